"""The analysis of an ensemble Kalman filter: members moved towards an observation.

With members x^i, predicted observations h^i = E[y | x^i] and simulated ones y^i,

    x^i <- x^i + K (y - y^i),    K = C_xh (C_hh + R)^-1,

where C are covariances over the members and R is the mean over the members of Var(y | x^i), so that
C_hh + R is the covariance of y by the law of total variance (Evensen 1994; Burgers, van Leeuwen and
Evensen 1998, "Analysis scheme in the ensemble Kalman filter": simulated observations give the moved
members the right spread). Where an observation can only be simulated, h^i = y^i and R = 0.
"""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Prediction", "gain", "taper"]


class Prediction(eqx.Module):
    """What N members say of the p numbers observed at a step.

    Attributes:
        simulated: With noise, `(N, p)`.
        means: Expected ones, `(N, p)`; the simulated ones where no moments are known.
        noise: Mean covariance of the noise that `means` leaves out, `(p, p)`.
        values: What was observed, `(p,)`.
        seen: Where; the rest is left out, `(p,)`.
    """

    simulated: Any
    means: Any
    noise: Any
    values: Any
    seen: Any

    @classmethod
    def join(cls, parts: list[Prediction]) -> Prediction:
        """Several sites observed at one step."""
        wide = lambda name: jnp.concatenate([getattr(p, name) for p in parts], axis=-1)  # noqa: E731
        noise = jax.scipy.linalg.block_diag(*(p.noise for p in parts))
        return cls(wide("simulated"), wide("means"), noise, wide("values"), wide("seen"))


def gain(prediction: Prediction, tapers: Any = None) -> tuple[Any, dict[str, Any]]:
    """Solves for the moves.

    Args:
        prediction: Of the observations of a step.
        tapers: Of the covariances between observations, `(p, p)`; None: all ones.

    Returns:
        A function from states `(..., N, k)` and tapers `(k, p)` or None to moves of that shape;
        and the Gaussian 'log_density' of the observation, in nats, with its 'distance': the squared
        innovation in units of its variance, over the count of what was observed (about 1).
    """
    seen = prediction.seen
    n, p = prediction.means.shape
    h = jnp.where(seen, prediction.means - jnp.mean(prediction.means, 0), 0.0)
    cov = h.T @ h / (n - 1)
    cov = cov if tapers is None else cov * tapers
    both = seen[:, None] & seen[None, :]
    cov = jnp.where(both, cov + prediction.noise, jnp.eye(p, dtype=cov.dtype))
    lower = jnp.linalg.cholesky(cov)
    gap = jnp.where(seen, prediction.values - prediction.simulated, 0.0)
    solved = jax.scipy.linalg.cho_solve((lower, True), gap.T)  # (p, N)

    def moves(states: Any, tapers: Any = None) -> Any:
        anomalies = states - jnp.mean(states, -2, keepdims=True)
        cross = jnp.einsum("...nk,np->...kp", anomalies, h) / (n - 1)
        cross = cross if tapers is None else cross * tapers
        return jnp.einsum("...kp,pn->...nk", cross, solved)

    centre = jnp.where(seen, prediction.values - jnp.mean(prediction.means, 0), 0.0)
    white = jax.scipy.linalg.solve_triangular(lower, centre, lower=True)
    count = jnp.sum(seen)
    squared = white @ white
    log_density = (
        -0.5 * (squared + count * math.log(2 * math.pi)) - jnp.sum(jnp.log(jnp.diag(lower)))
    )
    return moves, {"log_density": log_density, "distance": squared / jnp.maximum(count, 1)}


def taper(a: Any, b: Any, radius: float) -> np.ndarray:
    """Correlations that fall from 1 to 0 at a distance of `2 radius`.

    The fifth-order function of Gaspari and Cohn (1999), "Construction of correlation functions in
    two and three dimensions", eq. 4.10; positive semidefinite up to three dimensions.

    Args:
        a, b: Positions, `(k, dim)` and `(p, dim)`.
        radius: In units of the positions.

    Returns:
        Shape `(k, p)`.
    """
    r = np.linalg.norm(np.asarray(a)[:, None] - np.asarray(b)[None], axis=-1) / radius
    near = 1 - 5 / 3 * r**2 + 5 / 8 * r**3 + r**4 / 2 - r**5 / 4
    s = np.maximum(r, 1.0)
    far = 4 - 5 * s + 5 / 3 * s**2 + 5 / 8 * s**3 - s**4 / 2 + s**5 / 12 - 2 / (3 * s)
    return np.where(r <= 1, near, np.where(r < 2, far, 0.0))
