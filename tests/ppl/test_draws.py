"""What is drawn: the right distributions, and keys that follow addresses.

Kolmogorov-Smirnov tests of 3000 draws at a fixed key reject at p < 1e-5 each.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import abduce as ab
import abduce.dist as dist

N = 3000
KEYS = jax.random.split(jax.random.key(101), N)


def draws(program, *args):
    m = ab.model(program)
    return jax.jit(jax.vmap(lambda k: m.simulate(k, *args).choices))(KEYS)


def agrees(sample, law):
    assert np.asarray(sample).shape == (N,)
    assert stats.kstest(np.asarray(sample), law.cdf).pvalue > 1e-5


def uncorrelated(a, b):
    """Two columns of N draws; |r| sqrt(N) > 4.5 has probability 7e-6."""
    assert abs(np.corrcoef(np.asarray(a), np.asarray(b))[0, 1]) * np.sqrt(N) < 4.5


def test_plain_and_batch_shapes():
    def program():
        ab.sample("x", dist.Normal(2.0, 3.0))
        ab.sample("same", dist.Normal(2.0, 3.0))
        ab.sample("b", dist.Gamma(jnp.array([2.0, 5.0]), 1.5))

    c = draws(program)
    agrees(c["x"], stats.norm(2, 3))
    agrees(c["b"][:, 0], stats.gamma(2.0, scale=1 / 1.5))
    agrees(c["b"][:, 1], stats.gamma(5.0, scale=1 / 1.5))
    uncorrelated(c["x"], c["same"])
    uncorrelated(c["b"][:, 0], c["b"][:, 1])


def test_under_vmap():
    """Mapped parameters, shared parameters, and nothing mapped at all."""

    def program():
        def element(i):
            ab.sample("mapped", dist.Normal(i, 1.0 + i))
            ab.sample("shared", dist.Exponential(2.0))

        jax.vmap(element)(jnp.arange(3.0))

    c = draws(program)
    for i in range(3):
        agrees(c["mapped"][:, i], stats.norm(i, 1 + i))
        agrees(c["shared"][:, i], stats.expon(scale=0.5))
    uncorrelated(c["shared"][:, 0], c["shared"][:, 1])
    uncorrelated(c["shared"][:, 1], c["shared"][:, 2])
    uncorrelated(c["mapped"][:, 0], c["shared"][:, 0])


def test_under_scan():
    def program():
        def step(z, t):
            return ab.sample("z", dist.Normal(0.5 * z, 1.0)), ab.sample("e", dist.Laplace(t, 1.0))

        jax.lax.scan(step, 0.0, jnp.arange(4.0))

    c = draws(program)
    variance = 0.0
    for t in range(4):
        variance = 0.25 * variance + 1.0
        agrees(c["z"][:, t], stats.norm(0, np.sqrt(variance)))
        agrees(c["e"][:, t], stats.laplace(t, 1.0))
    uncorrelated(c["e"][:, 0], c["e"][:, 1])
    uncorrelated(c["z"][:, 1] - 0.5 * c["z"][:, 0], c["z"][:, 0])


@pytest.mark.parametrize("order", ["vmap_of_scan", "scan_of_vmap"])
def test_under_scan_and_vmap(order):
    def draw(i, t):
        return ab.sample("x", dist.Normal(10 * i + t, 1.0))

    def vmap_of_scan():
        def series(i):
            jax.lax.scan(lambda c, t: (c, draw(i, t)), 0, jnp.arange(3.0))

        jax.vmap(series)(jnp.arange(2.0))

    def scan_of_vmap():
        def step(c, t):
            return c, jax.vmap(lambda i: draw(i, t))(jnp.arange(2.0))

        jax.lax.scan(step, 0, jnp.arange(3.0))

    c = draws({"vmap_of_scan": vmap_of_scan, "scan_of_vmap": scan_of_vmap}[order])["x"]
    if order == "scan_of_vmap":
        c = jnp.swapaxes(c, 1, 2)
    z = c - 10 * jnp.arange(2.0)[:, None] - jnp.arange(3.0)
    for i in range(2):
        for t in range(3):
            agrees(z[:, i, t], stats.norm(0, 1))
    uncorrelated(z[:, 0, 0], z[:, 0, 1])
    uncorrelated(z[:, 0, 0], z[:, 1, 0])
    uncorrelated(z[:, 0, 1], z[:, 1, 0])


@pytest.mark.parametrize("mapped", [False, True])
def test_under_cond(mapped):
    """The branch value that flows on has the mixture's distribution."""

    def element(p):
        z = ab.sample("z", dist.Bernoulli(p))
        v = jax.lax.cond(
            z == 1,
            lambda: ab.sample("v", dist.Normal(5.0, 1.0)),
            lambda: ab.sample("w", dist.Normal(-5.0, 2.0)),
        )
        ab.sample("y", dist.Normal(v, 0.1))

    def program():
        if mapped:
            jax.vmap(element)(jnp.array([0.3, 0.3]))
        else:
            element(0.3)

    c = {a: np.asarray(v).reshape(N, -1) for a, v in draws(program).items()}

    class Mixture:
        @staticmethod
        def cdf(x):
            up, down = stats.norm(5, np.sqrt(1.01)), stats.norm(-5, np.sqrt(4.01))
            return 0.3 * up.cdf(x) + 0.7 * down.cdf(x)

    for i in range(2 if mapped else 1):
        agrees(c["y"][:, i], Mixture)
        on = c["z"][:, i] == 1
        assert abs(on.mean() - 0.3) < 4.5 * np.sqrt(0.21 / N)
        assert stats.kstest(c["v"][on, i], stats.norm(5, 1).cdf).pvalue > 1e-5
        assert stats.kstest(c["w"][~on, i], stats.norm(-5, 2).cdf).pvalue > 1e-5


def test_dependent_supports():
    def program():
        sigma = ab.sample("sigma", dist.Exponential(1.0))
        ab.sample("u", dist.Uniform(0.0, sigma))

    c = draws(program)
    agrees(c["u"] / c["sigma"], stats.uniform(0, 1))
    uncorrelated(c["u"] / c["sigma"], c["sigma"])


def test_scopes_and_inner_jit_have_their_own_draws():
    @jax.jit
    def draw():
        return ab.sample("x", dist.Normal(0.0, 1.0))

    def program():
        draw()
        for name in ("a", "b"):
            with ab.scope(name):
                draw()

    c = draws(program)
    for a in ("x", "a/x", "b/x"):
        agrees(c[a], stats.norm(0, 1))
    uncorrelated(c["x"], c["a/x"])
    uncorrelated(c["a/x"], c["b/x"])


# -- keys follow addresses -------------------------------------------------------------------


def _program(extra_before=False, extra_inside=False, extra_after=False):
    def program():
        if extra_before:
            ab.sample("new1", dist.Normal(0.0, 1.0))
            jax.lax.scan(
                lambda c, t: (c, ab.sample("new2", dist.Normal(0.0, 1.0))), 0, jnp.zeros(2)
            )
        x = ab.sample("x", dist.Normal(0.0, 1.0))

        def step(z, t):
            if extra_inside:
                ab.sample("new3", dist.Beta(2.0, 2.0))
            z = ab.sample("z", dist.Normal(z, 1.0))
            if extra_inside:
                jax.vmap(lambda i: ab.sample("new4", dist.Poisson(3.0)))(jnp.zeros(3))
            return z, jax.vmap(lambda i: ab.sample("w", dist.Normal(i, 1.0)))(jnp.arange(2.0))

        jax.lax.scan(step, x, jnp.arange(4.0))

        @jax.jit
        def inner():
            if extra_inside:
                ab.sample("new5", dist.Normal(0.0, 1.0))
            return ab.sample("j", dist.Normal(0.0, 1.0))

        with ab.scope("s"):
            inner()
        if extra_after:
            ab.sample("new6", dist.Normal(0.0, 1.0))

    return ab.model(program)


@pytest.mark.parametrize("where", ["extra_before", "extra_inside", "extra_after"])
def test_adding_a_site_leaves_the_other_draws(where):
    key = jax.random.key(3)
    plain = _program().simulate(key).choices
    more = _program(**{where: True}).simulate(key).choices
    assert set(more) > set(plain)
    for a in plain:
        assert np.array_equal(plain[a], more[a]), a


def test_a_given_value_leaves_independent_draws():
    key = jax.random.key(3)
    m = _program()
    plain = m.simulate(key).choices
    trace, _ = m.generate(key, {"s/j": 0.5})
    for a in ("x", "z", "w"):
        assert np.array_equal(plain[a], trace.choices[a])


def test_same_key_same_draws_and_other_key_other_draws():
    m = _program()
    a, b, c = (m.simulate(jax.random.key(k)).choices for k in (1, 1, 2))
    for name in a:
        assert np.array_equal(a[name], b[name])
        assert not np.any(np.asarray(a[name]) == np.asarray(c[name]))


def test_addresses_that_collide_in_a_weak_hash():
    """CRC32 maps `plumless` and `buckeroo` to one number; their draws must differ."""

    def program():
        for a in ("plumless", "buckeroo"):
            ab.sample(a, dist.Normal(0.0, 1.0))

    c = ab.model(program).simulate(jax.random.key(0)).choices
    assert float(c["plumless"]) != float(c["buckeroo"])


def test_simulator_draws_without_a_density():
    def program():
        f = ab.sample("f", dist.Simulator(lambda key, m: m + jax.random.normal(key, ()) ** 2, 1.5))
        ab.sample("y", dist.Normal(f, 0.1))

    c = draws(program)
    agrees(c["f"] - 1.5, stats.chi2(1))


def test_regenerated_values_come_from_the_prior():
    m = _program()
    trace = m.simulate(jax.random.key(0))
    run = jax.jit(jax.vmap(lambda k: trace.regenerate(k, "w")[0].choices["w"]))
    w = np.asarray(run(KEYS))
    for t in range(2):
        for i in range(2):
            agrees(w[:, t, i], stats.norm(i, 1.0))
