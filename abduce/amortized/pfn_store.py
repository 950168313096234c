"""A prior-fitted network as named arrays and JSON, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from abduce.amortized.pfn_network import Architecture, PFNNetwork
from abduce.amortized.pfn_sites import Column, Table
from abduce.amortized.saving import blueprint, fill, named_arrays

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
    arrays = named_arrays(network, "network")
    for a, mine in constants.items():
        arrays.update({f"constants/{a}/{k}": np.asarray(x) for k, x in mine.items()})
    arrays.update({f"history/{k}": np.asarray(x) for k, x in history.items()})
    return arrays


def unpack(
    table: Table, architecture: Architecture, arrays: dict[str, Any], where: str
) -> tuple[PFNNetwork, dict[str, dict[str, Any]], dict[str, Any]]:
    """The inverse of `pack`: network, constants and history.

    Raises:
        LoadError: See `fill`.
    """
    constants: dict[str, dict[str, Any]] = {}
    for name, x in arrays.items():
        if name.startswith("constants/"):
            address, _, field = name[len("constants/") :].rpartition("/")
            constants.setdefault(address, {})[field] = x
    history = {k[len("history/") :]: x for k, x in arrays.items() if k.startswith("history/")}
    like = blueprint(lambda key: PFNNetwork(key, table, architecture), where)
    return fill(like, arrays, "network", where), constants, history
