"""Summary tables of posterior draws.

One row per scalar element. The interval is **equal-tailed**: for `interval=0.9` the 5% and the
95% quantile. Quantiles of real numbers interpolate linearly; those of integers and booleans are
values that occur (the inverse of the distribution function). Weighted draws replace the
Markov-chain columns by Kish's effective sample size, and the error of the mean by that of
self-normalized importance sampling (Owen, "Monte Carlo theory, methods and examples", 2013,
eq. 9.8); R-hat has no meaning there.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from abduce.errors import InvalidValue
from abduce.inference.diagnostics import convergence
from abduce.inference.psis import weights_ess
from abduce.inference.table import Summary, element_labels

__all__ = ["Summary", "element_labels", "summarize", "weighted_quantile"]


def summarize(
    draws: Mapping[str, np.ndarray],
    log_weights=None,
    interval: float = 0.9,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    coords: Mapping[str, Sequence] | None = None,
) -> Summary:
    """Summarizes draws: mean, sd, equal-tailed interval, effective sample sizes, R-hat, MCSE.

    Args:
        draws: Site to draws, each `(chain, draw, ...)`; real, integer or boolean. Sites may
            differ in the number of chains and draws.
        log_weights: Unnormalized log weights, nats, shape `(chain, draw)`; None for equal ones.
        interval: Probability inside the equal-tailed interval, in `(0, 1)`.
        dims: Site to the names of its trailing axes; None for an axis without a name.
        coords: Name of an axis to its labels, used in the row labels.

    Returns:
        A `Summary` with columns `mean, sd, 5%, 95%, ess_bulk, ess_tail, r_hat, mcse_mean`, or,
        with weights, `mean, sd, 5%, 95%, ess, mcse_mean`. What is undefined is NaN: see
        `abduce.inference.diagnostics`.

    Raises:
        InvalidValue: Shapes, `interval`, labels or weights do not fit.
    """
    if not 0 < interval < 1:
        raise InvalidValue(
            f"summarize: interval must lie strictly between 0 and 1, got {interval}. For 90% "
            "write interval=0.9."
        )
    draws = {site: _checked(site, x) for site, x in draws.items()}
    probs = ((1 - interval) / 2, (1 + interval) / 2)
    labels, sites = [], []
    for site, x in draws.items():
        names = element_labels(site, x.shape[2:], (dims or {}).get(site), coords)
        labels += names
        sites += [site] * len(names)
    if log_weights is None:
        tables = [_unweighted(x, probs) for x in draws.values()]
    else:
        log_weights = np.asarray(log_weights, dtype=np.float64)
        tables = [_weighted(site, x, log_weights, probs) for site, x in draws.items()]
    bounds = tuple(f"{100 * p:.6g}%" for p in probs)
    middle = ["ess_bulk", "ess_tail", "r_hat"] if log_weights is None else ["ess"]
    names = ["mean", "sd", *bounds, *middle, "mcse_mean"]
    values = np.concatenate([np.empty((len(names), 0)), *tables], axis=1)
    note = _note(draws, log_weights, interval)
    discrete = frozenset(site for site, x in draws.items() if x.dtype.kind in "iub")
    columns = dict(zip(names, values, strict=True))
    return Summary(tuple(labels), tuple(sites), columns, note, discrete)


def weighted_quantile(x, weights, probs) -> np.ndarray:
    """Quantiles of weighted draws along the first axis.

    Sorted draws `x_1 <= ... <= x_n` with weights `w` stand at the levels
    `(w_1 + ... + w_k - w_k / 2 - w_1 / 2) / (1 - w_1 / 2 - w_n / 2)`, linear in between; equal
    weights give the usual `(k - 1) / (n - 1)`. Integers and booleans are not interpolated: their
    quantile is the smallest value at which the distribution function reaches the level.

    Args:
        x: Draws, shape `(draw, ...)`.
        weights: Not negative, shape `(draw,)`; they need not sum to 1.
        probs: Levels in `[0, 1]`, shape `(level,)`.

    Returns:
        Shape `(level, ...)`, float64.
    """
    x, weights, probs = np.asarray(x), np.asarray(weights, np.float64), np.asarray(probs)
    is_discrete = x.dtype.kind in "iub"
    alive = weights > 0
    flat = x.reshape(len(x), math.prod(x.shape[1:]))[alive]
    weights = weights[alive] / weights.sum()
    order = np.argsort(flat, axis=0, kind="stable")
    result = np.empty((len(probs), flat.shape[1]))
    for j in range(flat.shape[1]):
        values, w = flat[order[:, j], j].astype(np.float64), weights[order[:, j]]
        if np.isnan(values).any():
            result[:, j] = np.nan
        elif is_discrete or len(values) == 1:
            reached = np.searchsorted(np.cumsum(w), probs - 1e-12)  # rounding of the sum
            result[:, j] = values[np.minimum(reached, len(values) - 1)]
        else:
            levels = (np.cumsum(w) - w / 2 - w[0] / 2) / (1 - w[0] / 2 - w[-1] / 2)
            result[:, j] = np.interp(probs, levels, values)
    return result.reshape((len(probs), *x.shape[1:]))


def _checked(site: str, x) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim < 2:
        raise InvalidValue(
            f'summarize: draws["{site}"] must have shape (chain, draw, ...), got {x.shape}.'
        )
    if x.dtype.kind not in "fiub":  # bfloat16 and its kin count as void in numpy
        try:
            x = x.astype(np.float64, casting="same_kind" if x.dtype.kind != "V" else "unsafe")
        except (TypeError, ValueError) as error:
            raise InvalidValue(
                f'summarize: draws["{site}"] must be real, integer or boolean, got {x.dtype}.'
            ) from error
    return x


def _flat(x: np.ndarray) -> np.ndarray:
    """Shape (chain * draw, element); sizes spelled out, since -1 is ambiguous without draws."""
    return x.reshape(x.shape[0] * x.shape[1], math.prod(x.shape[2:]))


def _unweighted(x: np.ndarray, probs) -> np.ndarray:
    flat = _flat(x)
    real = flat.astype(np.float64)
    method = "inverted_cdf" if x.dtype.kind in "iub" else "linear"
    size = len(real)
    nothing = np.full((1, flat.shape[1]), np.nan)
    with np.errstate(invalid="ignore", over="ignore"):
        mean = real.mean(axis=0)[None] if size else nothing
        sd = real.std(axis=0, ddof=1)[None] if size > 1 else nothing
        quantiles = np.quantile(real, probs, axis=0, method=method) if size else nothing[[0, 0]]
    diagnostics = convergence(x)
    return np.concatenate(
        [mean, sd, quantiles]
        + [diagnostics[k].reshape(1, -1) for k in ("ess_bulk", "ess_tail", "r_hat", "mcse_mean")]
    )


def _weighted(site: str, x: np.ndarray, log_weights: np.ndarray, probs) -> np.ndarray:
    if log_weights.shape != x.shape[:2]:
        raise InvalidValue(
            f"summarize: log_weights must have the (chain, draw) shape of the draws, "
            f'{x.shape[:2]} for site "{site}", got {log_weights.shape}.'
        )
    ess = float(weights_ess(log_weights.reshape(-1)))
    weights = np.exp(log_weights.reshape(-1) - log_weights.max())
    weights /= weights.sum()
    alive = weights > 0  # a dead draw may hold anything, NaN too
    weights = weights[alive]
    flat = _flat(x)[alive]
    real = flat.astype(np.float64)
    mean = weights @ real
    deviations = (real - mean) ** 2
    sd = np.sqrt(weights @ deviations)
    error = np.sqrt(weights**2 @ deviations)
    quantiles = weighted_quantile(flat, weights, probs)
    size = np.full((1, len(mean)), ess)
    return np.concatenate([mean[None], sd[None], quantiles, size, error[None]])


def _note(draws, log_weights, interval) -> str:
    shapes = {x.shape[:2] for x in draws.values()}
    percent = f"{100 * interval:.6g}% equal-tailed interval"
    if len(shapes) != 1:
        return percent
    chains, count = shapes.pop()
    size = f"{chains} chain{'s' if chains != 1 else ''} x {count} draws"
    if log_weights is not None:
        size = f"{chains * count} weighted draws"
    return f"{size}, {percent}"
