"""Effective sample size, R-hat and Monte Carlo errors against ArviZ and against theory."""

import math

import arviz as az
import ml_dtypes
import numpy as np
import pytest

from abduce.errors import InvalidValue
from abduce.inference import diagnostics as dg

against_arviz = pytest.mark.skipif(
    int(az.__version__.split(".")[0]) >= 1, reason="compares with the functions of ArviZ 0.x"
)


def autoregression(phi, chains, draws, size, seed=0):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(chains, draws, size))
    x = np.empty_like(noise)
    x[:, 0] = noise[:, 0] / math.sqrt(1 - phi**2)
    for t in range(1, draws):
        x[:, t] = phi * x[:, t - 1] + noise[:, t]
    return x


CASES = {
    "independent": autoregression(0.0, 4, 1000, 5),
    "slow": autoregression(0.95, 4, 1000, 5),
    "antithetic": autoregression(-0.8, 4, 1000, 5),
    "two chains": autoregression(0.7, 2, 333, 5),
    "short": autoregression(0.3, 3, 8, 5),
    "shifted": autoregression(0.5, 4, 500, 5) + np.array([0.0, 0, 0, 1.5])[:, None, None],
    "heavy tails": np.random.default_rng(1).standard_cauchy(size=(4, 500, 5)),
    "ties": np.random.default_rng(2).poisson(2.0, size=(4, 500, 5)),
    "float32": autoregression(0.5, 4, 500, 5).astype(np.float32),
}


@pytest.fixture(params=CASES, name="x")
def _x(request):
    return CASES[request.param]


def az_over(function, x, **options):
    return np.array([function(np.asarray(x[:, :, i], float), **options) for i in range(x.shape[2])])


@against_arviz
@pytest.mark.parametrize("method", ["bulk", "tail", "mean", "sd", "median"])
def test_ess_equals_arviz(x, method):
    np.testing.assert_allclose(dg.ess(x, method), az_over(az.ess, x, method=method), rtol=1e-10)


@against_arviz
@pytest.mark.parametrize("prob", [0.05, 0.37, 0.9])
def test_quantile_ess_and_error_equal_arviz(x, prob):
    expected = az_over(az.ess, x, method="quantile", prob=prob)
    np.testing.assert_allclose(dg.ess_quantile(x, prob), expected, rtol=1e-10)
    expected = az_over(az.mcse, x, method="quantile", prob=prob)
    np.testing.assert_allclose(dg.mcse_quantile(x, prob), expected, rtol=1e-10)


@against_arviz
def test_rhat_and_errors_equal_arviz(x):
    np.testing.assert_allclose(dg.rhat(x), az_over(az.rhat, x), rtol=1e-10)
    np.testing.assert_allclose(dg.mcse_mean(x), az_over(az.mcse, x, method="mean"), rtol=1e-10)
    np.testing.assert_allclose(dg.mcse_sd(x), az_over(az.mcse, x, method="sd"), rtol=1e-10)


@against_arviz
def test_bfmi_equals_arviz():
    energy = CASES["slow"][:, :, 0]
    np.testing.assert_allclose(dg.bfmi(energy), az.bfmi(energy), rtol=1e-12)
    assert dg.bfmi(np.zeros((2, 1))).shape == (2,) and np.isnan(dg.bfmi(np.ones((1, 5)))).all()


def test_convergence_is_the_four_functions(x):
    four = dg.convergence(x)
    np.testing.assert_array_equal(four["ess_bulk"], dg.ess_bulk(x))
    np.testing.assert_array_equal(four["ess_tail"], dg.ess_tail(x))
    np.testing.assert_array_equal(four["r_hat"], dg.rhat(x))
    np.testing.assert_array_equal(four["mcse_mean"], dg.mcse_mean(x))


@pytest.mark.parametrize("phi", [-0.5, 0.0, 0.5, 0.9])
def test_ess_of_an_autoregression_is_the_known_one(phi):
    x = autoregression(phi, 4, 20_000, 3, seed=5)
    expected = 80_000 * (1 - phi) / (1 + phi)
    np.testing.assert_allclose(dg.ess_mean(x), expected, rtol=0.08 if phi < 0.9 else 0.15)
    # squares of a Gaussian AR(1) have autocorrelation phi^2 at lag 1
    expected = 80_000 * (1 - phi**2) / (1 + phi**2)
    np.testing.assert_allclose(dg.ess_sd(x), expected, rtol=0.08 if phi < 0.9 else 0.15)


def test_mcse_is_the_standard_deviation_of_the_estimate():
    """400 runs: the squared errors over the squared MCSEs sum to chi-square(400).

    Bounds at 1e-6; the MCSE itself varies by a few percent, which widens them a little.
    """
    x = autoregression(0.6, 4, 500, 400, seed=9)
    sd = 1 / math.sqrt(1 - 0.6**2)
    for error, mcse in [
        (x.mean(axis=(0, 1)), dg.mcse_mean(x)),
        (x.std(axis=(0, 1)) - sd, dg.mcse_sd(x)),
        (np.quantile(x, 0.8, axis=(0, 1)) - 0.8416212 * sd, dg.mcse_quantile(x, 0.8)),
    ]:
        statistic = np.mean((error / mcse) ** 2)
        assert 0.68 < statistic < 1.42


@pytest.mark.parametrize("how", ["location", "scale", "drift", "one chain drifts"])
def test_rhat_sees_each_kind_of_disagreement(how):
    x = autoregression(0.0, 4, 500, 50, seed=3)
    assert (dg.rhat(x) < 1.02).all()
    if how == "location":
        x[0] += 1
    elif how == "scale":
        x[0] *= 3
    elif how == "drift":
        x += np.linspace(-1, 1, 500)[:, None]
    else:
        x = x[:1] + np.linspace(-1, 1, 500)[:, None]
    assert (dg.rhat(x) > 1.04).all()


def test_ess_is_capped_for_antithetic_chains():
    x = autoregression(-0.98, 4, 1000, 3)
    np.testing.assert_allclose(dg.ess_mean(x), 4000 * math.log10(4000))


def test_constants_nan_and_few_draws():
    x = np.random.default_rng(0).normal(size=(4, 100, 5))
    x[..., 0] = 3.25
    x[2, 5, 1] = np.nan
    x[2, 5, 2] = np.inf
    x[..., 3] = np.arange(4)[:, None]  # each chain stuck somewhere else
    for function in (dg.ess_bulk, dg.ess_tail, dg.ess_mean, dg.ess_sd, dg.rhat, dg.mcse_mean):
        result = function(x)
        assert np.isnan(result[:3]).all() and np.isfinite(result[4])
    assert dg.rhat(x)[3] == np.inf and dg.ess_bulk(x)[3] < 10
    assert np.isnan(dg.mcse_quantile(x, 0.5)[:3]).all()
    assert np.isnan(dg.ess_bulk(x[:, :3])).all() and np.isfinite(dg.ess_bulk(x[:, :4])[4])
    assert dg.ess_bulk(x[:, :0]).shape == (5,) and dg.rhat(x[:, :, :0]).shape == (0,)
    assert np.isfinite(dg.rhat(x[:1])[4])


@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
def test_binary_sites_use_the_indicator_that_varies(share):
    """ArviZ gives all draws for the constant indicator; the minimum hides that only sometimes."""
    x = np.random.default_rng(0).random((4, 500)) < share
    np.testing.assert_allclose(dg.ess_tail(x), dg.ess_mean(~x), rtol=1e-10)
    np.testing.assert_allclose(dg.ess_tail(x), dg.ess_tail(~x), rtol=1e-10)


def test_any_real_dtype_and_any_trailing_shape():
    x = np.random.default_rng(0).integers(-8, 8, size=(3, 60, 2, 4))
    expected = dg.convergence(x.astype(np.float64))
    assert expected["r_hat"].shape == (2, 4)
    for dtype in (np.int8, np.float16, np.float32, ml_dtypes.bfloat16):
        for name, value in dg.convergence(x.astype(dtype)).items():
            np.testing.assert_array_equal(value, expected[name])
    assert dg.ess_bulk(x[:, :, 0, 0]).shape == ()
    assert dg.ess_bulk(x[:, :, 0, 0]) == expected["ess_bulk"][0, 0]


def test_extreme_scales_do_not_overflow():
    x = autoregression(0.5, 4, 200, 3)
    for scale in (1e-200, 1e200):
        np.testing.assert_allclose(dg.ess_mean(scale * x), dg.ess_mean(x), rtol=1e-9)
        np.testing.assert_allclose(dg.ess_sd(scale * x), dg.ess_sd(x), rtol=1e-9)
        np.testing.assert_allclose(dg.mcse_sd(scale * x), scale * dg.mcse_sd(x), rtol=1e-9)
    np.testing.assert_allclose(dg.ess_sd(x + 1e6), dg.ess_sd(x), rtol=1e-6)
    np.testing.assert_array_equal(dg.ess_bulk(np.exp(x)), dg.ess_bulk(x))


def test_blocks_change_nothing(monkeypatch):
    x = autoregression(0.5, 4, 200, 7)
    x[0, 0, 2] = np.nan
    whole = dg.convergence(x)
    monkeypatch.setattr(dg, "BLOCK", 1600)
    for name, value in dg.convergence(x).items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dg.ess_bulk(np.zeros(5)), r"\(chain, draw, \.\.\.\), got \(5,\).*x\[None\]"),
        (lambda: dg.rhat(np.zeros((2, 9), complex)), "real numbers, got dtype complex128"),
        (lambda: dg.rhat(np.array([["a"] * 9])), "real numbers"),
        (lambda: dg.ess(np.zeros((2, 9)), "bulkk"), "unknown method 'bulkk'"),
        (lambda: dg.ess(np.zeros((2, 9)), "quantile"), "prob goes with"),
        (lambda: dg.ess(np.zeros((2, 9)), "bulk", prob=0.5), "prob goes with"),
        (lambda: dg.mcse_quantile(np.zeros((2, 9)), 1.0), "strictly between 0 and 1, got 1.0"),
        (lambda: dg.bfmi(np.zeros(4)), r"\(chain, draw\), got \(4,\)"),
    ],
)
def test_messages(call, message):
    with pytest.raises(InvalidValue, match=message):
        call()
