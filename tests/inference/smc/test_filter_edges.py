"""Where a particle filter cannot go on, or is asked for what it cannot do: clear words, no NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_space import TOKENS, Y, chain, kalman, optimal, predictive, walk

import abduce as ab
import abduce.dist as dist

KEY = jax.random.key(5)
FILTER = ab.smc(num_particles=64)
GIVEN = {"y": Y}


@ab.model
def bounded(n, reverse=False):
    """Steps and observations stay within one: the particles cannot jump."""

    def step(x, _):
        x = ab.sample("x", dist.Uniform(x - 1.0, x + 1.0))
        ab.sample("y", dist.Uniform(x - 1.0, x + 1.0))
        return x, None

    jax.lax.scan(step, 0.0, None, length=n, reverse=reverse)


OUTLIER = np.array([0.1, 0.2, 50.0, 0.1])


@pytest.mark.parametrize(("reverse", "step"), [(False, 2), (True, 2)])
def test_the_step_at_which_all_weights_are_zero_is_named(reverse, step):
    with pytest.raises(ab.Degenerate, match=rf"at step {step} of the scan.*'y'.*proposal="):
        FILTER(bounded).posterior(KEY, 4, reverse, given={"y": OUTLIER})


def test_under_a_trace_the_evidence_is_zero_and_nothing_is_nan():
    def one(key, y):
        post = FILTER(bounded).posterior(key, 4, given={"y": y})
        d = post.diagnostics
        return post.log_evidence, post.mean("x"), d["ess"], d["log_evidence_increments"]

    ys = np.stack([OUTLIER, [0.1, 0.2, 0.3, 0.1]])
    log_z, mean, ess, increments = jax.jit(jax.vmap(one))(jax.random.split(KEY, 2), ys)
    assert log_z[0] == -jnp.inf and jnp.isfinite(log_z[1])
    assert ess[0, 2] == 0 and increments[0, 2] == -jnp.inf
    assert not any(jnp.isnan(x).any() for x in (mean, ess, increments))


def test_a_density_that_is_nan_counts_as_zero():
    """The square root of a negative state: those particles die, the others go on."""

    @ab.model
    def rooted(n):
        def step(x, _):
            x = ab.sample("x", dist.Normal(x, 1.0))
            ab.sample("y", dist.Normal(jnp.sqrt(x), 1.0))
            return x, None

        jax.lax.scan(step, 1.0, None, length=n)

    post = FILTER(rooted).posterior(KEY, 3, given={"y": np.ones(3)})
    assert np.isfinite(post.log_evidence) and (post["x"] > 0).all()
    with pytest.raises(ab.Degenerate, match="at step 1 of the scan"):
        FILTER(rooted).posterior(KEY, 3, given={"y": np.array([1.0, 1e30, 1.0])})


def test_one_particle():
    post = ab.smc(num_particles=1)(walk).posterior(KEY, 8, given=GIVEN)
    x = post["x"][0, 0]
    truth = dist.Normal(x, 0.5).log_prob(Y).sum()
    assert post.log_evidence == pytest.approx(float(truth), rel=1e-5)


SETTINGS = {
    "genealogy": {},
    "filter": {"store": "filter"},
    "ffbs": {"smoothing": "ffbs"},
    "lookahead": {"lookahead": predictive},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_scan_of_no_steps(name):
    alg = ab.smc(num_particles=2000, **SETTINGS[name])
    post = alg(walk).posterior(KEY, 0, given={"y": np.zeros(0)})
    assert post.log_evidence == 0 and abs(post.std("x0") - 1.2) < 0.1


@pytest.mark.parametrize("name", ["genealogy", "ffbs", "lookahead"])
def test_a_scan_of_one_step(name):
    alg = ab.smc(num_particles=2000, **SETTINGS[name])
    post = alg(walk).posterior(KEY, 1, given={"y": Y[:1]})
    assert abs(post.log_evidence - kalman(Y[:1])[0]) < 0.1


def test_memory_of_a_filter_without_a_past_does_not_grow_with_the_series():
    def temporary(steps):
        def run(key, y):
            post = ab.smc(num_particles=10_000, store="filter")(walk).posterior(
                key, steps, given={"y": y}
            )
            return post.log_evidence, post.diagnostics, {a: post.mean(a) for a in post}

        compiled = jax.jit(run).lower(KEY, jnp.zeros(steps)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(100), temporary(1000)
    assert long < 1.1 * short
    assert long < 1e6  # one array of all paths has 4e7 bytes


def test_other_data_compile_nothing(count_compiles):
    post = FILTER(walk).posterior(KEY, 8, given=GIVEN)
    assert post["x"].dtype == np.float32 and post.log_weights.dtype == np.float32
    key = jax.random.key(9)  # the making of a key may compile
    with count_compiles() as compiles:
        FILTER(walk).posterior(key, 8, given={"y": Y + 1})
    assert compiles.names == []


def test_precision_follows_the_setting(x64):
    post = FILTER(walk).posterior(KEY, 8, given=GIVEN)
    assert post["x"].dtype == np.float64 and post.log_weights.dtype == np.float64


def test_rbg_keys():
    post = FILTER.replace(proposal=optimal)(walk).posterior(
        jax.random.key(0, impl="rbg"), 8, given=GIVEN
    )
    assert abs(post.log_evidence - kalman()[0]) < 1


# ---------------------------------------------------------------------- messages


def proposing(address, d):
    @ab.model
    def wrong(given, carry, x):
        ab.sample(address, d)

    return wrong


@pytest.mark.parametrize(
    ("proposal", "match"),
    [
        (proposing("xx", dist.Normal()), r"`wrong`.*\['xx'\] are not latents.*there are \['x'\]"),
        (proposing("y", dist.Normal()), r"`wrong`.*\['y'\] are observed"),
        (proposing("x", dist.Normal(jnp.zeros(3))), r"'x' with shape \(3,\).* shape \(\)"),
    ],
)
def test_proposals_that_do_not_fit(proposal, match):
    with pytest.raises(ab.InvalidValue, match=match):
        FILTER.replace(proposal=proposal)(walk).posterior(KEY, 8, given=GIVEN)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"resampler": "sytematic"}, 'Did you mean "systematic"'),
        ({"threshold": 2.0}, r"in \[0, 1\], got 2.0"),
        ({"threshold": "often"}, r"in \[0, 1\], got 'often'"),
        ({"store": "all"}, "store='all'; there are 'paths', 'tree', 'filter'"),
        ({"smoothing": "two"}, "'genealogy', 'ffbs', 'two_filter', 'paris'"),
        ({"num_particles": 0}, "num_particles must be an int >= 1, got 0"),
        ({"num_particle": 3}, 'Did you mean "num_particles"'),
        ({"proposal": lambda *a: None}, "proposal= takes a Model, got function"),
    ],
)
def test_settings_that_do_not_exist(settings, match):
    with pytest.raises(ab.InvalidAlgorithm, match=match):
        ab.smc(**settings)


def test_a_look_ahead_is_a_scalar():
    with pytest.raises(ab.InvalidValue, match=r"scalar log weight, got shape \(2,\)"):
        alg = FILTER.replace(lookahead=lambda given, carry, x: jnp.zeros(2))
        alg(walk).posterior(KEY, 8, given=GIVEN)


def test_a_filter_without_a_past_cannot_return_steps():
    @ab.model
    def summed(n):
        _, xs = walk(n)
        ab.deterministic("total", xs.sum())

    with pytest.raises(ab.InvalidModel, match=r"store='filter'.*Use store='paths'"):
        FILTER.replace(store="filter")(summed).posterior(KEY, 8, given=GIVEN)


def test_transport_needs_places():
    with pytest.raises(ab.InvalidModel, match=r"optimal_transport.*no floating-point latent"):
        FILTER.replace(resampler="optimal_transport")(chain).posterior(
            KEY, 3, given={"token": TOKENS}
        )


def test_a_key_comes_first():
    with pytest.raises(ab.MissingKey, match="first argument is a random key, got the int 8"):
        FILTER(walk).posterior(8, given=GIVEN)


def test_a_low_effective_sample_size_is_told():
    with pytest.warns(ab.AbduceWarning, match="effective sample size falls to .* proposal="):
        ab.smc(num_particles=1000)(walk).posterior(KEY, 1, given={"y": np.array([12.0])})


def test_a_static_latent_that_resampling_wears_out_is_told():
    @ab.model
    def drifting(n):
        drift = ab.sample("drift", dist.Normal(0.0, 1.0))

        def step(x, _):
            x = ab.sample("x", dist.Normal(x + drift, 0.1))
            ab.sample("y", dist.Normal(x, 0.1))
            return x, None

        jax.lax.scan(step, 0.0, None, length=n)

    with pytest.warns(ab.AbduceWarning, match="'drift' .*values left.*ab.pmmh"):
        ab.smc(num_particles=500)(drifting).posterior(
            KEY, 30, given={"y": np.arange(1.0, 31) * 0.8}
        )
