"""A normal model whose posterior is known, and posteriors of it that are wrong in a chosen way.

`mu ~ N(0, 1)` in two coordinates, the last one alone in "b"; `y | mu ~ N(mu, 1/2)`, so that
`mu | y ~ N(0.8 y, 0.2)` in each.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import abduce as ab
import abduce.dist as dist
from abduce.amortized.checks import Calibration
from abduce.inference.algorithm import Algorithm, algorithm
from abduce.inference.posterior import make_posterior

GAIN, SD = 0.8, 0.2**0.5


def made(rng, num=400, draws=100, shift=0.0, scale=1.0, ignores_data=False, density=True):
    """Runs with draws from `N(0.8 y + shift * sd, (scale * sd)^2)`, made by NumPy."""
    mu = rng.normal(size=(num, 2))
    y = mu + 0.5 * rng.normal(size=mu.shape)
    q = GAIN * y[:, None] + SD * (shift + scale * rng.normal(size=(num, draws, 2)))
    if ignores_data:
        q = rng.normal(size=q.shape)

    def log_joint(mu, y):
        return -0.5 * (mu**2).sum(-1) - 2 * ((mu - y) ** 2).sum(-1)

    return Calibration(
        truths={"a": mu[:, 0], "b": mu[:, 1:]},
        draws={"a": q[..., 0], "b": q[..., 1:]},
        observed={"y": y},
        log_joint=(log_joint(mu, y), log_joint(q, y[:, None])) if density else None,
    )


@ab.model
def normal(scale=1.0):
    a = ab.sample("a", dist.Normal(0, 1))
    b = ab.sample("b", dist.Normal(0, 1).expand([1]))
    mu = jnp.concatenate([a[None], b])
    ab.sample("y", dist.Normal(mu, 0.5 * scale))


class _Exact(Algorithm):
    """Draws from the posterior of `normal`, shifted and scaled; `fails` decides by the first y."""

    def run(self, problem: Any, key: Any) -> Any:
        y = problem.given["y"].value
        if not isinstance(y, jax.core.Tracer):
            self.before(float(y[0]))
        noise = jax.random.normal(key, (self.num_samples, 2))
        q = GAIN * y + SD * (self.shift + self.scale * noise)
        q = jnp.where(y[0] > self.nan_above, jnp.nan, q)
        values = {"a": q[None, :, 0], "b": q[None, :, 1:]}
        return make_posterior(problem, values, algorithm="exact")

    def before(self, y):
        if y > self.raise_above:
            raise ValueError("too large for me")


@algorithm
class exact(_Exact):
    """Runs under tracing."""

    num_samples: int = 300
    shift: float = 0.0
    scale: float = 1.0
    nan_above: float = np.inf
    raise_above: float = np.inf
    traceable = True


@algorithm
class looped(_Exact):
    """Runs one data set after the other."""

    num_samples: int = 300
    shift: float = 0.0
    scale: float = 1.0
    nan_above: float = np.inf
    raise_above: float = np.inf
