"""What is known of an objective before it runs: what depends on choices, and what is not smooth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from abduce.errors import InvalidModel
from abduce.inference.vi.strategies import Strategy
from abduce.ppl import _jax
from abduce.ppl.dataflow import propagate
from abduce.ppl.site import has_sites, site_p

__all__ = ["require_smooth", "tainted_variables"]


def tainted_variables(jaxpr: Any, strategies: Mapping[str, Strategy]) -> frozenset[Any]:
    """Variables, at any depth, that depend on a credited choice."""
    found: set[Any] = set()

    def visit(v):
        labels = set(v.inputs)
        strategy = strategies.get(v.site.address)
        if v.site.kind == "sample" and strategy is not None and strategy.credited:
            labels.add(v.label(v.site.address))
        return labels

    def watch(inner, labels):
        for var in (*inner.invars, *(v for e in inner.eqns for v in e.outvars)):
            if labels(var):
                found.add(var)

    propagate(jaxpr, visit, watch=watch)
    return frozenset(found)


# Their value jumps while their derivative is zero.
_STEPS = frozenset(("ceil", "floor", "round", "sign", "argmax", "argmin"))


def require_smooth(jaxpr: Any, strategies: Mapping[str, Strategy]) -> None:
    """Refuses a choice with a path derivative where the cost visibly jumps with it.

    Raises:
        InvalidModel: Its value decides a branch, or is rounded, or becomes a flag and then a
            number. The derivative along the path would leave out the jumps without a word.
    """
    watched = {
        a for a, s in strategies.items() if hasattr(s, "assume_smooth") and not s.assume_smooth
    }
    if not watched:
        return
    opaque = _custom_bodies(jaxpr)
    live: set[Any] = set()
    _mark_live(_jax.inner_jaxpr(jaxpr)[0], None, live)
    found: dict[str, tuple[str, Any]] = {}

    def visit(v):
        for address in {x.source for x in (*v.guards, *v.operand("guard"))} & watched:
            found.setdefault(address, ("decides a branch", v.site.where))
        if v.site.kind != "sample":
            return set(v.inputs)
        if v.site.address in watched:
            return {v.label(v.site.address)}
        if jnp.issubdtype(v.site.dtype, jnp.inexact):
            return set(v.inputs) if hasattr(strategies.get(v.site.address), "assume_smooth") else ()
        return ()

    def watch(inner, labels):
        if id(inner) in opaque:
            return
        for eqn in inner.eqns:
            how = _jump(eqn)
            if how is None or not any(v in live for v in eqn.outvars):
                continue
            for label in labels(eqn.invars[0]):
                if label.source in watched:
                    found.setdefault(label.source, (how, None))

    propagate(jaxpr, visit, watch=watch)
    if found:
        address, (how, where) = next(iter(found.items()))
        raise InvalidModel(
            f"the value of {address!r} {how}{f' ({where})' if where else ''}, so the cost jumps "
            f"with it, and its derivative along the path ({strategies[address].name}) would leave "
            f"the jumps out. Give the site grad=ab.grad.score(); if the cost is continuous all the "
            f"same, grad=ab.grad.reparam(assume_smooth=True)."
        )


def _mark_live(jaxpr: Any, wanted: Any, live: set[Any]) -> None:
    """Variables that reach the result or a site; library functions compute things in vain."""

    def need(atom):
        if not isinstance(atom, _jax.Literal):
            live.add(atom)

    for i, atom in enumerate(jaxpr.outvars):
        if wanted is None or wanted[i]:
            need(atom)
    for eqn in reversed(jaxpr.eqns):
        outs = [v in live for v in eqn.outvars]
        subs = _jax.subjaxprs(eqn)
        if not (any(outs) or eqn.primitive is site_p or any(has_sites(s) for s in subs)):
            continue
        for sub in subs:
            inner, _ = _jax.inner_jaxpr(sub)
            whole = eqn.primitive in (_jax.scan_p, _jax.while_p) or len(inner.outvars) != len(outs)
            _mark_live(inner, None if whole else outs, live)
        call = _jax.call_jaxpr(eqn)
        if call is None:
            for atom in eqn.invars:
                need(atom)
            continue
        inner, _ = _jax.inner_jaxpr(call[1])
        for var, atom in zip(inner.invars, eqn.invars, strict=True):
            if var in live:
                need(atom)


def _jump(eqn: Any) -> str | None:
    name = eqn.primitive.name
    if eqn.primitive is _jax.cond_p:
        return "decides a branch"
    if name in _STEPS:
        return f"goes through `{name}`"
    if name == "convert_element_type":
        before, after = eqn.invars[0].aval.dtype, eqn.params["new_dtype"]
        if not jnp.issubdtype(before, jnp.inexact) and jnp.issubdtype(after, jnp.inexact):
            return "becomes a flag and then a number"
        if jnp.issubdtype(before, jnp.inexact) and not jnp.issubdtype(after, jnp.inexact):
            return "is turned into an integer"
    return None


def _custom_bodies(jaxpr: Any) -> set[int]:
    """Bodies of functions with their own derivative rule, which answers for their jumps."""
    found: set[int] = set()

    def collect(jaxpr, inside):
        inner, _ = _jax.inner_jaxpr(jaxpr)
        if inside:
            found.add(id(inner))
        for eqn in inner.eqns:
            call = _jax.call_jaxpr(eqn)
            custom = call is not None and call[0] == "custom"
            for sub in _jax.subjaxprs(eqn):
                collect(sub, inside or custom)

    collect(jaxpr, False)
    return found
