"""Partly observed values."""

from __future__ import annotations

from typing import Any

import equinox as eqx

from abduce.errors import InvalidValue
from abduce.ppl.data import as_data

__all__ = ["Masked", "masked"]


class Masked(eqx.Module):
    """Values of which only some are observed; made by `ab.masked`."""

    values: Any
    observed: Any


def masked(values: Any, observed: Any) -> Masked:
    """Values that are observed where `observed` is true, and inferred elsewhere.

    Args:
        values: Full-shape data. Hidden entries may be anything, NaN included.
        observed: Boolean mask over the site's mapped and batch dimensions (not inside an event).

    Returns:
        A value for `given` or `obs=`.

    Raises:
        InvalidValue: The mask is not boolean.

    Example:
        >>> import jax.numpy as jnp, abduce as ab
        >>> y = jnp.array([1.0, jnp.nan, 2.0])
        >>> given = {"y": ab.masked(y, observed=~jnp.isnan(y))}
    """
    observed = as_data(observed)
    if observed.dtype != bool:
        raise InvalidValue(
            f"ab.masked: observed must be boolean, got dtype {observed.dtype}. For NaN-coded gaps "
            f"use ab.masked(y, observed=~jnp.isnan(y))."
        )
    return Masked(as_data(values), observed)
