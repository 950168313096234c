"""Is the observation one that the model could have made?

A posterior of data unlike any simulation is not to be trusted, least of all a learned one. The
observation's features are compared with those of prior-predictive simulations by the maximum mean
discrepancy with a Gaussian kernel (Gretton et al. 2012; Schmitt et al. 2023 for amortized
inference). Its null distribution comes from putting simulations in the observation's place: under
the model they are exchangeable, so the p-value is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from abduce.amortized.checks.prior_predictive import simulate_data
from abduce.amortized.checks.result import Check, check_alpha
from abduce.errors import InvalidValue
from abduce.inference.algorithm import check_count
from abduce.ppl.operations import typed_key

__all__ = ["check_misspecification", "run_misspecification"]


def run_misspecification(
    model: Any,
    key: Any,
    *args: Any,
    given: Mapping[str, Any],
    num_simulations: int = 2000,
    features: Callable[[dict[str, Any]], Any] | None = None,
    alpha: float = 0.01,
    **kwargs: Any,
) -> Check:
    """Compares an observation with simulations of the model.

    Args:
        model: A model whose data are not observed inside.
        key: Random key.
        *args, **kwargs: The model's arguments.
        given: The observation, by address.
        num_simulations: Prior-predictive data sets.
        features: `f(data)` of one flat dict of data: a vector, such as a network's embedding or
            summary statistics. None: the data themselves.
        alpha: False-alarm rate.

    Returns:
        A `Check`: see `check_misspecification`.
    """
    check_count("run_misspecification", "num_simulations", num_simulations)
    key = typed_key(key, "run_misspecification")
    data = simulate_data(model, key, args, kwargs, tuple(given), num_simulations)
    own = {}
    for address, x in data.items():
        own[address] = np.asarray(given[address])
        if own[address].shape != x.shape[1:]:
            raise InvalidValue(
                f'run_misspecification: given["{address}"] has shape {own[address].shape}, but the '
                f"model draws {x.shape[1:]}."
            )
    if features is None:
        simulated = np.concatenate([x.reshape(num_simulations, -1) for x in data.values()], 1)
        observed = np.concatenate([x.ravel() for x in own.values()])
    else:
        simulated = np.asarray(jax.vmap(features)(data)).reshape(num_simulations, -1)
        observed = np.asarray(features(own)).ravel()
    return check_misspecification(observed, simulated, alpha=alpha)


def check_misspecification(
    observed: Any, simulated: Any, *, num_null: int = 1000, alpha: float = 0.01, seed: int = 0
) -> Check:
    """Tests whether features of observations are like those of simulations.

    Features are scaled by the median and quartiles of both together; the kernel's width is their
    median distance.

    Args:
        observed: Features of one observation, `(k,)`, or of several, `(n, k)`.
        simulated: Features of simulations, `(m, k)`.
        num_null: For several observations, random subsets of all to compare with; for one, every
            simulation takes its place.
        alpha: False-alarm rate.
        seed: Of the subsets.

    Returns:
        A `Check`; its array `mmd` is the squared discrepancy. It finds data that are farther out
        than simulations, not such that are too typical: see `check_predictive` for those.

    Raises:
        InvalidValue: Shapes do not fit, or numbers are not finite.
    """
    check_alpha("check_misspecification", alpha)
    x, y = np.asarray(observed, np.float64), np.asarray(simulated, np.float64)
    x = x[None] if x.ndim == 1 else x
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or len(y) <= len(x):
        raise InvalidValue(
            f"check_misspecification: expected features of shape (n, k) and more simulated ones, "
            f"(m, k), got {np.shape(observed)} and {np.shape(simulated)}."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InvalidValue("check_misspecification: features hold NaN or infinite numbers.")
    rng = np.random.default_rng(seed)
    together = _scaled(np.concatenate([x, y]))
    kernel = _kernel(together)
    n, total = len(x), len(together)
    if n == 1:
        subsets = np.arange(total)[:, None]
    else:
        rest = [rng.permutation(total)[:n] for _ in range(num_null)]
        subsets = np.stack([np.arange(n), *rest])
    statistic = _mmd(kernel, subsets)
    p_value = float((1 + (statistic[1:] >= statistic[0] - 1e-12).sum()) / len(statistic))
    far = np.abs(together[:n]).mean(0)
    passed = p_value > alpha
    return Check(
        name="misspecification",
        p_values={"discrepancy": p_value},
        alpha=alpha,
        verdict="The observation is like data that the model makes."
        if passed
        else f"The observation is unlike data that the model makes (most of all feature "
        f"{int(np.argmax(far))}, {far.max():.1f} scales from the median).",
        remedy=""
        if passed
        else "Change the model or its prior until its data can look like this, or treat the "
        "posterior as extrapolation; correct it with ab.importance or use ab.nuts.",
        notes=_notes(len(statistic) - 1, alpha),
        is_complete=len(statistic) >= 1 / alpha,
        arrays={"mmd": statistic[0], "null": statistic[1:]},
        figure=_figure,
    )


def _notes(num: int, alpha: float) -> tuple[str, ...]:
    if num + 1 >= 1 / alpha:
        return ()
    return (
        f"With {num} simulations no p-value is below {1 / (num + 1):.3g}, so this can never fail "
        f"at alpha={alpha}. Raise num_simulations to at least {int(np.ceil(1 / alpha))}.",
    )


def _scaled(x: np.ndarray) -> np.ndarray:
    low, middle, high = np.quantile(x, [0.25, 0.5, 0.75], axis=0)
    scale = np.where(high > low, (high - low) / 1.349, x.std(0))
    return (x - middle) / np.where(scale > 0, scale, 1.0)


def _kernel(x: np.ndarray) -> np.ndarray:
    squared = (x**2).sum(1)
    distance = np.maximum(squared[:, None] + squared[None] - 2 * x @ x.T, 0)
    np.fill_diagonal(distance, 0)
    off = distance[np.triu_indices(len(x), 1)]
    middle = np.median(off)
    return np.exp(-distance / (2 * (middle if middle > 0 else 1.0)))


def _mmd(kernel: np.ndarray, subsets: np.ndarray) -> np.ndarray:
    """Squared discrepancy between each subset and the rest, biased (V-statistic) form.

    With `S` the indicator of the subset, the three means are sums over the kernel's blocks.
    """
    total, n = len(kernel), subsets.shape[1]
    rows = kernel.sum(1)
    inside = np.array([kernel[np.ix_(s, s)].sum() for s in subsets])
    touching = rows[subsets].sum(1)  # subset with everything
    across = touching - inside
    outside = rows.sum() - 2 * touching + inside
    m = total - n
    return inside / n**2 + outside / m**2 - 2 * across / (n * m)


def _figure(arrays: Mapping[str, Any]) -> Any:
    from abduce.amortized.checks.figures import plot_statistics

    return plot_statistics(
        {"squared MMD": arrays["null"]}, {"squared MMD": arrays["mmd"]},
        title="Misspecification: the observation (black line) among simulations",
    )  # fmt: skip
