"""Importance sampling: exact proposals, unbiased evidence, and what it says when it fails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import SE
from gaussian import DATA, SCALES, exact, groups, latents
from scipy.stats import norm

import abduce as ab
import abduce.dist as dist

KEY = jax.random.key(11)


@ab.model
def exact_posterior(given, s):
    """Draws from the exact posterior of `groups`, one conditional after the other."""
    precision = 1 / s**2
    gain = precision / (1 + precision)
    spread = 1 / (1 + precision)  # of theta given mu and y
    weight = 1 / (1 + s**2)  # y given mu
    var = 1 / (0.25 + weight.sum())
    mu = ab.sample("mu", dist.Normal(var * (weight * given["y"]).sum(), jnp.sqrt(var)))
    centre = mu + gain * (given["y"] - mu)
    ab.sample("theta", dist.Normal(centre, jnp.sqrt(spread)))


def test_an_exact_proposal_gives_equal_weights_and_the_evidence():
    alg = ab.importance(num_samples=500, proposal=exact_posterior)
    post = alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    truth = exact()
    np.testing.assert_allclose(post.log_weights, truth.log_evidence, atol=2e-5)
    assert post.log_evidence == pytest.approx(truth.log_evidence, abs=1e-5)
    assert post.diagnostics["ess"] == pytest.approx(500, rel=1e-6)
    assert post.warnings == () and post.diagnostics["pareto_k"] < 0
    draws = latents(post)
    error = truth.sd / np.sqrt(500)
    assert (np.abs(draws.mean((0, 1)) - truth.mean) < SE * error).all()


def test_the_evidence_from_the_prior_is_unbiased():
    """The mean of exp(estimate - truth) over 400 runs of 50 draws is 1, to 4.5 standard errors."""

    @jax.jit
    @jax.vmap
    def run(key):
        alg = ab.importance(num_samples=50)
        return alg(groups).posterior(key, SCALES, given={"y": DATA}).log_evidence

    ratio = np.exp(np.asarray(run(jax.random.split(KEY, 400)), float) - exact().log_evidence)
    error = ratio.std() / 20
    assert abs(ratio.mean() - 1) < SE * error and error < 0.05


def test_a_proposal_may_cover_some_latents():
    """The rest comes from the prior, and the weights account for it."""

    @ab.model
    def level(given, s):
        ab.sample("mu", dist.Normal(given["y"].mean(), 1.5))

    alg = ab.importance(num_samples=4000, proposal=level)
    post = alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    truth = exact()
    assert abs(post.log_evidence - truth.log_evidence) < SE * post.diagnostics["log_evidence_se"]
    w = np.exp(np.asarray(post.log_weights[0], float))
    w /= w.sum()
    for address, i in [("mu", 0), ("theta", slice(1, None))]:
        x = np.asarray(post.draws[address][0], float)
        squares = (w**2)[:, None] * (x.reshape(len(w), -1) - truth.mean[i]) ** 2
        assert (np.abs(post.mean(address) - truth.mean[i]) < SE * np.sqrt(squares.sum(0))).all()


def test_a_proposal_that_does_not_fit():
    @ab.model
    def wrong(given, s):
        ab.sample("nu", dist.Normal(0, 1))

    alg = ab.importance(num_samples=10, proposal=wrong)
    with pytest.raises(ab.InvalidValue, match=r"\['nu'\] are not latents.*\['mu', 'theta'\]"):
        alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    alg = ab.importance(proposal=lambda given: None)
    with pytest.raises(ab.InvalidAlgorithm, match=r"q\(given, \*args\), .*got function"):
        alg(groups).posterior(KEY, SCALES)


def test_uneven_weights_raise_a_warning():
    far = np.array([25.0, -25.0, 25.0], np.float32)
    with pytest.warns(ab.AbduceWarning, match=r"Pareto k is .* num_samples.*proposal=.*ab\.nuts"):
        post = ab.importance(num_samples=2000)(groups).posterior(KEY, SCALES, given={"y": far})
    assert post.diagnostics["pareto_k"] > 0.7 and post.diagnostics["ess"] < 50


def test_no_weight_left():
    @ab.model
    def bounded():
        x = ab.sample("x", dist.Normal(0, 1))
        ab.sample("y", dist.Uniform(x, x + 1))

    message = r"all 100 draws have weight zero.*proposal="
    with pytest.raises(ab.Degenerate, match=message):
        ab.importance(num_samples=100)(bounded).posterior(KEY, given={"y": 50.0})


def test_smoothing_can_be_left_out(fits):
    raw = ab.importance(num_samples=2000, smooth=False)
    post = raw(groups).posterior(KEY, SCALES, given={"y": DATA})
    smooth = fits[1]["importance"]
    assert post.log_evidence == smooth.log_evidence
    theta = np.asarray(post.draws["theta"], float)
    expected = norm.logpdf(DATA, theta, SCALES).sum(-1)
    np.testing.assert_allclose(post.log_weights, expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(smooth.log_weights, expected, rtol=1e-4, atol=1e-4)
