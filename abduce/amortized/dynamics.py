"""Heads that transport noise to the posterior: flow matching and score matching.

Both train a network on a regression problem, without densities, and draw by an ordinary
differential equation, whose divergence gives the density.
"""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.amortized.heads import normal_log_density
from abduce.amortized.networks import Residual

__all__ = ["FlowMatching", "Score"]


def _time_features(t: Any) -> Any:
    frequencies = jnp.pi * jnp.array([0.5, 1.0, 2.0, 4.0], t.dtype)
    angles = frequencies * t
    return jnp.concatenate([t[None], jnp.sin(angles), jnp.cos(angles)])


def integrate(field: Any, x: Any, start: float, stop: float, num_steps: int) -> tuple[Any, Any]:
    """The solution of `dx/dt = field(t, x)` at `stop`, and the integral of its divergence.

    Classical Runge-Kutta; the divergence is exact, from the Jacobian.
    """
    h = (stop - start) / num_steps
    dim = x.shape[0]

    def both(t, x):
        velocity, pull = jax.linearize(lambda y: field(t, y), x)
        jacobian = jax.vmap(pull)(jnp.eye(dim, dtype=x.dtype))
        return velocity, jnp.trace(jacobian)

    def step(carry, i):
        x, total = carry
        t = jnp.asarray(start, x.dtype) + h * i.astype(x.dtype)
        k1, d1 = both(t, x)
        k2, d2 = both(t + h / 2, x + h / 2 * k1)
        k3, d3 = both(t + h / 2, x + h / 2 * k2)
        k4, d4 = both(t + h, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return (x, total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)), None

    (x, total), _ = jax.lax.scan(step, (x, jnp.zeros((), x.dtype)), jnp.arange(num_steps))
    return x, total


class _Transport(eqx.Module):
    """What both have in common: a network of a point, a time and the context."""

    net: Residual
    dim: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)

    def __init__(
        self, key: Any, context_dim: int, dim: int, width: int, depth: int, num_steps: int
    ):
        self.net = Residual(key, dim + 9 + context_dim, dim, width, depth, 0.0)
        self.dim, self.num_steps = dim, num_steps

    @property
    def noise_dim(self) -> int:
        """Length of the noise."""
        return self.dim

    def _net(self, context, t, x):
        return self.net(jnp.concatenate([x, _time_features(t), context]))

    def velocity(self, context: Any, t: Any, x: Any) -> Any:
        """Of the transport from noise at time 0 to the posterior at time 1."""
        raise NotImplementedError

    def draw(self, context: Any, e: Any) -> tuple[Any, Any]:
        """A draw and its log density."""
        v, divergence = integrate(
            lambda t, x: self.velocity(context, t, x), e, 0.0, 1.0, self.num_steps
        )
        return v, normal_log_density(e) - divergence

    def log_density(self, context: Any, v: Any) -> Any:
        """Log density of a point, in nats, up to the error of the integration."""
        e, divergence = integrate(
            lambda t, x: self.velocity(context, t, x), v, 1.0, 0.0, self.num_steps
        )
        return normal_log_density(e) + divergence


class FlowMatching(_Transport):
    """Straight paths from noise to posterior draws, and the velocity field that follows them.

    Lipman, Chen, Ben-Hamu, Nickel and Le, "Flow Matching for Generative Modeling", ICLR 2023,
    eq. 23; for posteriors, Dax, Wildberger, Buchholz, Green, Macke and Schoelkopf, "Flow Matching
    for Scalable Simulation-Based Inference", NeurIPS 2023, eq. 7 and 8 (times near 1 are drawn
    more often).

    Args:
        key: Typed PRNG key.
        context_dim: Length of the context.
        dim: Number of coordinates.
        width, depth: Of the network.
        num_steps: Runge-Kutta steps of a draw.
    """

    least: float = eqx.field(default=1e-4, static=True)  # sigma_min of the paper

    def velocity(self, context: Any, t: Any, x: Any) -> Any:
        """Of the transport, shape `(dim,)`."""
        return self._net(context, t, x) - x

    def loss(self, context: Any, v: Any, key: Any) -> Any:
        """Squared error of the velocity at a random time, per coordinate."""
        k1, k2 = jax.random.split(key)
        t = jax.random.uniform(k1, dtype=v.dtype) ** (2 / 3)  # density proportional to sqrt(t)
        e = jax.random.normal(k2, v.shape, v.dtype)
        x = (1 - (1 - self.least) * t) * e + t * v
        error = self.velocity(context, t, x) - (v - (1 - self.least) * e)
        return jnp.mean(error**2)


class Score(_Transport):
    """The score of the posterior blurred by noise, and the probability flow along it.

    Song, Sohl-Dickstein, Kingma, Kumar, Ermon and Poole, "Score-Based Generative Modeling through
    Stochastic Differential Equations", ICLR 2021, eq. 13; for posteriors, Geffner, Papamakarios
    and Mnih, "Compositional Score Modeling for Simulation-Based Inference", ICML 2023. Noise is
    variance preserving: at time `t` from the posterior, `x = a(t) v + s(t) e`.

    Args:
        key: Typed PRNG key.
        context_dim: Length of the context.
        dim: Number of coordinates.
        width, depth: Of the network.
        num_steps: Runge-Kutta steps of a draw.
    """

    def noise(self, r: Any) -> tuple[Any, Any, Any]:
        """`a`, `s` and the rate `beta` at noise time `r`, which is 0 at the posterior."""
        low, high = 0.1, 16.0
        integral = low * r + 0.5 * (high - low) * r**2
        a = jnp.exp(-0.5 * integral)
        return a, jnp.sqrt(-jnp.expm1(-integral)), low + (high - low) * r

    def error(self, context: Any, r: Any, x: Any) -> Any:
        """The network's guess of the noise in `x` at noise time `r`."""
        a, s, _ = self.noise(r)
        # The best guess for a standard normal is s x; the network adds what differs.
        return s * x + a * self._net(context, r, x)

    def score(self, context: Any, r: Any, x: Any) -> Any:
        """Gradient of the log density of the blurred posterior, shape `(dim,)`."""
        return -self.error(context, r, x) / self.noise(r)[1]

    def velocity(self, context: Any, t: Any, x: Any) -> Any:
        """Of the probability flow, with time running from noise to the posterior."""
        r = self._clock(t)
        _, s, beta = self.noise(r)
        drift = -0.5 * beta * (x - self.error(context, r, x) / s)
        return -drift * self._slope(t)

    @staticmethod
    def _clock(t):
        # Noise times are crossed quadratically, so that steps are short near the posterior.
        return 1e-3 + (1 - 1e-3) * (1 - t) ** 2

    @staticmethod
    def _slope(t):
        return (1 - 1e-3) * 2 * (1 - t)

    def loss(self, context: Any, v: Any, key: Any) -> Any:
        """Squared error of the guess at a random time, per coordinate."""
        k1, k2 = jax.random.split(key)
        root = jax.random.uniform(k1, dtype=v.dtype)
        r = 1e-3 + (1 - 1e-3) * root**2
        e = jax.random.normal(k2, v.shape, v.dtype)
        a, s, _ = self.noise(r)
        guess = self.error(context, r, a * v + s * e)
        return jnp.mean(((guess - e) / jnp.maximum(a, math.sqrt(0.1))) ** 2)
