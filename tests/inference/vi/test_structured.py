"""`ab.guides.structured`: the faithful inverse, element by element."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist
from abduce.inference.problem import make_problem
from abduce.inference.target import make_target
from abduce.inference.vi.elements import families
from abduce.inference.vi.faithful import faithful_inverse

KEY = jax.random.key(8)


def flat(m, args, given):
    return make_target(make_problem(m, args, given, {}, None), "ab.vi")


def inverse(m, args, given):
    """Parents by name, in the order of drawing; `theta[2]` is a coordinate."""
    target, data = flat(m, args, given)
    order, parents = faithful_inverse(families(target, data))
    name = {}
    for s in target.slots:
        for i in range(s.start, s.stop):
            name[i] = s.address + (f"[{i - s.start}]" if s.stop - s.start > 1 else "")
    return {name[i]: {name[j] for j in parents[i]} for i in order}


# ------------------------------------------------------------------- models


@ab.model
def schools(sigma):
    mu = ab.sample("mu", dist.Normal(0.0, 5.0))
    tau = ab.sample("tau", dist.HalfCauchy(5.0))

    def school(s):
        theta = ab.sample("theta", dist.Normal(mu, tau))
        ab.sample("y", dist.Normal(theta, s))

    jax.vmap(school)(sigma)


@ab.model
def hierarchy(n):
    """Normal throughout: a global mean, locals, and data of each."""
    mu = ab.sample("mu", dist.Normal(0.0, 2.0))

    def one(_):
        theta = ab.sample("theta", dist.Normal(mu, 0.7))
        ab.sample("y", dist.Normal(theta, 0.5))

    jax.vmap(one)(jnp.arange(n))


@ab.model
def chain(n):
    def step(x, _):
        x = ab.sample("x", dist.Normal(0.9 * x, 0.6))
        ab.sample("y", dist.Normal(x, 0.5))
        return x, None

    jax.lax.scan(step, 0.0, None, length=n)


@ab.model
def second_order(n):
    def step(carry, _):
        a, b = carry
        x = ab.sample("x", dist.Normal(0.5 * a + 0.2 * b, 1.0))
        ab.sample("y", dist.Normal(x, 1.0))
        return (x, a), None

    jax.lax.scan(step, (0.0, 0.0), None, length=n)


@ab.model
def collider():
    a = ab.sample("a", dist.Normal(0.0, 1.0))
    b = ab.sample("b", dist.Normal(0.0, 1.0))
    c = ab.sample("c", dist.Normal(a + b, 1.0))
    ab.sample("d", dist.Normal(c, 0.5))
    ab.sample("ya", dist.Normal(a, 0.8))
    ab.sample("yb", dist.Normal(b, 0.8))


@ab.model
def groups(index, x):
    """Effects by group, chosen by indices that are data; group 1 has no data."""
    m = ab.sample("m", dist.Normal(0.0, 1.0))
    slope = ab.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    level = ab.sample("level", dist.Normal(m, 0.7).expand([3]))
    ab.sample("y", dist.Normal(level[index] + x @ slope, 0.5))


INDEX = np.array([0, 0, 2, 2, 2])
X = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)


def test_elements_of_a_plate_depend_on_the_globals_alone():
    found = inverse(schools, (jnp.ones(4),), {"y": jnp.zeros(4)})
    assert found == {"mu": set(), "tau": {"mu"}} | {
        f"theta[{i}]": {"mu", "tau"} for i in range(4)
    }


def test_a_chain_is_drawn_along_its_steps():
    found = inverse(chain, (5,), {"y": jnp.zeros(5)})
    assert found == {"x[0]": set()} | {f"x[{t}]": {f"x[{t - 1}]"} for t in range(1, 5)}
    found = inverse(second_order, (5,), {"y": jnp.zeros(5)})
    assert found == {"x[0]": set(), "x[1]": {"x[0]"}} | {
        f"x[{t}]": {f"x[{t - 1}]", f"x[{t - 2}]"} for t in range(2, 5)
    }


def test_a_collider_joins_its_parents_if_data_are_below_it():
    seen = {"ya": 0.0, "yb": 0.0}
    assert inverse(collider, (), {**seen, "d": 1.0}) == {
        "a": set(), "b": {"a"}, "c": {"a", "b"}
    }  # fmt: skip
    # without data below c, a and b stay independent, which their moral graph does not show
    found = inverse(collider, (), seen)
    assert found["a"] == found["b"] == set()
    assert (found["c"], found["d"]) == ({"a", "b"}, {"c"})
    assert inverse(collider, (), {**seen, "c": 1.0}) == {
        "a": set(), "b": {"a"}, "d": set()
    }  # fmt: skip


def test_a_circle_needs_one_more_edge():
    # Neighbours on a circle of four share data. Without the first, its neighbours depend on each
    # other: five edges, of which one joins opposite sites, and none can go.
    @ab.model
    def circle():
        x = [ab.sample(a, dist.Normal(0.0, 1.0)) for a in "abcd"]
        for i in range(4):
            ab.sample(f"y{i}", dist.Normal(x[i] + x[(i + 1) % 4], 1.0))

    found = inverse(circle, (), {f"y{i}": 0.0 for i in range(4)})
    edges = {frozenset((child, p)) for child, parents in found.items() for p in parents}
    sides = {frozenset(pair) for pair in ("ab", "bc", "cd", "da")}
    assert sides < edges and len(edges) == 5


def test_indices_that_are_data_keep_groups_apart():
    found = inverse(groups, (INDEX, X), {"y": jnp.zeros(5)})
    assert found["level[1]"] == {"m"}
    assert all("level[1]" not in parents for parents in found.values())
    assert "level[0]" in found["level[2]"]  # through the slopes, that all rows share
    rows = inverse(groups, (INDEX, 0 * X), {"y": jnp.zeros(5), "slope": jnp.zeros(2)})
    assert rows == {"m": set()} | {f"level[{i}]": {"m"} for i in range(3)}


# ------------------------------------------------------------------- minimality


def separated(parents, a, b, given):
    """d-separation of `a` and `b` by `given`, in the moral graph of their ancestors."""
    keep, stack = set(), [a, b, *given]
    while stack:
        v = stack.pop()
        if v not in keep:
            keep.add(v)
            stack += parents[v]
    edges = set()
    for v in keep:
        edges |= set(itertools.permutations([v, *parents[v]], 2))
    reached, stack = set(), [a]
    while stack:
        v = stack.pop()
        if v not in reached and v not in given:
            reached.add(v)
            stack += [w for u, w in edges if u == v]
    return b not in reached


def random_network(seed, n=7):
    """A random directed graph over normals, some of which have data."""
    rng = np.random.default_rng(seed)
    parents = {i: [j for j in range(i) if rng.random() < 0.35] for i in range(n)}
    seen = [i for i in range(n) if rng.random() < 0.6]

    @ab.model
    def network():
        values = {}
        for i in range(n):
            mean = sum((values[j] for j in parents[i]), start=jnp.zeros(()))
            values[i] = ab.sample(f"v{i}", dist.Normal(mean, 1.0))
            if i in seen:
                ab.sample(f"y{i}", dist.Normal(values[i], 1.0))

    graph = {f"v{i}": [f"v{j}" for j in parents[i]] for i in range(n)}
    graph |= {f"y{i}": [f"v{i}"] for i in seen}
    return network, graph, [f"y{i}" for i in seen]


@pytest.mark.parametrize("seed", range(12))
def test_the_inverse_is_faithful_and_no_edge_of_it_can_go(seed):
    """For its order: a parent is needed if and only if d-separation does not make it needless."""
    network, graph, data = random_network(seed)
    found = inverse(network, (), dict.fromkeys(data, 0.0))
    before = []
    for v, parents in found.items():
        assert parents <= set(before)
        for u in before:
            others = [w for w in parents if w != u]
            assert separated(graph, v, u, [*others, *data]) == (u not in parents), (v, u)
        before.append(v)
    assert len(found) == 7


# ------------------------------------------------------------------- soundness


def branching():
    a = ab.sample("a", dist.Normal(0.0, 1.0))
    b = ab.sample("b", dist.Normal(0.0, 1.0))
    jax.lax.cond(
        a > 0,
        lambda: ab.sample("c", dist.Normal(b, 1.0)),
        lambda: ab.sample("c", dist.Normal(0.0, 2.0)),
    )
    ab.sample("e", dist.Normal(0.0, jnp.exp(b)))


def bounds():
    low = ab.sample("low", dist.Normal(0.0, 1.0))
    x = ab.sample("x", dist.Uniform(low, low + 2.0))
    ab.sample("s", dist.Dirichlet(jnp.exp(x) * jnp.ones(3)))
    z = ab.sample("z", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)))
    ab.factor("f", -jnp.sum(z**4) - z[0] * z[1])
    ab.factor("g", -(x**2) * low)


def loops():
    scale = ab.sample("scale", dist.HalfNormal(1.0))

    def series(k):
        def step(x, t):
            x = ab.sample("x", dist.Normal(jnp.tanh(x) + t, scale))
            return x, x**2

        _, squares = jax.lax.scan(step, 0.1 * k, jnp.arange(3.0), reverse=True)
        return squares

    squares = jax.vmap(series)(jnp.arange(2.0))
    ab.sample("w", dist.Normal(jnp.cumsum(squares, 1)[:, ::-1], 1.0).to_event(1))
    order = jnp.argsort(jnp.array([2.0, 0.5, 1.0]))
    ab.factor("pairs", jnp.sum(squares[0][order] * squares[1]))


@jax.jit
def inner(x, y):
    return jax.checkpoint(lambda x: x * jnp.sin(y))(x)


def calls():
    theta = ab.sample("theta", dist.Normal(jnp.zeros(4), 1.0))
    a, b = jnp.split(theta, 2)
    ab.sample("u", dist.Normal(inner(a, b), 1.0))
    padded = jnp.pad(theta, 1).at[0].set(theta[3] * theta[2])
    ab.factor("ends", padded[0] * padded[1])
    with ab.scaled(jnp.exp(theta[0])):
        ab.sample("v", dist.Normal(0.0, 1.0))
    moved = jax.lax.dynamic_slice(theta, (1,), (2,))
    ab.factor("matrix", moved @ jnp.array([[1.0, 0.0], [0.5, 2.0]]) @ moved)
    bent = jax.scipy.special.logsumexp(theta[2:])
    ab.factor("lse", jax.lax.while_loop(lambda c: c < -10.0, lambda c: c + 1, bent))


def written():
    theta = ab.sample("theta", dist.Normal(jnp.zeros(3), 1.0))
    cell = jax.new_ref(jnp.zeros(()))

    def step(c, t):
        cell[...] = cell[...] + t
        return c, None

    jax.lax.scan(step, 0.0, theta[:2])
    ab.factor("f", theta[2] * cell[...] ** 2)


centred = ab.reparam(schools, {"theta": ab.noncentered()})
MASK = np.array([True, False, True, False])
ZOO = {
    "schools": (schools, (jnp.ones(4),), {"y": jnp.zeros(4)}),
    "noncentered": (centred, (jnp.ones(4),), {"y": jnp.arange(4.0)}),
    "masked": (schools, (jnp.ones(4),), {"y": ab.masked(jnp.zeros(4), observed=MASK)}),
    "chain": (chain, (4,), {"y": jnp.ones(4)}),
    "groups": (groups, (INDEX, X), {"y": jnp.ones(5)}),
    "branching": (ab.model(branching), (), {"e": 0.5}),
    "bounds": (ab.model(bounds), (), {}),
    "loops": (ab.model(loops), (), {}),
    "calls": (ab.model(calls), (), {}),
}


@pytest.mark.parametrize("name", ZOO)
def test_no_dependence_is_missed(name):
    """Where the Hessian is not zero, a term has both coordinates; float64 at random points."""
    with jax.enable_x64(True):
        target, data = flat(*ZOO[name])
        found = families(target, data)
        joint = (found.all.T.astype(int) @ found.all.astype(int)).toarray() > 0
        hessian = jax.jit(jax.jacfwd(jax.jacfwd(lambda u: target(data, u))))
        for k in jax.random.split(KEY, 6):
            h = np.asarray(hessian(jax.random.normal(k, (target.dim,))))
            assert not (np.isfinite(h) & (h != 0) & ~joint).any(), name
    assert found.own.sum() == target.dim  # each coordinate is one element's
    assert (found.own.sum(0) == 1).all()


def test_what_is_apart_is_not_joined():
    """Sizes of the terms: nothing is mixed that mapped axes keep apart."""
    target, data = flat(*ZOO["loops"])
    sizes = np.asarray(families(target, data).all.sum(1)).ravel()
    # scale; x: itself, the step before, scale; w: itself and its series; pairs: all of x
    assert sorted(sizes) == [1, 2, 2, *[3] * 4, *[4] * 6, 6]
    target, data = flat(*ZOO["masked"])
    sizes = np.asarray(families(target, data).all.sum(1)).ravel()
    assert sorted(sizes) == [1, 1, 1, 1, 2, 2, 3, 3, 3, 3]


def test_what_is_written_in_a_loop_is_followed():
    target, data = flat(ab.model(written), (), {})
    sizes = np.asarray(families(target, data).all.sum(1)).ravel()
    assert sorted(sizes) == [1, 1, 1, 3]


# ------------------------------------------------------------------- fits


@pytest.mark.parametrize("name", ["hierarchy", "chain", "collider", "groups"])
def test_the_guide_reaches_normal_posteriors_with_fewer_weights(name):
    """KL below 1e-3 to the exact posterior, which is normal: from its moments."""
    m, args, given = {
        "hierarchy": (hierarchy, (6,), {"y": np.linspace(-1, 2, 6, dtype=np.float32)}),
        "chain": (chain, (6,), {"y": np.linspace(-1, 2, 6, dtype=np.float32)}),
        "collider": (collider, (), {"ya": 0.5, "yb": -1.0}),
        "groups": (groups, (INDEX, X), {"y": np.array([1.0, 0.5, -0.3, 0.2, 0.9], np.float32)}),
    }[name]
    alg = ab.vi(
        guide=ab.guides.structured(), num_steps=800, num_samples=100, progress_bar=False
    )  # fmt: skip
    post = alg(m).posterior(KEY, *args, given=given)
    target, data = flat(m, args, given)
    n = target.dim
    zero = jnp.zeros(n)
    precision = -np.asarray(jax.hessian(lambda u: target(data, u))(zero), float)
    mean = np.linalg.solve(precision, np.asarray(jax.grad(lambda u: target(data, u))(zero), float))
    order, parents = faithful_inverse(families(target, data))
    weights = np.asarray(post.params["weights"], float)
    assert len(weights) == sum(map(len, parents.values())) < n * (n - 1) / 2
    b = np.zeros((n, n))
    pairs = [(i, j) for i in order for j in parents[i]]
    for (i, j), w in zip(pairs, weights, strict=True):
        b[i, j] = w
    root = np.linalg.solve(np.eye(n) - b, np.diag(np.exp(np.asarray(post.params["log_scale"]))))
    cov = root @ root.T
    off = np.asarray(post.params["loc"], float) - mean
    kl = 0.5 * (
        np.trace(precision @ cov) - n + off @ precision @ off
        - np.linalg.slogdet(precision @ cov)[1]
    )  # fmt: skip
    assert kl < 1e-3
