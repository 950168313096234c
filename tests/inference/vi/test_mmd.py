"""`ab.objectives.mmd`: implicit guides and simulators, against conjugate posteriors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import abduce as ab
import abduce.dist as dist
from abduce.inference.vi.bound import ModelDensity, ModelGuide

KEY = jax.random.key(3)
NOISE = 0.5


@ab.model
def simulator(n):
    """mu ~ N(1, 2^2); the mean of n numbers around it, without densities."""
    mu = ab.sample("mu", dist.Simulator(lambda k: 1 + 2 * jax.random.normal(k)))

    def draw(k, mu):
        return mu + NOISE * jax.random.normal(k, (n,))

    ab.sample("y", dist.Simulator(draw, mu))


def closed_form(y):
    precision = 1 / 4 + len(y) / NOISE**2
    return (1 / 4 + y.sum() / NOISE**2) / precision, precision**-0.5


@ab.model
def implicit(given, n):
    """A network of the data and of noise: no density."""
    net = ab.param("net", eqx.nn.MLP(2, 1, 16, 1, jax.nn.tanh, key=jax.random.key(0)))
    line = ab.param("line", jnp.array([0.0, 0.0, 1.0]))

    arrays, static = eqx.partition(net, eqx.is_array)

    def draw(k, arrays, line, y):
        e = jax.random.normal(k)
        x = jnp.stack([y.mean(), e])
        return line[0] + line[1] * x[0] + line[2] * e + 0.3 * eqx.combine(arrays, static)(x)[0]

    ab.sample("mu", dist.Simulator(draw, arrays, line, given["y"]))


def adam(rate, steps):
    return optax.adam(optax.cosine_decay_schedule(rate, steps, 0.01))


@pytest.mark.parametrize("kernel", ["energy", "gaussian"])
def test_an_amortized_implicit_posterior_is_near_the_closed_form(kernel):
    """Model and guide without densities: mean and sd at three data sets, in posterior sd's."""
    alg = ab.vi(
        guide=implicit, objective=ab.objectives.mmd(kernel=kernel), num_steps=1500,
        optimizer=adam(0.01, 1500), num_samples=4000, progress_bar=False,
    )  # fmt: skip
    y = np.array([0.9, 1.6, 1.1], np.float32)
    post = alg(simulator).posterior(KEY, 3, given={"y": y})
    assert "pareto_k" not in post.diagnostics
    guide = post.as_model()
    for shift in (-2.0, 0.0, 2.0):
        mean, sd = closed_form(y + shift)
        run = jax.jit(jax.vmap(lambda k, s=shift: guide.simulate(k, {"y": y + s}, 3).choices["mu"]))
        draws = np.asarray(run(jax.random.split(KEY, 4000)))
        assert abs(draws.mean() - mean) < 0.3 * sd
        assert abs(draws.std() / sd - 1) < 0.2
    mean, sd = closed_form(y)
    assert abs(post.mean("mu") - mean) < 0.3 * sd and abs(post.std("mu") / sd - 1) < 0.2


@ab.model
def normal(n):
    mu = ab.sample("mu", dist.Normal(1.0, 2.0))
    ab.sample("y", dist.Normal(mu, NOISE).expand([n]))


@ab.model
def linear(given, n):
    u = ab.param("u", jnp.zeros(3))
    ab.sample("mu", dist.Normal(u[0] + u[1] * given["y"].mean(), jnp.exp(u[2])))


def scorer(objective, n=1000):
    """`u -> values, gradients` of the objective at parameters `u`."""

    def f(u):
        p = ModelDensity(normal, (3,), {}, {"y": jnp.zeros(3)}, {})
        q = ModelGuide(linear, ("mu",), ({"y": jnp.zeros(3)}, 3), {}, {"u": u})
        return objective(p, q)

    e = ab.expectation(f)
    run = jax.jit(jax.vmap(lambda k, u: e.value_and_grad(k, u), (0, None)))
    return lambda u: [np.asarray(x, float) for x in run(jax.random.split(KEY, n), u)]


@pytest.mark.parametrize("kernel", ["energy", "gaussian"])
def test_the_value_is_the_kernel_score_and_its_gradient_vanishes_at_the_posterior(kernel):
    """4.5 standard errors. Between normals, both kernels have closed-form means."""
    score_of = scorer(ab.objectives.mmd(4, 32, kernel=kernel, bandwidth=0.7))
    gain = 3 / NOISE**2 / (1 / 4 + 3 / NOISE**2)
    sd = (1 / 4 + 3 / NOISE**2) ** -0.5
    at = jnp.array([1 - gain, gain, np.log(sd)])
    values, grads = score_of(at)
    assert (np.abs(grads.mean(0)) < 4.5 * grads.std(0) / len(grads) ** 0.5).all()
    for i in (0, 2):
        off = score_of(at + 0.3 * np.eye(3)[i])[1][:, i]
        assert off.mean() < -10 * off.std() / len(off) ** 0.5
    # u - z and u - u' are N(0, 2 sd^2), in units of the prior's standard deviation, 2, whose
    # estimate from 31 draws has a mean inverse that is 1 + 0.75 / 31 times as large
    w = 2**0.5 * sd / 2
    if kernel == "energy":
        expected, slack = -w * (2 / np.pi) ** 0.5 * (1 + 0.75 / 31 + 0.5 / 31), 0.003
    else:
        expected, slack = 0.7 / np.hypot(0.7, w), 0.003
    se = values.std() / len(values) ** 0.5
    assert abs(values.mean() - expected) < 4.5 * se + slack


def test_discrete_latents_and_several_of_them():
    """A guide over a flag and a number: the frequencies of the flag, and the number's means."""

    @ab.model
    def two():
        z = ab.sample("z", dist.Bernoulli(0.5))
        x = ab.sample("x", dist.Normal(0.0, 1.0))
        ab.sample("y", dist.Normal(2.0 * z + x, 0.5))

    @ab.model
    def guide(given):
        u = ab.param("u", jnp.zeros(6))
        y = given["y"]
        z = ab.sample("z", dist.Bernoulli(logits=u[0] + u[1] * y))
        ab.sample("x", dist.Normal(u[2] + u[3] * y + u[4] * z, jnp.exp(u[5])))

    alg = ab.vi(
        guide=guide, objective=ab.objectives.mmd(4, 64), num_steps=2000, num_samples=100,
        optimizer=adam(0.03, 2000), progress_bar=False,
    )  # fmt: skip
    post = alg(two).posterior(KEY, given={"y": np.float32(1.2)})
    u = np.asarray(post.params["u"])
    # log odds: (y^2 - (y - 2)^2) / (2 * 1.25); x given z: 0.8 (y - 2 z), variance 0.2
    exact = np.array([-1.6, 1.6, 0.0, 0.8, -1.6, 0.5 * np.log(0.2)])
    np.testing.assert_allclose(u, exact, atol=0.2)
    assert "pareto_k" in post.diagnostics  # all have densities


def test_errors():
    def fit(m, given, guide=linear, **kw):
        kw = {"objective": ab.objectives.mmd(), "num_steps": 2, "progress_bar": False} | kw
        ab.vi(guide=guide, **kw)(m).posterior(KEY, 3, given=given)

    given = {"y": np.zeros(3, np.float32)}

    @ab.model
    def inside(n):
        mu = ab.sample("mu", dist.Normal(1.0, 2.0))
        ab.sample("y", dist.Normal(mu, NOISE).expand([n]), obs=jnp.zeros(3))

    with pytest.raises(ab.InvalidAlgorithm, match=r"mmd: site 'y' .* pass its value by given="):
        fit(inside, None)

    @ab.model
    def tilted(n):
        mu = ab.sample("mu", dist.Normal(1.0, 2.0))
        ab.factor("tilt", mu)
        ab.sample("y", dist.Normal(mu, NOISE).expand([n]))

    with pytest.raises(ab.InvalidAlgorithm, match=r"mmd: site 'tilt' .* is a factor"):
        fit(tilted, given)
    with pytest.raises(ab.InvalidAlgorithm, match=r"mmd: there are no data"):

        @ab.model
        def prior(n):
            ab.sample("mu", dist.Normal(1.0, 2.0))

        @ab.model
        def alone(given, n):
            ab.sample("mu", dist.Normal(ab.param("m", 0.0), 2.0))

        fit(prior, None, alone)
    with pytest.raises(ab.InvalidAlgorithm, match="leave batch= and batch_size= out"):
        fit(normal, given, batch={"y": 0}, batch_size=2)
    with pytest.raises(ab.NoDensity, match=r"'mu' of the guide .*mmd\(\)"):
        fit(normal, given, implicit, objective=None)
    with pytest.raises(ab.NoDensity, match="needs the density of site 'mu'"):
        fit(simulator, given, implicit, objective=None)
    with pytest.raises(ab.InvalidAlgorithm, match="num_simulations must be at least 3"):
        ab.objectives.mmd(4, 2)
    with pytest.raises(ab.InvalidAlgorithm, match="there are 'energy' and 'gaussian'"):
        ab.objectives.mmd(kernel="cubic")
    with pytest.raises(ab.InvalidAlgorithm, match=r"mmd .*a guide that is a Model"):
        fit(normal, given, ab.guides.mean_field())
