"""Guides, `ab.guides.*`: families over the unconstrained coordinates of a model's latents.

Each is a configuration that `ab.vi(guide=...)` fits: it needs nothing but the number of
coordinates, and reaches constrained sites through their bijections. A family draws
`u = draw(params, e)` from standard normal `e`, with its log density.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import NoDensity
from abduce.inference.static import Static
from abduce.inference.vi import flows
from abduce.inference.vi.elements import families
from abduce.inference.vi.faithful import faithful_inverse

__all__ = [
    "Family",
    "flow",
    "full_rank",
    "implicit",
    "laplace",
    "low_rank",
    "mean_field",
    "structured",
]

_LOG_2_PI = math.log(2 * math.pi)


def _normal(e: Any) -> Any:
    return -0.5 * jnp.sum(e**2) - 0.5 * e.shape[0] * _LOG_2_PI


@dataclasses.dataclass(frozen=True)
class Family:
    """Base of all families.

    A fit begins at the normal that Pathfinder finds on the way to a mode (`ab.pathfinder`), so that
    badly scaled coordinates do no harm.

    Attributes:
        rate: The optimizer's default rate at the start.
        framed: Whether the family lives in coordinates in which that normal is standard; otherwise
            it takes its location and its standard deviations.
    """

    rate = 0.02
    framed = False

    def prepare(self, key: Any, target: Any, data: Any, start: Any, scale: Any) -> tuple[Any, Any]:
        """The family for a target, and its parameters at the start.

        Args:
            key: Random key.
            target, data: The log density, called as `target(data, u)`.
            start: Where to begin, shape `(dim,)`.
            scale: Standard deviations there, shape `(dim,)`.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _OfDim:
    """A family that knows its dimension.

    Attributes:
        sticks: Whether the derivative without the guide's score is the better default. It vanishes
            at a perfect fit; for flows, far from one, it is the noisier of the two.
        has_density: Whether a draw can be scored.
    """

    dim: int
    sticks = True
    has_density = True

    @property
    def noise_dim(self) -> int:
        return self.dim


# ---------------------------------------------------------------------- normals


class _MeanField(_OfDim):
    def draw(self, params, e):
        u = params["loc"] + jnp.exp(params["log_scale"]) * e
        return u, _normal(e) - jnp.sum(params["log_scale"])

    def log_density(self, params, u):
        e = (u - params["loc"]) * jnp.exp(-params["log_scale"])
        return _normal(e) - jnp.sum(params["log_scale"])


@dataclasses.dataclass(frozen=True)
class mean_field(Family):
    """Independent normals."""

    def prepare(self, key, target, data, start, scale):
        log_scale = jnp.log(scale)
        return _MeanField(len(start)), {"loc": start, "log_scale": log_scale}


@dataclasses.dataclass(frozen=True)
class _FullRank(_OfDim):
    """`u = loc + L e`, `L` lower triangular where `rows, columns` say, with a positive diagonal."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def tril(self, params):
        diagonal = jnp.exp(params["log_diagonal"])
        rows, columns = np.array(self.rows, int), np.array(self.columns, int)
        return jnp.diag(diagonal).at[rows, columns].set(params["below"] * diagonal[rows])

    def draw(self, params, e):
        return params["loc"] + self.tril(params) @ e, _normal(e) - jnp.sum(params["log_diagonal"])

    def log_density(self, params, u):
        e = jax.scipy.linalg.solve_triangular(self.tril(params), u - params["loc"], lower=True)
        return _normal(e) - jnp.sum(params["log_diagonal"])


@dataclasses.dataclass(frozen=True)
class full_rank(Family):
    """A normal with any covariance, through its Cholesky factor."""

    framed = True

    def prepare(self, key, target, data, start, scale):
        n = len(start)
        rows, columns = np.tril_indices(n, -1)
        log_diagonal = jnp.log(scale)
        below = jnp.zeros(len(rows), start.dtype)
        family = _FullRank(n, tuple(rows.tolist()), tuple(columns.tolist()))
        return family, {"loc": start, "log_diagonal": log_diagonal, "below": below}


@dataclasses.dataclass(frozen=True)
class laplace(Family):
    """A full-rank normal that starts as Laplace's approximation at the mode nearest the start."""

    def prepare(self, key, target, data, start, scale):
        from abduce.inference.laplace import _climb, _newton

        mode, value, _ = _climb(target, data, np.asarray(start), 500)
        mode, _, precision = _newton(target, data, mode, value, start.dtype)
        values, vectors = np.linalg.eigh(precision)
        values = np.maximum(values, 1e-4 * max(float(values.max()), 1e-8))
        tril = np.linalg.cholesky((vectors / values) @ vectors.T)
        rows, columns = np.tril_indices(len(mode), -1)
        diagonal = np.diagonal(tril)
        family = _FullRank(len(mode), tuple(rows.tolist()), tuple(columns.tolist()))
        params = {
            "loc": mode,
            "log_diagonal": np.log(diagonal),
            "below": tril[rows, columns] / diagonal[rows],
        }
        return family, jax.tree.map(lambda x: jnp.asarray(x, start.dtype), params)


@dataclasses.dataclass(frozen=True)
class _LowRank(_OfDim):
    rank: int

    @property
    def noise_dim(self) -> int:
        return self.dim + self.rank

    def draw(self, params, e):
        scale = jnp.exp(params["log_scale"])
        u = params["loc"] + scale * (e[: self.dim] + params["factor"] @ e[self.dim :])
        return u, self.log_density(params, u)

    def log_density(self, params, u):
        # covariance S (I + F F') S; its inverse and determinant by the small matrix I + F' F
        factor = params["factor"]
        y = (u - params["loc"]) * jnp.exp(-params["log_scale"])
        small = jnp.eye(self.rank, dtype=y.dtype) + factor.T @ factor
        chol = jnp.linalg.cholesky(small)
        t = jax.scipy.linalg.solve_triangular(chol, factor.T @ y, lower=True)
        quadratic = jnp.sum(y**2) - jnp.sum(t**2)
        log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(chol))) + 2 * jnp.sum(params["log_scale"])
        return -0.5 * (quadratic + log_det + self.dim * _LOG_2_PI)


@dataclasses.dataclass(frozen=True)
class low_rank(Family):
    """A normal whose covariance is diagonal plus low rank.

    Args:
        rank: Of the second part; at most the number of coordinates.
    """

    rank: int = 5

    def prepare(self, key, target, data, start, scale):
        rank = min(self.rank, len(start))
        factor = 0.01 * jax.random.normal(key, (len(start), rank), start.dtype)
        log_scale = jnp.log(scale)
        params = {"loc": start, "log_scale": log_scale, "factor": factor}
        return _LowRank(len(start), rank), params


@dataclasses.dataclass(frozen=True)
class _Structured(_OfDim):
    """`u_i = loc_i + sum_j B_ij (u_j - loc_j) + d_i e_i` in some order, `B` sparse."""

    order: tuple[int, ...]
    rows: tuple[int, ...]  # of B, in that order
    columns: tuple[int, ...]

    def _b(self, params):
        b = jnp.zeros((self.dim, self.dim), params["loc"].dtype)
        return b.at[np.array(self.rows, int), np.array(self.columns, int)].set(params["weights"])

    def draw(self, params, e):
        order = np.array(self.order)
        scaled = (jnp.exp(params["log_scale"]) * e)[order]
        matrix = jnp.eye(self.dim, dtype=e.dtype) - self._b(params)
        y = jax.scipy.linalg.solve_triangular(matrix, scaled, lower=True, unit_diagonal=True)
        u = params["loc"].at[order].add(y)
        return u, _normal(e) - jnp.sum(params["log_scale"])

    def log_density(self, params, u):
        order = np.array(self.order)
        y = (u - params["loc"])[order]
        e = (y - self._b(params) @ y) * jnp.exp(-params["log_scale"][order])
        return _normal(e) - jnp.sum(params["log_scale"])


@dataclasses.dataclass(frozen=True)
class structured(Family):
    """A normal with the conditional independences of the posterior: a faithful inverse.

    The dependences of the model are followed from element to element, through `vmap`, `scan` and
    indices that are data. From them comes an order of the coordinates in which each depends on
    those before it that it must, and on no other (Webb et al., "Faithful inversion of generative
    models for effective amortized inference", NeurIPS 2018): elements of a plate on the global
    latents alone, a step of a chain on the next. The number of weights grows with the model's
    structure instead of with the square of its size.
    """

    def prepare(self, key, target, data, start, scale):
        order, parents = faithful_inverse(families(target, data))
        position = {j: i for i, j in enumerate(order)}
        pairs = [(position[i], position[j]) for i in order for j in parents[i]]
        rows = tuple(r for r, _ in pairs)
        columns = tuple(c for _, c in pairs)
        family = _Structured(len(start), tuple(order), rows, columns)
        log_scale = jnp.log(scale)
        weights = jnp.zeros(len(pairs), start.dtype)
        return family, {"loc": start, "log_scale": log_scale, "weights": weights}


# ---------------------------------------------------------------------- flows


@dataclasses.dataclass(frozen=True)
class _Flow(_OfDim):
    static: Any
    sticks = False

    def _flow(self, params):
        return eqx.combine(params["flow"], self.static.value)

    def draw(self, params, e):
        y, log_det = self._flow(params).forward(e)
        scale = jnp.exp(params["log_scale"])
        return params["loc"] + scale * y, _normal(e) - log_det - jnp.sum(params["log_scale"])

    def log_density(self, params, u):
        y = (u - params["loc"]) * jnp.exp(-params["log_scale"])
        e, log_det = self._flow(params).inverse(y)
        return _normal(e) + log_det - jnp.sum(params["log_scale"])


@dataclasses.dataclass(frozen=True)
class flow(Family):
    """A normalizing flow, then a shift and scale of each coordinate.

    Args:
        make: `make(key, dim)` gives a bijection of `ab.flows`; None: `ab.flows.spline_coupling`
            (`ab.flows.spline_autoregressive` in one dimension) with four layers.
    """

    rate = 0.003
    framed = True
    make: Any = None

    def prepare(self, key, target, data, start, scale):
        n = len(start)
        if self.make is not None:
            bijection = self.make(key, n)
        elif n == 1:
            bijection = flows.spline_autoregressive(key, n, 2)
        else:
            bijection = flows.spline_coupling(key, n, 4)
        arrays, static = eqx.partition(bijection, eqx.is_inexact_array)
        log_scale = jnp.log(scale)
        params = {"loc": start, "log_scale": log_scale, "flow": arrays}
        return _Flow(n, Static(static)), params


# ---------------------------------------------------------------------- implicit


@dataclasses.dataclass(frozen=True)
class _Implicit(_OfDim):
    latent_dim: int
    sigma: float
    static: Any
    sticks = False
    has_density = False

    @property
    def noise_dim(self) -> int:
        return self.latent_dim + self.dim

    def draw(self, params, e):
        network = eqx.combine(params["network"], self.static.value)
        z, noise = e[: self.latent_dim], e[self.latent_dim :]

        def g(z):
            return params["loc"] + network(z)

        # log det of J J' + s^2 I through its smaller side
        jacobian = jax.jacfwd(g)(z)
        k, n, s2 = self.latent_dim, self.dim, self.sigma**2
        if k < n:
            small = jnp.eye(k, dtype=e.dtype) * s2 + jacobian.T @ jacobian
            log_det = jnp.linalg.slogdet(small)[1] + (n - k) * math.log(s2)
        else:
            small = jnp.eye(n, dtype=e.dtype) * s2 + jacobian @ jacobian.T
            log_det = jnp.linalg.slogdet(small)[1]
        entropy = 0.5 * (log_det + n * (1 + _LOG_2_PI))
        return g(z) + self.sigma * noise, -entropy

    def log_density(self, params, u):
        raise NoDensity(
            "ab.guides.implicit has no density, only an estimate of its entropy: use "
            "ab.objectives.elbo()."
        )


@dataclasses.dataclass(frozen=True)
class implicit(Family):
    """A network of noise, with the entropy of its linearization.

    `u = g(z) + s e`; the entropy is estimated by that of the normal with covariance
    `J J' + s^2 I`, `J` the Jacobian of `g` at `z`, which is exact for a linear `g` (Uppal et al.,
    "Implicit variational inference for high-dimensional posteriors", NeurIPS 2023, equation 11).
    There is no density, so no Pareto k.

    Args:
        latent_dim: Dimension of `z`; None: that of the latents.
        hidden: Widths of the network's layers.
        sigma: `s`, on the unconstrained scale.
    """

    rate = 0.003
    framed = True
    latent_dim: int | None = None
    hidden: tuple[int, ...] = (64, 64)
    sigma: float = 0.02

    def prepare(self, key, target, data, start, scale):
        n = len(start)
        k = self.latent_dim or n
        network = _Network(key, k, n, self.hidden, start.dtype)
        arrays, static = eqx.partition(network, eqx.is_inexact_array)
        params = {"loc": start, "network": arrays}
        return _Implicit(n, k, self.sigma, Static(static)), params


class _Network(eqx.Module):
    """A linear map plus a multilayer perceptron."""

    linear: Any
    layers: Any

    def __init__(self, key, k, n, hidden, dtype):
        keys = jax.random.split(key, len(hidden) + 1)
        self.linear = jnp.eye(n, k, dtype=dtype)
        sizes = [k, *hidden, n]
        self.layers = [
            (
                jax.random.normal(q, (b, a), dtype)
                * math.sqrt(1 / a)
                * (0.01 if i == len(hidden) else 1),
                jnp.zeros(b, dtype),
            )
            for i, (q, a, b) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
        ]

    def __call__(self, z):
        h = z
        for w, b in self.layers[:-1]:
            h = jnp.tanh(w @ h + b)
        w, b = self.layers[-1]
        return self.linear @ z + w @ h + b
