"""Small networks that estimators are put together from."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.attention import ContextBlock, fold, stack
from abduce.errors import InvalidAlgorithm
from abduce.inference.vi.flows.networks import zeros

__all__ = [
    "SIZES",
    "Convolutions",
    "DeepSet",
    "Linear",
    "Pixels",
    "Residual",
    "SetTransformer",
    "cast",
    "check_settings",
    "squash",
    "stacked",
    "uniform",
]

SIZES = ("width", "depth", "context_dim", "num_layers", "num_bins", "num_components")
_FAR = 4.0  # spreads up to which `squash` is linear
_FEW = 12  # features up to which their products are pooled


def check_settings(settings: Any, heads: tuple[str, ...], sizes: tuple[str, ...]) -> None:
    """Settings of a network: a known head, sizes of at least 1, a known precision.

    Raises:
        InvalidAlgorithm: One does not fit.
    """
    if settings.head not in heads:
        raise InvalidAlgorithm(f"head={settings.head!r} is not one of {', '.join(heads)}.")
    for name in sizes:
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise InvalidAlgorithm(f"{name} must be an int >= 1, got {value!r}.")
    if settings.precision not in (None, "bfloat16"):
        raise InvalidAlgorithm(
            f"precision={settings.precision!r}: networks compute in float32 (None) or 'bfloat16'."
        )


def squash(z: Any) -> Any:
    """Linear up to a few spreads, then logarithmic; once differentiable, NaN stays.

    Written without `sign`, whose jump would be taken for one of a density that this is part of.
    """
    above, below = jnp.maximum(z, _FAR), jnp.maximum(-z, _FAR)
    return jnp.clip(z, -_FAR, _FAR) + _FAR * (jnp.log(above / _FAR) - jnp.log(below / _FAR))


def cast(tree: Any, dtype: Any) -> Any:
    """Floating-point arrays in another precision; what is None stays."""
    if dtype is None:
        return tree
    return jax.tree.map(
        lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree
    )


def stacked(modules: Any) -> Any:
    """Modules of one structure as one, with a leading axis on every array."""
    return jax.tree.map(lambda *xs: jnp.stack(xs) if eqx.is_array(xs[0]) else xs[0], *modules)


def uniform(key: Any, shape: tuple[int, ...], bound: float) -> jax.Array:
    """Numbers between `-bound` and `bound`.

    From a known key they are drawn on the host: a network has dozens of matrices, and a program
    for each would take longer to compile than short networks take to train.
    """
    if isinstance(key, jax.core.Tracer):
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).astype(np.uint64).tolist())
    return jnp.asarray(rng.uniform(-bound, bound, shape), jnp.result_type(float))


class Linear(eqx.Module):
    """`W x + b`; weights uniform with variance `gain^2 / in_dim`.

    Args:
        key: Typed PRNG key.
        in_dim, out_dim: Lengths of the input and of the output.
        gain: 0 starts at zero.
    """

    weight: jax.Array
    bias: jax.Array

    def __init__(self, key: Any, in_dim: int, out_dim: int, gain: float = 1.0):
        bound = gain * math.sqrt(3 / max(in_dim, 1))
        self.weight = uniform(key, (out_dim, in_dim), bound)
        self.bias = zeros(out_dim)

    def __call__(self, x: Any) -> Any:
        """Acts on the last axis of an array of any shape."""
        return x @ self.weight.T + self.bias


class Residual(eqx.Module):
    """A linear map, residual blocks `x + V silu(W silu(x))`, and a linear map.

    He, Zhang, Ren and Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016. The second
    map of a block starts at zero.

    Args:
        key: Typed PRNG key.
        in_dim, out_dim: Lengths of the input and of the output.
        width: Of the hidden layers.
        depth: Number of blocks.
        gain: Of the last map; 0 starts at zero.
    """

    first: Linear
    blocks: tuple[tuple[Linear, Linear], ...]
    last: Linear

    def __init__(
        self, key: Any, in_dim: int, out_dim: int, width: int, depth: int, gain: float = 1.0
    ):
        keys = jax.random.split(key, 2 * depth + 2)
        self.first = Linear(keys[0], in_dim, width)
        self.blocks = tuple(
            (Linear(keys[2 * i + 1], width, width), Linear(keys[2 * i + 2], width, width, 0.0))
            for i in range(depth)
        )
        self.last = Linear(keys[-1], width, out_dim, gain)

    def __call__(self, x: Any) -> Any:
        """Shape `(..., out_dim)` for an input of shape `(..., in_dim)`."""
        x = self.first(x)
        for a, b in self.blocks:
            x = x + b(jax.nn.silu(a(jax.nn.silu(x))))
        return self.last(jax.nn.silu(x))


class DeepSet(eqx.Module):
    """A function of a set: elements through a network, pooled, with the logarithm of their number.

    Zaheer, Kottur, Ravanbakhsh, Poczos, Salakhutdinov and Smola, "Deep Sets", NeurIPS 2017. Half
    of the pooled features are means, half are maxima, so that both averages and extremes (the
    sufficient statistics of many families) are within reach. The means of products of two features
    are given as well, where there are few: they are the sufficient statistics of linear models,
    and products are what such networks learn worst.

    Args:
        key: Typed PRNG key.
        in_dim: Features of an element.
        out_dim: Features of the set.
        width, depth: Of both networks.
    """

    inner: Residual
    outer: Residual

    def __init__(self, key: Any, in_dim: int, out_dim: int, width: int, depth: int):
        k1, k2 = jax.random.split(key)
        # Elements are many: their network has one hidden layer unless more depth is asked for.
        self.inner = Residual(k1, in_dim, width, width, max(0, depth - 2))
        products = in_dim * (in_dim + 1) // 2 if in_dim <= _FEW else 0
        self.outer = Residual(k2, width + 2 + products, out_dim, width, depth)

    def __call__(self, x: Any, mask: Any) -> Any:
        """Shape `(out_dim,)`.

        Args:
            x: Shape `(n, in_dim)`.
            mask: Which elements there are, bool, shape `(n,)`.
        """
        h = self.inner(x)
        half = h.shape[-1] // 2
        on = mask[:, None]
        n = jnp.sum(mask).astype(h.dtype)
        mean = jnp.sum(jnp.where(on, h[:, :half], 0.0), 0) / jnp.maximum(n, 1.0)
        top = jnp.max(jnp.where(on, h[:, half:], -10.0), 0, initial=-10.0)
        size = jnp.stack([jnp.log1p(n) / 2, 1 / (1 + n)]).astype(h.dtype)
        parts = [mean, top, size]
        if x.shape[-1] <= _FEW:
            there = jnp.where(on, x, 0.0)
            rows, columns = np.triu_indices(x.shape[-1])
            parts.append((there.T @ there)[rows, columns] / jnp.maximum(n, 1.0))
        return self.outer(jnp.concatenate(parts))


class SetTransformer(eqx.Module):
    """A function of a set: its elements attend to each other, then one query collects them.

    Lee, Lee, Kim, Kosiorek, Choi and Teh, "Set Transformer", ICML 2019; for posteriors over sets of
    any size, Sherki, Oseledets and Muravleva, "Combining Flow Matching and Transformers for
    Efficient Solution of Bayesian Inverse Problems", 2025. Cost grows with the square of the number
    of elements.

    Args:
        key: Typed PRNG key.
        in_dim: Features of an element.
        out_dim: Features of the set.
        width: Of the tokens; divisible by 4, or attention has one head.
        depth: Layers.
    """

    embed: Residual
    query: jax.Array
    blocks: Any
    outer: Residual

    def __init__(self, key: Any, in_dim: int, out_dim: int, width: int, depth: int):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        self.embed = Residual(k1, in_dim, width, width, 1)
        self.query = uniform(k2, (width,), 1.0)
        heads = 4 if width % 4 == 0 else 1
        self.blocks = stack(lambda k: ContextBlock(k, width, heads, 2 * width), k3, depth)
        self.outer = Residual(k4, width + 2, out_dim, width, 1)

    def __call__(self, x: Any, mask: Any) -> Any:
        """Shape `(out_dim,)`; arguments as of `DeepSet`."""
        tokens = jnp.concatenate([self.embed(x), self.query[None].astype(x.dtype)])
        seen = jnp.append(mask, True)  # and the learned key; the query is seen by none

        def step(block, tokens, _):
            return block(tokens, block.keys_values(tokens[:-1]), seen), None

        tokens, _ = fold(self.blocks, tokens, step)
        n = jnp.sum(mask).astype(tokens.dtype)
        size = jnp.stack([jnp.log1p(n) / 2, 1 / (1 + n)])
        return self.outer(jnp.concatenate([tokens[-1], size]))


class Convolutions(eqx.Module):
    """A function of a sequence: convolutions that halve its length, and pooling at the end.

    Steps come with their position, so that what changes over time is seen.

    Args:
        key: Typed PRNG key.
        in_dim: Features of a step.
        out_dim: Features of the sequence.
        width: Channels.
        length: Of the sequences in training; sets how often the length is halved.
    """

    first: Linear
    kernels: tuple[jax.Array, ...]  # (3 steps, in, out)
    biases: tuple[jax.Array, ...]
    outer: Residual

    def __init__(self, key: Any, in_dim: int, out_dim: int, width: int, length: int):
        levels = max(1, min(6, int(math.log2(max(length, 2))) - 2))
        keys = jax.random.split(key, levels + 2)
        self.first = Linear(keys[0], in_dim + 2, width)
        bound = math.sqrt(2 / (3 * width))
        self.kernels = tuple(
            uniform(k, (3, width, width), math.sqrt(3) * bound) for k in keys[1 : levels + 1]
        )
        self.biases = tuple(zeros(width) for _ in range(levels))
        self.outer = Residual(keys[-1], 4 * width, out_dim, width, 1)

    def __call__(self, x: Any, mask: Any) -> Any:
        """Shape `(out_dim,)`, for `x` of shape `(n, in_dim)` and a mask of shape `(n,)`."""
        n = x.shape[0]
        t = jnp.linspace(-1.0, 1.0, n, dtype=x.dtype)
        h = self.first(jnp.concatenate([x, t[:, None], mask[:, None].astype(x.dtype)], -1))
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            y = jax.lax.conv_general_dilated(
                jax.nn.silu(h)[None], kernel, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )[0]
            h = y + bias + h[::2]
        h = jax.nn.silu(h)
        pooled = jnp.concatenate([jnp.mean(h, 0), jnp.max(h, 0), h[0], h[-1]])
        return self.outer(pooled)


class Pixels(eqx.Module):
    """A function of an image: convolutions that halve height and width, and pooling at the end.

    Args:
        key: Typed PRNG key.
        shape: Height, width and channels.
        out_dim: Features of the image.
        width: Channels of the convolutions.
    """

    kernels: tuple[jax.Array, ...]
    biases: tuple[jax.Array, ...]
    outer: Residual

    def __init__(self, key: Any, shape: tuple[int, int, int], out_dim: int, width: int):
        h, w, c = shape
        levels = max(1, int(math.log2(min(h, w))) - 2)
        keys = jax.random.split(key, levels + 1)
        channels = [c + 2] + [width] * levels
        self.kernels = tuple(
            uniform(k, (3, 3, a, b), math.sqrt(6 / (9 * a)))
            for k, a, b in zip(keys, channels[:-1], channels[1:], strict=False)
        )
        self.biases = tuple(zeros(width) for _ in range(levels))
        for _ in range(levels):
            h, w = -(-h // 2), -(-w // 2)
        self.outer = Residual(keys[-1], h * w * width, out_dim, width, 1)

    def __call__(self, x: Any) -> Any:
        """Shape `(out_dim,)`, for `x` of shape `(height, width, channels)`."""
        h, w, _ = x.shape
        rows = jnp.broadcast_to(jnp.linspace(-1, 1, h, dtype=x.dtype)[:, None, None], (h, w, 1))
        columns = jnp.broadcast_to(jnp.linspace(-1, 1, w, dtype=x.dtype)[None, :, None], (h, w, 1))
        y = jnp.concatenate([x, rows, columns], -1)[None]
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            y = jax.nn.silu(
                jax.lax.conv_general_dilated(
                    y, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                + bias
            )
        return self.outer(y.reshape(-1))
