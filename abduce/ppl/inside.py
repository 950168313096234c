"""Models used inside programs: `propose` runs one as part of the program, `log_density` scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from abduce.errors import InvalidValue
from abduce.ppl.interpreter import State, broadcast_operand, walk
from abduce.ppl.model import Model
from abduce.ppl.naming import scoped
from abduce.ppl.operations import prepare_params
from abduce.ppl.program import relative, stage
from abduce.ppl.replay import log_density_of
from abduce.ppl.site import bind, elementwise

__all__ = ["log_density", "propose", "propose_scored"]


class _Propose:
    """Emits the sites again and scores their values.

    Args:
        grad: A gradient strategy for all of them, or None for their own.
    """

    def __init__(self, grad: Any = None):
        self.grad = grad

    def site(self, site, operands, given, key, acc):
        if site.kind == "param" and given is not None:
            return [jnp.asarray(given.value, site.dtype)], acc, None
        if self.grad is not None and site.kind == "sample":
            site = site.replace(grad=self.grad)
        out = bind(site, list(operands))
        record = None
        if site.kind == "factor":
            score = elementwise(site, lambda ops: log_density_of(site, ops, None), operands)
            return [], acc + jnp.sum(score).astype(acc.dtype), record
        if site.kind == "sample":
            score = elementwise(
                site, lambda ops, x: log_density_of(site, ops, x), operands, out
            )  # fmt: skip
            acc = acc + jnp.sum(score).astype(acc.dtype)
            if "obs" not in site.roles or "mask" in site.roles:
                record = {"value": out, "score": score}
                if "guard" in site.roles:
                    i = site.roles.index("guard")
                    record["active"] = broadcast_operand(site, operands[i], i)
        return [out], acc, record


def propose(
    m: Model, *args: Any, params: Mapping[str, Any] | None = None, grad: Any = None, **kwargs: Any
) -> tuple[dict[str, Any], Any]:
    """Runs a model as part of the program at hand.

    Its sites join the program (under the current scope).

    Args:
        m: A model. One made by `ab.marginal(..., via=ab.importance(...))` runs the importance
            sampler as part of the program too, and its log density is the estimate.
        *args, **kwargs: Its arguments.
        params: Values of its `ab.param` sites; the others join the program.
        grad: A gradient strategy for all its choices, in place of their own.

    Returns:
        The choice map (by the model's own addresses) and its log density, in nats.
    """
    if not isinstance(m, Model):
        raise InvalidValue(f"ab.propose takes a model, got {type(m).__name__}.")
    expand = getattr(m, "propose_inside", None)
    if expand is not None:
        return expand(args, kwargs, params, grad)
    choices, log_density, _ = propose_scored(m, args, kwargs, params=params, grad=grad)
    return choices, log_density


def propose_scored(
    m: Model, args: Any, kwargs: Any, *, params: Any = None, grad: Any = None
) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """`propose`, with the log density of each address as well."""
    program, arguments = stage(m.with_algorithm(None), args, kwargs)
    zero = jnp.zeros((), jnp.result_type(float))
    infos = relative(program).sites
    here = dataclasses.replace(program, sites=infos)
    inputs = {scoped(a): g for a, g in prepare_params(here, params).items()}
    state = State(None, inputs, zero)
    walk(_Propose(grad), program.jaxpr, program.inputs(arguments), state)
    found = {a: state.records[scoped(a)] for a in infos if scoped(a) in state.records}
    choices = {a: infos[a].to_logical(r["value"]) for a, r in found.items()}
    return choices, state.acc, {a: jnp.sum(r["score"]) for a, r in found.items()}


def log_density(m: Model, choices: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Log density of choices under a model, in nats; for use inside programs.

    The same as `m.log_density(choices, *args, **kwargs)`; where the density is estimated by
    importance sampling (`ab.marginal`), and no `key=` is passed, the sampler becomes part of the
    program.
    """
    expand = getattr(m, "log_density_inside", None)
    if expand is not None and kwargs.get("key") is None:
        return expand(dict(choices), args, kwargs)
    return m.log_density(dict(choices), *args, **kwargs)
