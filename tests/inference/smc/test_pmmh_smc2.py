"""Particle marginal MH and SMC^2 at their edges; `test_parameters` compares them with grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_space import DRIVE, NOISE, START, Y, kalman

import abduce as ab
import abduce.dist as dist

KEY = jax.random.key(12)
SHORT = Y[:4]


@ab.model
def half(n, reverse):
    """Decays below a half have evidence zero, from the second step on; data after the scan."""
    decay = ab.sample("decay", dist.Uniform(0.0, 1.0))

    def step(carry, _):
        x, t = carry
        x = ab.sample("x", dist.Normal(decay * x, DRIVE))
        ab.sample("y", dist.Normal(x, NOISE))
        ab.factor("gate", jnp.where((decay < 0.5) & (t > 0), -jnp.inf, 0.0))
        return (x, t + 1), None

    x0 = ab.sample("x0", dist.Normal(0.0, START))
    (x, _), _ = jax.lax.scan(step, (x0, 0), None, length=n, reverse=reverse)
    ab.sample("far", dist.Normal(x, 1000.0))


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_smc2_with_parameters_of_evidence_zero(reverse):
    points = 0.5 + (np.arange(400) + 0.5) / 800
    log_z = np.array([kalman(SHORT, decay=p)[0] for p in points])
    weights = np.exp(log_z - log_z.max())
    truth = np.log(weights.mean() / 2) + log_z.max() - 0.5 * np.log(2e6 * np.pi)
    mean = (weights * points).sum() / weights.sum()
    given = {"y": SHORT[::-1] if reverse else SHORT, "far": 0.0}
    alg = ab.smc2(via=ab.smc(num_particles=50), num_particles=300, progress_bar=False)
    post = alg(half).posterior(KEY, 4, reverse, given=given)
    assert (post["decay"] > 0.5).all() and len(post.diagnostics["times"]) >= 1
    assert abs(post.log_evidence - truth) < 0.3  # runs differ by about 0.05
    assert abs(post.mean("decay") - mean) < 5 * 0.15 / 100**0.5


@ab.model
def bounded(n):
    width = ab.sample("width", dist.Uniform(0.5, 1.0))

    def step(x, _):
        x = ab.sample("x", dist.Uniform(x - width, x + width))
        ab.sample("y", dist.Uniform(x - 1.0, x + 1.0))
        return x, None

    jax.lax.scan(step, 0.0, None, length=n)


IMPOSSIBLE = {"y": np.array([0.1, 50.0, 0.1])}


def test_smc2_names_the_step_where_nothing_is_left():
    alg = ab.smc2(via=ab.smc(num_particles=10), num_particles=10, progress_bar=False)
    with pytest.raises(ab.Degenerate, match="evidence zero at step 1 of the scan"):
        alg(bounded).posterior(KEY, 3, given=IMPOSSIBLE)


def test_pmmh_needs_a_start():
    alg = ab.pmmh(via=ab.smc(num_particles=10), num_chains=2, progress_bar=False)
    with pytest.raises(ab.InitializationError, match="no parameters with a finite evidence"):
        alg(bounded).posterior(KEY, 3, given=IMPOSSIBLE)


def test_particle_gibbs_needs_a_start():
    alg = ab.particle_gibbs(num_particles=10, num_chains=2, progress_bar=False)
    with pytest.raises(ab.InitializationError, match="no path with a finite density"):
        alg(bounded).posterior(KEY, 3, given=IMPOSSIBLE)


@pytest.mark.parametrize("alg", [ab.pmmh(), ab.smc2()])
def test_a_discrete_parameter_is_refused(alg):
    @ab.model
    def switching(n):
        fast = ab.sample("fast", dist.Bernoulli(0.5))

        def step(x, _):
            x = ab.sample("x", dist.Normal(jnp.where(fast, 0.5, 0.9) * x, DRIVE))
            ab.sample("y", dist.Normal(x, NOISE))
            return x, None

        jax.lax.scan(step, 0.0, None, length=n)

    with pytest.raises(ab.InvalidAlgorithm, match=r"'fast' is discrete.*ab.particle_gibbs"):
        alg(switching).posterior(KEY, 8, given={"y": Y})
