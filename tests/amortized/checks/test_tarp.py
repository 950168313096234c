"""TARP: exact fractions, power in both directions, references of one's own."""

import numpy as np
import pytest
from conjugate import made
from scipy.stats import kstest

from abduce.amortized.checks import Calibration, check_tarp, tarp_fractions
from abduce.amortized.checks.tarp import _curve, expected_values
from abduce.errors import InvalidValue

WRONG = {
    "narrow": ({"scale": 0.75}, "too narrow"),
    "wide": ({"scale": 1.35}, "too wide"),
    "high": ({"shift": 0.4}, "biased up"),
    "low": ({"shift": -0.4}, "biased down"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_posteriors_are_caught_with_the_right_words(kind):
    settings, words = WRONG[kind]
    for i in range(5):
        check = check_tarp(made(np.random.default_rng(i), **settings), seed=i)
        assert not check.passed and words in check.verdict


@pytest.mark.parametrize("kind", ["narrow", "wide"])
def test_references_from_the_data_see_a_wrong_width(kind):
    settings, words = WRONG[kind]
    check = check_tarp(made(np.random.default_rng(0), **settings), references="data")
    assert not check.passed and words in check.verdict


@pytest.mark.parametrize("references", ["uniform", "data", lambda x: 0.8 * x["y"]])
def test_fractions_of_an_exact_posterior_are_uniform(references):
    """KS test of 4000, alarm at 1e-5; few draws each, so that ties and ends matter."""
    runs = made(np.random.default_rng(1), num=4000, draws=7)
    f = tarp_fractions(runs, references=references)
    assert kstest(f, "uniform").pvalue > 1e-5
    wrong = tarp_fractions(
        made(np.random.default_rng(1), num=4000, draws=7, scale=0.7), references=references
    )
    assert kstest(wrong, "uniform").pvalue < 1e-5


def test_a_fraction_counts_the_draws_that_are_nearer():
    runs = Calibration(
        truths={"x": np.array([0.0, 10.0])},
        draws={"x": np.array([[1.0, 2.0, 8.0, 9.0], [1.0, 2.0, 8.0, 9.0]])},
    )
    f = tarp_fractions(runs, references=np.array([[3.0], [3.0]]))
    assert 2 / 5 < f[0] < 3 / 5  # 3 away: draws 1 and 2 are nearer
    assert f[1] > 4 / 5


def test_coordinates_are_scaled_by_truths_and_draws_together():
    """A far draw widens the range of its coordinate, and so takes it out of the distance."""
    truths = {"x": np.array([0.0, 1.0]), "y": np.array([0.0, 1.0])}
    draws = {"x": np.array([[0.0, 0.5], [1.0, 1000.0]]), "y": np.array([[0.4, 0.1], [0.5, 0.5]])}
    f = tarp_fractions(Calibration(truths, draws), references=np.zeros((2, 2)))
    # in x alone the truth 1.0 of the second is nearer than 1000; in scaled x it counts 0.001, so
    # y decides: draw (1, 0.5) is nearer, and (1000, 0.5), at (1, 0.5), is farther
    assert 1 / 3 < f[1] < 2 / 3


def test_the_curve_spans_zero_to_one():
    grid, ecp = _curve(np.full(200, 0.45))  # whatever the fractions are
    assert grid[0] == 0 and grid[-1] == 1 and ecp[0] == 0 and ecp[-1] == pytest.approx(1)
    assert ecp[grid <= 0.44].max() == 0
    u = (np.arange(400) + 0.5) / 400
    np.testing.assert_allclose(_curve(u)[1], _curve(u)[0], atol=1e-9)


def test_expected_values_use_earlier_rows_alone():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(300, 3))
    y = 0.5 + 0.1 * x[:, :1] + 0.01 * rng.normal(size=(300, 1))
    out = expected_values(x, y, rng)
    changed = y.copy()
    changed[200:] = 5.0
    np.testing.assert_array_equal(expected_values(x, changed, rng)[:201], out[:201])
    assert np.corrcoef(out[100:, 0], y[100:, 0])[0, 1] > 0.95


def test_wrong_settings_are_named():
    runs = made(np.random.default_rng(0), num=20)
    with pytest.raises(InvalidValue, match="choose from"):
        check_tarp(runs, distance="cosine")
    with pytest.raises(InvalidValue, match='"uniform", "data"'):
        check_tarp(runs, references="prior")
    with pytest.raises(InvalidValue, match=r"\(20, 2\)"):
        check_tarp(runs, references=np.zeros(2))
    with pytest.raises(InvalidValue, match="hold no data"):
        check_tarp(Calibration(runs.truths, runs.draws), references="data")
