"""Which linear map the draws of a warm-up window call for (numpy, on the host).

Candidates, from draws `x` and gradients `g` of all chains, each chain centred on its own mean so
that chains that have not met do not inflate the scales:

- diagonal: standard deviations of `x` (Welford); or `sqrt(sd(x) / sd(g))`, which minimizes the
  Fisher divergence to a standard normal;
- dense: the covariance of `x`; or the geometric mean of `cov(x)` and `cov(g)^-1`, the minimizer of
  the same divergence, exact for a Gaussian as soon as the draws span the space;
- low rank, for large dimensions: the same inside the span of the extreme directions
  (arXiv 2603.18845).

None is best everywhere, so each is scored on draws it was not fitted to. Leapfrog steps per
independent draw grow as the longest scale times the largest curvature, both seen through the map:
`cost = sqrt(lambda_max(cov z) * lambda_max(cov grad_z))`, which is 1 for a whitened Gaussian.
"""

from typing import NamedTuple

import numpy as np

from .linear_map import LinearMap, diagonal_map

__all__ = ["Choice", "choose_metric", "covariance_map", "nonlinearity", "whiten"]

_WORTH_STRUCTURE = 0.9  # a structured map must cut the predicted cost to this share
_SHRINK = 5.0  # draws' worth of the identity mixed into covariances, in scaled coordinates


class Choice(NamedTuple):
    """A fitted map."""

    kind: str  # "diagonal", "low rank" or "dense"
    metric: LinearMap  # numpy arrays, float64
    cost: float  # predicted, of this map
    current_cost: float  # predicted, of the map in use


class _Pairs(NamedTuple):
    """Centred draws and gradients, each `(num_pairs, dim)`."""

    x: np.ndarray
    g: np.ndarray


def choose_metric(
    positions: np.ndarray, gradients: np.ndarray, current: LinearMap, dense_mass: bool | None
) -> Choice:
    """Picks and fits a map.

    Args:
        positions: Draws, shape `(num_chains, num_draws, dim)`.
        gradients: Gradients of the log density there, same shape.
        current: The map in use (its `factor` fixes the layout).
        dense_mass: None to choose; False for a diagonal; True for a dense map.

    Returns:
        The choice, with predicted costs.
    """
    dim, rank = current.factor.shape
    pairs = _centre(positions, gradients)
    # chains drift slowly, so halves are interleaved blocks rather than first and second half
    num_pairs = pairs.x.shape[0]
    fold = (np.arange(num_pairs) // max(1, num_pairs // 20)) % 2 == 0
    halves = [_Pairs(pairs.x[half], pairs.g[half]) for half in (fold, ~fold)]

    candidates = {}
    if dense_mass is not True:
        candidates["diagonal"] = [_diagonal_welford, _diagonal_fisher]
    if dense_mass is not False:
        if rank == dim:
            # in large dimension the sample covariance needs more draws than a window has
            candidates["dense"] = [_dense_fisher, _dense_welford][: 2 if dim <= 50 else 1]
        else:
            candidates["low rank"] = [_low_rank_fisher]
    scored = []
    for kind, fits in candidates.items():
        for fit in fits:
            cost = np.sqrt(np.prod([_cost(fit(a, rank), b) for a, b in (halves, halves[::-1])]))
            handicap = 1.0 if kind == "diagonal" or dense_mass else 1 / _WORTH_STRUCTURE
            scored.append((cost * handicap, cost, kind, fit))
    _, cost, kind, fit = min(scored, key=lambda entry: entry[0])
    current_cost = np.sqrt(np.prod([_cost(current, half) for half in halves]))
    return Choice(kind, fit(pairs, rank), float(cost), float(current_cost))


def nonlinearity(metric: LinearMap, positions: np.ndarray, gradients: np.ndarray) -> float:
    """How far the gradient is from a linear function of the position.

    For a Gaussian it is one, without noise, so few draws tell. Elsewhere the curvature depends on
    where one is, and a step size that does well on average may be too large in places.

    Args:
        metric: The map, through which the coordinates are comparable.
        positions: `(num_chains, num_draws, dim)`.
        gradients: Same shape.

    Returns:
        The largest share of a whitened gradient's variance that a linear regression leaves
        unexplained: below 0.15 for regressions with much data, about 0.5 for a mild funnel, 1 for
        a bad one, and 1 where there are too few draws to tell.
    """
    dim = positions.shape[-1]
    x = np.asarray(positions, np.float64).reshape(-1, dim)
    g = _pull(metric, np.asarray(gradients, np.float64).reshape(-1, dim))
    if len(x) < 2 * dim + 10:
        return 1.0
    z = whiten(metric, x - x.mean(0))
    g = g - g.mean(0)
    if not (np.isfinite(z).all() and np.isfinite(g).all()):  # draws that run to infinity
        return 1.0
    residual = g - z @ np.linalg.lstsq(z, g, rcond=None)[0]
    unexplained = np.sum(residual**2, 0) / (len(x) - dim - 1)
    variance = np.sum(g**2, 0) / (len(x) - 1)
    return float(np.max(unexplained / np.maximum(variance, 1e-300)))


def covariance_map(covariance: np.ndarray, rank: int) -> LinearMap:
    """The map of a covariance, diagonal where the layout is tall."""
    scale = np.sqrt(np.diag(covariance))
    if rank != covariance.shape[0]:
        return diagonal_map(scale, rank)
    return _dense(_root(covariance / np.outer(scale, scale)), scale)


def _centre(positions, gradients) -> _Pairs:
    dim = positions.shape[-1]

    def flat(a):
        a = np.asarray(a, np.float64)
        return (a - a.mean(1, keepdims=True)).reshape(-1, dim)

    return _Pairs(flat(positions), flat(gradients))


def _moment(a: np.ndarray) -> np.ndarray:
    """Second moment, shrunk to the identity as if by `_SHRINK` draws of it at a small scale."""
    num = a.shape[0]
    return (a.T @ a + 1e-3 * _SHRINK * np.eye(a.shape[1])) / (num + _SHRINK)


def _spread(a: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(a * a, 0))


def _fisher_scale(pairs: _Pairs) -> np.ndarray:
    sd_x, sd_g = _spread(pairs.x), _spread(pairs.g)
    usable = (sd_x > 0) & (sd_g > 0)
    scale = np.sqrt(np.where(usable, sd_x, 1.0) / np.where(usable, sd_g, 1.0))
    return np.where(usable, scale, np.where(sd_x > 0, sd_x, 1.0))


def _dense(root: np.ndarray, scale: np.ndarray) -> LinearMap:
    """From a covariance given as `diag(scale) root root^T diag(scale)`."""
    return LinearMap(scale, scale[:, None] * root, np.zeros(len(scale)), np.array(True))


def _diagonal_welford(pairs: _Pairs, rank: int) -> LinearMap:
    num = pairs.x.shape[0]
    sd_x, fisher = _spread(pairs.x), _fisher_scale(pairs)
    # few draws lean on the gradients
    return diagonal_map(
        (sd_x**num * fisher**_SHRINK) ** (1 / (num + _SHRINK))
        if num < 50
        else np.where(sd_x > 0, sd_x, fisher),
        rank,
    )


def _diagonal_fisher(pairs: _Pairs, rank: int) -> LinearMap:
    return diagonal_map(_fisher_scale(pairs), rank)


def _dense_welford(pairs: _Pairs, rank: int) -> LinearMap:
    scale = _spread(pairs.x)
    scale = np.where(scale > 0, scale, 1.0)
    return _dense(_root(_moment(pairs.x / scale)), scale)


def _dense_fisher(pairs: _Pairs, rank: int) -> LinearMap:
    scale = _fisher_scale(pairs)
    return _dense(_root_of_mean(_moment(pairs.x / scale), _moment(pairs.g * scale)), scale)


def _root(a: np.ndarray) -> np.ndarray:
    """`r` with `r r^T = a`, for a symmetric `a` that rounding may have made indefinite."""
    values, vectors = np.linalg.eigh(a)
    return vectors * np.sqrt(np.maximum(values, 1e-14 * values[-1]))


def _root_of_mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`r` with `s = r r^T` the geometric mean of `a` and `b^-1`, that is `s b s = a`."""
    # with b = l l^T and l^T a l = v w v^T: s = l^-T v w^(1/2) v^T l^-1
    values, vectors = np.linalg.eigh(b)
    lower = vectors * np.sqrt(np.maximum(values, 1e-14 * values[-1]))
    inverse_transposed = lower / (lower * lower).sum(0)
    values, vectors = np.linalg.eigh(lower.T @ a @ lower)
    return inverse_transposed @ (vectors * np.maximum(values, 1e-14 * values[-1]) ** 0.25)


def _low_rank_fisher(pairs: _Pairs, rank: int) -> LinearMap:
    scale = _fisher_scale(pairs)
    x, g = pairs.x / scale, pairs.g * scale
    columns = rank // 2
    # directions of the largest spread of draws, and of gradients
    spans = [np.linalg.svd(a, full_matrices=False)[2][:columns] for a in (x, g)]
    basis = np.linalg.qr(np.concatenate(spans).T)[0]
    root = _root_of_mean(_moment(x @ basis), _moment(g @ basis))
    values, vectors = np.linalg.eigh(root @ root.T)
    values = np.where((values > 2) | (values < 0.5), np.maximum(values, 1e-10), 1.0)
    factor, core = np.zeros((len(scale), rank)), np.zeros(rank)
    factor[:, : basis.shape[1]] = basis @ vectors
    core[: basis.shape[1]] = np.sqrt(values) - 1
    return LinearMap(scale, factor, core, np.array(True))


def _cost(metric: LinearMap, pairs: _Pairs) -> float:
    return float(np.sqrt(_largest(whiten(metric, pairs.x)) * _largest(_pull(metric, pairs.g))))


def whiten(metric: LinearMap, x: np.ndarray) -> np.ndarray:
    """`A^-1 x` for vectors along the last axis."""
    scale, factor, core = (np.asarray(a, np.float64) for a in metric[:3])
    dim, rank = factor.shape
    if not metric.is_structured:
        return x / scale
    if rank == dim:
        return np.linalg.solve(factor, x.reshape(-1, dim).T).T.reshape(x.shape)
    z = x / scale
    return z - (z @ factor) * (core / (1 + core)) @ factor.T


def _pull(metric: LinearMap, g: np.ndarray) -> np.ndarray:
    """`A^T g` for gradients along the last axis."""
    scale, factor, core = (np.asarray(a, np.float64) for a in metric[:3])
    if not metric.is_structured:
        return g * scale
    if factor.shape[0] == factor.shape[1]:
        return g @ factor
    return g * scale + ((g * scale) @ factor) * core @ factor.T


def _largest(a: np.ndarray) -> float:
    """The largest eigenvalue of the second moment, by power iteration."""
    num, dim = a.shape
    gram = (a.T @ a if dim <= num else a @ a.T) / num
    vector = gram[:, np.argmax(np.diag(gram))]
    value = 0.0
    for _ in range(100):
        norm = np.linalg.norm(vector)
        if not 0 < norm < np.inf:
            return float(norm)
        vector = gram @ (vector / norm)
        previous, value = value, float(np.linalg.norm(vector))
        if abs(value - previous) < 1e-3 * value:
            break
    return value
