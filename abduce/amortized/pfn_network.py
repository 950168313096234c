"""The network of a prior-fitted network: tokens, layers, and a head for each target."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from abduce.amortized.attention import ContextBlock, Dense, LayerNorm, fold, stack
from abduce.amortized.bars import Bars
from abduce.amortized.pfn_sites import Column, Table
from abduce.amortized.predictive import Classes, Mixture, Predictive
from abduce.errors import InvalidAlgorithm

__all__ = ["Architecture", "PFNNetwork", "make_architecture", "prior_mass"]

_LEAST_SCALE = 1e-4  # of a bump or a component, relative to the prior's spread


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What decides the shapes of a network.

    Attributes:
        width: Length of a token.
        num_layers, num_heads: Of the transformer.
        head: 'bars' or 'mixture', for continuous targets.
        num_bars: Of the bar head.
        num_components: Of the mixture head.
        precision: 'float32' or 'bfloat16': the dtype of the products inside the layers.
    """

    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    head: str = "bars"
    num_bars: int = 1000
    num_components: int = 10
    precision: str = "float32"


def make_architecture(**settings: Any) -> Architecture:
    """An architecture from settings as users pass them, checked.

    Raises:
        InvalidAlgorithm: A setting does not fit.
    """
    for field in ("width", "num_layers", "num_heads", "num_bars", "num_components"):
        value, least = settings[field], 2 if field == "num_bars" else 1
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise InvalidAlgorithm(f"ab.pfn: {field} must be an int >= {least}, got {value!r}.")
        settings[field] = int(value)
    if settings["width"] % settings["num_heads"]:
        raise InvalidAlgorithm(
            f"ab.pfn: width {settings['width']} is not divisible by num_heads "
            f"{settings['num_heads']}."
        )
    for field, options in (("head", ("bars", "mixture")), ("precision", ("float32", "bfloat16"))):
        if settings[field] not in options:
            raise InvalidAlgorithm(
                f"ab.pfn: {field} must be one of {', '.join(map(repr, options))}, got "
                f"{settings[field]!r}."
            )
    return Architecture(**settings)


class BarHead(eqx.Module):
    """Log masses of bars: the prior's, tilted by one bump, plus a free part for each bar.

    With `z` the normal score of a bar under the prior, the bump turns a standard normal prior into
    any normal, so that a posterior that is nearly normal takes two numbers rather than a thousand.
    Both parts start at zero: an untrained network predicts the prior.
    """

    hidden: Dense
    free: Dense
    bump: Dense
    size: int = eqx.field(static=True)

    def __init__(self, key: Any, width: int, num_bars: int, size: int):
        k1, k2, k3 = jax.random.split(key, 3)
        self.hidden = Dense(k1, width, width)
        self.free = Dense(k2, width, size * num_bars, scale=0.0)
        self.bump = Dense(k3, width, size * 2, scale=0.0)
        self.size = size

    def __call__(self, x: Any, constants: Any) -> Any:
        """Logits, `(..., size, num_bars)`."""
        h = jax.nn.gelu(self.hidden(x))
        free = self.free(h).reshape((*x.shape[:-1], self.size, -1))
        bump = self.bump(h).reshape((*x.shape[:-1], self.size, 2, 1))
        log_mass = constants["log_mass"]
        mass = jnp.exp(log_mass)
        z = ndtri(jnp.clip(jnp.cumsum(mass) - 0.5 * mass, 1e-6, 1 - 1e-6))
        loc, scale = 3 * bump[..., 0, :], jnp.exp(bump[..., 1, :]) + _LEAST_SCALE
        return log_mass + 0.5 * z**2 - 0.5 * ((z - loc) / scale) ** 2 + free


class ClassHead(eqx.Module):
    """Logits of classes, relative to the prior's."""

    out: Dense
    size: int = eqx.field(static=True)

    def __init__(self, key: Any, width: int, num_classes: int, size: int):
        self.out = Dense(key, width, size * num_classes, scale=0.0)
        self.size = size

    def __call__(self, x: Any, constants: Any) -> Any:
        """Logits, `(..., size, num_classes)`."""
        logits = self.out(x).reshape((*x.shape[:-1], self.size, -1))
        return logits + constants["log_mass"]


class MixtureHead(eqx.Module):
    """Log weights, means and scales of normals, in unconstrained coordinates."""

    hidden: Dense
    out: Dense
    size: int = eqx.field(static=True)

    def __init__(self, key: Any, width: int, num_components: int, size: int):
        k1, k2 = jax.random.split(key)
        self.hidden = Dense(k1, width, width)
        self.out = Dense(k2, width, size * 3 * num_components, scale=0.0)
        self.size = size

    def __call__(self, x: Any, constants: Any) -> tuple[Any, Any, Any]:
        """Log weights, means and scales, each `(..., size, num_components)`."""
        out = self.out(jax.nn.gelu(self.hidden(x)))
        out = out.reshape((*x.shape[:-1], self.size, 3, -1))
        start = jnp.linspace(-1.5, 1.5, out.shape[-1])  # different, so that they part
        loc = constants["loc"] + constants["scale"] * (start + 3 * out[..., 1, :])
        scale = constants["scale"] * (0.5 * jnp.exp(out[..., 2, :]) + _LEAST_SCALE)
        return out[..., 0, :], loc, scale


class PFNNetwork(eqx.Module):
    """Tokens of points, layers that attend to the context alone, and heads.

    A point's token is a small network of its features, those of its targets included; a query's
    targets are blank. A global target has one learned token. No token ever depends on a query but
    its own.

    Args:
        key: Typed PRNG key.
        table: The sites.
        architecture: See there.
    """

    embed: Dense
    embed_out: Dense
    latents: jax.Array  # (num_latents, width)
    blocks: ContextBlock
    last: LayerNorm
    heads: dict[str, Any]
    table: Table = eqx.field(static=True)
    architecture: Architecture = eqx.field(static=True)

    def __init__(self, key: Any, table: Table, architecture: Architecture):
        width = architecture.width
        keys = jax.random.split(key, 4 + len(table.targets) + len(table.latents))
        self.embed = Dense(keys[0], table.num_features + 1, 2 * width)
        self.embed_out = Dense(keys[1], 2 * width, width)
        self.latents = jax.random.normal(keys[2], (len(table.latents), width))
        precision = None if architecture.precision == "float32" else architecture.precision

        def block(key):
            return ContextBlock(key, width, architecture.num_heads, 2 * width, precision)

        self.blocks = stack(block, keys[3], architecture.num_layers)
        self.last = LayerNorm(width)
        self.heads = {
            a: make_head(k, table.column(a), architecture)
            for k, a in zip(keys[4:], (*table.targets, *table.latents), strict=True)
        }
        self.table, self.architecture = table, architecture

    def tokens(self, features: Any, is_context: Any) -> Any:
        """Tokens of points, `(n, width)`, from features `(n, num_features)`."""
        flag = is_context.astype(features.dtype)[:, None]
        h = jax.nn.gelu(self.embed(jnp.concatenate([features, flag], axis=1)))
        return self.embed_out(h)

    def encode(self, context: Any, mask: Any) -> Any:
        """Keys and values of the context in every layer.

        Args:
            context: Tokens, `(n, width)`.
            mask: Boolean, `(n,)`: which are there.

        Returns:
            Shape `(num_layers, 2, num_heads, n + 1, width / num_heads)`.
        """
        seen = jnp.append(mask, True)

        def step(block, tokens, _):
            keys_values = block.keys_values(tokens)
            return block(tokens, keys_values, seen), keys_values

        return fold(self.blocks, context, step)[1]

    def decode(self, tokens: Any, keys_values: Any, mask: Any) -> Any:
        """Tokens after all layers, given what `encode` returned."""
        seen = jnp.append(mask, True)

        def step(block, tokens, keys_values):
            return block(tokens, keys_values, seen), None

        return self.last(fold(self.blocks, tokens, step, keys_values)[0])

    def together(self, tokens: Any, num_points: int, mask: Any) -> Any:
        """All tokens at once, for training: the first `num_points` may be context, by `mask`."""
        seen = jnp.append(mask, True)

        def step(block, tokens, _):
            return block(tokens, block.keys_values(tokens[:num_points]), seen), None

        return self.last(fold(self.blocks, tokens, step)[0])

    def predict(self, address: str, tokens: Any, constants: Any) -> Predictive:
        """The distribution of one target, from tokens `(..., width)` after all layers.

        Its batch shape is that of the tokens, then the target's own.
        """
        column = self.table.column(address)
        out = self.heads[address](tokens, constants)
        shape = (*tokens.shape[:-1], *column.shape)
        return make_prediction(column, out, constants, shape)


def make_head(key: Any, column: Column, architecture: Architecture) -> Any:
    """The head of one target."""
    if column.is_discrete:
        return ClassHead(key, architecture.width, column.num_classes, column.size)
    if architecture.head == "mixture":
        return MixtureHead(key, architecture.width, architecture.num_components, column.size)
    return BarHead(key, architecture.width, column.num_bars, column.size)


def make_prediction(column: Column, out: Any, constants: Any, shape: tuple[int, ...]) -> Predictive:
    """What a head's output means."""
    if isinstance(out, tuple):
        logits, loc, scale = (x.reshape((*shape, x.shape[-1])) for x in out)
        return Mixture(logits, loc, scale, column.lower, column.upper)
    logits = out.reshape((*shape, out.shape[-1]))
    if column.is_discrete:
        return Classes(logits, column.low, column.open_below, column.open_above)
    borders = jnp.asarray(constants["borders"])
    return Bars.tree_unflatten((column.lower is None, column.upper is None), (logits, borders))


def prior_mass(values: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Log fraction of draws in each bar, none of them zero."""
    index = np.clip(np.searchsorted(borders, values, side="right") - 1, 0, len(borders) - 2)
    counts = np.bincount(index.reshape(-1), minlength=len(borders) - 1) + 0.5
    return np.log(counts / counts.sum()).astype(np.float32)
