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
`exp(H(start) - H(leaf))`. Momenta live in the coordinates of `linear_map`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .counter_random import normals, threefry, uniform
from .linear_map import LinearMap, pull, push
from .single_kernel import single_kernel

__all__ = ["STATS", "Controls", "DualAverage", "Result", "num_rows", "run_chain"]

LogDensity = Callable[[Any, jax.Array], jax.Array]

STATS = ("lp", "energy", "n_steps", "tree_depth", "acceptance_rate", "diverging", "step_size")
MAX_ENERGY_ERROR = 1000.0  # nats; a leaf worse than this is a divergence
_DELAY, _FORGETTING = 10.0, 0.75  # t0, kappa of Hoffman and Gelman (2014)


class Controls(NamedTuple):
    """What a call may change without compiling."""

    integers: Any  # int32 (4,): num_draws, thinning, max_depth, adapt (0 or 1)
    target: Any  # wanted acceptance rate


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


class _Point(NamedTuple):
    position: jax.Array
    log_density: jax.Array
    gradient: jax.Array
    energy_error: jax.Array  # H(start) - H(here)


class _Edge(NamedTuple):
    position: jax.Array
    momentum: jax.Array
    force: jax.Array  # gradient with respect to z


class _Tree(NamedTuple):
    point: _Point  # drawn from the leaves
    weight: jax.Array
    momentum_sum: jax.Array


class _Machine(NamedTuple):
    done: jax.Array  # draws finished in this call; -1 while the start is evaluated
    draw: jax.Array
    average: DualAverage
    edge: _Edge  # where the next step starts
    ends: _Edge  # leading axis 2: backward end, forward end of the tree
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


def num_rows(dim: int) -> int:
    """Rows of the buffer that a call fills; bounded by a few MiB."""
    return int(np.clip((1 << 20) // (2 * dim + len(STATS)), 16, 1024))


@partial(jax.jit, static_argnames=("log_density", "max_depth", "on_cpu"))
def run_chain(log_density: LogDensity, data: Any, seed: jax.Array, draw: jax.Array,
              position: jax.Array, average: jax.Array, controls: Controls, metric: LinearMap, *,
              max_depth: int, on_cpu: bool) -> Result:
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
    move = single_kernel(_move, on_cpu)
    settle = single_kernel(_settle, on_cpu)

    def turn(m: _Machine) -> _Machine:
        halfway, position, step = move(m.edge, m.forward, m.average.log_step, m.done, metric)
        value, gradient = evaluate(data, position)
        return settle(m, halfway, step, position, value, gradient, seed, controls, metric)

    start = _initial(position, draw.astype(jnp.uint32), DualAverage(*average), max_depth)
    m = lax.while_loop(lambda m: m.done < controls.integers[0], turn, start)
    point = m.tree.point
    return Result(m.rows,
                  jnp.concatenate([point.position, point.gradient, point.log_density[None],
                                   jnp.stack(m.average)]),
                  jnp.stack([m.draw.astype(jnp.int32), m.num_gradients]))


def _initial(position, draw, average, max_depth) -> _Machine:
    dim, dtype = position.shape[0], position.dtype
    zero, zeros = jnp.zeros((), dtype), jnp.zeros(dim, dtype)
    low = jnp.array(-jnp.inf, dtype)
    point = _Point(position, zero, zeros, zero)
    tree = _Tree(point, low, zeros)
    edge = _Edge(position, zeros, zeros)
    count = jnp.zeros((), jnp.int32)
    return _Machine(
        done=count - 1, draw=draw, average=average, edge=edge,
        ends=jax.tree.map(lambda x: jnp.stack([x, x]), edge), forward=count,
        start=jnp.zeros(2, dtype), tree=tree, subtree=tree,
        checkpoints=jnp.zeros((max_depth + 1, 3, dim), dtype), leaf=count, leaves=count,
        depth=count, acceptance=zero, stats=jnp.zeros(len(STATS), dtype),
        rows=jnp.zeros((num_rows(dim), 2 * dim + len(STATS)), dtype), num_gradients=count)


def _move(edge: _Edge, forward, log_step, done, metric: LinearMap):
    """The first half of a leapfrog step: half a kick, then the drift."""
    step = jnp.exp(log_step) * jnp.where(forward == 1, 1, -1).astype(log_step.dtype)
    step = jnp.where(done < 0, 0, step)
    halfway = edge.momentum + 0.5 * step * edge.force
    return halfway, edge.position + step * push(metric, halfway), step


def _settle(m: _Machine, halfway, step, position, value, gradient, seed, controls: Controls,
            metric: LinearMap) -> _Machine:
    """The second kick, then everything that the new leaf completes."""
    dtype, starting = m.start.dtype, m.done < 0
    force = pull(metric, gradient)
    momentum = halfway + 0.5 * step * force
    kinetic = 0.5 * _dot(momentum, momentum)

    # differences to the start, not totals: in float32 a log density of -1e5 has a grain of 0.008
    error = (value - m.start[0]) + (m.start[1] - kinetic)
    error = jnp.where(starting, 0, error)
    diverged = ~(error > -MAX_ENERGY_ERROR)  # also NaN
    error = jnp.where(diverged | ~(error < jnp.inf), -jnp.inf, error)

    # multinomial draw from the leaves of the subtree
    words = threefry(seed, m.draw, m.leaves.astype(jnp.uint32))
    weight = jnp.logaddexp(m.subtree.weight, error)
    take = jnp.log(uniform(words.first, dtype)) < error - weight
    point = _Point(position, value, gradient, error)
    point = jax.tree.map(partial(jnp.where, take), point, m.subtree.point)
    momentum_sum = m.subtree.momentum_sum + momentum

    checkpoints = _store(m, momentum)
    turned = _turns_inside(checkpoints, m.leaf, momentum, momentum_sum)
    m = m._replace(
        edge=_Edge(position, momentum, force), subtree=_Tree(point, weight, momentum_sum),
        checkpoints=checkpoints, leaf=m.leaf + 1, leaves=m.leaves + 1,
        acceptance=m.acceptance + jnp.minimum(1, jnp.exp(error)),
        num_gradients=m.num_gradients + 1)

    # buffers stay outside the branches: XLA would copy them
    complete = ~(diverged | turned)
    rows, checkpoints = m.rows, m.checkpoints
    row = lax.div(jnp.maximum(m.done, 0), controls.integers[1])
    first = checkpoints[0, 0]
    small = m._replace(rows=None, checkpoints=None)
    small = lax.cond(
        ~complete | (m.leaf == 1 << m.depth),
        lambda s: _close_subtree(s, first, complete, diverged, words.second, seed, controls, metric),
        lambda s: s, small)
    # rewritten on every turn with the tree's current point; the turn that ends a draw is the last
    finished = small.stats
    record = jnp.concatenate([small.tree.point.position, small.tree.point.gradient, finished])
    rows = lax.dynamic_update_slice_in_dim(rows, record[None], row, 0)
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
        across = (_turns(first, middle, before_middle - before + middle)
                  | _turns(left_last, momentum, momentum_sum - before_middle + left_last))
        across &= k < longest  # a span of two has no halves to speak of
        return turned | across | _turns(first, momentum, momentum_sum - before)

    return lax.fori_loop(longest - ones + 1, longest + 1, check, jnp.array(False))


def _dot(a, b):
    """The inner product, summed in a way that a single kernel can vectorize."""
    lanes = 16
    blocks = a.shape[0] // lanes
    products = a * b
    if blocks < 2:
        return jnp.sum(products)
    head = jnp.sum(jnp.sum(products[:blocks * lanes].reshape(blocks, lanes), 0))
    return head + jnp.sum(products[blocks * lanes:])


def _turns(first, last, momentum_sum):
    return ~((_dot(first, momentum_sum) > 0) & (_dot(last, momentum_sum) > 0))


def _close_subtree(m: _Machine, first, complete, diverged, word, seed, controls: Controls,
                   metric: LinearMap) -> _Machine:
    """Joins the subtree to the tree, then extends the tree or ends the trajectory."""
    tree, subtree = m.tree, m.subtree
    # biased towards the new half (Betancourt, arXiv 1701.02434, appendix A.3.2)
    take = complete & (jnp.log(uniform(word, m.start.dtype)) < subtree.weight - tree.weight)
    far = jax.tree.map(lambda x: x[1 - m.forward], m.ends).momentum
    near = jax.tree.map(lambda x: x[m.forward], m.ends).momentum
    last = m.edge.momentum
    turned = (_turns(far, last, tree.momentum_sum + subtree.momentum_sum)
              | _turns(far, first, tree.momentum_sum + first)
              | _turns(near, last, subtree.momentum_sum + near))
    ends = jax.tree.map(
        lambda x, y: lax.dynamic_update_slice_in_dim(x, y[None], m.forward, 0), m.ends, m.edge)
    m = m._replace(
        ends=ends, depth=m.depth + 1, leaf=jnp.zeros_like(m.leaf),
        tree=_Tree(jax.tree.map(partial(jnp.where, take), subtree.point, tree.point),
                   jnp.logaddexp(tree.weight, subtree.weight),
                   tree.momentum_sum + subtree.momentum_sum),
        subtree=subtree._replace(weight=jnp.full_like(tree.weight, -jnp.inf),
                                 momentum_sum=jnp.zeros_like(first)))
    ended = ~complete | turned | (m.depth >= controls.integers[2]) | (m.done < 0)
    return lax.cond(ended, lambda s: _next_draw(s, diverged, seed, controls, metric),
                    lambda s: _extend(s, (word & np.uint32(1)).astype(jnp.int32)), m)


def _extend(m: _Machine, forward) -> _Machine:
    edge = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, forward, keepdims=False), m.ends)
    return m._replace(edge=edge, forward=forward)


def _next_draw(m: _Machine, diverged, seed, controls: Controls, metric: LinearMap) -> _Machine:
    """Writes down the statistics of the trajectory, adapts the step, draws a new momentum."""
    dtype, starting, point = m.start.dtype, m.done < 0, m.tree.point
    rate = m.acceptance / m.leaves.astype(dtype)
    energy = m.start[1] - m.start[0] - point.energy_error
    stats = jnp.stack([point.log_density, energy, m.leaves.astype(dtype), m.depth.astype(dtype),
                       rate, diverged.astype(dtype), jnp.exp(m.average.log_step)])
    draw = m.draw + jnp.where(starting, 0, 1).astype(m.draw.dtype)
    momentum, bit = normals(seed, draw, m.edge.position.shape[0], dtype)
    edge = _Edge(point.position, momentum, pull(metric, point.gradient))
    adapt = (controls.integers[3] > 0) & ~starting
    average = jax.tree.map(partial(jnp.where, adapt), _average(m.average, controls.target - rate),
                           m.average)
    return m._replace(
        done=m.done + 1, draw=draw, average=average, edge=edge, stats=stats,
        ends=jax.tree.map(lambda x: jnp.stack([x, x]), edge), forward=bit,
        start=jnp.stack([point.log_density, 0.5 * _dot(momentum, momentum)]),
        tree=_Tree(point._replace(energy_error=jnp.zeros_like(rate)), jnp.zeros_like(rate),
                   momentum),
        leaves=jnp.ones_like(m.leaf) - 1, depth=jnp.zeros_like(m.depth),
        acceptance=jnp.zeros_like(rate))


def _average(a: DualAverage, error) -> DualAverage:
    count = a.count + 1
    share = 1 / (count + _DELAY)
    error_average = (1 - share) * a.error_average + share * error
    log_step = a.center - jnp.sqrt(count) / a.shrinkage * error_average
    keep = count**-_FORGETTING
    return DualAverage(log_step, keep * log_step + (1 - keep) * a.log_step_average, error_average,
                       count, a.center, a.shrinkage)
