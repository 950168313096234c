"""Paths of particles as a tree that is pruned as it grows.

After a resampling, particles without offspring leave branches that no later particle descends from.
A pool of nodes keeps, of each step, only what some particle still descends from: T nodes for the
trunk that all share, and of the order of N log N for the crown, instead of N T (Jacob, Murray and
Rubenthaler 2015, "Path storage in the particle filter", theorem 1; algorithms 2 and 3).

The pool has a fixed capacity. Free places are on a stack; a node knows its parent, and how many
children and living particles refer to it.
"""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

__all__ = ["Tree", "default_capacity"]

_CROWN = 12  # the crown's share of the capacity, in units of N log N; we have met 11


def default_capacity(num_particles: int, num_steps: int) -> int:
    """Places in the pool: `T + 12 N log N + 2 N`, or all N T where that is less."""
    n = num_particles
    return min(n * num_steps, num_steps + math.ceil(_CROWN * n * math.log(max(n, 2))) + 2 * n)


class Tree(eqx.Module):
    """A pool of nodes, C places.

    Attributes:
        values: Per node, what is kept of a step; arrays `(C, ...)`.
        parents: Shape `(C,)`; C for those of the first step.
        counts: Children and living particles of each node, `(C,)`; 0: the place is free.
        leaves: The node of each particle, `(N,)`; C before the first step.
        free: A stack of free places, `(C,)`.
        num_free: Its height.
        speaker: Scratch: of the branches that end at a node, the one that goes on, `(C,)`.
        peak: The most places taken so far.
        lost: Whether there were too few places; the paths mean nothing then.
    """

    values: Any
    parents: Any
    counts: Any
    leaves: Any
    free: Any
    num_free: Any
    speaker: Any
    peak: Any
    lost: Any

    @classmethod
    def start(cls, values: Any, num_particles: int, capacity: int) -> Tree:
        """An empty tree.

        Args:
            values: Shapes and dtypes of what a step leaves, `(N, ...)`.
            num_particles: N.
            capacity: C, at least N.
        """
        blank = jax.tree.map(lambda v: jnp.zeros((capacity, *v.shape[1:]), v.dtype), values)
        zeros = jnp.zeros(capacity, jnp.int32)
        return cls(
            blank, zeros, zeros, jnp.full(num_particles, capacity, jnp.int32),
            jnp.arange(capacity, dtype=jnp.int32), jnp.asarray(capacity, jnp.int32),
            zeros, jnp.zeros((), jnp.int32), jnp.zeros((), bool),
        )  # fmt: skip

    @property
    def capacity(self) -> int:
        return self.parents.shape[0]

    def grow(self, ancestors: Any, values: Any) -> Tree:
        """A step: the particles' ancestors, shape `(N,)`, and what the step leaves of each."""
        return self._prune(ancestors)._insert(self.leaves[ancestors], values)

    def _prune(self, ancestors: Any) -> Tree:
        """Frees the leaves without offspring, and the branches that end with them."""
        n, c = self.leaves.shape[0], self.capacity
        offspring = jnp.zeros(n, jnp.int32).at[ancestors].add(1)
        counts = self.counts.at[self.leaves].set(offspring, mode="drop")

        def shorten(loop):
            ends, counts, free, num_free, speaker = loop
            dead, lanes = ends < c, jnp.arange(ends.shape[0], dtype=jnp.int32)
            place = num_free + jnp.cumsum(dead) - 1
            free = free.at[jnp.where(dead, place, c)].set(ends, mode="drop")
            num_free = num_free + jnp.sum(dead, dtype=jnp.int32)
            up = jnp.where(dead, self.parents.at[ends].get(mode="clip"), c)
            counts = counts.at[up].add(-1, mode="drop")
            # Of the branches that end at one node, one goes on to its parent.
            speaker = speaker.at[up].set(lanes, mode="drop")
            goes_on = (up < c) & (counts.at[up].get(mode="clip") == 0)
            goes_on &= speaker.at[up].get(mode="clip") == lanes
            return jnp.where(goes_on, up, c), counts, free, num_free, speaker

        ends = jnp.where(offspring == 0, self.leaves, c)
        loop = (ends, counts, self.free, self.num_free, self.speaker)
        # Few branches are long, so the loop goes on in ever narrower ones.
        while True:
            width = loop[0].shape[0]
            narrower = width // 8 if width > 16 else 0
            loop = jax.lax.while_loop(
                lambda loop, least=narrower: jnp.sum(loop[0] < c) > least, shorten, loop
            )
            if not narrower:
                break
            left = jnp.nonzero(loop[0] < c, size=narrower, fill_value=width)[0]
            loop = (loop[0].at[left].get(mode="fill", fill_value=c), *loop[1:])
        _, counts, free, num_free, speaker = loop
        return self._replace(counts=counts, free=free, num_free=num_free, speaker=speaker)

    def _insert(self, parents: Any, values: Any) -> Tree:
        """Puts a new leaf on each parent."""
        n, c = self.leaves.shape[0], self.capacity
        lost = self.lost | (self.num_free < n)
        num_free = jnp.maximum(self.num_free - n, 0)
        at = jax.lax.dynamic_slice(self.free, (num_free,), (n,))
        at = jnp.where(lost, c, at)  # nothing is overwritten
        put = lambda pool, new: pool.at[at].set(new, mode="drop", unique_indices=True)  # noqa: E731
        return self._replace(
            values=jax.tree.map(put, self.values, values), parents=put(self.parents, parents),
            counts=put(self.counts, jnp.ones(n, jnp.int32)), leaves=at, num_free=num_free,
            peak=jnp.maximum(self.peak, c - num_free), lost=lost,
        )  # fmt: skip

    def _replace(self, **changes: Any) -> Tree:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Tree(**{**fields, **changes})

    def paths(self, num_steps: int, *, reverse: bool) -> Any:
        """The values of each step along the path of each particle, `(T, N, ...)`.

        Args:
            num_steps: T, how often the tree has grown.
            reverse: Whether the last step comes first.
        """

        n = self.leaves.shape[0]
        blank = jax.tree.map(
            lambda v: jnp.zeros((n, num_steps, *v.shape[1:]), v.dtype), self.values
        )  # fmt: skip

        def back(i, loop):  # into the layout in which paths are handed on, without a second copy
            node, out = loop
            t = i if reverse else num_steps - 1 - i
            out = jax.tree.map(
                lambda o, v: o.at[:, t].set(jnp.take(v, node, axis=0, mode="clip")),
                out, self.values,
            )  # fmt: skip
            return jnp.take(self.parents, node, mode="clip"), out

        out = jax.lax.fori_loop(0, num_steps, back, (self.leaves, blank))[1]
        return jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), out)
