"""NUTS as a state machine that makes one leapfrog step per turn.

The no-U-turn sampler with multinomial sampling along the trajectory (Betancourt, arXiv 1701.02434)
and iterative tree doubling (Phan, Pradhan and Jankowiak, arXiv 1912.11554). Instead of three nested
loops (draws, doublings, leapfrog steps) there is one: each turn makes one step, with the only
evaluation of the log density in the program, then closes whatever the step has completed: a
subtree, a trajectory, or nothing. So the gradient is compiled once, chains under `vmap` need not
wait for the longest tree, and the number of draws is an argument.

A call starts with a turn of step size zero that evaluates the starting point; it is not recorded.

Words used: a *leaf* is a state reached by one leapfrog step; a *subtree* is the half that the
current doubling adds; the *tree* is everything before it. `weight` is the log of a sum of
`exp(H(start) - H(leaf))`.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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

__all__ = ["run_nuts"]


class _Tree(NamedTuple):
    point: Point  # drawn from the leaves
    weight: jax.Array
    momentum_sum: jax.Array


class _Machine(NamedTuple):
    done: jax.Array  # draws finished in this call; -1 while the start is evaluated
    draw: jax.Array
    average: DualAverage
    edge: Edge  # where the next step starts
    ends: Edge  # leading axis 2: backward end, forward end of the tree
    forward: jax.Array  # int32, 0 or 1: which end is being extended
    start: jax.Array  # (2,): log density and kinetic energy at the start of the trajectory
    tree: _Tree
    subtree: _Tree
    checkpoints: jax.Array  # (max_depth + 1, 3, dim): see `_turns_inside`
    leaf: jax.Array  # leaves in the subtree
    leaves: jax.Array  # leaves in the trajectory
    depth: jax.Array
    acceptance: jax.Array  # sum over the leaves of the trajectory
    stats: jax.Array
    rows: jax.Array
    num_gradients: jax.Array


@partial(jax.jit, static_argnames=("log_density", "max_depth", "on_cpu"))
def run_nuts(
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
    """Makes `num_draws` draws of one chain.

    Args:
        log_density: `(data, position) -> scalar`; static, so it must be hashable and stable.
        data: Any pytree of arrays.
        seed: uint32, shape `(2,)`.
        draw: int32 scalar: draws made before. Numbers are a function of `(seed, draw)`.
        position: Start, shape `(dim,)`.
        average: State of the step-size adaptation, the fields of `DualAverage`, shape `(6,)`.
        controls: See `Controls`; `num_draws` at most `num_rows(dim) * thinning`.
        metric: The linear map.
        max_depth: Largest number of doublings (static).
        on_cpu: Emit the bookkeeping as single kernels (static).

    Returns:
        A `Result`. With `num_draws=0` it only evaluates `position`.
    """
    evaluate = jax.value_and_grad(log_density, argnums=1)
    step_to = single_kernel(move, on_cpu)
    settle = single_kernel(_settle, on_cpu)

    def turn(m: _Machine) -> _Machine:
        halfway, position, step = step_to(m.edge, m.forward, m.average.log_step, m.done, metric)
        value, gradient = evaluate(data, position)
        return settle(m, halfway, step, position, value, gradient, seed, controls, metric)

    start = _initial(position, draw.astype(jnp.uint32), DualAverage(*average), max_depth)
    m = lax.while_loop(lambda m: m.done < controls.integers[0], turn, start)
    point = m.tree.point
    return Result(
        m.rows,
        jnp.concatenate(
            [point.position, point.gradient, point.log_density[None], jnp.stack(m.average)]
        ),
        jnp.stack([m.draw.astype(jnp.int32), m.num_gradients]),
    )


def _initial(position, draw, average, max_depth) -> _Machine:
    dim, dtype = position.shape[0], position.dtype
    zero, zeros = jnp.zeros((), dtype), jnp.zeros(dim, dtype)
    low = jnp.array(-jnp.inf, dtype)
    point = Point(position, zero, zeros, zero)
    tree = _Tree(point, low, zeros)
    edge = Edge(position, zeros, zeros)
    count = jnp.zeros((), jnp.int32)
    return _Machine(
        done=count - 1,
        draw=draw,
        average=average,
        edge=edge,
        ends=jax.tree.map(lambda x: jnp.stack([x, x]), edge),
        forward=count,
        start=jnp.zeros(2, dtype),
        tree=tree,
        subtree=tree,
        checkpoints=jnp.zeros((max_depth + 1, 3, dim), dtype),
        leaf=count,
        leaves=count,
        depth=count,
        acceptance=zero,
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
    """The second kick, then everything that the new leaf completes."""
    dtype, starting = m.start.dtype, m.done < 0
    momentum, force, kinetic = kick(halfway, step, gradient, metric)
    error, diverged = log_weight(value, kinetic, m.start, starting)

    # multinomial draw from the leaves of the subtree
    words = threefry(seed, m.draw, m.leaves.astype(jnp.uint32))
    weight = jnp.logaddexp(m.subtree.weight, error)
    take = jnp.log(uniform(words.first, dtype)) < error - weight
    point = Point(position, value, gradient, error)
    point = jax.tree.map(partial(jnp.where, take), point, m.subtree.point)
    momentum_sum = m.subtree.momentum_sum + momentum

    checkpoints = _store(m, momentum)
    turned = _turns_inside(checkpoints, m.leaf, momentum, momentum_sum)
    m = m._replace(
        edge=Edge(position, momentum, force),
        subtree=_Tree(point, weight, momentum_sum),
        checkpoints=checkpoints,
        leaf=m.leaf + 1,
        leaves=m.leaves + 1,
        acceptance=m.acceptance + jnp.minimum(1, jnp.exp(error)),
        num_gradients=m.num_gradients + 1,
    )

    complete = ~(diverged | turned)
    rows, done, first = m.rows, m.done, checkpoints[0, 0]
    # buffers stay outside the branches: XLA would copy them
    small = lax.cond(
        ~complete | (m.leaf == 1 << m.depth),
        lambda s: _close_subtree(
            s, first, complete, diverged, words.second, seed, controls, metric
        ),
        lambda s: s,
        m._replace(rows=None, checkpoints=None),
    )
    rows = write_row(rows, small.tree.point, small.stats, done, controls)
    return small._replace(rows=rows, checkpoints=checkpoints)


def _store(m: _Machine, momentum):
    """Keeps, at an even leaf, what the U-turn checks of later leaves need."""
    # the leaf that starts a span of 2**k leaves is found again at the number of ones of its index
    spare = m.checkpoints.shape[0] - 1
    index = jnp.where(m.leaf % 2 == 0, lax.population_count(m.leaf), spare)
    record = jnp.stack([momentum, m.subtree.momentum_sum, m.edge.momentum])
    return lax.dynamic_update_slice_in_dim(m.checkpoints, record[None], index, 0)


def _turns_inside(checkpoints, leaf, momentum, momentum_sum):
    """Whether a span of 2, 4, 8... leaves that ends at this leaf makes a U-turn.

    Row `k` of `checkpoints` describes the first leaf of a span: its momentum, the sum of the
    momenta before it in the subtree, and the momentum of the leaf before it. The right half of
    span `k` starts at row `k + 1`.
    """
    longest = lax.population_count(leaf >> 1)
    ones = lax.population_count(leaf & ~(leaf + 1))  # trailing ones: how many spans end here

    def check(k, turned):
        rows = lax.dynamic_slice_in_dim(checkpoints, k, 2)
        (first, before, _), (middle, before_middle, left_last) = rows
        # the two checks across the halves (Stan 2.21): a whole turn must not hide between the ends
        across = _turns(first, middle, before_middle - before + middle) | _turns(
            left_last, momentum, momentum_sum - before_middle + left_last
        )
        across &= k < longest  # a span of two has no halves to speak of
        return turned | across | _turns(first, momentum, momentum_sum - before)

    return lax.fori_loop(longest - ones + 1, longest + 1, check, jnp.array(False))


def _turns(first, last, momentum_sum):
    return ~((dot(first, momentum_sum) > 0) & (dot(last, momentum_sum) > 0))


def _close_subtree(
    m: _Machine, first, complete, diverged, word, seed, controls: Controls, metric: LinearMap
) -> _Machine:
    """Joins the subtree to the tree, then extends the tree or ends the trajectory."""
    tree, subtree = m.tree, m.subtree
    # biased towards the new half (Betancourt, arXiv 1701.02434, appendix A.3.2)
    take = complete & (jnp.log(uniform(word, m.start.dtype)) < subtree.weight - tree.weight)
    far = jax.tree.map(lambda x: x[1 - m.forward], m.ends).momentum
    near = jax.tree.map(lambda x: x[m.forward], m.ends).momentum
    last = m.edge.momentum
    turned = (
        _turns(far, last, tree.momentum_sum + subtree.momentum_sum)
        | _turns(far, first, tree.momentum_sum + first)
        | _turns(near, last, subtree.momentum_sum + near)
    )
    ends = jax.tree.map(
        lambda x, y: lax.dynamic_update_slice_in_dim(x, y[None], m.forward, 0), m.ends, m.edge
    )
    m = m._replace(
        ends=ends,
        depth=m.depth + 1,
        leaf=jnp.zeros_like(m.leaf),
        tree=_Tree(
            jax.tree.map(partial(jnp.where, take), subtree.point, tree.point),
            jnp.logaddexp(tree.weight, subtree.weight),
            tree.momentum_sum + subtree.momentum_sum,
        ),
        subtree=subtree._replace(
            weight=jnp.full_like(tree.weight, -jnp.inf), momentum_sum=jnp.zeros_like(first)
        ),
    )
    ended = ~complete | turned | (m.depth >= controls.integers[2]) | (m.done < 0)
    return lax.cond(
        ended,
        lambda s: _next_draw(s, diverged, seed, controls, metric),
        lambda s: _extend(s, (word & np.uint32(1)).astype(jnp.int32)),
        m,
    )


def _extend(m: _Machine, forward) -> _Machine:
    edge = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, forward, keepdims=False), m.ends)
    return m._replace(edge=edge, forward=forward)


def _next_draw(m: _Machine, diverged, seed, controls: Controls, metric: LinearMap) -> _Machine:
    """Writes down the statistics of the trajectory, adapts the step, draws a new momentum."""
    dtype, starting, point = m.start.dtype, m.done < 0, m.tree.point
    rate = m.acceptance / m.leaves.astype(dtype)
    energy = m.start[1] - m.start[0] - point.energy_error
    stats = jnp.stack(
        [
            point.log_density,
            energy,
            m.leaves.astype(dtype),
            m.depth.astype(dtype),
            rate,
            diverged.astype(dtype),
            jnp.exp(m.average.log_step),
        ]
    )
    draw = m.draw + jnp.where(starting, 0, 1).astype(m.draw.dtype)
    momentum, bit = normals(seed, draw, m.edge.position.shape[0], dtype)
    edge = Edge(point.position, momentum, pull(metric, point.gradient))
    average = adapted(m.average, controls, rate, starting)
    return m._replace(
        done=m.done + 1,
        draw=draw,
        average=average,
        edge=edge,
        stats=stats,
        ends=jax.tree.map(lambda x: jnp.stack([x, x]), edge),
        forward=bit,
        start=jnp.stack([point.log_density, 0.5 * dot(momentum, momentum)]),
        tree=_Tree(
            point._replace(energy_error=jnp.zeros_like(rate)), jnp.zeros_like(rate), momentum
        ),
        leaves=jnp.ones_like(m.leaf) - 1,
        depth=jnp.zeros_like(m.depth),
        acceptance=jnp.zeros_like(rate),
    )
