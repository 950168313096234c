"""What holds of every bijection: it has an inverse, and its log determinant is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import (
    CASES,
    CONTEXT_DIM,
    LAYERS,
    NEEDS_TWO,
    WITH_CONTEXT,
    make,
    random_like,
    tolerance,
)

import abduce as ab
from abduce.inference.vi import flows

N = 20


@jax.jit
def there_and_back(flow, x, context):
    """There and back from each row of `x`, from both ends, and the Jacobian of the first way."""

    def one(x):
        y, forward = flow.forward(x, context)
        jacobian = jax.jacfwd(lambda v: flow.forward(v, context)[0])(x)
        before, inverse = flow.inverse(x, context)
        return (y, forward, *flow.inverse(y, context)), jacobian, (
            before, inverse, *flow.forward(before, context)
        )  # fmt: skip

    return jax.vmap(one)(x)


@pytest.mark.parametrize("name", CASES)
def test_inverse_and_log_determinant(name):
    points = 2.0 * jax.random.normal(jax.random.key(1), (N, 3))
    context = jnp.array([0.3, -1.1]) if name in WITH_CONTEXT else None
    flow = make(name, context_dim=CONTEXT_DIM if context is not None else 0)
    (_, forward, back, inverse), jacobian, other_way = there_and_back(flow, points, context)

    atol = tolerance(name)
    np.testing.assert_allclose(back, points, atol=atol)
    np.testing.assert_allclose(forward, np.linalg.slogdet(jacobian)[1], atol=atol)
    np.testing.assert_allclose(forward + inverse, 0, atol=atol)
    _, inverse, again, forward = other_way
    np.testing.assert_allclose(again, points, atol=atol)
    np.testing.assert_allclose(forward + inverse, 0, atol=atol)
    assert name == "permutation" or np.abs(forward).max() > 0.02  # there is something to see


@pytest.mark.parametrize("name", [*sorted(set(LAYERS) - NEEDS_TWO), "lu"])
def test_one_dimension(name):
    flow = make(name, dim=1)
    (_, forward, back, _), jacobian, _ = there_and_back(flow, jnp.array([[0.7], [-1.3]]), None)
    np.testing.assert_allclose(forward, np.log(np.abs(jacobian[:, 0, 0])), atol=tolerance(name))
    np.testing.assert_allclose(back, [[0.7], [-1.3]], atol=tolerance(name))


@pytest.mark.parametrize("name", sorted(NEEDS_TWO))
def test_coupling_needs_two_dimensions(name):
    with pytest.raises(ab.InvalidValue, match=r"needs dim >= 2, got 1.*spline_autoregressive"):
        CASES[name](jax.random.key(0), 1)


def test_a_stack_is_the_chain_of_its_layers():
    points = jax.random.normal(jax.random.key(1), (N, 3))
    layers = [random_like(flows.Planar(jax.random.key(0), 3), seed) for seed in range(4)]
    by_scan = there_and_back(flows.Stack(layers), points, None)
    by_loop = there_and_back(flows.Chain(layers), points, None)
    for a, b in zip(jax.tree.leaves(by_scan), jax.tree.leaves(by_loop), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_a_mapped_constructor_makes_the_same_stack():
    keys = jax.random.split(jax.random.key(0), 3)
    mapped = flows.Stack(jax.vmap(lambda k: flows.LU(k, 3))(keys))
    listed = flows.Stack([flows.LU(k, 3) for k in keys])
    assert mapped.num_layers == listed.num_layers == 3
    for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(listed), strict=True):
        np.testing.assert_array_equal(a, b)
