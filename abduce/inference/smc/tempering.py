"""Tempering: from a distribution that can be drawn to a posterior, through many in between.

Particles are weighted from one temperature to the next, resampled where the weights have become
uneven, and moved by Markov kernels that leave the current distribution invariant (Neal 2001; Del
Moral, Doucet and Jasra 2006). The product of the mean weights estimates the evidence.

Temperatures adapt: a step is as long as the conditional effective sample size (Zhou, Johansen and
Aston 2016) allows, but never runs ahead of a base schedule. For the effective sample size cannot
see a region that no particle has reached: in a funnel it would jump to the posterior in two or
three steps, with an evidence that is wrong by a third. The base schedule is dense near 0 and 1 on
the logit scale: the wide part of a funnel gains mass only there.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import Degenerate, DiscreteLatent, InvalidAlgorithm, NoDensity
from abduce.inference.mcmc.algorithms import hmc, nuts
from abduce.inference.mcmc.mh import as_proposals, mh
from abduce.inference.posterior import Posterior, make_posterior
from abduce.inference.problem import Problem
from abduce.inference.smc.choice_moves import MH
from abduce.inference.smc.moves import HMC, Particles
from abduce.inference.smc.paths import Density, Path, make_path, no_nan
from abduce.inference.smc.population import Population, Resampling, take

__all__ = ["base_schedule", "run"]

_DECAY = 0.9  # conditional effective sample size that a step keeps, as a fraction
_LOGIT_RANGE = 8.0  # the base schedule lies between logits of -8 and 8
_NUM_MOVES = 10  # at most; two at least
_FORGOTTEN = 0.2  # correlation with the positions before the moves, below which they were enough
_HALVINGS = 24  # of an interval of the log step: 70 nats to 1e-5
_MOST_STEPS = 1000  # adaptive steps, beyond which only the base schedule is followed


def base_schedule(num_steps: int) -> np.ndarray:
    """Temperatures that end in 1, equally spaced in the logit.

    Args:
        num_steps: How many.

    Returns:
        Increasing, shape `(num_steps,)`; 0 is left out.
    """
    z = _LOGIT_RANGE * np.linspace(-1, 1, num_steps + 1)
    s = 1 / (1 + np.exp(-z))
    return ((s - s[0]) / (s[-1] - s[0]))[1:]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a run.

    Attributes:
        path, move: What is sampled, and how.
        num_particles, num_moves: At each temperature.
        resampling: The rule.
        adaptive: Whether steps shorter than those of the schedule are found.
        adaptive_moves: Whether moves end once the particles have forgotten where they were.
        num_base: Length of the schedule.
        waste_free: Length of the chains that are kept whole, or None.
    """

    path: Path
    move: Any
    num_particles: int
    num_moves: int
    resampling: Resampling
    adaptive: bool
    adaptive_moves: bool
    num_base: int
    waste_free: int | None

    @property
    def max_steps(self) -> int:
        """Bound on the number of temperatures."""
        return self.num_base + (_MOST_STEPS if self.adaptive else 0)


class State(eqx.Module):
    """What the loop over temperatures carries."""

    step: Any
    temperature: Any
    particles: Particles
    population: Population
    roots: Any
    memory: Any
    history: dict[str, Any]
    alive: Any


def run(alg: Any, problem: Problem, key: Any) -> Posterior:
    """Tempers a model.

    Args:
        alg: An `ab.smc`.
        problem: The model and its data.
        key: Random key.

    Returns:
        One chain of weighted draws, with `log_evidence` (of which the exponential is unbiased if
        temperatures and kernel are fixed in advance; what adapts to the particles biases it at
        order 1/N) and the diagnostics, per step, `temperatures`, `ess` (before resampling),
        `log_evidence_increments`, `resampled`, `acceptance_rate`, `num_moves`; `num_steps`,
        `num_ancestors` (distinct starting points of the particles) and `num_nan`.

    Raises:
        Degenerate: Every particle has weight zero at some step.
        InvalidAlgorithm: The prior cannot be drawn from, or settings that do not fit.
    """
    problem.require_latents("ab.smc")
    plan, inputs, schedule = make_plan(alg, problem)
    try:
        out = _run(plan, inputs, jnp.asarray(schedule), key)
    except NoDensity as e:
        if alg.proposal is not None and plan.path.covered == plan.path.latents:
            raise
        raise InvalidAlgorithm(
            f"ab.smc starts from draws of the prior, which is not possible here: {e} To start from "
            f"elsewhere, pass proposal=, a Model called as proposal(given, *args) that draws every "
            f"latent."
        ) from None
    values = {a: out["values"][a][None] for a in problem.program.sites if a in out["values"]}
    active = {a: x[None] for a, x in out["active"].items()}
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(out)):
        return make_posterior(
            problem, values, algorithm="smc", log_weights=out["log_weights"][None],
            log_evidence=out["log_evidence"], active=active,
            diagnostics={**out["history"], "num_steps": out["num_steps"]},
        )  # fmt: skip
    return _checked(plan, problem, inputs, out, values, active)


def make_plan(alg: Any, problem: Problem) -> tuple[Plan, Any, np.ndarray]:
    """Checks the settings of an `ab.smc`; returns the plan, the inputs, and the schedule."""
    move, proposals = as_move(alg.kernel, problem)
    path, inputs = make_path(problem, alg.path, alg.proposal, move.needs_flat)
    inputs["moves"] = proposals
    n, chain = alg.num_particles, alg.waste_free
    if chain is not None and (chain < 2 or n % chain):
        raise InvalidAlgorithm(
            f"ab.smc: waste_free={chain} is the length of chains, at least 2, and must divide "
            f"num_particles={n}."
        )
    fixed = alg.temperatures is not None
    schedule = _schedule(alg.temperatures) if fixed else base_schedule(alg.min_steps)
    moves = (1 if chain else _NUM_MOVES) if alg.num_moves is None else alg.num_moves
    if not isinstance(moves, int) or moves < 0:
        raise InvalidAlgorithm(f"ab.smc: num_moves must be an int >= 0, got {moves!r}.")
    plan = Plan(
        path, move, n, moves, alg.resampling(tempering=True),
        not fixed, alg.num_moves is None and not chain, len(schedule), chain,
    )  # fmt: skip
    return plan, inputs, schedule


def _schedule(temperatures: Any) -> np.ndarray:
    t = np.asarray(temperatures, np.float64)
    if t.ndim == 1 and t.size and t[0] == 0:
        t = t[1:]
    if t.ndim != 1 or not t.size or t[-1] != 1 or (np.diff(t, prepend=0.0) <= 0).any():
        raise InvalidAlgorithm(
            f"ab.smc: temperatures must increase from above 0 to 1, got {temperatures!r}. For "
            f"instance temperatures=jnp.linspace(0, 1, 51)[1:]."
        )
    return t


def as_move(kernel: Any, problem: Problem) -> tuple[Any, tuple[Any, ...]]:
    """The move, and the proposals it needs."""
    latents = problem.latents.items()
    discrete = [a for a, s in latents if s.is_discrete and not problem.is_all_observed(a)]
    if kernel is None:
        branches = any(s.conditional for _, s in latents)
        return (MH() if discrete or branches else HMC()), ()
    if isinstance(kernel, mh):
        return MH(), as_proposals(kernel.proposal, problem.model)
    if isinstance(kernel, hmc):
        if kernel.dense_mass:
            raise InvalidAlgorithm(
                "ab.smc: kernel=ab.hmc(dense_mass=True): coordinates are scaled one by one by the "
                "spread of the particles. Leave dense_mass out."
            )
        steps, length = kernel.num_steps, kernel.trajectory_length
        move: Any = HMC(
            10 if steps is None and length is None else steps, length, kernel.step_size,
            kernel.target_accept_prob, adapt=kernel.adapt_step_size,
            adapt_scale=kernel.adapt_mass_matrix,
        )  # fmt: skip
    elif hasattr(kernel, "needs_flat"):
        move = kernel
    else:
        hint = " For gradient moves, use ab.hmc()." if isinstance(kernel, nuts) else ""
        raise InvalidAlgorithm(
            f"ab.smc: kernel= takes ab.hmc(...), ab.mh(...) or a move of "
            f"abduce.inference.smc.moves, got {kernel!r}.{hint}"
        )
    if move.needs_flat and discrete:
        raise DiscreteLatent(
            f"ab.smc: this kernel moves continuous latents, but site {discrete[0]!r} is "
            f"{problem.latents[discrete[0]].family}. Use kernel=ab.mh(...)."
        )
    return move, ()


# -------------------------------------------------------------------- the compiled program


@functools.partial(jax.jit, static_argnums=0)
def _run(plan: Plan, inputs: Any, schedule: Any, key: Any) -> dict[str, Any]:
    n, path = plan.num_particles, plan.path
    dtype = jnp.result_type(float)
    k_draw, k_run = jax.random.split(key)
    # One key per draw by its number: a larger run begins with the same draws.
    keys = jax.vmap(lambda i: jax.random.fold_in(k_draw, i))(jnp.arange(n, dtype=jnp.uint32))
    position = jax.vmap(lambda k: path.draw(inputs, k))(keys)
    density = Density(path, inputs, path.weights(jnp.zeros((), dtype)))
    raw = jax.vmap(density.parts)(position)
    broken = jnp.isnan(raw[0]) | jnp.any(jnp.isnan(raw[1]) | (raw[1] == jnp.inf), -1)
    particles = Particles(position, *map(no_nan, raw))
    population = Population.start(n, dtype)
    blank = jnp.full(plan.max_steps, jnp.nan, dtype)
    names = (
        "temperatures", "ess", "log_evidence_increments", "resampled", "acceptance_rate",
        "num_moves",
    )  # fmt: skip
    state = State(
        jnp.zeros((), jnp.int32), jnp.zeros((), dtype), particles, population,
        jnp.arange(n, dtype=jnp.int32),
        plan.move.start(density, particles, population.probabilities),
        {name: blank for name in names}, jnp.asarray(True),
    )  # fmt: skip
    schedule = schedule.astype(dtype)

    def unfinished(s: State) -> Any:
        return (s.temperature < 1) & s.alive & (s.step < plan.max_steps)

    s = jax.lax.while_loop(
        unfinished,
        lambda s: _advance(plan, inputs, schedule, jax.random.fold_in(k_run, s.step), s),
        state,
    )
    values, active = jax.vmap(lambda x: path.values(inputs, x))(s.particles.position)
    return {
        "values": values,
        "active": active,
        "position": s.particles.position,
        "log_weights": s.population.log_weights,
        "log_evidence": s.population.total,
        "alive": s.alive,
        "temperature": s.temperature,
        "history": s.history,
        "num_steps": s.step,
        "roots": s.roots,
        "num_nan": jnp.sum(broken),
    }


def _advance(plan: Plan, inputs: Any, schedule: Any, key: Any, s: State) -> State:
    """One temperature: reweight, resample, move."""
    k_resample, k_move = jax.random.split(key)
    path = plan.path
    new = _next_temperature(plan, schedule, s)
    increments = path.increment(s.particles.log_ratio, s.temperature, new)
    population = s.population.reweight(increments)
    density = Density(path, inputs, path.weights(new))
    probabilities = population.probabilities
    memory = plan.move.tune(s.memory, s.particles, probabilities)
    if plan.waste_free is None:
        positions = s.particles.position if path.is_flat else None
        after, (particles, roots), _, due = plan.resampling(
            k_resample, population, (s.particles, s.roots), positions
        )
        particles, memory, rate, count = _moved(plan, k_move, density, particles, memory)
    else:
        after, particles, roots, memory, rate = _chains(
            plan, k_resample, k_move, density, population, s, memory
        )
        count = jnp.asarray(plan.num_moves)
        due = jnp.asarray(True)
    record = {
        "temperatures": new,
        "ess": population.ess,
        "log_evidence_increments": population.total - s.population.total,
        "resampled": due,
        "acceptance_rate": rate,
        "num_moves": count,
    }
    history = {a: x.at[s.step].set(record[a].astype(x.dtype)) for a, x in s.history.items()}
    alive = population.log_mean > -jnp.inf
    # The lost particles are kept as they were, for the message.
    particles = jax.tree.map(lambda a, b: jnp.where(alive, a, b), particles, s.particles)
    return State(s.step + 1, new, particles, after, roots, memory, history, alive)


def _moved(plan: Plan, key: Any, density: Density, particles: Particles, memory: Any) -> Any:
    """Moves every particle; returns also the mean acceptance and the number of moves."""
    if not plan.num_moves:
        return particles, memory, jnp.nan * jnp.zeros(()), jnp.zeros((), jnp.int32)
    before = particles
    enough = _FORGOTTEN + 3 / plan.num_particles**0.5  # chance correlations count for nothing

    def unfinished(carry):
        i, particles = carry[:2]
        if not plan.adaptive_moves:
            return i < plan.num_moves
        stuck = jax.lax.cond(
            (i >= 2) & (i < plan.num_moves), lambda: _memory_of(before, particles) > enough,
            lambda: i < 2,
        )  # fmt: skip
        return stuck

    def body(carry):
        i, particles, memory, local, total = carry
        k = jax.random.fold_in(key, i)
        particles, memory, local, rate = plan.move.step(k, density, particles, memory, local)
        return i + 1, particles, memory, local, total + jnp.mean(rate)

    local = plan.move.begin(density, particles)
    zero = jnp.zeros((), particles.log_start.dtype)
    count, particles, memory, _, total = jax.lax.while_loop(
        unfinished, body, (jnp.zeros((), jnp.int32), particles, memory, local, zero)
    )
    return particles, memory, total / count, count


def _memory_of(before: Particles, after: Particles) -> Any:
    """The largest correlation, over coordinates and log densities, with what particles were."""

    def largest(x, y):
        x, y = (jnp.where(jnp.isfinite(v), v, 0.0).reshape(len(v), -1) for v in (x, y))
        x, y = x - jnp.mean(x, 0), y - jnp.mean(y, 0)
        scale = jnp.sqrt(jnp.sum(x * x, 0) * jnp.sum(y * y, 0))
        return jnp.max(jnp.sum(x * y, 0) / jnp.where(scale > 0, scale, 1.0), initial=0.0)

    dtype = before.log_start.dtype
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return jnp.max(jnp.stack([largest(x.astype(dtype), y.astype(dtype)) for x, y in pairs]))


def _chains(plan, k_resample, k_move, density, population, s, memory):
    """Waste-free moves: N/P ancestors, and all P states of the chain from each."""
    n, length = plan.num_particles, plan.waste_free
    k1, k2 = jax.random.split(k_resample)
    positions = s.particles.position if plan.path.is_flat else None
    ancestors = plan.resampling.ancestors(k1, population.log_weights, positions)
    # Every P-th ancestor from a random one on: each index keeps its share in expectation.
    first = jax.random.randint(k2, (), 0, length)
    ancestors = ancestors[first + length * jnp.arange(n // length)]
    start, roots = take((s.particles, s.roots), ancestors)

    def link(carry, i):
        particles, memory = carry
        moved, memory, rate, _ = _moved(
            plan, jax.random.fold_in(k_move, i), density, particles, memory
        )
        return (moved, memory), (particles, rate)

    (last, memory), (kept, rates) = jax.lax.scan(link, (start, memory), jnp.arange(length - 1))
    kept = jax.tree.map(
        lambda x, y: jnp.concatenate([x, y[None]]).reshape((n, *y.shape[1:])), kept, last
    )
    fresh = Population.weighted(jnp.zeros_like(population.log_weights), population.total)
    return fresh, kept, jnp.tile(roots, length), memory, jnp.mean(rates)


def _next_temperature(plan: Plan, schedule: Any, s: State) -> Any:
    """The next of the schedule, or an earlier one where the weights would become too uneven."""
    old = s.temperature
    limit = jnp.min(jnp.where(schedule > old, schedule, 1.0))
    if not plan.adaptive:
        return limit
    log_weights, ratio = s.population.log_weights, s.particles.log_ratio

    def keeps(new):
        step = plan.path.increment(ratio, old, new)
        # Particles that no step however short would keep do not count.
        on = (log_weights > -jnp.inf) & (step > -jnp.inf)
        w = jnp.exp(log_weights - jnp.max(jnp.where(on, log_weights, -jnp.inf)))
        v = jnp.exp(step - jnp.max(jnp.where(on, step, -jnp.inf)))
        w, v = jnp.where(on, w, 0.0), jnp.where(on, v, 0.0)
        s0, s1, s2 = jnp.sum(w), jnp.sum(w * v), jnp.sum(w * v * v)
        return (s1 * s1 >= _DECAY * s0 * s2) | ~jnp.any(on)

    eps = jnp.finfo(old.dtype)
    least = jnp.maximum(8 * eps.eps * old, 1e3 * eps.tiny)
    low, high = jnp.log(least), jnp.log(jnp.maximum(limit - old, least))
    late = s.step >= _MOST_STEPS  # from here on the schedule alone decides, so that it ends

    def halve(search):
        i, low, high, trial = search
        ok = keeps(jnp.minimum(old + jnp.exp(trial), limit)) | late
        low, high = jnp.where(ok, trial, low), jnp.where(ok, high, trial)
        # The first trial is the limit itself; where it will do, there is nothing to search.
        return jnp.where(ok & (i == 0), _HALVINGS, i + 1), low, high, 0.5 * (low + high)

    start = (jnp.zeros((), jnp.int32), low, high, high)
    _, low, high, _ = jax.lax.while_loop(lambda x: x[0] < _HALVINGS, halve, start)
    return jnp.where(low >= high, limit, jnp.minimum(old + jnp.exp(low), limit))


# -------------------------------------------------------------------- on the host


@functools.partial(jax.jit, static_argnums=0)
def _lost(path, inputs, position):
    return jax.vmap(lambda x: path.lost(inputs, x))(position)


def _checked(plan, problem, inputs, out, values, active) -> Posterior:
    out = jax.device_get({k: v for k, v in out.items() if k not in ("values", "active")})
    n, steps = plan.num_particles, int(out["num_steps"])
    history = {a: x[:steps] for a, x in out["history"].items()}
    if not out["alive"]:
        lost = jax.device_get(_lost(plan.path, inputs, out["position"]))
        raise Degenerate(
            f"ab.smc, step {steps} at temperature {float(out['temperature']):.3g}: all {n} "
            f"particles have weight zero: {problem.culprit(lost)}. Correct the data, raise "
            f"num_particles, or start nearer to the posterior (proposal=)."
        )
    messages = _messages(plan, out, history, steps)
    diagnostics = {
        **history,
        "resampled": history["resampled"] > 0,
        "num_moves": history["num_moves"].astype(int),
        "num_steps": steps,
        "num_ancestors": len(np.unique(out["roots"])),
        "num_nan": int(out["num_nan"]),
    }
    return make_posterior(
        problem, values, algorithm="smc", log_weights=out["log_weights"][None],
        log_evidence=float(out["log_evidence"]), diagnostics=diagnostics, messages=messages,
        active=active,
    )  # fmt: skip


def _messages(plan: Plan, out: Any, history: Any, steps: int) -> list[str]:
    n = plan.num_particles
    messages = []
    if out["num_nan"]:
        messages.append(
            f"ab.smc: at {int(out['num_nan'])} of {n} draws from the start the log density was NaN "
            f"or infinite; they have weight zero. Look for invalid operations in the model."
        )
    if plan.adaptive and steps >= plan.max_steps - plan.num_base:
        messages.append(
            f"ab.smc: after {_MOST_STEPS} temperatures the posterior was still far, so the last "
            f"{plan.num_base} steps were longer than they should be. Do not trust the evidence; "
            f"start nearer to the posterior (proposal=), or rescale the model."
        )
    worst = float(np.min(history["ess"]))
    if worst < 0.1 * n and n >= 20:
        messages.append(
            f"ab.smc: the effective sample size fell to {worst:.1f} of {n} particles. "
            + (
                "Raise num_particles, or start nearer to the posterior (proposal=)."
                if plan.adaptive
                else "Use more temperatures, or temperatures=None, which finds them."
            )
        )
    rate = float(np.median(history["acceptance_rate"])) if plan.num_moves else 1.0
    if rate < 0.02:
        messages.append(
            f"ab.smc: {rate:.1%} of the moves were accepted: the particles hardly move. Make "
            f"smaller moves (kernel=), or more of them (num_moves)."
        )
    if plan.path.is_flat and plan.num_moves:
        distinct = len(np.unique(out["position"], axis=0))
        if distinct < 0.2 * n:
            messages.append(
                f"ab.smc: only {distinct} of {n} particles are distinct. Raise num_moves, or use "
                f"a kernel that accepts more."
            )
    return messages
