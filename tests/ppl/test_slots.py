"""Transformations keep what the carry and the inputs of a scan are called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist


def body_of(scale):
    """A step with structured carry and inputs."""

    def step(state, inputs):
        level, extra = state["level"], state["extra"]
        level = ab.sample("level", dist.Normal(level, scale))
        ab.sample("y", dist.Normal(level + extra[0] + inputs.real, 1.0))
        return {"level": level, "extra": (extra[0] + 1.0, extra[1])}, None

    return step


@ab.model
def walk(xs):
    scale = ab.sample("scale", dist.LogNormal(0.0, 1.0))
    start = {"level": 0.5, "extra": (1.0, jnp.zeros(2))}
    jax.lax.scan(body_of(scale), start, xs)


@ab.model
def fixed(xs):
    start = {"level": 0.5, "extra": (1.0, jnp.zeros(2))}
    jax.lax.scan(body_of(0.7), start, xs)


@ab.model
def step_proposal(given, state, inputs):
    assert sorted(state) == ["extra", "level"] and state["extra"][1].shape == (2,)
    centre = 0.5 * (state["level"] + given["y"] - state["extra"][0] - inputs.real)
    ab.sample("level", dist.Normal(centre, 0.8))


XS = jnp.arange(5) + 0j
Y = np.array([0.3, 2.0, 2.5, 5.0, 6.5], np.float32)
FIXED = {
    "do": ab.do(walk, {"scale": 0.7}),
    "condition": ab.condition(walk, {"scale": 0.7}),
    "prior": ab.with_prior(walk, {"scale": dist.Delta(jnp.float32(0.7))}),
    "nested": ab.do(ab.reparam(walk, {"level": ab.noncentered()}), {"scale": 0.7}),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_proposal_finds_the_carry_of_a_transformed_model(name):
    alg = ab.smc(num_particles=32, proposal=step_proposal)
    key = jax.random.key(0)
    want = alg(fixed).posterior(key, XS, given={"y": Y}).log_evidence
    post = alg(FIXED[name]).posterior(key, XS, given={"y": Y})
    # Draws are keyed by address, so the runs are the same but for the density of the scale.
    extra = 0.0
    if name == "condition":
        extra = float(dist.LogNormal(0.0, 1.0).log_prob(0.7))
    assert float(post.log_evidence) == pytest.approx(float(want) + extra, abs=2e-5)
