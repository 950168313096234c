"""Metropolis-Hastings moves on choice maps: `ab.mh` for a population along a path."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from abduce.errors import InvalidAlgorithm
from abduce.inference.mcmc.mh import gives_all, spread
from abduce.inference.smc.moves import Particles, evaluate, metropolis, normals, select
from abduce.inference.smc.paths import Density
from abduce.ppl.model import proposal_density

__all__ = ["MH"]


@dataclasses.dataclass(frozen=True)
class MH:
    """Each proposal once, then each latent that none covers from its prior, as in `ab.mh`.

    Of a site with many elements a random part is redrawn, of a size that is log-uniform between
    one element and all. Proposals are in the inputs of the path, under "moves".
    """

    needs_flat: bool = False

    def start(self, density: Density, particles: Particles, probabilities: Any) -> Any:
        return ()

    def tune(self, memory: Any, particles: Particles, probabilities: Any) -> Any:
        return memory

    def begin(self, density: Density, particles: Particles) -> Any:
        return ()

    def step(self, key, density, particles, memory, local):
        inputs = density.inputs
        model, args, kwargs = inputs["conditioned"].unpack()
        sites = model.program(*args, **kwargs).sites
        observed = {a: x for a, x in inputs["given"].items() if a not in density.path.latents}
        proposals = inputs["moves"]
        state = {**observed, **jax.tree.map(lambda x: x[0], particles.position)}
        covered = {a for q in proposals for a in q.program(state, *args, **kwargs).latents}
        if both := sorted(a for a in covered if a in sites and sites[a].partial):
            raise InvalidAlgorithm(
                f"ab.smc: the proposal of the kernel covers {both}, which are partly observed. "
                f"Leave them to their prior (proposal=None)."
            )
        moves = [functools.partial(_propose, q, observed) for q in proposals]
        moves += [
            functools.partial(_refresh, a, sites[a])
            for a in density.path.latents
            if a not in covered
        ]
        rates = []
        for i, move in enumerate(moves):
            k1, k2 = jax.random.split(jax.random.fold_in(key, i))
            n = particles.log_start.shape[0]

            def one(key, position, move=move):
                trace, _ = model.generate(key, position, *args, **kwargs)
                return move(key, trace)

            position, correction = jax.vmap(one)(jax.random.split(k1, n), particles.position)
            new = evaluate(density, position)
            (threshold,) = normals(k2, (n,))
            accept, rate = metropolis(threshold, density, new, particles, correction)
            particles = select(accept, new, particles)
            rates.append(rate)
        return particles, memory, local, jnp.mean(jnp.stack(rates), 0)


def _fresh(new: Any, old: Any, but: Any) -> Any:
    """Log prior density of what a jump had to draw: sites active in `new` and not in `old`."""
    total = jnp.zeros((), jnp.result_type(float))
    for a in new.active:
        if a in new.choices and a not in but and a in new.scores:
            score = new.scores[a]
            on = new.active[a] & ~old.active[a]
            total += jnp.sum(jnp.where(spread(on, score), score, 0.0))
    return total


def _propose(q, observed, key, trace):
    """A model's proposal; returns choices and `log q(old | new) - log q(new | old)`."""
    k1, k2, k3 = jax.random.split(key, 3)
    _, args, kwargs = trace.arguments.unpack()
    moved = q.simulate(k1, {**observed, **trace.choices}, *args, **kwargs)
    new, _, _ = trace.update(moved.choices, key=k2)
    back = {a: trace.choices[a] for a in moved.choices}
    reverse, _ = q.generate(k3, back, {**observed, **new.choices}, *args, **kwargs)
    forwards = proposal_density(moved, new) + _fresh(new, trace, moved.choices)
    backwards = proposal_density(reverse, trace) + _fresh(trace, new, moved.choices)
    possible = gives_all(moved, new) & gives_all(reverse, trace)
    return new.choices, jnp.where(possible, backwards - forwards, -jnp.inf)


def _refresh(address, info, key, trace):
    """A site, or a part of it, from its prior given the rest; as `_propose`."""
    k1, k2, k3, k4 = jax.random.split(key, 4)
    new, _ = trace.regenerate(k1, address)
    old_score, batch = trace.scores[address], info.shape[: info.batch_ndim]
    size = old_score.size
    if size > 1 and not info.conditional and not info.num_scans and not info.partial:
        log_part = jax.random.uniform(k2, minval=-jnp.log(float(size)), maxval=0.0)
        part = jax.random.uniform(k3, batch) < jnp.exp(log_part)
        old = trace.choices[address]
        mixed = jnp.where(spread(part, old), new.choices[address], old)
        new, _, _ = trace.update({address: mixed}, key=k4)
        forwards = jnp.sum(jnp.where(part, new.scores[address], 0.0))
        backwards = jnp.sum(jnp.where(part, old_score, 0.0))
    else:
        forwards, backwards = _drawn(new, address), _drawn(trace, address)
    forwards += _fresh(new, trace, {address})
    backwards += _fresh(trace, new, {address})
    return new.choices, backwards - forwards


def _drawn(trace, address):
    """Log density of what redrawing a site draws: not its observed entries."""
    score = trace.scores[address]
    if address in trace.masks:
        score = jnp.where(trace.masks[address], 0.0, score)
    return jnp.sum(score)
