"""The log densities that `benchmarks.gradient` times: each as a model, and written by hand.

A case is a function without arguments that returns `(density, by_hand, choices, data)`. The density
and each of the hand-written ones (a tuple: where it is not obvious how to write it fastest, there
are two, and the faster counts) take `(choices, *data)`; the choices are a dict of arrays on the
constrained scale.
"""

import jax
import jax.numpy as jnp

import abduce as ab
import abduce.dist as dist

__all__ = ["CASES"]

NUM_ROWS, NUM_PREDICTORS, NUM_GROUPS, NUM_STEPS = 1000, 20, 40, 1000


def _normal(x, mean, sd):
    """Log density of a normal, elementwise."""
    return -0.5 * ((x - mean) / sd) ** 2 - jnp.log(sd) - 0.5 * jnp.log(2 * jnp.pi)


def _half_cauchy(x, scale):
    return jnp.log(2 / jnp.pi / scale) - jnp.log1p((x / scale) ** 2)


# ---------------------------------------------------------------- logistic regression with groups


@ab.model
def _logistic(X, group):
    tau = ab.sample("tau", dist.HalfNormal(1))
    beta = ab.sample("beta", dist.Normal(0, 1).expand([NUM_PREDICTORS]))
    intercept = ab.sample("intercept", dist.Normal(0, tau).expand([NUM_GROUPS]))
    return ab.sample("y", dist.Bernoulli(logits=X @ beta + intercept[group]))


def _logistic_by_hand(choices, X, group, y):
    tau, beta, intercept = choices["tau"], choices["beta"], choices["intercept"]
    logits = X @ beta + intercept[group]
    return (
        jnp.log(2.0) + _normal(tau, 0.0, 1.0)
        + _normal(beta, 0.0, 1.0).sum()
        + _normal(intercept, 0.0, tau).sum()
        + jnp.sum(y * logits - jax.nn.softplus(logits))
    )


def logistic():
    keys = jax.random.split(jax.random.key(0), 5)
    X = jax.random.normal(keys[0], (NUM_ROWS, NUM_PREDICTORS))
    group = jax.random.randint(keys[1], (NUM_ROWS,), 0, NUM_GROUPS)
    y = jax.random.bernoulli(keys[2], shape=(NUM_ROWS,)).astype(jnp.int32)
    choices = {
        "tau": jnp.asarray(0.7),
        "beta": jax.random.normal(keys[3], (NUM_PREDICTORS,)),
        "intercept": jax.random.normal(keys[4], (NUM_GROUPS,)),
    }

    def density(choices, X, group, y):
        return _logistic.log_density({**choices, "y": y}, X, group)

    return density, (_logistic_by_hand,), choices, (X, group, y)


# ---------------------------------------------------------------- eight schools


@ab.model
def _schools(sigma):
    mu = ab.sample("mu", dist.Normal(0, 5))
    tau = ab.sample("tau", dist.HalfCauchy(5))

    def school(s):
        theta = ab.sample("theta", dist.Normal(mu, tau))
        return ab.sample("y", dist.Normal(theta, s))

    return jax.vmap(school)(sigma)


def _schools_by_hand(choices, sigma, y):
    mu, tau, theta = choices["mu"], choices["tau"], choices["theta"]
    prior = _normal(mu, 0.0, 5.0) + _half_cauchy(tau, 5.0)
    return prior + jnp.sum(_normal(theta, mu, tau) + _normal(y, theta, sigma))


def schools():
    y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    choices = {"mu": jnp.asarray(4.0), "tau": jnp.asarray(3.0), "theta": 0.5 * y}

    def density(choices, sigma, y):
        return _schools.log_density({**choices, "y": y}, sigma)

    return density, (_schools_by_hand,), choices, (sigma, y)


# ---------------------------------------------------------------- a walk of 1000 steps


@ab.model
def _walk():
    step_sd = ab.sample("step_sd", dist.HalfNormal(1))
    noise_sd = ab.sample("noise_sd", dist.HalfNormal(1))

    def step(before, _):
        x = ab.sample("x", dist.Normal(0.9 * before, step_sd))
        y = ab.sample("y", dist.Normal(x, noise_sd))
        return x, y

    return jax.lax.scan(step, 0.0, length=NUM_STEPS)[1]


def _walk_terms(choices, y):
    """Stacks the terms of the steps, and sums them in the end."""
    step_sd, noise_sd = choices["step_sd"], choices["noise_sd"]

    def step(before, xy):
        x, y = xy
        return x, _normal(x, 0.9 * before, step_sd) + _normal(y, x, noise_sd)

    _, terms = jax.lax.scan(step, 0.0, (choices["x"], y))
    return _half_normals(step_sd, noise_sd) + terms.sum()


def _walk_carried(choices, y):
    """Carries the sum along."""
    step_sd, noise_sd = choices["step_sd"], choices["noise_sd"]

    def step(carry, xy):
        (before, total), (x, y) = carry, xy
        return (x, total + _normal(x, 0.9 * before, step_sd) + _normal(y, x, noise_sd)), None

    (_, total), _ = jax.lax.scan(step, (0.0, _half_normals(step_sd, noise_sd)), (choices["x"], y))
    return total


def _half_normals(a, b):
    return 2 * jnp.log(2.0) + _normal(a, 0.0, 1.0) + _normal(b, 0.0, 1.0)


def walk():
    keys = jax.random.split(jax.random.key(1), 2)
    choices = {
        "step_sd": jnp.asarray(0.5),
        "noise_sd": jnp.asarray(0.8),
        "x": 0.5 * jax.random.normal(keys[0], (NUM_STEPS,)),
    }
    y = choices["x"] + 0.8 * jax.random.normal(keys[1], (NUM_STEPS,))

    def density(choices, y):
        return _walk.log_density({**choices, "y": y})

    return density, (_walk_terms, _walk_carried), choices, (y,)


# ---------------------------------------------------------------- states made of innovations
# Above, all states are given, and nothing forces the density to visit them one after the other.
# Here the state is a function of every innovation before it, so that the scan cannot be avoided.


@ab.model
def _innovations():
    step_sd = ab.sample("step_sd", dist.HalfNormal(1))
    noise_sd = ab.sample("noise_sd", dist.HalfNormal(1))

    def step(x, _):
        x = jnp.tanh(0.9 * x) + step_sd * ab.sample("z", dist.Normal(0, 1))
        return x, ab.sample("y", dist.Normal(x, noise_sd))

    return jax.lax.scan(step, 0.0, length=NUM_STEPS)[1]


def _innovations_path(choices, y):
    """Scans for the path alone; the densities are those of whole arrays."""
    step_sd, noise_sd, z = choices["step_sd"], choices["noise_sd"], choices["z"]

    def step(x, z):
        x = jnp.tanh(0.9 * x) + step_sd * z
        return x, x

    _, path = jax.lax.scan(step, 0.0, z)
    total = _normal(z, 0.0, 1.0).sum() + _normal(y, path, noise_sd).sum()
    return _half_normals(step_sd, noise_sd) + total


def _innovations_carried(choices, y):
    """Carries the sum along."""
    step_sd, noise_sd = choices["step_sd"], choices["noise_sd"]

    def step(carry, zy):
        (x, total), (z, y) = carry, zy
        x = jnp.tanh(0.9 * x) + step_sd * z
        return (x, total + _normal(z, 0.0, 1.0) + _normal(y, x, noise_sd)), None

    (_, total), _ = jax.lax.scan(step, (0.0, _half_normals(step_sd, noise_sd)), (choices["z"], y))
    return total


def innovations():
    keys = jax.random.split(jax.random.key(2), 2)
    choices = {
        "step_sd": jnp.asarray(0.5),
        "noise_sd": jnp.asarray(0.8),
        "z": jax.random.normal(keys[0], (NUM_STEPS,)),
    }

    def density(choices, y):
        return _innovations.log_density({**choices, "y": y})

    by_hand = (_innovations_path, _innovations_carried)
    return density, by_hand, choices, (jax.random.normal(keys[1], (NUM_STEPS,)),)


CASES = {
    f"logistic regression, {NUM_ROWS} x {NUM_PREDICTORS}, {NUM_GROUPS} groups": logistic,
    "eight schools": schools,
    f"state space, scan of {NUM_STEPS} steps": walk,
    f"innovations, scan of {NUM_STEPS} steps": innovations,
}
