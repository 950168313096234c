"""Particle filters through the scans of a model: from a problem to a posterior."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import Degenerate
from abduce.inference.posterior import Posterior, make_posterior
from abduce.inference.problem import Problem
from abduce.inference.smc.cloud import Cloud, Particles, Settings, first_keys
from abduce.inference.smc.flow import live_variables
from abduce.inference.smc.particles import Walker
from abduce.inference.smc.population import Population
from abduce.inference.smc.proposals import run_proposal
from abduce.ppl.interpreter import walk
from abduce.ppl.masked import Masked
from abduce.ppl.operations import outside_scopes, to_physical
from abduce.ppl.program import Arguments, stage_packed
from abduce.ppl.replay import Given

__all__ = ["filter_posterior", "run_filter"]


def run_filter(
    settings: Settings,
    arguments: Arguments,
    given: dict[str, Given],
    key: Any,
    *,
    proposal: Any = None,
    initial: Any = None,
    lookahead: Any = None,
    retained: dict[str, Any] | None = None,
    known: dict[str, Any] | None = None,
    resume: Any = (),
    population: Population | None = None,
) -> dict[str, Any]:
    """Runs a program for a population; traceable.

    Args:
        settings: Static settings.
        arguments: The packed model.
        given: Observed values, in the layout users see.
        key: Random key.
        proposal, initial, lookahead: As of `ab.smc`.
        retained: Choices of the retained path, in the layout users see.
        known: Draws of latents that an earlier run has weighed, `(N, ...)`, in the users' layout.
        resume: Per scan, the carry to start from.
        population: The weights to start from.

    Returns:
        'values' and 'active' by address, `(N, ...)` in the users' layout; 'population';
        'summaries'; 'reports' of the scans; 'carries' of the scans at the top.
    """
    with outside_scopes():
        program = stage_packed(arguments)
    inputs = {a: to_physical(program.sites[a], g) for a, g in given.items()}
    for address, x in (known or {}).items():
        physical = jax.vmap(program.sites[address].to_physical)(x)
        inputs[address] = Given(Particles(physical), trusted=True, shared=True)
    held = {
        a: program.sites[a].to_physical(x) for a, x in (retained or {}).items()
    }  # fmt: skip
    _, args, kwargs = arguments.unpack()
    observed = {a: g.value for a, g in given.items() if g.mask is None}
    messages: Any = None
    first: tuple[Any, ...] = ()
    if hasattr(proposal, "messages"):
        guide = proposal
        data = {a: g.value if g.mask is None else Masked(g.value, g.mask) for a, g in given.items()}
        messages, message = guide.messages(data, *args, **kwargs)
        proposal, first = guide.step, (message,)
        initial = initial or guide.start
        lookahead = lookahead or guide.lookahead
    walker = Walker(
        settings, live_variables(program.jaxpr), proposal, lookahead, tuple(resume), messages,
        live_variables(program.jaxpr, weighing=True) if settings.ancestor_sampling else frozenset(),
    )  # fmt: skip
    state = Cloud(
        first_keys(program.jaxpr, key), inputs, population or Population.start(walker.n),
        retained=held,
    )  # fmt: skip
    if initial is not None:
        outer = [a for a, s in program.latents.items() if s.num_scans == 0]
        call = (observed, *args, *kwargs.values(), *first)
        run_proposal(walker, initial, call, state, jax.random.fold_in(key, 1), outer)
    walk(walker, program.jaxpr, program.inputs(arguments), state)
    state.settle()
    values, active = {}, {}
    for address, info in program.sites.items():
        record = state.records.get(address)
        if record is None:
            continue
        array, mapped = state.resolve(record["value"])
        if not mapped:
            array = jnp.broadcast_to(array, (walker.n, *array.shape))
        values[address] = jax.vmap(info.to_logical)(array)
        if "active" in record:
            active[address] = jax.vmap(info.to_logical)(state.resolve(record["active"])[0])
    summaries = {
        a: {k: program.sites[a].to_logical(v) for k, v in s.items()}
        for a, s in state.summaries.items()
    }
    return {
        "values": values, "active": active, "population": state.population,
        "summaries": summaries, "reports": state.reports, "carries": state.carries,
    }  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(settings, lookahead, arguments, given, key, proposal, initial, known, resume, population):
    return run_filter(
        settings, arguments, given, key, proposal=proposal, initial=initial, lookahead=lookahead,
        known=known, resume=resume, population=population,
    )  # fmt: skip


def filter_posterior(
    alg: Any,
    problem: Problem,
    key: Any,
    *,
    known: dict[str, Any] | None = None,
    resume: Any = (),
    population: Population | None = None,
) -> Posterior:
    """Runs `ab.smc` as a particle filter; see `run_filter`."""
    out = _run(
        alg.settings(), alg.lookahead, problem.arguments, problem.given, key, alg.proposal,
        alg.initial, known, resume, population,
    )  # fmt: skip
    final: Population = out["population"]
    sites = problem.program.sites
    draws = {a: out["values"][a][None] for a in sites if a in out["values"]}
    active = {a: x[None] for a, x in out["active"].items()}
    diagnostics = _diagnostics(out)
    messages: list[str] = []
    if not isinstance(final.total, jax.core.Tracer):
        _require_alive(problem, out)
        messages = _messages(alg, problem, out, draws)
    return make_posterior(
        problem, draws, algorithm="smc", log_weights=final.log_weights[None],
        log_evidence=_number(final.total), diagnostics=diagnostics, messages=messages,
        active=active, 
        resume={"carries": out["carries"], "population": final, "algorithm": alg},
    )  # fmt: skip


def _number(x: Any) -> Any:
    return x if isinstance(x, jax.core.Tracer) else float(x)


def _diagnostics(out: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    reports = out["reports"]
    for i, report in enumerate(reports):
        suffix = "" if len(reports) == 1 else f"_{i + 1}"
        found[f"ess{suffix}"] = report["ess"]
        found[f"resampled{suffix}"] = report["resampled"]
        found[f"log_evidence_increments{suffix}"] = report["log_evidence"]
    for address, moments in out["summaries"].items():
        found[f"filtered_mean/{address}"] = moments["mean"]
        found[f"filtered_sd/{address}"] = moments["sd"]
    return found


def _require_alive(problem: Problem, out: dict[str, Any]) -> None:
    if np.isfinite(float(out["population"].total)):
        return
    where = ""
    for report in out["reports"]:
        dead = ~np.isfinite(np.asarray(report["log_evidence"]))
        if dead.any():
            where = f" at step {tuple(int(i) for i in np.argwhere(dead)[0])} of the scan"
            where = where.replace(",)", ")").replace("(", "").replace(")", "")
            break
    observed = [
        a for a, s in problem.program.sites.items()
        if s.kind == "factor" or s.observed or a in problem.given
    ]  # fmt: skip
    raise Degenerate(
        f"ab.smc: every particle has weight zero{where}: no particle explains "
        f"{', '.join(map(repr, observed))} there. Check these data, raise num_particles, or pass "
        f"proposal= a Model that looks at the observation."
    )


def _messages(alg: Any, problem: Problem, out: dict[str, Any], draws: dict[str, Any]) -> list[str]:
    n = alg.num_particles
    messages = []
    for report in out["reports"]:
        ess = np.asarray(report["ess"])
        low = ess < max(2.0, 0.002 * n)
        if n >= 100 and low.any():
            messages.append(
                f"ab.smc: the effective sample size falls to {ess.min():.1f} of {n} at "
                f"{int(low.sum())} of {ess.size} steps: few particles explain the observation "
                f"there. Raise num_particles, or pass proposal= or lookahead=."
            )
            break
    stuck = []
    for address, info in problem.program.sites.items():
        if address not in draws or info.num_scans or not info.is_latent or info.is_discrete:
            continue
        x = np.asarray(draws[address])[0].reshape(n, -1)
        if n >= 100 and x.shape[1] and len(np.unique(x[:, 0])) < max(10, 0.01 * n):
            stuck.append((address, len(np.unique(x[:, 0]))))
    if stuck:
        names = ", ".join(f"{a!r} ({k} values left)" for a, k in stuck)
        messages.append(
            f"ab.smc: resampling along the scan leaves few distinct values of what is drawn "
            f"before it: {names}. Of an initial state that is the smoothing law losing its past "
            f"(smoothing='ffbs' keeps it); for a static parameter use ab.pmmh, ab.smc2 or "
            f"ab.particle_gibbs."
        )
    return messages
