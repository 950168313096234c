"""The particle filter through a model's scan: evidence and moments against closed forms.

For any number of particles the evidence estimate is unbiased, and so is that of the evidence times
a posterior moment: means over independent runs are compared to 4.5 of their standard errors (a
false alarm in 1.5e5 each; keys are fixed).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_space import (
    DECAY,
    DRIVE,
    NOISE,
    SE,
    START,
    TOKENS,
    Y,
    assert_unbiased,
    chain,
    evidences,
    kalman,
    optimal,
    path_probabilities,
    predictive,
    walk,
)

import abduce as ab
import abduce.dist as dist

KEY = jax.random.key(5)
FILTER = ab.smc(num_particles=64)
LOG_Z, FILTERED, SMOOTHED = kalman()
GIVEN = {"y": Y}


def test_the_mean_of_500_estimates_is_the_kalman_value(x64):
    log_z = evidences(FILTER, walk, (8,), GIVEN, 500)
    assert log_z.dtype == np.float64
    ratio = np.exp(log_z - LOG_Z)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 500**0.5 < 0.1


VARIANTS = {
    "genealogy": {},
    "ffbs": {"smoothing": "ffbs", "num_particles": 32},
    "guided": {"proposal": optimal, "lookahead": predictive, "threshold": 1.0},
    "lookahead": {"lookahead": predictive},
}


@pytest.mark.parametrize(
    "name", ["genealogy", "ffbs", "guided", pytest.param("lookahead", marks=pytest.mark.slow)]
)
def test_evidence_times_smoothing_moments_is_unbiased(name):
    """E[Zhat phi_hat] = Z E[phi | y], for means and second moments of x0 and each x."""
    alg = FILTER.replace(**VARIANTS[name])

    def one(key):
        post = alg(walk).posterior(key, 8, given=GIVEN)
        squares = [post.expect(lambda d, a=a: d[a] ** 2) for a in ("x0", "x")]
        first = jnp.append(post.mean("x0"), post.mean("x"))
        return post.log_evidence, jnp.stack([first, jnp.append(*squares)])

    log_z, moments = jax.jit(jax.vmap(one))(jax.random.split(KEY, 600))
    assert_unbiased(log_z, LOG_Z)
    assert name != "guided" or np.std(log_z) < 0.25  # against 0.4 of the bootstrap filter
    truth = np.stack([SMOOTHED[0], SMOOTHED[1] + SMOOTHED[0] ** 2])
    errors = np.exp(np.asarray(log_z) - LOG_Z)[:, None, None] * (np.asarray(moments) - truth)
    assert (np.abs(errors.mean(0)) < SE * errors.std(0) / 600**0.5).all()


@pytest.mark.parametrize(
    "scheme",
    [
        "multinomial", "killing", "optimal_transport",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("stratified", "residual", "ssp")),
    ],
)  # fmt: skip
def test_every_resampler_is_unbiased(scheme):
    alg = ab.smc(num_particles=16, resampler=scheme, threshold=0.8)
    log_z = evidences(alg, walk, (3,), {"y": Y[:3]}, 1000)
    assert_unbiased(log_z, kalman(Y[:3])[0])


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_thresholds_are_unbiased_and_kept_to(threshold):
    alg = ab.smc(num_particles=32, threshold=threshold)

    def one(key):
        post = alg(walk).posterior(key, 3, given={"y": Y[:3]})
        return post.log_evidence, post.diagnostics["resampled"], post.diagnostics["ess"]

    log_z, resampled, ess = jax.jit(jax.vmap(one))(jax.random.split(KEY, 1000))
    assert_unbiased(log_z, kalman(Y[:3])[0])
    assert (np.asarray(resampled) == (threshold == 1)).all()
    assert ((np.asarray(ess) >= 1) & (np.asarray(ess) <= 32)).all()


def test_filtering_moments_without_a_past():
    post = ab.smc(num_particles=50_000, store="filter")(walk).posterior(KEY, 8, given=GIVEN)
    assert list(post) == ["x0"]
    mean, sd = (np.asarray(post.diagnostics[f"filtered_{k}/x"]) for k in ("mean", "sd"))
    error = SE * np.sqrt(FILTERED[1][1:]) / math.sqrt(5_000)  # a tenth of the particles
    assert (np.abs(mean - FILTERED[0][1:]) < error).all()
    assert (np.abs(sd - np.sqrt(FILTERED[1][1:])) < error).all()
    assert abs(post.log_evidence - LOG_Z) < 0.05


def test_increments_add_up_to_the_evidence():
    post = FILTER(walk).posterior(KEY, 8, given=GIVEN)
    assert post.diagnostics["log_evidence_increments"].sum() == pytest.approx(
        post.log_evidence, abs=1e-4
    )


@pytest.mark.slow
def test_masked_steps_do_not_weigh():
    """Given by `ab.masked` along time, or as `obs=` in the step: the same numbers."""
    seen = np.array([1, 1, 0, 1, 0, 0, 1, 1], bool)
    y = np.where(seen, Y, np.nan)

    @ab.model
    def written(y, seen):
        def step(x, row):
            x = ab.sample("x", dist.Normal(DECAY * x, DRIVE))
            ab.sample("y", dist.Normal(x, NOISE), obs=ab.masked(*row))
            return x, None

        jax.lax.scan(step, ab.sample("x0", dist.Normal(0.0, START)), (y, seen))

    given = evidences(ab.smc(num_particles=32), walk, (8,), {"y": ab.masked(y, seen)}, 600)
    assert_unbiased(given, kalman(observed=seen)[0])
    one = FILTER(walk).posterior(KEY, 8, given={"y": ab.masked(y, seen)})
    other = FILTER(written).posterior(KEY, y, seen)
    assert one.log_evidence == pytest.approx(other.log_evidence, abs=1e-5)
    hidden = one["y"][0][:, ~seen]
    assert np.isfinite(hidden).all() and (hidden.std(0) > 0).all()


def test_a_proposal_is_told_what_is_masked():
    seen = np.array([1, 0, 1], bool)

    @ab.model
    def careful(given, carry, x):
        y = given["y"]
        precision = 1 / DRIVE**2 + jnp.where(y.observed, 1 / NOISE**2, 0.0)
        pull = jnp.where(y.observed, y.values, 0.0) / NOISE**2
        mean = (DECAY * carry / DRIVE**2 + pull) / precision
        ab.sample("x", dist.Normal(mean, precision**-0.5))

    alg = FILTER.replace(proposal=careful)
    log_z = evidences(alg, walk, (3,), {"y": ab.masked(Y[:3], seen)}, 400)
    assert_unbiased(log_z, kalman(Y[:3], seen)[0], 0.02)


def test_discrete_states():
    log_z = evidences(ab.smc(num_particles=16), chain, (3,), {"token": TOKENS}, 1000)
    assert_unbiased(log_z, math.log(path_probabilities()[1]))


def test_an_initial_proposal():
    """The exact law of x0 given all data."""

    @ab.model
    def start(given, n):
        ab.sample("x0", dist.Normal(SMOOTHED[0][0], SMOOTHED[1][0] ** 0.5))

    log_z = evidences(FILTER.replace(initial=start), walk, (8,), GIVEN, 400)
    assert_unbiased(log_z, LOG_Z)
