"""The `ab.param` sites of several programs that are fitted together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import biject_to

from abduce.errors import InvalidAlgorithm, InvalidValue
from abduce.ppl.operations import execute
from abduce.ppl.replay import Replay

__all__ = ["Parameters", "constrained", "like"]


class Parameters:
    """Parameters by address; programs share those of equal name.

    Attributes:
        initial: Starting values, on their own scale.
        constraints: By address, or None.
        found: For each program in turn, its addresses.
    """

    def __init__(self, staged: Sequence[tuple[Any, Any] | None]):
        """Args: staged: Programs with their packed arguments; None has no parameters."""
        self.initial: dict[str, Any] = {}
        self.constraints: dict[str, Any] = {}
        found = []
        for pair in staged:
            mine = {} if pair is None else pair[0].of_kind("param")
            found.append(tuple(mine))
            values = _values(*pair) if mine and pair is not None else {}
            for a, info in mine.items():
                old = self.initial.get(a)
                if old is not None and old.shape != values[a].shape:
                    raise InvalidAlgorithm(
                        f"ab.vi: parameter {a!r} has shape {old.shape} in one place and "
                        f"{values[a].shape} in `{pair[0].name if pair else ''}`. Give them "
                        f"different names."
                    )
                self.initial[a] = values[a]
                self.constraints[a] = info.site.constraint
        self.found = tuple(found)

    def start(self) -> dict[str, Any]:
        """Starting values on the unconstrained scale."""
        return self._free(self.initial)

    def private(self, given: Any, params: Any) -> Any:
        """A user's starting values on the unconstrained scale, checked against `params`."""
        unknown = [a for a in given if a not in self.constraints]
        return like(given if unknown else self._free(given), params)

    def split(self, params: Any) -> list[dict[str, Any]]:
        """For each program, the values of its parameters."""
        values = constrained(params, self.constraints)
        return [{a: values[a] for a in mine} for mine in self.found]

    def _free(self, values: Any) -> dict[str, Any]:
        constraints = self.constraints
        return {
            a: x if constraints[a] is None else biject_to(constraints[a])._inverse(x)
            for a, x in values.items()
        }


def _values(program: Any, arguments: Any) -> dict[str, Any]:
    """Initial values of a program's parameters."""
    record = frozenset({"value"})
    out = execute(Replay(record=record, score=False), arguments, jax.random.key(0), {})
    return {a: out["records"][a]["value"] for a in program.of_kind("param")}


def constrained(params: Any, constraints: Any) -> dict[str, Any]:
    """Parameters on their own scale."""
    return {
        a: x if constraints.get(a) is None else biject_to(constraints[a])(x)
        for a, x in params.items()
    }


def like(given: Any, params: Any) -> Any:
    """Starting parameters in the structure that is fitted."""
    if jax.tree.structure(given) != jax.tree.structure(params):
        raise InvalidValue(
            f"ab.vi: params= has the structure {jax.tree.structure(given)}, the guide "
            f"{jax.tree.structure(params)}. Pass post.params of a fit with the same guide."
        )
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(params), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise InvalidValue(f"ab.vi: params= has shape {jnp.shape(a)}, expected {jnp.shape(b)}.")
    return jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), given, params)
