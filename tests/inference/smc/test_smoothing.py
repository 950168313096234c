"""Backward simulation: exact path probabilities, and refusals where it would be wrong.

Path frequencies are weighted by the evidence estimate, which makes them unbiased for any number of
particles, and compared to 4.5 standard errors over independent runs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_space import SE, TOKENS, Y, chain, kalman, path_index, path_probabilities, walk

import abduce as ab
import abduce.dist as dist

KEY = jax.random.key(8)
FFBS = ab.smc(num_particles=8, smoothing="ffbs")
PATHS, Z = path_probabilities()


def assert_path_law(alg, given=None, paths=PATHS, evidence=Z, runs=1500):
    """E[Zhat f_hat(path)] = Z p(path | data), for every path."""

    def one(key):
        post = alg(chain).posterior(key, 3, given=given or {"token": TOKENS})
        z0, z, weights = post.draws["z0"][0], post.draws["z"][0], post._weights
        bits = jnp.concatenate([z0[:, None], z], 1) * 2 ** jnp.arange(3, -1, -1)
        return jnp.zeros(16).at[bits.sum(1)].add(weights), post.log_evidence

    f, log_z = jax.jit(jax.vmap(one))(jax.random.split(KEY, runs))
    errors = np.asarray(f) * np.exp(np.asarray(log_z))[:, None] / evidence - paths.ravel()
    assert (np.abs(errors.mean(0)) < SE * errors.std(0) / runs**0.5).all()


def hint(given, carry, x):
    """Far from what it should be: taken back exactly, or the law is another."""
    return jnp.array([[0.5, -0.5], [-1.5, 1.0]])[carry, given["token"]]


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 0.5},
        pytest.param({"threshold": 1.0}, marks=pytest.mark.slow),
        {"smoothing": "genealogy"},
        {"lookahead": hint},
    ],
    ids=["adaptive", "every step", "genealogy", "look-ahead"],
)
def test_paths_of_a_chain_have_their_law(settings):
    """The initial state, which is drawn before the scan, included."""
    assert_path_law(FFBS.replace(**settings))


@pytest.mark.slow
def test_a_masked_step():
    seen = np.array([1, 0, 1], bool)
    emits = np.array([[0.8, 0.2], [0.35, 0.65]])
    joint = np.zeros((2,) * 4)
    for path in np.ndindex(joint.shape):
        p = [0.6, 0.4][path[0]]
        for t in range(3):
            p *= np.array([[0.7, 0.3], [0.2, 0.8]])[path[t], path[t + 1]]
            p *= emits[path[t + 1], TOKENS[t]] if seen[t] else 1.0
        joint[path] = p
    given = {"token": ab.masked(TOKENS, seen)}
    assert_path_law(FFBS, given=given, paths=joint / joint.sum(), evidence=joint.sum())


def test_it_matches_the_kalman_smoother_where_the_genealogy_has_died_out():
    n, big = 120, FFBS.replace(num_particles=600)
    y = np.tile(Y, 15)
    truth = kalman(y)[2]
    traced = big.replace(smoothing="genealogy")(walk).posterior(KEY, n, given={"y": y})
    assert len(np.unique(traced.draws["x0"])) < 60
    post = big(walk).posterior(KEY, n, given={"y": y})
    assert len(np.unique(post.draws["x0"])) > 200
    mean = np.append(post.mean("x0"), post.mean("x"))
    sd = np.append(post.std("x0"), post.std("x"))
    # 150 of 600 draws' worth: the filter's own noise comes on top; Bonferroni over the steps.
    assert (np.abs(mean - truth[0]) < 6 * np.sqrt(truth[1] / 150)).all()
    assert (np.abs(sd / np.sqrt(truth[1]) - 1) < 6 / np.sqrt(2 * 150)).all()


@pytest.mark.slow
def test_deterministics_follow_the_paths():
    @ab.model
    def recorded(n):
        x, xs = walk(n)
        ab.deterministic("last", x)
        ab.deterministic("total", xs.sum())

    post = FFBS.replace(num_particles=64)(recorded).posterior(KEY, 8, given={"y": Y})
    np.testing.assert_array_equal(post["last"], post["x"][..., -1])
    np.testing.assert_allclose(post["total"], post["x"].sum(-1), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- refusals


@ab.model
def non_centred(n):
    def step(x, _):
        x = 0.9 * x + ab.sample("e", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Normal(x, 1.0))
        return x, None

    jax.lax.scan(step, 0.0, None, length=n)


@ab.model
def two_lags(n):
    def step(carry, _):
        x = ab.sample("x", dist.Normal(0.5 * carry[0] + 0.3 * carry[1], 1.0))
        ab.sample("y", dist.Normal(x, 1.0))
        return (x, carry[0]), None

    jax.lax.scan(step, (0.0, 0.0), None, length=n)


@pytest.mark.parametrize(("m", "slot"), [(non_centred, 0), (two_lags, 1)])
def test_a_carry_that_its_step_does_not_determine(m, slot):
    with pytest.raises(ab.InvalidModel, match=f"slot {slot} .*smoothing='genealogy'"):
        FFBS(m).posterior(KEY, 8, given={"y": Y})


def test_a_static_latent():
    @ab.model
    def unknown_decay(n):
        decay = ab.sample("decay", dist.Beta(8.0, 2.0))

        def step(x, _):
            x = ab.sample("x", dist.Normal(decay * x, 1.0))
            ab.sample("y", dist.Normal(x, 1.0))
            return x, None

        jax.lax.scan(step, 0.0, None, length=n)

    with pytest.raises(ab.InvalidModel, match=r"static parameter.*given=.*ab.particle_gibbs"):
        FFBS(unknown_decay).posterior(KEY, 8, given={"y": Y})
    post = FFBS(unknown_decay).posterior(KEY, 8, given={"y": Y, "decay": 0.8})
    assert np.isfinite(post.log_evidence)


def test_path_indices_are_binary_numbers():
    assert path_index(np.array([1]), np.array([[0, 1, 1]])).tolist() == [11]
