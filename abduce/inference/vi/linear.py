"""Which variables of a program lead to its result by sums alone: where a cost is taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from abduce.ppl import _jax

__all__ = ["LINEAR", "RESHAPES", "linear_variables"]

RESHAPES = frozenset(("broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze"))
LINEAR = RESHAPES | {
    "add", "add_any", "concatenate", "neg", "reduce_sum", "stack", "sub", "transpose"
}  # fmt: skip


def linear_variables(jaxpr: Any, tainted: frozenset[Any]) -> frozenset[Any]:
    """Variables, at any depth, from which the result is reached by sums alone.

    Args:
        jaxpr: A program that returns one scalar.
        tainted: Variables that depend on a credited choice; only they are of interest.
    """
    found: set[Any] = set()
    inner, _ = _jax.inner_jaxpr(jaxpr)
    _mark(inner, [True] * len(inner.outvars), tainted, found)
    return frozenset(found)


def _mark(jaxpr: Any, wanted: Sequence[bool], tainted: frozenset[Any], found: set[Any]) -> None:
    def add(atom):
        _add(atom, tainted, found)

    for atom, w in zip(jaxpr.outvars, wanted, strict=True):
        if w:
            add(atom)
    for eqn in reversed(jaxpr.eqns):
        outs = [v in found for v in eqn.outvars]
        if not any(outs):
            continue
        name = eqn.primitive.name
        call = _jax.call_jaxpr(eqn)
        if name in LINEAR or name == "select_n":
            for atom in eqn.invars:
                add(atom)
        elif name in ("mul", "dot_general", "div"):
            reached = [not isinstance(a, _jax.Literal) and a in tainted for a in eqn.invars]
            if sum(reached) == 1 and (name != "div" or reached[0]):
                add(eqn.invars[reached.index(True)])
        elif eqn.primitive is _jax.scan_p:
            _mark_scan(eqn, outs, tainted, found)
        elif eqn.primitive is _jax.cond_p:
            for branch in eqn.params["branches"]:
                inner, _ = _jax.inner_jaxpr(branch)
                _mark(inner, outs, tainted, found)
                _hand_up(inner.invars, eqn.invars[1:], found, add)
        elif call is not None:
            inner, _ = _jax.inner_jaxpr(call[1])
            _mark(inner, outs, tainted, found)
            _hand_up(inner.invars, eqn.invars, found, add)


def _add(atom: Any, tainted: frozenset[Any], found: set[Any]) -> None:
    """Integers are left out: a factor has to be a float."""
    if isinstance(atom, _jax.Literal) or atom not in tainted:
        return
    if jnp.issubdtype(atom.aval.dtype, jnp.inexact):
        found.add(atom)


def _hand_up(inside: Sequence[Any], outside: Sequence[Any], found: set[Any], add: Any) -> None:
    for var, atom in zip(inside, outside, strict=True):
        if var in found:
            add(atom)


def _mark_scan(eqn: Any, outs: list[bool], tainted: frozenset[Any], found: set[Any]) -> None:
    nc, nk = _jax.scan_split(eqn)
    inner, _ = _jax.inner_jaxpr(eqn.params["jaxpr"])
    carry = outs[:nk]
    while True:
        _mark(inner, [*carry, *outs[nk:]], tainted, found)
        new = [c or v in found for c, v in zip(carry, inner.invars[nc : nc + nk], strict=True)]
        if new == carry:
            break
        carry = new
    for k, c in enumerate(carry):
        if c:
            _add(eqn.invars[nc + k], tainted, found)
    _hand_up(inner.invars, eqn.invars, found, lambda atom: _add(atom, tainted, found))
