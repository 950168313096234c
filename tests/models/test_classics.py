"""The ready models against closed forms, and their data against the published tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp, softmax

import abduce as ab
from abduce.models import classics
from abduce.models import data as published


def test_the_nile_is_the_published_series(data):
    reference = data.series("Nile")
    np.testing.assert_array_equal(published.nile().flow, reference["value"])
    np.testing.assert_array_equal(published.nile().year, reference["time"])


def test_eight_schools_is_the_published_table(data):
    reference = data.posterior("eight_schools-eight_schools_centered")["data"]
    schools = published.eight_schools()
    np.testing.assert_array_equal(schools.effect, reference["y"])
    np.testing.assert_array_equal(schools.standard_error, reference["sigma"])


def test_data_are_fresh_copies():
    published.nile().flow[0] = 0.0
    assert published.nile().flow[0] == 1120.0


def test_eight_schools_density(x64):
    schools = published.eight_schools()
    theta = np.linspace(-3.0, 9.0, 8)
    choices = {"mu": 4.0, "tau": 2.5, "theta": theta, "y": schools.effect}
    expected = (
        stats.norm(0, 5).logpdf(4.0)
        + stats.halfcauchy(scale=5).logpdf(2.5)
        + stats.norm(4.0, 2.5).logpdf(theta).sum()
        + stats.norm(theta, schools.standard_error).logpdf(schools.effect).sum()
    )
    ours = classics.eight_schools.log_density(choices, schools.standard_error)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


@pytest.fixture
def change_choices():
    river = published.nile()
    return river, {"before": 1080.0, "after": 860.0, "noise": 120.0, "flow": river.flow}


def test_the_change_point_is_the_change_year_summed_out(x64, change_choices):
    river, choices = change_choices
    by_year = jax.vmap(
        lambda c: classics.nile_change_year.log_density({**choices, "change": c}, river.year)
    )(river.year[1:])
    ours = classics.nile_change_point.log_density(choices, river.year)
    np.testing.assert_allclose(ours, logsumexp(by_year), rtol=1e-12)

    trace, weight = classics.nile_change_point.generate(
        jax.random.key(0), choices, river.year
    )
    np.testing.assert_allclose(weight, ours, rtol=1e-12)
    probability = trace.deterministics["change_probability"]
    np.testing.assert_allclose(probability, softmax(by_year), atol=1e-12)
    assert river.year[1:][np.argmax(probability)] == 1899


def test_local_level_density(x64):
    river = published.nile()
    level = 1000.0 + np.cumsum(np.cos(np.arange(100.0)) * 20)
    choices = {"start": 1010.0, "drift": 40.0, "noise": 120.0, "level": level, "flow": river.flow}
    before = np.append(1010.0, level[:-1])
    expected = (
        stats.norm(1000, 250).logpdf(1010.0)
        + stats.halfnorm(scale=100).logpdf(40.0)
        + stats.halfnorm(scale=250).logpdf(120.0)
        + stats.norm(before, 40.0).logpdf(level).sum()
        + stats.norm(level, 120.0).logpdf(river.flow).sum()
    )
    ours = classics.nile_local_level.log_density(choices, 100)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def local_level_moments(flow):
    """Posterior mean of `(drift, noise)` by quadrature: given both, the flow is Gaussian."""
    years = np.arange(1, len(flow) + 1)
    walk = np.minimum(years[:, None], years[None, :]).astype(float)
    drift, noise = np.linspace(0.5, 200, 80), np.linspace(40, 260, 80)
    log_joint = np.empty((80, 80))
    for i, d in enumerate(drift):
        for j, n in enumerate(noise):
            covariance = 250.0**2 + d**2 * walk + n**2 * np.eye(len(flow))
            log_joint[i, j] = stats.multivariate_normal(
                np.full(len(flow), 1000.0), covariance
            ).logpdf(flow)
    log_joint += stats.halfnorm(scale=100).logpdf(drift)[:, None]
    log_joint += stats.halfnorm(scale=250).logpdf(noise)[None, :]
    weight = softmax(log_joint)
    mean = np.array([(weight.sum(1) * drift).sum(), (weight.sum(0) * noise).sum()])
    square = np.array([(weight.sum(1) * drift**2).sum(), (weight.sum(0) * noise**2).sum()])
    return mean, np.sqrt(square - mean**2)


def test_nuts_finds_the_local_levels_posterior(key):
    """The scan under NUTS against quadrature; 5 standard errors each of 4 numbers: 1e-6 x 4."""
    flow = published.nile().flow[:40]
    mean, sd = local_level_moments(flow)
    model = ab.reparam(classics.nile_local_level, {"level": ab.noncentered()})
    nuts = ab.nuts(num_warmup=500, num_samples=1000, num_chains=4, progress_bar=False)
    post = nuts(model).posterior(key, 40, given={"flow": flow})
    summary = post.summary()
    for i, name in enumerate(["drift", "noise"]):
        row = summary[name]
        assert abs(row["mean"] - mean[i]) < 5 * row["mcse_mean"]
        # the standard error of a standard deviation is about sd / sqrt(2 ess), heavier tails: x 1.5
        assert abs(row["sd"] - sd[i]) < 5 * 1.5 * row["sd"] / np.sqrt(2 * row["ess_bulk"])


@pytest.mark.slow
@pytest.mark.parametrize(("years", "seed", "target"), [(100, 0, 0.8), (40, 20260, 0.95)])
def test_no_chain_is_caught_where_the_noise_vanishes(years, seed, target):
    """The density is unbounded as the levels meet the data and `noise` goes to 0, without mass.

    A warm-up that climbs to the mode ends there and never leaves. The noise is 122 +- 13.
    """
    model = ab.reparam(classics.nile_local_level, {"level": ab.noncentered()})
    nuts = ab.nuts(num_warmup=500, target_accept_prob=target, progress_bar=False)
    flow = published.nile().flow[:years]
    post = nuts(model).posterior(jax.random.key(seed), years, given={"flow": flow})
    assert (np.asarray(post["noise"]).mean(1) > 80).all()


def test_eight_schools_draws_follow_the_model(key):
    """`y - theta` is noise of the given size, independent of `theta`; false alarms below 1e-5."""
    errors = jnp.array([1.0, 3.0])
    traces = jax.vmap(lambda k: classics.eight_schools.simulate(k, errors))(
        jax.random.split(key, 4000)
    )
    noise = np.asarray((traces.choices["y"] - traces.choices["theta"]) / errors)
    for i in range(2):
        assert stats.kstest(noise[:, i], "norm").pvalue > 5e-6
