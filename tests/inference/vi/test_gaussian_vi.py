"""Gaussian variational inference: exact on Gaussians, at the optimum elsewhere.

Statistical checks are to 4.5 standard errors, a false alarm in 1.5e5 comparisons; keys are fixed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import SE
from gaussian import DATA, SCALES, exact, groups, latents
from scipy.linalg import sqrtm
from scipy.optimize import minimize
from scipy.special import betaln, expit, gammaln

import abduce as ab
import abduce.dist as dist
from abduce.inference.vi.gaussian import gaussian_vi
from abduce.inference.vi.gaussian_steps import (
    ADVANCE,
    Expectations,
    Normal,
    fixed_points,
    fresh_points,
    triangular,
)

KEY = jax.random.key(11)
MEAN, COV = np.array([1.0, -1.0]), np.array([[2.0, 0.9], [0.9, 0.5]])
PRECISION = np.linalg.inv(COV)
METHODS = ["natural_gradient", "wasserstein"]


@ab.model
def correlated():
    """Correlation 0.9, condition number 31."""
    # From lists: JAX remembers the precision a NumPy array was first traced in.
    ab.sample("x", dist.MultivariateNormal(jnp.array(MEAN.tolist()), jnp.array(COV.tolist())))


@ab.model
def coin(n):
    p = ab.sample("p", dist.Beta(2, 3))
    ab.sample("heads", dist.Binomial(n, probs=p))


@ab.model
def counts(x):
    w = ab.sample("w", dist.Normal(0, 2).expand([4]).to_event(1))
    ab.sample("y", dist.Poisson(jnp.exp(x @ w)).to_event(1))


RNG = np.random.default_rng(3)
X = RNG.normal(size=(30, 4)).astype(np.float32)
Y = RNG.poisson(np.exp(X @ [0.5, -0.5, 0.2, 0.8]))


def divergence(post):
    """KL of the fit from the exact posterior of `correlated`."""
    m, c = post.diagnostics["location"] - MEAN, post.diagnostics["scale_tril"]
    product = PRECISION @ c @ c.T
    return (np.trace(product) + m @ PRECISION @ m - 2 - np.linalg.slogdet(product)[1]) / 2


# -- steps -----------------------------------------------------------------------------------


def quadratic(normal, hessian, centre):
    """Exact expectations for `V(x) = (x - centre)' hessian (x - centre) / 2`."""
    c = normal.scale
    return Expectations(0.0, 0.0, hessian @ (normal.location - centre), c.T @ hessian @ c, 0.0)


@pytest.mark.parametrize("is_convex", [True, False])
def test_a_natural_gradient_step_is_the_published_one(is_convex):
    rng = np.random.default_rng(0)
    c, root = rng.normal(size=(2, 5, 5))
    h = root @ root.T if is_convex else root + root.T
    m, centre, rho = rng.normal(size=5), rng.normal(size=5), 0.7
    normal = Normal(m, c)
    new = ADVANCE["natural_gradient"](normal, quadratic(normal, h, centre), rho)
    s = c @ c.T
    p = np.linalg.inv(s)
    g = p - h
    expected = p - rho * g + rho**2 / 2 * g @ s @ g
    np.testing.assert_allclose(np.linalg.inv(new.scale @ new.scale.T), expected, rtol=1e-6)
    move = -rho * np.linalg.solve(expected, h @ (m - centre))
    np.testing.assert_allclose(new.location - m, move, rtol=1e-7)


@pytest.mark.parametrize("is_singular", [True, False])
def test_a_wasserstein_step_is_the_published_one(is_singular):
    rng = np.random.default_rng(1)
    c, root = rng.normal(size=(2, 5, 5))
    h = root @ root.T
    eta = (1 if is_singular else 0.6) / np.linalg.eigvalsh(h).max()
    m, centre = rng.normal(size=(2, 5))
    normal = Normal(m, c)
    new = ADVANCE["wasserstein"](normal, quadratic(normal, h, centre), eta)
    half = (np.eye(5) - eta * h) @ c @ c.T @ (np.eye(5) - eta * h)
    root = sqrtm(half @ (half + 4 * eta * np.eye(5))).real
    expected = (half + 2 * eta * np.eye(5) + root) / 2
    # the reference takes the root of a singular matrix, and loses half of the digits
    np.testing.assert_allclose(new.scale @ new.scale.T, expected, atol=1e-6 * np.abs(c).max())
    np.testing.assert_allclose(new.location, m - eta * h @ (m - centre), rtol=1e-9)


def test_points():
    z = fixed_points(40, 7, np.random.default_rng(0))
    assert z.shape == (80, 7)
    np.testing.assert_array_equal(z[:40], -z[40:])
    np.testing.assert_allclose(z.T @ z / 80, np.eye(7), atol=1e-12)
    rng = np.random.default_rng(0)
    z = np.stack([fresh_points(5, 3, rng) for _ in range(4000)])  # a block and a part
    assert z.shape == (4000, 10, 3)
    np.testing.assert_array_equal(z[:, :5], -z[:, 5:])
    dots = np.einsum("tid,tjd->tij", z[:, :5], z[:, :5])
    assert np.abs(dots[:, [0, 0, 1, 3], [1, 2, 2, 4]]).max() < 1e-10
    for power, expected, variance in ((2, 1, 2), (4, 3, 96)):  # moments of a standard normal
        found = (z[:, :5] ** power).mean(0)
        assert (np.abs(found - expected) < SE * np.sqrt(variance / 4000)).all()
    signs = (z[:, 0] > 0).mean(0)
    assert (np.abs(signs - 0.5) < SE * 0.5 / np.sqrt(4000)).all()


def test_triangular():
    c = np.random.default_rng(0).normal(size=(6, 6))
    np.testing.assert_allclose(triangular(c), np.linalg.cholesky(c @ c.T), rtol=1e-9, atol=1e-12)


# -- Gaussian targets ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ab.gaussian_vi")  # it says that 20 steps are too few
@pytest.mark.parametrize("wide", [False, True])
def test_forward_backward_converges_at_its_rate(wide):
    """The iteration run in float64 with exact expectations gives these KL divergences."""
    step_size = 1 / np.linalg.eigvalsh(PRECISION).max()
    with jax.enable_x64(wide):
        for num_steps, kl in ((20, 2.0215e-2), (50, 1.91354e-3), (100, 6.6117e-5), (200, 9.077e-8)):
            alg = gaussian_vi(
                method="wasserstein", step_size=step_size, num_steps=num_steps,
                init={"x": np.zeros(2)},
            )  # fmt: skip
            post = alg(correlated).posterior(KEY)
            assert divergence(post) == pytest.approx(kl, rel=1e-3)
            assert len(post.diagnostics["elbo"]) == num_steps + 1
            if wide:
                assert post.diagnostics["elbo"][-1] == pytest.approx(-divergence(post), abs=1e-12)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_gaussian_posterior(method, stochastic):
    alg = gaussian_vi(method=method, stochastic=stochastic, num_samples=4000)
    post = alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    truth, d = exact(), post.diagnostics
    assert post.warnings == () and post.algorithm == "gaussian_vi"
    np.testing.assert_allclose(d["location"], truth.mean, atol=1e-3)
    np.testing.assert_allclose(d["scale_tril"], np.linalg.cholesky(truth.cov), atol=1e-3)
    assert d["elbo"][-1] == pytest.approx(truth.log_evidence, abs=1e-5)
    assert post.log_evidence == pytest.approx(truth.log_evidence, abs=1e-3)
    assert d["ess"] == pytest.approx(4000, rel=1e-3)
    if method == "natural_gradient" and not stochastic:
        assert len(d["elbo"]) < 12  # it converges quadratically
    draws = latents(post)[0]
    np.testing.assert_allclose(np.cov(draws.T), truth.cov, atol=SE * 2 * truth.sd.max() ** 2 / 63)
    assert (np.abs(draws.mean(0) - truth.mean) < SE * truth.sd / 63).all()
    np.testing.assert_allclose(post["effect"], post["theta"] - post["mu"][..., None], atol=1e-5)


def test_natural_gradients_are_exact_in_float64(x64):
    post = gaussian_vi()(groups).posterior(KEY, SCALES, given={"y": DATA})
    truth, d = exact(), post.diagnostics
    np.testing.assert_allclose(d["location"], truth.mean, atol=1e-7)
    np.testing.assert_allclose(d["scale_tril"] @ d["scale_tril"].T, truth.cov, atol=1e-6)
    assert post.log_evidence == pytest.approx(truth.log_evidence, abs=1e-8)
    assert post.draws["mu"].dtype == np.float64


def test_the_scale_of_coordinates_does_not_matter_to_natural_gradients():
    @ab.model
    def scaled():
        ab.sample("x", dist.Normal(5, jnp.array([1e-3, 1.0, 1e3])).to_event(1))

    post = gaussian_vi()(scaled).posterior(KEY)
    d = post.diagnostics
    np.testing.assert_allclose(np.diag(d["scale_tril"]), [1e-3, 1.0, 1e3], rtol=1e-3)
    assert (np.abs(d["location"] - 5) < [1e-5, 1e-3, 1]).all()
    assert len(d["elbo"]) < 60 and post.warnings == ()


# -- other targets ---------------------------------------------------------------------------


def best_normal(a, b):
    """Mean and sd of the normal of largest ELBO for the logit of a `Beta(a, b)`, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()

    def loss(at):
        x = at[0] + np.exp(at[1]) * nodes
        log_p = a * x - (a + b) * np.logaddexp(0, x) - betaln(a, b)
        return -(weights @ log_p) - at[1]

    found = minimize(loss, [0.0, 0.0], method="BFGS", options={"gtol": 1e-9}).x
    return found[0], np.exp(found[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{}, {"stochastic": True, "num_draws": 32}])
def test_a_beta_posterior(method, settings):
    alg = gaussian_vi(method=method, num_samples=4000, **settings)
    post = alg(coin).posterior(KEY, 10, given={"heads": 7})
    mean, sd = best_normal(9, 6)
    np.testing.assert_allclose(post.diagnostics["location"], [mean], atol=3e-3)
    np.testing.assert_allclose(post.diagnostics["scale_tril"], [[sd]], rtol=5e-3)
    p = post["p"][0].astype(float)
    expected = expit(mean + sd * np.random.default_rng(0).normal(size=10**6)).mean()
    assert abs(p.mean() - expected) < SE * 0.13 / np.sqrt(4000) + 1e-3
    choose = gammaln(11) - gammaln(8) - gammaln(4)
    log_evidence = choose + betaln(9, 6) - betaln(2, 3)
    error = SE * post.diagnostics["log_evidence_se"]
    assert abs(post.log_evidence - log_evidence) < error < 0.02


def test_importance_corrects_the_fit():
    fit = gaussian_vi()(coin).posterior(KEY, 10, given={"heads": 7})
    alg = ab.importance(proposal=fit.as_model(num_components=64), num_samples=4000)
    post = alg(coin).posterior(KEY, 10, given={"heads": 7})
    ess = post.diagnostics["ess"]
    assert ess > 3000
    sd = np.sqrt(0.6 * 0.4 / 16)
    assert abs(post.mean("p") - 0.6) < SE * sd / np.sqrt(ess)
    assert abs(post.std("p") - sd) < SE * sd / np.sqrt(2 * ess) * 1.1


@pytest.mark.parametrize("method", METHODS)
def test_the_elbo_never_falls(method):
    """From a bad start: the second normal covers counts of exp(10)."""
    post = gaussian_vi(method=method, init_scale=3.0)(counts).posterior(KEY, X, given={"y": Y})
    elbo = post.diagnostics["elbo"]
    assert elbo[0] < -1e4 and elbo[-1] > -80
    assert (np.diff(elbo) > -1e-4 * (1 + np.abs(elbo[1:]))).all()
    assert post.warnings == () and post.diagnostics["ess"] > 900
    assert post.diagnostics["num_gradients"] % 256 == 0


def test_both_methods_and_fresh_points_find_one_optimum():
    settings = [{"method": m} for m in METHODS] + [{"stochastic": True}]
    fits = [
        gaussian_vi(**s)(counts).posterior(KEY, X, given={"y": Y}).diagnostics for s in settings
    ]
    sd = np.sqrt(np.diag(fits[0]["scale_tril"] @ fits[0]["scale_tril"].T))
    for fit in fits[1:]:
        assert (np.abs(fit["location"] - fits[0]["location"]) < 0.03 * sd).all()
        whitened = np.linalg.solve(fits[0]["scale_tril"], fit["scale_tril"])
        np.testing.assert_allclose(whitened, np.eye(4), atol=0.04)


def test_few_fresh_points_do():
    alg = gaussian_vi(stochastic=True, num_draws=2)
    post = alg(counts).posterior(KEY, X, given={"y": Y})
    assert post.diagnostics["ess"] > 800 and post.diagnostics["num_gradients"] < 3000


# -- warnings --------------------------------------------------------------------------------


def test_a_funnel_warns_with_a_remedy():
    @ab.model
    def funnel():
        v = ab.sample("v", dist.Normal(0, 3))
        ab.sample("x", dist.Normal(0, jnp.exp(v / 2)).expand([4]))

    with pytest.warns(
        ab.AbduceWarning, match=r"Pareto k.*ab\.importance\(proposal=post\.as_model\(\)\).*ab\.nuts"
    ):
        post = gaussian_vi(num_samples=500)(funnel).posterior(KEY)
    assert post.diagnostics["pareto_k"] > 0.7


@pytest.mark.filterwarnings("ignore:ab.gaussian_vi. Pareto k")
def test_too_few_steps_warn():
    alg = gaussian_vi(method="wasserstein", num_steps=2)
    with pytest.warns(ab.AbduceWarning, match=r"after 2 steps.*num_steps.*natural_gradient method"):
        alg(correlated).posterior(KEY)


@pytest.mark.filterwarnings("ignore:ab.gaussian_vi. Pareto k")
@pytest.mark.parametrize("step_size", [3.0, 1e300])
def test_a_fixed_step_that_diverges_warns(step_size):
    alg = gaussian_vi(method="wasserstein", step_size=step_size)
    with pytest.warns(ab.AbduceWarning, match=r"step \d+ with step_size=.*Lower step_size"):
        post = alg(correlated).posterior(KEY)
    assert np.isfinite(post.diagnostics["elbo"]).all()


# -- the protocol ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"method": "wasserstein", "stochastic": True}])
def test_other_data_of_the_same_shapes_compile_nothing(count_compiles, settings):
    model, key = gaussian_vi(num_steps=100, **settings)(groups), jax.random.key(1)
    first = model.posterior(KEY, SCALES, given={"y": DATA})
    again = model.posterior(KEY, SCALES, given={"y": DATA})
    np.testing.assert_array_equal(first["mu"], again["mu"])
    with count_compiles() as compiles:
        other = model.posterior(key, SCALES + 0.5, given={"y": DATA[::-1] + 3})
    assert compiles.names == []
    assert abs(other.mean("mu") - first.mean("mu")) > 0.5


def test_discrete_latents_are_refused():
    @ab.model
    def discrete():
        z = ab.sample("z", dist.Bernoulli(0.5))
        ab.sample("y", dist.Normal(z, 1))

    with pytest.raises(ab.DiscreteLatent, match=r"ab\.gaussian_vi.*\"?z"):
        gaussian_vi()(discrete).posterior(KEY, given={"y": 0.3})


def test_tracing_is_refused():
    model = gaussian_vi()(groups)
    with pytest.raises(ab.InvalidAlgorithm, match=r"ab\.gaussian_vi.*jax\.vmap.*Loop over.*Python"):
        jax.vmap(lambda y: model.posterior(KEY, SCALES, given={"y": y}))(np.stack([DATA, DATA]))


def test_no_start_has_a_density():
    @ab.model
    def impossible():
        ab.sample("x", dist.Normal(0, 1))
        ab.factor("never", -jnp.inf)

    with pytest.raises(ab.InitializationError, match=r"ab\.gaussian_vi.*factor 'never'"):
        gaussian_vi()(impossible).posterior(KEY)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "newton"}, "method must be one of 'natural_gradient', 'wasserstein'.*'newton'"),
        ({"num_draws": 7}, "num_draws must be even.*7"),
        ({"num_draws": 0}, "num_draws must be an int >= 2"),
        ({"num_steps": 0}, "num_steps must be an int >= 1"),
        ({"stochastic": 1}, "stochastic must be True or False, got 1"),
        ({"step_size": -1.0}, "step_size must be a positive number"),
        ({"step_size": 2.0}, "step_size must be a positive number and at most 1 with natural"),
        ({"step_size": "big", "method": "wasserstein"}, "step_size must be a positive number, got"),
        ({"init_scale": np.inf}, "init_scale must be a positive number, got inf"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ab.InvalidAlgorithm, match=message):
        gaussian_vi(**settings)


def test_too_few_fixed_points_for_the_dimension():
    with pytest.raises(ab.InvalidAlgorithm, match=r"num_draws=6.*all 4 directions.*at least 8"):
        gaussian_vi(num_draws=6)(groups).posterior(KEY, SCALES, given={"y": DATA})
