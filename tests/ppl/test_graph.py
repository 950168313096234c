"""`ab.graph`: edges from dataflow, separation, blankets, pictures."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist

from .cases import case
from .zoo import ZOO

nx = pytest.importorskip("networkx")


def normal(name, loc=0.0, scale=1.0):
    return ab.sample(name, dist.Normal(loc, scale))


def edges(program, *args):
    """`{(source, target)}`, and `(source, target, "past")` for an earlier step."""
    g = ab.graph(ab.model(program), *args)
    return {(e.source, e.target, "past") if e.lag else (e.source, e.target) for e in g.edges}


# -- edges -----------------------------------------------------------------------------------


def test_chain_fork_and_collider():
    def chain():
        normal("c", normal("b", normal("a")))

    def fork():
        a = normal("a")
        normal("b", a)
        normal("c", a)

    def collider():
        normal("c", normal("a") + normal("b"))

    assert edges(chain) == {("a", "b"), ("b", "c")}
    assert edges(fork) == {("a", "b"), ("a", "c")}
    assert edges(collider) == {("a", "c"), ("b", "c")}


def test_every_parameter_is_a_way_in():
    def program():
        a, b, p = normal("a"), ab.sample("b", dist.HalfNormal(1.0)), normal("p")
        normal("x", a, b)
        ab.sample("m", dist.MultivariateNormal(jnp.array([a, 0.0]), jnp.eye(2) * b))
        ab.sample("k", dist.Categorical(jax.nn.softmax(jnp.array([p, 0.0]))))

    assert edges(program) == {("a", "x"), ("b", "x"), ("a", "m"), ("b", "m"), ("p", "k")}


def test_no_edge_where_no_data_flow():
    def program(y):
        a, b = normal("a"), normal("b")
        unused = jnp.sin(a) * b
        del unused
        normal("x", b)
        normal("y", y)
        normal("const", jnp.shape(jnp.zeros(3) + a)[0])  # only a shape

    assert edges(program, 1.0) == {("b", "x")}


def test_observed_sites_factors_and_records():
    def program(y):
        a = normal("a")
        d = ab.deterministic("d", 2 * a)
        ab.sample("y", dist.Normal(d, 1.0), obs=y)
        ab.factor("f", -(a**2))
        normal("b", d)

    got = edges(program, 0.3)
    assert {("a", "y"), ("a", "f"), ("a", "d")} <= got
    assert ("a", "b") in got or ("d", "b") in got
    assert not any(target == "a" for _, target, *_ in got)


def test_a_gather_depends_on_table_and_index():
    def program():
        theta = jax.vmap(lambda i: normal("theta", i))(jnp.arange(3.0))
        z = ab.sample("z", dist.Categorical(jnp.ones(3) / 3))
        normal("y", theta[z])

    assert edges(program) == {("theta", "y"), ("z", "y")}


def test_vmap():
    def program(s):
        mu, tau = normal("mu"), ab.sample("tau", dist.HalfNormal(1.0))

        def row(s):
            theta = normal("theta", mu, tau)
            normal("y", theta, s)

        jax.vmap(row)(s)

    assert edges(program, jnp.ones(4)) == {("mu", "theta"), ("tau", "theta"), ("theta", "y")}


def test_a_scan_with_a_past():
    def program():
        phi = normal("phi")

        def step(z, t):
            z = normal("z", phi * z)
            normal("y", z)
            normal("noise", t)
            return z, None

        z, _ = jax.lax.scan(step, normal("z0"), jnp.arange(4.0))
        normal("last", z)

    got = edges(program)
    assert ("z", "z", "past") in got
    assert {("phi", "z"), ("z0", "z"), ("z", "y"), ("z", "last")} <= {e[:2] for e in got}
    assert not any("noise" in e for e in got)
    assert not any(e[:2] == ("y", "y") for e in got)


def test_a_scan_without_a_past():
    """The carry that matters is deterministic: no step depends on an earlier one."""

    def program():
        def step(t, x):
            normal("z", t)
            return t + 1.0, normal("w", x)

        _, w = jax.lax.scan(step, 0.0, jnp.arange(4.0))
        normal("total", jnp.sum(w))

    assert edges(program) == {("w", "total")}


def test_past_through_a_delay():
    """z reaches x two steps later, through a shift register: x depends on z's past only."""

    def program():
        def step(carry, _):
            one, two = carry
            z = normal("z")
            normal("x", two)
            return (z, one), None

        jax.lax.scan(step, (0.0, 0.0), None, length=5)

    assert edges(program) == {("z", "x", "past")}


def test_own_past_only_where_it_is():
    """Two chains in one scan, the second driven by the first."""

    def program():
        def step(carry, _):
            a, b = carry
            a = normal("a", a)
            b = normal("b", a)
            return (a, b), None

        jax.lax.scan(step, (0.0, 0.0), None, length=3)

    got = edges(program)
    assert ("a", "a", "past") in got and ("a", "b") in got
    assert not any(e[:2] in {("b", "b"), ("b", "a")} for e in got)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_predicate_is_a_parent(mapped):
    def program():
        def element(i):
            z = ab.sample("z", dist.Bernoulli(0.5))
            w = normal("w")
            v = jax.lax.cond(z == 1, lambda: normal("x", w), lambda: 0.0)
            normal("y", v, 1.0 + i)
            normal("other")

        if mapped:
            jax.vmap(element)(jnp.arange(3.0))
        else:
            element(0.0)

    got = edges(program)
    assert {("z", "x"), ("w", "x"), ("x", "y"), ("z", "y")} <= got
    assert not any("other" in e for e in got)
    assert ("w", "z") not in got


def test_switch_and_while():
    def program():
        k = ab.sample("k", dist.Categorical(jnp.ones(3) / 3))
        a = normal("a")
        jax.lax.switch(k, [lambda: normal("x", a), lambda: normal("y"), lambda: 0.0])
        stop = jax.lax.while_loop(lambda s: s < a, lambda s: s + 1.0, 0.0)
        normal("n", stop)

    got = edges(program)
    assert {("k", "x"), ("k", "y"), ("a", "x"), ("a", "n")} <= got
    assert not {("a", "y"), ("k", "n")} & got


def test_inner_jit_scopes_and_checkpoint():
    @jax.jit
    def draw(loc):
        return normal("x", loc)

    def program():
        with ab.scope("a"):
            a = draw(0.0)
        with ab.scope("b"):
            b = jax.checkpoint(draw)(0.0)
        with ab.scope("c"):
            draw(a)
        normal("y", b)

    assert edges(program) == {("a/x", "c/x"), ("b/x", "y")}


def test_custom_derivatives_carry_dataflow():
    @jax.custom_jvp
    def f(x):
        return jnp.sin(x)

    f.defjvp(lambda p, t: (f(*p), t[0]))

    def program():
        normal("y", f(normal("x")))

    assert edges(program) == {("x", "y")}


def test_nested_scans_and_vmap():
    def program():
        def series(i):
            def outer(s, t):
                def inner(u, _):
                    return normal("x", u), None

                u, _ = jax.lax.scan(inner, s, None, length=2)
                return normal("s", u), None

            jax.lax.scan(outer, normal("s0", i), None, length=3)

        jax.vmap(series)(jnp.arange(2.0))

    got = {e[:2] for e in edges(program)}
    assert {("x", "x"), ("x", "s"), ("s", "x"), ("s0", "x")} <= got
    assert ("s", "s0") not in got and ("x", "s0") not in got


def test_do_cuts_edges_and_condition_keeps_them():
    m = ab.model(lambda: normal("c", normal("b", normal("a"))))
    kept = {(e.source, e.target) for e in ab.graph(ab.condition(m, {"b": 0.3})).edges}
    assert kept >= {("a", "b")}
    cut = ab.graph(ab.do(m, {"b": 0.3}))
    assert ("a", "b") not in {(e.source, e.target) for e in cut.edges}
    assert cut.d_separated("a", "c")


def test_sites_of_the_graph():
    g = ab.graph(ab.model(ZOO["vmap_schools"].program), *ZOO["vmap_schools"].args)
    assert list(g.sites) == ["mu", "tau", "theta", "y"]
    assert g.sites["y"].observed and not g.sites["theta"].observed
    assert g.parents("theta") == ("mu", "tau")
    assert g.children("theta") == ("y",)


@pytest.mark.parametrize(
    "name",
    ["vmap_schools", "scan_carry_and_xs", "vmap_scan_cond", "switch_three", "jit_everywhere",
     "dependent_supports", "scan_vmap_scan", "hidden_markov", "submodels", "vmap_collective",
     "cond_different_addresses", "bounded_while", "scaled_sites"],
)  # fmt: skip
def test_soundness_by_perturbation(name):
    """If changing one element changes the score of another, there is an edge.

    The scores are differences of log densities, so this uses nothing of the analysis.
    """
    c = case(name)
    joined = {(e.source, e.target) for e in ab.graph(c.model, *c.entry.args).edges}
    scores = jax.jit(lambda choices: c.generate(choices)[0].scores)
    ((_, choices),) = c.finite(1)
    base = scores(choices)
    seen = set()
    for a in c.entry.shapes:
        elements = {(0,) * base[a].ndim, tuple(n - 1 for n in base[a].shape)}
        for index in elements:
            old = choices[a][index]
            new = old * 1.01 if jnp.issubdtype(old.dtype, jnp.floating) else 1 - jnp.minimum(old, 1)
            after = scores({**choices, a: choices[a].at[index].set(new)})
            for b in base:
                changed = np.array(base[b] != after[b])
                if a == b:
                    changed[index] = False
                if changed.any():
                    seen.add((a, b))
    assert seen <= joined
    assert seen  # something was tried


# -- separation ------------------------------------------------------------------------------


def _random_dag(seed, n=6):
    rng = np.random.default_rng(seed)
    return [(i, j) for i in range(n) for j in range(i + 1, n) if rng.random() < 0.35]


def _dag_model(n, arcs):
    def program():
        x = []
        for j in range(n):
            x.append(normal(f"x{j}", sum((x[i] for i, k in arcs if k == j), start=jnp.zeros(()))))

    return ab.model(program)


@pytest.mark.parametrize("seed", range(6))
def test_d_separation_against_networkx(seed):
    """All pairs, given all subsets, on random acyclic graphs."""
    n, arcs = 6, _random_dag(seed)
    g = ab.graph(_dag_model(n, arcs))
    assert {(e.source, e.target) for e in g.edges} == {(f"x{i}", f"x{j}") for i, j in arcs}
    reference = nx.DiGraph([(f"x{i}", f"x{j}") for i, j in arcs])
    reference.add_nodes_from(f"x{i}" for i in range(n))
    names = [f"x{i}" for i in range(n)]
    answers = []
    for a, b in itertools.combinations(names, 2):
        rest = [x for x in names if x not in (a, b)]
        for size in range(len(rest) + 1):
            for given in itertools.combinations(rest, size):
                expected = nx.is_d_separator(reference, {a}, {b}, set(given))
                assert g.d_separated(a, b, given) == expected, (a, b, given)
                answers.append(expected)
    assert any(answers) and not all(answers)


@pytest.mark.parametrize("seed", range(3))
def test_markov_blanket_against_its_definition(seed):
    """The smallest set that separates a site from the rest."""
    n, arcs = 6, _random_dag(seed)
    g = ab.graph(_dag_model(n, arcs))
    names = {f"x{i}" for i in range(n)}
    for a in names:
        blanket = set(g.markov_blanket(a))
        rest = names - blanket - {a}
        assert all(g.d_separated(a, b, tuple(blanket)) for b in rest)
        for b in blanket:
            assert not g.d_separated(a, b, tuple(blanket - {b}))


def test_separation_of_sets_and_globs():
    def program():
        with ab.scope("left"):
            a = normal("b", normal("a"))
        with ab.scope("right"):
            normal("b", normal("a"))
        normal("end", a)

    g = ab.graph(ab.model(program))
    assert g.d_separated("left/*", "right/*")
    assert not g.d_separated("left/a", "end")
    assert g.d_separated("left/a", "end", given="left/b")
    assert g.d_separated(("left/a", "right/a"), "end", given="left/b")


def test_observed_colliders_open():
    """An observation in the program is given; one left free is not."""

    def program(obs):
        a, b = normal("a"), normal("b")
        ab.sample("y", dist.Normal(a + b, 1.0), obs=0.3 if obs else None)

    assert ab.graph(ab.model(program), False).d_separated("a", "b")
    assert not ab.graph(ab.model(program), False).d_separated("a", "b", given="y")
    assert not ab.graph(ab.model(program), True).d_separated("a", "b")


def test_factors_join():
    def program():
        ab.factor("f", normal("a") * normal("b"))

    g = ab.graph(ab.model(program))
    assert not g.d_separated("a", "b")
    assert "b" in g.markov_blanket("a")


def test_blanket_in_a_hierarchy_and_a_scan():
    g = ab.graph(case("vmap_schools").model, *ZOO["vmap_schools"].args)
    assert set(g.markov_blanket("mu")) - {"y"} == {"tau", "theta"}
    assert set(g.markov_blanket("theta")) == {"mu", "tau", "y"}
    g = ab.graph(case("scan_carry_and_xs").model, *ZOO["scan_carry_and_xs"].args)
    assert set(g.markov_blanket("phi")) >= {"z", "s"}
    assert set(g.markov_blanket("z")) >= {"phi", "s", "y"}


def test_unknown_addresses_and_overlaps():
    g = ab.graph(_dag_model(3, [(0, 1)]))
    for call in (
        lambda: g.parents("nope"),
        lambda: g.markov_blanket("nope"),
        lambda: g.d_separated("x0", "nope"),
        lambda: g.d_separated("x0", "x1", given="nope"),
    ):
        with pytest.raises(ab.UnknownAddress, match="nope"):
            call()
    with pytest.raises(ab.AbduceError, match="x0"):
        g.d_separated("x0", "x0")
    with pytest.raises(ab.AbduceError):
        ab.graph(lambda: None)


# -- pictures --------------------------------------------------------------------------------


def test_render_text():
    entry = ZOO["vmap_schools"]
    text = ab.graph(ab.model(entry.program), *entry.args).render()
    for a in ("mu", "tau", "theta", "y"):
        assert a in text
    assert "HalfCauchy" in text and "4" in text


def test_render_svg(tmp_path):
    import xml.etree.ElementTree as ET

    def program(x):
        beta = normal("be<ta>&", jnp.zeros(3))
        jax.vmap(lambda x: normal("y", jnp.dot(x, beta)), axis_name="row")(x)

    g = ab.graph(ab.model(program), jnp.ones((4, 3)))
    path = tmp_path / "graph.svg"
    svg = g.render("svg", path)
    assert path.read_text() == svg
    root = ET.fromstring(svg)  # well formed, odd names escaped
    assert root.tag.endswith("svg")
    words = "".join(root.itertext())
    assert "be<ta>&" in words and "y" in words and "row" in words


def test_render_of_an_unknown_format():
    with pytest.raises(ab.AbduceError, match="svg"):
        ab.graph(_dag_model(2, [])).render("png")


@pytest.mark.parametrize("name", ["vmap_scan_vmap", "cond_in_cond_in_vmap", "jit_everywhere"])
def test_render_of_structured_models(name):
    import xml.etree.ElementTree as ET

    c = case(name)
    g = ab.graph(c.model, *c.entry.args)
    text, svg = g.render(), g.render("svg")
    ET.fromstring(svg)
    for a in c.entry.shapes:
        assert a in text


def test_a_model_without_sites():
    g = ab.graph(ab.model(lambda: 3.0))
    assert not g.sites and not g.edges
    assert isinstance(g.render(), str) and g.render("svg").lstrip().startswith("<")
