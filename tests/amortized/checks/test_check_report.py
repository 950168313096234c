"""All checks together: one rate, one table, plain values for storage."""

import json

import numpy as np
import pytest
from conjugate import exact, looped, made, normal

from abduce.amortized.checks import Check, Report, check_all, run_all
from abduce.errors import InvalidValue, UnknownAddress


def test_the_rate_is_over_all_checks():
    def check(name, p, is_complete=True):
        return Check(name=name, p_values={"x": p}, alpha=0.01, verdict="v", is_complete=is_complete)

    report = Report((check("a", 0.004), check("b", 0.5), check("c", 0.3)), alpha=0.01)
    assert report.adjusted == pytest.approx({"a": 0.012, "b": 0.6, "c": 0.6}) and report.passed
    assert not Report((check("a", 0.003), check("b", 0.5), check("c", 0.3)), alpha=0.01).passed
    assert not Report((check("a", 0.5, is_complete=False),), alpha=0.01).passed
    assert not Report((), alpha=0.01).passed


def test_made_runs():
    good = check_all(made(np.random.default_rng(0)))
    assert good.passed and len(good.checks) == 4
    bad = check_all(made(np.random.default_rng(0), scale=0.7))
    assert not bad.passed and "too narrow" in str(bad)
    assert bad["sbc"].p_value < 1e-3
    stored = json.loads(json.dumps(bad.as_dict(), allow_nan=False))
    assert stored["passed"] is False and stored["checks"][0]["name"] == "sbc"
    with pytest.raises(UnknownAddress, match="sbc"):
        bad["sbcc"]


def test_run_all_with_and_without_an_observation(key):
    report = run_all(normal, exact(), key, observed=["y"], num_datasets=100)
    assert report.passed and [c.name for c in report.checks] == [
        "sbc", "coverage", "tarp", "tarp, data references",
    ]  # fmt: skip
    y = np.array([7.0, 0.0], np.float32)
    odd = run_all(normal, exact(num_samples=3000), key, given={"y": y}, num_datasets=100)
    assert odd["sbc"].passed and not odd["misspecification"].passed and not odd.passed
    with pytest.raises(InvalidValue, match="second call"):
        run_all(normal, exact(), key, given={"y": y}, designs=normal)


def test_a_budget_that_is_too_small_is_no_pass(key):
    report = run_all(normal, looped(), key, observed="y", num_datasets=50, budget=1e-3)
    assert not report.passed and "incomplete" in str(report) and "budget" in str(report)
