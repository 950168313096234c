"""Cumulative weights in exact integer arithmetic, and what resampling does with them.

A resampling scheme compares uniform points with `C[j] = N (w[0] + ... + w[j])`. In float32 such
sums are wrong by whole counts beyond some 1e5 particles, and a sum made in blocks need not even
increase, so that a particle of weight zero could be drawn. Here a number of counts is a pair of
integers, `whole + part / 2**19`, and sums of pairs are exact: `C` increases, stays where a weight
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

BITS = 19  # 32 parts sum to at most 2**24, exactly in float32
ONE = 1 << BITS
MASK = ONE - 1
EXACT = 1 << 24  # float32 holds every whole number up to here
SMALL = 1 << (31 - BITS)  # fewer counts than this, with their parts, fit into an int32
NARROW = 8  # block of running sums by addition
WIDE = 32  # block of running sums by multiplication with a triangle of ones
SHRINK = 1 - 2.0**-18  # below one by more than the rounding of a float32 tree sum


class Counts(NamedTuple):
    """Numbers `whole + part / 2**19`, both int32, `part < 2**19`."""

    whole: jax.Array
    part: jax.Array


def cumulative(weights: jax.Array) -> Counts:
    """Cumulative sums of the weights, scaled so that the last is exactly their number.

    Each weight is rounded to a multiple of `2**-19` counts. The rounded weights sum to `N` within
    a relative 1e-5; what is missing is added in proportion to the sum so far.

    Args:
        weights: Non-negative, of float dtype, shape `(N,)`, at least one positive, none above 1.

    Returns:
        `C`, shape `(N,)`; increasing; `C[j] == C[j - 1]` exactly where `weights[j]` is zero (or
        below `2**-20` counts), and `(N, 0)` from the last positive weight on.
    """
    n, dtype = weights.shape[0], weights.dtype
    weights = lax.optimization_barrier(weights)  # else each use below computes `exp` again
    counts = weights * (n / _sum(weights))
    # The sums are stretched, only upwards so that they still increase. Whole numbers need none.
    is_whole = jnp.all(counts == jnp.floor(counts))
    sums = _rounded_sums(counts * jnp.where(is_whole, 1, SHRINK).astype(dtype))
    whole, part = sums
    missing = (n - whole[-1]).astype(dtype) - part[-1].astype(dtype) / ONE
    so_far = whole.astype(dtype)
    if n < EXACT:  # beyond, float32 holds not every whole number, and this might decrease
        so_far = so_far + part.astype(dtype) / ONE
    stretch = so_far * (jnp.maximum(missing, 0) / (n - missing))
    stretch_whole = jnp.floor(stretch)
    stretch_part = ((stretch - stretch_whole) * ONE).astype(jnp.int32)
    stretched = _carry(whole + stretch_whole.astype(jnp.int32), part + stretch_part)
    is_end = ((whole == whole[-1]) & (part == part[-1])) | (stretched.whole >= n)
    return Counts(jnp.where(is_end, n, stretched.whole), jnp.where(is_end, 0, stretched.part))


def differences(sums: Counts) -> Counts:
    """The terms of cumulative sums."""
    whole, part = (jnp.diff(x, prepend=jnp.zeros(1, jnp.int32)) for x in sums)
    return _carry(whole, part)  # a negative part borrows: shifts of int32 keep the sign


def cumsum(x: jax.Array, largest: int | None = None) -> jax.Array:
    """Cumulative sums of int32, shape `(n,)`.

    Args:
        x: Non-negative, int32.
        largest: Upper bound of the sums; `n` if not given.
    """
    n = x.shape[0]
    local = _running(x, (n if largest is None else largest) < EXACT)
    if local.shape[0] > 1:
        local = local + _shifted(cumsum(local[:, -1], n if largest is None else largest))[:, None]
    return local.reshape(-1)[:n]


def ancestors_from_ends(ends: jax.Array, n: int) -> jax.Array:
    """Ancestors of `n` slots: slot `i` has the first `j` with `ends[j] > i`.

    Args:
        ends: Increasing integers, shape `(num_particles,)`; particle `j` has the slots from
            `ends[j - 1]` to `ends[j] - 1`.
        n: Number of slots.

    Returns:
        int32, shape `(n,)`, increasing.
    """
    finished = jnp.zeros(n, jnp.int32).at[ends].add(1, mode="drop")
    return cumsum(finished)


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
    if n >= SMALL:
        return uniform_below(key, (n,), Counts(jnp.int32(n), jnp.int32(0)))
    whole, fraction = _multiply(jax.random.bits(key, (n,), jnp.uint32), jnp.uint32(n))
    return Counts(whole.astype(jnp.int32), (fraction >> (32 - BITS)).astype(jnp.int32))


def _carry(whole: jax.Array, part: jax.Array) -> Counts:
    return Counts(whole + (part >> BITS), part & MASK)


def _rounded_sums(x: jax.Array) -> Counts:
    """Exact cumulative sums of floats rounded to fixed point."""
    if x.shape[0] < SMALL:  # one word holds all
        sums = cumsum(jnp.round(x * ONE).astype(jnp.int32), EXACT)
        return _carry(jnp.zeros_like(sums), sums)
    whole = jnp.floor(x)
    part = jnp.round((x - whole) * ONE)
    return _cumsum_counts(Counts(whole.astype(jnp.int32), part.astype(jnp.int32)), x.shape[0])


def _cumsum_counts(x: Counts, largest: int) -> Counts:
    n = x.whole.shape[0]
    whole, part = _running(x.whole, largest < EXACT), _running(x.part, largest < EXACT)
    if whole.shape[0] > 1:
        offset = _cumsum_counts(_carry(whole[:, -1], part[:, -1]), largest)
        whole = whole + _shifted(offset.whole)[:, None]
        part = part + _shifted(offset.part)[:, None]
    return Counts(*(y.reshape(-1)[:n] for y in _carry(whole, part)))


def _sum(x: jax.Array) -> jax.Array:
    while x.shape[0] > 1:
        x = jnp.sum(_blocks(x, 64), axis=1)
    return x[0]


def _blocks(x: jax.Array, size: int) -> jax.Array:
    num_blocks = -(-x.shape[0] // size)
    return jnp.pad(x, (0, num_blocks * size - x.shape[0])).reshape(num_blocks, size)


def _running(x: jax.Array, is_exact_in_float: bool) -> jax.Array:
    """Cumulative sums inside each block, shape `(blocks, size)`.

    On a CPU either form is several times faster than `jnp.cumsum`, a network of slices. The
    barriers keep XLA from computing what comes before again for each entry of a block.
    """
    if x.shape[0] >= SMALL and is_exact_in_float:
        ones = jnp.triu(jnp.ones((WIDE, WIDE), jnp.float32))
        blocks = _blocks(x.astype(jnp.float32), WIDE)
        sums = jnp.dot(blocks, ones, precision=lax.Precision.HIGHEST)
        return sums.astype(jnp.int32)
    blocks = lax.optimization_barrier(_blocks(x, NARROW))
    columns = [blocks[:, 0]]
    for i in range(1, NARROW):
        columns.append(columns[-1] + blocks[:, i])
    return lax.optimization_barrier(jnp.stack(columns, axis=1))


def _shifted(x: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros(1, x.dtype), x[:-1]])


def _multiply(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The high and the low word of products of uint32, without 64-bit integers."""
    a_low, a_high, b_low, b_high = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    low, cross, other, high = a_low * b_low, a_low * b_high, a_high * b_low, a_high * b_high
    middle = (low >> 16) + (cross & 0xFFFF) + (other & 0xFFFF)
    return high + (cross >> 16) + (other >> 16) + (middle >> 16), a * b
