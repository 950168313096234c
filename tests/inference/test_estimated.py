"""`ab.marginal` and `ab.normalize`: estimates of densities are unbiased, and algorithms stay exact.

False-alarm rates: a mean is allowed 4 standard errors, 6.3e-5 each.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist


@ab.model
def gauss(s):
    mu = ab.sample("mu", dist.Normal(0.0, 1.0))
    z = ab.sample("z", dist.Normal(mu, 1.0))
    return ab.sample("y", dist.Normal(z, s))


S, Y = 0.5, 1.0
VAR_Y = 2.0 + S**2


@ab.model
def walk(given, *args):
    ab.sample("mu", dist.Normal(given["mu"], 1.0))


@ab.model
def coin():
    a = ab.sample("a", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
    ab.sample("y", dist.Normal(1.0 * a, 1.0), obs=1.5)


def weights_of_coin():
    p = np.array([0.2, 0.3, 0.5]) * np.exp(-0.5 * (1.5 - np.arange(3)) ** 2) / np.sqrt(2 * np.pi)
    return p / p.sum(), p.sum()


def near(draws, exact, errors=4.0):
    draws = np.asarray(draws, np.float64)
    se = draws.std() / np.sqrt(len(draws))
    assert abs(draws.mean() - exact) < errors * se + 1e-6, (draws.mean(), exact, se)


MARGINAL = ab.marginal(gauss, ("mu", "y"), via=ab.importance(num_samples=20))


def test_marginal_density_is_unbiased():
    exact = dist.Normal(0, 1).log_prob(0.3) + dist.Normal(0.3, np.sqrt(1 + S**2)).log_prob(Y)
    f = jax.jit(jax.vmap(lambda k: MARGINAL.log_density({"mu": 0.3, "y": Y}, S, key=k)))
    near(np.exp(np.asarray(f(jax.random.split(jax.random.key(0), 4000))) - exact), 1.0)


def test_marginal_keeps_only_what_was_asked():
    trace = MARGINAL.simulate(jax.random.key(1), S)
    assert set(trace.choices) == {"mu", "y"}
    assert trace.retval.keys() == {"mu", "y"}
    prior = jax.jit(jax.vmap(lambda k: MARGINAL.simulate(k, S).choices["y"]))
    y = prior(jax.random.split(jax.random.key(2), 4000))
    near(y, 0.0)
    near(y**2, VAR_Y)


def test_pseudo_marginal_metropolis_hastings():
    post = ab.mh(proposal=walk, num_samples=1500, num_warmup=200)(MARGINAL).posterior(
        jax.random.key(3), S, given={"y": Y}
    )
    table = post.summary()
    mcse = float(np.asarray(table.columns["mcse_mean"])[0])
    assert abs(post.mean("mu") - Y / VAR_Y) < 5 * mcse
    assert abs(post.std("mu") / np.sqrt(1 - 1 / VAR_Y) - 1) < 0.1


def test_marginal_in_importance_sampling():
    post = ab.importance(num_samples=4000)(MARGINAL).posterior(jax.random.key(4), S, given={"y": Y})
    exact = dist.Normal(0.0, np.sqrt(VAR_Y)).log_prob(Y)
    assert abs(post.log_evidence - exact) < 4 * post.diagnostics["log_evidence_se"]


def test_marginal_of_a_conditioned_model_counts_its_data():
    m = ab.marginal(ab.condition(gauss, {"y": Y}), "mu", via=ab.importance(num_samples=20))
    exact = dist.Normal(0, 1).log_prob(0.3) + dist.Normal(0.3, np.sqrt(1 + S**2)).log_prob(Y)
    f = jax.jit(jax.vmap(lambda k: m.log_density({"mu": 0.3}, S, key=k)))
    near(np.exp(np.asarray(f(jax.random.split(jax.random.key(5), 4000))) - exact), 1.0)


def test_marginal_inside_another_model_and_under_vmap():
    @ab.model
    def outer(scales):
        return jax.vmap(lambda s: MARGINAL(s)["y"])(scales)

    scales = jnp.array([0.5, 1.0])
    sites = outer.program(scales).sites
    assert sites["y"].shape == (2,) and sites["mu"].shape == (2,)
    choices = {"mu": jnp.array([0.3, -0.2]), "y": jnp.array([1.0, 0.5])}
    exact = sum(
        dist.Normal(0, 1).log_prob(m) + dist.Normal(m, np.sqrt(1 + s**2)).log_prob(y)
        for m, y, s in zip(choices["mu"], choices["y"], scales, strict=True)
    )
    f = jax.jit(jax.vmap(lambda k: outer.log_density(choices, scales, key=k)))
    near(np.exp(np.asarray(f(jax.random.split(jax.random.key(6), 4000))) - exact), 1.0)


def test_normalized_density_and_its_reciprocal_are_unbiased():
    q = ab.normalize(coin, via=ab.importance(num_samples=3))
    simulate = jax.jit(
        jax.vmap(lambda k: (lambda t: (t.choices["a"], t.log_density))(q.simulate(k)))
    )
    a, log_q = (np.asarray(x) for x in simulate(jax.random.split(jax.random.key(7), 60_000)))
    score = jax.jit(jax.vmap(lambda k, i: q.log_density({"a": i}, key=k), in_axes=(0, None)))
    for i in range(3):
        near(np.where(a == i, np.exp(-log_q), 0.0), 1.0)  # E[1 / q at a draw] over the support
        density = np.exp(np.asarray(score(jax.random.split(jax.random.key(8), 20_000), i)))
        drawn = (a == i).mean()
        se = np.hypot(density.std() / np.sqrt(20_000), np.sqrt(drawn / 60_000))
        assert abs(density.mean() - drawn) < 4 * se


@pytest.mark.parametrize("num_samples", [2, 20])
def test_normalized_proposal_leaves_metropolis_hastings_exact(num_samples):
    q = ab.normalize(ab.condition(gauss, {"y": Y}), via=ab.importance(num_samples=num_samples))

    @ab.model
    def proposal(given, s):
        return q(s)

    post = ab.mh(proposal=proposal, num_samples=1200, num_warmup=100)(gauss).posterior(
        jax.random.key(9), S, given={"y": Y}
    )
    exact = {"mu": (1 / VAR_Y, 1 - 1 / VAR_Y), "z": (2 / VAR_Y, 2 - 4 / VAR_Y)}
    columns = post.summary().columns
    for i, (address, (mean, variance)) in enumerate(exact.items()):
        assert abs(post.mean(address) - mean) < 5 * float(columns["mcse_mean"][i])
        assert abs(post.std(address) / np.sqrt(variance) - 1) < 0.1


@ab.model
def chain(y):
    def step(x, y):
        x = ab.sample("x", dist.Normal(0.9 * x, 0.7))
        ab.sample("y", dist.Normal(x, 0.5), obs=y)
        return x, None

    jax.lax.scan(step, 0.0, y)


def evidence_of_chain(y):
    mean, var, total = 0.0, 0.0, 0.0
    for value in y:
        mean, var = 0.9 * mean, 0.81 * var + 0.49
        s = var + 0.25
        total += -0.5 * (np.log(2 * np.pi * s) + (value - mean) ** 2 / s)
        mean, var = mean + var / s * (value - mean), var * 0.25 / s
    return total


@pytest.mark.slow
def test_normalized_particle_filter():
    y = jnp.array([0.3, -0.5, 1.2, 0.4, 0.1, -0.9])
    q = ab.normalize(chain, via=ab.smc(num_particles=8))
    assert q.program(y).latents["x"].shape == (6,)
    exact = evidence_of_chain(np.asarray(y))
    joint = jax.jit(
        jax.vmap(
            lambda k: (lambda t: chain.log_density(t.choices, y) - t.log_density)(q.simulate(k, y))
        )
    )
    # p(x, y) / q(x) is the evidence estimate of the run.
    near(np.exp(np.asarray(joint(jax.random.split(jax.random.key(10), 1500))) - exact), 1.0)
    x = q.simulate(jax.random.key(11), y).choices
    score = jax.jit(jax.vmap(lambda k: q.log_density(x, y, key=k)))
    values = np.asarray(score(jax.random.split(jax.random.key(12), 64)))
    assert np.isfinite(values).all() and values.std() > 0


@pytest.mark.slow
def test_particle_marginal_metropolis_hastings_is_a_composition():
    @ab.model
    def unknown(y):
        phi = ab.sample("phi", dist.Uniform(0.0, 1.0))

        def step(x, y):
            x = ab.sample("x", dist.Normal(phi * x, 0.7))
            ab.sample("y", dist.Normal(x, 0.5), obs=y)
            return x, None

        jax.lax.scan(step, 0.0, y)

    y = jnp.array([0.3, -0.5, 1.2, 0.4, 0.1, -0.9])
    m = ab.marginal(unknown, "phi", via=ab.smc(num_particles=20))

    @ab.model
    def move(given, *args):
        ab.sample("phi", dist.TruncatedNormal(given["phi"], 0.4, low=0.0, high=1.0))

    post = ab.mh(proposal=move, num_samples=600, num_warmup=100)(m).posterior(jax.random.key(13), y)

    def log_evidence(phi):
        mean, var, total = 0.0, 0.0, 0.0
        for value in np.asarray(y):
            mean, var = phi * mean, phi**2 * var + 0.49
            s = var + 0.25
            total += -0.5 * (np.log(s) + (value - mean) ** 2 / s)
            mean, var = mean + var / s * (value - mean), var * 0.25 / s
        return total

    grid = np.linspace(0.005, 0.995, 100)
    weights = np.exp([log_evidence(p) for p in grid])
    exact = (weights * grid).sum() / weights.sum()
    assert abs(post.mean("phi") - exact) < 5 * float(post.summary().columns["mcse_mean"][0])


def test_errors():
    with pytest.raises(ab.MissingKey, match=r"density of site 'y' .* is estimated"):
        MARGINAL.log_density({"mu": 0.3, "y": Y}, S)
    with pytest.raises(ab.MissingKey, match="gradient methods do not"):
        ab.nuts()(MARGINAL).posterior(jax.random.key(0), S, given={"y": Y})
    with pytest.raises(ab.InvalidModel, match="nothing to sum out"):
        ab.marginal(gauss, ("mu", "z", "y"), via=ab.importance()).program(S)
    with pytest.raises(ab.UnknownAddress):
        ab.marginal(gauss, "nu", via=ab.importance()).program(S)
    with pytest.raises(ab.InvalidAlgorithm, match="via="):
        ab.marginal(gauss, "mu", via=3)
    with pytest.raises(ab.InvalidAlgorithm, match="cannot retain"):
        ab.normalize(gauss, via=ab.nuts())
