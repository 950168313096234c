"""Bijections as pytrees, as NumPyro transforms, at a context, and wrongly put together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import CASES, CONTEXT_DIM, LAYERS, RECIPES, WITH_CONTEXT, make

import abduce as ab
from abduce.inference.vi import flows

POINTS = np.random.default_rng(1).normal(size=(6, 3))


@pytest.mark.parametrize(
    "name", ["planar", "spline coupling", "masked autoregressive", "inverse autoregressive"]
)
def test_as_a_numpyro_transform_it_acts_on_the_last_axis(name):
    flow = make(name)
    x = POINTS.reshape(2, 3, 3)

    @jax.jit
    def run(x):
        y, log_det = flow.call_with_intermediates(x)
        given = flow.log_abs_det_jacobian(x, y, log_det)
        want = jax.vmap(jax.vmap(flow.forward))(x)
        return y, log_det, given, want, flow.log_abs_det_jacobian(x, y), flow(x), flow.inv(y)

    y, log_det, given, want, found, called, back = run(x)
    np.testing.assert_allclose(y, want[0], rtol=1e-12)
    np.testing.assert_allclose(log_det, want[1], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(given, log_det)
    np.testing.assert_array_equal(called, y)
    np.testing.assert_allclose(found, log_det, atol=1e-8)
    np.testing.assert_allclose(back, x, atol=1e-8)
    assert flow.inv.inv is flow or isinstance(flow, flows.Inverse)
    assert flow.forward_shape((5, 3)) == flow.inverse_shape((5, 3)) == (5, 3)


@pytest.mark.parametrize("name", [*LAYERS, "affine coupling"])
def test_the_context_matters_and_is_needed(name):
    flow = make(name, context_dim=CONTEXT_DIM)
    contexts = jnp.array([[0.3, -1.1], [-0.5, 0.8]])
    x = jnp.asarray(POINTS[0])
    y, log_det = jax.jit(lambda x: flow.condition(contexts).call_with_intermediates(x))(x)
    assert np.abs(y[0] - y[1]).max() > 1e-3
    assert abs(float(log_det[0] - log_det[1])) > 1e-5
    with pytest.raises(ab.InvalidValue, match=r"context of shape \(2,\), but none was given"):
        flow.forward(x)
    with pytest.raises(ab.InvalidValue, match=r"context of shape \(2,\), got \(3,\)"):
        flow.forward(x, jnp.zeros(3))
    with pytest.raises(ab.InvalidValue, match=r"Make it with context_dim=2"):
        make(name).forward(x, contexts[0])


def test_contexts_in_a_batch_broadcast_against_values():
    flow = make("affine coupling layer", context_dim=CONTEXT_DIM)
    contexts = jnp.asarray(np.random.default_rng(5).normal(size=(4, 1, CONTEXT_DIM)))
    y, log_det = flow.condition(contexts).call_with_intermediates(POINTS)
    assert y.shape == (4, 6, 3)
    assert log_det.shape == (4, 6)
    want, want_log_det = flow.forward(POINTS[3], contexts[2, 0])
    fixed, fixed_log_det = flow.condition(contexts[2, 0]).forward(POINTS[3])
    for a, b in ((y[2, 3], log_det[2, 3]), (fixed, fixed_log_det)):
        np.testing.assert_allclose(a, want, rtol=1e-12)
        np.testing.assert_allclose(b, want_log_det, rtol=1e-12)
    back = flow.condition(contexts).inv(y)
    np.testing.assert_allclose(back, np.broadcast_to(POINTS, y.shape), atol=1e-8)
    with pytest.raises(ab.InvalidValue, match="do not broadcast"):
        flow.condition(contexts)(POINTS.reshape(2, 3, 3))
    with pytest.raises(ab.InvalidValue, match=r"is a batch of \(4, 1\)"):
        flow.condition(contexts).forward(POINTS[0])


@pytest.mark.parametrize("name", CASES)
def test_every_leaf_is_a_parameter_and_the_rest_is_hashable(name):
    settings = {"context_dim": CONTEXT_DIM} if name in WITH_CONTEXT else {}
    flow, other = (
        jax.eval_shape(lambda k: CASES[name](k, 3, **settings), jax.random.key(i)) for i in (0, 1)
    )
    assert all(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(flow))
    assert jax.tree.structure(flow) == jax.tree.structure(other)
    assert hash(jax.tree.structure(flow)) == hash(jax.tree.structure(other))


@pytest.mark.parametrize("name", RECIPES)
def test_it_starts_near_the_identity(name):
    """A fresh flow of a standard normal is one, within 0.1 nats (its layers may permute)."""
    run = jax.jit(lambda k: jax.vmap(CASES[name](k, 3).forward)(POINTS))
    for seed in (3, 4):
        y, log_det = run(jax.random.key(seed))
        gap = 0.5 * (np.sum(y**2, -1) - np.sum(POINTS**2, -1)) - log_det
        assert np.abs(gap).max() < (1e-12 if "radial" in name else 0.1)


@pytest.mark.parametrize("name", ["planar", "maf"])
def test_an_ensemble_is_made_and_run_by_vmap(name):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jnp.array([0.3, -0.2])

    @jax.jit
    def run(keys):
        ensemble = jax.vmap(lambda k: CASES[name](k, 2))(keys)
        one_by_one = [CASES[name](keys[i], 2).forward(x)[0] for i in range(3)]
        return jax.vmap(lambda flow: flow.forward(x)[0])(ensemble), jnp.stack(one_by_one)

    together, alone = run(keys)
    assert len(set(np.asarray(together[:, 0]))) == 3
    np.testing.assert_allclose(together, alone, rtol=1e-10)


def test_wrong_parts_are_named():
    key = jax.random.key(0)
    lu, planar = flows.LU(key, 2), flows.Planar(key, 2)
    with pytest.raises(ab.InvalidValue, match=r"differ in dim: 0 LU 2, 1 LU 3"):
        flows.Chain([lu, flows.LU(key, 3)])
    with pytest.raises(ab.InvalidValue, match=r"differ in context_dim: .* 1 Coupling 3"):
        flows.Chain([flows.Coupling(key, 2, context_dim=n) for n in (2, 3)])
    with pytest.raises(ab.InvalidValue, match=r"part 1 is .*support="):
        flows.Chain([lu, ab.dist.transforms.ExpTransform()])
    with pytest.raises(ab.InvalidValue, match="at least one"):
        flows.Chain([])
    with pytest.raises(ab.InvalidValue, match=r"got \['LU', 'Planar'\].*flows.Chain"):
        flows.Stack([lu, planar])
    with pytest.raises(ab.InvalidValue, match="at least one"):
        flows.Stack([])
    with pytest.raises(ab.InvalidValue, match="common leading axis"):
        flows.Stack(lu)
    with pytest.raises(ab.InvalidValue, match=r"takes one vector of shape \(2,\), got \(5, 2\)"):
        lu.forward(jnp.zeros((5, 2)))
    with pytest.raises(ab.InvalidValue, match=r"vectors of length 2.*got shape \(5, 3\)"):
        lu(jnp.zeros((5, 3)))
    with pytest.raises(ab.InvalidValue, match=r"takes no context"):
        lu.condition(jnp.zeros(3))
    with pytest.raises(ab.InvalidValue, match=r"each occurs once, got \(0, 2\)"):
        flows.Permutation([0, 2])
    with pytest.raises(ab.InvalidValue, match=r"order has 3 entries, but dim is 2"):
        flows.LU(key, 2, order=[0, 2, 1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda k: flows.planar(k, 0), r"dim must be a whole number >= 1, got 0"),
        (lambda k: flows.maf(k, 2, 0), r"flows.maf: num_layers must be a whole number >= 1"),
        (lambda k: flows.maf(k, 2, hidden=64), r"hidden must be a tuple of widths, got 64"),
        (lambda k: flows.maf(k, 2, hidden=()), r"at least one hidden layer"),
        (lambda k: flows.continuous(k, 2, hidden=()), r"at least one hidden layer"),
        (lambda k: flows.maf(k, 2, activation="sin"), r"unknown activation 'sin'; choose from"),
        (lambda k: flows.maf(k, 2, mixing="mix"), r"flows.maf: unknown mixing 'mix'"),
        (lambda k: flows.Affine(-1.0), r"max_log_scale must be a positive number, got -1.0"),
        (lambda k: flows.RationalQuadratic(num_bins=1), r"num_bins must be a whole number >= 2"),
        (lambda k: flows.RationalQuadratic(8, min_bin=0.2), r"below 1 / num_bins = 0.125"),
    ],
)
def test_wrong_settings_are_named(build, message):
    with pytest.raises(ab.InvalidValue, match=message):
        build(jax.random.key(0))


@pytest.mark.parametrize(
    "make", [*RECIPES, "planar layer", "radial layer", "lu", "masked autoregressive"]
)
def test_an_int_is_no_key(make):
    with pytest.raises(ab.MissingKey, match=r"got the int 7. Call flows\.\w+\(jax.random.key\(7\)"):
        CASES[make](7, 2)
