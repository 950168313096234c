"""What a model around a particle filter may look like: nothing is rewritten for it.

Where a model is the same program written otherwise, site keys make its runs the same to the digit;
elsewhere means of evidence estimates are compared to 4.5 standard errors.
"""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_space import (
    DECAY,
    DRIVE,
    EMITS,
    MOVES,
    NOISE,
    PRIOR,
    START,
    TOKENS,
    Y,
    assert_unbiased,
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
SHORT = Y[:4]
GIVEN = {"y": SHORT}
LOG_Z = kalman(SHORT)[0]


def start():
    return ab.sample("x0", dist.Normal(0.0, START))


def step(x, _):
    x = ab.sample("x", dist.Normal(DECAY * x, DRIVE))
    ab.sample("y", dist.Normal(x, NOISE))
    return x, x


def run(m, *args, given=GIVEN, **settings):
    return FILTER.replace(**settings)(m).posterior(KEY, *args, given=given)


@pytest.fixture(scope="module")
def plain():
    """The log evidence of the model as it is usually written, without and with a proposal."""
    return {p: run(walk, 4, proposal=p).log_evidence for p in (None, optimal)}


# ---------------------------------------------------------------------- the same to the digit


@ab.model
def in_jit(n):
    return jax.jit(lambda x: jax.lax.scan(step, x, None, length=n))(start())


@ab.model
def in_checkpoint(n):
    return jax.lax.scan(jax.checkpoint(step), start(), None, length=n)


@ab.model
def unrolled(n):
    return jax.lax.scan(step, start(), None, length=n, unroll=3)


@pytest.mark.parametrize(
    "m", [in_jit, in_checkpoint, unrolled], ids=["jit", "checkpoint", "unrolled"]
)
def test_what_surrounds_a_scan_does_not_matter(m, plain):
    assert run(m, 4).log_evidence == pytest.approx(plain[None], abs=1e-5)


def test_given_obs_and_condition_are_the_same(plain):
    @ab.model
    def observed(y):
        def step(x, y):
            x = ab.sample("x", dist.Normal(DECAY * x, DRIVE))
            ab.sample("y", dist.Normal(x, NOISE), obs=y)
            return x, None

        jax.lax.scan(step, start(), y)

    assert run(observed, SHORT, given={}).log_evidence == pytest.approx(plain[None], abs=1e-5)
    held = run(ab.condition(walk, GIVEN), 4, given={})
    assert held.log_evidence == pytest.approx(plain[None], abs=1e-5)


def test_factors_and_deterministics():
    @ab.model
    def factored(y):
        def step(x, y):
            x = ab.sample("x", dist.Normal(DECAY * x, DRIVE))
            ab.factor("y", dist.Normal(x, NOISE).log_prob(y))
            ab.deterministic("square", x**2)
            return x, x

        last, xs = jax.lax.scan(step, start(), y)
        ab.deterministic("total", xs.sum())
        ab.deterministic("last", last)

    post = run(factored, SHORT, given={})
    x = post["x"]
    np.testing.assert_allclose(post["square"], x**2)
    np.testing.assert_allclose(post["total"], x.sum(-1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(post["last"], x[..., -1])
    assert len(np.unique(np.asarray(x[0, :, 0]))) < 64  # paths, not the particles of each step


Carry = collections.namedtuple("Carry", "state clock")


def guide(get):
    @ab.model
    def propose(given, carry, x):
        precision = 1 / DRIVE**2 + 1 / NOISE**2
        mean = (DECAY * get(carry, x) / DRIVE**2 + given["y"] / NOISE**2) / precision
        ab.sample("x", dist.Normal(mean, precision**-0.5))

    return propose


@ab.model
def with_dict(n):
    def body(c, _):
        x, _ = step(c["x"], None)
        return {"x": x, "before": c["x"], "clock": c["clock"] + 1}, x

    return jax.lax.scan(body, {"x": start(), "before": jnp.zeros(()), "clock": 0}, None, length=n)


@ab.model
def with_namedtuple(n):
    def body(c, inputs):
        index, row = inputs
        x, _ = step(c.state["x"], None)
        return Carry({"x": x}, (c.clock[0] + row.sum(), c.state["x"])), index

    first = Carry({"x": start()}, (0.0, jnp.zeros(())))
    return jax.lax.scan(body, first, (jnp.arange(n), jnp.ones((n, 2))))


@ab.model
def with_tuple(n):
    def body(c, t):
        x, _ = step(c[1], None)
        return (t, x), None

    return jax.lax.scan(body, (0, start()), jnp.arange(n))


@pytest.mark.parametrize(
    ("m", "get"),
    [
        (with_dict, lambda c, x: c["x"] + 0 * c["clock"]),
        (with_namedtuple, lambda c, x: c.state["x"] + 0 * c.clock[0] + 0 * x[0] + 0 * x[1][1]),
        (with_tuple, lambda c, x: c[1] + 0 * x),
    ],
    ids=["dict", "namedtuple", "tuple"],
)
def test_a_proposal_sees_the_carry_as_the_step_does(m, get, plain):
    found = run(m, 4, proposal=guide(get))
    assert found.log_evidence == pytest.approx(plain[optimal], abs=1e-5)


# ---------------------------------------------------------------------- other programs


@ab.model
def nested(n):
    def outer(x, _):
        return jax.lax.scan(step, x, None, length=2)

    return jax.lax.scan(outer, start(), None, length=n // 2)


@ab.model
def in_sequence(n):
    x, _ = jax.lax.scan(step, start(), None, length=1)
    with ab.scope("later"):
        return jax.lax.scan(step, x, None, length=n - 1)


@ab.model
def backwards(n):
    return jax.lax.scan(step, start(), None, length=n, reverse=True)


@ab.model
def in_cond(n, flag):
    return jax.lax.cond(
        flag,
        lambda x: jax.lax.scan(step, x, None, length=n),
        lambda x: jax.lax.scan(step, x + 100, None, length=n),
        start(),
    )


@ab.model
def series(n):
    return jax.vmap(lambda _: walk(n), axis_name="series")(jnp.arange(2))


@ab.model
def vmapped_sites(n):
    def body(x, _):
        x = jax.vmap(lambda x: ab.sample("x", dist.Normal(DECAY * x, DRIVE)))(x)
        jax.vmap(lambda x: ab.sample("y", dist.Normal(x, NOISE)))(x)
        return x, None

    x0 = ab.sample("x0", dist.Normal(jnp.zeros(2), START))
    jax.lax.scan(body, x0, None, length=n)


def early(given, carry, x):
    """A look-ahead of both observations of an outer step."""
    return predictive({"y": given["y"][0]}, carry, x)


@ab.model
def pair_guide(given, carry, x):
    """Proposes both states of an outer step, by a scan of its own."""

    def body(x, y):
        optimal({"y": y}, x, None)
        return x, None

    jax.lax.scan(body, carry, given["y"])


@ab.model
def noise_first(n):
    """All noise is drawn before the scan, which takes it in step by step."""
    e = ab.sample("e", dist.Normal(jnp.zeros(n), 1.0))

    def body(x, e):
        x = DECAY * x + DRIVE * e
        ab.sample("y", dist.Normal(x, NOISE))
        return x, None

    jax.lax.scan(body, start(), e)


@ab.model
def noise_guide(given, n):
    """Called with the model's arguments, static ones as such."""
    ab.sample("e", dist.Normal(jnp.full(n, 0.2), 1.1))


def known_noise(given, carry, e):
    return dist.Normal(DECAY * carry + DRIVE * e, NOISE).log_prob(given["y"])


PAIRS = SHORT.reshape(2, 2)
OTHERS = {
    "nested": (nested, (4,), {"y": PAIRS}, {}),
    "nested, look-ahead": (nested, (4,), {"y": PAIRS}, {"lookahead": early, "threshold": 1.0}),
    "nested, guided by a scan": (nested, (4,), {"y": PAIRS}, {"proposal": pair_guide}),
    "noise first": (noise_first, (4,), GIVEN, {"initial": noise_guide, "lookahead": known_noise}),
    "two in sequence": (in_sequence, (4,), {"y": SHORT[:1], "later/y": SHORT[1:]}, {}),
    "two in sequence, ffbs": (
        in_sequence, (4,), {"y": SHORT[:1], "later/y": SHORT[1:]},
        {"smoothing": "ffbs", "num_particles": 32},
    ),
    "reverse": (backwards, (4,), {"y": SHORT[::-1]}, {}),
    "reverse, guided": (
        backwards, (4,), {"y": SHORT[::-1]},
        {"proposal": optimal, "lookahead": predictive, "threshold": 1.0},
    ),
    "reverse, ffbs": (
        backwards, (4,), {"y": SHORT[::-1]}, {"smoothing": "ffbs", "num_particles": 32},
    ),
    "in cond": (in_cond, (4, jnp.array(True)), GIVEN, {}),
    "series": (series, (2,), {"y": PAIRS}, {}),
    "vmapped sites": (vmapped_sites, (2,), {"y": PAIRS.T}, {}),
}  # fmt: skip


SLOW = {"two in sequence", "reverse", "reverse, ffbs", "vmapped sites"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in OTHERS]
)
def test_the_evidence_is_unbiased(name):
    m, args, given, settings = OTHERS[name]
    truth = LOG_Z
    if m in (series, vmapped_sites):
        truth = kalman(PAIRS[0])[0] + kalman(PAIRS[1])[0]
    assert_unbiased(evidences(FILTER.replace(**settings), m, args, given, 1000), truth)


def test_a_static_latent_before_the_scan():
    @ab.model
    def two_decays(n):
        fast = ab.sample("fast", dist.Bernoulli(0.3))

        def body(x, _):
            x = ab.sample("x", dist.Normal(jnp.where(fast, 0.5, DECAY) * x, DRIVE))
            ab.sample("y", dist.Normal(x, NOISE))
            return x, None

        jax.lax.scan(body, start(), None, length=n)

    slow, fast = math.log(0.7) + LOG_Z, math.log(0.3) + kalman(SHORT, decay=0.5)[0]

    def one(key):
        post = FILTER(two_decays).posterior(key, 4, given=GIVEN)
        return post.log_evidence, post.mean("fast")

    log_z, mean = jax.jit(jax.vmap(one))(jax.random.split(KEY, 1000))
    assert_unbiased(log_z, np.logaddexp(slow, fast))
    assert_unbiased(np.asarray(log_z) + np.log(np.asarray(mean) + 1e-30), fast)


@pytest.mark.parametrize("smoothing", ["genealogy", "ffbs"])
def test_data_after_the_scan(smoothing):
    """Of the last carry and of what the scan returned: a dense Gaussian says how likely."""

    @ab.model
    def ended(n):
        x, xs = jax.lax.scan(step, start(), None, length=n)
        ab.sample("z", dist.Normal(x + xs[0], 1.0))

    difference = np.eye(5) - DECAY * np.eye(5, k=-1)
    root = np.linalg.inv(difference) * np.array([START, *[DRIVE] * 4])
    seen = np.vstack([np.eye(5)[1:], np.eye(5)[4] + np.eye(5)[1]])
    cov = seen @ root @ root.T @ seen.T + np.diag([NOISE**2] * 4 + [1.0])
    values = np.append(SHORT, 1.5)
    truth = -0.5 * (
        values @ np.linalg.solve(cov, values) + np.linalg.slogdet(2 * np.pi * cov).logabsdet
    )
    alg = ab.smc(num_particles=32, smoothing=smoothing)
    assert_unbiased(evidences(alg, ended, (4,), {**GIVEN, "z": 1.5}, 1000), truth)


@pytest.mark.slow
def test_a_branch_that_each_particle_takes_for_itself():
    """Both branches have the same address, one has another site besides."""

    @ab.model
    def branching(n):
        z0 = ab.sample("z0", dist.Categorical(probs=jnp.array(PRIOR)))

        def stay():
            return ab.sample("z", dist.Categorical(probs=jnp.array(MOVES[0])))

        def move():
            u = ab.sample("u", dist.Bernoulli(0.25))
            p = jnp.where(u, 0.5, (MOVES[1][1] - 0.125) / 0.75)
            return ab.sample("z", dist.Categorical(probs=jnp.array([1 - p, p])))

        def body(z, _):
            z = jax.lax.cond(z == 0, stay, move)
            ab.sample("token", dist.Categorical(probs=jnp.array(EMITS)[z]))
            return z, None

        jax.lax.scan(body, z0, None, length=n)

    given = {"token": TOKENS}
    log_z = evidences(ab.smc(num_particles=16), branching, (3,), given, 1000)
    assert_unbiased(log_z, math.log(path_probabilities()[1]))
    post = run(branching, 3, given=given)
    z0, z = post.draws["z0"][0], post.draws["z"][0]
    before = np.concatenate([z0[:, None], z[:, :-1]], 1)
    np.testing.assert_array_equal(np.asarray(post.active["u"])[0], before == 1)


def test_params_and_scaled_densities():
    """A square of a Gaussian density is one of half the variance, times a constant."""

    @ab.model
    def powered(n):
        decay = ab.param("decay", DECAY)

        def body(x, _):
            x = ab.sample("x", dist.Normal(decay * x, DRIVE))
            with ab.scaled(2.0):
                ab.sample("y", dist.Normal(x, NOISE))
            return x, None

        jax.lax.scan(body, start(), None, length=n)

    constant = 0.5 * math.log(2 * math.pi * NOISE**2 / 2) - math.log(2 * math.pi * NOISE**2)
    truth = kalman(SHORT, noise=NOISE / 2**0.5)[0] + 4 * constant
    assert_unbiased(evidences(FILTER, powered, (4,), GIVEN, 1000), truth)
