"""Prior-fitted networks: exact posteriors, laws that hold by construction, storing, refusals."""

import dataclasses
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import abduce as ab
import abduce.dist as dist
from abduce.amortized import pfn_network, training
from abduce.amortized.pfn import from_saved, pfn
from abduce.amortized.pfn_sites import features
from abduce.amortized.pfn_task import PFNTask, estimate_constants, redrawable, simulate
from abduce.inference.persistence import LoadError, load_folder

NOISE = 0.2
SMALL = {"width": 32, "num_layers": 2, "num_heads": 2}


@ab.model
def coin(n):
    p = ab.sample("p", dist.Uniform(0.0, 1.0))  # Beta(1, 1)
    ab.sample("y", dist.Bernoulli(p).expand([n]))


@ab.model
def line(n):
    w = ab.sample("w", dist.Normal(0.0, 1.0))
    x = ab.sample("x", dist.Uniform(-1.0, 1.0).expand([n, 1]))
    ab.sample("y", dist.Normal(w * x[:, 0], NOISE))


@pytest.fixture(scope="module")
def fitted_coin():
    est = pfn(coin, 20, context="y", query=["y", "p"], num_bars=50, **SMALL)
    return est.fit(
        jax.random.key(0), num_steps=500, batch_size=64, learning_rate=3e-3, progress_bar=False
    )


@pytest.fixture(scope="module")
def fitted_line():
    est = pfn(line, 16, context=["x", "y"], query=["y", "w"], num_bars=200, **SMALL)
    return est.fit(
        jax.random.key(1), num_steps=2000, batch_size=64, learning_rate=3e-3, progress_bar=False
    )


def untrained(est, seed=0):
    """With constants and initial weights, but no step of training."""
    draws = simulate(jax.random.key(seed), est.arguments, est.table.addresses, 4096)
    table, constants = estimate_constants(
        est.table, draws, est.architecture.num_bars, est.architecture.head
    )
    network = pfn_network.PFNNetwork(jax.random.key(seed + 1), table, est.architecture)
    return dataclasses.replace(est, table=table, constants=constants, network=network)


@pytest.fixture(scope="module")
def quick():
    """With weights moved at random: for laws that hold at any weights."""
    est = untrained(pfn(line, 12, context=["x", "y"], query="y", num_bars=60, missing=0.4, **SMALL))
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype) if eqx.is_array(x) else x,
        est.network,
    )
    return dataclasses.replace(est, network=moved)


def data_of(num, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (num, 1)).astype(np.float32)
    return {"x": x, "y": (0.7 * x[:, 0] + NOISE * rng.normal(size=num)).astype(np.float32)}


# ---------------------------------------------------------------------- exact posteriors


def test_beta_bernoulli(fitted_coin):
    """Every count out of a number of flips; the largest error, not the mean."""
    predict = jax.vmap(lambda y: fitted_coin.predict({"y": y}))
    for c in (0, 1, 3, 8, 16):
        count = np.minimum(np.arange(17), c)
        d = predict((np.arange(c) < count[:, None]).astype(np.float32))
        exact = (count + 1) / (c + 2)
        assert d["y"].probs.shape == (17, 2) and d["p"].batch_shape == (17,)
        assert abs(d["y"].mean - exact).max() < 0.06
        assert abs(d["p"].mean - exact).max() < 0.06


def test_a_global_latent_has_its_posterior(fitted_coin):
    y = jnp.array([1, 1, 0, 1, 1, 0, 1, 1])
    d = fitted_coin.predict({"y": y})["p"]
    exact = scipy.stats.beta(7, 3)
    np.testing.assert_allclose(d.quantile([0.1, 0.5, 0.9]), exact.ppf([0.1, 0.5, 0.9]), atol=0.06)
    x = np.linspace(0.01, 0.99, 99)
    divergence = np.mean(exact.pdf(x) * (exact.logpdf(x) - np.asarray(d.log_prob(x)))) * 0.99
    assert divergence < 0.03
    assert d.log_prob(1.1) == -np.inf and d.log_prob(-0.1) == -np.inf


@pytest.mark.slow
def test_linear_regression(fitted_line):
    """Mean excess of -log q over the exact predictive: 0.04 nats at most (20,000 points)."""
    rng = np.random.default_rng(3)
    sets, m, total = 2000, 5, []
    predict = jax.jit(jax.vmap(lambda x, y, xq: fitted_line.predict({"x": x, "y": y}, {"x": xq})))
    for c in (0, 6):
        x = rng.uniform(-1, 1, (sets, c + m)).astype(np.float32)
        y = rng.normal(size=(sets, 1)) * x + NOISE * rng.normal(size=x.shape)
        precision = 1 + (x[:, :c] ** 2).sum(1) / NOISE**2
        mean = (x[:, :c] * y[:, :c]).sum(1) / NOISE**2 / precision
        sd = np.sqrt(x[:, c:] ** 2 / precision[:, None] + NOISE**2)
        exact = scipy.stats.norm(mean[:, None] * x[:, c:], sd).logpdf(y[:, c:])
        d = predict(x[:, :c, None], y[:, :c], x[:, c:, None])
        total.append((exact - np.asarray(d["y"].log_prob(y[:, c:]))).mean())
        error = np.asarray(d["w"].mean) - mean
        assert np.sqrt((error**2).mean()) < 0.15
    assert np.mean(total) < 0.04


@pytest.mark.slow
def test_draws_of_functions_hang_together(fitted_line, key):
    """Two queries at one input: given nothing, y and y' have correlation 1 / 1.04."""
    est = fitted_line
    x = jnp.array([[0.9], [0.9], [-0.9]])
    draws = np.asarray(est.sample_functions(key, {}, {"x": x}, num_samples=400))
    assert draws.shape == (400, 3)
    exact = 0.81 / (0.81 + NOISE**2)
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1] - exact) < 0.15
    assert abs(np.corrcoef(draws[:, 0], draws[:, 2])[0, 1] + exact) < 0.15


def test_one_query_is_drawn_from_its_prediction(quick, key):
    """Kolmogorov-Smirnov at 1e-5."""
    data, x = data_of(5), jnp.array([[0.4]])
    draws = np.asarray(quick.sample_functions(key, data, {"x": x}, num_samples=1000))[:, 0]
    d = quick.predict(data, {"x": x})
    assert scipy.stats.kstest(draws, lambda v: np.asarray(d.cdf(v[:, None]))[:, 0]).pvalue > 1e-5


def test_martingale_posterior(fitted_coin, key):
    """The mean of the continued data has the mean of the predictive distribution.

    With exact predictions it has the Beta-Binomial law; the standard deviation is near that.
    """
    y = jnp.array([1.0, 1.0, 1.0, 0.0])
    mean = lambda data: {"mean": jnp.mean(data["y"])}  # noqa: E731
    out = fitted_coin.martingale_posterior(key, {"y": y}, mean, num_samples=1000)
    total = scipy.stats.betabinom(16, 4, 2)
    assert abs(out["mean"].mean() - (3 + total.mean()) / 20) < 0.05
    assert abs(out["mean"].std() - total.std() / 20) < 0.05


def test_new_inputs_of_predictive_resampling(quick, key):
    data = data_of(4)
    seen = quick.martingale_posterior(key, data, lambda d: d, num_samples=50, num_steps=6)
    assert seen["x"].shape == (50, 10, 1) and seen["y"].shape == (50, 10)
    np.testing.assert_array_equal(seen["x"][:, :4], np.broadcast_to(data["x"], (50, 4, 1)))
    assert np.isin(seen["x"], data["x"]).all() and len(np.unique(seen["x"][:, 4:])) == 4
    x = np.linspace(-1, 1, 6, dtype=np.float32)[:, None]
    seen = quick.martingale_posterior(key, data, lambda d: d["x"], 3, 6, inputs={"x": x})
    np.testing.assert_array_equal(seen[:, 4:], np.broadcast_to(x, (3, 6, 1)))


# ---------------------------------------------------------------------- by construction


def test_the_order_of_the_context_does_not_matter(quick):
    data, x = data_of(9), {"x": jnp.linspace(-1, 1, 5)[:, None]}
    order = np.random.default_rng(1).permutation(9)
    d = quick.predict(data, x)
    shuffled = quick.predict({a: v[order] for a, v in data.items()}, x)
    np.testing.assert_allclose(d.logits, shuffled.logits, atol=1e-5)
    other = quick.predict({**data, "y": data["y"] + 1}, x)
    assert abs(d.logits - other.logits).max() > 1e-3  # it does look


def test_queries_do_not_see_each_other(quick):
    data = data_of(6)
    x = jnp.linspace(-1, 1, 5)[:, None]
    slope = jax.jacobian(lambda x: quick.predict(data, {"x": x}).logits)(x)  # (5, K, 5, 1)
    across = np.abs(np.asarray(slope)).sum((1, 3)) * (1 - np.eye(5))
    np.testing.assert_array_equal(across, np.zeros((5, 5)))
    assert np.abs(slope).sum() > 0
    moved = quick.predict(data, {"x": x.at[1:].set(0.3)})
    np.testing.assert_array_equal(quick.predict(data, {"x": x}).logits[0], moved.logits[0])
    alone = quick.predict(data, {"x": x[:1]})
    np.testing.assert_allclose(alone.logits[0], moved.logits[0], atol=1e-6)


def test_what_the_network_is_trained_on_is_what_predicts(quick):
    """The one pass of training equals encoding and decoding, for every size of the context."""
    network, table = quick.network, quick.table
    data = {a: jnp.asarray(v) for a, v in data_of(12).items()}
    for c in (0, 7):
        seen = jnp.arange(12) < c
        tokens = network.tokens(features(table, quick.constants, data, seen), seen)
        tokens = network.together(tokens, 12, seen)
        want = network.predict("y", tokens[c:], quick.constants["y"]).logits
        context = {a: v[:c] for a, v in data.items()}
        got = quick.predict(context, {"x": data["x"][c:]}).logits
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_cached_context_predicts_the_same_and_cannot_go_stale(quick):
    data, x = data_of(6), {"x": np.linspace(-1, 1, 5, dtype=np.float32)[:, None]}
    want = quick.predict(data, x)
    cache = quick.cache(data)
    kept = data["y"].copy()
    data["y"][:] = 0.0  # the caller's array changes, the cache does not
    np.testing.assert_allclose(cache.predict(x).logits, want.logits, atol=1e-5)
    np.testing.assert_array_equal(cache.context["y"], kept)
    one = cache.predict({"x": x["x"][2:3]})
    np.testing.assert_allclose(one.logits[0], want.logits[2], atol=1e-5)


def test_batches_by_vmap_and_no_new_program_for_new_data(quick, count_compiles):
    sets = [data_of(6, seed) for seed in range(3)]
    xs, ys = (jnp.stack([s[a] for s in sets]) for a in ("x", "y"))
    q = jnp.linspace(-1, 1, 4)[:, None]
    d = jax.jit(jax.vmap(lambda x, y: quick.predict({"x": x, "y": y}, {"x": q})))(xs, ys)
    assert d.batch_shape == (3, 4)
    for i, s in enumerate(sets):
        one = quick.predict(s, {"x": q})
        np.testing.assert_allclose(d.mean[i], one.mean, atol=1e-5)
        np.testing.assert_allclose(d.quantile(0.9)[i], one.quantile(0.9), atol=1e-4)
    quick.predict(data_of(7), {"x": q})
    with count_compiles() as compiles:
        quick.predict(data_of(7, 5), {"x": q})
    assert compiles.count == 0


def test_an_untrained_network_predicts_the_prior():
    est = pfn(line, 10, context=["x", "y"], query=["y", "w"], num_bars=100, **SMALL)
    d = untrained(est).predict(data_of(4), {"x": np.zeros((1, 1))})
    np.testing.assert_allclose(d["w"].quantile([0.1, 0.5, 0.9]), [-1.2816, 0, 1.2816], atol=0.1)
    np.testing.assert_allclose(d["y"].std, np.sqrt(1 / 3 + NOISE**2), rtol=0.1)


def test_missing_entries_are_told_apart(quick):
    data, q = data_of(6), {"x": np.array([[0.5]])}
    y = data["y"].copy()
    y[2] = np.nan
    gap = quick.predict({**data, "y": y}, q)
    masked = ab.masked(data["y"], observed=jnp.arange(6) != 2)
    np.testing.assert_array_equal(gap.logits, quick.predict({**data, "y": masked}, q).logits)
    assert np.isfinite(gap.logits).all()
    assert abs(gap.logits - quick.predict(data, q).logits).max() > 1e-5
    y[2] = 0.0  # the centre of the site, which is what NaN is replaced by
    assert abs(gap.logits - quick.predict({**data, "y": y}, q).logits).max() > 1e-5
    assert np.isfinite(quick.predict(data, {"x": np.array([[np.nan]])}).logits).all()


def test_mixture_head_and_bfloat16(quick):
    est = untrained(
        pfn(line, 10, context=["x", "y"], query="y", head="mixture", num_components=3, **SMALL)
    )
    q = {"x": np.array([[1.0], [0.1]])}
    d = est.predict({}, q)
    assert d.logits.shape == (2, 3)
    spread = 0.5 * float(est.constants["y"]["scale"])  # of one component, before training
    np.testing.assert_allclose(d.scale, spread, rtol=1e-3)

    settings = dataclasses.replace(quick.architecture, precision="bfloat16")
    other = pfn_network.PFNNetwork(jax.random.key(0), quick.table, settings)
    weights = jax.tree.leaves(quick.network)
    network = jax.tree.unflatten(jax.tree.structure(other), weights)
    half = dataclasses.replace(quick, network=network, architecture=settings)
    want, got = quick.predict(data_of(6), q), half.predict(data_of(6), q)
    assert {x.dtype for x in jax.tree.leaves(half.network)} == {jnp.dtype("float32")}
    difference = np.abs(np.asarray(got.logits - want.logits)).max()
    assert 0 < difference < 0.05 * np.abs(np.asarray(want.logits)).max()


def test_counts_have_an_open_end():
    @ab.model
    def counts(n):
        rate = ab.sample("rate", dist.Gamma(2.0, 1.0))
        ab.sample("y", dist.Poisson(rate).expand([n]))

    d = untrained(pfn(counts, 10, context="y", query="y", **SMALL)).predict({})
    exact = scipy.stats.nbinom(2, 0.5)  # the prior predictive law
    at = np.arange(6)
    np.testing.assert_allclose(np.exp(d.log_prob(at)), exact.pmf(at), atol=0.01)
    assert np.isfinite(d.log_prob(1000)) and d.log_prob(-1) == -np.inf
    assert abs(float(d.mean) - 2) < 0.1


# ---------------------------------------------------------------------- training


def test_redrawn_targets_keep_the_latents(key):
    est = pfn(line, 12, context=["x", "y"], query="y", **SMALL)
    task = PFNTask(est.table, ("y",), 50)
    batch = task.simulate(key, 40, {"arguments": est.arguments})
    x, y, again = batch["values"]["x"][..., 0], batch["values"]["y"], batch["again"]["y"]
    assert again.shape == (40, 50, 12)
    w = (x[:, None] * again).mean((1, 2)) / (x**2).mean(1)  # the slope of each set
    residual = np.asarray(again - (w[:, None] * x)[:, None]) / NOISE
    assert scipy.stats.kstest(residual[:, :40].ravel()[::40], "norm").pvalue > 1e-5
    np.testing.assert_allclose((x * y).sum(1) / (x**2).sum(1), w, atol=0.6)


def test_what_may_be_redrawn():
    def found(model, **roles):
        est = pfn(model, 6, **roles)
        return redrawable(model.program(6), est.table)

    assert found(line, context=["x", "y"], query="y") == ("y",)

    @ab.model
    def joint(n):
        ab.sample("y", dist.MultivariateNormal(jnp.zeros(n), 0.5 + jnp.eye(n)))

    @ab.model
    def walk(n):
        def step(y, _):
            y = ab.sample("y", dist.Normal(y, 1.0))
            return y, None

        jax.lax.scan(step, 0.0, None, length=n)

    @ab.model
    def followed(n):
        y = ab.sample("y", dist.Normal(0.0, 1.0).expand([n]))
        ab.sample("x", dist.Normal(y, 1.0))

    assert found(joint, context="y", query="y") == ()
    assert found(walk, context="y", query="y") == ()
    assert found(followed, context=["x", "y"], query="y") == ()


def test_a_global_site_as_long_as_the_data_is_global():
    @ab.model
    def prior(n):
        b = ab.sample("b", dist.Normal(0.0, 1.0).expand([6]))
        ab.sample("y", dist.Normal(jnp.sum(b), 1.0).expand([n]))

    table = pfn(prior, 6, context="y", query=["y", "b"]).table
    assert table.targets == ("y",) and table.latents == ("b",)


def test_resuming_gives_the_same_bits(tmp_path, monkeypatch):
    est = pfn(line, 8, context=["x", "y"], query="y", num_bars=10, **SMALL)
    settings = dict(num_steps=12, batch_size=4, validate_every=4, progress_bar=False)
    whole = est.fit(jax.random.key(4), **settings)
    validate, calls = training._Run._validate, []

    def killed(self):
        calls.append(self.step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(self)

    monkeypatch.setattr(training._Run, "_validate", killed)
    part = est.fit(jax.random.key(4), checkpoint_dir=tmp_path / "run", **settings)
    assert len(part.history["loss"]) == 8
    monkeypatch.undo()
    rest = est.fit(jax.random.key(4), checkpoint_dir=tmp_path / "run", **settings)
    for a, b in zip(jax.tree.leaves(whole.network), jax.tree.leaves(rest.network), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(whole.history["loss"], rest.history["loss"])


@pytest.mark.slow  # compiles a training loop of its own
def test_data_made_elsewhere(key):
    rng = np.random.default_rng(0)
    p = rng.uniform(size=(200, 1))
    rows = {"y": (rng.uniform(size=(200, 20)) < p).astype(np.int32), "p": p[:, 0]}
    est = pfn(coin, 20, context="y", query=["y", "p"], num_bars=20, **SMALL)
    fitted = est.fit(key, num_steps=20, batch_size=16, data=rows, progress_bar=False)
    assert len(fitted.history["loss"]) == 20 and not est.is_fitted


def test_data_made_elsewhere_is_checked(key):
    est = pfn(coin, 20, context="y", query=["y", "p"], num_bars=20, **SMALL)
    rows = {"y": np.zeros((200, 20), np.int32), "p": np.linspace(0, 1, 200)}
    with pytest.raises(ab.InvalidValue, match=r"data\['y'\] has shape \(200, 19\), expected"):
        est.fit(key, num_steps=2, data={**rows, "y": rows["y"][:, :19]}, progress_bar=False)
    with pytest.raises(ab.MissingData, match="data has no 'p'"):
        est.fit(key, num_steps=2, data={"y": rows["y"]}, progress_bar=False)


def test_a_prior_that_is_not_finite_is_named(key):
    @ab.model
    def broken(n):
        s = ab.sample("s", dist.Normal(0.0, 1.0))
        ab.deterministic("y", jnp.log(s) * jnp.ones(n))

    with pytest.raises(ab.InvalidValue, match="draws of site 'y' of `broken`"):
        pfn(broken, 5, context="y", query="y", **SMALL).fit(key, num_steps=2, progress_bar=False)


# ---------------------------------------------------------------------- storing


def test_a_loaded_one_predicts_the_same_bits(fitted_coin, tmp_path):
    fitted_coin.save(tmp_path / "coin")
    kind, config, arrays = load_folder(tmp_path / "coin")
    assert kind == "pfn"
    loaded = from_saved(config, arrays)
    y = {"y": np.array([1, 0, 1])}
    mine, other = fitted_coin.predict(y), loaded.predict(y)
    for a in ("y", "p"):
        np.testing.assert_array_equal(mine[a].logits, other[a].logits)
        np.testing.assert_array_equal(mine[a].mean, other[a].mean)
    np.testing.assert_array_equal(loaded.history["loss"], fitted_coin.history["loss"])
    with pytest.raises(ab.InvalidAlgorithm, match="a loaded pfn has no prior"):
        loaded.fit(jax.random.key(0), num_steps=2, progress_bar=False)


def test_what_does_not_fit_is_not_loaded(quick, tmp_path):
    quick.save(tmp_path / "line")
    _, config, arrays = load_folder(tmp_path / "line")
    name = next(a for a in arrays if "embed" in a)
    with pytest.raises(LoadError, match=r"the array .network.*missing"):
        from_saved(config, {a: x for a, x in arrays.items() if a != name})
    with pytest.raises(LoadError, match="the settings ask for"):
        from_saved(config, {**arrays, name: arrays[name][:1]})
    with pytest.raises(LoadError, match="lacks a setting"):
        from_saved({a: x for a, x in config.items() if a != "table"}, arrays)


# ---------------------------------------------------------------------- refusals


def test_roles_that_do_not_fit():
    with pytest.raises(ab.UnknownAddress, match="context 'z' matches no site of `line`"):
        pfn(line, 10, context=["x", "z"], query="y")
    with pytest.raises(ab.InvalidAlgorithm, match="leading axis of every context site"):
        pfn(line, 10, context=["x", "w"], query="y")
    with pytest.raises(ab.InvalidAlgorithm, match="1 numbers per point"):
        pfn(line, 10, context=["x", "y"], query="x")
    with pytest.raises(ab.InvalidAlgorithm, match="at least 2 are needed"):
        pfn(line, 1, context=["x", "y"], query="y")
    with pytest.raises(ab.InvalidAlgorithm, match="takes a model"):
        pfn(lambda n: n, 10, context="x", query="y")


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"head": "spline"}, "head must be one of 'bars', 'mixture'"),
        ({"width": 30, "num_heads": 4}, "width 30 is not divisible"),
        ({"num_layers": 0}, "num_layers must be an int >= 1"),
        ({"missing": 1.5}, "missing must lie in"),
        ({"precision": "float8"}, "precision must be one of"),
    ],
)
def test_settings_that_do_not_fit(setting, message):
    with pytest.raises(ab.InvalidAlgorithm, match=message):
        pfn(line, 10, context=["x", "y"], query="y", **setting)


def test_an_unfitted_one_says_so(key):
    est = pfn(line, 10, context=["x", "y"], query="y")
    for call in (
        lambda: est.predict({}, {"x": np.zeros((1, 1))}),
        lambda: est.cache({}),
        lambda: est.sample_functions(key, {}, {"x": np.zeros((1, 1))}),
        lambda: est.save("nowhere"),
    ):
        with pytest.raises(ab.NotFitted, match="is not fitted"):
            call()


def test_data_that_do_not_fit_are_named(fitted_coin, key):
    data, x = data_of(5), {"x": np.zeros((2, 1))}
    quick = untrained(pfn(line, 12, context=["x", "y"], query="y", num_bars=20, **SMALL))
    predict = quick.predict
    with pytest.raises(ab.UnknownAddress, match=r"context\['yy'\].*Did you mean \"y\""):
        predict({"x": data["x"], "yy": data["y"]}, x)
    with pytest.raises(ab.MissingData, match="context has no 'y'"):
        predict({"x": data["x"]}, x)
    with pytest.raises(ab.MissingData, match="the query has no 'x'"):
        predict(data)
    with pytest.raises(ab.InvalidValue, match=r"query\['y'\] is what is predicted"):
        predict(data, {**x, "y": np.zeros(2)})
    with pytest.raises(ab.InvalidValue, match=r"context\['x'\] has shape \(5,\), expected"):
        predict({**data, "x": data["x"][:, 0]}, x)
    with pytest.raises(ab.InvalidValue, match=r"different numbers of points: x \(5, 1\), y \(4,\)"):
        predict({**data, "y": data["y"][:4]}, x)
    gap = np.where(np.arange(5) == 3, np.nan, data["y"])
    with pytest.raises(ab.MissingData, match=r"context\['y'\].*1 missing .* \(3,\).*missing=0"):
        predict({**data, "y": gap}, x)
    with pytest.raises(ab.MissingData, match=r"query\['x'\]"):
        predict(data, {"x": np.full((2, 1), np.nan)})
    with pytest.raises(ab.InvalidValue, match="infinite"):
        predict({**data, "y": np.full(5, np.inf)}, x)
    with pytest.raises(ab.InvalidValue, match="has the value 2"):
        fitted_coin.predict({"y": np.array([0, 2])})
    with pytest.raises(ab.InvalidValue, match="next point, which has no inputs"):
        fitted_coin.predict({"y": np.array([0, 1])}, {"y": np.array([1])})
    with pytest.raises(ab.InvalidValue, match="points without inputs"):
        fitted_coin.sample_functions(key, {"y": np.array([0, 1])}, None)
    with pytest.raises(ab.InvalidAlgorithm, match=r"pfn\.fit has no setting 'num_step'"):
        quick.fit(key, num_steps=2, num_step=3)
    traced = jax.jit(lambda y: predict({"x": data["x"], "y": y}, x).mean)(gap)
    assert np.isnan(traced).all()  # no error can be raised there, and none is hidden


def test_more_points_than_trained_on_are_allowed_with_a_warning(quick):
    x = {"x": np.zeros((1, 1))}
    with pytest.warns(ab.AbduceWarning, match=r"a context of 13 points; trained on .* 12"):
        d = quick.predict(data_of(13), x)
    assert np.isfinite(d.mean).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick.predict(data_of(12), x)


def test_the_bump_of_the_bar_head_is_a_normal(key):
    """With the free part at zero, a bump turns a normal prior into any normal."""
    head = pfn_network.BarHead(key, 8, 400, 1)
    weights = head.bump.weight.at[:].set(0.0)
    bias = jnp.array([0.5 / 3, jnp.log(0.3)])
    head = eqx.tree_at(lambda h: (h.bump.weight, h.bump.bias), head, (weights, bias))
    borders = scipy.stats.norm.ppf(np.linspace(0.0005, 0.9995, 401))
    log_mass = np.log(np.diff(scipy.stats.norm.cdf(borders)))
    logits = head(jnp.zeros(8), {"log_mass": jnp.asarray(log_mass)})[0]
    middle = (borders[1:] + borders[:-1]) / 2
    p = np.exp(np.asarray(jax.nn.log_softmax(logits)))
    mean = (p * middle).sum()
    np.testing.assert_allclose(mean, 0.5, atol=5e-3)
    np.testing.assert_allclose(np.sqrt((p * (middle - mean) ** 2).sum()), 0.3, atol=5e-3)
