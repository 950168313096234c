"""`ab.objectives.fivo`: the bound of a particle filter, against a Kalman filter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import abduce as ab
import abduce.dist as dist
from abduce.inference.problem import make_problem
from abduce.inference.vi.expectation import Expectation
from abduce.inference.vi.filter_task import FilterTask

KEY = jax.random.key(5)
DRIVE, NOISE = 0.6, 0.5
Y = np.array([0.7, 1.3, 0.2, -0.4, 0.9, 1.8, 1.1, 0.3], np.float32)


@ab.model
def series(n):
    """An autoregression with noise; x0 is 0, and its coefficient is a parameter."""
    decay = ab.param("decay", 0.9)

    def step(x, _):
        x = ab.sample("x", dist.Normal(decay * x, DRIVE))
        ab.sample("y", dist.Normal(x, NOISE))
        return x, None

    jax.lax.scan(step, jnp.zeros(()), None, length=n)


@ab.model
def optimal(given, carry, x):
    """The law of the next state given its observation, at the first value of the parameter."""
    precision = 1 / DRIVE**2 + 1 / NOISE**2
    shift = ab.param("shift", 0.0)
    log_scale = ab.param("log_scale", 0.0)
    mean = (0.9 * carry / DRIVE**2 + given["y"] / NOISE**2) / precision
    ab.sample("x", dist.Normal(mean + shift, precision**-0.5 * jnp.exp(log_scale)))


def kalman(y, decay, drive=DRIVE, noise=NOISE):
    """Log evidence, in float64."""
    m, v, log_z = 0.0, 0.0, 0.0
    for value in np.asarray(y, float):
        m, v = decay * m, decay**2 * v + drive**2
        s = v + noise**2
        log_z += -0.5 * ((value - m) ** 2 / s + np.log(2 * np.pi * s))
        m, v = m + v / s * (value - m), v * noise**2 / s
    return log_z


def bound_of(objective, guide=None, model=series, y=Y, grads=True):
    """`(number of keys, params) -> values` and gradients of single filters."""
    alg = ab.vi(guide=guide, objective=objective)
    task = FilterTask(alg, guide, make_problem(model, (len(y),), {"y": y}, {}, None))
    e = Expectation(task.program(None, objective), ())
    start = task.prepare(KEY)[1]

    @jax.jit
    def run(keys, params):
        def one(k):
            if grads:
                return e.value_and_grad(k, params, task.data)
            return e.estimate(k, params, task.data), {}

        return jax.lax.map(one, keys, batch_size=1000)

    def values(n, seed=0, **params):
        params = start | {a: jnp.asarray(x) for a, x in params.items()}
        v, g = run(jax.random.split(jax.random.key(seed), n), params)
        return np.asarray(v, float), {a: np.asarray(x, float) for a, x in g.items()}

    return values


def mean_se(x):
    return x.mean(), x.std() / len(x) ** 0.5


def test_the_bound_is_below_the_evidence_and_rises_with_the_particles():
    """4.5 standard errors at each comparison."""
    exact = kalman(Y, 0.9)
    bounds = [bound_of(ab.objectives.fivo(n), optimal, grads=False) for n in (1, 8)]
    found = [mean_se(values(2000)[0]) for values in bounds]
    for (low, e1), (high, e2) in zip(found, [*found[1:], (exact, 0.0)], strict=True):
        assert low + 4.5 * np.hypot(e1, e2) < high
    assert exact - found[-1][0] < 0.2


def test_the_estimate_of_the_evidence_is_unbiased():
    """The mean of its exponential, with either gradient: 4.5 standard errors."""
    for scored in (False, True):
        values, _ = bound_of(ab.objectives.fivo(8, resampling_gradient=scored), grads=False)(2000)
        ratio, se = mean_se(np.exp(values - kalman(Y, 0.9)))
        assert abs(ratio - 1) < 4.5 * se < 0.2


def test_one_particle_is_the_elbo():
    """With the locally optimal proposal: value and gradient of the sum of increments."""
    values, grads = bound_of(ab.objectives.fivo(1, threshold=0), optimal)(50_000)
    precision = 1 / DRIVE**2 + 1 / NOISE**2
    s = np.sqrt(DRIVE**2 + NOISE**2)

    def elbo(shift, log_scale):
        """Each step: log p(y | x before) minus the divergence from the optimal law."""
        m, v, total = 0.0, 0.0, 0.0
        for y in np.asarray(Y, float):
            pm, pv = 0.9 * m, 0.81 * v
            total += -0.5 * ((y - pm) ** 2 + pv) / s**2 - 0.5 * np.log(2 * np.pi * s**2)
            total -= 0.5 * (shift**2 * precision + np.exp(2 * log_scale) - 1) - log_scale
            m = (pm / DRIVE**2 + y / NOISE**2) / precision + shift
            v = pv / DRIVE**4 / precision**2 + np.exp(2 * log_scale) / precision
        return total

    mean, se = mean_se(values)
    assert abs(mean - elbo(0.0, 0.0)) < 4.5 * se < 0.05
    for name, i in (("shift", 0), ("log_scale", 1)):
        h = np.eye(2)[i] * 1e-4
        slope = (elbo(*h) - elbo(*-h)) / 2e-4
        mean, se = mean_se(grads[name])
        assert abs(mean - slope) < 4.5 * se < 0.3, name


@pytest.mark.slow
def test_the_scored_gradient_is_that_of_the_bound_and_the_plain_one_is_not():
    """Against a difference of E log Z over common seeds, 4.5 standard errors; three parameters.

    Far from the best proposal, two particles: resampling matters.
    """
    at = {"decay": 0.5, "shift": -0.4, "log_scale": 0.5}
    y = Y[:3]
    objective = ab.objectives.fivo(2, resampling_gradient=True)
    scored = bound_of(objective, optimal, y=y)
    plain = bound_of(ab.objectives.fivo(2, resampler="multinomial", threshold=1.0), optimal, y=y)
    n = 100_000
    _, grads = scored(n, 1, **at)
    _, held = plain(n, 1, **at)
    apart = {}
    for name in at:
        h = 0.1
        up, _ = plain(n, 2, **(at | {name: at[name] + h}))
        down, _ = plain(n, 2, **(at | {name: at[name] - h}))
        wide, _ = plain(n, 2, **(at | {name: at[name] + 2 * h}))
        wider, _ = plain(n, 2, **(at | {name: at[name] - 2 * h}))
        slope, e1 = mean_se((8 * (up - down) - (wide - wider)) / (12 * h))
        mean, e2 = mean_se(grads[name])
        assert abs(mean - slope) < 4.5 * np.hypot(e1, e2) < 0.2, (name, mean, slope)
        biased, e3 = mean_se(held[name])
        apart[name] = abs(biased - slope) / np.hypot(e1, e3)
        assert held[name].var() < grads[name].var()
    assert max(apart.values()) > 8, apart


def simulated(decay=0.7, n=80):
    rng = np.random.default_rng(2)
    x, ys = 0.0, []
    for _ in range(n):
        x = decay * x + DRIVE * rng.normal()
        ys.append(x + NOISE * rng.normal())
    return np.array(ys, np.float32)


@ab.model
def learned(given, carry, x):
    slope, gain = ab.param("slope", 0.0), ab.param("gain", 0.0)
    scale = ab.param("scale", 1.0, constraint=dist.constraints.positive)
    ab.sample("x", dist.Normal(slope * carry + gain * given["y"], scale))


@pytest.fixture(scope="module")
def fit():
    alg = ab.vi(
        guide=learned, objective=ab.objectives.fivo(16), num_steps=800, num_particles=2,
        num_samples=500, progress_bar=False,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.03, 800, 0.01)),
    )  # fmt: skip
    y = simulated()
    return alg(series).posterior(KEY, len(y), given={"y": y}), y


def test_learning_ends_near_maximum_likelihood(fit):
    """The coefficient, and the proposal, which is best where it is the locally optimal one."""
    post, y = fit
    grid = np.linspace(0.3, 0.95, 131)
    log_z = np.array([kalman(y, a) for a in grid])
    best = grid[log_z.argmax()]
    curvature = np.gradient(np.gradient(log_z, grid), grid)[log_z.argmax()]
    assert abs(post.params["decay"] - best) < 0.2 * (-curvature) ** -0.5
    precision = 1 / DRIVE**2 + 1 / NOISE**2
    assert abs(post.params["gain"] - 1 / NOISE**2 / precision) < 0.08
    assert abs(post.params["slope"] - best / DRIVE**2 / precision) < 0.08
    assert abs(post.params["scale"] / precision**-0.5 - 1) < 0.1
    assert abs(post.log_evidence - log_z.max()) < 0.5
    tail = post.diagnostics["objective"][-80:].mean()
    assert log_z.max() - 1.5 < tail < log_z.max() + 0.2


def test_what_a_fit_returns(fit):
    """Draws of the filter at the fitted parameters, and the proposal, for `ab.smc`."""
    post, y = fit
    exact = kalman(y, float(post.params["decay"]))
    assert post.draws["x"].shape == (1, 500, 80) and set(post.given) == {"y"}
    assert abs(post.log_evidence - exact) < 0.5
    decay = float(post.params["decay"])

    @ab.model
    def at_fit(n):
        def step(x, _):
            x = ab.sample("x", dist.Normal(decay * x, DRIVE))
            ab.sample("y", dist.Normal(x, NOISE))
            return x, None

        jax.lax.scan(step, jnp.zeros(()), None, length=n)

    guided = ab.smc(num_particles=200, proposal=post.as_model())(at_fit)
    again = guided.posterior(KEY, 80, given={"y": y})
    assert abs(again.log_evidence - exact) < 0.8
    # nearly even weights, which draws from the model do not have
    plain = ab.smc(num_particles=200)(at_fit).posterior(KEY, 80, given={"y": y})
    assert np.mean(again.diagnostics["ess"]) > 1.2 * np.mean(plain.diagnostics["ess"])
    # predictions are those of the fitted model
    ahead = post.predict(KEY, redraw="x")
    lag = np.asarray(ahead["x"])[0]
    slope = (lag[:, 1:] * lag[:, :-1]).sum() / (lag[:, :-1] ** 2).sum()
    assert abs(slope - decay) < 4.5 * (1 - decay**2) ** 0.5 / (500 * 79) ** 0.5


def test_an_initial_proposal_is_fitted_too():
    """x0 before the scan: its best proposal is its posterior, with one particle the ELBO."""

    @ab.model
    def two(n):
        x0 = ab.sample("x0", dist.Normal(0.0, 1.0))
        level = ab.param("level", 0.0)

        def step(x, _):
            ab.sample("y", dist.Normal(x + level, 1.0))
            return x, None

        jax.lax.scan(step, x0, None, length=n)

    @ab.model
    def start(given, n):
        assert set(given) == {"y"}
        loc = ab.param("loc", 0.0)
        scale = ab.param("scale", 1.0, constraint=dist.constraints.positive)
        ab.sample("x0", dist.Normal(loc, scale))

    y = np.array([1.0, 2.0, 3.0], np.float32)
    alg = ab.vi(
        objective=ab.objectives.fivo(4, initial=start, threshold=0), num_steps=1500,
        optimizer=optax.adam(optax.cosine_decay_schedule(0.03, 1500, 0.01)), num_samples=1000,
        num_particles=4, progress_bar=False,
    )  # fmt: skip
    post = alg(two).posterior(KEY, 3, given={"y": y})
    # the evidence is largest at level = mean y, where the posterior of x0 is N(0, 1/4)
    assert abs(post.params["level"] - 2.0) < 0.05
    assert abs(post.params["loc"]) < 0.05 and abs(post.params["scale"] - 0.5) < 0.05
    cov = np.eye(3) + 1
    exact = -0.5 * ((y - 2) @ np.linalg.solve(cov, y - 2) + np.linalg.slogdet(2 * np.pi * cov)[1])
    assert abs(post.log_evidence - exact) < 0.01


def test_errors():
    def fit(m, given, guide=None, **kw):
        ab.vi(guide=guide, objective=ab.objectives.fivo(2), num_steps=2, progress_bar=False, **kw)(
            m
        ).posterior(KEY, 8, given=given)

    given = {"y": Y}

    @ab.model
    def static(n):
        mu = ab.sample("mu", dist.Normal(ab.param("m", 0.0), 1.0))
        jax.vmap(lambda _: ab.sample("y", dist.Normal(mu, 1.0)))(jnp.arange(n))

    with pytest.raises(ab.InvalidAlgorithm, match=r"no lax.scan with observed sites"):
        fit(static, given)

    @ab.model
    def hidden(n):
        def step(z, _):
            z = ab.sample("z", dist.Bernoulli(0.2 + 0.6 * z))
            ab.sample("y", dist.Normal(ab.param("m", 0.0) + z, 1.0))
            return z, None

        jax.lax.scan(step, jnp.zeros((), jnp.int32), None, length=n)

    with pytest.raises(ab.DiscreteLatent, match=r"'z'.*Bernoulli"):
        fit(hidden, given)

    @ab.model
    def mixed(n):
        def step(x, _):
            x = ab.sample("x", dist.VonMises(ab.param("m", 0.0) + x, 1.0))
            ab.sample("y", dist.Normal(x, 1.0))
            return x, None

        jax.lax.scan(step, jnp.zeros(()), None, length=n)

    with pytest.raises(ab.InvalidModel, match=r"'x' .VonMises. has no derivative"):
        fit(mixed, given)

    @ab.model
    def elsewhere(given, carry, x):
        ab.sample("w", dist.Normal(ab.param("m", 0.0), 1.0))

    with pytest.raises(ab.InvalidValue, match="'w'"):
        fit(series, given, elsewhere)
    with pytest.raises(ab.InvalidAlgorithm, match="proposal of a step"):
        fit(series, given, ab.guides.mean_field())
    with pytest.raises(ab.InvalidAlgorithm, match="batch= and grad="):
        fit(series, given, batch={"y": 0}, batch_size=2)
    with pytest.raises(ab.InvalidAlgorithm, match="needs resampler='multinomial'"):
        ab.objectives.fivo(4, resampler="systematic", resampling_gradient=True)
    with pytest.raises(ab.InvalidAlgorithm, match="unknown resampler"):
        ab.objectives.fivo(4, resampler="nearest")
    with pytest.raises(ab.InvalidAlgorithm, match="num_particles"):
        ab.objectives.fivo(0)

    @ab.model
    def fixed(n):
        def step(x, _):
            x = ab.sample("x", dist.Normal(x, 1.0))
            ab.sample("y", dist.Normal(x, 1.0))
            return x, None

        jax.lax.scan(step, jnp.zeros(()), None, length=n)

    with pytest.raises(ab.InvalidAlgorithm, match=r'write ab.param\("name", init\)'):
        fit(fixed, given)


def test_a_jump_is_reported():
    @ab.model
    def jumps(n):
        def step(x, _):
            x = ab.sample("x", dist.Normal(ab.param("m", 0.0) * x, 1.0))
            ab.sample("y", dist.Normal(jnp.round(x), 1.0))
            return x, None

        jax.lax.scan(step, jnp.zeros(()), None, length=n)

    alg = ab.vi(objective=ab.objectives.fivo(2), num_steps=2, num_samples=50, progress_bar=False)
    with pytest.warns(ab.AbduceWarning, match=r"fivo: in `jumps`, .*'x' goes through `round`"):
        alg(jumps).posterior(KEY, 8, given={"y": Y})


def test_a_second_call_compiles_nothing(count_compiles):
    alg = ab.vi(
        guide=learned, objective=ab.objectives.fivo(4), num_steps=20, num_samples=50,
        progress_bar=False,
    )  # fmt: skip
    alg(series).posterior(KEY, 8, given={"y": Y})
    key = jax.random.key(12)
    with count_compiles() as compiles:
        alg(series).posterior(key, 8, given={"y": Y + 1})
    assert compiles.names == []
