"""What the steps of a scan leave behind: values along paths, or moments of each step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from abduce.errors import InvalidModel
from abduce.inference.smc.cloud import ISLANDS
from abduce.inference.smc.population import Population, take
from abduce.inference.smc.tree import Tree, default_capacity

__all__ = ["collect", "finish", "run_steps"]


def collect(frame, inner, pairs, static, settings, state) -> dict[str, Any]:
    """Per-step outputs: values something needs, records of sites or their moments."""
    outs = pairs[frame.nk :]
    static["ys"] = [m for _, m in outs]
    y: dict[str, Any] = {
        "ys": [a if live else None for (a, _), live in zip(outs, frame.live, strict=True)]
    }
    y["summaries"] = dict(inner.summaries)
    records: dict[str, Any] = {}
    static["records"] = {}
    for address, record in inner.records.items():
        resolved = {k: inner.resolve(v) for k, v in record.items()}
        if settings.store == "filter" and state.mode == "run":
            y["summaries"][address] = _moments(inner.population, resolved, settings)
            continue
        records[address] = {k: a for k, (a, _) in resolved.items()}
        static["records"][address] = {k: m for k, (_, m) in resolved.items()}
    y["records"] = records
    return y


def _by_particle(y: Any, static: Any, frame: Any) -> dict[str, Any]:
    """Of the outputs of a step, those that differ by particle and are needed."""
    return {
        "ys": [
            v if m and live else None
            for v, m, live in zip(y["ys"], static["ys"], frame.live, strict=True)
        ],
        "records": {
            a: {k: v if static["records"][a][k] else None for k, v in r.items()}
            for a, r in y["records"].items()
        },
    }


def run_steps(body: Any, loop: Any, x: Any, frame: Any, static: Any, capacity: Any) -> Any:
    """Runs the steps, and grows a tree of what they leave by particle.

    Args:
        body: `(loop, x) -> (loop, outputs)`; the outputs may have 'ancestors'.
        loop, x: What the loop carries, and its inputs.
        frame: The scan.
        static: What a trace of the body finds out about its outputs.
        capacity: Places in the tree; 0: the default; None: no tree.

    Returns:
        The loop at the end, the outputs of all steps, and the tree or None.
    """
    options = {"length": frame.length, "reverse": frame.reverse, "unroll": frame.unroll}
    if capacity is None or not frame.length:
        return *jax.lax.scan(body, loop, x, **options), None
    first = jax.eval_shape(lambda x: jax.tree.map(lambda v: v[0], x), x)
    y = jax.eval_shape(body, loop, first)[1]
    if "ancestors" not in y:
        return *jax.lax.scan(body, loop, x, **options), None
    capacity = capacity or default_capacity(frame.n, frame.length)
    tree = Tree.start(_by_particle(y, static, frame), frame.n, max(capacity, frame.n))

    def grow(loop, x):
        loop, tree = loop
        loop, y = body(loop, x)
        tree = tree.grow(y.pop("ancestors"), _by_particle(y, static, frame))
        gone = lambda v, m: None if m else v  # noqa: E731
        y["ys"] = [gone(v, m) for v, m in zip(y["ys"], static["ys"], strict=True)]
        y["records"] = {
            a: {k: gone(v, static["records"][a][k]) for k, v in r.items()}
            for a, r in y["records"].items()
        }
        return (loop, tree), y

    (loop, tree), ys = jax.lax.scan(grow, (loop, tree), x, **options)
    return loop, ys, tree


def _moments(population: Population, record: Any, settings: Any) -> dict[str, Any]:
    """Weighted mean and standard deviation over the particles, of all islands."""
    x, mapped = record["value"]
    if not mapped:
        return {"mean": x, "sd": jnp.zeros_like(x)}
    total, w = lambda v: jnp.sum(v, 0), population.probabilities
    if settings.islands > 1:
        axes = (ISLANDS,) if settings.mesh_axis is None else (ISLANDS, settings.mesh_axis)
        evidence = population.total
        peak = jax.lax.pmax(evidence, axes)
        share = jnp.exp(evidence - jnp.where(jnp.isfinite(peak), peak, 0.0))
        whole = jax.lax.psum(share, axes)
        w = w * jnp.where(whole > 0, share / jnp.where(whole > 0, whole, 1.0), 0.0)
        total = lambda v: jax.lax.psum(jnp.sum(v, 0), axes)  # noqa: E731
    if "active" in record:
        on = record["active"][0]
        w = w.reshape((-1,) + (1,) * (on.ndim - 1)) * on
        w = w / jnp.maximum(total(w), jnp.finfo(w.dtype).tiny)
    w = w.reshape(w.shape + (1,) * (x.ndim - w.ndim))
    values = x.astype(w.dtype)
    mean = total(w * values)
    return {"mean": mean, "sd": jnp.sqrt(total(w * (values - mean) ** 2))}


def finish(frame, state, carry, ys, static, context) -> list[Any]:
    """Traces values of each step back to the particles that stand at the end."""
    x, settings, inner_state, number, tree = context
    traced = _by_particle(ys, static, frame)
    if tree is not None:
        traced = tree.paths(frame.length, reverse=frame.reverse)
    if "backward" in ys and frame.length > 0 and settings.smoothing == "two_filter":
        from abduce.inference.smc.two_filter import simulate_forwards

        traced, root, carry = simulate_forwards(frame, state, ys, traced, x, inner_state)
        state.maps[-1] = root
    elif "backward" in ys and frame.length > 0:
        from abduce.inference.smc.smoothing import simulate_backwards

        traced, root, last = simulate_backwards(frame, state, ys, traced, x, inner_state)
        state.maps[-1] = root
        carry = [
            take(c, last) if m else c for c, m in zip(carry, frame.carry_flags, strict=True)
        ]  # fmt: skip
        if settings.num_paths == 1:
            state.closed = True
    elif "ancestors" in ys:
        traced = _genealogy(traced, ys["ancestors"], frame)
    elif settings.store == "filter" and "ancestors" not in ys and any(frame.live):
        _require_no_past(frame, static, settings)

    def particles(y):
        return state.wrap(jnp.moveaxis(y, 0, 1))

    outs: list[Any] = [
        state.wrap(c) if m else c for c, m in zip(carry, frame.carry_flags, strict=True)
    ]
    for plain, y, m in zip(ys["ys"], traced["ys"], static["ys"], strict=True):
        outs.append(particles(y) if m and y is not None else plain)
    for address, record in ys["records"].items():
        state.records[address] = {
            k: particles(traced["records"][address][k]) if static["records"][address][k] else v
            for k, v in record.items()
        }
    state.summaries.update(ys["summaries"])
    ends = {"start": frame.start[1].total, "end": state.population.total}
    if tree is not None:
        ends |= {"num_nodes": tree.peak, "lost": tree.lost, "capacity": tree.capacity}
    state.reports.append({**ys["report"], **ends})
    state.reports.extend(ys["nested"])
    if number >= 0:
        state.carries.append(
            [c if m else None for c, m in zip(carry, frame.carry_flags, strict=True)]
        )
    return outs


def _require_no_past(frame, static, settings):
    if settings.resampling.threshold > 0 and any(
        m and live for m, live in zip(static["ys"], frame.live, strict=True)
    ):
        raise InvalidModel(
            "ab.smc(store='filter') keeps no past, but the model uses what its scan returns for "
            "each step, which came from latents. Use store='paths', or compute it in the carry."
        )


def _genealogy(traced: Any, ancestors: Any, frame: Any) -> Any:
    """Reads each step's values through the ancestors of the steps after it."""

    def back(index, step):
        values, ancestors = step
        return take(ancestors, index), take(values, index)

    first = jnp.arange(frame.n, dtype=jnp.int32)
    return jax.lax.scan(back, first, (traced, ancestors), reverse=not frame.reverse)[1]
