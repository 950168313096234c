"""What counts as data: arrays, numbers, lists, pandas and xarray objects."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidValue

__all__ = ["as_data", "labels_of"]


def as_data(x: Any) -> Any:
    """Turns data into an array that JAX takes.

    Args:
        x: An array, a number, a (nested) list or tuple of numbers, or a pandas or xarray object.

    Returns:
        A JAX or NumPy array (arrays and tracers pass through).

    Raises:
        InvalidValue: It holds something else than numbers.
    """
    if isinstance(x, (jax.Array, jax.core.Tracer)):
        return x
    if hasattr(x, "to_numpy"):  # pandas, xarray, polars
        x = x.to_numpy()
    if isinstance(x, (list, tuple)) and any(
        isinstance(leaf, (jax.Array, jax.core.Tracer)) for leaf in jax.tree.leaves(x)
    ):
        return jnp.asarray(x)
    array = np.asarray(x)
    if array.dtype == object or array.dtype.kind in "USmM":
        raise InvalidValue(
            f"data must be numbers, got {type(x).__name__} with dtype {array.dtype}. Encode text "
            f"and dates as numbers first, for example pandas.Categorical(x).codes."
        )
    return array


def labels_of(x: Any) -> dict[str, list[Any]]:
    """Labels of the named dimensions of a pandas or xarray object; empty for others."""
    if hasattr(x, "coords") and hasattr(x, "dims"):  # xarray
        return {str(k): list(v.values) for k, v in x.coords.items() if k in x.dims}
    index = getattr(x, "index", None)
    name = getattr(index, "name", None)
    if index is not None and name is not None and hasattr(x, "iloc"):
        return {str(name): list(index)}
    return {}
