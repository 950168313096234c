"""Learned likelihoods and ratios: exact normalization, exact placement, closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import abduce as ab
import abduce.dist as dist
from abduce.amortized.counts import Counts
from abduce.amortized.likelihood_model import LearnedLikelihood
from abduce.errors import (
    AbduceWarning,
    InvalidAlgorithm,
    InvalidModel,
    MissingData,
    NotFitted,
    UnknownAddress,
)

SMALL = {"width": 32, "context_dim": 16, "depth": 1}


def noisy(key, a, b):
    return a + b * jax.random.normal(key)


@ab.model
def normal(n):
    a = ab.sample("a", dist.Normal(0.0, 1.0))
    b = ab.sample("b", dist.LogNormal(0.0, 0.3))
    jax.vmap(lambda _: ab.sample("y", dist.Simulator(noisy, a, b)))(jnp.arange(n))


@ab.model
def walk(n):
    s = ab.sample("s", dist.LogNormal(0.0, 0.3))

    def step(x, _):
        x = ab.sample("x", dist.Normal(0.8 * x, 1.0))
        ab.sample("y", dist.Simulator(noisy, x, s))
        return x, None

    jax.lax.scan(step, 0.0, None, length=n)


@ab.model
def counts(n):
    rate = ab.sample("rate", dist.Gamma(3.0, 0.5))
    f = lambda key, r: jax.random.poisson(key, r)  # noqa: E731
    jax.vmap(lambda _: ab.sample("y", dist.Simulator(f, rate)))(jnp.arange(n))


@pytest.fixture(scope="module")
def fitted():
    est = ab.nle(normal, 4, observed="y", head="mixture", num_components=3, **SMALL)
    return est.fit(jax.random.key(0), num_steps=600, learning_rate=3e-3, progress_bar=False)


@pytest.fixture(scope="module")
def fitted_counts():
    est = ab.nle(counts, 4, observed="y", num_components=4, **SMALL)
    return est.fit(jax.random.key(0), num_steps=400, learning_rate=3e-3, progress_bar=False)


def shape_only(key, *args):
    return jnp.zeros(())


def law_of(est, *operands):
    """The learned law of one element."""
    return LearnedLikelihood(dist.Simulator(shape_only, *map(jnp.asarray, operands)), est.laws["y"])


log_prob = jax.jit(lambda law, y: law.log_prob(y))


# ---------------------------------------------------------------------- whole numbers


@pytest.mark.parametrize("low", [0, None])
def test_probabilities_of_counts_sum_to_one(low):
    head = Counts(jax.random.key(0), 3, 2, 16, 3, low)
    scale = (jnp.array([0.5, 0.1]), jnp.array([0.3, 0.4]))
    context = jnp.array([0.3, -1.0, 2.0])
    y = jnp.arange(0 if low == 0 else -60, 61, dtype=jnp.float32)
    grid = jnp.stack(jnp.meshgrid(y, y, indexing="ij"), -1).reshape(-1, 2)
    p = np.exp(
        jax.jit(jax.vmap(lambda v: head.log_density(context, v, scale)))(grid), dtype=np.float64
    )
    # What lies beyond 60 has weight below 1e-5 with these scales.
    assert p.sum() == pytest.approx(1, abs=1e-4)
    draws = jax.jit(jax.vmap(lambda k: head.draw(context, k, scale)))(
        jax.random.split(jax.random.key(1), 20_000)
    )
    most = np.argsort(-p)[:20]
    found = np.array([(np.asarray(draws) == np.asarray(grid[i])).all(1).sum() for i in most])
    rest = 20_000 - found.sum()
    expected = 20_000 * np.append(p[most], 1 - p[most].sum())
    # A chi-squared test, false alarm 1e-4.
    chi = np.sum((np.append(found, rest) - expected) ** 2 / expected)
    assert chi < stats.chi2.ppf(1 - 1e-4, 20)


def test_far_counts_keep_their_probability():
    # Far out, positions round to the same float32; their difference must not.
    head = Counts(jax.random.key(0), 1, 1, 8, 1, 0)
    scale = (jnp.array([15.0]), jnp.array([1.0]))
    y = 3e6  # log(1 + y) = 14.9
    score = jax.jit(lambda v: head.log_density(jnp.zeros(1), v[None], scale))
    log_p, near = score(jnp.float32(y)), score(jnp.float32(y + 7))
    slope = jax.jit(jax.grad(score))(jnp.float32(y))
    # The density of the logistic in log(1 + y) has slope of order one, so neighbours agree.
    assert float(near) == pytest.approx(float(log_p), abs=1e-4)
    assert -20 < float(log_p) < -14  # about -log(y): mass spread over e^15 numbers
    assert np.isfinite(float(slope))


# ---------------------------------------------------------------------- learned laws


def test_a_learned_law_is_normalized_and_drawn_from(fitted):
    law = law_of(fitted, 0.5, 1.2)
    y = jnp.linspace(-9, 10, 4001)
    p = np.exp(np.asarray(log_prob(law, y), np.float64))
    assert np.trapezoid(p, y) == pytest.approx(1, abs=1e-3)
    draws = jax.jit(lambda law: law.sample(jax.random.key(0), (4000,)))(law)
    cdf = np.cumsum(p) * (y[1] - y[0])
    # Kolmogorov's distance, false alarm 1e-4.
    gap = np.abs(np.interp(np.sort(draws), y, cdf) - (np.arange(4000) + 0.5) / 4000).max()
    assert gap < stats.kstwo.ppf(1 - 1e-4, 4000) + 1e-3


def test_a_learned_normal_is_near_the_true_one(fitted):
    for a, b in ((0.0, 1.0), (1.0, 0.7), (-1.2, 1.5)):
        law = law_of(fitted, a, b)
        y = jnp.asarray(a + b * np.linspace(-6, 6, 601), jnp.float32)
        true = stats.norm.logpdf(np.asarray(y, np.float64), a, b)
        kl = np.trapezoid(np.exp(true) * (true - np.asarray(log_prob(law, y))), y)
        assert kl < 0.02, (a, b)


def test_learned_counts_are_near_the_true_ones(fitted_counts):
    for rate in (2.0, 6.0, 12.0):
        y = np.arange(60)
        true = stats.poisson.logpmf(y, rate)
        got = np.asarray(log_prob(law_of(fitted_counts, rate), jnp.asarray(y)), np.float64)
        assert np.exp(got).sum() == pytest.approx(1, abs=1e-3)
        assert np.sum(np.exp(true) * (true - got)) < 0.03, rate


def test_positive_values_get_a_positive_law():
    @ab.model
    def sizes(n):
        m = ab.sample("m", dist.Normal(0.0, 1.0))
        f = lambda key, m: jnp.exp(m + 0.5 * jax.random.normal(key))  # noqa: E731
        jax.vmap(lambda _: ab.sample("y", dist.Simulator(f, m)))(jnp.arange(n))

    est = ab.nle(sizes, 4, observed="y", head="mixture", num_components=2, **SMALL)
    est = est.fit(jax.random.key(0), num_steps=300, learning_rate=3e-3, progress_bar=False)
    law = law_of(est, 0.4)
    t = np.linspace(-4, 5, 2001)
    y = np.exp(t)
    p = np.exp(np.asarray(log_prob(law, jnp.asarray(y, jnp.float32)), np.float64))
    assert np.trapezoid(p * y, t) == pytest.approx(1, abs=2e-3)  # dy = y dt
    true = stats.lognorm.logpdf(y, 0.5, scale=np.exp(0.4))
    assert np.trapezoid(np.exp(true) * y * (true - np.log(p)), t) < 0.03
    assert float(log_prob(law, jnp.float32(-1.0))) == -np.inf
    # Every algorithm takes the model: here importance sampling, exact for one latent by quadrature.
    data = jnp.array([1.2, 0.8, 2.0])
    post = ab.importance(num_samples=20_000)(est.learned_model()).posterior(
        jax.random.key(1), 3, given={"y": data}
    )
    grid = jnp.linspace(-5, 5, 2001)
    scores = jax.jit(jax.vmap(
        lambda m: est.learned_model().log_density({"m": m, "y": data}, 3)
    ))(grid)  # fmt: skip
    exact = np.log(np.trapezoid(np.exp(np.asarray(scores, np.float64)), grid))
    # Six standard errors: a false alarm once in 1e9 runs.
    assert abs(post.log_evidence - exact) < 6 * post.diagnostics["log_evidence_se"] + 1e-3


def test_laws_stand_where_the_sites_were(fitted):
    # Under vmap and in a scan, with jit, vmap and grad of it: the sum over elements, each alone.
    model = fitted.learned_model()
    y = jnp.array([0.3, -1.0, 2.0])
    choices = {"a": jnp.float32(0.4), "b": jnp.float32(1.3), "y": y}
    alone = sum(float(log_prob(law_of(fitted, 0.4, 1.3), v)) for v in y)
    prior = stats.norm.logpdf(0.4) + stats.lognorm.logpdf(1.3, 0.3)
    assert float(model.log_density(choices, 3)) == pytest.approx(alone + prior, abs=1e-4)

    other = ab.nle(walk, 3, observed="y", head="mixture", num_components=3, **SMALL)
    other = other.fit(jax.random.key(0), num_steps=2, progress_bar=False)
    chain = other.learned_model()
    x = jnp.array([0.2, 0.5, -0.3])

    @jax.jit
    def score(x, s):
        return chain.log_density({"s": s, "x": x, "y": y}, 3)

    means = 0.8 * np.array([0.0, 0.2, 0.5])
    prior = stats.lognorm.logpdf(0.9, 0.3) + stats.norm.logpdf(np.asarray(x), means).sum()
    alone = sum(float(log_prob(law_of(other, u, 0.9), v)) for u, v in zip(x, y, strict=True))
    assert float(score(x, jnp.float32(0.9))) == pytest.approx(alone + prior, abs=1e-4)
    s = jnp.array([0.9, 1.4], jnp.float32)
    many = jax.jit(jax.vmap(jax.grad(score, 1), (None, 0)))(x, s)
    h = 1e-2
    slope = [(score(x, v + h) - score(x, v - h)) / (2 * h) for v in s]
    np.testing.assert_allclose(many, slope, rtol=2e-2, atol=2e-2)


def test_the_posterior_is_that_of_the_true_likelihood(fitted):
    @ab.model
    def exact(n):
        a = ab.sample("a", dist.Normal(0.0, 1.0))
        b = ab.sample("b", dist.LogNormal(0.0, 0.3))
        jax.vmap(lambda _: ab.sample("y", dist.Normal(a, b)))(jnp.arange(n))

    # Trained with 4 elements, used with 12.
    y = np.random.default_rng(0).normal(0.5, 1.2, size=12)
    sampler = ab.nuts(num_chains=2, num_warmup=300, num_samples=500, progress_bar=False)
    true = sampler(exact).posterior(jax.random.key(1), 12, given={"y": y})
    post = fitted.replace(sampler=sampler)(normal).posterior(
        jax.random.key(2), 12, given={"y": y}
    )
    for site in ("a", "b"):
        sd = float(true[site].std())
        # Sampling errors are near 0.05 sd each; without data the gap would be above one sd.
        assert abs(float(post[site].mean() - true[site].mean())) < 0.4 * sd, site
        assert float(post[site].std()) == pytest.approx(sd, rel=0.3), site
    assert not post.warnings
    far = ab.with_prior(normal, {"a": dist.Normal(30.0, 1.0)})
    with pytest.warns(AbduceWarning, match="outside those of training"):
        fitted.replace(sampler=sampler)(far).posterior(jax.random.key(2), 12, given={"y": y + 30})


@pytest.mark.slow
def test_a_guide_is_fitted_to_the_learned_model(fitted):
    y = np.random.default_rng(0).normal(0.5, 1.2, size=12)
    run = {"given": {"y": y}}
    chains = ab.nuts(num_chains=2, num_warmup=300, num_samples=500, progress_bar=False)
    drawn = fitted.replace(sampler=chains)(normal).posterior(jax.random.key(2), 12, **run)
    guide = ab.vi(guide=ab.guides.full_rank(), num_steps=500, progress_bar=False)
    post = fitted.replace(sampler=guide)(normal).posterior(jax.random.key(3), 12, **run)
    for site in ("a", "b"):
        sd = float(drawn[site].std())
        assert abs(float(post[site].mean() - drawn[site].mean())) < 0.3 * sd, site
        assert float(post[site].std()) == pytest.approx(sd, rel=0.3), site


@pytest.mark.slow
def test_ratios_are_densities_up_to_a_constant_of_the_data():
    est = ab.nre(normal, 4, observed="y", width=32, depth=1)
    est = est.fit(jax.random.key(0), num_steps=600, learning_rate=3e-3, progress_bar=False)
    y = jnp.array([-1.0, 0.2, 1.5])
    points = [(0.0, 1.0), (0.8, 1.0), (-0.8, 1.0), (0.0, 1.5)]
    got = np.array([log_prob(law_of(est, a, b), y) for a, b in points])
    true = np.array([stats.norm.logpdf(np.asarray(y), a, b) for a, b in points])
    # Differences between parameters at the same data.
    np.testing.assert_allclose(got - got[0], true - true[0], atol=0.25)
    balanced = ab.nre(normal, 4, observed="y", width=16, depth=1, balance=100.0, num_contrast=1)
    balanced = balanced.fit(jax.random.key(0), num_steps=5, progress_bar=False)
    assert np.isfinite(balanced.history["loss"]).all()


def test_a_loaded_estimator_scores_the_same(fitted, tmp_path):
    fitted.save(tmp_path / "e")
    loaded = ab.load(tmp_path / "e")
    choices = {"a": 0.4, "b": 1.3, "y": jnp.array([0.3, -1.0])}
    a = fitted.learned_model().log_density(choices, 2)
    assert float(loaded.learned_model(normal).log_density(choices, 2)) == float(a)
    assert loaded.settings == fitted.settings
    with pytest.raises(NotFitted, match="learned_model"):
        loaded.learned_model()


@pytest.mark.slow
def test_a_particle_filter_runs_through_learned_emissions():
    est = ab.nle(walk, 10, observed="y", head="mixture", num_components=3, width=64)
    est = est.fit(jax.random.key(0), num_steps=3000, learning_rate=3e-3, progress_bar=False)
    y = np.array([0.5, 1.0, -0.2, -1.5, 0.3, 0.9, 2.0, 1.2, 0.1, -0.4])
    fixed = ab.condition(est.learned_model(), {"s": jnp.float32(1.0)})
    post = ab.smc(num_particles=4000)(fixed).posterior(jax.random.key(1), 10, given={"y": y})
    mean, var, total = 0.0, 0.0, 0.0
    for v in y:  # Kalman's filter
        mean, var = 0.8 * mean, 0.64 * var + 1.0
        total += stats.norm.logpdf(v, mean, np.sqrt(var + 1.0))
        gain = var / (var + 1.0)
        mean, var = mean + gain * (v - mean), (1 - gain) * var
    s = stats.lognorm.logpdf(1.0, 0.3)
    # Ten elements at 0.02 nats of misfit each, and 0.03 of the filter's own error.
    assert float(post.log_evidence) == pytest.approx(total + s, abs=0.3)


def test_messages():
    with pytest.raises(UnknownAddress, match="'z' matches no site"):
        ab.nle(normal, 4, observed="z")
    with pytest.raises(InvalidAlgorithm, match="head='x' is not one of"):
        ab.nle(normal, 4, observed="y", head="x")
    with pytest.raises(InvalidAlgorithm, match="sampler= is an algorithm"):
        ab.nre(normal, 4, observed="y", sampler="nuts")
    with pytest.raises(InvalidAlgorithm, match="no setting 'context_dim', and `normal` no such"):
        ab.nre(normal, 4, observed="y", context_dim=3)
    with pytest.raises(NotFitted, match="is not trained"):
        ab.nle(normal, 4, observed="y")(normal)

    @ab.model
    def unrelated():
        ab.sample("a", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Simulator(noisy, 0.0, 1.0))

    with pytest.raises(InvalidModel, match="depends on nothing that is drawn"):
        ab.nle(unrelated, observed="y").fit(jax.random.key(0), progress_bar=False)


def test_another_site_is_refused(fitted):
    @ab.model
    def pairs(n):
        a = ab.sample("a", dist.Normal(0.0, 1.0))
        b = ab.sample("b", dist.LogNormal(0.0, 0.3))
        f = lambda key, a, b: a + b * jax.random.normal(key, (2,))  # noqa: E731
        jax.vmap(lambda _: ab.sample("y", dist.Simulator(f, a, b)))(jnp.arange(n))

    with pytest.raises(InvalidModel, match=r"elements of shape \(\).*\(2,\)"):
        fitted.learned_model(pairs).simulate(jax.random.key(0), 3)
    with pytest.raises(MissingData, match="lacks 'y'"):
        fitted(normal).posterior(jax.random.key(0), 3, given={"a": 0.3})


def test_a_loaded_estimator_gets_its_model_back(fitted, tmp_path):
    fitted.save(tmp_path / "e")
    loaded = ab.load(tmp_path / "e")
    with pytest.raises(NotFitted, match="with_model"):
        loaded.check(jax.random.key(0))
    again = loaded.with_model(normal, 4)
    rows = again.simulate(jax.random.key(1), 5)
    assert {a: x.shape for a, x in rows.items()} == {"a": (5,), "b": (5,), "y": (5, 4)}

    @ab.model
    def other(n):
        a = ab.sample("a", dist.Normal(0.0, 1.0))
        jax.vmap(lambda _: ab.sample("y", dist.Simulator(noisy, a, 2.0)))(jnp.arange(n))

    with pytest.raises(InvalidModel, match="learned for elements"):
        loaded.with_model(other, 4)
