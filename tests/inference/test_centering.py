"""Coordinates that adapt, and sums relative to a reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist
from abduce.inference.centering import Centering, hierarchical_sites
from abduce.inference.diagnostics import ess_bulk
from abduce.inference.problem import make_problem
from abduce.inference.reference import large_sites, with_reference, zero_reference
from abduce.inference.target import constrain, make_target, unconstrain

SIGMA = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
Y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


@ab.model
def schools(sigma):
    mu = ab.sample("mu", dist.Normal(0, 5))
    tau = ab.sample("tau", dist.HalfCauchy(5))

    def school(s):
        theta = ab.sample("theta", dist.Normal(mu, tau))
        return ab.sample("y", dist.Normal(theta, s))

    return jax.vmap(school)(sigma)


@ab.model
def walk(num_steps):
    drift = ab.sample("drift", dist.HalfNormal(1.0))

    def step(level, _):
        level = ab.sample("level", dist.Normal(level, drift))
        return level, ab.sample("y", dist.Normal(level, 1.0))

    jax.vmap(lambda start: jax.lax.scan(step, start, None, length=num_steps))(jnp.zeros(2))


def setup(model, args, given):
    problem = make_problem(model, args, given, {}, "test")
    target, data = make_target(problem, "test")
    sites = hierarchical_sites(problem, target)
    centering = Centering(target, sites)
    return problem, target, centering, centering.start(data)


def test_only_sites_with_inferred_parameters_are_hierarchical():
    @ab.model
    def mixed(x):
        a = ab.sample("a", dist.Normal(0, 1))
        b = ab.sample("b", dist.Normal(a, 1.0))
        ab.sample("c", dist.Gamma(jnp.exp(b), 1.0))  # no location-scale family
        ab.sample("d", dist.Normal(x, 1.0))  # parameters are data
        ab.sample("e", dist.StudentT(3.0, a, 1.0).expand([2]))

    problem = make_problem(mixed, (jnp.zeros(3),), None, {}, "test")
    target, _ = make_target(problem, "test")
    assert hierarchical_sites(problem, target) == ("b", "e")


@pytest.mark.parametrize("case", ["vmap", "vmap of scan"])
def test_moving_keeps_the_point_and_changes_the_density_by_the_jacobian(case):
    if case == "vmap":
        problem, target, centering, data = setup(schools, (SIGMA,), {"y": Y})
        site, shape = "theta", (8,)
    else:
        problem, target, centering, data = setup(walk, (5,), {"y": jnp.ones((2, 5))})
        site, shape = "level", (5, 2)  # the program's layout: scan, then vmap
    rng = np.random.default_rng(0)
    q = rng.normal(size=(3, target.dim)).astype(np.float32)
    degrees = rng.uniform(size=shape)
    assert centering.slots[site].shape == shape
    moved_data = centering.replaced(data, {site: degrees})
    moved = centering.move(data, {site: degrees}, q)
    before, _ = constrain(target, data, problem.program, q)
    after, _ = constrain(target, moved_data, problem.program, moved)
    for address in before:
        np.testing.assert_allclose(after[address], before[address], rtol=2e-5, atol=2e-6)
    scale = before["tau" if case == "vmap" else "drift"]
    for i in range(3):
        jacobian = ((1 - degrees) * np.log(scale[i])).sum()
        change = target(moved_data, moved[i]) - target(data, q[i])
        np.testing.assert_allclose(change, jacobian, rtol=1e-4, atol=1e-4)
    back = unconstrain(target, moved_data, problem, {a: x[0] for a, x in after.items()})
    np.testing.assert_allclose(back, moved[0], rtol=2e-5, atol=2e-6)


def test_weak_data_are_noncentred_and_strong_data_are_centred():
    @ab.model
    def groups(error):
        mu = ab.sample("mu", dist.Normal(0, 5))
        tau = ab.sample("tau", dist.HalfNormal(5.0))
        theta = ab.sample("theta", dist.Normal(mu, tau).expand([2]))
        ab.sample("y", dist.Normal(theta, error))

    error = jnp.array([100.0, 0.01])
    problem, _, centering, data = setup(groups, (error,), {"y": jnp.array([0.0, 3.0])})
    rng = np.random.default_rng(0)
    n = 256
    mu, log_tau = rng.normal(size=n), rng.normal(size=n)
    theta = np.stack([mu + np.exp(log_tau) * rng.normal(size=n), 3 + 0.01 * rng.normal(size=n)], 1)
    start = {s.address: s.start for s in centering.target.slots}
    q = np.zeros((n, 4), np.float32)
    q[:, start["mu"]], q[:, start["tau"]] = mu, log_tau
    q[:, start["theta"] : start["theta"] + 2] = theta
    chosen = centering.choose(data, q)
    np.testing.assert_array_equal(chosen["theta"], [0.0, 1.0])
    assert problem.latents.keys() == {"mu", "tau", "theta"}


def test_a_centred_hierarchy_needs_no_cure():
    post = ab.nuts(num_warmup=500, num_samples=500)(schools).posterior(
        jax.random.key(0), SIGMA, given={"y": Y}
    )
    plain = ab.nuts(num_warmup=500, num_samples=500, adapt_coordinates=False, progress_bar=False)
    with pytest.warns(ab.AbduceWarning):
        stuck = plain(schools).posterior(jax.random.key(0), SIGMA, given={"y": Y})
    assert not post.diagnostics["diverging"].any()
    log_tau, stuck_log_tau = np.log(post["tau"]), np.log(stuck["tau"])
    assert ess_bulk(log_tau) > 3 * ess_bulk(stuck_log_tau)
    assert np.quantile(log_tau, 0.01) < -2  # the neck of the funnel is visited


def test_a_reference_keeps_the_digits_of_a_large_sum():
    n = 200_000
    rng = np.random.default_rng(0)
    y = jnp.asarray(3.0 + rng.normal(size=n), jnp.float32)

    @ab.model
    def mean(n):
        mu = ab.sample("mu", dist.Normal(0, 10))
        ab.sample("y", dist.Normal(mu, 1.0).expand([n]))

    problem = make_problem(mean, (n,), {"y": y}, {}, "test")
    target, data = make_target(problem, "test")
    sites = large_sites(problem)
    assert sites == ("y",)
    start = jnp.array([3.0])
    blank = zero_reference(problem, sites, data)
    moved, constant = with_reference(target, sites, blank, start)
    assert jax.tree.structure(moved) == jax.tree.structure(blank)
    density = jax.jit(target, static_argnums=())
    exact = np.asarray(y, np.float64)

    def change(q):  # of the log density from `start`, in float64
        at = lambda m: -0.5 * ((exact - m) ** 2).sum() - 0.5 * (m / 10) ** 2  # noqa: E731
        return at(float(q[0])) - at(3.0)

    for q in (jnp.array([3.002]), jnp.array([2.997])):
        error = float(density(moved, q) - density(moved, start)) - change(q)
        assert abs(error) < 5e-3  # the plain sum is spaced by 0.03
        total = float(density(moved, q)) + constant
        np.testing.assert_allclose(total, float(density(data, q)), rtol=1e-6)
