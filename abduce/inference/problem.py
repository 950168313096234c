"""What an algorithm is given: a staged model with checked data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from abduce.errors import DiscreteLatent, InvalidAlgorithm
from abduce.ppl.data import labels_of
from abduce.ppl.model import Model
from abduce.ppl.operations import prepare_given, require_density
from abduce.ppl.program import Arguments, Program, SiteInfo
from abduce.ppl.replay import Given

__all__ = ["Problem", "make_problem"]


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
            if info.is_discrete:
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
            what = "has no sites" if not self.program.sites else "has no latent site left"
            raise InvalidAlgorithm(
                f"{name}: `{self.program.name}` {what}, so there is nothing to infer. Add "
                f'ab.sample("theta", ...), or score it with m.log_density(choices, ...).'
            )


def make_problem(
    model: Model,
    args: tuple[Any, ...],
    given: Mapping[str, Any] | None,
    kwargs: dict[str, Any],
    name: str,
) -> Problem:
    """Stages the model and checks the data.

    `coords=` is taken out of the keyword arguments unless the model has such an argument.
    """
    kwargs = dict(kwargs)
    coords: dict[str, list[Any]] = {}
    for value in [*args, *kwargs.values(), *(given or {}).values()]:
        coords.update(labels_of(value))
    if "coords" in kwargs and not _accepts(model, "coords"):
        coords.update({k: list(v) for k, v in (kwargs.pop("coords") or {}).items()})
    bare = model if model.algorithm is None else model.with_algorithm(None)
    program, arguments = bare._stage(args, kwargs)
    checked = prepare_given(program, given)
    require_density(program, name)
    _check_coords(program, coords)
    return Problem(bare, program, arguments, checked, args, kwargs, coords)


def _accepts(model: Any, name: str) -> bool:
    import inspect

    fn = getattr(model, "fn", None)
    return fn is not None and name in inspect.signature(fn).parameters


def _check_coords(program: Program, coords: dict[str, list[Any]]) -> None:
    for info in program.sites.values():
        for dim, length in zip(info.dims, info.shape, strict=True):
            if dim in coords and len(coords[dim]) != length:
                raise InvalidAlgorithm(
                    f'coords["{dim}"] has {len(coords[dim])} labels, but site '
                    f"{info.address!r} has length {length} along {dim!r}."
                )


def as_numpy(tree: Any) -> Any:
    """Copies arrays to the host."""
    return jax.tree.map(np.asarray, tree)
