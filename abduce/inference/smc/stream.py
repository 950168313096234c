"""What a posterior remembers of the data it was updated with."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.inference.smc.batches import BLOCK, Base, Layout
from abduce.inference.smc.population import Population

__all__ = ["Batch", "Stream"]

_LEAST_CAPACITY = 4 * BLOCK
_GROWTH = 4  # of the capacity: only memory is wasted, since the loop ends where the stack does


class Batch(eqx.Module):
    """Some batches of one shape, stacked, with the latents drawn for each.

    Attributes:
        data: Leading axis: the batches.
        z: `(batches, N, dim)`, unconstrained.
    """

    data: Any
    z: Any

    def __len__(self) -> int:
        return self.z.shape[0]


class Stream(eqx.Module):
    """What a posterior remembers of all its data.

    Attributes:
        position: Unconstrained coordinates of the shared latents, `(N, dim)`.
        population: The weights.
        log_step: The step size that the moves have learnt.
        start: Data of `base`.
        groups: Per layout, the batches: a few stacks, each at most half as long as the one before,
            so that adding one copies each number O(log T) times.
        algorithm: The `ab.smc` whose settings apply.
        base, layouts: See there.
        num_batches, evaluations, moves: Counters: evaluations are of one batch at one particle.
        has_evidence: Whether the evidence of the start was known.
    """

    position: Any
    population: Population
    log_step: Any
    start: Any
    groups: tuple[tuple[Batch, ...], ...]
    algorithm: Any
    base: Base = eqx.field(static=True)
    layouts: tuple[Layout, ...] = eqx.field(static=True)
    has_evidence: bool = eqx.field(static=True)
    num_batches: Any = 0
    evaluations: Any = 0
    moves: Any = 0

    @property
    def num_particles(self) -> int:
        return self.position.shape[0]

    def model(self, layout: Layout) -> list[Any]:
        """The arrays inside the model: the same for all batches, so not stacked."""
        return list(self.start["dynamic"][: layout.num_model])

    def find(self, layout: Layout, data: Any) -> int:
        """The group that a batch belongs to; the number of groups, if to none."""
        signature = _signature(data)
        for i, (other, group) in enumerate(zip(self.layouts, self.groups, strict=True)):
            if other == layout and _signature(group[0].data, 1) == signature:
                return i
        return len(self.layouts)

    def stacks(self, layout: Layout, data: Any) -> tuple[tuple[Layout, ...], list[Any]]:
        """Layouts, and for each: data and `z` padded to a capacity, and how many batches there are.

        The layout of the next batch is among them, be its stack empty: so the second batch finds
        the program of the first one compiled.
        """
        layouts, groups = self.layouts, list(self.groups)
        counts = [sum(len(x) for x in group) for group in groups]
        if self.find(layout, data) == len(layouts):
            z = np.zeros((self.num_particles, layout.target.dim), self.position.dtype)
            layouts, counts = (*layouts, layout), [*counts, 0]
            groups.append((_lifted(Batch(data, z)),))
        out = []
        for group, count in zip(groups, counts, strict=True):
            capacity = _LEAST_CAPACITY
            while capacity < count:
                capacity *= _GROWTH
            padded = jax.tree.map(lambda x, c=capacity: _padded(x, c), _joined(group))
            out.append((padded.data, padded.z, np.int32(count)))
        return layouts, out

    def moved(self, layouts: Any, stacks: Any, out: Any) -> Stream:
        """After the moves: each group becomes one stack."""
        groups = []
        for (data, _, count), z in zip(stacks, out["zs"], strict=True):
            whole = Batch(data, z if isinstance(z, jax.core.Tracer) else np.asarray(z))
            groups.append((jax.tree.map(lambda x, c=int(count): x[:c], whole),))
        keep = [i for i, s in enumerate(stacks) if s[2] > 0]
        return dataclasses.replace(
            self, position=out["position"], log_step=out["log_step"],
            layouts=tuple(layouts[i] for i in keep), groups=tuple(groups[i] for i in keep),
        )  # fmt: skip

    def append(self, layout: Layout, data: Any, z: Any) -> Stream:
        """With one more batch; `z` has shape `(N, dim)`."""
        i = self.find(layout, data)
        new = _lifted(Batch(data, z))
        layouts, groups = self.layouts, list(self.groups)
        if i == len(groups):
            layouts, groups = (*layouts, layout), [*groups, ()]
        stacks = list(groups[i])
        while stacks and len(stacks[-1]) <= len(new):
            new = _joined((stacks.pop(), new))
        groups[i] = (*stacks, new)
        return dataclasses.replace(
            self, layouts=layouts, groups=tuple(groups), num_batches=self.num_batches + 1
        )


def _namespace(x: Any) -> Any:
    return jnp if isinstance(x, jax.core.Tracer) else np


def _lifted(batch: Batch) -> Batch:
    """A stack of one, in NumPy arrays unless traced: stacking those compiles nothing."""

    def lift(x):
        return (x if isinstance(x, jax.core.Tracer) else np.asarray(x, jnp.result_type(x)))[None]

    return jax.tree.map(lift, batch)


def _joined(group: Any) -> Batch:
    if len(group) == 1:
        return group[0]

    def join(*xs):
        traced = any(isinstance(x, jax.core.Tracer) for x in xs)
        return (jnp if traced else np).concatenate(xs)

    return jax.tree.map(join, *group)


def _padded(x: Any, capacity: int) -> Any:
    xp = _namespace(x)
    return xp.concatenate([x, xp.broadcast_to(x[-1:], (capacity - len(x), *x.shape[1:]))])


def _signature(data: Any, lead: int = 0) -> Any:
    leaves, treedef = jax.tree.flatten(data)
    return treedef, tuple((np.shape(x)[lead:], jnp.result_type(x)) for x in leaves)
