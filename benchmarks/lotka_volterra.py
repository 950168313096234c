"""The predator-prey equations, solved with a fixed number of Runge-Kutta steps.

du/dt = (alpha - beta v) u and dv/dt = (-gamma + delta u) v are integrated for (log u, log v): the
solution stays positive, and the likelihood wants logarithms anyway. One `lax.scan` over all steps
compiles fast and has a reverse-mode derivative. Four steps a year leave the log likelihood within
0.006 of that of 512 steps, over the 1000 stored draws of the reference posterior. All packages
call this same function, so that the comparison is about samplers and not about solvers.
"""

import jax
import jax.numpy as jnp

__all__ = ["NUM_SUBSTEPS", "log_populations"]

NUM_SUBSTEPS = 4


def log_populations(theta, z_init, ts, num_substeps: int = NUM_SUBSTEPS):
    """Log populations at the times `ts`, starting from `z_init` at time 0.

    Args:
        theta: (alpha, beta, gamma, delta), per year, shape `(4,)`.
        z_init: Prey and predator at time 0, positive, shape `(2,)`.
        ts: Increasing positive times, in years, shape `(num_times,)`.
        num_substeps: Runge-Kutta steps between two neighbouring times.

    Returns:
        Array of shape `(num_times, 2)`: log prey, log predator.
    """
    growth = jnp.stack([theta[0], -theta[2]])
    coupling = jnp.stack([-theta[1], theta[3]])

    def slope(log_z):
        return growth + coupling * jnp.exp(log_z[::-1])

    def step(log_z, h):
        k1 = slope(log_z)
        k2 = slope(log_z + 0.5 * h * k1)
        k3 = slope(log_z + 0.5 * h * k2)
        k4 = slope(log_z + h * k3)
        log_z = log_z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return log_z, log_z

    steps = jnp.repeat(jnp.diff(ts, prepend=0.0) / num_substeps, num_substeps)
    _, path = jax.lax.scan(step, jnp.log(z_init), steps)
    return path[num_substeps - 1 :: num_substeps]
