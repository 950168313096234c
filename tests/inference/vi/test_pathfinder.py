"""Pathfinder: the algebra against dense BFGS, posteriors against closed forms.

Statistical checks are to 4.5 standard errors, a false alarm in 1.5e5 comparisons; keys are fixed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import SE
from gaussian import DATA, SCALES, exact, groups
from scipy.special import betaln, gammaln
from scipy.stats import multivariate_normal

import abduce as ab
import abduce.dist as dist
from abduce.inference.vi.path_normals import local_normals, log_density, points_of
from abduce.inference.vi.pathfinder import pathfinder

KEY = jax.random.key(11)


@ab.model
def coin(n):
    p = ab.sample("p", dist.Beta(2, 3))
    ab.sample("heads", dist.Binomial(n, probs=p))


def assert_mean(post, address, values, mean, sd):
    """A weighted mean, to `SE` standard errors at the effective sample size."""
    weights = np.exp(np.asarray(post.log_weights[0], float))
    ess = weights.sum() ** 2 / (weights**2).sum()
    found = (weights @ values) / weights.sum()
    assert abs(found - mean) < SE * sd / np.sqrt(ess), (address, found, mean)


# -- the algebra -----------------------------------------------------------------------------


def dense_inverse_hessians(points, gradients, history_size):
    """BFGS by its product form, from the diagonal of scaled direct BFGS updates."""
    dim, alpha, pairs = len(points[0]), np.ones(len(points[0])), []
    yield np.eye(dim)
    for i in range(1, len(points)):
        s, z = points[i] - points[i - 1], gradients[i - 1] - gradients[i]
        if s @ z > 1e-12 * z @ z:
            b = np.diag(1 / alpha) * (z @ np.diag(alpha) @ z) / (s @ z)
            b = b - b @ np.outer(s, s) @ b / (s @ b @ s) + np.outer(z, z) / (s @ z)
            alpha = 1 / np.diag(b)
            pairs.append((s, z))
        h = np.diag(alpha)
        for s, z in pairs[-history_size:]:
            v = np.eye(dim) - np.outer(z, s) / (s @ z)
            h = v.T @ h @ v + np.outer(s, s) / (s @ z)
        yield h


@pytest.mark.parametrize("dim, history_size", [(1, 6), (3, 6), (20, 4), (5, 1)])
def test_normals_are_those_of_dense_bfgs(dim, history_size):
    rng = np.random.default_rng(dim)
    root = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    precision = root @ root.T + 0.1 * np.eye(dim)
    points = [rng.normal(size=dim) for _ in range(10)]
    gradients = [-precision @ q - 0.1 * q**3 for q in points]
    gradients[4] = gradients[3] + 0.1 * (points[4] - points[3])  # curves upwards: to be skipped
    found = list(local_normals(points, gradients, history_size))
    assert [i for i, _ in found] == list(range(10))
    expected = dense_inverse_hessians(points, gradients, history_size)
    u = rng.normal(size=(4, dim))
    for (i, normal), h in zip(found, expected, strict=True):
        centre = points_of(normal, np.zeros((1, dim)))
        cov = (points_of(normal, np.eye(dim)) - centre).T
        np.testing.assert_allclose(cov @ cov.T, h, rtol=1e-7, atol=1e-9 * np.abs(h).max())
        np.testing.assert_allclose(centre[0], points[i] + h @ gradients[i], rtol=1e-7, atol=1e-7)
        q = points_of(normal, u)
        reference = multivariate_normal(centre[0], (h + h.T) / 2).logpdf(q)
        np.testing.assert_allclose(log_density(normal, q), reference, rtol=1e-7, atol=1e-6)


# -- closed forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_paths", [1, 4])
def test_a_gaussian_posterior(num_paths):
    alg = pathfinder(num_paths=num_paths, num_samples=3001)
    post = alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    truth, d = exact(), post.diagnostics
    assert post.warnings == () and post.num_draws == 3001 and post.algorithm == "pathfinder"
    assert d["elbo"].shape == d["num_steps"].shape == d["num_gradients"].shape == (num_paths,)
    assert (d["num_gradients"] > d["num_steps"]).all() and (d["num_steps"] >= 4).all()
    assert d["ess"] > 0.9 * 3001
    assert abs(post.log_evidence - truth.log_evidence) < SE * d["log_evidence_se"] + 1e-5
    # 25 draws for each ELBO, of which it has the largest
    assert (np.abs(d["elbo"] - truth.log_evidence) < 0.5).all()
    draws = np.concatenate([post.draws["mu"][0][:, None], post.draws["theta"][0]], 1).astype(float)
    for i in range(4):
        assert_mean(post, i, draws[:, i], truth.mean[i], truth.sd[i])
        for j in range(i + 1):
            product = (draws[:, i] - truth.mean[i]) * (draws[:, j] - truth.mean[j])
            sd = np.sqrt(truth.cov[i, i] * truth.cov[j, j] + truth.cov[i, j] ** 2)
            assert_mean(post, (i, j), product, truth.cov[i, j], sd)
    effect = post.draws["theta"] - post.draws["mu"][..., None]
    np.testing.assert_allclose(post.draws["effect"], effect, atol=1e-5)


def test_one_path_alone_finds_a_gaussian_exactly(x64):
    """In two dimensions L-BFGS learns the Hessian; draws need no weights then."""
    mean, cov = np.array([1.0, -2.0]), np.array([[2.0, 0.9], [0.9, 0.5]])

    @ab.model
    def gaussian():
        ab.sample("x", dist.MultivariateNormal(jnp.asarray(mean), jnp.asarray(cov)))

    alg = pathfinder(num_paths=1, num_samples=4000, importance=False)
    post = alg(gaussian).posterior(KEY)
    d = post.diagnostics
    assert post.log_weights is None and post.log_evidence is None
    assert d["elbo"][0] == pytest.approx(0, abs=1e-3) and d["ess"] > 3990
    draws = post["x"][0]
    sd = np.sqrt(np.diag(cov))
    assert (np.abs(draws.mean(0) - mean) < SE * sd / np.sqrt(4000) + 1e-3).all()
    error = np.sqrt((np.outer(sd, sd) ** 2 + cov**2) / 4000)
    assert (np.abs(np.cov(draws.T) - cov) < SE * error + 1e-3).all()


@pytest.mark.parametrize("wide", [False, True])
def test_a_beta_posterior(wide):
    with jax.enable_x64(wide):
        post = pathfinder(num_samples=4000)(coin).posterior(KEY, 10, given={"heads": 7})
    assert post.draws["p"].dtype == (np.float64 if wide else np.float32)
    mean, sd = 0.6, np.sqrt(0.6 * 0.4 / 16)
    p = post.draws["p"][0].astype(float)
    assert_mean(post, "p", p, mean, sd)
    fourth = 3 * sd**4 * 1.2  # the fourth central moment of a Beta(9, 6) is below
    assert_mean(post, "variance", (p - mean) ** 2, sd**2, np.sqrt(fourth - sd**4))
    choose = gammaln(11) - gammaln(8) - gammaln(4)
    log_evidence = choose + betaln(9, 6) - betaln(2, 3)
    error = SE * post.diagnostics["log_evidence_se"]
    assert abs(post.log_evidence - log_evidence) < error < 0.02


def test_modes_count_by_their_mass_not_by_the_paths_that_find_them():
    """Weights by each path's own normal would give the left mode the share of its paths."""

    @ab.model
    def bimodal():
        ab.sample(
            "x",
            dist.MixtureSameFamily(
                dist.Categorical(jnp.array([0.3, 0.7])),
                dist.Normal(jnp.array([-4.0, 4.0]), jnp.array([0.5, 1.0])),
            ),
        )

    starts = {"x": np.array([-5.0, -4.5, -3.5, 5.0], np.float32)}
    post = pathfinder(num_samples=4000, init=starts)(bimodal).posterior(KEY)
    assert abs(post.log_evidence) < SE * post.diagnostics["log_evidence_se"] < 0.1
    x = post.draws["x"][0]
    assert 0.7 < (x < 0).mean() < 0.8
    assert_mean(post, "x", (x < 0).astype(float), 0.3, np.sqrt(0.3 * 0.7))


# -- hard cases ------------------------------------------------------------------------------


def test_normals_that_reach_beyond_the_support_are_weighted():
    @ab.model
    def half():
        x = ab.sample("x", dist.Normal(0, 1))
        ab.factor("positive", jnp.where(x > 0, 0.0, -jnp.inf))

    post = pathfinder(num_samples=4000, init={"x": np.float32(1.0)})(half).posterior(KEY)
    assert (post.diagnostics["elbo"] == -np.inf).all()
    assert abs(post.log_evidence - np.log(0.5)) < SE * post.diagnostics["log_evidence_se"]
    sd = np.sqrt(1 - 2 / np.pi)
    assert_mean(post, "x", post.draws["x"][0].astype(float), np.sqrt(2 / np.pi), sd)


def test_a_start_at_the_mode():
    @ab.model
    def narrow():
        ab.sample("x", dist.Normal(0, jnp.array([0.1, 10.0])).to_event(1))

    init = {"x": np.zeros(2, np.float32)}
    post = pathfinder(num_samples=2000, init=init)(narrow).posterior(KEY)
    assert (post.diagnostics["num_steps"] > 0).all() and post.diagnostics["ess"] > 1900
    x = post.draws["x"][0].astype(float)
    for i, sd in enumerate((0.1, 10.0)):
        assert_mean(post, i, x[:, i] ** 2, sd**2, np.sqrt(2) * sd**2)


def test_wide_directions_are_not_lost_in_rounding():
    """Vague priors under data: over them the density changes less than its last digit."""

    @ab.model
    def vague():
        a = ab.sample("a", dist.Normal(0, 100))
        b = ab.sample("b", dist.Normal(0, 100))
        ab.sample("y", dist.Normal(a + b, 3).expand([20]).to_event(1))

    y = np.linspace(40, 60, 20, dtype=np.float32)
    post = pathfinder(num_samples=2000)(vague).posterior(KEY, given={"y": y})
    log_evidence = multivariate_normal(np.zeros(20), 9 * np.eye(20) + 2e4).logpdf(y)
    assert abs(post.log_evidence - log_evidence) < SE * post.diagnostics["log_evidence_se"] < 0.2
    a, b = post.draws["a"][0].astype(float), post.draws["b"][0].astype(float)
    sd = np.sqrt(2e4)  # of a - b, which the data say nothing about
    assert_mean(post, "a - b", a - b, 0.0, sd)
    assert_mean(post, "variance", (a - b) ** 2, sd**2, np.sqrt(2) * sd**2)


def test_no_normal_has_a_draw_with_a_density():
    @ab.model
    def needle():
        x = ab.sample("x", dist.Normal(0, 1).expand([3]).to_event(1))
        ab.factor("near", jnp.where(jnp.abs(x).max() < 1e-6, 0.0, -jnp.inf))

    with pytest.raises(ab.Degenerate, match=r"along 2 paths.*init=.*ab\.reparam.*ab\.nuts"):
        pathfinder(num_paths=2, init={"x": np.zeros(3, np.float32)})(needle).posterior(KEY)


def test_no_start_has_a_density():
    @ab.model
    def impossible():
        ab.sample("x", dist.Normal(0, 1))
        ab.factor("never", -jnp.inf)

    with pytest.raises(ab.InitializationError, match=r"ab\.pathfinder.*factor 'never'"):
        pathfinder()(impossible).posterior(KEY)


def test_a_funnel_warns_with_a_remedy():
    @ab.model
    def funnel():
        v = ab.sample("v", dist.Normal(0, 3))
        ab.sample("x", dist.Normal(0, jnp.exp(v / 2)).expand([4]))

    with pytest.warns(ab.AbduceWarning, match=r"ab\.pathfinder: Pareto k.*ab\.nuts\(init=post\)"):
        post = pathfinder(num_samples=500)(funnel).posterior(KEY)
    assert post.diagnostics["pareto_k"] > 0.7 and len(post.warnings) == 1


@pytest.mark.filterwarnings("ignore:ab.pathfinder. Pareto k")
def test_a_path_that_is_cut_warns():
    with pytest.warns(ab.AbduceWarning, match=r"still rose after 2 steps. Raise max_steps"):
        pathfinder(max_steps=2)(groups).posterior(KEY, SCALES, given={"y": DATA + 1000})


# -- the protocol ----------------------------------------------------------------------------


def test_other_data_of_the_same_shapes_compile_nothing(count_compiles):
    model, key = pathfinder()(groups), jax.random.key(1)
    first = model.posterior(KEY, SCALES, given={"y": DATA})
    again = model.posterior(KEY, SCALES, given={"y": DATA})
    np.testing.assert_array_equal(first.draws["mu"], again.draws["mu"])
    with count_compiles() as compiles:
        other = model.posterior(key, SCALES + 0.5, given={"y": DATA[::-1] + 3})
    assert compiles.names == []
    assert abs(other.mean("mu") - first.mean("mu")) > 0.5


def test_a_posterior_gives_starting_points():
    post = pathfinder(num_samples=200)(groups).posterior(KEY, SCALES, given={"y": DATA})
    later = pathfinder(init=post)(groups).posterior(KEY, SCALES, given={"y": DATA})
    assert later.diagnostics["ess"] > 900


def test_discrete_latents_are_refused():
    @ab.model
    def discrete():
        z = ab.sample("z", dist.Bernoulli(0.5))
        ab.sample("y", dist.Normal(z, 1))

    with pytest.raises(ab.DiscreteLatent, match=r"ab\.pathfinder.*\"?z"):
        pathfinder()(discrete).posterior(KEY, given={"y": 0.3})


def test_tracing_is_refused():
    model = pathfinder()(groups)
    with pytest.raises(ab.InvalidAlgorithm, match=r"ab\.pathfinder.*jax\.vmap.*Loop over.*Python"):
        jax.vmap(lambda y: model.posterior(KEY, SCALES, given={"y": y}))(np.stack([DATA, DATA]))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_paths": 0}, "num_paths must be an int >= 1, got 0"),
        ({"num_elbo_draws": 1.5}, "num_elbo_draws must be an int >= 1, got 1.5"),
        ({"history_size": -1}, "history_size must be an int >= 1"),
        ({"importance": "yes"}, "importance must be True or False, got 'yes'"),
        ({"num_path": 3}, "no setting 'num_path'.*Did you mean \"num_paths\""),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ab.InvalidAlgorithm, match=message):
        pathfinder(**settings)
