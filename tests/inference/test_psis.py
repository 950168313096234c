"""Pareto smoothing against ArviZ, against known tails, and at its edges."""

import math

import arviz as az
import numpy as np
import pytest
from scipy.special import logsumexp

from abduce.errors import Degenerate, InvalidValue
from abduce.inference.psis import fit_generalized_pareto, khat_threshold, psis, weights_ess

against_arviz = pytest.mark.skipif(
    int(az.__version__.split(".")[0]) >= 1, reason="compares with the functions of ArviZ 0.x"
)


@against_arviz
@pytest.mark.parametrize("size", [30, 100, 1000, 5000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_equals_arviz(size, scale):
    log_weights = scale * np.random.default_rng(size).normal(size=(3, size)) + 100
    smoothed, k = psis(log_weights)
    assert smoothed.shape == (3, size) and k.shape == (3,)
    for row in range(3):
        expected, expected_k = az.psislw(log_weights[row])
        np.testing.assert_allclose(k[row], float(expected_k), rtol=1e-8, atol=1e-10)
        normalized = smoothed[row] - logsumexp(smoothed[row])
        np.testing.assert_allclose(normalized, np.asarray(expected), atol=1e-9)


@against_arviz
def test_relative_efficiency_equals_arviz():
    log_weights = np.random.default_rng(0).normal(size=2000)
    _, k = az.psislw(log_weights, reff=0.3)
    np.testing.assert_allclose(psis(log_weights, 0.3)[1], float(k), rtol=1e-8)


@pytest.mark.parametrize("k", [-0.2, 0.2, 0.5, 0.9])
def test_the_fit_recovers_a_generalized_pareto(k):
    """Quantiles of the distribution itself, so nothing is random; the prior pulls a little."""
    size, sigma = 4000, 2.5
    level = (np.arange(size) + 0.5) / size
    x = sigma * np.expm1(-k * np.log1p(-level)) / k
    shape, scale = fit_generalized_pareto(x)
    assert abs(shape - k) < 0.03 and abs(scale / sigma - 1) < 0.03


@pytest.mark.parametrize(("alpha", "low", "high"), [(4.0, 0.05, 0.45), (1.0, 0.8, 1.2)])
def test_pareto_ratios_have_shape_one_over_alpha(alpha, low, high):
    """Ratios with survival r^-alpha; a fixed seed, bounds about 5 standard errors wide."""
    uniform = np.random.default_rng(0).random(100_000)
    _, k = psis(-np.log(uniform) / alpha)
    assert low < k < high


def test_smoothing_lowers_the_error_of_a_heavy_tailed_estimate():
    """Weights with k = 0.9 and known mean: the smoothed mean varies less."""
    alpha = 1 / 0.9
    mean = alpha / (alpha - 1)
    log_weights = -np.log(np.random.default_rng(4).random((200, 1000))) / alpha
    smoothed, k = psis(log_weights)
    assert 0.7 < np.median(k) < 1.1
    raw_error = np.mean((np.exp(log_weights).mean(axis=1) / mean - 1) ** 2)
    error = np.mean((np.exp(smoothed).mean(axis=1) / mean - 1) ** 2)
    assert error < 0.7 * raw_error


def test_smoothing_keeps_scale_order_and_the_dead():
    log_weights = np.random.default_rng(1).normal(size=1000) * 2
    log_weights[::7] = -np.inf
    smoothed, k = psis(log_weights)
    again, same = psis(log_weights - 500)
    np.testing.assert_allclose(again, smoothed - 500, atol=1e-9)
    assert math.isclose(k, same, rel_tol=1e-8)
    assert (smoothed[::7] == -np.inf).all() and smoothed.max() <= log_weights.max()
    alive = log_weights > -np.inf
    order = np.argsort(log_weights[alive])
    assert (np.diff(smoothed[alive][order]) >= 0).all()


def test_equal_weights_need_no_smoothing():
    for log_weights in (np.zeros(1000), np.where(np.arange(1000) < 300, -2.0, -np.inf)):
        smoothed, k = psis(log_weights)
        assert k == -np.inf
        np.testing.assert_array_equal(smoothed, log_weights)
    jitter = 1e-12 * np.random.default_rng(0).normal(size=1000)  # equal up to rounding
    smoothed, k = psis(jitter)
    assert k < 0.7
    np.testing.assert_allclose(smoothed, jitter, atol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 5, 20])
def test_too_few_draws_are_not_trusted(size):
    smoothed, k = psis(np.arange(float(size)))
    assert k == np.inf
    np.testing.assert_array_equal(smoothed, np.arange(float(size)))


def test_one_draw_with_all_the_weight():
    log_weights = np.full(1000, -1e6)
    log_weights[17] = 0
    assert psis(log_weights)[1] == np.inf and weights_ess(log_weights) == 1


def test_threshold():
    assert khat_threshold(100) == 0.5
    assert khat_threshold(10**4) == 0.7
    assert math.isclose(khat_threshold(1000), 2 / 3)
    with pytest.raises(InvalidValue, match="at least 2 draws, got 1"):
        khat_threshold(1)


def test_kish_ess():
    np.testing.assert_allclose(weights_ess(np.full((2, 50), -700.0)), 50)
    np.testing.assert_allclose(weights_ess(np.log([1.0, 2.0, 3.0]) + 1e4), 36 / 14)
    np.testing.assert_allclose(weights_ess(np.array([0.0, -np.inf, 0.0])), 2)


@pytest.mark.parametrize("function", [psis, weights_ess])
def test_messages(function):
    with pytest.raises(InvalidValue, match=r"2 of 6 .* first at index \(0, 1\)"):
        function(np.array([[0, np.nan, 0], [0, 0, np.inf]]))
    with pytest.raises(Degenerate, match=r"all 4 log weights are -inf.*Widen the proposal"):
        function(np.full(4, -np.inf))
    with pytest.raises(InvalidValue, match=r"\(\.\.\., draw\).*\(0,\)"):
        function(np.zeros(0))
