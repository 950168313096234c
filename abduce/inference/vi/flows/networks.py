"""Networks that give a bijection its parameters: a plain one, and one that respects an order."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidValue
from abduce.inference.vi.flows.bijection import check_count

__all__ = ["ACTIVATIONS", "INITIAL_SCALE", "MADE", "MLP", "check_sizes", "dot", "normals", "zeros"]

ACTIVATIONS: MappingProxyType[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "elu": jax.nn.elu,
        "gelu": jax.nn.gelu,
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
        "softplus": jax.nn.softplus,
        "tanh": jnp.tanh,
    }
)

INITIAL_SCALE = 0.01  # of a last layer: a new flow is nearly the identity, but not symmetric


class MLP(eqx.Module):
    """A fully connected network.

    Weights are normal with variance one over the number of inputs, biases are zero; the last layer
    is scaled down by `INITIAL_SCALE`.

    Args:
        key: Typed PRNG key.
        in_dim, out_dim: Lengths of the input and of the output.
        hidden: Widths of the hidden layers; empty for an affine map.
        activation: A name in `ACTIVATIONS`.
    """

    weights: tuple[jax.Array, ...]
    biases: tuple[jax.Array, ...]
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        key: Any,
        in_dim: int,
        out_dim: int,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
    ):
        sizes = (in_dim, *check_sizes("MLP", hidden, activation), out_dim)
        shapes = tuple((m, n) for n, m in itertools.pairwise(sizes))
        scales = [1 / math.sqrt(max(n, 1)) for n in sizes[:-1]]
        scales[-1] *= INITIAL_SCALE
        self.weights = normals(key, shapes, scales)
        self.biases = tuple(zeros(m) for m in sizes[1:])
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """The output, shape `(out_dim,)`, for an input of shape `(in_dim,)`."""
        *hidden, last = zip(self.weights, self.biases, strict=True)
        for w, b in hidden:
            x = ACTIVATIONS[self.activation](dot(w, x) + b)
        return dot(last[0], x) + last[1]


class MADE(eqx.Module):
    """A masked network: row `i` of the output depends on inputs before `i` only.

    Germain, Gregor, Murray and Larochelle, "MADE: Masked Autoencoder for Distribution Estimation",
    ICML 2015. Input `i` has degree `i + 1`; a hidden unit of degree `k` sees units of degree up to
    `k` (eq. 8), and row `i` of the output sees hidden units of degree below `i + 1` (eq. 9).
    Degrees are spread evenly rather than drawn. Every unit sees the context.

    Args:
        key: Typed PRNG key.
        dim: Number of inputs, and of rows of the output.
        num_params: Length of a row.
        hidden: Widths of the hidden layers, at least one.
        context_dim: Length of the context; 0 for none.
        activation: A name in `ACTIVATIONS`.
    """

    weights: tuple[jax.Array, ...]
    biases: tuple[jax.Array, ...]
    context_weight: jax.Array | None
    out_weight: jax.Array  # (dim, num_params, hidden[-1])
    out_bias: jax.Array  # (dim, num_params)
    dim: int = eqx.field(static=True)
    context_dim: int = eqx.field(static=True)
    activation: str = eqx.field(static=True)

    def __init__(
        self,
        key: Any,
        dim: int,
        num_params: int,
        hidden: Sequence[int] = (64, 64),
        context_dim: int = 0,
        activation: str = "silu",
    ):
        hidden = check_sizes("MADE", hidden, activation)
        if not hidden:
            raise InvalidValue("MADE needs at least one hidden layer, got hidden=().")
        self.dim, self.context_dim, self.activation = dim, context_dim, activation
        *masks, out_mask = _masks(dim, hidden, bool(context_dim))
        shapes = [m.shape for m in masks]
        shapes += [(hidden[0], context_dim), (dim, num_params, hidden[-1])]
        scales: list[Any] = [_scales(m) for m in masks]
        scales += [1 / math.sqrt(max(context_dim, 1)), INITIAL_SCALE * _scales(out_mask)[:, None]]
        *weights, context_weight, self.out_weight = normals(key, tuple(shapes), scales)
        self.weights, self.biases = tuple(weights), tuple(zeros(n) for n in hidden)
        self.context_weight = context_weight if context_dim else None
        self.out_bias = zeros(dim, num_params)

    @property
    def hidden(self) -> tuple[int, ...]:
        """Widths of the hidden layers."""
        return tuple(b.shape[-1] for b in self.biases)

    def __call__(self, x: jax.Array, context: Any = None) -> jax.Array:
        """All rows, shape `(dim, num_params)`, for an input of shape `(dim,)`."""
        mask = self._masks()[-1]
        return dot(self.out_weight * mask[:, None], self._features(x, context)) + self.out_bias

    def row(self, i: jax.Array, x: jax.Array, context: Any = None) -> jax.Array:
        """Row `i`, shape `(num_params,)`; entries of `x` from `i` on do not matter."""
        weight = self.out_weight[i] * jnp.asarray(self._masks()[-1])[i]
        return dot(weight, self._features(x, context)) + self.out_bias[i]

    def _masks(self) -> tuple[np.ndarray, ...]:
        return _masks(self.dim, self.hidden, bool(self.context_dim))

    def _features(self, x: jax.Array, context: Any) -> jax.Array:
        """The last hidden layer."""
        act = ACTIVATIONS[self.activation]
        for j, (w, b, mask) in enumerate(
            zip(self.weights, self.biases, self._masks(), strict=False)
        ):
            x = dot(w * mask, x) + b
            if j == 0 and self.context_weight is not None:
                x = x + dot(self.context_weight, context)
            x = act(x)
        return x


@functools.lru_cache(maxsize=256)
def _masks(dim: int, hidden: tuple[int, ...], has_context: bool) -> tuple[np.ndarray, ...]:
    """Masks of each hidden layer, `(width, width before)`, then of the output, `(dim, width)`."""
    # Units of degree 0 see the context alone; without one they would be constants.
    least = 0 if has_context or dim == 1 else 1
    before = np.arange(1, dim + 1)
    masks = []
    for width in hidden:
        degrees = least + (np.arange(width) * (dim - least)) // width
        masks.append(degrees[:, None] >= before)
        before = degrees
    masks.append(np.arange(1, dim + 1)[:, None] > before)
    for mask in masks:
        mask.setflags(write=False)  # they are shared
    return tuple(masks)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of float32 in float32: accelerators round to fewer digits by default, and then
    the way back would miss where it started."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnums=1)
def normals(
    key: Any, shapes: tuple[tuple[int, ...], ...], scales: Sequence[Any]
) -> tuple[jax.Array, ...]:
    """Normal numbers of these shapes and standard deviations, from one draw.

    Programs that draw take most of the time in which a flow is made; this is one, whatever the
    number of shapes.
    """
    sizes = [math.prod(s) for s in shapes]
    flat = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    return tuple(
        (x.reshape(s) * c).astype(x.dtype) for x, s, c in zip(flat, shapes, scales, strict=True)
    )


def zeros(*shape: int) -> jax.Array:
    """Zeros of JAX's default float type, without a program to compile."""
    return jnp.asarray(np.zeros(shape), jnp.result_type(float))


def _scales(mask: np.ndarray) -> np.ndarray:
    """Standard deviation of the weights into each unit, by how many it sees."""
    return 1 / np.sqrt(np.maximum(mask.sum(axis=1, keepdims=True), 1))


def check_sizes(owner: str, hidden: Sequence[int], activation: str) -> tuple[int, ...]:
    """Widths of hidden layers as Python ints, and a known activation."""
    if activation not in ACTIVATIONS:
        raise InvalidValue(
            f"{owner}: unknown activation {activation!r}; choose from {sorted(ACTIVATIONS)}."
        )
    if not isinstance(hidden, Sequence):
        raise InvalidValue(f"{owner}: hidden must be a tuple of widths, got {hidden!r}.")
    return tuple(check_count(owner, "hidden", n) for n in hidden)
