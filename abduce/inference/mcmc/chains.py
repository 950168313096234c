"""Runs the compiled single-chain program for all chains.

On a CPU a chain is a call from a Python thread: the calls release the interpreter lock and run on
as many cores as there are, `num_chains` does not enter the compiled program, and no chain waits for
another's longer trajectory. On other devices the chains are one `vmap`.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from .linear_map import LinearMap
from .machine import STATS, Controls, DualAverage, LogDensity, num_rows

__all__ = ["Chains", "Draws", "fresh_average", "joined"]


class Draws:
    """Draws of all chains, on the host, `(num_chains, num_draws, ...)`."""

    def __init__(self, rows: np.ndarray, dim: int):
        self.positions, self.gradients = rows[..., :dim], rows[..., dim : 2 * dim]
        self.stats = {name: rows[..., 2 * dim + i] for i, name in enumerate(STATS)}
        self.rows = rows


def joined(parts: Sequence[Draws]) -> Draws:
    """Draws of successive calls as one."""
    if len(parts) == 1:
        return parts[0]
    return Draws(np.concatenate([p.rows for p in parts], 1), parts[0].positions.shape[-1])


def fresh_average(
    log_step: float, dtype: np.dtype, *, pull: float = 0.0, shrinkage: float = 0.05
) -> np.ndarray:
    """Step-size adaptation before its first draw, the fields of `DualAverage`."""
    return np.array(DualAverage(log_step, log_step, 0.0, 0.0, log_step + pull, shrinkage), dtype)


class Chains:
    """Positions, counters and step sizes of the chains, and the calls that advance them.

    Attributes:
        positions: `(num_chains, dim)`, on the host.
        log_densities: `(num_chains,)` at the positions, after the first call.
        gradients: `(num_chains, dim)` there.
        averages: The fields of `DualAverage`, `(num_chains, 6)`.
        num_gradients: Evaluations so far, all chains together.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        log_density: LogDensity,
        data: Any,
        seeds: np.ndarray,
        positions: np.ndarray,
        *,
        threads: bool,
        num_steps: int = 0,
        length: float = 0.0,
    ):
        self.positions = np.array(positions)
        self.num_chains, self.dim = self.positions.shape
        self.dtype = self.positions.dtype
        self.restart_averages(0.0)
        self.log_densities = np.full(self.num_chains, np.nan)
        self.gradients = np.full(self.positions.shape, np.nan)
        self.num_gradients = 0
        self._seeds = seeds
        self._counters = np.zeros(self.num_chains, np.int32)
        self._data = jax.device_put(data)
        self._metric: tuple[LinearMap, LinearMap] | None = None
        self._num_steps, self._length = num_steps, length
        self._threads = threads
        self._warm = False
        self._seconds_per_gradient = np.inf
        if threads:
            self._program = partial(program, log_density, on_cpu=jax.default_backend() == "cpu")
            cores = (
                len(os.sched_getaffinity(0))
                if hasattr(os, "sched_getaffinity")
                else (os.cpu_count() or 1)
            )
            self._pool = ThreadPoolExecutor(max(1, min(cores, self.num_chains)))
        else:
            single = partial(program, log_density, on_cpu=False)
            self._program = jax.vmap(single, in_axes=(None, 0, 0, 0, 0, None, None))

    def restart_averages(self, log_step: float, **options) -> None:
        """Gives all chains a step size, and a fresh adaptation of it."""
        self.averages = np.stack([fresh_average(log_step, self.dtype, **options)] * self.num_chains)

    def change_data(self, data: Any, positions: np.ndarray) -> None:
        """Changes the density; `evaluate` must follow."""
        self._data = jax.device_put(data)
        self.positions = np.array(positions, self.dtype)

    def close(self) -> None:
        """Ends the threads."""
        if self._threads:
            self._pool.shutdown()

    def evaluate(self, metric: LinearMap, chains: Sequence[int] | None = None) -> None:
        """Fills `log_densities` and `gradients` at the positions."""
        self.advance(0, metric, max_depth=0, chains=chains)

    def advance(
        self,
        num_draws: int,
        metric: LinearMap,
        *,
        max_depth: int,
        adapt: bool = False,
        target: float = 0.8,
        thinning: int = 1,
        chains: Sequence[int] | None = None,
    ) -> Draws:
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
        controls = Controls(
            np.array([num_draws * thinning, thinning, max_depth, adapt, self._num_steps], np.int32),
            np.array([target, self._length], self.dtype),
        )
        device_metric = self._on_device(metric)
        begin, before = time.perf_counter(), self.num_gradients
        if self._threads:
            results = self._from_threads(controls, device_metric, chains)
        else:
            results = self._from_vmap(controls, device_metric)
        dim = self.dim
        rows = np.full((self.num_chains, num_draws, 2 * dim + len(STATS)), np.nan, self.dtype)
        for i, (kept, state, counts) in results.items():
            rows[i] = kept[:num_draws]
            self.positions[i], self.gradients[i] = state[:dim], state[dim : 2 * dim]
            self.log_densities[i] = state[2 * dim]
            self._counters[i] = counts[0]
            self.num_gradients += int(counts[1])
            if adapt:
                self.averages[i] = state[2 * dim + 1 :]
        seconds = (time.perf_counter() - begin) / max(1, self.num_gradients - before)
        self._seconds_per_gradient = min(seconds, self._seconds_per_gradient)
        return Draws(rows, self.dim)

    def seconds_per_gradient(self) -> float:
        """Wall-clock seconds of one gradient of one chain, calls included; the best seen."""
        return self._seconds_per_gradient

    def _on_device(self, metric: LinearMap) -> LinearMap:
        if self._metric is None or self._metric[0] is not metric:
            first, second, third = (np.asarray(a, self.dtype) for a in metric[:3])
            structured = np.bool_(metric.is_structured)
            placed = jax.device_put(LinearMap(first, second, third, structured))
            self._metric = (metric, placed)
        return self._metric[1]

    def _from_threads(self, controls, metric, chains):
        # settings made by context managers are per thread
        wide, device = jax.config.jax_enable_x64, jax.config.jax_default_device
        precision = jax.config.jax_default_matmul_precision

        def call(i):
            with (
                jax.enable_x64(wide),
                jax.default_device(device),
                jax.default_matmul_precision(precision),
            ):
                result = self._program(
                    self._data,
                    self._seeds[i],
                    self._counters[i],
                    self.positions[i],
                    self.averages[i],
                    controls,
                    metric,
                )
            return tuple(map(np.asarray, result))

        which = list(range(self.num_chains)) if chains is None else list(chains)
        if not self._warm:  # one thread compiles, the others must not do it again
            self._warm = True
            first = call(which[0])
            return {which[0]: first} | {i: call(i) for i in which[1:]}
        if controls.integers[0] == 0 or len(which) == 1:
            return {i: call(i) for i in which}  # too short for a thread to pay
        futures = [(i, self._pool.submit(call, i)) for i in which]
        try:
            return {i: future.result() for i, future in futures}
        except BaseException:
            for _, future in futures:
                future.cancel()
            raise

    def _from_vmap(self, controls, metric):
        result = jax.device_get(
            self._program(
                self._data,
                self._seeds,
                self._counters,
                self.positions,
                self.averages,
                controls,
                metric,
            )
        )
        return dict(enumerate(zip(*result, strict=True)))

    def max_draws(self) -> int:
        """How many kept draws one call can return."""
        return num_rows(self.dim)
