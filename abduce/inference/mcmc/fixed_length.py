"""HMC with trajectories of a fixed length (Neal, arXiv 1206.1901), as the state machine of NUTS.

Where a length is given rather than a number of steps, each draw multiplies it by a number between
0.8 and 1.2, so that no direction of the posterior can be in resonance with it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .counter_random import normals, threefry, uniform
from .linear_map import LinearMap, pull
from .machine import (
    STATS,
    Controls,
    DualAverage,
    Edge,
    LogDensity,
    Point,
    Result,
    adapted,
    dot,
    kick,
    log_weight,
    move,
    num_rows,
    write_row,
)
from .single_kernel import single_kernel

__all__ = ["run_hmc"]

_MOST_STEPS = 1023  # of a trajectory given by its length


class _Machine(NamedTuple):
    done: jax.Array  # draws finished in this call; -1 while the start is evaluated
    draw: jax.Array
    average: DualAverage
    edge: Edge
    start: jax.Array  # (2,): log density and kinetic energy at the start of the trajectory
    point: Point  # the last draw
    step: jax.Array  # steps made in this trajectory
    steps: jax.Array  # steps to make
    stats: jax.Array
    rows: jax.Array
    num_gradients: jax.Array


@partial(jax.jit, static_argnames=("log_density", "max_depth", "on_cpu"))
def run_hmc(
    log_density: LogDensity,
    data: Any,
    seed: jax.Array,
    draw: jax.Array,
    position: jax.Array,
    average: jax.Array,
    controls: Controls,
    metric: LinearMap,
    *,
    max_depth: int,
    on_cpu: bool,
) -> Result:
    """Makes `num_draws` draws of one chain; arguments and result as in `run_nuts`.

    `controls` hold the number of steps, or 0 and the length of a trajectory; `max_depth` is not
    used, and the one in `controls` bounds the number of steps by a power of two.
    """
    evaluate = jax.value_and_grad(log_density, argnums=1)
    step_to = single_kernel(move, on_cpu)
    settle = single_kernel(_settle, on_cpu)
    forward = jnp.ones((), jnp.int32)

    def turn(m: _Machine) -> _Machine:
        halfway, position, step = step_to(m.edge, forward, m.average.log_step, m.done, metric)
        value, gradient = evaluate(data, position)
        return settle(m, halfway, step, position, value, gradient, seed, controls, metric)

    start = _initial(position, draw.astype(jnp.uint32), DualAverage(*average))
    m = lax.while_loop(lambda m: m.done < controls.integers[0], turn, start)
    return Result(
        m.rows,
        jnp.concatenate(
            [m.point.position, m.point.gradient, m.point.log_density[None], jnp.stack(m.average)]
        ),
        jnp.stack([m.draw.astype(jnp.int32), m.num_gradients]),
    )


def _initial(position, draw, average) -> _Machine:
    dim, dtype = position.shape[0], position.dtype
    zero, zeros, count = jnp.zeros((), dtype), jnp.zeros(dim, dtype), jnp.zeros((), jnp.int32)
    return _Machine(
        done=count - 1,
        draw=draw,
        average=average,
        edge=Edge(position, zeros, zeros),
        start=jnp.zeros(2, dtype),
        point=Point(position, zero, zeros, zero),
        step=count,
        steps=count + 1,
        stats=jnp.zeros(len(STATS), dtype),
        rows=jnp.zeros((num_rows(dim), 2 * dim + len(STATS)), dtype),
        num_gradients=count,
    )


def _settle(
    m: _Machine,
    halfway,
    step,
    position,
    value,
    gradient,
    seed,
    controls: Controls,
    metric: LinearMap,
) -> _Machine:
    """The second kick, then the end of the trajectory if this was its last step."""
    momentum, force, kinetic = kick(halfway, step, gradient, metric)
    error, diverged = log_weight(value, kinetic, m.start, m.done < 0)
    end = Point(position, value, gradient, error)
    rows, done = m.rows, m.done
    m = m._replace(
        edge=Edge(position, momentum, force),
        step=m.step + 1,
        rows=None,
        num_gradients=m.num_gradients + 1,
    )
    m = lax.cond(
        diverged | (m.step >= m.steps),
        lambda m: _next_draw(m, end, diverged, seed, controls, metric),
        lambda m: m,
        m,
    )
    return m._replace(rows=write_row(rows, m.point, m.stats, done, controls))


def _next_draw(
    m: _Machine, end: Point, diverged, seed, controls: Controls, metric: LinearMap
) -> _Machine:
    """Accepts or rejects the end, adapts the step size, draws a new momentum."""
    dtype, starting = m.start.dtype, m.done < 0
    words = threefry(seed, m.draw, jnp.zeros((), jnp.uint32))
    take = starting | (jnp.log(uniform(words.first, dtype)) < end.energy_error)
    point = jax.tree.map(partial(jnp.where, take), end, m.point)
    rate = jnp.minimum(1, jnp.exp(end.energy_error))
    energy = m.start[1] - m.start[0] - jnp.where(take, end.energy_error, 0)
    stats = jnp.stack(
        [
            point.log_density,
            energy,
            m.step.astype(dtype),
            jnp.zeros((), dtype),
            rate,
            diverged.astype(dtype),
            jnp.exp(m.average.log_step),
        ]
    )
    draw = m.draw + jnp.where(starting, 0, 1).astype(m.draw.dtype)
    momentum, _ = normals(seed, draw, point.position.shape[0], dtype)
    average = adapted(m.average, controls, rate, starting)
    jitter = 0.8 + 0.4 * uniform(threefry(seed, draw, jnp.ones((), jnp.uint32)).first, dtype)
    wanted = jnp.ceil(controls.reals[1] * jitter / jnp.exp(average.log_step))
    steps = jnp.clip(wanted, 1, _MOST_STEPS).astype(jnp.int32)
    steps = jnp.where(controls.integers[4] > 0, controls.integers[4], steps)
    return m._replace(
        done=m.done + 1,
        draw=draw,
        average=average,
        point=point,
        stats=stats,
        edge=Edge(point.position, momentum, pull(metric, point.gradient)),
        start=jnp.stack([point.log_density, 0.5 * dot(momentum, momentum)]),
        step=jnp.zeros_like(m.step),
        steps=jnp.minimum(steps, 1 << controls.integers[2]),
    )
