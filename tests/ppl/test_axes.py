"""Names of axes: from `vmap(axis_name=)` and `dims=`, in the order of the value's axes."""

import jax
import jax.numpy as jnp
import pytest

import abduce as ab
import abduce.dist as dist


def dims(program, *args):
    """The names of each site's dimensions."""
    return {a: s.dims for a, s in ab.model(program).program(*args).sites.items()}


def test_axis_names_of_vmap():
    def program(s):
        mu = ab.sample("mu", dist.Normal(0.0, 1.0))

        def school(s):
            theta = ab.sample("theta", dist.Normal(mu, 1.0))
            ab.deterministic("twice", 2 * theta)
            return ab.sample("y", dist.Normal(theta, s))

        jax.vmap(school, axis_name="school")(s)
        jax.vmap(lambda i: ab.sample("anonymous", dist.Normal(i, 1.0)))(s)

    assert dims(program, jnp.ones(4)) == {
        "mu": (), "theta": ("school",), "twice": ("school",), "y": ("school",),
        "anonymous": (None,),
    }  # fmt: skip


def test_order_of_nested_axes():
    def program():
        def outer(i):
            ab.sample("a", dist.Normal(i, 1.0))

            def inner(j):
                return ab.sample("x", dist.Normal(i + j, 1.0))

            return jax.vmap(inner, axis_name="col", out_axes=0)(jnp.arange(3.0))

        jax.vmap(outer, axis_name="row", out_axes=1)(jnp.arange(2.0))

    m = ab.model(program)
    sites = m.program().sites
    assert sites["a"].dims == ("row",)
    assert sites["x"].dims == ("row", "col")
    assert sites["x"].shape == (2, 3)


@pytest.mark.parametrize("order", ["vmap_scan", "scan_vmap", "vmap_scan_vmap"])
def test_scan_and_vmap(order):
    """A scan's axis has no name; the named axes stay where the value has them."""

    def draw(loc):
        return ab.sample("x", dist.Normal(loc, 1.0))

    def loop(f):
        return jax.lax.scan(lambda c, t: (f(c + t), None), 0.0, jnp.arange(4.0))[0]

    def vmap_scan():
        jax.vmap(lambda i: loop(lambda c: draw(c + i)), axis_name="row")(jnp.arange(3.0))

    def scan_vmap():
        loop(lambda c: jnp.sum(jax.vmap(lambda i: draw(c + i), axis_name="row")(jnp.arange(3.0))))

    def vmap_scan_vmap():
        def row(i):
            def body(c):
                return jnp.sum(jax.vmap(lambda j: draw(c + j), axis_name="col")(jnp.arange(2.0)))

            return loop(lambda c: body(c + i))

        jax.vmap(row, axis_name="row")(jnp.arange(3.0))

    program, expected, shape = {
        "vmap_scan": (vmap_scan, ("row", None), (3, 4)),
        "scan_vmap": (scan_vmap, (None, "row"), (4, 3)),
        "vmap_scan_vmap": (vmap_scan_vmap, ("row", None, "col"), (3, 4, 2)),
    }[order]
    site = ab.model(program).program().sites["x"]
    assert (site.dims, site.shape) == (expected, shape)


def test_dims_of_an_element():
    def program(x):
        beta = ab.sample("beta", dist.Normal(jnp.zeros(3), 1.0), dims="feature")
        ab.sample("w", dist.Normal(0.0, 1.0).expand((2, 3)).to_event(1), dims=("layer", "feature"))
        ab.param("p", jnp.zeros(3), dims=("feature",))

        def row(x):
            ab.deterministic("loc", beta * x, dims=("feature",))
            ab.sample("y", dist.Normal(beta * x, 1.0), dims=("feature",))
            ab.sample("half", dist.Normal(jnp.zeros((3, 2)), 1.0), dims=("feature", None))

        jax.vmap(row, axis_name="obs")(x)

    assert dims(program, jnp.ones((5, 3))) == {
        "beta": ("feature",),
        "w": ("layer", "feature"),
        "p": ("feature",),
        "loc": ("obs", "feature"),
        "y": ("obs", "feature"),
        "half": ("obs", "feature", None),
    }


def test_named_axes_in_branches():
    def program():
        def element(i):
            z = ab.sample("z", dist.Bernoulli(0.5))
            jax.lax.cond(z == 1, lambda: ab.sample("x", dist.Normal(i, 1.0)), lambda: 0.0)

        jax.vmap(element, axis_name="item")(jnp.arange(3.0))

    assert dims(program) == {"z": ("item",), "x": ("item",)}


def test_shapes_and_flags_of_the_site_table():
    def program():
        mu = ab.sample("mu", dist.Normal(0.0, 1.0))
        k = ab.sample("k", dist.Categorical(jnp.ones(3) / 3))
        ab.sample("v", dist.MultivariateNormal(jnp.zeros((4, 2)) + mu, jnp.eye(2)))
        ab.sample("y", dist.Normal(mu, 1.0), obs=0.3)
        jax.lax.cond(k == 1, lambda: ab.sample("c", dist.Normal(0.0, 1.0)), lambda: 0.0)

    sites = ab.model(program).program().sites
    assert {a: s.shape for a, s in sites.items()} == {
        "mu": (), "k": (), "v": (4, 2), "y": (), "c": (),
    }  # fmt: skip
    assert [a for a, s in sites.items() if s.observed] == ["y"]
    assert [a for a, s in sites.items() if s.is_discrete] == ["k"]
    assert [a for a, s in sites.items() if s.conditional] == ["c"]
    assert sites["v"].event_dim == 1


@pytest.mark.parametrize("names", [("a", "b"), (), ("a", "b", "c")])
def test_wrong_number_of_dims(names):
    def program():
        ab.sample("beta", dist.Normal(jnp.zeros(3), 1.0), dims=names)

    with pytest.raises(ab.InvalidModel) as e:
        ab.model(program).simulate(jax.random.key(0))
    assert "beta" in str(e.value) and "dims" in str(e.value)
