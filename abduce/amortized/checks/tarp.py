"""TARP: tests of accuracy with random points (Lemos et al. 2023).

Balls around a reference point that reach to the posterior's draws are credible regions, too: the
share `f` of draws that are nearer to it than the true value is uniform for the exact posterior,
whatever the reference point, as long as it knows nothing of the true value that the data do not
tell. If `f` is uniform for enough reference points, the posterior is exact. Unlike ranks of single
latents this looks at all together, and needs no density.

**Blind spot.** With reference points that do not depend on the data, a posterior that does not
either, such as the prior, passes. `references="data"` puts them where a regression on the earlier
data sets expects the true value: each depends on its own data and on earlier data sets only, so
`f` stays exactly uniform and independent, and the prior fails.

With uniform references there is a second test, of the direction: a posterior that lies too high
makes true values seem far from the references above it and near to those below. `Phi^-1(f)` is
normal whatever the references, so its regression on them is, under the null, exactly chi-square.

Coordinates are scaled to the range of true values *and* draws together: a range of the true values
alone would treat them and the draws unlike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.special import chdtrc, ndtri

from abduce.amortized.checks.calibration import Calibration
from abduce.amortized.checks.result import Check, check_alpha
from abduce.amortized.checks.sbc import MAX_FAILED, too_few
from abduce.amortized.checks.uniformity import LEAST, Uniformity, pit, uniformity
from abduce.errors import InvalidValue

__all__ = ["check_tarp", "tarp_fractions"]

_NUM_BOOTSTRAP = 100
_MAX_FEATURES = 50
_PER_DIRECTION = 10  # data sets per scalar without which a regression on references tells nothing
_REMEDY = (
    "Train longer, use a richer family, or correct the draws with ab.importance(proposal=...); "
    "ab.sbc tells which latent is off."
)
_DISTANCES: dict[str, Callable[..., np.ndarray]] = {
    "euclidean": lambda x: np.sqrt((x**2).sum(-1)),
    "manhattan": lambda x: np.abs(x).sum(-1),
}


def check_tarp(
    runs: Calibration,
    *,
    references: str | np.ndarray | Callable[..., Any] = "uniform",
    distance: str = "euclidean",
    alpha: float = 0.01,
    max_failed: float = MAX_FAILED,
    seed: int = 0,
) -> Check:
    """Tests the joint posterior by distances to reference points.

    Args:
        runs: From `run_calibration`.
        references: "uniform" over the range of true values and draws; "data": where a regression
            on earlier data sets expects the true value; or points of your own, `(dataset, k)`
            over all scalars in the order of `runs.elements()`, or a function `f(data)` of the flat
            dict with the leading axis `dataset` that gives them. They may depend on the data, not
            on the true values.
        distance: "euclidean" or "manhattan", in scaled coordinates.
        alpha: False-alarm rate.
        max_failed: It does not pass if more than this share of the runs failed.
        seed: Of reference points, ties and the bootstrap.

    Returns:
        A `Check`. Arrays: `fractions`, `(dataset,)`, made uniform by breaking ties; `grid` and
        `ecp`, the expected coverage probability; `band`, the bootstrap's 95% (2, grid).
    """
    check_alpha("check_tarp", alpha)
    kind = references if isinstance(references, str) else "own"
    name = "tarp" if kind == "uniform" else f"tarp, {kind} references"
    if runs.num_datasets < LEAST:
        return too_few(name, runs, alpha)
    f, points = _fractions(runs, references, distance, seed)
    test = uniformity(f)
    p_values = {"distance": test.p_value}
    if kind == "uniform" and points.shape[1] <= len(points) // _PER_DIRECTION:
        p_values["direction"], slopes = _direction(f, points)
    grid, ecp = _curve(f)
    rng = np.random.default_rng([seed, 1])
    again = [_curve(rng.choice(f, len(f)))[1] for _ in range(_NUM_BOOTSTRAP)]
    verdict, remedy = _verdict(test, kind, alpha / len(p_values))
    if p_values.get("direction", 1) <= min(alpha / 2, test.p_value):
        label = runs.elements()[0][int(np.argmax(np.abs(slopes)))]
        way = "high (biased up)" if slopes[np.argmax(np.abs(slopes))] > 0 else "low (biased down)"
        verdict, remedy = f"The posterior lies too {way}, foremost in {label}.", _REMEDY
    notes = [f"{runs.title}: {runs.num_datasets} data sets.", *runs.notes()]
    if kind == "uniform":
        notes.append('A posterior that ignores the data can pass: references="data" finds it.')
    return Check(
        name=name,
        p_values=p_values,
        alpha=alpha,
        verdict=verdict,
        remedy=remedy,
        notes=tuple(notes),
        is_complete=runs.is_complete(max_failed),
        arrays={
            "fractions": f,
            "grid": grid,
            "ecp": ecp,
            "band": np.quantile(again, [0.025, 0.975], axis=0),
        },
        figure=_figure,
    )


def tarp_fractions(
    runs: Calibration,
    *,
    references: str | np.ndarray | Callable[..., Any] = "uniform",
    distance: str = "euclidean",
    seed: int = 0,
) -> np.ndarray:
    """Share of draws nearer to the reference point than the true value, `(dataset,)`.

    Ranks are made continuous as in `pit`. Arguments are those of `check_tarp`.
    """
    return _fractions(runs, references, distance, seed)[0]


def _fractions(runs, references, distance, seed) -> tuple[np.ndarray, np.ndarray]:
    """The fractions, and the references in scaled coordinates."""
    if distance not in _DISTANCES:
        raise InvalidValue(
            f"check_tarp: distance={distance!r} is unknown; choose from {sorted(_DISTANCES)}."
        )
    rng = np.random.default_rng([seed, 0])
    _, truths, draws = runs.elements()
    used = np.arange(draws.shape[1]) < runs.used[:, None]
    draws = np.where(used[:, :, None], draws, truths[:, None])  # unused ones must not set the range
    low, scale = _range(truths, draws)
    truths, draws = _scaled(truths, low, scale), _scaled(draws, low, scale)
    points = _references(references, runs, truths, low, scale, rng)
    reach = _DISTANCES[distance]
    f = pit(reach(truths - points), reach(draws - points[:, None]), runs.used, rng)
    return f, points


def _direction(f: np.ndarray, points: np.ndarray) -> tuple[float, np.ndarray]:
    """Regression of `Phi^-1(f)` on uniform references: p-value, and slopes in standard errors.

    A positive slope: true values are far from high references, so the posterior lies too high.
    """
    z, x = ndtri(f), points - 0.5
    factor = np.linalg.cholesky(x.T @ x)
    slopes = np.linalg.solve(x.T @ x, x.T @ z)
    explained = ((np.linalg.solve(factor, x.T @ z)) ** 2).sum()
    errors = np.sqrt(np.diag(np.linalg.inv(x.T @ x)))
    return float(chdtrc(x.shape[1], explained)), slopes / errors


def _range(truths: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    together = np.concatenate([truths[:, None], draws], 1).reshape(-1, truths.shape[1])
    finite = np.isfinite(together)
    low = np.where(finite, together, np.inf).min(0)
    high = np.where(finite, together, -np.inf).max(0)
    low = np.where(np.isfinite(low), low, 0.0)  # never active
    scale = np.where(high > low, high - low, 1.0)
    return low, scale


def _scaled(x: np.ndarray, low: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """To (0, 1); what is in a branch that was not taken lies apart from all that is."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(x), (x - low) / scale, np.where(x > 0, 1.5, -0.5))


def _references(references, runs, truths, low, scale, rng) -> np.ndarray:
    n, k = truths.shape
    if isinstance(references, str):
        if references == "uniform":
            return rng.random((n, k))
        if references == "data":
            return expected_values(runs.features(), truths, rng)
        raise InvalidValue(
            f'check_tarp: references={references!r}; choose "uniform", "data", an array of shape '
            f"{(n, k)}, or a function of the data that gives one."
        )
    points = references(dict(runs.observed)) if callable(references) else references
    points = np.asarray(points, np.float64)
    if points.shape != (n, k) or not np.isfinite(points).all():
        raise InvalidValue(
            f"check_tarp: references must be finite numbers of shape (dataset, k) = {(n, k)}, got "
            f"shape {points.shape}."
        )
    return (points - low) / scale


def expected_values(
    features: np.ndarray, targets: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Predictions of each row's targets from its features and from the rows before it.

    Ridge regression on standardized features and their squares, brought up to date row by row.

    Args:
        features: Shape `(row, p)`.
        targets: In about (0, 1), shape `(row, k)`.
        rng: Projects more than 50 features down to 50.

    Returns:
        Shape `(row, k)`.
    """
    x = features - np.median(features, 0)
    x = x / np.maximum(np.median(np.abs(x), 0) * 1.4826, 1e-12 + x.std(0) * 1e-3)
    x = np.clip(np.nan_to_num(x), -5, 5)
    if x.shape[1] > _MAX_FEATURES:
        x = x @ rng.normal(size=(x.shape[1], _MAX_FEATURES)) / np.sqrt(x.shape[1])
    phi = np.concatenate([np.ones((len(x), 1)), x, x**2 - 1], 1)
    covariance = np.eye(phi.shape[1])  # of the coefficients, in units of the noise
    weights = np.zeros((phi.shape[1], targets.shape[1]))
    out = np.empty(targets.shape)
    for i, row in enumerate(phi):
        out[i] = 0.5 + row @ weights
        gain = covariance @ row / (1 + row @ covariance @ row)
        weights += np.outer(gain, targets[i] - out[i])
        covariance -= np.outer(gain, row @ covariance)
    return np.clip(out, -0.5, 1.5)


def _curve(f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Credibility and expected coverage probability; the histogram spans (0, 1), not the data."""
    heights, edges = np.histogram(f, bins=max(len(f) // 10, 10), range=(0, 1), density=True)
    return edges, np.concatenate([[0], np.cumsum(heights) * np.diff(edges)])


def _verdict(test: Uniformity, kind: str, alpha: float) -> tuple[str, str]:
    if test.p_value > alpha:
        return "The true values are as far from the references as the draws are.", ""
    if kind == "data" and test.reason != "shape":
        inner = test.mean < 0 if test.reason == "location" else test.sd < 1
        if inner:
            return (
                "True values are nearer to where the data point than draws are: too wide, or the "
                "posterior makes too little of the data.",
                _REMEDY,
            )
        return "True values are farther from where the data point: too narrow or biased.", _REMEDY
    if test.reason == "spread":
        if test.sd < 1:
            return "True values lie amid the draws too often: too wide.", _REMEDY
        return "True values lie outside the draws too often: too narrow or biased.", _REMEDY
    if test.reason == "location":
        way = "farther from" if test.mean > 0 else "nearer to"
        return f"True values are {way} the references than draws are: biased.", _REMEDY
    return "The fractions are not uniform, though right on average: wrong in shape.", _REMEDY


def _figure(arrays: Mapping[str, Any]) -> Any:
    from abduce.amortized.checks.figures import plot_curves

    return plot_curves(
        {"expected coverage": arrays["ecp"]}, {"expected coverage": tuple(arrays["band"])},
        arrays["grid"], title="TARP: a correct posterior follows the diagonal",
        labels=("credibility", "expected coverage"),
    )  # fmt: skip
