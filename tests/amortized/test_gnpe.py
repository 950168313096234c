"""Data in a standard pose: the law of the Gibbs chain, and what a small budget buys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist
from abduce.amortized import PoseEquivariance
from abduce.amortized.gnpe import gibbs
from abduce.errors import InvalidAlgorithm, InvalidValue, NoDensity, NotFitted, UnknownAddress

SMALL = {"width": 32, "depth": 1, "context_dim": 16, "head": "mixture", "num_components": 1}
QUIET = {"progress_bar": False}
WIDE = 200.0  # of the prior, in units of the noise


@ab.model
def location():
    mu = ab.sample("mu", dist.Normal(0.0, WIDE))
    ab.sample("y", dist.Normal(mu, jnp.array([1.0, 2.0, 0.5])))


def exact(y):
    precision = np.array([1.0, 0.25, 4.0])
    total = precision.sum() + WIDE**-2
    return float(precision @ y / total), float(total**-0.5)


def shift(y, a):
    return y + a


# ---------------------------------------------------------------------- the chain


def test_the_chain_of_an_exact_network_has_the_posterior_as_its_law():
    """`mu` normal, proxy normal about it: the exact conditional is normal too.

    A second latent, `z = 0.5 mu + noise`, comes along.
    """
    mean, sd, kernel = 13.0, 0.4, 0.9
    gain = sd**2 / (sd**2 + kernel**2)

    def draw(key, proxy):
        k1, k2 = jax.random.split(key)
        mu = mean + gain * (proxy - mean) + sd * (1 - gain) ** 0.5 * jax.random.normal(k1, (1,))
        z = 0.5 * mu + jax.random.normal(k2, (1,))
        return jnp.concatenate([z, mu - proxy])

    def chain(key):
        where = slice(1, 2)
        return gibbs(draw, jnp.array([mean + 30.0]), where, jnp.array([kernel]), 20, key)

    n = 100_000
    vectors, proxies, poses = jax.vmap(chain)(jax.random.split(jax.random.key(0), n))
    z, mu = vectors.T
    # Twenty iterations forget the start: 30 * 0.165^20 is nothing. Five standard errors each:
    # a false alarm less than once in 1e5.
    error = 5 / n**0.5
    assert poses.shape == (n, 20, 1)
    assert float(jnp.mean(mu)) == pytest.approx(mean, abs=error * sd)
    assert float(jnp.std(mu)) == pytest.approx(sd, rel=error)
    assert float(jnp.std(z)) == pytest.approx((1 + 0.25 * sd**2) ** 0.5, rel=error)
    assert float(jnp.cov(z, mu)[0, 1]) == pytest.approx(0.5 * sd**2, abs=2 * error * sd)
    # The proxy it was drawn under is blurred about the pose of the iteration before.
    assert float(jnp.std(proxies)) == pytest.approx((sd**2 + kernel**2) ** 0.5, rel=error)
    # Its autocorrelation is the gain: the mean contracts at the rate that the docs state.
    contraction = (jnp.mean(poses[:, 1]) - mean) / (jnp.mean(poses[:, 0]) - mean)
    assert float(contraction) == pytest.approx(gain, abs=0.01)


# ---------------------------------------------------------------------- training


def divergence(post, y):
    """KL between normals, of the draws' mean and spread from the exact ones."""
    mean, sd = exact(np.asarray(y))
    m, s = float(post["mu"].mean()), float(post["mu"].std())
    return np.log(s / sd) + (sd**2 + (m - mean) ** 2) / (2 * s**2) - 0.5


@pytest.fixture(scope="module")
def fitted():
    est = ab.npe(
        location, observed="y", equivariance=PoseEquivariance("mu", shift, kernel=4.0), **SMALL
    )
    return est.fit(jax.random.key(0), num_steps=500, learning_rate=3e-3, **QUIET)


def observations(num):
    mu = WIDE * jax.random.normal(jax.random.key(1), (num, 1))
    noise = jax.random.normal(jax.random.key(2), (num, 3)) * jnp.array([1.0, 2.0, 0.5])
    return np.asarray(mu + noise)


def test_a_wide_prior_costs_nothing(fitted):
    """The posterior is 400 times narrower than the prior."""
    plain = ab.npe(location, observed="y", num_candidates=0, frame=False, **SMALL)
    plain = plain.fit(jax.random.key(0), num_steps=500, learning_rate=3e-3, **QUIET)
    far = {
        name: np.mean([
            divergence(est(location).posterior(jax.random.key(3), given={"y": y}), y)
            for y in observations(8)
        ])
        for name, est in (("plain", plain), ("posed", fitted))
    }  # fmt: skip
    assert far["posed"] < 0.25  # measured: 0.085, and 2.9 nats plain
    assert far["plain"] > 10 * far["posed"]


def test_draws_alone(fitted):
    y = observations(1)[0]
    post = fitted(location).posterior(jax.random.key(3), given={"y": y})
    assert "log_density" not in post.diagnostics and not post.warnings
    with pytest.raises(NoDensity, match=r"as_model needs the log density.*draws alone"):
        fitted.log_density({"mu": jnp.float32(0.0)}, given={"y": y})
    with pytest.raises(NoDensity, match="fit_rounds needs"):
        fitted.fit_rounds(jax.random.key(0), given={"y": y})
    with pytest.raises(NoDensity, match="run_attack needs"):
        ab.checks.run_attack(fitted, jax.random.key(0))
    unlike = pytest.warns(ab.AbduceWarning, match=r"unlike the simulations.*draws\.$")
    unsettled = pytest.warns(ab.AbduceWarning, match="have not forgotten their start")
    with unlike, unsettled:
        odd = np.array([0.0, 150.0, -150.0])  # no shift explains these
        fitted(location).posterior(jax.random.key(3), given={"y": odd})


def test_checks_and_maps_work_without_a_density(fitted):
    report = fitted.replace(num_samples=50).check(
        jax.random.key(4), num_datasets=50, num_samples=20, alpha=1e-4
    )
    assert {c.name for c in report.checks} >= {"sbc", "coverage"}
    assert report["sbc"].p_value > 1e-4
    few = fitted.replace(num_samples=10)(location)

    def means(y):
        return few.posterior(jax.random.key(5), given={"y": y}).mean("mu")

    ys = observations(3)
    np.testing.assert_allclose(
        jax.vmap(means)(ys), [means(y) for y in ys], rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_an_exact_symmetry_needs_no_proxy():
    """A scale: the pose of a positive latent is its logarithm, the network sees ratios alone."""

    @ab.model
    def scale(n):
        s = ab.sample("s", dist.LogNormal(0.0, 5.0))
        jax.vmap(lambda _: ab.sample("y", dist.Normal(0.0, s)))(jnp.arange(n))

    turned = PoseEquivariance("s", lambda y, a: y * jnp.exp(a), kernel=1.0, exact=True)
    est = ab.npe(scale, 6, observed="y", sizes=(4, 6), equivariance=turned, **SMALL)
    assert est.layout.groups[0].kind == "set"
    est = est.fit(jax.random.key(0), num_steps=1500, learning_rate=3e-3, **QUIET)
    assert "proxy" not in est.scales
    ratios = np.array([0.4, -1.1, 0.7, 1.6, -0.2])
    for unit in (1e-4, 1.0, 1e4):  # about two standard deviations of the prior either way
        y = unit * ratios
        post = est(scale).posterior(jax.random.key(1), 5, given={"y": y})
        log_s = np.log(np.asarray(post["s"]))
        grid = np.linspace(-4, 4, 2001) + np.log(unit)
        log_p = -0.5 * (grid / 5.0) ** 2 - 5 * grid - 0.5 * (y**2).sum() * np.exp(-2 * grid)
        p = np.exp(log_p - log_p.max())
        p /= p.sum()
        mean = (p * grid).sum()
        sd = ((p * (grid - mean) ** 2).sum()) ** 0.5
        # 4,000 draws: a standard error of 0.016 sd; the rest is the short training.
        assert log_s.mean() == pytest.approx(mean, abs=0.2 * sd)
        assert log_s.std() == pytest.approx(sd, rel=0.2)


# ---------------------------------------------------------------------- several sites, saving


@ab.model
def two_sites():
    z = ab.sample("z", dist.Bernoulli(0.3))
    mu = ab.sample("mu", dist.Normal(jnp.zeros(2), 10.0).to_event(1))
    width = ab.sample("width", dist.LogNormal(0.0, 0.5))
    ab.sample("x", dist.Normal(mu + z, width).to_event(1))
    ab.sample("t", dist.Normal(mu[0], 1.0))
    ab.sample("c", dist.Normal(width, 1.0))


def first(t, a):
    return t + a[0]


def of_two_sites(factor=1.0, **changes):
    by = shift if factor == 1.0 else lambda x, a: x + factor * a
    move = {"x": by, "t": first}
    return PoseEquivariance("mu", **{"transform": move, "kernel": (2.0, 3.0), **changes})


@pytest.mark.slow
def test_a_loaded_estimator_needs_its_transformation(tmp_path):
    est = ab.npe(two_sites, observed=["x", "t", "c"], equivariance=of_two_sites(),
                 num_samples=20, **SMALL)  # fmt: skip
    est = est.fit(jax.random.key(0), num_steps=2, **QUIET)
    given = {"x": jnp.array([1.0, 2.0]), "t": 1.1, "c": 0.3}
    key = jax.random.key(1)
    before = est(two_sites).posterior(key, given=given)
    assert set(np.unique(before["z"])) <= {0, 1} and before["mu"].shape == (1, 20, 2)
    est.save(tmp_path / "est")
    again = ab.load(tmp_path / "est")
    with pytest.raises(NotFitted, match=r"est\.with_equivariance"):
        again(two_sites).posterior(key, given=given)
    with pytest.raises(InvalidAlgorithm, match="was trained with latent='mu', kernel"):
        again.with_equivariance(of_two_sites(kernel=2.0))
    with pytest.raises(InvalidAlgorithm, match="transform of 'x' is another one"):
        again.with_equivariance(of_two_sites(factor=2.0))
    after = again.with_equivariance(of_two_sites())(two_sites).posterior(key, given=given)
    for a in ("z", "mu", "width"):
        np.testing.assert_array_equal(before[a], after[a])


# ---------------------------------------------------------------------- messages


def test_messages(fitted):
    def make(equivariance, model=location, observed="y", **settings):
        return ab.npe(model, observed=observed, equivariance=equivariance, **settings)

    moved = PoseEquivariance("mu", shift, 1.0)
    with pytest.raises(InvalidValue, match="positive standard deviation"):
        PoseEquivariance("mu", shift, 0.0)
    with pytest.raises(InvalidAlgorithm, match="f\\(value, pose\\), or a dict"):
        PoseEquivariance("mu", {}, 1.0)
    with pytest.raises(InvalidAlgorithm, match=r"takes ab\.amortized\.PoseEquivariance"):
        make("mu")
    with pytest.raises(UnknownAddress, match="'nu' is no continuous latent of `location`"):
        make(PoseEquivariance("nu", shift, 1.0))
    with pytest.raises(UnknownAddress, match="is no observed site"):
        make(PoseEquivariance("mu", {"x": shift}, 1.0))
    with pytest.raises(InvalidValue, match=r"kernel= has 2 numbers.*1 coordinates"):
        make(PoseEquivariance("mu", shift, (1.0, 2.0)))
    with pytest.raises(InvalidAlgorithm, match="say which of them move"):
        make(moved, two_sites, ["x", "t", "c"])
    with pytest.raises(InvalidAlgorithm, match="moves the wrong way"):
        make(PoseEquivariance("mu", lambda y, a: y - a, 1.0))
    with pytest.raises(InvalidAlgorithm, match=r"f\(f\(x, a\), b\) is not f\(x, a \+ b\)"):
        make(PoseEquivariance("mu", lambda y, a: y + jnp.sinh(a / 100), 1.0))
    with pytest.raises(InvalidAlgorithm, match=r"f\(x, 0\) is not x"):
        make(PoseEquivariance("mu", lambda y, a: y + a + 10.0, 1.0))
    for name, value in (("robustness", 0.1), ("num_candidates", 3), ("frame", True)):
        with pytest.raises(InvalidAlgorithm, match=f"equivariance= and {name}= exclude"):
            make(moved, **{name: value})
    with pytest.raises(InvalidAlgorithm, match="equivariance= and missing= exclude"):
        make(moved, missing={"y": 0.2})

    @ab.model
    def bounded():
        mu = ab.sample("mu", dist.Uniform(-5.0, 5.0))
        ab.sample("y", dist.Normal(mu, 1.0))
        ab.sample("k", dist.Poisson(jnp.exp(mu)))

    with pytest.raises(InvalidAlgorithm, match=r"'mu' \(Uniform.*has a support with edges"):
        make(PoseEquivariance("mu", {"y": shift}, 1.0), bounded, ["y", "k"])
    plain = dataclasses.replace(fitted, settings=dataclasses.replace(fitted.settings, pose=None))
    with pytest.raises(InvalidAlgorithm, match="trained without equivariance="):
        plain.with_equivariance(moved)
