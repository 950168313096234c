"""Ranks and tests of uniformity: exact where they claim to be."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, kstest, multinomial

from abduce.amortized.checks.result import Check, holm
from abduce.amortized.checks.uniformity import (
    _inside,
    _limits,
    _points,
    detectable,
    ecdf_band,
    ecdf_p_value,
    pit,
    uniformity,
)
from abduce.errors import InvalidValue


@pytest.mark.parametrize("values", [None, 2, 30])
def test_ranks_are_uniform_with_ties_and_unequal_counts(values):
    """The KS test of 20,000 ranks, of continuous and of discrete quantities: alarm at 1e-5."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 12, size=20_000)
    x = rng.normal(size=(20_000, 12)) if values is None else rng.integers(values, size=(20_000, 12))
    u = pit(x[:, 0], x[:, 1:], np.minimum(counts, 11), rng)
    assert kstest(u, "uniform").pvalue > 1e-5
    wrong = pit(x[:, 0], x[:, 1:] + (0.2 if values is None else 1), np.minimum(counts, 11), rng)
    assert kstest(wrong, "uniform").pvalue < 1e-5


def test_a_rank_lies_where_it_belongs():
    rng = np.random.default_rng(0)
    u = pit(np.array([2.5, -1.0]), np.array([[1.0, 2.0, 3.0, 9.0]] * 2), np.array([3, 4]), rng)
    assert 2 / 4 < u[0] < 3 / 4  # above 2 of 3: the fourth draw does not count
    assert 0 < u[1] < 1 / 5
    with pytest.raises(InvalidValue, match=r"\(dataset, draw"):
        pit(np.zeros(3), np.zeros((2, 5)), None, rng)


def test_the_simultaneous_probability_is_that_of_all_counts():
    """Against the sum over every way in which 7 numbers can fall between the points."""
    n = 7
    points = _points(n)
    low, high = _limits(n, 0.2)
    widths = np.diff(np.concatenate([[0], points, [1]]))
    total = 0.0
    for cells in itertools.product(range(n + 1), repeat=len(widths) - 1):
        if sum(cells) > n:
            continue
        counts = np.cumsum(cells)
        if (counts >= low).all() and (counts <= high).all():
            total += multinomial.pmf([*cells, n - sum(cells)], n, widths)
    assert 0.2 < total < 0.99
    assert _inside(n, low, high) == pytest.approx(total, abs=1e-12)


def test_limits_are_the_counts_with_larger_tail_probabilities():
    n, tail = 40, 0.03
    low, high = _limits(n, tail)
    for point, first, last in zip(_points(n), low, high, strict=True):
        counts = np.arange(n + 1)
        both = 2 * np.minimum(binom.cdf(counts, n, point), binom.sf(counts - 1, n, point))
        inside = np.flatnonzero(both >= tail)
        assert (first, last) == (inside[0], inside[-1])


@pytest.mark.parametrize("n", [12, 300])
def test_p_values_are_uniform_under_the_null(n):
    """1500 repetitions; a share of 0.05 has standard error 0.0056, and 4.5 of them are allowed."""
    rng = np.random.default_rng(1)
    tests = [uniformity(rng.random(n)) for _ in range(1500)]
    error = 4.5 * math.sqrt(0.05 * 0.95 / 1500)
    for name in ("p_location", "p_spread"):
        assert abs(np.mean([getattr(t, name) <= 0.05 for t in tests]) - 0.05) < error
    for name in ("p_shape", "p_value"):  # discrete, and a union bound: at most
        assert 0.02 < np.mean([getattr(t, name) <= 0.05 for t in tests]) < 0.05 + error


def test_each_part_sees_its_kind_of_error():
    rng = np.random.default_rng(2)
    u = rng.random(300)
    assert uniformity(u**1.5).reason == "location" and uniformity(u**1.5).p_location < 1e-4
    wide = 0.5 + 0.7 * (u - 0.5)
    assert uniformity(wide).reason == "spread" and uniformity(wide).sd < 0.8
    # two clusters with the mean and variance of a normal
    z = np.where(u > 0.5, 1, -1) * np.sqrt(1 - 0.1) + np.sqrt(0.1) * rng.normal(size=300)
    from scipy.special import ndtr

    test = uniformity(ndtr(z))
    assert test.reason == "shape" and test.p_shape < 1e-6
    assert test.p_location > 0.01 and test.p_spread > 0.01


def test_deep_p_values_are_bounds_and_never_zero_divided():
    assert 0 <= ecdf_p_value(np.full(500, 0.5)) < 1e-100
    assert ecdf_p_value((np.arange(500) + 0.5) / 500) == pytest.approx(1, abs=1e-6)


def test_the_band_is_left_as_often_as_stated():
    points, low, high = ecdf_band(100, 0.05)
    rng = np.random.default_rng(3)
    u = np.sort(rng.random((4000, 100)), 1)
    ecdf = np.stack([np.searchsorted(row, points, side="right") for row in u]) / 100
    left = ((ecdf < low - 1e-9) | (ecdf > high + 1e-9)).any(1).mean()
    assert 0.03 < left < 0.05 + 4.5 * math.sqrt(0.05 * 0.95 / 4000)


def test_detectable_errors_are_detected():
    """At the size and error stated, 0.99 of tests alarm; at least 0.97 of 400 here."""
    shift, wider = detectable(300, 0.01)
    rng = np.random.default_rng(4)

    def power(shift, scale):
        hits = 0
        for _ in range(400):
            draws = shift + scale * rng.normal(size=(300, 200))
            hits += uniformity(pit(rng.normal(size=300), draws, None, rng)).p_value <= 0.01
        return hits / 400

    assert power(shift, 1.0) > 0.97 and power(0.0, 1 + wider) > 0.97


def test_too_few_numbers_are_refused():
    with pytest.raises(InvalidValue, match="at least 10"):
        uniformity(np.full(5, 0.5))


def test_holm():
    adjusted = holm([0.01, 0.04, 0.03, 0.005])  # the textbook example
    np.testing.assert_allclose(adjusted, [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([np.nan, 0.02]), [1, 0.04])


def test_a_check_corrects_for_its_quantities():
    check = Check(name="c", p_values={"a": 0.004, "b": 0.9}, alpha=0.01, verdict="v")
    assert check.p_value == pytest.approx(0.008) and not check.passed and check.worst == "a"
    assert Check(name="c", p_values={"a": 0.006, "b": 0.9}, alpha=0.01, verdict="v").passed
    assert not Check(name="c", p_values={}, alpha=0.01, verdict="v").passed
    whole = Check(name="c", p_values={"a": 0.5}, alpha=0.01, verdict="v", is_complete=False)
    assert not whole.passed
