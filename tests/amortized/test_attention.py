"""Attention against a naive softmax, masks, and layers that see the context alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import abduce as ab
from abduce.amortized.attention import ContextBlock, Dense, LayerNorm, attend, fold, stack


def naive(q, k, v, mask=None):
    """Float64 softmax attention of one head, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        weights = np.exp(k @ q[i] / np.sqrt(q.shape[1]))
        if mask is not None:
            weights = weights * np.broadcast_to(mask, (len(q), len(k)))[i]
        if weights.sum() > 0:
            out[i] = weights @ v / weights.sum()
    return out


def arrays(key, m=5, n=7, d=4, e=3):
    shapes = ((m, d), (n, d), (n, e))
    return [jax.random.normal(k, s) for k, s in zip(jax.random.split(key, 3), shapes, strict=True)]


@pytest.mark.parametrize("m, n", [(1, 1), (5, 7), (3, 64)])
def test_attention_is_a_weighted_mean(key, m, n):
    q, k, v = arrays(key, m, n)
    np.testing.assert_allclose(attend(q, k, v), naive(q, k, v), atol=1e-6)


def test_a_mask_hides_keys_and_a_query_without_keys_gives_zero(key):
    q, k, v = arrays(key)
    mask = np.arange(7) < 3
    np.testing.assert_allclose(attend(q, k, v, jnp.asarray(mask)), naive(q, k, v, mask), atol=1e-6)
    each = np.arange(35).reshape(5, 7) % 3 == 0
    each[2] = False
    np.testing.assert_allclose(attend(q, k, v, jnp.asarray(each)), naive(q, k, v, each), atol=1e-6)
    gradient = jax.grad(lambda q: jnp.sum(attend(q, k, v, jnp.asarray(each)) ** 2))(q)
    assert np.isfinite(gradient).all() and not np.asarray(gradient[2]).any()


def test_hidden_keys_have_no_influence_whatever_they_hold(key):
    q, k, v = arrays(key)
    mask = jnp.arange(7) < 3
    other = attend(q, k.at[3:].set(1e30), v.at[3:].set(-5.0), mask)
    np.testing.assert_array_equal(attend(q, k, v, mask), other)


def test_large_scores_do_not_overflow(key):
    q, k, v = arrays(key)
    out = attend(100 * q, 100 * k, v)
    best = jnp.argmax(q @ k.T, axis=1)
    np.testing.assert_allclose(out, v[best], atol=1e-5)


def test_heads_and_batches_are_leading_axes(key):
    q, k, v = (jnp.stack([x, 2 * x]) for x in arrays(key))
    np.testing.assert_allclose(attend(q, k, v)[1], attend(q[1], k[1], v[1]), atol=1e-6)
    np.testing.assert_allclose(jax.vmap(attend)(q, k, v), attend(q, k, v), atol=1e-6)


def test_gradients_in_float64(key, x64):
    q, k, v = (x.astype(jnp.float64) for x in arrays(key))
    check_grads(lambda *a: attend(*a, jnp.arange(7) != 2), (q, k, v), 1, ["rev"])


def test_bfloat16_sums_are_wide(key):
    n = 4096
    v = jnp.ones((n, 1), jnp.bfloat16)
    q = jnp.zeros((1, 4), jnp.bfloat16)
    out = attend(q, jnp.zeros((n, 4), jnp.bfloat16), v)
    assert out.dtype == jnp.bfloat16 and float(out[0, 0]) == 1.0


def test_shapes_that_do_not_fit_are_named(key):
    q, k, v = arrays(key)
    with pytest.raises(ab.InvalidValue, match=r"attend: q \(5, 4\), k \(7, 3\)"):
        attend(q, k[:, :3], v)
    with pytest.raises(ab.InvalidValue, match="mask must be boolean"):
        attend(q, k, v, jnp.ones(7))


def perturbed(tree, key):
    """All weights moved, so that parts that start at zero count."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    moved = [
        x + 0.3 * jax.random.normal(k, x.shape) if eqx.is_inexact_array(x) else x
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, moved)


def test_a_new_block_is_the_identity(key):
    block = ContextBlock(key, 8, 2, 16)
    x = jax.random.normal(key, (5, 8))
    np.testing.assert_array_equal(block(x, block.keys_values(x)), x)


def test_a_block_sees_the_context_as_a_set_and_no_other_token(key):
    block = perturbed(ContextBlock(key, 8, 2, 16), key)
    context = jax.random.normal(key, (6, 8))
    tokens = jax.random.normal(jax.random.fold_in(key, 1), (4, 8))
    out = block(tokens, block.keys_values(context))
    order = np.array([3, 1, 5, 0, 4, 2])
    np.testing.assert_allclose(out, block(tokens, block.keys_values(context[order])), atol=1e-5)
    slope = jax.jacobian(lambda t: block(t, block.keys_values(context)))(tokens)
    across = slope.sum((1, 3)) * (1 - np.eye(4))
    np.testing.assert_array_equal(across, np.zeros((4, 4)))
    assert (np.abs(np.asarray(out - tokens)) > 1e-3).any()


def test_an_empty_context_leaves_the_learned_key(key):
    block = perturbed(ContextBlock(key, 8, 2, 16), key)
    tokens = jax.random.normal(key, (4, 8))
    nothing = block(tokens, block.keys_values(jnp.zeros((0, 8))))
    hidden = block(tokens, block.keys_values(tokens), jnp.arange(5) == 4)
    np.testing.assert_allclose(nothing, hidden, atol=1e-6)


def test_folded_modules_are_the_modules_one_after_the_other(key):
    blocks = perturbed(stack(lambda k: ContextBlock(k, 8, 2, 16), key, 3), key)
    x = jax.random.normal(key, (5, 8))
    got, kept = fold(blocks, x, lambda b, x, y: (b(x, b.keys_values(x)), y), jnp.arange(3))
    for i in range(3):
        block = jax.tree.map(lambda a, i=i: a[i] if eqx.is_array(a) else a, blocks)
        x = block(x, block.keys_values(x))
    np.testing.assert_allclose(got, x, atol=1e-5)
    np.testing.assert_array_equal(kept, np.arange(3))


def test_depth_does_not_make_the_program_longer(key):
    def equations(num):
        blocks = stack(lambda k: ContextBlock(k, 8, 2, 16), key, num)

        def run(x):
            return fold(blocks, x, lambda b, x, _: (b(x, b.keys_values(x)), None))[0]

        return len(str(jax.make_jaxpr(run)(jnp.zeros((5, 8)))).splitlines())

    assert equations(2) == equations(12)


def test_layer_norm_and_dense(key):
    x = 3 + 2 * jax.random.normal(key, (6, 32))
    y = np.asarray(LayerNorm(32)(x), np.float64)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(-1), 1, atol=1e-4)
    dense = perturbed(Dense(key, 32, 4), key)
    np.testing.assert_allclose(dense(x), x @ dense.weight + dense.bias, atol=1e-5)
    assert dense(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_width_has_to_be_divisible(key):
    with pytest.raises(ab.InvalidAlgorithm, match="width 10 is not divisible by num_heads 4"):
        ContextBlock(key, 10, 4, 20)
