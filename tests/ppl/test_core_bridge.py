"""`ab.from_numpyro`: the density is NumPyro's own, to 1e-6 in double precision.

The reference is `numpyro.infer.util.log_density` at choices that our `simulate` drew.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer.reparam import LocScaleReparam, TransformReparam
from numpyro.infer.util import log_density

import abduce as ab
from abduce.errors import InvalidModel, MissingData
from abduce.ppl.bridge import from_numpyro
from abduce.ppl.graph import graph

X = np.linspace(-1.0, 1.0, 6)
Y = np.array([0.3, -0.2, 1.1, 0.4, -1.5, 0.9])
MASK = np.array([True, True, False, True, False, True])


def regression(x, y=None):
    b = numpyro.sample("b", dist.Normal(0, 1))
    s = numpyro.sample("s", dist.HalfNormal(2.0))
    with numpyro.plate("n", len(x)):
        return numpyro.sample("y", dist.Normal(b * x, s), obs=y)


def nested_plates():
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("a", 3, dim=-2):
        t = numpyro.sample("t", dist.Normal(mu, 1))
        with numpyro.plate("b", 4, dim=-1):
            numpyro.sample("u", dist.Dirichlet(jnp.ones(3)))
            numpyro.sample("o", dist.Normal(t, 1.0), obs=0.5)
    numpyro.deterministic("total", t.sum())


def plates_out_of_order():
    a, b = numpyro.plate("a", 2, dim=-1), numpyro.plate("b", 3, dim=-3)
    with b:
        x = numpyro.sample("x", dist.Exponential(2.0))
    with a, b:
        numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)).expand([1, 1, 1]))
        numpyro.sample("z", dist.Gamma(x + 1.0, 1.0))


def factors(x):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.factor("scalar", -(mu**2))
    numpyro.factor("vector", -jnp.abs(mu - x))
    with numpyro.plate("n", 6), handlers.mask(mask=jnp.asarray(MASK)):
        numpyro.factor("in_plate", -0.1 * mu)


def params(y):
    w = numpyro.param("w", jnp.array([2.0, 3.0]), constraint=dist.constraints.positive)
    numpyro.sample("a", dist.Normal(0.0, w[0]))
    with numpyro.plate("n", 6):
        numpyro.sample("y", dist.Normal(0.0, w[1]), obs=y)


def masked_and_scaled(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("n", 6), handlers.scale(scale=2.5), handlers.mask(mask=jnp.asarray(MASK)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    with handlers.mask(mask=False):
        numpyro.sample("z", dist.Normal(mu, 1.0))
    with handlers.scale(scale=3.0), handlers.scale(scale=jnp.exp(mu)):
        numpyro.sample("w", dist.Normal(mu, 1.0))


def subsampled(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("data", 6, subsample_size=2) as rows:
        numpyro.sample("z", dist.Normal(mu, 1.0))
        batch = numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=batch + 0.0 * rows)


def sample_shape():
    numpyro.sample("x", dist.Normal(0.0, jnp.array([1.0, 2.0])), sample_shape=(3,))
    numpyro.sample("k", dist.Categorical(probs=jnp.array([0.2, 0.8])), sample_shape=(4,))


def state_space(y=None):
    s = numpyro.sample("s", dist.HalfNormal(1.0))

    def step(c, y):
        with numpyro.plate("k", 2):
            z = numpyro.sample("z", dist.Normal(0.9 * c, s))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)
        numpyro.deterministic("doubled", 2 * z)
        return z, z

    with handlers.scale(scale=0.5), handlers.mask(mask=True):
        last, zs = scan(step, jnp.zeros(2), y, length=6)
    numpyro.sample("last", dist.Normal(last.sum() + zs[2].sum(), 1.0))


def branches():
    k = numpyro.sample("k", dist.Normal(0.0, 1.0))

    def high(a):
        return numpyro.sample("x", dist.Normal(20.0 + a))

    def low(a):
        return numpyro.sample("x", dist.Normal(a))

    v = cond(k > 0, high, low, 1.0)
    numpyro.sample("w", dist.Normal(v, 1.0))


def mixture(y):
    w = numpyro.sample("w", dist.Dirichlet(jnp.ones(2)))
    m = numpyro.sample("m", dist.Normal(0, 1).expand([2]).to_event(1))
    with numpyro.plate("n", 6):
        z = numpyro.sample("z", dist.Categorical(w), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(m[z], 1.0), obs=y)


@handlers.reparam(config={"t": LocScaleReparam(0.0), "v": TransformReparam()})
def reparametrized():
    m = numpyro.sample("m", dist.Normal(0, 1))
    numpyro.sample("t", dist.Normal(m, 2.0))
    affine = dist.transforms.AffineTransform(m, 3.0)
    numpyro.sample("v", dist.TransformedDistribution(dist.Normal(0, 1), affine))


def scoped(y):
    def part():
        return numpyro.sample("x", dist.Normal(0, 1))

    a = handlers.scope(part, prefix="a")()
    b = handlers.scope(handlers.scope(part, prefix="c", divider="."), prefix="b")()
    numpyro.sample("y", dist.Normal(a + b, 1.0).expand([6]).to_event(1), obs=y)


def independent_mask(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("y", dist.Exponential(jnp.exp(mu)).expand([6]).mask(MASK).to_event(1), obs=y)


def scan_conditioned():
    return handlers.condition(state_space, {"y": jnp.stack([Y, Y], 1)})()


def scan_substituted():
    return handlers.substitute(state_space, {"z": jnp.stack([Y, Y], 1)})()


HOLES = np.where(MASK, Y, np.nan)
CASES = {
    "regression": (regression, (X, Y)),
    "regression without data": (regression, (X,)),
    "nested plates": (nested_plates, ()),
    "plates out of order": (plates_out_of_order, ()),
    "factors": (factors, (X,)),
    "params": (params, (Y,)),
    "mask and scale": (masked_and_scaled, (HOLES,)),
    "subsample given": (handlers.substitute(subsampled, {"data": jnp.array([4, 1])}), (Y,)),
    "sample_shape": (sample_shape, ()),
    "scan": (state_space, (np.stack([Y, Y[::-1]], 1),)),
    "scan without data": (state_space, ()),
    "scan conditioned": (scan_conditioned, ()),
    "scan substituted": (scan_substituted, ()),
    "cond": (branches, ()),
    "mixture": (mixture, (Y,)),
    "reparam": (reparametrized, ()),
    "scope": (scoped, (Y,)),
    "mask inside an event": (independent_mask, (np.where(MASK, np.abs(Y), -1.0),)),
    "seeded": (handlers.seed(regression, 0), (X, Y)),
}


@pytest.mark.parametrize("name", CASES)
def test_density_is_numpyros(name):
    f, args = CASES[name]
    m = from_numpyro(f)
    trace = m.simulate(jax.random.key(1), *args)
    choices = trace.choices

    def reference(values):
        density, theirs = log_density(f, args, {}, values)
        latent = {
            a: s["value"] for a, s in theirs.items()
            if s["type"] == "sample" and not s["is_observed"] and a in choices
        }  # fmt: skip
        recorded = {a: s["value"] for a, s in theirs.items() if s["type"] == "deterministic"}
        return density, latent, recorded

    expected, latent, recorded = jax.jit(reference)({**choices, **trace.params})
    np.testing.assert_allclose(trace.log_density, expected, rtol=1e-10, atol=1e-10)
    assert {a: v.shape for a, v in latent.items()} == {a: v.shape for a, v in choices.items()}
    assert set(recorded) == set(trace.deterministics)
    for a, value in recorded.items():
        np.testing.assert_allclose(trace.deterministics[a], value)


def test_sample_shape_is_part_of_the_value():
    sites = from_numpyro(sample_shape).program().sites
    assert sites["x"].shape == (3, 2) and sites["k"].shape == (4,)


def test_plates_name_dimensions():
    sites = from_numpyro(nested_plates).program().sites
    assert sites["t"].dims == ("a", None) and sites["u"].dims == ("a", "b", None)
    assert from_numpyro(state_space).program().sites["z"].dims == (None, "k")
    g = graph(from_numpyro(nested_plates))
    assert [str(x) for x in g.sites["u"].axes] == ["a: 3", "b: 4"]
    assert g.parents("o") == ("t",)


def test_data_through_given_is_data_through_obs():
    m = from_numpyro(regression)
    choices = {"b": 0.3, "s": 1.2}
    conditioned = ab.condition(m, {"y": Y})
    np.testing.assert_allclose(
        conditioned.log_density(choices, X), m.log_density(choices, X, Y), rtol=1e-12
    )


def partly_observed(y, seen):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("n", 6), handlers.scale(scale=2.0):
        y = numpyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)
    numpyro.sample("after", dist.Normal(y.sum(), 1.0))


def test_obs_mask_is_one_partly_observed_site():
    m = from_numpyro(partly_observed)
    program = m.program(HOLES, MASK)
    assert list(program.sites) == ["mu", "y", "after"]
    assert program.sites["y"].partial and program.sites["y"].dims == ("n",)
    trace = m.simulate(jax.random.key(3), HOLES, MASK)
    y = trace.choices["y"]
    np.testing.assert_array_equal(y[MASK], Y[MASK])
    theirs = {"mu": trace.choices["mu"], "after": trace.choices["after"], "y_unobserved": y}
    reference, _ = log_density(partly_observed, (Y, MASK), {}, theirs)
    np.testing.assert_allclose(trace.log_density, reference, rtol=1e-10)


def test_obs_mask_twice_in_a_scope_and_in_a_scan():
    def program(y, seen):
        for name in "ab":
            with handlers.scope(prefix=name):
                numpyro.sample("y", dist.Normal(0, 1).expand([6]), obs=y, obs_mask=seen)

        def step(c, xs):
            value, known = xs
            return numpyro.sample("z", dist.Normal(c, 1), obs=value, obs_mask=known), None

        scan(step, 0.0, (y, seen))

    m = from_numpyro(program)
    trace = m.simulate(jax.random.key(0), HOLES, MASK)
    assert set(trace.choices) == {"a/y", "b/y", "z"}
    z = np.asarray(trace.choices["z"])
    np.testing.assert_array_equal(z[MASK], Y[MASK])
    expected = sum(dist.Normal(0, 1).log_prob(trace.choices[a]).sum() for a in ("a/y", "b/y"))
    expected += dist.Normal(np.concatenate([[0.0], z[:-1]]), 1).log_prob(z).sum()
    np.testing.assert_allclose(trace.log_density, expected, rtol=1e-10)


def test_reverse_scan_keeps_positions():
    """NumPyro's own log_density reads a reverse scan's values in the order of execution."""

    def program():
        def step(c, t):
            z = numpyro.sample("z", dist.Normal(c + t, 1.0))
            return z, z

        scan(step, 0.0, jnp.arange(4.0), reverse=True)

    m = from_numpyro(program)
    z = jnp.array([0.3, -1.0, 2.0, 0.5])
    by_hand = dist.Normal(jnp.append(z[1:], 0.0) + jnp.arange(4.0), 1.0).log_prob(z).sum()
    np.testing.assert_allclose(m.log_density({"z": z}), by_hand, rtol=1e-12)
    reference, _ = log_density(program, (), {}, {"z": z[::-1]})
    np.testing.assert_allclose(by_hand, reference, rtol=1e-12)


def test_nested_scans():
    def program():
        def outer(c, _):
            def inner(c, _):
                c = numpyro.sample("x", dist.Normal(c, 1.0))
                return c, c

            c, xs = scan(inner, c, None, length=3)
            return c, xs

        scan(outer, 0.0, None, length=2)

    trace = from_numpyro(program).simulate(jax.random.key(0))
    x = np.ravel(trace.choices["x"])
    expected = dist.Normal(np.concatenate([[0.0], x[:-1]]), 1.0).log_prob(x).sum()
    np.testing.assert_allclose(trace.log_density, expected, rtol=1e-12)


def test_handlers_around_a_scan_reach_its_sites():
    def program():
        def step(c, _):
            z = numpyro.sample("z", dist.Normal(c, 2.0))
            return z, None

        with handlers.scope(prefix="a"), handlers.scale(scale=3.0):
            scan(step, 0.0, None, length=4)

    trace = from_numpyro(program).simulate(jax.random.key(0))
    z = np.asarray(trace.choices["a/z"])
    expected = 3 * dist.Normal(np.concatenate([[0.0], z[:-1]]), 2.0).log_prob(z).sum()
    np.testing.assert_allclose(trace.log_density, expected, rtol=1e-12)


def test_reparam_around_a_scan():
    @handlers.reparam(config={"z": LocScaleReparam(0.0)})
    def program():
        return scan(lambda c, _: 2 * (numpyro.sample("z", dist.Normal(c, 2.0)),), 0.0, None, 3)

    trace = from_numpyro(program).simulate(jax.random.key(0))
    raw = np.asarray(trace.choices["z_decentered"])
    np.testing.assert_allclose(trace.log_density, dist.Normal(0, 1).log_prob(raw).sum())
    np.testing.assert_allclose(trace.deterministics["z"], np.cumsum(2 * raw), rtol=1e-12)


def test_do_cuts_a_site_off():
    def program():
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x, 1))

    m = from_numpyro(handlers.do(program, {"x": 2.0}))
    expected = dist.Normal(0, 1).log_prob(0.5) + dist.Normal(2.0, 1).log_prob(1.0)
    np.testing.assert_allclose(m.log_density({"x": 0.5, "y": 1.0}), expected, rtol=1e-12)
    assert graph(m).edges == ()


def test_inside_another_model_and_under_vmap():
    inner = from_numpyro(regression)

    @ab.model
    def outer(y):
        with ab.scope("one"):
            inner(X, y[0])
        return jax.vmap(lambda y: inner(X, y), axis_name="series")(y)

    y = np.stack([Y, 2 * Y])
    trace = outer.simulate(jax.random.key(0), y)
    assert trace.choices["b"].shape == (2,) and trace.choices["one/b"].shape == ()
    total = 0.0
    parts = [({"b": trace.choices["b"][i], "s": trace.choices["s"][i]}, y[i]) for i in (0, 1)]
    parts.append(({"b": trace.choices["one/b"], "s": trace.choices["one/s"]}, y[0]))
    for choices, data in parts:
        total += log_density(regression, (X, data), {}, choices)[0]
    np.testing.assert_allclose(trace.log_density, total, rtol=1e-10)


def test_handlers_outside_do_not_reach_in():
    m = from_numpyro(regression)
    plain = m.log_density({"b": 0.3, "s": 1.2}, X, Y)
    with handlers.scale(scale=10.0), handlers.scope(prefix="no"):
        again = from_numpyro(lambda x, y: regression(x, y)).log_density({"b": 0.3, "s": 1.2}, X, Y)
    np.testing.assert_allclose(plain, again, rtol=1e-12)
    assert not numpyro.primitives._PYRO_STACK


# Errors


def refuses(match, f, *args):
    with pytest.raises(InvalidModel, match=match):
        from_numpyro(f).program(*args)
    assert not numpyro.primitives._PYRO_STACK  # nothing is left behind


def test_minibatch_plates_are_refused():
    refuses(
        r"plate 'data' of `subsampled` draws a minibatch \(subsample_size=2 of 6\)", subsampled, Y
    )


def test_keys_and_state_are_refused():
    refuses("asks for a random key", lambda: numpyro.prng_key())
    refuses("asks for a random key", handlers.block(lambda: numpyro.sample("x", dist.Normal(0, 1))))
    refuses(
        r"numpyro.mutable statement \('m'\)", lambda: numpyro.primitives.mutable("m", {"a": 1.0})
    )
    refuses("param 'w' of .* has no initial array", lambda: numpyro.param("w"))
    refuses("param 'w' of .* has no initial array", lambda: numpyro.param("w", lambda k: 1.0))


def test_scales_by_arrays_are_refused():
    def program(weights):
        with handlers.scale(scale=weights), numpyro.plate("n", 6):
            numpyro.sample("x", dist.Normal(0, 1))

    with pytest.raises(InvalidModel, match=r"site 'x' of .* is scaled by an array of shape \(6,\)"):
        from_numpyro(lambda: program(np.arange(1.0, 7.0))).program()
    np.testing.assert_allclose(  # an array that is one number is that number
        from_numpyro(lambda: program(2.0 * np.ones(6))).log_density({"x": jnp.zeros(6)}),
        12 * dist.Normal(0, 1).log_prob(0.0),
        rtol=1e-12,
    )


def test_handlers_without_meaning_around_a_scan_are_refused():
    def program(handler):
        with handler:
            scan(lambda c, _: (numpyro.sample("z", dist.Normal(c, 1)), None), 0.0, None, length=3)

    refuses("handlers.mask with an array around a scan",
            lambda: program(handlers.mask(mask=jnp.ones(3, bool))))  # fmt: skip
    refuses("handlers.lift around a scan", lambda: program(handlers.lift(prior={})))
    refuses(
        r"site 'z' in a scan of 3 steps is set by a handler to a value of shape \(2,\)",
        lambda: program(handlers.condition(data={"z": jnp.zeros(2)})),
    )


def test_numpyros_own_refusal_of_scan_in_a_plate():
    def program():
        with numpyro.plate("n", 3):
            scan(lambda c, _: (c, None), 0.0, None, length=3)

    with pytest.raises(NotImplementedError, match="under a `plate` primitive"):
        from_numpyro(program).program()


def test_what_is_no_numpyro_model_is_refused():
    with pytest.raises(InvalidModel, match="takes a NumPyro model function, got 3"):
        from_numpyro(3)
    with pytest.raises(InvalidModel, match="is one of ours"):
        from_numpyro(ab.model(lambda: 1.0))


def test_nan_in_data_is_an_error_as_everywhere():
    def program():
        numpyro.sample("y", dist.Normal(0, 1).expand([6]), obs=HOLES)

    with pytest.raises(MissingData, match="2 NaN among 6 values"):
        from_numpyro(program).program()
