"""Zoo, part 4: inner `jit`, scopes, sub-models, `checkpoint`, custom derivatives."""

import jax
import jax.numpy as jnp
import numpy as np

import abduce as ab
import abduce.dist as dist

from . import closed_forms as cf
from .zoo_entry import Entry, collect

CALLS: dict[str, Entry] = {}


def model(reference, shapes, **options):
    return collect(CALLS, reference, shapes, **options)


@jax.jit
def walk(loc, scale):
    """Cached by JAX across scopes, axes and models: its trace must not remember any of them."""
    x = ab.sample("x", dist.Normal(loc, scale))
    return x + ab.sample("e", dist.Exponential(scale))


def _pair(c, prefix, loc, scale, index=()):
    x, e = c[f"{prefix}x"][index], c[f"{prefix}e"][index]
    return cf.normal(x, loc, scale) + cf.exponential(e, scale), x + e


def _ref(c):
    t1, a = _pair(c, "a/", 0.0, 1.0)
    t2, b = _pair(c, "b/", a, 1.0)
    t3, _ = _pair(c, "", b, 1.0)
    t4, _ = _pair(c, "b/c/", 0.0, 1.0)
    return t1 + t2 + t3 + t4


@model(
    _ref,
    {f"{p}{s}": () for p in ("a/", "b/", "", "b/c/") for s in ("x", "e")},
)
def jit_under_scopes():
    with ab.scope("a"):
        a = walk(0.0, 1.0)
    with ab.scope("b"):
        b = walk(a, 1.0)
    walk(b, 1.0)
    with ab.scope("b"), ab.scope("c"):
        walk(0.0, 1.0)


def _ref(c):
    total, s = 0.0, 0.0
    for i in range(3):
        total += _pair(c, "v/", i, 2.0, (i,))[0]
    for t in range(4):
        part, s = _pair(c, "s/", s, 1.0 + t, (t,))
        total += part
        s = s / 3
    for i in range(2):
        z = 0.0
        for t in range(4):
            part, z = _pair(c, "vs/", z / 3, 1.0 + i, (i, t))
            total += part
    return total + _pair(c, "j/", 0.5, 1.0)[0]


@model(
    _ref,
    {
        f"{p}/{s}": shape
        for p, shape in {"v": (3,), "s": (4,), "vs": (2, 4), "j": ()}.items()
        for s in ("x", "e")
    },
)
def jit_everywhere():
    with ab.scope("v"):
        jax.vmap(lambda i: walk(i, 2.0))(jnp.arange(3.0))
    with ab.scope("s"):
        jax.lax.scan(lambda s, t: (walk(s, 1.0 + t) / 3, None), 0.0, jnp.arange(4.0))

    def series(i):
        return jax.lax.scan(lambda z, _: (walk(z / 3, 1.0 + i), None), 0.0, None, length=4)

    with ab.scope("vs"):
        jax.vmap(series)(jnp.arange(2.0))
    with ab.scope("j"):
        jax.jit(lambda: jax.jit(walk)(0.5, 1.0))()


def _ref(c):
    total, z = cf.half_normal(c["s"], 1.0), 0.0
    for t in range(4):
        total += cf.normal(c["z"][t], jnp.sin(z), c["s"])
        z = c["z"][t]
    return total + cf.normal(c["w"], jnp.exp(z / 5), 1.0)


@model(_ref, {"s": (), "z": (4,), "w": ()})
def checkpointed():
    s = ab.sample("s", dist.HalfNormal(1.0))

    @jax.checkpoint
    def step(z, _):
        return ab.sample("z", dist.Normal(jnp.sin(z), s)), None

    z, _ = jax.lax.scan(step, 0.0, None, length=4)
    jax.checkpoint(lambda z: ab.sample("w", dist.Normal(jnp.exp(z / 5), 1.0)))(z)


@jax.custom_jvp
def clipped(x):
    return jnp.clip(x, -1.0, 1.0)


@clipped.defjvp
def _(
    primals, tangents
):  # straight through: the derivative of a reference shows whether it is used
    return clipped(*primals), tangents[0]


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (5 * g,))


def _ref(c):
    return (
        cf.normal(c["x"], 0, 3)
        + cf.normal(c["y"], clipped(c["x"]), 1.0)
        + cf.normal(c["z"], doubled(c["y"]), 1.0)
    )


@model(_ref, {"x": (), "y": (), "z": ()})
def custom_derivatives():
    x = ab.sample("x", dist.Normal(0, 3))
    y = ab.sample("y", dist.Normal(clipped(x), 1.0))
    ab.sample("z", dist.Normal(doubled(y), 1.0))


def linear(n):
    """A sub-model: a plain function is one too."""
    w = ab.sample("w", dist.Normal(0, 1).expand((n,)))
    return ab.deterministic("norm", jnp.sum(w**2)), w


def _ref(c, x, y):
    total = cf.normal(c["first/w"], 0, 1) + cf.normal(c["second/w"], 0, 1)
    total += cf.normal(c["group/w"], 0, 1) + cf.gamma(c["noise"], 2.0, 2.0)
    loc = x @ (c["first/w"] + c["second/w"]) + jnp.sum(c["group/w"])
    return total + cf.normal(y, loc, c["noise"])


@model(
    _ref,
    {"first/w": (2,), "second/w": (2,), "group/w": (3, 1), "noise": ()},
    args=(np.array([[1.0, 0.5], [-0.3, 2.0], [0.1, 0.1]]), np.array([0.2, 1.0, -0.7])),
)
def submodels(x, y):
    sub = ab.model(linear)
    with ab.scope("first"):
        _, w1 = sub(2)
    _, w2 = ab.scope("second")(linear)(2)

    @ab.scope("group")
    def element(_):
        return sub(1)[1]

    w3 = jax.vmap(element)(jnp.arange(3))
    noise = ab.sample("noise", dist.Gamma(2.0, 2.0))
    loc = x @ (w1 + w2) + jnp.sum(w3)
    ab.sample("y", dist.Normal(loc, noise), obs=y)


def _ref(c, y):
    return (
        cf.normal(c["theta"], 0, 1) + cf.normal(y, c["theta"] * 2, 1.0) + cf.normal(c["last"], 1.0)
    )


@model(_ref, {"theta": (), "last": ()}, args=(0.8,))
def recorded_values(y):
    theta = ab.sample("theta", dist.Normal(0, 1))
    twice = ab.deterministic("twice", 2 * theta)
    ab.sample("y", dist.Normal(twice, 1.0), obs=y)
    jax.vmap(lambda i: ab.deterministic("mapped", theta + i))(jnp.arange(3.0))
    jax.lax.scan(lambda c, i: (c + ab.deterministic("summed", c + i), None), theta, jnp.arange(4.0))
    ab.sample("last", dist.Normal(1.0, 1.0))
