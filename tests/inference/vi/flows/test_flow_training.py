"""Flows fitted by reverse KL divergence to densities whose normalizer is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from abduce.inference.vi import flows


def fitted(flow, energy, key, num_steps, num_draws=128, rate=1e-2):
    """The flow after Adam on `E_q[log q + energy]`, and `log q + energy` of fresh draws."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))

    def values(flow, key, n):
        x, log_q = flows.distribution(flow).sample_and_log_prob(key, (n,))
        return log_q + jax.vmap(energy)(x)

    def step(carry, key):
        flow, state = carry
        gradient = jax.grad(lambda f: jnp.mean(values(f, key, num_draws)))(flow)
        update, state = optimizer.update(gradient, state)
        return (optax.apply_updates(flow, update), state), None

    @jax.jit
    def run(flow, key):
        keys = jax.random.split(key, num_steps)
        (flow, _), _ = jax.lax.scan(step, (flow, optimizer.init(flow)), keys)
        return flow, values(flow, jax.random.fold_in(key, 1), 20_000)

    return run(flow, key)


def two_moons(z):
    """The first energy of Rezende and Mohamed (2015), table 1."""
    ring = 0.5 * ((jnp.linalg.norm(z) - 2) / 0.4) ** 2
    left, right = (-0.5 * ((z[0] - c) / 0.6) ** 2 for c in (-2.0, 2.0))
    return ring - jnp.logaddexp(left, right)


def test_divergence_falls_with_the_number_of_planar_layers():
    n, width = 400, 6.0
    x = (np.arange(n) + 0.5) / n * 2 * width - width
    grid = np.stack(np.meshgrid(x, x), -1).reshape(-1, 2)
    log_z = math.log(np.exp(-jax.vmap(two_moons)(grid)).sum() * (2 * width / n) ** 2)

    found = {}
    for k in (2, 8):
        flow = flows.planar(jax.random.key(0), 2, k)
        _, values = fitted(flow, two_moons, jax.random.key(1), num_steps=1500)
        found[k] = float(values.mean()) + log_z
    # Monte Carlo errors are below 0.01
    assert found[2] > 0.15
    assert found[8] < 0.6 * found[2]
    assert found[8] > -0.02


def test_a_matrix_fits_a_correlated_normal_exactly():
    scale_tril = jnp.array([[2.0, 0.0, 0.0], [-1.0, 0.5, 0.0], [0.3, 0.4, 1.5]])
    loc = jnp.array([1.0, -2.0, 0.5])

    def energy(x):
        z = jax.scipy.linalg.solve_triangular(scale_tril, x - loc, lower=True)
        return 0.5 * z @ z

    log_z = 1.5 * math.log(2 * math.pi) + float(jnp.sum(jnp.log(jnp.diag(scale_tril))))
    flow, values = fitted(
        flows.LU(jax.random.key(0), 3), energy, jax.random.key(1), 2500, num_draws=32, rate=3e-2
    )
    assert float(values.mean()) + log_z == pytest.approx(0, abs=2e-3)
    matrix = jax.jacfwd(lambda x: flow.forward(x)[0])(jnp.zeros(3))
    np.testing.assert_allclose(matrix @ matrix.T, scale_tril @ scale_tril.T, atol=0.05)
    np.testing.assert_allclose(flow.shift, loc, atol=0.05)
