"""Gradients of both directions, and float32 far out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import CONTEXT_DIM, LAYERS, make

CHECKED = [*(n for n in LAYERS if n != "stack"), "lu"]


@jax.jit
def slopes(args, direction):
    """The derivative of a function of everything along a direction: by gradient, and by
    differences (of order 4)."""

    def value(args):
        flow, x, context = args
        (y, forward), (z, inverse) = flow.forward(x, context), flow.inverse(x, context)
        return jnp.array([1.0, -2.0, 0.5]) @ (y + 0.7 * z) + forward - 0.3 * inverse

    def along(t):
        return value(jax.tree.map(lambda a, d: a + t * d, args, direction))

    products = jax.tree.map(jnp.vdot, jax.grad(value)(args), direction)
    h = 1e-3
    a, b, c, d = jax.lax.map(along, h * jnp.array([-2.0, -1.0, 1.0, 2.0]))
    return sum(jax.tree.leaves(products)), (a - 8 * b + 8 * c - d) / (12 * h)


@pytest.mark.parametrize("name", CHECKED)
def test_gradients_are_those_of_finite_differences(name):
    has_context = name != "lu"
    flow = make(name, context_dim=CONTEXT_DIM if has_context else 0, scale=0.3)
    args = (flow, jnp.array([0.4, -0.9, 1.3]), jnp.array([0.3, -1.1]) if has_context else None)
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), args)
    gradient, difference = slopes(args, direction)
    assert float(gradient) == pytest.approx(float(difference), rel=1e-7, abs=1e-7)
    assert abs(gradient) > 0.1


@pytest.mark.parametrize("name", CHECKED)
def test_float32_stays_finite_far_out(name):
    def total(flow, x):
        values = (*flow.forward(x), *flow.inverse(x))
        return sum(jnp.sum(v) for v in values), values

    units = [[1, 1, 1], [1, -1, 0], [0, 0, 0], [0, 0, 1], [-0.4, 0.9, 0.1], [0.7, 0, -0.7]]
    with jax.enable_x64(False):
        flow = make(name)
        x = jnp.array(units, jnp.float32) * jnp.array([0.5, 3.0, 30.0, 1e3])[:, None, None]
        x = x.reshape(-1, 3).astype(jnp.float32)
        run = jax.jit(jax.vmap(jax.grad(total, (0, 1), has_aux=True), in_axes=(None, 0)))
        for leaf in jax.tree.leaves(run(flow, x)):
            assert leaf.dtype == jnp.float32
            assert np.isfinite(leaf).all()
