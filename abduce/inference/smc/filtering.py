"""Particle filters through the scans of a model: from a problem to a posterior."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from abduce.errors import Degenerate, InvalidAlgorithm
from abduce.inference.posterior import Posterior, make_posterior
from abduce.inference.problem import Problem
from abduce.inference.smc.cloud import Cloud, Particles, Settings, first_keys
from abduce.inference.smc.flow import live_variables
from abduce.inference.smc.particles import Walker
from abduce.inference.smc.population import Population
from abduce.inference.smc.proposals import run_proposal
from abduce.inference.smc.quasi import drawn_sites, points
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
    moves: Any = None,
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
        moves: Proposals of a kernel that moves particles after a resampling, or None.
        retained: Choices of the retained path, in the layout users see.
        known: Draws of latents that an earlier run has weighed, `(N, ...)`, in the users' layout.
        resume: Per scan, the carry to start from.
        population: The weights to start from.

    Returns:
        'values' and 'active' by address, `(N, ...)` in the users' layout; 'population'; 'sums' of
        the functionals; 'summaries'; 'reports' of the scans; 'carries' of the scans at the top.
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
        moves,
    )  # fmt: skip
    state = Cloud(
        first_keys(program.jaxpr, key), inputs, population or Population.start(walker.n),
        retained=held,
    )  # fmt: skip
    if settings.qmc:
        outside = drawn_sites(program.jaxpr, inputs, scans=False)
        state.points = points(jax.random.fold_in(key, 2), walker.n, outside)
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
    weights = state.population.probabilities
    sums = {
        name: jnp.tensordot(weights, state.resolve(v)[0], 1) for name, v in state.sums.items()
    }  # fmt: skip
    return {
        "values": values, "active": active, "population": state.population, "sums": sums,
        "summaries": summaries, "reports": state.reports, "carries": state.carries,
    }  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    settings, lookahead, arguments, given, key, proposal, initial, moves, known, resume, population
):
    carried = {"known": known, "resume": resume, "population": population}
    if settings.islands > 1:
        from abduce.inference.smc.islands import run_islands

        shared = {"proposal": proposal, "initial": initial, "moves": moves}
        out = run_islands(
            settings, arguments, given, key, lookahead=lookahead, shared=shared, **carried
        )
    else:
        out = run_filter(
            settings, arguments, given, key, proposal=proposal, initial=initial,
            lookahead=lookahead, moves=moves, **carried,
        )  # fmt: skip
    if settings.spans_processes:  # every process gets the whole result
        everywhere = NamedSharding(settings.devices, PartitionSpec())
        out = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, everywhere), out)
    return out


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
    settings = alg.settings()
    out = _run(
        settings, alg.lookahead, problem.arguments, problem.given, key, alg.proposal,
        alg.initial, alg.filter_moves(), known, resume, population,
    )  # fmt: skip
    if settings.spans_processes and not isinstance(out["population"].total, jax.core.Tracer):
        out = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), out)
    final: Population = out["population"]
    sites = problem.program.sites
    draws = {a: out["values"][a][None] for a in sites if a in out["values"]}
    active = {a: x[None] for a, x in out["active"].items()}
    diagnostics = _diagnostics(out)
    messages: list[str] = []
    log_weights = final.log_weights
    if isinstance(final.total, jax.core.Tracer):
        for report in out["reports"]:  # nothing can be raised here
            log_weights = jnp.where(jnp.any(report.get("lost", False)), jnp.nan, log_weights)
    else:
        _require_alive(alg, problem, out)
        _require_room(alg, out)
        messages = _messages(alg, problem, out, draws)
    return make_posterior(
        problem, draws, algorithm="smc", log_weights=log_weights[None],
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
        if "num_nodes" in report:
            found[f"num_nodes{suffix}"] = report["num_nodes"]
        if "acceptance_rate" in report:
            found[f"acceptance_rate{suffix}"] = report["acceptance_rate"]
    for name in ("log_evidences", "island_ess"):
        if name in out:
            found[name] = out[name]
    for name, value in out["sums"].items():
        found[f"paris/{name}"] = value
    for address, moments in out["summaries"].items():
        found[f"filtered_mean/{address}"] = moments["mean"]
        found[f"filtered_sd/{address}"] = moments["sd"]
    return found


def _require_alive(alg: Any, problem: Problem, out: dict[str, Any]) -> None:
    if np.isfinite(float(out["population"].total)):
        return
    where = ""
    for report in out["reports"]:
        dead = ~np.isfinite(np.asarray(report["log_evidence"]))
        if dead.any():
            index = np.argwhere(dead)[0][1 if alg.islands > 1 else 0 :]
            where = f" at step {tuple(int(i) for i in index)} of the scan"
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


def _require_room(alg: Any, out: dict[str, Any]) -> None:
    for report in out["reports"]:
        if np.any(report.get("lost", False)):
            raise InvalidAlgorithm(
                f"ab.smc(store='tree'): the paths of {alg.num_particles} particles need more than "
                f"{np.max(report['capacity'])} values at once: few particles die at the steps. "
                f"Raise capacity=, or use store='paths'."
            )


def _messages(alg: Any, problem: Problem, out: dict[str, Any], draws: dict[str, Any]) -> list[str]:
    n, island = alg.num_particles, alg.num_particles // alg.islands
    messages = []
    if alg.islands > 1 and out["island_ess"] < 0.3 * alg.islands:
        messages.append(
            f"ab.smc: the evidences of the {alg.islands} islands differ so much that about "
            f"{float(out['island_ess']):.1f} of them count. Use fewer, larger islands."
        )
    for report in out["reports"]:
        ess = np.asarray(report["ess"])
        low = ess < max(2.0, 0.002 * island)
        if island >= 100 and low.any():
            messages.append(
                f"ab.smc: the effective sample size falls to {ess.min():.1f} of {island} at "
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
