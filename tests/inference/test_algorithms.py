"""What all algorithms share: the protocol, cached programs, keys; and draws from the prior.

Each algorithm's own tests are in a file of its name.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import SE
from gaussian import DATA, NAMES, SCALES, groups

import abduce as ab
import abduce.dist as dist
from abduce.ppl._jax import count_compiles

KEY = jax.random.key(11)


# -- the protocol ----------------------------------------------------------------------------


ALL = [ab.nuts, ab.hmc, ab.mh, ab.importance, ab.laplace]


@pytest.mark.parametrize("algorithm", ALL)
def test_an_algorithm_is_a_frozen_hashable_configuration(algorithm):
    alg = algorithm()
    assert isinstance(alg, ab.Algorithm) and alg.name == algorithm.__name__
    assert alg == algorithm() and hash(alg) == hash(algorithm())
    edited = alg.replace(num_samples=17)
    assert edited.num_samples == 17 and alg.num_samples != 17 and edited != alg
    assert repr(alg) == f"ab.{alg.name}()"
    assert repr(edited) == f"ab.{alg.name}(num_samples=17)"
    with pytest.raises(AttributeError):
        alg.num_samples = 3
    with pytest.raises(ab.InvalidAlgorithm, match=r"num_sample'.*Did you mean \"num_samples\""):
        alg.replace(num_sample=3)
    with pytest.raises(ab.InvalidAlgorithm, match=r"num_sample'.*Did you mean \"num_samples\""):
        algorithm(num_sample=3)
    with pytest.raises(ab.InvalidAlgorithm, match=r"num_samples.*0"):
        algorithm(num_samples=0)
    with pytest.raises(ab.InvalidAlgorithm, match=r"decorates a model, got function(.|\n)*@ab\."):
        alg(lambda: None)
    with pytest.raises(ab.InvalidAlgorithm, match=rf"parentheses, @ab\.{alg.name}\(\)"):
        algorithm(groups)


def test_attaching_and_replacing():
    a, b = ab.importance(num_samples=10), ab.laplace(num_samples=10)
    assert groups.algorithm is None
    attached = a(groups)
    assert attached.algorithm == a and groups.algorithm is None
    assert attached.name == "groups" and type(attached) is type(groups)
    assert b(attached).algorithm == b and attached.algorithm == a
    assert "importance(num_samples=10)" in repr(attached)

    @ab.mh(num_samples=3)
    @ab.model
    def decorated():
        ab.sample("x", dist.Normal(0, 1))

    assert decorated.algorithm == ab.mh(num_samples=3)


def test_transformations_keep_the_algorithm():
    alg = ab.importance(num_samples=7)
    m = alg(groups)
    for changed in (
        ab.condition(m, {"y": DATA}),
        ab.do(m, {"mu": 0.0}),
        ab.with_prior(m, {"mu": dist.Normal(0, 1)}),
        ab.reparam(m, {"theta": ab.noncentered()}),
        ab.do(ab.condition(m, {"y": DATA}), {"mu": 0.0}),
    ):
        assert changed.algorithm == alg
        assert ab.laplace()(changed).algorithm == ab.laplace()
    post = ab.condition(m, {"y": DATA}).posterior(KEY, SCALES)
    assert post.algorithm == "importance" and post.num_draws == 7


def test_inlining_ignores_the_algorithm():
    inner = ab.nuts(num_chains=99)(groups)

    @ab.importance(num_samples=5)
    @ab.model
    def outer(s):
        with ab.scope("a"):
            inner(s)

    post = outer.posterior(KEY, SCALES, given={"a/y": DATA})
    assert post.algorithm == "importance" and post["a/theta"].shape == (1, 5, 3)


def test_arrays_in_a_configuration_are_leaves():
    alg = ab.nuts(init={"mu": jnp.zeros(3)})
    assert [x.shape for x in jax.tree.leaves(alg)] == [(3,)]
    doubled = jax.tree.map(lambda x: x + 1, alg)
    assert doubled.init["mu"][0] == 1 and doubled.num_samples == alg.num_samples


# -- a second call compiles nothing ----------------------------------------------------------


EVERY = ["nuts", "hmc", "importance", "laplace", "mh"]


@pytest.mark.parametrize("name", EVERY)
def test_other_data_of_the_same_shapes_compile_nothing(fits, name):
    model, key = fits[0][name](groups), jax.random.key(1)
    with count_compiles() as compiles:
        other = model.posterior(key, SCALES + 0.5, given={"y": DATA[::-1] + 1})
    assert compiles.names == []
    assert abs(float(other.mean("mu")) - float(fits[1][name].mean("mu"))) > 0.05  # they are others


@pytest.mark.parametrize("name", ["nuts", "mh"])
def test_the_numbers_of_chains_and_draws_compile_nothing(fits, name):
    alg = fits[0][name].replace(num_samples=300)
    if name == "nuts":
        alg = alg.replace(num_chains=6, num_warmup=200)
    with count_compiles() as compiles:
        post = alg(groups).posterior(KEY, SCALES, given={"y": DATA})
    assert compiles.count == 0
    assert post["mu"].shape == (alg.num_chains, 300)


@pytest.mark.parametrize("name", EVERY)
def test_the_key_determines_the_draws(fits, name):
    model = fits[0][name](groups)
    again = model.posterior(KEY, SCALES, given={"y": DATA})
    other = model.posterior(jax.random.key(12), SCALES, given={"y": DATA})
    for address in ("mu", "theta"):
        np.testing.assert_array_equal(again[address], fits[1][name][address])
        assert np.mean(other[address] == again[address]) < 0.01


@pytest.mark.slow
def test_keys_are_used_once(fits):
    """JAX's checker needs programs of its own."""
    with jax.debug_key_reuse(True):
        for name in EVERY:
            fits[0][name](groups).posterior(jax.random.key(11), SCALES, given={"y": DATA})


# -- prior -----------------------------------------------------------------------------------


def test_prior_draws():
    prior = groups.prior(KEY, SCALES, num_samples=3000, coords={"group": NAMES})
    assert prior.algorithm == "prior" and prior.log_weights is None
    assert list(prior) == ["mu", "theta", "effect", "y"]
    assert prior["y"].shape == (1, 3000, 3)
    y = np.asarray(prior["y"], float)[0]
    assert (np.abs(y.mean(0)) < SE * y.std(0) / np.sqrt(3000)).all()
    sd = np.sqrt(5 + SCALES**2)
    assert (np.abs(y.std(0) - sd) < SE * sd / np.sqrt(6000)).all()
    covariance = np.cov(y[:, 0], y[:, 1])[0, 1]  # of the shared mu
    assert abs(covariance - 4) < SE * np.sqrt((sd[0] * sd[1]) ** 2 + 16) / np.sqrt(3000)
    assert "theta[south]" in prior.summary().labels
    np.testing.assert_array_equal(groups.prior(KEY, SCALES, num_samples=3000)["mu"], prior["mu"])


def test_prior_ignores_the_algorithm_and_checks_its_settings():
    prior = ab.nuts()(groups).prior(KEY, SCALES, num_samples=5)
    assert prior.algorithm == "prior" and prior["mu"].shape == (1, 5)
    with pytest.raises(ab.InvalidAlgorithm, match="num_samples must be an int >= 1, got 0"):
        groups.prior(KEY, SCALES, num_samples=0)
    with pytest.raises(ab.InvalidValue, match=r'coords\["grup"\].*Did you mean "group"'):
        groups.prior(KEY, SCALES, coords={"grup": NAMES})
