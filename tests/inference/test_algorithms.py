"""The algorithm protocol, and each algorithm against posteriors known exactly.

Statistical tests have fixed keys and compare to 4.5 Monte Carlo standard errors, a false alarm in
1.5e5 comparisons; no test makes more than 15.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import DATA, NAMES, SCALES, exact, groups, latents
from jax import lax
from numpyro.distributions import constraints
from scipy.stats import norm

import abduce as ab
import abduce.dist as dist
from abduce.inference import diagnostics
from abduce.ppl._jax import count_compiles

KEY = jax.random.key(11)
SE = 4.5


def mcse(x):
    """The standard error of the mean; chains that do not mix would have an excuse for anything."""
    assert diagnostics.ess_mean(x) > 150
    return diagnostics.mcse_mean(x)


def assert_moments(draws, mean, sd):
    """Means and standard deviations of chains, `(chain, draw, k)`, to 4.5 MCSE."""
    draws = np.asarray(draws, float)
    draws = draws.reshape((*draws.shape[:2], -1))
    mean, sd = np.ravel(mean), np.ravel(sd)
    for i in range(draws.shape[-1]):
        x = draws[..., i]
        error = SE * mcse(x)
        assert abs(x.mean() - mean[i]) < error, (i, x.mean(), mean[i])
        spread = (x - mean[i]) ** 2
        error = SE * mcse(spread)
        assert abs(spread.mean() - sd[i] ** 2) < error, (i, spread.mean() ** 0.5, sd[i])


def assert_probability(hits, probability):
    hits = np.asarray(hits, float)
    assert abs(hits.mean() - probability) < SE * mcse(hits), hits.mean()


# -- the protocol ----------------------------------------------------------------------------


ALL = [ab.nuts, ab.hmc, ab.mh, ab.importance, ab.laplace]


@pytest.mark.parametrize("algorithm", ALL)
def test_an_algorithm_is_a_frozen_hashable_configuration(algorithm):
    alg = algorithm()
    assert isinstance(alg, ab.Algorithm) and alg.name == algorithm.__name__
    assert alg == algorithm() and hash(alg) == hash(algorithm())
    edited = alg.replace(num_samples=17)
    assert edited.num_samples == 17 and alg.num_samples != 17 and edited != alg
    assert repr(alg) == f"ab.{alg.name}()"
    assert repr(edited) == f"ab.{alg.name}(num_samples=17)"
    with pytest.raises(AttributeError):
        alg.num_samples = 3
    with pytest.raises(ab.InvalidAlgorithm, match=r"num_sample'.*Did you mean \"num_samples\""):
        alg.replace(num_sample=3)
    with pytest.raises(ab.InvalidAlgorithm, match=r"num_sample'.*Did you mean \"num_samples\""):
        algorithm(num_sample=3)
    with pytest.raises(ab.InvalidAlgorithm, match=r"num_samples.*0"):
        algorithm(num_samples=0)
    with pytest.raises(ab.InvalidAlgorithm, match=r"decorates a model, got function(.|\n)*@ab\."):
        alg(lambda: None)
    with pytest.raises(ab.InvalidAlgorithm, match=rf"parentheses, @ab\.{alg.name}\(\)"):
        algorithm(groups)


def test_attaching_and_replacing():
    a, b = ab.importance(num_samples=10), ab.laplace(num_samples=10)
    assert groups.algorithm is None
    attached = a(groups)
    assert attached.algorithm == a and groups.algorithm is None
    assert attached.name == "groups" and type(attached) is type(groups)
    assert b(attached).algorithm == b and attached.algorithm == a
    assert "importance(num_samples=10)" in repr(attached)

    @ab.mh(num_samples=3)
    @ab.model
    def decorated():
        ab.sample("x", dist.Normal(0, 1))

    assert decorated.algorithm == ab.mh(num_samples=3)


def test_transformations_keep_the_algorithm():
    alg = ab.importance(num_samples=7)
    m = alg(groups)
    for changed in (
        ab.condition(m, {"y": DATA}),
        ab.do(m, {"mu": 0.0}),
        ab.with_prior(m, {"mu": dist.Normal(0, 1)}),
        ab.reparam(m, {"theta": ab.noncentered()}),
        ab.do(ab.condition(m, {"y": DATA}), {"mu": 0.0}),
    ):
        assert changed.algorithm == alg
        assert ab.laplace()(changed).algorithm == ab.laplace()
    post = ab.condition(m, {"y": DATA}).posterior(KEY, SCALES)
    assert post.algorithm == "importance" and post.num_draws == 7


def test_inlining_ignores_the_algorithm():
    inner = ab.nuts(num_chains=99)(groups)

    @ab.importance(num_samples=5)
    @ab.model
    def outer(s):
        with ab.scope("a"):
            inner(s)

    post = outer.posterior(KEY, SCALES, given={"a/y": DATA})
    assert post.algorithm == "importance" and post["a/theta"].shape == (1, 5, 3)


def test_arrays_in_a_configuration_are_leaves():
    alg = ab.nuts(init={"mu": jnp.zeros(3)})
    assert [x.shape for x in jax.tree.leaves(alg)] == [(3,)]
    doubled = jax.tree.map(lambda x: x + 1, alg)
    assert doubled.init["mu"][0] == 1 and doubled.num_samples == alg.num_samples


# -- a second call compiles nothing ----------------------------------------------------------


@pytest.fixture(scope="module")
def fits():
    """The first call of each algorithm; later ones find their programs."""
    configurations = {
        "nuts": ab.nuts(num_warmup=300, num_samples=1000),
        "hmc": ab.hmc(num_warmup=300, num_samples=500),
        "importance": ab.importance(num_samples=2000),
        "laplace": ab.laplace(num_samples=4000),
        "mh": ab.mh(num_warmup=500, num_samples=2000),
    }
    posts = {
        name: alg(groups).posterior(KEY, SCALES, given={"y": DATA}, coords={"group": NAMES})
        for name, alg in configurations.items()
    }
    return configurations, posts


EVERY = ["nuts", "hmc", "importance", "laplace", "mh"]


@pytest.mark.parametrize("name", EVERY)
def test_other_data_of_the_same_shapes_compile_nothing(fits, name):
    model = fits[0][name](groups)
    with count_compiles() as compiles:
        other = model.posterior(jax.random.key(1), SCALES + 0.5, given={"y": DATA[::-1] + 1})
    assert compiles.count == 0
    assert abs(float(other.mean("mu")) - float(fits[1][name].mean("mu"))) > 0.05  # they are others


@pytest.mark.parametrize("name", ["nuts", "mh"])
def test_the_numbers_of_chains_and_draws_compile_nothing(fits, name):
    alg = fits[0][name].replace(num_samples=300)
    if name == "nuts":
        alg = alg.replace(num_chains=6, num_warmup=200)
    with count_compiles() as compiles:
        post = alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    assert compiles.count == 0
    assert post["mu"].shape == (alg.num_chains, 300)


@pytest.mark.parametrize("name", EVERY)
def test_the_key_determines_the_draws(fits, name):
    model = fits[0][name](groups)
    again = model.posterior(KEY, SCALES, given={"y": DATA})
    other = model.posterior(jax.random.key(12), SCALES, given={"y": DATA})
    for address in ("mu", "theta"):
        np.testing.assert_array_equal(again[address], fits[1][name][address])
        assert np.mean(other[address] == again[address]) < 0.01


@pytest.mark.slow
def test_keys_are_used_once(fits):
    """JAX's checker needs programs of its own."""
    with jax.debug_key_reuse(True):
        for name in EVERY:
            fits[0][name](groups).posterior(jax.random.key(11), SCALES, given={"y": DATA})


# -- nuts and hmc ----------------------------------------------------------------------------


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


# -- importance ------------------------------------------------------------------------------


@ab.model
def exact_posterior(given, s):
    """Draws from the exact posterior of `groups`, one conditional after the other."""
    precision = 1 / s**2
    gain = precision / (1 + precision)
    spread = 1 / (1 + precision)  # of theta given mu and y
    weight = 1 / (1 + s**2)  # y given mu
    var = 1 / (0.25 + weight.sum())
    mu = ab.sample("mu", dist.Normal(var * (weight * given["y"]).sum(), jnp.sqrt(var)))
    centre = mu + gain * (given["y"] - mu)
    ab.sample("theta", dist.Normal(centre, jnp.sqrt(spread)))


def test_an_exact_proposal_gives_equal_weights_and_the_evidence():
    alg = ab.importance(num_samples=500, proposal=exact_posterior)
    post = alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    truth = exact()
    np.testing.assert_allclose(post.log_weights, truth.log_evidence, atol=2e-5)
    assert post.log_evidence == pytest.approx(truth.log_evidence, abs=1e-5)
    assert post.diagnostics["ess"] == pytest.approx(500, rel=1e-6)
    assert post.warnings == () and post.diagnostics["pareto_k"] < 0
    draws = latents(post)
    error = truth.sd / np.sqrt(500)
    assert (np.abs(draws.mean((0, 1)) - truth.mean) < SE * error).all()


def test_the_evidence_from_the_prior_is_unbiased():
    """The mean of exp(estimate - truth) over 400 runs of 50 draws is 1, to 4.5 standard errors."""

    @jax.jit
    @jax.vmap
    def run(key):
        alg = ab.importance(num_samples=50)
        return alg(groups).posterior(key, SCALES, given={"y": DATA}).log_evidence

    ratio = np.exp(np.asarray(run(jax.random.split(KEY, 400)), float) - exact().log_evidence)
    error = ratio.std() / 20
    assert abs(ratio.mean() - 1) < SE * error and error < 0.05


def test_a_proposal_may_cover_some_latents():
    """The rest comes from the prior, and the weights account for it."""

    @ab.model
    def level(given, s):
        ab.sample("mu", dist.Normal(given["y"].mean(), 1.5))

    alg = ab.importance(num_samples=4000, proposal=level)
    post = alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    truth = exact()
    assert abs(post.log_evidence - truth.log_evidence) < SE * post.diagnostics["log_evidence_se"]
    w = np.exp(np.asarray(post.log_weights[0], float))
    w /= w.sum()
    for address, i in [("mu", 0), ("theta", slice(1, None))]:
        x = np.asarray(post.draws[address][0], float)
        squares = (w**2)[:, None] * (x.reshape(len(w), -1) - truth.mean[i]) ** 2
        assert (np.abs(post.mean(address) - truth.mean[i]) < SE * np.sqrt(squares.sum(0))).all()


def test_a_proposal_that_does_not_fit():
    @ab.model
    def wrong(given, s):
        ab.sample("nu", dist.Normal(0, 1))

    alg = ab.importance(num_samples=10, proposal=wrong)
    with pytest.raises(ab.InvalidValue, match=r"\['nu'\] are not latents.*\['mu', 'theta'\]"):
        alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    alg = ab.importance(proposal=lambda given: None)
    with pytest.raises(ab.InvalidAlgorithm, match=r"proposal\(given, \*args\), got function"):
        alg(groups).posterior(KEY, SCALES)


def test_uneven_weights_raise_a_warning():
    far = np.array([25.0, -25.0, 25.0], np.float32)
    with pytest.warns(ab.AbduceWarning, match=r"Pareto k is .* num_samples.*proposal=.*ab\.nuts"):
        post = ab.importance(num_samples=2000)(groups).posterior(KEY, SCALES, given={"y": far})
    assert post.diagnostics["pareto_k"] > 0.7 and post.diagnostics["ess"] < 50


def test_no_weight_left():
    @ab.model
    def bounded():
        x = ab.sample("x", dist.Normal(0, 1))
        ab.sample("y", dist.Uniform(x, x + 1))

    message = r"all 100 draws have weight zero.*proposal="
    with pytest.raises(ab.Degenerate, match=message):
        ab.importance(num_samples=100)(bounded).posterior(KEY, given={"y": 50.0})


def test_smoothing_can_be_left_out(fits):
    raw = ab.importance(num_samples=2000, smooth=False)
    post = raw(groups).posterior(KEY, SCALES, given={"y": DATA})
    smooth = fits[1]["importance"]
    assert post.log_evidence == smooth.log_evidence
    theta = np.asarray(post.draws["theta"], float)
    expected = norm.logpdf(DATA, theta, SCALES).sum(-1)
    np.testing.assert_allclose(post.log_weights, expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(smooth.log_weights, expected, rtol=1e-4, atol=1e-4)


# -- laplace ---------------------------------------------------------------------------------


def test_laplace_is_exact_on_a_gaussian(x64):
    post = ab.laplace(num_samples=4000)(groups).posterior(KEY, SCALES, given={"y": DATA})
    truth = exact()
    assert post.log_evidence == pytest.approx(truth.log_evidence, abs=1e-9)
    np.testing.assert_allclose(post.diagnostics["mode"], truth.mean, atol=1e-7)
    assert post.warnings == () and post.diagnostics["ess"] == pytest.approx(4000, rel=1e-6)
    draws = latents(post)[0]
    np.testing.assert_allclose(np.cov(draws.T), truth.cov, atol=SE * 2 * truth.sd.max() ** 2 / 63)
    assert (np.abs(draws.mean(0) - truth.mean) < SE * truth.sd / 63).all()


@ab.model
def funnel():
    v = ab.sample("v", dist.Normal(0, 3))
    ab.sample("x", dist.Normal(0, jnp.exp(v / 2)).expand([4]))


def test_laplace_warns_on_a_funnel():
    with pytest.warns(ab.AbduceWarning, match=r"ab\.laplace.*(Pareto k|flat|curves).*ab\.nuts"):
        post = ab.laplace(num_samples=500)(funnel).posterior(KEY)
    assert len(post.warnings) == 1


def test_laplace_warns_where_there_is_no_mode():
    @ab.model
    def flat():
        ab.sample("a", dist.ImproperUniform(constraints.real, (), ()))
        b = ab.sample("b", dist.Normal(0, 1))
        ab.sample("y", dist.Normal(b, 1))

    with pytest.warns(ab.AbduceWarning, match=r"flat or curves upwards in 1 of 2 directions"):
        post = ab.laplace(num_samples=100)(flat).posterior(KEY, given={"y": 1.0})
    assert post.log_evidence is None


# -- mh --------------------------------------------------------------------------------------


P = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]], np.float32)


@ab.model
def discrete():
    a = ab.sample("a", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
    b = ab.sample("b", dist.Bernoulli(jnp.asarray(P)[a, 1]))
    ab.sample("y", dist.Normal(a - 2.0 * b, 1.0))


def discrete_posterior(y):
    p = np.array([0.2, 0.3, 0.5])[:, None] * P
    a, b = np.arange(3)[:, None], np.arange(2)
    p = p * norm.pdf(y, a - 2.0 * b)
    return p / p.sum()


def assert_states(post, y):
    expected = discrete_posterior(y)
    for a in range(3):
        for b in range(2):
            assert_probability((post["a"] == a) & (post["b"] == b), expected[a, b])


def test_mh_on_an_enumerable_model():
    post = ab.mh(num_warmup=250, num_samples=4000)(discrete).posterior(KEY, given={"y": 0.3})
    assert post["a"].dtype.kind == "i"
    assert_states(post, 0.3)


def test_a_proposal_covers_some_and_the_prior_the_rest():
    """It proposes neither symmetrically nor from the prior, and sees data and state."""

    @ab.model
    def nudge(given):
        step = 1 + ab_step(given["y"])
        logits = -step * jnp.abs(jnp.arange(3) - given["a"] - 0.5)
        ab.sample("a", dist.Categorical(logits=logits))

    def ab_step(y):
        return jnp.abs(y)

    alg = ab.mh(proposal=nudge, num_warmup=250, num_samples=4000)
    post = alg(discrete).posterior(KEY, given={"y": 0.3})
    assert_states(post, 0.3)


def test_several_proposals_take_turns():
    @ab.model
    def shift(given, s):
        ab.sample("mu", dist.Normal(given["mu"] + 0.3, 1.0))  # biased, so the ratio matters

    @ab.model
    def conditional(given, s):
        gain = 1 / (1 + s**2)
        centre = given["mu"] + gain * (given["y"] - given["mu"])
        ab.sample("theta", dist.Normal(centre, jnp.sqrt(1 - gain)))

    alg = ab.mh(proposal=(shift, conditional), num_warmup=250, num_samples=3000)
    post = alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    truth = exact()
    assert_moments(latents(post), truth.mean, truth.sd)
    # The second is the exact conditional: always accepted; the first at times.
    assert 0.5 < post.diagnostics["acceptance_rate"].mean() < 1


@ab.model
def branch():
    b = ab.sample("b", dist.Bernoulli(0.4))
    mean = lax.cond(b == 1, lambda: ab.sample("x", dist.Normal(2, 1)), lambda: 0.0)
    ab.sample("y", dist.Normal(mean, 1))


@ab.model
def flip(given):
    ab.sample("b", dist.Bernoulli(0.5))


@ab.model
def flip_and_draw(given):
    ab.sample("b", dist.Bernoulli(0.3))
    ab.sample("x", dist.Normal(1.0, 1.5))


@ab.model
def draw_if_flipped(given):
    b = ab.sample("b", dist.Bernoulli(0.3))
    lax.cond(b == 1, lambda: ab.sample("x", dist.Normal(1.0, 1.5)), lambda: 0.0)


@pytest.mark.parametrize("proposal", [None, flip, flip_and_draw, draw_if_flipped])
def test_mh_opens_and_closes_branches(proposal):
    y = 1.5
    on, off = 0.4 * norm.pdf(y, 2, 2**0.5), 0.6 * norm.pdf(y)
    alg = ab.mh(proposal=proposal, num_warmup=250, num_samples=3000)
    post = alg(branch).posterior(KEY, given={"y": y})
    assert_probability(post["b"] == 1, on / (on + off))
    active = np.asarray(post["b"]) == 1
    np.testing.assert_array_equal(np.isnan(post["x"]), ~active)
    x = np.where(active, np.asarray(post["x"], float) - 1.75, 0)
    assert abs(x.mean()) < SE * mcse(x)
    squares = np.where(active, x**2 - 0.5, 0)
    assert abs(squares.mean()) < SE * mcse(squares)
    if proposal is None:  # predictions keep each draw's branch, and its value
        noise = post.predict(KEY)["y"] - np.where(active, post["x"], 0)
        assert abs(noise.mean()) < SE / np.sqrt(noise.size)
        assert abs(noise.std() - 1) < SE / np.sqrt(2 * noise.size)


def test_mh_infers_hidden_entries():
    @ab.model
    def model():
        mu = ab.sample("mu", dist.Normal(0, 2))
        ab.sample("y", dist.Normal(mu, 1).expand([3]))

    y = np.array([1.0, np.nan, 2.0])
    alg = ab.mh(num_warmup=250, num_samples=4000)
    post = alg(model).posterior(KEY, given={"y": ab.masked(y, observed=~np.isnan(y))})
    var = 1 / (1 / 4 + 2)
    assert_moments(post["mu"], 3 * var, var**0.5)
    assert_moments(post["y"][..., 1], 3 * var, (1 + var) ** 0.5)
    assert (np.asarray(post["y"])[..., [0, 2]] == [1.0, 2.0]).all()


def test_a_proposal_over_a_partly_observed_site_is_refused():
    @ab.model
    def model():
        ab.sample("y", dist.Normal(0, 1).expand([2]))

    @ab.model
    def q(given):
        ab.sample("y", dist.Normal(0, 1).expand([2]))

    data = ab.masked(np.zeros(2), observed=np.array([True, False]))
    with pytest.raises(ab.InvalidAlgorithm, match=r"covers \['y'\], which are partly observed"):
        ab.mh(proposal=q)(model).posterior(KEY, given={"y": data})


def test_chains_that_have_not_mixed_are_reported(fits):
    alg = fits[0]["mh"].replace(num_warmup=0, num_samples=250)
    precise = 1e-4 * SCALES  # no prior draw comes near the data
    with pytest.warns(ab.AbduceWarning) as caught:
        post = alg(groups).posterior(KEY, precise, given={"y": DATA})
    assert [str(w.message) for w in caught] == list(post.warnings)
    (message,) = post.warnings
    assert "not mixed" in message and "'theta'" in message
    assert "num_warmup" in message and "ab.nuts" in message


def test_thinning_keeps_every_nth(fits):
    alg = fits[0]["mh"].replace(num_samples=2000, thinning=4)
    post = alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    assert post["mu"].shape == (4, 500)
    plain = fits[1]["mh"]
    ess = diagnostics.ess_bulk(np.asarray(post["mu"], float)) / 500
    assert ess > 1.5 * diagnostics.ess_bulk(np.asarray(plain["mu"], float)) / 2000


def test_an_interrupted_run_returns_what_it_has(fits, monkeypatch):
    from abduce.inference.mcmc import mh

    advance, calls = mh._advance, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 6:  # two calls of warm-up, three of draws
            raise KeyboardInterrupt
        return advance(*args)

    monkeypatch.setattr(mh, "_advance", interrupted)
    with pytest.warns(ab.AbduceWarning, match=r"interrupted after 750 of 2000 draws per chain"):
        post = fits[0]["mh"](groups).posterior(KEY, SCALES, given={"y": DATA})
    np.testing.assert_array_equal(post["mu"], fits[1]["mh"]["mu"][:, :750])
    calls[:] = [None] * 5  # in the first call: nothing to return
    with pytest.raises(KeyboardInterrupt):
        fits[0]["mh"](groups).posterior(KEY, SCALES, given={"y": DATA})


def test_mh_starts_where_it_is_told(fits):
    theta = DATA + np.arange(4.0)[:, None] * 1e-5  # nothing that the prior proposes is as good
    alg = fits[0]["mh"].replace(num_warmup=0, num_samples=1, init={"theta": theta})
    post = alg(groups).posterior(KEY, 1e-4 * SCALES, given={"y": DATA})
    np.testing.assert_allclose(post["theta"][:, 0], theta, rtol=1e-6)
    with pytest.raises(ab.InvalidValue, match=r'init\["theta"\] has shape \(2,\), expected \(3,\)'):
        alg.replace(init={"theta": np.ones(2)})(groups).posterior(KEY, SCALES, given={"y": DATA})
    with pytest.raises(ab.UnknownAddress, match=r'init\["thet"\]'):
        alg.replace(init={"thet": 1.0})(groups).posterior(KEY, SCALES, given={"y": DATA})


# -- prior -----------------------------------------------------------------------------------


def test_prior_draws():
    prior = groups.prior(KEY, SCALES, num_samples=3000, coords={"group": NAMES})
    assert prior.algorithm == "prior" and prior.log_weights is None
    assert list(prior) == ["mu", "theta", "effect", "y"]
    assert prior["y"].shape == (1, 3000, 3)
    y = np.asarray(prior["y"], float)[0]
    assert (np.abs(y.mean(0)) < SE * y.std(0) / np.sqrt(3000)).all()
    sd = np.sqrt(5 + SCALES**2)
    assert (np.abs(y.std(0) - sd) < SE * sd / np.sqrt(6000)).all()
    covariance = np.cov(y[:, 0], y[:, 1])[0, 1]  # of the shared mu
    assert abs(covariance - 4) < SE * np.sqrt((sd[0] * sd[1]) ** 2 + 16) / np.sqrt(3000)
    assert "theta[south]" in prior.summary().labels
    np.testing.assert_array_equal(groups.prior(KEY, SCALES, num_samples=3000)["mu"], prior["mu"])


def test_prior_ignores_the_algorithm_and_checks_its_settings():
    prior = ab.nuts()(groups).prior(KEY, SCALES, num_samples=5)
    assert prior.algorithm == "prior" and prior["mu"].shape == (1, 5)
    with pytest.raises(ab.InvalidAlgorithm, match="num_samples must be an int >= 1, got 0"):
        groups.prior(KEY, SCALES, num_samples=0)
    with pytest.raises(ab.InvalidValue, match=r'coords\["grup"\].*Did you mean "group"'):
        groups.prior(KEY, SCALES, coords={"grup": NAMES})
