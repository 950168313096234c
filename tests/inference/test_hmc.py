"""NUTS and HMC against posteriors known exactly, on supports and data of every kind."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import SE, assert_moments, assert_probability, mcse
from gaussian import DATA, SCALES, exact, latents
from jax import lax
from numpyro.distributions import constraints
from scipy.stats import norm

import abduce as ab
import abduce.dist as dist
from abduce.inference import diagnostics

KEY = jax.random.key(11)


@pytest.mark.parametrize("name", ["nuts", "hmc", "mh"])
def test_chains_on_a_gaussian(fits, name):
    post, truth = fits[1][name], exact()
    assert post.warnings == ()
    assert_moments(latents(post), truth.mean, truth.sd)
    for i in range(4):
        assert diagnostics.rhat(latents(post)[..., i]) < 1.05
    np.testing.assert_allclose(post["effect"], post["theta"] - post["mu"][..., None], atol=1e-5)


def test_diagnostics_of_chains(fits):
    d = fits[1]["nuts"].diagnostics
    for name in ("lp", "energy", "n_steps", "tree_depth", "acceptance_rate", "diverging"):
        assert d[name].shape == (4, 1000)
    assert not d["diverging"].any() and 0.6 < d["acceptance_rate"].mean() < 1
    mu, theta = fits[1]["nuts"]["mu"], fits[1]["nuts"]["theta"]
    lp = norm.logpdf(mu, 0, 2) + norm.logpdf(theta, mu[..., None], 1).sum(-1)
    lp += norm.logpdf(DATA, theta, SCALES).sum(-1)
    np.testing.assert_allclose(d["lp"], lp, rtol=1e-3, atol=1e-3)
    assert fits[1]["mh"].diagnostics["acceptance_rate"].shape == (4, 2000)
    assert fits[1]["mh"].diagnostics["num_nan"] == 0


COUNTS = np.array([4, 1, 2])
GAPS = np.array([0.5, np.nan, 2.0, np.nan], np.float32)


@ab.model
def awkward():
    """Independent parts, each of another kind, so that one run serves them all."""
    high = ab.sample("high", dist.Uniform(1.0, 2.0))
    ab.sample("low", dist.Uniform(0.0, high))
    p = ab.sample("p", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
    ab.sample("counts", dist.Multinomial(7, p))
    level = ab.sample("level", dist.Normal(0, 2))
    ab.sample("gaps", dist.Normal(level, 1).expand([4]))
    ordered = ab.sample("ordered", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    ab.sample("ends", dist.Normal(ordered, 1).to_event(1))


@pytest.fixture(scope="module")
def parts():
    given = {
        "counts": COUNTS,
        "gaps": ab.masked(GAPS, observed=~np.isnan(GAPS)),
        "ends": np.array([-1.0, 1.0]),
    }
    return ab.nuts(num_samples=1000)(awkward).posterior(KEY, given=given)


def test_nuts_on_a_support_that_depends_on_a_choice(parts):
    high, low = np.asarray(parts["high"], float), np.asarray(parts["low"], float)
    assert (low > 0).all() and (low < high).all()
    # high is uniform on (1, 2); low / high is uniform on (0, 1) and independent of it.
    assert_moments(high, 1.5, 12**-0.5)
    assert_moments(low / high, 0.5, 12**-0.5)
    assert_moments((high - 1.5) * (low / high - 0.5), 0, 1 / 12)


def test_nuts_on_a_simplex(parts):
    alpha = COUNTS + np.array([1, 2, 3])
    total = alpha.sum()
    mean = alpha / total
    np.testing.assert_allclose(np.sum(parts["p"], -1), 1, atol=1e-5)
    assert_moments(parts["p"], mean, np.sqrt(mean * (1 - mean) / (total + 1)))


def test_nuts_infers_hidden_entries(parts):
    var = 1 / (1 / 4 + 2)
    mean = var * 2.5
    assert_moments(parts["level"], mean, var**0.5)
    gaps = np.asarray(parts["gaps"])
    np.testing.assert_array_equal(gaps[..., [0, 2]], np.broadcast_to(GAPS[[0, 2]], (4, 1000, 2)))
    assert_moments(gaps[..., [1, 3]], [mean] * 2, [(var + 1) ** 0.5] * 2)
    hidden = gaps[..., [1, 3]].astype(float) - mean
    assert_moments(hidden.prod(-1), var, np.sqrt((var + 1) ** 2 + var**2))  # their covariance


def test_nuts_on_an_ordered_vector_without_a_prior(parts):
    """Two normals at -1 and 1, given their order: centre and half distance separate."""
    x = np.asarray(parts["ordered"], float)
    assert (x[..., 0] < x[..., 1]).all()
    assert_moments(x.mean(-1), 0, 0.5**0.5)
    a = -1 / 0.5**0.5  # the half distance is normal with mean 1, variance 1/2, cut at 0
    ratio = norm.pdf(a) / norm.sf(a)
    mean = 1 + 0.5**0.5 * ratio
    sd = np.sqrt(0.5 * (1 + a * ratio - ratio**2))
    assert_moments((x[..., 1] - x[..., 0]) / 2, mean, sd)


@ab.model
def switch_on_continuous():
    u = ab.sample("u", dist.Normal(0, 1))
    mean = lax.cond(u > 0, lambda: ab.sample("z", dist.Normal(3, 1)), lambda: 0.0)
    ab.sample("y", dist.Normal(mean, 1))


def test_nuts_on_a_site_in_a_branch():
    y = 1.6
    on, off = norm.pdf(y, 3, 2**0.5), norm.pdf(y)
    alg = ab.nuts(num_samples=2500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ab.AbduceWarning)  # the density jumps
        post = alg(switch_on_continuous).posterior(KEY, given={"y": y})
    assert_probability(np.asarray(post["u"]) > 0, on / (on + off))
    active = np.asarray(post.active["z"])
    np.testing.assert_array_equal(active, np.asarray(post["u"]) > 0)
    np.testing.assert_array_equal(np.isnan(post["z"]), ~active)
    z = np.asarray(post["z"], float)
    assert post.mean("z") == pytest.approx(np.nanmean(z), rel=1e-6)
    mean, sd = (3 + y) / 2, 0.5**0.5
    deviation = np.where(active, z - mean, 0)  # of mean 0 where z counts
    assert abs(deviation.mean()) < SE * mcse(deviation)
    squares = np.where(active, (z - mean) ** 2 - sd**2, 0)
    assert abs(squares.mean()) < SE * mcse(squares)


def test_no_algorithm_means_nuts():
    @ab.model
    def plain():
        ab.sample("x", dist.Normal(3, 1))

    post = plain.posterior(KEY)
    assert post.algorithm == "nuts" and post["x"].shape == (4, 1000)
    assert_moments(post["x"], 3, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_accept_prob": 1.5}, "target_accept_prob.*1.5"),
        ({"num_chains": 0}, "num_chains.*0"),
        ({"num_chains": 2.5}, "num_chains.*2.5"),
        ({"thinning": 2000}, "thinning=2000.*num_samples"),
        ({"chain_method": "parallel"}, "chain_method.*'parallel'"),
        ({"step_size": -1.0}, "step_size.*-1"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ab.InvalidAlgorithm, match=message):
        ab.nuts(**settings)


def test_hmc_takes_one_length():
    with pytest.raises(ab.InvalidAlgorithm, match="num_steps or trajectory_length, not both"):
        ab.hmc(num_steps=3, trajectory_length=1.0)
