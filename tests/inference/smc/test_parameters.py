"""Particle Gibbs, particle marginal MH and SMC^2 against enumeration and grids.

Frequencies and means are compared to 5 of their standard errors, with the effective sample size of
the chains in place of their length (a false alarm in 1.7e6 each; keys are fixed).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_space import TOKENS, chain, kalman, path_probabilities

import abduce as ab
import abduce.dist as dist
from abduce.inference.smc.cloud import Settings
from abduce.inference.smc.filtering import run_filter
from abduce.inference.smc.population import Resampling
from abduce.ppl.operations import prepare_given

PATHS, _ = path_probabilities()
GIVEN = {"token": TOKENS}

VARIANTS = {
    "ancestor sampling": {},
    "traced, multinomial": {"ancestor_sampling": False},
    "traced, systematic": {"ancestor_sampling": False, "resampler": "systematic"},
    "traced, killing": {"ancestor_sampling": False, "resampler": "killing"},
    "traced, adaptive": {
        "ancestor_sampling": False, "resampler": "stratified", "threshold": 0.5,
    },
    "backward": {"ancestor_sampling": False, "backward_sampling": True},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_particle_gibbs_has_the_exact_law_of_paths(name):
    alg = ab.particle_gibbs(
        num_particles=3, num_warmup=20, num_samples=1500, num_chains=8, **VARIANTS[name]
    )
    post = alg(chain).posterior(jax.random.key(0), 3, given=GIVEN)
    z = np.concatenate([np.asarray(post["z0"])[..., None], np.asarray(post["z"])], -1)
    for path, probability in np.ndenumerate(PATHS):
        hit = (z == np.array(path)).all(-1).astype(float)  # (chain, draw)
        frequency = hit.mean()
        # batches of 50 draws are nearly independent
        batches = hit.reshape(-1, 50).mean(1)
        error = batches.std() / len(batches) ** 0.5
        assert abs(frequency - probability) < 5 * error + 1e-3, (path, frequency, probability)


@pytest.mark.parametrize("scheme", ["multinomial", "systematic", "stratified", "residual", "ssp"])
def test_the_retained_path_is_retained(scheme):
    program, arguments = chain._stage((3,), {})
    given = prepare_given(program, GIVEN)
    retained = {"z0": jnp.array(1), "z": jnp.array([0, 1, 1])}
    settings = Settings(5, Resampling(scheme, 1.0, conditional=True))
    run = jax.jit(
        jax.vmap(lambda k: run_filter(settings, arguments, given, k, retained=retained)["values"])
    )
    values = run(jax.random.split(jax.random.key(1), 200))
    assert (np.asarray(values["z0"])[:, 0] == 1).all()
    assert (np.asarray(values["z"])[:, 0] == np.array([0, 1, 1])).all()
    assert (np.asarray(values["z"])[:, 1:] != np.array([0, 1, 1])).any()


Y = np.array([0.7, 1.3, 0.2, -0.4, 0.9, 1.8, 1.1, 0.3])


@ab.model
def unknown_decay(n):
    decay = ab.sample("decay", dist.Uniform(0.0, 1.0))
    x0 = ab.sample("x0", dist.Normal(0.0, 1.2))

    def step(x, _):
        x = ab.sample("x", dist.Normal(decay * x, 0.6))
        ab.sample("y", dist.Normal(x, 0.5))
        return x, None

    jax.lax.scan(step, x0, None, length=n)


def grid():
    """Mean and variance of the decay, and the log evidence, by quadrature."""
    points = (np.arange(400) + 0.5) / 400
    log_z = np.array([kalman(Y, decay=p)[0] for p in points])
    w = np.exp(log_z - log_z.max())
    evidence = np.log(w.mean()) + log_z.max()
    w = w / w.sum()
    mean = (w * points).sum()
    return mean, (w * (points - mean) ** 2).sum(), evidence


MEAN, VAR, LOG_Z = grid()


def assert_decay(post):
    row = post.summary().columns
    i = list(post.summary().sites).index("decay")
    error = float(row["mcse_mean"][i])
    assert abs(post.mean("decay") - MEAN) < 5 * error
    assert abs(post.std("decay") / VAR**0.5 - 1) < 0.2
    assert post["x"].shape[2:] == (8,)


@pytest.mark.slow
def test_particle_gibbs_infers_parameters():
    alg = ab.particle_gibbs(num_particles=10, num_warmup=200, num_samples=600, num_chains=4)
    post = alg(unknown_decay).posterior(jax.random.key(2), 8, given={"y": Y})
    assert_decay(post)
    assert 0.5 < np.mean(post.diagnostics["acceptance_rate"]) <= 1
    assert np.mean(post.diagnostics["renewed"]) > 0.5


@pytest.mark.slow
def test_pmmh():
    alg = ab.pmmh(via=ab.smc(num_particles=50), num_warmup=200, num_samples=600)
    post = alg(unknown_decay).posterior(jax.random.key(3), 8, given={"y": Y})
    assert_decay(post)
    assert (post.diagnostics["log_evidence_sd"] < 2).all()


def test_smc2():
    alg = ab.smc2(via=ab.smc(num_particles=50), num_particles=200)
    post = alg(unknown_decay).posterior(jax.random.key(4), 8, given={"y": Y})
    error = VAR**0.5 / 10  # with at least a hundred effective particles
    assert abs(post.mean("decay") - MEAN) < 5 * error
    assert abs(post.log_evidence - LOG_Z) < 0.5
    assert post.draws["x"].shape == (1, 200, 8)


@pytest.mark.slow
def test_particle_gibbs_with_a_discrete_parameter():
    @ab.model
    def regime(n):
        fast = ab.sample("fast", dist.Bernoulli(0.5))
        decay = jnp.where(fast == 1, 0.2, 0.9)

        def step(x, _):
            x = ab.sample("x", dist.Normal(decay * x, 0.6))
            ab.sample("y", dist.Normal(x, 0.5))
            return x, None

        jax.lax.scan(step, ab.sample("x0", dist.Normal(0.0, 1.2)), None, length=n)

    slow, fast = kalman(Y, decay=0.9)[0], kalman(Y, decay=0.2)[0]
    exact = 1 / (1 + np.exp(slow - fast))
    alg = ab.particle_gibbs(num_particles=10, num_warmup=50, num_samples=800, num_chains=4)
    post = alg(regime).posterior(jax.random.key(5), 8, given={"y": Y})
    batches = np.asarray(post["fast"], float).reshape(-1, 100).mean(1)
    assert abs(batches.mean() - exact) < 5 * batches.std() / len(batches) ** 0.5 + 0.01


@pytest.mark.slow
def test_rbg_keys():
    key = jax.random.key(0, impl="rbg")
    post = ab.smc(num_particles=200)(unknown_decay).posterior(key, 8, given={"y": Y})
    assert np.isfinite(post.log_evidence)
    alg = ab.particle_gibbs(num_particles=5, num_warmup=5, num_samples=20, num_chains=2)
    assert np.isfinite(alg(unknown_decay).posterior(key, 8, given={"y": Y})["decay"]).all()


def test_errors():
    @ab.model
    def static(x):
        ab.sample("y", dist.Normal(ab.sample("m", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    for alg in (ab.particle_gibbs(), ab.pmmh(), ab.smc2()):
        with pytest.raises(ab.InvalidAlgorithm, match="no latent inside a scan"):
            alg(static).posterior(jax.random.key(0), 1.0)
    with pytest.raises(ab.InvalidAlgorithm, match="has no parameter"):
        ab.pmmh()(chain).posterior(jax.random.key(0), 3, given=GIVEN)
    with pytest.raises(ab.InvalidAlgorithm, match="only right with resampler='multinomial'"):
        ab.particle_gibbs(resampler="systematic")
    with pytest.raises(ab.InvalidAlgorithm, match="via="):
        ab.pmmh(via=ab.nuts())
    with pytest.raises(ab.InvalidAlgorithm, match="cannot run under"):
        jax.jit(
            lambda k: ab.smc2(num_particles=8)(unknown_decay)
            .posterior(k, 8, given={"y": Y})
            .log_evidence
        )(jax.random.key(0))

    @ab.model
    def hidden_state(n):
        def step(x, _):
            x = 0.9 * x + ab.sample("noise", dist.Normal(0.0, 0.6))
            ab.sample("y", dist.Normal(x, 0.5))
            return x, None

        jax.lax.scan(step, 0.0, None, length=n)

    with pytest.raises(ab.InvalidModel, match="computed from the old carry"):
        ab.smc(num_particles=8, smoothing="ffbs")(hidden_state).posterior(
            jax.random.key(0), 8, given={"y": Y}
        )
    with pytest.raises(ab.InvalidModel, match="computed from the old carry"):
        ab.particle_gibbs(num_samples=2, num_warmup=0)(hidden_state).posterior(
            jax.random.key(0), 8, given={"y": Y}
        )


def test_a_state_used_again_after_the_scan_is_refused_where_the_past_is_renewed():
    @ab.model
    def twice(n):
        x0 = ab.sample("x0", dist.Normal(0.0, 1.2))

        def step(x, _):
            x = ab.sample("x", dist.Normal(0.9 * x, 0.6))
            ab.sample("y", dist.Normal(x, 0.5))
            return x, None

        jax.lax.scan(step, x0, None, length=n)
        ab.sample("again", dist.Normal(x0, 0.1))

    given = {"y": Y, "again": 0.5}
    with pytest.raises(ab.InvalidModel, match="'x0', drawn before the scan, is used after it"):
        ab.particle_gibbs()(twice).posterior(jax.random.key(0), 8, given=given)
    alg = ab.particle_gibbs(
        ancestor_sampling=False, num_particles=30, num_warmup=20, num_samples=400, num_chains=4
    )
    post = alg(twice).posterior(jax.random.key(0), 8, given=given)
    # x0 given both: its law given y is normal, and `again` is one more observation of it.
    from state_space import kalman as filter_and_smooth

    _, _, smooth = filter_and_smooth(Y, decay=0.9, drive=0.6, noise=0.5, start=1.2)
    mean, var = smooth[0][0], smooth[1][0]
    exact = (mean / var + 0.5 / 0.01) / (1 / var + 1 / 0.01)
    assert abs(post.mean("x0") - exact) < 0.03  # its sd is 0.1; a missed site moves it by 0.1


def test_a_proposal_for_a_site_in_a_branch_is_refused():
    @ab.model
    def jumps(y):
        def step(x, y):
            x = x + jax.lax.cond(
                x > 0, lambda: ab.sample("jump", dist.Normal(0.0, 1.0)), lambda: 0.0
            )
            x = ab.sample("x", dist.Normal(0.9 * x, 0.6))
            ab.sample("y", dist.Normal(x, 0.5), obs=y)
            return x, None

        jax.lax.scan(step, 0.5, y)

    @ab.model
    def proposal(given, carry, y):
        ab.sample("jump", dist.Normal(0.1, 1.0))

    y = jnp.asarray(Y)
    assert np.isfinite(ab.smc(num_particles=20)(jumps).posterior(jax.random.key(0), y).log_evidence)
    with pytest.raises(ab.InvalidModel, match="the proposal draws 'jump', which is in a branch"):
        ab.smc(num_particles=20, proposal=proposal)(jumps).posterior(jax.random.key(0), y)
    with pytest.raises(ab.InvalidAlgorithm, match="lookahead= takes a function"):
        ab.smc(lookahead=3)
