"""From a starting point down to where the posterior mass is (numpy, on the host).

A random start is often hundreds of standard deviations out, where a sampler makes thousands of tiny
steps. BFGS covers the distance in tens of gradients. It must not run on to the mode, which lies far
from the mass in high dimension, and may be infinite (a centred hierarchy). So it stops as soon as
the expected gain of a step is what random fluctuation costs anyway: for a posterior that is locally
Gaussian, `g^T H g`, with `H` the inverse Hessian, has mean `dim` over the posterior.

The searches are generators that yield points and are sent `(log density, gradient)` there, so
that the searches of several chains can be advanced together.
"""

from collections.abc import Generator
from typing import NamedTuple

import numpy as np

__all__ = ["Descent", "Mass", "descend", "find_mass", "local_covariance"]

_DENSE_LIMIT = 200  # largest dimension at which matrices are kept
_MAX_EVALUATIONS = 150
_LEGS = 6  # descents of one start, each with the curvature found by the one before
_MEMORY = 10
_ARMIJO = 1e-4
_FLAT = 1e-3  # curvature, relative to the rough estimate, below which the probe was too short
_PROBE = 0.5  # length of a finite difference, in estimated standard deviations


class Descent(NamedTuple):
    """Where a descent ended."""

    position: np.ndarray  # (dim,)
    value: float  # log density there
    gradient: np.ndarray  # (dim,)
    inverse_hessian: np.ndarray | None  # (dim, dim): a rough one; None above `_DENSE_LIMIT`


class Mass(NamedTuple):
    """Where a search ended, and how the density curves there."""

    descent: Descent
    covariance: np.ndarray | None  # (dim, dim); None above `_DENSE_LIMIT` or at an edge

    def gain(self) -> float:
        """What is left to gain up to the top, in nats, were the density Gaussian here."""
        if self.covariance is None:
            return 0.0
        gradient = self.descent.gradient
        return 0.5 * float(gradient @ self.covariance @ gradient)

    def log_mass(self) -> float:
        """Laplace's estimate of the log of the mass around here, up to a constant."""
        if self.covariance is None:
            return self.descent.value
        return self.descent.value + self.gain() + 0.5 * np.linalg.slogdet(self.covariance)[1]


def find_mass(
    position: np.ndarray, guide: np.ndarray | None = None
) -> Generator[np.ndarray, tuple[float, np.ndarray], Mass]:
    """Descends until the curvature at the end agrees that there is little left to gain.

    Args:
        position: Start, shape `(dim,)`, with finite log density and gradient.
        guide: The covariance that another search found, shape `(dim, dim)`.
    """
    for _ in range(_LEGS):
        descent = yield from descend(position, guide)
        if descent.inverse_hessian is None:
            return Mass(descent, None)
        found = yield from local_covariance(descent)
        if found is None:
            return Mass(descent, None)
        end, reliable = Mass(descent, found[0]), found[1]
        if reliable and end.gain() < len(position) + 5:
            break
        position, guide = descent.position, end.covariance
    return end


def descend(
    position: np.ndarray, inverse_hessian: np.ndarray | None = None
) -> Generator[np.ndarray, tuple[float, np.ndarray], Descent]:
    """Climbs to where the mass is.

    Args:
        position: Start, shape `(dim,)`, with finite log density and gradient.
        inverse_hessian: What another descent found, to start with.
    """
    x = np.asarray(position, np.float64)
    dim = x.shape[0]
    value, gradient = yield x
    evaluations, steps, hessian = 1, 0, inverse_hessian
    pairs: list[tuple] = []
    gains: list[float] = []
    while evaluations < _MAX_EVALUATIONS:
        direction = _direction(gradient, hessian, pairs)
        slope = float(direction @ gradient)
        if not slope > 0:
            break
        if steps >= 4 and slope < dim and max(gains[-2:]) < dim:
            break
        length = (
            1.0
            if hessian is not None or pairs
            else min(1.0, 1.0 / np.linalg.norm(direction, np.inf))
        )
        for _ in range(20):
            new = x + length * direction
            new_value, new_gradient = yield new
            evaluations += 1
            good = np.isfinite(new_value) and np.all(np.isfinite(new_gradient))
            if good and new_value >= value + _ARMIJO * length * slope:
                break
            # the vertex of the parabola through what is known, kept within bounds
            fall = new_value - value - length * slope if good else -np.inf
            factor = -0.5 * length * slope / fall if -np.inf < fall < 0 else 0.1
            length *= float(np.clip(factor, 0.1, 0.5))
        else:
            break
        step, change = new - x, gradient - new_gradient
        gains.append(float(new_value - value))
        x, value, gradient, steps = new, new_value, new_gradient, steps + 1
        curvature = step @ change
        if curvature > 1e-10 * np.linalg.norm(step) * np.linalg.norm(change):
            if dim <= _DENSE_LIMIT:
                hessian = _update(hessian, step, change, 1.0 / curvature)
            else:
                pairs = [*pairs, (step, change, 1.0 / curvature)][-_MEMORY:]
    return Descent(x, value, gradient, hessian)


def local_covariance(
    end: Descent,
) -> Generator[np.ndarray, tuple[float, np.ndarray], tuple[np.ndarray, bool] | None]:
    """Measures the curvature by finite differences of the gradient.

    The differences are taken along the columns of a root of the rough inverse Hessian, in which
    the curvature is near the identity, so that rounding in the gradients does little harm.

    Args:
        end: A descent with an inverse Hessian.

    Returns:
        The inverse of the Hessian of minus the log density, negative eigenvalues made positive;
        and whether it is reliable, which it is not where the rough inverse Hessian was far too
        small, as happens when the curvature fell on the way. None if a probe left the support.
    """
    scale = np.sqrt(np.diag(end.inverse_hessian))
    values, vectors = np.linalg.eigh(end.inverse_hessian / np.outer(scale, scale))
    root = scale[:, None] * vectors * np.sqrt(np.maximum(values, 1e-12 * values[-1]))
    columns = []
    for direction in root.T:
        value, gradient = yield end.position + _PROBE * direction
        if not (np.isfinite(value) and np.all(np.isfinite(gradient))):
            return None
        columns.append(root.T @ (end.gradient - gradient) / _PROBE)
    values, vectors = np.linalg.eigh(0.5 * (np.array(columns) + np.array(columns).T))
    reliable = bool(np.min(np.abs(values)) > _FLAT)
    whitened = root @ (vectors / np.sqrt(np.maximum(np.abs(values), _FLAT)))
    return whitened @ whitened.T, reliable


def _direction(gradient, hessian, pairs):
    """The step that would reach the maximum, were the estimate of the curvature right."""
    if hessian is not None:
        return hessian @ gradient
    if not pairs:
        return gradient
    # two-loop recursion (Nocedal, 1980)
    direction, shares = gradient.copy(), []
    for step, change, weight in reversed(pairs):
        shares.append(weight * (step @ direction))
        direction -= shares[-1] * change
    step, change, weight = pairs[-1]
    direction *= (step @ change) / (change @ change)
    for (step, change, weight), share in zip(pairs, reversed(shares), strict=True):
        direction += (share - weight * (change @ direction)) * step
    return direction


def _update(hessian, step, change, weight):
    """The BFGS update of the inverse Hessian of minus the log density."""
    dim = step.shape[0]
    if hessian is None:
        hessian = np.eye(dim) * (step @ change) / (change @ change)
    moved = hessian @ change
    along = np.outer(step, moved)
    scale = weight + weight**2 * float(change @ moved)
    return hessian - weight * (along + along.T) + scale * np.outer(step, step)
