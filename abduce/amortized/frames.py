"""Coordinates in which a posterior is nearly standard normal, from the model's own density.

Where a model has a density, a few Newton steps give Laplace's approximation of the posterior for
any data. A head that works in the coordinates `w = L^-1 (v - m)` of that normal has only to learn
what differs from it: for a linear model with normal noise, nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["frame_features", "laplace_frame", "to_frame"]

_STEPS = 6
_LONGEST = 3.0  # of a step, in spreads of the prior
_FLATTEST = 0.3  # curvature, where that of the prior is about 1


def laplace_frame(log_density: Callable[[Any], Any], dim: int) -> tuple[Any, Any]:
    """Mode and spread of a density over standardized coordinates.

    Args:
        log_density: Of a vector, up to a constant.
        dim: Its length.

    Returns:
        m: Shape `(dim,)`.
        tril: Lower triangular, shape `(dim, dim)`; `tril @ tril.T` is the inverse curvature.
    """
    gradient, hessian = jax.grad(log_density), jax.hessian(log_density)

    def curvature(v):
        h = jnp.nan_to_num(hessian(v), nan=0.0, posinf=0.0, neginf=0.0)
        values, vectors = jnp.linalg.eigh(-0.5 * (h + h.T))
        return jnp.clip(jnp.abs(values), _FLATTEST, 1e10), vectors

    def step(_, v):
        g = jnp.nan_to_num(gradient(v), nan=0.0, posinf=0.0, neginf=0.0)
        values, vectors = curvature(v)
        move = vectors @ ((vectors.T @ g) / values)
        return v + move * jnp.minimum(1.0, _LONGEST / jnp.maximum(jnp.linalg.norm(move), 1e-12))

    m = jax.lax.fori_loop(0, _STEPS, step, jnp.zeros(dim))
    values, vectors = curvature(m)
    tril = jnp.linalg.cholesky((vectors / values) @ vectors.T)
    return jax.lax.stop_gradient((m, tril))


def to_frame(frame: tuple[Any, Any], v: Any) -> Any:
    """`w = L^-1 (v - m)`."""
    m, tril = frame
    return jax.scipy.linalg.solve_triangular(tril, v - m, lower=True)


def frame_features(frame: tuple[Any, Any]) -> Any:
    """What a network is told of the frame, shape `(2 dim,)`."""
    m, tril = frame
    return jnp.concatenate([m / 3, jnp.log(jnp.diagonal(tril)) / 3])
