"""`ab.nuts` and `ab.hmc`: Hamiltonian Monte Carlo on the continuous latents of a model."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from abduce.errors import InvalidAlgorithm
from abduce.inference.algorithm import Algorithm, algorithm
from abduce.inference.centering import Centering, hierarchical_sites
from abduce.inference.init import starting_points
from abduce.inference.mcmc.engine import run
from abduce.inference.mcmc.settings import HMCConfig
from abduce.inference.posterior import Posterior, make_posterior
from abduce.inference.problem import Problem
from abduce.inference.reference import large_sites, with_reference, zero_reference
from abduce.inference.target import FlatTarget, constrain, make_target

__all__ = ["hmc", "nuts"]


@algorithm
class nuts(Algorithm):
    """The No-U-Turn Sampler.

    Dynamic Hamiltonian Monte Carlo (Hoffman and Gelman 2014) with multinomial sampling and the
    generalized U-turn criterion (Betancourt 2017). Step size and metric are adapted during the
    warm-up, over all chains together; the metric is diagonal, low rank or dense, whichever the
    warm-up shows to pay. One compiled program serves all chains, which run in parallel threads,
    and any data of the same shapes.

    Args:
        num_warmup: Warm-up iterations per chain, at most.
        num_samples: Draws per chain.
        num_chains: Chains.
        thinning: Keep each n-th draw; `num_samples // thinning` are kept.
        target_accept_prob: Mean acceptance that the step size aims at. Higher is slower and more
            careful.
        max_tree_depth: At most `2**max_tree_depth - 1` leapfrog steps a draw.
        dense_mass: None: the warm-up decides. False: diagonal. True: dense.
        step_size: Initial step size; None finds one.
        adapt_step_size: Whether to adapt the step size.
        adapt_mass_matrix: Whether to adapt the metric.
        adapt_coordinates: Whether hierarchical location-scale sites choose by themselves how far
            they are centred (`abduce.inference.centering`). Draws, addresses and densities are the
            same; funnels need no `ab.reparam`.
        init: Starting points: a choice map (a chain axis allowed), a Model, a Posterior,
            `ab.init.uniform(2.)` or `ab.init.prior()`. None: uniform in (-2, 2) on the
            unconstrained scale.
        chain_method: 'auto', 'threads' or 'vectorized'.
        progress_bar: Show progress when a run takes more than about two seconds.

    Raises (on use):
        DiscreteLatent: A latent is discrete.
        InitializationError: No starting point has a finite density; the message names the site.

    Example:
        >>> post = ab.nuts(num_samples=500)(schools).posterior(key, sigma, given={"y": y})
    """

    num_warmup: int = 1000
    num_samples: int = 1000
    num_chains: int = 4
    thinning: int = 1
    target_accept_prob: float = 0.8
    max_tree_depth: int = 10
    dense_mass: bool | None = None
    step_size: float | None = None
    adapt_step_size: bool = True
    adapt_mass_matrix: bool = True
    adapt_coordinates: bool = True
    init: Any = None
    chain_method: str = "auto"
    progress_bar: bool = True

    def __post_init__(self):
        self.config()

    def config(self) -> HMCConfig:
        """The settings of the engine."""
        return HMCConfig(kind="nuts", max_tree_depth=self.max_tree_depth, **_shared_settings(self))

    def run(self, problem: Problem, key: Any) -> Posterior:
        return _run(self, problem, key)


@algorithm
class hmc(Algorithm):
    """Hamiltonian Monte Carlo with trajectories of a fixed length (Neal 2011).

    Args:
        num_steps: Leapfrog steps per draw; give this or `trajectory_length`.
        trajectory_length: Step size times number of steps, on the whitened scale.
        num_warmup, num_samples, num_chains, thinning, target_accept_prob, dense_mass, step_size,
            adapt_step_size, adapt_mass_matrix, adapt_coordinates, init, chain_method,
            progress_bar: As in `ab.nuts`.
    """

    num_steps: int | None = None
    trajectory_length: float | None = None
    num_warmup: int = 1000
    num_samples: int = 1000
    num_chains: int = 4
    thinning: int = 1
    target_accept_prob: float = 0.8
    dense_mass: bool | None = None
    step_size: float | None = None
    adapt_step_size: bool = True
    adapt_mass_matrix: bool = True
    adapt_coordinates: bool = True
    init: Any = None
    chain_method: str = "auto"
    progress_bar: bool = True

    def __post_init__(self):
        if self.num_steps is not None and self.trajectory_length is not None:
            raise InvalidAlgorithm("ab.hmc: give num_steps or trajectory_length, not both.")
        self.config()

    def config(self) -> HMCConfig:
        """The settings of the engine."""
        length = self.trajectory_length
        if self.num_steps is None and length is None:
            length = float(np.pi / 2)  # a quarter period of a standard normal: independent draws
        return HMCConfig(
            kind="hmc", num_steps=self.num_steps, trajectory_length=length, **_shared_settings(self)
        )

    def run(self, problem: Problem, key: Any) -> Posterior:
        return _run(self, problem, key)


def _shared_settings(alg: Any) -> dict[str, Any]:
    names = (
        "num_warmup", "num_samples", "num_chains", "thinning", "target_accept_prob", "dense_mass",
        "step_size", "adapt_step_size", "adapt_mass_matrix", "chain_method", "progress_bar",
    )  # fmt: skip
    return {n: getattr(alg, n) for n in names}


def _run(alg: Any, problem: Problem, key: Any) -> Posterior:
    name = f"ab.{alg.name}"
    if problem.is_traced or isinstance(key, jax.core.Tracer):
        raise InvalidAlgorithm(
            f"{name} adapts between compiled calls, so it cannot run inside jax.jit or jax.vmap. "
            f"Loop over the data sets in Python: with equal shapes nothing is compiled again. "
            f"ab.importance can be mapped."
        )
    target, data = make_target(problem, name)
    moving = _Moving(alg, problem, target, data)
    data = moving.data
    propose, describe = starting_points(alg.init, problem, target, data, alg.num_chains, name)
    result = run(
        target, data, key, alg.config(), propose, describe_failure=describe,
        adapt_target=moving.adapt if moving.is_needed else None,
    )  # fmt: skip
    data = moving.data
    chains, n, dim = result.positions.shape
    flat = constrain(target, data, problem.program, result.positions.reshape(-1, dim))
    draws, active = jax.tree.map(lambda x: x.reshape((chains, n, *x.shape[1:])), flat)
    result.stats["lp"] = result.stats["lp"] + moving.constant
    result.stats["energy"] = result.stats["energy"] - moving.constant
    diagnostics = {
        **result.stats,
        "num_gradients_warmup": int(result.num_gradients_warmup),
        "num_gradients_sampling": int(result.num_gradients_sampling),
        "step_size_final": float(result.step_size),
        "metric": result.metric_kind,
    }
    messages = [*_runaways(target, result.positions, draws, name), *result.warnings]
    return make_posterior(
        problem, draws, algorithm=alg.name, diagnostics=diagnostics, messages=messages,
        active=active,
    )  # fmt: skip


_FAR = 1e17  # on the unconstrained scale; no sensible prior reaches there


def _runaways(
    target: FlatTarget, positions: np.ndarray, draws: dict[str, Any], name: str
) -> list[str]:
    """Draws that go to infinity: the posterior does not integrate."""
    found = [
        repr(s.address)
        for s in target.slots
        if not np.max(np.abs(positions[..., s.start : s.stop])) < _FAR
        or np.isinf(draws[s.address]).any()
    ]
    if not found:
        return []
    return [
        f"{name}: the draws of {', '.join(found)} run away without bound: the posterior looks "
        f"improper (it does not integrate to a finite number), and these draws mean nothing. Give "
        f"{'it' if len(found) == 1 else 'them'} a proper prior, or add data that identify "
        f"{'it' if len(found) == 1 else 'them'}."
    ]


class _Moving:
    """What of the density adapts during the warm-up: coordinates, and the float32 reference."""

    def __init__(self, alg: Any, problem: Problem, target: FlatTarget, data: Any):
        self.target, self.constant = target, 0.0
        self.large = large_sites(problem)
        adapts = alg.adapt_coordinates and alg.num_warmup > 0
        sites = hierarchical_sites(problem, target) if adapts else ()
        self.centering = Centering(target, sites) if sites else None
        self.data = zero_reference(problem, self.large, data) if self.large else data
        if self.centering is not None:
            self.data = self.centering.start(self.data)

    @property
    def is_needed(self) -> bool:
        return self.centering is not None or bool(self.large)

    def adapt(self, positions: np.ndarray) -> Any:
        """From draws to new data and the map of points into its coordinates, or None."""
        move = None
        middle = positions[-1:]
        if self.centering is not None:
            chosen = self.centering.choose(self.data, positions)
            if chosen is not None:
                move = functools.partial(self.centering.move, self.data, chosen)
                middle = move(middle)
                self.data = self.centering.replaced(self.data, chosen)
        if self.large:
            self.data, self.constant = with_reference(
                self.target, self.large, self.data, middle[0]
            )
        elif move is None:
            return None
        return self.data, move
