"""Statistics of weighted draws.

Weights are normalized and flat over chains and draws; None stands for equal ones. `on` says which
entries count (those of a site in a branch that was taken), in the shape of the draws; None for
all. Draws lie on the host and are reduced in float64, unless they are traced: then JAX does it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.inference.summary import weighted_quantile

__all__ = ["flat", "mean", "normalized", "quantile", "resampling_index"]


def _namespace(*arrays: Any) -> Any:
    return jnp if any(isinstance(x, jax.core.Tracer) for x in arrays) else np


def _wide(x: Any, xp: Any) -> Any:
    """In float64 (complex128) on the host, in JAX's default precision otherwise."""
    kind = complex if jnp.issubdtype(x.dtype, jnp.complexfloating) else float
    return x.astype(np.dtype(kind) if xp is np else jnp.result_type(kind))


def flat(x: Any) -> Any:
    """Chains and draws as one leading axis."""
    return x.reshape((x.shape[0] * x.shape[1], *x.shape[2:]))  # -1 fails on sites without elements


def normalized(log_weights: Any) -> Any:
    """Weights that sum to 1, flat."""
    xp = _namespace(log_weights)
    wide = _wide(xp.asarray(log_weights), xp).reshape(-1)
    weights = xp.exp(wide - wide.max())
    return weights / weights.sum()


def resampling_index(weights: Any) -> Any:
    """Systematic resampling with a fixed offset: the same draws on every call."""
    xp = _namespace(weights)
    n = weights.size
    cdf = xp.cumsum(weights)
    points = (xp.arange(n) + 0.5) / n * cdf[-1]
    return xp.minimum(xp.searchsorted(cdf, points), n - 1)


def mean(x: Any, weights: Any, on: Any = None) -> Any:
    """Mean over chains and draws, the two leading axes of `x`."""
    xp = _namespace(x, weights, on)
    values = flat(_wide(xp.asarray(x), xp))
    if weights is None and on is None:
        return values.mean(0)
    w = _per_entry(weights, len(values), values.ndim, xp)
    if on is not None:
        on = on.reshape(values.shape)
        values, w = xp.where(on, values, 0), xp.where(on, w, 0)
    with np.errstate(invalid="ignore"):  # never active: NaN
        return (w * values).sum(0) / w.sum(0)


def _per_entry(weights: Any, n: int, ndim: int, xp: Any) -> Any:
    w = xp.ones(n) if weights is None else weights
    return w.reshape((-1,) + (1,) * (ndim - 1))


def quantile(x: Any, q: np.ndarray, weights: Any, on: Any = None) -> Any:
    """Quantiles over chains and draws, shape `q.shape + x.shape[2:]`."""
    xp = _namespace(x, weights, on)
    values = flat(xp.asarray(x))
    if weights is None and on is None:
        return xp.quantile(values, q, axis=0)
    levels = np.atleast_1d(q)
    if not values.size:
        return xp.zeros((*q.shape, *x.shape[2:]))
    columns = values.reshape(len(values), -1).T
    w = xp.broadcast_to(_per_entry(weights, len(values), 2, xp).T, columns.shape)
    if on is not None:
        w = xp.where(on.reshape(len(values), -1).T, w, 0)
    one = _traced_column if xp is jnp else _column
    out = xp.stack([one(c, v, levels) for c, v in zip(columns, w, strict=True)], -1)
    return out.reshape((*q.shape, *x.shape[2:]))


def _column(x: np.ndarray, w: np.ndarray, levels: np.ndarray) -> np.ndarray:
    used = w > 0
    return weighted_quantile(x[used], w[used], levels) if used.any() else levels + np.nan


def _traced_column(x: Any, w: Any, levels: np.ndarray) -> Any:
    """As `weighted_quantile`; draws without weight are sorted to the end."""
    order = jnp.lexsort((x, w <= 0))
    x, w = x[order], w[order] / w.sum()
    alive, cdf = jnp.sum(w > 0), jnp.cumsum(w)
    last = jnp.maximum(alive - 1, 0)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x[jnp.minimum(jnp.searchsorted(cdf, levels - 1e-6), last)].astype(cdf.dtype)
    position = (cdf - w / 2 - w[0] / 2) / jnp.maximum(1 - w[0] / 2 - w[last] / 2, 1e-30)
    found = jnp.interp(levels, position, jnp.where(w > 0, x, x[last]))
    return jnp.where(alive > 0, jnp.where(alive == 1, x[0], found), jnp.nan)
