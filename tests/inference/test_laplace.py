"""Laplace's approximation: exact on a Gaussian, and warnings where it is not one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import SE
from gaussian import DATA, SCALES, exact, groups, latents
from numpyro.distributions import constraints

import abduce as ab
import abduce.dist as dist

KEY = jax.random.key(11)


def test_laplace_is_exact_on_a_gaussian(x64):
    post = ab.laplace(num_samples=4000)(groups).posterior(KEY, SCALES, given={"y": DATA})
    truth = exact()
    assert post.log_evidence == pytest.approx(truth.log_evidence, abs=1e-9)
    np.testing.assert_allclose(post.diagnostics["mode"], truth.mean, atol=1e-7)
    assert post.warnings == () and post.diagnostics["ess"] == pytest.approx(4000, rel=1e-6)
    draws = latents(post)[0]
    np.testing.assert_allclose(np.cov(draws.T), truth.cov, atol=SE * 2 * truth.sd.max() ** 2 / 63)
    assert (np.abs(draws.mean(0) - truth.mean) < SE * truth.sd / 63).all()


@ab.model
def funnel():
    v = ab.sample("v", dist.Normal(0, 3))
    ab.sample("x", dist.Normal(0, jnp.exp(v / 2)).expand([4]))


def test_laplace_warns_on_a_funnel():
    with pytest.warns(ab.AbduceWarning, match=r"ab\.laplace.*(Pareto k|flat|curves).*ab\.nuts"):
        post = ab.laplace(num_samples=500)(funnel).posterior(KEY)
    assert len(post.warnings) == 1


def test_laplace_warns_where_there_is_no_mode():
    @ab.model
    def flat():
        ab.sample("a", dist.ImproperUniform(constraints.real, (), ()))
        b = ab.sample("b", dist.Normal(0, 1))
        ab.sample("y", dist.Normal(b, 1))

    with pytest.warns(ab.AbduceWarning, match=r"flat or curves upwards in 1 of 2 directions"):
        post = ab.laplace(num_samples=100)(flat).posterior(KEY, given={"y": 1.0})
    assert post.log_evidence is None
