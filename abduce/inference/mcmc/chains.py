"""Runs the compiled single-chain program for all chains.

On a CPU a chain is a call from a Python thread: the calls release the interpreter lock and run on
as many cores as there are, `num_chains` does not enter the compiled program, and no chain waits for
another's longer trajectory. On other devices the chains are one `vmap`.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from .linear_map import LinearMap
from .trajectory import STATS, Controls, DualAverage, LogDensity, num_rows

__all__ = ["Chains", "Draws", "fresh_average"]


class Draws:
    """Draws of all chains, on the host, `(num_chains, num_draws, ...)`."""

    def __init__(self, rows: np.ndarray, dim: int):
        self.positions, self.gradients = rows[..., :dim], rows[..., dim:2 * dim]
        self.stats = {name: rows[..., 2 * dim + i] for i, name in enumerate(STATS)}


def fresh_average(log_step: float, dtype: np.dtype, *, center: float | None = None) -> DualAverage:
    """Step-size adaptation before its first draw."""
    center = log_step if center is None else center
    return DualAverage(*(dtype.type(v) for v in (log_step, log_step, 0.0, 0.0, center)))


class Chains:
    """Positions, counters and step sizes of the chains, and the calls that advance them.

    Attributes:
        positions: `(num_chains, dim)`, on the host.
        log_densities: `(num_chains,)` at the positions, after the first call.
        gradients: `(num_chains, dim)` there.
        averages: One `DualAverage` per chain.
        num_gradients: Evaluations so far, all chains together.
    """

    def __init__(self, program: Callable[..., Any], log_density: LogDensity, data: Any,
                 seeds: np.ndarray, positions: np.ndarray, *, threads: bool):
        self.positions = np.array(positions)
        self.num_chains, self.dim = self.positions.shape
        self.dtype = self.positions.dtype
        self.averages = [fresh_average(0.0, self.dtype)] * self.num_chains
        self.log_densities = np.full(self.num_chains, np.nan)
        self.gradients = np.full(self.positions.shape, np.nan)
        self.num_gradients = 0
        self._seeds = seeds
        self._counters = [np.uint32(0)] * self.num_chains
        self._data = jax.device_put(data)
        self._metric: tuple[LinearMap, LinearMap] | None = None
        self._threads = threads
        self._warm = False
        if threads:
            self._program = partial(program, log_density, on_cpu=True)
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (
                os.cpu_count() or 1)
            self._pool = ThreadPoolExecutor(max(1, min(cores, self.num_chains)))
        else:
            single = partial(program, log_density, on_cpu=False)
            self._program = jax.vmap(single, in_axes=(None, 0, 0, 0, 0, None, None))

    def close(self) -> None:
        """Ends the threads."""
        if self._threads:
            self._pool.shutdown()

    def evaluate(self, metric: LinearMap, chains: Sequence[int] | None = None) -> None:
        """Fills `log_densities` and `gradients` at the positions."""
        self.advance(0, metric, max_depth=0, chains=chains)

    def advance(self, num_draws: int, metric: LinearMap, *, max_depth: int, adapt: bool = False,
                target: float = 0.8, thinning: int = 1,
                chains: Sequence[int] | None = None) -> Draws:
        """Makes draws with every chain.

        Args:
            num_draws: Kept draws per chain, at most `num_rows(dim)`.
            metric: The linear map, numpy arrays of any float type.
            max_depth: Largest number of doublings.
            adapt: Adapt each chain's step size.
            target: Wanted acceptance rate.
            thinning: Draws made for each one kept.
            chains: Indices of the chains to run (threads only); the others get NaN rows.

        Returns:
            The draws. Nothing of the state changes if the call is interrupted.
        """
        controls = Controls(np.int32(num_draws * thinning), np.int32(thinning),
                            np.int32(max_depth), np.bool_(adapt), self.dtype.type(target))
        device_metric = self._on_device(metric)
        if self._threads:
            results = self._from_threads(controls, device_metric, chains)
        else:
            results = self._from_vmap(controls, device_metric)
        width = 2 * self.dim + len(STATS)
        rows = np.full((self.num_chains, num_draws, width), np.nan, self.dtype)
        for i, r in results.items():
            rows[i] = r.rows[:num_draws]
            self.positions[i], self.log_densities[i] = r.position, r.log_density
            self.gradients[i], self._counters[i] = r.gradient, r.draw
            self.num_gradients += int(r.num_gradients)
            if adapt:
                self.averages[i] = r.average
        return Draws(rows, self.dim)

    def _on_device(self, metric: LinearMap) -> LinearMap:
        if self._metric is None or self._metric[0] is not metric:
            cast = [np.asarray(a, self.dtype) for a in metric[:3]]
            placed = jax.device_put(LinearMap(*cast, np.bool_(metric.is_structured)))
            self._metric = (metric, placed)
        return self._metric[1]

    def _from_threads(self, controls, metric, chains):
        def call(i):
            return jax.device_get(self._program(
                self._data, self._seeds[i], self._counters[i], self.positions[i],
                self.averages[i], controls, metric))

        which = list(range(self.num_chains)) if chains is None else list(chains)
        if not self._warm:  # one thread compiles, the others must not do it again
            self._warm = True
            first = call(which[0])
            return {which[0]: first} | {i: call(i) for i in which[1:]}
        if int(controls.num_draws) == 0 or len(which) == 1:
            return {i: call(i) for i in which}  # too short for a thread to pay
        futures = [(i, self._pool.submit(call, i)) for i in which]
        try:
            return {i: future.result() for i, future in futures}
        except BaseException:
            for _, future in futures:
                future.cancel()
            raise

    def _from_vmap(self, controls, metric):
        averages = jax.tree.map(lambda *a: np.stack(a), *self.averages)
        result = jax.device_get(self._program(
            self._data, self._seeds, np.stack(self._counters), self.positions, averages, controls,
            metric))
        return {i: jax.tree.map(lambda a, i=i: a[i], result) for i in range(self.num_chains)}

    def max_draws(self) -> int:
        """How many kept draws one call can return."""
        return num_rows(self.dim)
