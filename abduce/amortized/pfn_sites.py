"""Which sites of a prior over data sets a network reads, and which it predicts.

Points lie along the leading axis of every site in the context. A site is turned into features by
constants that are estimated from draws of the prior: standardized, or one-hot.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints

from abduce.amortized.networks import squash
from abduce.errors import InvalidAlgorithm, InvalidModel, UnknownAddress, suggest
from abduce.ppl.program import Program, SiteInfo

__all__ = ["Column", "Table", "features", "make_table"]

MAX_CLASSES = 1024
_ONE_HOT = 64  # at most; above, an integer is a feature like a real number


@dataclasses.dataclass(frozen=True)
class Column:
    """One site.

    Attributes:
        address: Its address.
        shape: Of one point's value; of the whole value for a global target.
        is_discrete: Whether its values are integers or booleans.
        low: The least class.
        num_classes: Of a discrete site; 0 where draws of the prior decide.
        open_below, open_above: Whether integers beyond the classes are possible.
        lower, upper: Ends of the support of a continuous site, or None.
        num_bars: Of a continuous target; draws that coincide make them fewer than asked for.
    """

    address: str
    shape: tuple[int, ...]
    is_discrete: bool
    low: int = 0
    num_classes: int = 0
    open_below: bool = False
    open_above: bool = False
    lower: float | None = None
    upper: float | None = None
    num_bars: int = 0

    @property
    def size(self) -> int:
        """Numbers per point."""
        return math.prod(self.shape)

    @property
    def one_hot(self) -> bool:
        """Whether it is read as one feature per class."""
        return self.is_discrete and 0 < self.num_classes <= _ONE_HOT


@dataclasses.dataclass(frozen=True)
class Table:
    """The sites of a prior, by role. Hashable.

    Attributes:
        model_name: For messages.
        num_points: Points of a simulated data set.
        context: Per-point sites that a context has.
        targets: Per-point sites that are predicted.
        latents: Global sites that are predicted.
        columns: All of them.
        missing: Whether there is a feature that says what is missing.
    """

    model_name: str
    num_points: int
    context: tuple[str, ...]
    targets: tuple[str, ...]
    latents: tuple[str, ...]
    columns: tuple[Column, ...]
    missing: bool

    @property
    def inputs(self) -> tuple[str, ...]:
        """What a query has: the context without the targets."""
        return tuple(a for a in self.context if a not in self.targets)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Everything that is simulated."""
        return tuple(c.address for c in self.columns)

    def column(self, address: str) -> Column:
        """The site with this address."""
        return next(c for c in self.columns if c.address == address)

    @property
    def num_features(self) -> int:
        """Length of a point's features."""
        return sum(self._width(self.column(a)) for a in self.context)

    def _width(self, column: Column) -> int:
        values = column.size * (column.num_classes if column.one_hot else 1)
        return values + (column.size if self.missing else 0)


def features(table: Table, constants: Any, values: dict[str, Any], in_context: Any) -> Any:
    """Features of points, `(num, table.num_features)`.

    Args:
        table: The sites.
        constants: By address, `center` and `spread` of what is standardized.
        values: By address, `(num, ...)`; NaN is missing. What is NaN though nothing may be missing
            makes NaN of everything, since it cannot raise an error in a compiled program.
        in_context: Boolean, `(num,)`: elsewhere targets are blank, and need not be in `values`.
    """
    num, dtype = in_context.shape[0], jnp.result_type(float)
    parts = []
    for address in table.context:
        column = table.column(address)
        if address in values:
            x = jnp.asarray(values[address]).astype(dtype).reshape(num, column.size)
        else:
            x = jnp.zeros((num, column.size), dtype)
        blank = ~in_context[:, None] & (address in table.targets)
        hidden = jnp.isnan(x) & ~blank if table.missing else jnp.zeros(x.shape, bool)
        absent = hidden | blank
        if column.one_hot:
            index = jnp.clip(x - column.low, 0, column.num_classes - 1)[..., None]
            hot = (index == jnp.arange(column.num_classes)).astype(dtype)
            hot = jnp.where(jnp.isnan(index), jnp.nan, hot)
            parts.append(jnp.where(absent[..., None], 0.0, hot).reshape(num, -1))
        else:
            mine = constants[address]
            z = (jnp.where(absent, mine["center"], x) - mine["center"]) / mine["spread"]
            parts.append(squash(z))
        if table.missing:
            parts.append(hidden.astype(dtype))
    return jnp.concatenate(parts, axis=1)


# ---------------------------------------------------------------------- made once


def make_table(
    program: Program,
    other: Program | None,
    context: Any,
    query: Any,
    missing: bool,
) -> Table:
    """Reads a staged prior.

    Args:
        program: The prior.
        other: The same with one more point, where that is possible: tells apart a global site
            whose length happens to be the number of points.
        context, query: Addresses, as the user gave them.
        missing: Whether entries may be missing.

    Raises:
        UnknownAddress, InvalidAlgorithm, InvalidModel: See the messages.
    """
    context, query = _addresses(context, "context"), _addresses(query, "query")
    for role, names in (("context", context), ("query", query)):
        for a in names:
            if a not in program.sites or program.sites[a].kind not in ("sample", "deterministic"):
                known = [
                    x for x, s in program.sites.items() if s.kind in ("sample", "deterministic")
                ]
                raise UnknownAddress(
                    f"ab.pfn: {role} {a!r} matches no site of `{program.name}` "
                    f"({', '.join(f'{x} {program.sites[x].shape}' for x in known)})."
                    f"{suggest(a, known)}"
                )
    lengths = {a: program.sites[a].shape[:1] for a in context}
    if len(set(lengths.values())) > 1 or () in lengths.values():
        shapes = ", ".join(f"{a} {program.sites[a].shape}" for a in context)
        raise InvalidAlgorithm(
            f"ab.pfn: the leading axis of every context site runs over the data points, but they "
            f"have shapes {shapes}. Leave out of context= what belongs to no point; it may be a "
            f"query."
        )
    num_points = lengths[context[0]][0]
    if num_points < 2:
        raise InvalidAlgorithm(
            f"ab.pfn: the data sets of `{program.name}` have {num_points} points; at least 2 are "
            f"needed, one to predict and one to learn from."
        )
    targets, latents = [], []
    for a in query:
        shape = program.sites[a].shape
        grows = other is None or other.sites[a].shape != shape
        per_point = a in context or (shape[:1] == (num_points,) and grows)
        (targets if per_point else latents).append(a)
    columns = [_column(program.sites[a], 1) for a in context]
    columns += [_column(program.sites[a], 1) for a in targets if a not in context]
    columns += [_column(program.sites[a], 0) for a in latents]
    for c in columns:
        if c.address in targets and c.shape:
            raise InvalidAlgorithm(
                f"ab.pfn: query {c.address!r} has {c.size} numbers per point (shape {c.shape}), "
                f"and a prediction of each alone would lose how they depend on each other. Write "
                f"it as scalar sites, query=[...] of those, which are predicted point by point."
            )
    return Table(
        program.name, num_points, tuple(context), tuple(targets), tuple(latents), tuple(columns),
        missing,
    )  # fmt: skip


def _addresses(x: Any, role: str) -> list[str]:
    found = [x] if isinstance(x, str) else list(x) if isinstance(x, Sequence) else None
    if not found or not all(isinstance(a, str) for a in found) or len(set(found)) < len(found):
        raise InvalidAlgorithm(
            f"ab.pfn: {role}= takes an address or a list of different ones, got {x!r}."
        )
    return found


def _column(info: SiteInfo, lead: int) -> Column:
    support: Any = info.site.spec.support if info.site.spec is not None else None
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    shape = info.shape[lead:]
    if jax.dtypes.issubdtype(info.dtype, jax.dtypes.prng_key) or jnp.issubdtype(
        info.dtype, jnp.complexfloating
    ):
        raise InvalidModel(f"ab.pfn: site {info.address!r} has dtype {info.dtype}, not numbers.")
    if not info.is_discrete:
        lower, upper = _end(support, "lower_bound"), _end(support, "upper_bound")
        if support is constraints.simplex:
            lower, upper = 0.0, 1.0
        return Column(info.address, shape, False, lower=lower, upper=upper)
    if info.dtype == jnp.bool_ or support is constraints.boolean:
        return Column(info.address, shape, True, 0, 2)
    low, high = _end(support, "lower_bound"), _end(support, "upper_bound")
    if low is None or high is None or high - low >= MAX_CLASSES:
        # what stands in `low` is replaced when draws are seen; a known end stays closed
        return Column(
            info.address, shape, True, int(low or 0), 0, open_below=low is None, open_above=True
        )
    return Column(info.address, shape, True, int(low), int(high - low) + 1)


def _end(support: Any, name: str) -> float | None:
    """An end of a support that is a number, the same for all elements."""
    try:
        value = np.unique(np.asarray(getattr(support, name, None), np.float64))
    except (TypeError, ValueError, jax.errors.JAXTypeError):
        return None
    return float(value[0]) if value.size == 1 and np.isfinite(value[0]) else None
