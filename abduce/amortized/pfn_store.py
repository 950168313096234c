"""A prior-fitted network as named arrays and JSON, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.pfn_network import Architecture, PFNNetwork
from abduce.amortized.pfn_sites import Column, Table
from abduce.inference.persistence import LoadError

__all__ = ["pack", "table_from", "table_to", "unpack"]


def table_to(table: Table) -> dict[str, Any]:
    """A table as nested dicts, lists and numbers."""
    out = dataclasses.asdict(table)
    out["columns"] = [{**c, "shape": list(c["shape"])} for c in out["columns"]]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items()}


def table_from(stored: Mapping[str, Any]) -> Table:
    """The inverse of `table_to`."""
    columns = tuple(Column(**{**c, "shape": tuple(c["shape"])}) for c in stored["columns"])
    rest: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    return Table(**{**rest, "columns": columns})


def pack(network: PFNNetwork, constants: Any, history: Any) -> dict[str, np.ndarray]:
    """Everything that is an array, by name."""
    arrays = {name: np.asarray(x) for name, x in _named(network).items()}
    for a, mine in constants.items():
        arrays.update({f"constants/{a}/{k}": np.asarray(x) for k, x in mine.items()})
    arrays.update({f"history/{k}": np.asarray(x) for k, x in history.items()})
    return arrays


def unpack(
    table: Table, architecture: Architecture, arrays: Mapping[str, Any]
) -> tuple[PFNNetwork, dict[str, dict[str, Any]], dict[str, Any]]:
    """The inverse of `pack`: network, constants and history.

    Raises:
        LoadError: A weight is missing, or has another shape.
    """
    constants: dict[str, dict[str, Any]] = {}
    for name, x in arrays.items():
        if name.startswith("constants/"):
            address, _, field = name[len("constants/") :].rpartition("/")
            constants.setdefault(address, {})[field] = x
    history = {k[len("history/") :]: x for k, x in arrays.items() if k.startswith("history/")}
    return _network(table, architecture, arrays), constants, history


def _network(table: Table, architecture: Architecture, arrays: Mapping[str, Any]) -> PFNNetwork:
    """A network with stored weights."""
    try:
        template = eqx.filter_eval_shape(lambda: PFNNetwork(jax.random.key(0), table, architecture))
    except Exception as e:  # garbled sizes and names fail in as many ways as there are layers
        raise LoadError(f"config.json describes no network ({e!r}).") from e
    found = []
    for name, x in _named(template).items():
        if name not in arrays:
            raise LoadError(f"the saved pfn lacks the weights {name!r}.")
        if np.shape(arrays[name]) != x.shape:
            raise LoadError(
                f"the saved pfn has weights {name!r} of shape {np.shape(arrays[name])}, expected "
                f"{x.shape}."
            )
        found.append(jnp.asarray(arrays[name]))
    leaves, treedef = jax.tree.flatten(template)
    is_array = [hasattr(x, "shape") for x in leaves]
    it = iter(found)
    return jax.tree.unflatten(
        treedef, [next(it) if a else x for x, a in zip(leaves, is_array, strict=True)]
    )


def _named(tree: Any) -> dict[str, Any]:
    """Array leaves by path, in the order of `jax.tree.leaves`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"network" + jax.tree_util.keystr(path): x for path, x in flat if hasattr(x, "shape")}
