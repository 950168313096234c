"""Runs: what is drawn, thinned, counted and refused."""

import typing
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conjugate import GAIN, SD, _Exact, exact, looped, normal
from scipy.stats import kstest

import abduce as ab
import abduce.dist as dist
from abduce.amortized.checks import Calibration, check_sbc, run_calibration
from abduce.amortized.checks.runs import _independent
from abduce.amortized.checks.uniformity import pit
from abduce.errors import (
    Degenerate,
    InvalidAlgorithm,
    InvalidModel,
    InvalidValue,
    MissingData,
    UnknownAddress,
)
from abduce.inference.algorithm import algorithm

KEY = jax.random.key(3)


@pytest.mark.parametrize("alg", [exact(), looped()], ids=["traced", "looped"])
def test_runs_are_of_the_model(alg):
    runs = run_calibration(normal, alg, KEY, observed=["y"], num_datasets=60, num_samples=40)
    assert list(runs.truths) == ["a", "b"] and runs.draws["b"].shape == (60, 40, 1)
    assert runs.elements()[0] == ["a", "b[0]"] and not runs.failures and runs.stopped == ""
    mu = np.stack([runs.truths["a"], runs.truths["b"][:, 0]], 1)
    noise = (runs.observed["y"] - mu) / 0.5
    assert kstest(noise.ravel(), "norm").pvalue > 1e-5
    q = (runs.draws["a"] - GAIN * runs.observed["y"][:, :1]) / SD
    assert kstest(q[runs.used >= 40].ravel(), "norm").pvalue > 1e-5
    at = {"a": runs.truths["a"][5], "b": runs.truths["b"][5], "y": runs.observed["y"][5]}
    assert runs.log_joint[0][5] == pytest.approx(float(normal.log_density(at)), rel=1e-5)
    at = {"a": runs.draws["a"][5, 7], "b": runs.draws["b"][5, 7], "y": runs.observed["y"][5]}
    assert runs.log_joint[1][5, 7] == pytest.approx(float(normal.log_density(at)), rel=1e-5)


def test_traced_and_looped_runs_see_the_same_data():
    a, b = (
        run_calibration(normal, alg, KEY, observed="y", num_datasets=60)
        for alg in (exact(), looped())
    )
    np.testing.assert_array_equal(a.observed["y"], b.observed["y"])
    np.testing.assert_array_equal(a.truths["b"], b.truths["b"])


def test_importance_runs_under_vmap_and_its_ranks_are_uniform():
    alg = ab.importance(num_samples=2000)
    assert alg.traceable and not ab.nuts().traceable
    assert "traceable" not in repr(alg) and alg.replace(num_samples=5).traceable
    runs = run_calibration(normal, alg, KEY, observed=["y"], num_datasets=400, num_samples=50)
    assert not runs.failures and runs.counts.max() == 50
    u = pit(runs.truths["a"], runs.draws["a"], runs.counts, np.random.default_rng(0))
    assert kstest(u, "uniform").pvalue > 1e-4


def test_failures_are_counted_and_reported():
    raised = run_calibration(normal, looped(raise_above=0.5), KEY, observed="y", num_datasets=60)
    large = int(
        (
            run_calibration(normal, looped(), KEY, observed="y", num_datasets=60).observed["y"][
                :, 0
            ]
            > 0.5
        ).sum()
    )
    assert len(raised.failures) == large > 5 and raised.num_datasets == 60 - large
    assert raised.observed["y"][:, 0].max() <= 0.5
    assert "ValueError: too large for me" in raised.notes()[0]
    for alg in (exact(nan_above=0.5), looped(nan_above=0.5)):
        found = run_calibration(normal, alg, KEY, observed="y", num_datasets=60)
        assert len(found.failures) == large and "NaN in the draws of 'a'" in found.failures[0]
    check = check_sbc(found)
    assert not check.passed and not check.is_complete and check.p_value > 0.0


def test_when_all_fail_the_first_reason_is_raised():
    with pytest.raises(Degenerate, match="too large for me"):
        run_calibration(normal, looped(raise_above=-99.0), KEY, observed="y", num_datasets=60)


def test_misuse_is_raised_at_once():
    @ab.model
    def count():
        k = ab.sample("k", dist.Poisson(3.0))
        ab.sample("y", dist.Normal(k, 1.0))

    with pytest.raises(ab.DiscreteLatent):
        run_calibration(count, ab.nuts(), KEY, observed="y", num_datasets=20)
    with pytest.raises(InvalidAlgorithm, match="num_datasets"):
        run_calibration(count, exact(), KEY, observed="y", num_datasets=0)


def test_a_budget_ends_the_runs():
    runs = run_calibration(normal, looped(), KEY, observed="y", num_datasets=60, budget=1e-6)
    assert runs.num_datasets == 1 and runs.stopped == "budget"
    assert "1 of 60 data sets were run: the budget ran out" in runs.notes()[0]
    with pytest.raises(InvalidValue, match="budget"):
        run_calibration(normal, looped(), KEY, observed="y", budget=0)


def test_an_interrupt_returns_what_there_is(monkeypatch):
    seen = []

    def before(self, y):
        seen.append(y)
        if len(seen) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(_Exact, "before", before)
    runs = run_calibration(normal, looped(), KEY, observed="y", num_datasets=60)
    assert runs.num_datasets == 5 and runs.stopped == "interrupted"


def test_chains_are_thinned_by_their_effective_size():
    class Pairs:
        truths: typing.ClassVar = {"a": None}

        def hidden(self, address, x, on):
            return x

    class Post:
        num_chains, num_draws, log_weights, active = 2, 1000, None, {}

    rng = np.random.default_rng(0)
    x = np.zeros((2, 1000))
    for t in range(1, 1000):
        x[:, t] = 0.95 * x[:, t - 1] + rng.normal(size=2)
    Post.draws = {"a": x}
    draws, count = _independent(Post, Pairs(), 100, KEY)
    assert 20 < count < 90  # 2000 draws (1 - 0.95) / (1 + 0.95) = 51, tails less
    kept = draws["a"][:count]
    assert abs(np.corrcoef(kept[:-1], kept[1:])[0, 1]) < 0.5
    Post.draws = {"a": rng.normal(size=(2, 1000))}
    assert _independent(Post, Pairs(), 100, KEY)[1] == 100


def test_designs_give_each_data_set_its_arguments():
    @ab.model
    def designs():
        return {"scale": ab.sample("s", dist.Uniform(0.5, 2.0))}

    alg = exact()
    runs = run_calibration(normal, alg, KEY, observed="y", num_datasets=60, designs=designs)
    mu = np.stack([runs.truths["a"], runs.truths["b"][:, 0]], 1)
    plain = run_calibration(normal, alg, KEY, observed="y", num_datasets=60)
    assert not np.allclose(runs.observed["y"], plain.observed["y"])
    # the joint density knows the design: solve it back from two draws with the same latents
    z = runs.observed["y"] - mu
    rest = runs.log_joint[0] + 0.5 * (mu**2).sum(1) + 2 * np.log(2 * np.pi)
    scales = np.linspace(0.45, 2.05, 4000)
    density = -0.5 * (z**2).sum(1)[:, None] / (0.5 * scales) ** 2 - 2 * np.log(0.5 * scales)
    assert (np.abs(density - rest[:, None]).min(1) < 0.02).all()
    with pytest.raises(InvalidValue, match="replaces them"):
        run_calibration(normal, alg, KEY, 1.0, observed="y", designs=designs)


def test_latents_in_branches_are_ranked_with_their_activity():
    @ab.model
    def switch():
        on = ab.sample("on", dist.Bernoulli(0.5))
        x = jax.lax.cond(
            on == 1, lambda: ab.sample("x", dist.Normal(2.0, 1.0)), lambda: jnp.float32(0)
        )
        ab.sample("y", dist.Normal(x, 0.5))

    runs = run_calibration(
        switch, ab.importance(num_samples=2000), KEY, observed="y", num_datasets=400
    )
    assert not runs.failures
    off = np.asarray(runs.truths["on"]) == 0
    assert (np.isneginf(runs.truths["x"]) == off).all()
    assert (np.isneginf(runs.draws["x"]) == (runs.draws["on"] == 0)).all()
    rng = np.random.default_rng(0)
    for a in ("on", "x"):
        u = pit(runs.truths[a], runs.draws[a], runs.counts, rng)
        assert kstest(u, "uniform").pvalue > 1e-4
    assert np.isfinite(runs.log_joint[0]).all()
    assert kstest(pit(*runs.log_joint, runs.counts, rng), "uniform").pvalue > 1e-4


def test_the_density_of_a_fitted_guide_is_found():
    alg = ab.vi(guide=ab.guides.full_rank(), num_steps=300, progress_bar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ab.AbduceWarning)
        runs = run_calibration(normal, alg, KEY, observed="y", num_datasets=3, num_samples=20)
    y = runs.observed["y"]
    for i in range(3):
        z = np.stack([runs.draws["a"][i], runs.draws["b"][i, :, 0]], 1)
        want = -0.5 * (((z - GAIN * y[i]) / SD) ** 2).sum(1) - np.log(2 * np.pi * SD**2)
        np.testing.assert_allclose(runs.log_posterior[1][i], want, atol=0.5)


@ab.model
def known(given):
    ab.sample("a", dist.Normal(GAIN * given["y"][0], SD))
    ab.sample("b", dist.Normal(GAIN * given["y"][1:], SD))


@algorithm
class estimator(_Exact):
    """As estimators are: traceable, with a Model of the posterior."""

    num_samples: int = 300
    shift: float = 0.0
    scale: float = 1.0
    nan_above: float = np.inf
    traceable = True
    observed = ("y",)

    def as_model(self, model):
        return known


def test_the_density_and_the_data_of_an_estimator_are_its_own():
    runs = run_calibration(normal, estimator(), KEY, num_datasets=60)
    y = runs.observed["y"]
    mu = np.stack([runs.truths["a"], runs.truths["b"][:, 0]], 1)
    want = -0.5 * (((mu - GAIN * y) / SD) ** 2).sum(1) - np.log(2 * np.pi * SD**2)
    np.testing.assert_allclose(runs.log_posterior[0], want, rtol=1e-4, atol=1e-4)
    check = check_sbc(runs)
    assert check.passed and "log posterior density" in check.p_values


def test_errors_name_the_remedy():
    with pytest.raises(MissingData, match=r"observed=\[...\], some of a, b, y"):
        run_calibration(normal, exact(), KEY)
    with pytest.raises(UnknownAddress, match='Did you mean "y"'):
        run_calibration(normal, exact(), KEY, observed=["yy", "y"])

    @ab.model
    def fixed():
        mu = ab.sample("mu", dist.Normal(0, 1))
        ab.sample("y", dist.Normal(mu, 1), obs=1.0)
        ab.sample("z", dist.Normal(mu, 1))

    with pytest.raises(InvalidModel, match="Leave obs= out"):
        run_calibration(fixed, exact(), KEY, observed="z")

    @ab.model
    def weighted():
        mu = ab.sample("mu", dist.Normal(0, 1))
        with ab.scaled(2.0):
            ab.sample("y", dist.Normal(mu, 1))

    with pytest.raises(InvalidModel, match="scaled"):
        run_calibration(weighted, exact(), KEY, observed="y")

    @ab.model
    def factored():
        mu = ab.sample("mu", dist.Normal(0, 1))
        ab.factor("f", -mu)
        ab.sample("y", dist.Normal(mu, 1))

    with pytest.raises(InvalidModel, match="factor 'f'"):
        run_calibration(factored, exact(), KEY, observed="y")
    with pytest.raises(InvalidValue, match="every site"):
        run_calibration(normal, exact(), KEY, observed=["a", "b", "y"])
    with pytest.raises(InvalidValue, match="same addresses"):
        Calibration(truths={"a": np.zeros(3)}, draws={})
    with pytest.raises(InvalidValue, match=r'draws\["a"\] has shape \(3,\)'):
        Calibration(truths={"a": np.zeros(3)}, draws={"a": np.zeros(3)})
