"""Running a program for a whole population of particles at once.

A handler of the one interpreter, `abduce.ppl.interpreter.walk`. Values that differ by particle are
`Particles`, with the particle axis in front; everything else (data, constants) stays single.
Equations without sites are mapped over the particles, one by one, where an input differs.

Resampling permutes *everything* downstream of a latent. It happens at the steps of scans
(`abduce.inference.smc.scan`); each leaves a composed ancestor map behind, and values computed
before are read through the maps that came since.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from abduce.errors import InvalidModel, InvalidValue
from abduce.inference.smc.cloud import Cloud, Particles, Settings
from abduce.inference.smc.draws import draw_site, score_site
from abduce.inference.smc.quasi import quantiles
from abduce.ppl import _jax
from abduce.ppl.interpreter import (
    broadcast_operand,
    loop_error,
    walk,
)
from abduce.ppl.replay import (
    Given,
    _draw,
    _modified,
    is_estimated,
    log_density_of,
    score_element,
)
from abduce.ppl.site import Site, has_sites, site_p

__all__ = ["Walker"]


@dataclasses.dataclass(frozen=True, eq=False)
class Walker:
    """The handler: what equations mean for a population.

    Attributes:
        settings: See `Settings`.
        live: Variables of the program that something still needs (see `live_variables`).
        moves: Proposals of the kernel that moves particles after a resampling; None: no kernel.
        weighed: Variables on which a log density depends; empty without ancestor sampling.
        proposal: Called at each step of a scan as `proposal(given, carry, x)`, or None; a tuple
            has one for each scan of the top level.
        lookahead: Called with the next step's `(given, carry, x)`; a log weight, or None.
        resume: Per scan of the top level, the carry to start from, or nothing.
        messages: Per-step inputs for the proposal and the look-ahead of the first scan, or None.
    """

    settings: Settings
    live: frozenset[Any] = frozenset()
    proposal: Any = None
    lookahead: Any = None
    resume: Sequence[Any] = ()
    messages: Any = None
    weighed: frozenset[Any] = frozenset()
    moves: Any = None

    def proposal_of(self, number: int) -> Any:
        """The proposal for a scan of the top level; one alone is for the first scan."""
        if not isinstance(self.proposal, tuple):
            return self.proposal if number == 0 else None
        return self.proposal[number] if number < len(self.proposal) else None

    @property
    def n(self) -> int:
        return self.settings.num_particles

    def site(self, site, operands, given, key, acc):
        raise AssertionError("sites of a population are handled by `equation`")

    def equation(self, eqn: Any, vals: list[Any], state: Any) -> list[Any]:
        """One equation, for all particles."""
        if eqn.primitive is site_p:
            return self._site(eqn.params["site"], vals, state)
        if not any(has_sites(sub) for sub in _jax.subjaxprs(eqn)):
            return self._plain(eqn, vals, state)
        if eqn.primitive is _jax.scan_p:
            from abduce.inference.smc.scan import run_scan

            return run_scan(self, eqn, vals, state)
        if eqn.primitive is _jax.cond_p:
            return self._cond(eqn, vals, state)
        call = _jax.call_jaxpr(eqn)
        if call is None:
            raise loop_error(eqn)
        return walk(self, call[1], vals, state)

    def _plain(self, eqn: Any, vals: list[Any], state: Cloud) -> list[Any]:
        pairs = [state.resolve(v) for v in vals]
        arrays = [a for a, _ in pairs]
        if any(a is None for a in arrays):  # of what a scan returns and nothing needs
            return [None] * len(eqn.outvars)
        if not any(mapped for _, mapped in pairs):
            return _jax.evaluate(eqn, arrays)
        in_axes = tuple(0 if mapped else None for _, mapped in pairs)
        run = jax.vmap(
            lambda *xs: _jax.evaluate(eqn, xs), in_axes=in_axes, axis_size=self.n
        )  # fmt: skip
        return [state.wrap(x) for x in run(*arrays)]

    # ------------------------------------------------------------------ sites

    def _site(self, site: Site, vals: list[Any], state: Cloud) -> list[Any]:
        pairs = [state.resolve(v) for v in vals]
        ops, mapped = [a for a, _ in pairs], [m for _, m in pairs]
        if site.kind == "factor":
            score = score_site(site, lambda o: log_density_of(site, o, None), self.n, ops, mapped)
            state.add(_total(score, any(mapped)))
            return []
        if site.kind == "param":
            given = state.inputs.get(site.address)
            value = jnp.asarray(ops[0] if given is None else given.value, site.dtype)
            return [value]
        if site.kind == "auxiliary":
            key = state.keys[site.address]
            run = lambda k, o: site.build(o).sample(k)  # noqa: E731
            return [state.wrap(draw_site(site, run, key, self.n, ops, mapped))]
        if site.kind == "deterministic":
            return [self._deterministic(site, ops, mapped, state)]
        return [self._sample(site, ops, mapped, state)]

    def _deterministic(self, site, ops, mapped, state):
        if mapped[0]:
            value = jax.vmap(lambda x: broadcast_operand(site, x, 0))(ops[0])
            out = state.wrap(value)
        else:
            out = broadcast_operand(site, ops[0], 0)
        if state.mode == "run":
            self._record(site, ops, mapped, out, state)
        return out

    def _record(self, site, ops, mapped, value, state):
        record = {"value": value}
        active = None
        if "guard" in site.roles:
            i = site.roles.index("guard")
            if mapped[i]:
                active = jax.vmap(lambda g: broadcast_operand(site, g, i))(ops[i])
            else:
                active = jnp.broadcast_to(
                    broadcast_operand(site, ops[i], i), (self.n, *site.axis_sizes)
                )
        if state.guard is not None:
            on = state.guard.reshape((self.n,) + (1,) * len(site.axes))
            active = jnp.broadcast_to(on if active is None else on & active, self._lead(site))
        elif active is None and state.conditional:
            active = jnp.ones(self._lead(site), bool)
        if active is not None:
            record["active"] = state.wrap(active)
            array, is_mapped = state.resolve(value)
            if not is_mapped:
                record["value"] = state.wrap(jnp.broadcast_to(array, (self.n, *jnp.shape(array))))
        old = state.records.get(site.address)
        if old is not None:
            record = self._merge(old, record, state)
        state.records[site.address] = record

    def _lead(self, site):
        return (self.n, *site.axis_sizes)

    def _merge(self, old, new, state):
        """One address in two branches: each particle took one of them."""
        (a, _), (b, _) = state.resolve(old["value"]), state.resolve(new["value"])
        (was, _), (on, _) = state.resolve(old["active"]), state.resolve(new["active"])
        mask = on.reshape(on.shape + (1,) * (b.ndim - on.ndim))
        return {"value": state.wrap(jnp.where(mask, b, a)), "active": state.wrap(was | on)}

    def _sample(self, site: Site, ops: list[Any], mapped: list[bool], state: Cloud) -> Any:
        address = site.address
        given: Given | None = state.inputs.get(address)
        i = site.roles.index("obs") if "obs" in site.roles else None
        partly = "mask" in site.roles or (given is not None and given.mask is not None)
        if i is not None and "mask" not in site.roles:  # observed in the program
            if mapped[i]:
                value = jax.vmap(lambda x: _spread(site, x, i))(ops[i])
            else:
                value = _spread(site, ops[i], i)
            self._score(site, ops, mapped, value, mapped[i], None, False, state)
            return state.wrap(value) if mapped[i] else value
        if given is not None and given.mask is None:
            value, differs = state.resolve(given.value)
            if given.shared:  # draws from an earlier posterior: their density counted there
                self._record(site, ops, mapped, given.value, state)
                return given.value
            value = value.astype(site.dtype)
            self._score(site, ops, mapped, value, differs, None, given.trusted, state)
            return value
        value, scored = self._latent(site, ops, mapped, state)
        if partly:
            value = self._partly(site, ops, mapped, value, scored, given, state)
        elif scored:
            drawn = address not in state.proposed and state.mode == "propose"
            self._score(site, ops, mapped, value, True, None, False, state, drawn)
        out = state.wrap(value)
        if state.mode != "score":
            self._record(site, ops, mapped, out, state)
        return out

    def _latent(self, site, ops, mapped, state):
        """A latent's value for all particles, and whether its density counts."""
        address = site.address
        if state.mode == "score":
            value, differs = state.resolve(state.retained[address])
            return (value if differs else jnp.broadcast_to(value, (self.n, *value.shape))), True
        if address in state.proposed:
            if state.conditional or state.guard is not None or "guard" in site.roles:
                raise InvalidModel(
                    f"the proposal draws {address!r}, which is in a branch: where the branch is "
                    f"not taken, its density would have to be left out. Leave it to its prior, or "
                    f"move the site out of the branch."
                )
            (value, _), scored = state.resolve(state.proposed[address]), True
            if value.shape[1:] != site.full_shape:
                raise InvalidValue(
                    f"the proposal draws {address!r} with shape {value.shape[1:]}, but the model "
                    f"has it with shape {site.full_shape}."
                )
            value = value.astype(site.dtype)
        else:
            if state.points is not None and address in state.points:
                value = quantiles(site, state.points[address], ops, mapped, self.n)
            else:
                value = draw_site(
                    site, lambda k, o: _draw(site.build(o), k, site), state.keys[address], self.n,
                    ops, mapped,
                )  # fmt: skip
            value = self.settings.spread(value)
            scored = state.mode == "propose"
        if self.settings.conditional and address in state.retained:
            value = value.at[0].set(state.retained[address].astype(value.dtype))
        return value, scored

    def _partly(self, site, ops, mapped, value, scored, given, state):
        """Puts in what is observed under a mask; only that counts, unless all does."""
        batch = (self.n, *site.axis_sizes, *site.batch_shape)
        observed: Any = jnp.zeros(batch, bool)
        sources = []
        if given is not None:
            sources.append((given.value, False, given.mask))
        if "mask" in site.roles:
            i, j = site.roles.index("obs"), site.roles.index("mask")
            full = [
                jax.vmap(lambda x, k=k: broadcast_operand(site, x, k))(ops[k])
                if mapped[k]
                else broadcast_operand(site, ops[k], k)
                for k in (i, j)
            ]
            sources.append((full[0], mapped[i], full[1]))
        for x, _, mask in sources:
            mask = jnp.broadcast_to(mask, batch)
            wide = mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
            value = jnp.where(wide, jnp.asarray(x).astype(value.dtype), value)
            observed = observed | mask
        counted = None if scored else (observed, True)
        self._score(site, ops, mapped, value, True, counted, False, state)
        return value

    def _score(self, site, ops, mapped, value, differs, counted, trusted, state, drawn=False):
        """Adds the log density of a value, or of the elements that count."""
        if is_estimated(site):
            self._estimate(site, ops, mapped, value, differs, drawn, state)
            return

        def element(o, x, counts):
            score, inside = score_element(site.build(o), x, site, o, trusted)
            score = score if inside is None else jnp.where(inside, score, -jnp.inf)
            return score if counts is None else jnp.where(counts, score, 0.0)

        score = score_site(site, element, self.n, ops, mapped, (value, differs), counted)
        state.add(_total(score, any(mapped) or differs or counted is not None))

    def _estimate(self, site, ops, mapped, value, differs, drawn, state):
        """Adds a density that is estimated: every particle has its own random numbers."""
        if drawn and self.settings.conditional:
            raise InvalidModel(
                f"site {site.address!r} has an estimated density, so a conditional run cannot "
                f"retain it."
            )
        key = jax.random.fold_in(state.keys[site.address], 1)
        keys = jax.random.split(key, (self.n, *site.axis_sizes))

        def element(o, x, key):
            return _modified(site, o, site.build(o).estimate(key, x, drawn))

        state.add(_total(
            score_site(site, element, self.n, ops, mapped, (value, differs), (keys, True)), True
        ))  # fmt: skip

    # ------------------------------------------------------------------ branches

    def _cond(self, eqn: Any, vals: list[Any], state: Cloud) -> list[Any]:
        """A branch: taken by all, or by some of the particles.

        Scans inside are not resampled: they weigh the particles, which the next step outside sees.
        """
        pairs = [state.resolve(v) for v in vals]
        (index, by_particle), operands = pairs[0], pairs[1:]
        branches = eqn.params["branches"]
        live = [v in self.live for v in eqn.outvars]
        if by_particle:
            return self._each_branch(branches, index, vals[1:], live, state)
        return self._one_branch(branches, index, operands, live, state)

    def _each_branch(self, branches, index, operands, live, state):
        outer, results = state.guard, []
        for i, branch in enumerate(branches):
            on = index == i
            state.guard = on if outer is None else outer & on
            results.append(walk(self, branch, operands, state))
        state.guard = outer
        outs = []
        for needed, *values in zip(live, *results, strict=True):
            if not needed:
                outs.append(None)
                continue
            arrays = [self._wide(v, state) for v in values]
            picked = jax.vmap(jax.lax.select_n)(index, *arrays)
            outs.append(state.wrap(picked))
        return outs

    def _wide(self, x, state):
        array, mapped = state.resolve(x)
        return array if mapped else jnp.broadcast_to(array, (self.n, *jnp.shape(array)))

    def _one_branch(self, branches, index, operands, live, state):
        flags = [m for _, m in operands]

        def runner(branch):
            def run(arrays):
                inner = Cloud(
                    state.keys, state.inputs, state.population, retained=state.retained,
                    proposed=state.proposed, mode=state.mode,
                )  # fmt: skip
                inner.conditional, inner.scans, inner.guard = True, -1, state.guard
                inner.points = state.points
                values = [
                    Particles(a) if m else a for a, m in zip(arrays, flags, strict=True)
                ]  # fmt: skip
                outs = walk(self, branch, values, inner)
                records = {
                    a: {k: self._wide(v, inner) for k, v in r.items()}
                    for a, r in inner.records.items()
                }
                inner.settle()  # scans inside have moved their weights into the population
                before = state.population.log_weights
                total = inner.population.log_weights - jnp.where(before > -jnp.inf, before, 0.0)
                needed = [
                    self._wide(x, inner) if m else None for x, m in zip(outs, live, strict=True)
                ]  # fmt: skip
                return needed, total, records

            return run

        runners = [runner(b) for b in branches]
        arrays = [a for a, _ in operands]
        template: dict[str, Any] = {}
        for run in runners:
            for address, record in jax.eval_shape(run, arrays)[2].items():
                template.setdefault(address, record)

        def completed(run):
            def branch(arrays):
                outs, total, records = run(arrays)
                blank = {
                    a: {k: jnp.zeros(s.shape, s.dtype) for k, s in r.items()}
                    for a, r in template.items()
                    if a not in records
                }
                return outs, total, {**records, **blank}

            return branch

        outs, total, records = jax.lax.switch(index, [completed(r) for r in runners], arrays)
        state.add(total)
        for address, record in records.items():
            state.records[address] = {k: state.wrap(v) for k, v in record.items()}
        return [None if x is None else state.wrap(x) for x in outs]


def _spread(site: Site, x: Any, i: int) -> Any:
    """An observation with all mapped axes and the full element shape."""
    return jnp.broadcast_to(broadcast_operand(site, x, i), site.full_shape)


def _total(score: Any, by_particle: bool) -> Any:
    """Sums over elements: per particle, or once for all."""
    score = jnp.asarray(score)
    return jnp.sum(score, axis=tuple(range(1, score.ndim))) if by_particle else jnp.sum(score)
