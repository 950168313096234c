"""The dataflow analysis and the edges of the dependency graph, exactly."""

import jax
import jax.numpy as jnp
import pytest

import abduce as ab
import abduce.dist as dist
from abduce.ppl.dataflow import Label, propagate
from abduce.ppl.graph import Edge, graph


def edges(program, *args):
    """Edges of a program, as 'a -> b' with 'a ~> b' for one from the past."""
    g = graph(ab.model(program), *args)
    return {f"{e.source} {'~>' if e.lag else '->'} {e.target}" for e in g.edges}


def normal(name, *parents, obs=None):
    return ab.sample(name, dist.Normal(sum(parents, start=0.0), 1.0), obs=obs)


SIGMA = jnp.arange(1.0, 9.0)


@ab.model
def schools(sigma):
    mu = ab.sample("mu", dist.Normal(0, 5))
    tau = ab.sample("tau", dist.HalfCauchy(5))

    def school(s):
        theta = ab.sample("theta", dist.Normal(mu, tau))
        return ab.sample("y", dist.Normal(theta, s))

    return jax.vmap(school, axis_name="school")(sigma)


# Edges


def test_schools():
    g = graph(schools, SIGMA)
    assert g.edges == (Edge("mu", "theta"), Edge("tau", "theta"), Edge("theta", "y"))
    assert list(g.sites) == ["mu", "tau", "theta", "y"]
    assert g.parents("theta") == ("mu", "tau") and g.parents("mu") == ()
    assert g.children("mu") == ("theta",) and g.children("y") == ()
    assert g.markov_blanket("mu") == ("tau", "theta")
    assert g.markov_blanket(("mu", "tau")) == ("theta",)
    axis = g.sites["theta"].axes[0]
    assert (axis.kind, axis.name, axis.size) == ("vmap", "school", 8)
    assert g.groups["theta"] == g.groups["y"] != g.groups["mu"]


def test_edges_follow_outputs_of_an_inner_jit():
    @jax.jit
    def swap(a, b):
        return b, a + 1.0

    def program():
        x, y = swap(normal("a"), normal("b"))
        normal("x", x), normal("y", y)

    assert edges(program) == {"b -> x", "a -> y"}


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit, jax.custom_jvp, jax.custom_vjp])
def test_edges_follow_outputs_of_calls_with_sites(wrap):
    def body(a, b):
        return normal("x", a), 2.0 * b

    def program():
        f = wrap(body)
        if wrap is jax.custom_jvp:
            f.defjvp(lambda p, t: (f(*p), f(*t)))
        if wrap is jax.custom_vjp:
            f.defvjp(lambda *p: (f(*p), None), lambda _, t: t)
        u, v = f(normal("a"), normal("b"))
        normal("u", u), normal("v", v)

    assert edges(program) == {"a -> x", "x -> u", "b -> v"}


def test_zero_times_a_value_is_an_edge():
    """Sound, not exact: this is the documented limit of dataflow."""

    def program():
        normal("b", 0.0 * normal("a"))

    assert edges(program) == {"a -> b"}


def test_selecting_between_a_value_and_itself_needs_no_predicate():
    def program():
        a, b = normal("a"), normal("b")
        normal("x", jnp.where(a > 0, b, jax.lax.stop_gradient(b)))
        normal("y", jnp.where(a > 0, b, 1.0))

    assert edges(program) == {"b -> x", "a -> y", "b -> y"}


# Edges of loops


def test_chain_depends_on_its_own_past():
    def program():
        def step(z, _):
            z = normal("z", z)
            normal("y", z)
            return z, None

        last, _ = jax.lax.scan(step, normal("z0"), None, length=4)
        normal("end", last)

    assert edges(program) == {"z0 -> z", "z ~> z", "z -> y", "z -> end"}


def test_independent_steps_have_no_past():
    def program():
        def step(c, x):
            normal("y", normal("w", x), c)
            return c, None

        jax.lax.scan(step, normal("a"), jnp.arange(4.0))

    assert edges(program) == {"w -> y", "a -> y"}


@pytest.mark.parametrize("length", [1, 2])
def test_a_single_step_has_no_past(length):
    def program():
        jax.lax.scan(lambda z, _: (normal("z", z), None), 0.0, None, length=length)

    assert edges(program) == (set() if length == 1 else {"z ~> z"})


def test_delay_line_keeps_slots_apart():
    def program():
        def step(c, _):
            previous, fixed = c
            a = normal("a", fixed)
            b = normal("b", previous)
            return (a, fixed), b

        (last, fixed), b = jax.lax.scan(step, (0.0, normal("f")), None, length=5)
        normal("x", last), normal("y", fixed), normal("z", jnp.sum(b))

    assert edges(program) == {"f -> a", "a ~> b", "a -> x", "f -> y", "b -> z"}


def test_delay_of_two_steps_reaches_through():
    def program():
        def step(c, _):
            one, two = c
            return (normal("a"), one), normal("b", two)

        jax.lax.scan(step, (0.0, 0.0), None, length=5)

    assert edges(program) == {"a ~> b"}
    # In two steps, nothing arrives that left two steps ago.

    def short():
        def step(c, _):
            one, two = c
            return (normal("a"), one), normal("b", two)

        jax.lax.scan(step, (0.0, 0.0), None, length=2)

    assert edges(short) == set()


def test_reverse_scan_and_unroll():
    def program():
        def step(z, _):
            z = normal("z", z)
            return z, z

        _, zs = jax.lax.scan(step, 0.0, None, length=4, reverse=True, unroll=2)
        jax.lax.scan(lambda c, z: (c, normal("y", z)), 0.0, zs)

    assert edges(program) == {"z ~> z", "z -> y"}


def test_nested_scans_tell_the_pasts_apart():
    def program():
        def outer(level, _):
            level = normal("level", level)

            def inner(x, _):
                return normal("x", x, level), None

            x, _ = jax.lax.scan(inner, 0.0, None, length=3)
            normal("sum", x)
            return level, None

        jax.lax.scan(outer, 0.0, None, length=2)

    found = edges(program)
    assert found == {"level ~> level", "level -> x", "x ~> x", "x -> sum"}


def test_inner_loop_carried_through_the_outer_one():
    def program():
        def outer(x, _):
            x, _ = jax.lax.scan(lambda x, _: (normal("x", x), None), x, None, length=3)
            normal("y", x)
            return x, None

        x, _ = jax.lax.scan(outer, 0.0, None, length=2)
        normal("z", x)

    assert edges(program) == {"x ~> x", "x -> y", "x -> z"}


def test_scan_under_vmap_and_vmap_in_scan():
    def program():
        def step(z, _):
            z = jax.vmap(lambda m: normal("z", m), axis_name="lane")(z)
            return z, normal("y", jnp.sum(z))

        def series(z):
            return jax.lax.scan(step, z, None, length=3)[0]

        jax.vmap(series, axis_name="series")(jnp.ones((5, 2)))

    assert edges(program) == {"z ~> z", "z -> y"}
    g = graph(ab.model(program))
    assert [str(a) for a in g.sites["z"].axes] == ["series: 5", "scan: 3", "lane: 2"]
    assert g.groups["z"][:2] == g.groups["y"]


def test_while_loop_slots():
    def program():
        n, a, b = normal("n"), normal("a"), normal("b")

        def body(c):
            i, moving, still, free = c
            return i + 1, moving * 2, still, free + b

        i, moving, still, _ = jax.lax.while_loop(lambda c: c[0] < n, body, (0.0, a, a, 0.0))
        normal("count", i), normal("moved", moving), normal("stayed", still)

    assert edges(program) == {
        "n -> count", "n -> moved", "a -> moved", "a -> stayed",
    }  # fmt: skip


def test_bounded_while_loop():
    def program():
        ab.while_loop(lambda x: x < 2.0, lambda x: x + normal("up", x), jnp.asarray(0.0), 4)

    assert edges(program) == {"up ~> up", "up -> while_loop(up)"}


def test_mutable_reference():
    def program():
        r = jax.new_ref(0.0)

        def step(c, _):
            x = normal("x", r[...])
            r[...] = x
            return c, normal("w")

        jax.lax.scan(step, 0.0, None, length=3)
        normal("y", r[...])

    assert edges(program) == {"x ~> x", "x -> y"}


def test_reference_written_in_a_branch_depends_on_the_predicate():
    def program():
        r = jax.new_ref(0.0)

        def write():
            r[...] = 1.0

        jax.lax.cond(normal("p") > 0, write, lambda: None)
        normal("y", r[...])

    assert edges(program) == {"p -> y"}


# Edges of branches


def branches(p, a, b):
    def left(a, b):
        return normal("u", a), b, 1.0, 3.0

    def right(a, b):
        return normal("v"), b, 2.0, 3.0

    return jax.lax.cond(p > 0, left, right, a, b)


BRANCH_EDGES = {
    "p -> u", "a -> u", "p -> v", "p -> x", "u -> x", "v -> x", "b -> same", "p -> other",
}  # fmt: skip


def test_cond():
    def program():
        x, same, other, constant = branches(normal("p"), normal("a"), normal("b"))
        normal("x", x), normal("same", same), normal("other", other), normal("const", constant)

    assert edges(program) == BRANCH_EDGES
    g = graph(ab.model(program))
    assert g.sites["u"].conditional and not g.sites["x"].conditional


def test_cond_under_vmap_has_the_same_edges():
    def program():
        names = jax.vmap(lambda _: (normal("p"), normal("a"), normal("b")))(jnp.arange(3))
        x, same, other, constant = jax.vmap(branches)(*names)
        jax.vmap(lambda x, s, o, c: (normal("x", x), normal("same", s), normal("other", o)))(
            x, same, other, constant
        )

    assert edges(program) == BRANCH_EDGES
    g = graph(ab.model(program))
    assert g.sites["u"].conditional and g.groups["u"] == g.groups["v"]


def test_switch_with_one_address_in_several_branches():
    def program():
        k = ab.sample("k", dist.Categorical(jnp.ones(3) / 3))
        a, b = normal("a"), normal("b")
        fs = [lambda: normal("x", a), lambda: normal("x", b), lambda: normal("other")]
        normal("y", jax.lax.switch(k, fs))

    assert edges(program) == {
        "k -> x", "a -> x", "b -> x", "k -> other", "k -> y", "x -> y", "other -> y",
    }  # fmt: skip


def test_predicate_of_nested_conds_reaches_the_inner_sites():
    def program():
        p, q = normal("p"), normal("q")

        def inner():
            return jax.lax.cond(q > 0, lambda: normal("x"), lambda: 0.0)

        jax.lax.cond(p > 0, inner, lambda: 0.0)

    assert edges(program) == {"p -> x", "q -> x"}


# What kinds of sites do


def test_deterministic_sites_are_transparent():
    def program():
        s = ab.deterministic("s", normal("a") + normal("b"))
        normal("y", s)

    assert edges(program) == {"a -> s", "b -> s", "a -> y", "b -> y"}
    assert graph(ab.model(program)).children("s") == ()


def test_scale_observation_mask_and_factor_are_parents():
    def program():
        a, b, c = normal("a"), normal("b"), normal("c")
        with ab.scaled(jnp.exp(a)):
            normal("x", b)
        y = normal("y", obs=c)
        normal("after", y)
        z = ab.sample("z", dist.Normal(0, 1), obs=ab.masked(jnp.asarray(0.0), b > 0))
        ab.factor("f", z * c)

    assert edges(program) == {
        "a -> x", "b -> x", "c -> y", "y -> after", "c -> after", "b -> z",
        "z -> f", "b -> f", "c -> f",
    }  # fmt: skip


def test_params_are_nodes_without_a_past():
    def program():
        def step(c, _):
            w = ab.param("w", jnp.ones(2))
            return w[1], normal("x", w[0], c)

        jax.lax.scan(step, 0.0, None, length=3)

    assert edges(program) == {"w -> x"}
    assert graph(ab.model(program)).sites["w"].kind == "param"


def test_transformations_change_the_graph():
    g = graph(ab.do(schools, {"theta": jnp.zeros(8)}), SIGMA)
    assert g.edges == () and g.sites["theta"].kind == "deterministic"
    g = graph(ab.condition(schools, {"y": SIGMA}), SIGMA)
    assert g.sites["y"].observed and not g.d_separated("mu", "tau")


def test_scopes_and_arguments():
    def program(x):
        with ab.scope("left"):
            a = normal("a", x)
        with ab.scope("right"):
            normal("a", a)

    assert edges(program, 1.0) == {"left/a -> right/a"}


def test_families_are_named_as_written():
    def program():
        ab.sample("a", dist.Bernoulli(0.5).mask(True).expand([3]).to_event(1))
        ab.sample("b", dist.Categorical(logits=jnp.zeros(3)))

    g = graph(ab.model(program))
    assert [s.family for s in g.sites.values()] == ["Bernoulli", "Categorical"]


# The analysis itself


def test_propagate_labels_of_inputs():
    program = ab.model(lambda x, y: (normal("a", x), y * 2.0)).program(1.0, 2.0)
    seen = {}

    def visit(v):
        seen[v.site.address] = v.operand("leaf")
        return {v.label("a")}

    x, y = Label("x"), Label("y")
    out = propagate(program.jaxpr, visit, [{x}, {y}])
    assert seen == {"a": {x}} and out == [{Label("a")}, {y}]


def test_labels_carry_the_scan_they_are_past_in():
    def program():
        def outer(c, _):
            def inner(x, _):
                x = normal("x", x)
                return x, None

            return jax.lax.scan(inner, c, None, length=2)[0], None

        jax.lax.scan(outer, 0.0, None, length=2)

    pasts = set()

    def visit(v):
        pasts.update(x.past for x in v.inputs)
        return {v.label(v.site.address)}

    propagate(ab.model(program).program().jaxpr, visit)
    assert pasts == {frozenset({0}), frozenset({1})}
