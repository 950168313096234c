"""`ab.from_numpyro`: NumPyro's model functions with NumPyro's density."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as nd
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer.util import log_density

import abduce as ab

from .cases import close

X = np.array([[0.5, 1.0], [-1.0, 0.3], [2.0, -0.7], [0.1, 0.1]])
Y = np.array([0.4, -0.2, 1.9, 0.3])


def regression(x, y=None):
    b = numpyro.sample("b", nd.Normal(0.0, 2.0).expand([2]).to_event(1))
    s = numpyro.sample("s", nd.HalfNormal(1.0))
    loc = numpyro.deterministic("loc", x @ b)
    with numpyro.plate("n", x.shape[0]):
        return numpyro.sample("y", nd.Normal(loc, s), obs=y)


def schools(sigma, y=None):
    mu = numpyro.sample("mu", nd.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", nd.HalfCauchy(5.0))
    with numpyro.plate("school", len(sigma)):
        theta = numpyro.sample("theta", nd.Normal(mu, tau))
        numpyro.sample("y", nd.Normal(theta, sigma), obs=y)


def nested_plates():
    rows, cols = numpyro.plate("row", 3, dim=-2), numpyro.plate("col", 2, dim=-1)
    mu = numpyro.sample("mu", nd.Normal(0.0, 1.0))
    with rows:
        r = numpyro.sample("r", nd.Normal(mu, 1.0))
    with cols:
        c = numpyro.sample("c", nd.Gamma(2.0, 1.0))
    with rows, cols:
        e = numpyro.sample("e", nd.Normal(r, c))
        numpyro.sample("v", nd.Dirichlet(jnp.ones(3)))
        numpyro.sample("z", nd.Bernoulli(logits=e))


def factors_and_params():
    loc = numpyro.param("loc", jnp.array(0.5))
    scale = numpyro.param("scale", jnp.array(2.0), constraint=nd.constraints.positive)
    x = numpyro.sample("x", nd.Normal(loc, scale))
    numpyro.factor("f", -0.5 * x**2)
    with numpyro.plate("i", 3):
        numpyro.factor("g", x * jnp.arange(3.0))


def masks_and_scales(y):
    x = numpyro.sample("x", nd.Normal(0.0, 1.0))
    with numpyro.plate("n", 4), handlers.mask(mask=jnp.array([True, False, True, True])):
        numpyro.sample("y", nd.Normal(x, 1.0), obs=y)
    with handlers.scale(scale=0.3):
        numpyro.sample("w", nd.Normal(x, 1.0).mask(True))
    numpyro.sample("u", nd.Normal(x, 1.0).mask(False))


def local_level(ys):
    s = numpyro.sample("s", nd.HalfNormal(1.0))

    def step(z, y):
        z = numpyro.sample("z", nd.Normal(0.9 * z, s))
        numpyro.sample("y", nd.Normal(z, 0.5), obs=y)
        return z, numpyro.deterministic("twice", 2 * z)

    _, twice = scan(step, 0.0, ys)
    return twice


def scan_with_plate(ys):
    a = numpyro.sample("a", nd.Normal(0.0, 1.0))

    def step(z, y):
        with numpyro.plate("series", 3):
            z = numpyro.sample("z", nd.Normal(a * z, 1.0))
            numpyro.sample("y", nd.Normal(z, 0.5), obs=y)
        return z, None

    scan(step, jnp.zeros(3), ys)


def mixture(y):
    w = numpyro.sample("w", nd.Dirichlet(jnp.ones(2)))
    m = numpyro.sample("m", nd.ImproperUniform(nd.constraints.ordered_vector, (), (2,)))
    numpyro.factor("prior", nd.Normal(0.0, 3.0).log_prob(m).sum())
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", nd.MixtureSameFamily(nd.Categorical(w), nd.Normal(m, 1.0)), obs=y)


def scoped_twice():
    def part():
        return numpyro.sample("x", nd.Normal(0.0, 1.0))

    total = handlers.scope(part, prefix="a")() + handlers.scope(part, prefix="b")()
    numpyro.sample("total", nd.Normal(total, 1.0))


MODELS = {
    "regression": (regression, (X, Y), {"b": (2,), "s": ()}),
    "schools": (schools, (np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.2, -1.0])),
                {"mu": (), "tau": (), "theta": (3,)}),
    "schools, y free": (schools, (np.array([1.0, 2.0, 3.0]),),
                        {"mu": (), "tau": (), "theta": (3,), "y": (3,)}),
    "nested plates": (nested_plates, (),
                      {"mu": (), "r": (3, 1), "c": (2,), "e": (3, 2), "v": (3, 2, 3), "z": (3, 2)}),
    "factors and params": (factors_and_params, (), {"x": ()}),
    "masks and scales": (masks_and_scales, (Y,), {"x": (), "w": (), "u": ()}),
    "local level": (local_level, (Y,), {"s": (), "z": (4,)}),
    "scan with plate": (scan_with_plate, (np.arange(12.0).reshape(4, 3) / 5,),
                        {"a": (), "z": (4, 3)}),
    "scopes": (scoped_twice, (), {"a/x": (), "b/x": (), "total": ()}),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MODELS))
def test_density_and_shapes(name):
    f, args, shapes = MODELS[name]
    m = ab.from_numpyro(f)
    trace = m.simulate(jax.random.key(0), *args)
    assert {a: v.shape for a, v in trace.choices.items()} == shapes
    expected, _ = log_density(f, args, {}, trace.choices)
    close(trace.log_density, expected)
    close(m.log_density(trace.choices, *args), expected)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradients(name):
    f, args, _ = MODELS[name]
    m = ab.from_numpyro(f)
    choices = m.simulate(jax.random.key(1), *args).choices
    smooth = {a: v for a, v in choices.items() if np.issubdtype(v.dtype, np.floating)}

    def theirs(s):
        return log_density(f, args, {}, {**choices, **s})[0]

    got = jax.grad(lambda s: m.log_density({**choices, **s}, *args))(smooth)
    expected = jax.grad(theirs)(smooth)
    for a in smooth:
        close(got[a], expected[a])


def test_ordered_improper_mixture():
    m = ab.from_numpyro(mixture)
    choices = {"w": jnp.array([0.3, 0.7]), "m": jnp.array([-0.5, 1.5])}
    expected, _ = log_density(mixture, (Y,), {}, choices)
    close(m.log_density(choices, Y), expected)


def test_params_may_be_set():
    m = ab.from_numpyro(factors_and_params)
    params = {"loc": jnp.array(-1.0), "scale": jnp.array(0.4)}
    expected, _ = log_density(factors_and_params, (), {}, {"x": jnp.array(0.3), **params})
    close(m.log_density({"x": 0.3}, params=params), expected)


def test_deterministics_and_return_value():
    trace = ab.from_numpyro(local_level).simulate(jax.random.key(0), Y)
    close(trace.deterministics["twice"], 2 * trace.choices["z"])
    close(trace.retval, 2 * trace.choices["z"])
    trace = ab.from_numpyro(regression).simulate(jax.random.key(0), X)
    close(trace.deterministics["loc"], X @ trace.choices["b"])
    close(trace.retval, trace.choices["y"])


def test_given_and_obs_agree():
    m = ab.from_numpyro(regression)
    latents = {"b": jnp.array([0.3, -0.1]), "s": jnp.array(0.7)}
    close(m.log_density({**latents, "y": Y}, X), m.log_density(latents, X, Y))
    close(ab.condition(m, {"y": Y}).log_density(latents, X), m.log_density(latents, X, Y))


def test_plates_that_subsample():
    """The minibatch is drawn with a key no density has: refused, with what to do."""

    def f(y):
        mu = numpyro.sample("mu", nd.Normal(0.0, 1.0))
        with numpyro.plate("n", 4, subsample_size=2):
            batch = numpyro.subsample(y, event_dim=0)
            numpyro.sample("y", nd.Normal(mu, 1.0), obs=batch)

    with pytest.raises(ab.AbduceError) as e:
        ab.from_numpyro(f).log_density({"mu": 0.1}, Y)
    assert "'n'" in str(e.value) or '"n"' in str(e.value)
    assert "scale" in str(e.value)


def test_plates_that_subsample_everything():
    def f(y):
        mu = numpyro.sample("mu", nd.Normal(0.0, 1.0))
        with numpyro.plate("n", 4, subsample_size=4):
            numpyro.sample("y", nd.Normal(mu, 1.0), obs=numpyro.subsample(y, event_dim=0))

    expected, _ = log_density(f, (Y,), {}, {"mu": 0.1})
    close(ab.from_numpyro(f).log_density({"mu": 0.1}, Y), expected)


def test_minibatch_as_an_argument():
    """The remedy of the message, and its density."""

    def f(batch):
        mu = numpyro.sample("mu", nd.Normal(0.0, 1.0))
        with numpyro.plate("n", 2), handlers.scale(scale=4 / 2):
            numpyro.sample("y", nd.Normal(mu, 1.0), obs=batch)

    expected, _ = log_density(f, (Y[:2],), {}, {"mu": 0.1})
    close(ab.from_numpyro(f).log_density({"mu": 0.1}, Y[:2]), expected)


def test_reparametrized_models():
    f = handlers.reparam(schools, config={"theta": numpyro.infer.reparam.LocScaleReparam(0)})
    args = (np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.2, -1.0]))
    m = ab.from_numpyro(f)
    trace = m.simulate(jax.random.key(0), *args)
    assert "theta_decentered" in trace.choices
    expected, _ = log_density(f, args, {}, trace.choices)
    close(trace.log_density, expected)
    close(
        trace.deterministics["theta"],
        trace.choices["mu"] + trace.choices["tau"] * trace.choices["theta_decentered"],
    )


def test_conditioned_and_substituted_functions():
    f = handlers.condition(schools, data={"mu": jnp.array(0.5)})
    args = (np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.2, -1.0]))
    choices = {"tau": jnp.array(1.2), "theta": jnp.array([0.1, 0.0, -0.4])}
    expected, _ = log_density(f, args, {}, choices)
    close(ab.from_numpyro(f).log_density(choices, *args), expected)


def test_inside_a_model_of_ours():
    sub = ab.from_numpyro(nested_plates)

    @ab.model
    def outer():
        def element(i):
            with ab.scope("sub"):
                sub()
            return ab.sample("x", nd.Normal(i, 1.0))

        jax.vmap(element)(jnp.arange(2.0))

    trace = outer.simulate(jax.random.key(0))
    assert trace.choices["sub/e"].shape == (2, 3, 2)
    expected = jnp.sum(nd.Normal(jnp.arange(2.0), 1.0).log_prob(trace.choices["x"]))
    for i in range(2):
        part = {a[4:]: v[i] for a, v in trace.choices.items() if a.startswith("sub/")}
        expected += log_density(nested_plates, (), {}, part)[0]
    close(trace.log_density, expected)


def test_update_and_regenerate():
    m = ab.from_numpyro(nested_plates)
    old, new = (m.simulate(jax.random.key(k)) for k in (0, 1))
    _, weight, _ = old.update(new.choices)
    close(weight, new.log_density - old.log_density)
    moved, weight = old.regenerate(jax.random.key(2), "r")
    close(weight, moved.project(~ab.sel("r")) - old.project(~ab.sel("r")))


def test_new_data_of_the_same_shape_stages_nothing():
    count = 0

    def f(y):
        nonlocal count
        count += 1
        mu = numpyro.sample("mu", nd.Normal(0.0, 1.0))
        numpyro.sample("y", nd.Normal(mu, 1.0).expand(y.shape), obs=y)

    m = ab.from_numpyro(f)
    for i in range(3):
        m.log_density({"mu": 0.1 * i}, Y + i)
    assert count == 1


def test_numpyro_handlers_are_left_as_they_were():
    """A model that fails while staged must not leave its handlers on NumPyro's stack."""

    def broken():
        numpyro.sample("x", nd.Normal(0.0, 1.0))
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        ab.from_numpyro(broken).simulate(jax.random.key(0))
    trace = handlers.trace(handlers.seed(schools, 0)).get_trace(np.ones(3))
    assert isinstance(trace["mu"]["value"], jax.Array)
    assert not numpyro.primitives._PYRO_STACK
