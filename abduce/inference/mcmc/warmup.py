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

import numpy as np

from .chains import Chains, Draws
from .descent import descend
from .linear_map import LinearMap, diagonal_map
from .metric_choice import choose_metric, inverse_hessian_map
from .settings import HMCConfig
from .trajectory import DualAverage

__all__ = ["Warmup", "split_rhat", "warm_up"]

_FIRST_WINDOW, _GROWTH = 12, 1.5
_FIRST_DEPTH = 4  # the cap of the first window; one more in each that follows
_GOOD_ENOUGH = 1.15  # cost of the metric in use over that of a refitted one
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
        settled: Whether it ended because nothing was left to gain.
        history: One line per window, for `diagnostics`.
    """

    metric: LinearMap
    metric_kind: str = "diagonal"
    step_size: float = 1.0
    num_draws: int = 0
    num_gradients: int = 0
    settled: bool = False
    history: list[dict] = field(default_factory=list)


def warm_up(chains: Chains, config: HMCConfig, rank: int,
            advance: Callable[..., Draws]) -> Warmup:
    """Adapts step size and metric.

    Args:
        chains: With finite log density at their positions; left at the last warm-up draws.
        config: The settings.
        rank: Columns of the metric's layout.
        advance: `(num_draws, metric, **options) -> Draws`, which splits long windows into calls
            and reports progress.

    Returns:
        The result, also when `config.num_warmup` is 0 (an initial step size, unit metric).
    """
    unit = diagonal_map(np.ones(chains.dim), rank)
    warmup = Warmup(unit)
    if config.num_warmup > 0:
        warmup.metric, warmup.metric_kind = _descend(chains, unit, config)
    log_step = (_initial_log_step(chains, warmup.metric, config.target_accept_prob)
                if config.step_size is None else float(np.log(config.step_size)))

    left = config.num_warmup
    final = min(50, max(1, left // 5))
    size, index = _FIRST_WINDOW, 0
    recent: list[Draws] = []
    while left > 0:
        # a window that would leave less than a longer one takes the rest
        last = left <= final or warmup.settled
        count = min(left, final) if last else min(size, left - final)
        if not last and left - final - count < _GROWTH * count / 2:
            count = left - final
        # pulled towards larger steps, which are cheap to try (Hoffman and Gelman, 2014)
        chains.restart_averages(log_step, pull=np.log(2.0))
        draws = advance(count, warmup.metric, max_depth=min(config.max_tree_depth,
                        config.max_tree_depth if last else _FIRST_DEPTH + index),
                        adapt=config.adapt_step_size)
        log_step = _pooled_log_step(chains, log_step, config)
        left -= count
        warmup.num_draws += count
        warmup.history.append({
            "num_draws": count, "metric": warmup.metric_kind, "step_size": float(np.exp(log_step)),
            "mean_steps": float(np.mean(draws.stats["n_steps"])),
            "acceptance_rate": float(np.mean(draws.stats["acceptance_rate"])),
            "num_gradients": chains.num_gradients})
        if last:
            break
        if config.adapt_mass_matrix:
            recent = [*recent[-1:], draws] if index > 2 else [draws]
            warmup.settled = _refit(warmup, recent, config)
        elif config.end_warmup_early:
            warmup.settled = _agree(draws) and count >= 25
        warmup.settled &= config.end_warmup_early
        size, index = int(size * _GROWTH), index + 1
    warmup.step_size = float(np.exp(log_step))
    warmup.num_gradients = chains.num_gradients
    return warmup


def split_rhat(values: np.ndarray) -> np.ndarray:
    """Split R-hat (Gelman et al., BDA3, section 11.4).

    Args:
        values: `(num_chains, num_draws, ...)`, at least 4 draws.

    Returns:
        One number per trailing element; infinite where chains are constant and differ.
    """
    half = values.shape[1] // 2
    parts = np.concatenate([values[:, :half], values[:, -half:]]).astype(np.float64)
    within = parts.var(1, ddof=1).mean(0)
    between = parts.mean(1).var(0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sqrt((half - 1) / half + between / within)
    return np.where(within > 0, ratio, np.where(between > 0, np.inf, 1.0))


def _agree(draws: Draws) -> bool:
    values = np.concatenate([draws.positions, draws.stats["lp"][..., None]], -1)
    return bool(np.max(split_rhat(values)) < _AGREEMENT)


def _refit(warmup: Warmup, recent: list[Draws], config: HMCConfig) -> bool:
    """Refits the metric; returns whether it was already as good as it gets."""
    newest = recent[-1]
    positions = np.concatenate([d.positions for d in recent], 1)
    gradients = np.concatenate([d.gradients for d in recent], 1)
    num_chains, num_draws, dim = positions.shape
    choice = choose_metric(positions, gradients, warmup.metric, config.dense_mass)
    warmup.history[-1] |= {"cost": choice.current_cost, "refitted": choice.cost,
                           "choice": choice.kind}
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


def _initial_log_step(chains: Chains, metric: LinearMap, target: float) -> float:
    """Doubles or halves until one leapfrog step is accepted at about the target rate."""
    log_step, direction = float(np.log(chains.dim ** -0.25)), 0
    for _ in range(40):
        chains.restart_averages(log_step)
        draws = chains.advance(1, metric, max_depth=1)
        good = np.median(draws.stats["acceptance_rate"]) > target
        if direction == 0:
            direction = 1 if good else -1
        if good != (direction == 1):
            return log_step if good else log_step - np.log(2.0)
        log_step += direction * np.log(2.0)
    return log_step


def _descend(chains: Chains, unit: LinearMap, config: HMCConfig) -> tuple[LinearMap, str]:
    """Runs the descents of all chains in step; returns a first metric."""
    searches = {i: descend(chains.positions[i]) for i in range(chains.num_chains)}
    ends = {}
    for i, search in list(searches.items()):
        chains.positions[i] = next(search)
    while searches:
        chains.evaluate(unit, list(searches))
        for i, search in list(searches.items()):
            try:
                chains.positions[i] = search.send(
                    (float(chains.log_densities[i]), chains.gradients[i].copy()))
            except StopIteration as stop:
                ends[i] = stop.value
                del searches[i]
    for i, end in ends.items():
        chains.positions[i] = end.position
    estimates = [end.inverse_hessian for end in ends.values() if end.inverse_hessian is not None]
    rank = unit.factor.shape[1]
    if estimates and config.adapt_mass_matrix:
        metric = inverse_hessian_map(np.mean(estimates, 0), rank)
        if np.all(np.isfinite(metric.factor)):
            kind = "dense" if metric.is_structured else "diagonal"
            if kind == "diagonal" or config.dense_mass is not False:
                return metric, kind
            return diagonal_map(metric.scale, rank), "diagonal"
    return unit, "diagonal"
