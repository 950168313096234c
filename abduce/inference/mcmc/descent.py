"""From a starting point down to where the posterior mass is (numpy, on the host).

A random start is often hundreds of standard deviations out, where a sampler makes thousands of tiny
steps. BFGS covers the distance in tens of gradients. It must not run on to the mode, which lies far
from the mass in high dimension, and may be infinite (a centred hierarchy). So it stops as soon as
the expected gain of a step is what random fluctuation costs anyway: for a posterior that is locally
Gaussian, `g^T H g`, with `H` the inverse Hessian, has mean `dim` over the posterior.

The inverse Hessian it builds is the first metric.
"""

from collections.abc import Generator

import numpy as np

__all__ = ["Descent", "descend"]

MAX_EVALUATIONS = 100
_DENSE_LIMIT = 200  # above, the limited-memory form
_MEMORY = 10
_ARMIJO = 1e-4


class Descent:
    """Where a descent ended.

    Attributes:
        position: Shape `(dim,)`, finite log density.
        inverse_hessian: `(dim, dim)`, or None where too few steps were made to build one.
        num_gradients: Evaluations made, the first included.
    """

    def __init__(self, position, inverse_hessian, num_gradients):
        self.position, self.inverse_hessian = position, inverse_hessian
        self.num_gradients = num_gradients


def descend(position: np.ndarray) -> Generator[np.ndarray, tuple[float, np.ndarray], Descent]:
    """Yields points and is sent `(log density, gradient)` there; returns a `Descent`.

    Args:
        position: Start, shape `(dim,)`, with finite log density and gradient.
    """
    x = np.asarray(position, np.float64)
    dim = x.shape[0]
    value, gradient = yield x
    evaluations, pairs, hessian = 1, [], None
    gains: list[float] = []
    while evaluations < MAX_EVALUATIONS:
        direction = _direction(gradient, hessian, pairs)
        slope = float(direction @ gradient)
        if not slope > 0:
            break
        settled = len(pairs) >= min(dim, 5) + 1
        if settled and slope < dim and max(gains[-2:]) < dim:
            break
        length = 1.0 if pairs else min(1.0, 1.0 / np.linalg.norm(direction, np.inf))
        for _ in range(20):
            new = x + length * direction
            new_value, new_gradient = yield new
            evaluations += 1
            good = np.isfinite(new_value) and np.all(np.isfinite(new_gradient))
            if good and new_value >= value + _ARMIJO * length * slope:
                break
            # the vertex of the parabola through what is known, kept within bounds
            fall = new_value - value - length * slope if good else -np.inf
            factor = -0.5 * length * slope / fall if fall < 0 and np.isfinite(fall) else 0.1
            length *= float(np.clip(factor, 0.1, 0.5))
        else:
            break
        step, change = new - x, gradient - new_gradient
        gains.append(float(new_value - value))
        x, value, gradient = new, new_value, new_gradient
        curvature = step @ change
        if curvature > 1e-10 * np.linalg.norm(step) * np.linalg.norm(change):
            pairs.append((step, change, 1.0 / curvature))
            if dim <= _DENSE_LIMIT:
                hessian = _update(hessian, step, change, 1.0 / curvature)
            else:
                pairs = pairs[-_MEMORY:]
    enough = len(pairs) >= min(dim, 3)
    return Descent(x, hessian if enough else None, evaluations)


def _direction(gradient, hessian, pairs):
    """The step that would reach the maximum, were the estimate of the curvature right."""
    if hessian is not None:
        return hessian @ gradient
    if not pairs:
        return gradient.copy()
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
    left = np.eye(dim) - weight * np.outer(step, change)
    return left @ hessian @ left.T + weight * np.outer(step, step)
