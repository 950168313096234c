"""A fixed set of training examples: in memory, or on disk and larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidValue

__all__ = ["Rows", "split_rows"]

_ON_DEVICE = 1 << 30  # bytes that may be copied to the device at once


class Rows:
    """Rows of arrays with a common leading axis, in a new order in each epoch.

    Args:
        arrays: By name, each `(num_rows, ...)`; NumPy memory maps stay on disk.
        batch_size: Rows per batch.
        parts: Batches per step.
        seed: Of the order; the order of an epoch depends on it and on the epoch alone.
        index: Which rows belong to this set; None: all.

    Attributes:
        on_device: Whether `arrays` lie on the device, where batches are gathered by index.
    """

    def __init__(
        self,
        arrays: Mapping[str, Any],
        batch_size: int,
        parts: int = 1,
        seed: int = 0,
        index: np.ndarray | None = None,
    ):
        lengths = {a: len(x) for a, x in arrays.items()}
        if not lengths or len(set(lengths.values())) > 1:
            raise InvalidValue(
                f"fit: data= holds arrays with one row per simulation and equal lengths, got "
                f"{lengths}."
            )
        total = next(iter(lengths.values()))
        self.index = np.arange(total) if index is None else index
        self.num_rows = len(self.index)
        if self.num_rows < 2:
            raise InvalidValue(f"fit: data= holds {self.num_rows} simulations; 2 are the least.")
        self.batch_size, self.parts, self.seed = min(batch_size, self.num_rows), parts, seed
        size = sum(x.nbytes for x in arrays.values())
        self.on_device = size <= _ON_DEVICE
        self.arrays: Any = dict(arrays)
        if self.on_device:
            self.arrays = {a: jnp.asarray(np.asarray(x)) for a, x in arrays.items()}
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see about every row once."""
        return max(1, self.num_rows // (self.batch_size * self.parts))

    def batches(self, first: int, count: int, size: int) -> Any:
        """Rows of steps `first` to `first + count`, leading axes `(size, parts, batch)`."""
        index = np.stack([self._step(first + i) for i in range(count)])
        index = np.concatenate([index, np.repeat(index[-1:], size - count, 0)])
        if self.on_device:
            return index.astype(np.int32)
        rows = {a: self._gather(x, index[:count]) for a, x in self.arrays.items()}
        return {a: np.concatenate([x, np.repeat(x[-1:], size - count, 0)]) for a, x in rows.items()}

    def in_order(self, batch_size: int) -> Iterator[dict[str, Any]]:
        """All rows, in batches."""
        for i in range(0, self.num_rows, batch_size):
            index = self.index[i : i + batch_size]
            yield {a: x[index] for a, x in self.arrays.items()}

    def _step(self, step: int) -> np.ndarray:
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = (epoch, rng.permutation(self.index))
        width = self.batch_size * self.parts
        order = self._order[1][within * width : (within + 1) * width]
        if len(order) < width:  # a set smaller than one step
            order = np.resize(self._order[1], width)
        return order.reshape(self.parts, self.batch_size)

    @staticmethod
    def _gather(x: Any, index: np.ndarray) -> np.ndarray:
        """Rows of an array on disk, read in the order in which they lie there."""
        flat = index.reshape(-1)
        order = np.argsort(flat, kind="stable")
        out = np.empty((len(flat), *x.shape[1:]), x.dtype)
        out[order] = x[flat[order]]
        return out.reshape((*index.shape, *x.shape[1:]))


def split_rows(
    arrays: Mapping[str, Any], fraction: float, seed: int, batch_size: int, parts: int = 1
) -> tuple[Rows, Rows]:
    """Rows to train on, and rows held out."""
    total = len(next(iter(arrays.values())))
    order = np.random.default_rng([seed, 1 << 20]).permutation(total)
    held = min(max(1, round(fraction * total)), max(total - 2, 1))
    mine, rest = np.sort(order[held:]), np.sort(order[:held])
    rows = Rows(arrays, batch_size, parts, seed, mine)
    other = Rows(arrays, batch_size, 1, seed, rest if len(rest) > 1 else mine)
    return rows, other
