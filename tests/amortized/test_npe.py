"""Posterior estimators: exact posteriors, exact evidence, and what cannot be amortized."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist
from abduce.amortized.layout import make_layout
from abduce.amortized.posterior_network import PosteriorNetwork, PosteriorTask, Settings
from abduce.errors import (
    Degenerate,
    InvalidAlgorithm,
    InvalidModel,
    InvalidValue,
    MissingData,
    NoDensity,
    NotFitted,
    UnknownAddress,
)

SMALL = {"width": 32, "context_dim": 16, "num_layers": 2}


@ab.model
def normal(n):
    mu = ab.sample("mu", dist.Normal(0.0, 1.0))
    return jax.vmap(lambda _: ab.sample("y", dist.Normal(mu, 1.0)))(jnp.arange(n))


@ab.model
def coin():
    p = ab.sample("p", dist.Beta(2.0, 3.0))
    ab.sample("heads", dist.Binomial(10, probs=p))


@pytest.fixture(scope="module")
def fitted():
    est = ab.npe(normal, 8, observed="y", sizes=(1, 8), head="mixture", **SMALL)
    return est.fit(jax.random.key(0), num_steps=200, learning_rate=1e-3, progress_bar=False)


@pytest.fixture(scope="module")
def fitted_coin():
    est = ab.npe(coin, observed=["heads"], head="mixture", **SMALL)
    return est.fit(jax.random.key(1), num_steps=400, progress_bar=False)


def layout_of(model, *args, observed, designs=None, sizes=None):
    return make_layout(
        "npe", model, args, {}, observed, designs, sizes, jax.random.key(0)
    )[0]


# ---------------------------------------------------------------------- what is read off a model


@ab.model
def regression(x):
    w = ab.sample("w", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    jax.vmap(lambda row: ab.sample("y", dist.Normal(row @ w, 0.5)))(x)


@ab.model
def batched_regression(x):
    w = ab.sample("w", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    ab.sample("y", dist.Normal(x @ w, 0.5))


@ab.model
def trend(n):
    a = ab.sample("a", dist.Normal(0.0, 1.0))
    jax.vmap(lambda t: ab.sample("y", dist.Normal(a * t, 1.0)))(jnp.arange(n) / n)


@ab.model
def walk(n):
    s = ab.sample("s", dist.HalfNormal(1.0))

    def step(x, _):
        x = ab.sample("x", dist.Normal(x, s))
        ab.sample("y", dist.Normal(x, 1.0))
        return x, None

    jax.lax.scan(step, 0.0, None, length=n)


@ab.model
def picture():
    a = ab.sample("a", dist.Normal(0.0, 1.0))
    grid = jnp.linspace(-1, 1, 12)
    ab.sample("y", dist.Normal(a * grid[:, None] * grid, 1.0).to_event(2))


@ab.model
def groups(n):
    tau = ab.sample("tau", dist.HalfNormal(1.0))

    def group(_):
        theta = ab.sample("theta", dist.Normal(0.0, tau))
        ab.sample("y", dist.Normal(theta, 1.0))

    jax.vmap(group)(jnp.arange(n))


@ab.model
def simulator(n):
    rate = ab.sample("rate", dist.Gamma(2.0, 1.0))
    f = lambda key, r: jax.random.poisson(key, r)  # noqa: E731
    jax.vmap(lambda _: ab.sample("y", dist.Simulator(f, rate)))(jnp.arange(n))


@pytest.mark.parametrize(
    ("model", "args", "kind", "arguments"),
    [
        (normal, (5,), "set", ()),
        (regression, (np.random.default_rng(0).normal(size=(6, 2)),), "set", (0,)),
        (batched_regression, (np.random.default_rng(0).normal(size=(6, 2)),), "set", (0,)),
        (trend, (6,), "vector", ()),
        (trend, (20,), "sequence", ()),
        (walk, (20,), "sequence", ()),
        (picture, (), "image", ()),
        (groups, (8,), "vector", ()),
        (simulator, (7,), "set", ()),
    ],
)
def test_observations_are_arranged_by_what_the_model_does(model, args, kind, arguments):
    observed = layout_of(model, *args, observed="y").groups
    assert [(g.kind, g.arguments) for g in observed] == [(kind, arguments)]


def test_designs_that_are_no_part_of_an_element_are_read_too():
    @ab.model
    def scaled(x, c):
        w = ab.sample("w", dist.Normal(0.0, 1.0))
        jax.vmap(lambda x: ab.sample("y", dist.Normal(w * x * c, 1.0)))(x)

    @ab.model
    def designs():
        x = ab.sample("x", dist.Normal(0, 1).expand([5]))
        return x, ab.sample("c", dist.Uniform(1.0, 2.0))

    got = layout_of(scaled, observed="y", designs=designs).groups
    assert [(g.kind, g.sites, g.arguments) for g in got] == [
        ("set", ("y",), (0,)), ("vector", (), (1,)),
    ]  # fmt: skip


# ---------------------------------------------------------------------- exact posteriors


def exact_kl(est, n, y):
    """KL(exact || q) of the normal mean, by quadrature."""
    mean, sd = float(jnp.sum(y)) / (n + 1), (n + 1) ** -0.5
    z = np.linspace(-7, 7, 281)
    log_p = -0.5 * z**2 - 0.5 * np.log(2 * np.pi) - np.log(sd)
    points = jnp.asarray(mean + sd * z, jnp.float32)
    log_q = jax.vmap(lambda m: est.log_density({"mu": m}, n, given={"y": y}))(points)
    weights = np.exp(log_p) * sd * (z[1] - z[0])
    return float(np.sum(weights * (log_p - np.asarray(log_q))))


def test_sets_of_every_size_come_near_the_exact_posterior(fitted):
    # The frame is exact here, so a few steps stay within 0.01; a network that ignores the size or
    # the data is far above 0.1 nats. Data are prior draws with fixed keys.
    for n in (1, 3, 8):
        kls = []
        for i in range(8):
            k1, k2 = jax.random.split(jax.random.key(100 * n + i))
            y = jax.random.normal(k1) + jax.random.normal(k2, (n,))
            kls.append(exact_kl(fitted, n, y))
        assert np.mean(kls) < 0.01, n


def test_the_order_of_a_set_does_not_matter(fitted):
    y = jnp.array([0.3, -1.0, 2.0, 0.5])
    a = fitted.log_density({"mu": jnp.float32(0.4)}, 4, given={"y": y})
    b = fitted.log_density({"mu": jnp.float32(0.4)}, 4, given={"y": y[::-1]})
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_the_density_integrates_to_one_over_the_support(fitted_coin):
    # In the values' own measure: a wrong Jacobian of the coordinates would show.
    p = jnp.linspace(1e-4, 1 - 1e-4, 20001)
    log_q = jax.vmap(lambda x: fitted_coin.log_density({"p": x}, given={"heads": 7}))(p)
    assert np.trapezoid(np.exp(np.asarray(log_q, np.float64)), p) == pytest.approx(1, abs=2e-3)


def test_evidence_is_exact_whatever_the_network(fitted_coin):
    from scipy.special import betaln, gammaln

    exact = gammaln(11) - gammaln(8) - gammaln(4) + betaln(9, 6) - betaln(2, 3)
    post = ab.importance(proposal=fitted_coin, num_samples=20_000)(coin).posterior(
        jax.random.key(2), given={"heads": 7}
    )
    # six standard errors: a false alarm once in 1e9 runs
    assert abs(post.log_evidence - exact) < 6 * post.diagnostics["log_evidence_se"] + 1e-5
    assert post.diagnostics["pareto_k"] < 0.7


@pytest.mark.slow
def test_tempering_and_metropolis_take_an_estimator(fitted_coin):
    from scipy.special import betaln, gammaln

    exact = gammaln(11) - gammaln(8) - gammaln(4) + betaln(9, 6) - betaln(2, 3)
    tempered = ab.smc(proposal=fitted_coin, num_particles=2000)(coin).posterior(
        jax.random.key(3), given={"heads": 7}
    )
    assert abs(tempered.log_evidence - exact) < 0.1
    chain = ab.mh(proposal=fitted_coin, num_samples=2000, num_warmup=50)(coin).posterior(
        jax.random.key(4), given={"heads": 7}
    )
    # independence proposals: about 1,500 effective draws of sd .12, so 0.02 is six errors
    assert abs(float(chain.mean("p")) - 9 / 15) < 0.02


    post = ab.nuts(init=fitted_coin, num_warmup=100, num_samples=100, progress_bar=False)(
        coin
    ).posterior(jax.random.key(5), given={"heads": 7})
    assert abs(float(post.mean("p")) - 9 / 15) < 0.1


def test_many_data_sets_are_one_program(fitted):
    ys = jax.random.normal(jax.random.key(6), (3, 8))
    model = fitted(normal)

    def mean(y):
        return model.posterior(jax.random.key(7), 8, given={"y": y}).mean("mu")

    together = jax.vmap(mean)(ys)
    np.testing.assert_allclose(together, [mean(y) for y in ys], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_latents_that_are_mixed_and_in_branches():
    @ab.model
    def mixed():
        z = ab.sample("z", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
        flip = ab.sample("flip", dist.Bernoulli(jnp.array([0.3, 0.6])))
        mu = ab.sample("mu", dist.Normal(z - 1.0, 0.5))
        extra = jax.lax.cond(
            flip[0] > 0, lambda: ab.sample("extra", dist.Normal(0.0, 1.0)), lambda: 0.0
        )
        ab.sample("y", dist.Normal(mu + extra + flip[1], 0.5))

    est = ab.npe(mixed, observed="y", **SMALL)
    assert [d.num_values for d in est.layout.discrete] == [3, 2]
    est = est.fit(jax.random.key(0), num_steps=150, progress_bar=False)
    given = {"y": 0.7}
    post = est(mixed).posterior(jax.random.key(1), given=given)
    active = np.asarray(post.active["extra"])
    np.testing.assert_array_equal(active, np.asarray(post.draws["flip"])[..., 0] > 0)
    assert set(np.unique(post.draws["z"])) <= {0, 1, 2}
    assert np.isnan(np.asarray(post.draws["extra"])[~active]).all()
    with pytest.raises(InvalidModel, match="latents in a branch"):
        ab.importance(proposal=est)(mixed).posterior(jax.random.key(2), given=given)


@pytest.mark.slow
def test_discrete_latents_have_exact_evidence():
    @ab.model
    def mixed():
        z = ab.sample("z", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
        mu = ab.sample("mu", dist.Normal(z - 1.0, 0.5))
        ab.sample("y", dist.Normal(mu, 0.5))

    est = ab.npe(mixed, observed="y", head="mixture", **SMALL)
    est = est.fit(jax.random.key(0), num_steps=100, progress_bar=False)
    post = ab.importance(proposal=est, num_samples=10_000)(mixed).posterior(
        jax.random.key(3), given={"y": 0.7}
    )
    normals = dist.Normal(jnp.array([-1.0, 0.0, 1.0]), 0.5**0.5).log_prob(0.7)
    exact = float(jax.nn.logsumexp(normals + jnp.log(jnp.array([0.2, 0.3, 0.5]))))
    assert abs(post.log_evidence - exact) < 6 * post.diagnostics["log_evidence_se"] + 1e-5


@pytest.mark.slow
def test_missing_entries_widen_the_posterior():
    @ab.model
    def pair():
        mu = ab.sample("mu", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Normal(mu, jnp.array([0.3, 0.3, 3.0])))

    est = ab.npe(pair, observed="y", missing={"y": 0.3}, head="mixture", num_candidates=7, **SMALL)
    est = est.fit(jax.random.key(0), num_steps=150, learning_rate=3e-3, progress_bar=False)
    y = jnp.array([1.0, np.nan, 1.2])
    seen = jnp.array([True, False, True])
    post = est(pair).posterior(
        jax.random.key(1), given={"y": ab.masked(y, observed=seen)}
    )
    precision = 1 + 1 / 0.09 + 1 / 9
    mean = (1.0 / 0.09 + 1.2 / 9) / precision
    # Monte Carlo of 4,000 draws is .004; the rest is the short training
    assert abs(float(post.mean("mu")) - mean) < 0.06
    assert abs(float(post.std("mu")) * precision**0.5 - 1) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("make", [ab.fmpe, ab.npse])
def test_transport_heads_learn_and_score(make):
    @ab.model
    def two():
        mu = ab.sample("mu", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ab.sample("y", dist.Normal(mu, 0.5).to_event(1))

    est = make(two, observed="y", width=32, context_dim=16)
    est = est.fit(jax.random.key(0), num_steps=800, learning_rate=4e-3, progress_bar=False)
    y = jnp.array([0.5, -0.4])
    post = est(two).posterior(jax.random.key(1), given={"y": y})
    np.testing.assert_allclose(post.mean("mu"), y * 0.8, atol=0.08)
    np.testing.assert_allclose(post.std("mu"), 0.2**0.5, rtol=0.15)
    # The density belongs to the draws: evidence by importance is exact up to its own error.
    exact = float(jnp.sum(dist.Normal(0.0, 1.25**0.5).log_prob(y)))
    corrected = ab.importance(proposal=est, num_samples=1000)(two).posterior(
        jax.random.key(2), given={"y": y}
    )
    error = corrected.diagnostics["log_evidence_se"]
    assert abs(corrected.log_evidence - exact) < 6 * error + 0.01  # 0.01: the integration


# ---------------------------------------------------------------------- training


def arrays_of(est):
    return [np.asarray(x) for x in jax.tree.leaves(est.network) if hasattr(x, "shape")]


def plain():
    """The cheapest to compile; the tests of training share its programs."""
    return ab.npe(
        normal, 4, observed="y", head="mixture", frame=False, num_candidates=0, **SMALL
    )


def test_a_run_that_was_killed_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    from abduce.amortized import training

    est = plain()

    def fit(**extra):
        return est.fit(jax.random.key(0), num_steps=40, progress_bar=False, **extra)

    straight = fit()
    monkeypatch.setattr(training, "_SECONDS_PER_CHECKPOINT", 0.0)
    monkeypatch.setattr(training, "_BUFFER", 7)
    original, calls = training._Run._advance, []

    def dies(self, count):
        calls.append(count)
        if len(calls) == 4:
            raise MemoryError("killed")
        return original(self, count)

    monkeypatch.setattr(training._Run, "_advance", dies)
    with pytest.raises(MemoryError):
        fit(checkpoint_dir=tmp_path)
    resumed = fit(checkpoint_dir=tmp_path)
    for a, b in zip(arrays_of(straight), arrays_of(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(straight.history["loss"], resumed.history["loss"])
    with pytest.raises(InvalidValue, match="belongs to another run"):
        est.fit(jax.random.key(1), num_steps=40, progress_bar=False, checkpoint_dir=tmp_path)


def test_interrupting_returns_what_there_is(monkeypatch):
    from abduce.amortized import training

    original = training._Run._advance

    def stops(self, count):
        if self.step >= 5:
            raise KeyboardInterrupt
        return original(self, count)

    monkeypatch.setattr(training._Run, "_advance", stops)
    est = plain().fit(jax.random.key(0), num_steps=40, progress_bar=False)
    assert 5 <= len(est.history["loss"]) < 40
    post = est(normal).posterior(jax.random.key(1), 4, given={"y": np.ones(4)})
    assert post["mu"].shape == (1, 4000)


@pytest.mark.slow
def test_simulations_made_elsewhere(tmp_path):
    est = ab.npe(coin, observed="heads", head="mixture", **SMALL)
    rows = est.simulate(jax.random.key(3), 400)
    file = np.lib.format.open_memmap(
        tmp_path / "p.npy", mode="w+", dtype=np.float32, shape=rows["p"].shape
    )
    file[:] = rows["p"]
    on_disk = {"p": file, "heads": rows["heads"]}
    a = est.fit(jax.random.key(0), data=rows, num_steps=30, progress_bar=False)
    b = est.fit(jax.random.key(0), data=on_disk, num_steps=30, progress_bar=False)
    for x, y in zip(arrays_of(a), arrays_of(b), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(InvalidValue, match="data= has no 'heads'"):
        est.fit(jax.random.key(0), data={"p": rows["p"]})
    with pytest.raises(InvalidValue, match="has rows of shape"):
        est.fit(jax.random.key(0), data={"p": rows["p"], "heads": np.zeros((400, 2))})


def test_a_simulator_that_fails_is_named(tmp_path):
    @ab.model
    def fails():
        a = ab.sample("a", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Simulator(lambda k, a: jnp.where(a > 2.5, jnp.nan, a), a))

    est = ab.npe(fails, observed="y", head="mixture", **SMALL)
    with pytest.raises(Degenerate, match=r"site 'y' are not finite.*\n?"):
        est.fit(jax.random.key(0), num_steps=50, checkpoint_dir=tmp_path, progress_bar=False)
    assert (tmp_path / "bad-batch" / "config.json").exists()


@pytest.mark.slow
def test_networks_of_an_ensemble_are_mixed():
    est = ab.npe(coin, observed="heads", head="mixture", num_networks=3, **SMALL)
    est = est.fit(jax.random.key(0), num_steps=60, progress_bar=False)
    p = jnp.linspace(1e-4, 1 - 1e-4, 4001)
    log_q = jax.vmap(lambda x: est.log_density({"p": x}, given={"heads": 7}))(p)
    assert np.trapezoid(np.exp(np.asarray(log_q, np.float64)), p) == pytest.approx(1, abs=5e-3)


# ---------------------------------------------------------------------- saving


def test_a_loaded_estimator_gives_the_same_draws(fitted, tmp_path):
    fitted.save(tmp_path / "est")
    again = ab.load(tmp_path / "est")
    y = jnp.array([0.1, 0.2, -0.4])
    a = fitted(normal).posterior(jax.random.key(0), 3, given={"y": y})
    b = again(normal).posterior(jax.random.key(0), 3, given={"y": y})
    np.testing.assert_array_equal(a["mu"], b["mu"])
    assert again.with_model(normal, 8).as_model() is not None
    with pytest.raises(NotFitted, match=r"est\.as_model"):
        again.as_model()
    with pytest.raises(NotFitted, match="does not know its model"):
        again.fit(jax.random.key(0))


# ---------------------------------------------------------------------- errors


def test_another_model_is_refused(fitted):
    @ab.model
    def wider(n):
        mu = ab.sample("mu", dist.Normal(0.0, 2.0))
        jax.vmap(lambda _: ab.sample("y", dist.Normal(mu, 1.0)))(jnp.arange(n))

    with pytest.raises(InvalidModel, match="site 'mu' of `wider` has another density"):
        fitted(wider).posterior(jax.random.key(0), 8, given={"y": jnp.zeros(8)})
    with pytest.raises(InvalidModel, match="with sites mu, y; `coin` has heads, p"):
        fitted(coin).posterior(jax.random.key(0), given={"heads": 3})


def test_messages(fitted):
    with pytest.raises(UnknownAddress, match=r"matches no site of `coin`.*Did you mean .heads."):
        ab.npe(coin, observed="head")
    with pytest.raises(InvalidAlgorithm, match="say what will be observed"):
        ab.npe(coin, observed=[])
    with pytest.raises(InvalidAlgorithm, match="every site of `coin` is observed"):
        ab.npe(coin, observed=["p", "heads"])
    with pytest.raises(NotFitted, match=r"est\.fit"):
        ab.npe(coin, observed="heads")(coin)
    with pytest.raises(InvalidValue, match="greatest size has to be that number"):
        ab.npe(normal, 8, observed="y", sizes=(1, 9))
    with pytest.raises(InvalidAlgorithm, match="no observed site has an axis"):
        ab.npe(coin, observed="heads", sizes=(1, 2))
    with pytest.raises(InvalidAlgorithm, match="head='x' is not"):
        ab.npe(coin, observed="heads", head="x")
    with pytest.raises(MissingData, match=r'given\["y"\] is missing'):
        fitted(normal).posterior(jax.random.key(0), 8)
    with pytest.raises(InvalidAlgorithm, match="trained on complete data"):
        fitted(normal).posterior(
            jax.random.key(0), 8,
            given={"y": ab.masked(jnp.zeros(8), observed=jnp.arange(8) > 2)},
        )  # fmt: skip
    with pytest.raises(InvalidValue, match="trained on 1 to 8"):
        fitted(normal).posterior(jax.random.key(0), 9, given={"y": jnp.zeros(9)})


def test_data_unlike_any_simulation_are_noticed(fitted):
    with pytest.warns(ab.AbduceWarning, match="unlike the simulations"):
        fitted(normal).posterior(jax.random.key(0), 8, given={"y": jnp.full(8, 60.0)})


def test_a_count_without_bound_is_refused_as_a_latent():
    @ab.model
    def counts():
        k = ab.sample("k", dist.Poisson(3.0))
        ab.sample("y", dist.Normal(k, 1.0))

    with pytest.raises(InvalidAlgorithm, match=r"'k'.*finitely many values"):
        ab.npe(counts, observed="y")


# ---------------------------------------------------------------------- Laplace's frame


def test_the_frame_of_a_normal_density_is_exact():
    from abduce.amortized.frames import laplace_frame, to_frame

    mean = jnp.array([0.5, -1.0, 2.0])
    tril = jnp.array([[0.5, 0.0, 0.0], [0.2, 0.1, 0.0], [-0.3, 0.05, 0.8]])
    law = dist.MultivariateNormal(mean, scale_tril=tril)
    m, found = laplace_frame(law.log_prob, 3)
    np.testing.assert_allclose(m, mean, atol=1e-4)
    np.testing.assert_allclose(found, tril, atol=1e-4)
    x = law.sample(jax.random.key(0))
    np.testing.assert_allclose(
        to_frame((m, found), x), jnp.linalg.solve(tril, x - mean), rtol=1e-3, atol=1e-3
    )


def test_a_linear_model_is_exact_before_any_training():
    """A new head is the identity, and the frame is the posterior: all weights are equal."""
    est = ab.npe(normal, 6, observed="y", sizes=(1, 6), num_candidates=0, **SMALL)
    est = est.fit(jax.random.key(0), num_steps=1, learning_rate=1e-8, progress_bar=False)
    assert est.settings.frame
    y = jnp.array([0.4, 2.0, -1.0, 0.3])
    post = ab.importance(proposal=est, num_samples=500)(normal).posterior(
        jax.random.key(1), 4, given={"y": y}
    )
    exact = dist.MultivariateNormal(jnp.zeros(4), jnp.eye(4) + 1.0).log_prob(y)
    assert post.diagnostics["ess"] > 499  # the head's small initial weights are all that differs
    assert post.log_evidence == pytest.approx(float(exact), abs=5e-3)


@pytest.mark.slow
def test_several_modes_have_no_frame():
    @ab.model
    def square():
        a = ab.sample("a", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Normal(a**2, 0.01))

    est = ab.npe(square, observed="y", head="mixture", **SMALL)
    est = est.fit(jax.random.key(0), num_steps=1, progress_bar=False)
    assert not est.settings.frame


# ---------------------------------------------------------------------- the loss


def test_draws_of_q_change_the_gradient_of_the_loss_but_not_its_value():
    # What `history` holds stays -log q at the true latents, in nats.
    layout, simulation = make_layout(
        "npe", normal, (4,), {}, "y", None, None, jax.random.key(0)
    )
    one = jnp.ones(())
    scales = {"u": (jnp.zeros(1), jnp.ones(1)), "features": [(jnp.zeros(1), one)]}
    data = {"simulation": simulation, "scales": scales}
    plain = PosteriorTask(layout, Settings("mixture", 16, 1, 8))
    several = PosteriorTask(layout, Settings("mixture", 16, 1, 8, num_candidates=5))
    network = PosteriorNetwork(jax.random.key(1), layout, plain.settings, [(4, 1)])
    batch = plain.simulate(jax.random.key(2), 16, data)

    def loss(task):
        both = eqx.filter_jit(eqx.filter_value_and_grad(task.loss))
        return both(network, jax.random.key(3), batch, data)

    (a, da), (b, db) = loss(plain), loss(several)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    leaves = zip(jax.tree.leaves(da), jax.tree.leaves(db), strict=True)
    assert max(float(jnp.max(jnp.abs(x - y))) for x, y in leaves) > 1e-3


def test_a_simulator_needs_no_density():
    @ab.model
    def noisy(n):
        mu = ab.sample("mu", dist.Normal(0.0, 1.0))
        f = lambda key, m: m + jax.random.normal(key)  # noqa: E731
        jax.vmap(lambda _: ab.sample("y", dist.Simulator(f, mu)))(jnp.arange(n))

    est = ab.npe(noisy, 4, observed="y", head="mixture", **SMALL)
    est = est.fit(jax.random.key(0), num_steps=300, learning_rate=3e-3, progress_bar=False)
    y = np.array([1.0, 0.2, -0.3, 0.8])
    post = est(noisy).posterior(jax.random.key(1), 4, given={"y": y})
    # The exact posterior is N(sum(y) / 5, 1 / 5); without the data the mean would be 0.34 off.
    assert float(post["mu"].mean()) == pytest.approx(y.sum() / 5, abs=0.1)
    assert float(post["mu"].std()) == pytest.approx(5**-0.5, rel=0.2)
    with pytest.raises(NoDensity, match="'y'"):
        ab.importance(proposal=est)(noisy).posterior(jax.random.key(1), 4, given={"y": y})
