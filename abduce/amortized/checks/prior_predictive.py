"""Pairs of true values and data, drawn from a model's prior predictive distribution."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from abduce.amortized.posing import as_arguments
from abduce.errors import (
    InvalidModel,
    InvalidValue,
    MissingData,
    UnknownAddress,
    suggest,
)
from abduce.ppl.model import Model
from abduce.ppl.program import pack

__all__ = ["PriorPredictive", "simulate_data", "simulate_pairs"]


@dataclass(frozen=True, eq=False)
class PriorPredictive:
    """True values and data sets.

    Attributes:
        truths: Latents by address, `(dataset, ...)`; `-inf` in a branch that was not taken.
        observed: Data by address, `(dataset, ...)`.
        conditional: Latents in branches, with their own dtype.
        args, kwargs: The model's arguments, where all data sets share them.
        designs: What the Model of designs returned, with a leading axis `dataset`; or None.
        num_datasets: How many.
        name: The model's.
    """

    truths: dict[str, np.ndarray]
    observed: dict[str, np.ndarray]
    conditional: dict[str, Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    designs: Any
    num_datasets: int
    name: str

    @property
    def size(self) -> int:
        """Numbers in one draw of the latents."""
        return sum(int(np.prod(x.shape[1:])) for x in self.truths.values())

    def arguments(self, design: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's arguments for what the Model of designs returned."""
        return (self.args, self.kwargs) if self.designs is None else as_arguments(design)

    def dataset(self, i: int) -> tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Arguments, keyword arguments, data and true values of one data set."""
        design = jax.tree.map(lambda x: x[i], self.designs)
        given = {a: x[i] for a, x in self.observed.items()}
        return *self.arguments(design), given, {a: x[i] for a, x in self.truths.items()}

    def hidden(self, address: str, x: np.ndarray, active: np.ndarray | None) -> np.ndarray:
        """Values of a latent, `-inf` where it is in a branch that was not taken.

        Args:
            address: Of the latent.
            x: Values with any leading axes.
            active: Where it counts, with the same leading axes.
        """
        if address not in self.conditional:
            return x
        x = np.asarray(x, np.float64)
        if active is None:
            return np.where(np.isnan(x), -np.inf, x)
        on = np.reshape(active, np.shape(active) + (1,) * (x.ndim - np.ndim(active)))
        return np.where(on, x, -np.inf)

    def visible(self, points: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The opposite of `hidden`, as the model's density takes it."""
        return {
            a: np.where(np.isneginf(x), 1, x).astype(self.conditional[a])
            if a in self.conditional else x
            for a, x in points.items()
        }  # fmt: skip


def simulate_pairs(
    model: Any,
    key: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observed: Sequence[str] | str | None,
    num_datasets: int,
    designs: Any,
    algorithm: Any = None,
) -> PriorPredictive:
    """Draws true values and data. See `run_calibration`."""
    if not isinstance(model, Model):
        raise InvalidModel(
            f"checks: the first argument is a model, got {type(model).__name__}. Decorate the "
            f"function with @ab.model."
        )
    bare = model.with_algorithm(None) if model.algorithm is not None else model
    if designs is not None:
        if args or kwargs or not isinstance(designs, Model):
            raise InvalidValue(
                "checks: designs= is a Model that returns the arguments, so it replaces them. Pass "
                "either designs= or arguments."
            )
        design = designs.simulate(jax.random.key(0)).retval
        shapes_args, shapes_kwargs = as_arguments(design)
    else:
        shapes_args, shapes_kwargs = args, kwargs
    program = bare.program(*shapes_args, **shapes_kwargs)
    addresses = _observed(program, observed, algorithm)
    _require_drawable(program)
    latents = tuple(a for a in program.latents if a not in addresses)
    if not latents:
        raise InvalidValue(
            f"checks: every site of `{program.name}` is observed, so there is no posterior."
        )
    # without designs, the arguments are packed with the model; else, the model with the designs
    packed = pack(bare, args, kwargs) if designs is None else pack(designs, (bare,), {})
    keys = jax.random.split(key, num_datasets)
    drawn = _draw(latents, addresses, designs is not None, packed, keys)
    truths, active, data, retvals = jax.tree.map(np.asarray, drawn)
    sites = program.sites
    conditional = {a: np.dtype(sites[a].dtype) for a in latents if sites[a].conditional}
    pairs = PriorPredictive(
        {}, data, conditional, args, kwargs, retvals, num_datasets, program.name
    )
    for address in latents:  # in the model's order; a pytree sorts by address
        pairs.truths[address] = pairs.hidden(address, truths[address], active.get(address))
    for address, x in data.items():
        if np.issubdtype(x.dtype, np.inexact) and np.isnan(x).any():
            raise InvalidModel(
                f"checks: the model's own data at {address!r} hold NaN in "
                f"{int(np.isnan(x.reshape(len(x), -1)).any(1).sum())} of {num_datasets} data sets. "
                f"Look for invalid operations in `{program.name}`."
            )
    return pairs


def simulate_data(
    model: Any, key: Any, args: Any, kwargs: Any, observed: Sequence[str], num: int
) -> dict[str, np.ndarray]:
    """Prior-predictive data by address, `(dataset, ...)`."""
    return simulate_pairs(model, key, args, kwargs, observed, num, None).observed


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _draw(latents, addresses, is_designed, packed, keys):
    def one(key):
        if is_designed:
            designs, (model,), _ = packed.unpack()
            key_design, key = jax.random.split(key)
            design = designs.simulate(key_design).retval
            args, kwargs = as_arguments(design)
        else:
            (model, args, kwargs), design = packed.unpack(), None
        return (*_read(model.simulate(key, *args, **kwargs), latents, addresses), design)

    return jax.vmap(one)(keys)


def _read(trace, latents, addresses):
    active = {a: x for a, x in trace.active.items() if a in latents}
    return (
        {a: trace.choices[a] for a in latents},
        active,
        {a: trace.choices[a] for a in addresses},
    )


def _observed(program: Any, observed: Any, algorithm: Any) -> tuple[str, ...]:
    if observed is None:
        observed = getattr(algorithm, "observed", None)
    choices = [a for a, s in program.sites.items() if s.kind == "sample" and not s.observed]
    if not observed:
        raise MissingData(
            f"checks: which sites of `{program.name}` are data? Pass observed=[...], some of "
            f"{', '.join(choices) or 'none: it has no choices'}."
        )
    addresses = (observed,) if isinstance(observed, str) else tuple(observed)
    for address in addresses:
        if address not in choices:
            raise UnknownAddress(
                f"checks: observed={address!r} is no choice of `{program.name}` "
                f"({', '.join(choices)}).{suggest(address, choices)}"
            )
        if program.sites[address].conditional:
            raise InvalidModel(
                f"checks: the observed site {address!r} is in a branch, so data sets have "
                f"different sites. Observe it outside the branch."
            )
    return addresses


def _require_drawable(program: Any) -> None:
    """Draws of the model must follow its density."""
    remedy = "Checks draw data sets from the model, so its density must be that of its draws."
    for address, info in program.sites.items():
        if info.kind == "sample" and info.observed:
            raise InvalidModel(
                f"checks: site {address!r} ({info.site.where}) is observed inside "
                f"`{program.name}` (obs=, or ab.condition), so new data cannot be drawn. Leave "
                f"obs= out and name it in observed=[...]."
            )
        if info.kind == "factor":
            raise InvalidModel(
                f"checks: `{program.name}` has the factor {address!r} ({info.site.where}), which "
                f"draws do not follow. {remedy}"
            )
        if "scale" in info.site.roles:
            raise InvalidModel(
                f"checks: the density of site {address!r} ({info.site.where}) is scaled "
                f"(ab.scaled), which draws do not follow. {remedy}"
            )
