"""A Gaussian model of groups, of which everything is known in closed form."""

import dataclasses

import jax
import numpy as np
from scipy.stats import multivariate_normal

import abduce as ab
import abduce.dist as dist

NAMES = ["north", "south", "east"]
SCALES = np.array([1.0, 0.5, 2.0], np.float32)
DATA = np.array([1.5, -0.5, 3.0], np.float32)
LATENTS = ["mu", "theta[0]", "theta[1]", "theta[2]"]


@ab.model
def groups(s):
    mu = ab.sample("mu", dist.Normal(0, 2))

    def group(s):
        theta = ab.sample("theta", dist.Normal(mu, 1))
        ab.deterministic("effect", theta - mu)
        return ab.sample("y", dist.Normal(theta, s))

    return jax.vmap(group, axis_name="group")(s)


@dataclasses.dataclass
class Exact:
    """The posterior of `(mu, theta)`.

    Attributes:
        mean: Shape `(4,)`.
        cov: Shape `(4, 4)`.
        log_evidence: In nats.
    """

    mean: np.ndarray
    cov: np.ndarray
    log_evidence: float

    @property
    def sd(self):
        return np.sqrt(np.diag(self.cov))


def exact(y=DATA, s=SCALES, observed=None) -> Exact:
    """By the normal equations; `observed` is a mask over the data."""
    y, s = np.asarray(y, float), np.asarray(s, float)
    observed = np.ones(len(y), bool) if observed is None else observed
    prior = np.full((len(y) + 1,) * 2, 4.0)
    prior[1:, 1:] += np.eye(len(y))
    design = np.eye(len(y) + 1)[1:][observed]
    marginal = design @ prior @ design.T + np.diag(s[observed] ** 2)
    gain = prior @ design.T @ np.linalg.inv(marginal)
    return Exact(
        gain @ y[observed],
        prior - gain @ design @ prior,
        float(multivariate_normal.logpdf(y[observed], cov=marginal)),
    )


def latents(post) -> np.ndarray:
    """Draws of `(mu, theta)`, shape `(chain, draw, 4)`, float64."""
    mu, theta = np.asarray(post["mu"], float), np.asarray(post["theta"], float)
    return np.concatenate([mu[..., None], theta], -1)
