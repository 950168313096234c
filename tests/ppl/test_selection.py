"""Selections: addresses, globs, tuples and `ab.sel`, wherever an operation takes one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist

from .cases import close


@ab.model
def school():
    mu = ab.sample("mu", dist.Normal(0.0, 1.0))
    with ab.scope("a"):
        x = ab.sample("x", dist.Normal(mu, 1.0))
        ab.sample("y", dist.Normal(x, 1.0))
        with ab.scope("deep"):
            ab.sample("x", dist.Normal(x, 2.0))
    with ab.scope("b"):
        jax.vmap(lambda i: ab.sample("x", dist.Normal(mu + i, 1.0)))(jnp.arange(3.0))
    ab.factor("penalty", -(mu**2))
    ab.sample("obs", dist.Normal(mu, 1.0), obs=0.5)


ALL = {"mu", "a/x", "a/y", "a/deep/x", "b/x", "penalty", "obs"}

SELECTIONS = {
    "address": ("mu", {"mu"}),
    "nested address": ("a/deep/x", {"a/deep/x"}),
    "glob": ("a/*", {"a/x", "a/y", "a/deep/x"}),
    "glob at the end": ("*/x", {"a/x", "a/deep/x", "b/x"}),
    "question mark": ("?/x", {"a/x", "b/x"}),
    "everything": ("*", ALL),
    "tuple": (("mu", "b/x"), {"mu", "b/x"}),
    "tuple of globs": (("a/*", "b/*"), {"a/x", "a/y", "a/deep/x", "b/x"}),
    "overlapping tuple": (("a/x", "a/*"), {"a/x", "a/y", "a/deep/x"}),
    "sel": (lambda: ab.sel("mu"), {"mu"}),
    "sel of several": (lambda: ab.sel("mu", "a/y"), {"mu", "a/y"}),
    "or": (lambda: ab.sel("mu") | "a/y", {"mu", "a/y"}),
    "and": (lambda: ab.sel("a/*") & ab.sel("*/x"), {"a/x", "a/deep/x"}),
    "not": (lambda: ~ab.sel("a/*"), {"mu", "b/x", "penalty", "obs"}),
    "all three": (lambda: (ab.sel("*/x") & ~ab.sel("b/*")) | ab.sel("obs"),
                  {"a/x", "a/deep/x", "obs"}),
    "double negation": (lambda: ~~ab.sel("mu"), {"mu"}),
    "empty intersection": (lambda: ab.sel("mu") & ab.sel("a/x"), set()),
}  # fmt: skip


@pytest.fixture(scope="module")
def trace():
    return school.simulate(jax.random.key(0))


@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_project_sums_what_is_selected(name, trace):
    selection, expected = SELECTIONS[name]
    selection = selection() if callable(selection) else selection
    assert set(trace.scores) == ALL
    close(trace.project(selection), sum(float(jnp.sum(trace.scores[a])) for a in expected))


@pytest.mark.parametrize("name", ["glob", "tuple", "and"])
def test_regenerate_redraws_what_is_selected(name, trace):
    selection, expected = SELECTIONS[name]
    selection = selection() if callable(selection) else selection
    moved, _ = trace.regenerate(jax.random.key(9), selection)
    for a, v in trace.choices.items():
        changed = np.asarray(moved.choices[a]) != np.asarray(v)
        assert np.all(changed) if a in expected else not np.any(changed), a


@pytest.mark.parametrize("selection", ["muu", "c/*", ("mu", "nope"), "a/z"])
def test_unmatched_is_an_error(selection, trace):
    wrong = selection if isinstance(selection, str) else "nope"
    for call in (trace.project, lambda s: trace.regenerate(jax.random.key(0), s)):
        with pytest.raises(ab.UnknownAddress) as e:
            call(selection)
        assert wrong in str(e.value)
        assert "a/x" in str(e.value)  # what there is
        assert isinstance(e.value, KeyError)


def test_unmatched_inside_a_combination_is_an_error(trace):
    for make in (
        lambda: ab.sel("mu") | ab.sel("nope"),
        lambda: ab.sel("mu") & ab.sel("nope"),
        lambda: ~ab.sel("nope"),
    ):
        with pytest.raises(ab.UnknownAddress, match="nope"):
            trace.project(make())


def test_the_closest_address_is_proposed(trace):
    with pytest.raises(ab.UnknownAddress, match='"a/deep/x"'):
        trace.project("a/deap/x")


def test_an_observed_site_cannot_be_redrawn(trace):
    """It is no choice, and ignoring the request would be silent."""
    with pytest.raises(ab.UnknownAddress, match="obs"):
        trace.regenerate(jax.random.key(0), "obs")


@pytest.mark.parametrize("selection", [3, None, 1.5, ["mu", 2]])
def test_what_is_no_selection(selection, trace):
    with pytest.raises(ab.AbduceError):
        trace.project(selection)


def test_an_address_with_glob_characters():
    """An exact address comes before its reading as a glob."""

    @ab.model
    def m():
        ab.sample("x[0]", dist.Normal(0.0, 1.0))
        ab.sample("x0", dist.Normal(0.0, 2.0))

    trace = m.simulate(jax.random.key(0))
    close(trace.project("x[0]"), trace.scores["x[0]"])


def test_active_sites_only_count():
    @ab.model
    def m():
        z = ab.sample("z", dist.Bernoulli(0.5))
        jax.lax.cond(z == 1, lambda: ab.sample("x", dist.Normal(0.0, 1.0)), lambda: 0.0)

    trace, _ = m.generate(jax.random.key(0), {"z": 0})
    close(trace.project("x"), 0.0)
    close(trace.project(("x", "z")), np.log(0.5))
