"""The network of the Distribution Transformer: prior components and data in, components out.

Components of the prior become tokens, so do observations. In each layer the component tokens
attend to one another, then to the observation tokens, then pass through a two-layer network; there
are no positions, so permuting components permutes the output, and permuting the observations of a
set leaves it. The posterior's components are read off the tokens one by one.

Whittle, Ziomek, Rawling and Osborne, "Distribution Transformers: Fast Approximate Bayesian
Inference With On-The-Fly Prior Adaptation" (2025), section 3.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.amortized.attention import Dense, LayerNorm, attend
from abduce.amortized.mixtures import GaussianMixture, from_numbers, num_numbers, to_numbers
from abduce.errors import InvalidAlgorithm

__all__ = ["Block", "DTNetwork", "Perceptron"]

_LEAST_LOG_WEIGHT = -12.0
_LARGEST = 12.0  # of the log of a standard deviation, in standardized coordinates


class Perceptron(eqx.Module):
    """One hidden layer.

    Args:
        key: Typed PRNG key.
        in_dim, hidden, out_dim: Widths.
        scale: Of the last layer's initial weights.
    """

    first: Dense
    second: Dense

    def __init__(self, key: Any, in_dim: int, hidden: int, out_dim: int, scale: float = 1.0):
        k1, k2 = jax.random.split(key)
        self.first = Dense(k1, in_dim, hidden)
        self.second = Dense(k2, hidden, out_dim, scale=scale)

    def __call__(self, x: Any) -> Any:
        """Maps the last axis."""
        return self.second(jax.nn.gelu(self.first(x)))


class Attention(eqx.Module):
    """Multi-head attention of tokens to others."""

    query: Dense
    key_value: Dense
    out: Dense
    num_heads: int = eqx.field(static=True)

    def __init__(self, key: Any, width: int, num_heads: int):
        keys = jax.random.split(key, 3)
        self.query = Dense(keys[0], width, width, bias=False)
        self.key_value = Dense(keys[1], width, 2 * width, bias=False)
        self.out = Dense(keys[2], width, width, scale=0.0)
        self.num_heads = num_heads

    def __call__(self, tokens: Any, others: Any, mask: Any = None) -> Any:
        """Shape `(m, width)` for tokens `(m, width)` and others `(n, width)`; mask `(n,)`."""
        m, width = tokens.shape
        heads = (self.num_heads, width // self.num_heads)
        q = self.query(tokens).reshape(m, *heads).swapaxes(0, 1)
        both = self.key_value(others).reshape(-1, 2, *heads).transpose(1, 2, 0, 3)
        mixed = attend(q, both[0], both[1], mask)
        return self.out(mixed.swapaxes(0, 1).reshape(m, width))


class Block(eqx.Module):
    """One decoder layer; normalization stands before each part, and a new layer is the identity."""

    norms: tuple[LayerNorm, LayerNorm, LayerNorm]
    to_components: Attention
    to_data: Attention
    feed_forward: Perceptron

    def __init__(self, key: Any, width: int, num_heads: int, hidden: int):
        keys = jax.random.split(key, 3)
        self.norms = (LayerNorm(width), LayerNorm(width), LayerNorm(width))
        self.to_components = Attention(keys[0], width, num_heads)
        self.to_data = Attention(keys[1], width, num_heads)
        self.feed_forward = Perceptron(keys[2], width, hidden, width, scale=0.0)

    def __call__(self, tokens: Any, data: Any, mask: Any) -> Any:
        """The next layer's tokens, `(k, width)`."""
        x = self.norms[0](tokens)
        tokens = tokens + self.to_components(x, x)
        tokens = tokens + self.to_data(self.norms[1](tokens), data, mask)
        return tokens + self.feed_forward(self.norms[2](tokens))


class DTNetwork(eqx.Module):
    """The network, in standardized coordinates.

    Args:
        key: Typed PRNG key.
        prior_dim, target_dim: Coordinates of the prior and of the posterior.
        features: Length of the tokens of each kind of observation.
        width, num_layers, num_heads, hidden: Of the transformer.
    """

    embed: Perceptron
    readers: tuple[Perceptron, ...]
    blocks: tuple[Block, ...]
    norm: LayerNorm
    head: Perceptron
    prior_head: Perceptron | None
    prior_dim: int = eqx.field(static=True)
    target_dim: int = eqx.field(static=True)

    def __init__(
        self,
        key: Any,
        prior_dim: int,
        target_dim: int,
        features: tuple[int, ...],
        *,
        width: int,
        num_layers: int,
        num_heads: int,
        hidden: int,
    ):
        if width % num_heads:
            raise InvalidAlgorithm(
                f"width {width} is not divisible by num_heads {num_heads}: each head has "
                f"width / num_heads numbers."
            )
        keys = jax.random.split(key, 4)
        self.embed = Perceptron(keys[0], num_numbers(prior_dim), 2 * width, width)
        self.readers = tuple(
            Perceptron(k, n, 2 * width, width)
            for k, n in zip(jax.random.split(keys[1], len(features)), features, strict=True)
        )
        self.blocks = tuple(
            Block(k, width, num_heads, hidden) for k in jax.random.split(keys[2], num_layers)
        )
        self.norm = LayerNorm(width)
        k1, k2 = jax.random.split(keys[3])
        self.head = Perceptron(k1, width, 2 * width, num_numbers(target_dim))
        self.prior_head = None
        if prior_dim != target_dim:
            self.prior_head = Perceptron(k2, width, 2 * width, num_numbers(prior_dim))
        self.prior_dim, self.target_dim = prior_dim, target_dim

    def tokens(self, prior: GaussianMixture) -> Any:
        """One token per component, `(k, width)`."""
        numbers = to_numbers(prior)
        d = prior.dim
        weight = jnp.maximum(numbers[:, :1], _LEAST_LOG_WEIGHT)
        means = 3 * jnp.arcsinh(numbers[:, 1 : 1 + d] / 3)  # one far mean must not swamp the rest
        return self.embed(jnp.concatenate([weight, means, numbers[:, 1 + d :]], -1))

    def decode(self, tokens: Any, *, prior: bool = False) -> GaussianMixture:
        """The mixture that tokens stand for; `prior`: over the prior's coordinates."""
        head, d = self.head, self.target_dim
        if prior and self.prior_head is not None:
            head = self.prior_head
            d = self.prior_dim
        numbers = head(self.norm(tokens))
        log_scale = _LARGEST * jnp.tanh(numbers[:, 1 + d : 1 + 2 * d] / _LARGEST)
        numbers = jnp.concatenate([numbers[:, : 1 + d], log_scale, numbers[:, 1 + 2 * d :]], -1)
        return from_numbers(numbers, d)

    def __call__(self, prior: GaussianMixture, data: Any, masks: Any) -> GaussianMixture:
        """The posterior.

        Args:
            prior: Over standardized coordinates.
            data: For each kind of observation, tokens `(n, features)`.
            masks: For each kind, which tokens there are, `(n,)`.
        """
        tokens = self.tokens(prior)
        seen = jnp.concatenate([f(x) for f, x in zip(self.readers, data, strict=True)])
        mask = jnp.concatenate(list(masks))
        for block in self.blocks:
            tokens = block(tokens, seen, mask)
        return self.decode(tokens)
