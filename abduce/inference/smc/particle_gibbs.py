"""`ab.particle_gibbs`: paths by conditional SMC, parameters by MCMC given the path."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InitializationError, InvalidAlgorithm
from abduce.inference.algorithm import Algorithm, algorithm, check_count
from abduce.inference.mcmc.sweeps import is_traced, run_sweeps, unmixed
from abduce.inference.posterior import Posterior, make_posterior
from abduce.inference.problem import Problem
from abduce.inference.smc.blocks import require_no_late_use, split_latents
from abduce.inference.smc.cloud import Settings
from abduce.inference.smc.filtering import run_filter
from abduce.inference.smc.population import Resampling
from abduce.inference.target import FlatTarget, make_target, unconstrain_now
from abduce.ppl.replay import Given, Replay

__all__ = ["particle_gibbs"]

_CHUNK = 100
_LEAPFROGS = 8


@algorithm
class particle_gibbs(Algorithm):
    """Particle Gibbs sampling (Andrieu, Doucet and Holenstein 2010).

    Each iteration draws the path of the states by conditional SMC, in which one particle retains
    the current path, and then the parameters given the path, by a Hamiltonian move on their
    unconstrained scale (discrete ones from their prior, accepted or not). With ancestor sampling
    (Lindsten, Jordan and Schon 2014) or backward sampling (Whiteley 2010) the path's past is
    renewed too, so that a few particles suffice for long series.

    Args:
        num_particles: Of each conditional run, the retained one included; at least 2.
        num_warmup: Iterations that are dropped, during which step sizes adapt.
        num_samples: Iterations that are kept, before thinning.
        num_chains: Chains.
        thinning: Keep each n-th draw.
        ancestor_sampling: Whether the retained path draws a new past at every step. It needs a
            carry that is known from the step's latents alone.
        backward_sampling: Whether the new path is drawn by backward simulation instead of traced
            through its ancestors.
        resampler: A scheme with a conditional twin; ancestor sampling needs 'multinomial'.
        threshold: Resample below this fraction of N.
        proposal, initial: As of `ab.smc`.
        states: A selection of the latents that belong to the path; None: those in scans, and
            initial states.
        num_moves: Moves of the parameters an iteration.
        progress_bar: Show progress when a run takes more than about two seconds.

    Diagnostics, per iteration: `renewed`, the fraction of the path's latents that changed;
    `acceptance_rate` of the parameters' moves; `log_evidence_estimate` of the conditional run.

    Example:
        >>> post = ab.particle_gibbs(num_particles=32)(model).posterior(key, given={"y": y})
    """

    num_particles: int = 32
    num_warmup: int = 500
    num_samples: int = 1000
    num_chains: int = 4
    thinning: int = 1
    ancestor_sampling: bool = True
    backward_sampling: bool = False
    resampler: str = "multinomial"
    threshold: float = 1.0
    proposal: Any = None
    initial: Any = None
    states: Any = None
    num_moves: int = 1
    progress_bar: bool = True

    def __post_init__(self):
        check_count("particle_gibbs", "num_particles", self.num_particles, 2)
        check_count("particle_gibbs", "num_warmup", self.num_warmup, 0)
        for field in ("num_samples", "num_chains", "thinning", "num_moves"):
            check_count("particle_gibbs", field, getattr(self, field))
        if (self.ancestor_sampling or self.backward_sampling) and self.resampler != "multinomial":
            raise InvalidAlgorithm(
                f"ab.particle_gibbs: ancestor and backward sampling draw one index at a time, "
                f"which is only right with resampler='multinomial', got {self.resampler!r}. Set "
                f"ancestor_sampling=False for other resamplers."
            )
        Resampling(self.resampler, self.threshold, True)

    def run(self, problem: Problem, key: Any) -> Posterior:
        problem.require_latents("ab.particle_gibbs")
        parameters, states = split_latents(problem, self.states, "ab.particle_gibbs")
        if self.ancestor_sampling or self.backward_sampling:
            require_no_late_use(problem, states, "ab.particle_gibbs")
        sampler = _Sampler(
            num_particles=self.num_particles, parameters=tuple(parameters), states=tuple(states),
            resampling=Resampling(self.resampler, self.threshold),
            ancestor_sampling=self.ancestor_sampling, backward_sampling=self.backward_sampling,
            num_moves=self.num_moves,
        )  # fmt: skip
        data = {
            "arguments": problem.arguments, "given": problem.given, "proposal": self.proposal,
            "initial": self.initial,
        }  # fmt: skip
        k1, k2 = jax.random.split(key)
        keys = jax.random.split(k1, self.num_chains)
        chains, total = _begin(sampler, data, keys)
        if not is_traced(total) and not np.isfinite(np.asarray(total)).all():
            raise InitializationError(
                f"ab.particle_gibbs: chain {int(np.argmin(np.isfinite(np.asarray(total))))} found "
                f"no path with a finite density in {_TRIES} attempts of {self.num_particles} "
                f"particles. Raise num_particles, pass proposal=, or correct the data."
            )
        target: FlatTarget | None = None
        target_data: Any = None
        held = [a for a in problem.latents if a in states or problem.latents[a].is_discrete]
        moves = None
        if len(held) < len(problem.latents):
            fixed = {a: Given(chains[a][0], trusted=True) for a in held}
            rest = dataclasses.replace(problem, given={**problem.given, **fixed})
            target, target_data = make_target(rest, "ab.particle_gibbs")
            moves = _start_moves(target.dim, self.num_chains)
        state = (chains, moves)

        def advance(state, key, count, thinning, warming):
            return _advance(
                _CHUNK, sampler, target, data, target_data, state, key, count, thinning, warming
            )

        state, (draws, stats), _, messages = run_sweeps(
            "particle_gibbs", advance, state, k2, num_warmup=self.num_warmup,
            num_samples=self.num_samples, thinning=self.thinning, chunk=_CHUNK,
            progress_bar=self.progress_bar,
        )  # fmt: skip
        if not is_traced(draws):
            messages += _messages(stats, draws, sampler)
        order = [a for a in problem.program.sites if a in draws]
        return make_posterior(
            problem, {a: draws[a] for a in order}, algorithm="particle_gibbs", diagnostics=stats,
            messages=messages,
        )  # fmt: skip


_TRIES = 8


@dataclasses.dataclass(frozen=True)
class _Sampler:
    """The static part of a run."""

    num_particles: int
    parameters: tuple[str, ...]
    states: tuple[str, ...]
    resampling: Resampling
    ancestor_sampling: bool
    backward_sampling: bool
    num_moves: int

    def settings(self, conditional: bool) -> Settings:
        return Settings(
            self.num_particles,
            dataclasses.replace(self.resampling, conditional=conditional),
            ancestor_sampling=self.ancestor_sampling and conditional,
            smoothing="ffbs" if self.backward_sampling and conditional else "genealogy",
            num_paths=1 if self.backward_sampling and conditional else None,
        )

    def filter(self, data, key, retained=None, parameters=None, arguments=None):
        """Runs the particles; returns one path with its record, and the evidence estimate."""
        k1, k2 = jax.random.split(key)
        fixed = {a: Given(x, trusted=True) for a, x in (parameters or {}).items()}
        out = run_filter(
            self.settings(retained is not None), data["arguments"], {**data["given"], **fixed}, k1,
            proposal=data["proposal"], initial=data["initial"], retained=retained,
        )  # fmt: skip
        population = out["population"]
        index = jax.random.categorical(k2, jnp.log(population.probabilities))
        values = jax.tree.map(lambda x: x[index], out["values"])
        return {**(parameters or {}), **values}, population.total


@functools.partial(jax.jit, static_argnums=0)
def _begin(sampler: _Sampler, data: Any, keys: Any) -> Any:
    """A first path for each chain, by an ordinary filter over everything."""

    def one(key):
        def attempt(i):
            return sampler.filter(data, jax.random.fold_in(key, i))

        values, totals = jax.lax.map(attempt, jnp.arange(_TRIES))
        best = jnp.argmax(jnp.isfinite(totals))
        return jax.tree.map(lambda x: x[best], values), totals[best]

    return jax.vmap(one)(keys)


class _Moves(eqx.Module):
    """What the parameters' move learns in one chain."""

    log_step: Any
    mean: Any
    square: Any
    count: Any


def _start_moves(dim: int, num_chains: int) -> _Moves:
    one = jnp.ones((num_chains,))
    return _Moves(
        jnp.full((num_chains,), jnp.log(0.5 * dim**-0.25)), jnp.zeros((num_chains, dim)),
        jnp.ones((num_chains, dim)), one,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _advance(size, sampler, target, data, target_data, state, key, count, thinning, warming):
    def iterate(carry, key):
        chain, moves = carry
        k1, k2 = jax.random.split(key)
        rate = jnp.ones(())
        if sampler.parameters:
            chain, moves, rate = _move_parameters(
                sampler, target, data, target_data, chain, moves, k1, warming
            )
        parameters = {a: chain[a] for a in sampler.parameters}
        retained = {a: chain[a] for a in sampler.states}
        new, total = sampler.filter(data, k2, retained, parameters)
        changed = [jnp.mean((new[a] != chain[a]).astype(jnp.float32)) for a in sampler.states]
        stats = {
            "renewed": jnp.mean(jnp.stack(changed)),
            "acceptance_rate": rate,
            "log_evidence_estimate": total,
        }
        return ({**chain, **new}, moves), stats

    def chain(carry, key):
        def step(carry, i):
            def inner(j, loop):
                carry, _ = loop
                k = jax.random.fold_in(jax.random.fold_in(key, i), j)
                carry, new = iterate(carry, k)
                return carry, new

            n = jnp.where(i < count, thinning, 0)
            zero = jnp.zeros((), jnp.result_type(float))
            blank = {"renewed": jnp.float32(0), "acceptance_rate": zero,
                     "log_evidence_estimate": zero}  # fmt: skip
            carry, stats = jax.lax.fori_loop(0, n, inner, (carry, blank))
            return carry, (carry[0], stats)

        return jax.lax.scan(step, carry, jnp.arange(size))

    keys = jax.random.split(key, jax.tree.leaves(state)[0].shape[0])
    return jax.vmap(chain)(state, keys)


def _move_parameters(sampler, target, data, target_data, chain, moves, key, warming):
    """Moves the parameters given the path."""
    rates = []
    mine = set() if target is None else {s.address for s in target.slots}
    if target is not None:
        sites = target.program(target_data).sites
        given = {
            a: Given(sites[a].to_physical(chain[a]), trusted=True)
            for a in (*sampler.parameters, *sampler.states)
        }
        held = {a: g for a, g in given.items() if a not in mine}
        here = {**target_data, "given": {**target_data["given"], **held}}
        q = unconstrain_now(target, here, {a: given[a] for a in mine})
        for i in range(sampler.num_moves):
            q, moves, rate = _hmc(
                lambda q: target(here, q), jax.random.fold_in(key, i), q, moves, warming
            )
            rates.append(rate)
        out = target.run(Replay(score=False), here, q)
        chain = {**chain, **{a: out["records"][a]["value"] for a in mine}}
    discrete = [a for a in sampler.parameters if a not in mine]
    if discrete:
        model, args, kwargs = data["arguments"].unpack()
        observed = {a: g.value for a, g in data["given"].items()}
        latents = {a: chain[a] for a in (*sampler.parameters, *sampler.states)}
        trace, _ = model.generate(key, {**observed, **latents}, *args, **kwargs)
        for i, address in enumerate(discrete):
            k1, k2 = jax.random.split(jax.random.fold_in(key, 1000 + i))
            new, log_ratio = trace.regenerate(k1, address)
            ok = jnp.log(jax.random.uniform(k2)) < jnp.where(
                jnp.isnan(log_ratio), -jnp.inf, log_ratio
            )  # fmt: skip
            trace = jax.tree.map(lambda a, b, ok=ok: jnp.where(ok, a, b), new, trace)
            rates.append(ok.astype(jnp.result_type(float)))
        chain = {**chain, **{a: trace.choices[a] for a in discrete}}
    return chain, moves, jnp.mean(jnp.stack(rates))


def _hmc(log_density, key, q, moves, warming):
    """One Hamiltonian move; the step size and the scales adapt while warming up."""
    k1, k2, k3 = jax.random.split(key, 3)
    value_and_grad = jax.value_and_grad(log_density)
    spread = jnp.sqrt(jnp.maximum(moves.square / moves.count, 1e-12))
    scale = jnp.where(moves.count > 50, spread, 1.0).astype(q.dtype)
    step = jnp.exp(moves.log_step + 0.3 * jax.random.normal(k3)).astype(q.dtype)
    p0 = jax.random.normal(k1, q.shape, q.dtype)
    logp0, g0 = value_and_grad(q)

    def leapfrog(_, carry):
        x, p, g, _ = carry
        p = p + 0.5 * step * scale * g
        x = x + step * scale * p
        logp, g = value_and_grad(x)
        return x, p + 0.5 * step * scale * g, g, logp

    x, p, _, logp = jax.lax.fori_loop(0, _LEAPFROGS, leapfrog, (q, p0, g0, logp0))
    rate = jnp.exp(jnp.minimum(logp - logp0 + 0.5 * jnp.sum(p0**2 - p**2), 0.0))
    rate = jnp.where(jnp.isnan(rate), 0.0, rate)
    q = jnp.where(jax.random.uniform(k2) < rate, x, q)
    gain = jnp.where(warming, 1.0, 0.0)
    count = moves.count + gain
    mean = moves.mean + gain * (q - moves.mean) / jnp.maximum(count, 1.0)
    square = moves.square + gain * (q - moves.mean) * (q - mean)
    log_step = moves.log_step + gain * (rate - 0.8) * 3.0 / jnp.sqrt(count + 10.0)
    keep = lambda new, old: new.astype(old.dtype)  # noqa: E731
    new = _Moves(log_step, mean, square, count)
    return q, jax.tree.map(keep, new, moves), rate


def _messages(stats, draws, sampler) -> list[str]:
    messages = []
    renewed = np.asarray(stats["renewed"]).mean()
    if renewed < 0.05:
        messages.append(
            f"ab.particle_gibbs: only {renewed:.1%} of the path changes in an iteration. Raise "
            f"num_particles, or keep ancestor_sampling=True."
        )
    remedy = (
        "Run longer (num_warmup, num_samples), or use ab.pmmh, which does not condition the "
        "parameters on the path."
    )
    return messages + unmixed("particle_gibbs", {a: draws[a] for a in sampler.parameters}, remedy)
