"""Paths in a pruned tree: the same as whole paths, bit by bit, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from state_space import Y, optimal, predictive, walk

import abduce as ab
import abduce.dist as dist
from abduce.inference.smc.tree import Tree, default_capacity

KEY = jax.random.key(15)


def genealogy(seed=0, steps=40, n=7):
    """Ancestors of each step, with steps at which nothing is resampled."""
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.integers(n, size=(steps, n)), axis=1)
    return np.where(rng.random(steps)[:, None] < 0.4, np.arange(n), drawn).astype(np.int32)


def traced(ancestors):
    """Per step, the particle that each last one descends from; and the most nodes ever alive."""
    steps, n = ancestors.shape
    most = 0
    for end in range(steps):
        index, alive, paths = np.arange(n), 0, []
        for t in range(end, -1, -1):
            paths.insert(0, index)
            alive += len(np.unique(index))
            index = ancestors[t][index]
        most = max(most, alive)
    return np.array(paths), most


def grown(ancestors, capacity):
    steps, n = ancestors.shape
    values = (jnp.arange(steps)[:, None] * n + jnp.arange(n)).astype(jnp.int32)

    def step(tree, x):
        return tree.grow(*x), None

    start = Tree.start({"v": jnp.zeros(n, jnp.int32)}, n, capacity)
    return jax.lax.scan(step, start, (jnp.asarray(ancestors), {"v": values}))[0]


@pytest.mark.parametrize("n", [1, 7, 40])  # 40: the narrower loops as well
@pytest.mark.parametrize("seed", range(2))
def test_it_holds_what_particles_descend_from_and_nothing_else(seed, n):
    ancestors = genealogy(seed, n=n)
    index, most = traced(ancestors)
    tree = grown(ancestors, most)
    assert not tree.lost and tree.peak == most
    paths = tree.paths(len(ancestors), reverse=False)["v"]
    np.testing.assert_array_equal(paths, index + n * np.arange(len(ancestors))[:, None])
    places = np.sort(np.append(np.asarray(tree.free)[: tree.num_free], np.flatnonzero(tree.counts)))
    np.testing.assert_array_equal(places, np.arange(most))  # free or referred to, never both
    if n > 1:
        assert grown(ancestors, most - 1).lost


@ab.model
def varied(n):
    """Something of each kind: before and after the scan, a branch, several types and shapes."""
    x0 = ab.sample("x0", dist.Normal(0.0, 1.0).expand([2]))

    def step(carry, _):
        x, k = carry
        x = ab.sample("x", dist.Normal(0.8 * x, 0.5))
        k = ab.sample("k", dist.Categorical(logits=jnp.array([0.3, 0.1]) * k))
        jump = jax.lax.cond(
            k > 0, lambda: ab.sample("jump", dist.Normal(0.0, 0.3)), lambda: jnp.zeros(())
        )
        ab.deterministic("sum", x.sum() + jump)
        ab.sample("y", dist.Normal(x.sum() + jump, 0.3))
        return (x, k), x[0]

    (_, k), firsts = jax.lax.scan(step, (x0, 0), None, length=n, reverse=True)
    ab.deterministic("range", firsts.max() - firsts.min())
    ab.sample("after", dist.Normal(firsts[-1], 1.0 + k))


@ab.model
def nested(n):
    def step(x, _):
        def inner(x, _):
            x = ab.sample("x", dist.Normal(x, 0.5))
            ab.sample("y", dist.Normal(x, 0.4))
            return x, None

        x, _ = jax.lax.scan(inner, x, None, length=2)
        return ab.sample("z", dist.Normal(x, 0.1)), None

    jax.lax.scan(step, 0.0, None, length=n)


CASES = {
    "adaptive": (walk, Y, {}),
    "every step": (walk, Y, {"threshold": 1.0, "resampler": "multinomial"}),
    "never": (walk, Y, {"threshold": 0.0}),
    "guided": (walk, Y, {"proposal": optimal, "lookahead": predictive}),
    "moves": (walk, Y, {"kernel": ab.mh(), "threshold": 0.9}),
    "masked": (walk, ab.masked(Y, observed=np.arange(8) % 3 > 0), {}),
    "varied": (varied, Y, {"threshold": 0.8}),
    "nested": (nested, np.stack([Y, Y[::-1]], 1), {"threshold": 0.8}),
}


SLOW = {"adaptive", "every step", "guided", "masked"}


@pytest.mark.parametrize(
    "name", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES]
)
def test_paths_are_the_same_bit_by_bit(name):
    m, y, settings = CASES[name]
    alg = ab.smc(num_particles=30, **settings)
    whole, tree = (
        alg.replace(store=store)(m).posterior(KEY, 8, given={"y": y}) for store in ("paths", "tree")
    )
    assert set(whole.draws) == set(tree.draws)
    for a in whole.draws:
        np.testing.assert_array_equal(whole.draws[a], tree.draws[a])
    for a in whole.active:
        np.testing.assert_array_equal(whole.active[a], tree.active[a])
    np.testing.assert_array_equal(whole.log_weights, tree.log_weights)
    assert whole.log_evidence == tree.log_evidence
    assert any(d.startswith("num_nodes") for d in tree.diagnostics) == (name != "never")


def test_it_takes_less_memory():
    n, steps = 300, 400
    y = jnp.tile(jnp.asarray(Y, jnp.float32), steps // 8)

    def temporary(store, **settings):
        alg = ab.smc(num_particles=n, store=store, **settings)(walk)
        run = jax.jit(lambda key, y: alg.posterior(key, steps, given={"y": y}).draws)
        return run.lower(KEY, y).compile().memory_analysis().temp_size_in_bytes

    # Whole paths hold values and ancestors, 4 bytes each; the tree five such arrays of its places.
    whole, tree = temporary("paths"), temporary("tree", capacity=8000)
    assert whole > 8 * n * steps > 3 * tree
    assert default_capacity(1000, 1000) < 0.09 * 1000 * 1000
    assert default_capacity(1000, 5) == 5000  # a short series is kept whole


def test_too_small_a_tree():
    alg = ab.smc(num_particles=50, store="tree", capacity=100)
    with pytest.raises(ab.InvalidAlgorithm, match=r"more than 100 values.*store='paths'"):
        alg(walk).posterior(KEY, 8, given={"y": Y})
    # Where nothing can be raised, nothing looks right either.
    post = jax.jit(lambda k: alg(walk).posterior(k, 8, given={"y": Y}))(KEY)
    assert np.isnan(post.log_weights).all() and np.isfinite(post.log_evidence)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"store": "tree", "smoothing": "ffbs"}, "which store='tree' prunes"),
        ({"capacity": 2000}, "but store='paths'"),
        ({"store": "tree", "capacity": 10}, "capacity must be an int >= 64"),
    ],
)
def test_settings_that_do_not_fit(settings, match):
    with pytest.raises(ab.InvalidAlgorithm, match=match):
        ab.smc(num_particles=64, **settings)
