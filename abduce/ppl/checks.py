"""Checks of values at the boundary: dtypes, NaN, supports, masks, distribution parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints

from abduce.errors import InvalidModel, InvalidValue, MissingData
from abduce.ppl import _jax
from abduce.ppl.site import Site

__all__ = [
    "check_finite",
    "check_parameters",
    "check_support",
    "checked_mask",
    "coerce",
    "is_whole_space",
]


def checked_mask(site: Site, mask: Any, where: str) -> Any:
    """A mask of the site's batch shape; a mask inside an event is refused."""
    shape = jnp.shape(mask)
    if shape == site.full_shape and site.event_dim and site.axis_sizes + site.batch_shape != shape:
        raise InvalidValue(
            f"masked value of site {site.address!r} ({where}): the mask has shape {shape}, which "
            f"reaches inside one event of {site.spec.family if site.spec else ''}, shape "
            f"{site.shape[len(site.batch_shape) :]}. Its conditional has no general form; observe "
            f"whole events (mask shape {site.axis_sizes + site.batch_shape}), or write the event "
            f"as several sites."
        )
    want = site.axis_sizes + site.batch_shape
    if shape != want:
        raise InvalidValue(
            f"masked value of site {site.address!r} ({where}): the mask has shape {shape}, "
            f"expected {want}."
        )
    return jnp.asarray(mask, bool)


def check_parameters(address: str, d: Any, where: str) -> None:
    """Distribution parameters that are known now must lie in their constraints."""
    for name, constraint in getattr(type(d), "arg_constraints", {}).items():
        value = d.__dict__.get(name)
        if value is None or not isinstance(value, (int, float, np.ndarray, np.generic)):
            continue  # traced, or on a device: checked by the densities it gives
        if constraints.is_dependent(constraint) or isinstance(value, bool):
            continue
        ok = np.asarray(constraint(np.asarray(value)))
        if not ok.all():
            raise InvalidModel(
                f"site {address!r} ({where}): {type(d).__name__} got {name}={value}, which must "
                f"satisfy {constraint}."
            )


def coerce(value: Any, dtype: Any, address: str, *, what: str) -> Any:
    """Casts data to the site's dtype where that loses nothing; otherwise an error."""
    have = jnp.result_type(value)
    dtype = jnp.dtype(dtype)
    if jax.dtypes.issubdtype(have, jax.dtypes.prng_key):
        raise InvalidValue(f"{what} is a random key, expected {dtype} values.")
    if jnp.issubdtype(dtype, jnp.inexact) or have == dtype:
        return value if have == dtype else jnp.asarray(value).astype(dtype)
    if have == jnp.bool_ or jnp.issubdtype(have, jnp.integer):
        if dtype == jnp.bool_ and _jax.is_concrete(value) and not np.isin(value, (0, 1)).all():
            raise InvalidValue(f"{what} has values other than 0 and 1.")
        return jnp.asarray(value).astype(dtype)
    if _jax.is_concrete(value):
        rounded = np.asarray(value)
        finite = np.isfinite(rounded)
        if (rounded[finite] == np.floor(rounded[finite])).all():
            return jnp.asarray(np.where(finite, rounded, 0)).astype(dtype)
        raise InvalidValue(
            f"{what} must be whole numbers ({dtype}), got {have} with fractional values."
        )
    raise InvalidValue(
        f"{what} must have dtype {dtype}, got {have}. Convert it: x.astype({dtype.name!r})."
    )


def check_finite(value: Any, address: str, mask: Any, what: str) -> None:
    """NaN in observed data is an error (where it is known now and not masked)."""
    if not _jax.is_concrete(value) or (mask is not None and not _jax.is_concrete(mask)):
        return
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.inexact):
        return
    bad = np.isnan(array)
    if mask is not None:
        bad &= np.asarray(mask).reshape(np.shape(mask) + (1,) * (array.ndim - np.ndim(mask)))
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise MissingData(
            f"{what} has {int(bad.sum())} NaN among {array.size} values, first at index {first}. "
            f'To infer those, pass {{"{address}": ab.masked(y, observed=~jnp.isnan(y))}}.'
        )


def check_support(spec: Any, value: Any, mask: Any, what: str) -> None:
    """Observed data outside a support that is known now is an error."""
    support = spec.support
    if support is None or is_whole_space(support) or not _jax.is_concrete(value):
        return
    if mask is not None and not _jax.is_concrete(mask):
        return
    ok = np.asarray(support(np.asarray(value)))
    if mask is not None:
        m = np.asarray(mask)
        while ok.ndim > m.ndim:
            ok = ok.all(-1)
        ok = ok | ~m
    if not ok.all():
        first = tuple(int(i) for i in np.argwhere(~ok)[0])
        shown = np.asarray(value)[first] if first else np.asarray(value)
        raise InvalidValue(
            f"{what}: value {shown} at index {first} is outside the support of "
            f"{spec.family} ({support}); {int((~ok).sum())} of {ok.size} values are. Correct "
            f"the data, or use a distribution with a wider support."
        )


def is_whole_space(support: Any) -> bool:
    """Whether a support is the real numbers, in any shape."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector, constraints.real_matrix)
