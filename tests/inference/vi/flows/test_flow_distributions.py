"""Flows as distributions: densities, supports, contexts, and sites of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import CONTEXT_DIM, RECIPES, make

import abduce as ab
import abduce.dist as dist
from abduce.inference.vi import flows

NORMAL = dist.Normal(0.0, 1.0).expand([2]).to_event(1)


@pytest.mark.parametrize("name", RECIPES)
def test_density_integrates_to_one(name):
    d = flows.distribution(make(name, dim=2, scale=0.3))
    has_kinks = "spline" in name  # at knots
    draws = np.asarray(jax.jit(lambda k: d.sample(k, (4000,)))(jax.random.key(0)))
    low, high = draws.min(0) - 3.0, draws.max(0) + 3.0
    n = 500 if has_kinks else 200
    a, b = (low[i] + (np.arange(n) + 0.5) / n * (high[i] - low[i]) for i in (0, 1))
    grid = np.stack(np.meshgrid(a, b, indexing="ij"), -1).reshape(-1, 2)
    density = np.exp(jax.jit(lambda x: d.log_prob(x))(grid))
    total = density.sum() * np.prod((high - low) / n)
    assert total == pytest.approx(1, abs=1e-3 if has_kinks else 1e-5)


@pytest.mark.parametrize("name", ["planar", "iaf", "spline coupling", "continuous"])
def test_draws_are_scored_on_the_way_forward(name):
    flow = make(name, dim=2)
    d = flows.distribution(flow)

    @jax.jit
    def run(key):
        x, log_prob = d.sample_and_log_prob(key, (3, 2))
        plain = dist.TransformedDistribution(NORMAL, [flow])
        return x, log_prob, d.log_prob(x), plain.log_prob(x), d.sample(key, (3, 2))

    x, log_prob, by_inverse, plain, draws = run(jax.random.key(1))
    assert x.shape == (3, 2, 2) and log_prob.shape == (3, 2)
    tolerance = 2e-5 if name == "continuous" else 1e-8
    np.testing.assert_allclose(log_prob, by_inverse, atol=tolerance)
    np.testing.assert_allclose(log_prob, plain, atol=tolerance)
    np.testing.assert_array_equal(draws, x)


SUPPORTS = {
    "positive": (dist.constraints.positive, 3),
    "interval": (dist.constraints.interval(-1.0, 4.0), 3),
    "simplex": (dist.constraints.simplex, 4),
    "ordered": (dist.constraints.ordered_vector, 3),
    "real": (dist.constraints.real, 3),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_supports(name):
    """The density of `g(flow(x))`, by the Jacobian of the whole map from autodiff."""
    support, size = SUPPORTS[name]
    flow = make("affine coupling layer", scale=0.3)
    d, onto = flows.distribution(flow, support=support), dist.biject_to(support)
    normal = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    plain = dist.TransformedDistribution(normal, [flow, onto])
    assert d.event_shape == plain.event_shape == (size,)

    def whole(x):
        return onto(flow.forward(x)[0])[:3]  # three numbers determine a point of the simplex

    @jax.jit
    def run(x, key):
        value = onto(flow.forward(x)[0])
        want = normal.log_prob(x) - jnp.linalg.slogdet(jax.jacfwd(whole)(x))[1]
        draws, log_prob = d.sample_and_log_prob(key, (5,))
        return (
            (d.log_prob(value), want),
            draws,
            (log_prob, d.log_prob(draws), plain.log_prob(draws)),
        )

    (found, want), draws, scores = run(jnp.array([0.3, -0.8, 0.5]), jax.random.key(0))
    assert float(found) == pytest.approx(float(want), abs=1e-8)
    assert np.asarray(d.support(draws)).all()
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-8)
    np.testing.assert_allclose(scores[2], scores[0], atol=1e-8)


def test_contexts_and_bases_make_batches():
    flow = make("maf", context_dim=CONTEXT_DIM)
    contexts = jnp.asarray(np.random.default_rng(0).normal(size=(4, CONTEXT_DIM)))
    base = dist.StudentT(5.0, jnp.zeros(3), 2.0)  # a batch of scalars, taken as one vector
    d = flows.distribution(flow, base, context=contexts)
    assert d.batch_shape == (4,) and d.event_shape == (3,)

    @jax.jit
    def run(key):
        x, log_prob = d.sample_and_log_prob(key, (6,))
        z, log_det = jax.vmap(flow.inverse)(x[5], contexts)
        alone = flows.distribution(flow, base, context=contexts[2])
        want = base.log_prob(z).sum(-1) + log_det
        return x, log_prob, d.log_prob(x), want, alone.log_prob(x[5, 2])

    x, log_prob, by_inverse, want, alone = run(jax.random.key(0))
    assert x.shape == (6, 4, 3) and log_prob.shape == (6, 4)
    np.testing.assert_allclose(by_inverse, log_prob, atol=1e-8)
    np.testing.assert_allclose(log_prob[5], want, atol=1e-8)
    assert float(alone) == pytest.approx(float(want[2]), abs=1e-8)


@pytest.fixture(scope="module")
def coupling():
    return make("affine coupling layer", dim=2)


@ab.model
def program(flow, shift):
    z = ab.sample("z", flows.distribution(flow))

    def one(s):
        base = dist.Normal(jnp.array([s, 0.0]), 1.0)
        return ab.sample("w", flows.distribution(flow, base))

    jax.vmap(one, axis_name="i")(shift)

    def step(carry, s):
        value = ab.sample("v", flows.distribution(flow, dist.Normal(carry + s, 1.0)))
        return value, None

    jax.lax.scan(step, z, shift)
    ab.sample("p", flows.distribution(flow, support=dist.constraints.positive))


def by_hand(flow, shift, c):
    def log_prob(x, loc):
        z, log_det = flow.inverse(x)
        return dist.Normal(loc, 1.0).log_prob(z).sum() + log_det

    total = log_prob(c["z"], 0.0)
    total += sum(log_prob(c["w"][i], jnp.array([s, 0.0])) for i, s in enumerate(shift))
    before = [c["z"], *c["v"][:-1]]
    total += sum(log_prob(c["v"][i], before[i] + s) for i, s in enumerate(shift))
    return total + log_prob(jnp.log(c["p"]), 0.0) - jnp.log(c["p"]).sum()


def test_as_a_site_of_a_model(coupling):
    """Under `vmap`, in a `scan`, on a constrained support; density and gradients by hand."""
    shift = jnp.array([0.5, -1.0, 2.0])
    trace = program.simulate(jax.random.key(0), coupling, shift)
    shapes = {a: x.shape for a, x in trace.choices.items()}
    assert shapes == {"z": (2,), "w": (3, 2), "v": (3, 2), "p": (2,)}
    want, gradient = jax.jit(jax.value_and_grad(by_hand, (0, 2)))(coupling, shift, trace.choices)
    assert float(trace.log_density) == pytest.approx(float(want), abs=1e-8)
    found, of_model = jax.jit(
        jax.value_and_grad(lambda flow, c: program.log_density(c, flow, shift), (0, 1))
    )(coupling, trace.choices)
    assert float(found) == pytest.approx(float(want), abs=1e-8)
    for a, b in zip(jax.tree.leaves(of_model), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


def test_draws_of_a_site_follow_the_flow(coupling):
    """A site's draws are the flow of normal numbers: undone, they pass a test of normality.

    False alarms: mean and mean square of 8000 numbers, 4.9 standard errors, 2e-6 in all.
    """

    @ab.model
    def one():
        ab.sample("z", flows.distribution(coupling))

    keys = jax.random.split(jax.random.key(5), 4000)
    draws = jax.vmap(lambda k: one.simulate(k).choices["z"])(keys)
    x = np.asarray(jax.vmap(lambda z: coupling.inverse(z)[0])(draws)).ravel()
    assert abs(x.mean()) < 4.9 / np.sqrt(x.size)
    assert abs((x**2).mean() - 1) < 4.9 * np.sqrt(2 / x.size)


def test_parameters_of_a_flow_are_learnable_in_a_model(coupling):
    @ab.model
    def guide():
        ab.sample("z", flows.distribution(ab.param("flow", coupling)))

    c = {"z": jnp.array([0.3, 0.4])}
    assert float(guide.log_density(c)) == pytest.approx(
        float(flows.distribution(coupling).log_prob(c["z"])), abs=1e-10
    )


def test_as_coordinates_of_a_site():
    """`ab.reparam` accepts a flow as coordinates and leaves the joint density alone."""
    flow = make("affine coupling, permuted", dim=2, scale=0.3)

    @ab.model
    def m():
        ab.sample("z", dist.Normal(0.0, 2.0).expand([2]).to_event(1))

    moved = ab.reparam(m, {"z": flow})
    c = {"z": jnp.array([0.3, -0.4])}
    assert float(moved.log_density(c)) == float(m.log_density(c))


def test_wrong_settings_are_named():
    flow = make("maf")
    with pytest.raises(ab.InvalidValue, match=r"takes a bijection, got Normal"):
        flows.distribution(dist.Normal(0, 1))
    with pytest.raises(ab.InvalidValue, match=r"length 3, but the base has batch shape \(2,\)"):
        flows.distribution(flow, dist.Normal(jnp.zeros(2), 1.0))
    with pytest.raises(ab.InvalidValue, match=r"takes no context"):
        flows.distribution(flow, context=jnp.zeros(2))
    with pytest.raises(ab.InvalidValue, match=r"depends on a context of shape \(2,\)"):
        flows.distribution(make("maf", context_dim=2))
    with pytest.raises(ab.InvalidValue, match="no bijection from the real numbers onto"):
        flows.distribution(flow, support=dist.constraints.boolean)
