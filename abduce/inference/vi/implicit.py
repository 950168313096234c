"""Implicit reparametrization: derivatives of a draw from those of the distribution function.

With `F(x; a)` uniform, `dx/da = -(dF/da) / p(x; a)` (Figurnov, Mohamed, Mnih 2018, equation 6). In
several dimensions `S(x; a)` stacks the conditional distribution functions (the distributional
transform), and `dx/da = -(dS/dx)^-1 dS/da` (their equation 9), triangular.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import (
    Distribution,
    MixtureGeneral,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    VonMises,
)

from abduce.ppl.densities import log_prob
from abduce.ppl.site import unwrapped

__all__ = ["implicit_path", "is_implicit"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def is_implicit(d: Any) -> bool:
    """Whether the distribution function is known."""
    d = unwrapped(d)
    if isinstance(d, VonMises):
        return True
    if isinstance(d, (MixtureSameFamily, MixtureGeneral)):
        if d.event_shape and (d.batch_shape or len(d.event_shape) > 1):
            return False  # map over the batch instead
        return all(_has_conditionals(c) for c in _components(d))
    return d.event_shape == () and type(d).cdf is not Distribution.cdf


def _components(d: Any) -> list[Any]:
    if isinstance(d, MixtureSameFamily):
        return [d.component_distribution]
    return list(d.component_distributions)


def _has_conditionals(c: Any) -> bool:
    inner = unwrapped(c)
    if isinstance(inner, MultivariateNormal):
        return True
    return inner.event_shape == () and type(inner).cdf is not Distribution.cdf


def implicit_path(d: Any, x: Any) -> Any:
    """A draw with the derivative of the path; shape of the draw, which is held fixed."""
    x = jax.lax.stop_gradient(x)
    inner = unwrapped(d)
    if isinstance(inner, (MixtureSameFamily, MixtureGeneral)) and inner.event_shape:
        return _mixture_path(inner, x)
    cdf = _cdf(inner, x)
    density = jnp.exp(log_prob(inner, x))
    return x - (cdf - jax.lax.stop_gradient(cdf)) / jax.lax.stop_gradient(density)


def _cdf(d: Any, x: Any) -> Any:
    if isinstance(d, VonMises):
        return _von_mises_cdf(d, x)
    if isinstance(d, MixtureSameFamily):
        weights = d.mixing_distribution.probs
        return jnp.sum(weights * d.component_distribution.cdf(x[..., None]), -1)
    if isinstance(d, MixtureGeneral):
        weights = d.mixing_distribution.probs
        cdfs = jnp.stack([c.cdf(x) for c in d.component_distributions], -1)
        return jnp.sum(weights * cdfs, -1)
    return d.cdf(x)


def _von_mises_cdf(d: Any, x: Any) -> Any:
    """The integral of the density from the opposite of the mean (held fixed) to `x`.

    The start is a constant of the path, which the mean moves along with: it enters through `x`
    minus the mean. Gauss and Legendre's rule, over at most 12 standard deviations.
    """
    kappa = d.concentration
    y = x - d.loc
    turns = jax.lax.stop_gradient(jnp.round(y / (2 * math.pi)))
    y = y - 2 * math.pi * turns
    low = -jax.lax.stop_gradient(jnp.minimum(math.pi, 12.0 / jnp.sqrt(jnp.maximum(kappa, 1e-3))))
    low = jnp.minimum(low, jax.lax.stop_gradient(y))
    half = 0.5 * (y - low)
    nodes = half[..., None] * (jnp.asarray(_NODES, y.dtype) + 1) + low[..., None]
    log_i0e = jnp.log(jax.scipy.special.i0e(kappa))
    f = jnp.exp(kappa[..., None] * (jnp.cos(nodes) - 1) - log_i0e[..., None]) / (2 * math.pi)
    return half * jnp.sum(f * jnp.asarray(_WEIGHTS, y.dtype), -1)


def _mixture_path(d: Any, x: Any) -> Any:
    """One draw of a mixture over vectors, through the conditional distribution functions."""

    def transform(x):
        log_p, cdf = _conditionals(d, x)  # (component, dimension)
        before = jnp.cumsum(log_p, -1) - log_p
        log_w = jnp.log(d.mixing_distribution.probs)[:, None] + before
        return jnp.sum(jax.nn.softmax(log_w, 0) * cdf, 0)

    u = transform(x)
    jacobian = jax.lax.stop_gradient(jax.jacfwd(transform)(x))
    fixed = jax.lax.stop_gradient(u)
    return x - jax.scipy.linalg.solve_triangular(jacobian, u - fixed, lower=True)


def _conditionals(d: Any, x: Any) -> tuple[Any, Any]:
    if isinstance(d, MixtureSameFamily):
        return _of_component(d.component_distribution, x)
    parts = [_of_component(c, x) for c in d.component_distributions]
    return jnp.stack([p[0] for p in parts]), jnp.stack([p[1] for p in parts])


def _of_component(c: Any, x: Any) -> tuple[Any, Any]:
    """Log densities and distribution functions of each coordinate given those before it."""
    inner = unwrapped(c)
    if isinstance(inner, MultivariateNormal):
        tril = inner.scale_tril
        e = jax.scipy.linalg.solve_triangular(tril, (x - inner.loc)[..., None], lower=True)[..., 0]
        scale = jnp.diagonal(tril, axis1=-2, axis2=-1)
        normal = Normal(0.0, 1.0)
        return log_prob(normal, e) - jnp.log(scale), normal.cdf(e)
    shape = jnp.broadcast_shapes(tuple(inner.batch_shape), x.shape)
    return jnp.broadcast_to(log_prob(inner, x), shape), jnp.broadcast_to(inner.cdf(x), shape)
