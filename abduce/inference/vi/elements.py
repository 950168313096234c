"""Which coordinates of a posterior each term of its log density depends on, element by element.

`ab.graph` has one node per site. Here a site is as many nodes as it has elements: a walk over the
program gives each number the set of coordinates it is computed from, as a row of a sparse boolean
matrix. Mapped axes keep elements apart, and so do indices that are data (`theta[group]`); the steps
of a scan are taken one by one, so that a chain shows as one. Where an equation has no rule, its
outputs depend on all elements of its inputs. So a dependence is never missed; `0 * x` is one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import sparse

from abduce.inference.vi.choices import parameter_axes
from abduce.inference.vi.labels import flow
from abduce.inference.vi.strategies import inspect
from abduce.ppl import _jax
from abduce.ppl.graph import graph_of
from abduce.ppl.interpreter import loop_error, walk
from abduce.ppl.operations import outside_scopes
from abduce.ppl.program import Arguments
from abduce.ppl.site import Site, has_sites, site_p, unwrapped

__all__ = ["Families", "families"]

_MOVES = frozenset({
    "broadcast_in_dim", "concatenate", "copy", "copy_p", "dynamic_slice", "dynamic_update_slice",
    "expand_dims", "gather", "reshape", "rev", "slice", "split", "squeeze", "stack", "transpose",
    "unstack",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Families:
    """The terms of a log density.

    Attributes:
        own: For each term, the coordinates of the element that it is the density of; none for data
            and factors. Sparse bool, `(terms, dim)`.
        all: For each term, all coordinates it depends on; likewise.
        normalized: Whether it integrates to 1 over its own coordinates, bool `(terms,)`.
    """

    own: Any
    all: Any
    normalized: np.ndarray


@dataclasses.dataclass
class _Value:
    """What is known of an array.

    Attributes:
        shape: Its shape.
        on: The coordinates each element depends on, sparse bool `(size, dim)`; None: no element on
            any.
        array: The array, if it depends on none and was evaluated.
    """

    shape: tuple[int, ...]
    on: Any = None
    array: Any = None


def families(target: Any, data: Any) -> Families:
    """The terms of a `FlatTarget`, in the order of the program."""
    program = target.program(data)
    arguments = Arguments(target.static, data["dynamic"])
    with outside_scopes():
        normalized = {a: s.normalized for a, s in graph_of(program).sites.items()}
        walker = _Walker(target.dim, _coordinates(target, data), data["given"], normalized)
        inputs = [_known(x) for x in program.inputs(arguments)]
        walk(walker, program.jaxpr, inputs, None)  # type: ignore[arg-type]
    found = list(walker.found.values())
    return Families(
        sparse.vstack([own for own, _, _ in found]).tocsr(),
        sparse.vstack([every for _, every, _ in found]).tocsr(),
        np.concatenate([np.full(own.shape[0], good) for own, _, good in found]),
    )


def _coordinates(target: Any, data: Any) -> dict[str, np.ndarray]:
    """Numbers of the coordinates of each latent, in its layout; -1 where an entry is observed."""
    out = {}
    for slot in target.slots:
        numbers = np.arange(slot.start, slot.stop)
        if slot.hidden is not None:
            width = math.prod(slot.shape[slot.batch_ndim :])
            full = np.full((math.prod(slot.shape[: slot.batch_ndim]), width), -1)
            full[np.asarray(data["hidden"][slot.address])] = numbers.reshape(-1, width)
            numbers = full
        out[slot.address] = numbers.reshape(slot.shape)
    return out


def _known(x: Any) -> _Value:
    return _Value(jnp.shape(x), None, x)


class _Walker:
    """The handler of `walk`: what equations mean for sets of coordinates."""

    def __init__(
        self, dim: int, coordinates: Mapping[str, np.ndarray], given: Mapping[str, Any],
        normalized: Mapping[str, bool],
    ):  # fmt: skip
        self.dim, self.coordinates, self.given = dim, coordinates, given
        self.normalized = normalized
        self.steps: tuple[int, ...] = ()  # counters of the enclosing scans
        self.guards: list[Any] = []  # predicates of the enclosing branches
        self.found: dict[Any, tuple[Any, Any, bool]] = {}

    def site(self, site, operands, given, key, acc):
        raise AssertionError("sites are handled by `equation`")

    def equation(self, eqn: Any, vals: list[Any], state: Any) -> list[_Value]:
        """One equation."""
        values = [v if isinstance(v, _Value) else _known(v) for v in vals]
        if eqn.primitive is site_p:
            return self._site(eqn.params["site"], values)
        if eqn.primitive is _jax.scan_p:
            return self._scan(eqn, values, state)
        if eqn.primitive is _jax.cond_p:
            return self._cond(eqn, values, state)
        call = _jax.call_jaxpr(eqn)
        if call is not None:
            return walk(self, call[1], values, state)
        if any(has_sites(s) for s in _jax.subjaxprs(eqn)):
            raise loop_error(eqn)
        if any(map(_is_ref, (*eqn.invars, *eqn.outvars))):
            return self._reference(eqn, values)
        return self._plain(eqn, values)

    # ------------------------------------------------------------------ equations

    def _plain(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        shapes = [tuple(getattr(v.aval, "shape", ())) for v in eqn.outvars]
        if not any(v.on is not None for v in values):
            # Only whole numbers are wanted, as indices.
            if all(v.array is not None for v in values) and all(map(_is_index, eqn.outvars)):
                return [_known(x) for x in _jax.evaluate(eqn, [v.array for v in values])]
            return [_Value(s) for s in shapes]
        if eqn.primitive.name in _MOVES:
            moved = self._moved(eqn, values)
            if moved is not None:
                return moved
        outs = []
        for j, shape in enumerate(shapes):
            on = None
            for i, v in enumerate(values):
                if v.on is None:
                    continue
                rank = len(v.shape)
                where: dict[int, int] = {}
                if j == 0 or shape == shapes[0]:
                    labels: list[Any] = [{} for _ in values]
                    labels[i] = {("x", None): tuple(range(rank))}
                    axes = flow(eqn, labels)[j][("x", None)]
                    where = {a: b for a, b in enumerate(axes) if b is not None}
                on = _plus(on, _spread(v, shape, where))
            outs.append(_Value(shape, on))
        return outs

    def _reference(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        """Reads and writes of mutable references: whoever reads gets all that was written."""
        on = None
        for row in (*(_any(v.on) for v in values if v.on is not None), *self.guards):
            on = _plus(on, row)
        if eqn.primitive.name != "get":
            for var, v in zip(eqn.invars, values, strict=True):
                if _is_ref(var) and on is not None:
                    v.on, v.array = on[np.zeros(math.prod(v.shape), int)], None
        shapes = [tuple(v.aval.shape) for v in eqn.outvars]
        return [_Value(s, None if on is None else on[np.zeros(math.prod(s), int)]) for s in shapes]

    def _moved(self, eqn: Any, values: list[_Value]) -> list[_Value] | None:
        """Equations that only move elements: run on the elements' numbers."""
        name = eqn.primitive.name
        movable = {"gather": 1, "dynamic_slice": 1, "dynamic_update_slice": 2}.get(
            name, len(values)
        )
        others = values[movable:]
        if any(v.on is not None or v.array is None for v in others):
            return None  # where to is not known
        start, numbers, parts = 0, [], []
        for v in values[:movable]:
            size = math.prod(v.shape)
            numbers.append(jnp.arange(start, start + size, dtype=jnp.int32).reshape(v.shape))
            parts.append(self._none(size) if v.on is None else v.on)
            start += size
        table = sparse.vstack([*parts, self._none(1)]).tocsr()
        outs = []
        for x in _jax.evaluate(eqn, [*numbers, *(v.array for v in others)]):
            index = np.asarray(x).reshape(-1)
            index = np.where((index < 0) | (index >= start), start, index)  # filled in
            outs.append(_Value(tuple(x.shape), table[index]))
        return outs

    def _none(self, size: int) -> Any:
        return sparse.csr_matrix((size, self.dim), dtype=bool)

    # ------------------------------------------------------------------ sites

    def _site(self, site: Site, values: list[_Value]) -> list[_Value]:
        if site.kind == "param":
            return [_Value(site.full_shape)]
        if site.kind == "auxiliary":
            on = None
            for v in values:
                on = _plus(on, None if v.on is None else _spread(v, site.full_shape, {}))
            return [_Value(site.full_shape, on)]
        apart = _elements(site)  # dimensions of the value that index its elements
        shape = site.full_shape[:apart]
        everything = self._operands(site, values, shape)
        if site.kind == "deterministic":
            return [_Value(site.full_shape, everything)]
        if site.kind == "factor":
            self._add(site, self._none(math.prod(shape)), everything, False)
            return []
        coordinates = self.coordinates.get(site.address)
        own = self._none(math.prod(shape))
        if coordinates is not None:
            numbers = coordinates[self.steps]
            own = _rows(numbers.reshape(math.prod(shape), -1), self.dim)
        self._add(site, own, everything, self.normalized[site.address])
        return [_Value(site.full_shape, self._value(site, values, shape, own, everything))]

    def _value(self, site, values, shape, own, everything):
        """What the value of a choice depends on."""
        inner = math.prod(site.full_shape) // max(math.prod(shape), 1)
        on = None
        for i, role in enumerate(site.roles):
            if role == "obs" and values[i].on is not None:
                on = _plus(on, self._operand(site, i, values[i], shape))
        if site.address in self.coordinates:
            on = _plus(on, own)
            if site.coords is not None or site.spec.support is None:  # its bijection varies
                on = _plus(on, everything)
        if on is None or inner == 1:
            return on
        return on[np.repeat(np.arange(on.shape[0]), inner)]

    def _add(self, site: Site, own: Any, every: Any, normalized: bool) -> None:
        every = own if every is None else _plus(own, every)
        for guard in self.guards:
            every = _plus(every, guard[np.zeros(every.shape[0], int)])
        key = (site.address, self.steps)
        if key in self.found:  # in several branches, of which one is taken
            every = _plus(every, self.found[key][1])
        self.found[key] = (own, every.tocsr(), normalized)

    def _operands(self, site: Site, values: list[_Value], shape: tuple[int, ...]) -> Any:
        on = None
        for i, v in enumerate(values):
            if v.on is not None and site.roles[i] != "baseline":
                on = _plus(on, self._operand(site, i, v, shape))
        return on

    def _operand(self, site: Site, i: int, v: _Value, shape: tuple[int, ...]) -> Any:
        """What the elements of a site get from an operand."""
        axes = [j for j, a in enumerate(site.axes) if a.mapped[i]]
        where = dict(enumerate(axes))
        n, lead = len(axes), len(site.axes)
        role = site.roles[i]
        aligned = role in ("obs", "mask", "guard", "scale") or site.kind != "sample"
        if aligned or (role == "leaf" and parameter_axes(site, i)):
            for j in range(min(len(v.shape) - n, len(shape) - lead)):
                where[n + j] = lead + j
        return _spread(v, shape, where)

    # ------------------------------------------------------------------ control flow

    def _scan(self, eqn: Any, values: list[_Value], state: Any) -> list[_Value]:
        p = eqn.params
        nc, nk = _jax.scan_split(eqn)
        consts, carry, xs = values[:nc], values[nc : nc + nk], values[nc + nk :]
        times = range(p["length"])
        ys: dict[int, list[_Value]] = {}
        before = self.steps
        for t in reversed(times) if p["reverse"] else times:
            self.steps = (*before, t)
            outs = walk(self, p["jaxpr"], [*consts, *carry, *(_row(x, t) for x in xs)], state)
            outs = [o if isinstance(o, _Value) else _known(o) for o in outs]
            carry, ys[t] = outs[:nk], outs[nk:]
        self.steps = before
        stacked = []
        for j, var in enumerate(eqn.outvars[nk:]):
            shape = tuple(var.aval.shape)
            rows = [ys[t][j] for t in times]
            on = None
            if any(r.on is not None for r in rows):
                on = sparse.vstack(
                    [self._none(math.prod(r.shape)) if r.on is None else r.on for r in rows]
                ).tocsr()
            array = None
            if rows and _is_index(var) and all(r.array is not None for r in rows):
                array = jnp.stack([jnp.asarray(r.array) for r in rows])
            stacked.append(_Value(shape, on, array))
        return [*carry, *stacked]

    def _cond(self, eqn: Any, values: list[_Value], state: Any) -> list[_Value]:
        index, *operands = values
        if index.on is not None:
            self.guards.append(_any(index.on))
        results = [
            [o if isinstance(o, _Value) else _known(o) for o in walk(self, b, operands, state)]
            for b in eqn.params["branches"]
        ]
        guard = self.guards.pop() if index.on is not None else None
        outs = []
        for found in zip(*results, strict=True):
            on = None
            for v in found:
                on = _plus(on, v.on)
            if guard is not None:
                on = _plus(on, guard[np.zeros(math.prod(found[0].shape), int)])
            outs.append(_Value(found[0].shape, on))
        return outs


def _elements(site: Site) -> int:
    """How many leading dimensions of a value index elements that are independent."""
    if site.kind != "sample":
        return len(site.full_shape)
    event = inspect(site, lambda d: len(unwrapped(d).event_shape))
    if site.spec.support is None or site.coords is not None or event:
        return len(site.full_shape) - site.event_dim
    return len(site.full_shape)


def _is_index(var: Any) -> bool:
    dtype = getattr(var.aval, "dtype", None)
    return any(jnp.issubdtype(dtype, k) for k in (jnp.integer, jnp.bool_)) if dtype else False


def _is_ref(atom: Any) -> bool:
    return hasattr(atom.aval, "inner_aval")


def _row(x: _Value, t: int) -> _Value:
    shape = tuple(x.shape[1:])
    size = math.prod(shape)
    on = None if x.on is None else x.on[t * size : (t + 1) * size]
    return _Value(shape, on, None if x.array is None else x.array[t])


def _plus(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    return (a + b).tocsr()


def _any(on: Any) -> Any:
    """One row: what any element depends on."""
    return (sparse.csr_matrix(np.ones((1, on.shape[0]), bool)) @ on).tocsr()


def _rows(numbers: np.ndarray, dim: int) -> Any:
    """A matrix with these columns in its rows; -1 is none."""
    row = np.repeat(np.arange(len(numbers)), numbers.shape[1])
    column = numbers.reshape(-1)
    keep = column >= 0
    ones = np.ones(int(keep.sum()), bool)
    return sparse.csr_matrix((ones, (row[keep], column[keep])), (len(numbers), dim))


def _spread(v: _Value, shape: Sequence[int], where: Mapping[int, int]) -> Any:
    """The rows of an array of this shape; input axis `a` goes along `where[a]`, others mix."""
    kept = [a for a in range(len(v.shape)) if a in where and v.shape[a] == shape[where[a]]]
    rest = [a for a in range(len(v.shape)) if a not in kept]
    numbers = np.arange(math.prod(v.shape)).reshape(v.shape).transpose([*kept, *rest])
    numbers = numbers.reshape(math.prod(v.shape[a] for a in kept), -1)
    # one row for each combination of the kept axes, then those rows where they belong
    groups, members = numbers.shape
    table = sparse.csr_matrix(
        (np.ones(numbers.size, bool), numbers.reshape(-1), np.arange(groups + 1) * members),
        (groups, math.prod(v.shape)),
    )
    rows = (table @ v.on).tocsr()
    place = np.zeros(tuple(shape), int)
    stride = 1
    for a in reversed(kept):
        index = np.arange(v.shape[a]).reshape([-1] + [1] * (len(shape) - where[a] - 1))
        place = place + index * stride
        stride *= v.shape[a]
    return rows[place.reshape(-1)]
