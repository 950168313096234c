"""Contexts and queries as users pass them: checked, padded, and read once for many queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from abduce.amortized.pfn_network import PFNNetwork
from abduce.amortized.pfn_sites import Table, features
from abduce.amortized.predictive import Predictive
from abduce.errors import InvalidValue, MissingData, UnknownAddress, suggest
from abduce.inference.warning import warn
from abduce.ppl import _jax
from abduce.ppl.data import as_data
from abduce.ppl.masked import Masked

__all__ = ["Cache", "Points", "read_context", "read_query"]


class Points(eqx.Module):
    """Checked points.

    Attributes:
        values: By address, float, `(num, ...)`; NaN is missing.
        num: How many.
    """

    values: dict[str, Any]
    num: int = eqx.field(static=True)

    def padded(self, size: int) -> dict[str, Any]:
        """Values with `size` points; the new ones are zero."""
        return {
            a: jnp.pad(x, [(0, size - self.num)] + [(0, 0)] * (x.ndim - 1))
            for a, x in self.values.items()
        }


def padded_size(num: int) -> int:
    """Programs are compiled for few sizes: powers of two from 8 on, then multiples of 1024."""
    if num <= 8:
        return 8
    return 1 << (num - 1).bit_length() if num <= 1024 else -(-num // 1024) * 1024


def read_context(table: Table, context: Any) -> Points:
    """Checks a context; see `PFN.predict`."""
    if context is None or (isinstance(context, Mapping) and not context):
        dtype = jnp.result_type(float)
        empty = {a: jnp.zeros((0, *table.column(a).shape), dtype) for a in table.context}
        return Points(empty, 0)
    points = _read(table, context, table.context, "context")
    if points.num > table.num_points:
        warn([
            f"pfn: a context of {points.num} points; trained on data sets of "
            f"{table.num_points}. Train on larger ones to rely on this."
        ])  # fmt: skip
    return points


def read_query(table: Table, query: Any) -> Points | None:
    """Checks a query; None where points have no inputs, or only global targets are asked for."""
    if query is None or (isinstance(query, Mapping) and not query):
        if table.targets and table.inputs:
            raise MissingData(
                f"pfn: the query has no {', '.join(map(repr, table.inputs))}. To predict "
                f"{', '.join(map(repr, table.targets))}, pass "
                f'{{"{table.inputs[0]}": ...}} of the points to predict, shape (num_queries, ...).'
            )
        return None
    if not table.inputs or not table.targets:
        raise InvalidValue(
            "pfn: this pfn predicts "
            + ("the next point, which has no inputs" if table.targets else "global sites alone")
            + "; call pfn.predict(context) without a query."
        )
    return _read(table, query, table.inputs, "query")


def _read(table: Table, given: Any, addresses: tuple[str, ...], role: str) -> Points:
    if not isinstance(given, Mapping):
        raise InvalidValue(
            f"pfn: the {role} is a dict of values by address, got {type(given).__name__}. Write "
            f'{{"{addresses[0]}": ...}}.'
        )
    for a in given:
        if a not in addresses:
            if role == "query" and a in table.targets:
                raise InvalidValue(
                    f"pfn: query[{a!r}] is what is predicted. Leave it out; to score it, use "
                    f"pfn.predict(context, query).log_prob(value)."
                )
            raise UnknownAddress(
                f"pfn: {role}[{a!r}] is not read by this pfn of `{table.model_name}`; its {role} "
                f"has {', '.join(addresses)}.{suggest(str(a), addresses)}"
            )
    lacking = [a for a in addresses if a not in given]
    if lacking:
        raise MissingData(
            f"pfn: {role} has no {lacking[0]!r}; it needs {', '.join(addresses)}, each with one "
            f"row per point."
        )
    values = {a: _column_of(table, a, given[a], role) for a in addresses}
    lengths = {a: x.shape[0] for a, x in values.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidValue(
            f"pfn: {role} sites have different numbers of points: "
            f"{', '.join(f'{a} {values[a].shape}' for a in values)}. Pass one row per point."
        )
    return Points(values, next(iter(lengths.values())))


def _column_of(table: Table, address: str, value: Any, role: str) -> Any:
    column, label = table.column(address), f"pfn: {role}[{address!r}]"
    observed = None
    if isinstance(value, Masked):
        value, observed = value.values, value.observed
    value = as_data(value)
    shape = np.shape(value)
    if len(shape) != 1 + len(column.shape) or shape[1:] != column.shape:
        want = ", ".join(map(str, ("num_points", *column.shape)))
        raise InvalidValue(
            f"{label} has shape {shape}, expected ({want}{',' if not column.shape else ''}). "
            f"Points lie along the first axis; for several data sets, use jax.vmap."
        )
    dtype = jnp.result_type(float)
    x = jnp.array(value, dtype)  # a copy: what is read does not change later
    if observed is not None:
        if np.shape(observed) not in (shape, shape[:1]):
            raise InvalidValue(
                f"{label}: the mask has shape {np.shape(observed)}, expected {shape[:1]} or "
                f"{shape}."
            )
        observed = jnp.asarray(observed)
        observed = observed.reshape(observed.shape + (1,) * (x.ndim - observed.ndim))
        x = jnp.where(observed, x, jnp.nan)
    if _jax.is_concrete(x):
        _check_values(table, address, np.asarray(x), label)
    return x


def _check_values(table: Table, address: str, x: np.ndarray, label: str) -> None:
    column, missing = table.column(address), np.isnan(x)
    if missing.any() and not table.missing:
        first = tuple(int(i) for i in np.argwhere(missing)[0])
        raise MissingData(
            f"{label}, shape {x.shape}, has {int(missing.sum())} missing values (NaN) among "
            f"{x.size}, first at index {first}. Leave those points out, or train with "
            f"ab.pfn(..., missing=0.3) to predict with missing entries."
        )
    known = x[~missing]
    if np.isinf(known).any():
        raise InvalidValue(f"{label} has {int(np.isinf(known).sum())} infinite values.")
    if column.is_discrete and column.num_classes:
        high = column.low + column.num_classes - 1
        wrong = known != np.floor(known)
        wrong |= (known < column.low) & (not column.open_below)
        wrong |= (known > high) & (not column.open_above)
        if wrong.any():
            raise InvalidValue(
                f"{label} has the value {known[wrong][0]:g}, which is not among the integers "
                f"{column.low} to {high} that the prior's site takes."
            )


class Cache(eqx.Module):
    """A context that was read once; `pfn.cache` makes it.

    It holds what the network made of the context, and a copy of the context itself. Nothing in it
    changes: another context is another cache.

    Attributes:
        context: The context as it was read, by address.
    """

    network: PFNNetwork
    constants: dict[str, dict[str, Any]]
    keys_values: Any
    mask: Any
    context: dict[str, Any]
    is_single: bool = eqx.field(static=True)

    @classmethod
    def of(cls, network: PFNNetwork, constants: Any, points: Points, is_single: bool) -> Cache:
        """Reads a checked context."""
        size = padded_size(points.num)
        mask = jnp.arange(size) < points.num
        keys_values = _encode(network, constants, points.padded(size), mask)
        return cls(network, constants, keys_values, mask, points.values, is_single)

    def predict(self, query: Any = None) -> Any:
        """Predictive distributions, as `PFN.predict`."""
        table = self.network.table
        points = read_query(table, query)
        values, num = (None, 1) if points is None else (points.values, points.num)
        if points is not None:
            values = points.padded(padded_size(num))
        out = _decode(self.network, self.constants, self.keys_values, self.mask, values)
        if points is not None:
            out = {a: _first(d, num) if a in table.targets else d for a, d in out.items()}
        names = (*table.targets, *table.latents)
        return out[names[0]] if self.is_single else {a: out[a] for a in names}


def _first(d: Predictive, num: int) -> Predictive:
    """The first `num` predictions; the others are padding."""
    arrays, settings = d.tree_flatten()
    arrays = tuple(x[:num] if x.ndim == d.logits.ndim else x for x in arrays)
    return type(d).tree_unflatten(settings, arrays)


@eqx.filter_jit
def _encode(network, constants, values, mask):
    there = jnp.ones(mask.shape, bool)
    tokens = network.tokens(features(network.table, constants, values, there), there)
    return network.encode(tokens, mask)


@eqx.filter_jit
def _decode(network, constants, keys_values, mask, values):
    table = network.table
    tokens = []
    if table.targets:
        num = 1 if values is None else next(iter(values.values())).shape[0]
        there = jnp.zeros(num, bool)
        tokens.append(network.tokens(features(table, constants, values or {}, there), there))
    tokens = jnp.concatenate([*tokens, network.latents])
    tokens = network.decode(tokens, keys_values, mask)
    out = {}
    first = tokens.shape[0] - len(table.latents)
    for a in table.targets:
        mine = tokens[0] if values is None else tokens[:first]
        out[a] = network.predict(a, mine, constants[a])
    for i, a in enumerate(table.latents):
        out[a] = network.predict(a, tokens[first + i], constants[a])
    return out
