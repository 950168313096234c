"""Resampling: weighted particles in, ancestor indices out.

A scheme draws `N` ancestors `a` so that particle `j` appears `N w[j]` times on average, where
`w = softmax(log_weights)`. The schemes differ in the variance around that mean:

- `multinomial`: independent draws.
- `stratified`: one uniform point in each of `N` strata.
- `systematic`: one uniform shift of a grid; each count is `N w[j]` rounded up or down.
- `residual`: `floor(N w[j])` copies for certain, independent draws for the rest.
- `ssp`: Srinivasan sampling; rounds like `systematic`, consistent for every order of particles.
- `killing`: particle `i` stays in its slot with probability `w[i] / max(w)`, else is redrawn.
- `optimal_transport`: slot `i` draws from row `i` of an optimal coupling, so that its ancestor is
  close to particle `i`.

Unbiasedness is exact up to the arithmetic, `2**-18` counts (see `fixed_point`); a particle of
weight zero is never drawn. `conditional` draws the twin that particle Gibbs needs.

References: Chopin and Papaspiliopoulos, "An Introduction to Sequential Monte Carlo" (2020),
chapter 9; Gerber, Chopin and Whiteley, "Negative association, ordering and convergence of
resampling methods" (2019); Del Moral, "Feynman-Kac Formulae" (2004) for killing.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from abduce.errors import InvalidAlgorithm, suggest
from abduce.kernels.fixed_point import ancestors_from_ends, cumsum
from abduce.kernels.resampling_conditional import TWINS
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
from abduce.kernels.resampling_transport import optimal_transport, transport_matrix

__all__ = [
    "SCHEMES",
    "ancestors_from_counts",
    "conditional",
    "effective_sample_size",
    "killing",
    "multinomial",
    "optimal_transport",
    "residual",
    "ssp",
    "stratified",
    "systematic",
    "transport_matrix",
]


def multinomial(key: jax.Array, log_weights: jax.Array, positions=None) -> jax.Array:
    """Independent draws: each slot has ancestor `j` with probability `w[j]`.

    Args:
        key: Typed PRNG key, shape `()`.
        log_weights: Unnormalized, in nats, shape `(N,)`; `-inf` is never drawn. NaN and `+inf`
            give indices without meaning: the caller looks for them. For batches, use `jax.vmap`.
        positions: Not used; every scheme takes it.

    Returns:
        int32, shape `(N,)`; `0, ..., N - 1` if all log weights are `-inf`.

    Example:
        >>> multinomial(jax.random.key(0), jnp.log(jnp.array([0.0, 1.0, 0.0])))
        Array([1, 1, 1], dtype=int32)
    """
    return _alive_or_identity(independent(key, weight_sums(log_weights)), log_weights)


def stratified(key: jax.Array, log_weights: jax.Array, positions=None) -> jax.Array:
    """One uniform point in each of `N` strata. Arguments as for `multinomial`; increasing."""
    sums = weight_sums(log_weights)
    points = uniform_parts(key, log_weights.shape)
    return _alive_or_identity(stratified_at(sums, points), log_weights)


def systematic(key: jax.Array, log_weights: jax.Array, positions=None) -> jax.Array:
    """One uniform shift of a grid; each count is `N w[j]` rounded up or down.

    Arguments as for `multinomial`. The ancestors increase. There is no loop and no search:
    particle `j` ends at slot `ceil(C[j] - u)`, so that a histogram of the ends and its cumulative
    sum are the ancestors.

    Example:
        >>> systematic(jax.random.key(0), jnp.log(jnp.array([0.5, 0.0, 0.25, 0.25])))
        Array([0, 0, 2, 3], dtype=int32)
    """
    sums = weight_sums(log_weights)
    return _alive_or_identity(systematic_at(sums, uniform_parts(key, ())), log_weights)


def residual(key: jax.Array, log_weights: jax.Array, positions=None) -> jax.Array:
    """`floor(N w[j])` copies of each, the rest multinomial. As for `multinomial`; increasing."""
    terms = weight_terms(log_weights)
    draws = residual_draws(key, terms)
    return _alive_or_identity(residual_from(terms, draws), log_weights)


def ssp(key: jax.Array, log_weights: jax.Array, positions=None) -> jax.Array:
    """Srinivasan sampling: counts `N w[j]` rounded up or down, by a chain of pairwise roundings.

    Arguments as for `multinomial`. The ancestors increase. Negatively associated counts make it
    consistent for every order of the particles, which `systematic` is not (Gerber, Chopin and
    Whiteley, 2019, algorithm 1). The chain is a loop over the particles, the only one here: slow
    beyond some 1e4 particles, and on accelerators.
    """
    terms = weight_terms(log_weights)
    return _alive_or_identity(sorted_from_counts(ssp_counts(key, terms)), log_weights)


def killing(key: jax.Array, log_weights: jax.Array, positions=None) -> jax.Array:
    """Particle `i` keeps slot `i` with probability `w[i] / max(w)`, else a draw from `w` has it.

    Arguments as for `multinomial`. Nearly equal weights move nearly nothing, which suits many
    resamplings with little information each (Del Moral, 2004; Karppinen, Singh and Vihola, 2023).
    """
    return _alive_or_identity(killing_draws(key, log_weights), log_weights)


def ancestors_from_counts(counts: jax.Array, n: int) -> jax.Array:
    """The increasing ancestors with given counts.

    Args:
        counts: Non-negative integers that sum to `n`, shape `(num_particles,)`.
        n: Number of slots (static).

    Returns:
        int32, shape `(n,)`.

    Example:
        >>> ancestors_from_counts(jnp.array([2, 0, 1]), 3)
        Array([0, 0, 2], dtype=int32)
    """
    return ancestors_from_ends(cumsum(counts.astype(jnp.int32)), n)


def effective_sample_size(log_weights: jax.Array) -> jax.Array:
    """`1 / sum(w**2)`, between 1 and `N`; 0 if all log weights are `-inf`.

    Args:
        log_weights: Unnormalized, in nats, shape `(N,)`.
    """
    weights = relative_weights(log_weights)
    total = jnp.sum(weights)
    ess = total**2 / jnp.sum(weights**2)
    return jnp.where(jnp.any(log_weights > -jnp.inf), ess, 0)


SCHEMES: Mapping[str, Callable[..., jax.Array]] = MappingProxyType(
    {
        "multinomial": multinomial,
        "stratified": stratified,
        "systematic": systematic,
        "residual": residual,
        "ssp": ssp,
        "killing": killing,
        "optimal_transport": optimal_transport,
    }
)


def conditional(
    scheme_name: str, key: jax.Array, log_weights: jax.Array, positions=None
) -> jax.Array:
    """Ancestors given that slot 0 has ancestor 0: the resampling of conditional SMC.

    Particle 0 is the retained one, at every time. What is conditioned is the scheme made
    symmetric: `stratified` and `ssp` on particles that are rotated by a uniform shift, then all
    but `multinomial` with slots that are rotated by a uniform shift. So each slot has ancestor
    `j` with probability `w[j]`, and the law is the same when particles and slots are relabelled by
    rotations, which makes it harmless that the retained particle is always number 0. Drawn
    directly from that conditional law, without rejection.

    Sources: Andrieu, Doucet and Holenstein (2010); Chopin and Singh, "On particle Gibbs sampling"
    (2015), for residual and systematic; Karppinen, Singh and Vihola (2023) for killing. Given the
    ancestor of one slot, independent rows (`killing`, `optimal_transport`) stay independent; the
    bits of `ssp` follow its martingale's h-transform.

    Args:
        scheme_name: A name in `SCHEMES`.
        key: Typed PRNG key, shape `()`.
        log_weights: Unnormalized, in nats, shape `(N,)`; the first is not `-inf`.
        positions: Shape `(N, d)` or `(N,)`; `optimal_transport` needs it.

    Returns:
        int32, shape `(N,)`, the first 0; `0, ..., N - 1` if all log weights are `-inf`.

    Raises:
        InvalidAlgorithm: There is no such scheme.
    """
    if scheme_name not in TWINS:
        raise InvalidAlgorithm(
            f"resampling {scheme_name!r} has no conditional form; choose one of "
            f"{', '.join(TWINS)}.{suggest(scheme_name, TWINS)}"
        )
    ancestors = TWINS[scheme_name](key, log_weights, positions)
    return _alive_or_identity(ancestors.at[0].set(0), log_weights)


def _alive_or_identity(ancestors: jax.Array, log_weights: jax.Array) -> jax.Array:
    is_alive = jnp.any(log_weights > -jnp.inf)
    own = jnp.arange(ancestors.shape[0], dtype=jnp.int32)
    return jnp.where(is_alive, ancestors.astype(jnp.int32), own)
