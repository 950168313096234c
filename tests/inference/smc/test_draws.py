"""Draws for whole populations from one key: the law of one key per particle.

Laws are compared by the two-sample Kolmogorov-Smirnov distance at a false-alarm rate of 1e-5.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist
from abduce.inference.smc.draws import draw_many

N = 4000
KEY = jax.random.key(31)


def distance(x, y):
    """Two-sample Kolmogorov-Smirnov distance."""
    x, y = np.sort(np.ravel(x)), np.sort(np.ravel(y))
    both = np.concatenate([x, y])
    return np.abs(
        np.searchsorted(x, both, "right") / len(x) - np.searchsorted(y, both, "right") / len(y)
    ).max()


def assert_same_law(x, y):
    limit = math.sqrt(-math.log(1e-5 / 2) / 2 * (1 / np.size(x) + 1 / np.size(y)))
    assert distance(x, y) < limit, (distance(x, y), limit)


FAMILIES = {
    "normal": lambda s: dist.Normal(s, 1.0 + s),
    "student": lambda s: dist.StudentT(3.0, s, 1.0),
    "gamma": lambda s: dist.Gamma(0.5 + s, 2.0),  # rejection, in a loop over the key
    "beta": lambda s: dist.Beta(1.0 + s, 2.0),
    "exponential": lambda s: dist.Exponential(1.0 + s),
    "lognormal": lambda s: dist.LogNormal(s, 0.5),
    "uniform": lambda s: dist.Uniform(s, s + 2.0),
    "truncated": lambda s: dist.TruncatedNormal(s, 1.0, low=0.0),
    "mixture": lambda s: dist.MixtureSameFamily(
        dist.Categorical(probs=jnp.array([0.3, 0.7])), dist.Normal(jnp.array([-2.0, 2.0]), s + 0.5)
    ),
    "dirichlet": lambda s: dist.Dirichlet(jnp.array([1.0, 2.0, 0.5]) + s),
    "multivariate": lambda s: dist.MultivariateNormal(
        jnp.array([0.0, 1.0]) * s, jnp.array([[1.0, 0.5], [0.5, 2.0]])
    ),
    "categorical": lambda s: dist.Categorical(logits=jnp.array([0.0, 1.0, -1.0]) * s),
    "bernoulli": lambda s: dist.Bernoulli(0.2 + 0.5 * s),
    "poisson": lambda s: dist.Poisson(3.0 + s),
    "binomial": lambda s: dist.Binomial(10, 0.3 + 0.3 * s),
    "negative binomial": lambda s: dist.NegativeBinomial2(3.0, 2.0 + s),
    "vector": lambda s: dist.Normal(jnp.arange(3.0) * s, 1.0).to_event(1),
}


SLOW = {"beta", "dirichlet", "binomial", "negative binomial", "student"}  # loops of rejections


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in FAMILIES]
)
def test_a_population_has_the_law_of_single_draws(family):
    """Parameters differ by particle; two values of them, one half of the particles each."""
    build = FAMILIES[family]
    scale = jnp.where(jnp.arange(N) % 2, 1.0, 0.3)

    def draw(key, s):
        return build(s).sample(key)

    together = np.asarray(jax.jit(lambda k, s: draw_many(draw, k, N, [s], [True]))(KEY, scale))
    single = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(8), N), scale))
    assert together.shape == single.shape and together.dtype == single.dtype
    for half in (0, 1):
        for a, b in zip(
            together[half::2].reshape(N // 2, -1).T, single[half::2].reshape(N // 2, -1).T,
            strict=True,
        ):  # fmt: skip
            assert_same_law(a, b)


@pytest.mark.parametrize("family", ["normal", "gamma", "poisson"])
def test_particles_are_independent(family):
    """The correlation of neighbours, and of halves, is within 4.5 standard errors of zero."""
    x = draw_many(lambda k, s: FAMILIES[family](s).sample(k), KEY, N, [jnp.float32(0.5)], [False])
    x = np.asarray(x, float).reshape(N, -1)[:, 0]
    x = (x - x.mean()) / x.std()
    assert len(np.unique(x)) > 5
    for a, b in [(x[:-1], x[1:]), (x[: N // 2], x[N // 2 :])]:
        assert abs((a * b).mean()) < 4.5 / len(a) ** 0.5


def test_operands_that_do_not_differ_are_shared():
    x = draw_many(
        lambda k, m, s: m + s * jax.random.normal(k, (2,)), KEY, N,
        [jnp.array([5.0, -5.0]), jnp.ones(N)], [False, True],
    )  # fmt: skip
    assert x.shape == (N, 2)
    np.testing.assert_allclose(np.asarray(x).mean(0), [5.0, -5.0], atol=4.5 / N**0.5)


def test_a_point_mass_is_spread():
    x = draw_many(lambda k, v: v, KEY, 3, [jnp.array([1.0, 2.0])], [False])
    np.testing.assert_array_equal(x, [[1.0, 2.0]] * 3)


def test_keys_that_are_split_give_different_bits():
    def draw(key):
        a, b = jax.random.split(key)
        return jnp.stack([jax.random.normal(a), jax.random.normal(b)])

    x = np.asarray(draw_many(draw, KEY, N, [], []))
    assert abs(np.corrcoef(x.T)[0, 1]) < 4.5 / N**0.5
    assert len(np.unique(x)) > 1.99 * N


def test_an_array_of_keys():
    """One key for each of three entries of a draw, mapped inside it."""

    def draw(key):
        return jax.vmap(jax.random.normal)(jax.random.split(key, 3))

    x = np.asarray(draw_many(draw, KEY, N, [], []))
    assert x.shape == (N, 3)
    assert np.abs(np.corrcoef(x.T) - np.eye(3)).max() < 4.5 / N**0.5
    assert len(np.unique(x)) > 2.99 * N


def test_rbg_keys():
    key = jax.random.key(0, impl="rbg")
    x = draw_many(lambda k, s: s * jax.random.normal(k), key, N, [jnp.full(N, 2.0)], [True])
    assert_same_law(np.asarray(x), 2 * np.random.default_rng(0).standard_normal(N))
    x = draw_many(lambda k: jax.random.gamma(k, 0.7), key, N, [], [])
    assert_same_law(np.asarray(x), np.random.default_rng(0).gamma(0.7, size=N))


def test_sites_of_a_filter_do_not_share_bits():
    """Two sites, two steps, and elements of a mapped site: no two draws are correlated."""

    @ab.model
    def noise(n):
        def step(c, _):
            ab.sample("a", dist.Normal(0.0, 1.0))
            jax.vmap(lambda _: ab.sample("b", dist.Normal(0.0, 1.0)))(jnp.arange(2))
            ab.factor("nothing", 0.0)
            return c, None

        jax.lax.scan(step, 0.0, None, length=n)

    post = ab.smc(num_particles=N)(noise).posterior(KEY, 2)
    x = np.concatenate([post.draws["a"][0], np.asarray(post.draws["b"][0]).reshape(N, -1)], 1)
    assert x.shape == (N, 6) and post.log_evidence == 0
    assert np.abs(np.corrcoef(x.T) - np.eye(6)).max() < 4.5 / N**0.5
