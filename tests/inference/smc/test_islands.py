"""Filters side by side: one population, weighted by the islands' evidences.

Unbiasedness for any number of particles at 4.5 standard errors, as for one filter.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_space import (
    SE,
    TOKENS,
    Y,
    assert_unbiased,
    chain,
    evidences,
    kalman,
    path_probabilities,
    walk,
)

import abduce as ab
import abduce.dist as dist

KEY = jax.random.key(17)
ISLANDS = ab.smc(num_particles=32, islands=4)


def test_the_evidence_is_unbiased():
    log_z = evidences(ISLANDS, walk, (8,), {"y": Y}, 1500)
    assert_unbiased(log_z, kalman()[0])


def test_paths_of_a_chain_have_their_law():
    paths, z = path_probabilities()
    alg = ab.smc(num_particles=12, islands=3, threshold=1.0)

    def one(key):
        post = alg(chain).posterior(key, 3, given={"token": TOKENS})
        bits = jnp.concatenate([post.draws["z0"][0][:, None], post.draws["z"][0]], 1)
        f = jnp.zeros(16).at[(bits * 2 ** jnp.arange(3, -1, -1)).sum(1)].add(post._weights)
        return f * jnp.exp(post.log_evidence)

    errors = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, 2000))) / z - paths.ravel()
    assert (np.abs(errors.mean(0)) < SE * errors.std(0) / 2000**0.5).all()


def test_islands_do_not_exchange_particles():
    """The paths of an island are its own; its share of the weight is that of its evidence."""
    post = ISLANDS(walk).posterior(KEY, 8, given={"y": Y})
    d = post.diagnostics
    assert d["ess"].shape == d["resampled"].shape == (4, 8)
    weights = np.asarray(post._weights).reshape(4, 8)
    share = np.exp(d["log_evidences"] - np.max(d["log_evidences"]))
    np.testing.assert_allclose(weights.sum(1), share / share.sum(), rtol=1e-4)
    assert d["island_ess"] == pytest.approx(1 / np.sum((share / share.sum()) ** 2), rel=1e-4)
    assert post.log_evidence == pytest.approx(
        np.log(np.mean(np.exp(d["log_evidences"].astype(float)))), abs=1e-4
    )
    islands = np.asarray(post.draws["x0"][0]).reshape(4, 8)
    assert not any(np.intersect1d(islands[i], islands[j]).size for i in range(4) for j in range(i))


@pytest.mark.slow
def test_moments_and_smoothed_sums_are_of_all_islands():
    sums = {"last": lambda given, x, _, new: new}
    alg = ISLANDS.replace(smoothing="paris", functionals=sums, num_particles=4000)
    post = alg.replace(store="filter")(walk).posterior(KEY, 8, given={"y": Y})
    _, (fm, fv), (m, _) = kalman()
    np.testing.assert_allclose(post.diagnostics["filtered_mean/x"], fm[1:], atol=0.1)
    np.testing.assert_allclose(post.diagnostics["filtered_sd/x"], np.sqrt(fv[1:]), atol=0.07)
    assert post.diagnostics["paris/last"] == pytest.approx(m[1:].sum(), abs=0.3)

    # Of a filter's last step, moments are those of the weighted particles.
    paths = alg.replace(num_particles=32)
    whole = paths(walk).posterior(KEY, 8, given={"y": Y})
    kept = paths.replace(store="filter")(walk).posterior(KEY, 8, given={"y": Y})
    w, x = np.asarray(whole._weights, float), np.asarray(whole.draws["x"][0, :, -1], float)
    mean = w @ x
    assert kept.diagnostics["filtered_mean/x"][-1] == pytest.approx(mean, rel=1e-4)
    sd = np.sqrt(w @ (x - mean) ** 2)
    assert kept.diagnostics["filtered_sd/x"][-1] == pytest.approx(sd, rel=1e-4)


def test_a_run_goes_on():
    """In two parts with the data, the evidence is unbiased as well."""

    def one(key):
        k1, k2 = jax.random.split(key)
        post = ISLANDS(walk).posterior(k1, 4, given={"y": Y[:4]})
        return post.update(k2, 4, given={"y": Y[4:]}).log_evidence

    log_z = jax.jit(jax.vmap(one))(jax.random.split(KEY, 1500))
    assert_unbiased(log_z, kalman()[0])


def test_one_island_dies():
    @ab.model
    def gate(n):
        def step(x, _):
            x = ab.sample("x", dist.Normal(x, 1.0))
            ab.factor("gate", jnp.where(x > 0, 0.0, -jnp.inf))
            return x, None

        jax.lax.scan(step, 0.0, None, length=n)

    alg = ab.smc(num_particles=16, islands=8)
    log_z = evidences(alg, gate, (3,), {}, 2000)  # -inf where all islands died
    assert not np.isnan(log_z).any()
    # P(x1, x2, x3 > 0) of a Gaussian walk: 5/16, the arcsine law's orthant.
    assert_unbiased(log_z, np.log(5 / 16))
    dead = ab.smc(num_particles=2, islands=2)
    for seed in range(50):
        try:
            dead(gate).posterior(jax.random.key(seed), 3)
        except ab.Degenerate as error:
            assert "weight zero at step" in str(error)
            break
    else:
        raise AssertionError("no run lost all its particles")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_particles": 10, "islands": 4}, "10 particles do not divide evenly over islands=4"),
        ({"islands": 0}, "islands must be an int >= 1"),
    ],
)
def test_settings_that_do_not_fit(settings, match):
    with pytest.raises(ab.InvalidAlgorithm, match=match):
        ab.smc(**settings)


def test_islands_inside_something_else():
    @ab.model
    def unknown(n):
        decay = ab.sample("decay", dist.Beta(8.0, 2.0))

        def step(x, _):
            x = ab.sample("x", dist.Normal(decay * x, 1.0))
            ab.sample("y", dist.Normal(x, 1.0))
            return x, None

        jax.lax.scan(step, 0.0, None, length=n)

    with pytest.raises(ab.InvalidAlgorithm, match=r"islands=4 inside ab\.pmmh"):
        ab.pmmh(via=ISLANDS)(unknown).posterior(KEY, 8, given={"y": Y})

    @ab.model
    def static():
        ab.sample("y", dist.Normal(ab.sample("m", dist.Normal(0, 1)), 1), obs=1.0)

    with pytest.raises(ab.InvalidAlgorithm, match="islands=4 inside tempering"):
        ISLANDS(static).posterior(KEY)
