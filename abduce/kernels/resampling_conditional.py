"""Ancestors given that slot 0 has ancestor 0, for each resampling scheme.

See `abduce.kernels.resampling.conditional` for what the law is. Each twin draws the slot of the
retained particle from its conditional law first and then all else; slots (and, where the scheme
depends on the order of particles, particles) are rotated so that it is slot 0.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from abduce.kernels.fixed_point import ONE, Counts, cumulative, invert, uniform_below
from abduce.kernels.resampling_draws import (
    independent,
    killing_draws,
    relative_weights,
    residual_draws,
    residual_from,
    sorted_from_counts,
    ssp_counts,
    stratified_at,
    systematic_at,
    uniform_parts,
    weight_sums,
    weight_terms,
)
from abduce.kernels.resampling_transport import row_draws, transport_matrix

__all__ = ["TWINS"]


def _multinomial(key, log_weights, positions):
    return independent(key, weight_sums(log_weights))


def _systematic(key, log_weights, positions):
    """Slot `i` has the point `V + i` modulo `N`: given the event, `V` is uniform below `N w[0]`."""
    sums = weight_sums(log_weights)
    first = uniform_below(key, (), Counts(sums.whole[0], sums.part[0]))
    return _turned(systematic_at(sums, first.part), first.whole)


def _stratified(key, log_weights, positions):
    """Given the event, the point of slot 0 is uniform in the arc of particle 0."""
    n = log_weights.shape[0]
    turn_key, point_key, key = jax.random.split(key, 3)
    turn = jax.random.randint(turn_key, (), 0, n)
    home = jnp.where(turn == 0, 0, n - turn)  # where particle 0 is after the turn
    sums = weight_sums(_turned(log_weights, turn))
    start = Counts(*(jnp.where(home == 0, 0, x[home - 1]) for x in sums))
    borrow = (sums.part[home] < start.part).astype(jnp.int32)
    width = Counts(
        sums.whole[home] - start.whole - borrow, sums.part[home] - start.part + borrow * ONE
    )
    offset = uniform_below(point_key, (), width)
    part = start.part + offset.part
    stratum = start.whole + offset.whole + part // ONE
    shifts = uniform_parts(key, (n,)).at[stratum].set(part % ONE)
    ancestors = _turned(stratified_at(sums, shifts), stratum)
    return (ancestors + turn) % n


def _residual(key, log_weights, positions):
    """Slot 0 holds a certain copy of particle 0, or one of the draws, in proportion to each."""
    place_key, draw_key, key = jax.random.split(key, 3)
    terms = weight_terms(log_weights)
    mine = Counts(terms.whole[0], terms.part[0])
    is_draw = uniform_below(place_key, (), mine).whole >= mine.whole
    draws = residual_draws(draw_key, terms)
    draws = draws.at[0].set(jnp.where(is_draw, 0, draws[0]))
    return _sorted_turned(key, residual_from(terms, draws), 0)


def _ssp(key, log_weights, positions):
    """The rounding of particle 0 is biased by its count; the chain goes on given that rounding."""
    n = log_weights.shape[0]
    turn_key, round_key, chain_key, key = jax.random.split(key, 4)
    turn = jax.random.randint(turn_key, (), 0, n)
    home = jnp.where(turn == 0, 0, n - turn)
    terms = weight_terms(_turned(log_weights, turn))
    whole, part = (x[home].astype(jnp.float32) for x in terms)
    part = part / ONE
    up, down = (whole + 1) * part, whole * (1 - part)
    rounds_up = jax.random.uniform(round_key) * (up + down) < up
    ancestors = sorted_from_counts(ssp_counts(chain_key, terms, home, rounds_up))
    return (_sorted_turned(key, ancestors, home) + turn) % n


def _killing(key, log_weights, positions):
    """Slot `m` held particle 0 with probability `[m = 0] w[0] / max(w) + (1 - w[m] / max(w)) W[0]`.

    Here `W` are the weights that sum to one. So, given the event, particle 0 stayed where it was
    with probability `mean(w) / max(w)`, else `m` lost its particle.
    """
    n = log_weights.shape[0]
    stay_key, lost_key, key = jax.random.split(key, 3)
    relative = relative_weights(log_weights)
    stays = jax.random.uniform(stay_key, (), relative.dtype) < jnp.mean(relative)
    loss = jnp.where(jnp.any(relative < 1), 1 - relative, 1)
    all_losses = Counts(jnp.int32(n), jnp.int32(0))
    lost = invert(cumulative(loss), uniform_below(lost_key, (1,), all_losses))[0]
    slot = jnp.where(stays, 0, lost)
    return _turned(killing_draws(key, log_weights).at[slot].set(0), slot)


def _optimal_transport(key, log_weights, positions):
    """Slot `m` held particle 0 in proportion to column 0 of the coupling; rows are independent."""
    slot_key, key = jax.random.split(key)
    matrix = transport_matrix(log_weights, positions)
    slot = jax.random.categorical(slot_key, jnp.log(matrix[:, 0]))
    return _turned(row_draws(key, matrix).at[slot].set(0), slot)


TWINS: Mapping[str, Callable[..., jax.Array]] = MappingProxyType(
    {
        "multinomial": _multinomial,
        "stratified": _stratified,
        "systematic": _systematic,
        "residual": _residual,
        "ssp": _ssp,
        "killing": _killing,
        "optimal_transport": _optimal_transport,
    }
)


def _turned(x: jax.Array, start: jax.Array) -> jax.Array:
    """Entry `i` is `x[start + i]`, cyclically."""
    return jnp.roll(x, -start)


def _sorted_turned(key: jax.Array, ancestors: jax.Array, home: jax.Array | int) -> jax.Array:
    """Rotates increasing ancestors so that slot 0 is a uniformly drawn one of those of `home`."""
    first = jnp.sum(ancestors < home)
    count = jnp.maximum(jnp.sum(ancestors == home), 1)
    return _turned(ancestors, first + jax.random.randint(key, (), 0, count))
