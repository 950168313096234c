"""The HMC and NUTS engine on flat targets whose moments are known.

Statistical tests use fixed keys. Each compares moments with the truth in units of the Monte Carlo
standard error, estimated by batch means over the chains; a band of 4.5 standard errors has a
false-alarm rate of 7e-6 a comparison, at most 1e-4 a test with up to 14 comparisons. With
hundreds of coordinates the band is 5.5 (4e-8 a comparison).
"""

import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from abduce.errors import InitializationError, InvalidAlgorithm
from abduce.inference.mcmc import chains as chains_module
from abduce.inference.mcmc.chains import Chains
from abduce.inference.mcmc.counter_random import chain_seeds, normals, threefry, uniform
from abduce.inference.mcmc.descent import find_mass
from abduce.inference.mcmc.engine import run
from abduce.inference.mcmc.linear_map import LinearMap, diagonal_map, pull, push
from abduce.inference.mcmc.metric_choice import choose_metric, nonlinearity, whiten
from abduce.inference.mcmc.report import split_rhat, warnings_of
from abduce.inference.mcmc.settings import HMCConfig
from abduce.inference.mcmc.trajectory import run_nuts

# ------------------------------------------------------------------ targets


def standard(data, q):
    return -0.5 * jnp.sum((q - data["mean"]) ** 2 / data["variance"])


def correlated(data, q):
    r = q - data["mean"]
    return -0.5 * r @ data["precision"] @ r


def student(data, q):
    nu = data
    return -0.5 * (nu + 1) * jnp.sum(jnp.log1p(q**2 / nu))


def gumbel(data, q):
    return jnp.sum(-q - jnp.exp(-q)) + 0 * data


def mixture(data, q):
    return jnp.sum(jnp.logaddexp(-0.5 * (q + 1.2) ** 2, jnp.log(0.5) - 0.5 * (q - 1.2) ** 2)) + data


def funnel(data, q):  # non-centred
    scale = jnp.exp(q[0])
    return -0.5 * q[0] ** 2 - 0.5 * jnp.sum(q[1:] ** 2) - 0.5 * ((data - scale * q[1]) / 10) ** 2


def regression(data, q):
    r = data["y"] - data["x"] @ q[:-1]
    n = r.shape[0]
    return -0.5 * jnp.sum(r * r) * jnp.exp(-2 * q[-1]) - n * q[-1]


def half_line(data, q):  # NaN on one side, as a careless model has it
    return jnp.sum(jnp.log(q) - q) + data


def nowhere(data, q):
    return jnp.sum(q) * jnp.inf + data


def uniform_start(num_chains, dim, radius=2.0):
    def propose(key, attempt):
        words = [int(w) for w in np.asarray(jax.random.key_data(key)).ravel()]
        dtype = np.dtype(jnp.result_type(float))
        rng = np.random.default_rng([*words, attempt])
        return rng.uniform(-radius, radius, (num_chains, dim)).astype(dtype)

    return propose


def sample(target, data, dim, seed=0, **settings):
    config = HMCConfig(progress_bar=False, **settings)
    data = jax.tree.map(lambda a: np.asarray(a, np.dtype(jnp.result_type(float))), data)
    start = uniform_start(config.num_chains, dim)
    return run(target, data, jax.random.key(seed), config, start)


def assert_mean(values, truth, band=4.5):
    """Compares means over chains and draws with the truth; values `(chains, draws, ...)`."""
    values = np.asarray(values, np.float64)
    chains, draws = values.shape[:2]
    batches = values[:, : draws // 20 * 20].reshape(chains * 20, -1, *values.shape[2:]).mean(1)
    error = batches.std(0, ddof=1) / np.sqrt(len(batches))
    deviation = (values.mean((0, 1)) - truth) / error
    assert np.max(np.abs(deviation)) < band, deviation


# ------------------------------------------------------------------ exactness


@pytest.mark.parametrize("kind", ["nuts", "hmc"])
@pytest.mark.parametrize("dim", [1, 2, 50])
def test_gaussian_moments(dim, kind):
    rng = np.random.default_rng(dim)
    mean, variance = rng.normal(size=dim), np.exp(rng.normal(size=dim))
    length = {"trajectory_length": 1.5} if kind == "hmc" else {}
    result = sample(
        standard, {"mean": mean, "variance": variance}, dim, kind=kind, num_samples=2000, **length
    )
    assert result.positions.shape == (4, 2000, dim)
    band = 4.5 if dim < 10 else 5.5
    assert_mean(result.positions, mean, band)
    assert_mean((result.positions - mean) ** 2, variance, band)
    assert result.warnings == []


@pytest.mark.parametrize("dense_mass", [None, False, True])
def test_correlated_gaussian(dense_mass):
    dim = 6
    rng = np.random.default_rng(3)
    root = rng.normal(size=(dim, dim))
    covariance = root @ root.T + 0.05 * np.eye(dim)
    data = {"mean": np.zeros(dim), "precision": np.linalg.inv(covariance)}
    result = sample(correlated, data, dim, num_samples=3000, dense_mass=dense_mass)
    products = result.positions[..., :, None] * result.positions[..., None, :]
    assert_mean(products.reshape(4, 3000, -1), covariance.ravel(), 5.0)
    kinds = {None: {"dense"}, False: {"diagonal"}, True: {"dense"}}
    assert result.metric_kind in kinds[dense_mass]


@pytest.mark.parametrize(
    ("target", "data", "means"),
    [
        (gumbel, 0.0, {1: np.euler_gamma, 2: np.pi**2 / 6 + np.euler_gamma**2}),
        (mixture, 0.0, {1: -0.4, 2: 1 + 1.2**2}),
        (student, 8.0, {1: 0.0, 2: 8 / 6}),
    ],
    ids=["skewed", "mixture", "heavy tails"],
)
def test_other_densities_in_one_dimension(target, data, means):
    result = sample(target, data, 1, num_samples=8000)
    for power, truth in means.items():
        assert_mean(result.positions**power, truth)


def test_skewed_density_has_the_right_distribution():
    draws = sample(gumbel, 0.0, 1, num_samples=8000).positions[..., 0]
    for probability in (0.05, 0.5, 0.95):
        quantile = -np.log(-np.log(probability))
        assert_mean((draws < quantile)[..., None], probability)


def test_step_size_does_not_bias_the_draws():
    # far from the small-step limit every error in weights or U-turn checks would show
    for step_size in (0.3, 1.1, 1.6):
        result = sample(
            standard,
            {"mean": np.zeros(2), "variance": np.ones(2)},
            2,
            step_size=step_size,
            adapt_step_size=False,
            adapt_mass_matrix=False,
            num_samples=6000,
        )
        assert result.step_size == pytest.approx(step_size)
        assert_mean(result.positions**2, 1.0)
        assert_mean(result.positions, 0.0)


def test_a_wrong_sampler_is_caught_at_this_size():
    result = sample(standard, {"mean": np.zeros(2), "variance": np.ones(2)}, 2, num_samples=2000)
    with pytest.raises(AssertionError):
        assert_mean((1.15 * result.positions) ** 2, 1.0)


def test_noncentred_funnel_against_quadrature():
    data = 15.0
    result = sample(funnel, data, 3, num_samples=4000)
    v = np.linspace(-6, 6, 2001)
    spread = 10**2 + np.exp(2 * v)  # of the observation given v
    weights = np.exp(-0.5 * v**2 - 0.5 * data**2 / spread) / np.sqrt(spread)
    truth = np.sum(v * weights) / np.sum(weights)
    assert_mean(result.positions[..., :1], truth)


def test_density_that_is_not_finite_everywhere():
    result = sample(half_line, 0.0, 1, num_samples=4000)
    assert np.all(np.isfinite(result.positions)) and np.all(result.positions > 0)
    assert_mean(result.positions, 2.0)  # a gamma of shape 2


def test_double_precision(x64):
    result = sample(standard, {"mean": np.zeros(3), "variance": np.ones(3)}, 3, num_samples=2000)
    assert result.positions.dtype == np.float64
    assert_mean(result.positions**2, 1.0)


def test_vectorized_chains_are_the_same_chains(x64):
    data = {"mean": np.zeros(3), "variance": np.array([1.0, 4.0, 0.25])}
    settings = {"num_samples": 40, "num_warmup": 30}
    threads = sample(standard, data, 3, chain_method="threads", **settings)
    vectorized = sample(standard, data, 3, chain_method="vectorized", **settings)
    np.testing.assert_allclose(threads.positions, vectorized.positions, rtol=1e-6)


# ------------------------------------------------------------------ adaptation


def test_badly_scaled_regression_needs_few_gradients():
    rng = np.random.default_rng(0)
    x = np.column_stack([np.ones(200), rng.normal(2000, 10, 200)])
    y = x @ np.array([-30.0, 0.02]) + rng.normal(size=200)
    result = sample(regression, {"x": x, "y": y}, 3)
    # slope and intercept are correlated by 0.99999 and start a million nats from the mass
    assert result.metric_kind == "dense" and result.warmup.settled
    assert result.num_gradients_warmup < 10_000
    assert result.num_gradients_sampling < 40_000
    solution, residual = np.linalg.lstsq(x, y, rcond=None)[:2]
    assert_mean(result.positions[..., 1:2], solution[1])
    assert_mean(np.exp(-2 * result.positions[..., 2:]), 198 / residual[0])


def test_a_chain_in_a_negligible_mode_starts_anew():
    def lopsided(data, q):
        return (
            jnp.logaddexp(
                -0.5 * jnp.sum((q - 10) ** 2) * 100, -60 - 0.5 * jnp.sum((q + 10) ** 2) * 100
            )
            + data
        )

    def propose(key, attempt):
        near = np.full((4, 2), 9.0, np.float32)
        near[1 if attempt == 0 else 4 :] *= 1
        if attempt == 0:
            near[0] = -9.0
        return near

    result = run(lopsided, np.float32(0), jax.random.key(0), HMCConfig(progress_bar=False), propose)
    assert np.all(result.positions > 0)
    assert result.warnings == []


def test_metric_choice_sees_what_the_target_is():
    rng = np.random.default_rng(1)
    scales = np.exp(rng.normal(0, 2, 20))
    x = rng.normal(size=(4, 300, 20)) * scales
    unit = diagonal_map(np.ones(20), 20)
    choice = choose_metric(x, -x / scales**2, unit, None)
    assert choice.kind == "diagonal"
    np.testing.assert_allclose(choice.metric.scale, scales, rtol=0.15)
    root = np.eye(20) + 2 * np.ones((20, 20))
    y = x / scales @ root.T
    precision = np.linalg.inv(root @ root.T)
    choice = choose_metric(y, -y @ precision, unit, None)
    assert choice.kind == "dense" and choice.cost < choice.current_cost / 5
    np.testing.assert_allclose(
        choice.metric.factor @ choice.metric.factor.T, root @ root.T, rtol=0.05
    )
    assert choose_metric(y, -y @ precision, unit, False).kind == "diagonal"


def test_low_rank_metric_finds_the_long_direction():
    rng = np.random.default_rng(2)
    dim, rank = 300, 8
    direction = rng.normal(size=dim)
    direction /= np.linalg.norm(direction)
    stretch = np.eye(dim) + 9 * np.outer(direction, direction)
    x = rng.normal(size=(4, 100, dim)) @ stretch
    g = -x @ np.linalg.inv(stretch @ stretch)
    choice = choose_metric(x, g, diagonal_map(np.ones(dim), rank), None)
    assert choice.kind == "low rank"
    assert choice.cost < 0.3 * choice.current_cost
    z = whiten(choice.metric, x)
    assert np.std(z @ direction) < 1.5


def test_nonlinearity_tells_a_gaussian_from_a_funnel():
    rng = np.random.default_rng(3)
    root = rng.normal(size=(5, 5))
    z = rng.normal(size=(4, 50, 5))
    dense = LinearMap(np.ones(5), root, np.zeros(5), np.array(True))
    gradients = -z @ np.linalg.inv(root)
    assert nonlinearity(dense, z @ root.T, gradients) < 1e-10
    assert nonlinearity(dense, z[:, :4] @ root.T, gradients[:, :4]) == 1.0  # too few to tell
    unit = diagonal_map(np.ones(5), 5)
    scale = np.exp(1.5 * z[..., :1])
    theta = scale * z[..., 1:]
    slope = -z[..., :1] + np.sum(z[..., 1:] ** 2 - 1, -1, keepdims=True)
    funnel = np.concatenate([slope, -theta / scale**2], -1)
    assert nonlinearity(unit, np.concatenate([z[..., :1], theta], -1), funnel) > 0.5


def test_a_mild_funnel_keeps_its_distance_from_large_steps():
    def noncentred(data, q):
        effects = q[0] + jnp.exp(q[1]) * q[2:]
        prior = -0.5 * jnp.sum(q[2:] ** 2) - 0.5 * (q[0] / 5) ** 2 + q[1]
        prior = prior - jnp.log1p(jnp.exp(2 * q[1]) / 25)
        return prior - 0.5 * jnp.sum(((data["y"] - effects) / data["sigma"]) ** 2)

    data = {
        "y": np.array([28.0, 8, -3, 7, -1, 1, 18, 12]),
        "sigma": np.array([15.0, 10, 16, 11, 9, 11, 10, 18]),
    }
    result = sample(noncentred, data, 10)
    assert result.stats["acceptance_rate"].mean() > 0.85
    assert result.stats["diverging"].mean() < 0.001
    assert split_rhat(result.positions).max() < 1.02


def test_descent_stops_at_the_mass_and_measures_the_curvature():
    rng = np.random.default_rng(4)
    dim = 20
    root = rng.normal(size=(dim, dim)) / np.sqrt(dim) + np.eye(dim)
    precision = np.linalg.inv(root @ root.T)

    def drive(search):
        q = next(search)
        count = 1
        try:
            while True:
                q = search.send((float(-0.5 * q @ precision @ q), -precision @ q))
                count += 1
        except StopIteration as stop:
            return stop.value, count

    mass, count = drive(find_mass(rng.normal(size=dim) * 1000))
    assert count < 300
    q = mass.descent.position
    assert 0.5 * q @ precision @ q < dim + 5
    assert mass.gain() == pytest.approx(0.5 * q @ precision @ q, rel=1e-3)
    np.testing.assert_allclose(mass.covariance, root @ root.T, rtol=1e-4, atol=1e-4)
    assert mass.log_mass() == pytest.approx(-0.5 * np.linalg.slogdet(precision)[1], abs=1e-3)


def test_warmup_can_be_made_to_use_all_its_draws():
    data = {"mean": np.zeros(2), "variance": np.ones(2)}
    early = sample(standard, data, 2)
    full = sample(standard, data, 2, end_warmup_early=False)
    assert early.warmup.num_draws < 400 and early.warmup.settled
    assert full.warmup.num_draws == 1000


def test_few_or_no_warmup_draws():
    data = {"mean": np.zeros(2), "variance": np.ones(2)}
    for num_warmup in (0, 1, 7, 40):
        result = sample(standard, data, 2, num_warmup=num_warmup, num_samples=1000)
        assert result.warmup.num_draws <= num_warmup
        assert_mean(result.positions**2, 1.0)


def test_float32_keeps_long_trajectories_accurate():
    # a log density of about -1e5 has a grain of 0.008 in float32; the steps must not feel it much
    def shifted(data, q):
        return -0.5 * jnp.sum(q * q / data["variance"])

    variance = np.exp(np.linspace(0, 8, 20)).astype(np.float32)
    result = sample(shifted, {"variance": variance}, 20, adapt_mass_matrix=False, num_samples=200)
    assert result.stats["n_steps"].mean() > 50
    assert result.stats["acceptance_rate"].mean() > 0.6
    assert not result.stats["diverging"].any()


# ------------------------------------------------------------------ the run


def test_draws_depend_on_the_key_alone():
    data = {"mean": np.zeros(3), "variance": np.ones(3)}
    settings = {"num_samples": 60, "num_warmup": 60}
    first = sample(standard, data, 3, seed=5, **settings)
    again = sample(standard, data, 3, seed=5, **settings)
    other = sample(standard, data, 3, seed=6, **settings)
    np.testing.assert_array_equal(first.positions, again.positions)
    assert not np.any(first.positions == other.positions)


def test_draws_do_not_depend_on_how_they_are_split_into_calls():
    dim = 3
    data = {"mean": np.zeros(dim, np.float32), "variance": np.ones(dim, np.float32)}

    def draw(splits):
        def program(*args, on_cpu):
            return run_nuts(*args, max_depth=6, on_cpu=on_cpu)

        seeds = chain_seeds(jax.random.key(1), 2)
        chains = Chains(
            program, standard, data, seeds, np.zeros((2, dim), np.float32), threads=True
        )
        chains.restart_averages(np.log(0.5))
        unit = diagonal_map(np.ones(dim), dim)
        parts = [chains.advance(n, unit, max_depth=6, adapt=True).positions for n in splits]
        chains.close()
        return np.concatenate(parts, 1)

    np.testing.assert_array_equal(draw([30]), draw([1, 12, 17]))


def test_second_call_compiles_nothing(count_compiles):
    sample(standard, {"mean": np.zeros(4), "variance": np.ones(4)}, 4, num_samples=50)
    with count_compiles() as compiles:
        sample(standard, {"mean": np.ones(4), "variance": 2 * np.ones(4)}, 4, num_samples=50)
        sample(standard, {"mean": np.ones(4), "variance": np.ones(4)}, 4, seed=1, num_samples=777)
        sample(standard, {"mean": np.ones(4), "variance": np.ones(4)}, 4, num_chains=3)
        sample(standard, {"mean": np.ones(4), "variance": np.ones(4)}, 4, num_warmup=10, thinning=2)
        sample(standard, {"mean": np.ones(4), "variance": np.ones(4)}, 4, target_accept_prob=0.9)
    assert compiles.count == 0


def test_first_call_compiles_one_program(count_compiles):
    def fresh(data, q):
        return -0.5 * jnp.sum(q * q) + data

    sample(standard, {"mean": np.zeros(2), "variance": np.ones(2)}, 2, num_samples=50)
    with count_compiles() as compiles:
        sample(fresh, 0.0, 3, num_samples=50)
    assert compiles.count == 1


def test_thinning_keeps_each_nth_draw():
    data = {"mean": np.zeros(2), "variance": np.ones(2)}
    settings = {"num_warmup": 50, "num_samples": 60}
    every = sample(standard, data, 2, **settings)
    third = sample(standard, data, 2, thinning=3, **settings)
    assert third.positions.shape == (4, 20, 2)
    np.testing.assert_array_equal(third.positions, every.positions[:, 2::3])
    np.testing.assert_array_equal(third.stats["lp"], every.stats["lp"][:, 2::3])


def test_statistics_are_what_they_say():
    data = {"mean": np.zeros(3), "variance": np.array([1.0, 2.0, 3.0])}
    result = sample(standard, data, 3, num_samples=500)
    stats = result.stats
    assert set(stats) == {
        "lp", "energy", "n_steps", "tree_depth", "acceptance_rate", "diverging", "step_size",
    }  # fmt: skip
    assert all(v.shape == (4, 500) for v in stats.values())
    lp = -0.5 * np.sum(result.positions**2 / np.array([1.0, 2.0, 3.0]), -1)
    np.testing.assert_allclose(stats["lp"], lp, rtol=1e-4, atol=1e-5)
    assert result.num_gradients_sampling >= stats["n_steps"].sum()
    assert result.num_gradients_sampling <= stats["n_steps"].sum() + 4 * 500
    assert np.all(stats["n_steps"] <= 2 ** stats["tree_depth"] - 1)
    assert np.all(stats["energy"] >= -stats["lp"])
    assert stats["diverging"].dtype == bool and stats["n_steps"].dtype.kind == "i"
    # energy of a draw: potential plus kinetic, the latter a chi-square with 3 degrees of freedom
    kinetic = (stats["energy"] + stats["lp"])[..., None]
    assert_mean(kinetic, 1.5)


def test_energy_of_hmc():
    data = {"mean": np.zeros(3), "variance": np.ones(3)}
    result = sample(standard, data, 3, kind="hmc", num_steps=4, num_samples=500)
    assert "tree_depth" not in result.stats
    assert np.all(result.stats["n_steps"] == 4)
    assert np.all(result.stats["energy"] >= -result.stats["lp"] - 1e-5)


def test_no_starting_point():
    config = HMCConfig(progress_bar=False)
    with pytest.raises(InitializationError, match="chain 0 in 100 attempts: because of me"):
        run(
            nowhere, np.float32(0), jax.random.key(0), config, uniform_start(4, 2),
            describe_failure=lambda q: "because of me",
        )  # fmt: skip


def test_starting_points_are_asked_for_again_where_needed():
    asked = []

    def propose(key, attempt):
        asked.append(attempt)
        start = np.full((2, 1), 1.0, np.float32)
        if attempt < 3:
            start[1] = -1.0
        return start

    config = HMCConfig(num_chains=2, num_samples=50, num_warmup=20, progress_bar=False)
    result = run(half_line, np.float32(0), jax.random.key(0), config, propose)
    assert asked[:4] == [0, 1, 2, 3]
    assert np.all(result.positions > 0)


def test_interrupt_returns_the_draws_so_far(monkeypatch):
    original = chains_module.Chains.advance
    calls = []

    def advance(self, num_draws, metric, **options):
        if num_draws and not options.get("adapt") and options["max_depth"] == 10:
            calls.append(num_draws)
            if sum(calls) > 2000:
                raise KeyboardInterrupt
        return original(self, num_draws, metric, **options)

    monkeypatch.setattr(chains_module.Chains, "advance", advance)
    data = {"mean": np.zeros(2), "variance": np.ones(2)}
    result = sample(standard, data, 2, num_samples=100_000)
    assert result.interrupted
    assert 0 < result.positions.shape[1] < 100_000
    assert result.positions.shape[1] == result.stats["lp"].shape[1]
    assert "interrupted after" in result.warnings[0]


def test_interrupt_in_the_warmup_is_raised(monkeypatch):
    def advance(self, num_draws, metric, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(chains_module.Chains, "advance", advance)
    with pytest.raises(KeyboardInterrupt):
        sample(standard, {"mean": np.zeros(2), "variance": np.ones(2)}, 2)


def test_no_threads_are_left_behind():
    before = threading.active_count()
    sample(standard, {"mean": np.zeros(2), "variance": np.ones(2)}, 2, num_samples=20)
    assert threading.active_count() <= before


def test_progress_bar_appears_only_in_long_runs(capfd, monkeypatch):
    from abduce.inference.mcmc import pacing

    data = jax.tree.map(np.float32, {"mean": np.zeros(2), "variance": np.ones(2)})
    config = HMCConfig(num_samples=200, num_warmup=100)
    run(standard, data, jax.random.key(0), config, uniform_start(4, 2))
    assert "ab.nuts" not in capfd.readouterr().out
    monkeypatch.setattr(pacing, "_SECONDS_BEFORE_BAR", 0.0)
    opened = []
    original = pacing.Pacer._open
    monkeypatch.setattr(pacing.Pacer, "_open", lambda self: opened.append(original(self)))
    run(standard, data, jax.random.key(0), config, uniform_start(4, 2))
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples=0; expected an integer of at least 1"),
        ({"num_chains": 1.5}, "num_chains=1.5; expected an integer"),
        ({"target_accept_prob": 1.0}, "between 0 and 1, such as 0.8"),
        ({"step_size": -1.0}, "step_size=-1.0; expected a positive number, or None"),
        ({"thinning": 9, "num_samples": 5}, "expected thinning <= num_samples"),
        ({"max_tree_depth": 40}, "expected at most 20"),
        ({"chain_method": "pmap"}, "'auto', 'threads' or 'vectorized'"),
        ({"kind": "gibbs"}, "expected 'nuts' or 'hmc'"),
        ({"kind": "hmc"}, "give num_steps or trajectory_length"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InvalidAlgorithm, match=message):
        HMCConfig(**settings)


# ------------------------------------------------------------------ warnings


def _stats(num_draws=200, **changes):
    shape = (4, num_draws)
    rng = np.random.default_rng(0)
    stats = {
        "lp": np.zeros(shape), "energy": rng.normal(size=shape), "n_steps": np.ones(shape, int),
        "tree_depth": np.full(shape, 3), "diverging": np.zeros(shape, bool),
    }  # fmt: skip
    return stats | changes


def test_warnings_name_the_trouble_and_a_remedy():
    rng = np.random.default_rng(0)
    good, config = rng.normal(size=(4, 200, 2)), HMCConfig()
    assert warnings_of(good, _stats(), config) == []

    diverging = np.zeros((4, 200), bool)
    diverging[1, :7] = True
    (message,) = warnings_of(good, _stats(diverging=diverging), config)
    assert "7 of 800 trajectories diverged" in message and "target_accept_prob=0.95" in message

    (message,) = warnings_of(good, _stats(tree_depth=np.full((4, 200), 10)), config)
    assert "max_tree_depth=10" in message and "Try max_tree_depth=12" in message

    stuck = good.copy()
    stuck[2] = stuck[2, :1]
    assert any("chain 2 hardly moves" in m for m in warnings_of(stuck, _stats(), config))

    apart = good.copy()
    apart[3] += 30
    (message,) = warnings_of(apart, _stats(), config)
    assert "chain 3 and the others are in different modes" in message and "init=" in message

    drifting = good + np.linspace(0, 2, 200)[None, :, None]
    (message,) = warnings_of(drifting, _stats(), config)
    assert "have not mixed" in message and "num_samples=2000" in message

    walk = np.cumsum(rng.normal(size=(4, 200)), 1)
    (message,) = warnings_of(good, _stats(energy=walk), config)
    assert "E-BFMI" in message and "non-centred" in message


def test_split_rhat_of_shifted_halves():
    rng = np.random.default_rng(0)
    same = rng.normal(size=(4, 1000))
    assert split_rhat(same) == pytest.approx(1.0, abs=0.01)
    same[:, 500:] += 2
    assert split_rhat(same) > 1.3
    assert split_rhat(np.ones((2, 10))) == 1.0
    assert split_rhat(np.arange(2.0)[:, None] * np.ones(10)) == np.inf


# ------------------------------------------------------------------ pieces


def test_threefry_known_answers():
    # test vectors published with Salmon et al. (2011)
    def encrypt(key, high, low):
        words = threefry(jnp.array(key, jnp.uint32), jnp.uint32(high), jnp.uint32(low))
        return tuple(int(w) for w in words)

    assert encrypt((0, 0), 0, 0) == (0x6B200159, 0x99BA4EFE)
    ones = 0xFFFFFFFF
    assert encrypt((ones, ones), ones, ones) == (0x1CB996FC, 0xBB002BE7)
    assert encrypt((0x13198A2E, 0x03707344), 0x243F6A88, 0x85A308D3) == (0xC4923A9C, 0x483DF7A0)


@pytest.mark.parametrize("wide", [False, True])
def test_normals_and_uniforms(wide):
    from scipy import stats

    with jax.enable_x64(wide):
        dtype = jnp.result_type(float)
        seed = jnp.array([1, 2], jnp.uint32)
        many = jax.vmap(lambda i: normals(seed, i, 500, dtype)[0])(
            jnp.arange(200, dtype=jnp.uint32)
        )
        assert many.dtype == dtype
        many = np.asarray(many, np.float64).ravel()
        words = threefry(seed, jnp.uint32(3), jnp.arange(100_000, dtype=jnp.uint32))
        flat = np.asarray(uniform(words.first, dtype), np.float64)
    assert stats.kstest(many, "norm").pvalue > 1e-5
    assert stats.kstest(flat, "uniform").pvalue > 1e-5
    assert flat.min() > 0 and flat.max() < 1
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 4.5 / np.sqrt(len(many))


def test_seeds_do_not_depend_on_the_number_of_chains():
    key = jax.random.key(7)
    np.testing.assert_array_equal(chain_seeds(key, 2), chain_seeds(key, 5)[:2])
    assert len({tuple(s) for s in chain_seeds(key, 100)}) == 100
    assert not np.array_equal(chain_seeds(key, 1), chain_seeds(jax.random.key(8), 1))


@pytest.mark.parametrize("dim", [3, 40])
@pytest.mark.parametrize("layout", ["diagonal", "dense", "low rank"])
def test_linear_map_layouts_agree_with_matrices(layout, dim, x64):
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(size=dim))
    if layout == "diagonal":
        metric, matrix = diagonal_map(scale, dim), np.diag(scale)
    elif layout == "dense":
        matrix = rng.normal(size=(dim, dim))
        metric = LinearMap(scale, matrix, np.zeros(dim), np.array(True))
    else:
        basis, core = np.linalg.qr(rng.normal(size=(dim, 2)))[0], np.array([3.0, -0.5])
        matrix = np.diag(scale) @ (np.eye(dim) + basis * core @ basis.T)
        metric = LinearMap(scale, basis, core, np.array(True))
    p, g = rng.normal(size=(2, dim))
    on_device = jax.tree.map(jnp.asarray, metric)
    np.testing.assert_allclose(push(on_device, p), matrix @ p, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(pull(on_device, g), matrix.T @ g, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(whiten(metric, matrix @ p), p, rtol=1e-8, atol=1e-8)


def test_engine_raises_no_python_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(standard, {"mean": np.zeros(2), "variance": np.ones(2)}, 2, num_samples=50)
