"""What a prior-fitted network is trained on: data sets from the prior, split at a random size."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.bars import equal_mass_borders
from abduce.amortized.pfn_network import PFNNetwork, prior_mass
from abduce.amortized.pfn_sites import MAX_CLASSES, Column, Table, features
from abduce.amortized.predictive import Mixture
from abduce.errors import InvalidAlgorithm, InvalidValue, MissingData
from abduce.ppl.data import as_data
from abduce.ppl.graph import graph_of
from abduce.ppl.operations import outside_scopes, run_program
from abduce.ppl.program import Arguments, Program, stage_packed
from abduce.ppl.replay import Given, Replay

__all__ = [
    "PFNTask",
    "estimate_constants",
    "num_draws",
    "redrawable",
    "simulate",
    "stored_sets",
]

_DRAWS = 1_000_000  # numbers of a site that borders and scales are estimated from
_SETS = (2048, 16384)  # least and most data sets for that


@dataclasses.dataclass(frozen=True)
class PFNTask:
    """See `training.Task`. `data` is `{"arguments": ..., "constants": ...}`.

    Attributes:
        table: The sites.
        redrawn: Targets of which each simulation gives `num_redraws` more values, with every
            latent kept. They are exact draws of the same predictive distribution, so the loss
            keeps its mean, and the noise of the observations is averaged out of its gradient.
        num_redraws: How many.
        shuffle: Whether points are put in a random order before they are split.
        missing: Largest fraction of entries that is hidden.
    """

    table: Table
    redrawn: tuple[str, ...] = ()
    num_redraws: int = 0
    shuffle: bool = False
    missing: float = 0.0

    def simulate(self, key: Any, num: int, data: Any) -> dict[str, Any]:
        """`num` data sets: values by address, and `values` redrawn ones under "again"."""
        keys = jax.random.split(key, num)
        return jax.vmap(lambda k: self._one(k, data["arguments"]))(keys)

    def _one(self, key: Any, arguments: Arguments) -> dict[str, Any]:
        k1, k2 = jax.random.split(key)
        values, program = _run(k1, arguments)
        out: dict[str, Any] = {"values": {a: values[a] for a in self.table.addresses}}
        if self.redrawn:
            given = {
                a: Given(values[a], trusted=True)
                for a, s in program.latents.items()
                if a not in self.redrawn
            }

            def again(key):
                fresh, _ = _run(key, arguments, given)
                return {a: fresh[a] for a in self.redrawn}

            out["again"] = jax.vmap(again)(jax.random.split(k2, self.num_redraws))
        return out

    def read(self, rows: Any, key: Any, data: Any) -> dict[str, Any]:
        """Stored data sets."""
        return {"values": {a: rows[a] for a in self.table.addresses}}

    def loss(self, network: PFNNetwork, key: Any, batch: Any, data: Any) -> Any:
        """Mean negative log probability per target, in nats."""
        num = len(jax.tree.leaves(batch)[0])

        def one(key, example):
            return self._loss(network, key, example, data["constants"])

        return jnp.mean(jax.vmap(one)(jax.random.split(key, num), batch))

    def _loss(self, network, key, example, constants):
        table, n = self.table, self.table.num_points
        k_size, k_order, k_rate, k_hide = jax.random.split(key, 4)
        values, again = example["values"], example.get("again", {})
        per_point = [a for a in table.addresses if a not in table.latents]
        if self.shuffle:
            order = jax.random.permutation(k_order, n)
            values = {a: x[order] if a in per_point else x for a, x in values.items()}
            again = {a: x[:, order] for a, x in again.items()}
        size = jnp.searchsorted(_sizes(n), jax.random.uniform(k_size), side="right")
        in_context = jnp.arange(n) < jnp.minimum(size, n - 1)

        shown = {a: jnp.asarray(values[a]).astype(jnp.result_type(float)) for a in table.context}
        if self.missing:
            rate = self.missing * jax.random.uniform(k_rate)
            for i, a in enumerate(table.context):
                hide = jax.random.bernoulli(jax.random.fold_in(k_hide, i), rate, shown[a].shape)
                shown[a] = jnp.where(hide, jnp.nan, shown[a])
        tokens = network.tokens(features(table, constants, shown, in_context), in_context)
        tokens = jnp.concatenate([tokens, network.latents])
        tokens = network.together(tokens, n, in_context)

        asked = n - jnp.sum(in_context)
        total: Any = 0.0
        for a in table.targets:
            d = network.predict(a, tokens[:n], constants[a])
            truth = again[a] if a in again else values[a][None]
            each = jnp.where(in_context, 0.0, jnp.mean(d.log_prob(truth), axis=0))
            total = total - jnp.sum(each) / asked
        for i, a in enumerate(table.latents):
            d = network.predict(a, tokens[n + i], constants[a])
            total = total - jnp.mean(d.log_prob(values[a]))
        return total / (len(table.targets) + len(table.latents))

    def explain(self, batch: Any) -> str:
        """Names the site that is not finite."""
        for a, x in batch["values"].items():
            bad = ~np.isfinite(np.asarray(x, np.float64))
            if bad.any():
                return (
                    f"draws of site {a!r} of `{self.table.model_name}` have {int(bad.sum())} "
                    f"values that are not finite. Correct the prior."
                )
        return "the simulations are finite, the network is not. Lower learning_rate=."


def _sizes(n: int) -> jax.Array:
    """Cumulative probabilities of context sizes `0, ..., n - 1`.

    Half is uniform, half proportional to `1 / (size + 1)`: what few points say varies most, and
    is what is worst learned under a uniform law.
    """
    few = 1 / np.arange(1.0, n + 1)
    p = 0.5 / n + 0.5 * few / few.sum()
    return jnp.asarray(np.cumsum(p)[:-1], jnp.result_type(float))


# ---------------------------------------------------------------------- draws of the prior


def _run(key: Any, arguments: Arguments, given: Any = None) -> tuple[dict[str, Any], Program]:
    """One draw of everything, by address."""
    with outside_scopes():
        program = stage_packed(arguments)
        replay = Replay(record=frozenset({"value"}), score=False)
        out = run_program(replay, program, arguments, key, given or {})
    return {a: r["value"] for a, r in out["records"].items() if "value" in r}, program


def simulate(key: Any, arguments: Arguments, addresses: tuple[str, ...], num: int) -> Any:
    """`num` data sets on the host, by address, in batches."""
    batch = min(num, 256)
    parts = [
        jax.device_get(_simulate(addresses, batch, jax.random.fold_in(key, i), arguments))
        for i in range(-(-num // batch))
    ]
    return {a: np.concatenate([p[a] for p in parts])[:num] for a in addresses}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _simulate(addresses, num, key, arguments):
    def one(key):
        values, _ = _run(key, arguments)
        return {a: values[a] for a in addresses}

    return jax.vmap(one)(jax.random.split(key, num))


def stored_sets(table: Table, data: Mapping[str, Any]) -> dict[str, Any]:
    """Data sets made elsewhere, checked.

    Raises:
        MissingData, InvalidValue: A site is missing, or has another shape.
    """
    arrays = {}
    for a in table.addresses:
        if a not in data:
            raise MissingData(
                f"pfn.fit: data has no {a!r}; it needs {', '.join(table.addresses)}, one row per "
                f"data set."
            )
        x = as_data(data[a])
        lead = () if a in table.latents else (table.num_points,)
        want = (*lead, *table.column(a).shape)
        if np.shape(x)[1:] != want:
            raise InvalidValue(
                f"pfn.fit: data[{a!r}] has shape {np.shape(x)}, expected "
                f"({', '.join(map(str, ('num_sets', *want)))})."
            )
        arrays[a] = x
    return arrays


def redrawable(program: Program, table: Table) -> tuple[str, ...]:
    """Targets that may be drawn again with all latents kept.

    Given the latents, their elements have to be independent of each other (no event, no scan), and
    nothing may follow from them.
    """
    parents = {e.source for e in graph_of(program).edges}

    def fits(a):
        s = program.sites[a]
        plain = s.is_latent and not s.partial and not s.conditional
        return plain and s.event_dim == 0 and s.num_scans == 0 and a not in parents

    # All or none: a target that stays would tell of one that is redrawn, if it follows from it.
    chosen = tuple(a for a in table.targets if fits(a))
    return chosen if len(chosen) == len(table.targets) else ()


def estimate_constants(
    table: Table, draws: dict[str, np.ndarray], num_bars: int, head: str
) -> tuple[Table, dict[str, dict[str, np.ndarray]]]:
    """What features and heads need to know about the prior.

    Args:
        table: The sites.
        draws: By address, `(num_sets, ...)`.
        num_bars, head: Of continuous targets.

    Returns:
        The table with what draws decide (classes, bars), and by address the arrays: `center` and
        `spread` of a site's numbers, `borders` and `log_mass` of bars, `log_mass` of classes,
        `loc` and `scale` of coordinates.

    Raises:
        InvalidValue: Draws are not finite, or all the same.
        InvalidAlgorithm: A discrete target takes too many values.
    """
    columns, constants = [], {}
    for column in table.columns:
        a = column.address
        x = np.asarray(draws[a], np.float64)
        if not np.isfinite(x).all():
            raise InvalidValue(
                f"ab.pfn.fit: draws of site {a!r} of `{table.model_name}` have "
                f"{int((~np.isfinite(x)).sum())} values among {x.size} that are not finite. "
                f"Correct the prior."
            )
        mine = {}
        is_target = a in table.targets or a in table.latents
        if a in table.context:
            mine["center"], mine["spread"] = _standardizer(x.reshape(-1, column.size))
        if is_target and column.is_discrete:
            column = _with_classes(column, x)
            values = np.clip(x, column.low, column.low + column.num_classes - 1)
            edges = column.low - 0.5 + np.arange(column.num_classes + 1)
            mine["log_mass"] = prior_mass(values, edges)
        elif is_target and head == "mixture":
            unit = Mixture(None, None, None, column.lower, column.upper)
            u = np.asarray(unit.coordinate(jnp.asarray(x, jnp.float32))[0], np.float64)
            center, spread = _standardizer(u.reshape(-1, 1))
            mine["loc"], mine["scale"] = center[0], spread[0]
        elif is_target:
            borders = equal_mass_borders(x, num_bars, column.lower, column.upper)
            mine["borders"], mine["log_mass"] = borders, prior_mass(x, borders)
            column = dataclasses.replace(column, num_bars=len(borders) - 1)
        columns.append(column)
        if mine:
            constants[a] = {k: np.asarray(v, np.float32) for k, v in mine.items()}
    return dataclasses.replace(table, columns=tuple(columns)), constants


def num_draws(table: Table) -> int:
    """How many data sets constants are estimated from."""
    return int(np.clip(_DRAWS // table.num_points, *_SETS))


def _standardizer(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median, and half the width of the central 68%, of each column."""
    low, center, high = np.quantile(x, [0.1587, 0.5, 0.8413], axis=0)
    spread = (high - low) / 2
    spread = np.where(spread > 0, spread, x.std(axis=0))
    return center, np.where(spread > 0, spread, 1.0)


def _with_classes(column: Column, x: np.ndarray) -> Column:
    """Classes of a discrete target whose support does not say them: those drawn, and one more."""
    if column.num_classes:
        return column
    low = int(x.min()) - 1 if column.open_below else column.low
    num = int(x.max()) + 1 - low + 1
    if num > MAX_CLASSES:
        raise InvalidAlgorithm(
            f"ab.pfn: discrete query {column.address!r} takes values from {int(x.min())} to "
            f"{int(x.max())}; at most {MAX_CLASSES} are predicted one by one. Query a continuous "
            f"function of it instead, such as ab.deterministic with jnp.log1p of it."
        )
    return dataclasses.replace(column, low=low, num_classes=num)
