"""Steps between normals: natural gradients, and forward-backward in Bures-Wasserstein space.

Notation as in `gaussian`: `V` is minus the log density, `N(m, S)` the normal, `S = C C'`,
`g = E grad V`, `H = E hess V` and `W = C' H C`, which is the identity at the optimum. Whatever
root `C` is, the steps give the same `S`; they keep `C` continuous in the step size, so that fixed
points `m + C z` move continuously too. All is float64 on the host, but the log density.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri
from scipy.stats import qmc

from abduce.inference.vi.normal import densities_and_gradients

__all__ = [
    "ADVANCE",
    "Evaluator",
    "Expectations",
    "Normal",
    "fixed_points",
    "fresh_points",
    "triangular",
]


class Normal(NamedTuple):
    """A normal of mean `location`, shape `(dim,)`, and covariance `scale scale'`."""

    location: np.ndarray
    scale: np.ndarray


@dataclasses.dataclass(frozen=True)
class Expectations:
    """What a step needs to know of the density under a normal.

    Attributes:
        elbo: In nats.
        log_density: Its mean, in nats.
        gradient: g, shape `(dim,)`.
        whitened: W, shape `(dim, dim)`, symmetric but for the error of the expectations.
        gap: First-order estimate of the ELBO missing to the optimum, whatever the coordinates:
            half the squared norm of the natural gradient.
    """

    elbo: float
    log_density: float
    gradient: np.ndarray
    whitened: np.ndarray
    gap: float

    @property
    def is_finite(self) -> bool:
        """Whether all points had finite densities and gradients."""
        return math.isfinite(self.elbo) and math.isfinite(self.gap)

    def curvature(self, normal: Normal) -> float:
        """Largest size of an eigenvalue of H."""
        return float(np.abs(np.linalg.eigvalsh(hessian(normal, self))).max())


class Evaluator:
    """Takes expectations of a target.

    Args:
        target, data: From `make_target`.
        dtype: To compute log densities in.

    Attributes:
        num_gradients: Evaluations of density and gradient so far.
    """

    def __init__(self, target: Any, data: Any, dtype: Any):
        self.target, self.data, self.dtype = target, data, dtype
        self.num_gradients = 0

    def __call__(self, normal: Normal, z: np.ndarray) -> Expectations:
        """Expectations over the points `m + C z`; `z` has shape `(n, dim)` and mean zero."""
        n, dim = z.shape
        with np.errstate(all="ignore"):  # points without a density are the caller's matter
            q = (normal.location + z @ normal.scale.T).astype(self.dtype)
            log_p, gradients = densities_and_gradients(self.target, self.data, q)
            self.num_gradients += n
            minus = -gradients
            gradient = minus.mean(0)
            whitened = np.eye(dim) + (minus @ normal.scale - z).T @ z / n
            log_det = np.linalg.slogdet(normal.scale)[1]
            log_q = -0.5 * (np.sum(z**2, 1).mean() + dim * math.log(2 * math.pi)) - log_det
            natural = normal.scale.T @ gradient
            gap = natural @ natural / 2 + np.sum((symmetric(whitened) - np.eye(dim)) ** 2) / 4
        log_density = float(log_p.mean())
        return Expectations(log_density - float(log_q), log_density, gradient, whitened, float(gap))


def natural_gradient(normal: Normal, now: Expectations, rho: float) -> Normal:
    """The improved Bayesian learning rule (Lin, Schmidt and Khan 2020).

    With `P = S^-1` and `G = P - H`: `P <- P - rho G + rho^2 / 2 G S G`, which is
    `(P + (P - rho G) S (P - rho G)) / 2` and so positive definite. In coordinates that `C` whitens,
    P becomes `K = (I + B^2) / 2` with `B = (1 - rho) I + rho W`. The mean moves by the new
    covariance: as `K >= rho W`, it never overshoots on a convex quadratic, for any rho <= 1.
    """
    b, vectors = np.linalg.eigh(
        (1 - rho) * np.eye(len(normal.scale)) + rho * symmetric(now.whitened)
    )
    k = (1 + b**2) / 2
    natural = normal.scale.T @ now.gradient
    move = normal.scale @ (vectors @ (vectors.T @ natural / k))
    return Normal(normal.location - rho * move, normal.scale @ ((vectors / np.sqrt(k)) @ vectors.T))


def hessian(normal: Normal, now: Expectations) -> np.ndarray:
    """H from W, symmetric.

    Of the symmetric matrices that fit W, the one that solves `H S + S H = Q + Q'`, where
    `Q = E grad V (x - m)' = C'^-1 W C'`: the gradient in Bures-Wasserstein space of `E V`, also
    where the expectation is a mean over fixed points. In the axes of S it weighs `W_ij` and
    `W_ji` by variances.
    """
    left, s, right = np.linalg.svd(normal.scale)
    w = right @ now.whitened @ right.T
    share = s**2 / (s[:, None] ** 2 + s**2)
    inner = (share * w + (share * w).T) / np.outer(s, s)
    return left @ inner @ left.T


def wasserstein(normal: Normal, now: Expectations, eta: float) -> Normal:
    """Forward-backward in Bures-Wasserstein space (Diao et al. 2023, Algorithm 1).

    `m <- m - eta g`; with `M = I - eta H`, `S_half = M S M'` and then
    `S <- (S_half + 2 eta I + (S_half (S_half + 4 eta I))^(1/2)) / 2`. With the singular values s of
    `M C` the last is `((s + (s^2 + 4 eta)^(1/2)) / 2)^2`, which needs no square root of a matrix
    that is singular at `eta = 1 / L`.
    """
    with np.errstate(all="ignore"):  # of a step beyond all bounds not even the ELBO is finite
        forward = normal.scale - eta * hessian(normal, now) @ normal.scale
        location = normal.location - eta * now.gradient
        if not np.isfinite(forward).all():
            return Normal(location, forward)
        left, s, right = np.linalg.svd(forward)
        return Normal(location, (left * (s + np.hypot(s, 2 * math.sqrt(eta))) / 2) @ right)


ADVANCE = {"natural_gradient": natural_gradient, "wasserstein": wasserstein}


def symmetric(x: np.ndarray) -> np.ndarray:
    """The symmetric part."""
    return (x + x.T) / 2


def fixed_points(half: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    """`2 * half >= 2 * dim` quasi-random standard normal points, antithetic, of covariance I.

    Expectations of polynomials up to the third degree are exact.
    """
    sobol = qmc.Sobol(dim, rng=rng)
    uniform = sobol.random(1 << (half - 1).bit_length())[:half]
    z = ndtri(np.clip(uniform, 1e-12, 1 - 1e-12))
    values, vectors = np.linalg.eigh(z.T @ z / half)
    z = z @ (vectors / np.sqrt(values)) @ vectors.T
    return np.concatenate([z, -z])


def fresh_points(half: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    """`2 * half` standard normal points in pairs, orthogonal within blocks of `dim` pairs.

    Each point has the standard normal law, so that expectations are unbiased.
    """
    blocks = []
    for start in range(0, half, dim):
        normals = rng.normal(size=(dim, dim))
        q, r = np.linalg.qr(normals)
        directions = (q * np.sign(np.diag(r))).T  # with the signs, a uniform rotation
        radii = np.sqrt(rng.chisquare(dim, dim))
        blocks.append((radii[:, None] * directions)[: half - start])
    z = np.concatenate(blocks)
    return np.concatenate([z, -z])


def triangular(scale: np.ndarray) -> np.ndarray:
    """The Cholesky factor of `scale scale'`, without forming it."""
    r = np.linalg.qr(scale.T, mode="r")
    return (r * np.where(np.diag(r) < 0, -1.0, 1.0)[:, None]).T
