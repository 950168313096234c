"""One sweep of a steered sampler: draw, weigh, resample, in a single scan."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.inference.smc.population import Population, Resampling
from abduce.inference.smc.steered import SequencePath, Steered
from abduce.inference.smc.steering_checks import as_state

__all__ = ["draw_path", "sweep"]


class _Particles(eqx.Module):
    """What moves along with a particle.

    Attributes:
        state: The user's.
        done: The sequence has ended.
        length: Tokens so far.
        log_psi: Log potential of the prefix.
    """

    state: Any
    done: Any
    length: Any
    log_psi: Any


class _Step(eqx.Module):
    """What a step leaves behind: a retained sequence consists of these."""

    particles: _Particles
    token: Any
    increment: Any


def sweep(
    program: Any, key: Any, retained: Any = None, *, record: bool = False
) -> tuple[Steered, Any]:
    """One run of a program.

    Args:
        program: An `ab.steer`.
        key: Random key.
        retained: A `SequencePath` that particle 0 follows (conditional SMC).
        record: Whether to keep all states of all steps, from which `draw_path` takes a path.

    Returns:
        The result, and the record.
    """
    n, steps = program.num_particles, program.max_steps
    rule = Resampling(program.resampler, program.threshold, retained is not None)
    keys = jax.random.split(key, steps + 1)
    particles, population, invalid = _begin(program, keys[-1])
    if retained is not None:
        particles = _put_first(particles, retained.first)
        if program.weighting == "telescoping":
            population = Population.start(n).reweight(particles.log_psi)
    first = particles
    failed_at = jnp.where(population.total == -jnp.inf, 0, -1).astype(jnp.int32)

    def step(carry, x):
        particles, population, invalid, failed_at = carry
        t, key, kept = x
        keys = jax.random.split(key, n + 1)
        particles, population, ancestors, due = _resample(
            program, rule, keys[-1], t, particles, population
        )
        left, bad = _advance(program, keys[:-1], t, particles)
        if kept is not None:
            left = _put_first(left, kept)
        population = population.reweight(left.increment)
        alive = population.log_weights > -jnp.inf
        failing = (failed_at < 0) & (population.total == -jnp.inf)
        carry = (
            left.particles, population, invalid + jnp.sum(bad, dtype=jnp.int32),
            jnp.where(failing, t + 1, failed_at).astype(jnp.int32),
        )  # fmt: skip
        kept = left if record else None
        num_alive = jnp.sum(alive, dtype=jnp.int32)
        return carry, (left.token, kept, ancestors, due, population.ess, num_alive)

    xs = (
        jnp.arange(steps, dtype=jnp.int32),
        keys[:-1],
        None if retained is None else retained.steps,
    )
    carry = (particles, population, invalid, failed_at)
    carry, (tokens, history, ancestors, due, ess, num_alive) = jax.lax.scan(step, carry, xs)
    particles, population, invalid, failed_at = carry
    unfinished = ~particles.done & (population.log_weights > -jnp.inf)
    if program.unfinished == "discard":
        population = population.reweight(jnp.where(particles.done, 0.0, -jnp.inf))
        failing = (failed_at < 0) & (population.total == -jnp.inf)
        failed_at = jnp.where(failing, steps + 1, failed_at)
    lineage, root = _lineage(ancestors, jnp.arange(n, dtype=jnp.int32))
    out = Steered(
        states=particles.state,
        tokens=jnp.swapaxes(jax.vmap(lambda x, b: x[b])(tokens, lineage), 0, 1),
        lengths=particles.length,
        done=particles.done,
        log_weights=population.log_weights + population.log_evidence,
        log_evidence=population.total,
        ancestors=ancestors,
        resampled=due,
        ess=ess,
        num_alive=num_alive,
        num_unfinished=jnp.sum(unfinished, dtype=jnp.int32),
        num_invalid=invalid,
        failed_at=failed_at,
    )
    return out, ((first, root), (history, lineage))


def _begin(program: Any, key: Any) -> tuple[_Particles, Population, Any]:
    n = program.num_particles
    if callable(program.init):
        state = jax.vmap(lambda k: as_state(program.init(k)))(jax.random.split(key, n))
    else:
        state = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *jnp.shape(x))), program.init)
    done = jnp.zeros(n, bool)
    if program.is_done is not None:
        done = jnp.asarray(jax.vmap(program.is_done)(state), bool)
    population = Population.start(n)
    log_psi, bad = jnp.zeros_like(population.log_weights), done & False
    if program.weighting == "telescoping":
        log_psi, bad = _clean(jax.vmap(program.potential)(state, done), population)
        population = population.reweight(log_psi)
    particles = _Particles(state, done, jnp.zeros(n, jnp.int32), log_psi)
    return particles, population, jnp.sum(bad, dtype=jnp.int32)


def _resample(program, rule, key, t, particles, population):
    """Resamples by weight times look-ahead, which the new weights divide out."""
    log_h = None
    twisted = population
    if program.lookahead is not None:
        log_h = jax.vmap(program.lookahead)(particles.state, particles.done)
        log_h, _ = _clean(log_h, population)
        twisted = population.reweight(log_h)

    positions = None
    if program.positions is not None:
        positions = jax.vmap(program.positions)(particles.state)

    # Only what permutes is inside `cond`: JAX 0.10 on CPU miscompiles `vmap` of a `cond` with
    # matrix products in a branch, so that finished populations are masked and not skipped.
    always, never = (dataclasses.replace(rule, threshold=x) for x in (1.0, 0.0))
    due = rule.due(twisted)
    if program.schedule is not None:
        due = jnp.asarray(_scheduled(program.schedule, program.max_steps))[t]
    due &= ~jnp.all(particles.done) & (population.total > -jnp.inf)
    new, (particles, log_h), ancestors, _ = jax.lax.cond(
        due,
        lambda: always(key, twisted, (particles, log_h), positions),
        lambda: never(key, twisted, (particles, log_h), positions),
    )
    if log_h is not None:
        undone = jnp.where(log_h > -jnp.inf, -log_h, -jnp.inf)
        log_weights = jnp.where(due, undone, population.log_weights)
        new = Population.weighted(log_weights, new.log_evidence)
    return particles, new, ancestors, due


def _advance(program: Any, keys: Any, t: Any, old: _Particles) -> tuple[_Step, Any]:
    """Draws the next tokens and weighs them; finished sequences stay as they are."""
    n = program.num_particles
    state, token, logq, logp = jax.vmap(program.next)(keys, old.state)
    state = _where(old.done, old.state, state)
    done = jnp.zeros(n, bool)
    if program.is_done is not None:
        done |= jnp.asarray(jax.vmap(program.is_done)(state), bool)
    if program.end_token is not None:
        done |= token == program.end_token
    if program.is_done is None and program.end_token is None:
        done |= t == program.max_steps - 1
    done |= old.done
    log_psi, bad = _clean(jax.vmap(program.potential)(state, done), old.log_psi)
    ratio, bad_ratio = _clean(logp - logq, old.log_psi)
    dead = old.log_psi == -jnp.inf
    increment = ratio + log_psi
    if program.weighting == "telescoping":
        increment -= jnp.where(dead, 0.0, old.log_psi)
    increment = jnp.where(dead, -jnp.inf, increment)
    increment = jnp.where(old.done, 0.0, increment)
    new = _Particles(state, done, old.length + ~old.done, jnp.where(old.done, old.log_psi, log_psi))
    token = _where(old.done, _padding(program, old), token)
    return _Step(new, token, increment), (bad | bad_ratio) & ~old.done & ~dead


def _lineage(ancestors: Any, last: Any) -> tuple[Any, Any]:
    """The places of the ancestors of `last` at every step, and among the initial particles."""

    def back(place, ancestors):
        return ancestors[place], place

    root, places = jax.lax.scan(back, last, ancestors, reverse=True)
    return places, root


def draw_path(out: Steered, history: Any, key: Any) -> SequencePath:
    """Draws a sequence by its weight, with all that its steps left behind."""
    (first, root), (steps, lineage) = history
    chosen = jax.random.categorical(key, out.log_weights)
    places = lineage[:, chosen]
    steps = jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, places), steps)
    return SequencePath(
        jax.tree.map(lambda x: x[root[chosen]], first), steps, out.log_weights[chosen]
    )


def _clean(log_x: Any, like: Any) -> tuple[Any, Any]:
    """Log factors in the dtype of the weights; NaN and +inf become -inf and are flagged."""
    dtype = like.log_weights.dtype if isinstance(like, Population) else like.dtype
    bad = jnp.isnan(log_x) | (log_x == jnp.inf)
    return jnp.where(bad, -jnp.inf, log_x).astype(dtype), bad


def _padding(program: Any, particles: _Particles) -> Any:
    """Tokens after the end: the end token, or -1, or NaN where tokens are floats."""
    row = jax.tree.map(lambda x: x[0], particles.state)
    token = jax.eval_shape(program.next, jax.random.key(0), row)[1]
    shape = (program.num_particles, *token.shape)
    if program.end_token is not None:
        return jnp.full(shape, program.end_token, token.dtype)
    if jnp.issubdtype(token.dtype, jnp.inexact):
        return jnp.full(shape, jnp.nan, token.dtype)
    return jnp.full(shape, -1).astype(token.dtype)


def _where(mask: Any, a: Any, b: Any) -> Any:
    """Rows of `a` where the mask holds, of `b` elsewhere."""

    def rows(x, y):
        return jnp.where(mask.reshape(mask.shape + (1,) * (jnp.ndim(y) - 1)), x, y)

    return jax.tree.map(rows, a, b)


def _put_first(tree: Any, row: Any) -> Any:
    """The tree with its row 0 replaced."""
    return jax.tree.map(lambda x, r: x.at[0].set(r), tree, row)


def _scheduled(schedule: int | tuple[int, ...], max_steps: int) -> np.ndarray:
    """Whether to resample before each step; entry t is "after t tokens"."""
    t = np.arange(max_steps)
    if isinstance(schedule, int):
        return (t > 0) & (t % schedule == 0)
    return np.isin(t, schedule)
