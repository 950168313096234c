"""Every mistake gets an error of the right class, naming the address and the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist

from . import closed_forms as cf
from .cases import close

KEY = jax.random.key(0)


@ab.model
def schools(sigma):
    mu = ab.sample("mu", dist.Normal(0, 5))
    tau = ab.sample("tau", dist.HalfCauchy(5))

    def school(s):
        theta = ab.sample("theta", dist.Normal(mu, tau))
        return ab.sample("y", dist.Normal(theta, s))

    return jax.vmap(school)(sigma)


SIGMA = np.array([1.0, 2.0, 3.0])
GOOD = {"mu": 0.1, "tau": 1.0, "theta": np.zeros(3), "y": np.array([0.1, -0.4, 2.0])}


def fails(error, builtin, *words):
    """Asserts the class, the built-in base, and that every word is in the message."""

    class Check:
        def __enter__(self):
            pass

        def __exit__(self, kind, value, traceback):
            if value is None:
                pytest.fail(f"did not raise {error.__name__}")
            if not isinstance(value, error):
                return False  # the wrong error shows with its own traceback
            assert isinstance(value, ab.AbduceError)
            assert isinstance(value, builtin), type(value).__mro__
            for word in words:
                assert word in str(value), f"{word!r} is not in: {value}"
            return True

    return Check()


def entry_points(given):
    """Every public way to give values."""
    rest = {k: v for k, v in GOOD.items() if k not in given}
    return {
        "log_density": lambda: schools.log_density({**rest, **given}, SIGMA),
        "generate": lambda: schools.generate(KEY, given, SIGMA),
        "update": lambda: schools.simulate(KEY, SIGMA).update(given),
        "condition": lambda: ab.condition(schools, given).simulate(KEY, SIGMA),
    }


ENTRY = ["log_density", "generate", "update", "condition"]


# -- addresses -------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRY)
def test_unknown_address(entry):
    with fails(
        ab.UnknownAddress, KeyError, "thetaa", "schools", "mu", "tau", 'Did you mean "theta"'
    ):
        entry_points({"thetaa": np.zeros(3)})[entry]()


def test_message_is_readable():
    """KeyError would print the repr of its message; ours prints the message."""
    with pytest.raises(KeyError) as e:
        schools.generate(KEY, {"thetaa": 1.0}, SIGMA)
    assert not str(e.value).startswith(("'", '"'))


@pytest.mark.parametrize(
    "transform",
    [
        lambda: ab.do(schools, {"nope": 1.0}),
        lambda: ab.with_prior(schools, {"nope": dist.Normal(0, 1)}),
        lambda: ab.reparam(schools, {"nope": ab.noncentered()}),
        lambda: ab.condition(schools, {"nope": 1.0}),
        lambda: ab.with_prior(schools, ab.model(lambda: ab.sample("nope", dist.Normal(0, 1)))),
    ],
    ids=["do", "with_prior", "reparam", "condition", "with_prior model"],
)
def test_unknown_address_in_a_transformation(transform):
    with fails(ab.UnknownAddress, KeyError, "nope", "mu"):
        transform().simulate(KEY, SIGMA)


def test_unknown_param():
    @ab.model
    def m():
        ab.sample("x", dist.Normal(ab.param("loc", jnp.zeros(())), 1.0))

    with fails(ab.UnknownAddress, KeyError, "lok", "loc"):
        m.simulate(KEY, params={"lok": 1.0})
    with fails(ab.InvalidValue, ValueError, "loc", "(2,)"):
        m.simulate(KEY, params={"loc": np.zeros(2)})


def test_unknown_field_of_a_trace():
    with fails(ab.UnknownAddress, KeyError, "thetaa", "theta"):
        schools.simulate(KEY, SIGMA)["thetaa"]


def _twice(where):
    def draw(_=None):
        return ab.sample("x", dist.Normal(0.0, 1.0))

    def plain():
        draw()
        draw()

    def across_vmap():
        draw()
        jax.vmap(draw)(jnp.arange(3))

    def in_two_scans():
        for _ in range(2):
            jax.lax.scan(lambda c, t: (c, draw()), 0, jnp.arange(3))

    def inside_a_body():
        jax.lax.scan(lambda c, t: (draw(), draw()), 0.0, jnp.arange(3))

    def branch_and_outside():
        draw()
        jax.lax.cond(jnp.sin(1.0) > 0, draw, lambda: 0.0)

    def one_branch_twice():
        jax.lax.cond(jnp.sin(1.0) > 0, lambda: draw() + draw(), lambda: 0.0)

    def two_conds():
        for _ in range(2):
            jax.lax.cond(jnp.sin(1.0) > 0, draw, lambda: 0.0)

    def two_vmapped_conds():
        def element(p):
            for _ in range(2):
                jax.lax.cond(p, draw, lambda: 0.0)

        jax.vmap(element)(jnp.array([True, False]))

    def cached_jit():
        f = jax.jit(draw)
        f()
        f()

    def other_kind():
        draw()
        ab.deterministic("x", 1.0)

    def factor():
        draw()
        ab.factor("x", 1.0)

    def map_with_remainder():
        jax.lax.map(draw, jnp.arange(5), batch_size=2)

    return locals()[where]


@pytest.mark.parametrize(
    "where",
    ["plain", "across_vmap", "in_two_scans", "inside_a_body", "branch_and_outside",
     "one_branch_twice", "two_conds", "two_vmapped_conds", "cached_jit", "other_kind", "factor",
     "map_with_remainder"],
)  # fmt: skip
def test_duplicate_address(where):
    with fails(ab.DuplicateAddress, ValueError, "x", "scope"):
        ab.model(_twice(where)).simulate(KEY)


def test_sub_models_need_scopes():
    @ab.model
    def m(s):
        schools(s)
        schools(s)

    with fails(ab.DuplicateAddress, ValueError, "mu", "ab.scope"):
        m.simulate(KEY, SIGMA)


# -- missing and superfluous values ----------------------------------------------------------


def test_missing_latent():
    for a in GOOD:
        choices = {k: v for k, v in GOOD.items() if k != a}
        with fails(ab.MissingData, ValueError, a):
            schools.log_density(choices, SIGMA)


def test_missing_latents_are_all_named():
    with fails(ab.MissingData, ValueError, "mu", "tau", "theta", "y"):
        schools.log_density({}, SIGMA)


def test_missing_latent_of_an_active_branch():
    @ab.model
    def m():
        z = ab.sample("z", dist.Bernoulli(0.5))
        jax.lax.cond(z == 1, lambda: ab.sample("x", dist.Normal(0.0, 1.0)), lambda: 0.0)

    close(m.log_density({"z": 0}), np.log(0.5))  # inactive, so not needed
    with fails(ab.AbduceError, (ValueError, TypeError), "x"):
        m.log_density({"z": 1})


def test_observed_and_given():
    @ab.model
    def m(y):
        mu = ab.sample("mu", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Normal(mu, 1.0), obs=y)

    for call in (
        lambda: m.log_density({"mu": 0.0, "y": 1.0}, 0.5),
        lambda: m.generate(KEY, {"y": 1.0}, 0.5),
        lambda: m.simulate(KEY, 0.5).update({"y": 1.0}),
        lambda: ab.condition(m, {"y": 1.0}).simulate(KEY, 0.5),
    ):
        with fails(ab.AbduceError, (ValueError, KeyError), "y", "obs"):
            call()


def test_given_twice():
    """Once by `condition`, once by `given`."""
    m = ab.condition(schools, {"y": GOOD["y"]})
    for call in (
        lambda: m.generate(KEY, {"y": GOOD["y"]}, SIGMA),
        lambda: m.log_density(GOOD, SIGMA),
        lambda: ab.condition(m, {"y": GOOD["y"]}).simulate(KEY, SIGMA),
    ):
        with fails(ab.AbduceError, (ValueError, KeyError), "y"):
            call()


@pytest.mark.parametrize("kind", ["deterministic", "factor", "param"])
def test_what_is_no_choice_cannot_be_given(kind):
    @ab.model
    def m():
        x = ab.sample("x", dist.Normal(0.0, 1.0))
        ab.deterministic("deterministic", x)
        ab.factor("factor", x)
        ab.param("param", jnp.zeros(()))

    with fails(ab.AbduceError, (ValueError, KeyError), kind):
        m.generate(KEY, {kind: 1.0})
    if kind == "deterministic":
        with pytest.raises(ab.AbduceError, match=r"ab\.do"):
            m.generate(KEY, {kind: 1.0})


def test_given_that_is_no_dict():
    for bad in (3.0, np.zeros(3), [("mu", 1.0)], "mu"):
        with pytest.raises(ab.AbduceError):
            schools.generate(KEY, bad, SIGMA)


# -- values ----------------------------------------------------------------------------------

SHAPES = [
    {"theta": 0.0},  # given never broadcasts
    {"theta": np.zeros(1)},
    {"theta": np.zeros(4)},
    {"theta": np.zeros((3, 1))},
    {"mu": np.zeros(1)},  # a length-1 vector is no scalar
    {"mu": np.zeros(0)},
]


@pytest.mark.parametrize("entry", ENTRY)
@pytest.mark.parametrize(
    "given", SHAPES, ids=[f"{k}-{np.shape(v)}" for s in SHAPES for k, v in s.items()]
)
def test_wrong_shape(given, entry):
    ((address, value),) = given.items()
    expected = str(np.shape(GOOD[address]))
    with fails(ab.InvalidValue, ValueError, address, str(np.shape(value)), expected):
        entry_points(given)[entry]()


def test_wrong_shape_of_obs():
    @ab.model
    def m(y):
        ab.sample("y", dist.Normal(jnp.zeros(3), 1.0), obs=y)

    with fails(ab.InvalidValue, ValueError, "y", "(4,)", "(3,)"):
        m.simulate(KEY, np.zeros(4))


@pytest.mark.parametrize("entry", ["log_density", "generate", "condition"])
def test_wrong_dtype(entry):
    @ab.model
    def m():
        ab.sample("k", dist.Poisson(2.0))

    given = {"k": 1.5}
    call = {
        "log_density": lambda: m.log_density(given),
        "generate": lambda: m.generate(KEY, given),
        "condition": lambda: ab.condition(m, given).simulate(KEY),
    }[entry]
    with fails(ab.InvalidValue, ValueError, "k"):
        call()


@pytest.mark.parametrize("bad", ["text", object(), {"nested": 1.0}, np.array(["a"] * 3)])
def test_values_that_are_no_numbers(bad):
    with pytest.raises(ab.AbduceError) as e:
        schools.generate(KEY, {"y": bad}, SIGMA)
    assert "y" in str(e.value)


@pytest.mark.parametrize("entry", ENTRY)
def test_nan_in_data(entry):
    y = np.array([0.1, np.nan, np.nan])
    words = ("y", "2 NaN", "3", "(1,)", "ab.masked")
    with fails(ab.MissingData, ValueError, *words):
        entry_points({"y": y})[entry]()


def test_nan_in_obs():
    @ab.model
    def m():
        ab.sample("y", dist.Normal(0.0, 1.0).expand((4,)), obs=np.array([0.0, 1.0, 2.0, np.nan]))

    with fails(ab.MissingData, ValueError, "y", "1 NaN", "4", "(3,)", "ab.masked"):
        m.simulate(KEY)


def test_infinite_data():
    """Infinity lies in the closure of the real numbers only: density 0, or refused by name."""
    given = {**GOOD, "y": np.array([0.1, np.inf, 0.0])}
    try:
        value = schools.log_density(given, SIGMA)
    except ab.InvalidValue as e:
        assert "y" in str(e)
    else:
        assert float(value) == -np.inf


SUPPORTS = {
    "negative count": (lambda: dist.Poisson(2.0), -1),
    "above the count": (lambda: dist.Binomial(3, 0.5), 4),
    "negative scale": (lambda: dist.HalfNormal(1.0), -0.5),
    "outside the unit interval": (lambda: dist.Beta(2.0, 2.0), 1.5),
    "outside the interval": (lambda: dist.Uniform(0.0, 2.0), 2.5),
    "no simplex": (lambda: dist.Dirichlet(jnp.ones(3)), np.array([0.5, 0.6, 0.2])),
    "no category": (lambda: dist.Categorical(jnp.ones(3) / 3), 3),
    "not 0 or 1": (lambda: dist.Bernoulli(0.3), 2),
    "not positive definite": (lambda: dist.LKJ(2, 1.0), np.array([[1.0, 2.0], [2.0, 1.0]])),
    "below the truncation": (lambda: dist.TruncatedNormal(0.0, 1.0, low=1.0), 0.5),
    "not ordered": (
        lambda: dist.ImproperUniform(dist.constraints.ordered_vector, (), (2,)),
        np.array([1.0, 0.0]),
    ),
}


@pytest.mark.parametrize("entry", ["generate", "obs", "condition"])
@pytest.mark.parametrize("name", sorted(SUPPORTS))
def test_outside_the_support(name, entry):
    """Data are refused by name; a choice that is only scored has density zero."""
    make, value = SUPPORTS[name]
    m = ab.model(lambda: ab.sample("v", make()))
    call = {
        "generate": lambda: m.generate(KEY, {"v": value}),
        "obs": lambda: ab.model(lambda: ab.sample("v", make(), obs=value)).simulate(KEY),
        "condition": lambda: ab.condition(m, {"v": value}).simulate(KEY),
    }[entry]
    with fails(ab.InvalidValue, ValueError, "v", "support"):
        call()


@pytest.mark.parametrize("name", sorted(SUPPORTS))
def test_outside_the_support_under_jit(name):
    """What cannot be checked then still has no positive density."""
    make, value = SUPPORTS[name]
    m = ab.model(lambda: ab.sample("v", make()))
    assert float(jax.jit(lambda v: m.log_density({"v": v}))(jnp.asarray(value))) == -np.inf


def test_outside_a_support_that_depends_on_a_choice():
    @ab.model
    def m():
        s = ab.sample("s", dist.HalfNormal(1.0))
        ab.sample("u", dist.Uniform(0.0, s))

    assert float(m.log_density({"s": 1.0, "u": 1.5})) == -np.inf
    close(m.log_density({"s": 1.0, "u": 0.5}), cf.half_normal(1.0))


def test_invalid_parameters_of_a_distribution():
    with fails(ab.AbduceError, ValueError, "x", "scale"):
        ab.model(lambda: ab.sample("x", dist.Normal(0.0, -1.0))).simulate(KEY)


# -- keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, 1.5, None, "key", np.zeros(3, np.uint32), jnp.zeros(2)])
def test_what_is_no_key(bad):
    for call in (
        lambda: schools.simulate(bad, SIGMA),
        lambda: schools.generate(bad, {}, SIGMA),
        lambda: schools.simulate(KEY, SIGMA).regenerate(bad, "mu"),
    ):
        with fails(ab.MissingKey, TypeError, "jax.random.key("):
            call()


def test_forgotten_key():
    with fails(ab.MissingKey, TypeError, "jax.random.key("):
        schools.simulate(SIGMA)


def test_a_batch_of_keys_is_refused():
    with fails(ab.MissingKey, TypeError, "vmap"):
        schools.simulate(jax.random.split(KEY, 3), SIGMA)


def test_a_legacy_key_is_wrapped():
    old = schools.simulate(jax.random.PRNGKey(5), SIGMA)
    new = schools.simulate(jax.random.key(5), SIGMA)
    for a in new.choices:
        assert np.array_equal(old.choices[a], new.choices[a])


# -- programs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: ab.sample("x", dist.Normal(0.0, 1.0)),
        lambda: ab.factor("x", 1.0),
        lambda: ab.deterministic("x", 1.0),
        lambda: ab.param("x", 1.0),
        lambda: jax.vmap(lambda i: ab.sample("x", dist.Normal(i, 1.0)))(jnp.arange(3.0)),
        lambda: jax.jit(lambda: ab.sample("x", dist.Normal(0.0, 1.0)))(),
        lambda: jax.lax.scan(
            lambda c, t: (ab.sample("x", dist.Normal(c, 1.0)), None), 0.0, jnp.arange(3.0)
        ),
    ],
    ids=["sample", "factor", "deterministic", "param", "vmap", "jit", "scan"],
)
def test_outside_a_model(call):
    with fails(ab.OutsideModel, RuntimeError, "x", "@ab.model"):
        call()


def test_calling_a_model_outside_a_model():
    with fails(ab.OutsideModel, RuntimeError, "mu", "simulate"):
        schools(SIGMA)


def test_propose_outside_a_program():
    with fails(ab.OutsideModel, RuntimeError, "mu"):
        ab.propose(schools, SIGMA)


def test_site_in_an_unbounded_loop():
    def program():
        jax.lax.while_loop(
            lambda s: s < 3.0, lambda s: s + ab.sample("x", dist.Exponential(1.0)), 0.0
        )

    with fails(ab.InvalidModel, ValueError, "x", "while_loop", "ab.while_loop"):
        ab.model(program).simulate(KEY)


def test_fori_loop_with_traced_bounds():
    def program(n):
        jax.lax.fori_loop(0, n, lambda i, s: s + ab.sample("x", dist.Normal(s, 1.0)), 0.0)

    with fails(ab.InvalidModel, ValueError, "x", "ab.while_loop"):
        ab.model(program).simulate(KEY, np.int32(3))


def test_if_on_a_random_value():
    def program():
        z = ab.sample("z", dist.Normal(0.0, 1.0))
        if z > 0:  # THE LINE
            ab.sample("x", dist.Normal(0.0, 1.0))

    line = program.__code__.co_firstlineno + 2
    with fails(ab.InvalidModel, ValueError, "lax.cond", f"test_errors.py:{line}"):
        ab.model(program).simulate(KEY)


def test_if_on_a_random_value_inside_a_scan():
    def program():
        def step(z, _):
            z = ab.sample("z", dist.Normal(z, 1.0))
            return (z + 1.0 if z > 0 else z), None

        jax.lax.scan(step, 0.0, None, length=3)

    with fails(ab.InvalidModel, ValueError, "lax.cond", "test_errors.py"):
        ab.model(program).simulate(KEY)


def test_range_over_a_random_value():
    def program():
        n = ab.sample("n", dist.Poisson(3.0))
        for i in range(n):
            ab.sample(f"x{i}", dist.Normal(0.0, 1.0))

    with fails(ab.InvalidModel, ValueError, "test_errors.py"):
        ab.model(program).simulate(KEY)


def test_numpy_on_a_random_value():
    def program():
        x = ab.sample("x", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Normal(np.sin(x), 1.0))

    with fails(ab.InvalidModel, ValueError, "test_errors.py", "jnp"):
        ab.model(program).simulate(KEY)


@pytest.mark.parametrize("d", [1.0, None, "Normal", jnp.zeros(3), dist.Normal, {"a": 2.0}])
def test_sample_without_a_distribution(d):
    with fails(ab.InvalidModel, ValueError, "x", "dist.Normal(0, 1)"):
        ab.model(lambda: ab.sample("x", d)).simulate(KEY)


@pytest.mark.parametrize("name", ["", 3, None, ("a",)])
def test_bad_names(name):
    with pytest.raises(ab.InvalidModel):
        ab.model(lambda: ab.sample(name, dist.Normal(0.0, 1.0))).simulate(KEY)


def test_swapped_name_and_distribution():
    with fails(ab.InvalidModel, ValueError, "string"):
        ab.model(lambda: ab.sample(dist.Normal(0.0, 1.0), "x")).simulate(KEY)


def test_gradient_through_a_site_inside_the_model():
    def program():
        ab.deterministic("g", jax.grad(lambda m: ab.sample("x", dist.Normal(m, 1.0)))(0.5))

    with fails(ab.InvalidModel, ValueError, "x", "log_density"):
        ab.model(program).simulate(KEY)


def test_custom_vjp_with_sites_is_refused_in_gradients():
    @jax.custom_vjp
    def f(m):
        return ab.sample("x", dist.Normal(m, 1.0))

    f.defvjp(lambda m: (f(m), None), lambda _, g: (g,))

    @ab.model
    def m():
        mu = ab.sample("mu", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Normal(f(mu), 1.0))

    def density(mu):
        return m.log_density({"mu": mu, "x": 0.2, "y": 0.4})

    try:
        got = jax.grad(density)(0.3)
    except ab.AbduceError as e:
        assert "x" in str(e) and "custom_vjp" in str(e)
    else:  # or right: the density's own gradient
        close(got, -0.3 + (0.2 - 0.3))


def test_branches_with_incompatible_sites():
    """One address is one site: its shape must be one."""

    def program():
        p = jnp.sin(1.0) > 0
        jax.lax.cond(
            p,
            lambda: jnp.sum(ab.sample("x", dist.Normal(jnp.zeros(2), 1.0))),
            lambda: ab.sample("x", dist.Normal(0.0, 1.0)),
        )

    with fails(ab.AbduceError, ValueError, "x", "(2,)"):
        ab.model(program).simulate(KEY)


def test_a_param_that_differs_along_a_map():
    def program():
        jax.vmap(lambda i: ab.param("p", i))(jnp.arange(3.0))

    with fails(ab.InvalidModel, ValueError, "p"):
        ab.model(program).simulate(KEY)


def test_bad_scales():
    for c in (-1.0, jnp.ones(3)):
        with fails(ab.InvalidModel, ValueError, "ab.scaled", "test_errors.py"):

            def program():
                with ab.scaled(c):  # noqa: B023
                    ab.sample("x", dist.Normal(0.0, 1.0))

            ab.model(program).simulate(KEY)


def test_while_loop_needs_a_static_bound():
    def program(n):
        ab.while_loop(lambda s: s < 1.0, lambda s: s + 1.0, 0.0, max_steps=n)

    for bad in (2.5, None, True, np.float64(2.0)):
        with fails(ab.InvalidModel, ValueError, "max_steps"):
            ab.model(program).simulate(KEY, bad)


def test_static_arguments_must_be_hashable():
    class Odd:
        __hash__ = None

    with fails(ab.InvalidValue, ValueError, "schools"):
        schools.simulate(KEY, Odd())


def test_different_lengths_under_vmap():
    """JAX's own message names the sizes; it must come through."""

    def program(a, b):
        jax.vmap(lambda a, b: ab.sample("x", dist.Normal(a, b)))(a, b)

    with pytest.raises(ValueError, match=r"(?s)3.*4|4.*3"):
        ab.model(program).simulate(KEY, np.zeros(3), np.ones(4))


# -- sites without a density -----------------------------------------------------------------


@ab.model
def simulator():
    m = ab.sample("m", dist.Normal(0.0, 1.0))
    ab.sample("s", dist.Simulator(lambda key, m: m + jax.random.normal(key, ()), m))


@pytest.mark.parametrize(
    "call",
    [
        lambda t: simulator.log_density({"m": 0.0, "s": 0.0}),
        lambda t: t.log_density,
        lambda t: t.project("s"),
        lambda t: t.project(("m", "s")),
        lambda t: t.update({"m": 0.1}),
        lambda t: t.regenerate(KEY, "m"),
        lambda t: simulator.generate(KEY, {"s": 0.3}),
        lambda t: ab.condition(simulator, {"s": 0.3}).log_density({"m": 0.1}),
    ],
    ids=["log_density", "field", "project", "project both", "update", "regenerate", "generate",
         "condition"],
)  # fmt: skip
def test_no_density(call):
    trace = simulator.simulate(KEY)
    assert set(trace.choices) == {"m", "s"}
    with fails(ab.NoDensity, ValueError, "s"):
        call(trace)


def test_what_needs_no_density_works_beside_a_simulator():
    trace, weight = simulator.generate(KEY, {"m": 0.4})  # the simulator is only drawn
    close(weight, cf.normal(0.4))
    close(trace.project("m"), cf.normal(0.4))


def test_improper_prior_cannot_be_drawn():
    m = ab.model(lambda: ab.sample("x", dist.ImproperUniform(dist.constraints.real, (), ())))
    with fails(ab.NoDensity, ValueError, "x"):
        m.simulate(KEY)
    close(m.log_density({"x": 3.0}), 0.0)
    _, weight = m.generate(KEY, {"x": 3.0})
    close(weight, 0.0)


# -- input that is odd but right -------------------------------------------------------------


def test_a_model_without_sites():
    m = ab.model(lambda x: 2 * x)
    trace = m.simulate(KEY, 3.0)
    assert trace.choices == {} and float(trace.retval) == 6.0
    close(trace.log_density, 0.0)
    close(m.log_density({}, 3.0), 0.0)
    _, weight = m.generate(KEY, {}, 3.0)
    close(weight, 0.0)
    _, weight, discarded = trace.update({}, 4.0)
    close(weight, 0.0)
    assert discarded == {}


def test_zero_observations():
    choices = {"mu": 0.1, "tau": 1.0, "theta": np.zeros(0), "y": np.zeros(0)}
    expected = cf.normal(0.1, 0, 5) + cf.half_cauchy(1.0, 5)
    close(schools.log_density(choices, np.zeros(0)), expected)
    trace = schools.simulate(KEY, np.zeros(0))
    assert trace.choices["theta"].shape == (0,)


def test_scalar_and_length_one_data_are_different_models():
    @ab.model
    def m(y):
        mu = ab.sample("mu", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Normal(mu, 1.0).expand(jnp.shape(y)), obs=y)

    for y in (0.5, np.array([0.5]), np.array([[0.5]])):
        close(m.log_density({"mu": 0.1}, y), cf.normal(0.1) + cf.normal(0.5, 0.1))


def test_a_huge_prior_scale():
    m = ab.model(lambda: ab.sample("x", dist.Normal(0.0, 1e150)))
    close(m.log_density({"x": 1e149}), cf.normal(1e149, 0.0, 1e150))
    assert np.isfinite(m.simulate(KEY).choices["x"])


def test_an_improper_posterior_has_a_density_all_the_same():
    @ab.model
    def m():
        a = ab.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
        b = ab.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
        ab.sample("y", dist.Normal(a + b, 1.0), obs=0.5)  # only the sum is identified

    close(m.log_density({"a": 1e6, "b": -1e6}), cf.normal(0.5, 0.0, 1.0))


def test_what_is_no_function():
    for bad in (3, "model", None):
        with pytest.raises(ab.InvalidModel):
            ab.model(bad)


def test_update_with_arguments_of_another_shape():
    """Sites that change their shape have no value: a key is needed, and then they are drawn."""
    trace = schools.simulate(KEY, SIGMA)
    with fails(ab.MissingKey, TypeError, "theta"):
        trace.update({}, np.ones(5))
    moved, weight, discarded = trace.update({}, np.ones(5), key=jax.random.key(1))
    assert moved.choices["theta"].shape == (5,)
    assert set(discarded) == {"theta", "y"}
    close(moved.choices["mu"], trace.choices["mu"])
    kept = ("mu", "tau")
    close(weight, float(moved.project(kept)) - float(trace.log_density))


def test_discrete_latent_under_a_gradient_method():
    @ab.model
    def m():
        z = jax.vmap(lambda i: ab.sample("z", dist.Categorical(jnp.ones(2) / 2)))(jnp.arange(4))
        ab.sample("y", dist.Normal(jnp.sum(z), 1.0))

    with fails(ab.DiscreteLatent, TypeError, "z", "Categorical", "(4,)"):
        ab.nuts(num_warmup=2, num_samples=2, num_chains=1)(m).posterior(KEY, given={"y": 0.3})
