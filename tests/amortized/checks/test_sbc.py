"""Calibration checks on made arrays: exact posteriors pass, wrong ones fail with the right words.

False alarms of the three checks are measured in `test_false_alarms.py`.
"""

import json

import numpy as np
import pytest
from conjugate import exact, looped, made, normal

from abduce.amortized import checks
from abduce.amortized.checks import check_coverage, check_sbc, check_tarp
from abduce.errors import InvalidValue

WRONG = {
    "narrow": ({"scale": 0.8}, "too narrow"),
    "wide": ({"scale": 1.25}, "too wide"),
    "high": ({"shift": 0.3}, "too high (biased up)"),
    "low": ({"shift": -0.3}, "too low (biased down)"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_sbc_catches_wrong_posteriors_at_the_default_size(kind):
    """20 of 20; the power is about .997."""
    settings, words = WRONG[kind]
    found = [check_sbc(made(np.random.default_rng(i), **settings)) for i in range(20)]
    assert not any(c.passed for c in found)
    assert all(words in c.verdict for c in found)
    last = found[-1]
    assert last.columns["shift"]["a"] == pytest.approx(settings.get("shift", 0), abs=0.25)
    assert last.columns["width"]["a"] == pytest.approx(settings.get("scale", 1), abs=0.15)


def test_an_exact_posterior_passes_and_is_told_what_would_be_seen():
    check = check_sbc(made(np.random.default_rng(5)))
    assert check.passed and "would be seen in 99 of 100" in check.verdict
    assert set(check.p_values) == {"a", "b[0]", "log joint density"}
    assert "passed" in str(check) and "400 data sets" in str(check)
    json.dumps(check.as_dict())


def test_the_prior_as_posterior_has_uniform_ranks_but_a_wrong_density():
    runs = made(np.random.default_rng(6), ignores_data=True)
    check = check_sbc(runs)
    assert min(check.p_values["a"], check.p_values["b[0]"]) > 1e-3
    assert check.p_values["log joint density"] < 1e-10 and not check.passed
    assert "blind to data" in check.verdict
    blind = check_tarp(runs)  # the known blind spot of uniform references
    assert blind.p_value > 1e-3 and any("references=" in n for n in blind.notes)
    seeing = check_tarp(runs, references="data")
    assert seeing.p_value < 1e-10 and "too little of the data" in seeing.verdict


def test_quantities_of_ones_own():
    runs = made(np.random.default_rng(7), density=False)
    check = check_sbc(runs, quantities={"product": lambda z, x: z["a"] * z["b"][0] + x["y"][0]})
    assert check.p_values["product"] > 1e-3
    with pytest.raises(InvalidValue, match="must give a scalar"):
        check_sbc(runs, quantities={"two": lambda z, x: x["y"]})


def test_too_few_runs_do_not_pass():
    for check in (check_sbc, check_coverage, check_tarp):
        result = check(made(np.random.default_rng(0), num=5))
        assert not result.passed and "Only 5 data sets" in result.verdict
        assert "FAILED" in str(result)


def test_coverage_counts_regions():
    runs = made(np.random.default_rng(8), num=1000)
    check = check_coverage(runs)
    assert check.passed
    for name in ("highest-density regions", "a", "b[0]"):
        for level, share in (("50%", 0.5), ("80%", 0.8), ("95%", 0.95)):
            error = 4.5 * np.sqrt(share * (1 - share) / 1000)
            assert abs(check.columns[level][name] - share) < error
    # chi with 2 degrees of freedom: a region of credibility c reaches to r^2 = -2 log(1 - c)
    narrow = check_coverage(made(np.random.default_rng(9), num=1000, scale=0.8))
    inside = 1 - (1 - 0.8) ** (0.8**2)
    share = narrow.columns["80%"]["highest-density regions"]
    assert abs(share - inside) < 4.5 * np.sqrt(inside * (1 - inside) / 1000)
    assert not narrow.passed and "too narrow" in narrow.verdict
    wide = check_coverage(made(np.random.default_rng(9), scale=1.25))
    assert not wide.passed and "too wide" in wide.verdict
    assert "no density" in str(check_coverage(made(np.random.default_rng(9), density=False)))


def test_the_whole_way_with_and_without_tracing(key):
    for alg in (exact(), looped()):
        check = checks.sbc(normal, alg, key, observed=["y"], num_datasets=150)
        assert check.passed and len(check.p_values) == 3
        wrong = checks.sbc(normal, alg.replace(scale=0.6), key, observed="y", num_datasets=150)
        assert not wrong.passed and "too narrow" in wrong.verdict


def test_plots_show_the_ranks(tmp_path):
    runs = made(np.random.default_rng(10), num=100)
    for check in (check_sbc(runs), check_coverage(runs), check_tarp(runs)):
        figure = check.plot()
        figure.savefig(tmp_path / "f.png")
        assert (tmp_path / "f.png").stat().st_size > 5000
    axis = check_sbc(runs).plot().axes[0]
    line = axis.lines[0].get_ydata()
    u = check_sbc(runs).arrays["u"]["a"]
    grid = np.linspace(0, 1, 201)
    np.testing.assert_allclose(line, [(u <= g).mean() - g for g in grid], atol=1e-12)
