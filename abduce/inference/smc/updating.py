"""`post.update`: new data for a posterior.

Draws of any algorithm become particles, which new data weigh (`abduce.inference.smc.stream`). The
posterior of a particle filter goes on from the carry of its scan instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import Degenerate, DiscreteLatent, InvalidAlgorithm, InvalidValue
from abduce.inference.posterior import Posterior, make_posterior
from abduce.inference.predict import descendants
from abduce.inference.problem import Problem, make_problem
from abduce.inference.smc.algorithms import smc
from abduce.inference.smc.batches import MOST_EVEN, Base, Layout, bridge, particles_of, reweigh
from abduce.inference.smc.filtering import filter_posterior
from abduce.inference.smc.flow import evidence_scans
from abduce.inference.smc.moves import HMC
from abduce.inference.smc.stream import Stream
from abduce.inference.smc.tempering import as_move
from abduce.inference.target import FlatTarget, make_target
from abduce.ppl.operations import to_physical, typed_key
from abduce.ppl.program import Arguments
from abduce.ppl.replay import Given
from abduce.ppl.selection import matching

__all__ = ["update"]

_NAME = "post.update"
_NUM_MOVES = 5


def update(
    post: Posterior,
    key: Any,
    new_args: tuple[Any, ...],
    new_kwargs: dict[str, Any],
    *,
    given: Mapping[str, Any] | None,
    redraw: Any,
    via: Any,
) -> Posterior:
    """See `Posterior.update`."""
    key = typed_key(key, _NAME)
    if post.arguments is None:
        raise InvalidValue(
            "post.update: this posterior was loaded from disk. Models are code, which is not "
            "stored, and neither are the data that its particles are moved by. Update before "
            "saving, or run m.posterior(...) again."
        )
    resume = post.resume
    algorithm = _algorithm(via, resume)
    problem = make_problem(post.arguments.unpack()[0], new_args, given, new_kwargs, _NAME)
    problem = dataclasses.replace(problem, coords={**_coords(post, problem), **problem.coords})
    if isinstance(resume, dict) and "carries" in resume:
        return _step_on(post, algorithm, problem, key, redraw)
    k_start, k_draw, k_move = jax.random.split(key, 3)
    stream = resume
    if not isinstance(stream, Stream):
        stream = _start(post, problem, algorithm, k_start)
    stream = dataclasses.replace(stream, algorithm=algorithm)
    return _advance(stream, problem, redraw, k_draw, k_move)


def _algorithm(via: Any, resume: Any) -> Any:
    if via is None:
        if isinstance(resume, Stream):
            return resume.algorithm
        # What an `ab.smc` ran with goes on; draws of other algorithms get the defaults.
        return (resume.get("algorithm") if isinstance(resume, dict) else None) or smc()
    if not isinstance(via, smc):
        raise InvalidAlgorithm(
            f"post.update: via= takes an ab.smc(...), whose threshold, resampler, kernel and "
            f"num_moves apply, got {via!r}."
        )
    return via


def _coords(post: Posterior, problem: Problem) -> dict[str, list[Any]]:
    """The labels so far, of dimensions that still have that length."""
    lengths: dict[str, set[int]] = {}
    for info in problem.program.sites.values():
        for dim, length in zip(info.dims, info.shape, strict=True):
            if dim:
                lengths.setdefault(dim, set()).add(length)
    return {d: list(x) for d, x in post.coords if lengths.get(d) == {len(x)}}


# -------------------------------------------------------------------- state-space models


def _step_on(post: Posterior, alg: Any, problem: Problem, key: Any, redraw: Any) -> Posterior:
    """New steps of the scans; what was drawn before them keeps its draws."""
    program = problem.program
    if not evidence_scans(program.jaxpr, problem.given):
        raise InvalidValue(
            f"post.update: this posterior is of a particle filter, which goes on with new steps, "
            f"but with these arguments no scan of `{program.name}` has data in it. Pass what is "
            f"observed at the new steps with given=."
        )
    inside = {a for a, s in problem.latents.items() if s.num_scans}
    later = descendants(program, inside) if inside else set()
    new = later | (matching(redraw, problem.latents) if redraw else set())
    known = {}
    for address, info in problem.latents.items():
        if address in new or address in problem.given:
            continue
        draws = _draws_of(post, address, info)
        known[address] = draws.reshape((-1, *info.shape))
    n = post.num_chains * post.num_draws
    if alg.num_particles != n:
        alg = alg.replace(num_particles=n)
    out = filter_posterior(
        alg, problem, key, known=known, resume=post.resume["carries"],
        population=post.resume["population"],
    )  # fmt: skip
    return dataclasses.replace(out, resume={**out.resume, "algorithm": alg})


def _draws_of(post: Posterior, address: str, info: Any) -> Any:
    if address not in post.draws:
        raise InvalidValue(
            f"post.update: `{info.address}` is a latent of the model with these arguments, but the "
            f'posterior has no draws of it. To draw it from its prior, pass redraw="{address}".'
        )
    draws = post.draws[address]
    if np.shape(draws)[2:] != info.shape:
        raise InvalidValue(
            f"post.update: the draws of {address!r} have shape {np.shape(draws)[2:]}, but with "
            f"these arguments the site has shape {info.shape}. Latents are shared with the data "
            f'before. To draw it anew for these data (new groups, say), pass redraw="{address}".'
        )
    return draws


# -------------------------------------------------------------------- the first update


def _start(post: Posterior, problem: Problem, algorithm: Any, key: Any) -> Stream:
    """Particles from the draws of a posterior."""
    model, args, kwargs = post.arguments.unpack()  # type: ignore[union-attr]
    old = make_problem(model, args, post.given, kwargs, _NAME)
    is_prior = post.algorithm == "prior"
    dropped: tuple[str, ...] = ()
    if is_prior:  # predictive draws of what is observed from now on
        dropped = tuple(
            a for a in old.latents
            if a in problem.given and not descendants(old.program, {a}) & set(old.latents) - {a}
        )  # fmt: skip
    sites = old.program.sites
    # Stand-ins: nothing that counts depends on them.
    placed = {a: Given(jnp.zeros(sites[a].shape, sites[a].dtype)) for a in dropped}
    old = dataclasses.replace(old, given={**old.given, **placed})
    _require_flat(old)
    target, data = make_target(old, _NAME)
    addresses = [s.address for s in target.slots]
    values = {a: jnp.asarray(post.draws[a]) for a in addresses}
    active = {a: jnp.asarray(x) for a, x in post.active.items() if a in addresses}
    known = is_prior or post.log_evidence is not None
    start = 0.0 if is_prior or post.log_evidence is None else post.log_evidence
    weights = post.log_weights
    position, population = particles_of(target, data, values, active, weights, start, key)
    data = jax.tree.map(jnp.asarray, data)
    return Stream(
        position=position,
        population=population,
        log_step=jnp.full((), jnp.nan, position.dtype),
        start=data,
        groups=(),
        algorithm=algorithm,
        base=Base(target, dropped, not is_prior),
        layouts=(),
        has_evidence=known,
    )


def _require_flat(problem: Problem) -> None:
    for address, info in problem.latents.items():
        if info.is_discrete and not problem.is_all_observed(address):
            raise DiscreteLatent(
                f"post.update moves continuous latents, but site {address!r} "
                f"({info.site.where}) is {info.family}, shape {info.shape}. Go on with a model "
                f"whose prior is this posterior: ab.with_prior(m, post.as_model()), or sum "
                f"{address!r} out."
            )


# -------------------------------------------------------------------- one batch


def _layout(stream: Stream, problem: Problem, redraw: Any) -> tuple[Layout, Any]:
    """What of a batch is shared and what is new, and its data."""
    latents = problem.latents
    new = matching(redraw, latents) if redraw else set()
    if new:
        new |= descendants(problem.program, new) & set(latents)
    new |= {a for a in latents if latents[a].partial or a in problem.given}
    earlier = {s.address for layout in stream.layouts for s in layout.target.slots}
    slots = {s.address: s for s in stream.base.target.slots}
    shared = tuple(a for a in latents if a not in new)
    for address in shared:
        info = latents[address]
        if address in earlier:
            raise InvalidValue(
                f"post.update: {address!r} was drawn anew for earlier data, so there is no one "
                f'value of it to share. Draw it anew for these data too: redraw="{address}".'
            )
        if address not in slots:
            raise InvalidValue(
                f"post.update: {address!r} is a latent of the model with these arguments, but the "
                f"posterior has no draws of it ({', '.join(slots)}). To draw it from its prior, "
                f'pass redraw="{address}".'
            )
        if info.num_scans and evidence_scans(problem.program.jaxpr, problem.given):
            raise InvalidValue(
                f"post.update: {address!r} is drawn inside a scan that has data, and this "
                f"posterior does not know where the scan ended. To go on with new steps, start "
                f"from ab.smc(...)(m).posterior(...); for a new series that starts afresh, pass "
                f'redraw="{address}".'
            )
    if not new:
        target = FlatTarget(problem.arguments.static, (), 0)
        sites = problem.program.sites
        data: dict[str, Any] = {
            "given": {a: to_physical(sites[a], g) for a, g in problem.given.items()},
            "hidden": {},
        }
    else:
        _require_flat(problem)
        target, data = make_target(problem, _NAME)
        kept, at = [], 0
        for slot in target.slots:
            if slot.address in new:
                size = slot.stop - slot.start
                kept.append(dataclasses.replace(slot, start=at, stop=at + size))
                at += size
        target = FlatTarget(target.static, tuple(kept), at)
    num_model = _num_model(problem.arguments)
    data = {
        "dynamic": problem.arguments.dynamic[num_model:],
        "given": data["given"], "hidden": data["hidden"],
    }  # fmt: skip
    return Layout(target, shared, num_model), data


def _num_model(arguments: Arguments) -> int:
    """How many of the packed arrays belong to the model: they come first."""
    count = len(jax.tree.leaves(arguments.unpack()[0]))
    return sum(leaf is None for leaf in arguments.static.leaves[:count])


def _check_shapes(stream: Stream, problem: Problem, layout: Layout) -> None:
    sites = stream.base.target.program(stream.start).sites
    for address in layout.shared:
        old, new = sites[address].shape, problem.latents[address].shape
        if old != new:
            raise InvalidValue(
                f"post.update: the draws of {address!r} have shape {old}, but with these arguments "
                f"the site has shape {new}. Latents are shared with the data before. To draw it "
                f'anew for these data (new groups, say), pass redraw="{address}".'
            )


def _advance(stream: Stream, problem: Problem, redraw: Any, k_draw: Any, k_move: Any) -> Posterior:
    layout, data = _layout(stream, problem, redraw)
    _check_shapes(stream, problem, layout)
    if not layout.shared:
        raise InvalidValue(
            f"post.update: no latent of `{problem.program.name}` is shared with the data before, "
            f"so these data tell nothing about them. Leave some out of redraw=, or run "
            f"m.posterior(...) on the new data alone."
        )
    alg, n = stream.algorithm, stream.num_particles
    rule = alg.resampling()
    out = reweigh(
        stream.base, layout, stream.start, data, stream.position, stream.population, k_draw
    )
    evaluations, parts, acceptance = n, 0, None
    traced = isinstance(out["population"].ess, jax.core.Tracer)
    if traced or float(out["population"].ess) < min(rule.threshold, MOST_EVEN) * n:
        if not traced and not np.isfinite(float(out["population"].log_mean)):
            raise _degenerate(problem, n)
        move = _move(alg.kernel, problem)
        layouts, stacks = stream.stacks(layout, data)
        num_moves = _NUM_MOVES if alg.num_moves is None else alg.num_moves
        out = bridge(
            stream.base, layouts, layout, move, num_moves, rule, stream.start, stacks, data,
            stream.position, out["z"], stream.population, stream.log_step, k_move,
        )  # fmt: skip
        parts, acceptance = out["num_parts"], out["acceptance_rate"]
        if not traced:
            parts, acceptance = int(parts), float(acceptance)
        steps = getattr(move, "num_steps", 0)
        each = 1 + num_moves * (1 + (jnp.nan if steps is None else steps))
        evaluations += n * (2 + (stream.num_batches + 2) * (1 + parts * each))
        stream = stream.moved(layouts, stacks, out)
    stream = dataclasses.replace(
        stream, population=out["population"], evaluations=stream.evaluations + evaluations,
        moves=stream.moves + parts,
    )  # fmt: skip
    stream = stream.append(layout, data, out["z"])
    return _posterior(stream, problem, out, parts, acceptance)


def _move(kernel: Any, problem: Problem) -> Any:
    move = HMC() if kernel is None else as_move(kernel, problem)[0]
    if not move.needs_flat:
        raise InvalidAlgorithm(
            f"post.update moves particles along their unconstrained coordinates, which "
            f"kernel={kernel!r} does not. Use ab.hmc(...) or a flat move of "
            f"abduce.inference.smc.moves, such as RandomWalk()."
        )
    return move


def _degenerate(problem: Problem, n: int) -> Degenerate:
    seen = [
        a for a, s in problem.program.sites.items()
        if s.kind == "factor" or s.observed or a in problem.given
    ]  # fmt: skip
    return Degenerate(
        f"post.update: all {n} particles have weight zero: none explains "
        f"{', '.join(map(repr, seen))}. Check the new data, or start from more draws."
    )


def _posterior(
    stream: Stream, problem: Problem, out: Any, parts: Any, acceptance: Any
) -> Posterior:
    population = out["population"]
    traced = isinstance(population.ess, jax.core.Tracer)
    ess, total = population.ess, population.total
    messages = []
    if not traced:
        ess, total = float(ess), float(total)
        if acceptance is not None and parts and acceptance < 0.02:
            messages.append(
                f"post.update: {acceptance:.1%} of the moves were accepted: the particles hardly "
                f"move. Pass via=ab.smc(kernel=ab.hmc(step_size=...)), or more num_moves."
            )
    diagnostics = {
        "ess": ess, "num_parts": parts, "num_batches": stream.num_batches,
        "num_moved": stream.moves, "evaluations": stream.evaluations,
    }  # fmt: skip
    if acceptance is not None:
        diagnostics["acceptance_rate"] = acceptance
    return make_posterior(
        problem, out["values"], algorithm="update", log_weights=population.log_weights[None],
        log_evidence=total if stream.has_evidence else None, diagnostics=diagnostics,
        messages=messages, active=out["active"], resume=stream,
    )  # fmt: skip
