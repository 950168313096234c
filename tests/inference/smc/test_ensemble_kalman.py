"""The ensemble Kalman filter against the exact moments of linear-Gaussian models.

Means over independent runs are compared to 4.5 of their standard errors (a false alarm in 1.5e5
each; keys are fixed) plus the bias of a finite ensemble, of the order of 1 / N.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_space import DECAY, DRIVE, NOISE, SE, START, Y, chain, kalman, walk

import abduce as ab
import abduce.dist as dist
from abduce.inference.smc.ensemble_analysis import taper

KEY = jax.random.key(11)
LOG_Z, FILTERED, SMOOTHED = kalman()
ALG = ab.ensemble_kalman(num_particles=1000)


def path_law(y=Y, seen=None):
    """Mean and covariance of (x0, x1, ..., xT) given the data."""
    n = len(y)
    seen = np.ones(n, bool) if seen is None else seen
    variances = [START**2]
    for _ in range(n):
        variances.append(DECAY**2 * variances[-1] + DRIVE**2)
    cov = np.array([
        [DECAY ** abs(i - j) * variances[min(i, j)] for j in range(n + 1)] for i in range(n + 1)
    ])  # fmt: skip
    h = np.eye(n + 1)[1:][seen]
    gain = cov @ h.T @ np.linalg.inv(h @ cov @ h.T + NOISE**2 * np.eye(len(h)))
    return gain @ np.asarray(y)[seen], cov - gain @ h @ cov


def path_moments(alg, model, args, given, runs=16, names=("x0", "x")):
    """Means and covariances of the drawn paths, a row for each run."""

    def one(key):
        post = alg(model).posterior(key, *args, given=given)
        x = jnp.concatenate([post.draws[a][0].reshape(alg.num_particles, -1) for a in names], 1)
        return jnp.mean(x, 0), jnp.cov(x.T), post.diagnostics["gaussian_log_evidence"]

    return [np.asarray(v, float) for v in jax.jit(jax.vmap(one))(jax.random.split(KEY, runs))]


def assert_close(values, truth, bias=4e-3):
    error = values.std(0, ddof=1) / len(values) ** 0.5
    assert (error < 0.03).all(), error.max()
    assert (np.abs(values.mean(0) - truth) < SE * error + bias).all()


def test_paths_have_the_kalman_smoothers_means_and_covariances():
    means, covs, log_z = path_moments(ALG, walk, (8,), {"y": Y})
    m, c = path_law()
    np.testing.assert_allclose(m, SMOOTHED[0], atol=1e-10)
    assert_close(means, m)
    assert_close(covs, c)
    assert abs(log_z.mean() - LOG_Z) < SE * log_z.std(ddof=1) / 4 + 0.02


@ab.model
def noncentred(n):
    """The law of `walk`, but a step's only latent is noise: the carry itself has to be moved."""
    x0 = ab.sample("x0", dist.Normal(0.0, START))

    def step(x, _):
        e = ab.sample("e", dist.Normal(0.0, 1.0))
        x = ab.deterministic("x", DECAY * x + DRIVE * e)
        ab.sample("y", dist.Normal(x, NOISE))
        return x, x

    _, path = jax.lax.scan(step, x0, None, length=n)
    ab.deterministic("last", path[-1])


def test_a_state_that_is_computed_from_the_old_carry_is_moved_itself():
    means, covs, _ = path_moments(ALG, noncentred, (8,), {"y": Y})
    m, c = path_law()
    assert_close(means, m)
    assert_close(covs, c)
    post = ALG(noncentred).posterior(KEY, 8, given={"y": Y})
    np.testing.assert_allclose(post.draws["last"], post.draws["x"][..., -1], rtol=1e-6)
    x = np.concatenate([post.draws["x0"][0][:, None], post.draws["x"][0]], 1)
    # linear relations survive the analysis: the moved noise leads to the moved states
    np.testing.assert_allclose(x[:, 1:], DECAY * x[:, :-1] + DRIVE * post.draws["e"][0], atol=2e-5)


def test_missing_observations_are_left_out():
    seen = np.array([True, False, False, True, True, False, True, True])
    y = np.where(seen, Y, np.nan)
    means, covs, _ = path_moments(ALG, walk, (8,), {"y": ab.masked(y, observed=seen)})
    m, c = path_law(Y, seen)
    assert_close(means, m)
    assert_close(covs, c)
    post = ALG(walk).posterior(KEY, 8, given={"y": ab.masked(y, observed=seen)})
    drawn = np.asarray(post.draws["y"][0])
    assert (drawn[:, seen] == np.float32(Y[seen])).all()
    sd = (c[2, 2] + NOISE**2) ** 0.5
    assert abs(drawn[:, 1].mean() - m[2]) < SE * sd * 0.05
    assert abs(drawn[:, 1].std() / sd - 1) < 0.15


def test_observations_that_can_only_be_simulated():
    @ab.model
    def simulated(n):
        def step(x, _):
            x = ab.sample("x", dist.Normal(DECAY * x, DRIVE))
            look = lambda key, x: x + NOISE * jax.random.normal(key)  # noqa: E731
            ab.sample("y", dist.Simulator(look, x))
            return x, None

        jax.lax.scan(step, ab.sample("x0", dist.Normal(0.0, START)), None, length=n)

    means, covs, _ = path_moments(ALG, simulated, (8,), {"y": Y})
    m, c = path_law()
    assert_close(means, m, 6e-3)
    assert_close(covs, c, 6e-3)


def test_filtered_moments_and_lag_zero():
    post = ALG.replace(num_particles=4000, store="filter")(walk).posterior(KEY, 8, given={"y": Y})
    d = post.diagnostics
    se = SE * (FILTERED[1][1:] / 4000) ** 0.5
    assert (np.abs(d["filtered_mean/x"] - FILTERED[0][1:]) < 2 * se).all()
    assert (np.abs(d["filtered_sd/x"] / FILTERED[1][1:] ** 0.5 - 1) < 0.06).all()
    assert post.keys() == ["x0"]
    now = ALG.replace(lag=0)(walk).posterior(KEY, 8, given={"y": Y})
    np.testing.assert_allclose(now.mean("x"), now.diagnostics["filtered_mean/x"], atol=1e-5)
    far = ALG.replace(lag=7)(walk).posterior(KEY, 8, given={"y": Y})
    whole = ALG(walk).posterior(KEY, 8, given={"y": Y})
    np.testing.assert_allclose(far.draws["x"], whole.draws["x"], atol=1e-5)
    two = ALG.replace(lag=2)(walk).posterior(KEY, 8, given={"y": Y})
    np.testing.assert_allclose(two.draws["x"][..., 5:], whole.draws["x"][..., 5:], atol=1e-5)
    assert np.abs(two.draws["x"][..., 3] - whole.draws["x"][..., 3]).max() > 1e-3


def test_a_scan_that_runs_backwards():
    @ab.model
    def mirrored(n):
        x0 = ab.sample("x0", dist.Normal(0.0, START))

        def step(x, _):
            x = ab.sample("x", dist.Normal(DECAY * x, DRIVE))
            ab.sample("y", dist.Normal(x, NOISE))
            return x, None

        jax.lax.scan(step, x0, None, length=n, reverse=True)

    means, _, _ = path_moments(ALG, mirrored, (8,), {"y": Y[::-1]})
    m, _ = path_law()
    assert_close(means[:, 0], m[0])
    assert_close(means[:, 1:], m[:0:-1])


def test_a_parameter_and_a_positive_latent():
    """A constant level with known law: it is learned as well as its exact posterior."""

    @ab.model
    def levels():
        mu = ab.sample("mu", dist.Normal(0.0, 3.0))
        scale = ab.sample("scale", dist.LogNormal(0.0, 0.3))

        def step(_, y):
            gain = ab.sample("gain", dist.LogNormal(jnp.log(scale), 0.2))
            ab.deterministic("log_gain", jnp.log(gain))
            ab.sample("log_y", dist.Normal(mu + jnp.log(gain), 0.5), obs=y)
            return None, None

        jax.lax.scan(step, None, jnp.asarray(Y + 2.0))

    alg = ab.ensemble_kalman(num_particles=2000)
    post = alg(levels).posterior(KEY)
    # in logarithms the model is linear and Gaussian: y_t = mu + s + g_t + noise
    n = len(Y)
    cov = np.diag([9.0, 0.09, *[0.04] * n])
    h = np.concatenate([np.ones((n, 2)), np.eye(n)], 1)
    k = cov @ h.T @ np.linalg.inv(h @ cov @ h.T + 0.25 * np.eye(n))
    mean, after = k @ (Y + 2.0), cov - k @ h @ cov
    sd = np.diag(after) ** 0.5
    log_gain = np.log(post.draws["gain"][0])
    drawn = np.concatenate(
        [post.draws["mu"][0][:, None], np.log(post.draws["scale"][0])[:, None],
         log_gain - np.log(post.draws["scale"][0])[:, None]], 1
    )  # fmt: skip
    assert (np.abs(drawn.mean(0) - mean) < 0.15 * sd).all()
    assert (np.abs(drawn.std(0) / sd - 1) < 0.15).all()
    assert (post.draws["gain"] > 0).all()
    np.testing.assert_allclose(post.draws["log_gain"], np.log(post.draws["gain"]), atol=1e-5)


SIZE, STEPS = 40, 30


def advection():
    """A ring of 40 states that is pushed on by one, half of them observed; and exact moments."""
    rng = np.random.default_rng(0)
    push = 0.95 * np.roll(np.eye(SIZE), 1, 0)
    near = np.minimum(np.arange(SIZE), SIZE - np.arange(SIZE))
    row = np.exp(-0.5 * (near / 2) ** 2) + 1e-3 * (near == 0)
    noise = 0.3**2 * row[np.abs(np.subtract.outer(np.arange(SIZE), np.arange(SIZE)))]
    lower = np.linalg.cholesky(noise)
    h = np.eye(SIZE)[::2]
    x, truth, ys = np.zeros(SIZE), [], []
    m, c, means = np.zeros(SIZE), noise / (1 - 0.95**2), []
    x = np.linalg.cholesky(c) @ rng.normal(size=SIZE)
    start = np.linalg.cholesky(c)
    for _ in range(STEPS):
        x = push @ x + lower @ rng.normal(size=SIZE)
        y = h @ x + 0.2 * rng.normal(size=len(h))
        m, c = push @ m, push @ c @ push.T + noise
        k = c @ h.T @ np.linalg.inv(h @ c @ h.T + 0.04 * np.eye(len(h)))
        m, c = m + k @ (y - h @ m), c - k @ h @ c
        truth.append(x), ys.append(y), means.append(m)
    lower, start = jnp.asarray(lower), jnp.asarray(start)

    @ab.model
    def ring():
        def step(x, _):
            mean = 0.95 * jnp.roll(x, 1)
            x = ab.sample("x", dist.MultivariateNormal(mean, scale_tril=lower))
            ab.sample("y", dist.Normal(x[::2], 0.2))
            return x, None

        x0 = ab.sample("x0", dist.MultivariateNormal(jnp.zeros(SIZE), scale_tril=start))
        jax.lax.scan(step, x0, None, length=STEPS)

    return ring, np.array(ys), np.array(truth), np.array(means)


def test_forty_dimensions_with_a_hundred_members():
    """Close to the exact filter; localization on the ring makes it closer."""
    ring, ys, truth, exact = advection()
    angle = 2 * np.pi * np.arange(SIZE) / SIZE
    circle = SIZE / (2 * np.pi) * np.stack([np.cos(angle), np.sin(angle)], 1)
    errors = {}
    for name, extra in {
        "plain": {},
        "local": {"localization": {"x": circle, "y": circle[::2]}, "radius": 5.0},
    }.items():
        alg = ab.ensemble_kalman(num_particles=100, inflation=1.03, store="filter", **extra)
        post = alg(ring).posterior(KEY, given={"y": ys})
        mean = np.asarray(post.diagnostics["filtered_mean/x"])
        errors[name] = ((mean - exact) ** 2).mean() ** 0.5
        ratio = np.asarray(post.diagnostics["innovation_ratio"])[5:].mean()
        assert 0.7 < ratio < 1.4, (name, ratio)
    best = ((exact - truth) ** 2).mean() ** 0.5
    assert errors["plain"] < 0.45 * best, (errors, best)
    assert errors["local"] < 0.8 * errors["plain"], (errors, best)


def test_taper():
    a = np.linspace(0, 4, 41)[:, None]
    t = taper(a, a, 1.0)
    assert np.linalg.eigvalsh(t).min() > -1e-10 and (np.diag(t) == 1).all()
    assert t[0, 20] == 0 and (np.diff(t[0, :21]) < 0).all()
    assert abs(t[0, 10] - 5 / 24) < 1e-12  # both branches at r = 1


def test_inflation_widens_the_step():
    one, two = (
        ALG.replace(inflation=f)(walk).posterior(KEY, 1, given={"y": Y[:1]}) for f in (1.0, 1.5)
    )
    a, b = one.draws["x"][0, :, 0], two.draws["x"][0, :, 0]
    np.testing.assert_allclose(b - b.mean(), 1.5 * (a - a.mean()), atol=1e-5)
    np.testing.assert_allclose(one.draws["x0"], two.draws["x0"])
    assert one.log_evidence is None


def test_counts_observed_in_part_are_drawn_anew():
    @ab.model
    def counts():
        def step(x, _):
            x = ab.sample("x", dist.Normal(x, 0.1))
            ab.sample("n", dist.Poisson(jnp.exp(3.0 + x)))
            return x, None

        jax.lax.scan(step, 0.0, None, length=4)

    seen = jnp.array([True, False, True, True])
    post = ab.ensemble_kalman(num_particles=3000)(counts).posterior(
        KEY, given={"n": ab.masked(jnp.array([22, 0, 30, 26]), observed=seen)}
    )
    n, x = np.asarray(post.draws["n"][0]), np.asarray(post.draws["x"][0])
    assert (n[:, 2] == 30).all() and n.dtype.kind == "i"
    rate = np.exp(3 + x[:, 1])
    assert abs((n[:, 1] - rate).mean()) < SE * (rate.mean() / 3000) ** 0.5
    assert abs(np.mean((n[:, 1] - rate) ** 2 / rate) - 1) < 0.2  # Poisson given the moved state


def test_errors_name_the_site_and_a_remedy():
    run = lambda m, *a, **k: ALG(m).posterior(KEY, *a, **k)  # noqa: E731
    with pytest.raises(ab.DiscreteLatent, match=r"'z0'.*Categorical.*ab\.smc"):
        run(chain, 3, given={"token": jnp.array([1, 0, 1])})
    with pytest.raises(ab.InvalidModel, match="model has none"):
        run(walk, 8)

    def scanned(body, start=0.0):
        return ab.model(lambda: jax.lax.scan(body, start, None, length=2)[1])

    def factor(x, _):
        x = ab.sample("x", dist.Normal(x, 1.0))
        ab.factor("w", -(x**2))
        return x, None

    with pytest.raises(ab.InvalidModel, match="factor 'w'"):
        run(scanned(factor))

    def bounded(x, _):
        x = ab.sample("x", dist.Uniform(x, x + 1.0))
        ab.sample("y", dist.Normal(x, 1.0), obs=1.0)
        return x, None

    with pytest.raises(ab.InvalidModel, match="support of site 'x'"):
        run(scanned(bounded))

    def cauchy(x, _):
        x = ab.sample("x", dist.Normal(x, 1.0))
        ab.sample("y", dist.Cauchy(x, 1.0), obs=1.0)
        return x, None

    with pytest.raises(ab.Degenerate, match="step 0"):
        run(scanned(cauchy))

    def many(x, _):
        x = ab.sample("x", dist.Normal(x, 1.0))
        ab.sample("y", dist.Simulator(lambda k: jax.random.normal(k, (5,))), obs=jnp.zeros(5))
        return x, None

    with pytest.raises(ab.InvalidAlgorithm, match="num_particles above 5"):
        ab.ensemble_kalman(num_particles=5)(scanned(many)).posterior(KEY)
    local = ab.ensemble_kalman(localization={"z": np.arange(1)}, radius=1.0)
    with pytest.raises(ab.InvalidAlgorithm, match="names 'z'"):
        local(walk).posterior(KEY, 8, given={"y": Y})
    for bad in ({"inflation": 0.9}, {"lag": -1}, {"radius": 1.0}, {"num_particles": 1}):
        with pytest.raises(ab.InvalidAlgorithm, match=next(iter(bad))):
            ab.ensemble_kalman(**bad)


def test_a_second_call_compiles_nothing(count_compiles):
    key = jax.random.key(3)  # a key of a whole number is made by a compiled program
    ALG(walk).posterior(KEY, 8, given={"y": Y})
    with count_compiles() as compiles:
        ALG(walk).posterior(key, 8, given={"y": Y + 1})
    assert compiles.count == 0, compiles
