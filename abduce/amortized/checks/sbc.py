"""Simulation-based calibration: are true values exchangeable with posterior draws?

Draw `theta ~ p(theta)`, `x ~ p(x | theta)`, and draws from the posterior of `x`: then the rank of
any quantity of `theta` among its values at the draws is uniform (Talts et al. 2018). Besides every
latent, the log density of the joint is a quantity: it depends on the data, so it also finds a
posterior that does not, such as the prior, whose latents have perfect ranks (Modrak et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from abduce.amortized.checks.calibration import Calibration
from abduce.amortized.checks.result import Check, check_alpha
from abduce.amortized.checks.runs import run_calibration
from abduce.amortized.checks.uniformity import LEAST, Uniformity, detectable, pit, uniformity
from abduce.errors import InvalidValue

__all__ = ["check_sbc", "run_sbc", "sbc", "too_few"]

MAX_FAILED = 0.01
JOINT, POSTERIOR = "log joint density", "log posterior density"

_REMEDY = {
    "narrow": "Train longer or on more simulations, use a richer family, or correct the draws with "
    "ab.importance(proposal=...).",
    "wide": "Train longer or use a richer family; a posterior near the prior has learned little.",
    "shift": "Look for a wrong transformation or a wrong model in the algorithm; train longer.",
    "shape": "Look at the plot; use a richer family, or longer chains.",
}


def sbc(
    model: Any,
    algorithm: Any,
    key: Any,
    *args: Any,
    observed: Sequence[str] | str | None = None,
    num_datasets: int = 400,
    num_samples: int = 100,
    designs: Any = None,
    budget: float | None = None,
    quantities: Mapping[str, Callable[..., Any]] | None = None,
    alpha: float = 0.01,
    **kwargs: Any,
) -> Check:
    """Checks an algorithm on a model by simulation-based calibration.

    With the defaults, a posterior whose standard deviation is off by a quarter, or whose mean is
    off by 0.3 of it, fails in 99 of 100 checks; a correct one in at most 1 of 100.

    Args:
        model: A model whose data are not observed inside.
        algorithm: Any algorithm or estimator; None for the attached one.
        key: Random key.
        *args, **kwargs: The model's arguments.
        observed: Addresses of the data; default: the algorithm's `observed`, if it has them.
        num_datasets: Data sets, each with a run of the algorithm.
        num_samples: Draws of each posterior, at most.
        designs: A Model that returns the model's arguments, in place of them.
        budget: Seconds; fewer data sets are run if it is spent.
        quantities: Further functions `f(latents, data)` of flat dicts, each giving a scalar.
        alpha: False-alarm rate.

    Returns:
        A `Check`: `passed`, `p_values`, `verdict`, `plot()`. The column `shift` is positive where
        the posterior lies too high, in its standard deviations; `width` is its standard deviation
        relative to what it should be.

    Raises:
        MissingData, UnknownAddress: `observed` is missing or wrong.
        InvalidModel: Data cannot be drawn from the model.
        Degenerate: Every run failed.

    Example:
        >>> print(ab.sbc(schools, ab.nuts(), key, sigma, observed=["y"], num_datasets=100))
    """
    runs = run_sbc(
        model, algorithm, key, *args, observed=observed, num_datasets=num_datasets,
        num_samples=num_samples, designs=designs, budget=budget, **kwargs,
    )  # fmt: skip
    return check_sbc(runs, quantities=quantities, alpha=alpha)


run_sbc = run_calibration


def check_sbc(
    runs: Calibration,
    *,
    quantities: Mapping[str, Callable[..., Any]] | None = None,
    alpha: float = 0.01,
    max_failed: float = MAX_FAILED,
    seed: int = 0,
) -> Check:
    """Tests the ranks of true values among posterior draws.

    Args:
        runs: From `run_calibration`.
        quantities: Further functions `f(latents, data)` of flat dicts, each giving a scalar.
        alpha: False-alarm rate of the check, over all quantities.
        max_failed: It does not pass if more than this share of the runs failed.
        seed: Breaks ties.

    Returns:
        A `Check`.
    """
    check_alpha("check_sbc", alpha)
    if runs.num_datasets < LEAST:
        return too_few("sbc", runs, alpha)
    rng = np.random.default_rng(seed)
    labels, truths, draws = runs.elements()
    u = dict(zip(labels, pit(truths, draws, runs.used, rng).T, strict=True))
    for name, pair in ((JOINT, runs.log_joint), (POSTERIOR, runs.log_posterior)):
        if pair is not None:
            u[name] = pit(*pair, runs.used, rng)
    for name, f in (quantities or {}).items():
        u[name] = pit(*_evaluate(name, f, runs), runs.used, rng)
    tests = {name: uniformity(x) for name, x in u.items()}
    verdict, remedy = _verdict(tests, runs, alpha)
    return Check(
        name="sbc",
        p_values={name: t.p_value for name, t in tests.items()},
        alpha=alpha,
        verdict=verdict,
        remedy=remedy,
        notes=(f"{runs.title}: {runs.num_datasets} data sets.", *runs.notes()),
        columns={
            "shift": {name: -t.mean for name, t in tests.items() if not _is_density(name)},
            "width": {name: 1 / t.sd for name, t in tests.items() if not _is_density(name)},
        },
        is_complete=runs.is_complete(max_failed),
        arrays={"u": u, "alpha": alpha},
        figure=_figure,
    )


def too_few(name: str, runs: Calibration, alpha: float) -> Check:
    """The check that cannot be made: it does not pass."""
    return Check(
        name=name,
        p_values={},
        alpha=alpha,
        verdict=f"Only {runs.num_datasets} data sets were run; {LEAST} are needed.",
        remedy="Raise budget or num_datasets.",
        notes=runs.notes(),
        is_complete=False,
    )


def _is_density(name: str) -> bool:
    return name in (JOINT, POSTERIOR)


def _evaluate(name: str, f: Callable[..., Any], runs: Calibration) -> tuple[Any, Any]:
    over_draws = jax.vmap(f, in_axes=(0, None))
    truth = np.asarray(jax.vmap(f)(dict(runs.truths), dict(runs.observed)))
    draws = np.asarray(jax.vmap(over_draws)(dict(runs.draws), dict(runs.observed)))
    if truth.shape != (runs.num_datasets,):
        raise InvalidValue(
            f"check_sbc: quantities[{name!r}] must give a scalar, got shape {truth.shape[1:]} for "
            f"one draw. Pass one function for each element."
        )
    if np.isnan(truth).any() or np.isnan(draws).any():
        raise InvalidValue(f"check_sbc: quantities[{name!r}] gives NaN.")
    return truth, draws


def _verdict(tests: Mapping[str, Uniformity], runs: Calibration, alpha: float) -> tuple[str, str]:
    level = alpha / len(tests)
    bad = sorted((n for n in tests if tests[n].p_value <= level), key=lambda n: tests[n].p_value)
    if not bad:
        shift, wider = detectable(runs.num_datasets, level)
        return (
            f"No error seen. A posterior shifted by {shift:.2f} sd, or wider than it should be by "
            f"{100 * wider:.0f}%, would be seen in 99 of 100 checks of this size.",
            "",
        )
    # what is said of a latent can be acted on; a density tells only that something is wrong
    shown = [n for n in bad if not _is_density(n)] or bad
    words = [_words(n, tests[n]) for n in shown[:3]]
    more = f" (and {len(shown) - 3} more)" if len(shown) > 3 else ""
    return "; ".join(w for w, _ in words) + more + ".", _REMEDY[words[0][1]]


def _words(name: str, t: Uniformity) -> tuple[str, str]:
    if _is_density(name):
        if t.reason == "location" and t.mean < 0:
            return f"{name}: true values are less probable than draws: too narrow or off", "narrow"
        if t.reason == "location":
            return (
                f"{name}: true values are more probable than draws: too wide, or blind to data",
                ("wide"),
            )
        return f"{name}: ranks are not uniform, though right on average", "shape"
    if t.reason == "location":
        way = "low (biased down)" if t.mean > 0 else "high (biased up)"
        return f"{name}: the posterior lies {abs(t.mean):.2f} sd too {way}", "shift"
    if t.reason == "spread":
        width = 100 * abs(1 / t.sd - 1)
        way = "narrow" if t.sd > 1 else "wide"
        return f"{name}: the posterior is too {way}, by about {width:.0f}%", way
    return f"{name}: ranks are not uniform, though centre and width are right", "shape"


def _figure(arrays: Mapping[str, Any]) -> Any:
    from abduce.amortized.checks.figures import plot_ecdf_difference

    return plot_ecdf_difference(arrays["u"], arrays["alpha"])
