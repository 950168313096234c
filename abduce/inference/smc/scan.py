"""The scan of a model as a particle filter: resampling at its steps, nothing rewritten.

At step t: resample if it is due (that permutes the carry and everything else that came from a
latent and is used inside), let the proposal draw, run the body, weigh. In the notation of Chopin
and Papaspiliopoulos, "An Introduction to Sequential Monte Carlo" (2020), chapter 10.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from abduce.errors import InvalidModel
from abduce.inference.smc import quasi
from abduce.inference.smc.cloud import (
    MOVE,
    NEXT_SCAN,
    PARIS,
    PROPOSE,
    QMC,
    RENEW,
    STEP,
    Cloud,
    Particles,
    closed_error,
)
from abduce.inference.smc.flow import carry_flags, estimated_addresses
from abduce.inference.smc.history import collect, finish, run_steps
from abduce.inference.smc.particles import Walker
from abduce.inference.smc.population import Population, take
from abduce.inference.smc.proposals import (
    lookahead,
    observations,
    run_proposal,
    tree_of,
)
from abduce.ppl import _jax
from abduce.ppl.interpreter import addresses, walk
from abduce.ppl.slots import argument_names, root_of

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
        names = argument_names(self.body)
        values = self.wrapped(consts, carry, xs)
        nc, nk = len(self.consts), self.nk
        if not names and values:
            raise InvalidModel(
                "the scan's body has no argument names, so a proposal cannot be called with its "
                "carry and x. Define the body as a plain function `def step(carry, x)`."
            )
        carry_name = next((root_of(s) for s in names[nc : nc + nk] if s), None)
        x_name = next((root_of(s) for s in names[nc + nk :] if s), None)
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
    drawn: dict[str, Any] = {}
    if settings.qmc:
        quasi.require_outermost(number, frame.addresses)
        drawn = quasi.drawn_sites(frame.body, state.inputs, scans=True)
    renews = settings.ancestor_sampling and resamples and number >= 0
    if renews:
        from abduce.inference.smc.smoothing import require_renewable

        require_renewable(frame)
    moving = walker.moves is not None and resamples and number >= 0
    latents = {}
    if moving:
        from abduce.inference.smc.rejuvenation import Step, movable_latents, resample_move

        latents = movable_latents(frame, state.inputs)
        moving = bool(latents) and frame.length > 0
    summing = (
        settings.smoothing == "paris" and number == 0 and state.mode == "run"
        and not inside_branch and frame.length > 0
    )  # fmt: skip
    if summing:
        from abduce.inference.smc import paris

        paris.require_smoothable(frame)
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
        inner.retained = {
            a: Particles(x) if retained_flags.get(a) and not isinstance(x, Particles) else x
            for a, x in held.items()
        }
        inner.scans, inner.conditional, inner.guard = -1, state.conditional, state.guard
        return inner

    def ahead(consts, carry, inputs, xs, message):
        return lookahead(frame, consts, carry, inputs, xs, _extra(message))

    def resample(key, population, carry, consts, amap, psi, coordinate=None):
        movable = (
            [c if m else None for c, m in zip(carry, frame.carry_flags, strict=True)],
            [c if m else None for c, m in zip(consts, frame.const_flags, strict=True)],
            amap, psi,
        )  # fmt: skip
        choose = None
        if coordinate is not None:
            order = quasi.carry_order(carry, frame.carry_flags, frame.n)
            choose = lambda w: quasi.ancestors(key, coordinate, w, order)  # noqa: E731
        return movable, settings.resampling(
            key, population, movable, _positions(frame, settings, carry), choose
        )

    def merge(new, old):
        return [o if x is None else x for x, o in zip(new, old, strict=True)]

    def body(loop, x):
        carry, consts, population, amap, psi, came, sums = loop
        entered = (carry, _untwisted(population.log_weights, psi), sums)
        xs, inputs, held, key = x["xs"], x["inputs"], x["retained"], x["keys"]
        proposed = x["proposed"]
        due, ancestors = jnp.zeros((), bool), None
        coordinate, uniform = None, None
        if settings.qmc:
            key_u = jax.random.fold_in(key[STEP], QMC)
            coordinate, uniform = quasi.step_points(key_u, frame.n, drawn)
        if resamples and not moving:
            before = (carry, consts, _untwisted(population.log_weights, psi))
            movable, (population, moved, ancestors, due) = resample(
                key[STEP], population, carry, consts, amap, psi, coordinate
            )
            if renews:  # not in a nested scan: what follows it outside would weigh as well
                key_a = jax.random.fold_in(key[STEP], RENEW)
                new = _new_ancestor(frame, before, key_a, xs, inputs, held, inner_state)
                ancestors = ancestors.at[0].set(jnp.where(due, new, ancestors[0]))
                moved = take(movable, ancestors)
            carry, consts = merge(moved[0], carry), merge(moved[1], consts)
            amap, psi = moved[2], moved[3]
        if resamples:
            xs = [
                take(v, amap) if m else v for v, m in zip(xs, frame.xs_flags, strict=True)
            ]  # fmt: skip
            proposed = take(proposed, amap)
        inner = inner_state(key, inputs, held, population)
        inner.proposed = {a: Particles(v) for a, v in proposed.items()}
        inner.points = uniform
        if proposal is not None:
            args = (
                observations(inputs, x["message"]),
                *frame.trees(consts, carry, xs),
                *_extra(x["message"]),
            )
            key_q = jax.random.fold_in(key[STEP], PROPOSE)
            run_proposal(walker, proposal, args, inner, key_q, frame.addresses)
        carry_in = carry
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
        ess = inner.population.ess
        if moving:
            beside: dict[str, Any] = {"amap": amap, "psi": psi}
            later_psi = None
            if looking:
                beside["xs"] = [
                    v if m else None for v, m in zip(xs_next, frame.xs_flags, strict=True)
                ]

                def later_psi(consts, ends, beside):
                    xs = merge(beside["xs"], xs_next)
                    psi = ahead(consts, ends, inputs_next, xs, message_next)
                    return jnp.where(there, psi, 0.0)

            step = Step(
                frame, latents, carry_in, consts, xs, {**shared, **inputs}, beside, later_psi
            )  # fmt: skip
            again = settings.resampling.due(inner.population) & x["more"]
            rule = dataclasses.replace(settings.resampling, threshold=1.0)
            ends = step.ends(outs, inner)
            inner, pairs, consts, beside, ancestors, rate = resample_move(
                step, inner, pairs, again, jax.random.fold_in(key[STEP], MOVE),
                lambda k, p, t: rule(k, p, t, _positions(frame, settings, ends))[:3],
            )  # fmt: skip
            amap, psi = beside["amap"], beside["psi"]
            due, came = came, again
        new_carry = [
            settings.spread(frame._wide(a, m, want)) if want else a
            for (a, m), want in zip(pairs[: frame.nk], frame.carry_flags, strict=True)
        ]
        if summing:
            latent = {a: inner.resolve(r["value"]) for a, r in inner.records.items()}
            latent = {a: Particles(v) for a, (v, m) in latent.items() if m}
            sums = paris.advance(
                frame, settings.functionals, jax.random.fold_in(key[STEP], PARIS), entered,
                new_carry, jnp.arange(frame.n) if ancestors is None else ancestors,
                (xs, {**shared, **inputs}),
                lambda carry: score_step(frame, consts, carry, xs, inputs, latent, inner_state),
            )  # fmt: skip
        report = {"ess": ess, "resampled": due}
        if moving:
            report["acceptance_rate"] = rate
        lost = jnp.isneginf(before_evidence)  # no NaN once all weights are zero
        report["log_evidence"] = jnp.where(
            lost, 0.0, inner.population.total - jnp.where(lost, 0.0, before_evidence)
        )
        y = collect(frame, inner, pairs, static, settings, state)
        y["report"] = report
        y["nested"] = inner.reports
        if ancestors is not None and settings.store != "filter" and state.mode == "run":
            y["ancestors"] = ancestors
            if settings.smoothing in ("ffbs", "two_filter") and number >= 0:
                y["backward"] = (new_carry, _untwisted(inner.population.log_weights, psi))
        return (new_carry, consts, inner.population, amap, psi, came, sums), y

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
    frame.start = (init, state.population, psi)
    amap = jnp.arange(frame.n, dtype=jnp.int32)
    sums = {}
    if summing:
        first = jax.tree.map(lambda v: v[0], (frame.xs, sliced))
        sums = paris.start(frame, settings.functionals, (first[0], {**shared, **first[1]}))
    loop = (init, frame.consts, state.population, amap, psi, None, sums)
    if moving:  # particles are resampled at the ends of steps: here for the first
        x["more"] = _shifted((), frame)[1]
        key = jax.random.fold_in(state.keys[STEP], MOVE)
        _, (population, moved, _, came) = resample(
            key, state.population, init, frame.consts, amap, psi
        )
        loop = (
            merge(moved[0], init), merge(moved[1], frame.consts), population, *moved[2:], came, sums
        )  # fmt: skip
    grows = settings.store == "tree" and outermost
    (carry, _, state.population, amap, _, _, sums), ys, tree = run_steps(
        body, loop, x, frame, static, settings.capacity or 0 if grows else None
    )
    if resamples:
        state.maps.append(amap)
    state.sums |= {name: state.wrap(v) for name, v in sums.items()}
    if renews:
        from abduce.inference.smc.smoothing import require_unweighed

        require_unweighed(frame, static["ys"])
    outs = finish(frame, state, carry, ys, static, (x, settings, inner_state, number, tree))
    if STEP in state.keys:  # two scans in sequence do not resample alike
        state.keys = {**state.keys, STEP: jax.random.fold_in(state.keys[STEP], NEXT_SCAN)}
    return outs


def _untwisted(log_weights: Any, psi: Any) -> Any:
    """The filter's log weights, without the look-ahead."""
    return jnp.where(jnp.isneginf(log_weights), log_weights, log_weights - psi)


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


def score_step(frame: Frame, consts, carry, xs, inputs, held, inner_state) -> Any:
    """Log density of a step's sites at given latents, for each particle's carry; `(N,)`."""
    inner = inner_state({}, inputs, held, Population.start(frame.n))
    inner.mode = "score"
    walk(frame.walker, frame.body, frame.wrapped(consts, carry, xs), inner)
    inner.settle()  # scans inside have done so before
    return inner.population.log_weights


def _new_ancestor(frame, before, key, xs, inputs, held, inner_state) -> Any:
    """Draws a new past for the retained path (Lindsten, Jordan and Schon 2014, eq. 5)."""
    carry, consts, log_weights = before
    logits = log_weights + score_step(frame, consts, carry, xs, inputs, held, inner_state)
    alive = jnp.any(jnp.isfinite(logits))
    return jnp.where(alive, jax.random.categorical(key, logits), 0).astype(jnp.int32)
