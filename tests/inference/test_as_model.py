"""`post.as_model()`: moments, normalization, and its uses as prior and proposal.

Statistical comparisons are to 4.5 standard errors (a false alarm in 1.5e5), with fixed keys.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist

SE = 4.5


@ab.model
def line(x):
    """Conjugate: intercept and slope, known noise."""
    w = ab.sample("w", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    ab.sample("y", dist.Normal(w[0] + w[1] * x, 1.0))


def exact_line(x, y):
    design = np.stack([np.ones_like(x), x], 1).astype(float)
    cov = np.linalg.inv(np.eye(2) / 4 + design.T @ design)
    total = np.eye(len(x)) + 4 * design @ design.T
    log_z = -0.5 * (len(x) * np.log(2 * np.pi) + np.linalg.slogdet(total)[1])
    return cov @ design.T @ y, cov, log_z - 0.5 * y @ np.linalg.solve(total, y)


rng = np.random.default_rng(0)
X = rng.uniform(0, 3, 24).astype(np.float32)
Y = (0.5 + 1.2 * X + rng.normal(size=24)).astype(np.float32)


@ab.model
def mixed(n):
    p = ab.sample("p", dist.Beta(2.0, 2.0))
    k = ab.sample("k", dist.Poisson(3.0))
    z = jax.vmap(lambda _: ab.sample("z", dist.Bernoulli(p)))(jnp.arange(2))
    scale = ab.sample("scale", dist.HalfNormal(1.0))
    top = ab.sample("top", dist.Uniform(0.0, 2.0 * n))
    ab.sample("share", dist.Dirichlet(jnp.array([3.0, 2.0, 5.0])))
    ab.deterministic("sum", k + z.sum())
    ab.sample("y", dist.Normal(p + 0.4 * k + z.sum() + 0.1 * top, 0.5 + scale))


@pytest.fixture(scope="module")
def linear():
    nuts = ab.nuts(num_chains=2, num_warmup=300, num_samples=1000)(line)
    return nuts.posterior(jax.random.key(0), X[:12], given={"y": Y[:12]})


@pytest.fixture(scope="module")
def weighted():
    importance = ab.importance(num_samples=8000)(mixed)
    return importance.posterior(jax.random.key(1), 1.0, given={"y": 3.5})


def draws(model, n, seed=0):
    one = lambda key: model.simulate(key).choices  # noqa: E731
    return jax.vmap(one)(jax.random.split(jax.random.key(seed), n))


def test_moments_are_those_of_the_posterior(linear):
    n = 20_000
    x = np.asarray(draws(linear.as_model(), n)["w"], float)
    own = np.asarray(linear["w"], float).reshape(-1, 2)
    sd = own.std(0)
    assert (np.abs(x.mean(0) - own.mean(0)) < SE * sd / n**0.5).all()
    z = (x - own.mean(0)) / sd
    for i, j in ((0, 0), (0, 1), (1, 1)):
        product = z[:, i] * z[:, j]
        want = np.corrcoef(own.T)[i, j]
        assert abs(product.mean() - want) < SE * product.std() / n**0.5


@pytest.mark.slow
def test_moments_with_weights_and_discrete_latents(weighted):
    model, n = weighted.as_model(), 20_000
    found = draws(model, n)
    assert set(found) == {"p", "k", "z", "scale", "top", "share"}  # no deterministics
    for a in found:
        x = np.asarray(found[a], float).reshape(n, -1)
        # The draws kept are a systematic choice of 512 from the weighted ones.
        error = SE * (x.std(0) / n**0.5 + np.ravel(weighted.std(a)) / 512**0.5)
        assert (np.abs(x.mean(0) - np.ravel(weighted.mean(a))) < error).all(), a
        assert found[a].shape[1:] == np.shape(weighted.draws[a])[2:]
    w, k = weighted._weights, weighted.draws["k"][0]
    top = weighted.draws["top"][0]
    want = np.cov(np.stack([k, top]), aweights=w)[0, 1]
    got = np.cov(np.stack([found["k"], found["top"]]).astype(float))[0, 1]
    assert abs(got - want) < 0.15  # of standard deviations 1.3 and 0.58
    np.testing.assert_allclose(np.asarray(found["share"]).sum(-1), 1, atol=1e-5)
    assert float(found["top"].max()) < 2.0 and float(found["scale"].min()) > 0


@pytest.mark.parametrize(
    ("law", "low", "high", "variation"),
    [
        (dist.Normal(1.0, 2.0), -30.0, 30.0, 0.08),
        (dist.Beta(0.8, 3.0), 1e-6, 1 - 1e-6, 0.1),
        (dist.MixtureSameFamily(
            dist.Categorical(probs=jnp.array([0.3, 0.7])),
            dist.Normal(jnp.array([-4.0, 3.0]), jnp.array([0.5, 1.0])),
        ), -25.0, 25.0, 0.18),
    ],
)  # fmt: skip
def test_densities_integrate_to_one_and_fit(law, low, high, variation):
    @ab.model
    def one():
        ab.sample("x", law)

    model = one.prior(jax.random.key(0), num_samples=2000).as_model()
    x = jnp.linspace(low, high, 20_001)
    log_p = np.asarray(jax.vmap(lambda v: model.log_density({"x": v}))(x), float)
    assert abs(np.trapezoid(np.exp(log_p), x) - 1) < 2e-3
    truth = np.exp(np.asarray(law.log_prob(x), float))
    assert 0.5 * np.trapezoid(np.abs(np.exp(log_p) - truth), x) < variation  # in total


def test_discrete_masses_sum_to_one():
    @ab.model
    def counts():
        ab.sample("k", dist.Poisson(2.0))
        ab.sample("b", dist.Categorical(probs=jnp.array([0.2, 0.0, 0.8])))

    model = counts.prior(jax.random.key(0), num_samples=1000).as_model()
    k, b = jnp.meshgrid(jnp.arange(60), jnp.arange(3), indexing="ij")
    choices = {"k": k.ravel(), "b": b.ravel()}
    log_p = np.asarray(jax.vmap(model.log_density)(choices), float).reshape(60, 3)
    assert abs(np.exp(log_p).sum() - 1) < 1e-5
    assert np.isfinite(log_p).all()  # full support, however far from the draws
    truth = np.exp(np.asarray(dist.Poisson(2.0).log_prob(jnp.arange(60)), float))
    assert 0.5 * np.abs(np.exp(log_p).sum(1) - truth).sum() < 0.1
    with pytest.raises(ab.InvalidValue, match="outside the support"):
        model.log_density({"k": -1, "b": 0})


def test_as_proposal_it_gives_the_evidence(linear):
    _, _, log_z = exact_line(X[:12], Y[:12])
    alg = ab.importance(num_samples=4000, proposal=linear.as_model())(line)
    post = alg.posterior(jax.random.key(3), X[:12], given={"y": Y[:12]})
    assert post.diagnostics["ess"] > 0.9 * 4000
    assert abs(post.log_evidence - log_z) < SE * post.diagnostics["log_evidence_se"]


@pytest.mark.slow
def test_as_proposal_for_discrete_latents(weighted):
    alg = ab.importance(num_samples=4000, proposal=weighted.as_model())(mixed)
    post = alg.posterior(jax.random.key(3), 1.0, given={"y": 3.5})
    assert post.diagnostics["ess"] > 0.5 * 4000
    se = np.hypot(post.diagnostics["log_evidence_se"], weighted.diagnostics["log_evidence_se"])
    assert abs(post.log_evidence - weighted.log_evidence) < SE * se


def test_as_prior_the_second_half_completes_the_posterior(linear):
    mean, cov, _ = exact_line(X, Y)
    later = ab.nuts(num_chains=2, num_warmup=300, num_samples=1000)(
        ab.with_prior(line, linear.as_model())
    ).posterior(jax.random.key(4), X[12:], given={"y": Y[12:]})
    sd = np.sqrt(np.diag(cov))
    # The error of the first fit, 2000 draws of NUTS, is a part of this one's.
    assert (np.abs(later.mean("w") - mean) < SE * sd / 500**0.5).all()
    assert (np.abs(later.std("w") / sd - 1) < SE * 1000**-0.5).all()
    assert later.keys() == ["w"]


def test_two_modes_are_kept():
    @ab.model
    def modes():
        x = ab.sample("x", dist.Normal(0.0, 3.0))
        y = ab.sample("y", dist.Normal(jnp.sign(x), 0.2))
        ab.factor("at", -0.5 * ((jnp.abs(x) - 3) / 0.3) ** 2)
        return y

    post = ab.importance(num_samples=20_000)(modes).posterior(jax.random.key(0))
    model = post.as_model()
    assert model.bandwidth < 0.3
    found = draws(model, 4000)
    assert float(np.mean(np.sign(found["x"]) == np.sign(found["y"]))) > 0.93  # jointly
    assert float(np.mean(np.abs(np.abs(found["x"]) - 3) < 1.2)) > 0.9


def test_keep_and_extra_arguments(weighted):
    model = weighted.as_model(keep=("p", "k"), num_components=100)
    assert model.addresses == ("k", "p") and model.num_components <= 100
    assert "k, p" in repr(model)
    trace = model.simulate(jax.random.key(0), {"y": 1.0}, 3, scale=2.0)
    assert set(trace.choices) == {"k", "p"}
    half = ab.with_prior(mixed, model).simulate(jax.random.key(0), 1.0)
    assert {"p", "k", "z", "scale", "top", "y"} <= set(half.choices)


def test_messages(tmp_path, linear, weighted):
    linear.save(tmp_path / "post")
    with pytest.raises(ab.InvalidValue, match="loaded from disk"):
        ab.load(tmp_path / "post").as_model()
    with pytest.raises(ab.UnknownAddress, match="matches no site"):
        weighted.as_model(keep="q")
    with pytest.raises(ab.InvalidAlgorithm, match="num_components"):
        weighted.as_model(num_components=1)

    @ab.model
    def nested():
        top = ab.sample("top", dist.HalfNormal(1.0))
        ab.sample("x", dist.Uniform(0.0, top))

    post = nested.prior(jax.random.key(0), num_samples=100)
    with pytest.raises(ab.InvalidModel, match=r"support of 'x'.*depends on"):
        post.as_model()
    assert post.as_model(keep="top").addresses == ("top",)
    with pytest.raises(ab.InvalidValue, match="run inside"):
        jax.jit(lambda key: nested.prior(key, num_samples=10).as_model(keep="top"))(
            jax.random.key(0)
        )
