"""Laws that hold for every program, on random programs (see `programs.py`)."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import abduce as ab

from .cases import close, row
from .programs import Branch, Loop, Map, Seq, Site, Wrap, emit, label, programs, visit

START = 0.4
quick = settings(
    max_examples=4, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck), print_blob=False,
    phases=(Phase.explicit, Phase.generate),  # shrinking would compile hundreds of programs
)  # fmt: skip
thorough = settings(quick, max_examples=60)


def simulated(program, n=3, seed=0):
    """A model, and n traces of it, drawn in one compiled call."""
    m = ab.model(lambda: emit(program, START))
    traces = jax.jit(jax.vmap(m.simulate))(jax.random.split(jax.random.key(seed), n))
    return m, [row(traces, i) for i in range(n)]


def whole(program, trace, names):
    """Those of the names whose every element ran: values of dead elements mean nothing."""
    met = visit(program, START, trace.choices)[1]
    return [a for a in names if all((a, i) in met for i in np.ndindex(trace.scores[a].shape))]


def check_density(program, m, traces):
    """`simulate`, `log_density`, scores and `active` agree with the Python loop."""
    for trace in traces:
        retval, scores = visit(program, START, trace.choices)
        expected = sum(scores.values())
        close(trace.log_density, expected)
        close(m.log_density(trace.choices), expected)
        close(trace.retval, retval)
        for a, s in trace.scores.items():
            s = np.asarray(s)
            for index in np.ndindex(s.shape):
                close(s[index], scores.get((a, index), 0.0))
                active = np.broadcast_to(np.asarray(trace.active.get(a, True)), s.shape)
                assert bool(active[index]) == ((a, index) in scores)


def check_update(program, m, traces):
    """All values replaced, and put back."""
    old, new, _ = traces
    moved, weight, discarded = old.update(new.choices)
    at_old, at_new = (sum(visit(program, START, t.choices)[1].values()) for t in (old, new))
    close(weight, at_new - at_old)
    for a, v in old.choices.items():
        close(discarded[a], v)
    back, reverse, _ = moved.update(discarded)
    close(float(weight) + float(reverse), 0.0)
    close(back.log_density, at_old)


def check_partial_update(program, traces, names):
    """Some values replaced; a flipped branch brings fresh draws, which the weight leaves out."""
    old, new, _ = traces
    edited = {a: new.choices[a] for a in whole(program, new, names)}
    moved, weight, _ = old.update(edited, key=jax.random.key(5))
    before = visit(program, START, old.choices)[1]
    after = visit(program, START, moved.choices)[1]
    fresh = [e for e in after if e[0] not in edited and e not in before]
    expected = sum(after.values()) - sum(before.values()) - sum(after[e] for e in fresh)
    close(weight, expected)
    for (a, index), _ in after.items():
        if (a, index) not in fresh:
            source = edited if a in edited else old.choices
            close(np.asarray(moved.choices[a])[index], np.asarray(source[a])[index])


def check_generate(program, m, traces, names):
    """The weight is the density of what is given, whatever is drawn."""
    choices = {a: traces[0].choices[a] for a in whole(program, traces[0], names)}
    trace, weight = m.generate(jax.random.key(6), choices)
    scores = visit(program, START, trace.choices)[1]
    close(weight, sum(s for (a, _), s in scores.items() if a in choices))
    close(trace.log_density, sum(scores.values()))
    for a, v in choices.items():
        close(trace.choices[a], v)


def check_regenerate(program, traces, names):
    """The weight is the acceptance ratio of a proposal from the prior."""
    old = traces[0]
    moved, weight = old.regenerate(jax.random.key(7), tuple(names))
    before = visit(program, START, old.choices)[1]
    after = visit(program, START, moved.choices)[1]
    forward = sum(s for e, s in after.items() if e[0] in names or e not in before)
    backward = sum(s for e, s in before.items() if e[0] in names or e not in after)
    ratio = sum(after.values()) - forward - (sum(before.values()) - backward)
    close(weight, ratio)
    for (a, index), _ in after.items():
        if a not in names and (a, index) in before:
            close(np.asarray(moved.choices[a])[index], np.asarray(old.choices[a])[index])


def check_projection(traces, names):
    for trace in traces:
        rest = [a for a in trace.choices if a not in names]
        parts = [float(trace.project(tuple(x))) if x else 0.0 for x in (names, rest)]
        close(sum(parts), trace.log_density)


def check_own_draws(traces):
    """No two elements of a continuous site share their random bits."""
    for a in traces[0].choices:
        if a.split("/")[-1].startswith(("normal", "scale", "gamma", "pair")):
            met = [
                np.ravel(np.broadcast_to(t.active.get(a, True), t.scores[a].shape)) for t in traces
            ]
            values = [
                np.reshape(t.choices[a], (m.size, -1)) for t, m in zip(traces, met, strict=True)
            ]
            values = np.concatenate([v[m] for v, m in zip(values, met, strict=True)])
            assert len(np.unique(values)) == values.size


def check_gradient(program, m, trace):
    """Along a random direction, by central differences of the Python loop."""
    scores = visit(program, START, trace.choices)[1]
    smooth = {a: v for a, v in trace.choices.items() if np.issubdtype(v.dtype, np.floating)}
    rng = np.random.default_rng(0)
    direction = {a: rng.normal(size=v.shape) for a, v in smooth.items()}
    grad = jax.grad(lambda s: m.log_density({**trace.choices, **s}))(smooth)
    slope = sum(float(np.vdot(grad[a], direction[a])) for a in smooth)

    def at(h):
        moved = {a: np.asarray(v) + h * direction[a] for a, v in smooth.items()}
        return visit(program, START, {**trace.choices, **moved})[1]

    up, down = at(1e-6), at(-1e-6)
    if set(up) == set(down) == set(scores):  # no branch flips in between
        close(slope, (sum(up.values()) - sum(down.values())) / 2e-6, 1e-4)


def check_everything(program, data):
    m, traces = simulated(program)
    addresses = sorted(traces[0].choices)
    names = [a for i, a in enumerate(addresses) if (data >> i) & 1] or addresses[:1]
    check_density(program, m, traces)
    check_update(program, m, traces)
    check_partial_update(program, traces, names)
    check_generate(program, m, traces, names)
    check_regenerate(program, traces, names)
    check_projection(traces, names)
    check_own_draws(traces)
    check_gradient(program, m, traces[0])


@quick
@given(programs(), st.integers(0, 63))
def test_laws(program, data):
    check_everything(program, data)


@pytest.mark.slow
@thorough
@given(programs(max_sites=9), st.integers(0, 511))
def test_laws_thoroughly(program, data):
    check_everything(program, data)


def _with_loops(node):
    """The same program with every vmap as a scan whose steps do not see each other."""
    match node:
        case None | Site():
            return node
        case Seq():
            return Seq(tuple(_with_loops(p) for p in node.parts))
        case Branch():
            return Branch(_with_loops(node.yes), _with_loops(node.no))
        case Map():
            return Unrolled(node.size, _with_loops(node.body))
        case Loop():
            return Loop(node.size, node.reverse, _with_loops(node.body))
        case Wrap():
            return Wrap(node.kind, _with_loops(node.body))
    raise TypeError(node)


class Unrolled:
    """A map written as a scan without carry."""

    def __init__(self, size, body):
        self.size, self.body = size, body


def _emit_loops(node, x):
    """`emit`, where an `Unrolled` is a scan over the index."""
    import jax.numpy as jnp

    match node:
        case Unrolled():
            return jnp.mean(
                jax.lax.map(
                    lambda i: _emit_loops(node.body, x + i / 2), jnp.arange(node.size) * 1.0
                )
            )
        case Seq():
            for part in node.parts:
                x = _emit_loops(part, x)
            return x
        case Branch():
            return jax.lax.cond(
                x > 0, lambda x: _emit_loops(node.yes, x), lambda x: _emit_loops(node.no, x), x
            )
        case Loop():

            def step(c, t):
                return _emit_loops(node.body, c + t / 3), None

            steps = jnp.arange(node.size) * 1.0
            return jax.lax.scan(step, x, steps, reverse=node.reverse)[0]
        case Wrap("jit"):
            return jax.jit(lambda x: _emit_loops(node.body, x))(x)
        case Wrap("checkpoint"):
            return jax.checkpoint(lambda x: _emit_loops(node.body, x))(x)
        case Wrap("scope"):
            with ab.scope("s"):
                return _emit_loops(node.body, x)
    return emit(node, x)


@settings(quick, max_examples=3)
@given(programs(max_sites=4))
def test_vmap_and_scan_agree(program):
    """The same choice map, in the same layout, has the same density in both."""
    _, traces = simulated(program, n=1)
    looped = _with_loops(program)
    m = ab.model(lambda: _emit_loops(looped, START))
    close(m.log_density(traces[0].choices), traces[0].log_density)
    other = m.simulate(jax.random.key(3))
    shapes = {a: v.shape for a, v in other.choices.items()}
    assert shapes == {a: v.shape for a, v in traces[0].choices.items()}
    close(other.log_density, sum(visit(program, START, other.choices)[1].values()))


@settings(quick, max_examples=2)
@given(programs(max_sites=4), st.sampled_from(["before", "after", "both"]))
def test_a_new_site_leaves_the_other_draws(program, where):
    key = jax.random.key(8)
    plain = ab.model(lambda: emit(program, START)).simulate(key).choices

    def more():
        extra = Seq((Site("normal", "new1"), Loop(2, False, Site("gamma", "new2"))))
        if where != "after":
            emit(extra, 0.0)
        out = emit(program, START)
        if where != "before":
            with ab.scope("late"):
                emit(Map(2, extra), 0.0)
        return out

    larger = ab.model(more).simulate(key).choices
    assert len(larger) > len(plain)
    for a, v in plain.items():
        assert np.array_equal(v, larger[a]), a


def _kinds(node):
    """Chains of constructs from the root to the sites."""
    match node:
        case None | Site():
            yield ()
        case Seq():
            for p in node.parts:
                yield from _kinds(p)
        case Branch():
            for p in (node.yes, node.no):
                yield from ((Branch, *chain) for chain in _kinds(p))
        case _:
            yield from ((type(node), *chain) for chain in _kinds(node.body))


def test_the_generator_makes_what_it_should():
    """Every construct occurs inside every other one, mostly."""
    pairs = set()

    @settings(quick, max_examples=150)
    @given(programs())
    def collect(program):
        for chain in _kinds(program):
            pairs.update(itertools.pairwise(chain))

    collect()
    assert len(pairs) >= 12  # of 16


NESTS = {
    "loop of map": Loop(3, False, Map(2, Seq((Site("normal"), Site("bernoulli"))))),
    "map of loop": Map(2, Loop(3, True, Seq((Site("normal"), Site("pair"))))),
    "map loop map": Map(2, Loop(4, False, Map(3, Site("scale")))),
    "loop map loop": Loop(4, True, Map(3, Loop(2, False, Site("scale")))),
    "map map loop": Map(2, Map(3, Loop(4, False, Site("normal")))),
    "branch in map in loop": Loop(
        3, False, Map(2, Seq((Site("normal"), Branch(Site("gamma"), Site("poisson")))))
    ),
    "loop in branch in map": Map(
        3, Seq((Site("normal"), Branch(Loop(2, False, Site("normal")), Map(2, Site("pair")))))
    ),
    "branch in branch in map": Map(
        4, Seq((Site("normal"), Branch(Seq((Site("scale"), Branch(Site("gamma"), None))), None)))
    ),
    "jit in loop in scope in map": Map(
        2, Wrap("scope", Loop(3, False, Wrap("jit", Seq((Site("normal"), Site("gamma"))))))
    ),
    "checkpoint around loop in map": Map(
        2, Wrap("checkpoint", Loop(3, True, Wrap("checkpoint", Site("normal"))))
    ),
}


@pytest.mark.parametrize("name", sorted(NESTS))
def test_laws_of_nests(name):
    """The nests that are easy to get wrong, whatever the random search finds."""
    program = label(Seq((Site("normal"), NESTS[name], Site("normal"))))
    check_everything(program, 0b010101)
