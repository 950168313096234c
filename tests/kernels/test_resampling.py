"""Resampling: expected counts, bounds on counts, and the laws that particle Gibbs needs."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from abduce.errors import InvalidAlgorithm, InvalidValue
from abduce.kernels import fixed_point
from abduce.kernels.fixed_point import BITS, ONE, Counts
from abduce.kernels.resampling import (
    SCHEMES,
    ancestors_from_counts,
    conditional,
    effective_sample_size,
    systematic,
    transport_matrix,
)
from abduce.kernels.resampling_draws import systematic_at, weight_sums

NAMES = list(SCHEMES)
ALARM = 1e-5  # false-alarm rate of each statistical test below
LOG_WEIGHTS = np.array([0.3, -1.0, -np.inf, 1.2, -4.0, 0.9], np.float32)
WEIGHTS = np.exp(LOG_WEIGHTS.astype(float)) / np.exp(LOG_WEIGHTS.astype(float)).sum()
POSITIONS = np.array([0.1, 2.0, 0.7, -0.5, 1.0, 0.4], np.float32)


def counts_of(ancestors, n):
    return np.stack([np.bincount(a, minlength=n) for a in np.atleast_2d(ancestors)])


@cache
def compiled(name, is_conditional=False, is_rotated=False):
    """Draws for many keys; shared, since compiling takes longer than drawing."""
    draw = partial(conditional, name) if is_conditional else SCHEMES[name]
    draw = partial(rotated, name) if is_rotated else draw
    return jax.jit(jax.vmap(draw, in_axes=(0, None, None)))


def many(name, log_weights=LOG_WEIGHTS, positions=POSITIONS, seed=0, num=40_000, **kind):
    keys = jax.random.split(jax.random.key(seed), num)
    return np.asarray(compiled(name, **kind)(keys, jnp.asarray(log_weights), positions))


def assert_expected(counts, expected):
    standard_error = counts.std(0) / np.sqrt(len(counts))
    bound = stats.norm.isf(ALARM / 2 / counts.shape[1])
    assert (np.abs(counts.mean(0) - expected) <= bound * standard_error + 1e-5).all()


@pytest.mark.parametrize("name", NAMES)
def test_expected_counts(name):
    ancestors = many(name)
    assert ancestors.dtype == np.int32
    counts = counts_of(ancestors, 6)
    assert_expected(counts, 6 * WEIGHTS)
    assert (counts[:, 2] == 0).all()  # weight zero
    rounded = np.floor(6 * WEIGHTS), np.ceil(6 * WEIGHTS)
    if name in ("systematic", "ssp"):
        assert (counts >= rounded[0]).all() and (counts <= rounded[1]).all()
    elif name == "residual":
        assert (counts >= rounded[0]).all() and (counts > rounded[1]).any()
    elif name == "stratified":
        assert (np.abs(counts - 6 * WEIGHTS) < 2).all()


def test_systematic_is_unbiased_over_every_shift():
    """The shift is the only random number, and takes 2**18 values."""
    sums = jax.jit(weight_sums)(LOG_WEIGHTS)
    ancestors = jax.jit(jax.vmap(lambda u: systematic_at(sums, u)))(jnp.arange(ONE))
    mean = np.bincount(np.asarray(ancestors).ravel(), minlength=6) / ONE
    np.testing.assert_allclose(mean, 6 * WEIGHTS, atol=1.5 / ONE)


@pytest.mark.parametrize("name", ["stratified", "systematic", "residual", "ssp"])
def test_whole_counts_are_certain(name):
    log_weights = np.log(np.array([2, 1, 1, 1, 1, 1], np.float32))
    log_weights[2] = -np.inf
    assert (many(name, log_weights) == [0, 0, 1, 3, 4, 5]).all()
    assert (many(name, np.full(6, -3.7, np.float32)) == np.arange(6)).all()


@pytest.mark.parametrize("name", NAMES)
def test_extreme_weights(name):
    all_lost = np.full(6, -np.inf, np.float32)
    assert (many(name, all_lost) == np.arange(6)).all()
    assert (many(name, all_lost, is_conditional=True) == np.arange(6)).all()
    for place in (2, 5):
        one = all_lost.copy()
        one[place] = 900.0
        assert (many(name, one) == place).all()
        assert (many(name, one, np.zeros(6, np.float32)) == place).all()
    one[0], one[5] = one[5], one[0]
    assert (many(name, one, is_conditional=True) == 0).all()


@pytest.mark.parametrize("name", ["systematic", "ssp", "killing"])
def test_one_particle(name):
    for kind in ({}, {"is_conditional": True}):
        assert many(name, np.zeros(1, np.float32), np.ones(1), num=2, **kind).tolist() == [[0], [0]]


@pytest.mark.parametrize("name", ["multinomial", "systematic", "ssp"])
def test_vmap_is_a_loop(name):
    rng = np.random.default_rng(4)
    log_weights = rng.normal(size=(3, 40)).astype(np.float32)
    positions = rng.normal(size=(3, 40, 2)).astype(np.float32)
    keys = jax.random.split(jax.random.key(5), 3)
    together = jax.jit(jax.vmap(SCHEMES[name]))(keys, log_weights, positions)
    scheme = jax.jit(SCHEMES[name])
    alone = [scheme(*args) for args in zip(keys, log_weights, positions, strict=True)]
    np.testing.assert_array_equal(together, np.stack(alone))


@pytest.mark.parametrize("name", ["systematic", "residual"])
def test_double_precision(name, x64):
    ancestors = many(name, LOG_WEIGHTS.astype(np.float64), POSITIONS.astype(np.float64))
    assert ancestors.dtype == np.int32
    assert_expected(counts_of(ancestors, 6), 6 * WEIGHTS)
    twin = many(name, LOG_WEIGHTS.astype(np.float64), is_conditional=True)
    assert twin.dtype == np.int32 and (twin[:, 0] == 0).all()


# --- many particles ---


def largest_error(log_weights, ancestors):
    weights = np.exp(log_weights.astype(np.float64) - log_weights.max())
    expected = len(weights) * weights / weights.sum()
    assert (np.diff(ancestors) >= 0).all()
    return np.abs(np.bincount(ancestors, minlength=len(weights)) - expected).max()


def skewed(n, kind):
    log_weights = np.random.default_rng(6).normal(size=n)
    if kind == "wide":
        log_weights *= 3
    elif kind == "one heavy":  # it takes half of the slots, in the midst of light ones
        log_weights[n // 3] = np.log(n)
    elif kind == "half dead":
        log_weights[::2] = -np.inf
        log_weights[-1] = -np.inf
    else:
        log_weights[:] = -3.7
    return log_weights.astype(np.float32)


@pytest.mark.parametrize("kind", ["wide", "one heavy", "half dead", "equal"])
@pytest.mark.parametrize("n", [33, 12_345, 300_000])
def test_systematic_counts_are_accurate(n, kind):
    log_weights = skewed(n, kind)
    ancestors = np.asarray(jax.jit(systematic)(jax.random.key(7), log_weights))
    assert largest_error(log_weights, ancestors) <= (0 if kind == "equal" else 1.01)
    assert np.isfinite(log_weights[ancestors]).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wide", "one heavy", "half dead"])
def test_systematic_counts_are_accurate_for_ten_million(kind):
    log_weights = skewed(10_000_000, kind)
    ancestors = np.asarray(jax.jit(systematic)(jax.random.key(8), log_weights))
    assert largest_error(log_weights, ancestors) <= 1.1
    assert np.isfinite(log_weights[ancestors]).all()


# --- conditional twins ---


def rotated(name, key, log_weights, positions):
    """A scheme on particles rotated by a uniform shift, with slots rotated by another."""
    n = log_weights.shape[0]
    key, *turn_keys = jax.random.split(key, 3)
    turn, slot = (jax.random.randint(k, (), 0, n) for k in turn_keys)
    a = SCHEMES[name](key, jnp.roll(log_weights, -turn), jnp.roll(positions, -turn))
    return jnp.roll((a + turn) % n, -slot)


@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (0.6, 0.1, 0.3)], ids=["light", "heavy"])
@pytest.mark.parametrize("name", NAMES)
def test_conditional_law(name, weights):
    """Draws of the twin against draws of the rotated scheme that have ancestor 0 in slot 0."""
    setting = np.log(np.array(weights, np.float32)), np.array([0.0, 1.0, 0.3], np.float32)
    free = many(name, *setting, seed=9, num=100_000, is_rotated=True)
    share = np.stack([np.mean(free == j, axis=0) for j in range(3)])  # each slot has law `weights`
    slack = stats.norm.isf(ALARM / 18) * 0.5 / np.sqrt(len(free))
    assert np.abs(share - np.array(weights)[:, None]).max() < slack

    twin = many(name, *setting, seed=10, num=40_000, is_conditional=True)
    assert (twin[:, 0] == 0).all()
    pair = (free[free[:, 0] == 0], twin)
    table = np.stack([np.bincount(3 * a[:, 1] + a[:, 2], minlength=9) for a in pair])
    assert stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > ALARM


PRIOR = np.array([0.7, 0.3])
MOVE = np.array([[0.8, 0.2], [0.4, 0.6]])
LIKELIHOOD = np.array([[0.9, 0.2], [0.1, 0.8], [0.7, 0.3]])  # of the datum at t, by state


def path_posterior():
    """Probabilities of the eight paths of three binary states."""
    x = np.array([[(p >> t) & 1 for t in range(3)] for p in range(8)])
    joint = PRIOR[x[:, 0]] * LIKELIHOOD[0, x[:, 0]]
    for t in (1, 2):
        joint *= MOVE[x[:, t - 1], x[:, t]] * LIKELIHOOD[t, x[:, t]]
    return joint / joint.sum()


def conditional_smc(key, path, resample, n=3):
    """One sweep with `path` retained as particle 0; returns the number of the path drawn."""
    likelihood, move = (jnp.asarray(x, jnp.float32) for x in (LIKELIHOOD, MOVE))
    start, end, *keys = jax.random.split(key, 6)
    x = jax.random.bernoulli(start, PRIOR[1], (n,)).astype(jnp.int32).at[0].set(path & 1)

    def step(state, now):
        paths, x = state
        t, resample_key, move_key = now
        a = resample(resample_key, jnp.log(likelihood[t - 1, x]), x.astype(jnp.float32))
        x = jax.random.bernoulli(move_key, move[x[a], 1]).astype(jnp.int32)
        x = x.at[0].set((path >> t) & 1)
        return (paths[a] + (x << t), x), None

    now = jnp.arange(1, 3), jnp.stack(keys[:2]), jnp.stack(keys[2:])
    (paths, x), _ = jax.lax.scan(step, (x, x), now)
    return paths[jax.random.categorical(end, jnp.log(likelihood[2, x]))]


def sweep_pvalue(resample, num=60_000):
    """Tests that one sweep leaves the law of the path as it was."""
    posterior = path_posterior()
    start = np.random.default_rng(11).choice(8, size=num, p=posterior)
    keys = jax.random.split(jax.random.key(12), num)
    sweep = jax.jit(jax.vmap(lambda k, p: conditional_smc(k, p, resample)))
    drawn = np.bincount(np.asarray(sweep(keys, jnp.asarray(start))), minlength=8)
    return stats.chisquare(drawn, num * posterior).pvalue


@pytest.mark.parametrize("name", NAMES)
def test_conditional_smc_leaves_the_posterior_invariant(name):
    assert sweep_pvalue(lambda *args: conditional(name, *args)) > ALARM


@pytest.mark.parametrize("name", ["systematic", "killing"])
def test_overwriting_an_ancestor_is_caught(name):
    """The same test sees the usual mistake: an unconditional draw with slot 0 overwritten."""
    assert sweep_pvalue(lambda *args: SCHEMES[name](*args).at[0].set(0)) < ALARM


def test_unknown_scheme():
    with pytest.raises(InvalidAlgorithm, match=r"'sistematic'.*Did you mean \"systematic\""):
        conditional("sistematic", jax.random.key(0), LOG_WEIGHTS)


# --- optimal transport ---


def test_transport_has_both_marginals():
    for epsilon, num_iterations in ((0.01, 3), (0.1, 50), (1000.0, 1)):
        matrix = np.asarray(transport_matrix(LOG_WEIGHTS, POSITIONS, epsilon, num_iterations))
        assert (matrix >= 0).all() and (matrix[:, 2] == 0).all()
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(matrix.sum(0), 6 * WEIGHTS, atol=1e-5)
    np.testing.assert_allclose(matrix, np.tile(WEIGHTS, (6, 1)), atol=2e-3)


def test_transport_on_a_line_is_monotone():
    """Little entropy: the coupling of sorted particles, by hand."""
    weights, positions = np.array([0.5, 0.25, 0.25]), np.array([1.0, 0.0, 2.0])
    matrix = transport_matrix(jnp.log(weights), jnp.asarray(positions), 0.005, 500)
    by_hand = [[1, 0, 0], [0.25, 0.75, 0], [0.25, 0, 0.75]]
    np.testing.assert_allclose(matrix, by_hand, atol=1e-3)


def test_transport_is_differentiable(x64):
    def mean(shift):
        log_weights = jnp.asarray(LOG_WEIGHTS, float).at[1].add(shift)
        matrix = transport_matrix(log_weights, jnp.asarray(POSITIONS, float), 0.5, 100)
        return jnp.mean((matrix @ POSITIONS) ** 2)

    slope = (mean(1e-5) - mean(-1e-5)) / 2e-5
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(jax.grad(mean)(0.0), slope, rtol=1e-5)


def test_transport_needs_positions():
    for positions, shape in (
        (None, "None"),
        (np.zeros(5), r"\(5,\)"),
        (np.zeros((6, 1, 1)), "1, 1"),
    ):
        with pytest.raises(InvalidValue, match=rf"\(6, d\) or \(6,\), got .*{shape}"):
            SCHEMES["optimal_transport"](jax.random.key(0), LOG_WEIGHTS, positions)


# --- parts ---


def wide(counts):
    return np.asarray(counts.whole, np.int64) * ONE + np.asarray(counts.part)


@pytest.mark.parametrize("n", [1, 32, 33, 40_000])
def test_cumulative_sums_are_exact(n):
    rng = np.random.default_rng(n)
    x = rng.multinomial(n, rng.dirichlet(np.full(n, 0.1))).astype(np.int32)
    for in_float in (True, False):
        np.testing.assert_array_equal(fixed_point._cumsum(jnp.asarray(x), in_float), np.cumsum(x))
    np.testing.assert_array_equal(ancestors_from_counts(x, n), np.repeat(np.arange(n), x))
    part = rng.integers(0, ONE + 1, n)
    exact = np.cumsum(x.astype(np.int64) * ONE + part)
    for in_float in (True, False):
        sums = fixed_point._cumsum_counts(
            Counts(jnp.asarray(x), jnp.asarray(part, jnp.int32)), in_float
        )
        np.testing.assert_array_equal(
            np.asarray(sums.whole, np.int64) * ONE + np.asarray(sums.part), exact
        )


def test_search_and_products_are_exact():
    rng = np.random.default_rng(12)
    log_weights = rng.normal(size=5000).astype(np.float32) * 4
    sums = jax.jit(weight_sums)(log_weights)
    points = fixed_point.uniform_below_size(jax.random.key(13), 5000)
    assert (np.diff(wide(sums)) >= 0).all() and wide(sums)[-1] == 5000 * ONE
    expected = np.searchsorted(wide(sums), wide(points), side="right")
    np.testing.assert_array_equal(fixed_point.invert(sums, points), expected)
    a, b = rng.integers(0, 1 << 32, (2, 1000), dtype=np.uint64)
    high, low = fixed_point._multiply(*(jnp.asarray(x.astype(np.uint32)) for x in (a, b)))
    np.testing.assert_array_equal((np.asarray(high, np.uint64) << 32) + np.asarray(low), a * b)


@pytest.mark.parametrize("n", [3, 20_000])
def test_uniform_numbers_fill_their_range(n):
    """A Kolmogorov-Smirnov test each."""
    keys = jax.random.split(jax.random.key(14), max(1, 20_000 // n))
    drawn = jax.vmap(lambda k: fixed_point.uniform_below_size(k, n))(keys)
    x = (np.asarray(drawn.whole) + np.asarray(drawn.part) / ONE).ravel()
    assert stats.kstest(x / n, "uniform").pvalue > ALARM
    bound = Counts(jnp.int32(2), jnp.int32(3 << (BITS - 2)))  # 2.75
    drawn = fixed_point.uniform_below(keys[0], (20_000,), bound)
    x = np.asarray(drawn.whole) + np.asarray(drawn.part) / ONE
    assert x.max() < 2.75 and stats.kstest(x / 2.75, "uniform").pvalue > ALARM


def test_effective_sample_size():
    np.testing.assert_allclose(
        effective_sample_size(LOG_WEIGHTS), 1 / np.sum(WEIGHTS**2), rtol=1e-6
    )
    assert effective_sample_size(np.zeros(7, np.float32)) == 7
    assert effective_sample_size(np.full(7, -np.inf, np.float32)) == 0
