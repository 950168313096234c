"""Metropolis-Hastings against enumerated and other exact posteriors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import SE, assert_moments, assert_probability, mcse
from gaussian import DATA, SCALES, exact, groups, latents
from jax import lax
from scipy.stats import norm

import abduce as ab
import abduce.dist as dist
from abduce.inference import diagnostics

KEY = jax.random.key(11)


P = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]], np.float32)


@ab.model
def discrete():
    a = ab.sample("a", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
    b = ab.sample("b", dist.Bernoulli(jnp.asarray(P)[a, 1]))
    ab.sample("y", dist.Normal(a - 2.0 * b, 1.0))


def discrete_posterior(y):
    p = np.array([0.2, 0.3, 0.5])[:, None] * P
    a, b = np.arange(3)[:, None], np.arange(2)
    p = p * norm.pdf(y, a - 2.0 * b)
    return p / p.sum()


def assert_states(post, y):
    expected = discrete_posterior(y)
    for a in range(3):
        for b in range(2):
            assert_probability((post["a"] == a) & (post["b"] == b), expected[a, b])


def test_mh_on_an_enumerable_model():
    post = ab.mh(num_warmup=250, num_samples=4000)(discrete).posterior(KEY, given={"y": 0.3})
    assert post["a"].dtype.kind == "i"
    assert_states(post, 0.3)


def test_a_proposal_covers_some_and_the_prior_the_rest():
    """It proposes neither symmetrically nor from the prior, and sees data and state."""

    @ab.model
    def nudge(given):
        steepness = 1 + jnp.abs(given["y"])
        logits = -steepness * jnp.abs(jnp.arange(3) - given["a"] - 0.5)
        ab.sample("a", dist.Categorical(logits=logits))

    alg = ab.mh(proposal=nudge, num_warmup=250, num_samples=4000)
    post = alg(discrete).posterior(KEY, given={"y": 0.3})
    assert_states(post, 0.3)


@pytest.mark.slow
def test_several_proposals_take_turns():
    @ab.model
    def shift(given, s):
        ab.sample("mu", dist.Normal(given["mu"] + 0.3, 1.0))  # biased, so the ratio matters

    @ab.model
    def conditional(given, s):
        gain = 1 / (1 + s**2)
        centre = given["mu"] + gain * (given["y"] - given["mu"])
        ab.sample("theta", dist.Normal(centre, jnp.sqrt(1 - gain)))

    alg = ab.mh(proposal=(shift, conditional), num_warmup=250, num_samples=3000)
    post = alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    truth = exact()
    assert_moments(latents(post), truth.mean, truth.sd)
    # The second is the exact conditional: always accepted; the first at times.
    assert 0.5 < post.diagnostics["acceptance_rate"].mean() < 1


@ab.model
def branch():
    b = ab.sample("b", dist.Bernoulli(0.4))
    mean = lax.cond(b == 1, lambda: ab.sample("x", dist.Normal(2, 1)), lambda: 0.0)
    ab.sample("y", dist.Normal(mean, 1))


@ab.model
def flip(given):
    ab.sample("b", dist.Bernoulli(0.5))


@ab.model
def flip_and_draw(given):
    ab.sample("b", dist.Bernoulli(0.3))
    ab.sample("x", dist.Normal(1.0, 1.5))


@ab.model
def draw_if_flipped(given):
    b = ab.sample("b", dist.Bernoulli(0.3))
    lax.cond(b == 1, lambda: ab.sample("x", dist.Normal(1.0, 1.5)), lambda: 0.0)


@ab.model
def draw_if_open(given):
    """Proposes a value only where the branch was taken before: other moves have no way back."""
    ab.sample("b", dist.Bernoulli(0.3))
    lax.cond(given["b"] == 1, lambda: ab.sample("x", dist.Normal(1.0, 1.5)), lambda: 0.0)


PROPOSALS = [None, flip, flip_and_draw, draw_if_flipped, (draw_if_open, flip)]


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_mh_opens_and_closes_branches(proposal):
    y = 1.5
    on, off = 0.4 * norm.pdf(y, 2, 2**0.5), 0.6 * norm.pdf(y)
    alg = ab.mh(proposal=proposal, num_warmup=250, num_samples=3000)
    post = alg(branch).posterior(KEY, given={"y": y})
    assert_probability(post["b"] == 1, on / (on + off))
    active = np.asarray(post["b"]) == 1
    np.testing.assert_array_equal(np.isnan(post["x"]), ~active)
    x = np.where(active, np.asarray(post["x"], float) - 1.75, 0)
    assert abs(x.mean()) < SE * mcse(x)
    squares = np.where(active, x**2 - 0.5, 0)
    assert abs(squares.mean()) < SE * mcse(squares)
    if proposal is None:  # predictions keep each draw's branch, and its value
        noise = post.predict(KEY)["y"] - np.where(active, post["x"], 0)
        assert abs(noise.mean()) < SE / np.sqrt(noise.size)
        assert abs(noise.std() - 1) < SE / np.sqrt(2 * noise.size)


def test_mh_infers_hidden_entries():
    @ab.model
    def model():
        mu = ab.sample("mu", dist.Normal(0, 2))
        ab.sample("y", dist.Normal(mu, 1).expand([3]))

    y = np.array([1.0, np.nan, 2.0])
    alg = ab.mh(num_warmup=250, num_samples=4000)
    post = alg(model).posterior(KEY, given={"y": ab.masked(y, observed=~np.isnan(y))})
    var = 1 / (1 / 4 + 2)
    assert_moments(post["mu"], 3 * var, var**0.5)
    assert_moments(post["y"][..., 1], 3 * var, (1 + var) ** 0.5)
    assert (np.asarray(post["y"])[..., [0, 2]] == [1.0, 2.0]).all()


def test_a_proposal_over_a_partly_observed_site_is_refused():
    @ab.model
    def model():
        ab.sample("y", dist.Normal(0, 1).expand([2]))

    @ab.model
    def q(given):
        ab.sample("y", dist.Normal(0, 1).expand([2]))

    data = ab.masked(np.zeros(2), observed=np.array([True, False]))
    with pytest.raises(ab.InvalidAlgorithm, match=r"covers \['y'\], which are partly observed"):
        ab.mh(proposal=q)(model).posterior(KEY, given={"y": data})


def test_chains_that_have_not_mixed_are_reported(fits):
    alg = fits[0]["mh"].replace(num_warmup=0, num_samples=250)
    precise = 1e-4 * SCALES  # no prior draw comes near the data
    with pytest.warns(ab.AbduceWarning) as caught:
        post = alg(groups).posterior(KEY, precise, given={"y": DATA})
    assert [str(w.message) for w in caught] == list(post.warnings)
    (message,) = post.warnings
    assert "not mixed" in message and "'theta'" in message
    assert "num_warmup" in message and "ab.nuts" in message


def test_thinning_keeps_every_nth(fits):
    alg = fits[0]["mh"].replace(num_samples=2000, thinning=4)
    post = alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    assert post["mu"].shape == (4, 500)
    plain = fits[1]["mh"]
    ess = diagnostics.ess_bulk(np.asarray(post["mu"], float)) / 500
    assert ess > 1.5 * diagnostics.ess_bulk(np.asarray(plain["mu"], float)) / 2000


def test_an_interrupted_run_returns_what_it_has(fits, monkeypatch):
    from abduce.inference.mcmc import mh

    advance, calls = mh._advance, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 6:  # two calls of warm-up, three of draws
            raise KeyboardInterrupt
        return advance(*args)

    monkeypatch.setattr(mh, "_advance", interrupted)
    with pytest.warns(ab.AbduceWarning, match=r"interrupted after 750 of 2000 draws per chain"):
        post = fits[0]["mh"](groups).posterior(KEY, SCALES, given={"y": DATA})
    np.testing.assert_array_equal(post["mu"], fits[1]["mh"]["mu"][:, :750])
    calls[:] = [None] * 5  # in the first call: nothing to return
    with pytest.raises(KeyboardInterrupt):
        fits[0]["mh"](groups).posterior(KEY, SCALES, given={"y": DATA})


def test_mh_starts_where_it_is_told(fits):
    theta = DATA + np.arange(4.0)[:, None] * 1e-5  # nothing that the prior proposes is as good
    alg = fits[0]["mh"].replace(num_warmup=0, num_samples=1, init={"theta": theta})
    post = alg(groups).posterior(KEY, 1e-4 * SCALES, given={"y": DATA})
    np.testing.assert_allclose(post["theta"][:, 0], theta, rtol=1e-6)
    with pytest.raises(ab.InvalidValue, match=r'init\["theta"\] has shape \(2,\), expected \(3,\)'):
        alg.replace(init={"theta": np.ones(2)})(groups).posterior(KEY, SCALES, given={"y": DATA})
    with pytest.raises(ab.UnknownAddress, match=r'init\["thet"\]'):
        alg.replace(init={"thet": 1.0})(groups).posterior(KEY, SCALES, given={"y": DATA})
