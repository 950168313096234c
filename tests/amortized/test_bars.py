"""Predictive distributions of one number: bars, classes and mixtures against quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import abduce as ab
import abduce.dist as dist
from abduce.amortized.bars import Bars, equal_mass_borders
from abduce.amortized.predictive import Classes, Mixture

BORDERS = jnp.array([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0])
LOGITS = jnp.array([0.3, -1.0, 0.5, 1.0, -0.2])


def cases():
    found = {
        f"bars {low}{up}": Bars(LOGITS, BORDERS, low, up)
        for low in (False, True)
        for up in (False, True)
    }
    parts = jnp.array([0.2, -0.5]), jnp.array([-0.4, 0.8]), jnp.array([0.6, 0.3])
    for lower, upper in ((None, None), (-1.0, None), (None, 2.5), (-1.0, 2.5)):
        found[f"mixture {lower} {upper}"] = Mixture(*parts, lower, upper)
    return found


CASES = cases()


def grid(d, n=40_001):
    """Midpoints and their distance, over all but 1e-6 of the mass; kinks lie between midpoints."""
    low, high = (float(d.quantile(q)) for q in (1e-6, 1 - 1e-6))
    if isinstance(d, Bars) and not d.lower_tail:
        low = float(d.borders[0])
    if isinstance(d, Bars) and not d.upper_tail:
        high = float(d.borders[-1])
    h = (high - low) / n
    return low + h * (np.arange(n) + 0.5), h


@pytest.mark.parametrize("name", CASES)
def test_against_quadrature(name, x64):
    d = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), CASES[name])
    x, h = grid(d)
    p = np.exp(np.asarray(d.log_prob(x)))
    assert abs(p.sum() * h - 1) < 1e-3
    mean = (p * x).sum() * h
    assert abs(float(d.mean) - mean) < 2e-3
    assert abs(float(d.variance) - (p * (x - mean) ** 2).sum() * h) < 2e-3
    np.testing.assert_allclose(d.std**2, d.variance, rtol=1e-6)
    at = np.array([-0.9, -0.3, 0.1, 0.7, 1.7])
    want = np.array([(p * (x <= a)).sum() * h for a in at])
    np.testing.assert_allclose(d.cdf(at), want, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_quantile_inverts_cdf(name, x64):
    d = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), CASES[name])
    q = np.array([0.001, 0.05, 0.3, 0.5, 0.77, 0.95, 0.999])
    np.testing.assert_allclose(d.cdf(d.quantile(q)), q, atol=1e-9)
    low, high = d.interval(0.9)
    np.testing.assert_allclose([d.cdf(low), d.cdf(high)], [0.05, 0.95], atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_draws_have_the_distribution(name, key):
    """Kolmogorov-Smirnov, 8 tests at 1e-5 each."""
    d = CASES[name]
    x = np.asarray(d.sample(key, (4000,)))
    assert x.shape == (4000,) and bool(d.support(x).all())
    assert scipy.stats.kstest(x, lambda v: np.asarray(d.cdf(v))).pvalue > 1e-5


def test_bars_are_constant_between_borders():
    d = Bars(LOGITS, BORDERS, False, False)
    mass = np.exp(np.asarray(jax.nn.log_softmax(LOGITS)))
    width = np.diff(np.asarray(BORDERS))
    middle = np.asarray(BORDERS[:-1]) + width / 2
    np.testing.assert_allclose(np.exp(d.log_prob(middle)), mass / width, rtol=1e-5)
    assert d.log_prob(-2.01) == -np.inf and d.log_prob(3.01) == -np.inf
    assert np.isnan(d.log_prob(jnp.nan))


def test_tails_are_half_normals_with_half_of_their_mass_inside_the_bar():
    d = Bars(LOGITS, BORDERS)
    mass = np.exp(np.asarray(jax.nn.log_softmax(LOGITS)))
    tail = scipy.stats.halfnorm(loc=1.0, scale=2.0 / scipy.stats.halfnorm.ppf(0.5))
    at = np.array([1.2, 3.0, 9.0, 15.0])
    np.testing.assert_allclose(d.log_prob(at), np.log(mass[-1]) + tail.logpdf(at), rtol=1e-4)
    np.testing.assert_allclose(1 - d.cdf(3.0), mass[-1] / 2, rtol=1e-4)
    np.testing.assert_allclose(d.cdf(-2.0), mass[0] / 2, rtol=1e-4)


def test_bars_batch_vmap_and_grad(key):
    logits = jax.random.normal(key, (3, 4, 5))
    d = Bars(logits, BORDERS)
    assert d.batch_shape == (3, 4) and d.event_shape == ()
    assert d.mean.shape == (3, 4) and d.sample(key, (7,)).shape == (7, 3, 4)
    assert d.quantile(np.array([0.1, 0.9])).shape == (2, 3, 4)
    value = jax.random.normal(key, (7, 3, 4))
    one = Bars(logits[1, 2], BORDERS)
    np.testing.assert_allclose(d.log_prob(value)[:, 1, 2], one.log_prob(value[:, 1, 2]), rtol=1e-5)

    mapped = jax.vmap(lambda x: Bars(x, BORDERS))(logits)  # the borders get an axis too
    np.testing.assert_allclose(mapped.mean, d.mean, rtol=1e-5)
    np.testing.assert_allclose(mapped.log_prob(value), d.log_prob(value), rtol=1e-5)
    np.testing.assert_allclose(mapped.quantile(0.3), d.quantile(0.3), rtol=1e-5)
    assert mapped.sample(key).shape == (3, 4)

    slope = jax.grad(lambda x: Bars(x, BORDERS).log_prob(0.1))(LOGITS)
    np.testing.assert_allclose(slope, np.eye(5)[2] - jax.nn.softmax(LOGITS), atol=1e-6)


def test_bars_are_a_distribution_in_models(key):
    @ab.model
    def m():
        ab.sample("x", Bars(LOGITS, BORDERS))

    trace = m.simulate(key)
    want = Bars(LOGITS, BORDERS).log_prob(trace["x"])
    np.testing.assert_allclose(trace.log_density, want, rtol=1e-5)


def test_borders_hold_equal_numbers_of_draws():
    x = np.random.default_rng(0).gamma(2.0, size=20_000)
    borders = equal_mass_borders(x, 50, lower=0.0)
    assert borders.shape == (51,) and borders[0] == 0
    counts = np.histogram(x, np.append(borders[:-1], np.inf))[0]
    assert abs(counts - 400).max() <= 2
    d = Bars(jnp.zeros(50), borders, lower_tail=False)
    np.testing.assert_allclose(d.mean, 2.0, rtol=0.01)
    np.testing.assert_allclose(d.std, np.sqrt(2.0), rtol=0.02)
    few = equal_mass_borders(np.repeat([0.0, 1.0, 2.0, 5.0], 10), 50)
    assert (np.diff(few) > 0).all() and len(few) <= 7  # four values and what is between
    with pytest.raises(ab.InvalidValue, match="fewer than two different values"):
        equal_mass_borders(np.ones(100), 10)


def test_bars_that_do_not_fit_are_refused():
    with pytest.raises(ab.InvalidValue, match="5 bars have 6 borders"):
        Bars(LOGITS, BORDERS[:-1])
    with pytest.raises(ab.InvalidValue, match="increase strictly"):
        Bars(LOGITS, BORDERS[::-1])
    with pytest.raises(ab.InvalidValue, match="cannot be both tails"):
        Bars(LOGITS[:1], BORDERS[:2])
    with pytest.raises(ab.InvalidValue, match="between 0 and 1"):
        Bars(LOGITS, BORDERS).quantile(1.2)


@pytest.mark.parametrize("below, above", [(False, False), (False, True), (True, True)])
def test_classes_against_enumeration(below, above, key):
    """Draws: chi-square at 1e-5 each."""
    d = Classes(jnp.array([0.3, -0.4, 0.8, 0.1]), low=2, open_below=below, open_above=above)
    values = np.arange(-60, 70)
    p = np.exp(np.asarray(d.log_prob(values), np.float64))
    assert abs(p.sum() - 1) < 1e-5
    assert abs(float(d.mean) - (p * values).sum()) < 1e-4
    assert abs(float(d.variance) - (p * (values - (p * values).sum()) ** 2).sum()) < 1e-3
    at = np.array([0, 1, 2, 3, 4, 5, 6, 9])
    cdf = np.array([p[values <= a].sum() for a in at])
    np.testing.assert_allclose(d.cdf(at), cdf, atol=1e-5)
    q = np.array([0.03, 0.2, 0.5, 0.8, 0.97])
    want = [values[np.searchsorted(np.cumsum(p), a)] for a in q]
    np.testing.assert_array_equal(d.quantile(q), want)
    if not below:
        assert d.log_prob(1) == -np.inf
    if not above:
        assert d.log_prob(6) == -np.inf
    assert d.log_prob(2.5) == -np.inf

    draws = np.asarray(d.sample(key, (20_000,)))
    keep = p * len(draws) > 5
    counts = np.array([(draws == v).sum() for v in values])
    observed = np.append(counts[keep], counts[~keep].sum() + 1e-9)
    expected = np.append(p[keep], p[~keep].sum() + 1e-12 / len(draws)) * len(draws)
    keep_cells = expected > 1
    observed, expected = observed[keep_cells], expected[keep_cells]
    assert scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-5


def test_a_mixture_is_the_transformed_mixture(x64):
    d = CASES["mixture -1.0 2.5"]
    d = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), d)
    base = dist.MixtureSameFamily(dist.Categorical(logits=d.logits), dist.Normal(d.loc, d.scale))
    onto = dist.biject_to(dist.constraints.interval(-1.0, 2.5))
    other = dist.TransformedDistribution(base, [onto])
    x = np.linspace(-0.95, 2.45, 9)
    np.testing.assert_allclose(d.log_prob(x), other.log_prob(x), rtol=1e-6)
    assert d.log_prob(-1.5) == -np.inf and d.log_prob(2.6) == -np.inf
    assert d.cdf(-1.5) == 0 and d.cdf(2.6) == 1
