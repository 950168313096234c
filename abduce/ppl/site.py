"""Sites: the primitive that `sample`, `factor`, `deterministic` and `param` bind.

A site equation carries a `Site` (what it is, statically) and operands (the numbers: distribution
parameters, an observed value, a scale, a guard). `jax.vmap` of a site records the mapped axis in
`Site.axes`; nothing is drawn or scored until an interpreter meets the equation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.distributions import constraints

from abduce.errors import InvalidModel, OutsideModel
from abduce.ppl import _jax

__all__ = [
    "Axis",
    "DistSpec",
    "Site",
    "bind",
    "elementwise",
    "has_sites",
    "site_p",
    "user_location",
]


@dataclasses.dataclass(frozen=True)
class Axis:
    """One `vmap` around a site.

    Attributes:
        size: Its length.
        name: From `vmap(axis_name=)`, or None.
        depth: How many of the enclosing scans (innermost first) lie *inside* this vmap.
        mapped: For each operand of the site, whether it has this axis (in front).
    """

    size: int
    name: str | None
    depth: int
    mapped: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class DistSpec:
    """A distribution taken apart: `build(leaves)` puts it together from its array leaves.

    Attributes:
        treedef, static: How to put it together.
        family: Its name, without wrappers such as `expand`.
        avals: (shape, dtype) of one element's operands.
        support: Its support, if that is the same whatever the operands are; else None.
    """

    treedef: Any
    static: tuple[Any, ...]  # a Python value, or the marker for "an operand"
    family: str
    avals: tuple[Any, ...] = ()
    support: Any = None

    def build(self, leaves: Sequence[Any]) -> Any:
        it = iter(leaves)
        d = jax.tree.unflatten(
            self.treedef, [next(it) if s is _OPERAND else s for s in self.static]
        )
        inner = d
        while inner is not None:  # NumPyro's own validation costs equations; we check ourselves
            inner._validate_args = False
            inner = getattr(inner, "base_dist", None)
        return d


_OPERAND = type("Operand", (), {"__repr__": lambda self: "operand"})()


def take_apart(d: Any) -> tuple[DistSpec, list[Any]]:
    """Splits a distribution into its static part and its array leaves."""
    leaves, treedef = jax.tree.flatten(d)
    arrays, static = [], []
    for leaf in leaves:
        if isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            arrays.append(leaf)
            static.append(_OPERAND)
        else:
            static.append(leaf)
    avals = tuple((jnp.shape(x), jnp.result_type(x)) for x in arrays)
    family = type(unwrapped(d)).__name__.removesuffix("Probs").removesuffix("Logits")
    return DistSpec(treedef, tuple(static), family, avals, known_support(d)), arrays


_WRAPPERS = ("ExpandedDistribution", "Independent", "MaskedDistribution")


def unwrapped(d: Any) -> Any:
    """The distribution inside `expand`, `to_event` and `mask`."""
    while type(d).__name__ in _WRAPPERS:
        d = d.base_dist
    return d


def known_support(d: Any) -> Any | None:
    """The support of a distribution if it does not depend on its array parameters, else None."""
    if type(d).__name__ in _WRAPPERS:
        support = known_support(d.base_dist)
        if support is not None and type(d).__name__ == "Independent":
            return constraints.independent(support, d.reinterpreted_batch_ndims)
        return support
    try:
        support = d.support
    except NotImplementedError:
        return None
    if any(not _jax.is_concrete(x) for x in jax.tree.leaves(support)):
        return None
    if support is None or constraints.is_dependent(support):
        return None
    return support


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """The static part of a site.

    Attributes:
        kind: 'sample', 'factor', 'deterministic', 'param', or 'auxiliary' (random numbers that are
            no choice: what `ab.normalize` and `ab.marginal` draw inside).
        address: Absolute, with scopes.
        shape: Of one element, without mapped axes (batch then event).
        dtype: Of the value.
        event_dim: How many trailing dimensions are one event.
        roles: What each operand is: 'leaf', 'obs', 'mask', 'scale', 'guard', 'baseline'.
        spec: The distribution (kind 'sample').
        axes: Mapped axes, outermost first.
        dims: Names of the element's own dimensions.
        where: 'file.py:12', where the user wrote it.
        coords: How its unconstrained coordinates are made; None for the support's bijection.
        grad: Gradient strategy, for objectives.
        constraint: Of a 'param'.
        branches: `(cond, index)` of each vmapped conditional it is in; two sites of one
            conditional with different indices are never active together.
    """

    kind: str
    address: str
    shape: tuple[int, ...]
    dtype: Any
    event_dim: int = 0
    roles: tuple[str, ...] = ()
    spec: Any = None
    axes: tuple[Axis, ...] = ()
    dims: tuple[str | None, ...] = ()
    where: str = ""
    coords: Any = None
    grad: Any = None
    constraint: Any = None
    branches: tuple[tuple[Any, int], ...] = ()

    def __repr__(self) -> str:
        family = f" ~ {self.spec.family}" if self.spec else ""
        return f"{self.kind} {self.address!r}{family} {self.full_shape}"

    @property
    def axis_sizes(self) -> tuple[int, ...]:
        return tuple(a.size for a in self.axes)

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the value where the equation stands: mapped axes, then the element."""
        return self.axis_sizes + self.shape

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.shape[: len(self.shape) - self.event_dim]

    def replace(self, **changes: Any) -> Site:
        return dataclasses.replace(self, **changes)

    def operand(self, operands: Sequence[Any], role: str) -> Any | None:
        """The operand with this role, or None."""
        return operands[self.roles.index(role)] if role in self.roles else None

    def with_operand(
        self, operands: Sequence[Any], role: str, value: Any, *, mapped: bool
    ) -> tuple[Site, list[Any]]:
        """Adds or replaces an operand; `mapped` says whether it has all of the site's axes."""
        if role in self.roles:
            i = self.roles.index(role)
            axes = tuple(
                dataclasses.replace(a, mapped=(*a.mapped[:i], mapped, *a.mapped[i + 1 :]))
                for a in self.axes
            )
            new = [*operands[:i], value, *operands[i + 1 :]]
            return self.replace(axes=axes), new
        axes = tuple(dataclasses.replace(a, mapped=(*a.mapped, mapped)) for a in self.axes)
        return self.replace(roles=(*self.roles, role), axes=axes), [*operands, value]

    def without_operands(self, operands: Sequence[Any], *roles: str) -> tuple[Site, list[Any]]:
        """Drops the operands with these roles."""
        keep = [i for i, r in enumerate(self.roles) if r not in roles]
        axes = tuple(
            dataclasses.replace(a, mapped=tuple(a.mapped[i] for i in keep)) for a in self.axes
        )
        site = self.replace(roles=tuple(self.roles[i] for i in keep), axes=axes)
        return site, [operands[i] for i in keep]

    def build(self, operands: Sequence[Any]) -> Any:
        """The element's distribution, from the operands of one element."""
        return self.spec.build(
            [x for x, r in zip(operands, self.roles, strict=True) if r == "leaf"]
        )


def elementwise(site: Site, fn: Callable[..., Any], operands: Sequence[Any], *extra: Any) -> Any:
    """Runs `fn(operands, *extra)` for every element of the site's mapped axes.

    Args:
        site: Gives the axes.
        fn: Takes the list of one element's operands, then one element of each extra.
        operands: As in the equation.
        *extra: Arrays or pytrees that have all mapped axes in front; None passes through.
    """

    def flat(*args):
        return fn(list(args[: len(operands)]), *args[len(operands) :])

    wrapped = flat
    for axis in reversed(site.axes):
        in_axes = tuple(0 if m else None for m in axis.mapped)
        in_axes += tuple(None if e is None else 0 for e in extra)
        wrapped = jax.vmap(wrapped, in_axes=in_axes, axis_size=axis.size)
    return wrapped(*operands, *extra)


def _abstract(*avals, site):
    if site.kind == "factor":
        return []
    return [jax.core.ShapedArray(site.full_shape, site.dtype)]


def _outside(*, site):
    return OutsideModel(
        f"ab.{site.kind}({site.address!r}, ...) ran outside a model ({site.where}). Decorate the "
        f"function with @ab.model and call m.simulate(key, ...), m.log_density(choices, ...) or "
        f"m.posterior(key, ..., given=...)."
    )


def _differentiated(*, site):
    return InvalidModel(
        f"site {site.address!r} ({site.where}) is differentiated inside the model: a derivative of "
        f"a random choice is not defined there. Take the gradient of a density instead: "
        f"jax.grad(lambda c: m.log_density(c, ...))."
    )


def _batch(axis_data, args, dims, *, site):
    mapped = tuple(d is not None for d in dims)
    moved = [_jax.move_to_front(x, d) for x, d in zip(args, dims, strict=True)]
    if site.kind == "param":
        if any(mapped):
            raise InvalidModel(
                f"param {site.address!r} ({site.where}): its initial value differs along a vmapped "
                f"axis, but a parameter has one value. Compute the initial value outside the vmap."
            )
        return site_p.bind(*moved, site=site), [None]
    axis = Axis(axis_data.size, _jax.axis_name_of(axis_data), _jax.scan_depth_context.value, mapped)
    outs = site_p.bind(*moved, site=site.replace(axes=(axis, *site.axes)))
    return outs, [0] * len(outs)


site_p = _jax.new_primitive(
    "abduce_site",
    abstract=_abstract,
    outside=_outside,
    differentiated=_differentiated,
    batch=_batch,
)


def bind(site: Site, operands: Sequence[Any]) -> Any:
    """Emits a site into the program being staged; returns its value (None for a factor)."""
    out = site_p.bind(*operands, site=site)
    return out[0] if out else None


def has_sites(jaxpr: Any) -> bool:
    """Whether a jaxpr has a site, at any depth."""
    inner, _ = _jax.inner_jaxpr(jaxpr)
    return any(
        eqn.primitive is site_p or any(has_sites(sub) for sub in _jax.subjaxprs(eqn))
        for eqn in inner.eqns
    )


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_SKIP = (
    _PACKAGE + os.sep,
    contextlib.__file__,
    *(os.path.dirname(os.path.abspath(m.__file__)) + os.sep for m in (jax, numpyro, equinox)),
)


def user_location() -> str:
    """'file.py:12' of the innermost frame that is neither ours nor JAX's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_SKIP) or name.startswith(
            (os.path.join(_PACKAGE, "models"), os.path.join(_PACKAGE, "demo"))
        ):
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown location"


def as_float(x: Any) -> Any:
    """An array of JAX's default float type, unless it is a float already."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.result_type(float))
