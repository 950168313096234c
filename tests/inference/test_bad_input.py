"""What users get wrong: each mistake has its error or warning, with address and remedy."""

import inspect
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import constraints

import abduce as ab
import abduce.dist as dist

KEY = jax.random.key(5)
Y = np.array([0.5, -1.0, 2.0])

QUICK = {
    "nuts": ab.nuts(num_warmup=150, num_samples=100, num_chains=2),
    "hmc": ab.hmc(num_warmup=150, num_samples=100, num_chains=2),
    "mh": ab.mh(num_warmup=50, num_samples=100, num_chains=2),
    "importance": ab.importance(num_samples=1000),
    "laplace": ab.laplace(num_samples=1000),
}
EVERY = list(QUICK)


@ab.model
def normal(s):
    mu = ab.sample("mu", dist.Normal(0, 2))
    ab.sample("y", dist.Normal(mu, s).expand([3]))


@ab.model
def scalar():
    mu = ab.sample("mu", dist.Normal(0, 2))
    ab.sample("y", dist.Normal(mu, 1))


@ab.model
def counts():
    rate = ab.sample("rate", dist.Gamma(2.0, 1.0))
    ab.sample("y", dist.Poisson(rate).expand([3]))


def fit(name, model, *args, key=KEY, **options):
    return QUICK[name](model).posterior(key, *args, **options)


def refused(error, builtin, *fragments):
    """`pytest.raises`, for the built-in class as well, and for each fragment in this order."""
    assert issubclass(error, builtin) and issubclass(error, ab.AbduceError)
    return pytest.raises(error, match=r"(.|\n)*".join(fragments))


# -- the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_a_model_without_sites(name):
    @ab.model
    def nothing(x):
        return x + 1

    message = rf"ab\.{name}: `nothing` has no sites", "nothing to infer", 'Add ab.sample'
    with refused(ab.InvalidAlgorithm, ValueError, *message):
        fit(name, nothing, 1.0)


@pytest.mark.parametrize("name", EVERY)
def test_nothing_left_to_infer(name):
    message = "`normal` has no latent site left", "Observe fewer", r"m\.log_density"
    with refused(ab.InvalidAlgorithm, ValueError, *message):
        fit(name, normal, 1.0, given={"mu": 0.0, "y": Y})


def test_the_same_address_twice():
    @ab.model
    def twice():
        ab.sample("x", dist.Normal(0, 1))
        ab.sample("x", dist.Normal(0, 1))

    message = "address 'x' occurs twice in `twice`", r"test_bad_input\.py", "different names"
    with refused(ab.DuplicateAddress, ValueError, *message, r"ab\.scope"):
        fit("nuts", twice)


def test_different_lengths_under_vmap():
    @ab.model
    def paired(a, b):
        mu = ab.sample("mu", dist.Normal(0, 1))
        jax.vmap(lambda a, b: ab.sample("y", dist.Normal(mu + a, b)))(a, b)

    with pytest.raises(ValueError, match=r"inconsistent sizes(.|\n)*size 3(.|\n)*size 2"):
        fit("nuts", paired, np.ones(3), np.ones(2), given={"y": Y})


@pytest.mark.parametrize("name", ["nuts", "hmc", "laplace"])
def test_a_discrete_latent_for_a_gradient_method(name):
    @ab.model
    def mixture():
        z = ab.sample("z", dist.Categorical(jnp.ones(3) / 3).expand([2]))
        ab.sample("y", dist.Normal(z, 1.0))

    message = rf"ab\.{name} needs gradients", "site 'z'", r"Categorical, shape \(2,\)", r"ab\.mh"
    with refused(ab.DiscreteLatent, TypeError, *message):
        fit(name, mixture, given={"y": np.zeros(2)})


def test_a_gradient_method_takes_discrete_data_even_masked():
    data = ab.masked(np.array([1, 2, 3]), observed=np.ones(3, bool))  # nothing is hidden
    masked = fit("laplace", counts, given={"y": data})
    plain = fit("laplace", counts, given={"y": np.array([1, 2, 3])})
    np.testing.assert_allclose(masked["rate"], plain["rate"], rtol=1e-5)
    np.testing.assert_array_equal(masked["y"][0, 0], [1, 2, 3])
    hidden = ab.masked(np.array([1, 2, 3]), observed=np.array([True, True, False]))
    with refused(ab.DiscreteLatent, TypeError, "site 'y'", "Poisson"):
        fit("laplace", counts, given={"y": hidden})


@pytest.mark.parametrize("name", ["nuts", "hmc", "laplace"])
def test_a_gradient_method_inside_vmap(name):
    def run(y):
        return fit(name, normal, 1.0, given={"y": y})["mu"]

    message = rf"ab\.{name} .*cannot run inside jax\.jit or jax\.vmap", "Loop", r"ab\.importance"
    with refused(ab.InvalidAlgorithm, ValueError, *message):
        jax.vmap(run)(np.stack([Y, Y]))
    with refused(ab.InvalidAlgorithm, ValueError, *message):
        jax.jit(run)(Y)
    with refused(ab.InvalidAlgorithm, ValueError, *message):
        jax.vmap(lambda k: fit(name, normal, 1.0, key=k, given={"y": Y})["mu"])(
            jax.random.split(KEY, 2)
        )


# -- the data --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_nan_in_the_data(name):
    data = np.array([0.5, np.nan, np.nan])
    message = r'given\["y"\] has 2 NaN among 3 values, first at index \(1,\)', r"ab\.masked\(y"
    with refused(ab.MissingData, ValueError, *message):
        fit(name, normal, 1.0, given={"y": data})


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nuts", ab.InitializationError),
        ("mh", ab.InitializationError),
        ("laplace", ab.InitializationError),
        ("importance", ab.Degenerate),
    ],
)
def test_infinity_in_the_data(name, error):
    message = "observed site 'y'", r"Normal, test_bad_input\.py:\d+", "-inf"
    with refused(error, RuntimeError, *message, "(correct|Correct)"):
        fit(name, normal, 1.0, given={"y": np.array([0.5, np.inf, 2.0])})


def test_nan_inside_the_model():
    @ab.model
    def inside(y):
        mu = ab.sample("mu", dist.Normal(0, 1))
        ab.sample("y", dist.Normal(mu, 1), obs=y)

    with refused(ab.InitializationError, RuntimeError, "observed site 'y'", "nan at value nan"):
        fit("laplace", inside, np.nan)

    @ab.model
    def weighed():  # a param has no density to look at
        x = ab.sample("x", dist.Normal(ab.param("p", 1.0), 1))
        ab.factor("f", jnp.nan * x)

    with refused(ab.InitializationError, RuntimeError, "factor 'f'", "nan"):
        fit("laplace", weighed)


def test_data_outside_the_support():
    message = r'given\["y"\]: value -2 at index \(1,\) is outside the support of Poisson', "1 of 3"
    with refused(ab.InvalidValue, ValueError, *message, "Correct the data"):
        fit("nuts", counts, given={"y": np.array([1, -2, 3])})


def test_data_outside_a_support_that_depends_on_choices():
    @ab.model
    def bounded():
        width = ab.sample("width", dist.Beta(1.0, 1.0))
        ab.sample("y", dist.Uniform(0, width).expand([2]))

    message = "observed site 'y'", "-inf", r"at index \(1,\) at value 1\.5", "1 of 2 elements"
    with refused(ab.InitializationError, RuntimeError, *message):
        fit("laplace", bounded, given={"y": np.array([1e-6, 1.5])})


def test_data_that_are_no_numbers():
    with refused(ab.InvalidValue, ValueError, "must be numbers", "Encode text"):
        fit("nuts", normal, 1.0, given={"y": ["a", "b", "c"]})


@pytest.mark.parametrize(
    ("model", "args", "value", "have", "want"),
    [
        (scalar, (), np.ones(1), r"\(1,\)", r"\(\)"),
        (normal, (1.0,), 1.0, r"\(\)", r"\(3,\)"),
        (normal, (1.0,), np.ones(1), r"\(1,\)", r"\(3,\)"),
        (normal, (1.0,), np.ones((3, 1)), r"\(3, 1\)", r"\(3,\)"),
    ],
)
def test_data_of_another_shape_are_not_broadcast(model, args, value, have, want):
    message = rf'given\["y"\] has shape {have}', rf"shape {want}", "never broadcast"
    with refused(ab.InvalidValue, ValueError, *message):
        fit("nuts", model, *args, given={"y": value})


@pytest.mark.parametrize("name", ["nuts", "laplace", "importance"])
def test_integers_lists_and_doubles_are_floats(name):
    """Shapes and values decide, not the type of the container."""
    expected = fit(name, normal, 1.0, given={"y": np.array([1, 0, 2], np.float32)})
    for data in (np.array([1, 0, 2]), [1, 0, 2], np.array([1.0, 0.0, 2.0]), jnp.array([1, 0, 2])):
        post = fit(name, normal, 1.0, given={"y": data})
        np.testing.assert_array_equal(post["mu"], expected["mu"])


def test_whole_floats_are_counts_and_others_are_not():
    a = fit("importance", counts, given={"y": np.array([1.0, 2.0, 3.0])})
    b = fit("importance", counts, given={"y": np.array([1, 2, 3])})
    np.testing.assert_array_equal(a["rate"], b["rate"])
    with refused(ab.InvalidValue, ValueError, r'given\["y"\] must be whole numbers', "fractional"):
        fit("importance", counts, given={"y": np.array([1.5, 2.0, 3.0])})


@pytest.mark.parametrize("name", ["nuts", "importance", "laplace"])
def test_zero_observations_leave_the_prior(name):
    @ab.model
    def regression(x):
        slope = ab.sample("slope", dist.Normal(3, 2))
        jax.vmap(lambda x: ab.sample("y", dist.Normal(slope * x, 1)))(x)

    post = fit(name, regression, np.zeros(0), given={"y": np.zeros(0)})
    draws = np.asarray(post["slope"], float)
    n = draws.size if name != "nuts" else 60  # of correlated draws, a bound from below
    assert abs(draws.mean() - 3) < 4.5 * 2 / np.sqrt(n)
    assert post.log_evidence is None or post.log_evidence == pytest.approx(0, abs=1e-4)
    assert post.warnings == ()
    assert post.predict(KEY)["y"].shape == (*draws.shape, 0)


# -- given -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_a_misspelt_address(name):
    message = r'given\["yy"\] matches no site of `normal` \(mu, y \(3,\)\)', 'Did you mean "y"'
    with refused(ab.UnknownAddress, KeyError, *message):
        fit(name, normal, 1.0, given={"yy": Y})


def test_given_is_a_dict():
    with refused(ab.InvalidValue, ValueError, "given is a dict", "got ndarray", 'given={"y": y}'):
        fit("nuts", normal, 1.0, given=Y)


def test_observed_twice():
    @ab.model
    def inside(y):
        mu = ab.sample("mu", dist.Normal(0, 2))
        ab.sample("y", dist.Normal(mu, 1), obs=y)

    message = r'given\["y"\]: site "y" is observed already', r"test_bad_input\.py", "Drop one"
    with refused(ab.InvalidValue, ValueError, *message):
        fit("nuts", inside, Y, given={"y": Y})
    with refused(ab.InvalidValue, ValueError, *message):
        fit("nuts", ab.condition(normal, {"y": Y}), 1.0, given={"y": Y})


def test_a_deterministic_is_no_choice():
    @ab.model
    def derived():
        x = ab.sample("x", dist.Normal(0, 1))
        ab.deterministic("twice", 2 * x)

    message = r'given\["twice"\]', "deterministic, not a choice", r"ab\.do"
    with refused(ab.InvalidValue, ValueError, *message):
        fit("nuts", derived, given={"twice": 1.0})


def test_labels_that_do_not_fit():
    @ab.model
    def named():
        ab.sample("x", dist.Normal(0, 1).expand([3]), dims="site")

    message = r'coords\["sites"\] names no dimension of `named` \(site\)', 'Did you mean "site"'
    with refused(ab.InvalidValue, ValueError, *message):
        fit("importance", named, coords={"sites": ["a", "b", "c"]})
    message = r'coords\["site"\] has 2 labels', "'x' has length 3"
    with refused(ab.InvalidValue, ValueError, *message):
        fit("importance", named, coords={"site": ["a", "b"]})


# -- keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (0, r"the int 0.*m\.posterior\(jax\.random\.key\(0\)"),
        (42, r"the int 42.*jax\.random\.key\(42\)"),
        (None, r"NoneType.*jax\.random\.key\(0\)"),
        (1.0, r"got float.*jax\.random\.key\(0\)"),
        (np.ones(3), r"ndarray.*jax\.random\.key\(0\)"),
    ],
)
def test_something_else_for_a_key(key, message):
    with refused(ab.MissingKey, TypeError, r"m\.posterior: the first argument", message):
        fit("nuts", normal, 1.0, key=key, given={"y": Y})
    with refused(ab.MissingKey, TypeError, "the first argument is a random key"):
        normal.prior(key, 1.0)


def test_no_key_at_all():
    with pytest.raises(TypeError, match="'key'"):
        normal.posterior(given={"y": Y})
    with refused(ab.MissingKey, TypeError, r"m\.posterior: the first argument"):
        normal.posterior(Y, given={"y": Y})  # the model's argument, where the key should be


def test_several_keys():
    with refused(ab.MissingKey, TypeError, r"shape \(2,\)", r"jax\.vmap"):
        fit("nuts", normal, 1.0, key=jax.random.split(KEY, 2), given={"y": Y})


def test_a_legacy_key_works_and_a_reused_one_repeats():
    posts = [
        fit("importance", normal, 1.0, key=key, given={"y": Y})
        for key in (jax.random.key(9), jax.random.key(9), jax.random.PRNGKey(9))
    ]
    np.testing.assert_array_equal(posts[0]["mu"], posts[1]["mu"])
    np.testing.assert_array_equal(posts[0]["mu"], posts[2]["mu"])


# -- posteriors that are hard or do not exist ------------------------------------------------


@pytest.mark.parametrize("name", ["nuts", "laplace"])
@pytest.mark.parametrize("scale", [1e6, 1e10])
def test_a_huge_prior_scale_does_no_harm(name, scale):
    vague = ab.with_prior(normal, {"mu": dist.Normal(0, scale)})
    post = fit(name, vague, 1.0, given={"y": Y})
    sd = 3**-0.5
    n = 1000 if name == "laplace" else 40  # of correlated draws, a bound from below
    assert abs(post.mean("mu") - 0.5) < 4.5 * sd / np.sqrt(n)
    assert abs(post.std("mu") - sd) < 4.5 * sd / np.sqrt(2 * n)
    assert post.warnings == ()


def test_a_huge_prior_scale_is_reported_where_the_prior_proposes():
    vague = ab.with_prior(normal, {"mu": dist.Normal(0, 1e10)})
    with pytest.warns(ab.AbduceWarning, match=r"Pareto k.*proposal=.*ab\.nuts"):
        fit("importance", vague, 1.0, given={"y": Y})
    alg = QUICK["mh"].replace(num_warmup=5000)
    with pytest.warns(ab.AbduceWarning) as caught:
        post = alg(vague).posterior(KEY, 1.0, given={"y": Y})
    assert [str(w.message) for w in caught] == list(post.warnings)
    stuck, unmixed = post.warnings
    assert "chains [0, 1] accepted" in stuck and "smaller moves" in stuck
    assert "not mixed" in unmixed and "'mu'" in unmixed and "ab.nuts" in unmixed


@ab.model
def flat():
    ab.sample("mu", dist.ImproperUniform(constraints.real, (), ()))


@pytest.mark.parametrize("name", ["nuts", "laplace"])
def test_an_improper_posterior_is_reported(name):
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.warns(ab.AbduceWarning) as caught:
            post = fit(name, flat)
    assert time.perf_counter() - start < 60
    found = [str(w.message) for w in caught if issubclass(w.category, ab.AbduceWarning)]
    assert tuple(found) == post.warnings
    if name == "nuts":
        assert "'mu'" in post.warnings[0] and "improper" in post.warnings[0]
        assert "proper prior" in post.warnings[0]
    else:
        assert "flat" in post.warnings[0] and "add prior information" in post.warnings[0]
        assert post.log_evidence is None


@pytest.mark.parametrize("name", ["importance", "mh"])
def test_an_improper_prior_cannot_be_drawn_from(name):
    message = r"site 'mu' \(test_bad_input\.py:\d+\)", "cannot be drawn from", r"ab\.nuts"
    with refused(ab.NoDensity, ValueError, *message):
        fit(name, flat)


def test_a_flat_prior_with_data_is_fine():
    @ab.model
    def level():
        mu = ab.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        ab.sample("y", dist.Normal(mu, 1).expand([3]))

    post = fit("laplace", level, given={"y": Y})
    assert post.warnings == ()
    assert abs(post.mean("mu") - 0.5) < 4.5 / np.sqrt(3 * 1000)


@ab.model
def unidentified(scale):
    a = ab.sample("a", dist.Normal(0, scale))
    b = ab.sample("b", dist.Normal(0, scale))
    ab.sample("y", dist.Normal(a + b, 1).expand([3]))


def test_a_ridge_that_the_prior_closes_is_sampled():
    """Only a + b is identified; the metric follows the ridge, 300 times as long as wide."""
    post = fit("nuts", unidentified, 100.0, given={"y": Y})
    total = np.asarray(post["a"] + post["b"], float)
    assert abs(total.mean() - 0.5) < 4.5 * 3**-0.5 / np.sqrt(30)
    assert 40 < post.std("a") < 110  # 71 in truth
    assert post.warnings == ()


@ab.model
def ridge():
    a = ab.sample("a", dist.ImproperUniform(constraints.real, (), ()))
    b = ab.sample("b", dist.ImproperUniform(constraints.real, (), ()))
    ab.sample("y", dist.Normal(a + b, 1).expand([3]))


def test_laplace_reports_a_model_that_is_not_identified():
    message = r"1 of 2 directions.*unidentified.*prior information"
    with pytest.warns(ab.AbduceWarning, match=message):
        fit("laplace", ridge, given={"y": Y})


def test_nuts_reports_a_model_that_is_not_identified():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.warns(ab.AbduceWarning, match=r"improper|chains have not mixed"):
            fit("nuts", ridge, given={"y": Y})


def test_a_density_that_is_nowhere_finite():
    @ab.model
    def impossible():
        a = ab.sample("a", dist.Normal(0, 1))
        ab.factor("wall", jnp.where(a < 100, -jnp.inf, 0.0))

    for name in ("nuts", "laplace", "mh"):
        with refused(ab.InitializationError, RuntimeError, "'wall'", "-inf", "init="):
            fit(name, impossible)


def test_warnings_point_at_the_callers_line():
    with pytest.warns(ab.AbduceWarning) as caught:
        line = inspect.currentframe().f_lineno + 1
        ab.importance(num_samples=100)(flat_far).posterior(KEY, given={"y": 40.0})
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)


@ab.model
def flat_far():
    mu = ab.sample("mu", dist.Normal(0, 1))
    ab.sample("y", dist.Normal(mu, 0.1))
