"""The one module that touches JAX internals.

It hides what differs between JAX releases (0.10.2 and later), and holds the rules that JAX's own
`vmap` needs in order to see the sites of a model:

* a batching rule that records each mapped axis on the site instead of drawing,
* a wrapper around the rule of `scan`, so that an axis mapped *outside* a scan can be told from one
  mapped inside it (the staged program looks the same),
* a wrapper around the rule of `cond`, because a vmapped `cond` runs every branch and would
  silently make their sites unconditional.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import core as _core
from jax._src.lax.control_flow.conditionals import cond_p
from jax._src.lax.control_flow.loops import scan_p, while_p
from jax.extend import core as _extend
from jax.interpreters import ad, batching, mlir

__all__ = [
    "Jaxpr",
    "Literal",
    "call_jaxpr",
    "cond_p",
    "count_compiles",
    "evaluate",
    "inner_jaxpr",
    "is_concrete",
    "is_dropvar",
    "literal_value",
    "new_primitive",
    "scan_depth_context",
    "scan_p",
    "scan_split",
    "scope_context",
    "set_cond_batcher",
    "stage",
    "subjaxprs",
    "token_context",
    "while_p",
]

Jaxpr = Any  # open or closed: since JAX 0.11 they are one class
Literal = _extend.Literal

# User contexts are part of JAX's trace-cache key: a cached inner jit traces again under another
# scope, so what a site emits may depend on them. A plain ContextVar would not be seen.
scope_context = jax.make_user_context(())
token_context = jax.make_user_context(())
scan_depth_context = jax.make_user_context(0)


def inner_jaxpr(jaxpr: Jaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """Returns the open jaxpr and its constants, whichever class it is."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def subjaxprs(eqn: Any) -> list[Jaxpr]:
    """Returns the jaxprs among an equation's parameters."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def scan_split(eqn: Any) -> tuple[int, int]:
    """Returns the number of constants and of carries of a `scan` equation."""
    p = eqn.params
    if "num_carry" in p:
        return p["num_consts"], p["num_carry"]
    groups = p["ft_in"].update(list(eqn.invars)).unpack()[:2]
    consts, carry = (len(list(g)) for g in groups)
    return consts, carry


_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": ("call_jaxpr", "jaxpr"),
    "call": ("call_jaxpr", "jaxpr"),
    "core_call": ("call_jaxpr", "jaxpr"),
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": ("call_jaxpr", "fun_jaxpr"),
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
}


def call_jaxpr(eqn: Any) -> tuple[str, Jaxpr] | None:
    """Returns ('call' | 'custom' | 'remat', jaxpr) for an equation that calls a jaxpr once."""
    name = eqn.primitive.name
    if name not in _CALLS:
        return None
    fields = _CALLS[name]
    for field in (fields,) if isinstance(fields, str) else fields:
        if field in eqn.params:
            kind = "custom" if name.startswith("custom") else "call"
            kind = "remat" if name in ("remat2", "checkpoint", "remat") else kind
            return kind, eqn.params[field]
    return None


def evaluate(eqn: Any, vals: Sequence[Any]) -> list[Any]:
    """Evaluates one equation as it stands, whatever its primitive."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*vals, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def stage(jitted: Any, *args: Any) -> tuple[Jaxpr, list[Any], Any]:
    """Traces a jitted function through JAX's cache.

    Returns:
        The jaxpr; the traced values that the function closes over, which are its first inputs; and
        the structure of its result.
    """
    traced = jitted.trace(*args)
    return traced.jaxpr, list(getattr(traced, "_consts", ())), jax.tree.structure(traced.out_info)


def is_dropvar(var: Any) -> bool:
    """Whether an equation's output is unused."""
    return isinstance(var, _core.DropVar)


def literal_value(atom: Any) -> Any:
    """The value of a literal atom."""
    return atom.val


def is_concrete(x: Any) -> bool:
    """Whether the value is known now, rather than being traced."""
    return not isinstance(x, jax.core.Tracer)


def new_primitive(
    name: str,
    *,
    abstract: Callable[..., Any],
    outside: Callable[..., Exception],
    differentiated: Callable[..., Exception],
    batch: Callable[..., Any],
) -> Any:
    """Makes a primitive with several results that exists only while a program is staged.

    Args:
        name: Shown in jaxprs.
        abstract: From input avals and parameters to the list of output avals.
        outside: Builds the error for running or compiling it outside a model.
        differentiated: Builds the error for differentiating it.
        batch: `(axis_data, args, dims, **params) -> (outs, out_dims)`. It also runs when no
            operand is mapped.
    """
    prim = _extend.Primitive(name)
    prim.multiple_results = True
    prim.def_abstract_eval(abstract)

    def impl(*args, **params):
        raise outside(**params)

    def lower(ctx, *args, **params):
        raise outside(**params)

    def jvp(primals, tangents, **params):
        raise differentiated(**params)

    prim.def_impl(impl)
    mlir.register_lowering(prim, lower)
    ad.primitive_jvps[prim] = jvp
    batching.fancy_primitive_batchers[prim] = batch
    return prim


def _wrap_scan_batcher() -> None:
    original = batching.fancy_primitive_batchers[scan_p]

    def rule(axis_data, args, dims, **params):
        with scan_depth_context(scan_depth_context.value + 1):
            return original(axis_data, args, dims, **params)

    rule.abduce_original = original  # type: ignore[attr-defined]
    batching.fancy_primitive_batchers[scan_p] = rule


def set_cond_batcher(
    applies: Callable[[Sequence[Jaxpr]], bool],
    element: Callable[..., list[Any]],
) -> None:
    """Makes `vmap` of a `cond` over a mapped predicate keep the sites of each branch conditional.

    Args:
        applies: Whether any of the branches has sites.
        element: `(branches, index, operands) -> outputs` for one element of the mapped axis,
            running all branches with guarded sites.
    """
    original = batching.fancy_primitive_batchers[cond_p]
    original = getattr(original, "abduce_original", original)

    def rule(axis_data, args, dims, *, branches, **params):
        if dims[0] is None or not applies(branches):
            return original(axis_data, args, dims, branches=branches, **params)
        name = axis_data.name
        mapped = jax.vmap(
            lambda index, *ops: element(branches, index, ops),
            in_axes=tuple(dims),
            axis_size=axis_data.size,
            **({} if name is _core.no_axis_name else {"axis_name": name}),
            **({} if not axis_data.spmd_name else {"spmd_axis_name": axis_data.spmd_name}),
        )
        outs = mapped(*args)
        return outs, [0] * len(outs)

    rule.abduce_original = original  # type: ignore[attr-defined]
    batching.fancy_primitive_batchers[cond_p] = rule


def axis_name_of(axis_data: Any) -> str | None:
    """The name given by `vmap(axis_name=)`, or None."""
    return None if axis_data.name is _core.no_axis_name else str(axis_data.name)


def move_to_front(x: Any, dim: int | None) -> Any:
    """Moves a mapped dimension to the front; an unmapped operand stays."""
    return x if dim is None or dim == 0 else jnp.moveaxis(x, dim, 0)


_wrap_scan_batcher()


class CompileCount:
    """How many programs the backend compiled inside a `count_compiles` block, and which."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @property
    def count(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"CompileCount({self.names})"


_compile_counters: list[CompileCount] = []
_compile_lock = threading.Lock()
_listening = False


def _on_event(event: str, duration: float, **about: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        for counter in list(_compile_counters):
            counter.names.append(str(about.get("fun_name", "?")))


@contextlib.contextmanager
def count_compiles() -> Iterator[CompileCount]:
    """Counts backend compilations, exactly, while the block runs.

    Example:
        >>> with count_compiles() as compiles:
        ...     _ = jax.jit(lambda x: x + 1)(1.0)
        >>> compiles.count >= 0
        True
    """
    global _listening
    with _compile_lock:
        if not _listening:  # JAX offers no way to remove one listener, so there is only ever one
            jax.monitoring.register_event_duration_secs_listener(_on_event)
            _listening = True
    counter = CompileCount()
    _compile_counters.append(counter)
    try:
        yield counter
    finally:
        _compile_counters.remove(counter)
