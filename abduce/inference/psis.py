"""Pareto-smoothed importance sampling: steadier weights, and a measure of their trustworthiness.

The largest importance ratios are modelled by a generalized Pareto distribution with shape `k` and
replaced by its expected order statistics. A large `k` says that the ratios have a tail too heavy
for the number of draws: moments above order `1 / k` do not exist, and estimates converge slowly
or not at all.

References: Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling", Journal
of Machine Learning Research 25 (2024); Zhang and Stephens, "A new and efficient estimation method
for the generalized Pareto distribution", Technometrics 51 (2009).
"""

import math

import numpy as np
from scipy.special import logsumexp

from abduce.errors import Degenerate, InvalidValue

__all__ = ["fit_generalized_pareto", "khat_threshold", "psis", "weights_ess"]

LEVEL = 0.01  # nats; largest weights this close are equal, up to the rounding of float32
MIN_TAIL = 5  # fewer tail points than this do not determine a shape


def psis(log_weights, relative_efficiency: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Smooths importance weights and estimates the shape of their tail.

    Args:
        log_weights: Unnormalized, nats, shape `(..., draw)`; `-inf` is a dead draw.
        relative_efficiency: Effective over actual number of draws, where the draws come from a
            Markov chain; 1 for independent draws.

    Returns:
        smoothed: Log weights of the same shape and on the same scale (unnormalized), never above
            the largest raw one. `logsumexp(smoothed) - log(draws)` estimates the log evidence.
        k: Shape `(...)`, the tail's shape. Compare with `khat_threshold`. `inf` where fewer than
            five draws lie in the tail, which is too few to judge; `-inf` where the largest
            weights are equal up to 1%, so that there is no tail to smooth.

    Raises:
        InvalidValue: A log weight is NaN or `+inf`, or there are none.
        Degenerate: All log weights of a set are `-inf`.

    Example:
        >>> smoothed, k = psis(np.random.default_rng(0).normal(size=1000))
        >>> bool(k < khat_threshold(1000))
        True
    """
    log_weights = _checked("psis", log_weights)
    flat = log_weights.reshape(-1, log_weights.shape[-1])
    smoothed, k = np.empty_like(flat), np.empty(len(flat))
    for i, row in enumerate(flat):
        smoothed[i], k[i] = _smooth(row, relative_efficiency)
    return smoothed.reshape(log_weights.shape), k.reshape(log_weights.shape[:-1])[()]


def khat_threshold(num_draws: int) -> float:
    """Largest tail shape at which this many draws give a reliable estimate.

    `min(1 - 1 / log10(S), 0.7)`, from Vehtari et al. (2024), section 3.2.4: 0.5 for 100 draws,
    0.7 from about 2200 draws on.

    Raises:
        InvalidValue: Fewer than two draws.
    """
    if num_draws < 2:
        raise InvalidValue(f"khat_threshold: needs at least 2 draws, got {num_draws}.")
    return min(1 - 1 / math.log10(num_draws), 0.7)


def weights_ess(log_weights) -> np.ndarray:
    """Kish's effective sample size, `(sum w)^2 / sum w^2`, between 1 and the number of draws.

    Args:
        log_weights: Unnormalized, nats, shape `(..., draw)`.

    Returns:
        Shape `(...)`.

    Raises:
        InvalidValue: A log weight is NaN or `+inf`, or there are none.
        Degenerate: All log weights of a set are `-inf`.
    """
    log_weights = _checked("weights_ess", log_weights)
    return np.exp(2 * logsumexp(log_weights, axis=-1) - logsumexp(2 * log_weights, axis=-1))[()]


def fit_generalized_pareto(exceedances: np.ndarray) -> tuple[float, float]:
    """Fits a generalized Pareto distribution on `(0, inf)` to exceedances over a threshold.

    The nearly Bayesian estimate of Zhang and Stephens (2009): the likelihood, profiled over the
    shape, is averaged over a grid of values of `theta = -k / sigma`. The shape is then pulled
    towards 0.5 with the weight of ten observations (Vehtari et al. 2024, appendix C).

    Args:
        exceedances: Positive, in increasing order, shape `(n,)`, `n >= 5`.

    Returns:
        The shape `k` and the scale `sigma`.
    """
    x, n = exceedances, len(exceedances)
    grid_size = 30 + int(math.sqrt(n))
    first_quartile = x[int(n / 4 + 0.5) - 1]
    j = np.arange(1, grid_size + 1)
    theta = 1 / x[-1] + (1 - np.sqrt(grid_size / (j - 0.5))) / (3 * first_quartile)
    shape = np.log1p(-theta[:, None] * x).mean(axis=1)  # minus Zhang and Stephens' k
    log_profile = n * (np.log(-theta / shape) - shape - 1)
    weights = np.exp(log_profile - logsumexp(log_profile))
    theta_hat = float(weights @ theta)
    k = float(np.log1p(-theta_hat * x).mean())
    sigma = -k / theta_hat
    return (n * k + 10 * 0.5) / (n + 10), sigma


def _checked(name: str, log_weights) -> np.ndarray:
    log_weights = np.asarray(log_weights, dtype=np.float64)
    if log_weights.ndim == 0 or log_weights.shape[-1] == 0:
        raise InvalidValue(
            f"{name}: log_weights must have shape (..., draw) with at least one draw, got "
            f"{log_weights.shape}."
        )
    bad = np.isnan(log_weights) | (log_weights == np.inf)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise InvalidValue(
            f"{name}: {int(bad.sum())} of {log_weights.size} log weights are NaN or +inf, first "
            f"at index {first}. Find the draws where the target or the proposal density is "
            "undefined; a draw outside the target's support has log weight -inf."
        )
    if (log_weights.max(axis=-1, initial=-np.inf) == -np.inf).any():
        raise Degenerate(
            f"{name}: all {log_weights.shape[-1]} log weights are -inf: no draw of the proposal "
            "has positive density under the target. Widen the proposal."
        )
    return log_weights


def _smooth(log_weights: np.ndarray, relative_efficiency: float) -> tuple[np.ndarray, float]:
    size, top = len(log_weights), log_weights.max()
    x = log_weights - top
    tail_size = math.ceil(min(size / 5, 3 * math.sqrt(size / relative_efficiency)))
    if tail_size >= size:
        return log_weights.copy(), math.inf
    order = np.argsort(x, kind="stable")
    # below the smallest normal float the exceedances would all be the weight itself
    cutoff = max(x[order[-tail_size - 1]], math.log(np.finfo(np.float64).tiny))
    if cutoff > -LEVEL:  # all of the tail is as large as the largest weight
        return log_weights.copy(), -math.inf
    tail = order[x[order] > cutoff]
    if len(tail) < MIN_TAIL:
        return log_weights.copy(), math.inf
    exceedances = np.exp(x[tail]) - math.exp(cutoff)
    if exceedances[0] == exceedances[-1]:
        return log_weights.copy(), -math.inf
    if exceedances[0] <= 0:  # weights equal up to rounding
        exceedances = np.maximum(exceedances, np.finfo(np.float64).tiny)
    k, sigma = fit_generalized_pareto(exceedances)
    if not (math.isfinite(k) and math.isfinite(sigma)):
        return log_weights.copy(), math.inf
    level = (np.arange(len(tail)) + 0.5) / len(tail)
    minus_log_survival = -np.log1p(-level)
    scaled = minus_log_survival if k == 0 else np.expm1(k * minus_log_survival) / k
    smoothed = x.copy()
    smoothed[tail] = np.minimum(np.log(sigma * scaled + math.exp(cutoff)), 0)
    return smoothed + top, k
