"""Rounds for one observation: truncated priors, and posteriors that one round cannot reach."""

import jax
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist
from abduce.amortized.rounds import _truncated
from abduce.errors import Degenerate, InvalidAlgorithm
from abduce.inference.problem import make_problem

SMALL = {"width": 32, "context_dim": 16, "num_layers": 2}
CALM = {"num_steps": 1500, "learning_rate": 3e-3, "progress_bar": False}


@ab.model
def far():
    """The posterior is 60 times as narrow as the prior."""
    mu = ab.sample("mu", dist.Uniform(-50.0, 50.0))
    f = lambda key, m: m + 0.5 * jax.random.normal(key)  # noqa: E731
    ab.sample("y", dist.Simulator(f, mu))


@pytest.fixture(scope="module")
def rounds():
    est = ab.npe(far, observed="y", head="mixture", num_components=2, **SMALL)
    return est.fit_rounds(
        jax.random.key(0), given={"y": 13.0}, num_rounds=3, budget=900, settings=CALM
    )


def test_rounds_narrow_the_prior_and_find_the_posterior(rounds):
    share = rounds.history["prior_share"]
    assert share[0] == 1.0 and share[-1] < 0.3  # 8 posterior sd are 4% of the prior
    post = rounds(far).posterior(jax.random.key(1), given={"y": 13.0})
    # The exact posterior is N(13, 0.5^2).
    assert float(post["mu"].mean()) == pytest.approx(13.0, abs=0.25)
    assert float(post["mu"].std()) == pytest.approx(0.5, rel=0.3)


def test_truncated_draws_are_prior_draws_above_the_threshold(rounds):
    problem = make_problem(far, (), {"y": 13.0}, {}, None)
    low = -2.0
    values, share = _truncated(rounds, problem, jax.random.key(3), 500, low)
    mu = values["mu"]
    assert mu.shape == (500,)
    # The density over coordinates; those of a Uniform are logits of (mu + 50) / 100.
    p = (mu + 50) / 100
    log_q = jax.vmap(lambda m: rounds.log_density({"mu": m}, given={"y": 13.0}))(mu)
    log_q = np.asarray(log_q) + np.log(100 * p * (1 - p))
    assert log_q.min() > low - 1e-3
    # Where q exceeds the threshold, the uniform prior is flat: Kolmogorov's test, level 1e-4.
    z = np.sort((mu - mu.min()) / (mu.max() - mu.min()))
    assert np.abs(z - np.arange(500) / 499).max() < 2.23 / np.sqrt(500)
    assert share == pytest.approx((mu.max() - mu.min()) / 100, rel=0.2)


def test_messages():
    est = ab.npe(far, observed="y", head="mixture", **SMALL)
    with pytest.raises(InvalidAlgorithm, match="fewer than 20 simulations"):
        est.fit_rounds(jax.random.key(0), given={"y": 1.0}, num_rounds=10, budget=100)
    with pytest.raises(InvalidAlgorithm, match="tail must lie"):
        est.fit_rounds(jax.random.key(0), given={"y": 1.0}, tail=0.9)


def test_a_threshold_out_of_reach_is_said(rounds):
    problem = make_problem(far, (), {"y": 13.0}, {}, None)
    with pytest.raises(Degenerate, match="of 65536 prior draws 0 lie"):
        _truncated(rounds, problem, jax.random.key(3), 10, 1e6)
