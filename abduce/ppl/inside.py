"""Models used inside programs: `propose` runs one as part of the program, `log_density` scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from abduce.errors import InvalidValue
from abduce.ppl.interpreter import State, broadcast_operand, walk
from abduce.ppl.model import Model
from abduce.ppl.naming import scoped
from abduce.ppl.program import relative, stage
from abduce.ppl.replay import log_density_of
from abduce.ppl.site import bind, elementwise

__all__ = ["log_density", "propose"]


class _Propose:
    """Emits the sites again and scores their values."""

    def site(self, site, operands, given, key, acc):
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
                record = {"value": out}
                if "guard" in site.roles:
                    i = site.roles.index("guard")
                    record["active"] = broadcast_operand(site, operands[i], i)
        return [out], acc, record


def propose(m: Model, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
    """Runs a model as part of the program at hand.

    Its sites join the program (under the current scope).

    Args:
        m: A model.
        *args, **kwargs: Its arguments.

    Returns:
        The choice map (by the model's own addresses) and its log density, in nats.
    """
    if not isinstance(m, Model):
        raise InvalidValue(f"ab.propose takes a model, got {type(m).__name__}.")
    program, arguments = stage(m.with_algorithm(None), args, kwargs)
    zero = jnp.zeros((), jnp.result_type(float))
    state = State(None, {}, zero)
    walk(_Propose(), program.jaxpr, program.inputs(arguments), state)
    infos = relative(program).sites
    choices = {
        a: infos[a].to_logical(state.records[scoped(a)]["value"])
        for a in infos
        if scoped(a) in state.records
    }
    return choices, state.acc


def log_density(m: Model, choices: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Log density of choices under a model, in nats; for use inside programs.

    The same as `m.log_density(choices, *args, **kwargs)`.
    """
    return m.log_density(dict(choices), *args, **kwargs)
