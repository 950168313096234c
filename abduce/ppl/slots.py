"""What the carry and the inputs of a scan are called, kept where a scan is emitted anew.

Proposals of a particle filter are called with the carry and the input that the user's step gets. A
jaxpr has them flat; where they belong is in the names that JAX notes for the arguments of a body,
such as `state[0]` or `x['y']`. A transformation of a model emits scans with bodies of its own,
whose arguments have to have the same names.

JAX makes a slot of the carry that never changes a constant of the body. It keeps its name, and goes
back into the carry of the new scan, for JAX to do so again.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from abduce.ppl import _jax

__all__ = ["Slots", "argument_names", "name_arguments", "root_of"]

_REST = "\0rest"  # not in any name of a user's


@dataclasses.dataclass(frozen=True)
class _Key:
    """A step of a path that prints as it is."""

    text: str

    def __str__(self) -> str:
        return self.text


@jax.tree_util.register_pytree_with_keys_class
class Slots:
    """Flat values with the paths that name them, and something more that rides along."""

    def __init__(self, values: Sequence[Any], paths: tuple[str, ...], rest: Any):
        self.values, self.paths, self.rest = list(values), paths, rest

    def tree_flatten_with_keys(self) -> Any:
        pairs = [(_Key(p), x) for p, x in zip(self.paths, self.values, strict=True)]
        return (*pairs, (_Key(_REST), self.rest)), self.paths

    def tree_flatten(self) -> Any:
        return (*self.values, self.rest), self.paths

    @classmethod
    def tree_unflatten(cls, paths: tuple[str, ...], children: Any) -> Slots:
        *values, rest = children
        return cls(values, paths, rest)


def argument_names(jaxpr: Any) -> tuple[str, ...]:
    """Of a body, as `state[0]`; empty for what a transformation added. () if there are none."""
    inner = _jax.inner_jaxpr(jaxpr)[0]
    names = inner.debug_info.arg_names or ()
    if len(names) != len(inner.invars):
        return ()
    return tuple("" if n is None or _REST in n else n for n in names)


def root_of(name: str) -> str:
    """The argument that a name is in: `state` of `state[0]`."""
    return re.split(r"[.\[]", name, maxsplit=1)[0]


def name_arguments(
    body: Callable[[Slots, Slots], Any], jaxpr: Any, num_consts: int, num_carry: int
) -> tuple[tuple[str, ...], tuple[str, ...], dict[int, str]]:
    """Gives a new body of a scan the arguments' names of the old one.

    Args:
        body: Takes and returns `Slots`; called with a carry and inputs.
        jaxpr: The old body.
        num_consts, num_carry: How many of its inputs are constants and carries.

    Returns:
        The paths of the carry's slots, and of the inputs'; and of constants that belong to the
        carry, by their number.
    """
    count = len(_jax.inner_jaxpr(jaxpr)[0].invars)
    names = argument_names(jaxpr) or ("",) * count
    ends = (num_consts, num_consts + num_carry, count)
    roots: list[str] = []
    paths = []
    for low, high, default in ((*ends[:2], "carry"), (*ends[1:], "x")):
        mine = names[low:high]
        root = next((root_of(n) for n in mine if n), "")
        root = root if root.isidentifier() and root not in roots else default
        root = root if root not in roots else f"{root}_"
        roots.append(root)
        paths.append(
            tuple(
                n[len(root) :] if n and root_of(n) == root else f"[{i}]"
                for i, n in enumerate(mine)
            )
        )
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    body.__signature__ = inspect.Signature([inspect.Parameter(r, kind) for r in roots])  # type: ignore[attr-defined]
    fixed = {i: n[len(roots[0]) :] for i, n in enumerate(names[:num_consts]) if n}
    fixed = {i: p for i, p in fixed.items() if root_of(names[i]) == roots[0]}
    return paths[0], paths[1], fixed
