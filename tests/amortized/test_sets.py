"""Encoders of sets: order, padding and size."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from abduce.amortized.networks import DeepSet, SetTransformer
from abduce.amortized.posterior_network import Settings
from abduce.errors import InvalidAlgorithm


def shaken(module, key):
    """New layers are the identity; other weights show what they see."""
    leaves, treedef = jax.tree.flatten(eqx.filter(module, eqx.is_inexact_array))
    keys = jax.random.split(key, len(leaves))
    moved = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return eqx.combine(jax.tree.unflatten(treedef, moved), module)


@pytest.mark.parametrize("make", [DeepSet, SetTransformer])
def test_a_set_has_no_order_and_no_padding_but_a_size(make):
    net = shaken(make(jax.random.key(0), 3, 5, 16, 2), jax.random.key(1))
    f = eqx.filter_jit(net)
    x = jax.random.normal(jax.random.key(2), (6, 3))
    whole = jnp.ones(6, bool)
    out = f(x, whole)
    np.testing.assert_allclose(f(x[::-1], whole), out, rtol=1e-4, atol=1e-5)
    some = jnp.array([True, True, False, True, False, True])
    kept = eqx.filter_jit(net)(x[some], jnp.ones(4, bool))
    padded = f(jnp.where(some[:, None], x, 1e3), some)
    np.testing.assert_allclose(padded, kept, rtol=1e-4, atol=1e-4)
    assert float(jnp.max(jnp.abs(out - kept))) > 1e-2
    twice = eqx.filter_jit(net)(jnp.concatenate([x, x]), jnp.ones(12, bool))
    assert float(jnp.max(jnp.abs(twice - out))) > 1e-2  # averages alone would not tell
    empty = f(x, jnp.zeros(6, bool))
    assert np.isfinite(empty).all()


def test_an_unknown_encoder_is_refused():
    with pytest.raises(InvalidAlgorithm, match="sets='lstm' is not 'pool' or 'transformer'"):
        Settings(sets="lstm")
