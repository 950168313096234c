"""Flax NNX modules as arguments of models: split into arrays and a static graph."""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["NNXModule"]


@jax.tree_util.register_pytree_node_class
class NNXModule:
    """An NNX module as a pytree; `unwrap` gives the module back."""

    abduce_unwrap = True

    def __init__(self, graph: Any, state: Any):
        self.graph, self.state = graph, state

    @classmethod
    def wrap(cls, module: Any) -> NNXModule:
        from flax import nnx

        return cls(*nnx.split(module))

    def unwrap(self) -> Any:
        from flax import nnx

        return nnx.merge(self.graph, self.state)

    def tree_flatten(self):
        return (self.state,), self.graph

    @classmethod
    def tree_unflatten(cls, graph, children):
        return cls(graph, children[0])
