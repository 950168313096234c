"""The random parts of resampling schemes, shared by each scheme and its conditional twin."""

import jax
import jax.numpy as jnp
from jax import lax

from abduce.kernels.fixed_point import (
    BITS,
    ONE,
    Counts,
    ancestors_from_ends,
    cumsum,
    cumulative,
    differences,
    invert,
    uniform_below_size,
)

__all__ = [
    "independent",
    "killing_draws",
    "relative_weights",
    "residual_draws",
    "residual_from",
    "sorted_from_counts",
    "ssp_counts",
    "stratified_at",
    "systematic_at",
    "uniform_parts",
    "weight_sums",
    "weight_terms",
]


def relative_weights(log_weights: jax.Array) -> jax.Array:
    """`exp(log_weights - max)`, float32 or better; all one where all log weights are `-inf`."""
    log_weights = lax.stop_gradient(jnp.asarray(log_weights))
    log_weights = log_weights.astype(jnp.promote_types(log_weights.dtype, jnp.float32))
    top = jnp.max(log_weights)
    return jnp.where(top == -jnp.inf, 1, jnp.exp(log_weights - top))


def weight_sums(log_weights: jax.Array) -> Counts:
    """`C[j] = N (w[0] + ... + w[j])`."""
    return cumulative(relative_weights(log_weights))


def weight_terms(log_weights: jax.Array) -> Counts:
    """`N w[j]`; they sum to `N` exactly."""
    return differences(weight_sums(log_weights))


def uniform_parts(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform multiples of `2**-18` in `[0, 1)`, as integers."""
    return (jax.random.bits(key, shape, jnp.uint32) >> (32 - BITS)).astype(jnp.int32)


def independent(key: jax.Array, sums: Counts) -> jax.Array:
    """`N` independent draws from the weights with these cumulative sums."""
    return invert(sums, uniform_below_size(key, sums.whole.shape[0]))


def systematic_at(sums: Counts, shift: jax.Array) -> jax.Array:
    """Ancestors of the points `i + shift`."""
    ends = sums.whole + (sums.part > shift)
    return ancestors_from_ends(ends, sums.whole.shape[0])


def stratified_at(sums: Counts, shifts: jax.Array) -> jax.Array:
    """Ancestors of the points `i + shifts[i]`."""
    n = sums.whole.shape[0]
    ends = sums.whole + (sums.part > shifts[jnp.minimum(sums.whole, n - 1)])
    return ancestors_from_ends(ends, n)


def sorted_from_counts(counts: jax.Array) -> jax.Array:
    """The increasing ancestors with given counts, which sum to their number."""
    return ancestors_from_ends(cumsum(counts), counts.shape[0])


def residual_draws(key: jax.Array, terms: Counts) -> jax.Array:
    """`N` independent draws in proportion to what rounding down leaves of the terms."""
    parts = terms.part.astype(jnp.float32) / ONE
    parts = jnp.where(jnp.any(terms.part > 0), parts, 1)  # else none of the draws is used
    return independent(key, cumulative(parts))


def residual_from(terms: Counts, draws: jax.Array) -> jax.Array:
    """Copies for certain and as many of the draws as slots are left; increasing."""
    n = draws.shape[0]
    num_free = n - jnp.sum(terms.whole, dtype=jnp.int32)
    targets = jnp.where(jnp.arange(n) < num_free, draws, n)
    drawn = jnp.zeros(n, jnp.int32).at[targets].add(1, mode="drop")
    return sorted_from_counts(terms.whole + drawn)


def ssp_counts(
    key: jax.Array, terms: Counts, target: jax.Array | int = -1, rounds_up: jax.Array | bool = False
) -> jax.Array:
    """Counts of Srinivasan sampling; given how one particle is rounded, if `target` names one.

    One particle is open at a time. It meets the next: their fractional parts sum to less than one
    and one of them becomes 0, or to more and one becomes 1; the other is open from then on, with
    the rest of the sum. Each part is a martingale, so that conditioning on the final rounding of
    one particle reweights each step by that particle's part after the step (before it is settled)
    or by its rounding (when the step settles it).

    Args:
        key: Typed PRNG key.
        terms: `N w[j]`, shape `(N,)`.
        target: Index of the particle whose rounding is given; none if negative.
        rounds_up: Whether it is rounded up.

    Returns:
        int32, shape `(N,)`, summing to `N`.
    """
    n = terms.part.shape[0]
    uniforms = jax.random.uniform(key, (n,), jnp.float32)

    def likelihood(part):  # of the given rounding, for a target with this fractional part
        return jnp.where(rounds_up, part, 1 - part)

    def step(carry, new):
        opened, p = carry
        index, q, uniform = new
        is_full = p + q >= ONE
        rest = jnp.where(is_full, p + q - ONE, p + q)
        settles_open = jnp.where(is_full, ONE - q, q).astype(jnp.float32) / ONE
        settles_new = jnp.where(is_full, ONE - p, p).astype(jnp.float32) / ONE
        settled = likelihood(is_full.astype(jnp.float32))
        goes_on = likelihood(rest.astype(jnp.float32) / ONE)
        settles_open *= jnp.where(opened == target, settled, jnp.where(index == target, goes_on, 1))
        settles_new *= jnp.where(index == target, settled, jnp.where(opened == target, goes_on, 1))
        takes_open = uniform * (settles_open + settles_new) < settles_open
        done = jnp.where(takes_open, opened, index)
        return (jnp.where(takes_open, index, opened), rest), (done, is_full.astype(jnp.int32))

    indices = jnp.arange(n, dtype=jnp.int32)
    start = (indices[0], terms.part[0])
    _, (done, up) = lax.scan(step, start, (indices[1:], terms.part[1:], uniforms[1:]))
    return terms.whole.at[done].add(up)  # the last one open has part 0


def killing_draws(key: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Slot `i` keeps particle `i` with probability `w[i] / max(w)`, or draws from `w`."""
    n = log_weights.shape[0]
    keep_key, draw_key = jax.random.split(key)
    relative = relative_weights(log_weights)
    keeps = jax.random.uniform(keep_key, (n,), relative.dtype) < relative
    draws = independent(draw_key, cumulative(relative))
    return jnp.where(keeps, jnp.arange(n, dtype=jnp.int32), draws)
