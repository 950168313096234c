"""Expected coverage: how often regions of the posterior hold the true value.

A region of credibility `c` should hold it in a share `c` of the data sets. Regions of highest
density (Hermans et al. 2022): the true value lies in the one of credibility `c` if the share of
draws with a higher log density is below `c`. The density is that of the posterior itself where it
has one, otherwise that of the model's joint, which for given data is the exact posterior's up to a
constant. Central intervals look at each latent on its own: the one of credibility `c` holds the
true value if its rank `u` has `|2u - 1| < c`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from abduce.amortized.checks.calibration import Calibration
from abduce.amortized.checks.result import Check, check_alpha
from abduce.amortized.checks.sbc import MAX_FAILED, too_few
from abduce.amortized.checks.uniformity import LEAST, Uniformity, ecdf_band, pit, uniformity

__all__ = ["check_coverage"]

REGIONS = "highest-density regions"
LEVELS = (0.5, 0.8, 0.95)


def check_coverage(
    runs: Calibration,
    *,
    alpha: float = 0.01,
    max_failed: float = MAX_FAILED,
    seed: int = 0,
) -> Check:
    """Tests whether credible regions hold the true value as often as they say.

    Args:
        runs: From `run_calibration`.
        alpha: False-alarm rate of the check, over all quantities.
        max_failed: It does not pass if more than this share of the runs failed.
        seed: Breaks ties.

    Returns:
        A `Check`. Its columns are the measured coverage of regions of 50%, 80% and 95%; below
        that number, the posterior is too narrow or in the wrong place, above it too wide.
    """
    check_alpha("check_coverage", alpha)
    if runs.num_datasets < LEAST:
        return too_few("coverage", runs, alpha)
    rng = np.random.default_rng(seed)
    labels, truths, draws = runs.elements()
    # |2u - 1| of a uniform u is uniform
    central = np.abs(2 * pit(truths, draws, runs.used, rng) - 1)
    central = np.clip(central, 1e-15, 1 - 1e-15)
    u = dict(zip(labels, central.T, strict=True))
    density = runs.log_posterior if runs.log_posterior is not None else runs.log_joint
    notes = [f"{runs.title}: {runs.num_datasets} data sets.", *runs.notes()]
    if density is not None:
        u = {REGIONS: pit(-density[0], -density[1], runs.used, rng), **u}
    else:
        notes.append("The model has no density, so there are no regions of highest density.")
    tests = {name: uniformity(x) for name, x in u.items()}
    verdict, remedy = _verdict(u, tests, alpha)
    return Check(
        name="coverage",
        p_values={name: t.p_value for name, t in tests.items()},
        alpha=alpha,
        verdict=verdict,
        remedy=remedy,
        notes=tuple(notes),
        columns={
            f"{100 * c:.0f}%": {name: float((x < c).mean()) for name, x in u.items()}
            for c in LEVELS
        },
        is_complete=runs.is_complete(max_failed),
        arrays={"u": u, "alpha": alpha},
        figure=_figure,
    )


def _verdict(
    u: Mapping[str, np.ndarray], tests: Mapping[str, Uniformity], alpha: float
) -> tuple[str, str]:
    level = alpha / len(tests)
    bad = sorted((n for n in tests if tests[n].p_value <= level), key=lambda n: tests[n].p_value)
    if not bad:
        return "Credible regions hold the true value as often as they say.", ""
    words = []
    for name in bad[:3]:
        excess = [(u[name] < c).mean() - c for c in LEVELS]
        share = f"{name}: 80% regions hold the true value in {100 * (excess[1] + 0.8):.0f}%"
        if max(excess) <= 0:
            words.append(f"{share}: too narrow, or in the wrong place")
        elif min(excess) >= 0:
            words.append(f"{share}: too wide")
        else:
            words.append(f"{name}: coverage is too low at some levels and too high at others")
    more = f" (and {len(bad) - 3} more)" if len(bad) > 3 else ""
    remedy = (
        "Too wide is safe but wasteful; too narrow is neither. Train longer, use a richer family, "
        "or correct the draws with ab.importance(proposal=...)."
    )
    return "; ".join(words) + more + ".", remedy


def _figure(arrays: Mapping[str, Any]) -> Any:
    from abduce.amortized.checks.figures import plot_curves

    first = next(iter(arrays["u"].values()))
    points, low, high = ecdf_band(len(first), arrays["alpha"])
    grid = np.concatenate([[0], points, [1]])
    curves = {
        name: np.searchsorted(np.sort(x), grid, side="right") / len(x)
        for name, x in arrays["u"].items()
    }
    bands = {"band of a correct posterior": (np.r_[0, low, 1], np.r_[0, high, 1])}
    return plot_curves(
        {"band of a correct posterior": grid, **curves}, bands, grid,
        title="Coverage: above the diagonal too wide, below too narrow",
        labels=("credibility", "share of true values inside"),
    )  # fmt: skip
