"""Arguments of models: what is traced, what is static, what counts as data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist

from . import closed_forms as cf
from .cases import close

KEY = jax.random.key(2)


class Counter:
    """Counts how often a model's function is traced."""

    def __init__(self, program):
        self.count = 0

        def traced(*args, **kwargs):
            self.count += 1
            return program(*args, **kwargs)

        self.model = ab.model(traced)

    def __call__(self, choices, *args, **kwargs):
        return self.model.log_density(choices, *args, **kwargs)


def test_new_data_of_the_same_shape_stages_nothing():
    def program(y, scale):
        mu = ab.sample("mu", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Normal(mu, scale).expand(y.shape), obs=y)

    m = Counter(program)
    for i in range(4):
        y = np.arange(3.0) + i
        close(m({"mu": 0.1 * i}, y, 1.0 + i), cf.normal(0.1 * i) + cf.normal(y, 0.1 * i, 1.0 + i))
    assert m.count == 1
    m({"mu": 0.0}, np.arange(4.0), 1.0)  # another shape does
    assert m.count == 2
    m({"mu": 0.0}, np.arange(3.0), 9.0)
    assert m.count == 2


def test_static_values_stage_anew_and_are_remembered():
    def program(n, kind, flag, f, nothing):
        assert isinstance(n, int) and isinstance(kind, str) and isinstance(flag, bool)
        assert nothing is None and callable(f)
        for i in range(n):
            d = dist.Normal(f(1.0), 1.0) if kind == "normal" else dist.Laplace(f(1.0), 1.0)
            ab.sample(f"x{i}", d)
        if flag:
            ab.sample("extra", dist.Normal(0.0, 1.0))

    m = Counter(program)
    close(m({"x0": 0.5}, 1, "normal", False, jnp.cos, None), cf.normal(0.5, np.cos(1.0)))
    close(m({"x0": 0.5}, 1, "laplace", False, jnp.cos, None), cf.laplace(0.5, np.cos(1.0)))
    close(
        m({"x0": 0.5, "x1": 0.1}, 2, "normal", False, jnp.sin, None),
        cf.normal(jnp.array([0.5, 0.1]), np.sin(1.0)),
    )
    close(
        m({"x0": 0.5, "extra": 1.0}, 1, "normal", True, jnp.cos, None),
        cf.normal(0.5, np.cos(1.0)) + cf.normal(1.0),
    )
    assert m.count == 4
    close(m({"x0": 0.2}, 1, "normal", False, jnp.cos, None), cf.normal(0.2, np.cos(1.0)))
    assert m.count == 4


def test_true_and_one_are_different_static_values():
    """Python holds `True == 1 == 1.0`; a cache key must not."""

    def program(flag):
        kind = "bool" if isinstance(flag, bool) else "int" if isinstance(flag, int) else "float"
        ab.sample(kind, dist.Normal(0.0, 1.0))

    m = ab.model(program)
    assert set(m.simulate(KEY, True).choices) == {"bool"}
    assert set(m.simulate(KEY, 1).choices) == {"int"}
    assert set(m.simulate(KEY, 1.0).choices) == {"float"}
    assert set(m.simulate(KEY, True).choices) == {"bool"}


def test_floats_and_numpy_scalars_are_traced():
    seen = []

    def program(a, b, c):
        seen.extend([a, b, c])
        ab.sample("x", dist.Normal(a + b + c, 1.0))

    m = ab.model(program)
    close(m.log_density({"x": 0.0}, 1.0, np.float64(2.0), np.int64(3)), cf.normal(0.0, 6.0))
    assert all(isinstance(v, jax.core.Tracer) for v in seen)


def test_gradient_with_respect_to_arguments():
    m = ab.model(lambda loc, scale: ab.sample("x", dist.Normal(loc, scale)))
    grad = jax.grad(lambda a: m.log_density({"x": 1.0}, a, 2.0))(0.5)
    close(grad, 0.5 / 4)
    many = jax.vmap(lambda s: m.log_density({"x": 1.0}, 0.5, s))(jnp.array([1.0, 2.0]))
    close(many, [cf.normal(1.0, 0.5, 1.0), cf.normal(1.0, 0.5, 2.0)])


def test_keyword_arguments_and_defaults():
    @ab.model
    def m(loc, scale=2.0, *, shift=0.0, double=False):
        loc = 2 * loc if double else loc
        ab.sample("x", dist.Normal(loc + shift, scale))

    close(m.log_density({"x": 1.0}, 0.5), cf.normal(1.0, 0.5, 2.0))
    close(m.log_density({"x": 1.0}, 0.5, shift=1.0), cf.normal(1.0, 1.5, 2.0))
    close(m.log_density({"x": 1.0}, loc=0.5, scale=3.0, double=True), cf.normal(1.0, 1.0, 3.0))
    trace = m.simulate(KEY, 0.5, shift=1.0)
    close(trace.log_density, cf.normal(trace.choices["x"], 1.5, 2.0))
    _, weight = m.generate(KEY, {"x": 1.0}, 0.5, shift=1.0)
    close(weight, cf.normal(1.0, 1.5, 2.0))
    _, weight, _ = trace.update({"x": 0.0})  # keeps positional and keyword arguments
    close(weight, cf.normal(0.0, 1.5, 2.0) - trace.log_density)


DATA = [0.5, -1.0, 2.0]


def regression(y, x=None):
    mu = ab.sample("mu", dist.Normal(0.0, 1.0))
    loc = mu if x is None else mu + jnp.asarray(x)
    jax.vmap(lambda m, y: ab.sample("y", dist.Normal(m, 1.0), obs=y))(
        jnp.broadcast_to(loc, (3,)), jnp.asarray(y)
    )


def _containers():
    pd = pytest.importorskip("pandas")
    xr = pytest.importorskip("xarray")
    return {
        "list": DATA,
        "list of numpy": [np.float64(v) for v in DATA],
        "array": np.array(DATA),
        "jax": jnp.array(DATA),
        "float32": np.array(DATA, np.float32),
        "series": pd.Series(DATA, index=["a", "b", "c"]),
        "column": pd.DataFrame({"y": DATA})["y"],
        "xarray": xr.DataArray(DATA, dims="time", coords={"time": [1, 2, 3]}),
    }


@pytest.mark.parametrize(
    "kind",
    ["list", "list of numpy", "array", "jax", "float32", "series", "column", "xarray"],
)
def test_containers_are_data(kind):
    """As an argument, and under `given`."""
    value = _containers()[kind]
    m = ab.model(regression)
    expected = cf.normal(0.3) + cf.normal(np.array(DATA), 0.3)
    close(m.log_density({"mu": 0.3}, value), expected)

    @ab.model
    def free():
        mu = ab.sample("mu", dist.Normal(0.0, 1.0))
        jax.vmap(lambda i: ab.sample("y", dist.Normal(mu, 1.0)))(jnp.arange(3))

    close(free.log_density({"mu": 0.3, "y": value}), expected)
    _, weight = free.generate(KEY, {"mu": 0.3, "y": value})
    close(weight, expected)
    close(ab.condition(free, {"y": value}).log_density({"mu": 0.3}), expected)
    close(ab.do(free, {"y": value}).log_density({"mu": 0.3}), cf.normal(0.3))


def test_nested_data_and_dataframes():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"x": [0.0, 1.0, 2.0], "y": DATA})

    @ab.model
    def m(data):
        mu = ab.sample("mu", dist.Normal(0.0, 1.0))
        assert data["x"].shape == (3,)
        ab.sample("y", dist.Normal(mu + data["x"], 1.0), obs=data["y"])

    expected = cf.normal(0.3) + cf.normal(np.array(DATA), 0.3 + np.arange(3.0))
    close(m.log_density({"mu": 0.3}, {"x": frame["x"], "y": frame["y"]}), expected)
    close(m.log_density({"mu": 0.3}, {"x": [0.0, 1.0, 2.0], "y": DATA}), expected)

    @ab.model
    def table(rows):
        assert rows.shape == (3, 2)
        mu = ab.sample("mu", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Normal(mu + rows[:, 0], 1.0), obs=rows[:, 1])

    close(table.log_density({"mu": 0.3}, frame), expected)


def test_integer_data_where_floats_are_expected():
    m = ab.model(regression)
    expected = cf.normal(0.3) + cf.normal(np.array([1.0, 2.0, 3.0]), 0.3)
    close(m.log_density({"mu": 0.3}, np.array([1, 2, 3])), expected)
    close(m.log_density({"mu": 0.3}, [1, 2, 3]), expected)
    close(m.log_density({"mu": 0}, [1, 2, 3]), cf.normal(0.0) + cf.normal(np.arange(1.0, 4.0)))


def test_float_data_where_integers_are_expected():
    """Whole numbers are taken, fractions are an error."""

    @ab.model
    def m():
        ab.sample("k", dist.Poisson(2.0))

    close(m.log_density({"k": 3.0}), cf.poisson(3.0, 2.0))
    close(m.log_density({"k": np.float32(3)}), cf.poisson(3.0, 2.0))
    with pytest.raises(ab.InvalidValue, match="k"):
        m.log_density({"k": 2.5})


def test_text_is_no_data():
    m = ab.model(regression)
    for bad in (np.array(["a", "b", "c"]), np.array([object()] * 3)):
        with pytest.raises((ab.InvalidValue, TypeError)) as e:
            m.log_density({"mu": 0.3}, bad)
        assert isinstance(e.value, ab.AbduceError)


# -- modules of other frameworks -------------------------------------------------------------


def test_equinox_module():
    import equinox as eqx

    net = eqx.nn.MLP(2, "scalar", 3, 1, activation=jnp.tanh, key=jax.random.key(5))

    @ab.model
    def m(net, x):
        mu = ab.sample("mu", dist.Normal(net(x), 1.0))
        return mu

    x = np.array([0.4, -0.2])
    close(m.log_density({"mu": 0.3}, net, x), cf.normal(0.3, net(x)))
    trace = m.simulate(KEY, net, x)
    close(trace.log_density, cf.normal(trace.choices["mu"], net(x)))

    def loss(net):
        return m.log_density({"mu": 0.3}, net, x)

    grads = eqx.filter_grad(loss)(net)
    expected = eqx.filter_grad(lambda n: cf.normal(0.3, n(x)))(net)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        close(a, b)


def test_equinox_module_with_another_static_field():
    import equinox as eqx

    class Scale(eqx.Module):
        weight: jax.Array
        power: int = eqx.field(static=True)

    @ab.model
    def m(s):
        ab.sample("x", dist.Normal(0.0, s.weight**s.power))

    for power in (1, 2, 1):
        s = Scale(jnp.array(1.5), power)
        close(m.log_density({"x": 0.7}, s), cf.normal(0.7, 0.0, 1.5**power))


def test_flax_nnx_module():
    nnx = pytest.importorskip("flax.nnx")
    net = nnx.Linear(2, 1, rngs=nnx.Rngs(0))

    @ab.model
    def m(net, x):
        return ab.sample("y", dist.Normal(net(x)[0], 1.0))

    x = np.array([0.4, -0.2], np.float32)
    close(m.log_density({"y": 0.3}, net, x), cf.normal(0.3, net(x)[0]))
    net.bias[...] = net.bias[...] + 1.0  # the module is read at each call
    close(m.log_density({"y": 0.3}, net, x), cf.normal(0.3, net(x)[0]))


def test_modules_as_params():
    import equinox as eqx

    net = eqx.nn.Linear(2, 1, key=jax.random.key(5))

    @ab.model
    def m(x):
        f = ab.param("net", net)
        return ab.sample("y", dist.Normal(f(x)[0], 1.0))

    x = np.array([0.4, -0.2])
    close(m.log_density({"y": 0.3}, x), cf.normal(0.3, net(x)[0]))
    trace = m.simulate(KEY, x)
    assert set(trace.params) == {"net/weight", "net/bias"}
    moved = {"net/weight": jnp.array([[1.0, 2.0]]), "net/bias": jnp.array([0.5])}
    close(m.log_density({"y": 0.3}, x, params=moved), cf.normal(0.3, 0.4 - 0.4 + 0.5))
    grad = jax.grad(lambda p: m.log_density({"y": 0.3}, x, params=p))(moved)
    close(grad["net/bias"], [-0.2])
    close(grad["net/weight"], -0.2 * x[None])
    partial = m.log_density({"y": 0.3}, x, params={"net/bias": jnp.array([0.5])})
    close(partial, cf.normal(0.3, (net.weight @ x)[0] + 0.5))


def test_flax_module_as_param():
    nnx = pytest.importorskip("flax.nnx")
    net = nnx.Linear(2, 1, rngs=nnx.Rngs(0))

    @ab.model
    def m(x):
        f = ab.param("net", net)
        return ab.sample("y", dist.Normal(f(x)[0], 1.0))

    x = np.array([0.4, -0.2], np.float32)
    close(m.log_density({"y": 0.3}, x), cf.normal(0.3, net(x)[0]))
    assert len(m.simulate(KEY, x).params) == 2


def test_a_prior_over_an_equinox_network():
    """One line makes a Bayesian network: a pytree of distributions in the network's structure."""
    import equinox as eqx

    net = eqx.nn.MLP(2, "scalar", 3, 1, activation=jnp.tanh, key=jax.random.key(5))
    arrays, rest = eqx.partition(net, eqx.is_array)

    @ab.model
    def m(x):
        prior = jax.tree.map(lambda w: dist.Normal(0.0, 2.0).expand(w.shape), arrays)
        f = eqx.combine(ab.sample("net", prior), rest)
        loc = jax.vmap(f)(x)
        jax.vmap(lambda v: ab.sample("y", dist.Normal(v, 1.0)))(loc)

    x = np.array([[0.4, -0.2], [1.0, 0.3]])
    trace = m.simulate(KEY, x)
    assert set(trace.choices) == {
        "net/layers/0/weight", "net/layers/0/bias", "net/layers/1/weight", "net/layers/1/bias", "y",
    }  # fmt: skip
    c = trace.choices
    h = jnp.tanh(x @ c["net/layers/0/weight"].T + c["net/layers/0/bias"])
    loc = (h @ c["net/layers/1/weight"].T + c["net/layers/1/bias"])[:, 0]
    expected = sum(cf.normal(v, 0.0, 2.0) for a, v in c.items() if a != "y")
    close(trace.log_density, expected + cf.normal(c["y"], loc))


def test_a_prior_over_a_flax_network():
    nnx = pytest.importorskip("flax.nnx")
    graph, state = nnx.split(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))

    @ab.model
    def m(x):
        prior = jax.tree.map(lambda w: dist.Normal(0.0, 2.0).expand(w.shape), state)
        f = nnx.merge(graph, ab.sample("net", prior))
        ab.sample("y", dist.Normal(f(x)[0], 1.0))

    x = np.array([0.4, -0.2])
    trace = m.simulate(KEY, x)
    kernel, bias = (
        next(v for a, v in trace.choices.items() if a.startswith(f"net/{name}"))
        for name in ("kernel", "bias")
    )
    assert len(trace.choices) == 3
    expected = cf.normal(kernel, 0.0, 2.0) + cf.normal(bias, 0.0, 2.0)
    close(trace.log_density, expected + cf.normal(trace.choices["y"], (x @ kernel + bias)[0]))


def test_lists_of_arrays_are_pytrees():
    """A list of weights, as JAX users pass it; the arrays differ in shape."""

    @ab.model
    def m(layers, x):
        for w in layers:
            x = jnp.tanh(w @ x)
        ab.sample("y", dist.Normal(x[0], 1.0))

    x = np.array([0.4, -0.2])
    w1, w2 = np.arange(6.0).reshape(3, 2) / 4, np.array([[0.5, -0.5, 1.0]])
    expected = cf.normal(0.3, jnp.tanh(w2 @ jnp.tanh(w1 @ x))[0])
    for make in (np.asarray, jnp.asarray):
        layers = [make(w1), make(w2)]
        close(m.log_density({"y": 0.3}, layers, x), expected)
        close(m.log_density({"y": 0.3}, tuple(layers), x), expected)
        grad = jax.grad(lambda ls: m.log_density({"y": 0.3}, ls, x))(
            [jnp.asarray(w) for w in layers]
        )
        assert [g.shape for g in grad] == [(3, 2), (1, 3)]


def test_observed_pytrees():
    @ab.model
    def m(y):
        mu = ab.sample("mu", dist.Normal(0.0, 1.0))
        prior = {"a": dist.Normal(mu, 1.0), "b": (dist.Normal(0.0, 2.0).expand((2,)),)}
        return ab.sample("y", prior, obs=y)

    y = {"a": 0.3, "b": (np.array([0.1, -0.2]),)}
    expected = cf.normal(0.5) + cf.normal(0.3, 0.5) + cf.normal(y["b"][0], 0.0, 2.0)
    close(m.log_density({"mu": 0.5}, y), expected)
    close(m.simulate(KEY, y).retval["b"][0], y["b"][0])


def test_distributions_as_arguments():
    """A distribution is a pytree of arrays: a prior can be passed in."""

    @ab.model
    def m(prior):
        ab.sample("x", prior)

    close(m.log_density({"x": 0.5}, dist.Normal(1.0, 2.0)), cf.normal(0.5, 1.0, 2.0))
    close(m.log_density({"x": 0.5}, dist.Gamma(2.0, 3.0)), cf.gamma(0.5, 2.0, 3.0))


def test_models_as_arguments():
    @ab.model
    def sub(scale):
        return ab.sample("z", dist.Normal(0.0, scale))

    @ab.model
    def m(part, scale):
        return ab.sample("x", dist.Normal(part(scale), 1.0))

    close(m.log_density({"z": 0.1, "x": 0.5}, sub, 2.0), cf.normal(0.1, 0, 2) + cf.normal(0.5, 0.1))
    done = ab.do(sub, {"z": 0.4})
    close(m.log_density({"x": 0.5}, done, 2.0), cf.normal(0.5, 0.4))


def test_keys_as_arguments():
    """A model may draw with a key of its own; such draws are deterministic for the model."""

    @ab.model
    def m(key):
        noise = jax.random.normal(key)
        return ab.sample("x", dist.Normal(noise, 1.0))

    k = jax.random.key(9)
    close(m.log_density({"x": 0.0}, k), cf.normal(0.0, jax.random.normal(k)))


def test_closures_over_arrays():
    """Arrays that a function closes over are read when it is staged."""
    offset = jnp.array([1.0, 2.0])

    @ab.model
    def m():
        ab.sample("x", dist.Normal(offset, 1.0))

    close(m.log_density({"x": jnp.zeros(2)}), cf.normal(jnp.zeros(2), offset))

    def inside_jit(shift):
        local = ab.model(lambda: ab.sample("x", dist.Normal(offset + shift, 1.0)))
        return local.log_density({"x": jnp.zeros(2)})

    for shift in (0.5, 3.0):
        close(jax.jit(inside_jit)(shift), cf.normal(jnp.zeros(2), offset + shift))
