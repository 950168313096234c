"""Local C2ST: errors at one observation, with an exact null."""

import jax
import numpy as np
import pytest
from conjugate import GAIN, SD, exact, made, normal

from abduce.amortized.checks import check_lc2st, run_lc2st
from abduce.errors import UnknownAddress

Y = np.array([0.5, -1.0])


def draws(rng, shift=0.0, scale=1.0, num=500):
    q = GAIN * Y + SD * (shift + scale * rng.normal(size=(num, 2)))
    return {"a": q[:, 0], "b": q[:, 1:]}


def check(key, seed=0, **settings):
    rng = np.random.default_rng(seed)
    runs = made(rng, num=500, draws=1, **settings)
    return check_lc2st(
        key, runs, draws(rng, **settings), {"y": Y}, num_null=99, num_steps=100, alpha=0.02
    )


def test_an_exact_posterior_passes(key):
    assert check(key).p_value > 0.02
    assert "cannot tell" in check(key).verdict


def test_a_shifted_and_a_narrow_posterior_fail_with_their_direction(key):
    shifted = check(key, seed=1, shift=0.8)
    assert not shifted.passed and "too high" in shifted.verdict
    assert shifted.arrays["shift"]["a"] == pytest.approx(0.8, abs=0.35)
    narrow = check(key, seed=1, scale=0.5)
    assert not narrow.passed and "too narrow" in narrow.verdict
    assert narrow.arrays["width"]["b[0]"] < 0.97
    assert narrow.plot().axes


def test_too_few_null_classifiers_cannot_pass(key):
    rng = np.random.default_rng(0)
    runs = made(rng, num=60, draws=1)
    result = check_lc2st(key, runs, draws(rng, num=50), {"y": Y}, num_null=10, num_steps=20)
    assert not result.is_complete and not result.passed and "num_null=10" in str(result)
    with pytest.raises(UnknownAddress, match="draws lacks 'b'"):
        check_lc2st(key, runs, {"a": np.zeros(5)}, {"y": Y})


@pytest.mark.slow
def test_the_null_is_exact():
    """60 exact posteriors: the share of p-values below 0.2 is 0.2, to 4.5 standard errors."""
    p = [check(jax.random.key(i), seed=i).p_value for i in range(60)]
    assert abs(np.mean(np.array(p) <= 0.2) - 0.2) < 4.5 * np.sqrt(0.16 / 60)


@pytest.mark.slow
def test_the_whole_way(key):
    result = run_lc2st(
        normal, exact(num_samples=500), key, given={"y": Y.astype(np.float32)},
        num_datasets=600, num_null=99, alpha=0.02,
    )  # fmt: skip
    assert result.passed
