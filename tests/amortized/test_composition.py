"""Scores of single observations, added up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist
from abduce.amortized import composition
from abduce.amortized.dynamics import Score
from abduce.errors import InvalidAlgorithm, InvalidValue

SMALL = {"width": 32, "context_dim": 8, "depth": 1}


@ab.model
def normal(n):
    mu = ab.sample("mu", dist.Normal(0.0, 1.0))
    jax.vmap(lambda _: ab.sample("y", dist.Normal(mu, 1.0)))(jnp.arange(n))


def exact(y):
    return float(np.sum(y)) / (len(y) + 1), (len(y) + 1) ** -0.5


def test_exact_scores_compose_to_the_exact_posterior(monkeypatch):
    est = ab.npse(normal, 2, observed="y", sizes=(1, 2), compose=True, **SMALL)
    est = est.fit(jax.random.key(0), num_steps=1, progress_bar=False)
    centre, spread = (x[0] for x in est.scales["u"])

    def encode(layout, net, scales, example):
        return jnp.stack([jnp.sum(example["observed"]["y"] * example["mask"]),
                          jnp.sum(example["mask"])])  # fmt: skip

    def score(self, context, r, v):
        # Of N((mean - centre) / spread, (sd / spread)^2), blurred.
        total, n = context
        a, s, _ = self.noise(r)
        mean, var = total / (n + 1), 1 / (n + 1)
        return -(v - a * (mean - centre) / spread) / (a**2 * var / spread**2 + s**2)

    monkeypatch.setattr(composition, "encode", encode)
    monkeypatch.setattr(Score, "score", score)
    y = np.array([0.3, 2.0, 1.1, -0.4, 0.9, 1.6, 2.2])  # four blocks, the last of one element
    post = est.replace(num_samples=20_000)(normal).posterior(
        jax.random.key(1), len(y), given={"y": y}
    )
    mean, sd = exact(y)
    # Standard errors are 0.0025 and 0.0018 (four of them: 1e-4); the path of noise levels ends
    # at noise 0.01, and leaves a few per cent of what it does not follow.
    assert float(post["mu"].mean()) == pytest.approx(mean, abs=0.01 + 0.03 * sd)
    assert float(post["mu"].std()) == pytest.approx(sd, rel=0.05)


@pytest.mark.slow
def test_learned_scores_compose():
    est = ab.npse(normal, 2, observed="y", sizes=(1, 2), compose=True, width=64, context_dim=16)
    est = est.fit(jax.random.key(0), num_steps=4000, progress_bar=False)
    y = np.random.default_rng(1).normal(1.0, 1.0, size=10)
    post = est(normal).posterior(jax.random.key(1), 10, given={"y": y})
    mean, sd = exact(y)
    # Ten learned scores, each a little off.
    assert float(post["mu"].mean()) == pytest.approx(mean, abs=0.5 * sd)
    assert float(post["mu"].std()) == pytest.approx(sd, rel=0.25)
    assert "log_density" not in post.diagnostics


def test_messages():
    @ab.model
    def single():
        a = ab.sample("a", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Normal(a, 1.0))

    with pytest.raises(InvalidAlgorithm, match="one exchangeable set"):
        ab.npse(single, observed="y", compose=True)
    est = ab.npse(normal, 2, observed="y", compose=True, **SMALL)
    est = est.fit(jax.random.key(0), num_steps=1, progress_bar=False)
    with pytest.raises(InvalidValue, match="no multiple of 2"):
        est(normal).posterior(jax.random.key(1), 5, given={"y": np.zeros(5)})
    hidden = ab.masked(np.zeros(4), observed=np.array([True, True, True, False]))
    with pytest.raises(InvalidValue, match="without hidden entries"):
        est(normal).posterior(jax.random.key(1), 4, given={"y": hidden})
