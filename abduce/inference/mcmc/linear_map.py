"""The metric of HMC as a linear change of coordinates.

A target with position `q` is explored in coordinates `z` with `q = A z`, where `A A^T` is the
metric's estimate of the posterior covariance (the inverse mass matrix). In `z` the momentum is
standard normal, so kinetic energy is `|p|^2 / 2` without cancellation and a U-turn is a plain dot
product. A diagonal, a low-rank and a dense metric are data of the same compiled program.

Two layouts, chosen by the shape of `factor`:

- square, `(dim, dim)`: `A = factor` when `is_structured`, else `A = diag(scale)`;
- tall, `(dim, rank)`: `A = diag(scale) (I + U diag(core) U^T)` with `U = factor` orthonormal (zero
  columns are unused), as in "Sampling with low-rank metrics by the Fisher divergence"
  (arXiv 2603.18845).
"""

from typing import NamedTuple

import jax
import numpy as np
from jax import lax

__all__ = ["DENSE_LIMIT", "LOW_RANK", "LinearMap", "diagonal_map", "layout_rank", "pull", "push"]

DENSE_LIMIT = 200  # largest dimension whose metric is laid out as a square matrix
LOW_RANK = 24  # columns of the tall layout
_ALWAYS_DENSE = 16  # below this a branch costs more than the product it avoids


class LinearMap(NamedTuple):
    """`q = A z`; see the module's docstring."""

    scale: jax.Array  # (dim,)
    factor: jax.Array  # (dim, dim) or (dim, rank)
    core: jax.Array  # (rank,)
    is_structured: jax.Array  # bool (): False means A = diag(scale)


def layout_rank(dim: int, dense_mass: bool | None) -> int:
    """How many columns `factor` has for a target of this dimension."""
    if dense_mass is True or dim <= DENSE_LIMIT:
        return dim
    return 1 if dense_mass is False else min(LOW_RANK, dim)


def diagonal_map(scale: np.ndarray, rank: int) -> LinearMap:
    """A diagonal map in a given layout (numpy arrays, dtype of `scale`)."""
    dim, dtype = scale.shape[0], scale.dtype
    factor = np.diag(scale) if rank == dim else np.zeros((dim, rank), dtype)
    return LinearMap(scale, factor, np.zeros(rank, dtype), np.array(False))


def push(metric: LinearMap, momentum: jax.Array) -> jax.Array:
    """`A p`: the velocity of `q`, shape `(dim,)`."""
    dim, rank = metric.factor.shape
    if rank == dim:
        if dim <= _ALWAYS_DENSE:
            return metric.factor @ momentum
        return lax.cond(
            metric.is_structured, lambda: metric.factor @ momentum, lambda: metric.scale * momentum
        )
    return metric.scale * lax.cond(
        metric.is_structured, lambda: _add_low_rank(metric, momentum), lambda: momentum
    )


def pull(metric: LinearMap, gradient: jax.Array) -> jax.Array:
    """`A^T g`: the gradient with respect to `z`, shape `(dim,)`."""
    dim, rank = metric.factor.shape
    if rank == dim:
        if dim <= _ALWAYS_DENSE:
            return gradient @ metric.factor
        return lax.cond(
            metric.is_structured, lambda: gradient @ metric.factor, lambda: metric.scale * gradient
        )
    scaled = metric.scale * gradient
    return lax.cond(metric.is_structured, lambda: _add_low_rank(metric, scaled), lambda: scaled)


def _add_low_rank(metric: LinearMap, vector: jax.Array) -> jax.Array:
    return vector + metric.factor @ (metric.core * (vector @ metric.factor))
