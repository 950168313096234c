"""Scopes: addresses are absolute, also where JAX caches the trace of an inner function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist

from . import closed_forms as cf
from .cases import close

KEY = jax.random.key(1)


@jax.jit
def pair(loc):
    x = ab.sample("x", dist.Normal(loc, 1.0))
    with ab.scope("in"):
        y = ab.sample("y", dist.Normal(x, 1.0))
    return y


def addresses(program, *args):
    trace = ab.model(program).simulate(KEY, *args)
    return set(trace.choices)


def test_cached_jit_twice_under_different_scopes():
    def program():
        with ab.scope("a"):
            y = pair(0.0)
        with ab.scope("b"):
            pair(y)

    m = ab.model(program)
    trace = m.simulate(KEY)
    c = trace.choices
    assert set(c) == {"a/x", "a/in/y", "b/x", "b/in/y"}
    expected = cf.normal(c["a/x"]) + cf.normal(c["a/in/y"], c["a/x"])
    expected += cf.normal(c["b/x"], c["a/in/y"]) + cf.normal(c["b/in/y"], c["b/x"])
    close(trace.log_density, expected)
    assert float(c["a/x"]) != float(c["b/x"])


def test_cached_jit_across_models():
    """What one model traced must not leak its scope into the next."""

    def scoped():
        with ab.scope("first"):
            pair(0.0)

    assert addresses(scoped) == {"first/x", "first/in/y"}
    assert addresses(lambda: pair(0.0)) == {"x", "in/y"}
    assert addresses(scoped) == {"first/x", "first/in/y"}


def test_decorator():
    @ab.scope("outer")
    def f(n):
        if n:
            return f(n - 1)  # entering the same decorator again nests
        return ab.sample("x", dist.Normal(0.0, 1.0))

    assert addresses(lambda: f(0)) == {"outer/x"}
    assert addresses(lambda: f(2)) == {"outer/outer/outer/x"}


def test_decorator_on_a_jitted_function_and_on_a_model():
    @ab.scope("s")
    @jax.jit
    def f():
        return ab.sample("x", dist.Normal(0.0, 1.0))

    @ab.model
    def sub():
        ab.sample("z", dist.Normal(0.0, 1.0))

    def program():
        f()
        ab.scope("t")(sub)()
        ab.scope("u")(jax.jit(lambda: sub()))()

    assert addresses(program) == {"s/x", "t/z", "u/z"}


def test_one_scope_object_used_twice_and_nested():
    scope = ab.scope("a")

    def program():
        with scope:
            ab.sample("x", dist.Normal(0.0, 1.0))
            with scope:
                ab.sample("x", dist.Normal(0.0, 1.0))
        ab.sample("x", dist.Normal(0.0, 1.0))

    assert addresses(program) == {"a/x", "a/a/x", "x"}


def test_scope_closes_after_an_error():
    def program(fail):
        try:
            with ab.scope("a"):
                if fail:
                    raise KeyError("stop")
        except KeyError:
            pass
        ab.sample("x", dist.Normal(0.0, 1.0))

    assert addresses(program, True) == {"x"}


def test_scope_around_control_flow():
    """The scope may stand inside or outside of vmap, scan and cond."""

    def draw(loc):
        return ab.sample("x", dist.Normal(loc, 1.0))

    def inside(name):
        def f(loc):
            with ab.scope(name):
                return draw(loc)

        return f

    def program():
        jax.vmap(inside("v1"))(jnp.arange(3.0))
        with ab.scope("v2"):
            jax.vmap(draw)(jnp.arange(3.0))
        jax.lax.scan(lambda c, t: (inside("s1")(c), None), 0.0, jnp.arange(2.0))
        with ab.scope("s2"):
            jax.lax.scan(lambda c, t: (draw(c), None), 0.0, jnp.arange(2.0))
        jax.lax.cond(ab.sample("z", dist.Bernoulli(0.5)) == 1, inside("c1"), inside("c2"), 0.0)

    trace = ab.model(program).simulate(KEY)
    shapes = {a: v.shape for a, v in trace.choices.items()}
    assert shapes == {
        "v1/x": (3,), "v2/x": (3,), "s1/x": (2,), "s2/x": (2,), "z": (), "c1/x": (), "c2/x": (),
    }  # fmt: skip


def test_every_kind_of_site_is_prefixed():
    def program():
        with ab.scope("s"):
            p = ab.param("p", 1.5)
            ab.deterministic("d", p)
            ab.factor("f", p)
            ab.sample("x", dist.Normal(p, 1.0), obs=0.5)
            ab.sample("net", {"w": dist.Normal(0.0, 1.0)})
            ab.deterministic("tree", {"k": p, "l": [p]})

    trace = ab.model(program).simulate(KEY)
    assert set(trace.deterministics) == {"s/d", "s/tree/k", "s/tree/l/0"}
    assert set(trace.scores) >= {"s/f", "s/x", "s/net/w"}
    assert set(trace.choices) == {"s/net/w"}
    density = ab.model(program).log_density({"s/net/w": 0.0}, params={"s/p": 2.0})
    close(density, 2.0 + cf.normal(0.5, 2.0) + cf.normal(0.0))


def test_scope_names_with_slashes_join():
    def program():
        with ab.scope("a/b"):
            ab.sample("x", dist.Normal(0.0, 1.0))
        with ab.scope("c"):
            ab.sample("d/x", dist.Normal(0.0, 1.0))

    assert addresses(program) == {"a/b/x", "c/d/x"}


@pytest.mark.parametrize("name", ["", 3, None])
def test_bad_scope_names(name):
    with pytest.raises(ab.InvalidModel, match="scope"):
        ab.scope(name)


def test_operations_inside_a_program_are_not_scoped():
    """`log_density` of another model takes that model's own addresses, wherever it is called."""

    @ab.model
    def target():
        ab.sample("x", dist.Normal(0.0, 2.0))

    @ab.model
    def program():
        with ab.scope("s"):
            v = ab.sample("v", dist.Normal(0.0, 1.0))
            ab.factor("w", ab.log_density(target, {"x": v}))

    close(program.log_density({"s/v": 0.4}), cf.normal(0.4) + cf.normal(0.4, 0, 2))


def test_scopes_in_threads_are_apart():
    from concurrent.futures import ThreadPoolExecutor

    def program(name):
        def f():
            with ab.scope(name):
                x = pair(0.0)
                with ab.scope("two"):
                    pair(x)

        return addresses(f)

    names = [f"t{i}" for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(program, names))
    for name, got in zip(names, found, strict=True):
        assert got == {f"{name}/x", f"{name}/in/y", f"{name}/two/x", f"{name}/two/in/y"}


def test_scaled_does_not_leak_into_a_cached_jit():
    """The same jitted function with, without, and with another scale."""

    @jax.jit
    def observe(mu):
        ab.sample("y", dist.Normal(mu, 1.0), obs=0.3)

    def program(c):
        mu = ab.sample("mu", dist.Normal(0.0, 1.0))
        with ab.scope("plain"):
            observe(mu)
        with ab.scope("scaled"), ab.scaled(c):
            observe(mu)
        with ab.scope("fixed"), ab.scaled(0.5):
            observe(mu)
        with ab.scope("after"):
            observe(mu)

    m = ab.model(program)
    for c in (2.0, 0.1):
        expected = cf.normal(0.7) + (1 + c + 0.5 + 1) * cf.normal(0.3, 0.7)
        close(m.log_density({"mu": 0.7}, c), expected)
    grad = jax.grad(lambda c: m.log_density({"mu": 0.7}, c))(2.0)
    close(grad, cf.normal(0.3, 0.7))
    many = jax.vmap(lambda c: m.log_density({"mu": 0.7}, c))(jnp.array([2.0, 0.1]))
    close(np.diff(many)[0], -1.9 * float(cf.normal(0.3, 0.7)))
