"""Adaptation: from starting points to a step size and a metric that all chains share.

1. Each chain descends to where the mass is (`descent`), which also gives a first metric.
2. Windows that grow by half. Draws of all chains together refit the metric after each; step sizes
   adapt inside a window by dual averaging and are averaged over the chains after it. Trajectories
   are capped at first, so that a bad metric cannot burn `2**max_tree_depth` gradients a draw.
3. When a window shows that the metric in use is as good as one fitted to fresh draws, and the
   chains agree, adaptation has nothing left to gain: a last window settles the step size and the
   warm-up ends, perhaps long before `num_warmup`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .chains import Chains, Draws, joined
from .linear_map import LinearMap, diagonal_map
from .machine import DualAverage
from .metric_choice import choose_metric, nonlinearity
from .report import split_rhat
from .settings import HMCConfig
from .start import approach, rescue
from .step_size import initial_log_step, tune

__all__ = ["AdaptTarget", "Warmup", "warm_up"]

AdaptTarget = Callable[[np.ndarray], tuple[Any, Callable[[np.ndarray], np.ndarray] | None] | None]

_FIRST_WINDOW, _GROWTH = 12, 1.5
_FINAL_DRAWS = 90  # to choose the step size that sampling uses
_FIRST_DEPTH = 4  # the cap of the first window; one more in each that follows
_GOOD_ENOUGH = 1.15  # cost of the metric in use over that of a refitted one
_TARGET_WINDOWS = (1, 3)  # after these the density may adapt to the draws
_AGREEMENT = 1.1  # largest split R-hat at which chains count as mixed during warm-up


@dataclass
class Warmup:
    """What the warm-up found.

    Attributes:
        metric: The shared linear map (numpy).
        metric_kind: "diagonal", "low rank" or "dense".
        step_size: The shared step size.
        num_draws: Draws made by each chain.
        num_gradients: Evaluations of all chains, starting points and descent included.
        num_rescued: How often a chain was moved out of a mode of negligible mass.
        settled: Whether it ended because nothing was left to gain.
        history: One line per window, for `diagnostics`.
    """

    metric: LinearMap
    metric_kind: str = "diagonal"
    step_size: float = 1.0
    num_draws: int = 0
    num_gradients: int = 0
    num_rescued: int = 0
    settled: bool = False
    history: list[dict] = field(default_factory=list)


def warm_up(
    chains: Chains,
    config: HMCConfig,
    rank: int,
    advance: Callable[..., Draws],
    propose: Callable[[list[int]], None],
    adapt_target: AdaptTarget | None = None,
) -> Warmup:
    """Adapts step size and metric.

    Args:
        chains: With finite log density at their positions; left at the last warm-up draws.
        config: The settings.
        rank: Columns of the metric's layout.
        advance: `(num_draws, metric, **options) -> Draws`, which splits long windows into calls
            and reports progress.
        propose: Replaces the positions of the listed chains by new, finite starting points.
        adapt_target: From draws `(num_draws, dim)` to new data for the density and, if its
            coordinates change, the map of points into the new ones; None leaves it as it is.

    Returns:
        The result, also when `config.num_warmup` is 0 (an initial step size, unit metric).
    """
    unit = diagonal_map(np.ones(chains.dim), rank)
    warmup = Warmup(unit)
    if config.num_warmup > 0:
        first = approach(chains, unit, propose)
        if first is not None and config.adapt_mass_matrix:
            if config.dense_mass is False:
                first = diagonal_map(first.scale, rank)
            warmup.metric = first
            warmup.metric_kind = "dense" if first.is_structured else "diagonal"
    log_step = (
        initial_log_step(chains, warmup.metric, config.target_accept_prob)
        if config.step_size is None
        else float(np.log(config.step_size))
    )

    left = config.num_warmup
    reserve = min(_FINAL_DRAWS, left // 4) if config.adapt_step_size else 0
    size, index = _FIRST_WINDOW, 0
    recent: list[Draws] = []
    while left > reserve and not warmup.settled:
        # a window that would leave less than a longer one takes the rest
        count = min(size, left - reserve)
        if left - reserve - count < _GROWTH * count / 2:
            count = left - reserve
        # pulled towards larger steps, which are cheap to try (Hoffman and Gelman, 2014)
        chains.restart_averages(log_step, pull=np.log(2.0))
        draws = advance(
            count,
            warmup.metric,
            adapt=config.adapt_step_size,
            max_depth=min(config.max_tree_depth, _FIRST_DEPTH + index),
        )
        log_step = _pooled_log_step(chains, log_step, config)
        left -= count
        warmup.num_draws += count
        warmup.history.append(
            {
                "num_draws": count,
                "metric": warmup.metric_kind,
                "step_size": float(np.exp(log_step)),
                "mean_steps": float(np.mean(draws.stats["n_steps"])),
                "acceptance_rate": float(np.mean(draws.stats["acceptance_rate"])),
                "num_gradients": chains.num_gradients,
            }
        )
        moved = rescue(chains, draws, warmup.metric)
        warmup.num_rescued += moved
        if adapt_target is not None and index in _TARGET_WINDOWS:
            metric = _adapt_target(chains, draws, warmup.metric, adapt_target, rank, config)
            if metric is not None:  # gradients in the old coordinates are of no use
                warmup.metric, warmup.metric_kind, recent = metric, "diagonal", []
                size, index = int(size * _GROWTH), index + 1
                continue
        recent = [*recent[-1:], draws]
        if config.adapt_mass_matrix:
            warmup.settled = _refit(warmup, recent if index > 2 else [draws], config)
        else:
            warmup.settled = count >= 25 and _agree(draws)
        warmup.settled &= config.end_warmup_early and not moved
        size, index = int(size * _GROWTH), index + 1
    if reserve and recent:
        latest = joined(recent)
        uneven = nonlinearity(warmup.metric, latest.positions, latest.gradients)
        log_step = tune(
            chains,
            warmup.metric,
            log_step,
            reserve,
            config.target_accept_prob,
            config.max_tree_depth,
            advance,
            uneven,
        )
        warmup.num_draws += reserve
    warmup.step_size = float(np.exp(log_step))
    warmup.num_gradients = chains.num_gradients
    return warmup


def _adapt_target(
    chains: Chains,
    draws: Draws,
    metric: LinearMap,
    adapt_target: AdaptTarget,
    rank: int,
    config: HMCConfig,
) -> LinearMap | None:
    """Lets the density adapt; returns a new metric if its coordinates changed."""
    changed = adapt_target(draws.positions.reshape(-1, chains.dim))
    if changed is None:
        return None
    data, move = changed
    if move is None:
        chains.change_data(data, chains.positions)
        chains.evaluate(metric)
        return None
    chains.change_data(data, move(chains.positions))
    if config.adapt_mass_matrix:
        moved = move(draws.positions.reshape(-1, chains.dim)).reshape(draws.positions.shape)
        spread = np.median(moved.std(1), 0)  # of each chain about its own mean
        usable = np.isfinite(spread) & (spread > 0)
        metric = diagonal_map(np.where(usable, spread, 1.0), rank)
    chains.evaluate(metric)
    return metric


def _agree(draws: Draws) -> bool:
    values = np.concatenate([draws.positions, draws.stats["lp"][..., None]], -1)
    return bool(np.max(split_rhat(values)) < _AGREEMENT)


def _refit(warmup: Warmup, recent: list[Draws], config: HMCConfig) -> bool:
    """Refits the metric; returns whether it was already as good as it gets."""
    newest, together = recent[-1], joined(recent)
    num_chains, _, dim = together.positions.shape
    choice = choose_metric(together.positions, together.gradients, warmup.metric, config.dense_mass)
    warmup.history[-1] |= {
        "cost": choice.current_cost,
        "refitted": choice.cost,
        "choice": choice.kind,
    }
    usable = np.all(np.isfinite(choice.metric.factor)) and np.isfinite(choice.cost)
    enough = num_chains * newest.positions.shape[1] >= max(100, 2 * dim)
    settled = enough and choice.current_cost < _GOOD_ENOUGH * choice.cost and _agree(newest)
    if usable:
        warmup.metric, warmup.metric_kind = choice.metric, choice.kind
    return bool(settled)


def _pooled_log_step(chains: Chains, log_step: float, config: HMCConfig) -> float:
    if not config.adapt_step_size:
        return log_step
    steps = chains.averages[:, DualAverage._fields.index("log_step_average")]
    return float(np.median(steps)) if np.all(np.isfinite(steps)) else log_step
