"""Entropy-regularised optimal transport between weighted particles and equally weighted ones.

Corenflos, Thornton, Deligiannidis and Doucet, "Differentiable Particle Filtering via
Entropy-Regularized Optimal Transport" (2021), after Reich (2013). Memory and time grow as `N**2`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp

from abduce.errors import InvalidValue

__all__ = ["optimal_transport", "row_draws", "transport_matrix"]


def transport_matrix(
    log_weights: jax.Array,
    positions: jax.Array,
    epsilon: float = 0.1,
    num_iterations: int = 50,
) -> jax.Array:
    """`N` times a coupling of the uniform law (rows) and the weights (columns).

    Sinkhorn's iteration meets one marginal at a time. Both are needed: slot `i` draws from row `i`,
    so that `E[#{i: a[i] = j}]` is `N w[j]` only if each row sums to one *and* column `j` to
    `N w[j]`. So the last iterate is rounded to a coupling as in Altschuler, Weed and Rigollet
    (2017, algorithm 2): rows, then columns, are scaled down where they are too large, and what is
    missing is added as a matrix of rank one. Differentiable in weights and positions:
    `transport_matrix(...) @ positions` is the differentiable resampling of the paper.

    Args:
        log_weights: Unnormalized, in nats, shape `(N,)`.
        positions: Shape `(N, d)` or `(N,)`. The cost is the squared distance, divided by its mean
            under the weights.
        epsilon: Strength of the entropy, in units of that mean cost. As it grows, each row tends
            to the weights, and the scheme to `multinomial`.
        num_iterations: Sinkhorn iterations (static). Too few make the coupling less than optimal;
            its marginals are exact in any case.

    Returns:
        Shape `(N, N)`, non-negative; the identity if all log weights are `-inf`.

    Raises:
        InvalidValue: `positions` is missing, or has the wrong shape.

    Example:
        >>> matrix = transport_matrix(jnp.log(jnp.array([0.75, 0.25])), jnp.array([0.0, 1.0]))
        >>> matrix.sum(axis=0)
        Array([1.5, 0.5], dtype=float32)
    """
    n = log_weights.shape[0]
    if positions is None or jnp.ndim(positions) not in (1, 2) or positions.shape[0] != n:
        shape = None if positions is None else jnp.shape(positions)
        raise InvalidValue(
            f"optimal transport: positions must have shape ({n}, d) or ({n},), got {shape}. Pass "
            "the particles as `positions=`, or use a scheme without them, such as systematic."
        )
    dtype = jnp.promote_types(jnp.result_type(log_weights, positions), jnp.float32)
    is_alive = jnp.any(log_weights > -jnp.inf)
    log_w = jax.nn.log_softmax(jnp.where(is_alive, log_weights, 0).astype(dtype))
    cost = _cost(jnp.asarray(positions, dtype).reshape(n, -1), log_w)

    def step(g, _):  # row potentials from column potentials, and back
        f = -epsilon * logsumexp((g - cost) / epsilon + log_w, axis=1)
        return -epsilon * (logsumexp((f[:, None] - cost) / epsilon, axis=0) - jnp.log(n)), None

    g, _ = lax.scan(step, jnp.zeros(n, dtype), None, length=num_iterations)
    matrix = jax.nn.softmax((g - cost) / epsilon + log_w, axis=1)  # each row sums to one
    return jnp.where(is_alive, _with_columns(matrix, n * jnp.exp(log_w)), jnp.eye(n, dtype=dtype))


def optimal_transport(key: jax.Array, log_weights: jax.Array, positions=None) -> jax.Array:
    """Slot `i` draws its ancestor from row `i` of `transport_matrix(log_weights, positions)`.

    Args:
        key: Typed PRNG key, shape `()`.
        log_weights: Unnormalized, in nats, shape `(N,)`; `-inf` is never drawn.
        positions: The particles, shape `(N, d)` or `(N,)`.

    Returns:
        int32, shape `(N,)`; `0, ..., N - 1` if all log weights are `-inf`.

    Raises:
        InvalidValue: `positions` is missing, or has the wrong shape.
    """
    return row_draws(key, lax.stop_gradient(transport_matrix(log_weights, positions)))


def row_draws(key: jax.Array, matrix: jax.Array) -> jax.Array:
    """One index from each row of non-negative numbers."""
    return jax.random.categorical(key, jnp.log(matrix), axis=1).astype(jnp.int32)


def _cost(positions: jax.Array, log_w: jax.Array) -> jax.Array:
    cost = jnp.sum((positions[:, None, :] - positions[None, :, :]) ** 2, axis=-1)
    w = jnp.exp(log_w)
    scale = w @ cost @ w
    scale = jnp.where(scale > 0, scale, jnp.max(cost))  # else one place has all the weight
    return cost / jnp.where(scale > 0, scale, 1)


def _with_columns(matrix: jax.Array, columns: jax.Array) -> jax.Array:
    """The nearest matrix, in a sense, with rows that sum to one and the given column sums."""
    sums = jnp.sum(matrix, axis=0)
    matrix = matrix * jnp.where(sums > columns, columns / jnp.where(sums > 0, sums, 1), 1)
    rows_missing = jnp.maximum(1 - jnp.sum(matrix, axis=1), 0)
    columns_missing = jnp.maximum(columns - jnp.sum(matrix, axis=0), 0)
    total = jnp.sum(rows_missing)
    share = rows_missing / jnp.where(total > 0, total, 1)
    return matrix + share[:, None] * columns_missing
