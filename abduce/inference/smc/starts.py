"""Starting points for parameters: draws from their prior, in unconstrained coordinates."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from abduce.inference.target import FlatTarget, unconstrain_now
from abduce.ppl.interpreter import State, walk
from abduce.ppl.operations import outside_scopes, to_physical
from abduce.ppl.program import stage_packed
from abduce.ppl.replay import Given, Replay, Sums

__all__ = ["prior_coordinates"]


def prior_coordinates(target: FlatTarget, data: Any, key: Any) -> Any:
    """Coordinates `(dim,)` of a draw of the parameters from the model, data ignored."""
    with outside_scopes():
        program = stage_packed(data["arguments"])
    replay = Replay(record=frozenset({"value"}), score=False, predictive=True)
    state = State(key, {}, Sums.zero(log_density=False))
    walk(replay, program.jaxpr, program.inputs(data["arguments"]), state)
    given = {
        a: Given(r["value"], trusted=True)
        for a, r in state.records.items()
        if program.sites[a].is_latent
    }
    mine = {s.address for s in target.slots}
    held = {a: g for a, g in given.items() if a not in mine}
    observed = {a: to_physical(program.sites[a], g) for a, g in data["given"].items()}
    inputs = {
        "dynamic": data["arguments"].dynamic, "given": {**held, **observed}, "hidden": {},
        "centering": {},
    }  # fmt: skip
    return jnp.asarray(unconstrain_now(target, inputs, {a: given[a] for a in mine}))
