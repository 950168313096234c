"""`ab.pmmh`: Metropolis-Hastings on parameters, with the evidence estimated by particles."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InitializationError, InvalidAlgorithm
from abduce.inference.algorithm import Algorithm, algorithm, check_count
from abduce.inference.mcmc.sweeps import is_traced, run_sweeps, unmixed
from abduce.inference.posterior import Posterior, make_posterior
from abduce.inference.problem import Problem
from abduce.inference.smc.algorithms import smc
from abduce.inference.smc.parameters import Evidence, RandomWalk, make_evidence
from abduce.inference.smc.starts import prior_coordinates

__all__ = ["pmmh"]

_CHUNK = 50
_TRIES = 16
_TARGET_RATE = 0.2  # between the optima for exact and for very noisy evidence


@algorithm
class pmmh(Algorithm):
    """Particle marginal Metropolis-Hastings (Andrieu, Doucet and Holenstein 2010).

    Parameters move by a random walk on their unconstrained scale, adapted during the warm-up;
    each proposal runs a particle filter, whose unbiased evidence takes the place of the
    likelihood. The chain's law is the exact posterior, however few particles there are; with
    few it moves seldom. Each draw has a path of the states.

    Args:
        via: The `ab.smc(...)` that runs the particles.
        num_warmup: Iterations that are dropped, during which the walk adapts.
        num_samples: Iterations that are kept, before thinning.
        num_chains: Chains.
        thinning: Keep each n-th draw.
        states: A selection of the latents that belong to the path; None: those in scans, and
            initial states.
        progress_bar: Show progress when a run takes more than about two seconds.

    Diagnostics: `acceptance_rate` and `lp` (the estimate that the chain holds) per iteration;
    `log_evidence_sd`, the standard deviation of the log evidence estimate at the last draw of each
    chain: about 1 is best, above 2 the chain sticks (Pitt et al. 2012).

    Example:
        >>> post = ab.pmmh(via=ab.smc(num_particles=200))(model).posterior(key, given={"y": y})
    """

    via: Any = smc(num_particles=256)
    num_warmup: int = 500
    num_samples: int = 1000
    num_chains: int = 4
    thinning: int = 1
    states: Any = None
    progress_bar: bool = True

    def __post_init__(self):
        check_count("pmmh", "num_warmup", self.num_warmup, 0)
        for field in ("num_samples", "num_chains", "thinning"):
            check_count("pmmh", field, getattr(self, field))
        if isinstance(self.via, Algorithm) and not isinstance(self.via, smc):
            raise InvalidAlgorithm(
                f"ab.pmmh: via= takes an ab.smc(...) that estimates the evidence, got {self.via!r}."
            )

    def run(self, problem: Problem, key: Any) -> Posterior:
        problem.require_latents("ab.pmmh")
        evidence, data = make_evidence(self.via, problem, self.states, "ab.pmmh")
        k1, k2, k3 = jax.random.split(key, 3)
        u, total, values = _begin(self.num_chains, evidence, data, k1)
        if not is_traced(total) and not np.isfinite(np.asarray(total)).all():
            raise InitializationError(
                f"ab.pmmh: chain {int(np.argmin(np.isfinite(np.asarray(total))))} found no "
                f"parameters with a finite evidence among {_TRIES} prior draws. Raise the "
                f"particles of via=, or correct the data."
            )
        state = (u, total, values, RandomWalk.start(u))

        def advance(state, key, count, thinning, warming):
            return _advance(_CHUNK, evidence, data, state, key, count, thinning, warming)

        state, (draws, stats), _, messages = run_sweeps(
            "pmmh", advance, state, k2, num_warmup=self.num_warmup, num_samples=self.num_samples,
            thinning=self.thinning, chunk=_CHUNK, progress_bar=self.progress_bar,
        )  # fmt: skip
        sd = _noise(evidence, data, state[0], k3)
        stats["log_evidence_sd"] = sd
        if not is_traced(draws):
            messages += _messages(stats, draws, evidence.addresses)
        order = [a for a in problem.program.sites if a in draws]
        return make_posterior(
            problem, {a: draws[a] for a in order}, algorithm="pmmh", diagnostics=stats,
            messages=messages,
        )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(num_chains: int, evidence: Evidence, data: Any, key: Any) -> Any:
    """The best of a few prior draws for each chain."""

    def one(key):
        def attempt(i):
            k1, k2 = jax.random.split(jax.random.fold_in(key, i))
            u = prior_coordinates(evidence.target, data, k1)
            return (u, *evidence(data, k2, u))

        us, totals, values = jax.lax.map(attempt, jnp.arange(_TRIES))
        best = jnp.argmax(jnp.where(jnp.isnan(totals), -jnp.inf, totals))
        return us[best], totals[best], jax.tree.map(lambda x: x[best], values)

    return jax.vmap(one)(jax.random.split(key, num_chains))


def metropolis_step(evidence, data, walk, u, total, values, key):
    """One pseudo-marginal move of each row; the held estimates are kept, never renewed."""
    k1, k2, k3 = jax.random.split(key, 3)
    new_u = walk.propose(k1, u)
    keys = jax.random.split(k2, u.shape[0])
    new_total, new_values = jax.vmap(lambda k, u: evidence(data, k, u))(keys, new_u)
    log_ratio = new_total - total
    rate = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio), 0.0))
    ok = jax.random.uniform(k3, rate.shape, rate.dtype) < rate
    pick = lambda a, b: jnp.where(ok.reshape(ok.shape + (1,) * (a.ndim - 1)), a, b)  # noqa: E731
    u, values = jax.tree.map(pick, (new_u, new_values), (u, values))
    return u, jnp.where(ok, new_total, total), values, rate


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advance(size, evidence, data, state, key, count, thinning, warming):
    def iterate(j, loop, key):
        (u, total, values, walk), mean_rate = loop
        u, total, values, rate = metropolis_step(
            evidence, data, walk, u, total, values, jax.random.fold_in(key, j)
        )
        walk = walk.learn(u, jnp.mean(rate), _TARGET_RATE, warming)
        return (u, total, values, walk), mean_rate + rate / thinning

    def step(state, i):
        n = jnp.where(i < count, thinning, 0)
        start = (state, jnp.zeros_like(state[1]))
        k = jax.random.fold_in(key, i)
        state, rate = jax.lax.fori_loop(0, n, lambda j, c: iterate(j, c, k), start)
        return state, (state[2], {"acceptance_rate": rate, "lp": state[1]})

    state, out = jax.lax.scan(step, state, jnp.arange(size))
    return state, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), out)


@functools.partial(jax.jit, static_argnums=0)
def _noise(evidence: Evidence, data: Any, u: Any, key: Any) -> Any:
    """Standard deviation of the log evidence estimate at each row of `u`."""

    def one(u, key):
        totals = jax.lax.map(lambda k: evidence(data, k, u)[0], jax.random.split(key, 16))
        return jnp.std(totals, ddof=1)

    return jax.vmap(one)(u, jax.random.split(key, u.shape[0]))


def _messages(stats, draws, parameters) -> list[str]:
    messages = []
    sd = float(np.max(np.asarray(stats["log_evidence_sd"])))
    if not sd < 2.0:
        messages.append(
            f"ab.pmmh: the log evidence estimate has a standard deviation of {sd:.1f}; above 2 the "
            f"chain sticks. Raise the particles of via=, or give it a better proposal."
        )
    remedy = "Run longer (num_warmup, num_samples), or raise the particles of via=."
    return messages + unmixed("pmmh", {a: draws[a] for a in sorted(parameters)}, remedy)
