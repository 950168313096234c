"""Distribution Transformer: exact symmetries, a conjugate task, filtering, saving, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist
from abduce.amortized.distribution_transformer import distribution_transformer
from abduce.amortized.dt_estimator import make_network
from abduce.amortized.dt_filter import LinearGaussian
from abduce.amortized.dt_inputs import Scales
from abduce.amortized.dt_saving import KIND, transformer_from_saved
from abduce.amortized.dt_training import TransformerTask
from abduce.amortized.equivariance import ScaleEquivariance
from abduce.amortized.mixtures import GaussianMixture, normal, split
from abduce.inference.persistence import load_folder

SMALL = {"num_components": 2, "width": 32, "num_layers": 2, "num_heads": 2, "hidden": 64}
N = 5


@ab.model
def mean_model():
    mu = ab.sample("mu", dist.Normal(0.0, 1.0))
    ab.deterministic("double", 2 * mu)
    jax.vmap(lambda _: ab.sample("y", dist.Normal(mu, 1.0)))(jnp.arange(N))


@ab.model
def mean_priors():
    m = ab.sample("m", dist.Normal(0.0, 1.0))
    s = ab.sample("s", dist.LogNormal(-0.5, 0.4))
    return {"mu": dist.Normal(m, s)}


@ab.model
def variance_model():
    v = ab.sample("variance", dist.LogNormal(0.0, 1.0))
    jax.vmap(lambda _: ab.sample("z", dist.Normal(0.0, jnp.sqrt(v))))(jnp.arange(N))


@ab.model
def variance_priors():
    m = ab.sample("m", dist.Normal(0.0, 1.0))
    return {"variance": dist.LogNormal(m, 0.7)}


SCALE = ScaleEquivariance(observed={"z": 1.0}, latents={"variance": 2.0})


def shaken(est, seed=0):
    """With a network that is not trained but depends on everything it reads."""
    unit = (jnp.zeros(1), jnp.ones(1))
    width = 2 if est.plan.missing else 1  # with an indicator of what is missing
    scales = Scales([(jnp.zeros(width), jnp.ones(width))], unit, unit)
    network = jax.jit(lambda k: make_network(est.plan, scales, k))(jax.random.key(seed))
    leaves, treedef = jax.tree.flatten(network)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [
        x + 0.2 * jax.random.normal(k, x.shape) if hasattr(x, "shape") else x
        for k, x in zip(keys, leaves, strict=True)
    ]
    return dataclasses.replace(est, scales=scales, network=jax.tree.unflatten(treedef, leaves))


@pytest.fixture(scope="module")
def trained():
    est = distribution_transformer(
        mean_model, observed=["y"], priors=mean_priors, num_candidates=3, num_samples=2000, **SMALL
    )
    return est.fit(
        jax.random.key(0), num_steps=300, batch_size=128, learning_rate=3e-3, progress_bar=False
    )


@pytest.fixture(scope="module")
def equivariant():
    return shaken(
        distribution_transformer(
            variance_model, observed=["z"], priors=variance_priors, equivariance=SCALE, **SMALL
        )
    )


def exact(m, s, y):
    precision = 1 / s**2 + len(y)
    return (m / s**2 + y.sum()) / precision, precision**-0.5


def test_a_short_training_reaches_the_exact_posterior(trained):
    """`KL(exact || q)` by quadrature; the largest of 40 tasks and their mean."""

    @jax.jit
    @jax.vmap
    def one(key):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        m, s = jax.random.normal(k1), jnp.exp(-0.5 + 0.4 * jax.random.normal(k2))
        y = m + s * jax.random.normal(k3) + jax.random.normal(k4, (N,))
        prior = split(normal(m[None], s[None, None] ** 2), 2)
        q = trained.infer(prior, {"y": y})
        precision = 1 / s**2 + N
        mean, sd = (m / s**2 + y.sum()) / precision, precision**-0.5
        x = jnp.linspace(-6, 6, 401)
        log_p = -0.5 * x**2 - 0.5 * jnp.log(2 * jnp.pi)
        log_q = jax.vmap(lambda t: q.log_prob((mean + sd * t)[None]))(x) + jnp.log(sd)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q)) * 0.03

    kl = np.asarray(one(jax.random.split(jax.random.key(7), 40)))
    assert (kl > -1e-4).all()
    assert kl.mean() < 0.02
    assert trained.history["loss"].shape == (300,)
    assert trained.history["validation_loss"][-1] < trained.history["validation_loss"][0]


def test_the_prior_is_read_from_the_model(trained):
    y = jnp.array([1.3, 0.2, 0.8, 1.9, -0.1])
    for m, s in ((0.0, 0.5), (1.0, 0.8)):
        edited = ab.with_prior(mean_model, {"mu": dist.Normal(m, s)})
        post = trained(edited).posterior(jax.random.key(1), given={"y": y})
        mean, sd = exact(m, s, np.asarray(y))
        assert abs(post.mean("mu") - mean) < 0.25 * sd
        assert abs(post.std("mu") / sd - 1) < 0.2
        assert post.diagnostics["prior_fit_kl"] == 0.0
        np.testing.assert_allclose(post["double"], 2 * post["mu"], rtol=1e-6)


def test_posteriors_are_proposals(trained):
    """Importance weights correct the network: the evidence is the exact one."""
    y = jnp.array([1.3, 0.2, 0.8, 1.9, -0.1])
    model = ab.with_prior(mean_model, {"mu": dist.Normal(0.5, 0.7)})
    q = trained.as_model(model)
    given = {"y": y}
    x = jnp.array(0.4)
    mixture = trained.mixture(model, given=given)
    np.testing.assert_allclose(
        q.log_density({"mu": x}, given), mixture.log_prob(x[None]), rtol=1e-5
    )
    post = ab.importance(proposal=q, num_samples=2000)(model).posterior(
        jax.random.key(0), given=given
    )
    covariance = np.eye(N) + 0.49
    r = np.asarray(y) - 0.5
    log_evidence = -0.5 * (
        r @ np.linalg.solve(covariance, r) + np.linalg.slogdet(2 * np.pi * covariance)[1]
    )
    assert post.diagnostics["ess"] > 1500
    assert abs(post.log_evidence - log_evidence) < 5 * post.diagnostics["log_evidence_se"] + 1e-4


def test_a_posterior_is_the_next_prior(trained):
    model = ab.with_prior(mean_model, {"mu": dist.Normal(0.5, 0.7)})
    y = jnp.array([1.3, 0.2, 0.8, 1.9, -0.1])
    post = trained(model).posterior(jax.random.key(1), given={"y": y})
    later = ab.with_prior(mean_model, post.as_model())
    read = trained.prior(later)
    np.testing.assert_allclose(read.mixture.means, post.diagnostics["mixture_means"], rtol=1e-6)
    assert float(read.kl) == 0.0


def test_filtering_agrees_with_kalman(trained):
    rng = np.random.default_rng(0)
    steps, noise = 6, 0.3
    x = np.cumsum(rng.normal(size=steps) * noise**0.5)
    ys = x[:, None] + rng.normal(size=(steps, N))
    start = split(normal(jnp.zeros(1), 0.5 * jnp.eye(1)), 2)
    move = LinearGaussian(0.9 * jnp.eye(1), noise * jnp.eye(1))
    out = trained.filter(start, {"y": jnp.asarray(ys, jnp.float32)}, transition=move)
    m, v = 0.0, 0.5
    for t in range(steps):
        if t:
            m, v = 0.9 * m, 0.81 * v + noise
        gain = v / (v + 1 / N)
        m, v = m + gain * (ys[t].mean() - m), v * (1 - gain)
        q = jax.tree.map(lambda a, t=t: a[t], out.posterior)
        assert abs(float(q.mean[0]) - m) < 0.4 * v**0.5
        assert abs(float(q.covariance[0, 0]) / v - 1) < 0.5
    before = jax.tree.map(lambda a: a[2], out.posterior)
    after = jax.tree.map(lambda a: a[3], out.predicted)
    np.testing.assert_allclose(after.mean, 0.9 * before.mean, rtol=1e-5)


def test_vmap_and_jit(trained):
    ys = jnp.asarray(np.random.default_rng(1).normal(size=(3, N)), jnp.float32)
    prior = split(normal(jnp.zeros(1), jnp.eye(1)), 2)
    many = jax.jit(jax.vmap(lambda y: trained.infer(prior, {"y": y})))(ys)
    one = trained.infer(prior, {"y": ys[1]})
    np.testing.assert_allclose(many.means[1], one.means, rtol=1e-4, atol=1e-5)
    key = jax.random.key(0)
    posts = jax.vmap(lambda y: trained(mean_model).posterior(key, given={"y": y}).draws["mu"])(ys)
    single = trained(mean_model).posterior(key, given={"y": ys[1]})
    np.testing.assert_allclose(posts[1], single.draws["mu"], rtol=1e-3, atol=1e-4)


def test_saved_and_loaded_it_answers_bit_for_bit(trained, tmp_path):
    trained.save(tmp_path / "dt")
    kind, config, arrays = load_folder(tmp_path / "dt")
    assert kind == KIND == "distribution transformer"
    loaded = transformer_from_saved(config, arrays)
    assert loaded.plan == trained.plan
    y = jnp.array([1.3, 0.2, 0.8, 1.9, -0.1])
    a = trained(mean_model).posterior(jax.random.key(1), given={"y": y})
    b = loaded(mean_model).posterior(jax.random.key(1), given={"y": y})
    assert (np.asarray(a["mu"]) == np.asarray(b["mu"])).all()
    with pytest.raises(ab.InvalidAlgorithm, match="loaded from disk"):
        loaded.fit(jax.random.key(0), num_steps=1)
    del arrays["scales.prior[0]"]
    with pytest.raises(ab.AbduceError, match=r"scales.prior\[0\]"):
        transformer_from_saved(config, arrays)
    with pytest.raises(ab.AbduceError, match=r"config\.json"):
        transformer_from_saved({**config, "plan": {}}, arrays)


# ---------------------------------------------------------------------- symmetries


def test_order_of_components_and_of_observations_does_not_matter(equivariant):
    prior = GaussianMixture(
        jnp.log(jnp.array([0.3, 0.7])), jnp.array([[-1.0], [0.5]]), jnp.array([[[0.4]], [[0.9]]])
    )
    z = jnp.array([0.5, 1.0, -2.0, 0.1, 0.4])
    flipped = jax.tree.map(lambda x: x[::-1], prior)
    q = equivariant.infer(prior, {"z": z})
    r = equivariant.infer(flipped, {"z": z[jnp.array([3, 1, 0, 4, 2])]})
    assert np.ptp(np.asarray(q.means)) > 1e-3  # the components do differ
    np.testing.assert_allclose(r.means[::-1], q.means, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(r.log_weights[::-1], q.log_weights, rtol=1e-4, atol=1e-5)
    other = equivariant.infer(prior, {"z": 3 * z})
    assert np.abs(np.asarray(other.means - q.means)).max() > 1e-2  # the data do matter


@pytest.mark.parametrize("log_s", [1.5, -3.0])
def test_scale_equivariance_is_exact(equivariant, log_s):
    prior = split(normal(jnp.array([0.3]), 0.6 * jnp.eye(1)), 2)
    z = jnp.array([0.5, 1.0, -2.0, 0.1, 0.4])
    q = equivariant.infer(prior, {"z": z})
    moved = prior.scaled(jnp.ones(1), jnp.full(1, 2 * log_s))
    r = equivariant.infer(moved, {"z": z * np.exp(log_s)})
    np.testing.assert_allclose(r.means - 2 * log_s, q.means, atol=2e-5)
    np.testing.assert_allclose(r.trils, q.trils, rtol=2e-5)


def test_a_symmetry_that_the_model_lacks_is_refused():
    def make(powers):
        distribution_transformer(
            variance_model, observed=["z"], priors=variance_priors,
            equivariance=ScaleEquivariance({"z": 1.0}, powers), **SMALL,
        )  # fmt: skip

    with pytest.raises(ab.InvalidAlgorithm, match="does not have this symmetry"):
        make({"variance": 1.0})
    with pytest.raises(ab.UnknownAddress, match="varianc"):
        make({"varianc": 2.0})


def test_candidates_divide_the_gradient_at_the_exact_posterior(trained):
    """All weights are equal there, so `1 / (K + 1)` of the plain gradient is left."""
    task = TransformerTask(trained.plan)
    data = {**trained.data, "scales": trained.scales}
    m, s, y = 0.2, 0.7, jnp.array([0.4, 1.1, -0.3, 0.9, 0.2])
    mean, sd = exact(m, s, np.asarray(y))
    example = {
        "target_u": jnp.array([0.8]), "observed": {"y": y}, "arguments": (), "gone": None,
        "law": {"mu": dist.Normal(m, s)},
    }  # fmt: skip
    q = normal(jnp.array([mean]), jnp.array([[sd**2]]))

    def loss(means):
        law = GaussianMixture(q.log_weights, means, q.trils)
        return task._candidates(jax.random.key(0), law, example, data)

    plain = jax.grad(lambda means: -GaussianMixture(q.log_weights, means, q.trils).log_prob(
        example["target_u"]))(q.means)  # fmt: skip
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(q.means), plain / 4, rtol=2e-3)


# ---------------------------------------------------------------------- errors


def test_unfitted_and_mismatched_models_are_refused(trained):
    key, y = jax.random.key(0), jnp.zeros(N)
    raw = distribution_transformer(mean_model, observed=["y"], priors=mean_priors, **SMALL)
    with pytest.raises(ab.NotFitted, match="fit"):
        raw(mean_model).posterior(key, given={"y": y})

    @ab.model
    def renamed():
        theta = ab.sample("theta", dist.Normal(0.0, 1.0))
        jax.vmap(lambda _: ab.sample("y", dist.Normal(theta, 1.0)))(jnp.arange(N))

    @ab.model
    def heavy():
        mu = ab.sample("mu", dist.Normal(0.0, 1.0))
        jax.vmap(lambda _: ab.sample("y", dist.StudentT(3.0, mu, 1.0)))(jnp.arange(N))

    with pytest.raises(ab.InvalidModel, match=r"latent 'mu'.*theta"):
        trained(renamed).posterior(key, given={"y": y})
    with pytest.raises(ab.InvalidModel, match=r"'y' is Normal.*StudentT"):
        trained(heavy).posterior(key, given={"y": y})
    positive = ab.with_prior(mean_model, {"mu": dist.LogNormal(0.0, 1.0)})
    with pytest.raises(ab.InvalidValue, match="support"):
        trained(positive).posterior(key, given={"y": y})
    with pytest.raises(ab.MissingData, match=r'given\["y"\]'):
        trained(mean_model).posterior(key)
    with pytest.raises(ab.InvalidAlgorithm, match="missing="):
        hidden = ab.masked(y, observed=jnp.arange(N) > 0)
        trained(mean_model).posterior(key, given={"y": hidden})


def test_mixtures_and_observations_of_wrong_shape_are_refused(trained):
    prior = split(normal(jnp.zeros(1), jnp.eye(1)), 2)
    with pytest.raises(ab.InvalidValue, match=r"1 coordinates.*2 dimensions"):
        trained.infer(normal(jnp.zeros(2), jnp.eye(2)), {"y": jnp.zeros(N)})
    with pytest.raises(ab.InvalidValue, match=r"shape \(7,\).*\(5,\)"):
        trained.infer(prior, {"y": jnp.zeros(7)})
    with pytest.raises(ab.MissingData, match="1 NaN among 5"):
        trained.infer(prior, {"y": jnp.zeros(N).at[2].set(jnp.nan)})
    with pytest.raises(ab.UnknownAddress, match="'yy'"):
        trained.infer(prior, {"yy": jnp.zeros(N)})
    with pytest.raises(ab.InvalidValue, match="key="):
        trained.filter(prior, {"y": jnp.zeros((2, N))}, transition=lambda k, u: u)


def test_bad_meta_priors_and_settings_are_refused():
    @ab.model
    def other():
        return {"nu": dist.Normal(0.0, 1.0)}

    @ab.model
    def number():
        return ab.sample("m", dist.Normal(0.0, 1.0))

    def make(**settings):
        settings = {"observed": ["y"], "priors": mean_priors, **SMALL, **settings}
        return distribution_transformer(mean_model, **settings)

    with pytest.raises(ab.UnknownAddress, match="'nu' is no latent"):
        make(priors=other)
    with pytest.raises(ab.InvalidAlgorithm, match="dict of distributions"):
        make(priors=number)
    with pytest.raises(ab.InvalidAlgorithm, match="priors=, a Model"):
        make(priors=lambda: {})
    with pytest.raises(ab.InvalidAlgorithm, match="probability"):
        make(missing=1.5)
    with pytest.raises(ab.InvalidAlgorithm, match="num_components"):
        make(num_components=0)


def test_hidden_observations_do_not_matter():
    est = shaken(
        distribution_transformer(
            mean_model, observed=["y"], priors=mean_priors, missing=0.5, **SMALL
        )
    )
    prior = split(normal(jnp.zeros(1), jnp.eye(1)), 2)
    y, on = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0]), jnp.array([True, False, True, True, False])
    a = est.infer(prior, {"y": ab.masked(y, observed=on)})
    b = est.infer(prior, {"y": ab.masked(jnp.where(on, y, jnp.nan), observed=on)})
    c = est.infer(prior, {"y": y[on]})  # a smaller set
    np.testing.assert_allclose(a.means, b.means, rtol=1e-6)
    np.testing.assert_allclose(a.means, c.means, rtol=1e-5, atol=1e-6)
