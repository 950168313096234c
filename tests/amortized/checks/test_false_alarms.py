"""False-alarm rates and power of the checks, measured on draws that NumPy makes."""

import math

import numpy as np
import pytest
from conjugate import made

from abduce.amortized.checks import check_all, check_coverage, check_sbc, check_tarp

CHECKS = {
    "sbc": check_sbc,
    "coverage": check_coverage,
    "tarp": check_tarp,
    "tarp, data references": lambda r, **k: check_tarp(r, references="data", **k),
}


@pytest.mark.slow
def test_false_alarms_are_at_most_as_stated():
    """800 exact posteriors at two levels; 4.5 standard errors above the rate is an alarm.

    Alarms must also happen: below a tenth of the rate a check would be asleep.
    """
    num, p = 800, {name: [] for name in CHECKS}
    p["all"] = []
    for i in range(num):
        runs = made(np.random.default_rng(1000 + i), num=150, draws=60)
        for name, check in CHECKS.items():
            p[name].append(check(runs, seed=2 * i).p_value)
        p["all"].append(min(check_all(runs, seed=2 * i + 1).adjusted.values()))
    for name, values in p.items():
        for alpha in (0.01, 0.1):
            rate = np.mean(np.array(values) <= alpha)
            assert rate < alpha + 4.5 * math.sqrt(alpha * (1 - alpha) / num), (name, alpha, rate)
        assert np.mean(np.array(values) <= 0.1) > 0.01, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"scale": 0.8}, {"scale": 1.25}, {"shift": 0.3}, {"shift": -0.3}]
)
def test_wrong_posteriors_are_caught_at_the_default_size(settings):
    """At least 99 of 100 by SBC and by the whole report."""
    caught = {"sbc": 0, "all": 0}
    for i in range(100):
        runs = made(np.random.default_rng(i), **settings)
        caught["sbc"] += not check_sbc(runs).passed
        caught["all"] += not check_all(runs).passed
    assert min(caught.values()) >= 99
