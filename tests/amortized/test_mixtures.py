"""Mixtures of normals: densities, algebra and fits against NumPy, quadrature and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

import abduce as ab
import abduce.dist as dist
from abduce.amortized.dt_coordinates import MixtureLaw, MixtureModel, arrange
from abduce.amortized.dt_priors import fit_laws, prior_of, read_laws
from abduce.amortized.mixture_fits import fit_density, fit_draws, quadrature
from abduce.amortized.mixtures import GaussianMixture, from_numbers, normal, split, to_numbers
from abduce.inference.kernel_density import Support


def three(d=3, k=3, seed=0):
    """A mixture with well separated but overlapping components."""
    rng = np.random.default_rng(seed)
    trils = np.tril(0.4 * rng.normal(size=(k, d, d)))
    i = np.arange(d)
    trils[:, i, i] = 0.5 + rng.uniform(size=(k, d))
    weights = rng.dirichlet(np.ones(k))
    parts = (np.log(weights), rng.normal(size=(k, d)), trils)
    return GaussianMixture(*(jnp.asarray(x, jnp.float32) for x in parts))


def reference(m):
    """The density by SciPy."""
    w = np.exp(np.asarray(m.log_weights, np.float64))
    laws = [
        multivariate_normal(np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(m.means, m.covariances, strict=True)
    ]
    return lambda u: np.log(sum(a * law.pdf(u) for a, law in zip(w, laws, strict=True)))


@pytest.mark.parametrize("d", [1, 2, 5, 9])
def test_density_is_that_of_scipy(d):
    m = three(d)
    u = np.random.default_rng(1).normal(size=(6, d))
    got = jax.jit(jax.vmap(m.log_prob))(jnp.asarray(u, jnp.float32))
    np.testing.assert_allclose(got, reference(m)(u), rtol=2e-4, atol=2e-4)


def test_moments_and_draws():
    m = three(2)
    x = np.asarray(jax.jit(lambda k: m.sample(k, 40_000))(jax.random.key(0)), np.float64)
    se = x.std(0) / 200
    assert (np.abs(x.mean(0) - m.mean) < 5 * se).all()  # 1e-6 each
    np.testing.assert_allclose(np.cov(x.T), m.covariance, atol=0.05)
    assert m.sample(jax.random.key(0)).shape == (2,)


def test_push_marginal_and_condition_agree_with_the_joint_density():
    m = three(3)
    u = jnp.array([0.3, -0.4, 0.8])
    marginal, rest = m.marginal([0, 1]), m.condition(2, u[:2])
    np.testing.assert_allclose(
        marginal.log_prob(u[:2]) + rest.log_prob(u[2:]), m.log_prob(u), rtol=1e-4
    )
    a = jnp.array([[2.0, 0.3, 0.0], [0.0, 1.0, 0.5], [0.1, 0.0, 0.7]])
    pushed = m.push(a, jnp.array([1.0, 0.0, -1.0]))
    at = a @ u + jnp.array([1.0, 0.0, -1.0])
    np.testing.assert_allclose(
        pushed.log_prob(at), m.log_prob(u) - jnp.linalg.slogdet(a)[1], rtol=1e-4
    )
    noisy = m.push(a, 0.0, 0.5 * jnp.eye(3))
    np.testing.assert_allclose(noisy.mean, a @ m.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        noisy.covariance, a @ m.covariance @ a.T + 0.5 * jnp.eye(3), rtol=1e-3, atol=1e-4
    )
    scaled = m.scaled(jnp.array([1.0, 2.0, 0.5]), jnp.ones(3))
    np.testing.assert_allclose(
        scaled.log_prob(u * jnp.array([1.0, 2.0, 0.5]) + 1), m.log_prob(u), rtol=1e-4
    )


def test_distribution_function():
    m = three(1)
    x = jnp.linspace(-8, 8, 4001)
    p = jnp.exp(jax.vmap(lambda v: m.log_prob(v[None]))(x))
    at = jnp.searchsorted(x, 0.7)
    np.testing.assert_allclose(m.cdf(x[at]), jnp.sum(p[:at]) * 0.004, atol=2e-3)
    with pytest.raises(ab.AbduceError, match=r"3 dimensions.*marginal"):
        three(3).cdf(0.0)


def test_numbers_go_there_and_back():
    m = three(3)
    back = from_numbers(to_numbers(m), 3)
    np.testing.assert_allclose(back.trils, m.trils, rtol=1e-6)
    np.testing.assert_allclose(back.log_weights, m.log_weights, rtol=1e-5)


@pytest.mark.parametrize("num", [2, 3, 5])
def test_splitting_hardly_changes_the_law(num):
    one = normal(jnp.array([1.0, -2.0]), jnp.array([[2.0, 0.5], [0.5, 0.3]]))
    more = jax.jit(split, static_argnums=1)(one, num)
    assert more.num_components == num
    assert len(np.unique(np.asarray(more.means[:, 0]))) == num  # tokens have to differ
    np.testing.assert_allclose(more.mean, one.mean, atol=1e-5)
    np.testing.assert_allclose(more.covariance, one.covariance, rtol=1e-4)

    @jax.jit
    def divergence(key):
        u = one.sample(key, 2000)
        return jnp.mean(jax.vmap(one.log_prob)(u) - jax.vmap(more.log_prob)(u))

    assert abs(float(divergence(jax.random.key(0)))) < 1e-3


def test_quadrature_finds_mass_far_away():
    find = jax.jit(lambda m, s, c, r: quadrature(lambda u: -0.5 * ((u - m) / s) ** 2 + 7.0, c, r))
    x, w, log_p = find(300.0, 1.0, 250.0, 100.0)
    np.testing.assert_allclose(jnp.sum(w * x), 300.0, rtol=1e-4)
    np.testing.assert_allclose(jnp.sum(w * (x - 300) ** 2), 1.0, rtol=0.01)
    x, w, log_p = find(0.0, 1.0, 3.0, 0.02)
    np.testing.assert_allclose(jnp.sum(w * x**2), 1.0, rtol=5e-3)
    exact = -0.5 * x**2 - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(log_p, exact, atol=1e-2)


def inverse_gamma(a, b):
    d = dist.InverseGamma(a, b)
    return lambda u: d.log_prob(jnp.exp(u)) + u


def test_log_inverse_gamma_is_fitted_within_a_thousandth_of_a_nat():
    """The reported divergence is that of an independent quadrature in NumPy."""
    fit = jax.jit(jax.vmap(lambda a, b: fit_density(inverse_gamma(a, b), 0.0, 1.0, 5)))
    hyper = np.array([[2.0, 2.0], [10.0, 3.0], [0.5, 1.0], [100.0, 5.0]])
    mixtures, kl = fit(*hyper.T)
    from scipy.stats import invgamma

    for i, (a, b) in enumerate(hyper):
        u = np.linspace(-12, 60, 200_001)
        log_p = invgamma.logpdf(np.exp(u), a, scale=b) + u
        m = jax.tree.map(lambda x, i=i: np.asarray(x[i], np.float64), mixtures)
        z = (u[:, None] - m.means[:, 0]) / m.trils[:, 0, 0]
        q = np.exp(m.log_weights - 0.5 * z**2) / m.trils[:, 0, 0] / np.sqrt(2 * np.pi)
        p = np.exp(log_p)
        with np.errstate(divide="ignore", invalid="ignore"):
            exact = np.nansum(np.where(p > 1e-30, p * (log_p - np.log(q.sum(1))), 0.0))
        exact *= u[1] - u[0]
        assert exact < 1.5e-3
        assert abs(float(kl[i]) - exact) < 3e-4


def test_one_component_has_the_moments_of_the_law():
    mixture, kl = jax.jit(lambda: fit_density(inverse_gamma(3.0, 2.0), 0.0, 1.0, 1))()
    from scipy.special import digamma, polygamma

    np.testing.assert_allclose(mixture.mean[0], np.log(2.0) - digamma(3.0), atol=2e-3)
    np.testing.assert_allclose(mixture.covariance[0, 0], polygamma(1, 3.0), rtol=1e-2)
    entropy = np.log(2.0) + 3 + 0.6931472 - 4 * digamma(3.0) - (np.log(2.0) - digamma(3.0))
    normal_part = 0.5 * np.log(2 * np.pi * np.e * polygamma(1, 3.0))
    assert abs(float(kl) - (normal_part - entropy)) < 2e-3


def test_draws_of_a_mixture_are_fitted_by_it():
    m = GaussianMixture(
        jnp.log(jnp.array([0.3, 0.7])),
        jnp.array([[3.0, -2.0], [0.0, 0.0]]),
        jnp.array([[[0.3, 0.0], [0.0, 0.3]], [[1.0, 0.0], [0.8, 0.5]]]),
    )
    fitted = jax.jit(fit_draws, static_argnums=1)(m.sample(jax.random.key(0), 4000), 2)
    fresh = m.sample(jax.random.key(1), 4000)
    gap = jax.vmap(m.log_prob)(fresh) - jax.vmap(fitted.log_prob)(fresh)
    # 11 parameters: their expected cost is 11 / (2 * 4000) = 0.0014 nats
    assert float(gap.mean()) < 0.01
    np.testing.assert_allclose(np.sort(np.exp(fitted.log_weights)), [0.3, 0.7], atol=0.04)


@pytest.mark.parametrize(
    "law, coordinates",
    [
        (dist.Normal(1.0, 2.0), lambda u: dist.Normal(1.0, 2.0).log_prob(u)),
        (dist.LogNormal(0.5, 0.3), lambda u: dist.Normal(0.5, 0.3).log_prob(u)),
        (
            dist.MixtureSameFamily(
                dist.Categorical(probs=jnp.array([0.2, 0.8])),
                dist.Normal(jnp.array([-1.0, 1.0]), jnp.array([0.5, 0.2])),
            ),
            None,
        ),
    ],
    ids=["normal", "log-normal", "mixture"],
)
def test_mixtures_are_read_as_they_stand(law, coordinates):
    at = arrange([("x", (), law.support)])
    fit = fit_laws({"x": law}, at, 1, 100)
    assert float(fit.kl) == 0.0
    for u in (-0.3, 0.4, 1.1):
        exact = law.log_prob(u) if coordinates is None else coordinates(u)
        np.testing.assert_allclose(fit.mixture.log_prob(jnp.array([u])), exact, atol=2e-3)


def test_independent_normals_multiply_and_dependent_priors_are_fitted_jointly():
    @ab.model
    def independent():
        ab.sample("a", dist.Normal(1.0, 2.0))
        ab.sample("b", dist.MultivariateNormal(jnp.zeros(2), 0.5 * jnp.eye(2)))

    @ab.model
    def chain():
        a = ab.sample("a", dist.Normal(1.0, 2.0))
        ab.sample("b", dist.Normal(a, 0.5).expand([2]).to_event(1))

    at = arrange([("a", (), dist.constraints.real), ("b", (2,), dist.constraints.real_vector)])
    program, arguments = independent._stage((), {})
    exact = jax.jit(lambda a: prior_of(program, a, at, 1, 500))(arguments)
    np.testing.assert_allclose(exact.mixture.covariance, np.diag([4.0, 0.5, 0.5]), rtol=1e-5)
    program, arguments = chain._stage((), {})
    laws = read_laws(program, arguments, ("a", "b"), jax.random.key(0))
    assert laws["a"] is not None and laws["b"] is None
    fitted = jax.jit(lambda a: prior_of(program, a, at, 1, 4000))(arguments)
    expected = np.array([[4.0, 4.0, 4.0], [4.0, 4.25, 4.0], [4.0, 4.0, 4.25]])
    np.testing.assert_allclose(fitted.mixture.covariance, expected, atol=0.5)
    assert abs(float(fitted.kl)) < 4 * float(fitted.kl_se) + 0.01  # 9 parameters of 4000 draws


def test_a_mixture_is_a_model_with_exact_conditionals():
    m = three(2)
    at = arrange([("a", (), dist.constraints.real), ("b", (), dist.constraints.positive)])
    model = MixtureModel(m, at)
    got = model.log_density({"a": jnp.array(0.3), "b": jnp.array(1.7)})
    u = jnp.array([0.3, np.log(1.7)])
    np.testing.assert_allclose(got, m.log_prob(u) - np.log(1.7), rtol=1e-4)
    draws = jax.vmap(lambda k: model.simulate(k).choices)(jax.random.split(jax.random.key(0), 4000))
    log_b = np.log(np.asarray(draws["b"]))
    assert abs(log_b.mean() - m.mean[1]) < 5 * log_b.std() / np.sqrt(4000)


def test_a_law_of_one_address_integrates_to_one():
    law = MixtureLaw(three(1), Support(dist.constraints.interval(-1.0, 2.0)), ())
    x = jnp.linspace(-0.9999, 1.9999, 20_001)
    total = jnp.sum(jnp.exp(law.log_prob(x))) * 3 / 20_000
    np.testing.assert_allclose(total, 1.0, atol=2e-3)
    assert law.sample(jax.random.key(0), (5, 2)).shape == (5, 2)
