"""Zoo, part 2: `scan`, `fori_loop`, `ab.while_loop`, and their nesting with `vmap`.

Lengths differ everywhere, and parameters depend on every index, so that a wrong order of axes
gives a wrong shape or a wrong number.
"""

import jax
import jax.numpy as jnp
import numpy as np

import abduce as ab
import abduce.dist as dist

from . import closed_forms as cf
from .zoo_entry import Entry, collect

LOOPS: dict[str, Entry] = {}

YS = np.array([0.4, -0.3, 1.1, 0.9, -1.4])


def model(reference, shapes, **options):
    return collect(LOOPS, reference, shapes, **options)


def _ref(c, ys):
    total = cf.beta(c["phi"], 4.0, 2.0) + cf.gamma(c["s"], 2.0, 1.0)
    z = 0.0
    for t, y in enumerate(ys):
        total += cf.normal(c["z"][t], c["phi"] * z, c["s"])
        z = c["z"][t]
        total += cf.normal(y, z, 0.5 + 0.1 * t)
    return total


@model(_ref, {"phi": (), "s": (), "z": (5,)}, args=(YS,), retval=lambda c, ys: c["z"][-1])
def scan_carry_and_xs(ys):
    phi = ab.sample("phi", dist.Beta(4.0, 2.0))
    s = ab.sample("s", dist.Gamma(2.0, 1.0))

    def step(z, x):
        t, y = x
        z = ab.sample("z", dist.Normal(phi * z, s))
        ab.sample("y", dist.Normal(z, 0.5 + 0.1 * t), obs=y)
        return z, None

    return jax.lax.scan(step, 0.0, (jnp.arange(5), ys))[0]


def _ref(c, ys):
    total, z = 0.0, 0.3
    for t in reversed(range(5)):  # values are stored where their xs are
        total += cf.normal(c["z"][t], 0.8 * z + t, 1.0 + t)
        z = c["z"][t]
    return total + cf.normal(ys, c["z"], 1.0)


@model(_ref, {"z": (5,)}, args=(YS,), retval=lambda c, ys: c["z"] * 2)
def scan_reverse(ys):
    def step(z, x):
        t, y = x
        z = ab.sample("z", dist.Normal(0.8 * z + t, 1.0 + t))
        ab.sample("y", dist.Normal(z, 1.0), obs=y)
        return z, 2 * z

    return jax.lax.scan(step, 0.3, (jnp.arange(5), ys), reverse=True)[1]


def _ref(c):
    total, z = 0.0, jnp.zeros(2)
    for t in range(7):
        total += cf.normal(c["z"][t], z + t, jnp.array([1.0, 2.0]))
        z = c["z"][t] / 2
    return total


@model(_ref, {"z": (7, 2)})
def scan_unrolled():
    def step(z, t):
        z = ab.sample("z", dist.Normal(z + t, jnp.array([1.0, 2.0])))
        return z / 2, ()

    jax.lax.scan(step, jnp.zeros(2), jnp.arange(7), unroll=3)


def _ref(c):
    total, total_z = 0.0, 0.0
    for i in range(2):
        total += cf.normal(c["a"][i], total_z, 1 + i)
        for j in range(3):
            total += cf.normal(c["z"][i, j], c["a"][i] + total_z, 1 + i + 10 * j)
            total_z = total_z + c["z"][i, j]
    return total


@model(_ref, {"a": (2,), "z": (2, 3)})
def scan_in_scan():
    def outer(s, i):
        a = ab.sample("a", dist.Normal(s, 1 + i))

        def inner(s, j):
            z = ab.sample("z", dist.Normal(a + s, 1 + i + 10 * j))
            return s + z, None

        return jax.lax.scan(inner, s, jnp.arange(3))[0], None

    jax.lax.scan(outer, 0.0, jnp.arange(2))


def _ref(c, data):
    total = cf.half_normal(c["s"], 1.0)
    for i in range(3):
        total += cf.normal(c["start"][i], i, c["s"])
        z = c["start"][i]
        for t in range(5):
            total += cf.normal(c["z"][i, t], z / 2 + i, 1 + t)
            z = c["z"][i, t]
            total += cf.normal(data[t, i], z, 1.0)
    return total


DATA = np.random.default_rng(0).normal(size=(5, 3))


@model(_ref, {"s": (), "start": (3,), "z": (3, 5)}, args=(DATA,))
def vmap_of_scan(data):
    s = ab.sample("s", dist.HalfNormal(1.0))

    def series(i, ys):
        def step(z, x):
            t, y = x
            z = ab.sample("z", dist.Normal(z / 2 + i, 1 + t))
            ab.sample("y", dist.Normal(z, 1.0), obs=y)
            return z, None

        start = ab.sample("start", dist.Normal(i, s))
        return jax.lax.scan(step, start, (jnp.arange(5), ys))[0]

    return jax.vmap(series, in_axes=(0, 1))(jnp.arange(3.0), data)


def _ref(c, data):
    total, m = 0.0, 0.0
    for t in range(5):
        for i in range(3):
            total += cf.normal(c["z"][t, i], m / 2 + i, 1 + t)
            total += cf.normal(data[t, i], c["z"][t, i], 1.0)
        m = jnp.mean(c["z"][t])
    return total


@model(_ref, {"z": (5, 3)}, args=(DATA,))
def scan_of_vmap(data):
    def step(m, x):
        t, ys = x

        def element(i, y):
            z = ab.sample("z", dist.Normal(m / 2 + i, 1 + t))
            ab.sample("y", dist.Normal(z, 1.0), obs=y)
            return z

        return jnp.mean(jax.vmap(element)(jnp.arange(3.0), ys)), None

    jax.lax.scan(step, 0.0, (jnp.arange(5), data))


def _ref(c):
    total = 0.0
    for i in range(2):
        z = 0.0
        for t in range(4):
            for j in range(3):
                total += cf.normal(c["x"][i, t, j], z + i + 10 * j, 1 + t)
            z = jnp.sum(c["x"][i, t]) / 10
            total += cf.multivariate_normal(c["e"][i, t], z * jnp.ones(5), (1.0 + i) * jnp.eye(5))
    return total


@model(_ref, {"x": (2, 4, 3), "e": (2, 4, 5)})
def vmap_scan_vmap():
    def series(i):
        def step(z, t):
            def element(j):
                return ab.sample("x", dist.Normal(z + i + 10 * j, 1 + t))

            z = jnp.sum(jax.vmap(element)(jnp.arange(3.0))) / 10
            cov = (1.0 + i) * jnp.eye(5)
            ab.sample("e", dist.MultivariateNormal(z * jnp.ones(5), cov))
            return z, None

        jax.lax.scan(step, 0.0, jnp.arange(4.0))

    jax.vmap(series)(jnp.arange(2.0))


def _ref(c):
    total, s = 0.0, 0.0
    for t in range(4):
        new = 0.0
        for i in range(3):
            z = s
            for u in range(2):
                total += cf.normal(c["x"][t, i, u], z + i, 1 + t + 5 * u)
                z = c["x"][t, i, u]
            new = new + z
        s = new / 3
    return total


@model(_ref, {"x": (4, 3, 2)})
def scan_vmap_scan():
    def outer(s, t):
        def series(i):
            def inner(z, u):
                z = ab.sample("x", dist.Normal(z + i, 1 + t + 5 * u))
                return z, None

            return jax.lax.scan(inner, s, jnp.arange(2))[0]

        return jnp.sum(jax.vmap(series)(jnp.arange(3))) / 3, None

    jax.lax.scan(outer, 0.0, jnp.arange(4))


def _ref(c):
    total = 0.0
    for i in range(2):
        for j in range(3):
            for t in range(4):
                total += cf.normal(c["vvs/x"][i, j, t], 10 * i + j, 1 + t)
                total += cf.normal(c["vsv/x"][i, t, j], 10 * i + j, 1 + t)
                total += cf.normal(c["svv/x"][t, i, j], 10 * i + j, 1 + t)
    return total


@model(_ref, {"vvs/x": (2, 3, 4), "vsv/x": (2, 4, 3), "svv/x": (4, 2, 3)})
def axis_orders_of_one_jit():
    """One cached inner jit in three nestings: the order of axes must not leak between them."""

    @jax.jit
    def draw(loc, scale):
        return ab.sample("x", dist.Normal(loc, scale))

    rows, columns, times = jnp.arange(2.0), jnp.arange(3.0), jnp.arange(4.0)

    def loop(f):  # runs f(t) for every time
        jax.lax.scan(lambda c, t: (c, f(t)), 0, times)

    def over_rows(f):
        return jax.vmap(f)(rows)

    def over_columns(f):
        return jax.vmap(f)(columns)

    with ab.scope("vvs"):
        over_rows(lambda i: over_columns(lambda j: loop(lambda t: draw(10 * i + j, 1 + t))))
    with ab.scope("vsv"):
        over_rows(lambda i: loop(lambda t: over_columns(lambda j: draw(10 * i + j, 1 + t))))
    with ab.scope("svv"):
        loop(lambda t: over_rows(lambda i: over_columns(lambda j: draw(10 * i + j, 1 + t))))


def _ref(c):
    total, z = 0.0, 1.0
    for i in range(2, 6):
        total += cf.normal(c["x"][i - 2], z, i)
        z = c["x"][i - 2] / 3
    return total


@model(_ref, {"x": (4,)}, retval=lambda c: c["x"][-1] / 3)
def fori_loop():
    def body(i, z):
        return ab.sample("x", dist.Normal(z, i)) / 3

    return jax.lax.fori_loop(2, 6, body, 1.0)


def _ref(c):
    return cf.normal(c["x"], jnp.arange(6.0), 2.0) + cf.poisson(c["n"], jnp.exp(c["x"] / 10))


@model(_ref, {"x": (6,), "n": (6,)})
def lax_map():
    def body(i):
        x = ab.sample("x", dist.Normal(i, 2.0))
        return ab.sample("n", dist.Poisson(jnp.exp(x / 10)))

    jax.lax.map(body, jnp.arange(6.0))


INIT = np.array([0.5, 0.3, 0.2])
TRANS = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]])


def _ref(c, ys):
    locs = jnp.cumsum(c["loc"])
    total = cf.normal(c["loc"], 0, 2) + cf.categorical(c["z0"], INIT)
    z = c["z0"]
    for t in range(5):
        total += cf.categorical(c["z"][t], TRANS[z])
        z = c["z"][t]
        total += cf.normal(ys[t], locs[z], 1.0)
    return total


@model(_ref, {"loc": (3,), "z0": (), "z": (5,)}, args=(YS,))
def hidden_markov(ys):
    loc = ab.sample("loc", dist.Normal(0, 2).expand((3,)))
    locs = jnp.cumsum(loc)

    def step(z, y):
        z = ab.sample("z", dist.Categorical(jnp.asarray(TRANS)[z]))
        ab.sample("y", dist.Normal(locs[z], 1.0), obs=y)
        return z, None

    jax.lax.scan(step, ab.sample("z0", dist.Categorical(INIT)), ys)


def _steps(c):
    """How many steps run: until the first success, at most 6."""
    b = np.asarray(c["b"])
    return int(np.argmax(b == 1)) + 1 if b.any() else 6


def _ref(c):
    n = _steps(c)
    if not np.asarray(c["b"])[:n].any():
        return -jnp.inf  # still running after max_steps: such a run has no density
    total, s = cf.beta(c["p"], 2.0, 2.0), 0.0
    for t in range(n):
        total += cf.bernoulli(c["b"][t], 0.5 + 0.4 * c["p"]) + cf.normal(c["x"][t], s, 1 + t)
        s = s + c["x"][t]
    return total + cf.normal(0.3, s, 1.0)


def _active(c):
    ran = np.arange(6) < _steps(c)
    return {"b": ran, "x": ran}


@model(_ref, {"p": (), "b": (6,), "x": (6,)}, active=_active)
def bounded_while():
    p = ab.sample("p", dist.Beta(2.0, 2.0))

    def body(state):
        t, s, _ = state
        b = ab.sample("b", dist.Bernoulli(0.5 + 0.4 * p))
        x = ab.sample("x", dist.Normal(s, 1 + t))
        return t + 1, s + x, b

    init = (0, 0.0, jnp.array(0))
    _, s, _ = ab.while_loop(lambda state: state[2] == 0, body, init, max_steps=6)
    ab.sample("y", dist.Normal(s, 1.0), obs=0.3)


def _ref(c):
    # the site-free while_loop runs as it is: halve until below 1
    v = float(jnp.abs(c["x"]))
    while v >= 1.0:
        v /= 2
    return cf.normal(c["x"], 0, 3) + cf.normal(c["y"], v, 1.0)


@model(_ref, {"x": (), "y": ()}, smooth=("y",))
def while_without_sites():
    x = ab.sample("x", dist.Normal(0, 3))
    v = jax.lax.while_loop(lambda v: v >= 1.0, lambda v: v / 2, jnp.abs(x))
    ab.sample("y", dist.Normal(v, 1.0))
