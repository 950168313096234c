"""Zoo, part 3: `cond` and `switch`, also where `vmap` runs every branch."""

import jax
import jax.numpy as jnp
import numpy as np

import abduce as ab
import abduce.dist as dist

from . import closed_forms as cf
from .zoo_entry import Entry, collect

BRANCHES: dict[str, Entry] = {}


def model(reference, shapes, **options):
    return collect(BRANCHES, reference, shapes, **options)


def _ref(c):
    total = cf.bernoulli(c["z"], 0.4)
    if c["z"]:
        total += cf.normal(c["x"], 1.0, 2.0)
    return total + cf.normal(0.2, c["x"] if c["z"] else -1.0, 0.5)


@model(_ref, {"z": (), "x": ()}, active=lambda c: {"x": c["z"] == 1})
def cond_one_branch():
    z = ab.sample("z", dist.Bernoulli(0.4))
    v = jax.lax.cond(z == 1, lambda: ab.sample("x", dist.Normal(1.0, 2.0)), lambda: -1.0)
    ab.sample("y", dist.Normal(v, 0.5), obs=0.2)


def _ref(c):
    total = cf.normal(c["p"], 0, 1)
    if c["p"] > 0:
        return total + cf.normal(c["left"], c["p"], 1) + cf.normal(0.5, c["left"], 1.0)
    return total + cf.gamma(c["right"], 2.0, 1.0 + c["p"] ** 2) + cf.normal(-0.5, c["right"], 2.0)


@model(
    _ref,
    {"p": (), "left": (), "right": ()},
    active=lambda c: {"left": c["p"] > 0, "right": c["p"] <= 0},
)
def cond_different_addresses():
    p = ab.sample("p", dist.Normal(0, 1))

    def left(p):
        left = ab.sample("left", dist.Normal(p, 1))
        ab.sample("o1", dist.Normal(left, 1.0), obs=0.5)  # observed in this branch only

    def right(p):
        right = ab.sample("right", dist.Gamma(2.0, 1.0 + p**2))
        ab.sample("o2", dist.Normal(right, 2.0), obs=-0.5)

    jax.lax.cond(p > 0, left, right, p)


def _ref(c):
    total = cf.bernoulli(c["z"], 0.5)
    x = c["x"]
    total += cf.normal(x, 3.0, 1.0) if c["z"] else cf.gamma(x, 2.0, 1.0)
    return total + cf.normal(c["y"], x, 1.0)


# x has other supports in the two branches: no single gradient check at a boundary, so only y
@model(_ref, {"z": (), "x": (), "y": ()}, smooth=("y",))
def cond_same_address():
    z = ab.sample("z", dist.Bernoulli(0.5))
    x = jax.lax.cond(
        z == 1,
        lambda: ab.sample("x", dist.Normal(3.0, 1.0)),
        lambda: ab.sample("x", dist.Gamma(2.0, 1.0)),
    )
    ab.sample("y", dist.Normal(x, 1.0))


def _ref(c):
    k = int(c["k"])
    total = cf.categorical(c["k"], jnp.array([0.2, 0.3, 0.5]))
    if k == 0:
        total += cf.normal(c["a"], 0, 1)
        v = c["a"]
    elif k == 1:
        total += cf.normal(c["a"], 5, 2) + cf.exponential(c["b"], 2.0)
        v = c["a"] + c["b"]
    else:
        v = 2.5
    return total + cf.normal(c["y"], v, 1.0)


@model(
    _ref,
    {"k": (), "a": (), "b": (), "y": ()},
    active=lambda c: {"a": c["k"] < 2, "b": c["k"] == 1},
)
def switch_three():
    k = ab.sample("k", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))

    def zero():
        return ab.sample("a", dist.Normal(0.0, 1.0))

    def one():
        a = ab.sample("a", dist.Normal(5.0, 2.0))
        return a + ab.sample("b", dist.Exponential(2.0))

    v = jax.lax.switch(k, [zero, one, lambda: 2.5])
    ab.sample("y", dist.Normal(v, 1.0))


def _ref(c, low):
    total = 0.0
    for i in range(4):
        total += cf.normal(c["x"][i], 0, 1)
        if c["x"][i] > 0:
            total += cf.normal(c["v"][i], 1.0, jnp.sqrt(c["x"][i]))
            v = c["v"][i]
        else:
            v = low
        total += cf.normal(c["y"][i], v, 1.0 + i)
    return total


@model(
    _ref, {"x": (4,), "v": (4,), "y": (4,)}, args=(-2.0,), active=lambda c, low: {"v": c["x"] > 0}
)
def vmap_of_cond(low):
    """The dead branch has an invalid scale, sqrt of a negative number."""

    def element(i):
        x = ab.sample("x", dist.Normal(0, 1))
        v = jax.lax.cond(
            x > 0, lambda: ab.sample("v", dist.Normal(1.0, jnp.sqrt(x))), lambda: jnp.asarray(low)
        )
        ab.sample("y", dist.Normal(v, 1.0 + i))

    jax.vmap(element)(jnp.arange(4))


def _ref(c, data):
    total = 0.0
    for i in range(3):
        total += cf.bernoulli(c["z"][i], 0.3 + 0.2 * i)
        if c["z"][i]:
            total += cf.normal(c["x"][i], 2.0, 1.0) + cf.normal(data[i], c["x"][i], 1.0)
        else:
            total += cf.laplace(c["x"][i], -i, 0.5)
            total += cf.gamma(c["g"][i], 2.0, jnp.exp(c["x"][i] / 9)) + 0.5 * c["g"][i]
    return total


@model(
    _ref,
    {"z": (3,), "x": (3,), "g": (3,)},
    args=(np.array([1.0, 0.5, -2.0]),),
    active=lambda c, data: {"g": c["z"] == 0},
)
def vmap_of_cond_both_branches(data):
    """One address in both branches, one in one, an observation and a factor in one."""

    def element(i, y):
        z = ab.sample("z", dist.Bernoulli(0.3 + 0.2 * i))

        def yes():
            x = ab.sample("x", dist.Normal(2.0, 1.0))
            ab.sample("o", dist.Normal(x, 1.0), obs=y)
            return x

        def no():
            x = ab.sample("x", dist.Laplace(-i, 0.5))
            g = ab.sample("g", dist.Gamma(2.0, jnp.exp(x / 9)))
            ab.factor("f", 0.5 * g)
            return x

        return jax.lax.cond(z == 1, yes, no)

    jax.vmap(element)(jnp.arange(3.0), data)


def _ref(c):
    total = cf.bernoulli(c["z"], 0.5)
    for i in range(3):
        if c["z"]:
            total += cf.normal(c["x"][i], i, 1.0)
    return total


@model(_ref, {"z": (), "x": (3,)}, active=lambda c: {"x": np.broadcast_to(c["z"] == 1, (3,))})
def vmap_of_cond_shared_predicate():
    z = ab.sample("z", dist.Bernoulli(0.5))

    def element(i):
        return jax.lax.cond(z == 1, lambda: ab.sample("x", dist.Normal(i, 1.0)), lambda: 0.0)

    jax.vmap(element)(jnp.arange(3.0))


def _ref(c):
    total = 0.0
    for i in range(5):
        k = int(c["k"][i])
        total += cf.categorical(c["k"][i], jnp.array([0.3, 0.3, 0.4]))
        if k == 0:
            total += cf.beta(c["a"][i], 2.0, 3.0)
        elif k == 2:
            total += cf.normal(c["b"][i], i, 1.0)
    return total


@model(
    _ref,
    {"k": (5,), "a": (5,), "b": (5, 2)},
    active=lambda c: {"a": c["k"] == 0, "b": c["k"] == 2},
)
def vmap_of_switch():
    """A site with a batch shape is active as one element of the vmap."""

    def element(i):
        k = ab.sample("k", dist.Categorical(jnp.array([0.3, 0.3, 0.4])))

        def beta():
            return ab.sample("a", dist.Beta(2.0, 3.0))

        def pair():
            return jnp.sum(ab.sample("b", dist.Normal(i, 1.0).expand((2,)).to_event(1)))

        return jax.lax.switch(k, [beta, lambda: 0.0, pair])

    jax.vmap(element)(jnp.arange(5.0))


def _ref(c):
    total, z = 0.0, 0.0
    for t in range(5):
        total += cf.bernoulli(c["jump"][t], 0.4)
        if c["jump"][t]:
            total += cf.normal(c["size"][t], 0.0, 1.0 + t)
            z = z + c["size"][t]
        total += cf.normal(c["x"][t], z, 1.0)
    return total


@model(_ref, {"jump": (5,), "size": (5,), "x": (5,)}, active=lambda c: {"size": c["jump"] == 1})
def scan_of_cond():
    def step(z, t):
        jump = ab.sample("jump", dist.Bernoulli(0.4))
        size = jax.lax.cond(
            jump == 1, lambda: ab.sample("size", dist.Normal(0.0, 1.0 + t)), lambda: 0.0
        )
        ab.sample("x", dist.Normal(z + size, 1.0))
        return z + size, None

    jax.lax.scan(step, 0.0, jnp.arange(5.0))


def _ref(c):
    total = 0.0
    for i in range(2):
        z = 0.0
        for t in range(4):
            total += cf.normal(c["x"][i, t], z, 1.0 + i)
            if c["x"][i, t] > 0:
                total += cf.exponential(c["e"][i, t], 1.0 + t) + cf.normal(0.1, c["e"][i, t], 1.0)
                z = z / 2 - c["e"][i, t]
            else:
                z = z / 2 + 1.0
    return total


@model(_ref, {"x": (2, 4), "e": (2, 4)}, active=lambda c: {"e": c["x"] > 0})
def vmap_scan_cond():
    def series(i):
        def step(z, t):
            x = ab.sample("x", dist.Normal(z, 1.0 + i))

            def up():
                e = ab.sample("e", dist.Exponential(1.0 + t))
                ab.sample("o", dist.Normal(e, 1.0), obs=0.1)
                return -e

            return z / 2 + jax.lax.cond(x > 0, up, lambda: 1.0), None

        jax.lax.scan(step, 0.0, jnp.arange(4.0))

    jax.vmap(series)(jnp.arange(2.0))


def _ref(c):
    total = cf.bernoulli(c["a"], 0.5)
    for i in range(3):
        total += cf.bernoulli(c["b"][i], 0.3)
        if c["a"] and c["b"][i]:
            total += cf.normal(c["x"][i], 0, 1)
        elif c["a"]:
            total += cf.normal(c["y"][i], i, 1)
    return total


@model(
    _ref,
    {"a": (), "b": (3,), "x": (3,), "y": (3,)},
    active=lambda c: {
        "x": (c["a"] == 1) & (c["b"] == 1),
        "y": (c["a"] == 1) & (c["b"] == 0),
    },
)
def cond_in_cond_in_vmap():
    a = ab.sample("a", dist.Bernoulli(0.5))

    def element(i):
        b = ab.sample("b", dist.Bernoulli(0.3))

        def inside():
            return jax.lax.cond(
                b == 1,
                lambda: ab.sample("x", dist.Normal(0.0, 1.0)),
                lambda: ab.sample("y", dist.Normal(i, 1.0)),
            )

        return jax.lax.cond(a == 1, inside, lambda: 0.0)

    jax.vmap(element)(jnp.arange(3.0))


def _ref(c):
    total = cf.bernoulli(c["z"], 0.6)
    if not c["z"]:
        return total
    s = 0.0
    for t in range(3):
        for i in range(2):
            total += cf.normal(c["x"][t, i], s + i, 1.0 + t)
        s = jnp.sum(c["x"][t]) / 4
    return total


@model(_ref, {"z": (), "x": (3, 2)}, active=lambda c: {"x": np.broadcast_to(c["z"] == 1, (3, 2))})
def cond_of_scan_of_vmap():
    z = ab.sample("z", dist.Bernoulli(0.6))

    def run():
        def step(s, t):
            draw = jax.vmap(lambda i: ab.sample("x", dist.Normal(s + i, 1.0 + t)))
            return jnp.sum(draw(jnp.arange(2.0))) / 4, None

        return jax.lax.scan(step, 0.0, jnp.arange(3.0))[0]

    jax.lax.cond(z == 1, run, lambda: 0.0)
