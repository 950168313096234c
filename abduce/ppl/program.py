"""Staging: from a model and its arguments to a program, with a table of its sites.

JAX's own trace cache does the caching: `_run` is one stable function for all models, so a model
is staged once per (static part, shapes, dtypes, x64, scope).
"""

from __future__ import annotations

import dataclasses
import functools
import traceback
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions.distribution import Distribution

from abduce.errors import DuplicateAddress, InvalidModel, InvalidValue
from abduce.ppl import _jax
from abduce.ppl.data import as_data
from abduce.ppl.interpreter import loop_error
from abduce.ppl.site import Site, has_sites, site_p

__all__ = ["Arguments", "Program", "SiteInfo", "pack", "prepare_argument", "relative", "stage"]


@jax.tree_util.register_pytree_node_class
class Arguments:
    """A model and its arguments, split into arrays (traced) and everything else (static)."""

    __slots__ = ("dynamic", "static")

    def __init__(self, static: Static, dynamic: Sequence[Any]):
        self.static = static
        self.dynamic = list(dynamic)

    def unpack(self) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Returns the model, the positional and the keyword arguments."""
        return self.static.join(self.dynamic)

    def tree_flatten(self):
        return (tuple(self.dynamic),), self.static

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(static, children[0])


@dataclasses.dataclass(frozen=True)
class Static:
    """The static part of `Arguments`; hashable, so it can be part of compile-cache keys."""

    treedef: Any
    leaves: tuple[Any, ...]  # (type, value), or the marker for "an array"

    def join(self, dynamic: Sequence[Any]) -> Any:
        it = iter(dynamic)
        return jax.tree.unflatten(
            self.treedef, [next(it) if leaf is None else leaf[1] for leaf in self.leaves]
        )


def _is_dynamic(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.number, np.bool_, float, complex)) or (
        hasattr(leaf, "__jax_array__")
    )


def prepare_argument(x: Any) -> Any:
    """A model's argument: lists of numbers, pandas and xarray objects become arrays."""
    if hasattr(x, "to_numpy") and not isinstance(x, jax.Array):
        return as_data(x)
    if isinstance(x, list):
        leaves = jax.tree.leaves(x)
        if leaves and all(
            isinstance(v, (int, float, np.number)) for v in leaves  # a list of arrays is a pytree
        ):
            return as_data(x)
        return [prepare_argument(v) for v in x]
    if type(x) is dict:
        return {k: prepare_argument(v) for k, v in x.items()}
    if type(x) is tuple:
        return tuple(prepare_argument(v) for v in x)
    if type(x).__module__.startswith("flax.nnx") or any(
        c.__module__.startswith("flax.nnx") for c in type(x).__mro__
    ):
        from abduce.ppl.modules import NNXModule

        return NNXModule.wrap(x)
    return x


def pack(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Splits a model and its arguments into dynamic arrays and a static, hashable rest."""
    args = tuple(prepare_argument(a) for a in args)
    kwargs = {k: prepare_argument(v) for k, v in kwargs.items()}
    leaves, treedef = jax.tree_util.tree_flatten((model, args, kwargs))
    dynamic: list[Any] = []
    static: list[Any] = []
    for leaf in leaves:
        if _is_dynamic(leaf):
            if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OUSmM":
                raise InvalidValue(
                    f"arguments of `{model.name}` must be numbers, got an array of dtype "
                    f"{leaf.dtype}."
                )
            dynamic.append(leaf)
            static.append(None)
        else:
            static.append((type(leaf), leaf))
    result = Static(treedef, tuple(static))
    try:
        hash(result)
    except TypeError as e:
        raise InvalidValue(
            f"arguments of `{model.name}`: {e}. Whatever is not an array must be hashable (it is "
            f"static): pass numbers as arrays, or give the class a __hash__."
        ) from None
    return Arguments(result, dynamic)


def _run(static: Static, dynamic: list[Any]) -> Any:
    model, args, kwargs = static.join(dynamic)
    args, kwargs = jax.tree.map(
        lambda x: x.unwrap() if hasattr(x, "abduce_unwrap") else x,
        (args, kwargs),
        is_leaf=lambda x: hasattr(x, "abduce_unwrap"),
    )
    return model.emit(*args, **kwargs)


_staged = jax.jit(_run, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class SiteInfo:
    """What is known of a site before anything runs.

    Attributes:
        address, kind, dtype, event_dim: As of the site.
        shape: As users see it: mapped axes and scans (outermost first), batch, event.
        dims: A name or None for each dimension of `shape`.
        batch_ndim: How many leading dimensions are not part of an event.
        lead_ndim: How many leading dimensions are mapped axes or scans.
        perm: The physical dimension that each dimension of `shape` is.
        observed: Observed in the program (wholly, unless `partial`).
        partial: Observed under a mask.
        conditional: In a branch, so `trace.active` tells whether it counted.
        site: The (first) site.
    """

    address: str
    kind: str
    shape: tuple[int, ...]
    dtype: Any
    event_dim: int
    dims: tuple[str | None, ...]
    perm: tuple[int, ...]
    lead_ndim: int
    observed: bool
    partial: bool
    conditional: bool
    num_scans: int
    site: Site

    @property
    def batch_ndim(self) -> int:
        return len(self.shape) - self.event_dim

    @property
    def family(self) -> str:
        return self.site.spec.family if self.site.spec else self.kind

    @property
    def is_latent(self) -> bool:
        return self.kind == "sample" and (not self.observed or self.partial)

    @property
    def is_discrete(self) -> bool:
        return not jnp.issubdtype(self.dtype, jnp.inexact)

    @property
    def has_density(self) -> bool:
        return self.family != "Simulator"

    def to_physical(self, x: Any) -> Any:
        """From the layout users see to that of the program (any trailing dimensions stay)."""
        return _permute(x, tuple(np.argsort(self.perm)))

    def to_logical(self, x: Any) -> Any:
        """From the program's layout to the one users see."""
        return _permute(x, self.perm)


def _permute(x: Any, perm: tuple[int, ...]) -> Any:
    n = np.ndim(x)
    head = (*(p for p in perm if p < n), *range(len(perm), n))
    return x if head == tuple(range(n)) else jnp.transpose(x, head)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A staged model.

    Attributes:
        jaxpr: With site equations in it.
        out_tree: Structure of the model's return value.
        sites: By address, in program order.
        name: The model's name.
        closed: Traced values that the model closes over: the first inputs of the jaxpr.
    """

    jaxpr: Any
    out_tree: Any
    sites: dict[str, SiteInfo]
    name: str
    closed: list[Any] = dataclasses.field(default_factory=list)

    def inputs(self, arguments: Arguments) -> list[Any]:
        """What the jaxpr is run on."""
        return [*self.closed, *arguments.dynamic]

    @functools.cached_property
    def latents(self) -> dict[str, SiteInfo]:
        return {a: s for a, s in self.sites.items() if s.is_latent}

    @functools.cached_property
    def observed(self) -> dict[str, SiteInfo]:
        return {a: s for a, s in self.sites.items() if s.kind == "sample" and s.observed}

    def of_kind(self, kind: str) -> dict[str, SiteInfo]:
        return {a: s for a, s in self.sites.items() if s.kind == kind}


def stage(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Program, Arguments]:
    """Stages a model on its arguments (concrete or traced)."""
    arguments = pack(model, args, kwargs)
    return stage_packed(arguments), arguments


def stage_packed(arguments: Arguments) -> Program:
    """Stages a packed model."""
    name = arguments.unpack()[0].name
    was_validating = Distribution._validate_args
    Distribution._validate_args = False  # its checks would be staged as equations; we have ours
    try:
        jaxpr, closed, out_tree = _jax.stage(_staged, arguments.static, arguments.dynamic)
    except jax.errors.JAXTypeError as e:
        raise _explain(e, name) from e
    except TypeError as e:
        if "not a valid JAX type" not in str(e):
            raise
        raise InvalidModel(
            f"model `{name}` returns something that is neither an array nor a pytree of arrays: "
            f"{str(e).split('traced for jit ')[-1]}. Return arrays only."
        ) from None
    finally:
        Distribution._validate_args = was_validating
    key, _ = _jax.inner_jaxpr(jaxpr)  # the constants may differ from call to call
    sites = _tables.get(key)
    if sites is None:
        sites = _tables[key] = site_table(jaxpr, name)
    return Program(jaxpr, out_tree, sites, name, closed)


def relative(program: Program) -> Program:
    """A program staged inside another one, with addresses relative to the current scope."""
    n = sum(len(s) + 1 for s in _jax.scope_context.value)
    if not n:
        return program
    sites = {a[n:]: s for a, s in program.sites.items()}
    return dataclasses.replace(program, sites=sites)


def _explain(error: Exception, name: str) -> InvalidModel:
    line = next(
        (
            f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}: {f.line}"
            for f in reversed(traceback.extract_tb(error.__traceback__))
            if "/jax/" not in f.filename and "/abduce/ppl/" not in f.filename
        ),
        "unknown line",
    )
    if isinstance(error, jax.errors.TracerBoolConversionError):
        return InvalidModel(
            f"model `{name}` branches in Python on a random or traced value, at {line}\n"
            f"Python's `if`, `while`, `and`, `or` need a value that is known while the model is "
            f"staged. Use jax.lax.cond(pred, f, g, x), jnp.where, or ab.while_loop. If it is an "
            f"option rather than data, pass it as a bool, int or str: those are static."
        )
    return InvalidModel(
        f"model `{name}` needs the number behind a random or traced value while it is staged, at "
        f"{line}\nUse jnp functions instead of NumPy or Python ones on it; shapes and loop bounds "
        f"must be static (pass them as Python ints).\n{str(error).splitlines()[0]}"
    )


_tables: weakref.WeakKeyDictionary[Any, dict[str, SiteInfo]] = weakref.WeakKeyDictionary()


def site_table(jaxpr: Any, name: str) -> dict[str, SiteInfo]:
    """Finds all sites of a program, with their shapes; refuses duplicates."""
    table: dict[str, SiteInfo] = {}
    paths: dict[str, list[tuple[Any, ...]]] = {}

    def visit(jaxpr, scans, path):
        inner, _ = _jax.inner_jaxpr(jaxpr)
        for eqn in inner.eqns:
            if eqn.primitive is site_p:
                add(eqn.params["site"], scans, path)
                continue
            subs = [s for s in _jax.subjaxprs(eqn) if has_sites(s)]
            if not subs:
                continue
            if eqn.primitive is _jax.scan_p:
                visit(eqn.params["jaxpr"], (*scans, eqn.params["length"]), path)
            elif eqn.primitive is _jax.cond_p:
                group = object()
                for i, branch in enumerate(eqn.params["branches"]):
                    if has_sites(branch):
                        visit(branch, scans, (*path, (group, i)))
            elif (call := _jax.call_jaxpr(eqn)) is not None:
                visit(call[1], scans, path)
            else:
                raise loop_error(eqn)

    def add(site, scans, path):
        full_path = (*path, *site.branches)
        info = _info(site, scans, bool(full_path))
        seen = table.get(site.address)
        if seen is None:
            table[site.address] = info
            paths[site.address] = [full_path]
            return
        if not all(_exclusive(full_path, p) for p in paths[site.address]):
            if site.kind == "param":
                raise DuplicateAddress(
                    f"param {site.address!r} occurs twice in `{name}`: {seen.site.where} and "
                    f"{site.where}. Create it once and pass its value on."
                )
            raise DuplicateAddress(
                f"address {site.address!r} occurs twice in `{name}`: {seen.site.where} and "
                f"{site.where}. Give the sites different names, or put one in "
                f'`with ab.scope("..."):`.' + _map_hint(seen.site, site)
            )
        if (seen.shape, seen.dtype, seen.kind) != (info.shape, info.dtype, info.kind):
            raise InvalidValue(
                f"site {site.address!r} is in several branches of a cond or switch, as "
                f"{seen.kind} {seen.shape} {seen.dtype} ({seen.site.where}) and {info.kind} "
                f"{info.shape} {info.dtype} ({site.where}). The same address in several branches "
                f"is one site: make them alike, or give them different addresses."
            )
        paths[site.address].append(full_path)

    visit(jaxpr, (), ())
    return table


def _map_hint(a: Site, b: Site) -> str:
    if a.where == b.where:
        return (
            " If it comes from jax.lax.map(batch_size=) with a remainder, choose a batch size that "
            "divides the length; in a Python loop, put the counter into the name or use jax.vmap."
        )
    return ""


def _exclusive(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    index = dict(a)
    return any(group in index and index[group] != i for group, i in b)


def _info(site: Site, scans: tuple[int, ...], conditional: bool) -> SiteInfo:
    if site.kind == "param":
        scans = ()
    n = len(scans)
    # Outermost first: an axis mapped outside the k innermost scans stands before them.
    order: list[tuple[float, int]] = [(n - i - 0.5, i) for i in range(n)]
    order += [(min(a.depth, n), n + j) for j, a in enumerate(site.axes)]
    lead = [phys for _, phys in sorted(order, key=lambda t: -t[0])]
    lead_names = [None] * n + [a.name for a in site.axes]
    sizes = (*scans, *site.axis_sizes)
    total = n + len(site.axes)
    perm = (*lead, *range(total, total + len(site.shape)))
    shape = tuple(sizes[p] for p in lead) + site.shape
    dims = tuple(lead_names[p] for p in lead) + (site.dims or (None,) * len(site.shape))
    return SiteInfo(
        address=site.address,
        kind=site.kind,
        shape=shape,
        dtype=site.dtype,
        event_dim=site.event_dim,
        dims=dims,
        perm=perm,
        lead_ndim=total,
        observed="obs" in site.roles,
        partial="mask" in site.roles,
        conditional=conditional,
        num_scans=n,
        site=site,
    )
