"""Weighted populations: what every sequential Monte Carlo method carries, and how it resamples.

A population holds log weights since the last resampling and the evidence up to there, so that

    log Z = log_evidence + log mean exp(log_weights)

is an unbiased estimate (of Z) at any moment, whenever and however it was resampled, as long as the
scheme chooses particle `i` with mean count `N w_i`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.errors import InvalidAlgorithm, suggest
from abduce.kernels import resampling

__all__ = ["Population", "Resampling", "take"]


class Population(eqx.Module):
    """The weights of N particles.

    Attributes:
        log_weights: Shape `(N,)`, nats, unnormalized, since the last resampling.
        log_evidence: Log evidence up to the last resampling, in nats.
        log_mean: Log of the mean of the current weights.
        ess: Effective sample size of the current weights, between 1 and N; 0 if all are zero.
    """

    log_weights: Any
    log_evidence: Any
    log_mean: Any
    ess: Any

    @classmethod
    def start(cls, num_particles: int, dtype: Any = None) -> Population:
        """Equal weights, evidence 1."""
        dtype = dtype or jnp.result_type(float)
        zero = jnp.zeros((), dtype)
        return cls(jnp.zeros(num_particles, dtype), zero, zero, jnp.full((), num_particles, dtype))

    @classmethod
    def weighted(cls, log_weights: Any, log_evidence: Any) -> Population:
        """A population with these weights."""
        log_mean, ess = _statistics(log_weights)
        return cls(log_weights, jnp.asarray(log_evidence, log_weights.dtype), log_mean, ess)

    @property
    def total(self) -> Any:
        """Log evidence so far, in nats."""
        return self.log_evidence + self.log_mean

    @property
    def probabilities(self) -> Any:
        """Normalized weights; equal ones if all are zero."""
        n = self.log_weights.shape[0]
        alive = self.log_mean > -jnp.inf
        safe = jnp.where(alive, self.log_mean, 0.0)
        w = jnp.exp(self.log_weights - safe) / n
        return jnp.where(alive, w, 1.0 / n)

    def reweight(self, increments: Any) -> Population:
        """Adds log weights, shape `(N,)` or scalar; a NaN counts as zero weight."""
        new = self.log_weights + increments
        new = jnp.where(jnp.isnan(new), -jnp.inf, new).astype(self.log_weights.dtype)
        return Population.weighted(new, self.log_evidence)


def _statistics(log_weights: Any) -> tuple[Any, Any]:
    """Log mean weight and effective sample size, without NaN where all weights are zero."""
    n = log_weights.shape[0]
    peak = jnp.max(log_weights)
    safe = jnp.where(jnp.isfinite(peak), peak, 0.0)
    w = jnp.exp(log_weights - safe)
    s1, s2 = jnp.sum(w), jnp.sum(w * w)
    log_mean = jnp.where(s1 > 0, jnp.log(s1), -jnp.inf) + safe - math.log(n)
    return log_mean, jnp.where(s2 > 0, s1 * s1 / jnp.where(s2 > 0, s2, 1.0), 0.0)


def take(tree: Any, ancestors: Any) -> Any:
    """Rows of every array in a tree (axis 0)."""
    return jax.tree.map(lambda x: jnp.take(x, ancestors, axis=0, mode="clip"), tree)


@dataclasses.dataclass(frozen=True)
class Resampling:
    """When and how a population is resampled.

    Attributes:
        scheme: One of `abduce.kernels.resampling.SCHEMES`.
        threshold: Resample where the effective sample size is below this fraction of N; 0 never,
            1 at every step.
        conditional: Particle 0 is retained (conditional SMC).
    """

    scheme: str = "systematic"
    threshold: float = 0.5
    conditional: bool = False

    def __post_init__(self):
        known = tuple(resampling.SCHEMES)
        if self.scheme not in known:
            raise InvalidAlgorithm(
                f"unknown resampler {self.scheme!r}; there are {', '.join(known)}."
                f"{suggest(str(self.scheme), known)}"
            )
        if not isinstance(self.threshold, numbers.Real) or not 0 <= self.threshold <= 1:
            raise InvalidAlgorithm(
                f"the ESS threshold is a fraction of the particles, in [0, 1], got "
                f"{self.threshold!r}. 0 never resamples, 1 always."
            )

    def ancestors(self, key: Any, log_weights: Any, positions: Any = None) -> Any:
        """Draws ancestors, shape `(N,)`."""
        if self.conditional:
            return resampling.conditional(self.scheme, key, log_weights, positions)
        return resampling.SCHEMES[self.scheme](key, log_weights, positions)

    def due(self, population: Population) -> Any:
        """Whether the population should be resampled now: a bool array, or a Python False."""
        n = population.log_weights.shape[0]
        if self.threshold == 0:
            return jnp.zeros((), bool)
        if self.threshold == 1:
            return jnp.ones((), bool)
        return population.ess < self.threshold * n

    def __call__(
        self,
        key: Any,
        population: Population,
        tree: Any,
        positions: Any = None,
        choose: Callable[[Any], Any] | None = None,
    ) -> tuple[Population, Any, Any, Any]:
        """Resamples if it is due.

        Args:
            key: Random key.
            population: The weights.
            tree: Arrays with leading axis N, to be permuted along.
            positions: For schemes that use them, `(N, d)`.
            choose: From log weights to ancestors, in place of the scheme.

        Returns:
            The population, the tree, the ancestors `(N,)`, and whether it was resampled.
        """
        n = population.log_weights.shape[0]
        due = self.due(population)

        def yes(population, tree):
            if choose is None:
                ancestors = self.ancestors(key, population.log_weights, positions)
            else:
                ancestors = choose(population.log_weights)
            fresh = jnp.zeros_like(population.log_weights)
            new = Population(
                fresh, population.total, jnp.zeros_like(population.log_mean),
                jnp.full_like(population.ess, n),
            )  # fmt: skip
            return new, take(tree, ancestors), ancestors.astype(jnp.int32)

        def no(population, tree):
            return population, tree, jnp.arange(n, dtype=jnp.int32)

        if self.threshold == 1:
            out = yes(population, tree)
        elif self.threshold == 0:
            out = no(population, tree)
        else:
            out = jax.lax.cond(due, yes, no, population, tree)
        return (*out, due)
