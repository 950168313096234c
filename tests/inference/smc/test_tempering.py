"""Tempering: exact evidence, exact posteriors, and clear words where it fails.

Statistical comparisons are to 4.5 standard errors: a false alarm in 1.5e5 each; keys are fixed.
"""

import itertools
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist
from abduce.inference.smc.moves import HMC, RandomWalk
from abduce.inference.smc.tempering import base_schedule

sys.path.append(str(Path(__file__).parents[1]))
from checks import SE
from gaussian import DATA, SCALES, exact, groups

KEY = jax.random.key(20)
QUICK = {"num_particles": 500, "min_steps": 20, "num_moves": 3}
FIXED = {"num_particles": 64, "num_moves": 2, "temperatures": np.linspace(0, 1, 9)}


def quick(**settings):
    return ab.smc(**{**QUICK, **settings})


def many(alg, m, args, given, n, *, seed=3):
    """Evidence estimates of `n` independent runs, in one compiled program."""

    def one(key):
        return alg(m).posterior(key, *args, given=given).log_evidence

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), n)), float)


def assert_unbiased(log_z, truth):
    ratio = np.exp(log_z - truth)
    error = ratio.std() / math.sqrt(len(ratio))
    assert error < 0.03 and abs(ratio.mean() - 1) < SE * error, (ratio.mean(), error)


def assert_moments(post, truth):
    """Means within 4.5 errors of as many independent draws as a quarter of the particles."""
    n = post.num_draws / 4
    mean = np.concatenate([[post.mean("mu")], post.mean("theta")])
    sd = np.concatenate([[post.std("mu")], post.std("theta")])
    assert (np.abs(mean - truth.mean) < SE * truth.sd / np.sqrt(n)).all()
    assert (np.abs(sd / truth.sd - 1) < SE / np.sqrt(2 * n)).all()


@pytest.fixture(scope="module")
def post():
    return quick()(groups).posterior(KEY, SCALES, given={"y": DATA})


# ---------------------------------------------------------------- the evidence


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel": ab.hmc(num_steps=3, step_size=0.5, adapt_step_size=False)},
        pytest.param({"kernel": ab.mh()}, marks=pytest.mark.slow),
        pytest.param({"waste_free": 8}, marks=pytest.mark.slow),
        pytest.param(
            {"path": "data", "temperatures": np.linspace(0, 1, 13)}, marks=pytest.mark.slow
        ),
    ],
    ids=["hmc", "mh", "waste_free", "data"],
)
def test_the_evidence_is_unbiased_with_fixed_temperatures(settings):
    """Mean of exp(estimate - truth) over 400 runs of 64 particles."""
    log_z = many(ab.smc(**{**FIXED, **settings}), groups, (SCALES,), {"y": DATA}, 400)
    assert_unbiased(log_z, exact().log_evidence)


def test_adaptive_temperatures(post):
    """The sd of the estimate is about .04 (200 runs), so .2 is 5 of them."""
    truth, d = exact(), post.diagnostics
    assert abs(post.log_evidence - truth.log_evidence) < 0.2
    assert_moments(post, truth)
    t = d["temperatures"]
    assert t[-1] == 1 and (np.diff(t) > 0).all() and len(t) == d["num_steps"] >= 20
    assert d["log_evidence_increments"].sum() == pytest.approx(post.log_evidence, abs=1e-4)
    assert (d["ess"] > 200).all() and (d["ess"] <= 500.01).all()
    assert 0.5 < d["acceptance_rate"].mean() < 0.7 and d["num_nan"] == 0
    assert d["num_ancestors"] > 20 and post.warnings == ()
    np.testing.assert_allclose(
        post.draws["effect"], post.draws["theta"] - post.draws["mu"][..., None], atol=1e-5
    )


@pytest.mark.parametrize(("threshold", "share"), [(None, 0.9), (0.5, 0.5)])
def test_particles_are_resampled_below_the_threshold(post, threshold, share):
    """By default at 0.9 of the particles; a filter at half of them."""
    if threshold is not None:
        alg = quick(threshold=threshold)
        post = alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    due = post.diagnostics["ess"] < share * len(post.log_weights[0])
    np.testing.assert_array_equal(post.diagnostics["resampled"], due)
    assert 0 < due.sum() < len(due)
    assert ab.smc().resampling().threshold == 0.5


def test_temperatures_never_run_ahead_of_the_base_schedule(post):
    t = post.diagnostics["temperatures"]
    base = base_schedule(20).astype(np.float32)
    assert base[-1] == 1 and (np.diff(base) > 0).all() and base[0] < 1e-3 and base[-2] > 0.999
    limits = base[np.minimum(np.searchsorted(base, [0, *t[:-1]], side="right"), 19)]
    assert (t <= limits).all()


@ab.model
def shaped(slope=0.0, centre=0.0, half=np.inf, scale=np.inf, root=False):
    """A standard normal times a factor; its arguments share one compiled program."""
    x = ab.sample("x", dist.Normal(0, 1))
    log_factor = slope * x - 0.5 * ((x - centre) / scale) ** 2
    log_factor += jnp.where(jnp.abs(x - centre) < half, 0.0, -jnp.inf)
    ab.factor("shape", log_factor + jnp.where(root, jnp.sqrt(jnp.where(root, x, 1.0)), 0.0))


def run_shaped(**arguments):
    defaults = {"slope": 0.0, "centre": 0.0, "half": np.inf, "scale": np.inf, "root": False}
    arrays = {k: np.asarray(v, bool if k == "root" else np.float32) for k, v in arguments.items()}
    defaults = {k: np.asarray(v, bool if k == "root" else np.float32) for k, v in defaults.items()}
    return quick()(shaped).posterior(KEY, **{**defaults, **arrays})


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_one_sided_likelihoods(sign):
    """Z = E exp(a x) = exp(a^2 / 2) for a standard normal x: the mean moves to a."""
    a = 4.0 * sign
    post = run_shaped(slope=a)
    assert abs(post.log_evidence - 8.0) < 0.25  # sd .05
    assert abs(post.mean("x") - a) < SE / np.sqrt(500 / 4)
    assert abs(post.std("x") - 1) < SE / np.sqrt(2 * 500 / 4)


def test_a_likelihood_of_huge_size_takes_tiny_first_steps():
    """log L is of the order of -1e8 at the prior; the posterior sd is 1e-4."""
    post = run_shaped(centre=0.5, scale=1e-4)
    assert abs(post.log_evidence - (math.log(1e-4) - 0.125)) < 0.4
    assert post.diagnostics["temperatures"][0] < 1e-6
    assert abs(post.mean("x") - 0.5) < SE * 1e-4 / math.sqrt(125)
    assert post.std("x") == pytest.approx(1e-4, rel=SE / math.sqrt(250))


def test_a_likelihood_that_is_zero_nearly_everywhere():
    post = run_shaped(centre=1.5, half=0.5)
    p = 0.5 * (math.erf(2 / math.sqrt(2)) - math.erf(1 / math.sqrt(2)))
    assert abs(post.log_evidence - math.log(p)) < SE / math.sqrt(500 * p)
    draws = post.draws["x"][post.log_weights > -np.inf]
    assert (np.abs(draws - 1.5) <= 0.5).all() and len(np.unique(draws)) > 100
    assert np.isfinite(post.diagnostics["ess"]).all()


def test_no_weight_left():
    with pytest.raises(ab.Degenerate, match=r"step 1 .* all 500 particles.*site 'shape'"):
        run_shaped(half=-1.0)


def test_densities_that_are_nan_count_as_zero():
    grid = np.arange(5e-4, 10, 1e-3)
    truth = np.log((np.exp(np.sqrt(grid) - 0.5 * grid**2)).sum() * 1e-3 / np.sqrt(2 * np.pi))
    with pytest.warns(ab.AbduceWarning, match="log density was NaN"):
        post = run_shaped(root=True)
    assert abs(post.log_evidence - truth) < 0.3
    assert 200 < post.diagnostics["num_nan"] < 300


@pytest.mark.slow
def test_bounded_and_dependent_supports():
    """By quadrature on a grid."""

    @ab.model
    def nested():
        s = ab.sample("s", dist.HalfNormal(2.0))
        x = ab.sample("x", dist.Uniform(0, s))
        ab.sample("y", dist.Normal(x, 0.5))

    def density(s, x):
        y = 1.0
        prior = 2 * np.exp(-(s**2) / 8) / np.sqrt(2 * np.pi * 4) / s
        return prior * (x < s) * np.exp(-2 * (y - x) ** 2) / (0.5 * np.sqrt(2 * np.pi))

    h = 1 / 400
    g = np.arange(h / 2, 10, h)
    p = density(g[:, None], g[None])
    z = p.sum() * h * h
    mean = np.array([(p * g[:, None]).sum(), (p * g[None]).sum()]) * h * h / z
    post = quick()(nested).posterior(KEY, given={"y": 1.0})
    assert abs(post.log_evidence - np.log(z)) < 0.2
    assert abs(post.mean("s") - mean[0]) < SE * post.std("s") / np.sqrt(125)
    assert abs(post.mean("x") - mean[1]) < SE * post.std("x") / np.sqrt(125)
    assert (post.draws["x"] <= post.draws["s"]).all() and (post.draws["x"] >= 0).all()


# ---------------------------------------------------------------- kernels and discrete latents

COUPLING, FIELD = 0.8, np.array([1.0, -0.5, 0.3, 2.0], np.float32)


@ab.model
def spins(y):
    z = ab.sample("z", dist.Bernoulli(0.4).expand([4]))
    s = 2.0 * z - 1
    ab.factor("coupling", COUPLING * jnp.sum(s[1:] * s[:-1]))
    jax.vmap(lambda s, y: ab.sample("y", dist.Normal(s, 1.0), obs=y))(s, y)


def spin_table():
    states = np.array(list(itertools.product([0, 1], repeat=4)))
    s = 2.0 * states - 1
    log_p = (states * np.log(0.4) + (1 - states) * np.log(0.6)).sum(1)
    log_p += COUPLING * (s[:, 1:] * s[:, :-1]).sum(1)
    log_p += (-0.5 * (FIELD - s) ** 2 - 0.5 * np.log(2 * np.pi)).sum(1)
    return states, log_p


def test_discrete_latents_against_enumeration():
    _, log_p = spin_table()
    log_z = np.logaddexp.reduce(log_p)
    post = quick(num_particles=1000)(spins).posterior(KEY, FIELD)
    w = np.exp(np.asarray(post.log_weights[0], float))
    z = np.asarray(post.draws["z"][0])
    index = z @ [8, 4, 2, 1]
    found = np.bincount(index, w, 16) / w.sum()
    p = np.exp(log_p - log_z)
    assert (np.abs(found - p) < SE * np.sqrt(p * (1 - p) / 250)).all()
    assert abs(post.log_evidence - log_z) < 0.2


@pytest.mark.slow
def test_the_evidence_of_a_discrete_model_is_unbiased():
    log_z = np.logaddexp.reduce(spin_table()[1])
    assert_unbiased(many(ab.smc(**FIXED), spins, (FIELD,), None, 400), log_z)


@pytest.mark.slow
def test_a_model_with_branches():
    """Two models of one number: the odds are those of their evidences."""

    @ab.model
    def choice():
        k = ab.sample("k", dist.Bernoulli(0.5))
        mean = jax.lax.cond(
            k == 1,
            lambda: ab.sample("a", dist.Normal(0.0, 2.0)),
            lambda: ab.sample("b", dist.Normal(-1.0, 0.5)),
        )
        ab.sample("y", dist.Normal(mean, 1.0))

    def normal(x, m, v):
        return math.exp(-0.5 * (x - m) ** 2 / v) / math.sqrt(2 * math.pi * v)

    y = 0.7
    a, b = normal(y, 0, 5), normal(y, -1, 1.25)
    post = quick(num_particles=1000)(choice).posterior(KEY, given={"y": y})
    assert abs(post.log_evidence - math.log(0.5 * (a + b))) < 0.15
    p = a / (a + b)
    assert abs(post.mean("k") - p) < SE * math.sqrt(p * (1 - p) / 250)
    assert abs(post.mean("a") - 0.8 * y) < SE * 0.9 / math.sqrt(1000 * p / 4)
    assert np.isnan(post.draws["a"][post.draws["k"] == 0]).all()


@pytest.mark.slow
def test_proposals_of_mh_move_particles():
    @ab.model
    def walk(given, s):
        ab.sample("mu", dist.Normal(given["mu"], 0.5))
        ab.sample("theta", dist.Normal(given["theta"], 0.7))

    alg = ab.smc(**{**FIXED, "num_particles": 500, "kernel": ab.mh(proposal=walk)})
    post = alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    assert abs(post.log_evidence - exact().log_evidence) < 0.3
    assert_moments(post, exact())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel", [ab.hmc(trajectory_length=1.5), RandomWalk()], ids=["trajectory", "random_walk"]
)
def test_other_kernels(kernel):
    post = quick(kernel=kernel)(groups).posterior(KEY, SCALES, given={"y": DATA})
    assert abs(post.log_evidence - exact().log_evidence) < 0.25
    assert_moments(post, exact())


@pytest.mark.slow
def test_waste_free():
    post = quick(waste_free=10, num_moves=1)(groups).posterior(KEY, SCALES, given={"y": DATA})
    assert abs(post.log_evidence - exact().log_evidence) < 0.4
    assert post.draws["mu"].shape == (1, 500)
    with pytest.raises(ab.InvalidAlgorithm, match=r"waste_free=7 .* must divide num_particles=500"):
        quick(waste_free=7)(groups).posterior(KEY, SCALES, given={"y": DATA})


# ---------------------------------------------------------------- starts and paths


@ab.model
def exact_posterior(given, s):
    gain = 1 / (1 + s**2)
    var = 1 / (0.25 + gain.sum())
    mu = ab.sample("mu", dist.Normal(var * (gain * given["y"]).sum(), jnp.sqrt(var)))
    ab.sample("theta", dist.Normal(mu + gain * (given["y"] - mu), s * jnp.sqrt(gain)))


def test_an_exact_proposal_gives_equal_weights_and_the_evidence():
    alg = quick(proposal=exact_posterior, num_moves=1)
    post = alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    assert post.log_evidence == pytest.approx(exact().log_evidence, abs=1e-5)
    np.testing.assert_allclose(post.log_weights - post.log_weights[0, 0], 0, atol=2e-5)
    np.testing.assert_allclose(post.diagnostics["ess"], 500, rtol=1e-5)
    assert post.diagnostics["num_ancestors"] == 500


@ab.model
def level(given, s):
    ab.sample("mu", dist.Normal(given["y"].mean(), 1.5))


@pytest.mark.slow
@pytest.mark.parametrize("path", ["likelihood", "data"])
def test_a_proposal_may_cover_some_latents(path):
    post = quick(proposal=level, path=path)(groups).posterior(KEY, SCALES, given={"y": DATA})
    assert abs(post.log_evidence - exact().log_evidence) < 0.25
    assert_moments(post, exact())


@ab.model
def flat_mean(y):
    mu = ab.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
    ab.sample("y", dist.Normal(mu, 1.0).expand([len(y)]), obs=y)


@pytest.mark.slow
def test_an_improper_prior_needs_a_proposal():
    y = jnp.array([0.5, 1.5, 1.0])

    @ab.model
    def near(given, y):
        ab.sample("mu", dist.Normal(0.0, 2.0))

    with pytest.raises(ab.InvalidAlgorithm, match=r"'mu'.*proposal=, a Model called as"):
        quick()(flat_mean).posterior(KEY, y)
    post = quick(proposal=near)(flat_mean).posterior(KEY, y)
    truth = -math.log(2 * math.pi) - 0.5 * math.log(3) - 0.25
    assert abs(post.log_evidence - truth) < 0.2
    assert abs(post.mean("mu") - 1) < SE / math.sqrt(3 * 125)


@pytest.mark.slow
def test_data_tempering(post):
    """Rows enter one after the other, and end where likelihood tempering does."""
    alg = ab.smc(path="data", temperatures=[1 / 3, 2 / 3, 1], num_particles=2000, num_moves=3)
    data = alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    assert abs(data.log_evidence - post.log_evidence) < 0.25
    for k in (1, 2, 3):  # after each third of the path one more row has been seen
        seen = data.diagnostics["log_evidence_increments"][:k].sum()
        assert abs(seen - exact(observed=np.arange(3) < k).log_evidence) < 0.1 + 0.05 * k
    with pytest.raises(ab.InvalidAlgorithm, match=r"leading axis.*none has one"):
        quick(path="data")(scalar).posterior(KEY, given={"y": 1.0})


@ab.model
def scalar():
    x = ab.sample("x", dist.Normal(0, 1))
    ab.sample("y", dist.Normal(x, 1))


@ab.model
def other():
    z = ab.sample("z", dist.Normal(0, 1))
    ab.sample("y", dist.Normal(z, 1))


@pytest.mark.slow
def test_a_path_of_models():
    @ab.model
    def rough(s):
        mu = ab.sample("mu", dist.Normal(0.5, 3))
        theta = ab.sample("theta", dist.Normal(mu, 2).expand([3]))
        ab.sample("y", dist.Normal(theta, 2 * s))

    post = quick(path=(rough, groups))(groups).posterior(KEY, SCALES, given={"y": DATA})
    assert abs(post.log_evidence - exact().log_evidence) < 0.3
    assert_moments(post, exact())
    with pytest.raises(ab.InvalidAlgorithm, match="must end in the model itself, `groups`"):
        quick(path=(groups, rough))(groups).posterior(KEY, SCALES, given={"y": DATA})
    with pytest.raises(ab.InvalidAlgorithm, match="same latents"):
        quick(path=(other, scalar))(scalar).posterior(KEY, given={"y": 1.0})


@pytest.mark.slow
def test_partly_observed_sites():
    """Hidden entries are latents; the evidence is that of the seen ones."""
    seen = np.array([True, False, True])
    truth = exact(observed=seen)
    given = {"y": ab.masked(np.where(seen, DATA, 0), seen)}
    for kernel in (None, ab.mh()):
        post = quick(kernel=kernel)(groups).posterior(KEY, SCALES, given=given)
        assert abs(post.log_evidence - truth.log_evidence) < 0.25
        assert_moments(post, truth)
        np.testing.assert_allclose(
            post.draws["y"][..., seen], np.broadcast_to(DATA[seen], (1, 500, 2))
        )


# ---------------------------------------------------------------- where it is hard


@pytest.mark.slow
def test_one_particle():
    post = quick(num_particles=1)(groups).posterior(KEY, SCALES, given={"y": DATA})
    assert np.isfinite(post.log_evidence) and post.draws["theta"].shape == (1, 1, 3)
    assert post.diagnostics["num_steps"] == 20  # one particle has no uneven weights


@pytest.mark.slow
def test_moves_that_are_all_rejected_are_reported():
    kernel = HMC(step_size=1e4, adapt=False, jitter=0.0)
    with pytest.warns(ab.AbduceWarning, match="of the moves were accepted"):
        quick(kernel=kernel)(groups).posterior(KEY, SCALES, given={"y": DATA})


def test_settings_that_do_not_fit():
    def run(**settings):
        return quick(**settings)(groups).posterior(KEY, SCALES, given={"y": DATA})

    for settings, message in [
        ({"temperatures": [0.5, 0.2, 1.0]}, "must increase from above 0 to 1"),
        ({"temperatures": [0.5]}, "must increase from above 0 to 1"),
        ({"kernel": ab.nuts()}, r"For gradient moves, use ab\.hmc\(\)"),
        ({"kernel": ab.hmc(dense_mass=True)}, "dense_mass"),
        ({"path": "rows"}, "path= is 'likelihood', 'data' or a tuple"),
        ({"num_moves": -1}, "num_moves"),
    ]:
        with pytest.raises(ab.InvalidAlgorithm, match=message):
            run(**settings)
    with pytest.raises(ab.DiscreteLatent, match=r"site 'z'.*kernel=ab\.mh"):
        quick(kernel=ab.hmc())(spins).posterior(KEY, FIELD)


# ---------------------------------------------------------------- compiling and mapping


def test_other_data_compile_nothing(post, count_compiles):
    key = jax.random.key(1)
    with count_compiles() as compiles:
        quick()(groups).posterior(key, SCALES + 1, given={"y": DATA - 1})
    assert compiles.names == []


@pytest.mark.slow
def test_mapping_over_data():
    y = jnp.stack([DATA, DATA + 1])

    def one(y):
        post = quick()(groups).posterior(KEY, SCALES, given={"y": y})
        return post.log_evidence, post.mean("mu")

    log_z, mean = jax.vmap(one)(y)
    for i in range(2):
        truth = exact(y[i])
        assert abs(log_z[i] - truth.log_evidence) < 0.2
        assert abs(mean[i] - truth.mean[0]) < SE * truth.sd[0] / np.sqrt(125)


@pytest.mark.slow
def test_double_precision(x64):
    post = quick()(groups).posterior(jax.random.key(2), SCALES, given={"y": DATA})
    assert post.draws["mu"].dtype == np.float64
    assert abs(post.log_evidence - exact().log_evidence) < 0.2
