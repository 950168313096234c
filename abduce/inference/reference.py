"""Log densities relative to a point: sums of many terms that keep their digits in float32."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.inference.problem import Problem
from abduce.inference.target import FlatTarget, scan_lengths
from abduce.ppl.replay import Given, Replay

__all__ = ["large_sites", "with_reference", "zero_reference"]

_LARGE_SITE = 1000  # elements; below, float32 sums lose nothing that matters


def large_sites(problem: Problem) -> tuple[str, ...]:
    """Sites whose scores are summed as differences from a reference, in float32."""
    if jnp.result_type(float) == jnp.float64:
        return ()
    return tuple(
        a
        for a, s in problem.program.sites.items()
        if s.kind == "sample"
        and not s.conditional  # a constant must be subtracted always or never
        and math.prod(s.shape[: s.batch_ndim]) >= _LARGE_SITE
    )


def zero_reference(problem: Problem, sites: tuple[str, ...], data: Any) -> Any:
    """Data with the structure that `with_reference` gives, and no reference yet."""
    given = dict(data["given"])
    for address in sites:
        info = problem.program.sites[address]
        sizes = (*scan_lengths(info), *info.site.axis_sizes, *info.site.batch_shape)
        zeros = jnp.zeros(sizes, jnp.result_type(float))
        given[address] = dataclasses.replace(given.get(address, Given()), reference=zeros)
    return {**data, "given": given}


def with_reference(
    target: FlatTarget, sites: tuple[str, ...], data: Any, q: Any
) -> tuple[Any, float]:
    """Data whose log density is relative to that of the large sites at `q`.

    In float32 a log density of a million has a spacing of 0.06, which would drown the energy
    errors that the acceptance probability is made of. The difference to a point in the bulk,
    taken element by element, is of order one and keeps its digits.

    Args:
        target, data: From `make_target`.
        sites: From `large_sites`.
        q: A point in the bulk of the posterior, shape `(dim,)`.

    Returns:
        The new data, of fixed structure; and the constant that was subtracted, in float64.
    """
    if not sites:
        return data, 0.0
    plain = {
        a: dataclasses.replace(g, reference=None)
        for a, g in data["given"].items()
        if g.value is not None  # else it was only a reference
    }
    scores = _scores_at(target, sites, {**data, "given": plain}, jnp.asarray(q))
    given, constant = dict(plain), 0.0
    for address, score in scores.items():
        score = jnp.where(jnp.isfinite(score), score, 0.0)
        given[address] = dataclasses.replace(given.get(address, Given()), reference=score)
        constant += float(np.asarray(score, np.float64).sum())
    return {**data, "given": given}, constant


def _scores_at_now(target, sites, data, q):
    records = target.run(Replay(record=frozenset({"score"})), data, q)["records"]
    program = target.program(data)
    return {a: program.sites[a].to_physical(records[a]["score"]) for a in sites}


_scores_at = jax.jit(_scores_at_now, static_argnums=(0, 1))
