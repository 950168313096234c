"""Guided proposals: even weights where the auxiliary process is the truth, fair ones elsewhere."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

import abduce as ab
import abduce.dist as dist
from abduce.inference.smc import guiding
from abduce.inference.smc.guided import guided
from abduce.inference.smc.messages import GuidedGamma, log_kummer

T = 8


def even(post, log_evidence):
    """All weights equal at every step, and the evidence is exact."""
    spread = np.ptp(np.asarray(post.log_weights))
    assert spread < 1e-4
    assert np.asarray(post.diagnostics["ess"]).min() > (1 - 1e-4) * post.log_weights.size
    assert abs(post.log_evidence - log_evidence) < 1e-4


def drawn(guide, key, given, *args):
    """A guided path and its log weight."""
    shapes = guide.noise_shapes(given, *args)
    keys = jax.random.split(key, len(shapes))
    noise = {a: jax.random.normal(k, s) for k, (a, s) in zip(keys, shapes.items(), strict=True)}
    return guide.path(noise, given, *args)


# ---------------------------------------------------------------------- linear Gaussian


@ab.model
def level(a, q, r):
    x0 = ab.sample("x0", dist.Normal(0.0, 1.0))

    def step(x, _):
        x = ab.sample("x", dist.Normal(a * x + 0.1, q))
        ab.sample("y", dist.Normal(x, r))
        return x, None

    jax.lax.scan(step, x0, None, length=T)


def joint_gaussian(model, given, *args):
    """log p(given) of a linear Gaussian model, from the Hessian of its joint density."""
    latents = {
        a: jnp.zeros(s.shape) for a, s in model.program(*args).latents.items() if a not in given
    }
    flat, back = jax.flatten_util.ravel_pytree(latents)

    def joint(u):
        return model.log_density({**back(u), **given}, *args)

    value, slope, curvature = joint(flat), jax.grad(joint)(flat), jax.hessian(joint)(flat)
    gain = 0.5 * slope @ jnp.linalg.solve(-curvature, slope)
    _, log_det = jnp.linalg.slogdet(-curvature / (2 * jnp.pi))
    return float(value + gain - 0.5 * log_det)


ARGS = (0.9, 0.5, 0.3)
Y = np.array([0.4, -0.3, 1.2, 0.7, 0.2, -0.9, 0.1, 0.5])


@pytest.mark.parametrize("kind", ["linearized", "given", "transition given"])
def test_linear_gaussian_weights_are_the_evidence(kind, key, x64):
    observation = {"H": [[1.0]], "R": [[0.09]], "observed": "y"} if kind == "given" else {}
    auxiliary = (
        guiding.linearized("x")
        if kind == "linearized"
        else guiding.linear_gaussian("x", B=[[0.9]], b=[0.1], Q=[[0.25]], **observation)
    )
    guide = guided(level, auxiliary)
    mean, cov = level_moments(*ARGS)
    exact = scipy.stats.multivariate_normal(mean, cov).logpdf(Y)
    choices, log_weight = drawn(guide, key, {"y": Y}, *ARGS)
    assert abs(log_weight - exact) < 1e-6  # the weight of a path is that of a particle
    assert choices["x"].shape == (T,) and choices["x0"].shape == ()
    if kind != "linearized":
        return
    post = ab.smc(num_particles=32, proposal=guide)(level).posterior(key, *ARGS, given={"y": Y})
    even(post, exact)


def test_a_gap_in_the_data(key, x64):
    seen = jnp.arange(T) % 3 != 1
    missing = {"y": ab.masked(jnp.where(seen, Y, jnp.nan), seen)}
    observation = {"H": [[1.0]], "R": [[0.09]], "observed": "y"}
    for auxiliary in (
        guiding.linearized("x", num_iterations=0),
        guiding.linear_gaussian("x", B=[[0.9]], b=[0.1], Q=[[0.25]], **observation),
    ):
        guide = guided(level, auxiliary)
        weights = [
            guide.path(
                {"x0": jax.random.normal(k, (1,)), "x": jax.random.normal(k, (T, 1))},
                missing, *ARGS,
            )[1]
            for k in jax.random.split(key, 3)
        ]  # fmt: skip
        assert np.ptp(weights) < 1e-8
        mean, cov = level_moments(*ARGS)
        on = np.asarray(seen)
        exact = scipy.stats.multivariate_normal(mean[on], cov[np.ix_(on, on)]).logpdf(Y[on])
        assert abs(weights[0] - exact) < 1e-6


def level_moments(a, q, r):
    """Mean and covariance of the observations of `level`."""
    paths = np.zeros((T, T + 1))  # on x0 and the innovations
    mean, row, m = np.zeros(T), np.eye(T + 1)[0], 0.0
    for t in range(T):
        row = a * row
        row[t + 1] = q
        m = a * m + 0.1
        paths[t], mean[t] = row, m
    return mean, paths @ paths.T + r**2 * np.eye(T)


@ab.model
def plane(B, gains):
    x0 = ab.sample("x0", dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3)))

    def step(carry, gain):
        mean = B @ carry["x"] + 0.2 * carry["before"]
        x = ab.sample("x", dist.Normal(mean, jnp.array([0.5, 0.2, 0.1])).to_event(1))
        ab.sample("y", dist.Normal(gain @ x, 0.4).to_event(1))
        return {"x": x, "before": carry["x"]}, x.sum()

    jax.lax.scan(step, {"x": x0, "before": jnp.zeros(3)}, gains)


@pytest.mark.slow
def test_second_order_chain_in_three_dimensions(key, x64):
    """The message is on the whole carry, so two lags are exact; the gains vary in time."""
    B = jnp.array([[0.5, 0.3, 0.0], [0.0, 0.6, 0.3], [0.2, 0.0, 0.4]])
    gains = jax.random.normal(key, (T, 2, 3))
    y = jax.random.normal(jax.random.key(1), (T, 2))
    guide = guided(plane, guiding.linearized("x", num_iterations=0))
    weights = [drawn(guide, k, {"y": y}, B, gains)[1] for k in jax.random.split(key, 3)]
    want = joint_gaussian(plane, {"y": y}, B, gains)
    np.testing.assert_allclose(weights, want, atol=1e-6)


def test_float32(key):
    guide = guided(level, guiding.linearized("x", num_iterations=0))
    y = Y.astype("float32")
    weights = [
        drawn(guide, k, {"y": y}, 0.9, 0.5, 0.003)[1] for k in jax.random.split(key, 3)
    ]  # fmt: skip
    mean, cov = level_moments(0.9, 0.5, 0.003)
    want = scipy.stats.multivariate_normal(mean, cov).logpdf(Y)
    np.testing.assert_allclose(weights, want, atol=0.02)


# ---------------------------------------------------------------------- nonlinear


@ab.model
def counts():
    def step(x, _):
        x = ab.sample("x", dist.Normal(x + 0.3 * jnp.sin(x), 0.3))
        ab.sample("n", dist.Poisson(jnp.exp(2.0 + x)))
        return x, None

    jax.lax.scan(step, 0.0, None, length=T)


@pytest.mark.slow
def test_nonlinear_model_is_unbiased_and_better_than_bootstrap(key, x64):
    n = jnp.array([4, 9, 20, 35, 60, 40, 90, 70])
    guide = guided(counts, guiding.linearized("x"))
    run = jax.jit(lambda k: drawn(guide, k, {"n": n})[1])
    log_weights = np.asarray(jax.lax.map(run, jax.random.split(key, 4000), batch_size=1000))
    log_z = scipy.special.logsumexp(log_weights) - np.log(len(log_weights))
    relative = np.exp(log_weights - log_z)
    assert 1 / np.mean(relative**2) > 0.8  # effective share of guided paths; bootstrap: < 0.01
    # Reference: integration on a grid, to 1e-6.
    x = np.linspace(-4, 8, 1201)
    h = x[1] - x[0]
    forward = scipy.stats.norm.pdf(x, 0.0, 0.3)
    kernel = scipy.stats.norm.pdf(x[None], (x + 0.3 * np.sin(x))[:, None], 0.3) * h
    exact = 0.0
    for t, k in enumerate(np.asarray(n)):
        if t:
            forward = forward @ kernel
        forward = forward * scipy.stats.poisson.pmf(k, np.exp(2 + x))
        exact += np.log(forward.sum())
        forward /= forward.sum()
    exact += np.log(h)
    error = np.std(relative) / np.sqrt(len(relative))
    assert abs(log_z - exact) < 4.5 * error + 1e-5  # false alarm 7e-6

    smc = ab.smc(num_particles=256, threshold=0.0, proposal=guide)
    post = smc(counts).posterior(key, given={"n": n})
    assert post.diagnostics["ess"][-1] > 0.7 * 256
    assert abs(post.log_evidence - exact) < 0.2
    blind = ab.smc(num_particles=256, threshold=0.0)(counts).posterior(key, given={"n": n})
    assert blind.diagnostics["ess"][-1] < 0.1 * 256


@pytest.mark.slow
def test_euler_maruyama_with_a_linear_auxiliary(key, x64):
    """With the auxiliary diffusion the weights are fair; with the truth they are even."""
    dt = 0.1

    @ab.model
    def ou(bend):
        def step(x, _):
            drift = -0.8 * x + 0.5 + bend * jnp.sin(3 * x)
            x = ab.sample("x", dist.Normal(x + drift * dt, 0.4 * jnp.sqrt(dt)))
            ab.sample("y", dist.Normal(x, 0.1))
            return x, None

        jax.lax.scan(step, 0.0, None, length=20)

    seen = jnp.arange(20) == 19
    given = {"y": ab.masked(jnp.full(20, 1.3), seen)}
    auxiliary = guiding.diffusion(
        "x", B=[[-0.8]], beta=[0.5], sigma=[[0.4]], dt=dt, H=[[1.0]], R=[[0.01]], observed="y"
    )
    guide = guided(ou, auxiliary)
    keys = jax.random.split(key, 2000)
    run = jax.jit(jax.vmap(lambda k, bend: drawn(guide, k, given, bend)[1], (0, None)))
    even_weights = run(keys, 0.0)
    decay = 1 - 0.8 * dt
    mean = 0.5 * dt * sum(decay**i for i in range(20))
    var = 0.16 * dt * sum(decay ** (2 * i) for i in range(20)) + 0.01
    assert np.ptp(even_weights) < 1e-8
    assert abs(even_weights[0] - scipy.stats.norm(mean, var**0.5).logpdf(1.3)) < 1e-8
    bent = run(keys, 0.3)
    # Reference: the transition density of the discretised process, on a grid.
    x = np.linspace(-2, 4, 1501)
    step = x + (-0.8 * x + 0.5 + 0.3 * np.sin(3 * x)) * dt
    kernel = scipy.stats.norm.pdf(x[None], step[:, None], 0.4 * dt**0.5) * (x[1] - x[0])
    law = scipy.stats.norm.pdf(x, 0.5 * dt, 0.4 * dt**0.5)
    for _ in range(19):
        law = law @ kernel
    exact = np.log((law * scipy.stats.norm.pdf(1.3, x, 0.1)).sum() * (x[1] - x[0]))
    w = np.exp(np.asarray(bent) - exact)
    assert abs(w.mean() - 1) < 4.5 * w.std() / np.sqrt(len(w))
    assert 1 / np.mean((w / w.mean()) ** 2) > 0.5


# ---------------------------------------------------------------------- discrete


P = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
E = np.array([[0.8, 0.2], [0.4, 0.6], [0.1, 0.9]])


@ab.model
def hmm():
    z0 = ab.sample("z0", dist.Categorical(jnp.array([0.5, 0.3, 0.2])))

    def step(z, _):
        z = ab.sample("z", dist.Categorical(jnp.asarray(P)[z]))
        ab.sample("s", dist.Categorical(jnp.asarray(E)[z]))
        return z, None

    jax.lax.scan(step, z0, None, length=T)


SEEN = np.array([0, 1, 1, 0, 1, 1, 1, 0])


@pytest.mark.parametrize("kind", ["model", "given"])
def test_hidden_markov_model(kind, key, x64):
    options = {} if kind == "model" else {
        "transition": P, "emission": lambda s: jnp.log(jnp.asarray(E))[:, s], "observed": "s"
    }  # fmt: skip
    guide = guided(hmm, guiding.discrete("z", **options))
    forward = np.array([0.5, 0.3, 0.2])
    for s in SEEN:
        forward = (forward @ P) * E[:, s]
    weights = [drawn(guide, k, {"s": SEEN})[1] for k in jax.random.split(key, 3)]
    np.testing.assert_allclose(weights, np.log(forward.sum()), atol=1e-6)
    if kind == "model":
        post = ab.smc(num_particles=32, proposal=guide)(hmm).posterior(key, given={"s": SEEN})
        even(post, np.log(forward.sum()))


# ---------------------------------------------------------------------- trees

PARENTS = (-1, 0, 0, 1, 1, 2)  # node 0 has a prior; 3, 4, 5 are leaves
LEAVES = np.array([False, False, False, True, True, True])


@ab.model
def branching():
    def step(x, node):
        t, parent = node
        above = jnp.where(parent < 0, 0.0, x[parent])
        v = ab.sample("v", dist.Normal(0.9 * above, jnp.where(parent < 0, 1.0, 0.6)))
        ab.sample("y", dist.Normal(v, 0.3))
        return x.at[t].set(v), None

    n = len(PARENTS)
    jax.lax.scan(step, jnp.zeros(n), (jnp.arange(n), jnp.array(PARENTS)))


@pytest.mark.parametrize("kind", ["linearized", "parents"])
@pytest.mark.slow
def test_gaussian_tree(kind, key, x64):
    """Observed at all nodes, for the filter; and at the leaves alone."""
    n = len(PARENTS)
    Q = np.full((n, 1, 1), 0.36)
    auxiliary = (
        guiding.linearized("v", num_iterations=0)
        if kind == "linearized"
        else guiding.linear_gaussian(
            "v", B=[[0.9]], Q=Q, H=[[1.0]], R=[[0.09]], observed="y", parents=PARENTS
        )
    )
    guide = guided(branching, auxiliary)
    y = np.array([0.3, 0.8, -0.5, 1.1, 0.2, -0.6])
    cov = np.zeros((n, n))
    for i in range(n):
        p = PARENTS[i]
        if p < 0:
            cov[i, i] = 1.0
            continue
        cov[i, :i] = cov[:i, i] = 0.9 * cov[p, :i]
        cov[i, i] = 0.81 * cov[p, p] + 0.36
    if kind == "parents":
        everywhere = scipy.stats.multivariate_normal(np.zeros(n), cov + 0.09 * np.eye(n)).logpdf(y)
        post = ab.smc(num_particles=32, proposal=guide)(branching).posterior(key, given={"y": y})
        even(post, everywhere)
    at = np.ix_(LEAVES, LEAVES)
    want = scipy.stats.multivariate_normal(np.zeros(3), cov[at] + 0.09 * np.eye(3)).logpdf(y[3:])
    given = {"y": ab.masked(y, LEAVES)}
    weights = [drawn(guide, k, given)[1] for k in jax.random.split(key, 3)]
    np.testing.assert_allclose(weights, want, atol=1e-6)


@ab.model
def colours():
    def step(z, node):
        t, parent = node
        table = jnp.asarray(P)
        p = jnp.where(parent < 0, jnp.array([0.5, 0.3, 0.2]), table[z[parent]])
        k = ab.sample("k", dist.Categorical(p))
        ab.sample("s", dist.Categorical(jnp.asarray(E)[k]))
        return z.at[t].set(k), None

    n = len(PARENTS)
    jax.lax.scan(step, jnp.zeros(n, int), (jnp.arange(n), jnp.array(PARENTS)))


@pytest.mark.slow
def test_discrete_tree(key, x64):
    s = np.array([0, 1, 0, 1, 1, 0])
    guide = guided(colours, guiding.discrete("k", parents=PARENTS))
    post = ab.smc(num_particles=32, proposal=guide)(colours).posterior(key, given={"s": s})
    total = 0.0
    for ks in itertools.product(range(3), repeat=len(PARENTS)):
        w = [0.5, 0.3, 0.2][ks[0]] * E[ks[0], s[0]]
        for i, p in list(enumerate(PARENTS))[1:]:
            w *= P[ks[p], ks[i]] * E[ks[i], s[i]]
        total += w
    even(post, np.log(total))


# ---------------------------------------------------------------------- gamma increments


@pytest.mark.parametrize(
    ("a", "b", "z"), [(0.3, 2.0, -5.0), (0.3, 2.0, 5.0), (2.0, 3.5, -70.0), (0.1, 5.0, 200.0)]
)
def test_confluent_hypergeometric_function(a, b, z, x64):
    assert abs(log_kummer(a, b, z) - np.log(scipy.special.hyp1f1(a, b, z))) < 1e-10


@pytest.mark.slow
def test_tilted_beta_draws(key, x64):
    """Means of 2,500 draws within 4.5 standard errors (false alarm 7e-6 each)."""
    a, A = np.array([0.4, 0.4, 0.5, 0.1]), np.array([2.5, 2.5, 0.2, 5.0])
    xi = np.array([-6.0, 30.0, 40.0, -200.0])
    d = GuidedGamma(jnp.ones(4), jnp.asarray(a), jnp.asarray(A), jnp.asarray(xi))
    z = np.asarray(jax.jit(lambda k: d.sample(k, (2500,)))(key))
    f = scipy.special.hyp1f1
    mean = a / (a + A) * f(a + 1, a + A + 1, -xi) / f(a, a + A, -xi)
    assert np.all(np.abs(z.mean(0) - mean) < 4.5 * z.std(0) / 50)


@pytest.mark.slow
def test_gamma_increments(key, x64):
    """One rate: even weights, and the evidence of the end; another rate: fair ones."""

    @ab.model
    def rise(bend):
        def step(x, _):
            inc = ab.sample("inc", dist.Gamma(0.7, 2.0 + bend * jnp.exp(-x)))
            return x + inc, None

        x, _ = jax.lax.scan(step, 0.5, None, length=T)
        shift = dist.transforms.AffineTransform(x, 1.0, domain=dist.constraints.positive)
        ab.sample("end", dist.TransformedDistribution(dist.Gamma(1.5, 2.0), shift))

    guide = guided(rise, guiding.gamma("inc", end=4.0, shape=1.5, rate=2.0))
    run = jax.jit(
        jax.vmap(lambda k, b: rise.generate(k, {"end": 4.0}, b, proposal=guide)[1], (0, None))
    )
    weights = run(jax.random.split(key, 500), 0.0)
    want = scipy.stats.gamma(0.7 * T + 1.5, scale=0.5).logpdf(3.5)
    assert np.ptp(weights) < 1e-6 and abs(weights[0] - want) < 1e-6
    bent = np.exp(np.asarray(run(jax.random.split(key, 500), 1.0)))
    # Reference: plain simulation.
    rng = np.random.default_rng(0)
    x = np.full(100_000, 0.5)
    for _ in range(T):
        x = x + rng.gamma(0.7, 1 / (2 + np.exp(-x)))
    plain = scipy.stats.gamma(1.5, scale=0.5).pdf(4.0 - x)
    error = np.hypot(bent.std() / len(bent) ** 0.5, plain.std() / len(plain) ** 0.5)
    assert abs(bent.mean() - plain.mean()) < 4.5 * error
    assert bent.mean() ** 2 / np.mean(bent**2) > 0.9


# ---------------------------------------------------------------------- other uses


@pytest.mark.slow
def test_nuts_on_the_noise(key, x64):
    """In noise coordinates a linear Gaussian posterior is standard normal."""
    guide = guided(level, guiding.linearized("x", num_iterations=0))
    nuts = ab.nuts(num_warmup=150, num_samples=400, num_chains=2, progress_bar=False)
    post = nuts(guide.in_noise).posterior(key, {"y": Y}, *ARGS)
    mean, cov = level_moments(*ARGS)
    cross = cov - 0.09 * np.eye(T)
    want = mean + cross @ np.linalg.solve(cov, Y - mean)
    sd = np.sqrt(np.diag(cross - cross @ np.linalg.solve(cov, cross)))
    x = np.asarray(post["x"]).reshape(-1, T)
    # 800 draws, at worst as good as 400 independent ones: 5 standard errors, 8 numbers (5e-6).
    assert np.all(np.abs(x.mean(0) - want) < 5 * sd / 20)


@pytest.mark.slow
def test_whole_paths_as_proposals(key, x64):
    """Exact proposals: equal importance weights, and Metropolis-Hastings accepts all."""
    guide = guided(level, guiding.linearized("x", num_iterations=0))
    weigh = ab.importance(num_samples=20, proposal=guide)
    post = weigh(level).posterior(key, *ARGS, given={"y": Y})
    assert np.ptp(np.asarray(post.log_weights)) < 1e-8
    settings = {"num_warmup": 0, "num_samples": 10, "num_chains": 2, "progress_bar": False}
    post = ab.mh(proposal=guide, **settings)(level).posterior(key, *ARGS, given={"y": Y})
    assert np.all(np.asarray(post.diagnostics["acceptance_rate"]) == 1)


def test_steps_that_depend_on_a_latent_are_refused(key):
    @ab.model
    def unknown_slope():
        a = ab.sample("a", dist.Normal(0.0, 1.0))

        def step(x, _):
            x = ab.sample("x", dist.Normal(a * x, 1.0))
            ab.sample("y", dist.Normal(x, 1.0))
            return x, None

        jax.lax.scan(step, 0.0, None, length=T)

    guide = guided(unknown_slope, guiding.linearized("x", num_iterations=0))
    with pytest.raises(ab.InvalidModel, match=r"latent 'a'.*ab\.condition"):
        guide.noise_shapes({"y": Y})
    known = guided(
        ab.condition(unknown_slope, {"a": 0.5}), guiding.linearized("x", num_iterations=0)
    )
    assert np.isfinite(drawn(known, key, {"y": Y})[1])
    assert np.isfinite(drawn(guide, key, {"y": Y, "a": 0.5})[1])


def test_messages_name_what_is_wrong(key):
    with pytest.raises(ab.UnknownAddress, match=r"'lvel'.*\(there are x0, x\)"):
        guided(level, guiding.linearized("lvel")).noise_shapes({"y": Y}, *ARGS)
    with pytest.raises(ab.InvalidModel, match=r"'z0'.*Categorical.*ab\.guiding"):
        drawn(guided(hmm, guiding.linear_gaussian("z", B=[[1.0]], Q=[[1.0]])), key, {"s": SEEN})
    with pytest.raises(ab.InvalidValue, match="parent of node 1 is 3"):
        drawn(
            guided(level, guiding.discrete("x", parents=(-1, 3, *range(6)))), key, {"y": Y}, *ARGS
        )
    guide = guided(level, guiding.linearized("x", num_iterations=0))
    with pytest.raises(ab.InvalidValue, match=r"noise\['x'\] must have shape \(8, 1\)"):
        guide.path({"x0": jnp.zeros(1), "x": jnp.zeros(3)}, {"y": Y}, *ARGS)
    with pytest.raises(ab.InvalidValue, match="auxiliary= takes one of"):
        guided(level, "x")
