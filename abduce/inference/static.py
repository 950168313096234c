"""The static part of a module as a hashable value: equal modules share compiled programs."""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["Static"]


class Static:
    """What `eqx.partition` leaves once the arrays are taken out.

    Attributes:
        value: The pytree.
    """

    def __init__(self, value: Any):
        self.value = value
        leaves, treedef = jax.tree.flatten(value)
        self.key = (treedef, tuple(leaves))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.key == other.key
