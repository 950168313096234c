"""`FlatTarget`: values against sums written by hand and NumPyro's potential, gradients, layout.

In x64, so that agreement means agreement. Each case is a model whose latents meet another
difficulty; `reference` is its log density over unconstrained coordinates, computed elsewhere.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import lax
from numpyro.distributions import biject_to, constraints
from numpyro.infer.util import potential_energy
from scipy.special import expit, gammaln
from scipy.stats import norm

import abduce as ab
import abduce.dist as dist
from abduce.inference.init import starting_points
from abduce.inference.problem import make_problem
from abduce.inference.target import constrain, make_target, unconstrain

KEY = jax.random.key(3)

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Many tiny programs run once each: XLA's costly passes do not pay for themselves."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@dataclasses.dataclass
class Case:
    """A model with data.

    Attributes:
        model, args, given: As for `posterior`.
        layout: Shape of the coordinates of each latent in the flat vector, in its order.
        reference: From the coordinates by address to the log density with log Jacobian.
    """

    model: ab.Model
    args: tuple[Any, ...]
    given: dict[str, Any]
    layout: dict[str, tuple[int, ...]]
    reference: Callable[[dict[str, np.ndarray]], float]

    def build(self):
        problem = make_problem(self.model, self.args, self.given, {}, "ab.nuts")
        return problem, *make_target(problem, "ab.nuts")

    def split(self, q):
        parts, start = {}, 0
        for address, shape in self.layout.items():
            size = int(np.prod(shape))
            parts[address] = np.asarray(q[start : start + size]).reshape(shape)
            start += size
        assert start == len(q)
        return parts

    @property
    def dim(self):
        return sum(int(np.prod(s)) for s in self.layout.values())


CASES: dict[str, Callable[[], Case]] = {}
GROUPS = (np.array([1.0, 2.0, 0.5]),)  # the argument of one of them


def case(make):
    CASES[make.__name__] = make
    return make


def from_numpyro(f, *args, **observed):
    """NumPyro's potential, with the data in place."""

    def reference(u):
        conditioned = numpyro.handlers.condition(f, observed)
        positions = {a: jnp.asarray(x) for a, x in u.items()}
        return -float(potential_energy(conditioned, args, {}, positions))

    return reference


# -- cases -----------------------------------------------------------------------------------


@case
def scalars_on_every_interval():
    y = np.array([0.3, -1.0])

    def f(sample):
        a = sample("a", dist.HalfNormal(2.0))
        b = sample("b", dist.Beta(2.0, 3.0))
        c = sample("c", dist.Uniform(-1.0, 4.0))
        d = sample("d", dist.LogNormal(c, 0.5))
        e = sample("e", dist.Gamma(2.0, 1.5))
        sample("y", dist.Normal(a * b + d, e).expand([2]).to_event(1))

    theirs = from_numpyro(lambda: f(numpyro.sample), y=y)
    return Case(ab.model(lambda: f(ab.sample)), (), {"y": y}, {a: () for a in "abcde"}, theirs)


@case
def supports_that_depend_on_choices():
    """Garch-like: `b` in (0, 1 - a), `c` above `a`, `d` in (0, c)."""

    def f(sample):
        a = sample("a", dist.Uniform(0.0, 1.0))
        b = sample("b", dist.Uniform(0.0, 1.0 - a))
        c = sample("c", dist.TruncatedNormal(0.0, 2.0, low=a))
        d = sample("d", dist.Uniform(0.0, c))
        sample("y", dist.Normal(b, d))

    def by_hand(u):
        a = expit(u["a"])
        b = (1 - a) * expit(u["b"])
        c = a + np.exp(u["c"])
        d = c * expit(u["d"])
        log_p = -np.log(1 - a) + norm.logpdf(c, 0, 2) - norm.logsf(a, 0, 2) - np.log(c)
        log_p += norm.logpdf(0.7, b, d)

        def slope(x):
            return np.log(expit(x)) + np.log(expit(-x))

        log_j = slope(u["a"]) + np.log(1 - a) + slope(u["b"]) + u["c"] + np.log(c) + slope(u["d"])
        return float(log_p + log_j)

    model = ab.model(lambda: f(ab.sample))
    return Case(model, (), {"y": 0.7}, {a: () for a in "abcd"}, by_hand)


@case
def vectors_with_structure():
    """A simplex, a Cholesky factor and an ordered vector: fewer, or other, coordinates."""
    counts = np.array([4, 1, 2])

    def f(sample):
        p = sample("p", dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])))
        sample("counts", dist.Multinomial(7, p))
        sample("corr", dist.LKJCholesky(3, 2.0))
        o = sample("o", dist.ImproperUniform(constraints.ordered_vector, (), (3,)))
        sample("y", dist.Normal(o, 1.0).to_event(1))

    given = {"counts": counts, "y": np.array([0.0, 1.0, 5.0])}
    layout = {"p": (2,), "corr": (3,), "o": (3,)}
    model = ab.model(lambda: f(ab.sample))
    return Case(model, (), given, layout, from_numpyro(lambda: f(numpyro.sample), **given))


@case
def groups_under_vmap():
    y = np.array([0.1, 2.0, -1.0])

    @ab.model
    def model(s):
        mu = ab.sample("mu", dist.Normal(0, 5))
        tau = ab.sample("tau", dist.HalfCauchy(5))

        def group(s):
            theta = ab.sample("theta", dist.Normal(mu, tau).expand([2]))
            ab.sample("y", dist.Normal(theta.sum(), s))

        jax.vmap(group)(s)

    def theirs(s):
        mu = numpyro.sample("mu", dist.Normal(0, 5))
        tau = numpyro.sample("tau", dist.HalfCauchy(5))
        theta = numpyro.sample("theta", dist.Normal(mu, tau).expand([3, 2]).to_event(2))
        numpyro.sample("y", dist.Normal(theta.sum(-1), s).to_event(1))

    layout = {"mu": (), "tau": (), "theta": (3, 2)}
    return Case(model, GROUPS, {"y": y}, layout, from_numpyro(theirs, *GROUPS, y=y))


@case
def scan_inside_vmap():
    """Users see (series, time); the program runs (time, series)."""
    y = np.arange(6.0).reshape(3, 2) / 3

    @ab.model
    def model(scales):
        def series(scale):
            def step(z, _):
                z = ab.sample("z", dist.Normal(0.9 * z, 1.0))
                r = ab.sample("r", dist.HalfNormal(scale))
                ab.sample("y", dist.Normal(z, r))
                return z, None

            lax.scan(step, 0.0, None, length=2)

        jax.vmap(series)(scales)

    scales = np.array([1.0, 2.0, 3.0])

    def by_hand(u):
        z, r = u["z"].T, np.exp(u["r"]).T  # (series, time)
        before = np.concatenate([np.zeros((3, 1)), 0.9 * z[:, :-1]], 1)
        log_p = norm.logpdf(z, before, 1) + np.log(2) + norm.logpdf(r, 0, scales[:, None])
        return float((log_p + norm.logpdf(y, z, r)).sum() + u["r"].sum())

    return Case(model, (scales,), {"y": y}, {"z": (2, 3), "r": (2, 3)}, by_hand)


@case
def noncentred_groups():
    y = np.array([1.0, -2.0])

    @ab.model
    def centred():
        mu = ab.sample("mu", dist.Normal(0, 5))
        tau = ab.sample("tau", dist.HalfNormal(5))
        theta = ab.sample("theta", dist.Normal(mu, tau).expand([2]))
        ab.sample("y", dist.Normal(theta, 1.0))

    def by_hand(u):
        tau = np.exp(u["tau"])
        log_p = norm.logpdf(u["mu"], 0, 5) + np.log(2) + norm.logpdf(tau, 0, 5) + u["tau"]
        log_p += norm.logpdf(u["theta"]).sum() + norm.logpdf(y, u["mu"] + tau * u["theta"]).sum()
        return float(log_p)

    model = ab.reparam(centred, {"theta": ab.noncentered()})
    return Case(model, (), {"y": y}, {"mu": (), "tau": (), "theta": (2,)}, by_hand)


@case
def gaps_in_the_data():
    """Only hidden entries have coordinates; `y` is positive."""
    y = np.array([[1.0, np.nan, 2.0], [np.nan, 3.0, np.nan]])

    @ab.model
    def model():
        rate = ab.sample("rate", dist.Gamma(3.0, 2.0))
        ab.sample("y", dist.Exponential(rate).expand([2, 3]))

    def by_hand(u):
        rate, hidden = np.exp(u["rate"]), np.exp(u["y"])
        log_p = 3 * np.log(2) - gammaln(3) + 2 * np.log(rate) - 2 * rate + u["rate"]
        seen = y[~np.isnan(y)]
        return float(log_p + 6 * np.log(rate) - rate * (seen.sum() + hidden.sum()) + u["y"].sum())

    given = {"y": ab.masked(y, observed=~np.isnan(y))}
    return Case(model, (), given, {"rate": (), "y": (3,)}, by_hand)


@case
def a_site_in_one_branch():
    """Where the branch is not taken, its coordinate has a standard normal density."""

    @ab.model
    def model():
        u = ab.sample("u", dist.Normal(0, 1))
        mean = lax.cond(u > 0, lambda: ab.sample("z", dist.Exponential(2.0)), lambda: 0.0)
        ab.sample("y", dist.Normal(mean, 1.0))

    def by_hand(u):
        log_p = norm.logpdf(u["u"])
        z = np.exp(u["z"])
        if u["u"] > 0:
            return float(log_p + np.log(2) - 2 * z + u["z"] + norm.logpdf(0.5, z))
        return float(log_p + norm.logpdf(u["z"]) + norm.logpdf(0.5))

    return Case(model, (), {"y": 0.5}, {"u": (), "z": ()}, by_hand)


# -- values, gradients, coordinates ----------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_value_gradient_and_round_trip(name):
    c = CASES[name]()
    problem, target, data = c.build()
    assert target.dim == c.dim
    assert [(s.address, s.stop - s.start) for s in target.slots] == [
        (a, int(np.prod(s))) for a, s in c.layout.items()
    ]
    points = np.random.default_rng(0).normal(size=(4, c.dim))
    if name == "a_site_in_one_branch":
        points[:2, 0], points[2:, 0] = np.abs(points[:2, 0]), -np.abs(points[2:, 0])
    value_and_grad = jax.jit(jax.vmap(jax.value_and_grad(lambda q: target(data, q))))
    values, gradients = value_and_grad(jnp.asarray(points))
    assert values.dtype == jnp.float64
    for q, value in zip(points, values, strict=True):
        assert value == pytest.approx(c.reference(c.split(q)), rel=1e-9, abs=1e-9)

    step = 1e-5
    moved = points[:, None] + step * np.concatenate([np.eye(c.dim), -np.eye(c.dim)])
    ends = np.asarray(jax.jit(jax.vmap(lambda q: target(data, q)))(moved.reshape(-1, c.dim)))
    up, down = np.split(ends.reshape(4, -1), 2, axis=1)
    np.testing.assert_allclose(gradients, (up - down) / (2 * step), rtol=1e-6, atol=1e-6)

    choices, _ = constrain(target, data, problem.program, points)
    for i in range(4):
        one = {a: x[i] for a, x in choices.items() if a in problem.latents}
        if name == "a_site_in_one_branch" and i >= 2:
            continue
        back = unconstrain(target, data, problem, one)
        np.testing.assert_allclose(back, points[i], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["scan_inside_vmap", "gaps_in_the_data", "noncentred_groups"])
def test_the_density_is_that_of_the_model_plus_the_jacobian(name):
    """`log_density` at the constrained choices, with the Jacobian by autodiff."""
    c = CASES[name]()
    problem, target, data = c.build()
    q = jnp.asarray(np.random.default_rng(1).normal(size=c.dim))
    choices, _ = constrain(target, data, problem.program, np.asarray(q)[None])
    one = {a: x[0] for a, x in choices.items()}
    given = {a: v for a, v in c.given.items() if a not in one}
    log_p = c.model.log_density({**one, **given}, *c.args)

    def flat(q):
        inputs = c.split(np.arange(c.dim))
        mu, tau = (q[int(inputs[a])] for a in ("mu", "tau"))
        return jnp.concatenate([jnp.stack([mu, jnp.exp(tau)]), mu + jnp.exp(tau) * q[2:]])

    def positive(q):
        split = c.dim // 2 if name == "scan_inside_vmap" else 0
        return jnp.concatenate([q[:split], jnp.exp(q[split:])])

    jacobian = jax.jacobian(flat if name == "noncentred_groups" else positive)(q)
    log_j = jnp.linalg.slogdet(jacobian)[1]
    np.testing.assert_allclose(target(data, q), log_p + log_j, rtol=1e-9)


def test_draws_have_the_shape_users_see():
    c = CASES["scan_inside_vmap"]()
    problem, target, data = c.build()
    q = np.random.default_rng(2).normal(size=(7, c.dim))
    choices, active = constrain(target, data, problem.program, q, batch=4)  # the last call padded
    assert {a: x.shape for a, x in choices.items()} == {"z": (7, 3, 2), "r": (7, 3, 2)}
    assert active == {}
    for i in range(7):
        u = c.split(q[i])
        np.testing.assert_allclose(choices["z"][i], u["z"].T)
        np.testing.assert_allclose(choices["r"][i], np.exp(u["r"].T))


def test_gaps_are_filled_in_and_data_stay():
    c = CASES["gaps_in_the_data"]()
    problem, target, data = c.build()
    choices, _ = constrain(target, data, problem.program, np.array([[0.0, 0.1, 0.2, 0.3]]))
    a, b, d = np.exp([0.1, 0.2, 0.3])
    np.testing.assert_allclose(choices["y"][0], [[1, a, 2], [b, 3, d]], rtol=1e-12)


def test_where_a_branch_was_taken():
    c = CASES["a_site_in_one_branch"]()
    problem, target, data = c.build()
    _, active = constrain(target, data, problem.program, np.array([[1.0, 0.0], [-1.0, 0.0]]))
    np.testing.assert_array_equal(active["z"], [True, False])


def test_float32_is_kept():
    with jax.enable_x64(False):
        c = CASES["scan_inside_vmap"]()
        _, target, data = c.build()
        q = np.random.default_rng(0).normal(size=c.dim).astype(np.float32)
        value = target(data, jnp.asarray(q))
        assert value.dtype == jnp.float32
        assert value == pytest.approx(c.reference(c.split(q)), rel=1e-5)


def test_equal_targets_are_one_key():
    """What compiled programs are found by: equal for other data of the same shapes."""
    first = CASES["scan_inside_vmap"]()
    _, a, _ = first.build()
    other = dataclasses.replace(first, given={"y": first.given["y"] + 1})
    _, b, _ = other.build()
    assert a == b and hash(a) == hash(b)


def test_a_mask_inside_the_model_is_refused_with_the_remedy():
    @ab.model
    def inside():
        data = ab.masked([1.0, 2.0], observed=np.array([True, False]))
        ab.sample("y", dist.Normal(0, 1), obs=data)

    with pytest.raises(ab.InvalidAlgorithm, match=r"'y'.*partly observed inside.*given=\{\"y\""):
        make_target(make_problem(inside, (), {}, {}, "ab.nuts"), "ab.nuts")


# -- starting points -------------------------------------------------------------------------


@pytest.fixture
def hierarchy():
    c = CASES["groups_under_vmap"]()
    problem, target, data = c.build()

    def start(init, num_chains=3):
        propose, _ = starting_points(init, problem, target, data, num_chains, "ab.nuts")
        q = propose(KEY, 0)
        assert q.shape == (num_chains, target.dim) and q.dtype == np.float64
        return q, constrain(target, data, problem.program, q)[0]

    return start


THETA = np.arange(6.0).reshape(3, 2)


def test_start_at_a_choice_map(hierarchy):
    _, choices = hierarchy({"mu": 1.0, "tau": 2.0, "theta": THETA})
    np.testing.assert_allclose(choices["mu"], np.ones(3))
    np.testing.assert_allclose(choices["tau"], 2 * np.ones(3))
    np.testing.assert_allclose(choices["theta"], np.broadcast_to(THETA, (3, 3, 2)))


def test_start_at_a_choice_map_per_chain(hierarchy):
    mu, tau = np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.0, 2.0])
    theta = THETA + np.arange(3.0)[:, None, None]
    _, choices = hierarchy({"mu": mu, "tau": tau, "theta": theta})
    for address, value in {"mu": mu, "tau": tau, "theta": theta}.items():
        np.testing.assert_allclose(choices[address], value)
    _, choices = hierarchy({"mu": mu, "tau": 1.0, "theta": THETA})  # some of them per chain
    np.testing.assert_allclose(choices["mu"], mu)
    np.testing.assert_allclose(choices["tau"], 1)


@pytest.mark.parametrize(
    ("init", "error", "message"),
    [
        ({"mu": 0.0}, ab.InvalidValue, r"'tau', 'theta'.*has every\s+latent.*ab\.init\.uniform"),
        ({"muu": 0.0}, ab.UnknownAddress, r'init\["muu"\].*Did you mean "mu"'),
        ({"y": np.zeros(3)}, ab.UnknownAddress, r'init\["y"\]'),
        (
            {"mu": np.zeros(2), "tau": 1.0, "theta": THETA},
            ab.InvalidValue,
            r'init\["mu"\] has shape \(2,\), expected \(\), or \(3,\) with a value per chain',
        ),
        (
            {"mu": 0.0, "tau": -1.0, "theta": THETA},
            ab.InvalidValue,
            r'init\["tau"\].*-1\.0.*outside the support',
        ),
        ("prior", ab.InvalidAlgorithm, r"init= takes a choice map.*got 'prior'"),
    ],
)
def test_a_start_that_does_not_fit(hierarchy, init, error, message):
    with pytest.raises(error, match=message):
        hierarchy(init)


def test_start_uniformly(hierarchy):
    q, _ = hierarchy(ab.init.uniform(0.5), num_chains=200)
    assert np.abs(q).max() < 0.5 < 2 * np.abs(q).max()
    np.testing.assert_array_equal(hierarchy(ab.init.uniform(0.5), num_chains=200)[0], q)
    q, _ = hierarchy(None, num_chains=200)
    assert 1.9 < np.abs(q).max() < 2
    assert abs(q.mean()) < 4.5 * 2 / np.sqrt(3 * q.size)
    with pytest.raises(ab.InvalidAlgorithm, match=r"radius must be positive, got -1"):
        ab.init.uniform(-1)


def test_start_at_the_prior(hierarchy):
    _, choices = hierarchy(ab.init.prior(), num_chains=100)
    mu = choices["mu"]
    assert len(np.unique(mu)) == 100  # chains differ
    assert abs(mu.mean()) < 4.5 * 5 / 10 and 3 < mu.std() < 7.5


def test_start_at_a_model(hierarchy):
    @ab.model
    def near(given, s):
        ab.sample("mu", dist.Normal(given["y"].mean(), 1e-6))
        ab.sample("tau", dist.Delta(2.0))
        ab.sample("theta", dist.Normal(s[:, None], 1e-6).expand([3, 2]))

    _, choices = hierarchy(near)
    np.testing.assert_allclose(choices["mu"], np.full(3, 1.1 / 3), atol=1e-4)
    np.testing.assert_allclose(choices["tau"], 2)
    np.testing.assert_allclose(choices["theta"][0], [[1, 1], [2, 2], [0.5, 0.5]], atol=1e-4)


def test_start_at_a_posterior(hierarchy):
    post = CASES["groups_under_vmap"]().model.prior(KEY, *GROUPS, num_samples=50)
    _, choices = hierarchy(post)
    for mu, tau in zip(choices["mu"], choices["tau"], strict=True):
        row = np.argmin(np.abs(post.draws["mu"][0] - mu))
        assert post.draws["mu"][0][row] == pytest.approx(mu)
        assert post.draws["tau"][0][row] == pytest.approx(tau)


def test_bijections_that_numpyro_knows_are_used():
    """The coordinates are NumPyro's, so results carry over."""
    c = CASES["vectors_with_structure"]()
    problem, target, data = c.build()
    q = np.random.default_rng(5).normal(size=(1, c.dim))
    choices, _ = constrain(target, data, problem.program, q)
    u = c.split(q[0])
    expected = {
        "p": constraints.simplex, "corr": constraints.corr_cholesky,
        "o": constraints.ordered_vector,
    }  # fmt: skip
    for address, constraint in expected.items():
        value = biject_to(constraint)(jnp.asarray(u[address]))
        np.testing.assert_allclose(choices[address][0], value, rtol=1e-12)
