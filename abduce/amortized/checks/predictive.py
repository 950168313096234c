"""Posterior predictive check: do data drawn from the posterior look like the observation?

Statistics of the observation are compared with those of replicates (Rubin 1984; Gelman, Meng and
Stern 1996). The tail probability uses the data twice, so it is conservative as a p-value: under the
model it is below `a` at most `2a` of the time (Meng 1994), and mostly far less often. The check
accounts for the factor 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from abduce.amortized.checks.result import Check, check_alpha
from abduce.errors import InvalidValue, UnknownAddress
from abduce.inference.predict import observations, with_gaps
from abduce.ppl.operations import typed_key

__all__ = ["check_predictive", "run_predictive"]

STATISTICS: Mapping[str, Callable[[np.ndarray], Any]] = {
    "mean": np.nanmean,
    "sd": np.nanstd,
    "min": np.nanmin,
    "max": np.nanmax,
}


def run_predictive(
    post: Any,
    key: Any,
    *,
    statistics: Mapping[str, Callable[[np.ndarray], Any]] | None = None,
    alpha: float = 0.01,
    batch_size: int | None = None,
) -> Check:
    """Draws replicates of the data from a posterior and compares them with the data.

    Args:
        post: A `Posterior`.
        key: Random key.
        statistics: By name, `f(x)` of one site's values: a scalar. Default: mean, sd, min, max.
        alpha: False-alarm rate.
        batch_size: Draws per step, to bound memory.

    Returns:
        A `Check`: see `check_predictive`.

    Example:
        >>> print(run_predictive(post, key, statistics={"range": np.ptp}))
    """
    data = {a: with_gaps(*x) for a, x in observations(post).items()}
    if not data:
        raise InvalidValue("run_predictive: the posterior was given no data to compare with.")
    replicates = post.predict(typed_key(key, "run_predictive"), batch_size=batch_size)
    flat = {}
    for address, x in data.items():
        drawn = np.asarray(replicates[address])
        drawn = drawn.reshape(drawn.shape[0] * drawn.shape[1], *drawn.shape[2:])
        # where nothing was observed, replicates count for nothing either
        flat[address] = np.where(np.isnan(x), np.nan, drawn) if x.dtype.kind == "f" else drawn
    return check_predictive(data, flat, statistics=statistics, alpha=alpha)


def check_predictive(
    observed: Mapping[str, Any],
    replicates: Mapping[str, Any],
    *,
    statistics: Mapping[str, Callable[[np.ndarray], Any]] | None = None,
    alpha: float = 0.01,
) -> Check:
    """Compares statistics of the observation with those of replicates.

    Args:
        observed: Data by address.
        replicates: Replicates by address, `(draw, ...)`.
        statistics: By name, `f(x)` of one site's values: a scalar. Default: mean, sd, min, max;
            for a site with a single number, the mean alone.
        alpha: False-alarm rate, over all statistics.

    Returns:
        A `Check`. Columns: `observed`, and `below`, the share of replicates with a smaller value:
        near 0 the replicates are too large, near 1 too small.
    """
    check_alpha("check_predictive", alpha)
    null, value, below, p_values = {}, {}, {}, {}
    for address, x in observed.items():
        x = np.asarray(x)
        if address not in replicates:
            raise UnknownAddress(f"check_predictive: there are no replicates of {address!r}.")
        y = np.asarray(replicates[address])
        if y.shape[1:] != x.shape or not len(y):
            raise InvalidValue(
                f"check_predictive: replicates[{address!r}] must have shape (draw, *{x.shape}), "
                f"got {y.shape}."
            )
        chosen = STATISTICS if statistics is None else statistics
        if statistics is None and x.size == 1:
            chosen = {"mean": np.nanmean}
        for name, f in chosen.items():
            label = f"{name} of {address}"
            t = np.array([f(row) for row in y], np.float64)
            own = float(f(x))
            if np.isnan(own) or np.isnan(t).any():
                raise InvalidValue(f"check_predictive: the statistic {label} is NaN.")
            less, equal, n = (t < own).sum(), (t == own).sum(), len(t)
            below[label] = float((less + equal / 2) / n)
            tail = (1 + min(n - less - equal / 2, less + equal / 2)) / (n + 1)
            p_values[label] = float(min(1.0, 2 * 2 * tail))  # two sides, data used twice
            null[label], value[label] = t, own
    check = Check(
        name="posterior predictive",
        p_values=p_values,
        alpha=alpha,
        verdict="",
        columns={"observed": value, "below": below},
        arrays={"null": null, "value": value},
        figure=_figure,
    )
    least = min(len(t) for t in null.values())
    return _with_verdict(check, least)


def _with_verdict(check: Check, num: int) -> Check:
    finest = 4 * len(check.p_values) / (num + 1)
    if finest > check.alpha:
        return dataclasses.replace(
            check,
            verdict=f"{num} replicates are too few to fail at alpha={check.alpha}.",
            remedy=f"Draw at least {int(np.ceil(4 * len(check.p_values) / check.alpha))}.",
            is_complete=False,
        )
    if check.passed:
        return dataclasses.replace(check, verdict="Replicates of the data look like the data.")
    worst = check.worst
    way = "larger" if check.columns["below"][worst] < 0.5 else "smaller"
    return dataclasses.replace(
        check,
        verdict=f"The {worst} is {check.columns['observed'][worst]:.4g}, but nearly all replicates "
        f"have a {way} one.",
        remedy="Extend the model where it cannot reproduce this statistic (tails, dependence, "
        "groups, an unequal variance).",
    )


def _figure(arrays: Mapping[str, Any]) -> Any:
    from abduce.amortized.checks.figures import plot_statistics

    return plot_statistics(
        arrays["null"], arrays["value"],
        title="Posterior predictive check: the observation (black line) among replicates",
    )  # fmt: skip
