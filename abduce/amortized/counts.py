"""A law of whole numbers, normalized over all of them."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.amortized.networks import Residual, stacked

__all__ = ["Counts"]


class Counts(eqx.Module):
    """Mixtures of discretized logistic laws, one variable after the other.

    Salimans, Karpathy, Chen and Kingma, "PixelCNN++", ICLR 2017, section 2.1: the probability of
    `y` is that of the interval from `y - 1/2` to `y + 1/2`. The logistic variable is
    `sign(y) log(1 + |y|)`, standardized, so that counts of any size are within reach.

    Args:
        key: Typed PRNG key.
        context_dim: Length of the context.
        dim: Number of variables.
        width: Of the networks, one for each variable.
        num_components: Of the mixtures.
        low: The least value, which takes what lies below; None: there is none.
    """

    nets: Any
    dim: int = eqx.field(static=True)
    num_components: int = eqx.field(static=True)
    low: int | None = eqx.field(static=True)

    def __init__(
        self, key: Any, context_dim: int, dim: int, width: int, num_components: int,
        low: int | None,
    ):  # fmt: skip
        keys = jax.random.split(key, dim)
        self.nets = stacked(
            [Residual(k, context_dim + dim, 3 * num_components, width, 1, 0.3) for k in keys]
        )
        self.dim, self.num_components, self.low = dim, num_components, low

    def log_density(self, context: Any, y: Any, scale: Any) -> Any:
        """Log probability of whole numbers `(dim,)`, in nats.

        Args:
            context: What the law is conditioned on.
            y: The numbers, as floats.
            scale: Centre and spread of `position(y)`, each `(dim,)`.
        """
        z = (position(y) - scale[0]) / scale[1]
        each = jax.vmap(
            lambda net, i: self._one(self._parameters(net, i, context, z), y[i], scale, i)
        )
        scores = each(self.nets, jnp.arange(self.dim))
        if self.low is not None:
            scores = jnp.where(y < self.low, -jnp.inf, scores)
        return jnp.sum(scores)

    def draw(self, context: Any, key: Any, scale: Any) -> Any:
        """Whole numbers `(dim,)`, as floats."""
        arrays, static = eqx.partition(self.nets, eqx.is_array)

        def step(y, inputs):
            net, i, k = inputs
            z = (position(y) - scale[0]) / scale[1]
            log_w, loc, rate = self._parameters(eqx.combine(net, static), i, context, z)
            k1, k2 = jax.random.split(k)
            c = jax.random.categorical(k1, log_w)
            u = jax.random.logistic(k2, dtype=z.dtype)
            at = scale[0][i] + scale[1][i] * (loc[c] + u * rate[c])
            value = jnp.round(jnp.sign(at) * jnp.expm1(jnp.minimum(jnp.abs(at), 30.0)))
            if self.low is not None:
                value = jnp.maximum(value, self.low)
            return y.at[i].set(value), None

        keys = jax.random.split(key, self.dim)
        start = jnp.zeros(self.dim, jnp.result_type(float))
        y, _ = jax.lax.scan(step, start, (arrays, jnp.arange(self.dim), keys))
        return y

    def _parameters(self, net, i, context, z):
        """Log weights, locations and scales of variable `i`, given those before it."""
        before = jnp.where(jnp.arange(self.dim) < i, z, 0.0)
        raw = net(jnp.concatenate([context, before])).reshape(3, self.num_components)
        spread = jnp.linspace(-1.0, 1.0, self.num_components, dtype=raw.dtype)
        rate = jnp.exp(7 * jnp.tanh((raw[2] - 1.0) / 7))
        return jax.nn.log_softmax(raw[0]), raw[1] + spread, rate

    def _one(self, parameters, y, scale, i):
        log_w, loc, rate = parameters
        top = ((position(y + 0.5) - scale[0][i]) / scale[1][i] - loc) / rate
        # From the difference itself, which two rounded positions far out would lose.
        wide = _width(y) / scale[1][i] / rate
        bottom = top - wide
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a - b)): no cancellation.
        inner = jax.nn.log_sigmoid(top) + jax.nn.log_sigmoid(-bottom) + jnp.log(-jnp.expm1(-wide))
        if self.low is not None:
            inner = jnp.where(y <= self.low, jax.nn.log_sigmoid(top), inner)
        return jax.nn.logsumexp(log_w + inner)


def position(y: Any) -> Any:
    """`sign(y) log(1 + |y|)`: increasing, and its own steps at 0 are of order one."""
    return jnp.log1p(jnp.maximum(y, 0.0)) - jnp.log1p(jnp.maximum(-y, 0.0))


def _width(y):
    """`position(y + 1/2) - position(y - 1/2)` of a whole number."""
    away = jnp.abs(y)
    return jnp.where(away < 0.5, 2 * jnp.log1p(0.5), jnp.log1p(1 / (away + 0.5)))
