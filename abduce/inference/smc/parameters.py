"""The law of the parameters of a sequential model, with the evidence estimated by particles.

Given parameters `theta` in unconstrained coordinates `u`, one run of the particles returns
`log p(theta) + log |d theta / d u| + log Zhat(y | theta)`, where `Zhat` is unbiased. Metropolis-
Hastings on such estimates targets the exact posterior (Andrieu and Roberts 2009).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.errors import InvalidAlgorithm
from abduce.inference.problem import Problem
from abduce.inference.smc.blocks import split_latents
from abduce.inference.smc.cloud import Settings
from abduce.inference.smc.filtering import run_filter
from abduce.inference.target import FlatTarget, make_target
from abduce.ppl.replay import Given, Replay

__all__ = ["Evidence", "RandomWalk", "make_evidence"]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Estimates the density of the parameters; static.

    Attributes:
        settings: Of the particles.
        target: The parameters alone, as a flat vector.
        lookahead: As of `ab.smc`.
    """

    settings: Settings
    target: FlatTarget
    lookahead: Any = None

    @property
    def addresses(self) -> set[str]:
        """Of the parameters."""
        return {s.address for s in self.target.slots}

    def prior(self, data: Any, u: Any) -> Any:
        """Log prior density at `u`, with the log Jacobian."""
        return self.target.split(data["target"], u)[0]

    def run(self, data: Any, key: Any, u: Any) -> dict[str, Any]:
        """Runs the particles at `u`, shape `(dim,)`; as `run_filter`."""
        records = self.target.run(Replay(score=False), data["target"], u)["records"]
        fixed = {a: Given(records[a]["value"], shared=True) for a in self.addresses}
        return run_filter(
            self.settings, data["arguments"], {**data["given"], **fixed}, key,
            proposal=data["proposal"], initial=data["initial"], lookahead=self.lookahead,
            moves=data["moves"],
        )  # fmt: skip

    def __call__(self, data: Any, key: Any, u: Any) -> tuple[Any, dict[str, Any]]:
        """The log density estimate, and one draw of everything given the parameters."""
        k1, k2 = jax.random.split(key)
        out = self.run(data, k1, u)
        population = out["population"]
        index = jax.random.categorical(k2, jnp.log(population.probabilities))
        total = population.total + self.prior(data, u)
        return total, jax.tree.map(lambda x: x[index], out["values"])


def make_evidence(
    alg: Any, problem: Problem, states: Any, name: str
) -> tuple[Evidence, dict[str, Any]]:
    """Splits a problem into parameters and states.

    Args:
        alg: The `ab.smc` that runs the particles.
        problem: The conditioned model.
        states: A selection, or None.
        name: For messages.

    Returns:
        The evidence, and its data.

    Raises:
        InvalidAlgorithm: There are no parameters, or one is discrete.
    """
    parameters, paths = split_latents(problem, states, name)
    if not parameters:
        raise InvalidAlgorithm(
            f"{name}: `{problem.program.name}` has no parameter: all its latents "
            f"({', '.join(paths)}) are states of the scan. Use ab.smc."
        )
    discrete = [a for a in parameters if problem.latents[a].is_discrete]
    if discrete:
        raise InvalidAlgorithm(
            f"{name}: the parameter {discrete[0]!r} is discrete, and a random walk needs "
            f"continuous ones. Use ab.particle_gibbs, or observe it."
        )
    sites = problem.program.sites
    held = {a: Given(jnp.zeros(sites[a].shape, sites[a].dtype), trusted=True) for a in paths}
    rest = dataclasses.replace(problem, given={**problem.given, **held})
    target, inputs = make_target(rest, name)
    data = {
        "arguments": problem.arguments, "given": problem.given, "proposal": alg.proposal,
        "initial": alg.initial, "moves": alg.filter_moves(), "target": inputs,
    }  # fmt: skip
    alg.require_one_island(name)
    smoothing = "ffbs" if alg.smoothing == "ffbs" else "genealogy"  # sums are not asked for
    settings = dataclasses.replace(alg.settings(), store="paths", smoothing=smoothing)
    return Evidence(settings, target, alg.lookahead), data


class RandomWalk(eqx.Module):
    """Gaussian steps in the shape of the chains, learnt while warming up (Haario et al. 2001).

    Attributes:
        mean, cov: Of the coordinates, over all chains.
        log_scale: Of the step, relative to `cov`.
        count: Updates so far.
    """

    mean: Any
    cov: Any
    log_scale: Any
    count: Any

    @classmethod
    def start(cls, u: Any) -> RandomWalk:
        """From starting points `(chain, dim)`."""
        dim = u.shape[-1]
        return cls(
            jnp.mean(u, 0), jnp.eye(dim, dtype=u.dtype) * 0.1,
            jnp.log(jnp.asarray(2.38 / dim**0.5, u.dtype)), jnp.ones((), u.dtype),
        )  # fmt: skip

    def propose(self, key: Any, u: Any) -> Any:
        """A step from each row of `u`."""
        dim = u.shape[-1]
        root = jnp.linalg.cholesky(self.cov + 1e-8 * jnp.eye(dim, dtype=u.dtype))
        root = jnp.where(jnp.all(jnp.isfinite(root)), root, 0.1 * jnp.eye(dim, dtype=u.dtype))
        return u + jnp.exp(self.log_scale) * jax.random.normal(key, u.shape, u.dtype) @ root.T

    def learn(self, u: Any, rate: Any, target: float, on: Any) -> RandomWalk:
        """Follows the chains and the acceptance, if `on`."""
        gain = jnp.where(on, self.count**-0.6, 0.0).astype(u.dtype)
        mean = self.mean + gain * (jnp.mean(u, 0) - self.mean)
        centred = u - mean
        cov = self.cov + gain * (centred.T @ centred / u.shape[0] - self.cov)
        log_scale = self.log_scale + gain * (rate - target)
        return RandomWalk(mean, cov, log_scale.astype(u.dtype), self.count + jnp.where(on, 1, 0))
