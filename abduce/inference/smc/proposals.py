"""Proposals and look-ahead of a filter: models and functions of a step's carry and input."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidModel, InvalidValue
from abduce.inference.smc.cloud import Cloud, Particles, first_keys
from abduce.inference.smc.flow import live_variables
from abduce.inference.smc.particles import Walker
from abduce.inference.smc.population import Population
from abduce.ppl.interpreter import walk
from abduce.ppl.masked import Masked
from abduce.ppl.operations import outside_scopes
from abduce.ppl.program import stage

__all__ = [
    "lookahead",
    "observations",
    "proposed_latents",
    "run_proposal",
    "stage_proposal",
    "tree_of",
    "walk_proposal",
]


def observations(inputs: Any, message: Any) -> dict[str, Any]:
    """What a proposal is told of a step: the observed values, by address.

    Partly observed ones come as `ab.masked` values; with messages, these know them.
    """
    partly = {} if message is not None else {
        a: Masked(g.value, g.mask) for a, g in inputs.items() if g.mask is not None
    }  # fmt: skip
    return {a: g.value for a, g in inputs.items() if g.mask is None} | partly


def _stand_ins(tree: Any, leaves: dict[int, Any]) -> Any:
    """One particle's values, for staging; `leaves` maps them back to those of all."""

    def one(v):
        if not isinstance(v, (Particles, jax.Array, np.ndarray, np.generic, float)):
            return v  # static in the model, so in the proposal
        x = v.array[0] if isinstance(v, Particles) else jnp.asarray(v)
        if isinstance(v, Particles) or id(x) not in leaves:
            leaves[id(x)] = v
        leaves.setdefault(("keep", id(x)), x)  # type: ignore[call-overload]
        return x

    return jax.tree.map(one, tree, is_leaf=lambda v: isinstance(v, Particles))


def run_proposal(walker: Walker, proposal: Any, args: Any, state: Cloud, key: Any, known) -> None:
    """Runs a proposal for all particles; its values go to `state.proposed`."""
    program, q = walk_proposal(
        walker, proposal, args, key, retained=state.retained, points=state.points
    )
    latents = proposed_latents(program, known, state.inputs)
    for address in latents:
        state.proposed[address] = Particles(q.resolve(q.records[address]["value"])[0])
    state.add(-q.population.log_weights)


def walk_proposal(
    walker: Walker,
    proposal: Any,
    args: Any,
    key: Any,
    *,
    retained: Any,
    mode: str = "propose",
    points: Any = None,
) -> tuple[Any, Cloud]:
    """Runs a proposal for all particles, or scores `retained` under it (`mode='score'`).

    Returns:
        Its program, and its cloud: the weights are its log density.
    """
    program, inputs = stage_proposal(proposal, args)
    q = Cloud(
        first_keys(program.jaxpr, key), {}, Population.start(walker.n), retained=retained,
        mode=mode,
    )  # fmt: skip
    q.scans, q.points = -1, points
    own = dataclasses.replace(walker, live=live_variables(program.jaxpr))
    walk(own, program.jaxpr, inputs, q)
    q.settle()
    return program, q


def stage_proposal(proposal: Any, args: Any) -> tuple[Any, list[Any]]:
    """The program of a proposal, and its inputs for all particles."""
    leaves: dict[Any, Any] = {}
    stand_ins = _stand_ins(args, leaves)
    with outside_scopes():
        program, arguments = stage(proposal.with_algorithm(None), stand_ins, {})
    return program, [*program.closed, *(leaves.get(id(v), v) for v in arguments.dynamic)]


def proposed_latents(program: Any, known: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The latents of a proposal, by address.

    Raises:
        InvalidValue: The model has no such latents there.
    """
    latents = {a: s for a, s in program.sites.items() if s.is_latent}
    unknown = [a for a in latents if a not in known]
    taken = [a for a in latents if a in inputs and inputs[a].mask is None]
    if unknown or taken:
        raise InvalidValue(
            f"the proposal `{program.name}` does not fit the model: "
            + (f"{unknown} are not latents there; " if unknown else "")
            + (f"{taken} are observed; " if taken else "")
            + f"the proposal has {sorted(latents)}, the latents there are "
            f"{sorted(a for a in known if a not in inputs)}."
        )
    return latents


def lookahead(frame: Any, consts, carry, inputs, xs, extra) -> Any:
    """`lookahead(given, carry, x)` of each particle."""
    message = extra[0] if extra else None
    values = (observations(inputs, message), *frame.trees(consts, carry, xs), *extra)
    is_particles = lambda v: isinstance(v, Particles)  # noqa: E731
    leaves, treedef = jax.tree.flatten(values, is_leaf=is_particles)
    axes = [0 if is_particles(v) else None for v in leaves]
    arrays = [v.array if is_particles(v) else v for v in leaves]

    def one(*leaves):
        out = jnp.asarray(frame.walker.lookahead(*jax.tree.unflatten(treedef, leaves)))
        if out.shape != ():
            raise InvalidValue(
                f"lookahead(given, carry, x) must return a scalar log weight, got shape "
                f"{out.shape}."
            )
        return out

    if not any(a == 0 for a in axes):
        return jnp.broadcast_to(one(*arrays), (frame.n,))
    return jax.vmap(one, in_axes=axes, axis_size=frame.n)(*arrays)


_STEP = re.compile(r"\[(?P<index>\d+)\]|\[(?P<key>'[^']*'|\"[^\"]*\")\]|\.(?P<attr>\w+)")


def tree_of(leaves: dict[str, Any]) -> Any:
    """Builds nested tuples, dicts and named tuples from leaves named by their paths."""
    if set(leaves) == {""}:
        return leaves[""]
    groups: dict[Any, dict[str, Any]] = {}
    for path, value in leaves.items():
        match = _STEP.match(path)
        if match is None:
            raise InvalidModel(f"cannot rebuild the carry of a scan from the path {path!r}.")
        if match["index"] is not None:
            head: Any = int(match["index"])
        else:
            head = ("key", match["key"][1:-1]) if match["key"] else ("attr", match["attr"])
        groups.setdefault(head, {})[path[match.end() :]] = value
    if not groups:
        return ()
    built = {head: tree_of(rest) for head, rest in groups.items()}
    if all(isinstance(h, int) for h in built):
        return tuple(built.get(i) for i in range(max(built) + 1))
    if all(h[0] == "key" for h in built):
        return {h[1]: v for h, v in built.items()}
    import collections

    names = [h[1] for h in built]
    return collections.namedtuple("Carry", names)(*built.values())
