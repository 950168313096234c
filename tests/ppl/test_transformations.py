"""`condition`, `do`, `with_prior`, `reparam`, `propose`: new models out of old ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import abduce as ab
import abduce.dist as dist

from . import closed_forms as cf
from .cases import case, close

KEY = jax.random.key(23)


@ab.model
def chain(scale=1.0):
    """a -> b -> c, with a mapped site below b."""
    a = ab.sample("a", dist.Normal(0.0, 2.0))
    b = ab.sample("b", dist.Normal(a, scale))
    d = ab.deterministic("d", 3 * b)
    c = jax.vmap(lambda i: ab.sample("c", dist.Normal(d + i, 0.5)))(jnp.arange(3.0))
    return a, b, c


A, B, C = 0.4, -0.7, np.array([-2.0, -1.5, 0.3])
CHOICES = {"a": A, "b": B, "c": C}


# -- condition -------------------------------------------------------------------------------


def test_condition_is_given():
    m = ab.condition(chain, {"b": B})
    close(m.log_density({"a": A, "c": C}), chain.log_density(CHOICES))
    trace = m.simulate(KEY)
    close(trace.choices.get("b", B), B)
    close(trace.retval[1], B)
    _, weight = m.generate(KEY, {"c": C})
    trace, same = chain.generate(KEY, {"b": B, "c": C})
    close(weight, same)
    close(weight, trace.log_density - trace.project("a"))


def test_condition_composes():
    m = ab.condition(ab.condition(chain, {"b": B}), {"c": C})
    close(m.log_density({"a": A}), chain.log_density(CHOICES))
    grad = jax.grad(lambda a: m.log_density({"a": a}))(A)
    close(grad, -A / 4.0 + (B - A))


def test_condition_with_traced_values():
    """The data may be traced: one compiled program for many data sets."""
    density = jax.jit(lambda b: ab.condition(chain, {"b": b}).log_density({"a": A, "c": C}))
    for b in (B, 1.2):
        close(density(b), chain.log_density({**CHOICES, "b": b}))
    close(jax.vmap(density)(jnp.array([B, 1.2]))[1], density(1.2))


@pytest.mark.parametrize("name", ["vmap_of_scan", "scan_of_vmap", "vmap_of_cond", "jit_everywhere"])
def test_condition_of_any_site(name):
    c = case(name)
    choices = c.choices(0)
    for a in choices:
        m = ab.condition(c.model, {a: choices[a]})
        rest = {b: v for b, v in choices.items() if b != a}
        close(m.log_density(rest, *c.entry.args), c.reference(choices))


# -- do --------------------------------------------------------------------------------------


def test_do_cuts_parents_and_density():
    m = ab.do(chain, {"b": 1.5})
    expected = cf.normal(A, 0, 2) + cf.normal(C, 4.5 + jnp.arange(3), 0.5)
    close(m.log_density({"a": A, "c": C}), expected)
    trace = m.simulate(KEY)
    close(trace.retval[1], 1.5)
    close(trace.deterministics["d"], 4.5)
    close(trace.choices["a"], chain.simulate(KEY).choices["a"])  # upstream is untouched
    close(trace.log_density, m.log_density({k: trace.choices[k] for k in "ac"}))
    # conditioning differs: it keeps the site's density
    close(
        chain.log_density({"a": A, "b": 1.5, "c": C}) - m.log_density({"a": A, "c": C}),
        cf.normal(1.5, A, 1.0),
    )


def test_do_of_a_deterministic():
    m = ab.do(chain, {"d": 0.0})
    expected = cf.normal(A, 0, 2) + cf.normal(B, A, 1) + cf.normal(C, jnp.arange(3), 0.5)
    close(m.log_density(CHOICES), expected)


def test_do_broadcasts_a_scalar():
    m = ab.do(chain, {"c": 0.25})
    close(m.log_density({"a": A, "b": B}), cf.normal(A, 0, 2) + cf.normal(B, A, 1))
    close(m.simulate(KEY).retval[2], 0.25 * np.ones(3))
    values = jnp.array([1.0, 2.0, 3.0])
    close(ab.do(chain, {"c": values}).simulate(KEY).retval[2], values)


def test_do_in_a_scan():
    """Intervening on every step cuts the chain: steps become independent of the past."""
    c = case("scan_carry_and_xs")
    (ys,) = c.entry.args
    z = jnp.linspace(-1.0, 1.0, 5)
    m = ab.do(c.model, {"z": z})
    expected = cf.beta(0.3, 4.0, 2.0) + cf.gamma(0.8, 2.0, 1.0)
    expected += cf.normal(ys, z, 0.5 + 0.1 * jnp.arange(5))
    close(m.log_density({"phi": 0.3, "s": 0.8}, ys), expected)
    trace = m.simulate(KEY, ys)
    close(trace.retval, 1.0)


def test_do_under_a_branch_and_a_scope():
    c = case("cond_one_branch")
    m = ab.do(c.model, {"x": 3.0})
    close(m.log_density({"z": 1}), cf.bernoulli(1, 0.4) + cf.normal(0.2, 3.0, 0.5))
    close(m.log_density({"z": 0}), cf.bernoulli(0, 0.4) + cf.normal(0.2, -1.0, 0.5))
    c = case("jit_under_scopes")
    choices = c.choices(0)
    m = ab.do(c.model, {"a/x": 0.0})
    rest = {k: v for k, v in choices.items() if k != "a/x"}
    moved = {**choices, "a/x": jnp.array(0.0)}
    close(m.log_density(rest), c.reference(moved) - cf.normal(0.0, 0.0, 1.0))


# -- with_prior ------------------------------------------------------------------------------


def test_with_prior_from_a_dict():
    m = ab.with_prior(chain, {"a": dist.StudentT(4.0, 1.0, 2.0)})
    expected = chain.log_density(CHOICES) - cf.normal(A, 0, 2) + cf.student_t(A, 4.0, 1.0, 2.0)
    close(m.log_density(CHOICES), expected)
    draws = jax.vmap(lambda k: m.simulate(k).choices["a"])(jax.random.split(KEY, 2000))
    assert stats.kstest(draws, stats.t(4.0, 1.0, 2.0).cdf).pvalue > 1e-5


def test_with_prior_of_a_mapped_site():
    c = case("vmap_schools")
    choices = c.choices(0)
    m = ab.with_prior(c.model, {"theta": dist.Laplace(0.0, 3.0)})
    expected = c.reference(choices) + cf.laplace(choices["theta"], 0.0, 3.0)
    expected -= cf.normal(choices["theta"], choices["mu"], choices["tau"])
    close(m.log_density(choices, *c.entry.args), expected)


def test_with_prior_from_a_model():
    """A Model over several sites replaces them jointly, their dependence included."""

    @ab.model
    def prior():
        b = ab.sample("b", dist.Normal(2.0, 1.0))
        ab.sample("a", dist.Normal(-b, 0.3))

    m = ab.with_prior(chain, prior)
    expected = cf.normal(B, 2, 1) + cf.normal(A, -B, 0.3) + cf.normal(C, 3 * B + jnp.arange(3), 0.5)
    close(m.log_density(CHOICES), expected)
    trace = m.simulate(KEY)
    close(trace.log_density, m.log_density({k: trace.choices[k] for k in "abc"}))
    close(trace.retval[0], trace.choices["a"])
    draws = jax.vmap(lambda k: m.simulate(k).choices)(jax.random.split(KEY, 2000))
    assert stats.kstest(draws["a"] + draws["b"], stats.norm(0, 0.3).cdf).pvalue > 1e-5


# -- reparam ---------------------------------------------------------------------------------


REPARAM = {
    "vmap_schools": {"theta": lambda: ab.noncentered()},
    "scan_carry_and_xs": {"z": lambda: ab.noncentered()},
    "vmap_of_scan": {"z": lambda: ab.noncentered(), "start": lambda: ab.noncentered()},
    "scalar_chain": {"x": lambda: ab.noncentered()},
}


@pytest.mark.parametrize("name", sorted(REPARAM))
def test_reparam_keeps_the_joint(name):
    c = case(name)
    m = ab.reparam(c.model, {a: make() for a, make in REPARAM[name].items()})
    for i in range(2):
        choices = c.choices(i)
        close(m.log_density(choices, *c.entry.args), c.reference(choices))
    trace = m.simulate(KEY, *c.entry.args)
    assert set(trace.choices) == set(c.simulate(KEY).choices)  # same addresses, same scale
    latents = {a: trace.choices[a] for a in c.entry.shapes}
    close(trace.log_density, c.reference(latents))


def test_reparam_keeps_the_distribution():
    m = ab.reparam(chain, {"b": ab.noncentered()})
    keys = jax.random.split(KEY, 3000)
    b = jax.vmap(lambda k: m.simulate(k).choices["b"])(keys)
    assert stats.kstest(b, stats.norm(0, np.sqrt(5.0)).cdf).pvalue > 1e-5


def test_reparam_by_a_bijection():
    from numpyro.distributions import transforms

    c = case("vmap_schools")
    m = ab.reparam(c.model, {"tau": transforms.ExpTransform()})
    for i in range(2):
        close(m.log_density(c.choices(i), *c.entry.args), c.reference(c.choices(i)))


# -- propose ---------------------------------------------------------------------------------


@ab.model
def guide(loc):
    a = ab.sample("a", dist.Normal(loc, 1.5))

    def step(z, t):
        z = ab.sample("z", dist.Normal(z / 2, 1.0 + t))
        return z, None

    jax.lax.scan(step, a, jnp.arange(3.0))


def _guide_density(c, loc):
    total, z = cf.normal(c["a"], loc, 1.5), c["a"]
    for t in range(3):
        total += cf.normal(c["z"][t], z / 2, 1.0 + t)
        z = c["z"][t]
    return total


def test_propose_inside_a_program():
    @ab.model
    def outer(loc):
        choices, log_q = ab.propose(guide, loc)
        ab.deterministic("log_q", log_q)
        ab.sample("y", dist.Normal(jnp.sum(choices["z"]), 1.0), obs=0.4)
        return choices

    trace = outer.simulate(KEY, 0.7)
    latents = {k: trace.choices[k] for k in ("a", "z")}
    expected = _guide_density(latents, 0.7)
    close(trace.deterministics["log_q"], expected)
    jax.tree.map(close, trace.retval, latents)
    expected += cf.normal(0.4, jnp.sum(latents["z"]), 1.0)
    close(trace.log_density, expected)
    close(outer.log_density(latents, 0.7), expected)


def test_propose_under_scan_and_vmap():
    """Each run of the proposal has its own draws and its own log density."""

    @ab.model
    def outer():
        def step(s, t):
            choices, log_q = jax.vmap(lambda i: ab.propose(guide, s + i))(jnp.arange(2.0))
            ab.deterministic("log_q", log_q)
            return jnp.mean(choices["a"]), None

        jax.lax.scan(step, 0.0, jnp.arange(3.0))

    trace = outer.simulate(KEY)
    assert trace.choices["a"].shape == (3, 2)
    assert trace.choices["z"].shape == (3, 2, 3)
    s, total = 0.0, 0.0
    for t in range(3):
        for i in range(2):
            part = _guide_density({k: trace.choices[k][t, i] for k in ("a", "z")}, s + i)
            close(trace.deterministics["log_q"][t, i], part)
            total += part
        s = jnp.mean(trace.choices["a"][t])
    close(trace.log_density, total)


def test_log_density_inside_a_program():
    """Importance sampling written as a program: the factor makes the total the target's."""

    @ab.model
    def target():
        a = ab.sample("a", dist.Normal(0.0, 1.0))
        z = ab.sample("z", dist.Normal(a, 1.0).expand((3,)))
        ab.sample("y", dist.Normal(jnp.sum(z), 1.0))

    @ab.model
    def program():
        choices, log_q = ab.propose(guide, 0.2)
        ab.factor("weight", ab.log_density(target, {**choices, "y": 1.1}) - log_q)

    trace = program.simulate(KEY)
    latents = {k: trace.choices[k] for k in ("a", "z")}
    expected = cf.normal(latents["a"]) + cf.normal(latents["z"], latents["a"])
    expected += cf.normal(1.1, jnp.sum(latents["z"]), 1.0)
    close(trace.log_density, expected)
    close(target.log_density({**latents, "y": 1.1}), expected)


# -- transformations of transformations ------------------------------------------------------


def test_transformations_compose():
    m = ab.condition(
        ab.do(ab.with_prior(chain, {"a": dist.Cauchy(0.0, 1.0)}), {"b": 0.5}), {"c": C}
    )
    close(m.log_density({"a": A}), cf.cauchy(A) + cf.normal(C, 1.5 + jnp.arange(3), 0.5))
    m = ab.reparam(ab.condition(chain, {"c": C}), {"b": ab.noncentered()})
    close(m.log_density({"a": A, "b": B}), chain.log_density(CHOICES))


def test_transformed_models_inline():
    """A transformed model is a Model: it runs inside another, under scope and vmap."""
    done = ab.do(chain, {"b": 0.5})

    @ab.model
    def outer():
        with ab.scope("s"):
            jax.vmap(lambda _: done())(jnp.arange(2))
        ab.sample("top", dist.Normal(0.0, 1.0))

    trace = outer.simulate(KEY)
    a, c = trace.choices["s/a"], trace.choices["s/c"]
    assert a.shape == (2,) and c.shape == (2, 3)
    expected = cf.normal(trace.choices["top"]) + cf.normal(a, 0, 2)
    expected += cf.normal(c, 1.5 + jnp.arange(3), 0.5)
    close(trace.log_density, expected)


def test_conditioned_model_inlines():
    observed = ab.condition(chain, {"c": C})

    @ab.model
    def outer():
        with ab.scope("s"):
            observed()

    close(outer.log_density({"s/a": A, "s/b": B}), chain.log_density(CHOICES))


def test_transformations_leave_the_original():
    before = float(chain.log_density(CHOICES))
    ab.do(chain, {"b": 1.0})
    ab.condition(chain, {"b": 1.0}).simulate(KEY)
    ab.reparam(chain, {"b": ab.noncentered()}).simulate(KEY)
    assert float(chain.log_density(CHOICES)) == before
