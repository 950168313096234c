"""`update`, `regenerate`, `generate`, `project`: their weights as identities, then as averages.

Statistical tests use fixed keys and 4.5 standard errors, a false-alarm rate of 7e-6 each.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist

from .cases import SIMULATED, case, close, row
from .enumerable import ENUMERABLE
from .zoo import ZOO

KEY = jax.random.key(11)

# Neither observations nor factors nor scales: nothing given, nothing to weigh.
PURE = [
    "scalar_chain", "correlation_cholesky", "dependent_supports", "vmap_nested_axes", "vmap_events",
    "vmap_collective", "learnable_parameters", "scan_unrolled", "scan_in_scan", "vmap_scan_vmap",
    "scan_vmap_scan", "fori_loop", "lax_map", "cond_same_address", "switch_three", "vmap_of_cond",
    "vmap_of_switch", "scan_of_cond", "cond_in_cond_in_vmap", "cond_of_scan_of_vmap",
    "jit_under_scopes", "jit_everywhere", "checkpointed", "static_arguments",
    "axis_orders_of_one_jit",
]  # fmt: skip

# One or two for each rule; the others run among the slow tests.
REPRESENTATIVE = {
    "scalar_chain", "batch_and_event_shapes", "vmap_schools", "vmap_nested_axes", "factors",
    "scan_reverse", "vmap_of_scan", "scan_vmap_scan", "hidden_markov", "vmap_scan_cond",
    "vmap_of_cond_both_branches", "cond_different_addresses", "jit_everywhere", "submodels",
    "learnable_parameters",
}  # fmt: skip


def spread(names):
    """All names; those beyond the representative ones marked slow."""
    slow = pytest.mark.slow
    return [n if n in REPRESENTATIVE else pytest.param(n, marks=slow) for n in names]


UNSCALED = [name for name in SIMULATED if name != "scaled_sites"]


# -- update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", spread(SIMULATED))
def test_update_weight_there_and_back(name):
    c = case(name)
    (i, old), (_, new) = c.finite()
    moved, weight, discarded = row(c.traces, i).update(new)
    close(weight, c.reference(new) - c.reference(old))
    close(moved.log_density, c.reference(new))
    for a in new:
        close(moved.choices[a], new[a])
        close(discarded[a], old[a])
    back, reverse, rediscarded = moved.update({a: discarded[a] for a in new})
    close(float(weight) + float(reverse), 0.0)
    close(back.log_density, c.expected[i])
    for a in new:
        close(back.choices[a], old[a])
        close(rediscarded[a], new[a])


@pytest.mark.parametrize(
    "name", ["vmap_schools", "scan_carry_and_xs", "jit_under_scopes", "scaled_sites", "factors"]
)
def test_update_of_one_address(name):
    """Everything downstream is scored anew; everything else keeps its value."""
    c = case(name)
    (i, old), (_, new) = c.finite()
    trace = row(c.traces, i)
    for a in c.entry.shapes:
        moved, weight, discarded = trace.update({a: new[a]})
        close(weight, c.reference({**old, a: new[a]}) - c.reference(old))
        assert set(discarded) == {a}
        for b in c.entry.shapes:
            close(moved.choices[b], (new if a == b else old)[b])


def test_update_with_new_arguments():
    c = case("vmap_schools")
    choices, trace = c.choices(0), row(c.traces, 0)
    s, y = c.entry.args
    moved, weight, discarded = trace.update({}, 2 * s, y + 1)
    close(weight, c.entry.reference(choices, 2 * s, y + 1) - c.reference(choices))
    assert not discarded
    jax.tree.map(close, moved.args, (2 * s, y + 1))
    moved, weight, _ = trace.update({"mu": 0.3}, 2 * s, y)
    changed = {**choices, "mu": jnp.asarray(0.3)}
    close(weight, c.entry.reference(changed, 2 * s, y) - c.reference(choices))


def test_update_that_flips_a_branch():
    """The site that appears is drawn with the key, and the weight does not count it."""
    c = case("cond_one_branch")
    off = {"z": jnp.array(0), "x": jnp.array(0.0)}
    trace, _ = c.model.generate(KEY, {"z": 0})
    assert not bool(trace.active["x"])
    moved, weight, _ = trace.update({"z": 1}, key=jax.random.key(4))
    on = {"z": jnp.array(1), "x": moved.choices["x"]}
    drawn = float(-0.5 * ((on["x"] - 1) / 2) ** 2 - np.log(2) - 0.5 * np.log(2 * np.pi))
    close(weight, c.reference(on) - drawn - c.reference(off))
    moved, weight, _ = trace.update({"z": 1, "x": 0.7})  # given: no key, nothing drawn
    close(weight, c.reference({"z": 1, "x": jnp.array(0.7)}) - c.reference(off))
    back, reverse, discarded = moved.update({"z": 0})
    close(float(weight) + float(reverse), 0.0)
    close(discarded["z"], 1)
    close(back.log_density, c.reference(off))


def test_update_under_jit_vmap_and_grad():
    c = case("scan_carry_and_xs")
    (i, old), (_, new) = c.finite()
    trace = row(c.traces, i)
    weight = jax.jit(lambda t, z: t.update({"z": z})[1])
    close(weight(trace, new["z"]), c.reference({**old, "z": new["z"]}) - c.reference(old))
    many = jax.vmap(weight, in_axes=(None, 0))(trace, c.draws["z"])
    close(many, [c.reference({**old, "z": z}) - c.reference(old) for z in c.draws["z"]])
    grad = jax.grad(weight, argnums=1)(trace, new["z"])
    close(grad, jax.grad(lambda z: c.reference({**old, "z": z}))(new["z"]))


# -- generate --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIMULATED)
def test_generate_with_everything_given(name):
    c = case(name)
    ((_, choices),) = c.finite(1)
    trace, weight = c.generate(choices)
    close(weight, c.reference(choices))
    close(trace.log_density, weight)
    for a in choices:
        close(trace.choices[a], choices[a])


@pytest.mark.parametrize("name", spread(PURE))
def test_generate_with_nothing_given(name):
    c = case(name)
    trace, weight = c.model.generate(KEY, {}, *c.entry.args, **c.options)
    close(weight, 0.0)
    alone = c.simulate(KEY)
    for a in c.entry.shapes:  # the prior draws of the same key
        close(trace.choices[a], alone.choices[a])


@pytest.mark.parametrize("name", spread(UNSCALED))
def test_generate_weight_with_half_given(name):
    """Weight = log density minus the log probability of what was drawn."""
    c = case(name)
    ((_, choices),) = c.finite(1)
    # dead draws may be NaN, and drawing the rest anew may bring their branch to life
    names = sorted(a for a in choices if not np.isnan(choices[a]).any())
    given = {a: choices[a] for a in names[::2]}
    rest = tuple(a for a in choices if a not in given)
    trace, weight = c.model.generate(KEY, given, *c.entry.args, **c.options)
    if not np.isfinite(trace.log_density):
        assert weight == -np.inf
        return
    drawn = float(trace.project(rest)) if rest else 0.0
    close(weight, float(trace.log_density) - drawn)
    close(trace.log_density, c.reference({a: trace.choices[a] for a in choices}))
    for a in given:
        close(trace.choices[a], given[a])


@functools.cache
def _weights(name, given_latents=()):
    e = ENUMERABLE[name]
    m = ab.model(e.program)
    truth = max(e.outcomes(), key=e.weight)
    given = {**e.given, **{a: truth[a] for a in given_latents}}
    keys = jax.random.split(jax.random.key(5), 4000)
    run = jax.jit(jax.vmap(lambda k: (lambda t, w: (t.choices, w))(*m.generate(k, given))))
    choices, weights = run(keys)
    return truth, choices, np.asarray(weights)


@pytest.mark.parametrize("name", sorted(ENUMERABLE))
def test_log_density_of_every_outcome(name):
    e = ENUMERABLE[name]
    m = ab.model(e.program)
    outcomes = list(e.outcomes())
    stacked = {a: jnp.asarray(np.stack([c[a] for c in outcomes])) for a in e.latents}
    got = jax.jit(jax.vmap(lambda c: m.log_density({**c, **e.given})))(stacked)
    for value, c in zip(got, outcomes, strict=True):
        prior = e.prior(c)
        if prior > 0:
            close(value, np.log(prior) + np.log(e.likelihood(c)))


@pytest.mark.parametrize("name", sorted(ENUMERABLE))
def test_generate_estimates_the_evidence(name):
    e = ENUMERABLE[name]
    _, choices, weights = _weights(name)
    for i in range(5):  # each weight is the likelihood of its own draws
        close(weights[i], np.log(e.likelihood({a: np.asarray(choices[a][i]) for a in e.latents})))
    w = np.exp(weights)
    assert abs(w.mean() - e.evidence) < 4.5 * w.std() / np.sqrt(w.size)
    assert w.std() > 0.02 * w.mean()  # otherwise the test could not fail


@pytest.mark.parametrize(
    ("name", "fixed"), [("small", ("k",)), ("tempered", ("v/x",)), ("branch", ("s",))]
)
def test_generate_with_a_latent_given(name, fixed):
    """E[exp(weight)] is the joint probability of what is given, latents summed out."""
    e = ENUMERABLE[name]
    truth, _, weights = _weights(name, fixed)
    if name == "branch":  # a given value of an inactive site counts as 1: sum over r only
        truth = {"s": truth["s"]}
        expected = sum(
            e.weight({"r": np.array(r), "s": np.where(np.array(r) == 1, truth["s"], 0)})
            for r in np.ndindex(2, 2, 2)
        )
    else:
        same = (c for c in e.outcomes() if all(np.array_equal(c[a], truth[a]) for a in fixed))
        expected = sum(e.weight(c) for c in same)
    w = np.exp(weights)
    assert abs(w.mean() - expected) < 4.5 * w.std() / np.sqrt(w.size)
    assert w.std() > 0.02 * w.mean()


def _normal_mean(y):
    mu = ab.sample("mu", dist.Normal(0.5, 2.0))
    jax.vmap(lambda y: ab.sample("y", dist.Normal(mu, 0.7), obs=y))(y)


def _exact_posterior(given, y):
    precision = 1 / 4.0 + y.shape[0] / 0.49
    loc = (0.5 / 4.0 + jnp.sum(y) / 0.49) / precision
    ab.sample("mu", dist.Normal(loc, 1 / jnp.sqrt(precision)))


def test_generate_with_the_exact_posterior_as_proposal():
    """Then every weight is the log evidence, whatever was drawn."""
    y = np.array([0.3, 1.1, -0.6])
    m, q = ab.model(_normal_mean), ab.model(_exact_posterior)
    run = jax.vmap(lambda k: m.generate(k, {}, y, proposal=q)[1])
    weights = np.asarray(run(jax.random.split(KEY, 20)))
    covariance = 0.49 * np.eye(3) + 4.0
    d = y - 0.5
    expected = -0.5 * (
        d @ np.linalg.solve(covariance, d)
        + np.linalg.slogdet(covariance)[1]
        + 3 * np.log(2 * np.pi)
    )
    np.testing.assert_allclose(weights, expected, atol=1e-9)


def test_proposal_sees_what_is_given():
    """A proposal is called as `q(given, *args)`, and may read the observed values."""

    @ab.model
    def m(scale):
        mu = ab.sample("mu", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Normal(mu, scale))

    @ab.model
    def q(given, scale):
        precision = 1 + 1 / scale**2
        ab.sample("mu", dist.Normal(given["y"] / scale**2 / precision, precision**-0.5))

    run = jax.vmap(lambda k: m.generate(k, {"y": 1.3}, 0.6, proposal=q)[1])
    weights = np.asarray(run(jax.random.split(KEY, 10)))
    variance = 1 + 0.36
    expected = -0.5 * (1.3**2 / variance + np.log(2 * np.pi * variance))
    np.testing.assert_allclose(weights, expected, atol=1e-9)


def test_proposal_over_some_latents():
    """The rest come from the prior, given the proposed ones."""

    @ab.model
    def m():
        a = ab.sample("a", dist.Normal(0.0, 1.0))
        b = jax.vmap(lambda i: ab.sample("b", dist.Normal(a + i, 1.0)))(jnp.arange(3.0))
        ab.sample("y", dist.Normal(jnp.sum(b), 1.0))

    @ab.model
    def q(given):
        ab.sample("a", dist.Laplace(given["y"] / 6, 2.0))

    trace, weight = m.generate(KEY, {"y": 2.5}, proposal=q)
    a, b = (np.asarray(trace.choices[x]) for x in "ab")
    log_q = -abs(a - 2.5 / 6) / 2.0 - np.log(4.0)
    log_p = -0.5 * a**2 - 0.5 * (2.5 - b.sum()) ** 2 - np.log(2 * np.pi)
    close(weight, log_p - log_q)


@pytest.mark.parametrize("name", ["small", "chain", "branch"])
def test_proposal_estimates_the_evidence(name):
    """Unbiased for a proposal that is far from exact."""
    e = ENUMERABLE[name]
    m = ab.model(e.program)

    @ab.model
    def q(given):
        if name != "branch":
            for a, shape in e.latents.items():
                k = e.sizes[a]
                ab.sample(a, dist.Categorical(jnp.ones((*shape, k)) / k))
            return

        def element(y):
            r = ab.sample("r", dist.Bernoulli(jax.nn.sigmoid(y)))
            uniform = dist.Categorical(jnp.ones(3) / 3)
            jax.lax.cond(r == 1, lambda: ab.sample("s", uniform), lambda: 0)

        jax.vmap(element)(given["y"])

    keys = jax.random.split(jax.random.key(9), 8000)
    run = jax.jit(jax.vmap(lambda k: m.generate(k, e.given, proposal=q)[1]))
    w = np.exp(np.asarray(run(keys)))
    assert abs(w.mean() - e.evidence) < 4.5 * w.std() / np.sqrt(w.size)
    assert w.std() > 0.05 * w.mean()


# -- regenerate ------------------------------------------------------------------------------

FIXED_STRUCTURE = [n for n in UNSCALED if ZOO[n].active is None]


@pytest.mark.parametrize("name", spread(FIXED_STRUCTURE))
def test_regenerate_weight(name):
    """Weight = change of the log density of what was not redrawn."""
    c = case(name)
    ((i, old),) = c.finite(1)
    trace = row(c.traces, i)
    chosen = tuple(sorted(old)[::2])
    moved, weight = trace.regenerate(jax.random.key(8), chosen)
    before = float(trace.log_density) - float(trace.project(chosen))
    after = float(moved.log_density) - float(moved.project(chosen))
    close(weight, after - before)
    close(moved.log_density, c.reference({a: moved.choices[a] for a in old}))
    for a in old:
        same = np.array_equal(moved.choices[a], old[a])
        if a not in chosen:
            assert same
        elif np.issubdtype(old[a].dtype, np.floating) and old[a].size:
            assert not same


@pytest.mark.parametrize("name", sorted(ENUMERABLE))
def test_regenerate_estimates_the_evidence(name):
    """Everything redrawn from one trace: E[exp(w)] = Z / likelihood there."""
    e = ENUMERABLE[name]
    m = ab.model(e.program)
    start = max(e.outcomes(), key=e.weight)
    trace, _ = m.generate(KEY, {**start, **e.given})
    keys = jax.random.split(jax.random.key(6), 4000)
    run = jax.jit(jax.vmap(lambda k: trace.regenerate(k, tuple(e.latents))[1]))
    w = np.exp(np.asarray(run(keys))) * e.likelihood(start)
    assert abs(w.mean() - e.evidence) < 4.5 * w.std() / np.sqrt(w.size)
    assert w.std() > 0.02 * w.mean()


@pytest.mark.parametrize(
    ("name", "selection"),
    [("small", "k"), ("small", ("a", "b")), ("chain", "z"), ("branch", "r"), ("branch", "s")],
)
def test_regenerate_leaves_the_posterior_invariant(name, selection):
    """A Metropolis step with `min(1, exp(weight))`, from exact posterior draws.

    In `branch` the step adds and removes sites. Chi-square over outcomes with at least five
    expected draws, at 1e-5.
    """
    from scipy import stats

    e = ENUMERABLE[name]
    m = ab.model(e.program)
    outcomes = [c for c in e.outcomes() if e.weight(c) > 0]
    probs = np.array([e.weight(c) for c in outcomes]) / e.evidence
    n = 6000
    index = np.random.default_rng(3).choice(len(outcomes), size=n, p=probs)
    start = {a: jnp.asarray(np.stack([outcomes[i][a] for i in index])) for a in e.latents}

    def step(key, choices):
        k1, k2, k3 = jax.random.split(key, 3)
        trace, _ = m.generate(k1, {**choices, **e.given})
        moved, weight = trace.regenerate(k2, selection)
        accept = jnp.log(jax.random.uniform(k3)) < weight
        return {a: jnp.where(accept, moved.choices[a], trace.choices[a]) for a in e.latents}

    end = jax.jit(jax.vmap(step))(jax.random.split(jax.random.key(21), n), start)
    if name == "branch":
        end["s"] = jnp.where(end["r"] == 1, end["s"], 0)
    where = {
        tuple(np.concatenate([c[a].ravel() for a in e.latents])): i for i, c in enumerate(outcomes)
    }
    flat = np.concatenate([np.asarray(end[a]).reshape(n, -1) for a in e.latents], 1)
    counts = np.bincount([where[tuple(r)] for r in flat], minlength=len(outcomes))
    moved = np.mean(
        flat != np.concatenate([np.asarray(start[a]).reshape(n, -1) for a in e.latents], 1)
    )
    assert moved > 0.02
    big = probs * n >= 5
    observed = np.append(counts[big], counts[~big].sum())
    expected = np.append(probs[big] * n, probs[~big].sum() * n)
    keep = expected > 0
    assert stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-5


# -- project ---------------------------------------------------------------------------------


def test_project_adds_up():
    c = case("vmap_of_scan")
    trace = row(c.traces, 0)
    parts = [float(trace.project(a)) for a in (*c.entry.shapes, "y")]
    close(sum(parts), trace.log_density)
    close(trace.project(("s", "z")), parts[0] + parts[2])
    close(trace.project(~ab.sel("y")), sum(parts[:-1]))
