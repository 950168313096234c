"""All checks of a posterior in one table, with one false-alarm rate."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from abduce.amortized.checks.calibration import Calibration
from abduce.amortized.checks.coverage import check_coverage
from abduce.amortized.checks.misspecification import run_misspecification
from abduce.amortized.checks.predictive import run_predictive
from abduce.amortized.checks.result import Check, check_alpha, holm, text_table
from abduce.amortized.checks.runs import run_calibration
from abduce.amortized.checks.sbc import check_sbc
from abduce.amortized.checks.tarp import check_tarp
from abduce.errors import InvalidValue, UnknownAddress
from abduce.ppl.operations import typed_key

__all__ = ["Report", "check_all", "run_all"]


@dataclass(frozen=True, eq=False)
class Report:
    """Several checks of one posterior.

    Attributes:
        checks: In the order made; each on its own, at `alpha`.
        alpha: False-alarm rate of `passed`, over all checks: at most this share of correct
            posteriors fail (Holm's correction).
        title: What was checked.
        seconds: Taken in all.
    """

    checks: tuple[Check, ...]
    alpha: float
    title: str = "posterior"
    seconds: float = 0.0

    @property
    def adjusted(self) -> dict[str, float]:
        """By check, the p-value corrected for the number of checks."""
        values = holm([c.p_value for c in self.checks])
        return {c.name: float(p) for c, p in zip(self.checks, values, strict=True)}

    @property
    def passed(self) -> bool:
        """Whether every check was made and none found anything at the rate `alpha` over all."""
        found = any(p <= self.alpha for p in self.adjusted.values())
        return bool(self.checks) and not found and all(c.is_complete for c in self.checks)

    def __getitem__(self, name: str) -> Check:
        """The check of this name, such as "sbc"."""
        for check in self.checks:
            if check.name == name:
                return check
        names = [c.name for c in self.checks]
        raise UnknownAddress(f"there is no check {name!r}; there are {', '.join(names)}.")

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "passed": self.passed,
            "alpha": self.alpha,
            "title": self.title,
            "seconds": round(self.seconds, 3),
            "adjusted_p_values": self.adjusted,
            "checks": [c.as_dict() for c in self.checks],
        }

    def __str__(self) -> str:
        state = "passed" if self.passed else "FAILED"
        head = f"{self.title}: {state} (false alarms: at most {self.alpha:.2g} over all checks)"
        rows = []
        for check in self.checks:
            p = self.adjusted[check.name]
            result = "ok" if p > self.alpha else "FAILED"
            result = result if check.is_complete else "incomplete"
            rows.append([result, "-" if np.isnan(check.p_value) else f"{p:.3g}"])
        lines = [head, text_table([c.name for c in self.checks], ["", "adjusted p"], rows)]
        notes: dict[str, None] = {}
        for check, (result, _) in zip(self.checks, rows, strict=True):
            if result != "ok":
                lines += ["", f"{check.name}: {check.verdict}", check.remedy]
            notes.update(dict.fromkeys(check.notes))
        return "\n".join([*lines, *([""] if notes else []), *notes])

    def __repr__(self) -> str:
        return self.__str__()


def check_all(runs: Calibration, *, alpha: float = 0.01, seed: int = 0) -> Report:
    """SBC, coverage, and TARP with both kinds of references, of runs that were made before.

    Args:
        runs: From `run_calibration`.
        alpha: False-alarm rate over all checks.
        seed: Breaks ties.
    """
    check_alpha("check_all", alpha)
    checks = [
        check_sbc(runs, alpha=alpha, seed=seed),
        check_coverage(runs, alpha=alpha, seed=seed + 1),
        check_tarp(runs, alpha=alpha, seed=seed + 2),
    ]
    if runs.observed:
        checks.append(check_tarp(runs, references="data", alpha=alpha, seed=seed + 3))
    return Report(tuple(checks), alpha, runs.title, runs.seconds)


def run_all(
    model: Any,
    algorithm: Any,
    key: Any,
    *args: Any,
    observed: Sequence[str] | str | None = None,
    given: Mapping[str, Any] | None = None,
    num_datasets: int = 400,
    num_samples: int = 100,
    designs: Any = None,
    budget: float | None = None,
    alpha: float = 0.01,
    **kwargs: Any,
) -> Report:
    """Runs an algorithm on data sets from the model, and every check on the results.

    Args:
        model: A model whose data are not observed inside.
        algorithm: Any algorithm or estimator; None for the attached one.
        key: Random key.
        *args, **kwargs: The model's arguments.
        observed: Addresses of the data; default: those of `given`, or the algorithm's `observed`.
        given: An observation: adds the check of misspecification and the posterior predictive
            one. Not with `designs`.
        num_datasets: Data sets.
        num_samples: Draws of each posterior, at most.
        designs: A Model that returns the model's arguments, in place of them.
        budget: Seconds in all; fewer data sets are run if it is spent.
        alpha: False-alarm rate over all checks.

    Returns:
        A `Report`.

    Example:
        >>> report = run_all(model, ab.nuts(), key, observed=["y"], budget=60)
        >>> report.passed, report["sbc"].verdict
    """
    check_alpha("run_all", alpha)
    started = time.monotonic()
    key_runs, key_sim, key_post, key_rep = jax.random.split(typed_key(key, "run_all"), 4)
    if observed is None and given is not None:
        observed = tuple(given)
    if given is not None and designs is not None:
        raise InvalidValue(
            "run_all: given= is one observation with its own arguments, designs= draws arguments. "
            "Check the observation in a second call, with its arguments and without designs=."
        )
    extra = []
    if given is not None:  # first: they are quick, and few runs must not leave them out
        extra.append(
            run_misspecification(model, key_sim, *args, given=given, alpha=alpha, **kwargs)
        )
        configured = model if algorithm is None else algorithm(model)
        post = configured.posterior(key_post, *args, given=dict(given), **kwargs)
        extra.append(run_predictive(post, key_rep, alpha=alpha))
    left = None if budget is None else max(budget - (time.monotonic() - started), 1e-3)
    runs = run_calibration(
        model, algorithm, key_runs, *args, observed=observed, num_datasets=num_datasets,
        num_samples=num_samples, designs=designs, budget=left, **kwargs,
    )  # fmt: skip
    report = check_all(runs, alpha=alpha)
    return Report((*report.checks, *extra), alpha, report.title, time.monotonic() - started)
