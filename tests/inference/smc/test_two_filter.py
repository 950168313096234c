"""Two-filter smoothing against the Kalman smoother.

Means over independent runs are compared to 4.5 of their standard errors (a false alarm in 1.5e5
each; keys are fixed) plus the bias of a finite number of particles, of the order of 1 / N.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_space import DECAY, DRIVE, NOISE, SE, START, Y, chain, kalman, walk

import abduce as ab
import abduce.dist as dist

KEY = jax.random.key(23)
LOG_Z, _, SMOOTHED = kalman()
ALG = ab.smc(num_particles=200, smoothing="two_filter")


def path_law():
    """Mean and covariance of (x0, x1, ..., x8) given the data."""
    m, v = SMOOTHED
    before = kalman()[1][1]  # filtering variances
    cov = np.diag(v)
    for s in range(len(m)):
        gain = 1.0
        for t in range(s, len(m) - 1):
            gain *= DECAY * before[t] / (DECAY**2 * before[t] + DRIVE**2)
            cov[s, t + 1] = cov[t + 1, s] = gain * v[t + 1]
    return m, cov


def moments(alg, model, names, runs=60, change=lambda x: x):
    def one(key):
        post = alg(model).posterior(key, 8, given={"y": Y})
        assert post.log_weights.shape == (1, alg.num_particles)
        x = [change(post.draws[a][0]).reshape(alg.num_particles, -1) for a in names]
        x = jnp.concatenate(x, 1)
        return jnp.mean(x, 0), jnp.cov(x.T), post.log_evidence, jnp.ptp(post.log_weights)

    out = jax.jit(jax.vmap(one))(jax.random.split(KEY, runs))
    return [np.asarray(v, float) for v in out]


def assert_close(values, truth, bias):
    error = values.std(0, ddof=1) / len(values) ** 0.5
    assert (error < 0.03).all(), error.max()
    assert (np.abs(values.mean(0) - truth) < SE * error + bias).all()


def test_paths_have_the_kalman_smoothers_means_and_covariances():
    means, covs, log_z, spread = moments(ALG, walk, ("x0", "x"))
    m, c = path_law()
    assert_close(means, m, 0.01)
    assert_close(covs, c, 0.02)
    assert (spread == 0).all()
    ratio = np.exp(log_z - LOG_Z)
    assert abs(ratio.mean() - 1) < SE * ratio.std() / len(ratio) ** 0.5


@ab.model
def levels(n):
    """The law of `walk` in logarithms; what is recorded is computed from the old carry too."""

    def step(carry, _):
        v = ab.sample("v", dist.LogNormal(DECAY * jnp.log(carry["v"]), DRIVE))
        ab.deterministic("growth", jnp.log(v) - jnp.log(carry["v"]))
        ab.sample("y", dist.Normal(jnp.log(v), NOISE))
        return {"v": v, "t": carry["t"] + 1}, v

    v0 = ab.sample("v0", dist.LogNormal(0.0, START))
    _, vs = jax.lax.scan(step, {"v": v0, "t": 0}, None, length=n, reverse=True)
    ab.deterministic("first", vs[0])


@pytest.mark.slow
def test_positive_states_in_a_scan_that_runs_backwards():
    def one(key):
        post = ALG(levels).posterior(key, 8, given={"y": Y[::-1]})
        x = jnp.log(jnp.concatenate([post.draws["v0"][0][:, None], post.draws["v"][0][:, ::-1]], 1))
        return jnp.mean(x, 0), jnp.cov(x.T)

    means, covs = jax.jit(jax.vmap(one))(jax.random.split(KEY, 40))
    m, c = path_law()
    assert_close(np.asarray(means, float), m, 0.01)
    assert_close(np.asarray(covs, float), c, 0.02)
    post = ALG(levels).posterior(KEY, 8, given={"y": Y[::-1]})
    v, v0 = np.asarray(post.draws["v"][0]), np.asarray(post.draws["v0"][0])
    before = np.concatenate([v[:, 1:], v0[:, None]], 1)  # the last step is the first
    np.testing.assert_allclose(post.draws["growth"][0], np.log(v / before), atol=1e-5)
    np.testing.assert_array_equal(post.draws["first"][0], v[:, 0])


def test_errors_name_the_site_and_a_remedy():
    with pytest.raises(ab.DiscreteLatent, match=r"'z'.*Categorical.*ffbs"):
        ALG(chain).posterior(KEY, 3, given={"token": jnp.array([1, 0, 1])})
    seen = jnp.arange(8) > 2
    with pytest.raises(ab.InvalidModel, match=r"'y'.*observed in part"):
        ALG(walk).posterior(KEY, 8, given={"y": ab.masked(Y, observed=seen)})

    @ab.model
    def noise():
        def step(x, _):
            x = x + ab.sample("e", dist.Normal(0.0, 1.0))
            ab.sample("y", dist.Normal(x, 1.0), obs=1.0)
            return x, None

        jax.lax.scan(step, 0.0, None, length=2)

    with pytest.raises(ab.InvalidModel, match=r"two_filter.*old carry"):
        ALG(noise).posterior(KEY)

    @ab.model
    def unknown():
        s = ab.sample("s", dist.HalfNormal(1.0))

        def step(x, _):
            x = ab.sample("x", dist.Normal(x, s))
            ab.sample("y", dist.Normal(x, 1.0), obs=1.0)
            return x, None

        jax.lax.scan(step, 0.0, None, length=2)

    with pytest.raises(ab.InvalidModel, match="static parameter"):
        ALG(unknown).posterior(KEY)
    with pytest.raises(ab.InvalidAlgorithm, match="store='tree'"):
        ALG.replace(store="tree")
