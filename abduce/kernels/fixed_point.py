"""Cumulative weights in exact integer arithmetic, and what resampling does with them.

A resampling scheme compares uniform points with `C[j] = N (w[0] + ... + w[j])`. In float32 such
sums are wrong by whole counts beyond some 1e5 particles, and a sum made in blocks need not even
increase, so that a particle of weight zero could be drawn. Here a number of counts is a pair of
integers, `whole + part / 2**18`, and sums of pairs are exact: `C` increases, stays where a weight
is zero, ends at exactly `N`, and means the same on every device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

__all__ = [
    "Counts",
    "ancestors_from_ends",
    "cumsum",
    "cumulative",
    "differences",
    "invert",
    "uniform_below",
    "uniform_below_size",
]

BITS = 18  # the parts of a block and a carry sum to less than 2**24
ONE = 1 << BITS
MASK = ONE - 1
BLOCK = 32
EXACT = 1 << 24  # float32 holds every whole number up to here
FEW = 1 << 13  # for fewer particles 32 random bits are a whole part and a part
SHRINK = 1 - 2.0**-18  # below one by more than the rounding of a float32 tree sum
SHY = 1 - 2.0**-20  # what is added to sums must not lift them above their bound by rounding


class Counts(NamedTuple):
    """Numbers `whole + part / 2**18`, both int32, `part < 2**18`."""

    whole: jax.Array
    part: jax.Array


def cumulative(weights: jax.Array) -> Counts:
    """Cumulative sums of the weights, scaled so that the last is exactly their number.

    Each weight is rounded to a multiple of `2**-18` counts. The rounded weights sum to `N` within
    a relative 1e-5; what is missing is added in proportion to the sum so far.

    Args:
        weights: Non-negative, of float dtype, shape `(N,)`, at least one positive, none above 1.

    Returns:
        `C`, shape `(N,)`; increasing; `C[j] == C[j - 1]` exactly where `weights[j]` is zero (or
        below `2**-19` counts), and `(N, 0)` from the last positive weight on.
    """
    n, dtype = weights.shape[0], weights.dtype
    counts = weights * (n / _sum(weights))
    # The sums are stretched, only upwards so that they still increase. Whole numbers need none.
    is_whole = jnp.all(counts == jnp.floor(counts))
    sums = _rounded_sums(counts * jnp.where(is_whole, 1, SHRINK).astype(dtype))
    whole, part = sums
    missing = (n - whole[-1]).astype(dtype) - part[-1].astype(dtype) / ONE
    so_far = whole.astype(dtype)
    if n < EXACT:  # beyond, float32 holds not every whole number, and this might decrease
        so_far = so_far + part.astype(dtype) / ONE
    stretch = so_far * (jnp.maximum(missing, 0) / (n - missing) * SHY)
    stretch_whole = jnp.floor(stretch)
    stretch_part = ((stretch - stretch_whole) * ONE).astype(jnp.int32)
    whole, part = _carry(whole + stretch_whole.astype(jnp.int32), part + stretch_part)
    indices = jnp.arange(n)
    is_end = indices >= jnp.max(jnp.where(weights > 0, indices, 0))
    return Counts(jnp.where(is_end, n, whole), jnp.where(is_end, 0, part))


def differences(sums: Counts) -> Counts:
    """The terms of cumulative sums."""
    whole, part = (jnp.diff(x, prepend=jnp.zeros(1, jnp.int32)) for x in sums)
    return _carry(whole, part)  # a negative part borrows: shifts of int32 keep the sign


def cumsum(x: jax.Array) -> jax.Array:
    """Cumulative sums of non-negative int32, shape `(n,)`, that do not exceed `n`."""
    return _cumsum(x, x.shape[0] < EXACT)


def ancestors_from_ends(ends: jax.Array, n: int) -> jax.Array:
    """Ancestors of `n` slots: slot `i` has the first `j` with `ends[j] > i`.

    Args:
        ends: Increasing integers, shape `(num_particles,)`; particle `j` has the slots from
            `ends[j - 1]` to `ends[j] - 1`.
        n: Number of slots.

    Returns:
        int32, shape `(n,)`, increasing.
    """
    return cumsum(jnp.zeros(n, jnp.int32).at[ends].add(1, mode="drop"))


def invert(sums: Counts, points: Counts) -> jax.Array:
    """For each point, the first `j` with `C[j] > point`; points lie below `C[-1]`, a whole number.

    A table of the whole parts brackets the answer (the guide table of Chen and Asau, 1974); a
    binary search runs inside the brackets, as many steps as the fullest bracket needs.
    """
    n = sums.whole.shape[0]
    table = cumsum(jnp.zeros(n, jnp.int32).at[sums.whole].add(1, mode="drop"))
    low = jnp.where(points.whole > 0, table[points.whole - 1], 0)
    high = table[points.whole]

    def step(bracket):
        low, high = bracket
        middle = (low + high) // 2
        whole, part = sums.whole[middle], sums.part[middle]
        is_left = (whole > points.whole) | ((whole == points.whole) & (part > points.part))
        is_open = low < high
        return (
            jnp.where(is_open & ~is_left, middle + 1, low),
            jnp.where(is_open & is_left, middle, high),
        )

    return lax.while_loop(lambda b: jnp.any(b[0] < b[1]), step, (low, high))[0]


def uniform_below(key: jax.Array, shape: tuple[int, ...], bound: Counts) -> Counts:
    """Uniform numbers in `[0, bound)`, from 64 random bits each."""
    high, low = jax.random.bits(key, (2, *shape), jnp.uint32)
    bound_whole = jnp.asarray(bound.whole).astype(jnp.uint32)
    whole, fraction = _multiply(high, bound_whole)
    more = fraction + _multiply(low, bound_whole)[0]
    whole = whole + (more < fraction)  # unsigned sums wrap: carry
    part = _multiply(high, jnp.asarray(bound.part).astype(jnp.uint32))[0]
    return _carry(
        whole.astype(jnp.int32), (more >> (32 - BITS)).astype(jnp.int32) + part.astype(jnp.int32)
    )


def uniform_below_size(key: jax.Array, n: int) -> Counts:
    """`n` uniform numbers in `[0, n)`, with as many random bits as their resolution needs."""
    if n >= FEW:
        return uniform_below(key, (n,), Counts(jnp.int32(n), jnp.int32(0)))
    whole, fraction = _multiply(jax.random.bits(key, (n,), jnp.uint32), jnp.uint32(n))
    return Counts(whole.astype(jnp.int32), (fraction >> (32 - BITS)).astype(jnp.int32))


def _carry(whole: jax.Array, part: jax.Array) -> Counts:
    return Counts(whole + (part >> BITS), part & MASK)


def _rounded_sums(x: jax.Array) -> Counts:
    """Exact cumulative sums of floats rounded to fixed point."""
    whole = jnp.floor(x)
    part = jnp.round((x - whole) * ONE)
    counts = Counts(whole.astype(jnp.int32), part.astype(jnp.int32))
    return _cumsum_counts(counts, x.shape[0] < EXACT)


def _cumsum_counts(x: Counts, in_float: bool) -> Counts:
    """Cumulative sums of counts, level by level.

    Blocks are summed, the sums cumulated, and each block runs on from the sum before it. That sum
    is added to the block's first entry: added to all of its results, XLA's CPU compiler would walk
    through all levels again for each of them.
    """
    n = x.whole.shape[0]
    if n <= BLOCK:
        return _carry(_running(x.whole[None], in_float)[0], _running(x.part[None], True)[0])
    whole, part = (_blocks(y, BLOCK) for y in x)
    before = _cumsum_counts(_carry(jnp.sum(whole, axis=1), jnp.sum(part, axis=1)), in_float)
    whole = _running(_start_from(whole, before.whole), in_float).reshape(-1)[:n]
    part = _running(_start_from(part, before.part), True).reshape(-1)[:n]
    return _carry(whole, part)


def _cumsum(x: jax.Array, in_float: bool) -> jax.Array:
    if x.shape[0] <= BLOCK:
        return _running(x[None], in_float)[0]
    blocks = _blocks(x, BLOCK)
    before = _cumsum(jnp.sum(blocks, axis=1), in_float)
    return _running(_start_from(blocks, before), in_float).reshape(-1)[: x.shape[0]]


def _start_from(blocks: jax.Array, sums: jax.Array) -> jax.Array:
    before = jnp.concatenate([jnp.zeros(1, sums.dtype), sums[:-1]])
    return blocks + jnp.where(jnp.arange(BLOCK) == 0, before[:, None], 0)


def _running(blocks: jax.Array, in_float: bool) -> jax.Array:
    """Cumulative sums along the last axis.

    By multiplication with a triangle of ones where float32 is exact: on a CPU several times faster
    than `jnp.cumsum`, which is a network of slices there, and no slower elsewhere.
    """
    if not in_float:
        return jnp.cumsum(blocks, axis=1)
    ones = jnp.triu(jnp.ones((blocks.shape[1], blocks.shape[1]), jnp.float32))
    sums = jnp.dot(blocks.astype(jnp.float32), ones, precision=lax.Precision.HIGHEST)
    return sums.astype(jnp.int32)


def _sum(x: jax.Array) -> jax.Array:
    while x.shape[0] > 1:
        x = jnp.sum(_blocks(x, 64), axis=1)
    return x[0]


def _blocks(x: jax.Array, size: int) -> jax.Array:
    num_blocks = -(-x.shape[0] // size)
    return jnp.pad(x, (0, num_blocks * size - x.shape[0])).reshape(num_blocks, size)


def _multiply(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The high and the low word of products of uint32, without 64-bit integers."""
    a_low, a_high, b_low, b_high = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    low, cross, other, high = a_low * b_low, a_low * b_high, a_high * b_low, a_high * b_high
    middle = (low >> 16) + (cross & 0xFFFF) + (other & 0xFFFF)
    return high + (cross >> 16) + (other >> 16) + (middle >> 16), a * b
