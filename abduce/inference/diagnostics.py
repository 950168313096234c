"""Convergence diagnostics of Markov chains: effective sample size, R-hat, Monte Carlo error.

Draws have shape `(chain, draw, ...)`; every function treats each trailing element on its own and
returns an array of the trailing shape. Everything is numpy in float64, whatever the input type.

Notation. With `m` chains of `n` draws (each original chain cut in halves, so a drift inside a
chain shows as a difference between chains), `W` is the mean of the within-chain variances, `B / n`
the variance of the chain means, and `V = W (n - 1) / n + B / n` the pooled estimate of the
variance. The autocorrelation at lag `t` is `rho(t) = 1 - (W - acov(t)) / V`, with `acov(t)` the
mean over chains of the autocovariance. Sums of neighbouring pairs `rho(2k) + rho(2k + 1)` are
positive and decreasing for a reversible chain, which is where the sum is cut (Geyer's initial
monotone sequence). Then `ess = m n / tau` with `tau = -1 + 2 sum_t rho(t)`.

What is defined when:

- A NaN or an infinity among an element's draws makes all its diagnostics NaN.
- Draws that are all equal carry no information about mixing: ESS and R-hat are NaN, Monte Carlo
  errors are NaN. Chains stuck at *different* constants give R-hat `inf`.
- Fewer than four draws a chain: NaN.
- One chain is enough, its two halves are compared.
- ESS never exceeds `S log10(S)` for `S` draws, as in the paper below.

References: Vehtari, Gelman, Simpson, Carpenter, Burkner, "Rank-normalization, folding, and
localization: an improved R-hat for assessing convergence of MCMC", Bayesian Analysis 16 (2021);
Geyer, "Practical Markov chain Monte Carlo", Statistical Science 7 (1992); Betancourt, "Diagnosing
suboptimal cotangent disintegrations in Hamiltonian Monte Carlo" (2016) for `bfmi`.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import betaincinv, ndtri

from abduce.errors import InvalidValue

__all__ = [
    "bfmi",
    "convergence",
    "ess",
    "ess_bulk",
    "ess_mean",
    "ess_quantile",
    "ess_sd",
    "ess_tail",
    "mcse_mean",
    "mcse_quantile",
    "mcse_sd",
    "rhat",
]

MIN_DRAWS = 4  # two a half: one lag
TAIL = (0.05, 0.95)
BLOCK = 1 << 15  # draws handled at a time: bounds memory, and keeps the work in cache


def ess_bulk(x) -> np.ndarray:
    """Effective sample size of the rank-normalized draws: how well the bulk is explored.

    Args:
        x: Draws, shape `(chain, draw, ...)`.

    Returns:
        Shape `(...)`. Vehtari et al. (2021) ask for at least 100 a chain.

    Example:
        >>> ess_bulk(np.random.default_rng(0).normal(size=(4, 1000, 3))).shape
        (3,)
    """
    return _apply("ess_bulk", x, lambda a: _ess(_rank_normalize(_split(a))[0]))


def ess_tail(x) -> np.ndarray:
    """Smaller of the effective sample sizes of the 5% and the 95% quantile.

    A discrete site's quantile may be its largest value; then the indicator of lying strictly
    below it counts, since that of lying at or below it is constant.

    Args:
        x: Draws, shape `(chain, draw, ...)`.

    Returns:
        Shape `(...)`.
    """
    return _apply("ess_tail", x, lambda a: _tail(a, _sorted(a)))


def ess_mean(x) -> np.ndarray:
    """Effective sample size for the mean; needs a finite variance, unlike `ess_bulk`.

    Args:
        x: Draws, shape `(chain, draw, ...)`.

    Returns:
        Shape `(...)`.
    """
    return _apply("ess_mean", x, lambda a: _ess(_split(_standardize(a))))


def ess_sd(x) -> np.ndarray:
    """Effective sample size for the standard deviation: that of the squared deviations.

    Args:
        x: Draws, shape `(chain, draw, ...)`.

    Returns:
        Shape `(...)`.
    """
    return _apply("ess_sd", x, lambda a: _ess(_split(_squared_deviations(a))))


def ess_quantile(x, prob: float) -> np.ndarray:
    """Effective sample size of the `prob` quantile: that of the indicator of lying below it.

    Args:
        x: Draws, shape `(chain, draw, ...)`.
        prob: In `(0, 1)`.

    Returns:
        Shape `(...)`.
    """
    _check_prob("ess_quantile", prob)
    return _apply("ess_quantile", x, lambda a: _ess_below(a, _quantile(_sorted(a), prob)))


def ess(x, method: str = "bulk", prob: float | None = None) -> np.ndarray:
    """Effective sample size by the named method.

    Args:
        x: Draws, shape `(chain, draw, ...)`.
        method: "bulk", "tail", "mean", "sd", "median" or "quantile".
        prob: The quantile, for `method="quantile"` only.

    Returns:
        Shape `(...)`.

    Raises:
        InvalidValue: The method is unknown, or `prob` is missing or superfluous.
    """
    plain = {"bulk": ess_bulk, "tail": ess_tail, "mean": ess_mean, "sd": ess_sd}
    if (method == "quantile") != (prob is not None):
        raise InvalidValue(
            f'ess: method={method!r} with prob={prob}; prob goes with method="quantile" alone.'
        )
    if prob is not None:
        return ess_quantile(x, prob)
    if method == "median":
        return ess_quantile(x, 0.5)
    if method not in plain:
        names = [*plain, "median", "quantile"]
        raise InvalidValue(f"ess: unknown method {method!r}; choose from {names}.")
    return plain[method](x)


def rhat(x) -> np.ndarray:
    """Potential scale reduction: larger of the rank-normalized split R-hat and its folded form.

    The first sees chains that differ in location, the second (on distances from the median)
    chains that differ in scale.

    Args:
        x: Draws, shape `(chain, draw, ...)`.

    Returns:
        Shape `(...)`. Near 1 when the chains agree; above 1.01 they should not be trusted yet.
    """
    return _apply("rhat", x, _rhat)


def mcse_mean(x) -> np.ndarray:
    """Monte Carlo standard error of the mean, `sd / sqrt(ess_mean)`, in units of `x`.

    Args:
        x: Draws, shape `(chain, draw, ...)`.

    Returns:
        Shape `(...)`.
    """
    return _apply("mcse_mean", x, _mcse_mean)


def mcse_sd(x) -> np.ndarray:
    """Monte Carlo standard error of the standard deviation, in units of `x`.

    By the delta method from that of the variance: `sqrt(var(d) / ess_sd / (4 mean(d)))` with `d`
    the squared deviations from the mean.

    Args:
        x: Draws, shape `(chain, draw, ...)`.

    Returns:
        Shape `(...)`.
    """

    def compute(a):
        d = _squared_deviations(a)  # in units of the squared scale
        mean = d.mean(axis=(1, 2))
        return _scale(a) * np.sqrt(d.var(axis=(1, 2)) / _ess(_split(d)) / (4 * mean))

    return _apply("mcse_sd", x, compute)


def mcse_quantile(x, prob: float) -> np.ndarray:
    """Monte Carlo standard error of the `prob` quantile, in units of `x`.

    Half the distance between the order statistics at the 16% and 84% points of a beta
    distribution for the quantile's level (Vehtari et al. 2021, section 4.4).

    Args:
        x: Draws, shape `(chain, draw, ...)`.
        prob: In `(0, 1)`.

    Returns:
        Shape `(...)`.
    """
    _check_prob("mcse_quantile", prob)

    def compute(a):
        ordered = _sorted(a)
        size = ordered.shape[1]
        count = _ess_below(a, _quantile(ordered, prob))
        one_sd = np.array([0.1586553, 0.8413447])[:, None]  # of a normal distribution
        level = betaincinv(count * prob + 1, count * (1 - prob) + 1, one_sd)
        position = np.nan_to_num(level * size - 1)
        low = np.floor(np.maximum(position[0], 0)).astype(int)
        high = np.ceil(np.minimum(position[1], size - 1)).astype(int)
        rows = np.arange(len(ordered))
        error = (ordered[rows, high] - ordered[rows, low]) / 2
        return np.where(np.isnan(count), np.nan, error)

    return _apply("mcse_quantile", x, compute)


def bfmi(energy) -> np.ndarray:
    """Energy Bayesian fraction of missing information, one value a chain.

    The sum of squared changes of energy over that of its squared deviations from the mean. Below
    about 0.3, momentum draws move the energy too little in one step to explore heavy tails.

    Args:
        energy: Hamiltonian at each draw, nats, shape `(chain, draw)`.

    Returns:
        Shape `(chain,)`; NaN for a chain of fewer than two draws or of constant energy.
    """
    energy = np.asarray(energy, dtype=np.float64)
    if energy.ndim != 2:
        raise InvalidValue(f"bfmi: energy must have shape (chain, draw), got {energy.shape}.")
    if energy.shape[1] < 2:
        return np.full(energy.shape[0], np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        constant = np.ptp(energy, axis=1) == 0
        deviations = energy - energy.mean(axis=1, keepdims=True)
        ratio = (np.diff(energy, axis=1) ** 2).sum(axis=1) / (deviations**2).sum(axis=1)
    return np.where(constant, np.nan, ratio)


def convergence(x) -> dict[str, np.ndarray]:
    """The four columns of a summary table at once, sharing their work.

    Args:
        x: Draws, shape `(chain, draw, ...)`.

    Returns:
        `ess_bulk`, `ess_tail`, `r_hat` and `mcse_mean`, each of shape `(...)`, equal to the
        functions of these names (`r_hat` to `rhat`).
    """
    names = ("ess_bulk", "ess_tail", "r_hat", "mcse_mean")

    def compute(a):
        halves = _split(a)
        z, ordered = _rank_normalize(halves)
        folded, _ = _rank_normalize(_fold(halves, ordered))
        r_hat = np.maximum(_plain_rhat(z), _plain_rhat(folded))
        everything = ordered if halves.size == a.size else _sorted(a)
        return np.stack([_ess(z), _tail(a, everything), r_hat, _mcse_mean(a)])

    return dict(zip(names, _apply("convergence", x, compute, num_outputs=4), strict=True))


# Below, `a` has shape (element, chain, draw), float64, and results shape (element,).


def _apply(name: str, x, compute: Callable, num_outputs: int | None = None) -> np.ndarray:
    """Runs `compute` over blocks of elements, and puts NaN where it has no meaning."""
    x = np.asarray(x)
    if x.ndim < 2:
        raise InvalidValue(
            f"{name}: draws must have shape (chain, draw, ...), got {x.shape}. For a single chain "
            "write x[None]."
        )
    if x.dtype == object or not (np.can_cast(x.dtype, np.float64, "same_kind") or _is_small(x)):
        raise InvalidValue(f"{name}: draws must be real numbers, got dtype {x.dtype}.")
    shape, leading = x.shape[2:], () if num_outputs is None else (num_outputs,)
    flat = x.reshape(x.shape[0], x.shape[1], math.prod(shape))
    result = np.full((*leading, flat.shape[2]), np.nan)
    if x.shape[0] and x.shape[1] >= MIN_DRAWS:
        step = max(1, BLOCK // (x.shape[0] * x.shape[1]))
        for start in range(0, flat.shape[2], step):
            a = np.ascontiguousarray(
                np.moveaxis(flat[:, :, start : start + step], 2, 0), dtype=np.float64
            )
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                # a difference of infinities is NaN, so one comparison finds both
                spread = a.max(axis=(1, 2)) - a.min(axis=(1, 2))
                usable = (spread > 0) & np.isfinite(a.sum(axis=(1, 2)) * 0)
                if usable.all():
                    result[..., start : start + step] = compute(a)
                elif usable.any():
                    where = start + np.flatnonzero(usable)
                    result[..., where] = compute(a[usable])
    return result.reshape((*leading, *shape))[()]


def _is_small(x: np.ndarray) -> bool:
    """Whether the dtype is one of the machine-learning types numpy does not know."""
    return x.dtype.kind == "V" and x.dtype.names is None and x.dtype.name != "void"


def _check_prob(name: str, prob: float) -> None:
    if not 0 < prob < 1:
        raise InvalidValue(f"{name}: prob must lie strictly between 0 and 1, got {prob}.")


def _split(a: np.ndarray) -> np.ndarray:
    """Each chain as two; an odd number of draws loses the middle one."""
    half = a.shape[2] // 2
    return np.concatenate([a[:, :, :half], a[:, :, -half:]], axis=1)


def _scale(a: np.ndarray) -> np.ndarray:
    mean = a.mean(axis=(1, 2), keepdims=True)
    return np.abs(a - mean).max(axis=(1, 2))


def _standardize(a: np.ndarray) -> np.ndarray:
    """Centred, in units of the largest deviation, so that squares cannot over- or underflow."""
    centred = a - a.mean(axis=(1, 2), keepdims=True)
    return centred / np.abs(centred).max(axis=(1, 2), keepdims=True)


def _squared_deviations(a: np.ndarray) -> np.ndarray:
    return _standardize(a) ** 2


def _sorted(a: np.ndarray) -> np.ndarray:
    return np.sort(a.reshape(a.shape[0], -1), axis=1)


def _quantile(ordered: np.ndarray, prob: float) -> np.ndarray:
    """Linear interpolation of order statistics, each row of `ordered` being sorted."""
    position = prob * (ordered.shape[1] - 1)
    low = int(position)
    high = min(low + 1, ordered.shape[1] - 1)
    return ordered[:, low] + (ordered[:, high] - ordered[:, low]) * (position - low)


def _fold(a: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    return np.abs(a - _quantile(ordered, 0.5)[:, None, None])


def _rank_normalize(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normal scores of the ranks over all chains, ties averaged (Vehtari et al., eq. 14).

    Also returns all draws of each element in order, shape (element, chain * draw).
    """
    flat = a.reshape(a.shape[0], -1)
    size = flat.shape[1]
    order = np.argsort(flat, axis=1)
    ordered = np.take_along_axis(flat, order, axis=1)
    # there are only 2 S - 1 possible scores: cheaper to tabulate than to evaluate each
    scores = ndtri((np.arange(2 * size - 1) / 2 + 1 - 3 / 8) / (size + 1 / 4))
    is_tie = ordered[:, 1:] == ordered[:, :-1]
    if is_tie.any():
        index = np.arange(size)
        edge = np.ones((len(flat), 1), dtype=bool)
        first = np.maximum.accumulate(np.where(np.hstack([edge, ~is_tie]), index, 0), axis=1)
        last = np.where(np.hstack([~is_tie, edge]), index, size)
        last = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
        ranked = scores[first + last]  # the middle of a run of ties, in halves
    else:
        ranked = np.broadcast_to(scores[::2], flat.shape)
    z = np.empty_like(flat)
    np.put_along_axis(z, order, ranked, axis=1)
    return z.reshape(a.shape), ordered


def _plain_rhat(a: np.ndarray) -> np.ndarray:
    """Gelman and Rubin's statistic of chains taken as they are (eq. 4)."""
    n = a.shape[2]
    is_stuck = (a == a[:, :, :1]).all(axis=2)  # else rounding gives these a variance
    within = np.where(is_stuck, 0, a.var(axis=2, ddof=1)).mean(axis=1)
    between = a.mean(axis=2).var(axis=1, ddof=1)
    return np.sqrt((n - 1) / n + between / within)


def _rhat(a: np.ndarray) -> np.ndarray:
    halves = _split(a)
    z, ordered = _rank_normalize(halves)
    folded, _ = _rank_normalize(_fold(halves, ordered))
    return np.maximum(_plain_rhat(z), _plain_rhat(folded))


def _tail(a: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    return np.minimum(*(_ess_below(a, _quantile(ordered, prob)) for prob in TAIL))


def _ess_below(a: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Of the indicator `a <= threshold`, or `a < threshold` where the former is always true."""
    threshold = threshold[:, None, None]
    is_largest = threshold >= a.max(axis=(1, 2), keepdims=True)
    below = np.where(is_largest, a < threshold, a <= threshold)
    return _ess(_split(below.astype(np.float64)))


def _mcse_mean(a: np.ndarray) -> np.ndarray:
    s = _standardize(a)
    return _scale(a) * s.std(axis=(1, 2), ddof=1) / np.sqrt(_ess(_split(s)))


def _ess(a: np.ndarray) -> np.ndarray:
    """Effective sample size of chains taken as they are; NaN where all values are equal."""
    _, m, n = a.shape
    means = a.mean(axis=2, keepdims=True)
    centred = a - means
    length = next_fast_len(2 * n, real=True)  # zero padding keeps the correlation linear
    spectrum = rfft(centred, n=length, axis=2)
    # the transform is linear: chains are averaged here, for one inverse transform an element
    power = np.einsum("pmf,pmf->pf", spectrum, spectrum.conj()).real / m
    acov = irfft(power, n=length, axis=1)[:, :n] / n
    within = acov[:, :1] * n / (n - 1)
    pooled = acov[:, :1] + (means[:, :, 0].var(axis=1, ddof=1)[:, None] if m > 1 else 0.0)
    rho = 1 - (within - acov) / pooled
    rho[:, 0] = 1
    last = max((n - 3) // 2, 0)  # the last pair of lags that may be looked at
    pairs = rho[:, : 2 * last + 2].reshape(len(rho), last + 1, 2).sum(axis=2)
    stops = pairs <= 0
    cut = np.where(stops.any(axis=1), stops.argmax(axis=1), last)
    monotone = np.minimum.accumulate(pairs, axis=1)
    total = np.where(np.arange(last + 1) < cut[:, None], monotone, 0).sum(axis=1)
    # the even lag at the cut, if positive, reduces the variance of the estimate (Geyer 1992)
    tau = -1 + 2 * total + np.maximum(rho[np.arange(len(rho)), 2 * cut], 0)
    size = m * n
    result = size / np.maximum(tau, 1 / np.log10(size))
    return np.where((a == a[:, :1, :1]).all(axis=(1, 2)), np.nan, result)
