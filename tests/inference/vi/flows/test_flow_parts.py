"""The parts of flows against closed forms: masks, splines, roots, matrices, the solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import random_like
from scipy.integrate import solve_ivp
from scipy.optimize import brentq

from abduce.inference.vi import flows
from abduce.inference.vi.flows.planar_radial import _planar_root

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("hidden", [(1,), (7, 3), (16, 16)])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_made_is_strictly_autoregressive(dim, hidden, context_dim):
    net = jax.eval_shape(
        lambda k: flows.MADE(k, dim, 3, hidden, context_dim, "tanh"), jax.random.key(0)
    )
    net = random_like(net, scale=1.0)
    x, context = jnp.asarray(RNG.normal(size=dim)), jnp.asarray(RNG.normal(size=context_dim))
    c = context if context_dim else None
    of_x = np.abs(jax.jacfwd(lambda x: net(x, c))(x)).max(1)
    assert (of_x[np.triu_indices(dim)] == 0).all()  # row i does not see inputs i, i + 1, ...
    if min(hidden) >= dim:  # wide enough for every degree: row i sees all of the inputs before
        assert (of_x[np.tril_indices(dim, -1)] > 0).all()
    if context_dim and hidden[0] >= 7:
        assert (np.abs(jax.jacfwd(lambda c: net(x, c))(context)).max((1, 2)) > 0).all()
    for i in range(dim):
        beyond = x.at[i:].set(jnp.nan_to_num(x[i:]) + 5.0)
        np.testing.assert_allclose(net.row(i, beyond, c), net(x, c)[i], rtol=1e-12)


SPLINE = flows.RationalQuadratic(num_bins=5, bound=2.0, min_bin=1e-2, min_derivative=1e-2)


@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0])
def test_spline_is_continuously_differentiable_and_increasing(scale):
    params = jnp.asarray(scale * RNG.normal(size=SPLINE.num_params))
    xs, ys, slopes = SPLINE._knots(params)
    assert np.diff(xs).min() >= 0.04 * 0.999 and np.diff(ys).min() >= 0.04 * 0.999
    slope = jax.jit(jax.vmap(jax.grad(lambda x: SPLINE.forward(x, params)[0])))
    inverse_slope = jax.jit(jax.vmap(jax.grad(lambda y: SPLINE.inverse(y, params)[0])))
    forward = jax.jit(jax.vmap(lambda x: SPLINE.forward(x, params)))
    inverse = jax.jit(jax.vmap(lambda y: SPLINE.inverse(y, params)))
    for side in (-1e-13, 0.0, 1e-13):
        y, log_det = forward(xs + side)
        np.testing.assert_allclose(y, ys, atol=1e-5)
        np.testing.assert_allclose(jnp.exp(log_det), slopes, rtol=1e-5)
        np.testing.assert_allclose(slope(xs + side), slopes, rtol=1e-5)
        back, back_log_det = inverse(ys + side)
        np.testing.assert_allclose(back, xs, atol=1e-5)
        np.testing.assert_allclose(jnp.exp(back_log_det), 1 / slopes, rtol=1e-5)
        np.testing.assert_allclose(inverse_slope(ys + side), 1 / slopes, rtol=1e-5)
    line = jnp.linspace(-3, 3, 2001)
    y, log_det = forward(line)
    assert (np.diff(y) > 0).all()
    np.testing.assert_allclose(jnp.exp(log_det), slope(line), rtol=1e-9)
    is_outside = np.abs(line) >= 2
    np.testing.assert_array_equal(y[is_outside], line[is_outside])
    np.testing.assert_array_equal(log_det[is_outside], 0)


def test_spline_at_zero_parameters_is_the_identity():
    x = jnp.linspace(-3, 3, 101)
    y, log_det = SPLINE.forward(x, jnp.zeros((101, SPLINE.num_params)))
    np.testing.assert_allclose(y, x, atol=1e-14)
    np.testing.assert_allclose(log_det, 0, atol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 10.0, 1e3])
def test_spline_inverts_in_float32(scale):
    spline = flows.RationalQuadratic(num_bins=16, bound=5.0)
    with jax.enable_x64(False):
        params = jnp.asarray(scale * RNG.normal(size=(400, spline.num_params)), jnp.float32)
        x = jnp.asarray(RNG.uniform(-5.2, 5.2, size=400), jnp.float32)
        y, log_det = spline.forward(x, params)
        back, inverse = spline.inverse(y, params)
        for v in (y, log_det, back, inverse):
            assert np.isfinite(v).all()
        # `y` is rounded to 4e-7; the way back stretches that by the inverse slope
        error = np.abs(back - x) / np.maximum(1, np.exp(-np.asarray(log_det)))
        assert error.max() < 1e-5


@pytest.mark.parametrize("slope", [1e-12, 1e-3, 0.5, 1.0, 1.7, 50.0, 1e4])
def test_planar_root_solves_its_equation(slope):
    targets = np.concatenate([-np.geomspace(1e-9, 1e3, 25), [0.0], np.geomspace(1e-9, 1e3, 25)])
    roots = jax.vmap(_planar_root, in_axes=(0, None))(jnp.asarray(targets), slope)
    for t, s in zip(targets, roots, strict=True):
        want = brentq(
            lambda s, t=t: s + (slope - 1) * np.tanh(s) - t, -2e4, 2e4, xtol=1e-300, maxiter=1000
        )
        conditioning = 1 / (np.tanh(s) ** 2 + slope / np.cosh(min(abs(s), 300.0)) ** 2)
        assert float(s) == pytest.approx(want, abs=1e-13 * (1 + abs(t)) * conditioning, rel=1e-7)


def test_planar_root_has_derivatives_of_any_order():
    """Against those of the inverse function: s' = 1/f', s'' = -f''/f'^3."""
    target, slope = 0.6, 0.2

    def f(s, slope):
        return s + (slope - 1) * jnp.tanh(s)

    s = _planar_root(target, slope)
    d1, d2 = jax.grad(f)(s, slope), jax.grad(jax.grad(f))(s, slope)
    assert float(jax.grad(_planar_root)(target, slope)) == pytest.approx(float(1 / d1), rel=1e-12)
    second = jax.grad(jax.grad(_planar_root))(target, slope)
    assert float(second) == pytest.approx(float(-d2 / d1**3), rel=1e-10)
    of_slope = jax.grad(_planar_root, 1)(target, slope)
    assert float(of_slope) == pytest.approx(float(-jnp.tanh(s) / d1), rel=1e-12)


def test_planar_at_the_edge_of_invertibility():
    """`w.u` far below -1: the constraint makes it just above, and float32 stays finite."""
    with jax.enable_x64(False):
        layer = flows.Planar(jax.random.key(0), 2)
        values = jnp.array([-200.0, 0.0, 1.0, 0.0, 0.0])
        layer = jax.tree.unflatten(jax.tree.structure(layer), [values])
        x = jnp.array([[0.0, 0.0], [0.3, -1.0], [1e3, 1.0]])
        y, log_det = jax.vmap(layer.forward)(x)
        back, inverse = jax.jit(jax.vmap(layer.inverse))(y)
        for v in (y, log_det, back, inverse):
            assert np.isfinite(v).all()
        assert (np.abs(back - x).max(1) < 1e-3 * (1 + np.abs(x).max(1))).all()
        assert float(log_det[0]) < -50


def test_radial_at_its_center():
    layer = flows.Radial(jax.random.key(0), 3)
    values = jnp.array([0.5, -1.0, 2.0, 0.3, 1.5])
    layer = jax.tree.unflatten(jax.tree.structure(layer), [values])
    center = values[:3]
    alpha, total = jax.nn.softplus(values[3]), jax.nn.softplus(values[4])
    for way, factor in ((layer.forward, total / alpha), (layer.inverse, alpha / total)):
        moved, log_det = way(center)
        np.testing.assert_allclose(moved, center, atol=1e-15)
        assert float(log_det) == pytest.approx(float(3 * jnp.log(factor)), rel=1e-12)
        jacobian = jax.jacrev(lambda x, way=way: way(x)[0])(center)
        np.testing.assert_allclose(jacobian, factor * np.eye(3), rtol=1e-12)
        assert np.isfinite(jax.grad(lambda x, way=way: way(x)[1])(center)).all()


def test_lu_is_the_product_of_its_factors():
    layer = random_like(flows.LU(jax.random.key(0), 4, order=[2, 0, 3, 1]))
    lower, upper = np.eye(4), np.diag(np.exp(layer.log_diagonal))
    lower[np.tril_indices(4, -1)] = layer.lower
    upper[np.triu_indices(4, 1)] = layer.upper
    matrix = np.eye(4)[[2, 0, 3, 1]] @ lower @ upper
    x = RNG.normal(size=4)
    y, log_det = layer.forward(x)
    np.testing.assert_allclose(y, matrix @ x + layer.shift, rtol=1e-12)
    assert float(log_det) == pytest.approx(np.linalg.slogdet(matrix)[1], rel=1e-12)


def test_permutation():
    layer = flows.Permutation([2, 0, 1])
    np.testing.assert_array_equal(layer.forward(jnp.array([10.0, 20.0, 30.0]))[0], [30, 10, 20])
    np.testing.assert_array_equal(layer.inverse(jnp.array([30.0, 10.0, 20.0]))[0], [10, 20, 30])
    assert flows.Permutation.reverse(3).order == (2, 1, 0)
    assert flows.Permutation.shuffled(9, seed=1) == flows.Permutation.shuffled(9, seed=1)
    assert flows.Permutation.shuffled(9, seed=1) != flows.Permutation.shuffled(9, seed=2)


@pytest.fixture(scope="module")
def field():
    key = jax.random.key(0)
    made = jax.eval_shape(lambda k: flows.Continuous(k, 2, hidden=(5, 4), context_dim=1), key)
    return random_like(made, seed=1, scale=1.5)


def with_steps(flow, num_steps):
    leaves = jax.tree.leaves(flow)
    other = jax.eval_shape(
        lambda k: flows.Continuous(
            k, 2, hidden=(5, 4), context_dim=1, num_steps=num_steps
        ), jax.random.key(0),
    )  # fmt: skip
    return jax.tree.unflatten(jax.tree.structure(other), leaves)


def test_divergence_is_the_trace_of_the_jacobian(field):
    z, c = jnp.array([0.3, -1.2]), jnp.array([0.7])
    _, divergence = field._velocity(z, jnp.array(0.4), c)
    jacobian = jax.jacfwd(lambda z: field._velocity(z, jnp.array(0.4), c)[0])(z)
    assert float(divergence) == pytest.approx(float(jnp.trace(jacobian)), rel=1e-12)
    assert abs(divergence) > 0.1


def test_solver_converges_to_the_solution_with_order_four(field):
    x, c = jnp.array([0.3, -1.2]), jnp.array([0.7])
    velocity = jax.jit(lambda t, z: field._velocity(z, t, c))

    def slope(t, state):
        v, divergence = velocity(jnp.asarray(t), jnp.asarray(state[:2]))
        return [*v, divergence]

    exact = solve_ivp(slope, (0, 1), [*x, 0.0], method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]

    def error(num_steps):
        y, log_det = with_steps(field, num_steps).forward(x, c)
        return np.abs(np.append(y, log_det) - exact).max()

    coarse, fine = error(10), error(20)
    assert 10 < coarse / fine < 24  # 16 in the limit
    assert error(80) < 1e-7
    value, log_det = with_steps(field, 20).step_error(x, c)
    assert max(float(value), float(log_det)) == pytest.approx(fine, rel=0.5)
