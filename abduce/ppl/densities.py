"""Log densities: NumPyro's, with faster formulas where its own cost shows in a gradient."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import BernoulliLogits

__all__ = ["log_prob"]


def _bernoulli_logits(d: BernoulliLogits, x: Any) -> Any:
    """`-softplus(-z)` for 1 and `-softplus(z)` for 0, which holds for infinite logits too.

    The branches with which NumPyro guards against NaN made the gradient of a logistic regression
    1.4 times as costly.
    """
    return -jax.nn.softplus((1 - 2 * jnp.asarray(x, d.logits.dtype)) * d.logits)


_FASTER: MappingProxyType[type, Callable[[Any, Any], Any]] = MappingProxyType(
    {BernoulliLogits: _bernoulli_logits}
)


def log_prob(d: Any, x: Any) -> Any:
    """Log density of one element in nats, shape `d.batch_shape`."""
    return _FASTER.get(type(d), _numpyro)(d, x)


def _numpyro(d: Any, x: Any) -> Any:
    return d.log_prob(x)
