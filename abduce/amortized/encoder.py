"""From observations and arguments to one vector that a posterior head is conditioned on."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.layout import Group, Layout
from abduce.amortized.networks import (
    Convolutions,
    DeepSet,
    Pixels,
    Residual,
    SetTransformer,
    cast,
    squash,
)

__all__ = ["Encoder", "feature_scales", "features", "raw_features", "robust_scale"]


def raw_features(layout: Layout, example: Any, missing: Any) -> list[jax.Array]:
    """Per group: `(n, features)`, `(features,)` or `(height, width, channels)`, not standardized.

    Args:
        layout: Of the estimator.
        example: `observed` and `arguments` of one example.
        missing: By address, True where an entry is not there; None: sites with missing entries
            were not announced.
    """
    kinds = dict(layout.kinds)
    out = []
    for group in layout.groups:
        columns = []
        for a in group.sites:
            x = _numbers(kinds[a], example["observed"][a])
            gone = None
            if missing is not None:
                gone = jnp.broadcast_to(
                    missing[a].reshape(missing[a].shape + (1,) * (x.ndim - missing[a].ndim)),
                    x.shape,
                )
                x = jnp.where(gone, 0.0, x)
            columns.append(_columns(group, x))
            if gone is not None:
                columns.append(_columns(group, gone.astype(x.dtype)))
        for i in group.arguments:
            columns.append(_columns(group, _numbers("real", example["arguments"][i])))
        out.append(jnp.concatenate(columns, -1))
    return out


def _numbers(kind: str, x: Any) -> jax.Array:
    """Values on a scale on which they are spread out."""
    dtype = jnp.result_type(float)
    if kind.startswith("classes"):
        _, low, count = kind.split(":")
        return jax.nn.one_hot(x - int(low), int(count), dtype=dtype)
    x = jnp.asarray(x, dtype)
    if kind == "positive":
        return jnp.log(jnp.maximum(x, jnp.finfo(dtype).tiny))
    if kind == "count":
        return jnp.sqrt(jnp.maximum(x, 0.0))
    return x


def _columns(group: Group, x: jax.Array) -> jax.Array:
    if group.kind in ("set", "sequence"):
        return x.reshape(x.shape[0], -1)
    if group.kind == "image":
        return x.reshape((*x.shape[:2], -1))
    return x.reshape(-1)


def feature_scales(layout: Layout, raw: list[Any]) -> list[tuple[jax.Array, jax.Array]]:
    """Centre and spread of every feature, from prior draws: `raw` has a leading axis of draws.

    Elements of a set and steps of a sequence share them. Median and quantiles, since simulators
    have heavy tails; a constant feature gets spread 1.
    """
    out = []
    for group, x in zip(layout.groups, raw, strict=True):
        x = np.asarray(x, np.float64)
        if group.kind in ("set", "sequence", "image"):
            x = x.reshape(-1, x.shape[-1])
        mid, spread = robust_scale(x)
        dtype = jnp.result_type(float)
        out.append((jnp.asarray(mid, dtype), jnp.asarray(spread, dtype)))
    return out


def features(scales: Any, raw: list[Any]) -> list[jax.Array]:
    """Standardized; far out, logarithmic, so that one wild value does not swamp the rest."""
    out = []
    for (centre, spread), x in zip(scales, raw, strict=True):
        out.append(squash((x - centre) / spread))
    return out


def robust_scale(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """Median and half the width of the central 68% of each column of `(rows, columns)`.

    Columns that are mostly one value (indicators) have no spread by quantiles; they get their
    standard deviation, constants 1. What is not finite is left out.
    """
    x = np.asarray(x, np.float64)
    x = np.where(np.isfinite(x), x, np.nan)
    low, mid, high = np.nanquantile(x, [0.16, 0.5, 0.84], axis=0)
    spread, wide = (high - low) / 2, np.nanstd(x, axis=0)
    spread = np.where(spread > 1e-3 * wide, spread, wide)
    return mid, np.where(spread > 0, spread, 1.0)


class Encoder(eqx.Module):
    """One network per group, and one for all.

    Args:
        key: Typed PRNG key.
        layout: Of the estimator.
        dims: Features of each group (its last axis, or all of them).
        shapes: Shape of each group's features.
        out_dim: Length of the context.
        width, depth: Of the networks.
        precision: None or 'bfloat16'.
        extra: Length of a further vector.
        sets: 'pool' or 'transformer'.
    """

    parts: tuple[Any, ...]
    outer: Residual
    kinds: tuple[str, ...] = eqx.field(static=True)
    precision: str | None = eqx.field(static=True)

    def __init__(
        self,
        key: Any,
        layout: Layout,
        shapes: list[tuple[int, ...]],
        out_dim: int,
        width: int,
        depth: int,
        precision: str | None = None,
        extra: int = 0,
        sets: str = "pool",
    ):
        keys = jax.random.split(key, len(layout.groups) + 1)
        parts: list[Any] = []
        total = extra
        for k, group, shape in zip(keys, layout.groups, shapes, strict=False):
            if group.kind == "set":
                make = DeepSet if sets == "pool" else SetTransformer
                parts.append(make(k, shape[-1], width, width, depth))
                total += width
            elif group.kind == "sequence":
                parts.append(Convolutions(k, shape[-1], width, width, shape[0]))
                total += width
            elif group.kind == "image":
                parts.append(Pixels(k, shape, width, max(16, width // 2)))  # type: ignore[arg-type]
                total += width
            else:
                parts.append(None)
                total += math.prod(shape)
        self.parts = tuple(parts)
        self.outer = Residual(keys[-1], total, out_dim, width, depth)
        self.kinds = tuple(g.kind for g in layout.groups)
        self.precision = precision

    def __call__(self, groups: list[Any], mask: Any, extra: Any = None) -> jax.Array:
        """The context, shape `(out_dim,)`.

        Args:
            groups: Standardized features of each group.
            mask: Which elements of the sets there are, shape `(n,)`; None: all.
            extra: The further vector, or None.
        """
        groups = [*groups, *([] if extra is None else [extra])]
        me, groups = cast((self, groups), self.precision)
        out = []
        kinds = (*self.kinds, *([] if extra is None else ["vector"]))
        parts = (*me.parts, *([] if extra is None else [None]))
        for kind, part, x in zip(kinds, parts, groups, strict=True):
            if kind in ("set", "sequence"):
                there = jnp.ones(x.shape[0], bool)
                if kind == "set" and mask is not None:
                    there = mask
                out.append(part(x, there))
            elif kind == "image":
                out.append(part(x))
            else:
                out.append(x)
        context = me.outer(jnp.concatenate(out))
        return context.astype(jnp.result_type(float))
