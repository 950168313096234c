"""Independent draws for a whole population from one key.

A draw is a small program of random bits and arithmetic. Mapping it over one key per particle costs
a key derivation and a hash block per particle; drawing the bits of all particles at once from one
key gives the same law for a quarter of the hashing. So the draw is staged for one element and run
with its `random_bits` widened to all elements. Where a key reaches anything else (a rejection
sampler's loop, say), it is split into one key per element there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from abduce.ppl import _jax
from abduce.ppl.site import Site, elementwise

__all__ = ["draw_many", "draw_site", "score_site"]

_STRUCTURAL = (
    "slice", "squeeze", "reshape", "dynamic_slice", "gather", "transpose", "broadcast_in_dim",
    "copy", "copy_p",
)  # fmt: skip


def draw_many(draw: Callable[..., Any], key: Any, n: int, operands: Sequence[Any], mapped: Any):
    """Draws `n` independent values.

    Args:
        draw: `(key, *element operands) -> array`.
        key: One random key for all.
        n: How many.
        operands: Arrays; those flagged in `mapped` have a leading axis of length `n`.
        mapped: A flag for each operand.

    Returns:
        Shape `(n, *element shape)`.
    """
    element = [x[0] if m else x for x, m in zip(operands, mapped, strict=True)]
    jaxpr = jax.make_jaxpr(draw)(key, *element)
    values = [_Shared(key), *(_Row(x) if m else x for x, m in zip(operands, mapped, strict=True))]
    (out,) = _run(jaxpr, values, n)
    if isinstance(out, _Row):
        return out.array
    return jnp.broadcast_to(_plain(out), (n, *jnp.shape(_plain(out))))  # a point mass


class _Row:
    """A value with one entry per element, on axis 0."""

    __slots__ = ("array",)

    def __init__(self, array):
        self.array = array


class _Shared:
    """A random key (or several) from which the draws of all elements come."""

    __slots__ = ("key",)

    def __init__(self, key):
        self.key = key


def _plain(x: Any) -> Any:
    return x.array if isinstance(x, _Row) else x


def _run(jaxpr: Any, args: Sequence[Any], n: int) -> list[Any]:
    inner, consts = _jax.inner_jaxpr(jaxpr)
    env: dict[Any, Any] = dict(zip(inner.constvars, consts, strict=True))
    env.update(zip(inner.invars, args, strict=True))

    def read(atom):
        return _jax.literal_value(atom) if isinstance(atom, _jax.Literal) else env[atom]

    for eqn in inner.eqns:
        outs = _equation(eqn, [read(a) for a in eqn.invars], n)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in inner.outvars]


def _equation(eqn: Any, vals: list[Any], n: int) -> list[Any]:
    name = eqn.primitive.name
    if any(isinstance(v, _Shared) for v in vals):
        if name == "random_bits" and vals[0].key.shape == ():
            p = eqn.params
            bits = jax.random.bits(vals[0].key, (n, *p["shape"]), f"uint{p['bit_width']}")
            return [_Row(bits)]
        others = [v for v in vals if not isinstance(v, _Shared)]
        fixed = not any(isinstance(v, _Row) for v in others)
        if fixed and name in ("random_split", "random_fold_in", *_STRUCTURAL):
            plain = [v.key if isinstance(v, _Shared) else v for v in vals]
            return [_Shared(x) for x in _jax.evaluate(eqn, plain)]
        call = _jax.call_jaxpr(eqn)
        if call is not None:
            return _run(call[1], vals, n)
        vals = [_Row(_split(v.key, n)) if isinstance(v, _Shared) else v for v in vals]
    if not any(isinstance(v, _Row) for v in vals):
        return _jax.evaluate(eqn, vals)
    in_axes = tuple(0 if isinstance(v, _Row) else None for v in vals)
    mapped = jax.vmap(lambda *xs: _jax.evaluate(eqn, xs), in_axes=in_axes, axis_size=n)
    return [_Row(x) for x in mapped(*(_plain(v) for v in vals))]


def _split(key: Any, n: int) -> Any:
    """`n` keys for each key, new axis in front."""
    flat = key.reshape(-1)
    keys = jax.vmap(lambda k: jax.random.split(k, n), out_axes=1)(flat)
    return keys.reshape((n, *key.shape))


def draw_site(
    site: Site, draw: Callable[..., Any], key: Any, n: int, operands: Sequence[Any], mapped: Any
) -> Any:
    """Draws a site for `n` particles.

    Args:
        site: Its mapped axes.
        draw: `(key, operands of one element) -> value`.
        key: One random key.
        n: Number of particles.
        operands: Of the site; those flagged have the particles in front.
        mapped: A flag for each operand.

    Returns:
        Shape `(n, *site.full_shape)`.
    """
    sizes = site.axis_sizes
    total = n * math.prod(sizes)
    flat, flags = [], []
    for i, (x, m) in enumerate(zip(operands, mapped, strict=True)):
        present = [a.mapped[i] for a in site.axes]
        if not m and not any(present):
            flat.append(x)
            flags.append(False)
            continue
        lead = (n if m else 1, *(s if p else 1 for s, p in zip(sizes, present, strict=True)))
        rest = jnp.shape(x)[int(m) + sum(present) :]
        x = jnp.broadcast_to(jnp.reshape(x, lead + rest), (n, *sizes, *rest))
        flat.append(x.reshape((total, *rest)))
        flags.append(True)
    out = draw_many(lambda k, *ops: draw(k, list(ops)), key, total, flat, flags)
    return out.reshape((n, *sizes, *out.shape[1:]))


def score_site(
    site: Site, score: Callable[..., Any], n: int, operands: Sequence[Any], mapped: Any, *extra: Any
) -> Any:
    """Runs `score(operands, *extra)` for each particle and each element of the mapped axes.

    Args:
        site: Its mapped axes.
        score: Takes the operands of one element, then one element of each extra.
        n: Number of particles.
        operands: Of the site; those flagged have the particles in front.
        mapped: A flag for each operand.
        *extra: Pairs `(array, has particles)`, or None; arrays have all mapped axes.
    """

    def particle(ops, extras):
        return elementwise(site, score, ops, *extras)

    axes = (
        [0 if m else None for m in mapped],
        [None if e is None else (0 if e[1] else None) for e in extra],
    )
    values = (list(operands), [None if e is None else e[0] for e in extra])
    if not any(mapped) and not any(e is not None and e[1] for e in extra):
        return particle(*values)
    return jax.vmap(particle, in_axes=axes, axis_size=n)(*values)
