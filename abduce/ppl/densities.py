"""Log densities: NumPyro's, with faster formulas where its own cost shows in a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import BernoulliLogits, ExpandedDistribution, Independent, Normal

__all__ = ["log_prob"]

_HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)


def _bernoulli_logits(d: BernoulliLogits, x: Any) -> Any:
    """`-softplus(-z)` for 1 and `-softplus(z)` for 0, which holds for infinite logits too.

    The branches with which NumPyro guards against NaN made the gradient of a logistic regression
    1.4 times as costly.
    """
    return -jax.nn.softplus((1 - 2 * jnp.asarray(x, jnp.result_type(d.logits))) * d.logits)


def _normal(d: Normal, x: Any) -> Any:
    """The constant stands outside the logarithm: one multiplication less per element."""
    return -0.5 * jnp.square((x - d.loc) / d.scale) - jnp.log(d.scale) - _HALF_LOG_2_PI


_FASTER: MappingProxyType[type, Callable[[Any, Any], Any]] = MappingProxyType(
    {BernoulliLogits: _bernoulli_logits, Normal: _normal}
)


def log_prob(d: Any, x: Any) -> Any:
    """Log density of one element in nats, shape `d.batch_shape`."""
    if type(d) is Independent:  # made by `to_event`
        parts = log_prob(d.base_dist, x)
        n = d.reinterpreted_batch_ndims
        return jnp.sum(parts, tuple(range(parts.ndim - n, parts.ndim)))
    if type(d) is ExpandedDistribution:
        parts = log_prob(d.base_dist, x)
        return jnp.broadcast_to(parts, jnp.broadcast_shapes(d.batch_shape, jnp.shape(parts)))
    return _FASTER.get(type(d), _numpyro)(d, x)


def _numpyro(d: Any, x: Any) -> Any:
    return d.log_prob(x)
