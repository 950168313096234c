"""Zoo, part 1: shapes, `vmap`, families in context, and everything but loops and branches."""

import jax
import jax.numpy as jnp
import numpy as np

import abduce as ab
import abduce.dist as dist

from . import closed_forms as cf
from .zoo_entry import Entry, collect

BASIC: dict[str, Entry] = {}

Y = np.array([0.3, -1.2, 0.8, 2.1])
S = np.array([0.5, 1.0, 1.5, 2.0])


def model(reference, shapes, **options):
    return collect(BASIC, reference, shapes, **options)


# -- plain sites -----------------------------------------------------------------------------


def _ref(c):
    return (
        cf.normal(c["mu"], 0, 2)
        + cf.half_normal(c["sigma"], 1.5)
        + cf.normal(c["x"], c["mu"], c["sigma"])
    )


@model(_ref, {"mu": (), "sigma": (), "x": ()}, retval=lambda c: c["x"] + c["mu"])
def scalar_chain():
    mu = ab.sample("mu", dist.Normal(0, 2))
    sigma = ab.sample("sigma", dist.HalfNormal(1.5))
    return ab.sample("x", dist.Normal(mu, sigma)) + mu


def _ref(c, y):
    return (
        cf.normal(c["a"], jnp.arange(4.0)[:, None], S[:3])
        + cf.normal(c["b"], jnp.sum(c["a"]), 2.0)
        + cf.normal(y, c["b"], 0.5)
    )


@model(_ref, {"a": (4, 3), "b": (3,)}, args=(np.array([0.1, 0.2, 0.3]),))
def batch_and_event_shapes(y):
    a = ab.sample("a", dist.Normal(jnp.arange(4.0)[:, None], S[:3]))
    b = ab.sample("b", dist.Normal(jnp.sum(a), 2.0).expand((3,)).to_event(1))
    ab.sample("y", dist.Normal(b, 0.5).to_event(1), obs=y)


def _ref(c):
    return (
        cf.dirichlet(c["w"], jnp.array([2.0, 3.0, 1.5]))
        + cf.normal(c["cut"], 0, 1)
        + cf.categorical(c["z"], c["w"])
        + cf.normal(c["x"], jnp.cumsum(c["cut"])[c["z"]], 0.3)
    )


# derivatives that leave the simplex depend on who normalizes, so not with respect to w
@model(_ref, {"w": (3,), "cut": (3,), "z": (), "x": ()}, smooth=("cut", "x"))
def simplex_and_indexing():
    w = ab.sample("w", dist.Dirichlet(jnp.array([2.0, 3.0, 1.5])))
    cut = ab.sample("cut", dist.Normal(0, 1).expand([3]))
    z = ab.sample("z", dist.Categorical(w))
    ab.sample("x", dist.Normal(jnp.cumsum(cut)[z], 0.3))


def _ref(c):
    chol = c["scale"][:, None] * c["corr"]
    return (
        cf.lkj_cholesky_2(c["corr"], 2.0)
        + cf.log_normal(c["scale"], 0.0, 0.4)
        + cf.multivariate_normal(c["x"], jnp.zeros(2), chol @ chol.T)
    )


@model(_ref, {"corr": (2, 2), "scale": (2,), "x": (2,)}, smooth=("scale", "x"))
def correlation_cholesky():
    corr = ab.sample("corr", dist.LKJCholesky(2, 2.0))
    scale = ab.sample("scale", dist.LogNormal(0.0, 0.4 * jnp.ones(2)))
    ab.sample("x", dist.MultivariateNormal(jnp.zeros(2), scale_tril=scale[:, None] * corr))


def _ref(c):
    a1 = c["alpha1"]
    return (
        cf.half_normal(c["sigma"], 2.0)
        + cf.uniform(c["u"], 0.0, c["sigma"])
        + cf.uniform(a1, 0.0, 1.0)
        + cf.uniform(c["beta1"], 0.0, 1.0 - a1)
        + cf.normal(c["t"], c["u"], 1.0)
        - jnp.log(1 - jax.scipy.stats.norm.cdf(-c["u"]))  # the mass above 0, where t starts
    )


@model(_ref, {"sigma": (), "u": (), "alpha1": (), "beta1": (), "t": ()})
def dependent_supports():
    sigma = ab.sample("sigma", dist.HalfNormal(2.0))
    u = ab.sample("u", dist.Uniform(0.0, sigma))
    alpha1 = ab.sample("alpha1", dist.Uniform(0.0, 1.0))
    ab.sample("beta1", dist.Uniform(0.0, 1.0 - alpha1))
    ab.sample("t", dist.TruncatedNormal(u, 1.0, low=0.0))


def _ref(c, y):
    return cf.normal(y, c["cuts"][1], c["tau"])


@model(
    _ref,
    {"cuts": (3,), "tau": ()},
    args=(Y,),
    values={"cuts": np.array([-0.4, 0.2, 1.7]), "tau": np.array(1.3)},
)
def improper_priors(y):
    constraint = dist.constraints
    cuts = ab.sample("cuts", dist.ImproperUniform(constraint.ordered_vector, (), (3,)))
    tau = ab.sample("tau", dist.ImproperUniform(constraint.positive, (), ()))
    ab.sample("y", dist.Normal(cuts[1], tau), obs=y)


def _ref(c, y):
    locs = jnp.cumsum(jnp.concatenate([c["first"][None], c["gap"]]))
    return (
        cf.normal(c["first"], -1.0, 1.0)
        + cf.exponential(c["gap"], 0.8)
        + cf.dirichlet(c["w"], jnp.ones(3))
        + cf.normal_mixture(y, c["w"], locs, jnp.array([0.5, 0.6, 0.7]))
    )


@model(_ref, {"first": (), "gap": (2,), "w": (3,)}, args=(Y,), smooth=("first", "gap"))
def marginal_mixture(y):
    first = ab.sample("first", dist.Normal(-1.0, 1.0))
    gap = ab.sample("gap", dist.Exponential(0.8 * jnp.ones(2)))
    w = ab.sample("w", dist.Dirichlet(jnp.ones(3)))
    locs = jnp.cumsum(jnp.concatenate([first[None], gap]))
    parts = dist.Normal(locs, jnp.array([0.5, 0.6, 0.7]))
    ab.sample("y", dist.MixtureSameFamily(dist.Categorical(w), parts), obs=y)


# -- vmap ------------------------------------------------------------------------------------


def _ref(c, s, y):
    return (
        cf.normal(c["mu"], 0, 5)
        + cf.half_cauchy(c["tau"], 5)
        + cf.normal(c["theta"], c["mu"], c["tau"])
        + cf.normal(y, c["theta"], s)
    )


@model(
    _ref,
    {"mu": (), "tau": (), "theta": (4,)},
    args=(S, Y),
    retval=lambda c, s, y: 2 * c["theta"],
)
def vmap_schools(s, y):
    mu = ab.sample("mu", dist.Normal(0, 5))
    tau = ab.sample("tau", dist.HalfCauchy(5))

    def school(s, y):
        theta = ab.sample("theta", dist.Normal(mu, tau))
        ab.sample("y", dist.Normal(theta, s), obs=y)
        return 2 * theta

    return jax.vmap(school)(s, y)


def _ref(c):
    return (
        cf.normal(c["mu"], 0, 1)
        + cf.normal(c["free"], 0, 1)
        + cf.normal(c["shared"], c["mu"], 1)
        + cf.normal(0.7, c["shared"], 2.0)  # an observation shared by all elements counts 4 times
        + 4 * cf.normal(1.5, c["mu"], 1.0)  # neither parameter nor observation mapped
        + cf.normal(Y, c["mu"], 3.0)  # only the observation mapped
    )


@model(_ref, {"mu": (), "free": (4,), "shared": (4,)})
def vmap_what_is_mapped():
    mu = ab.sample("mu", dist.Normal(0, 1))

    def element(y):
        ab.sample("free", dist.Normal(0.0, 1.0))
        shared = ab.sample("shared", dist.Normal(mu, 1))
        ab.sample("o1", dist.Normal(shared, 2.0), obs=0.7)
        ab.sample("o2", dist.Normal(mu, 1.0), obs=1.5)
        ab.sample("o3", dist.Normal(mu, 3.0), obs=y)

    jax.vmap(element)(Y)


def _ref(c):
    return cf.normal(c["z"], 0, 1) + cf.bernoulli(c["b"], 0.3)


@model(_ref, {"z": (5,), "b": (5, 2)}, retval=lambda c: c["z"])
def vmap_axis_size_only():
    def element():
        ab.sample("b", dist.Bernoulli(0.3 * jnp.ones(2)))
        return ab.sample("z", dist.Normal(0, 1))

    return jax.vmap(element, in_axes=(), axis_size=5)()


GRID = np.arange(24.0).reshape(2, 3, 4) / 10


def _ref(c, grid):
    # outer vmap over axis 2 (length 4), inner over axis 0 (length 2), axis 1 is the batch shape
    total = cf.normal(c["row"], 0, 1)
    for i in range(4):
        for j in range(2):
            total += cf.normal(c["x"][i, j], grid[j, :, i] + c["row"][i], 1.0 + j)
    return total


@model(
    _ref,
    {"row": (4,), "x": (4, 2, 3)},
    args=(GRID,),
    retval=lambda c, grid: jnp.transpose(c["x"], (2, 1, 0)),
)
def vmap_nested_axes(grid):
    def outer(plane):  # (2, 3)
        row = ab.sample("row", dist.Normal(0, 1))

        def inner(line, scale):  # (3,)
            return ab.sample("x", dist.Normal(line + row, scale))

        return jax.vmap(inner, in_axes=(0, 0), out_axes=1)(plane, jnp.array([1.0, 2.0]))  # (3, 2)

    return jax.vmap(outer, in_axes=2, out_axes=2)(grid)


def _ref(c, loc):
    total = cf.gamma(c["v"], 3.0, 1.0 + jnp.arange(3.0))
    for i in range(3):
        total += cf.multivariate_normal(
            c["x"][i], loc, c["v"][i] * jnp.array([[2.0, 0.3], [0.3, 1.0]])
        )
        total += cf.multivariate_normal(c["y"][i], c["x"][i], jnp.eye(2))
    return total


@model(_ref, {"v": (3,), "x": (3, 2), "y": (3, 2)}, args=(np.array([0.5, -0.5]),))
def vmap_events(loc):
    def element(rate):
        v = ab.sample("v", dist.Gamma(3.0, rate))
        cov = v * jnp.array([[2.0, 0.3], [0.3, 1.0]])
        x = ab.sample("x", dist.MultivariateNormal(loc, cov))
        ab.sample("y", dist.MultivariateNormal(x, scale_tril=jnp.eye(2)))

    jax.vmap(element)(1.0 + jnp.arange(3.0))


def _ref(c):
    total = cf.normal(c["z"], 0, 1)
    return total + cf.normal(c["y"], jnp.sum(c["z"]) + jnp.arange(3), jnp.exp(c["z"] / 4))


@model(_ref, {"z": (3,), "y": (3,)})
def vmap_collective():
    def element(_):
        z = ab.sample("z", dist.Normal(0, 1))
        loc = jax.lax.psum(z, "item") + jax.lax.axis_index("item")
        ab.sample("y", dist.Normal(loc, jnp.exp(z / 4)))

    jax.vmap(element, axis_name="item")(jnp.zeros(3))


def _ref(c, group, y):
    return (
        cf.normal(c["theta"], 0, 2)
        + cf.categorical(c["z"], jnp.array([0.2, 0.8]))
        + cf.poisson(y, jnp.exp(c["theta"][group] / 3 + 0.5 * c["z"]))
    )


@model(
    _ref,
    {"theta": (3,), "z": (5,)},
    args=(np.array([0, 2, 1, 2, 0]), np.array([1, 0, 3, 2, 1])),
)
def vmap_gather(group, y):
    theta = jax.vmap(lambda _: ab.sample("theta", dist.Normal(0, 2)))(jnp.arange(3))

    def row(g, y):
        z = ab.sample("z", dist.Categorical(jnp.array([0.2, 0.8])))
        ab.sample("y", dist.Poisson(jnp.exp(theta[g] / 3 + 0.5 * z)), obs=y)

    jax.vmap(row)(group, y)


def _ref(c, empty):
    return cf.normal(c["mu"], 0, 1)


@model(_ref, {"mu": (), "x": (0,)}, args=(np.zeros(0),), smooth=("mu",))
def vmap_of_nothing(empty):
    mu = ab.sample("mu", dist.Normal(0, 1))

    def element(y):
        x = ab.sample("x", dist.Normal(mu, 1))
        ab.sample("y", dist.Normal(x, 1), obs=y)

    jax.vmap(element)(empty)


# -- the other words of the language ---------------------------------------------------------


def _ref(c):
    total = cf.normal(c["x"], 0, 1) - 0.5 * c["x"] ** 2 + jnp.sum(jnp.sin(c["z"]) * jnp.arange(3))
    return total + cf.normal(c["z"], 0, 1) + jnp.sum(jnp.cos(c["z"])) + 3 * 0.25


@model(_ref, {"x": (), "z": (3,)})
def factors():
    x = ab.sample("x", dist.Normal(0, 1))
    ab.factor("square", -0.5 * x**2)

    def element(w):
        z = ab.sample("z", dist.Normal(0, 1))
        ab.factor("mapped", w * jnp.sin(z))
        ab.factor("unmapped", 0.25)
        return z

    z = jax.vmap(element)(jnp.arange(3.0))
    ab.factor("vector", jnp.cos(z))  # an array is summed


def _ref(c, t):
    return (
        cf.normal(c["x"], 0, 1)
        + t * cf.normal(c["y"], c["x"], 1)
        + 2.0 * t * (cf.normal(c["z"], c["y"], 1) + jnp.sum(c["z"]))
        + jnp.exp(c["x"] / 5) * cf.normal(0.4, c["x"], 1)
    )


@model(_ref, {"x": (), "y": (), "z": (3,)}, args=(0.3,))
def scaled_sites(t):
    x = ab.sample("x", dist.Normal(0, 1))
    with ab.scaled(t):
        y = ab.sample("y", dist.Normal(x, 1))
        with ab.scaled(2.0):

            @jax.jit
            def element(_):
                z = ab.sample("z", dist.Normal(y, 1))
                ab.factor("f", z)

            jax.vmap(element)(jnp.arange(3))
    with ab.scaled(jnp.exp(x / 5)):
        ab.sample("o", dist.Normal(x, 1), obs=0.4)


def _ref(c):
    layers = cf.normal(c["net/layers/0/weight"], 0, 1) + cf.normal(c["net/layers/0/bias"], 0, 2)
    layers += cf.normal(c["net/layers/1/weight"], 0, 1) + cf.normal(c["net/layers/1/bias"], 0, 2)
    h = jnp.tanh(c["net/layers/0/weight"] @ jnp.ones(2) + c["net/layers/0/bias"])
    out = c["net/layers/1/weight"] @ h + c["net/layers/1/bias"]
    return layers + cf.normal(0.5, out, 0.1)


@model(
    _ref,
    {
        "net/layers/0/weight": (3, 2),
        "net/layers/0/bias": (3,),
        "net/layers/1/weight": (1, 3),
        "net/layers/1/bias": (1,),
    },
)
def pytree_of_distributions():
    def layer(i, o):
        return {
            "weight": dist.Normal(0, 1).expand((o, i)),
            "bias": dist.Normal(jnp.zeros(o), 2.0),
        }

    net = ab.sample("net", {"layers": [layer(2, 3), layer(3, 1)]})
    h = jnp.tanh(net["layers"][0]["weight"] @ jnp.ones(2) + net["layers"][0]["bias"])
    out = net["layers"][1]["weight"] @ h + net["layers"][1]["bias"]
    ab.sample("y", dist.Normal(out, 0.1), obs=jnp.array([0.5]))


PARAMS = {"loc": np.array(0.7), "scale": np.array(2.5), "more": np.array([0.1, -0.2])}


def _ref(c):
    p = PARAMS
    total = cf.normal(c["x"], p["loc"], p["scale"])
    return total + cf.normal(c["y"], p["loc"] + c["x"] + p["more"], p["scale"])


@model(_ref, {"x": (), "y": (3, 2)}, params=PARAMS)
def learnable_parameters():
    loc = ab.param("loc", 0.0)
    scale = ab.param("scale", 1.0, constraint=dist.constraints.positive)
    x = ab.sample("x", dist.Normal(loc, scale))

    def element(_):
        more = ab.param("more", jnp.zeros(2))  # one value, though met three times
        ab.sample("y", dist.Normal(more + loc + x, scale))

    jax.vmap(element)(jnp.arange(3))


def _ref(c, mode, n, f, shift):
    total = 0.0
    for i in range(n):
        total += cf.normal(c[f"x{i}"], jnp.cos(shift), 1 + i)
    return total + cf.laplace(c["last"], c[f"x{n - 1}"], 1.0)


@model(
    _ref,
    {"x0": (), "x1": (), "x2": (), "last": ()},
    args=("heavy", 3, jnp.cos, 0.4),
)
def static_arguments(mode, n, f, shift):
    x = 0.0
    for i in range(n):  # an int is static, so a Python loop over it is fine
        x = ab.sample(f"x{i}", dist.Normal(f(shift), 1 + i))
    family = dist.Laplace if mode == "heavy" else dist.Normal
    ab.sample("last", family(x, 1.0))
