"""Attention of queries to keys, and transformer blocks whose keys come from a context alone.

Everything here reaches attention through one function, `attend`, so that a device kernel has one
place to stand in.
"""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.errors import InvalidAlgorithm, InvalidValue

__all__ = ["ContextBlock", "Dense", "LayerNorm", "attend", "fold", "stack"]


def attend(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
    """Scaled dot-product attention, `softmax(q k^T / sqrt(d)) v`.

    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, eq. 1. Scores and sums are float32
    (or wider) whatever the inputs are.

    Args:
        q: Queries, shape `(..., num_queries, d)`; heads are among the leading axes.
        k: Keys, shape `(..., num_keys, d)`, the same leading axes.
        v: Values, shape `(..., num_keys, e)`.
        mask: Boolean, broadcastable to `(..., num_queries, num_keys)`: which keys a query sees.
            A mask of shape `(num_keys,)` serves all queries. None: all.

    Returns:
        Shape `(..., num_queries, e)`, in the dtype of `v`; zero for a query that sees no key.

    Raises:
        InvalidValue: The shapes do not fit, or the mask is not boolean.
    """
    if q.shape[:-2] != k.shape[:-2] or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise InvalidValue(
            f"attend: q {q.shape}, k {k.shape} and v {v.shape} do not fit. Expected "
            f"(..., num_queries, d), (..., num_keys, d) and (..., num_keys, e), with equal leading "
            f"axes."
        )
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("...md,...nd->...mn", q, k, preferred_element_type=wide)
    scores = scores * (1 / math.sqrt(q.shape[-1]))
    if mask is not None:
        if mask.dtype != bool:
            raise InvalidValue(f"attend: mask must be boolean, got dtype {mask.dtype}.")
        scores = jnp.where(mask, scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("...mn,...ne->...me", weights.astype(v.dtype), v, preferred_element_type=wide)
    return (out / jnp.where(total > 0, total, 1.0)).astype(v.dtype)


class Dense(eqx.Module):
    """An affine map. The weights keep their dtype; the product is computed in that of the input.

    Args:
        key: Typed PRNG key.
        in_dim, out_dim: Lengths of input and output.
        scale: Of the initial weights, times one over the root of `in_dim`; 0 for none.
        bias: Whether there is one; it starts at zero.
    """

    weight: jax.Array  # (in_dim, out_dim)
    bias: jax.Array | None

    def __init__(
        self, key: Any, in_dim: int, out_dim: int, *, scale: float = 1.0, bias: bool = True
    ):
        noise = jax.random.normal(key, (in_dim, out_dim), jnp.result_type(float))
        self.weight = noise * (scale / math.sqrt(max(in_dim, 1)))
        self.bias = jnp.zeros(out_dim, jnp.result_type(float)) if bias else None

    def __call__(self, x: Any) -> Any:
        """Maps the last axis."""
        y = x @ self.weight.astype(x.dtype)
        return y if self.bias is None else y + self.bias.astype(x.dtype)


class LayerNorm(eqx.Module):
    """Mean 0, variance 1 over the last axis, then a learned scale and shift; in float32 or wider.

    Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """

    scale: jax.Array
    shift: jax.Array

    def __init__(self, dim: int):
        self.scale = jnp.ones(dim, jnp.result_type(float))
        self.shift = jnp.zeros(dim, jnp.result_type(float))

    def __call__(self, x: Any) -> Any:
        """Normalizes the last axis; the dtype stays."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centred**2, axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + 1e-6) * self.scale + self.shift).astype(x.dtype)


class ContextBlock(eqx.Module):
    """One transformer layer in which every token attends to context tokens, and to nothing else.

    Normalization stands before each part, and the last matrix of each part starts at zero, so that
    a new block is the identity. Besides the context, a token sees one learned key: it can attend
    to nothing, and with an empty context it has to. What a token becomes depends on itself and on
    the *set* of context tokens: there are no positions.

    Args:
        key: Typed PRNG key.
        width: Of a token.
        num_heads: Divides the width.
        hidden: Width of the hidden layer of the second part.
        precision: The dtype in which products are computed, such as "bfloat16"; None: that of the
            tokens. Tokens are summed in their own dtype.
    """

    first: LayerNorm
    second: LayerNorm
    query: Dense
    key_value: Dense
    out: Dense
    null: jax.Array  # (2, num_heads, 1, width // num_heads)
    up: Dense
    down: Dense
    num_heads: int = eqx.field(static=True)
    precision: str | None = eqx.field(static=True)

    def __init__(
        self, key: Any, width: int, num_heads: int, hidden: int, precision: str | None = None
    ):
        if width % num_heads:
            raise InvalidAlgorithm(
                f"width {width} is not divisible by num_heads {num_heads}: each head has "
                f"width / num_heads numbers."
            )
        keys = jax.random.split(key, 6)
        size = width // num_heads
        self.first, self.second = LayerNorm(width), LayerNorm(width)
        self.query = Dense(keys[0], width, width, bias=False)
        self.key_value = Dense(keys[1], width, 2 * width, bias=False)
        self.out = Dense(keys[2], width, width, scale=0.0)
        self.null = 0.1 * jax.random.normal(keys[3], (2, num_heads, 1, size))
        self.up = Dense(keys[4], width, hidden)
        self.down = Dense(keys[5], hidden, width, scale=0.0)
        self.num_heads, self.precision = num_heads, precision

    def keys_values(self, context: Any) -> Any:
        """What tokens attend to: `(2, num_heads, num_context + 1, width / num_heads)`."""
        both = self.key_value(self._compute(self.first(context)))  # (n, 2 width)
        n, size = both.shape[0], both.shape[1] // (2 * self.num_heads)
        both = both.reshape(n, 2, self.num_heads, size).transpose(1, 2, 0, 3)
        return jnp.concatenate([both, self.null.astype(both.dtype)], axis=2)

    def __call__(self, tokens: Any, keys_values: Any, mask: Any = None) -> Any:
        """The next layer's tokens.

        Args:
            tokens: Shape `(num_tokens, width)`.
            keys_values: From `keys_values`.
            mask: Boolean, `(num_context + 1,)`: which are seen; the last is the learned one.
        """
        m, width = tokens.shape
        q = self.query(self._compute(self.first(tokens)))
        q = q.reshape(m, self.num_heads, -1).swapaxes(0, 1)
        k, v = keys_values
        mixed = attend(q, k, v, mask).swapaxes(0, 1).reshape(m, width)
        tokens = tokens + self.out(mixed).astype(tokens.dtype)
        hidden = jax.nn.gelu(self.up(self._compute(self.second(tokens))))
        return tokens + self.down(hidden).astype(tokens.dtype)

    def _compute(self, x: Any) -> Any:
        return x if self.precision is None else x.astype(self.precision)


def stack(make: Any, key: Any, num: int) -> Any:
    """`num` modules in one, every array with a leading axis: `make(key)` for each of `num` keys."""
    return eqx.filter_vmap(make)(jax.random.split(key, num))


def fold(modules: Any, carry: Any, step: Any, xs: Any = None) -> tuple[Any, Any]:
    """Runs stacked modules one after the other; compile time does not grow with their number.

    Args:
        modules: From `stack`.
        carry: What is passed on.
        step: `(module, carry, x) -> (carry, y)`.
        xs: A pytree with a leading axis over the modules, or None.

    Returns:
        The last carry, and the stacked `y`.
    """
    arrays, static = eqx.partition(modules, eqx.is_array)

    def body(carry, both):
        mine, x = both
        return step(eqx.combine(mine, static), carry, x)

    return jax.lax.scan(body, carry, (arrays, xs))
