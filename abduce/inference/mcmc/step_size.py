"""The step size: a first guess, and the choice that ends the warm-up.

A NUTS trajectory has 1, 3, 7, 15... steps, so its cost jumps where a step size is just too small
for one doubling less, and the cost of an independent draw can differ twofold between two step sizes
of nearly the same acceptance rate (for a whitened Gaussian: 3 steps of 1.0 against 7 of 0.8). Dual
averaging towards an acceptance rate cannot see that. So the last draws of the warm-up try a grid of
step sizes around the adapted one, and the one with the most effective draws per gradient is kept.
"""

from collections.abc import Callable

import numpy as np

from .chains import Chains, Draws
from .linear_map import LinearMap
from .metric_choice import whiten

__all__ = ["GRID", "initial_log_step", "tune"]

GRID = np.linspace(-0.36, 0.54, 6)  # added to the log of the adapted step size
_EVEN, _ROUGH = 0.25, 0.8  # unevenness of harmless targets, and of funnels
_FEWEST_DRAWS = 24  # of all chains together, for a step size to be judged


def initial_log_step(chains: Chains, metric: LinearMap, target: float) -> float:
    """Doubles or halves until one leapfrog step is accepted at about the target rate."""
    log_step, direction = float(np.log(chains.dim**-0.25)), 0
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


def tune(
    chains: Chains,
    metric: LinearMap,
    log_step: float,
    num_draws: int,
    target: float,
    max_depth: int,
    advance: Callable[..., Draws],
    unevenness: float,
) -> float:
    """Chooses the step size to sample with.

    Args:
        chains: The chains, which move on.
        metric: The final linear map.
        log_step: What dual averaging found.
        num_draws: Draws per chain to spend.
        target: Wanted acceptance rate.
        max_depth: Largest number of doublings.
        advance: `(num_draws, metric, **options) -> Draws`.
        unevenness: `metric_choice.nonlinearity` of the target. Where the curvature is the same
            nearly everywhere, larger steps are tried as well, and acceptance rates a little below
            the target are allowed (0.7 for a target of 0.8, 0.925 for 0.95). Elsewhere a step that
            does well on average gets stuck where the curvature is largest, so rates a little
            above the target are asked for (0.9 for 0.8), as dual averaging gives in practice.

    Returns:
        The log of the step size.
    """
    each = num_draws // len(GRID)
    if each * chains.num_chains < _FEWEST_DRAWS:
        return log_step
    slack = min(0.1, 0.5 * (1 - target))
    floor = target - slack if unevenness < _EVEN else target + slack
    rates, merits = [], []
    shift = 0.0 if unevenness < _EVEN else 0.5 if unevenness < _ROUGH else 1.0
    steps = log_step + GRID - shift * GRID[-1]
    for step in steps:
        chains.restart_averages(float(step))
        before = chains.positions[:, None].copy()
        draws = advance(each, metric, max_depth=max_depth)
        rates.append(float(np.mean(draws.stats["acceptance_rate"])))
        path = np.concatenate([before, draws.positions], 1)
        merits.append(_effective_share(path, metric) / float(np.mean(draws.stats["n_steps"])))
        if rates[-1] < floor - 0.1:
            break
    smooth = _smooth(np.array(rates))
    allowed = np.flatnonzero(smooth >= floor)
    if not len(allowed):
        return float(steps[0] - 0.3)
    return float(steps[max(allowed, key=lambda i: merits[i])])


def _effective_share(path: np.ndarray, metric: LinearMap) -> float:
    """Effective draws per draw, from how far positions and their squares move in one draw.

    With lag-one autocorrelation `r` the share is `(1 - r) / (1 + r)`; the worse of positions and
    squares counts, and the slower half of the coordinates.
    """
    z = whiten(metric, path - path.mean((0, 1)))
    shares = []
    for values in (z, z * z):
        variance = np.maximum(values.var((0, 1)), 1e-300)
        moved = np.mean(np.square(np.diff(values, axis=1)), (0, 1)) / (2 * variance)
        moved = np.sort(np.clip(moved, 1e-6, 1.9))
        shares.append(np.mean((moved / (2 - moved))[: (len(moved) + 1) // 2]))
    return float(min(shares))


def _smooth(rates: np.ndarray) -> np.ndarray:
    """A straight line through the logits, since rates fall with the step size."""
    logits = np.log(np.clip(rates, 1e-3, 1 - 1e-3) / (1 - np.clip(rates, 1e-3, 1 - 1e-3)))
    if len(rates) < 3:
        return rates
    index = np.arange(len(rates))
    slope, level = np.polyfit(index, logits, 1)
    return 1 / (1 + np.exp(-(level + min(slope, 0.0) * index)))
