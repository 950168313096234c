"""Mixtures of normals with full covariances, and how any law is fitted by one.

A mixture is `p(u) = sum_k w_k N(u; m_k, L_k L_k')` over a vector of unconstrained coordinates. It
is closed under what a filter needs: affine maps with added normal noise, marginals, conditionals.
"""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp, ndtr

from abduce.errors import InvalidValue

__all__ = ["GaussianMixture", "from_numbers", "normal", "num_numbers", "split", "to_numbers"]


class GaussianMixture(eqx.Module):
    """A mixture of normals.

    Attributes:
        log_weights: Normalized, in nats, shape `(k,)`.
        means: Shape `(k, d)`.
        trils: Lower triangular with positive diagonal, `L L'` is a covariance; `(k, d, d)`.

    Example:
        >>> two = normal(jnp.zeros(2), jnp.eye(2))
        >>> two.log_prob(jnp.zeros(2))  # -log(2 pi)
    """

    log_weights: Any
    means: Any
    trils: Any

    @property
    def num_components(self) -> int:
        """How many normals."""
        return self.means.shape[-2]

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.means.shape[-1]

    def component_log_probs(self, u: Any) -> Any:
        """Log weight plus log density of each component at `u`, shape `(d,)`; `(k,)`, in nats."""
        return self.log_weights + _normal_log_probs(u, self.means, self.trils)

    def log_prob(self, u: Any) -> Any:
        """Log density at `u`, shape `(d,)`, in nats."""
        return logsumexp(self.component_log_probs(u))

    def sample(self, key: Any, n: int | None = None) -> Any:
        """Independent draws, shape `(n, d)`; without `n` one, shape `(d,)`."""
        k1, k2 = jax.random.split(key)
        shape = () if n is None else (n,)
        index = jax.random.categorical(k1, self.log_weights, shape=shape)
        noise = jax.random.normal(k2, (*shape, self.dim), self.means.dtype)
        return self.means[index] + jnp.einsum("...ij,...j->...i", self.trils[index], noise)

    @property
    def mean(self) -> Any:
        """Shape `(d,)`."""
        return jnp.exp(self.log_weights) @ self.means

    @property
    def covariances(self) -> Any:
        """Of the components, `(k, d, d)`."""
        return self.trils @ jnp.swapaxes(self.trils, -1, -2)

    @property
    def covariance(self) -> Any:
        """Of the mixture, `(d, d)`."""
        w = jnp.exp(self.log_weights)
        off = self.means - self.mean
        return jnp.einsum("k,kij->ij", w, self.covariances) + (w[:, None] * off).T @ off

    def cdf(self, u: Any) -> Any:
        """Distribution function of a one-dimensional mixture at the scalar `u`."""
        if self.dim != 1:
            raise InvalidValue(
                f"mixture.cdf: the mixture has {self.dim} dimensions. Take one of them, "
                f"mixture.marginal([0]).cdf(u)."
            )
        z = (u - self.means[:, 0]) / self.trils[:, 0, 0]
        return jnp.sum(jnp.exp(self.log_weights) * ndtr(z))

    def push(self, matrix: Any, offset: Any = 0.0, noise: Any = None) -> GaussianMixture:
        """The law of `matrix u + offset + e`, exactly.

        Args:
            matrix: Shape `(d', d)`.
            offset: Shape `(d',)`.
            noise: Covariance of the normal `e`, `(d', d')`; None: no noise, for which `matrix`
                has to have full row rank.
        """
        means = self.means @ matrix.T + offset
        moved = matrix @ self.trils
        if noise is None:
            covariances = moved @ jnp.swapaxes(moved, -1, -2)
        else:
            covariances = moved @ jnp.swapaxes(moved, -1, -2) + noise
        return GaussianMixture(self.log_weights, means, jnp.linalg.cholesky(covariances))

    def scaled(self, factor: Any, offset: Any) -> GaussianMixture:
        """The law of `factor * u + offset`, entry by entry; `factor` is positive, `(d,)`."""
        means, trils = self.means * factor + offset, self.trils * factor[:, None]
        return GaussianMixture(self.log_weights, means, trils)

    def marginal(self, index: Any) -> GaussianMixture:
        """The law of some entries, in the order given."""
        index = np.asarray(index)
        rows = self.trils[:, index, :]
        covariances = rows @ jnp.swapaxes(rows, -1, -2)
        return GaussianMixture(
            self.log_weights, self.means[:, index], jnp.linalg.cholesky(covariances)
        )

    def condition(self, num: int, u: Any) -> GaussianMixture:
        """The law of the entries from `num` on, given that those before are `u`, `(num,)`.

        With `L = [[A, 0], [B, C]]`: means `m_2 + B A^-1 (u - m_1)`, triangular matrices `C`.
        """
        head, below = self.trils[:, :num, :num], self.trils[:, num:, :num]
        z = jax.vmap(lambda a, r: solve_triangular(a, r, lower=True))(head, u - self.means[:, :num])
        log_weights = self.log_weights + _normal_log_probs(u, self.means[:, :num], head)
        means = self.means[:, num:] + jnp.einsum("kij,kj->ki", below, z)
        return GaussianMixture(jax.nn.log_softmax(log_weights), means, self.trils[:, num:, num:])


def _normal_log_probs(u: Any, means: Any, trils: Any) -> Any:
    """Log densities of normals at one point, `(k,)`."""
    d = means.shape[-1]
    if d == 1:
        scale = trils[:, 0, 0]
        z2 = ((u[0] - means[:, 0]) / scale) ** 2
        return -0.5 * (z2 + math.log(2 * math.pi)) - jnp.log(scale)
    z = _solve(trils, u - means)
    log_det = jnp.sum(jnp.log(jnp.diagonal(trils, axis1=-2, axis2=-1)), -1)
    return -0.5 * (jnp.sum(z**2, -1) + d * math.log(2 * math.pi)) - log_det


def _solve(trils: Any, r: Any) -> Any:
    """`L^-1 r` for each component, `(k, d)`; written out where `d` is small, for `vmap`'s sake."""
    d = r.shape[-1]
    if d > 8:
        return jax.vmap(lambda a, b: solve_triangular(a, b, lower=True))(trils, r)
    z: list[Any] = []
    for i in range(d):
        rest = r[..., i] - sum((trils[..., i, j] * z[j] for j in range(i)), start=0.0)
        z.append(rest / trils[..., i, i])
    return jnp.stack(z, -1)


def normal(mean: Any, covariance: Any) -> GaussianMixture:
    """One normal, as a mixture; shapes `(d,)` and `(d, d)`."""
    mean = jnp.asarray(mean)
    tril = jnp.linalg.cholesky(jnp.asarray(covariance))
    return GaussianMixture(jnp.zeros(1, mean.dtype), mean[None], tril[None])


def split(mixture: GaussianMixture, num_components: int, spread: float = 0.5) -> GaussianMixture:
    """Very nearly the same law with more components.

    A normal is the law of `m + c v x + e` with `x` standard normal, `v` the largest principal axis
    and `e` normal with the rest of the variance. Gauss-Hermite nodes in place of `x` keep `2 n - 1`
    moments.

    Args:
        mixture: Of at most `num_components`.
        num_components: How many there shall be.
        spread: The fraction `c` of the standard deviation that goes to the nodes.
    """
    k = mixture.num_components
    counts = [num_components // k + (i < num_components % k) for i in range(k)]
    log_weights, means, trils = [], [], []
    for i, n in enumerate(counts):
        if n == 1:
            log_weights.append(mixture.log_weights[i : i + 1])
            means.append(mixture.means[i : i + 1])
            trils.append(mixture.trils[i : i + 1])
            continue
        nodes, w = np.polynomial.hermite_e.hermegauss(n)
        c = spread if n > 2 else 0.6 * spread  # two nodes keep three moments only
        if mixture.dim == 1:
            axis, tril = mixture.trils[i, 0], math.sqrt(1 - c**2) * mixture.trils[i]
        else:
            covariance = mixture.trils[i] @ mixture.trils[i].T
            values, vectors = jnp.linalg.eigh(covariance)
            axis = vectors[:, -1] * jnp.sqrt(values[-1])
            tril = jnp.linalg.cholesky(covariance - c**2 * jnp.outer(axis, axis))
        log_weights.append(mixture.log_weights[i] + jnp.log(jnp.asarray(w / w.sum())))
        means.append(mixture.means[i] + c * jnp.asarray(nodes)[:, None] * axis)
        trils.append(jnp.broadcast_to(tril, (n, *tril.shape)))
    parts = (log_weights, means, trils)
    dtype = mixture.means.dtype
    return GaussianMixture(*(jnp.concatenate(x).astype(dtype) for x in parts))


def num_numbers(dim: int) -> int:
    """How many numbers describe a component: log weight, mean, and a triangle."""
    return 1 + dim + dim * (dim + 1) // 2


def to_numbers(mixture: GaussianMixture) -> Any:
    """A row of numbers for each component: log weight, mean, log diagonal, what is below it."""
    d = mixture.dim
    rows, columns = np.tril_indices(d, -1)
    diagonal = jnp.diagonal(mixture.trils, axis1=-2, axis2=-1)
    below = mixture.trils[:, rows, columns]
    head = mixture.log_weights[:, None]
    return jnp.concatenate([head, mixture.means, jnp.log(diagonal), below], -1)


def from_numbers(numbers: Any, dim: int) -> GaussianMixture:
    """The inverse of `to_numbers`; log weights need not be normalized."""
    rows, columns = np.tril_indices(dim, -1)
    means, diagonal = numbers[:, 1 : 1 + dim], jnp.exp(numbers[:, 1 + dim : 1 + 2 * dim])
    trils = diagonal[:, :, None] * jnp.eye(dim, dtype=numbers.dtype)
    trils = trils.at[:, rows, columns].set(numbers[:, 1 + 2 * dim :])
    return GaussianMixture(jax.nn.log_softmax(numbers[:, 0]), means, trils)
