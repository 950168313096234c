"""Ranks as uniform numbers, and tests of whether they are uniform that say in which way not.

If data sets come from the model and draws from its exact posterior, the rank of the true value
among `n` independent draws is uniform on `0..n` (Cook, Gelman and Rubin 2006; Talts et al. 2018).
With ties broken at random and a uniform number added, `u = (rank + U) / (n + 1)` is exactly
uniform on (0, 1), for discrete quantities and for unequal `n` too, and `z = Phi^-1(u)` is exactly
standard normal. Three tests share the false-alarm rate:

* location, `mean(z)`: is the posterior shifted? (40%)
* spread, `var(z)`, exactly chi-square: is it too narrow or too wide? (40%)
* shape, the largest pointwise surprise of the ECDF, calibrated over all points at once
  (Saeilynoja, Buerkner and Vehtari 2022): anything else (20%)

The first two are the most powerful tests there are if posteriors are about normal, and valid if
they are not.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln, ndtr, ndtri

from abduce.errors import InvalidValue

__all__ = ["Uniformity", "detectable", "ecdf_band", "ecdf_p_value", "pit", "uniformity"]

WEIGHTS = (0.4, 0.4, 0.2)
LEAST = 10  # uniform numbers below which there is nothing to test
_POINTS = 64
_DEEPEST = 1e-9  # p-values below this come from the union bound


def pit(
    truth: np.ndarray, draws: np.ndarray, counts: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """Randomized ranks of true values among draws, scaled to (0, 1).

    Args:
        truth: Shape `(dataset, ...)`. Not NaN.
        draws: Shape `(dataset, draw, ...)`.
        counts: How many of each data set's draws count (the first ones), shape `(dataset,)`; None
            for all.
        rng: Breaks ties.

    Returns:
        Shape `(dataset, ...)`: uniform if the truth is exchangeable with the draws.
    """
    truth, draws = np.asarray(truth), np.asarray(draws)
    if draws.shape[:1] + draws.shape[2:] != truth.shape or draws.ndim < 2:
        raise InvalidValue(
            f"pit: for true values of shape {truth.shape}, draws have shape (dataset, draw, ...), "
            f"got {draws.shape}."
        )
    extra = (1,) * (draws.ndim - 2)
    n = np.full(len(truth), draws.shape[1]) if counts is None else np.asarray(counts)
    used = (np.arange(draws.shape[1]) < n[:, None]).reshape(draws.shape[:2] + extra)
    below = (used & (draws < truth[:, None])).sum(1)
    ties = (used & (draws == truth[:, None])).sum(1)
    rank = below + np.floor(rng.random(truth.shape) * (ties + 1))
    u = (rank + rng.random(truth.shape)) / (n.reshape(-1, *extra) + 1)
    return np.clip(u, 1e-15, 1 - 1e-15)


@dataclass(frozen=True)
class Uniformity:
    """A test of numbers that should be uniform.

    Attributes:
        p_value: Of the three tests together.
        p_location, p_spread, p_shape: Each on its own.
        mean: Of `z = Phi^-1(u)`; should be 0.
        sd: Of `z`; should be 1.
    """

    p_value: float
    p_location: float
    p_spread: float
    p_shape: float
    mean: float
    sd: float

    @property
    def reason(self) -> str:
        """What is most wrong: "location", "spread", or "shape" where neither of these is."""
        if min(self.p_location, self.p_spread) > max(self.p_shape, 1e-3):
            return "shape"
        return "location" if self.p_location < self.p_spread else "spread"


def uniformity(u: np.ndarray) -> Uniformity:
    """Tests that independent numbers are uniform on (0, 1).

    Args:
        u: Shape `(n,)`, at least 10.

    Returns:
        A `Uniformity`; the p-values of location and spread are exact, so is that of the shape.

    Raises:
        InvalidValue: Too few numbers, or some outside (0, 1).
    """
    from scipy.stats import chi2  # slow to import

    u = np.asarray(u, np.float64)
    if u.ndim != 1 or len(u) < LEAST or not ((u > 0) & (u < 1)).all():
        raise InvalidValue(
            f"uniformity: expected a vector of at least {LEAST} numbers in (0, 1), got shape "
            f"{u.shape}. Make more runs: raise num_datasets or budget."
        )
    z, n = ndtri(u), len(u)
    p_location = 2 * ndtr(-math.sqrt(n) * abs(z.mean()))
    total = ((z - z.mean()) ** 2).sum()
    p_spread = 2 * min(chi2.cdf(total, n - 1), chi2.sf(total, n - 1))
    p_shape = ecdf_p_value(u)
    values = (float(p_location), float(p_spread), p_shape)
    p = min(1.0, *(v / w for v, w in zip(values, WEIGHTS, strict=True)))
    return Uniformity(p, *values, float(z.mean()), float(z.std(ddof=1)))


def detectable(n: int, alpha: float, power: float = 0.99) -> tuple[float, float]:
    """The errors that `uniformity` sees with the given probability, for normal posteriors.

    Args:
        n: Data sets.
        alpha: False-alarm rate of one quantity's test.
        power: Probability of an alarm.

    Returns:
        The shift, in posterior standard deviations; and by how much wide posteriors are wider than
        they should be (0.2: 20%).
    """
    from scipy.stats import chi2  # slow to import

    critical = -ndtri(WEIGHTS[0] * alpha / 2)
    shift = (critical + ndtri(power)) / math.sqrt(n)
    lower = chi2.ppf(WEIGHTS[1] * alpha / 2, n - 1)
    ratio = math.sqrt(chi2.ppf(power, n - 1) / lower)
    return float(shift), float(ratio - 1)


# ---------------------------------------------------------------- simultaneous bands


def _points(n: int) -> np.ndarray:
    size = min(_POINTS, n)
    return np.arange(1, size) / size


def ecdf_p_value(u: np.ndarray) -> float:
    """Tests the ECDF at 63 points together.

    At each point `x` the count of `u <= x` is binomial; the statistic is its smallest two-sided
    tail probability over the points. Its distribution is computed exactly, by the recursion of
    Saeilynoja et al. (2022, Algorithm 2).

    Args:
        u: Shape `(n,)`.

    Returns:
        The p-value; below 1e-9 an upper bound of it.
    """
    from scipy.stats import binom  # slow to import

    n = len(u)
    points = _points(n)
    counts = np.searchsorted(np.sort(u), points, side="right")
    tail = np.minimum(binom.cdf(counts, n, points), binom.cdf(n - counts, n, 1 - points))
    return _simultaneous(n, float(min(1.0, 2 * tail.min())))


@functools.lru_cache(maxsize=4096)
def _simultaneous(n: int, tail: float) -> float:
    """Probability that some point's two-sided tail probability is at most `tail`."""
    if tail <= 0:
        return 0.0
    bound = min(1.0, tail * (min(_POINTS, n) - 1))
    inside = _inside(n, *_limits(n, tail * (1 + 1e-9)))
    return bound if 1 - inside < _DEEPEST else min(1 - inside, bound)


def _limits(n: int, tail: float) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest count at each point with a tail probability above `tail`."""
    from scipy.stats import binom  # slow to import

    points = _points(n)
    half = min(tail / 2, 0.5)
    return binom.ppf(half, n, points).astype(int), n - binom.ppf(half, n, 1 - points).astype(int)


def _inside(n: int, low: np.ndarray, high: np.ndarray) -> float:
    """Probability that the counts stay within the limits at every point."""
    if (low > high).any():
        return 0.0
    log_factorial = gammaln(np.arange(n + 2) + 1.0)
    points = _points(n)
    state, start, before = np.ones(1), 0, 0.0
    for point, first, last in zip(points, low, high, strict=True):
        share = (point - before) / (1 - before)
        i = np.arange(start, start + len(state))[:, None]
        j = np.arange(first, last + 1)[None, :]
        step, room = np.maximum(j - i, 0), n - i
        rest = np.maximum(room - step, 0)
        log_p = (
            log_factorial[room] - log_factorial[step] - log_factorial[rest]
            + step * math.log(share) + rest * math.log1p(-share)
        )  # fmt: skip
        state = state @ np.where(j >= i, np.exp(log_p), 0.0)
        start, before = int(first), point
    return float(state.sum())


@functools.lru_cache(maxsize=64)
def ecdf_band(n: int, alpha: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A band that the ECDF of `n` uniform numbers leaves anywhere at most `alpha` of the time.

    Args:
        n: Numbers.
        alpha: Rate of leaving it.

    Returns:
        The points, and the lower and upper end of the ECDF there.
    """
    outside, inside = 0.0, alpha  # the tail probability for which the band is just wide enough
    for _ in range(30):
        middle = (outside + inside) / 2
        if 1 - _inside(n, *_limits(n, middle)) <= alpha:
            outside = middle
        else:
            inside = middle
    low, high = _limits(n, max(outside, 1e-300))
    return _points(n), low / n, high / n
