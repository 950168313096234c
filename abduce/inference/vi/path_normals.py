"""Normals from quasi-Newton steps, factored so that draws cost linear time in the dimension.

Algorithms 3 and 4 of Zhang, Carpenter, Gelman and Vehtari, "Pathfinder: parallel quasi-Newton
variational inference", Journal of Machine Learning Research 23 (2022). An iterate `q` of L-BFGS
with gradient `g` gives a normal with mean `q + H g` and covariance `H`, the inverse Hessian
estimated from the last steps `s` and falls in gradient `z` (Byrd, Nocedal and Schnabel 1994):

    H = A + beta gamma beta',    A = diag(alpha),    beta = [A Z, S]

In the coordinates `A^(-1/2) beta = Q R`, with 2 * history_size orthonormal columns in `Q`,

    H = A^(1/2) (I + Q (M - I) Q') A^(1/2),    M = I + R gamma R' = L L'

so that `q + H g + A^(1/2) (u + Q (L - I) Q' u)` is a draw for standard normal `u`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Normal", "local_normals", "log_density", "points_of"]


class Normal(NamedTuple):
    """A normal with covariance `H`, factored as in the module's docstring; `r <= dim`.

    Attributes:
        location: Mean, shape `(dim,)`.
        scale: Square root of alpha, shape `(dim,)`.
        basis: Q, shape `(dim, r)`, with orthonormal columns.
        factor: L, shape `(r, r)`, lower triangular.
        log_det: Of `H`.
    """

    location: Any
    scale: Any
    basis: Any
    factor: Any
    log_det: Any


def local_normals(
    points: list[np.ndarray], gradients: list[np.ndarray], history_size: int
) -> Iterator[tuple[int, Normal]]:
    """Numbers of iterates with their normals (Algorithms 3 and 4), but for what rounding spoils.

    The first, with the identity for covariance, stands for paths without a step.
    """
    alpha = np.ones_like(points[0])
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for i, (point, gradient) in enumerate(zip(points, gradients, strict=True)):
        if i:
            s, z = point - points[i - 1], gradients[i - 1] - gradient
            updated = _diagonal(alpha, s, z)
            if updated is not None:
                alpha = updated
                unit = math.sqrt(s @ z)  # a pair may have any scale; this one keeps R near I
                pairs = [*pairs, (s / unit, z / unit)][-history_size:]
        normal = _normal(point, gradient, alpha, pairs, history_size)
        if normal is not None:
            yield i, normal


def _diagonal(alpha: np.ndarray, s: np.ndarray, z: np.ndarray) -> np.ndarray | None:
    """The diagonal after one more pair; None if the pair fails the curvature condition.

    The diagonal of the BFGS update of `diag(1 / alpha)`, first scaled to fit the pair (Gilbert
    and Lemarechal 1989; Algorithm 3).
    """
    b = s @ z
    if not b > 1e-12 * (z @ z):
        return None
    a, c = z @ (alpha * z), s @ (s / alpha)
    with np.errstate(all="ignore"):
        updated = 1 / (a / (b * alpha) + z**2 / b - a * s**2 / (b * c * alpha**2))
    return updated if np.isfinite(updated).all() and (updated > 0).all() else None


def _normal(
    point: np.ndarray,
    gradient: np.ndarray,
    alpha: np.ndarray,
    pairs: list[tuple[np.ndarray, np.ndarray]],
    history_size: int,
) -> Normal | None:
    """The normal at an iterate; None if its covariance is not positive definite in float64.

    Missing pairs are zero columns: they add nothing, and all normals have the same shapes.
    """
    dim, n, scale = len(point), len(pairs), np.sqrt(alpha)
    s, z = np.zeros((2, dim, history_size))
    upper, gram = np.eye(history_size), np.zeros((history_size, history_size))
    if n:
        s[:, :n], z[:, :n] = (np.stack(x, 1) for x in zip(*pairs, strict=True))
        upper[:n, :n] = np.triu(s[:, :n].T @ z[:, :n])
        gram[:n, :n] = np.diag(np.diag(upper)[:n]) + z[:, :n].T @ (alpha[:, None] * z[:, :n])
    basis, r = np.linalg.qr(np.concatenate([scale[:, None] * z, s / scale[:, None]], 1))
    inverse = np.linalg.inv(upper)  # its diagonal is 1
    with np.errstate(all="ignore"):
        gamma = np.block([
            [np.zeros_like(upper), -inverse],
            [-inverse.T, inverse.T @ gram @ inverse],
        ])  # fmt: skip
        inner = r @ gamma @ r.T
    inner = (inner + inner.T) / 2
    try:
        factor = np.linalg.cholesky(np.eye(len(inner)) + inner)
    except np.linalg.LinAlgError:
        return None
    w = scale * gradient
    location = point + scale * (w + basis @ (inner @ (basis.T @ w)))
    log_det = float(2 * np.log(scale).sum() + 2 * np.log(np.diag(factor)).sum())
    if not (np.isfinite(location).all() and math.isfinite(log_det)):
        return None
    return Normal(location, scale, basis, factor, log_det)


def log_density(normal: Normal, q: np.ndarray) -> np.ndarray:
    """Of points, shape `(n, dim)`, in nats; in float64."""
    w = (q.astype(np.float64) - normal.location) / normal.scale
    inside = w @ normal.basis
    u = w + (np.linalg.solve(normal.factor, inside.T).T - inside) @ normal.basis.T
    return -0.5 * (np.sum(u**2, 1) + normal.log_det + len(normal.location) * math.log(2 * math.pi))


def points_of(normal: Normal, u: Any) -> Any:
    """Points from standard normal draws, shape `(n, dim)`."""
    inside = u @ normal.basis
    change = (inside @ normal.factor.T - inside) @ normal.basis.T
    return normal.location + normal.scale * (u + change)
