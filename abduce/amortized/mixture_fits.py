"""Any law as a mixture of normals, by maximum likelihood.

Expectation-maximization with a fixed number of steps runs on a quadrature grid in one dimension,
on draws in more. Fits have no randomness of their own and no data-dependent loops, so that they
run under `jax.jit` and `jax.vmap`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import logsumexp

from abduce.amortized.mixtures import GaussianMixture, from_numbers, to_numbers

__all__ = ["fit_density", "fit_draws", "quadrature"]

_NODES = 64  # of the grid that EM runs on
_COARSE = 129  # of the grid that finds where the mass is
_REACHES = (9.0, 6.0, 4.0)  # asinh of the farthest points looked at, in scales
_GRID_CYCLES = 14
_DRAW_CYCLES = 25
_TRIAL_CYCLES = 3
_LONGEST = 32.0  # extrapolation of EM steps
_RIDGE = 1e-4  # least variance of a component, relative to that of the law


def quadrature(log_density: Any, centre: Any, scale: Any, num: int = _NODES) -> Any:
    """Points and normalized weights for expectations under a density on the line.

    A coarse grid with exponentially growing gaps finds the mass; the points are then quantiles of
    the square root of the density, close where the density is high, without leaving out its tails.

    Args:
        log_density: Of a scalar, up to a constant, in nats; what is not finite counts as zero mass.
        centre, scale: Rough location and spread, right within two orders of magnitude.
        num: Number of points.

    Returns:
        Points and weights, shape `(num,)`, of which the weights add up to 1; and the log density
        at the points, normalized.
    """
    t = jnp.linspace(-1.0, 1.0, _COARSE, dtype=jnp.result_type(float))
    for reach in _REACHES:  # each pass looks where the one before has found the mass
        x = centre + scale * jnp.sinh(reach * t)
        gaps = scale * jnp.cosh(reach * t)
        log_p = _finite(jax.vmap(log_density)(x))
        log_p = log_p - jnp.max(log_p)
        if reach != _REACHES[-1]:
            mass = jnp.exp(log_p) * gaps
            step = gaps[jnp.argmax(mass)] * (2 * reach / (_COARSE - 1))
            centre, scale = _median_and_spread(x, mass / jnp.sum(mass), step)
    cumulative = jnp.cumsum(jnp.exp(0.5 * log_p) * gaps)
    cumulative = cumulative / cumulative[-1]
    points = jnp.interp((jnp.arange(num) + 0.5) / num, cumulative, x)
    points = points + 1e-6 * scale * jnp.arange(num)  # distinct, where the density has a jump
    log_p = _finite(jax.vmap(log_density)(points))
    top = jnp.max(log_p)
    weights = jnp.exp(log_p - top) * jnp.gradient(points)
    total = jnp.sum(weights)
    return points, weights / total, log_p - top - jnp.log(total)


def _finite(log_p: Any) -> Any:
    return jnp.where(jnp.isfinite(log_p), log_p, -jnp.inf)


def _median_and_spread(x: Any, mass: Any, step: Any) -> tuple[Any, Any]:
    cumulative = jnp.cumsum(mass) - 0.5 * mass
    low, mid, high = jnp.interp(jnp.array([0.1, 0.5, 0.9]), cumulative, x)
    return mid, jnp.maximum((high - low) / 2.56, 0.2 * step)  # of what lies between two points


def fit_density(
    log_density: Any, centre: Any, scale: Any, num_components: int
) -> tuple[GaussianMixture, Any]:
    """The mixture that fits a density on the line by maximum likelihood, and how well.

    Args:
        log_density: Of a scalar, normalized, in nats.
        centre, scale: Rough location and spread.
        num_components: Of the mixture.

    Returns:
        The mixture, over vectors of shape `(1,)`, and `KL(density || mixture)` in nats, by
        quadrature on a finer grid.
    """
    points, weights, _ = quadrature(log_density, centre, scale)
    start = _slices(points[:, None], weights, points, num_components)
    mixture = _em(start, points[:, None], weights, _GRID_CYCLES)
    x, w, log_p = quadrature(log_density, centre, scale, 8 * _NODES)
    gap = log_p - jax.vmap(lambda v: mixture.log_prob(v[None]))(x)
    return mixture, jnp.sum(jnp.where(w > 0, w * gap, 0.0))


def fit_draws(draws: Any, num_components: int, weights: Any = None) -> GaussianMixture:
    """The mixture that fits draws by maximum likelihood.

    EM starts from slices of the draws along each of the first four principal axes, and goes on
    from the best of them.

    Args:
        draws: Shape `(n, d)`.
        num_components: Of the mixture.
        weights: Of the draws, shape `(n,)`, not negative; None: equal.
    """
    n, d = draws.shape
    weights = jnp.full(n, 1 / n, draws.dtype) if weights is None else weights / jnp.sum(weights)
    mean = weights @ draws
    off = draws - mean
    covariance = (weights[:, None] * off).T @ off
    diagonal = jnp.diagonal(covariance)
    ridge = 1e-6 * jnp.where(diagonal > 0, diagonal, 1.0)
    tril = jnp.linalg.cholesky(covariance + jnp.diag(ridge))
    y = jax.vmap(lambda r: solve_triangular(tril, r, lower=True))(off)
    sd = jnp.sqrt(diagonal + ridge)
    _, axes = jnp.linalg.eigh(covariance / (sd[:, None] * sd))
    along = (off / sd) @ axes[:, ::-1][:, : min(d, 4)]

    def trial(direction):
        start = _slices(y, weights, direction, num_components)
        mixture = _em(start, y, weights, _TRIAL_CYCLES)
        return mixture, weights @ jax.vmap(mixture.log_prob)(y)

    trials, scores = jax.vmap(trial)(along.T)
    best = jax.tree.map(lambda x: x[jnp.argmax(scores)], trials)
    fitted = _em(best, y, weights, _DRAW_CYCLES)
    return GaussianMixture(fitted.log_weights, mean + fitted.means @ tril.T, tril @ fitted.trils)


def _slices(x: Any, weights: Any, along: Any, k: int) -> GaussianMixture:
    """Components that overlap: each has the moments of twice its share of the quantiles."""
    order = jnp.argsort(along)
    x, weights = x[order], weights[order]
    level = k * (jnp.cumsum(weights) - 0.5 * weights) - jnp.arange(k)[:, None]
    share = jnp.where((level > -0.5) & (level < 1.5), 1.0, 1e-6)
    return _maximize(share / jnp.sum(share, 0) * weights, x, _floor(x, weights))


def _floor(x: Any, weights: Any) -> Any:
    """Least variances of components."""
    mean = weights @ x
    return _RIDGE * (weights @ (x - mean) ** 2)


def _maximize(responsibilities: Any, x: Any, floor: Any) -> GaussianMixture:
    """The M step; responsibilities have shape `(k, n)` and add up to 1 over everything."""
    total = jnp.maximum(jnp.sum(responsibilities, 1), 1e-12)
    means = (responsibilities @ x) / total[:, None]
    if x.shape[1] == 1:
        square = jnp.sum(responsibilities * (x[:, 0] - means) ** 2, 1) / total
        trils = jnp.sqrt(square + floor)[:, None, None]
    else:
        off = x - means[:, None]  # (k, n, d)
        covariances = jnp.swapaxes(responsibilities[..., None] * off, 1, 2) @ off
        covariances = covariances / total[:, None, None] + jnp.diag(floor)
        trils = jnp.linalg.cholesky(covariances)
    return GaussianMixture(jnp.log(total / jnp.sum(total)), means, trils)


def _em(start: GaussianMixture, x: Any, weights: Any, num_cycles: int) -> GaussianMixture:
    """Expectation-maximization (Dempster, Laird and Rubin 1977) on weighted points, accelerated.

    A cycle takes two steps, extrapolates them and takes a third from there: SQUAREM, scheme S3 of
    Varadhan and Roland, "Simple and globally convergent methods for accelerating the convergence
    of any EM algorithm" (2008). An extrapolation below the likelihood it came from is dropped.
    """
    floor = _floor(x, weights)

    def step(numbers):
        mixture = from_numbers(numbers, x.shape[1])
        logits = jax.vmap(mixture.component_log_probs, out_axes=1)(x)  # (k, n)
        log_p = logsumexp(logits, axis=0)
        new = _maximize(jnp.exp(logits - log_p) * weights, x, floor)
        return to_numbers(new), jnp.sum(jnp.where(weights > 0, weights * log_p, 0.0))

    def cycle(numbers, _):
        first, before = step(numbers)
        second, _ = step(first)
        r = first - numbers
        v = second - first - r
        length = jnp.sqrt(jnp.sum(r**2) / jnp.maximum(jnp.sum(v**2), 1e-20))
        length = jnp.clip(length, 1.0, _LONGEST)
        third, after = step(numbers + 2 * length * r + length**2 * v)
        better = jnp.all(jnp.isfinite(third)) & (after >= before)
        return jnp.where(better, third, second), None

    numbers = jax.lax.scan(cycle, to_numbers(start), None, length=num_cycles)[0]
    return from_numbers(numbers, x.shape[1])
