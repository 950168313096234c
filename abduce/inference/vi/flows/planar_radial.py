"""Planar and radial bijections: contractions and expansions around a hyperplane or a point.

Rezende and Mohamed, "Variational Inference with Normalizing Flows", ICML 2015, section 4.1 and
appendix A.1, which gives the constraints under which they are invertible. Their log determinants
are written here as logarithms of sums of positive terms, so that they stay finite at the edge of
invertibility. With a context the parameters are affine in a network of it, as in the paper's
amortized posteriors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.inference.vi.flows.bijection import Bijection, check_count
from abduce.inference.vi.flows.networks import INITIAL_SCALE, MLP, dot
from abduce.ppl.operations import typed_key

__all__ = ["Planar", "Radial"]

_SOFTPLUS_ONE = math.log(math.e - 1)  # softplus of this is 1
_MAX_STEPS = 128


class _Parameters(eqx.Module):
    """A vector of parameters, moved by a network of the context where there is one."""

    values: jax.Array
    network: MLP | None

    def __init__(self, key, values, hidden, context_dim, activation):
        self.values = values
        self.network = (
            MLP(key, context_dim, values.shape[0], hidden, activation) if context_dim else None
        )

    def __call__(self, context):
        return self.values if self.network is None else self.values + self.network(context)


class Planar(Bijection):
    """`y = x + u tanh(w.x + b)` (eqs. 10 to 12), invertible where `w.u > -1`.

    The inverse is one root along `w`, found by Newton's method to rounding; its derivative is the
    implicit one, of any order.

    Args:
        key: Typed PRNG key.
        dim: Length of a vector.
        context_dim: Length of the context; 0 for none.
        hidden: Hidden layers of the context's network.
        activation: Of the context's network.
    """

    parameters: _Parameters
    dim: int = eqx.field(static=True)
    context_dim: int = eqx.field(static=True)

    def __init__(
        self,
        key: Any,
        dim: int,
        *,
        context_dim: int = 0,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
    ):
        self.dim = check_count("flows.Planar", "dim", dim)
        self.context_dim = check_count("flows.Planar", "context_dim", context_dim, 0)
        key = typed_key(key, "flows.Planar")
        values = _planar_values(key, dim)
        self.parameters = _Parameters(key, values, hidden, self.context_dim, activation)

    @property
    def fast_inverse(self) -> bool:
        return False

    def _forward(self, x, context):
        u_hat, w, b, slope = self._read(context)
        h = jnp.tanh(dot(w, x) + b)
        return x + u_hat * h, _log_planar(h, slope)

    def _backward(self, y, context):
        u_hat, w, b, slope = self._read(context)
        h = jnp.tanh(_planar_root(dot(w, y) + b, slope))
        return y - u_hat * h, -_log_planar(h, slope)

    def _read(self, context):
        """`(u_hat, w, b, 1 + w.u_hat)`; the last is positive (appendix A.1)."""
        values = self.parameters(context)
        u, w, b = values[: self.dim], values[self.dim : -1], values[-1]
        wu, ww = dot(w, u), dot(w, w)
        slope = jnp.maximum(jax.nn.softplus(wu), jnp.finfo(wu.dtype).tiny)
        slope = jnp.where(ww > 0, slope, 1.0)
        u_hat = u + (slope - 1 - wu) * w / jnp.where(ww > 0, ww, 1.0)
        return u_hat, w, b, slope


@functools.partial(jax.jit, static_argnums=1)
def _planar_values(key, dim):
    key_u, key_w, key_b = jax.random.split(jax.random.fold_in(key, 0), 3)
    w = jax.random.normal(key_w, (dim,)) / math.sqrt(dim)
    # the part of u along w makes w.u_hat nearly zero: the layer starts near the identity
    u = INITIAL_SCALE * jax.random.normal(key_u, (dim,)) + _SOFTPLUS_ONE * w / jnp.sum(w * w)
    return jnp.concatenate([u, w, jax.random.normal(key_b, (1,))])


def _log_planar(h, slope):
    """`log(1 + (1 - h^2) w.u_hat)`, as a sum of two positive terms."""
    return jnp.log(h * h + (1 - h) * (1 + h) * slope)


@jax.custom_jvp
def _planar_root(target: jax.Array, slope: jax.Array) -> jax.Array:
    """The root `s` of `s + (slope - 1) tanh(s) = target`, increasing in `s` for `slope > 0`.

    The left side is odd, and for `s > 0` concave where `slope > 1` and convex where `slope < 1`.
    Newton's method therefore moves monotonically to the root from a start below it in the first
    case and above it in the second: no step needs a safeguard.
    """
    t = jnp.abs(target)
    bend = slope - 1
    start = jnp.where(bend > 0, jnp.maximum(t / slope, t - bend), jnp.minimum(t / slope, t - bend))
    accuracy = 2 * jnp.finfo(t.dtype).eps

    def is_moving(state):
        i, _, is_done = state
        return ~is_done & (i < _MAX_STEPS)

    def step(state):
        i, s, _ = state
        h = jnp.tanh(s)
        derivative = h * h + (1 - h) * (1 + h) * slope
        new = s - (s + bend * h - t) / derivative
        # a step against the direction of travel is rounding: the root is reached
        is_back = jnp.where(bend > 0, new <= s, new >= s)
        is_done = is_back | (jnp.abs(new - s) <= accuracy * jnp.abs(s))
        return i + 1, jnp.where(is_back, s, new), is_done

    s = jax.lax.while_loop(is_moving, step, (0, start, jnp.zeros((), bool)))[1]
    return jnp.where(target < 0, -s, s)


@_planar_root.defjvp
def _planar_root_jvp(primals, tangents):
    """Implicit differentiation; it calls the function, so it can be differentiated again."""
    s = _planar_root(*primals)
    h, slope = jnp.tanh(s), primals[1]
    derivative = h * h + (1 - h) * (1 + h) * slope
    return s, (tangents[0] - h * tangents[1]) / derivative


class Radial(Bijection):
    """`y = x + beta (x - c) / (alpha + r)` with `r = |x - c|` (eqs. 13 and 14).

    Invertible where `beta >= -alpha`. The inverse is the positive root of a quadratic in `r`.

    Args:
        key: Typed PRNG key.
        dim: Length of a vector.
        context_dim: Length of the context; 0 for none.
        hidden: Hidden layers of the context's network.
        activation: Of the context's network.
    """

    parameters: _Parameters
    dim: int = eqx.field(static=True)
    context_dim: int = eqx.field(static=True)

    def __init__(
        self,
        key: Any,
        dim: int,
        *,
        context_dim: int = 0,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
    ):
        self.dim = check_count("flows.Radial", "dim", dim)
        self.context_dim = check_count("flows.Radial", "context_dim", context_dim, 0)
        key = typed_key(key, "flows.Radial")
        values = _radial_values(key, dim)
        self.parameters = _Parameters(key, values, hidden, self.context_dim, activation)

    def _forward(self, x, context):
        center, alpha, total = self._read(context)
        r = _norm(x - center)
        y = center + (x - center) * ((r + total) / (r + alpha))
        return y, self._log_det(r, alpha, total)

    def _backward(self, y, context):
        center, alpha, total = self._read(context)
        rho = _norm(y - center)
        # rho (alpha + r) = r (total + r): r^2 + p r - q = 0, by the formula without cancellation
        p, q = total - rho, alpha * rho
        root = jnp.sqrt(p * p + 4 * q)
        r = jnp.where(p > 0, 2 * q / jnp.where(p > 0, p + root, 1.0), (root - p) / 2)
        x = center + (y - center) * ((r + alpha) / (r + total))
        return x, -self._log_det(r, alpha, total)

    def _log_det(self, r, alpha, total):
        """Eq. 14: `dim - 1` tangential derivatives, and `(r^2 + 2 alpha r + alpha total) /
        (r + alpha)^2` along the radius."""
        tangential = jnp.log(r + total) - jnp.log(r + alpha)
        radial = jnp.log(r * r + alpha * (2 * r + total)) - 2 * jnp.log(r + alpha)
        return (self.dim - 1) * tangential + radial

    def _read(self, context):
        """`(center, alpha, alpha + beta)`; the last two are positive (appendix A.2)."""
        values = self.parameters(context)
        alpha, total = jax.nn.softplus(values[-2]), jax.nn.softplus(values[-1])
        return values[: self.dim], alpha, total


@functools.partial(jax.jit, static_argnums=1)
def _radial_values(key, dim):
    """A random center, alpha = 1 and beta = 0."""
    center = jax.random.normal(jax.random.fold_in(key, 0), (dim,))
    return jnp.concatenate([center, jnp.full(2, _SOFTPLUS_ONE)])


def _norm(x):
    """Length of a vector, with derivative 0 rather than NaN at zero."""
    squared = jnp.sum(x * x)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
