"""HMC and NUTS for a density over a flat vector."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np

from abduce.errors import InitializationError

from .chains import Chains
from .counter_random import chain_seeds
from .fixed_length import run_hmc
from .linear_map import diagonal_map, layout_rank
from .machine import LogDensity
from .pacing import Pacer
from .report import warnings_of
from .settings import HMCConfig, HMCRun
from .trajectory import run_nuts
from .warmup import AdaptTarget, warm_up

__all__ = ["run"]

MAX_ATTEMPTS = 100
_SMALL_FOR_BLAS = 30  # dimension up to which NumPy's linear algebra starts no threads
_SINGLE_KERNEL_LIMIT = 256  # larger dimensions fill a kernel of their own


def run(
    log_density: LogDensity,
    data: Any,
    key: jax.Array,
    config: HMCConfig,
    propose_initial: Callable[[jax.Array, int], np.ndarray],
    *,
    describe_failure: Callable[[np.ndarray], str] | None = None,
    adapt_target: AdaptTarget | None = None,
) -> HMCRun:
    """Draws from a density.

    Args:
        log_density: `(data, q) -> scalar`; hashable, and the same object on every call that
            should reuse the compiled program.
        data: Pytree of arrays.
        key: Typed PRNG key.
        config: The settings.
        propose_initial: `(key, attempt) -> (num_chains, dim)` candidate starting points.
        describe_failure: Says why a point has no finite log density.
        adapt_target: Lets the density adapt to the draws of the warm-up; see `warm_up`.

    Returns:
        The draws and their statistics.

    Raises:
        InitializationError: No starting point with finite log density and gradient was found.
    """
    seeds = chain_seeds(key, config.num_chains)
    first = np.asarray(propose_initial(key, 0))
    dim = first.shape[1]
    rank = layout_rank(dim, config.dense_mass)
    threads = _use_threads(config)

    compiled = run_nuts if config.kind == "nuts" else run_hmc

    def program(log_density, *args, on_cpu):
        return compiled(
            log_density,
            *args,
            max_depth=config.max_tree_depth,
            on_cpu=on_cpu and dim <= _SINGLE_KERNEL_LIMIT,
        )

    chains = Chains(
        program,
        log_density,
        data,
        seeds,
        first,
        threads=threads,
        num_steps=config.num_steps or 0,
        length=config.trajectory_length or 0.0,
    )
    try:
        starts = _Starts(chains, rank, key, propose_initial, describe_failure)
        starts.settle(list(range(config.num_chains)))
        pacer = Pacer(chains, config)
        try:
            with _single_blas_thread(dim), np.errstate(all="ignore"):
                warmup = warm_up(chains, config, rank, pacer.advance, starts.replace, adapt_target)
            chains.restart_averages(float(np.log(warmup.step_size)))
            pacer.start_sampling(warmup.num_draws)
            draws = pacer.advance(
                config.num_samples // config.thinning,
                warmup.metric,
                keep_on_interrupt=True,
                max_depth=config.max_tree_depth,
                thinning=config.thinning,
            )
        finally:
            pacer.close()
    finally:
        chains.close()
    stats = dict(draws.stats)
    for name, dtype in (("n_steps", np.int32), ("tree_depth", np.int32), ("diverging", bool)):
        stats[name] = stats[name].astype(dtype)
    messages = warnings_of(draws.positions, stats, config)
    if config.kind == "hmc":
        del stats["tree_depth"]
    if pacer.interrupted:
        messages.insert(
            0,
            f"ab.{config.kind}: interrupted after {draws.positions.shape[1]} of "
            f"{config.num_samples // config.thinning} draws per chain. These are "
            f"valid, if fewer; call again for more.",
        )
    return HMCRun(
        draws.positions,
        stats,
        warmup,
        warmup.num_gradients,
        chains.num_gradients - warmup.num_gradients,
        warmup.step_size,
        warmup.metric_kind,
        messages,
        pacer.interrupted,
    )


def _use_threads(config: HMCConfig) -> bool:
    if config.chain_method == "auto":
        return jax.default_backend() == "cpu"
    return config.chain_method == "threads"


@functools.cache
def _thread_pools() -> Any:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController()


def _single_blas_thread(dim: int) -> AbstractContextManager:
    """Keeps NumPy's linear algebra on one thread while the metric is fitted.

    The matrices are small, and OpenBLAS threads wait for each other by spinning: on a busy machine
    an eigendecomposition at dimension 200 took 440 ms with two threads and 10 ms with one.
    """
    pools = _thread_pools() if dim > _SMALL_FOR_BLAS else None
    return nullcontext() if pools is None else pools.limit(limits=1, user_api="blas")


class _Starts:
    """Candidate starting points, until each chain has one with finite density and gradient."""

    def __init__(self, chains: Chains, rank: int, key, propose, describe):
        self.chains, self.key, self.propose, self.describe = chains, key, propose, describe
        self.metric = diagonal_map(np.ones(chains.dim), rank)
        self.attempt = 0

    def replace(self, pending: list[int]) -> None:
        """Gives the listed chains new starting points."""
        self.attempt += 1
        candidates = np.asarray(self.propose(self.key, self.attempt))
        for i in pending:
            self.chains.positions[i] = candidates[i]
        self.settle(pending)

    def settle(self, pending: list[int]) -> None:
        """Replaces points of the listed chains until all are usable."""
        chains = self.chains
        for _ in range(MAX_ATTEMPTS):
            chains.evaluate(self.metric, pending)
            finite = np.isfinite(chains.log_densities) & np.all(np.isfinite(chains.gradients), 1)
            pending = [i for i in pending if not finite[i]]
            if not pending:
                return
            self.attempt += 1
            candidates = np.asarray(self.propose(self.key, self.attempt))
            for i in pending:
                chains.positions[i] = candidates[i]
        worst = pending[0]
        reason = (
            self.describe(chains.positions[worst])
            if self.describe
            else (f"the log density is {chains.log_densities[worst]} at {chains.positions[worst]}.")
        )
        raise InitializationError(
            f"No starting point with finite log density and gradient for chain {worst} in "
            f"{MAX_ATTEMPTS} attempts: {reason}"
        )
