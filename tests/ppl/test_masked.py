"""Partly observed values: `ab.masked` in `given` and in `obs=`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import abduce as ab
import abduce.dist as dist

from . import closed_forms as cf
from .cases import close

KEY = jax.random.key(4)
Y = np.array([0.4, np.nan, -1.3, np.nan, 2.0])
SEEN = ~np.isnan(Y)


@ab.model
def rows():
    mu = ab.sample("mu", dist.Normal(0.0, 2.0))
    return jax.vmap(lambda i: ab.sample("y", dist.Normal(mu + i, 1.0)))(jnp.arange(5.0))


def given():
    return {"y": ab.masked(Y, observed=SEEN)}


def test_generate_weighs_only_what_is_seen():
    trace, weight = rows.generate(KEY, given())
    mu, y = trace.choices["mu"], trace.choices["y"]
    assert y.shape == (5,)
    close(y[SEEN], Y[SEEN])
    assert np.all(np.isfinite(y))
    close(weight, cf.normal(Y[SEEN], mu + np.arange(5.0)[SEEN], 1.0))
    close(trace.log_density, cf.normal(mu, 0, 2) + cf.normal(y, mu + np.arange(5.0), 1.0))
    close(trace.retval, y)


def test_hidden_entries_are_drawn_from_the_model():
    run = jax.vmap(lambda k: rows.generate(k, given())[0].choices)
    c = jax.jit(run)(jax.random.split(KEY, 3000))
    for i in (1, 3):
        assert stats.kstest(c["y"][:, i] - c["mu"] - i, stats.norm(0, 1).cdf).pvalue > 1e-5
    for i in (0, 2, 4):
        assert np.all(np.asarray(c["y"][:, i]) == Y[i])


def test_average_weight_is_the_density_of_what_is_seen():
    """The hidden entries are integrated out: 4.5 standard errors, 7e-6."""
    run = jax.jit(jax.vmap(lambda k: rows.generate(k, given())[1]))
    w = np.exp(np.asarray(run(jax.random.split(KEY, 20000))))
    i = np.arange(5.0)[SEEN]
    expected = stats.multivariate_normal(i, np.eye(3) + 4.0).pdf(Y[SEEN])
    assert abs(w.mean() - expected) < 4.5 * w.std() / np.sqrt(w.size)
    assert w.std() > 0.1 * w.mean()


def test_condition_in_part():
    """The hidden entries stay latent, in full shape; NaN under the mask reaches nothing."""
    m = ab.condition(rows, given())
    y = np.where(SEEN, 123.0, 0.7)  # what is given where the data are seen does not matter
    density = jax.jit(lambda c: m.log_density(c))
    full = np.where(SEEN, np.nan_to_num(Y), 0.7)
    expected = cf.normal(0.3, 0, 2) + cf.normal(full, 0.3 + np.arange(5.0), 1.0)
    close(density({"mu": 0.3, "y": jnp.asarray(y)}), expected)
    grad = jax.grad(lambda c: m.log_density(c))({"mu": jnp.asarray(0.3), "y": jnp.asarray(y)})
    close(grad["mu"], -0.3 / 4 + np.sum(full - 0.3 - np.arange(5.0)))
    close(grad["y"], np.where(SEEN, 0.0, -(0.7 - 0.3 - np.arange(5.0))))


def test_nan_in_hidden_entries_of_a_bounded_family():
    """Supports and logarithms must not see the hidden NaN either."""

    @ab.model
    def m():
        rate = ab.sample("rate", dist.Gamma(2.0, 1.0))
        jax.vmap(lambda i: ab.sample("y", dist.Exponential(rate)))(jnp.arange(3))

    data = np.array([1.5, np.nan, 0.2])
    trace, weight = m.generate(KEY, {"y": ab.masked(data, observed=~np.isnan(data))})
    rate = trace.choices["rate"]
    close(weight, cf.exponential(data[[0, 2]], rate))
    assert trace.choices["y"][1] > 0
    density = ab.condition(m, {"y": ab.masked(data, observed=~np.isnan(data))}).log_density
    choices = {"rate": jnp.asarray(0.8), "y": jnp.array([9.0, 0.5, 9.0])}
    grad = jax.grad(lambda c: density(c))(choices)
    close(grad["rate"], 1 / 0.8 - 1 + 3 / 0.8 - (1.5 + 0.5 + 0.2))
    close(grad["y"], np.array([0.0, -0.8, 0.0]))


def test_obs_in_part():
    @ab.model
    def m(y, seen):
        mu = ab.sample("mu", dist.Normal(0.0, 2.0))

        def row(i, y, s):
            return ab.sample("y", dist.Normal(mu + i, 1.0), obs=ab.masked(y, observed=s))

        return jax.vmap(row)(jnp.arange(5.0), y, seen)

    trace = m.simulate(KEY, Y, SEEN)
    close(trace.retval[SEEN], Y[SEEN])
    _, weight = m.generate(KEY, {"mu": 0.1}, Y, SEEN)
    expected = cf.normal(0.1, 0, 2) + cf.normal(Y[SEEN], 0.1 + np.arange(5.0)[SEEN], 1.0)
    close(weight, expected)


def test_batch_shapes_and_whole_events():
    """A mask of the batch shape hides whole events."""

    @ab.model
    def m():
        ab.sample("v", dist.MultivariateNormal(jnp.zeros((3, 2)), jnp.eye(2)))

    v = np.array([[1.0, 2.0], [np.nan, np.nan], [0.5, -1.0]])
    seen = np.array([True, False, True])
    trace, weight = m.generate(KEY, {"v": ab.masked(v, observed=seen)})
    close(trace.choices["v"][seen], v[seen])
    close(weight, cf.normal(v[seen]))


def test_a_mask_inside_an_event_is_refused():
    """No draw from the prior has the right weight for part of a correlated event."""

    @ab.model
    def m():
        ab.sample("v", dist.MultivariateNormal(jnp.zeros(3), 0.5 * jnp.eye(3) + 0.5))

    for seen in (np.array([True, False, True]),):
        with pytest.raises(ab.InvalidValue) as e:
            m.generate(KEY, {"v": ab.masked(np.array([1.0, np.nan, 0.2]), observed=seen)})
        assert "v" in str(e.value) and "event" in str(e.value)


@pytest.mark.parametrize("observed", [np.ones(4, bool), np.ones((5, 1), bool), np.array(True)])
def test_a_mask_of_the_wrong_shape(observed):
    with pytest.raises(ab.InvalidValue, match="y"):
        rows.generate(KEY, {"y": ab.masked(np.zeros(5), observed=observed)})


def test_a_mask_that_is_not_boolean():
    with pytest.raises(ab.InvalidValue, match="boolean"):
        ab.masked(Y, observed=Y)


def test_nan_where_the_mask_says_seen():
    with pytest.raises(ab.MissingData, match="y"):
        rows.generate(KEY, {"y": ab.masked(Y, observed=np.array([True, True, False, False, True]))})


def test_all_seen_and_none_seen():
    data = np.arange(5.0)
    _, all_seen = rows.generate(KEY, {"mu": 0.2, "y": ab.masked(data, observed=np.ones(5, bool))})
    close(all_seen, rows.log_density({"mu": 0.2, "y": data}))
    trace, none = rows.generate(KEY, {"y": ab.masked(0 * data, observed=np.zeros(5, bool))})
    close(none, 0.0)
    alone = rows.simulate(KEY)
    close(trace.choices["y"], alone.choices["y"])


def test_masked_values_in_a_scan_and_under_vmap():
    """The mask has the axes of the value, in the order users see."""

    @ab.model
    def m():
        def series(i):
            def step(z, t):
                z = ab.sample("z", dist.Normal(z + i, 1.0 + t))
                return z, None

            jax.lax.scan(step, 0.0, jnp.arange(4.0))

        jax.vmap(series)(jnp.arange(3.0))

    rng = np.random.default_rng(1)
    data, seen = rng.normal(size=(3, 4)), rng.random((3, 4)) < 0.6
    data = np.where(seen, data, np.nan)
    trace, weight = m.generate(KEY, {"z": ab.masked(data, observed=seen)})
    z = np.asarray(trace.choices["z"])
    close(z[seen], data[seen])
    expected = 0.0
    for i in range(3):
        past = 0.0
        for t in range(4):
            if seen[i, t]:
                expected += cf.normal(z[i, t], past + i, 1.0 + t)
            past = z[i, t]
    close(weight, expected)


def test_masked_under_jit_and_lists():
    """The mask may be traced, and lists are data."""

    def weight(y, seen):
        return rows.generate(KEY, {"mu": 0.5, "y": ab.masked(y, observed=seen)})[1]

    expected = cf.normal(0.5, 0, 2) + cf.normal(Y[SEEN], 0.5 + np.arange(5.0)[SEEN], 1.0)
    close(jax.jit(weight)(Y, SEEN), expected)
    close(weight(list(Y), list(SEEN)), expected)


def test_update_in_part():
    """The entries under the mask keep their values."""
    trace = rows.simulate(KEY)
    old = np.asarray(trace.choices["y"])
    moved, weight, discarded = trace.update(given())
    new = np.where(SEEN, np.nan_to_num(Y), old)
    close(moved.choices["y"], new)
    close(discarded["y"], old)
    loc = trace.choices["mu"] + np.arange(5.0)
    close(weight, cf.normal(new, loc, 1.0) - cf.normal(old, loc, 1.0))


def test_masked_discrete_values():
    @ab.model
    def m():
        p = ab.sample("p", dist.Beta(2.0, 2.0))
        jax.vmap(lambda i: ab.sample("k", dist.Binomial(3, p)))(jnp.arange(4))

    data = ab.masked(np.array([1, 0, 3, 2]), observed=np.array([True, False, True, True]))
    trace, weight = m.generate(KEY, {"k": data})
    k, p = trace.choices["k"], float(trace.choices["p"])
    assert jnp.issubdtype(k.dtype, jnp.integer)
    assert np.array_equal(np.asarray(k)[[0, 2, 3]], [1, 3, 2])
    close(weight, np.sum(stats.binom.logpmf([1, 3, 2], 3, p)))
