"""What the compiled programs of NUTS and of HMC share.

Both are one loop that makes one leapfrog step a turn; see `trajectory`. Momenta live in the
coordinates of `linear_map`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .linear_map import LinearMap, pull, push

__all__ = [
    "MAX_ENERGY_ERROR",
    "STATS",
    "Controls",
    "DualAverage",
    "Edge",
    "LogDensity",
    "Point",
    "Result",
    "adapted",
    "dot",
    "kick",
    "log_weight",
    "move",
    "num_rows",
    "write_row",
]

LogDensity = Callable[[Any, jax.Array], jax.Array]

STATS = ("lp", "energy", "n_steps", "tree_depth", "acceptance_rate", "diverging", "step_size")
MAX_ENERGY_ERROR = 1000.0  # nats; a leaf worse than this is a divergence
_DELAY, _FORGETTING = 10.0, 0.75  # t0, kappa of Hoffman and Gelman (2014)


class Controls(NamedTuple):
    """What a call may change without compiling."""

    integers: Any  # int32 (5,): num_draws, thinning, max_depth, adapt (0 or 1), num_steps
    reals: Any  # (2,): wanted acceptance rate, trajectory length (both lengths only for HMC)


class DualAverage(NamedTuple):
    """Step-size adaptation (Hoffman and Gelman, 2014, section 3.2); scalars."""

    log_step: Any  # in use
    log_step_average: Any
    error_average: Any
    count: Any
    center: Any  # mu: where log_step is pulled to
    shrinkage: Any  # gamma: larger is smoother


class Result(NamedTuple):
    """What a call hands back, in few arrays, because each costs microseconds to fetch."""

    rows: jax.Array  # (num_rows, 2 dim + len(STATS)): position, gradient, statistics
    state: jax.Array  # (2 dim + 7,): position, gradient, log density, `DualAverage`
    counts: jax.Array  # int32 (2,): draws so far, for the next call; evaluations in this call


class Point(NamedTuple):
    position: jax.Array
    log_density: jax.Array
    gradient: jax.Array
    energy_error: jax.Array  # H(start) - H(here)


class Edge(NamedTuple):
    position: jax.Array
    momentum: jax.Array
    force: jax.Array  # gradient with respect to z


def num_rows(dim: int) -> int:
    """Rows of the buffer that a call fills; bounded by a few MiB."""
    return int(np.clip((1 << 20) // (2 * dim + len(STATS)), 16, 1024))


def move(edge: Edge, forward, log_step, done, metric: LinearMap):
    """The first half of a leapfrog step: half a kick, then the drift."""
    step = jnp.exp(log_step) * jnp.where(forward == 1, 1, -1).astype(log_step.dtype)
    step = jnp.where(done < 0, 0, step)
    halfway = edge.momentum + 0.5 * step * edge.force
    return halfway, edge.position + step * push(metric, halfway), step


def kick(halfway, step, gradient, metric: LinearMap) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The second half of a leapfrog step: momentum, force and kinetic energy."""
    force = pull(metric, gradient)
    momentum = halfway + 0.5 * step * force
    return momentum, force, 0.5 * dot(momentum, momentum)


def log_weight(value, kinetic, start, starting) -> tuple[jax.Array, jax.Array]:
    """`H(start) - H(here)` in nats, `-inf` after a divergence; and whether it diverged."""
    # differences to the start, not totals: in float32 a log density of -1e5 has a grain of 0.008
    error = jnp.where(starting, 0, (value - start[0]) + (start[1] - kinetic))
    diverged = ~((error > -MAX_ENERGY_ERROR) & (error < jnp.inf))  # also NaN
    return jnp.where(diverged, -jnp.inf, error), diverged


def adapted(average: DualAverage, controls: Controls, rate, starting) -> DualAverage:
    """The step-size adaptation after a draw with this acceptance rate."""
    a, error = average, controls.reals[0] - rate
    count = a.count + 1
    share = 1 / (count + _DELAY)
    error_average = (1 - share) * a.error_average + share * error
    log_step = a.center - jnp.sqrt(count) / a.shrinkage * error_average
    keep = count**-_FORGETTING
    new = DualAverage(
        log_step,
        keep * log_step + (1 - keep) * a.log_step_average,
        error_average,
        count,
        a.center,
        a.shrinkage,
    )
    adapt = (controls.integers[3] > 0) & ~starting
    return jax.tree.map(lambda x, y: jnp.where(adapt, x, y), new, average)


def write_row(rows, point: Point, stats, done, controls: Controls) -> jax.Array:
    """Writes the current point where the draw in progress belongs.

    Done on every turn, so that the last turn of a draw has the last word: inside a branch XLA
    would copy the buffer.
    """
    row = lax.div(jnp.maximum(done, 0), controls.integers[1])
    record = jnp.concatenate([point.position, point.gradient, stats])
    return lax.dynamic_update_slice_in_dim(rows, record[None], row, 0)


def dot(a, b):
    """The inner product, summed in a way that a single kernel can vectorize."""
    lanes = 16
    blocks = a.shape[0] // lanes
    products = a * b
    if blocks < 2:
        return jnp.sum(products)
    head = jnp.sum(jnp.sum(products[: blocks * lanes].reshape(blocks, lanes), 0))
    return head + jnp.sum(products[blocks * lanes :])
