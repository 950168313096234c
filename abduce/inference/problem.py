"""What an algorithm is given: a staged model with checked data."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import DiscreteLatent, InvalidAlgorithm, InvalidValue, suggest
from abduce.ppl import _jax
from abduce.ppl.data import labels_of
from abduce.ppl.model import Model
from abduce.ppl.operations import prepare_given, require_density
from abduce.ppl.program import Arguments, Program, SiteInfo
from abduce.ppl.replay import Given

__all__ = ["Problem", "accepts", "lost_sites", "make_problem"]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A model conditioned on data.

    Attributes:
        model: Without its algorithm.
        program: Staged on the arguments.
        arguments: Packed model and arguments.
        given: Checked values, in the layout users see.
        args, kwargs: As the user passed them.
        coords: Labels by dimension name.
    """

    model: Model
    program: Program
    arguments: Arguments
    given: dict[str, Given]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    coords: dict[str, list[Any]]

    @property
    def latents(self) -> dict[str, SiteInfo]:
        """The sites to infer: not observed, or only in part."""
        return {
            a: s
            for a, s in self.program.latents.items()
            if a not in self.given or self.given[a].mask is not None
        }

    def is_all_observed(self, address: str) -> bool:
        """Whether a partly observed site turns out to have nothing hidden."""
        given = self.given.get(address)
        mask = None if given is None else given.mask
        return mask is not None and _jax.is_concrete(mask) and bool(np.all(mask))

    @property
    def is_traced(self) -> bool:
        """Whether data or arguments are tracers, as under an outer `jax.vmap`."""
        leaves = jax.tree.leaves((self.arguments.dynamic, self.given))
        return any(isinstance(x, jax.core.Tracer) for x in leaves)

    def require_continuous(self, name: str) -> None:
        """Gradient methods need continuous latents.

        Raises:
            DiscreteLatent: One is discrete.
        """
        for address, info in self.latents.items():
            if info.is_discrete and not self.is_all_observed(address):
                raise DiscreteLatent(
                    f"{name} needs gradients, but site {address!r} ({info.site.where}) is "
                    f"{info.family}, shape {info.shape}. Sum it out by hand with ab.factor and "
                    f"jax.scipy.special.logsumexp, or attach ab.mh or ab.importance instead."
                )

    def require_latents(self, name: str) -> None:
        """There must be something to infer.

        Raises:
            InvalidAlgorithm: Every site is observed, or there is none.
        """
        if not self.latents:
            what, remedy = "has no sites", 'Add ab.sample("theta", ...)'
            if self.program.of_kind("sample"):
                what, remedy = "has no latent site left", "Observe fewer of its sites"
            raise InvalidAlgorithm(
                f"{name}: `{self.program.name}` {what}, so there is nothing to infer. {remedy}, or "
                f"score it with m.log_density(choices, ...)."
            )

    def culprit(self, lost: Mapping[str, Any]) -> str:
        """Names the site to blame where no draw has a density.

        Args:
            lost: By address, in which draws the site's log density is not finite.
        """
        counts = {a: int(np.sum(lost[a])) for a in self.program.sites if a in lost}
        address = max(counts, key=lambda a: counts[a])  # the first of equals
        info = self.program.sites[address]
        what = "observed site" if info.observed or address in self.given else "site"
        return (
            f"the log density of {what} {address!r} ({info.family}, {info.site.where}) is -inf or "
            f"NaN in {counts[address]} of {np.size(lost[address])}"
        )


def lost_sites(trace: Any) -> dict[str, Any]:
    """By address, whether a site's log density is not finite somewhere."""
    return {a: ~jnp.all(jnp.isfinite(x)) for a, x in trace.scores.items()}


def make_problem(
    model: Model,
    args: tuple[Any, ...],
    given: Mapping[str, Any] | None,
    kwargs: dict[str, Any],
    name: str | None,
) -> Problem:
    """Stages the model and checks the data.

    `coords=` is taken out of the keyword arguments unless the model has such an argument.

    Args:
        name: Of the algorithm, for messages; None if no density is needed.
    """
    kwargs = dict(kwargs)
    coords: dict[str, list[Any]] = {}
    data = given.values() if isinstance(given, Mapping) else ()
    for value in [*args, *kwargs.values(), *data]:
        coords.update(labels_of(value))
    named = {}
    if "coords" in kwargs and not accepts(model, "coords"):
        named = _as_coords(kwargs.pop("coords"))
    bare = model if model.algorithm is None else model.with_algorithm(None)
    program, arguments = bare._stage(args, kwargs)
    checked = prepare_given(program, given)
    if name is not None:
        require_density(program, name)
    _check_names(program, named)
    coords = {k: [_as_label(x) for x in v] for k, v in {**coords, **named}.items()}
    _check_lengths(program, coords)
    return Problem(bare, program, arguments, checked, args, kwargs, coords)


def accepts(model: Any, name: str, *, or_any: bool = False) -> bool:
    """Whether a model's function has an argument of this name (or, with `or_any`, takes any)."""
    while hasattr(model, "base"):
        model = model.base
    fn = getattr(model, "fn", model.emit)
    parameters = inspect.signature(fn).parameters
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return name in parameters or (or_any and is_open)


def _as_coords(coords: Any) -> dict[str, list[Any]]:
    if coords is not None and not isinstance(coords, Mapping):
        raise InvalidValue(
            f"coords is a dict of labels by dimension name, got {type(coords).__name__}. Write "
            f'coords={{"school": names}}.'
        )
    return {k: list(v) for k, v in (coords or {}).items()}


def _as_label(x: Any) -> Any:
    """A label as a plain Python value, fit for the static part of a posterior; dates as text."""
    if not isinstance(x, np.generic):
        return x
    return str(x) if x.dtype.kind in "mM" else x.item()


def _check_names(program: Program, coords: dict[str, list[Any]]) -> None:
    known = list(dict.fromkeys(d for s in program.sites.values() for d in s.dims if d))
    for dim in coords:
        if dim not in known:
            raise InvalidValue(
                f'coords["{dim}"] names no dimension of `{program.name}` '
                f"({', '.join(known) or 'it names none'}).{suggest(dim, known)} Dimensions are "
                f'named by jax.vmap(..., axis_name="{dim}") and ab.sample(..., dims="{dim}").'
            )


def _check_lengths(program: Program, coords: dict[str, list[Any]]) -> None:
    for info in program.sites.values():
        for dim, length in zip(info.dims, info.shape, strict=True):
            if dim in coords and len(coords[dim]) != length:
                raise InvalidValue(
                    f'coords["{dim}"] has {len(coords[dim])} labels, but site '
                    f"{info.address!r} has length {length} along {dim!r}."
                )
