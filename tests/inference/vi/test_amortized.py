"""Amortized guides: fits against closed forms, enumeration per element, and minibatches.

False alarms: means of random numbers are compared at 4.5 standard errors, 7e-6 each.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import abduce as ab
import abduce.dist as dist

# ---------------------------------------------------------------- a linear-Gaussian autoencoder

NOISE = 0.5
LOADINGS = np.array([[1.0, 0.5], [-0.5, 1.0], [0.3, -0.6], [0.6, 0.3]])  # orthogonal columns


class Encoder(eqx.Module):
    """Location and scale of two latents: the exact posterior is among them."""

    linear: eqx.nn.Linear
    log_scale: jax.Array

    def __init__(self, key):
        self.linear = eqx.nn.Linear(4, 2, key=key)
        self.log_scale = jnp.zeros(2)

    def __call__(self, x):
        return self.linear(x), jnp.exp(self.log_scale)


@ab.model
def decoder(rows):
    def one(_):
        z = ab.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        ab.sample("x", dist.Normal(jnp.asarray(LOADINGS) @ z, NOISE).to_event(1))

    jax.vmap(one)(rows)


@ab.model
def encoder_guide(given, rows):
    net = ab.param("encoder", Encoder(jax.random.key(0)))

    def one(x):
        loc, scale = net(x)
        ab.sample("z", dist.Normal(loc, scale).to_event(1))

    jax.vmap(one)(given["x"])


def exact_posterior(x):
    """Means of the latents, shape (rows, 2), and their scales."""
    precision = np.eye(2) + LOADINGS.T @ LOADINGS / NOISE**2
    return x @ LOADINGS / NOISE**2 / np.diag(precision), 1 / np.sqrt(np.diag(precision))


def log_evidence(x):
    covariance = LOADINGS @ LOADINGS.T + NOISE**2 * np.eye(4)
    _, log_det = np.linalg.slogdet(2 * np.pi * covariance)
    return -0.5 * np.sum(log_det + np.einsum("ni,ij,nj->n", x, np.linalg.inv(covariance), x))


def made_rows(n, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 2)) @ LOADINGS.T + NOISE * rng.normal(size=(n, 4))


def test_an_amortized_guide_finds_the_closed_form_posterior():
    """Without the score of the guide no noise is left at the optimum, so the fit is exact."""
    x, new = (made_rows(n, seed).astype(np.float32) for n, seed in ((200, 0), (7, 1)))
    vi = ab.vi(
        guide=encoder_guide, objective=ab.objectives.sticking_the_landing(),
        optimizer=optax.adam(optax.cosine_decay_schedule(0.05, 1000, 1e-3)), num_steps=1000,
        batch={"rows": 0, "x": 0}, batch_size=40, num_samples=500, progress_bar=False,
    )  # fmt: skip
    post = vi(decoder).posterior(jax.random.key(1), np.arange(200), given={"x": x})
    mean, scale = exact_posterior(x)
    net = {name.rpartition("/")[2]: v for name, v in post.params.items()}
    np.testing.assert_allclose(x @ net["weight"].T + net["bias"], mean, atol=5e-3)
    np.testing.assert_allclose(np.exp(net["log_scale"]), scale, rtol=5e-3)
    # every importance weight of the exact posterior is the evidence
    assert abs(post.diagnostics["elbo"] - log_evidence(x)) < 0.05
    # 400 means, at 1e-8 each
    assert (np.abs(post.mean("z") - mean) < 5.8 * scale / np.sqrt(500) + 5e-3).all()

    def draw(key):  # the same guide, for data it has not seen
        return encoder_guide.simulate(key, {"x": new}, np.arange(7), params=post.params)

    z = jax.vmap(lambda k: draw(k).choices["z"])(jax.random.split(jax.random.key(2), 4000))
    mean, _ = exact_posterior(new)
    assert (np.abs(z.mean(0) - mean) < 5.8 * scale / np.sqrt(4000) + 5e-3).all()
    np.testing.assert_allclose(z.std(0), np.broadcast_to(scale, (7, 2)), rtol=0.07)


def test_binary_pixels_are_no_jump():
    """Checks of the data inside a density must not pass for jumps of the cost in the latents."""

    @ab.model
    def binary(rows):
        def one(_):
            z = ab.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            ab.sample("x", dist.Bernoulli(logits=jnp.asarray(LOADINGS) @ z).to_event(1))

        jax.vmap(one)(rows)

    @ab.expectation
    def elbo(net, x, rows):
        z, log_q = ab.propose(guide, net, x)
        return ab.log_density(binary, {**z, "x": x}, rows) - log_q

    @ab.model
    def guide(net, x):
        jax.vmap(lambda x: ab.sample("z", dist.Normal(*net(x)).to_event(1)))(x)

    net, x = Encoder(jax.random.key(0)), jnp.zeros((3, 4), int)
    assert elbo.plan(net, x, jnp.arange(3)) == {"z": "ab.grad.reparam()"}


# ---------------------------------------------------------------- enumeration, element by element

CENTERS = np.array([-1.0, 0.5, 2.0])


@ab.model
def mixture(size, weights):
    def one(_):
        k = ab.sample("k", dist.Categorical(probs=weights))
        ab.sample("x", dist.Normal(jnp.asarray(CENTERS)[k], 0.7))

    jax.vmap(one)(jnp.arange(size))


@ab.model
def mixture_guide(x, net):
    def one(x):
        ab.sample("k", dist.Categorical(logits=net(x[None])))

    jax.vmap(one)(x)


def mixture_elbo(net, x):
    z, log_q = ab.propose(mixture_guide, x, net)
    weights = jnp.array([0.5, 0.3, 0.2])
    return ab.log_density(mixture, {**z, "x": x}, len(x), weights) - log_q


def exact_mixture_elbo(net, x):
    """Sums over the values of each element alone."""
    log_q = jax.nn.log_softmax(jax.vmap(lambda x: net(x[None]))(x))
    log_p = jnp.log(jnp.array([0.5, 0.3, 0.2])) + dist.Normal(CENTERS, 0.7).log_prob(x[:, None])
    return jnp.sum(jnp.exp(log_q) * (log_p - log_q))


def largest_difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs)


def test_enumeration_costs_the_alternatives_of_one_element(x64):
    net = eqx.nn.Linear(1, 3, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (300,))
    objective = ab.expectation(mixture_elbo, grad={"k": ab.grad.enum()})
    for size in (4, 300):
        plan = objective.plan(net, x[:size])
        assert plan == {"k": "ab.grad.enum(): summed out with 3 alternatives"}
    value, grads = objective.value_and_grad(jax.random.key(2), net, x)
    expected, exact = eqx.filter_value_and_grad(exact_mixture_elbo)(net, x)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    assert largest_difference(grads, exact) < 1e-7


def test_enumeration_multiplies_where_elements_meet(x64):
    """The same choices, in a cost that mixes three of them: all their combinations are run."""
    net = eqx.nn.Linear(1, 3, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3,))

    def mixing(net, x):
        z, _ = ab.propose(mixture_guide, x, net)
        return jnp.square(jnp.sum(jnp.asarray(CENTERS)[z["k"]] * x))

    def exact_mixing(net, x):
        q = jax.nn.softmax(jax.vmap(lambda x: net(x[None]))(x))
        total = (CENTERS * x[0])[:, None, None] + (CENTERS * x[1])[:, None] + CENTERS * x[2]
        return jnp.einsum("i,j,k,ijk->", *q, jnp.square(total))

    objective = ab.expectation(mixing, grad={"k": ab.grad.enum()})
    assert objective.plan(net, x) == {"k": "ab.grad.enum(): summed out with 27 alternatives"}
    value, grads = objective.value_and_grad(jax.random.key(2), net, x)
    expected, exact = eqx.filter_value_and_grad(exact_mixing)(net, x)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    assert largest_difference(grads, exact) < 1e-9


# ---------------------------------------------------------------- a number of objects, one by one

STEPS = 3
BRIGHTNESS = np.array([1.0, 0.7, 0.4])


def presence(logit):
    """Objects follow one another until one is absent; `logit(state)` of each presence."""

    def step(carry, brightness):
        total, present = carry
        present = jax.lax.cond(
            present == 1,
            lambda: ab.sample("present", dist.Bernoulli(logits=logit(total))),
            lambda: jnp.zeros((), int),
        )
        return (total + present * brightness, present), None

    (total, _), _ = jax.lax.scan(step, (jnp.zeros(()), jnp.ones((), int)), jnp.asarray(BRIGHTNESS))
    return total


@ab.model
def scene(size):
    def one(_):
        ab.sample("x", dist.Normal(presence(lambda _: 0.4), 0.3))

    jax.vmap(one)(jnp.arange(size))


@ab.model
def scene_guide(x, net):
    def one(x):
        presence(lambda total: net(jnp.stack([x, total]))[0])

    jax.vmap(one)(x)


def scene_elbo(net, x):
    z, log_q = ab.propose(scene_guide, x, net)
    return jnp.mean(ab.log_density(scene, {**z, "x": x}, len(x)) - log_q)


def exact_scene_elbo(net, x):
    """Sums over the number of objects of each scene."""

    def one(x):
        log_q = log_p = out = jnp.zeros(())
        total = 0.0
        for n in range(STEPS + 1):
            stop_q, stop_p = 0.0, 0.0
            if n < STEPS:
                logit = net(jnp.stack([x, total]))[0]
                stop_q, stop_p = jax.nn.log_sigmoid(-logit), jax.nn.log_sigmoid(-0.4)
            likelihood = dist.Normal(total, 0.3).log_prob(x)
            weight = log_p + stop_p + likelihood - log_q - stop_q
            out += jnp.exp(log_q + stop_q) * weight
            if n < STEPS:
                log_q, log_p = log_q + jax.nn.log_sigmoid(logit), log_p + jax.nn.log_sigmoid(0.4)
                total = total + BRIGHTNESS[n]
        return out

    return jnp.sum(jax.vmap(one)(x))


def scene_case():
    net = eqx.nn.MLP(2, 1, 5, 1, activation=jax.nn.tanh, key=jax.random.key(5))
    x = jnp.array([0.1, 0.9, 1.6, 2.2, 1.1])
    return net, x, eqx.filter_value_and_grad(exact_scene_elbo)(net, x)


def test_enumeration_of_a_sequence_of_guarded_choices(x64):
    net, x, (expected, exact) = scene_case()
    objective = ab.expectation(scene_elbo, grad={"present": ab.grad.enum()})
    assert objective.plan(net, x) == {"present": "ab.grad.enum(): summed out with 8 alternatives"}
    value, grads = objective.value_and_grad(jax.random.key(2), net, x)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    assert largest_difference(grads, exact) < 1e-9


def test_alternatives_of_a_sequence_of_guarded_choices(x64):
    net, x, (expected, exact) = scene_case()
    objective = ab.expectation(scene_elbo, grad={"present": ab.grad.mvd()})
    arrays, static = eqx.partition(net, eqx.is_array)

    def numbers(key):
        net = eqx.combine(arrays, static)
        value, grads = objective.value_and_grad(key, net, x)
        return jnp.concatenate([value[None], *(g.ravel() for g in jax.tree.leaves(grads))])

    n = 2000
    found = jax.jit(jax.vmap(numbers))(jax.random.split(jax.random.key(6), n))
    want = jnp.concatenate([expected[None], *(g.ravel() for g in jax.tree.leaves(exact))])
    z = (found.mean(0) - want) / (found.std(0) / np.sqrt(n))
    # 22 numbers at a false alarm of 1e-6 each
    assert float(jnp.max(jnp.abs(z))) < 4.9, z


# ---------------------------------------------------------------- minibatches

ROWS, BATCH = 12, 3
fixed_guide = pytest.mark.filterwarnings("ignore:ab.vi. Pareto k")  # and far from the posterior


@ab.model
def hierarchy(covariate):
    """A global latent, and a local one for each row."""
    mu = ab.sample("mu", dist.Normal(0.0, 1.0))

    def row(c):
        z = ab.sample("z", dist.Normal(mu + c, 1.0))
        ab.sample("x", dist.Normal(z, 0.5))

    jax.vmap(row)(covariate)


@ab.model
def hierarchy_guide(given, covariate):
    m = ab.param("m", 0.3)
    a = ab.param("a", 0.6)
    ab.sample("mu", dist.Normal(m, 0.4))
    jax.vmap(lambda x: ab.sample("z", dist.Normal(a * x, 0.8)))(given["x"])


def exact_hierarchy_elbo(m, a, x, covariate):
    """Term by term; each is `E log N(u; v, s)` of independent normals `u` and `v`."""

    def normal(bias, variance, s):
        return -0.5 * np.log(2 * np.pi) - jnp.log(s) - 0.5 * (bias**2 + variance) / s**2

    prior = normal(m, 0.4**2, 1.0) + jnp.sum(normal(a * x - m - covariate, 0.8**2 + 0.4**2, 1.0))
    likelihood = jnp.sum(normal(x - a * x, 0.8**2, 0.5))
    entropy = 0.5 * np.log(2 * np.pi) + 0.5 + np.log(np.array([0.4, *[0.8] * len(x)]))
    return prior + likelihood + entropy.sum()


@pytest.mark.slow
@fixed_guide
def test_the_objective_of_minibatches_has_the_mean_of_all_data(x64):
    """At parameters that do not move, and the derivative by a rate that hardly moves them."""
    rng = np.random.default_rng(3)
    covariate, x = rng.normal(size=ROWS), 2 * rng.normal(size=ROWS)
    steps, rate = 20_000, 1e-9
    vi = ab.vi(
        guide=hierarchy_guide, optimizer=optax.sgd(rate), num_steps=steps, num_samples=50,
        batch={"covariate": 0, "x": 0}, batch_size=BATCH, progress_bar=False,
    )  # fmt: skip
    post = vi(hierarchy).posterior(jax.random.key(7), covariate, given={"x": x})
    values = post.diagnostics["objective"]
    exact, slopes = jax.value_and_grad(exact_hierarchy_elbo, argnums=(0, 1))(0.3, 0.6, x, covariate)
    error = values.std() / np.sqrt(steps)
    assert error < 0.2  # of a value near -40: unscaled, the mean would be off by tens
    assert abs(values.mean() - exact) < 4.5 * error
    # By 20,000 derivatives written by hand, their standard deviations are 12 and 53.
    for start, end, slope, spread in zip(
        (0.3, 0.6), (post.params["m"], post.params["a"]), slopes, (13.0, 56.0), strict=True
    ):
        estimate = (float(end) - start) / (rate * steps)
        assert abs(estimate - float(slope)) < 4.5 * spread / np.sqrt(steps), (estimate, slope)


@fixed_guide
def test_a_batch_of_all_rows_is_the_objective_of_all_data(x64):
    rng = np.random.default_rng(4)
    covariate, x = rng.normal(size=ROWS), rng.normal(size=ROWS)
    vi = ab.vi(
        guide=hierarchy_guide, optimizer=optax.sgd(0.0), num_steps=4000, num_samples=50,
        batch={"covariate": 0, "x": 0}, batch_size=ROWS, progress_bar=False,
    )  # fmt: skip
    post = vi(hierarchy).posterior(jax.random.key(8), covariate, given={"x": x})
    values = post.diagnostics["objective"]
    exact = float(exact_hierarchy_elbo(0.3, 0.6, x, covariate))
    assert abs(values.mean() - exact) < 4.5 * values.std() / np.sqrt(4000)
