"""`post.update`: conjugate models, the Kalman filter, costs, compiles, messages.

Statistical comparisons are to 4.5 standard errors (a false alarm in 1.5e5), with fixed keys.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist

SD = 2.0  # of the prior of `mean_model`


@ab.model
def mean_model(n):
    theta = ab.sample("theta", dist.Normal(0.0, SD))
    ab.deterministic("twice", 2 * theta)
    ab.sample("y", dist.Normal(theta, 1.0).expand([n]))


def exact(y):
    """Mean, standard deviation and log evidence of `mean_model`."""
    y = np.ravel(np.asarray(y, float))
    precision = 1 / SD**2 + len(y)
    cov = np.eye(len(y)) + SD**2
    log_z = -0.5 * (len(y) * np.log(2 * np.pi) + np.linalg.slogdet(cov)[1])
    return y.sum() / precision, precision**-0.5, log_z - 0.5 * y @ np.linalg.solve(cov, y)


Y = np.random.default_rng(1).normal(1.5, 1.0, (60, 4)).astype(np.float32)
N = 1000


@pytest.fixture(scope="module")
def streamed():
    start = mean_model.prior(jax.random.key(3), 4, num_samples=N)
    history = [start]
    for key, y in zip(jax.random.split(jax.random.key(4), len(Y)), Y, strict=True):
        history.append(history[-1].update(key, 4, given={"y": y}))
    return history


def test_many_batches_equal_the_closed_form(streamed):
    post = streamed[-1]
    mean, sd, log_z = exact(Y)
    ess = post.diagnostics["ess"]
    assert post.diagnostics["num_batches"] == len(Y)
    assert post.diagnostics["num_moved"] >= 3
    assert abs(post.mean("theta") - mean) < 4.5 * sd / ess**0.5
    assert abs(post.std("theta") / sd - 1) < 4.5 * (2 * ess) ** -0.5
    # Each part contributes at most 1/N to the variance of the log evidence, times the variance of
    # its relative weights, at most 1 at the threshold of one half.
    assert abs(post.log_evidence - log_z) < 4.5 * (2 * post.diagnostics["num_moved"] / N) ** 0.5
    np.testing.assert_allclose(post.draws["twice"], 2 * post.draws["theta"], rtol=1e-6)


def test_moves_leave_the_law_invariant(streamed):
    """Right after each move, where particles are equally weighted or nearly so."""
    after = [(i, p) for i, p in enumerate(streamed) if p.diagnostics.get("num_parts")]
    for i, post in after:
        mean, sd, _ = exact(Y[:i])
        ess = post.diagnostics["ess"]
        assert ess > N / 2
        assert abs(post.mean("theta") - mean) < 4.5 * sd / (ess / 2) ** 0.5  # correlated by copies
        z = (post.draws["theta"] - mean) / sd
        w = np.asarray(post._weights)
        tail = float(w @ (np.abs(np.ravel(z)) > 1.645))
        assert abs(tail - 0.1) < 4.5 * (0.09 / (ess / 2)) ** 0.5


def test_cost_grows_linearly_and_moves_become_rare(streamed):
    moved = [p.diagnostics["num_moved"] for p in streamed[1:]]
    work = np.array([p.diagnostics["evaluations"] for p in streamed[1:]], float)
    expected = 0
    for count, post in enumerate(streamed[1:]):
        parts = post.diagnostics["num_parts"]
        expected += N
        if parts:  # values before, gradients and values in the moves, draws after
            expected += N * (2 + (count + 2) * (1 + parts * (1 + 5 * 11)))
        assert post.diagnostics["evaluations"] == expected
    assert moved[-1] - moved[29] <= 2  # twice the data: one more move, or two
    # Least upper bound of moves at each doubling: c (T + T/2 + ...) = 2 c T.
    assert work[59] < 2.7 * work[29]


def test_one_batch_equals_its_parts(streamed):
    """Without moves, what matters is the product of the likelihoods."""
    start = streamed[0]
    never = ab.smc(threshold=0.0)
    parts = start
    for y in Y[:3]:
        parts = parts.update(jax.random.key(0), 4, given={"y": y}, via=never)
        never = None  # remembered
    whole = start.update(
        jax.random.key(0), 12, given={"y": Y[:3].ravel()}, via=ab.smc(threshold=0.0)
    )
    np.testing.assert_allclose(parts.log_weights, whole.log_weights, rtol=2e-5, atol=2e-4)
    np.testing.assert_array_equal(parts.draws["theta"], start.draws["theta"])
    assert abs(parts.log_evidence - whole.log_evidence) < 1e-3


@pytest.mark.slow
def test_draws_of_other_algorithms_go_on():
    mean, sd, log_z = exact(Y[:11])
    first = Y[:10].ravel()
    nuts = ab.nuts(num_chains=2, num_warmup=200, num_samples=500)(mean_model)
    importance = ab.importance(num_samples=1000)(mean_model)
    for algorithm, known in ((nuts, False), (importance, True)):
        post = algorithm.posterior(jax.random.key(1), 40, given={"y": first})
        post = post.update(jax.random.key(2), 4, given={"y": Y[10]})
        assert post.num_chains == 1
        assert abs(post.mean("theta") - mean) < 4.5 * sd / 200**0.5
        assert (post.log_evidence is not None) == known
    assert abs(post.log_evidence - log_z) < 0.2


def test_a_batch_that_says_much_enters_in_parts():
    @ab.model
    def sharp(scale):
        theta = ab.sample("theta", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Normal(theta, scale))

    start = sharp.prior(jax.random.key(0), 0.01, num_samples=1000)
    post = start.update(jax.random.key(1), 0.01, given={"y": 3.0})
    assert post.diagnostics["num_parts"] > 4
    sd = (1 + 1e4) ** -0.5
    assert abs(post.mean("theta") - 3 * 1e4 * sd**2) < 4.5 * sd / 300**0.5
    log_z = dist.Normal(0.0, (1 + 1e-4) ** 0.5).log_prob(3.0)
    assert abs(post.log_evidence - log_z) < 4.5 * (2 * post.diagnostics["num_parts"] / 1000) ** 0.5


def test_data_without_information_leave_the_weights(streamed):
    @ab.model
    def loose(x):
        theta = ab.sample("theta", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Normal(x * theta, 1.0))

    post = loose.prior(jax.random.key(0), 1.0, num_samples=100)
    post = post.update(jax.random.key(1), 1.0, given={"y": 0.5}, via=ab.smc(threshold=0.1))
    again = post.update(jax.random.key(2), 0.0, given={"y": 0.5})
    moved = again.log_weights - post.log_weights
    np.testing.assert_allclose(moved, dist.Normal(0.0, 1.0).log_prob(0.5), rtol=1e-5)


def test_no_compiles_while_shapes_repeat(count_compiles, streamed):
    keys, post = list(jax.random.split(jax.random.key(9), 20)), streamed[0]
    with count_compiles() as compiles:
        for key, y in zip(keys, Y[:20], strict=True):
            post = post.update(key, 4, given={"y": y})
    assert post.diagnostics["num_moved"] > 1 and compiles.count == 0


# ---------------------------------------------------------------------- groups drawn anew


@ab.model
def groups(n):
    mu = ab.sample("mu", dist.Normal(0.0, 1.0))
    theta = jax.vmap(lambda _: ab.sample("theta", dist.Normal(mu, 0.5)))(jnp.arange(n))
    ab.sample("y", dist.Normal(theta, 0.3).to_event(1))


@pytest.mark.slow
def test_new_groups_are_drawn_anew():
    rng = np.random.default_rng(3)
    data = [rng.normal(0.8, 0.58, n).astype(np.float32) for n in (3, 3, 3, 3, 3, 3, 5)]
    post = groups.prior(jax.random.key(0), 3, num_samples=1000)
    keys = jax.random.split(jax.random.key(1), len(data))
    with pytest.raises(ab.InvalidValue, match='redraw="theta"'):
        post.update(keys[0], 5, given={"y": data[-1]})
    for key, y in zip(keys, data, strict=True):
        post = post.update(key, len(y), given={"y": y}, redraw="theta")
    y = np.concatenate(data).astype(float)
    cov = np.ones((len(y), len(y))) + (0.25 + 0.09) * np.eye(len(y))
    variance = 1 / (1 + len(y) / 0.34)
    mean = variance * y.sum() / 0.34
    log_z = -0.5 * (len(y) * np.log(2 * np.pi) + np.linalg.slogdet(cov)[1])
    log_z -= 0.5 * y @ np.linalg.solve(cov, y)
    assert post.diagnostics["num_moved"] >= 3
    assert abs(post.mean("mu") - mean) < 4.5 * variance**0.5 / 300**0.5
    assert abs(post.std("mu") / variance**0.5 - 1) < 4.5 * 600**-0.5
    assert abs(post.log_evidence - log_z) < 0.5
    # The effects are those of the latest groups.
    assert np.shape(post.draws["theta"]) == (1, 1000, 5)
    shrunk = (y[-5:] / 0.09 + post.mean("mu") / 0.25) / (1 / 0.09 + 1 / 0.25)
    assert np.abs(post.mean("theta") - shrunk).max() < 4.5 * 0.3 / 200**0.5
    with pytest.raises(ab.InvalidValue, match="was drawn anew for earlier data"):
        post.update(keys[0], 5, given={"y": data[-1]})


# ---------------------------------------------------------------------- state-space models


@ab.model
def local_level(n):
    x0 = ab.sample("x0", dist.Normal(0.0, 1.0))

    def step(x, _):
        x = ab.sample("x", dist.Normal(0.9 * x, 0.5))
        ab.sample("y", dist.Normal(x, 0.7))
        return x, None

    jax.lax.scan(step, x0, None, length=n)


def kalman(y):
    mean, variance, log_z, means = 0.0, 1.0, 0.0, []
    for v in y:
        mean, variance = 0.9 * mean, 0.81 * variance + 0.25
        s = variance + 0.49
        log_z -= 0.5 * np.log(2 * np.pi * s) + 0.5 * (v - mean) ** 2 / s
        mean, variance = mean + variance / s * (v - mean), variance * (1 - variance / s)
        means.append(mean)
    return np.array(means), variance, log_z


SERIES = np.random.default_rng(5).normal(0, 1.1, 20).astype(np.float32)


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.filterwarnings("ignore:ab.smc")
@pytest.mark.slow
def test_a_filter_goes_on_as_one_long_run(length):
    """80 filters: the mean evidence is that of the Kalman filter, and so are the means."""
    alg = ab.smc(num_particles=64)(local_level)

    def run(key):
        keys = jax.random.split(key, 20 // length)
        post = alg.posterior(keys[0], length, given={"y": SERIES[:length]})
        for i in range(1, 20 // length):
            y = SERIES[i * length : (i + 1) * length]
            post = post.update(keys[i], length, given={"y": y})
        return post.log_evidence, post.mean("x")[-1]

    if length == 1:  # 20 filters of one step would compile for long under one vmap
        log_z, means = np.array([run(k) for k in jax.random.split(jax.random.key(0), 80)]).T
    else:
        log_z, means = jax.vmap(run)(jax.random.split(jax.random.key(0), 80))
    exact_means, _, exact_log_z = kalman(SERIES)
    ratio = np.exp(np.asarray(log_z, float) - exact_log_z)
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / 80**0.5
    error = np.asarray(means, float) - exact_means[-1]
    assert abs(error.mean()) < 4.5 * error.std() / 80**0.5 + 0.005  # of order 1/N


@pytest.mark.filterwarnings("ignore:ab.smc")
def test_single_steps_compile_nothing(count_compiles):
    post = ab.smc(num_particles=64)(local_level).posterior(
        jax.random.key(0), 1, given={"y": SERIES[:1]}
    )
    keys = jax.random.split(jax.random.key(1), 20)
    for t in (1, 2):
        post = post.update(keys[t], 1, given={"y": SERIES[t : t + 1]})
    with count_compiles() as compiles:
        for t in range(3, 20):
            post = post.update(keys[t], 1, given={"y": SERIES[t : t + 1]})
    assert compiles.count == 0
    assert np.shape(post.draws["x"]) == (1, 64, 1) and np.shape(post.draws["x0"]) == (1, 64)
    assert len(jax.tree.leaves(post.resume)) < 12  # no past is carried along


# ---------------------------------------------------------------------- messages


def test_messages(tmp_path, streamed):
    start, key = streamed[0], jax.random.key(0)
    with pytest.raises(ab.InvalidValue, match="has shape"):
        start.update(key, 4, given={"y": Y[0, :3]})
    with pytest.raises(ab.UnknownAddress, match='Did you mean "y"'):
        start.update(key, 4, given={"yy": Y[0]})
    with pytest.raises(ab.UnknownAddress, match="matches no site"):
        start.update(key, 4, given={"y": Y[0]}, redraw="thetta")
    with pytest.raises(ab.InvalidValue, match="no latent of `mean_model` is shared"):
        start.update(key, 4, given={"y": Y[0]}, redraw="theta")
    with pytest.raises(ab.InvalidAlgorithm, match=r"via= takes an ab.smc"):
        start.update(key, 4, given={"y": Y[0]}, via=ab.nuts())
    with pytest.raises(ab.MissingKey):
        start.update(0, 4, given={"y": Y[0]})
    streamed[-1].save(tmp_path / "post")
    loaded = ab.load(tmp_path / "post")
    with pytest.raises(ab.InvalidValue, match="loaded from disk"):
        loaded.update(key, 4, given={"y": Y[0]})


def test_impossible_data():
    @ab.model
    def bounded():
        theta = ab.sample("theta", dist.Uniform(0.0, 1.0))
        ab.sample("y", dist.Uniform(0.0, theta))

    post = bounded.prior(jax.random.key(0), num_samples=50)
    with pytest.raises(ab.Degenerate, match=r"all 50 particles have weight zero.*'y'"):
        post.update(jax.random.key(0), given={"y": 2.0})


def test_discrete_latents_and_scans_without_carry_are_refused():
    @ab.model
    def mixture(n):
        k = ab.sample("k", dist.Bernoulli(0.5))
        ab.sample("y", dist.Normal(1.0 * k, 1.0).expand([n]))

    post = mixture.prior(jax.random.key(0), 4, num_samples=50)
    with pytest.raises(ab.DiscreteLatent, match=r"'k'.*with_prior\(m, post.as_model\(\)\)"):
        post.update(jax.random.key(0), 4, given={"y": Y[0]})
    series = local_level.prior(jax.random.key(0), 4, num_samples=50)
    with pytest.raises(ab.InvalidValue, match="'x' is drawn inside a scan"):
        series.update(jax.random.key(0), 4, given={"y": Y[0]})


@pytest.mark.slow
def test_update_can_be_mapped():
    """Traced: whether to move is decided by the compiled program."""

    def run(key, y):
        post = mean_model.prior(key, 4, num_samples=400)
        for i in range(2):
            post = post.update(jax.random.fold_in(key, i), 4, given={"y": y[i]})
        return post.mean("theta"), post.log_evidence

    data = jnp.asarray(Y[:6]).reshape(3, 2, 4)
    means, log_z = jax.vmap(run)(jax.random.split(jax.random.key(0), 3), data)
    for i in range(3):
        mean, sd, exact_log_z = exact(Y[2 * i : 2 * i + 2])
        assert abs(means[i] - mean) < 4.5 * sd / 100**0.5
        assert abs(log_z[i] - exact_log_z) < 4.5 * (6 / 400) ** 0.5
