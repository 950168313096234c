"""The scan of a model as a particle filter: resampling at its steps, nothing rewritten.

At step t: resample if it is due (that permutes the carry and everything else that came from a
latent and is used inside), let the proposal draw, run the body, weigh. In the notation of Chopin
and Papaspiliopoulos, "An Introduction to Sequential Monte Carlo" (2020), chapter 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from abduce.errors import InvalidModel
from abduce.inference.smc.cloud import (
    NEXT_SCAN,
    PROPOSE,
    RENEW,
    STEP,
    Cloud,
    Particles,
    closed_error,
)
from abduce.inference.smc.flow import carry_flags, estimated_addresses
from abduce.inference.smc.particles import Walker
from abduce.inference.smc.population import Population, take
from abduce.inference.smc.proposals import (
    lookahead,
    observations,
    root_of,
    run_proposal,
    tree_of,
)
from abduce.ppl import _jax
from abduce.ppl.interpreter import addresses, walk

__all__ = ["Frame", "run_scan"]


class Frame:
    """A scan equation with its operands at hand.

    Attributes:
        body: The jaxpr of a step.
        length, reverse: Of the scan.
        consts, const_flags: What the body closes over, and whether it differs by particle.
        carry, carry_flags: The first carry.
        xs, xs_flags: Per-step inputs, time in front.
        live: Which per-step outputs something still needs.
        weighed: Which of them a log density depends on (with ancestor sampling).
    """

    def __init__(self, walker: Walker, eqn: Any, vals: Sequence[Any], state: Cloud):
        p = eqn.params
        self.walker, self.n = walker, walker.n
        self.body, self.length, self.reverse = p["jaxpr"], p["length"], p["reverse"]
        self.unroll = p["unroll"]
        nc, nk = _jax.scan_split(eqn)
        pairs = [state.resolve(v) for v in vals]
        flags = [m for _, m in pairs]
        self.consts, self.const_flags = [a for a, _ in pairs[:nc]], flags[:nc]
        self.xs_flags = flags[nc + nk :]
        self.xs = [
            jnp.moveaxis(a, 1, 0) if m else a
            for (a, _), m in zip(pairs[nc + nk :], self.xs_flags, strict=True)
        ]
        self.carry_flags = carry_flags(self.body, flags, nc, nk, state)
        avals = [v.aval for v in _jax.inner_jaxpr(self.body)[0].invars[nc : nc + nk]]
        self.carry = [
            self._wide(jnp.asarray(a, v.dtype), m, want)
            for (a, m), want, v in zip(pairs[nc : nc + nk], self.carry_flags, avals, strict=True)
        ]
        self.live = [v in walker.live for v in eqn.outvars[nk:]]
        self.weighed = [v in walker.weighed for v in eqn.outvars[nk:]]
        self.addresses = sorted(addresses(self.body))
        self.estimated = estimated_addresses(self.body)
        self.nk = nk
        self.start: Any = None  # the first carry and the population there

    def _wide(self, x, mapped, wanted):
        return jnp.broadcast_to(x, (self.n, *jnp.shape(x))) if wanted and not mapped else x

    def wrapped(self, consts: Any, carry: Any, xs: Any) -> list[Any]:
        """Inputs of the body, for a walk that begins with no ancestor maps."""
        flags = [*self.const_flags, *self.carry_flags, *self.xs_flags]
        values = [*consts, *carry, *xs]
        return [Particles(a) if m else a for a, m in zip(values, flags, strict=True)]

    def wrapped_consts(self, consts: Any) -> list[Any]:
        """The constants alone, wrapped."""
        return self.wrapped(consts, self.carry, self.xs)[: len(self.consts)]

    def trees(self, consts: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
        """The carry and the input of a step, in the structure that the user's function has."""
        names = _jax.inner_jaxpr(self.body)[0].debug_info.arg_names or ()
        values = self.wrapped(consts, carry, xs)
        nc, nk = len(self.consts), self.nk
        if len(names) != len(values):
            raise InvalidModel(
                "the scan's body has no argument names, so a proposal cannot be called with its "
                "carry and x. Define the body as a plain function `def step(carry, x)`."
            )
        carry_name = next((root_of(s) for s in names[nc : nc + nk]), None)
        x_name = next((root_of(s) for s in names[nc + nk :]), None)
        parts: dict[Any, dict[str, Any]] = {carry_name: {}, x_name: {}}
        for name, value in zip(names, values, strict=True):
            if name and root_of(name) in parts and name not in parts[root_of(name)]:
                parts[root_of(name)][name[len(root_of(name)) :]] = value
        return tree_of(parts.get(carry_name, {})), (
            None if x_name is None else tree_of(parts[x_name])
        )


def run_scan(walker: Walker, eqn: Any, vals: list[Any], state: Cloud) -> list[Any]:
    """Runs a scan that has sites, for all particles."""
    frame = Frame(walker, eqn, vals, state)
    settings = walker.settings
    if state.closed:
        raise closed_error()
    number = state.scans
    inside_branch = state.guard is not None or state.conditional
    resamples = settings.resampling.threshold > 0 and not inside_branch and state.mode == "run"
    resumed = None
    if number >= 0:
        state.scans += 1
        if state.mode == "run" and number < len(walker.resume):
            resumed = walker.resume[number]
    renews = settings.ancestor_sampling and resamples and number >= 0
    if renews:
        from abduce.inference.smc.smoothing import require_renewable

        require_renewable(frame)
    init = frame.carry if resumed is None else _resumed(frame, resumed)
    steps = jnp.arange(frame.length, dtype=jnp.uint32)
    keys = {
        a: jax.vmap(lambda t, k=state.keys[a]: jax.random.fold_in(k, t))(steps)
        for a in (*frame.addresses, STEP)
        if a in state.keys and (a == STEP or _draws(a, frame, state))
    }
    sliced = {a: g for a, g in state.inputs.items() if a in frame.addresses and not g.shared}
    shared = {a: g for a, g in state.inputs.items() if a in frame.addresses and g.shared}
    held = [a for a in frame.addresses if a in state.retained]
    retained, retained_flags = {}, {}
    for a in held:
        array, mapped = state.resolve(state.retained[a])
        retained[a], retained_flags[a] = (jnp.moveaxis(array, 1, 0) if mapped else array), mapped
    outermost = number >= 0 and state.mode == "run"
    looking = walker.lookahead is not None and outermost and frame.length > 0
    proposal = walker.proposal_of(number) if outermost else None
    messages = walker.messages if outermost and number == 0 else None
    static: dict[str, Any] = {}  # what a trace of the body finds out about its outputs

    def inner_state(key, inputs, held, population):
        inner = Cloud(key, {**shared, **inputs}, population, mode=state.mode)
        inner.retained = {a: Particles(x) if retained_flags.get(a) else x for a, x in held.items()}
        inner.scans, inner.conditional, inner.guard = -1, state.conditional, state.guard
        return inner

    def ahead(consts, carry, inputs, xs, message):
        return lookahead(frame, consts, carry, inputs, xs, _extra(message))

    def body(loop, x):
        carry, consts, population, amap, psi = loop
        xs, inputs, held, key = x["xs"], x["inputs"], x["retained"], x["keys"]
        proposed = x["proposed"]
        due, ancestors = jnp.zeros((), bool), None
        if resamples:
            movable = (
                [c if m else None for c, m in zip(carry, frame.carry_flags, strict=True)],
                [c if m else None for c, m in zip(consts, frame.const_flags, strict=True)],
                amap, psi,
            )  # fmt: skip
            before = (carry, consts, population)
            population, moved, ancestors, due = settings.resampling(
                key[STEP], population, movable, _positions(frame, settings, carry)
            )
            if renews:  # not in a nested scan: what follows it outside would weigh as well
                key_a = jax.random.fold_in(key[STEP], RENEW)
                new = _new_ancestor(frame, before, key_a, xs, inputs, held, inner_state)
                ancestors = ancestors.at[0].set(jnp.where(due, new, ancestors[0]))
                moved = take(movable, ancestors)
            merge = lambda new, old: [  # noqa: E731
                o if x is None else x for x, o in zip(new, old, strict=True)
            ]
            carry, consts = merge(moved[0], carry), merge(moved[1], consts)
            amap, psi = moved[2], moved[3]
            xs = [
                take(v, amap) if m else v for v, m in zip(xs, frame.xs_flags, strict=True)
            ]  # fmt: skip
            proposed = take(proposed, amap)
        inner = inner_state(key, inputs, held, population)
        inner.proposed = {a: Particles(v) for a, v in proposed.items()}
        if proposal is not None:
            args = (
                observations(inputs, x["message"]),
                *frame.trees(consts, carry, xs),
                *_extra(x["message"]),
            )
            key_q = jax.random.fold_in(key[STEP], PROPOSE)
            run_proposal(walker, proposal, args, inner, key_q, frame.addresses)
        outs = walk(walker, frame.body, frame.wrapped(consts, carry, xs), inner)
        pairs = [inner.resolve(o) for o in outs]
        consts = [inner.resolve(v)[0] for v in frame.wrapped_consts(consts)]
        for extra in inner.maps:  # of scans inside this step
            amap = take(amap, extra)
            ancestors = extra if ancestors is None else take(ancestors, extra)
            psi = take(psi, extra)
        if looking:
            (inputs_next, xs_next, message_next), there = x["next"]
            ends = [a for a, _ in pairs[: frame.nk]]
            xs_next = [
                take(v, amap) if m else v for v, m in zip(xs_next, frame.xs_flags, strict=True)
            ]  # fmt: skip
            later = ahead(consts, ends, inputs_next, xs_next, message_next)
            later = jnp.where(there, later, 0.0)
            inner.add(later - psi)
            psi = later
        before_evidence = population.total
        inner.settle()
        new_carry = [
            settings.spread(frame._wide(a, m, want)) if want else a
            for (a, m), want in zip(pairs[: frame.nk], frame.carry_flags, strict=True)
        ]
        report = {"ess": inner.population.ess, "resampled": due}
        lost = jnp.isneginf(before_evidence)  # no NaN once all weights are zero
        report["log_evidence"] = jnp.where(
            lost, 0.0, inner.population.total - jnp.where(lost, 0.0, before_evidence)
        )
        y = _collect(frame, inner, pairs, static, settings, state)
        y["report"] = report
        y["nested"] = inner.reports
        if ancestors is not None and settings.store == "paths" and state.mode == "run":
            y["ancestors"] = ancestors
            if settings.smoothing == "ffbs" and number >= 0:
                y["backward"] = (new_carry, inner.population.log_weights)
        return (new_carry, consts, inner.population, amap, psi), y

    state.settle()
    psi = jnp.zeros((frame.n,), state.population.log_weights.dtype)
    if looking:
        first = -1 if frame.reverse else 0
        slices = jax.tree.map(lambda v: v[first], (sliced, frame.xs, messages))
        psi = jnp.broadcast_to(ahead(frame.consts, init, *slices), (frame.n,)).astype(psi.dtype)
        state.add(psi)
        state.settle()
    x: dict[str, Any] = {"xs": frame.xs, "inputs": sliced, "retained": retained, "keys": keys}
    x["message"] = messages
    x["proposed"] = {  # by a proposal for the step that this scan is in
        a: jnp.moveaxis(state.resolve(state.proposed[a])[0], 1, 0)
        for a in frame.addresses
        if a in state.proposed
    }
    if looking:
        x["next"] = _shifted((sliced, frame.xs, messages), frame)
    frame.start = (init, state.population)
    amap = jnp.arange(frame.n, dtype=jnp.int32)
    loop = (init, frame.consts, state.population, amap, psi)
    (carry, _, state.population, amap, _), ys = jax.lax.scan(
        body, loop, x, length=frame.length, reverse=frame.reverse, unroll=frame.unroll
    )
    if resamples:
        state.maps.append(amap)
    if renews:
        from abduce.inference.smc.smoothing import require_unweighed

        require_unweighed(frame, static["ys"])
    outs = _finish(frame, state, carry, ys, static, (x, settings, inner_state, number))
    if STEP in state.keys:  # two scans in sequence do not resample alike
        state.keys = {**state.keys, STEP: jax.random.fold_in(state.keys[STEP], NEXT_SCAN)}
    return outs


def _positions(frame: Frame, settings: Any, carry: Sequence[Any]) -> Any:
    """Where particles are, `(N, d)`, for the one scheme that looks: the carry, scaled."""
    if settings.resampling.scheme != "optimal_transport":
        return None
    columns = [
        c.reshape(frame.n, -1)
        for c, m in zip(carry, frame.carry_flags, strict=True)
        if m and jnp.issubdtype(c.dtype, jnp.inexact)
    ]
    if not columns:
        raise InvalidModel(
            "ab.smc(resampler='optimal_transport') needs distances between particles, but the "
            "scan's carry has no floating-point latent. Use another resampler."
        )
    x = jnp.concatenate(columns, axis=1)
    return x / jnp.maximum(jnp.std(x, axis=0), jnp.finfo(x.dtype).tiny)


def _draws(address: str, frame: Frame, state: Cloud) -> bool:
    given = state.inputs.get(address)
    return given is None or given.mask is not None or address in frame.estimated


def _resumed(frame: Frame, carry: Sequence[Any]) -> list[Any]:
    return [
        r if r is not None else c for c, r in zip(frame.carry, carry, strict=True)
    ]  # fmt: skip


def _extra(message: Any) -> tuple[Any, ...]:
    return () if message is None else (message,)


def _shifted(tree: Any, frame: Frame) -> tuple[Any, Any]:
    """The next step's inputs at each step, and whether there is one."""
    shift = 1 if frame.reverse else -1
    there = jnp.arange(frame.length) != (0 if frame.reverse else frame.length - 1)
    return jax.tree.map(lambda v: jnp.roll(v, shift, axis=0), tree), there


# ---------------------------------------------------------------------- what a step leaves behind


def _collect(frame, inner, pairs, static, settings, state) -> dict[str, Any]:
    """Per-step outputs: values something needs, records of sites or their moments."""
    outs = pairs[frame.nk :]
    static["ys"] = [m for _, m in outs]
    y: dict[str, Any] = {
        "ys": [a if live else None for (a, _), live in zip(outs, frame.live, strict=True)]
    }
    y["summaries"] = dict(inner.summaries)
    records: dict[str, Any] = {}
    static["records"] = {}
    for address, record in inner.records.items():
        resolved = {k: inner.resolve(v) for k, v in record.items()}
        if settings.store == "filter" and state.mode == "run":
            y["summaries"][address] = _moments(inner.population, resolved)
            continue
        records[address] = {k: a for k, (a, _) in resolved.items()}
        static["records"][address] = {k: m for k, (_, m) in resolved.items()}
    y["records"] = records
    return y


def _moments(population: Population, record: Any) -> dict[str, Any]:
    x, mapped = record["value"]
    if not mapped:
        return {"mean": x, "sd": jnp.zeros_like(x)}
    w = population.probabilities
    if "active" in record:
        on = record["active"][0]
        w = w.reshape((-1,) + (1,) * (on.ndim - 1)) * on
        w = w / jnp.maximum(jnp.sum(w, 0), jnp.finfo(w.dtype).tiny)
    w = w.reshape(w.shape + (1,) * (x.ndim - w.ndim))
    values = x.astype(w.dtype)
    mean = jnp.sum(w * values, 0)
    return {"mean": mean, "sd": jnp.sqrt(jnp.sum(w * (values - mean) ** 2, 0))}


def _finish(frame, state, carry, ys, static, context) -> list[Any]:
    """Traces values of each step back to the particles that stand at the end."""
    x, settings, inner_state, number = context
    traced: dict[str, Any] = {
        "ys": [
            y if m and live else None
            for y, m, live in zip(ys["ys"], static["ys"], frame.live, strict=True)
        ],
        "records": {
            a: {k: v if static["records"][a][k] else None for k, v in r.items()}
            for a, r in ys["records"].items()
        },
    }
    if "backward" in ys and frame.length > 0:
        from abduce.inference.smc.smoothing import simulate_backwards

        traced, root, last = simulate_backwards(frame, state, ys, traced, x, inner_state)
        state.maps[-1] = root
        carry = [
            take(c, last) if m else c for c, m in zip(carry, frame.carry_flags, strict=True)
        ]  # fmt: skip
        if settings.num_paths == 1:
            state.closed = True
    elif "ancestors" in ys:
        traced = _genealogy(traced, ys["ancestors"], frame)
    elif settings.store == "filter" and "ancestors" not in ys and any(frame.live):
        _require_no_past(frame, static, settings)

    def particles(y):
        return state.wrap(jnp.moveaxis(y, 0, 1))

    outs: list[Any] = [
        state.wrap(c) if m else c for c, m in zip(carry, frame.carry_flags, strict=True)
    ]
    for plain, y, m in zip(ys["ys"], traced["ys"], static["ys"], strict=True):
        outs.append(particles(y) if m and y is not None else plain)
    for address, record in ys["records"].items():
        state.records[address] = {
            k: particles(traced["records"][address][k]) if static["records"][address][k] else v
            for k, v in record.items()
        }
    state.summaries.update(ys["summaries"])
    ends = {"start": frame.start[1].total, "end": state.population.total}
    state.reports.append({**ys["report"], **ends})
    state.reports.extend(ys["nested"])
    if number >= 0:
        state.carries.append(
            [c if m else None for c, m in zip(carry, frame.carry_flags, strict=True)]
        )
    return outs


def _require_no_past(frame, static, settings):
    if settings.resampling.threshold > 0 and any(
        m and live for m, live in zip(static["ys"], frame.live, strict=True)
    ):
        raise InvalidModel(
            "ab.smc(store='filter') keeps no past, but the model uses what its scan returns for "
            "each step, which came from latents. Use store='paths', or compute it in the carry."
        )


def _genealogy(traced: Any, ancestors: Any, frame: Frame) -> Any:
    """Reads each step's values through the ancestors of the steps after it."""

    def back(index, step):
        values, ancestors = step
        return take(ancestors, index), take(values, index)

    first = jnp.arange(frame.n, dtype=jnp.int32)
    return jax.lax.scan(back, first, (traced, ancestors), reverse=not frame.reverse)[1]


def score_step(frame: Frame, consts, carry, xs, inputs, held, inner_state) -> Any:
    """Log density of a step's sites at given latents, for each particle's carry; `(N,)`."""
    inner = inner_state({}, inputs, held, Population.start(frame.n))
    inner.mode = "score"
    walk(frame.walker, frame.body, frame.wrapped(consts, carry, xs), inner)
    inner.settle()  # scans inside have done so before
    return inner.population.log_weights


def _new_ancestor(frame, before, key, xs, inputs, held, inner_state) -> Any:
    """Draws a new past for the retained path (Lindsten, Jordan and Schon 2014, eq. 5)."""
    carry, consts, population = before
    logits = population.log_weights + score_step(
        frame, consts, carry, xs, inputs, held, inner_state
    )
    alive = jnp.any(jnp.isfinite(logits))
    return jnp.where(alive, jax.random.categorical(key, logits), 0).astype(jnp.int32)
