"""Conditional SMC leaves the law of paths as it is, whatever the variant and the model around it.

Paths are drawn from their exact law, each goes through one iteration, and the frequencies of what
comes out are compared to the law: 4.5 standard errors of independent draws (at most 64 comparisons
of a false alarm in 1.5e5; keys are fixed).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_space import EMITS, MOVES, PRIOR, SE, TOKENS, Y, chain, path_probabilities

import abduce as ab
import abduce.dist as dist
from abduce.inference.problem import make_problem
from abduce.inference.smc.particle_gibbs import _Sampler
from abduce.inference.smc.population import Resampling

PATHS, _ = path_probabilities()
RUNS = 10_000


def first():
    return ab.sample("z0", dist.Categorical(probs=jnp.array(PRIOR)))


def step(z, _):
    z = ab.sample("z", dist.Categorical(probs=jnp.array(MOVES)[z]))
    ab.sample("token", dist.Categorical(probs=jnp.array(EMITS)[z]))
    return z, z


def conditional(problem, num_particles, resampler, threshold, ancestor_sampling, backward_sampling):
    """One iteration without parameters: `(key, path) -> path`."""
    sampler = _Sampler(
        num_particles=num_particles, parameters=(), states=tuple(problem.latents), num_moves=1,
        resampling=Resampling(resampler, threshold), ancestor_sampling=ancestor_sampling,
        backward_sampling=backward_sampling,
    )  # fmt: skip
    data = {
        "arguments": problem.arguments, "given": problem.given, "proposal": None, "initial": None,
    }  # fmt: skip
    return lambda key, path: sampler.filter(data, key, path, {})[0]


def assert_invariant(
    m, given, law, pack, unpack, *, num_particles=3, resampler="multinomial", threshold=1.0,
    ancestor_sampling=False, backward_sampling=False,
):  # fmt: skip
    """One iteration of particle Gibbs from the exact law; returns how many paths changed."""
    iterate = conditional(
        make_problem(m, (3,), given, {}, "particle_gibbs"), num_particles, resampler, threshold,
        ancestor_sampling, backward_sampling,
    )  # fmt: skip
    k1, k2 = jax.random.split(jax.random.key(0))
    before = jax.random.choice(k1, law.size, (RUNS,), p=jnp.asarray(law.ravel()))
    bits = (before[:, None] >> jnp.arange(law.ndim)[::-1]) & 1
    out = unpack(jax.jit(jax.vmap(iterate))(jax.random.split(k2, RUNS), pack(bits)))
    after = np.asarray((out * 2 ** jnp.arange(law.ndim)[::-1]).sum(1))
    p = law.ravel()
    frequency = np.bincount(after, minlength=law.size) / RUNS
    z = (frequency - p) / np.sqrt(p * (1 - p) / RUNS)
    assert np.abs(z).max() < SE, z.round(1)
    return (after != before).mean()


def pack(bits):
    return {"z0": bits[:, 0], "z": bits[:, 1:]}


def unpack(out):
    return jnp.concatenate([out["z0"][:, None], out["z"]], 1)


CHAIN = ({"token": TOKENS}, PATHS, pack, unpack)
VARIANTS = {
    "ancestor, adaptive": {"ancestor_sampling": True, "threshold": 0.6},
    "backward, adaptive": {"backward_sampling": True, "threshold": 0.6},
    "killing, adaptive": {"resampler": "killing", "threshold": 0.8},
}
SLOW = {
    "ancestor": {"ancestor_sampling": True},
    "two particles": {"num_particles": 2, "threshold": 0.6},
    "systematic": {"resampler": "systematic"},
    "backward": {"backward_sampling": True},
    "both, adaptive": {"ancestor_sampling": True, "backward_sampling": True, "threshold": 0.6},
    "multinomial": {},
    "stratified": {"resampler": "stratified"},
    "residual": {"resampler": "residual"},
    "ssp": {"resampler": "ssp"},
    "killing": {"resampler": "killing"},
}


@pytest.mark.parametrize(
    "name", [*VARIANTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_chain(name):
    assert assert_invariant(chain, *CHAIN, **(VARIANTS | SLOW)[name]) > 0.2


@pytest.mark.slow
def test_ancestor_sampling_renews_more_than_tracing():
    traced = assert_invariant(chain, *CHAIN, num_particles=2)
    renewed = assert_invariant(chain, *CHAIN, num_particles=2, ancestor_sampling=True)
    assert renewed > 1.2 * traced


@pytest.mark.slow
def test_optimal_transport_keeps_a_path_too():
    """It needs places: the state as a float."""

    @ab.model
    def placed(n):
        def body(x, _):
            z, _ = step(x.astype(int), None)
            return 1.0 * z, None

        jax.lax.scan(body, 1.0 * first(), None, length=n)

    assert assert_invariant(placed, *CHAIN, resampler="optimal_transport") > 0.2


# ---------------------------------------------------------------------- other programs


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("settings", [{"ancestor_sampling": True}, slow({"threshold": 0.7})])
def test_data_after_the_scan(settings):
    @ab.model
    def ended(n):
        z, _ = jax.lax.scan(step, first(), None, length=n)
        ab.sample("end", dist.Bernoulli(jnp.array([0.9, 0.1])[z]))

    law = PATHS * np.array([0.9, 0.1])
    given = {"token": TOKENS, "end": 1}
    assert_invariant(ended, given, law / law.sum(), pack, unpack, **settings)


@pytest.mark.parametrize(
    "settings", [slow({"ancestor_sampling": True}), {"resampler": "systematic"}]
)
def test_two_scans_in_sequence(settings):
    @ab.model
    def sequence(n):
        z, _ = jax.lax.scan(step, first(), None, length=1)
        with ab.scope("b"):
            jax.lax.scan(step, z, None, length=n - 1)

    assert_invariant(
        sequence, {"token": TOKENS[:1], "b/token": TOKENS[1:]}, PATHS,
        lambda bits: {"z0": bits[:, 0], "z": bits[:, 1:2], "b/z": bits[:, 2:]},
        lambda out: jnp.concatenate([out["z0"][:, None], out["z"], out["b/z"]], 1), **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings", [slow({"ancestor_sampling": True}), {"backward_sampling": True, "threshold": 0.7}]
)
@pytest.mark.slow
def test_a_scan_that_runs_backwards(settings):
    @ab.model
    def reverse(n):
        jax.lax.scan(step, first(), None, length=n, reverse=True)

    assert_invariant(
        reverse, {"token": TOKENS[::-1]}, PATHS,
        lambda bits: {"z0": bits[:, 0], "z": bits[:, :0:-1]},
        lambda out: jnp.concatenate([out["z0"][:, None], out["z"][:, ::-1]], 1), **settings,
    )  # fmt: skip


LEVELS, READINGS = np.array([0.2, 0.7]), np.array([0.3, 0.9])
SEEN = np.array([[1, 1], [0, 1]])


@ab.model
def nested(_):
    """Two steps of the chain; in each, two indicators that are read with errors."""

    def outer(z, _):
        z, _ = step(z, None)

        def inner(c, _):
            w = ab.sample("w", dist.Bernoulli(jnp.array(LEVELS)[z]))
            ab.sample("v", dist.Bernoulli(jnp.array(READINGS)[w]))
            return c, None

        jax.lax.scan(inner, 0.0, None, length=2)
        return z, None

    jax.lax.scan(outer, first(), None, length=2)


@pytest.mark.parametrize(
    "settings", [{"ancestor_sampling": True}, slow({"resampler": "systematic"})]
)
@pytest.mark.slow
def test_a_scan_inside_the_steps(settings):
    law = np.zeros((2,) * 7)
    for bits in np.ndindex(law.shape):
        z, w = bits[:3], np.reshape(bits[3:], (2, 2))
        p = PRIOR[z[0]]
        for t in range(2):
            p *= MOVES[z[t], z[t + 1]] * EMITS[z[t + 1], TOKENS[t]]
            level, reading = LEVELS[z[t + 1]], READINGS[w[t]]
            p *= np.where(w[t], level, 1 - level).prod()
            p *= np.where(SEEN[t], reading, 1 - reading).prod()
        law[bits] = p
    assert_invariant(
        nested, {"token": TOKENS[:2], "v": SEEN}, law / law.sum(),
        lambda b: {"z0": b[:, 0], "z": b[:, 1:3], "w": b[:, 3:].reshape(-1, 2, 2)},
        lambda o: jnp.concatenate([o["z0"][:, None], o["z"], o["w"].reshape(-1, 4)], 1), **settings,
    )  # fmt: skip


# ---------------------------------------------------------------------- refusals


def trace(m, given, *, ancestor_sampling=True, backward_sampling=False):
    """Stages one iteration; nothing is compiled."""
    problem = make_problem(m, (8,), given, {}, "particle_gibbs")
    iterate = conditional(problem, 4, "multinomial", 1.0, ancestor_sampling, backward_sampling)
    path = {a: jnp.zeros(s.shape, s.dtype) for a, s in problem.latents.items()}
    return jax.eval_shape(iterate, jax.random.key(0), path)


def gaussian(x, _):
    x = ab.sample("x", dist.Normal(0.9 * x, 1.0))
    ab.sample("y", dist.Normal(x, 1.0))
    return x, x


def test_a_past_that_later_sites_depend_on_is_not_renewed():
    @ab.model
    def total(n):
        _, xs = jax.lax.scan(gaussian, 0.0, None, length=n)
        ab.sample("total", dist.Normal(xs.sum(), 1.0))

    given = {"y": Y, "total": 1.0}
    with pytest.raises(ab.InvalidModel, match=r"a site after the scan .*ancestor_sampling=False"):
        trace(total, given)
    with pytest.raises(ab.InvalidModel, match=r"backward_sampling=True.* data after it"):
        trace(total, given, ancestor_sampling=False, backward_sampling=True)


def test_a_total_that_is_only_recorded_does_no_harm():
    @ab.model
    def recorded(n):
        _, xs = jax.lax.scan(gaussian, 0.0, None, length=n)
        ab.deterministic("total", xs.sum())

    assert trace(recorded, {"y": Y})["total"].shape == ()


def test_a_state_before_the_scan_that_every_step_uses():
    @ab.model
    def levelled(n):
        level = ab.sample("level", dist.Normal(0.0, 1.0))

        def body(x, _):
            x = ab.sample("x", dist.Normal(x, 1.0))
            ab.sample("y", dist.Normal(x + level, 1.0))
            return x, None

        jax.lax.scan(body, 0.0, None, length=n)

    with pytest.raises(ab.InvalidModel, match=r"Leave it out of states="):
        trace(levelled, {"y": Y})


def test_paths_through_inner_scans_are_not_drawn_backwards():
    with pytest.raises(ab.InvalidModel, match="another one with sites inside"):
        trace(
            nested, {"token": TOKENS[:2], "v": SEEN}, ancestor_sampling=False,
            backward_sampling=True,
        )  # fmt: skip


# ---------------------------------------------------------------------- hidden data and parameters


@pytest.mark.slow
def test_a_discrete_parameter_and_masked_data():
    """What is hidden has no say in the parameter's move."""

    @ab.model
    def sticky(n):
        lazy = ab.sample("lazy", dist.Bernoulli(0.5))
        moves = jnp.where(lazy, 0.5 * jnp.array(MOVES) + 0.5 * jnp.eye(2), jnp.array(MOVES))

        def body(z, _):
            z = ab.sample("z", dist.Categorical(probs=moves[z]))
            ab.sample("token", dist.Categorical(probs=jnp.array(EMITS)[z]))
            return z, None

        jax.lax.scan(body, first(), None, length=n)

    seen = np.array([1, 0, 1], bool)
    z = [
        sum(
            path_probabilities(np.where(seen, TOKENS, v), moves=moves)[1] for v in (0, 1)
        )
        for moves in (MOVES, 0.5 * MOVES + 0.5 * np.eye(2))
    ]  # fmt: skip
    alg = ab.particle_gibbs(
        num_particles=4, num_warmup=20, num_samples=400, num_chains=40, progress_bar=False
    )
    given = {"token": ab.masked(TOKENS, seen)}
    post = alg(sticky).posterior(jax.random.key(0), 3, given=given)
    rates = np.asarray(post["lazy"], float).mean(1)
    error = rates.std(ddof=1) / 40**0.5
    assert error < 0.02 and abs(rates.mean() - z[1] / sum(z)) < SE * error
