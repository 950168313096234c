"""Islands: several particle filters side by side, weighted by their evidences.

K filters of N / K particles run and resample on their own, so that devices have nothing to tell one
another until the end. All particles together, the weights of island k times its evidence estimate
Z_k, are one population: its evidence estimate is the mean of the Z_k, unbiased, and weighted paths
keep their law (Verge, Dubarry, Del Moral and Moulines 2015, "On parallel implementation of
sequential Monte Carlo methods: the island particle model", the case without interaction). With time
the Z_k drift apart and fewer islands count: `island_ess` tells how many.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from abduce.inference.smc.cloud import ISLANDS, Settings
from abduce.inference.smc.filtering import run_filter
from abduce.inference.smc.population import Population

__all__ = ["run_islands"]


def run_islands(
    settings: Settings,
    arguments: Any,
    given: Any,
    key: Any,
    *,
    lookahead: Any,
    shared: Any,
    known: Any,
    resume: Any,
    population: Population | None,
) -> dict[str, Any]:
    """Runs a program as `settings.islands` filters; traceable.

    Args:
        settings: Of the whole.
        arguments, given, key, lookahead, known, resume, population: As of `run_filter`.
        shared: Its other keyword arguments that hold arrays.

    Returns:
        As `run_filter`; reports and 'log_evidences' have the islands in front.
    """  # fmt: skip
    k, n = settings.islands, settings.num_particles
    mesh = settings.mesh
    own = dataclasses.replace(
        settings, num_particles=n // k, mesh=None,
        mesh_axis=None if mesh is None else mesh.axis_names[0],
    )  # fmt: skip
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(k, dtype=jnp.uint32))
    if population is None:
        population = Population.start(n)

    def cut(tree):
        return jax.tree.map(lambda x: x.reshape((k, n // k, *x.shape[1:])), tree)

    total = population.log_evidence
    each = (keys, cut(population.log_weights), cut(known or {}), cut(list(resume)))

    def run(each, everywhere):
        arguments, given, shared, total = everywhere

        def one(key, log_weights, known, resume):
            out = run_filter(
                own, arguments, given, key, lookahead=lookahead, known=known, resume=resume,
                population=Population.weighted(log_weights, total), **shared,
            )  # fmt: skip
            return {a: x for a, x in out.items() if a != "carries"}, out["carries"]

        return jax.vmap(one, axis_name=ISLANDS)(*each)

    everywhere = (arguments, given, shared, total)
    if mesh is not None:
        axis = PartitionSpec(mesh.axis_names[0])
        run = jax.shard_map(
            run, mesh=settings.devices, in_specs=(axis, PartitionSpec()), out_specs=axis,
            check_vma=False,
        )  # fmt: skip
    out, carries = run(each, everywhere)
    return {**_joined(out, n), "carries": _flat(carries, n)}


def _flat(tree: Any, n: int) -> Any:
    return jax.tree.map(lambda x: x.reshape((n, *x.shape[2:])), tree)


def _joined(out: dict[str, Any], n: int) -> dict[str, Any]:
    """One population of all islands."""
    each: Population = out["population"]
    totals = each.total
    offset = jnp.max(each.log_evidence)
    log_weights = each.log_weights + (each.log_evidence - offset)[:, None]
    w = jnp.where(jnp.any(totals > -jnp.inf), jax.nn.softmax(totals), 1 / len(totals))
    return {
        **out,
        "values": _flat(out["values"], n), "active": _flat(out["active"], n),
        "population": Population.weighted(log_weights.reshape(n), offset),
        "sums": jax.tree.map(lambda x: jnp.tensordot(w, x, 1), out["sums"]),
        "summaries": jax.tree.map(lambda x: x[0], out["summaries"]),  # the same in all
        "log_evidences": totals, "island_ess": 1 / jnp.sum(w * w),
    }  # fmt: skip
