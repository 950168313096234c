"""The interpreter: one walk over a staged program, for every meaning of a model.

A *handler* says what a site means (draw it, score it, observe it, emit it again); the walk carries
the handler's accumulator and per-site inputs and records through `scan`, `cond`, inner `jit`,
`checkpoint` and custom derivatives. Equations without sites are evaluated as they stand, whatever
their primitive.

Arrays per site are in *physical* layout while walking: one leading axis per enclosing scan
(outermost first), then the site's mapped axes, then the element. `abduce.ppl.program` converts to
the layout that users see.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from abduce.errors import DuplicateAddress, InvalidModel, InvalidValue
from abduce.ppl import _jax
from abduce.ppl.site import Site, bind, has_sites, site_p
from abduce.ppl.slots import Slots, name_arguments

__all__ = [
    "Handler",
    "State",
    "address_key",
    "addresses",
    "broadcast_operand",
    "element_keys",
    "first_site",
    "loop_error",
    "undifferentiable",
    "walk",
]


class Handler(Protocol):
    """What sites mean."""

    def site(
        self, site: Site, operands: Sequence[Any], given: Any, key: Any, acc: Any
    ) -> tuple[list[Any], Any, dict[str, Any] | None]:
        """Handles one site.

        Args:
            site: Its static part.
            operands: Its operands.
            given: The site's entry of `State.inputs`, sliced along enclosing scans, or None.
            key: The key of this program and of these loop counters (not yet of this address).
            acc: The accumulator.

        Returns:
            The outputs of the equation, the accumulator, and a dict of arrays to record.
        """
        ...

    # A handler may also have `equation(eqn, vals, state) -> outputs`: its own rule for every
    # equation, such as one that evaluates for a whole population of particles.


class State:
    """What a walk carries besides the values of the program.

    Attributes:
        key: Random key, folded with the counters of the enclosing loops; None where nothing may
            be drawn.
        inputs: Per address, what the handler needs; physical layout.
        acc: The handler's accumulator, a pytree of arrays.
        records: Per address, what the handler recorded.
        conditional: Whether this is inside a branch.
    """

    __slots__ = ("acc", "conditional", "inputs", "key", "records")

    def __init__(self, key, inputs, acc, conditional=False):
        self.key = key
        self.inputs = inputs
        self.acc = acc
        self.records: dict[str, dict[str, Any]] = {}
        self.conditional = conditional


@functools.lru_cache(maxsize=65536)
def _words(address: str) -> tuple[int, int]:
    digest = hashlib.blake2b(address.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def address_key(key: Any, address: str) -> Any:
    """The key of an address: two words of a strong hash are folded in, so none collide."""
    a, b = _words(address)
    return jax.random.fold_in(jax.random.fold_in(key, a), b)


def element_keys(site: Site, key: Any) -> Any:
    """A key for every element of a site's mapped axes."""

    def over(keys, sizes):
        if not sizes:
            return keys
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        index = jnp.arange(sizes[0], dtype=jnp.uint32)
        return jax.vmap(lambda k: over(k, sizes[1:]))(fold(keys, index))

    return over(address_key(key, site.address), site.axis_sizes)


def walk(handler: Handler, jaxpr: Any, args: Sequence[Any], state: State) -> list[Any]:
    """Runs a jaxpr with sites under a handler; updates `state.acc` and `state.records`."""
    inner, consts = _jax.inner_jaxpr(jaxpr)
    env: dict[Any, Any] = {}

    def read(atom):
        return _jax.literal_value(atom) if isinstance(atom, _jax.Literal) else env[atom]

    env.update(zip(inner.constvars, consts, strict=True))
    env.update(zip(inner.invars, args, strict=True))
    for eqn in inner.eqns:
        vals = [read(a) for a in eqn.invars]
        outs = _equation(handler, eqn, vals, state)
        for var, out in zip(eqn.outvars, outs, strict=True):
            if not _jax.is_dropvar(var):
                env[var] = out
    return [read(a) for a in inner.outvars]


def _equation(handler: Handler, eqn: Any, vals: list[Any], state: State) -> list[Any]:
    rule = getattr(handler, "equation", None)
    if rule is not None:
        return rule(eqn, vals, state)
    prim = eqn.primitive
    if prim is site_p:
        return _site(handler, eqn.params["site"], vals, state)
    if not any(has_sites(sub) for sub in _jax.subjaxprs(eqn)):
        return _jax.evaluate(eqn, vals)
    if prim is _jax.scan_p:
        return _scan(handler, eqn, vals, state)
    if prim is _jax.cond_p:
        return _cond(handler, eqn, vals, state)
    call = _jax.call_jaxpr(eqn)
    if call is None:
        raise loop_error(eqn)
    kind, jaxpr = call
    if kind == "remat":
        return _remat(handler, eqn, jaxpr, vals, state)
    outs = walk(handler, jaxpr, vals, state)
    if kind == "custom":
        name = first_site(jaxpr).address
        outs = [undifferentiable(x, name) for x in outs]
    return outs


def loop_error(eqn: Any) -> InvalidModel:
    """The error for a site inside a construct that has no rule."""
    site = first_site(next(s for s in _jax.subjaxprs(eqn) if has_sites(s)))
    if eqn.primitive is _jax.while_p:
        return InvalidModel(
            f"site {site.address!r} ({site.where}) is inside a while loop without a static bound. "
            f"Use ab.while_loop(cond, body, init, max_steps), or jax.lax.fori_loop with Python "
            f"ints as bounds, or jax.lax.scan."
        )
    return InvalidModel(
        f"site {site.address!r} ({site.where}) is inside `{eqn.primitive.name}`, which has no "
        f"meaning for random choices. Move the site outside of it."
    )


def first_site(jaxpr: Any) -> Site:
    """The first site in a jaxpr that has one."""
    inner, _ = _jax.inner_jaxpr(jaxpr)
    for eqn in inner.eqns:
        if eqn.primitive is site_p:
            return eqn.params["site"]
        for sub in _jax.subjaxprs(eqn):
            if has_sites(sub):
                return first_site(sub)
    raise LookupError("no site")


def addresses(jaxpr: Any) -> set[str]:
    """All addresses in a jaxpr, at any depth."""
    inner, _ = _jax.inner_jaxpr(jaxpr)
    found: set[str] = set()
    for eqn in inner.eqns:
        if eqn.primitive is site_p:
            found.add(eqn.params["site"].address)
        for sub in _jax.subjaxprs(eqn):
            found |= addresses(sub)
    return found


def _site(handler: Handler, site: Site, vals: list[Any], state: State) -> list[Any]:
    outs, state.acc, record = handler.site(
        site, vals, state.inputs.get(site.address), state.key, state.acc
    )
    if record is not None:
        if state.conditional and "active" not in record:
            record = {**record, "active": jnp.ones(site.axis_sizes, bool)}
        if site.address in state.records:
            record = _merge_exclusive(site, state.records[site.address], record)
        state.records[site.address] = record
    return outs


def _merge_exclusive(site: Site, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """One address in two branches of a vmapped conditional: per element one is active."""
    if "active" not in old or "active" not in new:
        raise DuplicateAddress(f"address {site.address!r} ({site.where}) occurs twice.")
    on = new["active"]
    merged: dict[str, Any] = {}
    for name, x in new.items():
        if name == "active":
            merged[name] = old[name] | on
            continue
        if jnp.shape(x) != jnp.shape(old[name]):
            raise _branch_shapes(site.address, jnp.shape(old[name]), jnp.shape(x))
        mask = on.reshape(on.shape + (1,) * (jnp.ndim(x) - on.ndim))
        merged[name] = jnp.where(mask, x, old[name])
    return merged


def _branch_shapes(address: str, a: Any, b: Any) -> InvalidValue:
    return InvalidValue(
        f"site {address!r} is in several branches of a cond or switch with different shapes or "
        f"dtypes, {a} and {b}. The same address in several branches is one site: make them alike, "
        f"or give them different addresses."
    )


def _scan(handler: Handler, eqn: Any, vals: list[Any], state: State) -> list[Any]:
    p = eqn.params
    nc, nk = _jax.scan_split(eqn)
    consts, init, xs = vals[:nc], vals[nc : nc + nk], vals[nc + nk :]
    body_jaxpr = p["jaxpr"]
    mine = {a: state.inputs[a] for a in sorted(addresses(body_jaxpr)) if a in state.inputs}
    sliced = {a: g for a, g in mine.items() if not getattr(g, "shared", False)}
    shared = {a: g for a, g in mine.items() if a not in sliced}
    counter = None if state.key is None else jnp.arange(p["length"], dtype=jnp.uint32)

    def body(carry, x):
        inputs_t, t = x.rest
        key = None if t is None else jax.random.fold_in(state.key, t)
        inner = State(key, {**shared, **inputs_t}, carry.rest, state.conditional)
        outs = walk(handler, body_jaxpr, [*consts, *carry.values[:nk], *x.values], inner)
        values = [*outs[:nk], *carry.values[nk:]]
        return Slots(values, carry.paths, inner.acc), (outs[nk:], inner.records)

    carry_paths, x_paths, fixed = name_arguments(body, body_jaxpr, nc, nk)
    carried = _jax.inner_jaxpr(body_jaxpr)[0].invars[nc : nc + nk]
    init = [
        x if hasattr(x, "dtype") else jnp.asarray(x, v.aval.dtype)  # a literal of the program
        for x, v in zip(init, carried, strict=True)
    ]
    carry, (ys, records) = jax.lax.scan(
        body,
        Slots([*init, *(consts[i] for i in fixed)], (*carry_paths, *fixed.values()), state.acc),
        Slots(xs, x_paths, (sliced, counter)),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    state.acc = carry.rest
    _add_records(state, records)
    return [*carry.values[:nk], *ys]


def _add_records(state: State, records: dict[str, dict[str, Any]]) -> None:
    for address, record in records.items():
        if address in state.records:
            raise DuplicateAddress(
                f"address {address!r} occurs twice in the program. Give the sites different names, "
                f'or put one in `with ab.scope("..."):`.'
            )
        state.records[address] = record


def _cond(handler: Handler, eqn: Any, vals: list[Any], state: State) -> list[Any]:
    index, *operands = vals
    branches = eqn.params["branches"]

    def runner(branch):
        def run(operands, acc):
            inner = State(state.key, state.inputs, acc, True)
            outs = walk(handler, branch, operands, inner)
            return outs, inner.acc, inner.records

        return run

    runners = [runner(b) for b in branches]
    template: dict[str, dict[str, Any]] = {}
    for run in runners:
        _, _, records = jax.eval_shape(run, operands, state.acc)
        for address, record in records.items():
            seen = template.setdefault(address, record)
            a, b = (
                {k: (v.shape, v.dtype.name) for k, v in r.items() if k == "value"}
                for r in (seen, record)
            )
            if a != b or set(seen) != set(record):
                raise _branch_shapes(address, a.get("value"), b.get("value"))

    def completed(run):
        def branch(operands, acc):
            outs, acc, records = run(operands, acc)
            blank = {
                a: {k: jnp.zeros(s.shape, s.dtype) for k, s in r.items()}
                for a, r in template.items()
                if a not in records
            }
            return outs, acc, {**records, **blank}

        return branch

    outs, state.acc, records = jax.lax.switch(
        index, [completed(r) for r in runners], operands, state.acc
    )
    _add_records(state, records)
    return outs


def _remat(handler: Handler, eqn: Any, jaxpr: Any, vals: list[Any], state: State) -> list[Any]:
    p = eqn.params

    def run(vals, key, inputs, acc):
        inner = State(key, inputs, acc, state.conditional)
        outs = walk(handler, jaxpr, vals, inner)
        return outs, inner.acc, inner.records

    mine = {a: state.inputs[a] for a in sorted(addresses(jaxpr)) if a in state.inputs}
    outs, state.acc, records = jax.checkpoint(
        run, policy=p["policy"], prevent_cse=p["prevent_cse"]
    )(vals, state.key, mine, state.acc)
    _add_records(state, records)
    return outs


def undifferentiable(x: Any, address: str) -> Any:
    """Passes a value on, and refuses derivatives: the custom rule knows nothing of the site."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return x

    @jax.custom_jvp
    def identity(x):
        return x

    @identity.defjvp
    def _(primals, tangents):
        raise InvalidModel(
            f"site {address!r} is inside a function with a custom derivative rule "
            f"(jax.custom_jvp or jax.custom_vjp), which says nothing about the site. Move the "
            f"site outside of that function to take gradients of the density."
        )

    return identity(x)


class _Guard:
    """Emits the sites of one branch again, active only where `on` is true."""

    def __init__(self, on, group, index):
        self.on, self.tag = on, (group, index)

    def site(self, site, operands, given, key, acc):
        if site.kind == "param":
            return [bind(site, operands)], acc, None
        on = self.on
        old = site.operand(operands, "guard")
        mapped = False
        if old is not None:
            i = site.roles.index("guard")
            if any(a.mapped[i] for a in site.axes):
                # Bring the old guard to all axes, so that one flag describes the operand.
                old = broadcast_operand(site, old, i)
                mapped = True
            on = jnp.logical_and(on, old)
        site, operands = site.with_operand(operands, "guard", on, mapped=mapped)
        site = site.replace(branches=(self.tag, *site.branches))
        out = bind(site, operands)
        return ([] if out is None else [out]), acc, None


def broadcast_operand(site: Site, x: Any, i: int) -> Any:
    """Gives operand `i` all of the site's mapped axes in front."""
    present = [a.size for a in site.axes if a.mapped[i]]
    rest = jnp.shape(x)[len(present) :]
    shape = tuple(a.size if a.mapped[i] else 1 for a in site.axes)
    return jnp.broadcast_to(jnp.reshape(x, shape + rest), site.axis_sizes + rest)


def _vmapped_cond_element(branches, index, operands):
    group = object()
    outs = []
    for i, branch in enumerate(branches):
        on = index == i
        # A dead branch must not send NaN gradients back through inputs it was never meant to see.
        safe = [
            jnp.where(on, x, jax.lax.stop_gradient(x))
            if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
            else x
            for x in operands
        ]
        outs.append(walk(_Guard(on, group, i), branch, safe, State(None, {}, ())))
    return [
        jax.lax.select_n(index, *(jnp.asarray(o) for o in out)) for out in zip(*outs, strict=True)
    ]


_jax.set_cond_batcher(lambda branches: any(has_sites(b) for b in branches), _vmapped_cond_element)
