"""`ab.vi`: fits against closed forms, and what a run does on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import gammaln

import abduce as ab
import abduce.dist as dist

KEY = jax.random.key(11)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 2)).astype(np.float32)
Y = (X @ np.array([1.0, -2.0]) + 0.5 * RNG.normal(size=60)).astype(np.float32)
PRECISION = X.T @ X / 0.25 + np.eye(2)
COV = np.linalg.inv(PRECISION)
MEAN = COV @ (X.T @ Y) / 0.25
LOG_EVIDENCE = -0.5 * (
    Y @ np.linalg.solve(0.25 * np.eye(60) + X @ X.T, Y)
    + np.linalg.slogdet(2 * np.pi * (0.25 * np.eye(60) + X @ X.T))[1]
)


@ab.model
def regression(x):
    b = ab.sample("b", dist.Normal(0, 1).expand([2]))
    jax.vmap(lambda row: ab.sample("y", dist.Normal(row @ b, 0.5)))(x)


GIVEN = {"y": Y}
EXACT = {
    "full_rank": ab.guides.full_rank(),
    "low_rank": ab.guides.low_rank(rank=2),
    "structured": ab.guides.structured(),
    "laplace": ab.guides.laplace(),
    "implicit": ab.guides.implicit(hidden=()),
}


def quick(guide, **kw):
    return ab.vi(guide=guide, num_steps=1500, num_samples=2000, progress_bar=False, **kw)


@pytest.mark.parametrize("name", EXACT)
def test_a_family_that_holds_the_posterior_finds_it(name):
    """A normal posterior: the bound is the evidence, and the weights are constant."""
    post = quick(EXACT[name])(regression).posterior(KEY, X, given=GIVEN)
    # 2,000 draws: 5 standard errors; the entropy estimate of the implicit family is noisy
    slack = 0.2 if name == "implicit" else 5 / 2000**0.5
    np.testing.assert_allclose(post.mean("b"), MEAN, atol=slack * COV.max() ** 0.5)
    np.testing.assert_allclose(post.std("b"), np.sqrt(np.diag(COV)), rtol=0.1)
    if name != "implicit":
        # the factor of a low rank is not unique, which leaves the optimizer some way to go
        near = 1e-2 if name == "low_rank" else 2e-3
        assert abs(post.diagnostics["elbo"] - LOG_EVIDENCE) < near
        assert post.diagnostics["ess"] > 1900
    else:
        with pytest.raises(ab.NoDensity, match="no density"):
            quick(EXACT[name], objective=ab.objectives.iwelbo(2))(regression).posterior(
                KEY, X, given=GIVEN
            )


def test_mean_field_has_the_conditional_scales():
    """Of a normal posterior: means exact, precisions those of its diagonal."""
    post = quick(ab.guides.mean_field())(regression).posterior(KEY, X, given=GIVEN)
    scale = np.exp(np.asarray(post.params["log_scale"]))
    np.testing.assert_allclose(post.params["loc"], MEAN, atol=2e-3)
    np.testing.assert_allclose(scale, np.diag(PRECISION) ** -0.5, rtol=5e-3)


@ab.model
def counts(n):
    rate = ab.sample("rate", dist.Gamma(2.0, 1.0))
    jax.vmap(lambda _: ab.sample("k", dist.Poisson(rate)))(jnp.arange(n))


COUNTS = np.array([3, 1, 4, 1, 5])


def gamma_evidence():
    """Gamma(2, 1) prior, Poisson counts, Gamma(16, 6) posterior."""
    return gammaln(16.0) - 16 * np.log(6.0) - gammaln(2.0) - gammaln(COUNTS + 1.0).sum()


@pytest.mark.slow
def test_a_flow_reaches_a_positive_site():
    alg = ab.vi(guide=ab.guides.flow(), num_steps=1500, progress_bar=False)
    post = alg(counts).posterior(KEY, 5, given={"k": COUNTS})
    shape, rate = 2 + COUNTS.sum(), 6.0
    assert abs(post.diagnostics["elbo"] - float(gamma_evidence())) < 0.02
    assert abs(float(post.mean("rate")) - shape / rate) < 0.06  # 5 standard errors of 4,000 draws
    assert abs(float(post.std("rate")) - shape**0.5 / rate) < 0.05


@ab.model
def gamma_guide(given, n):
    positive = dist.constraints.positive
    a = ab.param("a", 5.0, constraint=positive)
    b = ab.param("b", 2.0, constraint=positive)
    ab.sample("rate", dist.Gamma(a, b))


OBJECTIVES = {
    "elbo": ab.objectives.elbo(),
    "sticking the landing": ab.objectives.sticking_the_landing(),
    "iwelbo": ab.objectives.iwelbo(4),
    "dreg": ab.objectives.iwelbo(4, doubly_reparametrized=True),
    "renyi": ab.objectives.renyi(0.5, 4),
    "chi squared": ab.objectives.chi_squared(32),
    "forward KL": ab.objectives.forward_kl(32),
    "wake sleep": ab.objectives.reweighted_wake_sleep(32),
    "vimco": ab.objectives.vimco(4),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_finds_a_posterior_in_the_guide(name):
    """The posterior is Gamma(16, 6); at the optimum every weight is the evidence."""
    alg = ab.vi(
        guide=gamma_guide, objective=OBJECTIVES[name], num_steps=2500, num_particles=4,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.02, 2500, 0.01)), progress_bar=False,
    )  # fmt: skip
    post = alg(counts).posterior(KEY, 5, given={"k": COUNTS})
    a, b = float(post.params["a"]), float(post.params["b"])
    # The bound with several draws is nearly flat in the guide: its scores are mostly noise.
    slack = 4.0 if name in ("iwelbo", "vimco") else 1.0
    assert abs(a / b - 16 / 6) < 0.02 * slack
    assert abs(a / 16 - 1) < 0.1 * slack
    assert abs(post.diagnostics["elbo"] - gamma_evidence()) < 0.02 * slack**2


def test_doubly_reparametrized_and_plain_gradients_agree():
    """DReG against IWELBO: the means of 4,000 gradients, 4.5 standard errors (7e-6 a number)."""
    from abduce.inference.vi.bound import ModelDensity, ModelGuide

    def gradients(objective):
        def f(u):
            params = {"a": u[0], "b": u[1]}
            p = ModelDensity(counts, (5,), {}, {"k": COUNTS}, {})
            q = ModelGuide(gamma_guide, ("rate",), ({"k": COUNTS}, 5), {}, params)
            return objective(p, q)

        e = ab.expectation(f)
        u = jnp.array([9.0, 4.0])
        keys = jax.random.split(KEY, 4000)
        return np.asarray(jax.vmap(lambda k: e.value_and_grad(k, u)[1])(keys))

    plain = gradients(ab.objectives.iwelbo(3))
    doubly = gradients(ab.objectives.iwelbo(3, doubly_reparametrized=True))
    se = np.sqrt((plain.var(0) + doubly.var(0)) / 4000)
    assert (np.abs(plain.mean(0) - doubly.mean(0)) < 4.5 * se).all()
    assert doubly.var(0).sum() < plain.var(0).sum()


def test_the_fitted_guide_is_a_proposal():
    post = quick(ab.guides.full_rank())(counts).posterior(KEY, 5, given={"k": COUNTS})
    exact = ab.importance(proposal=post, num_samples=4000)(counts).posterior(
        KEY, 5, given={"k": COUNTS}
    )
    assert abs(exact.log_evidence - gamma_evidence()) < 5 * exact.diagnostics["log_evidence_se"]
    guide = post.as_model()
    trace = guide.simulate(KEY)
    np.testing.assert_allclose(
        guide.log_density(trace.choices), trace.log_density, rtol=1e-4, atol=1e-4
    )
    x = np.linspace(0.2, 9, 2001)
    density = jax.vmap(lambda r: jnp.exp(guide.log_density({"rate": r})))(jnp.asarray(x))
    assert abs(np.trapezoid(np.asarray(density), x) - 1) < 1e-3


def test_batches_are_scaled():
    post = quick(ab.guides.full_rank(), batch={"x": 0, "y": 0}, batch_size=20)(
        regression
    ).posterior(KEY, X, given=GIVEN)
    # The noise of batches stays in the parameters: a tenth of a standard deviation.
    np.testing.assert_allclose(post.mean("b"), MEAN, atol=0.2 * COV.max() ** 0.5)
    np.testing.assert_allclose(post.std("b"), np.sqrt(np.diag(COV)), rtol=0.15)


def test_a_second_call_compiles_nothing(count_compiles):
    alg = ab.vi(guide=ab.guides.full_rank(), num_steps=50, num_samples=100, progress_bar=False)
    alg(regression).posterior(KEY, X, given=GIVEN)
    key = jax.random.key(12)
    with count_compiles() as compiles:
        alg(regression).posterior(key, X + 1, given={"y": Y - 1})
    assert compiles.names == []


def test_a_run_resumes_to_the_same_result(tmp_path, monkeypatch):
    def make(folder):
        alg = ab.vi(
            guide=ab.guides.mean_field(), num_steps=400, num_samples=50, progress_bar=False,
            checkpoint_dir=folder,
        )  # fmt: skip
        return alg(regression)

    whole = make(None).posterior(KEY, X, given=GIVEN)
    from abduce.inference.vi import training

    compiled, calls = training._chunk, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return compiled(*args)

    monkeypatch.setattr(training, "_chunk", stopping)
    with pytest.warns(ab.AbduceWarning, match="interrupted after 100 of 400 steps"):
        part = make(tmp_path).posterior(KEY, X, given=GIVEN)
    assert part.diagnostics["num_steps"] == 100
    monkeypatch.setattr(training, "_chunk", compiled)
    again = make(tmp_path).posterior(KEY, X, given=GIVEN)
    np.testing.assert_array_equal(again.params["loc"], whole.params["loc"])
    np.testing.assert_array_equal(again["b"], whole["b"])
    with pytest.raises(ab.InvalidValue, match="belongs to another run"):
        make(tmp_path).posterior(KEY, X, given={"y": Y + 1})
    (tmp_path / "vi-0.npz").write_bytes(b"nonsense")
    with pytest.raises(ab.InvalidValue, match="cannot be read"):
        make(tmp_path).posterior(KEY, X, given=GIVEN)


def test_warm_start_and_patience():
    first = quick(ab.guides.full_rank())(regression).posterior(KEY, X, given=GIVEN)
    alg = ab.vi(
        guide=ab.guides.full_rank(), num_steps=2000, params=first.params, patience=2,
        num_samples=100, optimizer=optax.sgd(1e-6), progress_bar=False,
    )  # fmt: skip
    post = alg(regression).posterior(KEY, X, given=GIVEN)
    assert post.diagnostics["num_steps"] < 2000
    np.testing.assert_allclose(
        post.params["family"]["loc"], first.params["family"]["loc"], atol=1e-3
    )
    with pytest.raises(ab.InvalidValue, match="structure"):
        alg.replace(params={"loc": 0.0})(regression).posterior(KEY, X, given=GIVEN)


def test_bad_steps_are_skipped_and_named():
    @ab.model
    def overflowing(n):
        mu = ab.sample("mu", dist.Normal(0.0, 1.0))
        bad = ab.sample("bad", dist.Normal(0.0, 1.0))
        ab.factor("edge", jnp.where(bad > 0.7, jnp.nan, -mu))

    alg = ab.vi(guide=ab.guides.mean_field(), num_steps=60, num_samples=100,
                num_particles=1, progress_bar=False, init={"mu": 0.0, "bad": 0.0})  # fmt: skip
    with pytest.warns(ab.AbduceWarning, match=r"of 60 steps \(first at step \d+.*were skipped"):
        post = alg(overflowing).posterior(KEY, 1)
    assert post.diagnostics["num_nonfinite"] > 0
    assert np.isfinite(np.asarray(post.params["loc"])).all()


def test_starts_that_disagree_are_reported():
    @ab.model
    def two():
        x = ab.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        ab.factor("well", jnp.logaddexp(-50.0 * (x - 4) ** 2, -3.0 - 50.0 * (x + 4) ** 2))

    alg = ab.vi(num_steps=400, num_starts=6, num_samples=500, progress_bar=False,
                init=ab.init.uniform(5.0))  # fmt: skip
    with pytest.warns(ab.AbduceWarning, match="6 starts ended at objectives from"):
        post = alg(two).posterior(jax.random.key(1))
    assert post.mean("x") > 3  # the deeper one


def test_a_bad_guide_is_reported():
    @ab.model
    def heavy():
        ab.sample("x", dist.StudentT(1.2))

    with pytest.warns(ab.AbduceWarning, match=r"Pareto k is .*ab.importance\(proposal=post\)"):
        quick(ab.guides.mean_field())(heavy).posterior(KEY)


@ab.model
def shifted(n):
    level = ab.param("level", 0.0)

    def one(_):
        z = ab.sample("z", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Normal(level + z, 1.0))

    jax.vmap(one)(jnp.arange(n))


def test_predictions_are_those_of_the_fitted_parameters():
    """New data lie around the fitted level, not around the initial one; 5 standard errors."""

    @ab.model
    def guide(given, n):
        slope = ab.param("slope", 0.0)
        jax.vmap(lambda y: ab.sample("z", dist.Normal(slope * (y - 5), 0.7)))(given["y"])

    y = 5 + 1.4 * np.random.default_rng(0).normal(size=200).astype(np.float32)
    alg = ab.vi(guide=guide, num_steps=500, optimizer=optax.adam(0.05), num_samples=200,
                progress_bar=False)  # fmt: skip
    post = alg(shifted).posterior(KEY, 200, given={"y": y})
    assert abs(post.params["level"] - y.mean()) < 0.2
    ahead = np.asarray(post.predict(KEY, redraw="z")["y"])
    assert abs(ahead.mean() - post.params["level"]) < 5 * 1.5 / ahead.size**0.5


def test_a_family_says_that_it_leaves_parameters_of_the_model():
    alg = ab.vi(num_steps=2, num_samples=50, progress_bar=False)
    with pytest.warns(ab.AbduceWarning, match="level keeps its initial value"):
        alg(shifted).posterior(KEY, 3, given={"y": np.zeros(3, np.float32)})


def test_errors():
    @ab.model
    def other(given, x):
        ab.sample("c", dist.Normal(ab.param("m", 0.0), 1.0))

    with pytest.raises(ab.InvalidAlgorithm, match=r"Model: b. Guide: c. Only in the model: b"):
        ab.vi(guide=other)(regression).posterior(KEY, X, given=GIVEN)

    @ab.model
    def fixed(given, x):
        ab.sample("b", dist.Normal(0.0, 1.0).expand([2]))

    with pytest.raises(ab.InvalidAlgorithm, match=r'write ab.param\("name", init\)'):
        ab.vi(guide=fixed)(regression).posterior(KEY, X, given=GIVEN)
    with pytest.raises(ab.InvalidAlgorithm, match="guide= takes a family"):
        ab.vi(guide=ab.guides.full_rank)(regression).posterior(KEY, X, given=GIVEN)
    with pytest.raises(ab.InvalidAlgorithm, match="come together"):
        ab.vi(batch={"x": 0})
    with pytest.raises(ab.InvalidAlgorithm, match="names 'z'"):
        ab.vi(batch={"z": 0}, batch_size=5)(regression).posterior(KEY, X, given=GIVEN)
    with pytest.raises(ab.InvalidAlgorithm, match="same number of rows"):
        ab.vi(batch={"x": 1, "y": 0}, batch_size=2)(regression).posterior(KEY, X, given=GIVEN)
    with pytest.raises(ab.InvalidAlgorithm, match="cannot run inside"):
        jax.jit(lambda y: ab.vi()(regression).posterior(KEY, X, given={"y": y}).mean("b"))(Y)

    @ab.model
    def spins():
        ab.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(ab.DiscreteLatent, match="'z'"):
        ab.vi()(spins).posterior(KEY)
