"""Moves: Markov kernels for whole populations, along a path of distributions.

A move leaves `exp(density.temper(...))` invariant, for whichever density of the path it is given.
It is a frozen dataclass with four functions:

    start(density, particles, probabilities) -> memory      before the first temperature
    tune(memory, particles, probabilities) -> memory        at each temperature, before resampling
    begin(density, particles) -> local                      at each temperature, after resampling
    step(key, density, particles, memory, local) -> (particles, memory, local, acceptance)

`memory` holds what is learnt (step sizes, scales) and lives on; `local` holds what belongs to the
particles at this density (gradients). `acceptance` has shape `(N,)`. A new kernel is a `step` of a
few lines. What is learnt from the particles costs the evidence its strict unbiasedness, at order
1/N; with `adapt=False` nothing is learnt.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.inference.mcmc import counter_random
from abduce.inference.smc.paths import Density, no_nan

__all__ = ["HMC", "Move", "Particles", "RandomWalk", "evaluate"]


class Particles(eqx.Module):
    """A population without its weights.

    Attributes:
        position: Flat vectors `(N, dim)`, or a choice map with leading axis N.
        log_start: Shape `(N,)`.
        log_ratio: Shape `(N, K)`.
    """

    position: Any
    log_start: Any
    log_ratio: Any


class Move(Protocol):
    """What the engine asks of a move."""

    needs_flat: bool

    def start(self, density: Density, particles: Particles, probabilities: Any) -> Any: ...

    def tune(self, memory: Any, particles: Particles, probabilities: Any) -> Any: ...

    def begin(self, density: Density, particles: Particles) -> Any: ...

    def step(
        self, key: Any, density: Density, particles: Particles, memory: Any, local: Any
    ) -> tuple[Particles, Any, Any, Any]: ...


def evaluate(density: Density, position: Any) -> Particles:
    """Particles at these positions."""
    return Particles(position, *map(no_nan, jax.vmap(density.parts)(position)))


def select(accept: Any, new: Any, old: Any) -> Any:
    """Rows of `new` where accepted."""

    def rows(a, b):
        return jnp.where(accept.reshape(accept.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(rows, new, old)


def metropolis(
    threshold: Any, density: Density, new: Particles, old: Particles, correction: Any = 0.0
) -> tuple[Any, Any]:
    """The rule of Metropolis and Hastings; NaN rejects.

    Args:
        threshold: Standard normal numbers, `(N,)`, whose distribution function decides.
        density: The target.
        new, old: Proposals and particles.
        correction: What the log ratio has besides the densities.

    Returns:
        Whether each is accepted, and with which probability.
    """
    before = density.temper(old.log_start, old.log_ratio)
    after = density.temper(new.log_start, new.log_ratio)
    log_rate = after - before + correction
    log_rate = jnp.where(jnp.isnan(log_rate), -jnp.inf, log_rate)  # XLA's minimum may drop a NaN
    rate = jnp.exp(jnp.minimum(log_rate, 0.0))
    accept = apart(density.weights[-1] >= 0, jax.scipy.special.ndtr(threshold) < rate)
    return accept, rate


def apart(always: Any, x: Any) -> Any:
    """`x`, computed once: otherwise XLA computes it anew for each element of each consumer.

    Args:
        always: True, in a way that the compiler cannot see.
        x: An array.
    """
    return jax.lax.cond(always, lambda x: x, jnp.zeros_like, x)


def normals(key: Any, *shapes: tuple[int, ...]) -> list[Any]:
    """Standard normal numbers in several shapes, by one unrolled pass of Threefry."""
    sizes = [math.prod(s) for s in shapes]
    seed = jax.random.bits(key, (2,), jnp.uint32)
    dtype = jnp.result_type(float)
    z, _ = counter_random.normals(seed, jnp.zeros((), jnp.uint32), sum(sizes), dtype)
    z = apart((seed[0] & seed[1]) != np.uint32(0xFFFFFFFF), z)
    ends = np.cumsum([0, *sizes])
    return [z[a:b].reshape(s) for a, b, s in zip(ends[:-1], ends[1:], shapes, strict=True)]


class Memory(eqx.Module):
    """What flat moves learn: a step size for all, and a scale for each coordinate."""

    log_step: Any
    scale: Any


def _spread(particles: Particles, probabilities: Any) -> Any:
    """Weighted standard deviations; 1 where all particles agree."""
    q, w = particles.position, probabilities[:, None]
    mean = jnp.sum(w * q, 0)
    sd = jnp.sqrt(jnp.sum(w * (q - mean) ** 2, 0))
    return jnp.where((sd > 1e-12) & jnp.isfinite(sd), sd, 1.0)


@dataclasses.dataclass(frozen=True)
class HMC:
    """Hamiltonian moves (Neal 2011) with a step size that differs from particle to particle.

    The steps are spread around a common size with heavy tails (log-Laplace), so that a population
    that spans several scales (a funnel) has steps for each; the scales of the coordinates are the
    standard deviations of the population.

    Attributes:
        num_steps: Leapfrog steps; or
        trajectory_length: their number times the common step size, on the whitened scale.
        step_size: To begin with, on the whitened scale; None chooses it by the dimension.
        target_accept_prob: Mean acceptance that the common step size aims at.
        jitter: Mean deviation of the log step sizes.
        adapt: Whether the step size follows the acceptance.
        adapt_scale: Whether coordinates are scaled by the population.
    """

    num_steps: int | None = 10
    trajectory_length: float | None = None
    step_size: float | None = None
    target_accept_prob: float = 0.6
    jitter: float = 1.0
    adapt: bool = True
    adapt_scale: bool = True
    needs_flat: bool = True

    def start(self, density: Density, particles: Particles, probabilities: Any) -> Memory:
        dim, dtype = particles.position.shape[-1], particles.position.dtype
        step = dim**-0.25 if self.step_size is None else self.step_size
        return Memory(jnp.log(jnp.asarray(step, dtype)), jnp.ones(dim, dtype))

    def tune(self, memory: Memory, particles: Particles, probabilities: Any) -> Memory:
        if not self.adapt_scale:
            return memory
        return Memory(memory.log_step, _spread(particles, probabilities))

    def begin(self, density: Density, particles: Particles) -> Any:
        return self._gradient(density, particles.position)

    def _gradient(self, density: Density, position: Any) -> Any:
        return jax.vmap(jax.grad(lambda q: density.temper(*density.parts(q))))(position)

    def step(self, key, density, particles, memory, local):
        q = particles.position
        start, noise, threshold = normals(key, q.shape, q.shape[:1], q.shape[:1])
        size = jnp.exp(memory.log_step + self.jitter * laplace(noise))[:, None] * memory.scale
        count: Any = self.num_steps
        if self.trajectory_length is not None:
            wanted = jnp.ceil(self.trajectory_length / jnp.exp(memory.log_step))
            count = jnp.clip(wanted, 1, 1023).astype(jnp.int32)

        def leapfrog(_, carry):  # without values: half of the work, where they are not needed
            q, p, gradient = carry
            q = q + size * p
            gradient = self._gradient(density, q)
            return q, p + size * gradient, gradient

        p = start + 0.5 * size * local
        q, p, gradient = jax.lax.fori_loop(0, count, leapfrog, (q, p, local))
        p = p - 0.5 * size * gradient
        new = evaluate(density, q)
        energy = 0.5 * jnp.sum(start**2 - p**2, -1)
        accept, rate = metropolis(threshold, density, new, particles, energy)
        particles, local = select(accept, (new, gradient), (particles, local))
        return particles, _follow(self, memory, rate), local, rate


def laplace(z: Any) -> Any:
    """A double exponential number from a standard normal one."""
    tail = jax.scipy.special.ndtr(-jnp.abs(z))
    return -jnp.sign(z) * jnp.log(2 * tail)


def _follow(move: Any, memory: Memory, rate: Any) -> Memory:
    """The step size follows the mean acceptance; with N particles the mean is precise."""
    if not move.adapt:
        return memory
    log_step = memory.log_step + (jnp.mean(rate) - move.target_accept_prob)
    return Memory(jnp.clip(log_step, -20.0, 5.0), memory.scale)


@dataclasses.dataclass(frozen=True)
class RandomWalk:
    """Gaussian steps around each particle, scaled by the population; no gradients.

    Attributes:
        step_size: Relative to the population's standard deviations, to begin with; None: 2.4 /
            sqrt(dim) (Roberts, Gelman and Gilks 1997).
        target_accept_prob: Mean acceptance that the step size aims at.
        adapt: Whether the step size follows the acceptance.
        adapt_scale: Whether coordinates are scaled by the population.
    """

    step_size: float | None = None
    target_accept_prob: float = 0.25
    adapt: bool = True
    adapt_scale: bool = True
    needs_flat: bool = True

    def start(self, density: Density, particles: Particles, probabilities: Any) -> Memory:
        dim, dtype = particles.position.shape[-1], particles.position.dtype
        step = 2.4 / dim**0.5 if self.step_size is None else self.step_size
        return Memory(jnp.log(jnp.asarray(step, dtype)), jnp.ones(dim, dtype))

    tune = HMC.tune

    def begin(self, density: Density, particles: Particles) -> Any:
        return ()

    def step(self, key, density, particles, memory, local):
        q = particles.position
        noise, threshold = normals(key, q.shape, q.shape[:1])
        new = evaluate(density, q + jnp.exp(memory.log_step) * memory.scale * noise)
        accept, rate = metropolis(threshold, density, new, particles)
        return select(accept, new, particles), _follow(self, memory, rate), local, rate
