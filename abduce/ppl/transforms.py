"""Transformations: from models to models.

Each stages the model it wraps and emits its sites again, edited: `condition` adds an observation,
`do` cuts a site from its parents, `with_prior` swaps a distribution, `reparam` changes
coordinates. The edited sites stay in their `vmap`, `scan` and `cond`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution

from abduce.errors import InvalidValue
from abduce.ppl.checks import coerce
from abduce.ppl.data import as_data
from abduce.ppl.inside import propose
from abduce.ppl.interpreter import State, walk
from abduce.ppl.masked import Masked
from abduce.ppl.model import Model
from abduce.ppl.naming import scoped
from abduce.ppl.operations import prepare_given, to_physical, unknown_address
from abduce.ppl.program import Program, relative, stage
from abduce.ppl.reparam import Coordinates, as_coordinates
from abduce.ppl.replay import Given
from abduce.ppl.site import Site, bind, take_apart

__all__ = ["condition", "do", "reparam", "with_prior"]


class Emit:
    """Emits every site again, after an edit.

    Args:
        edit: `(site, operands, given) -> (site, operands)` or, to put a value in the site's place,
            `(site, value)` with a plain array.
    """

    def __init__(self, edit: Any):
        self.edit = edit

    def site(self, site: Site, operands: Sequence[Any], given: Any, key: Any, acc: Any):
        site, operands = self.edit(site, list(operands), given)
        if not isinstance(operands, list):
            return [operands], acc, None
        out = bind(site, operands)
        return ([] if out is None else [out]), acc, None


def emit_again(model: Model, args: Any, kwargs: Any, edit: Any, given: dict[str, Given]) -> Any:
    """Stages `model` here (in the current scope) and emits it edited.

    `given` is keyed by the model's own addresses, values in the layout users see.
    """
    program, arguments = stage(model, args, kwargs)
    inputs = {scoped(a): to_physical(program.sites[scoped(a)], g) for a, g in given.items()}
    state = State(None, inputs, ())
    outs = walk(Emit(edit), program.jaxpr, program.inputs(arguments), state)
    return jax.tree.unflatten(program.out_tree, outs)


class Transformed(Model):
    """A model made from another one."""

    base: eqx.AbstractVar[Model]

    @property
    def name(self) -> str:
        return self.base.name

    def check(self, args: Any, kwargs: Any) -> None:
        self.base.check(args, kwargs)

    def __repr__(self) -> str:
        return f"<{type(self).__name__.lower()} of {self.base!r}>"


def _bare(m: Any, call: str) -> tuple[Model, Any]:
    """The model without its algorithm, and the algorithm: transformations keep it."""
    if not isinstance(m, Model):
        raise InvalidValue(f"{call} takes a model, got {type(m).__name__}.")
    algorithm = m.algorithm
    return (m if algorithm is None else m.with_algorithm(None)), algorithm


class Conditioned(Transformed):
    """A model some of whose sites are observed."""

    base: Model
    given: dict[str, Any]
    algorithm: Any = None

    def check(self, args, kwargs):
        program, _ = self.base._stage(args, kwargs)  # which checks the model inside, too
        prepare_given(program, self.given)

    def emit(self, *args, **kwargs):
        program = relative(stage(self.base, args, kwargs)[0])
        given = prepare_given(program, self.given)

        def edit(site, operands, g):
            if g is None:
                return site, operands
            if g.mask is None:
                site, operands = site.without_operands(operands, "mask")
                return site.with_operand(operands, "obs", g.value, mapped=True)
            site, operands = site.with_operand(operands, "obs", g.value, mapped=True)
            return site.with_operand(operands, "mask", g.mask, mapped=True)

        return emit_again(self.base, args, kwargs, edit, given)


def condition(m: Model, given: Mapping[str, Any]) -> Model:
    """The model with some sites observed.

    Args:
        m: A model.
        given: Values by address; `ab.masked(...)` observes in part. Checked when the model is used,
            since its shapes depend on its arguments.

    Returns:
        A model with the same return value and one latent less per address.

    Raises:
        UnknownAddress, InvalidValue: On use; see the messages.

    Example:
        >>> posterior_model = ab.condition(schools, {"y": y})
        >>> posterior_model.log_density({"mu": 0., "tau": 1., "theta": jnp.zeros(8)}, sigma)
    """
    base, algorithm = _bare(m, "ab.condition")
    return Conditioned(base, _as_tree(given, "ab.condition"), algorithm)


def _as_tree(values: Mapping[str, Any], call: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise InvalidValue(f"{call} takes a dict by address, got {type(values).__name__}.")

    def convert(v):
        if isinstance(v, Masked):
            return v
        v = as_data(v)
        return v if isinstance(v, jax.core.Tracer) else jnp.asarray(v)

    return {a: convert(v) for a, v in values.items()}


class Intervened(Transformed):
    """A model some of whose sites are set from outside."""

    base: Model
    values: dict[str, Any]
    algorithm: Any = None

    def emit(self, *args, **kwargs):
        program = relative(stage(self.base, args, kwargs)[0])
        given = {}
        for address, value in self.values.items():
            info = program.sites.get(address)
            if info is None or info.kind not in ("sample", "deterministic"):
                raise unknown_address(address, program, "values")
            if np.shape(value) not in ((), info.shape):
                raise InvalidValue(
                    f'ab.do: values["{address}"] has shape {np.shape(value)}, expected '
                    f"{info.shape} or a scalar."
                )
            value = coerce(value, info.dtype, address, what=f'ab.do: values["{address}"]')
            given[address] = Given(jnp.broadcast_to(value, info.shape))

        def edit(site, operands, g):
            if g is None:
                return site, operands
            guard = site.operand(operands, "guard")
            record = site.replace(
                kind="deterministic", spec=None, event_dim=0, roles=(),
                axes=tuple(_replace_mapped(a, ()) for a in site.axes),
            )  # fmt: skip
            record, new = record.with_operand([], "leaf", g.value, mapped=True)
            if guard is not None:
                mapped = any(a.mapped[site.roles.index("guard")] for a in site.axes)
                record, new = record.with_operand(new, "guard", guard, mapped=mapped)
            return record, new

        return emit_again(self.base, args, kwargs, edit, given)


def do(m: Model, values: Mapping[str, Any]) -> Model:
    """The intervened model: the sites are cut from their parents and lose their density.

    The values appear among `trace.deterministics`.

    Args:
        m: A model.
        values: By address; a scalar broadcasts. Deterministic sites may be set too.

    Example:
        >>> treated = ab.do(trial, {"dose": 1.0})
    """
    base, algorithm = _bare(m, "ab.do")
    return Intervened(base, _as_tree(values, "ab.do"), algorithm)


class WithPrior(Transformed):
    """A model some of whose sites are drawn from something else."""

    base: Model
    prior: Any  # a dict of distributions, or a Model
    algorithm: Any = None

    def emit(self, *args, **kwargs):
        program = relative(stage(self.base, args, kwargs)[0])
        if isinstance(self.prior, Model):
            return self._from_model(program, args, kwargs)
        for address, d in self.prior.items():
            self._check(program, address, d)
        prior = {scoped(a): d for a, d in self.prior.items()}

        def edit(site, operands, g):
            d = prior.get(site.address)
            if d is None:
                return site, operands
            return _swap_distribution(site, operands, d)

        return emit_again(self.base, args, kwargs, edit, {})

    def _check(self, program: Program, address: str, d: Any) -> None:
        info = program.sites.get(address)
        if info is None or info.kind != "sample":
            raise unknown_address(address, program, "prior")
        site = info.site
        event = tuple(d.event_shape)
        try:
            if event != site.shape[len(site.shape) - len(event) :]:
                raise ValueError
            batch = site.shape[: len(site.shape) - len(event)]
            if np.broadcast_shapes(tuple(d.batch_shape), batch) != batch:
                raise ValueError
        except ValueError:
            raise InvalidValue(
                f'ab.with_prior: prior["{address}"] has batch shape {tuple(d.batch_shape)} and '
                f"event shape {event}, but one element of site {address!r} has shape {site.shape}"
                f"{f' (mapped to {info.shape})' if info.lead_ndim else ''}. The new distribution "
                f"describes one element."
            ) from None

    def _from_model(self, program: Program, args: Any, kwargs: Any) -> Any:
        choices, _ = propose(self.prior, *(args if _takes(self.prior, args, kwargs) else ()))
        given = {}
        for address, value in choices.items():
            info = program.sites.get(address)
            if info is None or info.kind != "sample":
                raise unknown_address(address, program, "prior")
            if np.shape(value) != info.shape:
                raise InvalidValue(
                    f"ab.with_prior: the prior model gives {address!r} shape {np.shape(value)}, "
                    f"the model needs {info.shape}."
                )
            given[address] = Given(value.astype(info.dtype))

        def edit(site, operands, g):
            return (site, operands) if g is None else (site, g.value)

        return emit_again(self.base, args, kwargs, edit, given)


def _takes(m: Model, args: Any, kwargs: Any) -> bool:
    """Whether a prior model wants the target's arguments."""
    fn = getattr(m, "fn", None)
    if fn is None:
        return False
    try:
        inspect.signature(fn).bind(*args, **kwargs)
    except TypeError:
        return False
    return bool(args or kwargs)


def _swap_distribution(site: Site, operands: list[Any], d: Any) -> tuple[Site, list[Any]]:
    batch = site.shape[: len(site.shape) - len(d.event_shape)]
    if tuple(d.batch_shape) != batch:
        d = d.expand(batch)
    spec, leaves = take_apart(d)
    site, operands = site.without_operands(operands, "leaf")
    extra = [False] * len(leaves)
    axes = tuple(_replace_mapped(a, (*extra, *a.mapped)) for a in site.axes)
    site = site.replace(
        spec=spec, event_dim=len(d.event_shape), axes=axes, coords=None,
        roles=("leaf",) * len(leaves) + site.roles,
    )  # fmt: skip
    return site, [*leaves, *operands]


def _replace_mapped(axis: Any, mapped: tuple[bool, ...]) -> Any:
    return dataclasses.replace(axis, mapped=mapped)


def with_prior(m: Model, prior: Mapping[str, Any] | Model) -> Model:
    """The model with the named sites drawn from `prior` instead.

    Args:
        m: A model.
        prior: A dict of distributions by address, each describing one element (under `vmap` or
            `scan`, every element gets it); or a Model over several addresses jointly, which is run
            first (with this model's arguments, if it takes them).

    Example:
        >>> vague = ab.with_prior(schools, {"tau": dist.HalfNormal(50.0)})
    """
    base, algorithm = _bare(m, "ab.with_prior")
    if isinstance(prior, Model):
        return WithPrior(base, prior.with_algorithm(None), algorithm)
    if not isinstance(prior, Mapping) or not all(
        isinstance(d, Distribution) for d in prior.values()
    ):
        raise InvalidValue(
            f"ab.with_prior takes a dict of distributions by address, or a model; got {prior!r}."
        )
    return WithPrior(base, dict(prior), algorithm)


class Reparametrized(Transformed):
    """A model some of whose sites have other unconstrained coordinates."""

    base: Model
    coords: dict[str, Coordinates]
    algorithm: Any = None

    def emit(self, *args, **kwargs):
        program = relative(stage(self.base, args, kwargs)[0])
        for address in self.coords:
            info = program.sites.get(address)
            if info is None or info.kind != "sample":
                raise unknown_address(address, program, "reparam")
        coords = {scoped(a): c for a, c in self.coords.items()}

        def edit(site, operands, g):
            c = coords.get(site.address)
            return (site if c is None else site.replace(coords=c)), operands

        return emit_again(self.base, args, kwargs, edit, {})


def reparam(m: Model, coords: Mapping[str, Any]) -> Model:
    """The same joint distribution in other unconstrained coordinates.

    Draws, traces and densities are unchanged; gradient methods move in the new coordinates.

    Args:
        m: A model.
        coords: By address: `ab.noncentered()`, `ab.bijection(transform)`, or a NumPyro
            reparameterizer that is a bijection (`LocScaleReparam`, `TransformReparam`).

    Example:
        >>> cured = ab.reparam(schools, {"theta": ab.noncentered()})
    """
    base, algorithm = _bare(m, "ab.reparam")
    return Reparametrized(base, {a: as_coordinates(a, c) for a, c in coords.items()}, algorithm)
