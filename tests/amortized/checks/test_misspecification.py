"""Observations that the model cannot make, and posteriors that cannot remake them."""

import jax
import numpy as np
import pytest
from conjugate import exact, normal

import abduce as ab
from abduce.amortized.checks import (
    check_misspecification,
    check_predictive,
    run_misspecification,
    run_predictive,
)
from abduce.amortized.checks.misspecification import _mmd
from abduce.errors import InvalidValue, UnknownAddress


def test_the_discrepancy_is_the_mean_of_the_kernel_over_blocks():
    rng = np.random.default_rng(0)
    kernel = rng.random((9, 9))
    kernel = kernel + kernel.T
    inside, rest = [1, 4, 5], [0, 2, 3, 6, 7, 8]
    want = (
        kernel[np.ix_(inside, inside)].mean()
        + kernel[np.ix_(rest, rest)].mean()
        - 2 * kernel[np.ix_(inside, rest)].mean()
    )
    assert _mmd(kernel, np.array([inside]))[0] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("n", [1, 5])
def test_p_values_under_the_model_are_uniform(n):
    """300 observations of the model: the share below 0.1, to 4.5 standard errors."""
    p = []
    for i in range(300):
        rng = np.random.default_rng(i)
        x = rng.standard_t(3, size=(100 + n, 4))
        p.append(check_misspecification(x[:n], x[n:], num_null=99, alpha=0.05).p_value)
    assert abs(np.mean(np.array(p) <= 0.1) - 0.1) < 4.5 * np.sqrt(0.09 / 300)


def test_strange_observations_are_found():
    rng = np.random.default_rng(1)
    sims = rng.normal(size=(500, 10)) * 10.0 ** np.arange(-5, 5)
    assert check_misspecification(sims[0], sims[1:]).passed
    strange = sims[0].copy()
    strange[3] = 8 * 10.0**-2
    found = check_misspecification(strange, sims[1:])
    assert not found.passed and "feature 3" in found.verdict and "extrapolation" in found.remedy
    # several observations, each of them plausible, that are too alike
    several = check_misspecification(sims[:20] * 0.5 + 10.0 ** np.arange(-5, 5), sims[20:])
    assert several.p_value < 0.01
    few = check_misspecification(sims[0], sims[1:40])
    assert not few.is_complete and "Raise num_simulations" in str(few)
    with pytest.raises(InvalidValue, match="NaN"):
        check_misspecification(strange * np.nan, sims)


def test_an_observation_is_compared_with_the_models_own(key):
    fine = run_misspecification(
        normal, key, given={"y": np.array([0.5, -1.0])}, num_simulations=500
    )
    assert fine.passed and fine.plot().axes
    odd = run_misspecification(normal, key, given={"y": np.array([9.0, 0.0])}, num_simulations=500)
    assert odd.p_value == pytest.approx(1 / 501)
    # features that do not see the difference
    blind = run_misspecification(
        normal, key, given={"y": np.array([9.0, 0.0])}, num_simulations=500,
        features=lambda data: data["y"][1:],
    )  # fmt: skip
    assert blind.passed
    with pytest.raises(InvalidValue, match=r'given\["y"\] has shape \(3,\)'):
        run_misspecification(normal, key, given={"y": np.zeros(3)})


def test_replicates_of_the_right_model_look_like_the_data(key):
    post = exact(num_samples=2000)(normal).posterior(key, given={"y": np.array([0.5, -1.0])})
    check = run_predictive(post, jax.random.key(1))
    assert check.passed and set(check.p_values) == {
        f"{s} of y" for s in ("mean", "sd", "min", "max")
    }
    assert check.plot().axes
    prior = normal.prior(key, num_samples=100)
    with pytest.raises(InvalidValue, match="no data"):
        run_predictive(prior, key)


def test_tail_shares_and_words():
    rng = np.random.default_rng(2)
    y = rng.normal(size=(4000, 30))
    x = rng.normal(size=30)
    x[0] = 7.0
    check = check_predictive({"y": x}, {"y": y})
    assert not check.passed and check.worst == "sd of y" and "smaller" in check.verdict
    assert check.columns["below"]["max of y"] == 1
    want = (y.mean(1) < x.mean()).mean()
    assert check.columns["below"]["mean of y"] == pytest.approx(want, abs=1e-12)
    ties = check_predictive({"y": np.zeros(3)}, {"y": np.zeros((3000, 3))})
    assert ties.columns["below"]["min of y"] == 0.5 and ties.p_value == 1
    few = check_predictive({"y": x}, {"y": y[:100]})
    assert not few.passed and "too few" in few.verdict
    one = check_predictive({"z": np.array(0.3)}, {"z": y[:, 0]})
    assert list(one.p_values) == ["mean of z"] and one.passed
    with pytest.raises(UnknownAddress, match="'z'"):
        check_predictive({"z": x}, {"y": y})
    with pytest.raises(InvalidValue, match="replicates"):
        check_predictive({"y": x}, {"y": y[:, :3]})


def test_entries_that_were_not_observed_are_left_out(key):
    y = ab.masked(np.array([0.5, np.nan], np.float32), observed=np.array([True, False]))
    post = ab.importance(num_samples=4000)(normal).posterior(key, given={"y": y})
    check = run_predictive(post, jax.random.key(1), statistics={"mean": np.nanmean})
    assert check.columns["observed"]["mean of y"] == pytest.approx(0.5)
    assert 0.1 < check.columns["below"]["mean of y"] < 0.9
