"""`ab.expectation`: exact cases, credit, baselines, combinations with JAX, and what is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
import abduce.dist as dist

KEY = jax.random.key(3)
ENUM, SCORE, MVD = ab.grad.enum(), ab.grad.score(), ab.grad.mvd()


def flips(grad, structure):
    """`(sum of 3 flips)^2`, whose mean is `3 p + 6 p^2`."""

    def flip(p):
        return ab.sample("z", dist.Bernoulli(probs=p), grad=grad).astype(float)

    def mapped(p):
        return jnp.sum(jax.vmap(lambda _: flip(p))(jnp.arange(3))) ** 2

    def scanned(p):
        return jax.lax.scan(lambda c, _: (c + flip(p), None), 0.0, None, length=3)[0] ** 2

    def looped(p):
        return jax.lax.fori_loop(0, 3, lambda i, c: c + flip(p), 0.0) ** 2

    def unrolled(p):
        zs = [ab.sample(f"z{i}", dist.Bernoulli(probs=p), grad=grad) for i in range(3)]
        return sum(z.astype(float) for z in zs) ** 2

    def checkpointed(p):
        body = jax.checkpoint(lambda c, _: (c + flip(p), None))
        return jax.lax.scan(body, 0.0, None, length=3)[0] ** 2

    def jitted(p):
        inner = jax.jit(lambda p: jax.vmap(lambda _: flip(p))(jnp.arange(3)))
        return jnp.sum(inner(p)) ** 2

    forms = [mapped, scanned, looped, unrolled, checkpointed, jitted]
    return ab.expectation({f.__name__: f for f in forms}[structure])


FORMS = ["mapped", "scanned", "looped", "unrolled", "checkpointed", "jitted"]


@pytest.mark.parametrize("structure", FORMS)
def test_enumeration_is_exact(structure, x64):
    """To the third derivative, which no path reaches: 9, 12 and 0 at one half."""
    f = flips(ENUM, structure)
    value, gradient = f.value_and_grad(KEY, 0.5)
    np.testing.assert_allclose([value, gradient], [3.0, 9.0], rtol=1e-12)
    second = jax.grad(jax.grad(lambda p: f.estimate(KEY, p)))(0.5)
    np.testing.assert_allclose(second, 12.0, rtol=1e-10)


@pytest.mark.parametrize("grad", [SCORE, MVD, ab.grad.enum(max_joint=1)])
@pytest.mark.parametrize("structure", ["scanned", "unrolled", "checkpointed"])
def test_other_strategies_are_unbiased(grad, structure, x64):
    """4.5 standard errors of 5,000 gradients: 7e-6."""
    f = flips(grad, structure)
    g = jax.vmap(lambda k: f.value_and_grad(k, 0.5)[1])(jax.random.split(KEY, 5000))
    assert abs(g.mean() - 9) < 4.5 * g.std() / 5000**0.5


def test_second_derivatives_of_scores_are_unbiased(x64):
    f = flips(SCORE, "mapped")
    run = jax.vmap(lambda k: jax.grad(jax.grad(lambda p: f.estimate(k, p)))(0.5))
    g = run(jax.random.split(KEY, 20_000))
    assert abs(g.mean() - 12) < 4.5 * g.std() / 20_000**0.5


def test_reparametrized_gradients_are_counted_once(x64):
    """A mixed program: counting the cost twice in the surrogate would pass discrete tests only."""

    @ab.expectation
    def f(u):
        z = ab.sample("z", dist.Bernoulli(probs=u[0]), grad=ENUM)
        x = ab.sample("x", dist.Normal(u[1] * (1 + z), 1.0))
        return x**2

    u = jnp.array([0.3, 0.7])
    g = jax.vmap(lambda k: f.value_and_grad(k, u)[1])(jax.random.split(KEY, 4000))
    p, m = u
    exact = [3 * m**2, 2 * m * (1 + 3 * p)]  # E = 1 + m^2 (1 + 3 p)
    assert (abs(g.mean(0) - jnp.array(exact)) < 4.5 * g.std(0) / 4000**0.5).all()


def test_rsvi_has_less_variance_than_the_score(x64):
    """d/da E[z^2] = 2 a + 1 = 5 for Gamma(2); at most a quarter of the score's variance."""

    def gradients(grad):
        f = ab.expectation(lambda a: ab.sample("z", dist.Gamma(a, 1.0), grad=grad) ** 2)
        keys = jax.random.split(KEY, 20_000)
        return np.asarray(jax.vmap(lambda k: f.value_and_grad(k, 2.0)[1])(keys))

    score = gradients(SCORE)
    for b in (0, 1, 4):
        g = gradients(ab.grad.rsvi(b))
        assert abs(g.mean() - 5) < 4.5 * g.std() / 20_000**0.5
        assert g.var() < score.var() / 4


@pytest.mark.parametrize("family", ["Beta", "Dirichlet"])
def test_rsvi_of_beta_and_dirichlet(family, x64):
    def f(a):
        if family == "Beta":
            x = ab.sample("x", dist.Beta(a, 1.5), grad=ab.grad.rsvi())
        else:
            law = dist.Dirichlet(jnp.stack([a, 1.0 + 0 * a, 0.5 + 0 * a]))
            x = ab.sample("x", law, grad=ab.grad.rsvi())[0]
        return x**2

    def exact(a):
        total = a + 1.5
        return a * (a + 1) / (total * (total + 1))

    e = ab.expectation(f)
    g = jax.vmap(lambda k: e.value_and_grad(k, 0.8)[1])(jax.random.split(KEY, 20_000))
    assert abs(g.mean() - jax.grad(exact)(0.8)) < 4.5 * g.std() / 20_000**0.5


# ------------------------------------------------------------------- credit


def separate(grad, n):
    @ab.expectation
    def f(p):
        def one(target):
            z = ab.sample("z", dist.Bernoulli(probs=p), grad=grad)
            return (z - target) ** 2

        return jnp.sum(jax.vmap(one)(jnp.linspace(0.0, 1.0, n)))

    return f


def test_independent_elements_are_summed_out_at_the_price_of_one(x64):
    f = separate(ENUM, 50)
    assert f.plan(0.3) == {"z": "ab.grad.enum(): summed out with 2 alternatives"}
    t = np.linspace(0, 1, 50)
    value, gradient = f.value_and_grad(KEY, 0.3)
    np.testing.assert_allclose(value, np.sum(0.3 * (1 - t) ** 2 + 0.7 * t**2), rtol=1e-12)
    np.testing.assert_allclose(gradient, np.sum((1 - t) ** 2 - t**2), atol=1e-12)
    assert separate(MVD, 50).plan(0.3) == {"z": "ab.grad.mvd(): 1 more runs"}


def test_an_element_is_credited_with_its_own_cost():
    costs = separate(SCORE, 4).costs(KEY, 0.3)["z"]
    t = np.linspace(0.0, 1.0, 4)
    for c, u in zip(np.asarray(costs), t, strict=True):
        assert min(abs(c - u**2), abs(c - (1 - u) ** 2)) < 1e-6


def test_a_step_is_credited_with_the_costs_from_it_on():
    @ab.expectation
    def f(p):
        def with_choice(total, price):
            z = ab.sample("z", dist.Bernoulli(probs=p), grad=SCORE)
            return total + price * jnp.exp(0.0 * z), None

        return jax.lax.scan(with_choice, 0.0, jnp.array([1.0, 10.0, 100.0]))[0]

    # The price does not depend on the draw, but on the step: step t sees its own price only.
    np.testing.assert_allclose(f.costs(KEY, 0.5)["z"], [1.0, 10.0, 100.0])

    @ab.expectation
    def g(p):
        def step(carry, price):
            total, level = carry
            z = ab.sample("z", dist.Bernoulli(probs=p), grad=SCORE)
            level = level + 0.0 * z
            return (total + price * jnp.exp(level), level), None

        return jax.lax.scan(step, (0.0, 0.0), jnp.array([1.0, 10.0, 100.0]))[0][0]

    # The level is carried on, so a choice is credited with all later prices.
    np.testing.assert_allclose(g.costs(KEY, 0.5)["z"], [111.0, 110.0, 100.0])


def test_reverse_scans_count_from_the_end():
    @ab.expectation
    def f(p):
        def step(carry, price):
            total, level = carry
            z = ab.sample("z", dist.Bernoulli(probs=p), grad=SCORE)
            level = level + 0.0 * z
            return (total + price * jnp.exp(level), level), None

        out = jax.lax.scan(step, (0.0, 0.0), jnp.array([1.0, 10.0, 100.0]), reverse=True)
        return out[0][0]

    np.testing.assert_allclose(f.costs(KEY, 0.5)["z"], [1.0, 11.0, 111.0])


def test_nested_scans(x64):
    @ab.expectation
    def f(p):
        def outer(x, _):
            def inner(y, _):
                z = ab.sample("z", dist.Bernoulli(probs=p), grad=ENUM).astype(float)
                return y + z, y * z

            y, products = jax.lax.scan(inner, x, None, length=2)
            return y, jnp.sum(products)

        x, out = jax.lax.scan(outer, 0.0, None, length=2)
        return jnp.sum(out) + x**2

    def exact(p):
        total = 0.0
        for bits in np.ndindex(2, 2, 2, 2):
            y, cost, w = 0.0, 0.0, 1.0
            for b in bits:
                cost, y, w = cost + y * b, y + b, w * (p if b else 1 - p)
            total += w * (cost + y**2)
        return total

    value, gradient = f.value_and_grad(KEY, 0.3)
    np.testing.assert_allclose(value, exact(0.3), rtol=1e-10)
    slope = (exact(0.3 + 1e-5) - exact(0.3 - 1e-5)) / 2e-5
    np.testing.assert_allclose(gradient, slope, rtol=1e-7)


def test_scans_one_after_the_other(x64):
    """The second scan uses what the first one drew: its steps are not apart there."""

    @ab.expectation
    def f(p):
        def draw(c, _):
            z = ab.sample("z", dist.Bernoulli(probs=p), grad=ENUM).astype(float)
            return c + z, z

        c, zs = jax.lax.scan(draw, 0.0, None, length=3)

        def use(total, z):
            return total + jnp.exp(c) * (1 + z), None

        return jax.lax.scan(use, 0.0, zs)[0]

    def exact(p):
        total = 0.0
        for zs in np.ndindex(2, 2, 2):
            w = np.prod([p if z else 1 - p for z in zs])
            total += w * np.exp(sum(zs)) * (3 + sum(zs))
        return total

    value, gradient = f.value_and_grad(KEY, 0.3)
    np.testing.assert_allclose(value, exact(0.3), rtol=1e-10)
    slope = (exact(0.3 + 1e-5) - exact(0.3 - 1e-5)) / 2e-5
    np.testing.assert_allclose(gradient, slope, rtol=1e-7)


def test_minus_infinity_is_no_part_where_it_can_happen(x64):
    """A mask by -inf inside an exponential depends on the choice; at the top it is a support."""

    @ab.expectation
    def f(p):
        z = ab.sample("z", dist.Bernoulli(probs=p), grad=ENUM)
        masked = jnp.where(z == 1, 2.0, -jnp.inf)
        return jnp.exp(masked) + jnp.logaddexp(masked, 1.0)

    value, gradient = f.value_and_grad(KEY, 0.3)
    on, off = np.exp(2) + np.logaddexp(2.0, 1.0), 1.0
    np.testing.assert_allclose([value, gradient], [0.3 * on + 0.7 * off, on - off], rtol=1e-12)


def test_a_branch_is_credited_with_its_predicate(x64):
    @ab.expectation
    def f(p):
        z = ab.sample("z", dist.Bernoulli(probs=p), grad=ENUM)
        return jax.lax.cond(z == 1, lambda: 3.0 * p, lambda: 1.0)

    value, gradient = f.value_and_grad(KEY, 0.2)  # 3 p^2 + 1 - p
    np.testing.assert_allclose([value, gradient], [0.92, 0.2], rtol=1e-12)

    @ab.expectation
    def through(p):
        """A value from outside passes through a branch: it depends on the predicate there."""
        z = ab.sample("z", dist.Bernoulli(probs=p), grad=ENUM)
        a = p + 1.0
        return jax.lax.cond(z == 1, lambda a: a, lambda a: 0.0 * a, a)

    value, gradient = through.value_and_grad(KEY, 0.2)  # p (p + 1)
    np.testing.assert_allclose([value, gradient], [0.24, 1.4], rtol=1e-12)

    @ab.expectation
    def mapped(p):
        def one(c):
            z = ab.sample("z", dist.Bernoulli(probs=p), grad=ENUM)
            w = jax.lax.cond(
                z == 1,
                lambda: ab.sample("w", dist.Bernoulli(probs=p**2), grad=ENUM).astype(float),
                lambda: c,
            )
            return w * c

        return jnp.sum(jax.vmap(one)(jnp.array([1.0, 2.0, 5.0])))

    value, gradient = mapped.value_and_grad(KEY, 0.2)  # sum c (p^3 + (1 - p) c)
    np.testing.assert_allclose(value, 8 * 0.008 + 0.8 * 30, rtol=1e-12)
    np.testing.assert_allclose(gradient, 8 * 3 * 0.04 - 30, rtol=1e-12)


# ------------------------------------------------------------------- baselines


def test_baselines_keep_the_mean_and_lower_the_variance(x64):
    def f(grad):
        @ab.expectation
        def f(p):
            z = jax.vmap(lambda _: ab.sample("z", dist.Bernoulli(probs=p), grad=grad))(
                jnp.arange(3)
            )
            return (jnp.sum(z.astype(float)) + 5.0) ** 2

        return f

    keys = jax.random.split(KEY, 1000)

    def gradients(grad, **kw):
        return np.asarray(
            jax.vmap(lambda k: f(grad).value_and_grad(k, 0.5, num_samples=4, **kw)[1])(keys)
        )

    plain = gradients(SCORE)
    exact = 3 * 10 + 9  # of 25 + 30 p + 3 p + 6 p^2
    for g in (
        gradients(ab.grad.score("leave_one_out")),
        gradients(SCORE, baselines={"z": 43.0}),
        gradients(ab.grad.score(baseline=jnp.array(43.0))),
    ):
        assert abs(g.mean() - exact) < 4.5 * g.std() / 1000**0.5
        assert g.var() < plain.var() / 3


def test_a_learned_baseline_is_fitted_to_the_cost():
    @ab.expectation
    def f(u, x):
        b = u["slope"] * x
        z = ab.sample("z", dist.Bernoulli(probs=u["p"]), grad=ab.grad.score(baseline=b))
        return 7.0 * x * jnp.exp(0.0 * z)

    u = {"p": jnp.array(0.3), "slope": jnp.array(1.0)}
    loss = jax.grad(lambda u: f.baseline_loss(KEY, u, 2.0))(u)
    np.testing.assert_allclose(loss["slope"], -2 * (14.0 - 2.0) * 2.0, rtol=1e-5)
    assert loss["p"] == 0
    u["slope"] = jnp.array(7.0)
    _, gradient = f.value_and_grad(KEY, u, 2.0)
    assert abs(gradient["p"]) < 1e-4  # nothing is left to chance


# ------------------------------------------------------------------- with JAX


def test_under_vmap_jit_jvp_and_float32():
    @ab.expectation
    def f(u):
        x = ab.sample("x", dist.Normal(u["m"], 1.0))
        z = ab.sample("z", dist.Bernoulli(logits=u["a"]), grad=ENUM)
        return x * z

    u = {"m": jnp.array(2.0), "a": jnp.array(0.0)}
    keys = jax.random.split(KEY, 5)
    mapped = jax.jit(jax.vmap(lambda k: f.value_and_grad(k, u)))(keys)
    for i, k in enumerate(keys):
        value, gradient = f.value_and_grad(k, u)
        np.testing.assert_allclose(mapped[0][i], value, rtol=1e-6)
        np.testing.assert_allclose(mapped[1]["a"][i], gradient["a"], rtol=1e-6)
        assert value.dtype == np.float32
    du = {"m": jnp.array(1.0), "a": jnp.array(-2.0)}
    value, gradient = f.value_and_grad(KEY, u)
    out, slope = f.jvp(KEY, (u,), (du,))
    np.testing.assert_allclose(out, value, rtol=1e-6)
    np.testing.assert_allclose(slope, gradient["m"] - 2 * gradient["a"], rtol=1e-5)
    under = jax.grad(lambda u: f.estimate(KEY, u))(u)
    np.testing.assert_allclose(under["a"], gradient["a"], rtol=1e-6)


def test_other_numbers_compile_nothing(count_compiles):
    f = flips(ENUM, "mapped")
    f.value_and_grad(KEY, 0.5)
    with count_compiles() as compiles:
        f.value_and_grad(KEY, 0.25)
    assert compiles.names == []


def test_modules_as_parameters():
    net = eqx.nn.Linear(2, 1, key=KEY)

    @ab.expectation
    def f(net, x):
        return ab.sample("y", dist.Normal(net(x)[0], 1.0)) * 2.0

    _, gradient = f.value_and_grad(KEY, net, jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(gradient.weight, [[2.0, 6.0]])
    np.testing.assert_allclose(gradient.bias, [2.0])


def test_param_sites():
    @ab.expectation
    def f(x):
        w = ab.param("w", 2.0)
        return ab.sample("y", dist.Normal(w * x, 1.0))

    value, gradient = f.value_and_grad(KEY, 3.0, params={"w": 5.0})
    np.testing.assert_allclose(gradient["w"], 3.0)
    np.testing.assert_allclose(value - f.estimate(KEY, 3.0), 9.0, rtol=1e-5)
    with pytest.raises(ab.UnknownAddress, match="v"):
        f.estimate(KEY, 3.0, params={"v": 1.0})


def test_expectations_nest(x64):
    @ab.expectation(grad={"z": ENUM})
    def inner(p):
        return ab.sample("z", dist.Bernoulli(probs=p)) * 2.0

    @ab.expectation
    def outer(p):
        with ab.scope("first"):
            a = inner(p)
        with ab.scope("second"):
            b = inner(p**2)
        return a * b

    value, gradient = outer.value_and_grad(KEY, 0.5)  # 4 p^3
    np.testing.assert_allclose([value, gradient], [0.5, 3.0], rtol=1e-12)

    @ab.expectation
    def estimated(p):
        z = ab.sample("w", dist.Bernoulli(probs=p), grad=ENUM)
        return inner.estimate(KEY, p * (1 + z)) * z

    value, gradient = estimated.value_and_grad(KEY, 0.3)  # p * 2 * 2 p
    np.testing.assert_allclose([value, gradient], [0.36, 2.4], rtol=1e-12)


def test_gumbel_softmax_follows_the_relaxed_vector(x64):
    logits = jnp.array([0.2, -0.3, 0.5])

    @ab.expectation
    def f(logits):
        d = dist.OneHotCategorical(logits=logits)
        return ab.sample("z", d, grad=ab.grad.gumbel_softmax(0.7)) @ jnp.array([1.0, 2.0, 4.0])

    value, gradient = f.value_and_grad(KEY, logits)
    assert float(value) in (1.0, 2.0, 4.0)
    assert abs(gradient.sum()) < 1e-12 and abs(gradient).max() > 0
    exact = ab.expectation(
        lambda logits: (
            ab.sample("z", dist.OneHotCategorical(logits=logits)) @ jnp.array([1.0, 2.0, 4.0])
        )
    )
    p = jax.nn.softmax(logits)
    np.testing.assert_allclose(exact.estimate(KEY, logits), p @ jnp.array([1.0, 2, 4]), rtol=1e-10)


def test_objectives_about_models_have_the_right_gradient(x64):
    """An ELBO of a model with a discrete latent, enumerated, against its closed form."""

    @ab.model
    def model(y):
        z = ab.sample("z", dist.Bernoulli(probs=0.3))
        ab.sample("y", dist.Normal(2.0 * z, 1.0), obs=y)

    @ab.model
    def guide(p):
        ab.sample("z", dist.Bernoulli(probs=p))

    @ab.expectation
    def elbo(p, y):
        z, log_q = ab.propose(guide, p)
        return ab.log_density(model, z, y) - log_q

    def exact(p, y):
        logp = [jnp.log(0.7) + dist.Normal(0, 1).log_prob(y),
                jnp.log(0.3) + dist.Normal(2, 1).log_prob(y)]  # fmt: skip
        return (1 - p) * (logp[0] - jnp.log(1 - p)) + p * (logp[1] - jnp.log(p))

    value, gradient = elbo.value_and_grad(KEY, 0.4, 1.5)
    np.testing.assert_allclose(value, exact(0.4, 1.5), rtol=1e-9)
    np.testing.assert_allclose(gradient, jax.grad(exact)(0.4, 1.5), rtol=1e-8)


# ------------------------------------------------------------------- refused


def test_jumps_along_a_path_are_refused():
    def case(f):
        return ab.expectation(f)

    bad = {
        "decides a branch": lambda x: jax.lax.cond(x > 0, lambda: 1.0, lambda: x),
        "goes through `floor`": lambda x: jnp.floor(x),
        "becomes a flag": lambda x: (x > 0) * 1.0,
        "is turned into an integer": lambda x: x.astype(int) * 1.0,
    }
    for what, cost in bad.items():
        f = case(lambda mu, cost=cost: cost(ab.sample("x", dist.Normal(mu, 1.0))))
        with pytest.raises(ab.InvalidModel, match=rf"'x' .*{what}.*ab.grad.score\(\)"):
            f.value_and_grad(KEY, 0.0)
        forced = ab.expectation(f, grad={"x": ab.grad.reparam(assume_smooth=True)})
        assert np.isfinite(forced.value_and_grad(KEY, 0.0)[0])
    good = case(lambda mu: jax.nn.relu(ab.sample("x", dist.Normal(mu, 1.0))))
    assert np.isfinite(good.value_and_grad(KEY, 0.0)[1])


def test_errors():
    def refused(f, match, error=ab.InvalidModel, grad=None):
        with pytest.raises(error, match=match):
            ab.expectation(f, grad=grad).value_and_grad(KEY, 0.5)

    refused(lambda p: ab.sample("z", dist.Poisson(p), grad=ENUM) * 1.0, "'z'.*finite support")
    refused(lambda p: ab.sample("z", dist.Poisson(p), grad=ab.grad.reparam()) * 1.0, "'z'.*Poisson")
    refused(lambda p: ab.sample("z", dist.Beta(p, 1.0), grad=MVD), "'z'.*Beta.*ab.grad.mvd")
    refused(lambda p: ab.sample("z", dist.Normal(p, 1), grad=ab.grad.rsvi()), "Gamma, Beta")
    refused(
        lambda p: ab.sample("z", dist.Bernoulli(p), grad=ab.grad.gumbel_softmax()) * 1.0,
        "OneHotCategorical",
    )
    refused(
        lambda p: (
            jnp.sum(ab.sample("z", dist.Bernoulli(jnp.ones(3) * p).to_event(1), grad=ENUM)) * 1.0
        ),
        "no .to_event",
    )
    refused(lambda p: jnp.ones(3) * p, "one float scalar")
    refused(lambda p: ab.sample("x", dist.Normal(p, 1.0)), "zz", ab.UnknownAddress, {"zz": SCORE})

    def factored(p):
        ab.factor("f", p)
        return p

    refused(factored, "factor site 'f'.*has no effect")

    def looped(p):
        return ab.while_loop(
            lambda x: x < 1, lambda x: x + ab.sample("x", dist.Bernoulli(p)), 0.0, max_steps=3
        )

    refused(looped, r"while_loop\(x\).*runs out of steps: write the loop as a jax.lax.scan")
    refused(
        lambda p: ab.sample("z", dist.Bernoulli(p), grad=ab.grad.score("leave_one_out")) * 1.0,
        "num_samples >= 2", ab.InvalidValue,
    )  # fmt: skip
    with pytest.raises(ab.InvalidModel, match="strategies such as"):
        ab.expectation(lambda p: p, grad={"z": "score"})
    with pytest.raises(ab.InvalidValue, match="nothing to differentiate"):
        ab.expectation(lambda: 1.0).value_and_grad(KEY)
    with pytest.raises(ab.InvalidValue, match="num_samples"):
        ab.expectation(lambda p: p).value_and_grad(KEY, 1.0, num_samples=0)
    with pytest.raises(ab.InvalidModel, match="'mean'"):
        ab.grad.score(baseline="mean")
