"""Moves after a resampling: weighted paths keep their law, for any number of particles.

Z-weighted averages over runs are unbiased; they are compared to enumeration and to closed forms at
4.5 standard errors, which a wrong acceptance ratio misses (there is a test of that).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_space import (
    SE,
    TOKENS,
    Y,
    chain,
    kalman,
    optimal,
    path_probabilities,
    predictive,
    walk,
)

import abduce as ab
import abduce.dist as dist
from abduce.inference.smc.rejuvenation import Step

KEY = jax.random.key(14)
PATHS, Z = path_probabilities()


def slow(settings):
    return pytest.param(settings, marks=pytest.mark.slow)


@ab.model
def lopsided(given, carry, x):
    """Its forward and backward densities differ; it hardly ever proposes a 1."""
    ab.sample("z", dist.Categorical(probs=jnp.array([[0.9, 0.1], [0.6, 0.4]])[given["z"]]))


@ab.model
def drifting(given, carry, x):
    ab.sample("x", dist.Normal(0.7 * given["x"] + 0.1 * given["y"], 0.4))


def path_errors(alg, runs=1500):
    """Zhat f_hat(path) / Z - p(path | data), for every run and path."""

    def one(key):
        post = alg(chain).posterior(key, 3, given={"token": TOKENS})
        bits = jnp.concatenate([post.draws["z0"][0][:, None], post.draws["z"][0]], 1)
        f = jnp.zeros(16).at[(bits * 2 ** jnp.arange(3, -1, -1)).sum(1)].add(post._weights)
        return f, post.log_evidence

    f, log_z = jax.jit(jax.vmap(one))(jax.random.split(KEY, runs))
    return np.asarray(f) * np.exp(np.asarray(log_z))[:, None] / Z - PATHS.ravel()


def is_unbiased(errors):
    return (np.abs(errors.mean(0)) < SE * errors.std(0) / len(errors) ** 0.5 + 1e-6).all()


@pytest.mark.parametrize(
    "settings",
    [
        slow({"kernel": ab.mh()}),
        {"kernel": ab.mh(proposal=lopsided), "num_moves": 2, "threshold": 0.7},
        slow({"kernel": ab.mh(proposal=lopsided), "smoothing": "ffbs"}),
    ],
    ids=["prior", "proposal, adaptive", "backward simulation"],
)
def test_paths_of_a_chain_have_their_law(settings):
    base = {"num_particles": 6, "threshold": 1.0, "resampler": "multinomial"}
    assert is_unbiased(path_errors(ab.smc(**{**base, **settings})))


@pytest.mark.slow
def test_a_kernel_without_its_backward_density_is_caught(monkeypatch):
    """The same comparison, of the same size, with the rule broken."""

    def always(self, key, log_ratio, new, old):
        return new, jnp.ones(())

    monkeypatch.setattr(Step, "choose", always)
    alg = ab.smc(
        num_particles=6, threshold=1.0, resampler="multinomial", kernel=ab.mh(proposal=lopsided)
    )
    jax.clear_caches()
    assert not is_unbiased(path_errors(alg))
    jax.clear_caches()


@pytest.mark.parametrize(
    "settings",
    [
        slow({"kernel": ab.mh(proposal=drifting)}),
        {"kernel": ab.mh(proposal=drifting), "proposal": optimal, "lookahead": predictive},
        slow({"kernel": ab.mh(), "lookahead": predictive, "store": "filter"}),
    ],
    ids=["proposal", "guided, look-ahead", "prior, look-ahead"],
)
def test_evidence_and_states_of_a_linear_gaussian_model(settings):
    log_z, _, smooth = kalman()
    alg = ab.smc(num_particles=24, threshold=0.9, **settings)

    def one(key):
        post = alg(walk).posterior(key, 8, given={"y": Y})
        if alg.store == "filter":
            return jnp.exp(post.log_evidence - log_z) * jnp.ones(1)
        means = jnp.sum(post._weights[:, None] * post.draws["x"][0], 0)
        return jnp.exp(post.log_evidence - log_z) * jnp.append(means - smooth[0][1:], 1.0)

    out = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, 2000)))
    truth = np.zeros(out.shape[1])
    truth[-1] = 1.0
    assert out[:, -1].std() / 2000**0.5 < 0.05
    assert is_unbiased(out - truth)


@ab.model
def rich(n):
    """A static latent, an input by particle, several elements, a masked and a recorded value."""
    level = ab.sample("level", dist.Normal(0.0, 1.0))
    shifts = ab.sample("shifts", dist.Normal(0.0, 0.5).expand([n]))

    def step(x, shift):
        x = jax.vmap(lambda x: ab.sample("x", dist.Normal(0.8 * x + shift, 0.6)))(x)
        w = ab.sample("w", dist.Normal(level, 0.5))
        ab.deterministic("sum", x.sum() + w)
        ab.sample("y", dist.Normal(x.sum() + w, 0.5))
        return x, x.mean()

    _, means = jax.lax.scan(step, jnp.zeros(3), shifts)
    ab.deterministic("means", means)


def rich_law(y, seen, w):
    """Mean of everything given the data, by the joint Gaussian of all variables; the evidence."""
    n = len(y)
    names = ["level", *[f"s{t}" for t in range(n)]]
    names += [f"x{t}{i}" for t in range(n) for i in range(3)] + [f"w{t}" for t in range(n)]
    names += [f"e{t}" for t in range(n)]
    sd = [1.0] + [0.5] * n + [0.6] * (3 * n) + [0.5] * n + [0.5] * n
    eye = np.eye(len(names))
    at = {name: eye[i] for i, name in enumerate(names)}
    rows = {}
    for t in range(n):
        for i in range(3):
            before = rows[f"x{t - 1}{i}"] if t else 0.0
            rows[f"x{t}{i}"] = 0.8 * before + at[f"s{t}"] + at[f"x{t}{i}"]
        rows[f"w{t}"] = at["level"] + at[f"w{t}"]
        rows[f"y{t}"] = sum(rows[f"x{t}{i}"] for i in range(3)) + rows[f"w{t}"] + at[f"e{t}"]
    cov = np.diag(np.square(sd))
    data = np.array(
        [rows[f"y{t}"] for t in range(n)] + [rows[f"w{t}"] for t in np.flatnonzero(seen)]
    )
    values = np.concatenate([y, w[seen]])
    s = data @ cov @ data.T
    want = [at["level"]] + [rows[f"x{t}{i}"] for t in range(n) for i in range(3)]
    want += [rows[f"w{t}"] for t in range(n)]
    mean = np.array(want) @ cov @ data.T @ np.linalg.solve(s, values)
    return mean, -0.5 * (values @ np.linalg.solve(s, values) + np.linalg.slogdet(2 * np.pi * s)[1])


@pytest.mark.slow
def test_everything_that_a_step_may_depend_on():
    y, w = np.array([0.5, 1.4, 0.9, 2.0]), np.array([0.0, 0.6, 0.0, 0.4])
    seen = np.array([False, True, False, True])
    mean, log_z = rich_law(y, seen, w)
    given = {"y": y, "w": ab.masked(w, observed=seen)}
    alg = ab.smc(num_particles=60, threshold=1.0, kernel=ab.mh(), num_moves=2)

    def one(key):
        post = alg(rich).posterior(key, 4, given=given)
        d = {a: x[0] for a, x in post.draws.items()}
        off = jnp.abs(d["sum"] - d["x"].sum(-1) - d["w"]).max()
        off = jnp.maximum(off, jnp.abs(d["means"] - d["x"].mean(-1)).max())
        flat = jnp.concatenate([d["level"][:, None], d["x"].reshape(60, -1), d["w"]], 1)
        ratio = jnp.exp(post.log_evidence - log_z)
        return ratio * jnp.append(jnp.sum(post._weights[:, None] * flat, 0) - mean, 1.0), off

    out, off = jax.jit(jax.vmap(one))(jax.random.split(KEY, 1000))
    assert off.max() < 1e-4  # what is recorded belongs to the moved latents
    out = np.array(out)
    assert out[:, -1].std() / 1000**0.5 < 0.05
    out[:, -1] -= 1
    assert is_unbiased(out)


def test_copies_differ_after_a_move():
    """One informative observation leaves few particles; a move after it spreads them again."""
    y = np.array([0.1, 2.5, 0.9])
    alg = ab.smc(num_particles=400, threshold=0.9)
    plain = alg(walk).posterior(KEY, 3, given={"y": y})
    moved = alg.replace(kernel=ab.mh(proposal=drifting), num_moves=5)(walk)
    post = moved.posterior(KEY, 3, given={"y": y})
    distinct = [len(np.unique(p.draws["x"][0, :, 1])) for p in (plain, post)]
    assert distinct[0] < 120 and distinct[1] > 2 * distinct[0]
    rate = post.diagnostics["acceptance_rate"]
    came = post.diagnostics["resampled"]  # before a step: the move was at the end of the one before
    np.testing.assert_array_equal(np.isfinite(rate[:-1]), came[1:])
    assert (rate[np.isfinite(rate)] > 0.1).all() and "acceptance_rate" not in plain.diagnostics


def test_a_reversed_scan_and_a_second_call(count_compiles):
    @ab.model
    def backwards(n):
        def step(x, _):
            x = ab.sample("x", dist.Normal(0.9 * x, 0.6))
            ab.sample("y", dist.Normal(x, 0.5))
            return x, None

        jax.lax.scan(step, ab.sample("x0", dist.Normal(0.0, 1.2)), None, length=n, reverse=True)

    alg = ab.smc(num_particles=2000, kernel=ab.mh())
    post = alg(backwards).posterior(KEY, 8, given={"y": Y[::-1]})
    log_z, _, smooth = kalman()
    assert abs(post.log_evidence - log_z) < 0.3  # sd about .05
    assert np.abs(post.mean("x")[::-1] - smooth[0][1:]).max() < 0.2
    with count_compiles() as compiles:
        alg(backwards).posterior(KEY, 8, given={"y": Y})
    assert compiles.count == 0


# ---------------------------------------------------------------------- refusals


@ab.model
def branching(n):
    def step(x, _):
        x = jax.lax.cond(
            x > 0,
            lambda: ab.sample("a", dist.Normal(x, 1.0)),
            lambda: ab.sample("b", dist.Normal(x, 2.0)),
        )
        ab.sample("y", dist.Normal(x, 1.0))
        return x, None

    jax.lax.scan(step, 0.0, None, length=n)


@ab.model
def nested(n):
    def step(x, _):
        def inner(x, _):
            return ab.sample("x", dist.Normal(x, 1.0)), None

        x, _ = jax.lax.scan(inner, x, None, length=2)
        ab.sample("y", dist.Normal(x, 1.0))
        return x, None

    jax.lax.scan(step, 0.0, None, length=n)


@ab.model
def covers_data(given, carry, x):
    ab.sample("y", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("m", "kernel", "error", "match"),
    [
        (branching, ab.mh(), ab.InvalidModel, "'[ab]' is in a branch.*leave kernel= out"),
        (nested, ab.mh(), ab.InvalidModel, "another scan with sites inside"),
        (walk, ab.hmc(), ab.InvalidAlgorithm, r"kernel= takes an ab.mh\(...\)"),
        (walk, ab.mh(proposal=covers_data), ValueError, r"\['y'\] are observed"),
    ],
)
def test_what_cannot_be_moved(m, kernel, error, match):
    with pytest.raises(error, match=match):
        ab.smc(num_particles=8, kernel=kernel)(m).posterior(KEY, 8, given={"y": Y})


def test_a_retained_path_cannot_be_moved():
    q = ab.normalize(ab.condition(walk, {"y": Y}), via=ab.smc(num_particles=8, kernel=ab.mh()))
    trace = q.simulate(KEY, 8)
    with pytest.raises(ab.InvalidAlgorithm, match=r"retained path. Leave kernel= out"):
        q.log_density(trace.choices, 8, key=KEY)
