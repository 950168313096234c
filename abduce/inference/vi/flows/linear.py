"""Linear bijections: a scale and shift of each coordinate, permutations, and full mixing by LU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from abduce.errors import InvalidValue
from abduce.inference.vi.flows.bijection import Bijection, check_count
from abduce.inference.vi.flows.networks import INITIAL_SCALE, MLP, dot, normals, zeros
from abduce.ppl.operations import typed_key

__all__ = ["LU", "ElementwiseAffine", "Permutation"]


class ElementwiseAffine(Bijection):
    """`y = x exp(s) + t` with one scale and shift per coordinate.

    The base of a flow in Rezende and Mohamed (2015) is a normal with this learned scale and shift;
    at the end of a flow it places what the other layers shaped. With a context, `s` and `t` are
    affine in a network of it.

    Args:
        key: Typed PRNG key; used only with a context.
        dim: Length of a vector.
        context_dim: Length of the context; 0 for none.
        hidden: Hidden layers of the context's network.
        activation: Of the context's network.
    """

    shift: jax.Array
    log_scale: jax.Array
    network: MLP | None
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
        self.dim = check_count("flows.ElementwiseAffine", "dim", dim)
        self.context_dim = check_count("flows.ElementwiseAffine", "context_dim", context_dim, 0)
        self.shift, self.log_scale = zeros(dim), zeros(dim)
        key = typed_key(key, "flows.ElementwiseAffine")
        self.network = MLP(key, context_dim, 2 * dim, hidden, activation) if context_dim else None

    def _forward(self, x, context):
        shift, log_scale = self._read(context)
        return x * jnp.exp(log_scale) + shift, jnp.sum(log_scale)

    def _backward(self, y, context):
        shift, log_scale = self._read(context)
        return (y - shift) * jnp.exp(-log_scale), -jnp.sum(log_scale)

    def _read(self, context):
        if self.network is None:
            return self.shift, self.log_scale
        moved = self.network(context)
        return self.shift + moved[: self.dim], self.log_scale + moved[self.dim :]


class Permutation(Bijection):
    """`y[i] = x[order[i]]`. Its own inverse where the order is.

    Args:
        order: A permutation of `0, ..., dim - 1`.
    """

    order: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, order: Sequence[int]):
        self.order = tuple(int(i) for i in order)
        if not self.order or sorted(self.order) != list(range(len(self.order))):
            raise InvalidValue(
                f"flows.Permutation takes an order of 0, ..., dim - 1 in which each occurs once, "
                f"got {self.order}."
            )

    @classmethod
    def reverse(cls, dim: int) -> Permutation:
        """The last coordinate first."""
        return cls(range(check_count("flows.Permutation.reverse", "dim", dim) - 1, -1, -1))

    @classmethod
    def shuffled(cls, dim: int, seed: int) -> Permutation:
        """A random order, the same for the same seed.

        The seed is a Python int, not a key: an order is part of the structure of a flow, so it
        must be known while a program is traced.
        """
        check_count("flows.Permutation.shuffled", "dim", dim)
        return cls(np.random.default_rng(seed).permutation(dim))

    @property
    def dim(self) -> int:
        return len(self.order)

    @property
    def context_dim(self) -> int:
        return 0

    def _forward(self, x, context):
        return x[np.array(self.order)], jnp.zeros((), x.dtype)

    def _backward(self, y, context):
        return y[np.argsort(self.order)], jnp.zeros((), y.dtype)


class LU(Bijection):
    """`y = P L U x + t`: an invertible matrix as permutation, unit lower and upper triangle.

    Kingma and Dhariwal, "Glow", NeurIPS 2018, eq. 10, with all of the diagonal positive: a sign is
    taken up by the layers around, and the determinant costs nothing.

    Args:
        key: Typed PRNG key.
        dim: Length of a vector.
        order: The permutation `P`, fixed; by default the reversal.
    """

    lower: jax.Array  # below the diagonal
    upper: jax.Array  # above the diagonal
    log_diagonal: jax.Array
    shift: jax.Array
    order: Permutation
    dim: int = eqx.field(static=True)

    def __init__(self, key: Any, dim: int, *, order: Sequence[int] | None = None):
        self.dim = check_count("flows.LU", "dim", dim)
        self.order = Permutation.reverse(dim) if order is None else Permutation(order)
        if self.order.dim != dim:
            raise InvalidValue(f"flows.LU: order has {self.order.dim} entries, but dim is {dim}.")
        size = dim * (dim - 1) // 2
        key = typed_key(key, "flows.LU")
        self.lower, self.upper = normals(key, ((size,), (size,)), (INITIAL_SCALE, INITIAL_SCALE))
        self.log_diagonal, self.shift = zeros(dim), zeros(dim)

    @property
    def context_dim(self) -> int:
        return 0

    def _forward(self, x, context):
        lower, upper = self._factors()
        y, _ = self.order._forward(dot(lower, dot(upper, x)), None)
        return y + self.shift, jnp.sum(self.log_diagonal)

    def _backward(self, y, context):
        lower, upper = self._factors()
        # The matrix is inverted, not the vector solved for: under `vmap` over vectors that happens
        # once, and the rest is a product (a hundred times as fast on a CPU).
        identity = jnp.eye(self.dim, dtype=lower.dtype)
        inverse = solve_triangular(lower, identity, lower=True, unit_diagonal=True)
        inverse = solve_triangular(upper, inverse, lower=False)
        x, _ = self.order._backward(y - self.shift, None)
        return dot(inverse, x), -jnp.sum(self.log_diagonal)

    def _factors(self):
        d = self.dim
        lower = jnp.eye(d, dtype=self.lower.dtype).at[np.tril_indices(d, -1)].set(self.lower)
        upper = jnp.diag(jnp.exp(self.log_diagonal)).at[np.triu_indices(d, 1)].set(self.upper)
        return lower, upper
