"""Heads: laws of a coordinate vector given a context.

Every head has a law that can be drawn from noise of fixed length and scored:

* `draw(context, e)` turns standard normal noise of shape `(noise_dim,)` into `(v, log q(v))`;
* `log_density(context, v)` scores any point;
* `loss(context, v, key)` is what training minimizes: here `-log q(v)`, whose mean is, up to a
  constant, the expected forward Kullback-Leibler divergence from the posterior.

Coordinates are standardized by the prior, so `v` is of order one.
"""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.networks import Linear, Residual, stacked, uniform
from abduce.inference.vi import flows

__all__ = ["Choices", "Flow", "Mixture"]

_LOG_2_PI = math.log(2 * math.pi)
_FULL = 16  # coordinates up to which the affine part has a full triangular matrix


def normal_log_density(e: Any) -> Any:
    """Of a standard normal vector."""
    return -0.5 * jnp.sum(e**2) - 0.5 * e.shape[-1] * _LOG_2_PI


class _Triangular(eqx.Module):
    """`loc` and `L` of `v = loc + L y` from the context; `L` lower triangular.

    Posteriors given many data are far narrower than the prior; a spline on a fixed interval could
    not follow them, an affine map of the context does.
    """

    out: Linear
    dim: int = eqx.field(static=True)

    def __init__(self, key: Any, context_dim: int, dim: int):
        below = dim * (dim - 1) // 2 if dim <= _FULL else 0
        self.out = Linear(key, context_dim, 2 * dim + below, 0.0)
        self.dim = dim

    def __call__(self, context: Any) -> tuple[Any, Any]:
        """`loc`, shape `(dim,)`, and `L`, shape `(dim, dim)`."""
        return triangular(self.out(context), self.dim)


def triangular(raw: Any, dim: int) -> tuple[Any, Any]:
    """Reads `loc` and a triangular matrix with positive diagonal from a vector of numbers."""
    loc, diagonal = raw[:dim], _bounded_exp(raw[dim : 2 * dim])
    tril = jnp.diag(diagonal)
    if dim <= _FULL and dim > 1:
        rows, columns = np.tril_indices(dim, -1)
        tril = tril.at[rows, columns].set(raw[2 * dim :] * diagonal[rows])
    return loc, tril


def _bounded_exp(x: Any) -> Any:
    """`exp` within e^-8 and e^8: a network far from its training data must not overflow."""
    return jnp.exp(8 * jnp.tanh(x / 8))


class Flow(eqx.Module):
    """A normal, spline layers, and an affine map, all conditioned on the context.

    Durkan, Bekasov, Murray and Papamakarios, "Neural Spline Flows", NeurIPS 2019, here
    autoregressive: densities, which training needs, take one pass.

    Args:
        key: Typed PRNG key.
        context_dim: Length of the context.
        dim: Number of coordinates.
        num_layers, hidden, num_bins: Of the flow.
        coupling: Whether layers are couplings: coarser, but drawn in one pass too.
    """

    affine: _Triangular
    flow: Any
    dim: int = eqx.field(static=True)

    def __init__(
        self,
        key: Any,
        context_dim: int,
        dim: int,
        num_layers: int = 4,
        hidden: tuple[int, ...] = (64, 64),
        num_bins: int = 8,
        coupling: bool = False,
    ):
        k1, k2 = jax.random.split(key)
        self.affine = _Triangular(k1, context_dim, dim)
        make = flows.spline_coupling if coupling and dim > 1 else flows.spline_autoregressive
        self.flow = make(
            k2, dim, num_layers if dim > 1 else 1, hidden=hidden, context_dim=context_dim,
            num_bins=num_bins, mixing="lu" if dim > 1 else "reverse",
        )  # fmt: skip
        self.dim = dim

    @property
    def noise_dim(self) -> int:
        """Length of the noise."""
        return self.dim

    def draw(self, context: Any, e: Any) -> tuple[Any, Any]:
        """A draw and its log density."""
        y, log_det = self.flow.forward(e, context)
        loc, tril = self.affine(context)
        log_diagonal = jnp.sum(jnp.log(jnp.diagonal(tril)))
        return loc + tril @ y, normal_log_density(e) - log_det - log_diagonal

    def log_density(self, context: Any, v: Any) -> Any:
        """Log density of a point, in nats."""
        loc, tril = self.affine(context)
        y = jax.scipy.linalg.solve_triangular(tril, v - loc, lower=True)
        e, log_det = self.flow.inverse(y, context)
        return normal_log_density(e) + log_det - jnp.sum(jnp.log(jnp.diagonal(tril)))

    def loss(self, context: Any, v: Any, key: Any) -> Any:
        """`-log q(v)`."""
        return -self.log_density(context, v)


class Mixture(eqx.Module):
    """A mixture of normals with full covariances, its parameters linear in the context.

    Bishop, "Mixture Density Networks", 1994.

    Args:
        key: Typed PRNG key.
        context_dim: Length of the context.
        dim: Number of coordinates.
        num_components: Of the mixture.
    """

    out: Linear
    spread: jax.Array
    dim: int = eqx.field(static=True)
    num_components: int = eqx.field(static=True)

    def __init__(self, key: Any, context_dim: int, dim: int, num_components: int = 8):
        below = dim * (dim - 1) // 2 if dim <= _FULL else 0
        self.out = Linear(key, context_dim, num_components * (1 + 2 * dim + below), 0.0)
        self.spread = uniform(key, (num_components, dim), 2.0 * (num_components > 1))
        self.dim, self.num_components = dim, num_components

    @property
    def noise_dim(self) -> int:
        """Length of the noise: one number picks the component."""
        return self.dim + 1

    def parameters(self, context: Any) -> tuple[Any, Any, Any]:
        """Log weights `(k,)`, means `(k, dim)`, triangular factors `(k, dim, dim)`."""
        raw = self.out(context).reshape(self.num_components, -1)
        loc, tril = jax.vmap(lambda r: triangular(r, self.dim))(raw[:, 1:])
        return jax.nn.log_softmax(raw[:, 0]), loc + 0.5 * self.spread, tril

    def draw(self, context: Any, e: Any) -> tuple[Any, Any]:
        """A draw and its log density."""
        log_w, loc, tril = self.parameters(context)
        p = jax.scipy.stats.norm.cdf(e[0])
        edges = jnp.cumsum(jnp.exp(log_w))
        i = jnp.minimum(jnp.sum(p * edges[-1] > edges), self.num_components - 1)
        v = loc[i] + tril[i] @ e[1:]
        return v, self._score(log_w, loc, tril, v)

    def log_density(self, context: Any, v: Any) -> Any:
        """Log density of a point, in nats."""
        return self._score(*self.parameters(context), v)

    @staticmethod
    def _score(log_w, loc, tril, v):
        def component(loc, tril):
            e = jax.scipy.linalg.solve_triangular(tril, v - loc, lower=True)
            return normal_log_density(e) - jnp.sum(jnp.log(jnp.diagonal(tril)))

        return jax.nn.logsumexp(log_w + jax.vmap(component)(loc, tril))

    def loss(self, context: Any, v: Any, key: Any) -> Any:
        """`-log q(v)`."""
        return -self.log_density(context, v)


class Choices(eqx.Module):
    """Discrete latents one after the other, each given the context and those before it.

    Args:
        key: Typed PRNG key.
        context_dim: Length of the context.
        counts: Number of values of each variable.
        width: Of the networks, one for each variable.
    """

    nets: Any
    counts: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, key: Any, context_dim: int, counts: tuple[int, ...], width: int):
        d, k = len(counts), max(counts)
        nets = [
            Residual(q, context_dim + d * k, k, width, 1, 0.0) for q in jax.random.split(key, d)
        ]
        self.nets = stacked(nets)
        self.counts = tuple(counts)

    @property
    def width(self) -> int:
        """Length of `one_hot`."""
        return len(self.counts) * max(self.counts)

    def one_hot(self, x: Any) -> Any:
        """Values `(d,)` as a vector of indicators, for networks that depend on them."""
        return jax.nn.one_hot(x, max(self.counts), dtype=jnp.result_type(float)).reshape(-1)

    def log_density(self, context: Any, x: Any) -> Any:
        """Log probability of values `(d,)`, each from 0 to its count minus 1."""
        d = len(self.counts)
        logits = jax.vmap(lambda net, i: self._logits(net, i, context, x), (0, 0))(
            self.nets, jnp.arange(d)
        )
        return jnp.sum(jnp.take_along_axis(logits, x[:, None], 1))

    def draw(self, context: Any, key: Any) -> tuple[Any, Any]:
        """Values and their log probability."""
        arrays, static = eqx.partition(self.nets, eqx.is_array)

        def step(x, inputs):
            net, i, k = inputs
            logits = self._logits(eqx.combine(net, static), i, context, x)
            value = jax.random.categorical(k, logits).astype(jnp.int32)
            return x.at[i].set(value), logits[value]

        d = len(self.counts)
        keys = jax.random.split(key, d)
        x, log_q = jax.lax.scan(
            step, jnp.zeros(d, jnp.int32), (arrays, jnp.arange(d), keys)
        )
        return x, jnp.sum(log_q)

    def _logits(self, net, i, context, x):
        d, k = len(self.counts), max(self.counts)
        before = jnp.arange(d) < i
        seen = jax.nn.one_hot(x, k, dtype=context.dtype) * before[:, None]
        logits = net(jnp.concatenate([context, seen.reshape(-1)]))
        valid = jnp.arange(k) < jnp.asarray(self.counts)[i]
        return jax.nn.log_softmax(jnp.where(valid, logits, -jnp.inf))
