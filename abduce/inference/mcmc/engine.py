"""HMC and NUTS for a density over a flat vector."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from abduce.errors import InitializationError, InvalidAlgorithm

from .chains import Chains, Draws
from .counter_random import chain_seeds
from .linear_map import diagonal_map, layout_rank
from .settings import HMCConfig, HMCRun
from .trajectory import LogDensity, run_chain
from .warmup import warm_up

__all__ = ["run"]

MAX_ATTEMPTS = 100
_SECONDS_PER_CALL = 0.3  # an interrupt is seen this soon


def run(log_density: LogDensity, data: Any, key: jax.Array, config: HMCConfig,
        propose_initial: Callable[[jax.Array, int], np.ndarray], *,
        describe_failure: Callable[[np.ndarray], str] | None = None) -> HMCRun:
    """Draws from a density.

    Args:
        log_density: `(data, q) -> scalar`; hashable, and the same object on every call that
            should reuse the compiled program.
        data: Pytree of arrays.
        key: Typed PRNG key.
        config: The settings.
        propose_initial: `(key, attempt) -> (num_chains, dim)` candidate starting points.
        describe_failure: Says why a point has no finite log density.

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

    def program(log_density, *args, on_cpu):
        return run_chain(log_density, *args, max_depth=config.max_tree_depth,
                         on_cpu=on_cpu and dim <= 256)

    chains = Chains(program, log_density, data, seeds, first, threads=threads)
    try:
        _find_start(chains, diagonal_map(np.ones(dim), rank), key, propose_initial,
                    describe_failure)
        pacer = _Pacer(chains, config)
        warmup = warm_up(chains, config, rank, pacer.advance)
        chains.restart_averages(float(np.log(warmup.step_size)))
        draws = pacer.advance(config.num_samples // config.thinning, warmup.metric,
                              max_depth=config.max_tree_depth, thinning=config.thinning)
    finally:
        chains.close()
    stats = dict(draws.stats)
    for name, dtype in (("n_steps", np.int32), ("tree_depth", np.int32), ("diverging", bool)):
        stats[name] = stats[name].astype(dtype)
    return HMCRun(draws.positions, stats, warmup, warmup.num_gradients,
                  chains.num_gradients - warmup.num_gradients, warmup.step_size,
                  warmup.metric_kind)


def _use_threads(config: HMCConfig) -> bool:
    if config.chain_method == "auto":
        return jax.default_backend() == "cpu"
    return config.chain_method == "threads"


def _find_start(chains: Chains, metric, key, propose_initial, describe_failure) -> None:
    """Replaces candidates until each chain has a finite log density and gradient."""
    pending = list(range(chains.num_chains))
    for attempt in range(1, MAX_ATTEMPTS + 1):
        chains.evaluate(metric, pending)
        finite = np.isfinite(chains.log_densities) & np.all(np.isfinite(chains.gradients), 1)
        pending = [i for i in range(chains.num_chains) if not finite[i]]
        if not pending:
            return
        candidates = np.asarray(propose_initial(key, attempt))
        for i in pending:
            chains.positions[i] = candidates[i]
    reason = describe_failure(chains.positions[pending[0]]) if describe_failure else (
        f"the log density is {chains.log_densities[pending[0]]} at {chains.positions[pending[0]]}")
    raise InitializationError(
        f"No starting point with finite log density and gradient for chain {pending[0]} in "
        f"{MAX_ATTEMPTS} attempts: {reason}")


class _Pacer:
    """Splits requests into calls that end soon enough to notice an interrupt."""

    def __init__(self, chains: Chains, config: HMCConfig):
        self.chains, self.config = chains, config
        self.per_call = 50

    def advance(self, num_draws: int, metric, **options) -> Draws:
        """As `Chains.advance`, for any number of draws."""
        parts, done = [], 0
        while done < num_draws:
            count = min(num_draws - done, self.per_call, self.chains.max_draws())
            begin = time.perf_counter()
            parts.append(self.chains.advance(count, metric, target=self.config.target_accept_prob,
                                             **options))
            seconds = max(time.perf_counter() - begin, 1e-6)
            self.per_call = max(1, int(min(4 * self.per_call,
                                           count * _SECONDS_PER_CALL / seconds)))
            done += count
        joined = Draws.__new__(Draws)
        joined.positions = np.concatenate([p.positions for p in parts], 1)
        joined.gradients = np.concatenate([p.gradients for p in parts], 1)
        joined.stats = {name: np.concatenate([p.stats[name] for p in parts], 1)
                        for name in parts[0].stats}
        return joined
