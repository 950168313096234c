"""Every member of `Posterior`, against NumPy and closed forms.

Statistical tests have fixed keys and 4.5 standard errors: a false alarm in 1.5e5 comparisons.
"""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian import DATA, NAMES, SCALES, exact, groups, latents
from scipy.stats import norm

import abduce as ab
import abduce.dist as dist
from abduce.inference import diagnostics

KEY = jax.random.key(7)
SE = 4.5
N = 4000


def fit(algorithm, **options):
    model = algorithm(groups)
    return model.posterior(KEY, SCALES, given={"y": DATA}, coords={"group": NAMES}, **options)


@pytest.fixture(scope="module")
def independent():
    """Independent draws, equally weighted: Laplace's approximation is exact here."""
    return fit(ab.laplace(num_samples=N))


@pytest.fixture(scope="module")
def weighted():
    return fit(ab.importance(num_samples=N))


@pytest.fixture(scope="module")
def chains():
    return fit(ab.nuts(num_warmup=200, num_samples=250))


@pytest.fixture(params=["independent", "weighted", "chains"])
def post(request):
    return request.getfixturevalue(request.param)


def weights_of(post):
    shape = np.shape(post.draws["mu"])
    if post.log_weights is None:
        return np.full(shape, 1 / np.prod(shape))
    w = np.exp(np.asarray(post.log_weights, float))
    return w / w.sum()


def assert_mean(draws, expected, sd=None):
    """The mean of independent draws along the first axis, to 4.5 standard errors."""
    draws = np.asarray(draws, float)
    error = (draws.std(0) if sd is None else sd) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(0) - expected) < SE * error), (draws.mean(0), expected)


def assert_sd(draws, expected):
    """The standard deviation of independent normal draws, to 4.5 standard errors."""
    draws = np.asarray(draws, float)
    error = expected / np.sqrt(2 * len(draws))
    assert np.all(np.abs(draws.std(0) - expected) < SE * error), (draws.std(0), expected)


# -- draws -----------------------------------------------------------------------------------


def test_shapes_and_names(independent, weighted, chains):
    for post, shape in [(independent, (1, N)), (weighted, (1, N)), (chains, (4, 250))]:
        assert (post.num_chains, post.num_draws) == shape
        assert post.keys() == list(post) == ["mu", "theta", "effect"]
        assert "theta" in post and "y" not in post
        for address, own in [("mu", ()), ("theta", (3,)), ("effect", (3,))]:
            assert post[address].shape == post.draws[address].shape == (*shape, *own)
    assert independent.log_weights is None and chains.log_weights is None
    assert weighted.log_weights.shape == (1, N)
    assert independent.params == {}


def test_equally_weighted_draws_are_the_draws(independent):
    np.testing.assert_array_equal(independent["theta"], independent.draws["theta"])


def test_deterministics_are_consistent_with_the_draws(post):
    difference = post["theta"] - post["mu"][..., None]
    np.testing.assert_allclose(post["effect"], difference, atol=1e-5)


def test_weighted_draws_are_resampled_once(weighted):
    mu = np.asarray(weighted["mu"])[0]
    np.testing.assert_array_equal(mu, weighted["mu"][0])
    raw = np.asarray(weighted.draws["mu"])[0]
    values, counts = np.unique(mu, return_counts=True)
    expected = dict(zip(raw, N * weights_of(weighted)[0], strict=True))  # the draws differ
    for value, count in zip(values, counts, strict=True):
        assert abs(count - expected.pop(value)) < 1 + 1e-6
    assert max(expected.values()) < 1 + 1e-6  # only light draws were left out


def test_an_unknown_address_names_the_known(weighted):
    for ask in (weighted.__getitem__, weighted.mean, weighted.std):
        with pytest.raises(ab.UnknownAddress, match=r'"?thet.*mu, theta, effect.*mean "theta"'):
            ask("thetaa")
    with pytest.raises(KeyError):
        weighted.quantile("thetaa", 0.5)


# -- statistics ------------------------------------------------------------------------------


def test_moments_are_numpys(post):
    w = weights_of(post)
    for address in post:
        x = np.asarray(post.draws[address], float)
        v = w.reshape(w.shape + (1,) * (x.ndim - 2))
        mean = (v * x).sum((0, 1))
        np.testing.assert_allclose(post.mean(address), mean, atol=1e-6)
        sd = np.sqrt((v * (x - mean) ** 2).sum((0, 1)))
        np.testing.assert_allclose(post.std(address), sd, rtol=1e-5)


@pytest.mark.parametrize("q", [0.3, [0.05, 0.5, 0.95]])
def test_quantiles(post, q):
    found = post.quantile("theta", q)
    assert found.shape == (*np.shape(q), 3)
    x, w = np.asarray(post.draws["theta"], float).reshape(-1, 3), weights_of(post).ravel()
    if post.log_weights is None:
        np.testing.assert_allclose(found, np.quantile(x, q, axis=0), rtol=1e-5)
    for level, row in zip(np.atleast_1d(q), np.atleast_2d(found), strict=True):
        below = (w[:, None] * (x < row)).sum(0)  # the definition, up to one draw's weight
        np.testing.assert_allclose(below, level, atol=2 * w.max() + 1e-6)


def test_quantiles_outside_the_unit_interval(independent):
    with pytest.raises(ab.InvalidValue, match=r"\[0, 1\].*50"):
        independent.quantile("mu", 50)


def test_map_and_expect(post):
    def f(d):
        return {"sum": d["theta"].sum() + d["mu"], "outer": jnp.outer(d["theta"], d["effect"])}

    mapped = post.map(f)
    x, e = np.asarray(post.draws["theta"]), np.asarray(post.draws["effect"])
    np.testing.assert_allclose(mapped["sum"], x.sum(-1) + post.draws["mu"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mapped["outer"], x[..., None] * e[:, :, None], rtol=1e-5, atol=1e-5)
    for address, value in post.map(f, batch_size=300).items():
        np.testing.assert_allclose(value, mapped[address], rtol=1e-5, atol=1e-6)
    w = weights_of(post)
    expected = (w[..., None, None] * np.asarray(mapped["outer"], float)).sum((0, 1))
    np.testing.assert_allclose(post.expect(f)["outer"], expected, rtol=1e-5, atol=1e-6)


def test_moments_are_those_of_the_posterior(independent, weighted):
    truth = exact()
    draws = latents(independent)[0]
    assert_mean(draws, truth.mean, truth.sd)
    assert_sd(draws, truth.sd)
    # Of a weighted mean, to first order: sqrt(sum w^2 (x - mean)^2).
    w = weights_of(weighted)[0]
    for i, x in enumerate([weighted.draws["mu"][0], *np.asarray(weighted.draws["theta"][0]).T]):
        error = np.sqrt((w**2 * (x - truth.mean[i]) ** 2).sum())
        assert abs((w * x).sum() - truth.mean[i]) < SE * error


def test_log_evidence(independent, weighted, chains):
    truth = exact().log_evidence
    assert isinstance(independent.log_evidence, float) and isinstance(weighted.log_evidence, float)
    assert independent.log_evidence == pytest.approx(truth, abs=2e-4)
    assert abs(weighted.log_evidence - truth) < SE * weighted.diagnostics["log_evidence_se"]
    assert chains.log_evidence is None


def test_summary_has_labels_values_and_an_interval(post):
    table = post.summary(interval=0.8)
    labels = ["mu", *(f"theta[{n}]" for n in NAMES), *(f"effect[{n}]" for n in NAMES)]
    assert list(table.labels) == labels
    assert "theta[south]" in str(table)
    # The table divides by n - 1.
    np.testing.assert_allclose(table["theta"]["mean"], post.mean("theta"), rtol=1e-5)
    np.testing.assert_allclose(table["theta"]["sd"], post.std("theta"), rtol=1e-2)
    np.testing.assert_allclose(table["theta"]["10%"], post.quantile("theta", 0.1), rtol=1e-4)
    np.testing.assert_allclose(table["theta"]["90%"], post.quantile("theta", 0.9), rtol=1e-4)
    if post.log_weights is None:
        x = np.asarray(post["mu"], float)
        assert table["mu"]["ess_bulk"] == pytest.approx(diagnostics.ess_bulk(x), rel=1e-5)
        assert table["mu"]["r_hat"] == pytest.approx(diagnostics.rhat(x), rel=1e-5)


def test_labels_come_from_pandas_and_xarray(weighted):
    pandas, xarray = pytest.importorskip("pandas"), pytest.importorskip("xarray")
    series = pandas.Series(DATA, index=pandas.Index(NAMES, name="group"))
    array = xarray.DataArray(DATA, dims="group", coords={"group": NAMES})
    for data in (series, array):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            alg = ab.importance(num_samples=N)
            post = alg(groups).posterior(KEY, SCALES, given={"y": data})
        np.testing.assert_array_equal(post["mu"], weighted["mu"])
        assert post.summary().labels == weighted.summary().labels


def test_repr_says_what_there_is(weighted, chains):
    assert repr(chains) == "<Posterior by nuts: 4 x 250 draws of mu (), theta (3,), effect (3,)>"
    assert f"1 x {N} draws, weighted" in repr(weighted) and "log evidence -" in repr(weighted)


# -- sample ----------------------------------------------------------------------------------


def test_sample_draws_whole_rows_by_weight(weighted):
    drawn = weighted.sample(jax.random.key(1), N)
    assert {a: x.shape for a, x in drawn.items()} == {"mu": (N,), "theta": (N, 3), "effect": (N, 3)}
    np.testing.assert_allclose(drawn["effect"], drawn["theta"] - drawn["mu"][:, None], atol=1e-5)
    assert np.isin(drawn["mu"], weighted.draws["mu"]).all()
    assert_mean(drawn["theta"], weighted.mean("theta"), weighted.std("theta"))
    other = weighted.sample(jax.random.key(2), N)
    assert not np.array_equal(drawn["mu"], other["mu"])


def test_sample_needs_a_key(independent):
    with pytest.raises(ab.MissingKey, match=r"post\.sample.*the int 3.*jax\.random\.key\(3\)"):
        independent.sample(3, 10)


# -- predict ---------------------------------------------------------------------------------


def test_predict_draws_the_data_anew(independent):
    truth = exact()
    out = independent.predict(jax.random.key(1))
    assert {a: x.shape for a, x in out.items()} == {"effect": (1, N, 3), "y": (1, N, 3)}
    np.testing.assert_allclose(out["effect"], independent["effect"], atol=1e-5)
    assert_mean(out["y"][0], truth.mean[1:])
    assert_sd(out["y"][0], np.sqrt(truth.sd[1:] ** 2 + SCALES**2))
    noise = np.asarray(out["y"][0] - independent["theta"][0]) / SCALES  # at the draws' own theta
    assert_mean(noise, 0, 1)
    assert_sd(noise, 1)


def test_predict_at_other_arguments(independent):
    out = independent.predict(jax.random.key(1), 0.01 * SCALES)
    noise = np.asarray(out["y"][0] - independent["theta"][0]) / (0.01 * SCALES)
    assert_sd(noise, 1)


def test_predict_in_batches_is_the_same(chains):
    whole, batched = chains.predict(KEY), chains.predict(KEY, batch_size=300)
    for address, value in whole.items():
        np.testing.assert_allclose(batched[address], value, atol=1e-5)


def test_predict_depends_on_the_key_alone(independent):
    a, b = independent.predict(KEY), independent.predict(KEY)
    np.testing.assert_array_equal(a["y"], b["y"])
    assert not np.array_equal(a["y"], independent.predict(jax.random.key(8))["y"])


def test_predictions_of_weighted_draws_are_resampled_with_them(weighted):
    out = weighted.predict(KEY)
    np.testing.assert_allclose(out["effect"], weighted["effect"], atol=1e-5)
    assert np.abs(np.asarray(out["y"] - weighted["theta"]) / SCALES).mean() < 1  # of a normal: 0.8


def test_redraw_takes_what_is_downstream_along(independent):
    groups_anew = independent.predict(KEY, redraw="theta")
    assert set(groups_anew) == {"theta", "effect", "y"}
    assert_mean(groups_anew["theta"][0] - independent["mu"][0][:, None], 0, 1)
    assert_sd(groups_anew["effect"][0], 1)
    everything = independent.predict(KEY, redraw=["mu"])  # theta depends on mu
    assert set(everything) == {"mu", "theta", "effect", "y"}
    assert_mean(everything["mu"][0], 0, 2)
    assert_sd(everything["mu"][0], 2)
    assert_sd(everything["theta"][0], np.sqrt(5))
    assert_sd(everything["y"][0], np.sqrt(5 + SCALES**2))
    with pytest.raises(ab.UnknownAddress, match=r"'thetaa'.*mu, theta.*Did you mean"):
        independent.predict(KEY, redraw="thetaa")


def test_new_groups_need_redraw(independent):
    five = np.ones(5, np.float32)
    message = r"'theta' have shape \(3,\).*shape \(5,\).*redraw=\"theta\""
    with pytest.raises(ab.InvalidValue, match=message):
        independent.predict(KEY, five)
    out = independent.predict(KEY, five, redraw="theta")
    assert out["y"].shape == (1, N, 5)
    truth = exact()
    assert_mean(out["y"][0], truth.mean[0])
    assert_sd(out["y"][0], np.sqrt(truth.cov[0, 0] + 1 + 1))


def test_given_values_are_held(independent):
    out = independent.predict(KEY, given={"mu": 10.0}, redraw="theta")
    assert "mu" not in out
    assert_mean(out["theta"][0], 10, 1)
    with pytest.raises(ab.UnknownAddress, match=r'given.*"muu".*Did you mean "mu"'):
        independent.predict(KEY, given={"muu": 10.0})
    held = {"mu": 0.0, "theta": np.zeros(3), "y": DATA}
    assert set(independent.predict(KEY, given=held)) == {"effect"}


def test_predict_under_an_intervention(independent):
    treated = ab.do(groups, {"mu": -3.0})
    out = independent.predict(KEY, model=treated)
    np.testing.assert_allclose(out["mu"], -3)
    np.testing.assert_allclose(out["effect"], independent["theta"] + 3, atol=1e-5)
    assert_mean(out["y"][0] - independent["theta"][0], 0, SCALES)
    out = independent.predict(KEY, model=treated, redraw="theta")
    assert_mean(out["theta"][0], -3, 1)


def test_nothing_to_predict():
    @ab.model
    def alone():
        ab.sample("x", dist.Normal(0, 1))

    prior = alone.prior(KEY, num_samples=10)
    with pytest.raises(ab.InvalidValue, match=r"nothing in `alone` is left to draw.*redraw="):
        prior.predict(KEY)


# -- likelihood, ArviZ, files ----------------------------------------------------------------


def test_log_likelihood(post):
    expected = norm.logpdf(DATA, np.asarray(post["theta"], float), SCALES)
    for batch_size in (None, 300):
        found = post.log_likelihood(batch_size=batch_size)
        assert list(found) == ["y"]
        np.testing.assert_allclose(found["y"], expected, rtol=1e-4, atol=1e-4)


def dataset(tree, group):
    return tree[group].to_dataset() if hasattr(tree[group], "to_dataset") else tree[group]


def test_arviz_groups(chains):
    tree = chains.to_arviz(predictive=chains.predict(KEY))
    posterior = dataset(tree, "posterior")
    assert dict(posterior.sizes) == {"chain": 4, "draw": 250, "group": 3}
    assert posterior["theta"].dims == ("chain", "draw", "group")
    assert list(posterior["group"].values) == NAMES
    np.testing.assert_array_equal(posterior["theta"], chains["theta"])
    stats = dataset(tree, "sample_stats")
    names = {"diverging", "energy", "n_steps", "tree_depth", "acceptance_rate", "step_size", "lp"}
    assert names <= set(stats) and stats["lp"].shape == (4, 250)
    assert dataset(tree, "observed_data")["y"].dims == ("group",)
    np.testing.assert_array_equal(dataset(tree, "observed_data")["y"], DATA)
    likelihood = dataset(tree, "log_likelihood")["y"]
    assert likelihood.dims == ("chain", "draw", "group")
    np.testing.assert_allclose(likelihood, chains.log_likelihood()["y"])
    assert dataset(tree, "posterior_predictive")["y"].shape == (4, 250, 3)
    assert posterior.attrs["algorithm"] == "nuts"


def test_arviz_of_weighted_draws(weighted):
    tree = weighted.to_arviz()
    np.testing.assert_array_equal(dataset(tree, "posterior")["mu"], weighted["mu"])
    expected = norm.logpdf(DATA, np.asarray(weighted["theta"], float), SCALES)
    np.testing.assert_allclose(dataset(tree, "log_likelihood")["y"], expected, rtol=1e-4, atol=1e-4)


def test_data_observed_in_the_program():
    @ab.model
    def inside(y):
        mu = ab.sample("mu", dist.Normal(0, 2))
        ab.sample("y", dist.Normal(mu, 1), obs=y)

    post = ab.laplace(num_samples=50)(inside).posterior(KEY, DATA)
    expected = norm.logpdf(DATA, np.asarray(post["mu"], float)[..., None])
    np.testing.assert_allclose(post.log_likelihood()["y"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(dataset(post.to_arviz(), "observed_data")["y"], DATA)
    assert post.predict(KEY)["y"].shape == (1, 50, 3)
    assert not np.isin(post.predict(KEY)["y"], DATA).any()


def test_save_and_load(post, tmp_path):
    post.save(tmp_path / "post")
    loaded = ab.load(tmp_path / "post")
    assert loaded.keys() == post.keys() and repr(loaded) == repr(post)
    for address in post:
        np.testing.assert_array_equal(loaded[address], post[address])
        np.testing.assert_allclose(loaded.mean(address), post.mean(address), rtol=1e-6)
    assert str(loaded.summary()) == str(post.summary())
    assert loaded.warnings == post.warnings
    np.testing.assert_array_equal(loaded.given["y"], DATA)
    assert set(loaded.diagnostics) == set(post.diagnostics)
    with pytest.raises(ab.InvalidValue, match=r"loaded from disk.*predict\(key, \*args, model=m\)"):
        loaded.predict(KEY)
    with pytest.raises(ab.InvalidValue, match=r"log_likelihood.*before saving"):
        loaded.log_likelihood()
    again = loaded.predict(KEY, SCALES, model=groups)
    np.testing.assert_allclose(again["y"], post.predict(KEY)["y"], atol=1e-5)
    assert dataset(loaded.to_arviz(), "observed_data")["y"].dims == ("group",)


def test_a_saved_posterior_holds_no_code(independent, tmp_path):
    folder = independent.save(tmp_path / "post")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "weights.safetensors"]
    assert json.loads((folder / "config.json").read_text())["kind"] == "posterior"


# -- partly observed data --------------------------------------------------------------------


@pytest.fixture(scope="module")
def gappy():
    y = np.array([1.5, np.nan, 3.0], np.float32)
    data = ab.masked(y, observed=~np.isnan(y))
    return ab.importance(num_samples=N)(groups).posterior(KEY, SCALES, given={"y": data})


def test_hidden_entries_are_inferred(gappy):
    truth = exact(DATA, SCALES, observed=np.array([True, False, True]))
    w = weights_of(gappy)[0]
    y = np.asarray(gappy.draws["y"], float)[0]
    assert (y[:, 0] == 1.5).all() and (y[:, 2] == 3.0).all()
    error = np.sqrt((w**2 * (y[:, 1] - truth.mean[2]) ** 2).sum())
    assert abs(gappy.mean("y")[1] - truth.mean[2]) < SE * error
    assert abs(gappy.log_evidence - truth.log_evidence) < SE * gappy.diagnostics["log_evidence_se"]


def test_predict_replicates_what_was_observed_and_keeps_the_rest(gappy):
    out = gappy.predict(KEY)["y"]
    np.testing.assert_array_equal(out[..., 1], gappy["y"][..., 1])
    noise = np.asarray(out - gappy["theta"])[0] / SCALES
    assert 0.7 < noise[:, 0].std() < 1.3 and not np.isin(out[..., [0, 2]], [1.5, 3.0]).any()


def test_the_likelihood_is_that_of_the_observed(gappy, tmp_path):
    found = np.asarray(gappy.log_likelihood()["y"])
    assert np.isnan(found[..., 1]).all()
    expected = norm.logpdf([1.5, 3.0], np.asarray(gappy["theta"], float)[..., [0, 2]], [1.0, 2.0])
    np.testing.assert_allclose(found[..., [0, 2]], expected, rtol=1e-4, atol=1e-4)
    tree = gappy.to_arviz()
    np.testing.assert_allclose(dataset(tree, "log_likelihood")["y_observed"], found[..., [0, 2]])
    np.testing.assert_array_equal(dataset(tree, "observed_data")["y"], [1.5, np.nan, 3.0])
    gappy.save(tmp_path / "gappy")
    loaded = ab.load(tmp_path / "gappy")
    np.testing.assert_array_equal(loaded.given["y"].observed, [True, False, True])
    again = loaded.predict(KEY, SCALES, model=groups)
    np.testing.assert_allclose(again["y"], gappy.predict(KEY)["y"], atol=1e-5)


# -- a posterior is a pytree -----------------------------------------------------------------


def test_tree_map_and_jit(post):
    doubled = jax.tree.map(lambda x: 2 * x, post)
    assert type(doubled) is ab.Posterior
    np.testing.assert_allclose(doubled.draws["theta"], 2 * np.asarray(post.draws["theta"]))
    same = jax.tree.unflatten(jax.tree.structure(post), jax.tree.leaves(post))
    assert repr(same) == repr(post)
    found = jax.jit(lambda p: (p.mean("theta"), p.std("theta"), p.expect(lambda d: d["mu"])))(post)
    expected = post.mean("theta"), post.std("theta"), post.mean("mu")
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    different = jax.jit(lambda p: p["mu"])(post) != post["mu"]
    assert np.mean(different) < 0.01  # in float32, rounding may move an edge


def test_vmap_over_data_is_a_loop():
    levels = np.array([0.1, 0.5])

    @jax.jit
    @jax.vmap
    def fit(y):
        post = ab.importance(num_samples=500)(groups).posterior(KEY, SCALES, given={"y": y})
        return post, post.mean("theta"), post.quantile("theta", levels), post["mu"]

    ys = np.stack([DATA, DATA + 1, -DATA])
    posts, means, quantiles, mus = fit(ys)
    assert posts.draws["theta"].shape == (3, 1, 500, 3) and posts.log_evidence.shape == (3,)
    for i, y in enumerate(ys):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ab.AbduceWarning)
            alg = ab.importance(num_samples=500, smooth=False)
            alone = alg(groups).posterior(KEY, SCALES, given={"y": y})
        one = jax.tree.map(lambda x, i=i: x[i], posts)
        np.testing.assert_allclose(one.log_evidence, alone.log_evidence, rtol=1e-4)
        np.testing.assert_allclose(one.mean("theta"), alone.mean("theta"), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(means[i], alone.mean("theta"), rtol=1e-3, atol=1e-3)
        expected = alone.quantile("theta", levels)
        np.testing.assert_allclose(quantiles[i], expected, rtol=1e-2, atol=1e-2)
        assert np.mean(mus[i] != alone["mu"]) < 0.02  # rounding may move a boundary
    with pytest.raises(ab.InvalidValue, match=r"stack of posteriors, shape \(3,\).*x\[0\]"):
        posts.mean("theta")
    with pytest.raises(ab.InvalidValue, match="stack of posteriors"):
        posts.predict(KEY)


# -- warnings --------------------------------------------------------------------------------


def test_warnings_are_raised_once_with_a_remedy():
    far = np.array([30.0, 31.0, 29.0], np.float32)
    with pytest.warns(ab.AbduceWarning) as caught:
        post = ab.importance(num_samples=N)(groups).posterior(KEY, SCALES, given={"y": far})
    assert len(caught) == len(post.warnings) == 1
    assert str(caught[0].message) == post.warnings[0]
    assert "Pareto k" in post.warnings[0] and "proposal=" in post.warnings[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        post.mean("mu"), post["mu"], post.summary(), post.predict(KEY), repr(post)
