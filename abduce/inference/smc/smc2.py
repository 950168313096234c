"""`ab.smc2`: SMC over parameters, with a particle filter inside each particle."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import Degenerate, InvalidAlgorithm
from abduce.inference.algorithm import Algorithm, algorithm, check_count
from abduce.inference.mcmc.sweeps import Bar, is_traced
from abduce.inference.posterior import Posterior, make_posterior
from abduce.inference.problem import Problem
from abduce.inference.smc.algorithms import smc
from abduce.inference.smc.parameters import Evidence, RandomWalk, make_evidence
from abduce.inference.smc.pmmh import metropolis_step
from abduce.inference.smc.population import Population, Resampling
from abduce.inference.smc.starts import prior_coordinates

__all__ = ["smc2"]

_LOW_RATE = 0.1  # acceptance below which the inner filters get more particles


@algorithm
class smc2(Algorithm):
    """SMC^2 (Chopin, Jacob and Papaspiliopoulos 2013).

    Particles of the parameters, drawn from their prior, are weighed by the data as they arrive;
    each carries a particle filter whose evidence increments are its weights. Where the effective
    sample size falls below the threshold they are resampled and moved by particle marginal
    Metropolis-Hastings on the data so far. The evidence of the data is estimated without bias as
    long as the moves do not adapt; with the adaptive random walk, up to order 1/N.

    Args:
        via: The `ab.smc(...)` inside, with the number of particles to begin with.
        num_particles: Of the parameters.
        num_moves: Moves at each rejuvenation.
        threshold: Rejuvenate below this fraction of `num_particles`.
        resampler: For the parameters.
        max_inner_particles: The filters inside double their particles, up to this many, where
            moves are accepted less than one time in ten (the exchange step of the paper).
        states: A selection of the latents that belong to the path; None: those in scans, and
            initial states.
        progress_bar: Show progress when a run takes more than about two seconds.

    The posterior has weighted draws of parameters, each with a path, and `log_evidence`.
    Diagnostics: `times` of the rejuvenations, `acceptance_rate` and `inner_particles` at each.

    Example:
        >>> post = ab.smc2(num_particles=500)(model).posterior(key, given={"y": y})
    """

    via: Any = smc(num_particles=128)
    num_particles: int = 512
    num_moves: int = 3
    threshold: float = 0.5
    resampler: str = "systematic"
    max_inner_particles: int = 4096
    states: Any = None
    progress_bar: bool = True

    def __post_init__(self):
        for field in ("num_particles", "num_moves", "max_inner_particles"):
            check_count("smc2", field, getattr(self, field))
        Resampling(self.resampler, self.threshold)
        if isinstance(self.via, Algorithm) and not isinstance(self.via, smc):
            raise InvalidAlgorithm(
                f"ab.smc2: via= takes the ab.smc(...) of the filters inside, got {self.via!r}."
            )

    def run(self, problem: Problem, key: Any) -> Posterior:
        problem.require_latents("ab.smc2")
        if problem.is_traced or is_traced(key):
            raise InvalidAlgorithm(
                "ab.smc2 decides on the host when to rejuvenate, so it cannot run under jax.jit or "
                "jax.vmap. Call it in a Python loop, or use ab.pmmh."
            )
        evidence, data = make_evidence(self.via, problem, self.states, "ab.smc2")
        k0, k1 = jax.random.split(key)
        u, cumulative, values = _begin(self.num_particles, evidence, data, k0)
        num_steps = cumulative.shape[1] - 1
        population = Population.start(self.num_particles).reweight(cumulative[:, 0])
        rule = Resampling(self.resampler, 1.0)
        time, rounds = 0, 0
        record: dict[str, list[Any]] = {"times": [], "acceptance_rate": [], "inner_particles": []}
        with Bar("smc2", num_steps, self.progress_bar) as bar:
            while True:
                stop, population = _until(self.threshold, population, cumulative, time)
                stop = int(stop)
                if not np.isfinite(float(population.total)):
                    stop = int(np.argmax(np.isneginf(cumulative).all(0)))
                    raise Degenerate(
                        f"ab.smc2: every parameter has evidence zero {_place(stop, num_steps)}. "
                        f"Check the data there, raise num_particles, or the particles of via=."
                    )
                bar.update(stop)
                if stop >= num_steps:
                    break
                time, rounds = stop, rounds + 1
                k1, k2, k3 = jax.random.split(k1, 3)
                u, cumulative, values, population, rate = _rejuvenate(
                    rule, self.num_moves, evidence, data, (u, cumulative, values), population,
                    jnp.asarray(time), k2,
                )  # fmt: skip
                record["times"].append(time)
                record["acceptance_rate"].append(float(rate))
                inner = evidence.settings.num_particles
                record["inner_particles"].append(inner)
                if float(rate) < _LOW_RATE and 2 * inner <= self.max_inner_particles:
                    settings = dataclasses.replace(evidence.settings, num_particles=2 * inner)
                    evidence = dataclasses.replace(evidence, settings=settings)
                    cumulative, values, population = _exchange(
                        evidence, data, u, cumulative, population, jnp.asarray(time), k3
                    )
        messages = []
        rates = record["acceptance_rate"]
        if rates and min(rates) < 0.02:
            messages.append(
                f"ab.smc2: at step {record['times'][int(np.argmin(rates))]} only "
                f"{min(rates):.1%} of the moves were accepted. Raise the particles of via=, "
                f"max_inner_particles or num_moves."
            )
        order = [a for a in problem.program.sites if a in values]
        return make_posterior(
            problem, {a: values[a][None] for a in order}, algorithm="smc2",
            log_weights=population.log_weights[None], log_evidence=float(population.total),
            diagnostics={k: np.asarray(v) for k, v in record.items()} | {
                "ess": np.asarray(population.ess)
            },
            messages=messages,
        )  # fmt: skip


def _place(stop: int, num_steps: int) -> str:
    if 0 < stop < num_steps:
        return f"at step {stop - 1} of the scan"
    return "after the scan" if stop else "before the scan"


def _run_inside(evidence: Evidence, data: Any, key: Any, u: Any) -> Any:
    """Log evidence before the scan, after each step and after all; one draw of everything."""
    k1, k2 = jax.random.split(key)
    out = evidence.run(data, k1, u)
    population = out["population"]
    report = out["reports"][0]
    inside = report["start"] + jnp.cumsum(report["log_evidence"])
    ends = [report["end"][None], population.total[None]]  # the same where no data come after
    cumulative = jnp.concatenate([report["start"][None], inside[:-1], *ends])
    index = jax.random.categorical(k2, jnp.log(population.probabilities))
    return cumulative, jax.tree.map(lambda x: x[index], out["values"])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(m: int, evidence: Evidence, data: Any, key: Any) -> Any:
    def one(key):
        k1, k2 = jax.random.split(key)
        u = prior_coordinates(evidence.target, data, k1)
        cumulative, values = _run_inside(evidence, data, k2, u)
        return u, cumulative, values

    return jax.vmap(one)(jax.random.split(key, m))


@functools.partial(jax.jit, static_argnums=0)
def _until(threshold: float, population: Population, cumulative: Any, time: Any) -> Any:
    """The first step at which the parameters are to be rejuvenated, and the weights there."""
    m, steps = cumulative.shape[0], cumulative.shape[1] - 1
    here = jnp.take(cumulative, time, axis=1)[:, None]
    gained = population.log_weights[:, None] + _difference(cumulative, here)
    peak = jnp.max(gained, 0)
    w = jnp.exp(gained - jnp.where(jnp.isfinite(peak), peak, 0.0))
    ess = jnp.sum(w, 0) ** 2 / jnp.maximum(jnp.sum(w * w, 0), jnp.finfo(w.dtype).tiny)
    to_come = jnp.any(cumulative != cumulative[:, -1:], axis=0)
    due = (ess < threshold * m) & (jnp.arange(steps + 1) > time) & to_come
    stop = jnp.where(jnp.any(due), jnp.argmax(due), steps)
    increments = jnp.take(gained, stop, axis=1) - population.log_weights
    return stop, population.reweight(increments)


def _difference(a: Any, b: Any) -> Any:
    """`a - b`, where both may be -inf (then -inf)."""
    return jnp.where(jnp.isneginf(a), -jnp.inf, a - jnp.where(jnp.isneginf(b), 0.0, b))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _rejuvenate(rule, num_moves, evidence, data, particles, population, time, key):
    """Resamples the parameters and moves them, given the data so far."""
    k1, k2 = jax.random.split(key)
    p = population.probabilities[:, None]
    u = particles[0]
    mean = jnp.sum(p * u, 0)
    cov = (p * (u - mean)).T @ (u - mean)
    population, particles, _, _ = rule(k1, population, particles)
    walk = RandomWalk.start(particles[0])
    walk = RandomWalk(mean, cov, walk.log_scale, walk.count)

    def full(data, key, u):
        cumulative, values = _run_inside(evidence, data, key, u)
        return jnp.take(cumulative, time) + evidence.prior(data, u), (cumulative, values)

    def move(i, loop):
        (u, cumulative, values), rate = loop
        held = jnp.take(cumulative, time, axis=1) + jax.vmap(lambda u: evidence.prior(data, u))(u)
        u, _, (cumulative, values), accepted = metropolis_step(
            full, data, walk, u, held, (cumulative, values), jax.random.fold_in(k2, i)
        )
        return (u, cumulative, values), rate + jnp.mean(accepted) / num_moves

    particles, rate = jax.lax.fori_loop(
        0, num_moves, move, (particles, jnp.zeros((), u.dtype))
    )  # fmt: skip
    return (*particles, population, rate)


@functools.partial(jax.jit, static_argnums=0)
def _exchange(evidence, data, u, cumulative, population, time, key):
    """New filters, with more particles, in place of the old (section 3.6 of the paper)."""
    keys = jax.random.split(key, u.shape[0])
    new, values = jax.vmap(lambda k, u: _run_inside(evidence, data, k, u))(keys, u)
    old = jnp.take(cumulative, time, axis=1)
    ratio = _difference(jnp.take(new, time, axis=1), old)
    return new, values, population.reweight(ratio)
