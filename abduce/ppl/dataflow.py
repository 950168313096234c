"""Dataflow: which values of a staged program depend on which sources.

Labels flow from inputs and sites through every equation of a jaxpr. By default an output of an
equation carries the labels of all inputs; where an equation contains a jaxpr, the labels follow
its own equations, so that each output carries only what it can depend on:

* `jit`, `checkpoint`, custom derivatives, closed calls: their body,
* `scan`: a fixpoint on the carry, slot by slot. A label that came round the carry is marked
  *past*, so a site depends on its own past only if it does,
* `cond` and `switch`: each branch; outputs that differ between branches, and the sites inside,
  also carry the labels of the predicate,
* `while`: a fixpoint; every slot that changes also carries the labels of the condition,
* mutable references (`jax.new_ref`): what was ever written.

The result is *sound*: a dependence is never missed. It is not exact: `0 * x` depends on `x`,
though its value does not. Values that are plainly the same array (a slot passed through, a
`select` between a value and itself) are recognised.

The method is the classical one of Kam and Ullman, "Monotone data flow analysis frameworks" (Acta
Informatica 1977): label sets only grow, so the fixpoints exist.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from abduce.ppl import _jax
from abduce.ppl.interpreter import loop_error
from abduce.ppl.site import Site, has_sites, site_p

__all__ = ["Label", "Labels", "Visit", "propagate"]


class Label(NamedTuple):
    """Where a value comes from.

    Attributes:
        source: Anything hashable; the address of a site, say.
        depth: How many of the enclosing scans, outermost first, the source is in too.
        past: Those among them (by number) whose carry the value came round: then it is the
            source's value at an earlier step.
    """

    source: Hashable
    depth: int = 0
    past: frozenset[int] = frozenset()


Labels = frozenset[Label]
_NONE: Labels = frozenset()


@dataclasses.dataclass(frozen=True)
class Visit:
    """A site equation, with what reaches it.

    Attributes:
        site: The site.
        operands: Labels of each operand, as `site.roles` names them.
        guards: Labels of the predicates of the enclosing branches.
        scans: A name for each enclosing scan, outermost first; equal for sites of one scan.
    """

    site: Site
    operands: tuple[Labels, ...]
    guards: Labels
    scans: tuple[Hashable, ...]

    @property
    def inputs(self) -> Labels:
        """Everything the site depends on."""
        return _union((*self.operands, self.guards))

    def operand(self, role: str) -> Labels:
        """Labels of the operands with this role."""
        pairs = zip(self.operands, self.site.roles, strict=True)
        return _union(labels for labels, r in pairs if r == role)

    def label(self, source: Hashable) -> Label:
        """A label for a value that is new at every step of the enclosing scans."""
        return Label(source, len(self.scans))


def propagate(
    jaxpr: Any,
    visit: Callable[[Visit], Iterable[Label]],
    inputs: Sequence[Iterable[Label]] | None = None,
    watch: Callable[[Any, Callable[[Any], Labels]], None] | None = None,
) -> list[Labels]:
    """Propagates labels through a staged program.

    Args:
        jaxpr: The program, open or closed.
        visit: Called for each site equation with what reaches it; returns the labels of the
            site's value. A site in a scan is visited once per round of the fixpoint, with sets
            that only grow, so collect by union.
        inputs: Labels of the program's inputs; none by default.
        watch: Called with each jaxpr (open) that was gone through and a function from its
            variables to their labels; as often as the fixpoints need, with sets that only grow.

    Returns:
        Labels of the program's outputs.

    Example:
        >>> reached = {}
        >>> def visit(v):
        ...     reached.setdefault(v.site.address, set()).update(x.source for x in v.inputs)
        ...     return {v.label(v.site.address)}
        >>> _ = propagate(schools.program(sigma).jaxpr, visit)
        >>> sorted(reached["theta"])
        ['mu', 'tau']
    """
    inner, _ = _jax.inner_jaxpr(jaxpr)
    given = [_NONE] * len(inner.invars) if inputs is None else [frozenset(x) for x in inputs]
    values = [_Value(labels, object()) for labels in given]
    return [v.labels for v in _Walk(visit, watch).run(jaxpr, values, _Where())]


class _Value(NamedTuple):
    """What is known of one variable: equal `ident` means the same array."""

    labels: Labels
    ident: Hashable


@dataclasses.dataclass(frozen=True)
class _Where:
    """Where in the program an equation stands."""

    path: tuple[int, ...] = ()
    scans: tuple[Hashable, ...] = ()
    guards: Labels = _NONE

    def at(self, i: int) -> _Where:
        return dataclasses.replace(self, path=(*self.path, i))

    def guarded(self, labels: Labels) -> _Where:
        return dataclasses.replace(self, guards=self.guards | labels)

    @property
    def depth(self) -> int:
        return len(self.scans)


class _Walk:
    def __init__(self, visit: Callable[[Visit], Iterable[Label]], watch: Any = None):
        self.visit = visit
        self.watch = watch
        self.cells: dict[Hashable, Labels] = {}  # of each mutable reference, by ident

    def run(self, jaxpr: Any, values: Sequence[_Value], where: _Where) -> list[_Value]:
        inner, _ = _jax.inner_jaxpr(jaxpr)
        env: dict[Any, _Value] = {v: _Value(_NONE, object()) for v in inner.constvars}
        env.update(zip(inner.invars, values, strict=True))

        def read(atom):
            return _literal(atom) if isinstance(atom, _jax.Literal) else env[atom]

        for i, eqn in enumerate(inner.eqns):
            outs = self.equation(eqn, [read(a) for a in eqn.invars], where.at(i))
            env.update(zip(eqn.outvars, outs, strict=True))
        if self.watch is not None:
            self.watch(inner, lambda a: read(a).labels)
        return [read(a) for a in inner.outvars]

    def equation(self, eqn: Any, vals: list[_Value], where: _Where) -> list[_Value]:
        prim = eqn.primitive
        if prim is site_p:
            return self.site(eqn, vals, where)
        if prim is _jax.scan_p:
            return self.scan(eqn, vals, where)
        if prim is _jax.cond_p:
            return self.cond(eqn, vals, where)
        if prim is _jax.while_p:
            return self.loop(eqn, vals, where)
        call = _jax.call_jaxpr(eqn)
        if call is not None:
            return self.run(call[1], vals, where)
        if any(has_sites(sub) for sub in _jax.subjaxprs(eqn)):
            raise loop_error(eqn)
        if any(_is_ref(a) for a in (*eqn.invars, *eqn.outvars)):
            return self.reference(eqn, vals, where)
        same = _same_array(eqn, vals)
        if same is not None:
            return same
        labels = _union(v.labels for v in vals)
        return [_Value(labels, object()) for _ in eqn.outvars]

    def site(self, eqn, vals, where):
        operands = tuple(v.labels for v in vals)
        visit = Visit(eqn.params["site"], operands, where.guards, where.scans)
        labels = frozenset(self.visit(visit))
        return [_Value(labels, object()) for _ in eqn.outvars]

    def scan(self, eqn, vals, where):
        nc, nk = _jax.scan_split(eqn)
        length, depth = eqn.params["length"], where.depth
        inside = dataclasses.replace(where, scans=(*where.scans, where.path))
        consts, init = vals[:nc], vals[nc : nc + nk]
        xs = [_Value(v.labels, object()) for v in vals[nc + nk :]]

        def step(carry):
            outs = self.run(eqn.params["jaxpr"], [*consts, *carry, *xs], inside)
            return outs, [_Value(_aged(v.labels, depth), v.ident) for v in outs[:nk]]

        carry, outs = self.fixpoint(step, init, max(length, 1), depth)
        self.cells = {k: _left(labels, depth) for k, labels in self.cells.items()}
        last = [
            start
            if length == 0 or after.ident == before.ident
            else _Value(_left(after.labels, depth), object())
            for start, before, after in zip(init, carry, outs[:nk], strict=True)
        ]
        return last + [_Value(_left(y.labels, depth), object()) for y in outs[nk:]]

    def loop(self, eqn, vals, where):
        p = eqn.params
        nc, nb = p["cond_nconsts"], p["body_nconsts"]
        init = vals[nc + nb :]

        def step(carry):
            (go,) = self.run(p["cond_jaxpr"], [*vals[:nc], *carry], where.at(0))
            body = where.at(1).guarded(go.labels)
            outs = self.run(p["body_jaxpr"], [*vals[nc : nc + nb], *carry], body)
            return (go, outs), outs

        carry, (go, outs) = self.fixpoint(step, init, None)
        return [
            start if after.ident == before.ident else _Value(before.labels | go.labels, object())
            for start, before, after in zip(init, carry, outs, strict=True)
        ]

    def fixpoint(self, step, init, limit, scan=None):
        """Runs `step(carry) -> (result, next carry)` until no label set grows, or `limit` times."""
        carry = [_Value(v.labels, object()) for v in init]
        known = list(self.cells)
        written = dict(self.cells)
        for rounds in itertools.count(1):
            result, new = step(carry)
            grown = [
                _Value(a.labels | b.labels, a.ident) for a, b in zip(carry, new, strict=True)
            ]
            before, written = written, {k: self.cells[k] for k in known}
            if (grown == carry and written == before) or rounds == limit:
                return carry, result
            carry = grown
            if scan is not None:
                self.cells.update({k: _aged(self.cells[k], scan) for k in known})

    def cond(self, eqn, vals, where):
        predicate, *operands = vals
        inside = where.guarded(predicate.labels)
        results = [
            self.run(branch, operands, dataclasses.replace(inside, path=(*where.path, i)))
            for i, branch in enumerate(eqn.params["branches"])
        ]
        outs = []
        for values in zip(*results, strict=True):
            labels = _union(v.labels for v in values)
            if len({v.ident for v in values}) == 1:  # the same, whichever branch
                outs.append(_Value(labels, values[0].ident))
            else:
                outs.append(_Value(labels | predicate.labels, object()))
        return outs

    def reference(self, eqn, vals, where):
        """Reads and writes of mutable references: whoever reads gets all that was written."""
        cells = [v.ident for a, v in zip(eqn.invars, vals, strict=True) if _is_ref(a)]
        held = (self.cells.get(c, _NONE) for c in cells)
        labels = _union((*(v.labels for v in vals), *held))
        if eqn.primitive.name != "get":
            for c in cells:
                self.cells[c] = labels | where.guards
        outs = [_Value(labels, object()) for _ in eqn.outvars]
        for var, out in zip(eqn.outvars, outs, strict=True):
            if _is_ref(var):
                self.cells[out.ident] = labels
        return outs


def _union(sets: Iterable[Labels]) -> Labels:
    return _NONE.union(*sets)


def _aged(labels: Labels, scan: int) -> Labels:
    """Labels after a step of scan number `scan`: what is made in its body is past now."""
    return frozenset(
        Label(x.source, x.depth, x.past | {scan}) if x.depth > scan else x for x in labels
    )


def _left(labels: Labels, scan: int) -> Labels:
    """Labels outside of scan number `scan`, where its steps are no longer told apart."""
    return frozenset(Label(x.source, min(x.depth, scan), x.past - {scan}) for x in labels)


def _literal(atom: Any) -> _Value:
    value = _jax.literal_value(atom)
    return _Value(_NONE, (str(atom.aval), repr(value)))


def _is_ref(atom: Any) -> bool:
    return hasattr(atom.aval, "inner_aval")


_RENAMES = ("stop_gradient", "copy", "copy_p", "convert_element_type", "broadcast_in_dim")


def _same_array(eqn: Any, vals: list[_Value]) -> list[_Value] | None:
    """The outputs of an equation that only hands on one of its inputs, or None."""
    name = eqn.primitive.name
    if name == "select_n" and len({v.ident for v in vals[1:]}) == 1:
        return [vals[1]]
    if name == "optimization_barrier":
        return vals
    if name in _RENAMES and len(vals) == 1:
        before, after = eqn.invars[0].aval, eqn.outvars[0].aval
        if (before.shape, before.dtype) == (after.shape, after.dtype):
            return vals
    return None
