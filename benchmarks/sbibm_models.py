"""The simulators of seven sbibm tasks as models with densities; see `benchmarks/sbibm.py`."""

# mypy: disable-error-code="attr-defined, name-defined"
# `abduce.dist` passes NumPyro's names on, which are not visible to a type checker.

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import abduce as ab
import abduce.dist as dist

__all__ = [
    "bernoulli_glm", "gaussian_linear", "gaussian_mixture", "lotka_volterra", "sir", "slcp",
    "two_moons",
]  # fmt: skip

SIR_STEPS, LOTKA_VOLTERRA_STEPS = 34, 84  # of Runge-Kutta between neighbouring observations


class HalfRing(dist.Distribution):
    """`shift + (0.25 + r cos a, r sin a)`, `r ~ N(0.1, 0.01^2)`, `a ~ U(-pi/2, pi/2)`.

    A point to the right of the ring's centre has `r > 0`; one to the left has `r < 0`, ten standard
    deviations away. So `(r, a)` is a function of the point, and the density is exact.

    Args:
        shift: Shape `(..., 2)`.
    """

    arg_constraints = {"shift": dist.constraints.real_vector}  # noqa: RUF012
    support = dist.constraints.real_vector

    def __init__(self, shift, *, validate_args=None):
        self.shift = shift
        super().__init__(jnp.shape(shift)[:-1], (2,), validate_args=validate_args)

    def sample(self, key, sample_shape=()):
        k1, k2 = jax.random.split(key)
        shape = (*sample_shape, *self.batch_shape)
        r = 0.1 + 0.01 * jax.random.normal(k1, shape)
        a = jax.random.uniform(k2, shape, minval=-math.pi / 2, maxval=math.pi / 2)
        return self.shift + jnp.stack([0.25 + r * jnp.cos(a), r * jnp.sin(a)], -1)

    def log_prob(self, value, intermediates=None):
        right, up = jnp.moveaxis(value - self.shift, -1, 0)
        distance = jnp.hypot(right - 0.25, up)
        r = jnp.where(right > 0.25, distance, -distance)
        return dist.Normal(0.1, 0.01).log_prob(r) - jnp.log(math.pi * distance)


class SpikeStatistics(dist.Distribution):
    """`design.T @ y` for independent `y ~ Bernoulli(sigmoid(design @ theta))`.

    An exponential family whose natural parameter is `theta`. Its density is taken with respect to
    the number of vectors `y` with the same statistics, which does not depend on `theta`: the
    posterior is exact, and evidences lack a constant.

    Args:
        theta: Shape `(..., dim)`.
        design: Shape `(num_bins, dim)`.
    """

    arg_constraints = {  # noqa: RUF012
        "theta": dist.constraints.real_vector,
        "design": dist.constraints.real_matrix,
    }
    support = dist.constraints.real_vector

    def __init__(self, theta, design, *, validate_args=None):
        self.theta, self.design = theta, design
        shape = jnp.shape(theta)
        super().__init__(shape[:-1], shape[-1:], validate_args=validate_args)

    def sample(self, key, sample_shape=()):
        p = jax.nn.sigmoid(self.theta @ self.design.T)
        y = jax.random.bernoulli(key, p, (*sample_shape, *p.shape))
        return y.astype(p.dtype) @ self.design

    def log_prob(self, value, intermediates=None):
        log_normalizer = jnp.sum(jax.nn.softplus(self.theta @ self.design.T), -1)
        return jnp.sum(value * self.theta, -1) - log_normalizer


@ab.model
def gaussian_linear():
    theta = ab.sample("theta", dist.Normal(0.0, 0.1**0.5).expand([10]).to_event(1))
    ab.sample("x", dist.Normal(theta, 0.1**0.5).to_event(1))


@ab.model
def gaussian_mixture():
    theta = ab.sample("theta", dist.Uniform(-10.0, 10.0).expand([2]).to_event(1))
    parts = dist.Normal(theta, jnp.array([[1.0], [0.1]])).to_event(1)
    ab.sample("x", dist.MixtureSameFamily(dist.Categorical(probs=jnp.array([0.5, 0.5])), parts))


@ab.model
def two_moons():
    t1, t2 = ab.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    ab.sample("x", HalfRing(jnp.stack([-jnp.abs(t1 + t2), t2 - t1]) / 2**0.5))


@ab.model
def slcp():
    theta = ab.sample("theta", dist.Uniform(-3.0, 3.0).expand([5]).to_event(1))
    s1, s2, added = theta[2] ** 2, theta[3] ** 2, 1e-6
    # The Cholesky factor of [[s1^2, rho s1 s2], [rho s1 s2, s2^2]] + added * I, without differences
    # of nearly equal numbers; 1 - tanh^2 = 1 / cosh^2.
    first = jnp.sqrt(s1**2 + added)
    cross = jnp.tanh(theta[4]) * s1 * s2 / first
    rest = s2**2 * ((s1 / jnp.cosh(theta[4])) ** 2 + added) / first**2 + added
    zero = jnp.zeros_like(first)
    tril = jnp.stack([jnp.stack([first, zero]), jnp.stack([cross, jnp.sqrt(rest)])])
    law = dist.MultivariateNormal(theta[:2], scale_tril=tril)
    jax.vmap(lambda _: ab.sample("x", law))(jnp.arange(4))


@ab.model
def bernoulli_glm(design):
    num = design.shape[1] - 1
    difference = jnp.eye(num) - jnp.eye(num, k=-1)
    smooth = difference @ difference + jnp.diag(jnp.sqrt(jnp.arange(num) / num))
    precision = jnp.zeros((num + 1, num + 1)).at[0, 0].set(0.5)
    precision = precision.at[1:, 1:].set(smooth.T @ smooth)
    prior = dist.MultivariateNormal(jnp.zeros(num + 1), precision_matrix=precision)
    ab.sample("x", SpikeStatistics(ab.sample("theta", prior), design))


def solve(slope: Callable[[Any], Any], start: Any, step: float, num_steps: int) -> Any:
    """States at ten times, `num_steps` Runge-Kutta steps apart; shape `(10, *start.shape)`."""

    def runge_kutta(z, _):
        k1 = slope(z)
        k2 = slope(z + step / 2 * k1)
        k3 = slope(z + step / 2 * k2)
        k4 = slope(z + step * k3)
        return z + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    def interval(z, _):
        z, _ = jax.lax.scan(runge_kutta, z, None, length=num_steps)
        return z, z

    _, path = jax.lax.scan(interval, start, None, length=9)
    return jnp.concatenate([start[None], path])


@ab.model
def sir():
    prior = dist.LogNormal(jnp.log(jnp.array([0.4, 0.125])), jnp.array([0.5, 0.2]))
    beta, gamma = ab.sample("theta", prior.to_event(1))

    def slope(z):  # of the logarithms of S / N and I / N, 17 days between observations
        return jnp.stack([-beta * jnp.exp(z[1]), beta * jnp.exp(z[0]) - gamma])

    start = jnp.array([math.log1p(-1e-6), math.log(1e-6)])
    log_p = solve(slope, start, 17 / SIR_STEPS, SIR_STEPS)[:, 1]
    log_odds = log_p - jnp.log1p(-jnp.exp(log_p))
    ab.sample("x", dist.Binomial(1000, logits=log_odds).to_event(1))


@ab.model
def lotka_volterra():
    prior = dist.LogNormal(jnp.array([-0.125, -3.0, -0.125, -3.0]), 0.5)
    alpha, beta, gamma, delta = ab.sample("theta", prior.to_event(1))
    growth, coupling = jnp.stack([alpha, -gamma]), jnp.stack([-beta, delta])

    def slope(z):  # of the logarithms of prey and predators, 2.1 days between observations
        return growth + coupling * jnp.exp(z[::-1])

    start = jnp.array([math.log(30.0), 0.0])
    path = solve(slope, start, 2.1 / LOTKA_VOLTERRA_STEPS, LOTKA_VOLTERRA_STEPS)
    ab.sample("x", dist.LogNormal(path.T, 0.1).to_event(2))
