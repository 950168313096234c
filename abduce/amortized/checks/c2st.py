"""Classifier two-sample test: how well can a network tell two sets of draws apart?

The accuracy on held-out draws is 0.5 where it cannot, so that the laws are about equal, and 1
where they are disjoint (Friedman 2003; Lopez-Paz and Oquab 2017). Settings are those of the
simulation-based inference benchmark (Lueckmann et al. 2021), whose numbers it reproduces: five
folds, inputs standardized by the first set, two hidden layers of ten times the dimension, and
the stopping rule of scikit-learn's `MLPClassifier`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from abduce.amortized.checks.mlp import init_mlp, log_loss, logits
from abduce.errors import InvalidValue
from abduce.ppl.operations import typed_key

__all__ = ["c2st"]

_LEARNING_RATE, _DECAY, _BATCH = 1e-3, 1e-4, 200
_TOLERANCE, _PATIENCE = 1e-4, 10
_STRETCH = 10  # epochs per compiled call


def c2st(
    key: Any,
    samples_a: Any,
    samples_b: Any,
    *,
    num_folds: int = 5,
    max_epochs: int = 1000,
    standardize: bool = True,
) -> float:
    """Cross-validated accuracy of a classifier between two sets of draws.

    Args:
        key: Random key: of the folds, the batches and the starting weights.
        samples_a: Draws, usually of the reference, shape `(n, dim)` or `(n,)`.
        samples_b: Draws, shape `(m, dim)`; `n == m` makes 0.5 the least accuracy.
        num_folds: Folds; their classifiers are trained together.
        max_epochs: Passes over the training set at most. It stops earlier once the training loss
            has not fallen by 1e-4 for 10 epochs in a row.
        standardize: Whether to subtract the mean of `samples_a` and divide by its deviation.

    Returns:
        Between about 0.5 and 1. Its Monte Carlo error is about `0.5 / sqrt(n + m)`.

    Raises:
        InvalidValue: Shapes do not fit, or draws are not finite.

    Example:
        >>> c2st(key, np.random.normal(size=(1000, 2)), np.random.normal(size=(1000, 2)))
    """
    key = typed_key(key, "c2st")
    a, b = _checked("samples_a", samples_a), _checked("samples_b", samples_b)
    if a.shape[1] != b.shape[1] or min(len(a), len(b)) < num_folds or num_folds < 2:
        raise InvalidValue(
            f"c2st: sets of draws have shapes (n, dim) and (m, dim) with at least num_folds = "
            f"{num_folds} >= 2 rows each, got {a.shape} and {b.shape}."
        )
    if standardize:
        centre, scale = a.mean(0), a.std(0, ddof=1)
        scale = np.where(scale > 0, scale, 1.0)
        a, b = (a - centre) / scale, (b - centre) / scale
    x = jnp.asarray(np.concatenate([a, b]), jnp.float32)
    y = jnp.asarray(np.repeat([0.0, 1.0], [len(a), len(b)]), jnp.float32)
    seed = np.asarray(jax.random.key_data(key)).ravel().tolist()
    rng = np.random.default_rng(seed)
    train, test = _folds(len(x), num_folds, rng)
    width = 10 * x.shape[1]
    keys = jax.random.split(key, num_folds)
    state = _start((x.shape[1], width, width, 1), keys)
    for first in range(0, max_epochs, _STRETCH):  # so that an interrupt gets through
        # shuffled here: compiling a sort for the device takes longer than most trainings
        orders = np.stack([_batches(train, rng) for _ in range(_STRETCH)])
        state = _epochs(state, orders, first, max_epochs, x, y)
        if np.all(state["done"]):
            break
    return float(np.mean(_accuracy(state["layers"], test, x, y)))


def _checked(name: str, samples: Any) -> np.ndarray:
    x = np.asarray(samples, np.float64)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or not x.size:
        raise InvalidValue(f"c2st: {name} must have shape (n, dim), got {np.shape(samples)}.")
    if not np.isfinite(x).all():
        raise InvalidValue(f"c2st: {name} holds {int((~np.isfinite(x)).sum())} NaN or infinite.")
    return x


def _folds(n: int, k: int, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows of each fold's training set, and of its test set, filled up with -1, `(fold, row)`."""
    parts = np.array_split(rng.permutation(n), k)
    longest = max(len(p) for p in parts)
    train = [np.concatenate([*parts[:i], *parts[i + 1 :]]) for i in range(k)]
    test = [np.pad(p, (0, longest - len(p)), constant_values=-1) for p in parts]
    return train, np.stack(test)


def _batches(train: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Training rows in random order, `(fold, batch, row)`; -1 fills up the last batches."""
    longest = max(len(rows) for rows in train)
    batch = min(_BATCH, longest)
    size = longest + -longest % batch
    shuffled = [
        np.pad(rng.permutation(rows), (0, size - len(rows)), constant_values=-1) for rows in train
    ]
    return np.stack(shuffled).reshape(len(train), -1, batch)


@functools.partial(jax.jit, static_argnums=0)
def _start(sizes, keys):
    def one(key):
        layers = init_mlp(key, sizes)
        return {
            "layers": layers,
            "moments": optax.adam(_LEARNING_RATE).init(layers),
            "best": jnp.asarray(jnp.inf),
            "waited": jnp.asarray(0),
            "done": jnp.asarray(False),
        }

    return jax.vmap(one)(keys)


@jax.jit
def _epochs(state, orders, first, max_epochs, x, y):
    """Some passes over every fold's training set; finished folds rest.

    `orders` are rows by `(epoch, fold, batch, row)`.
    """

    def one(state, inputs):
        epoch, order = inputs
        new = jax.vmap(_epoch_of_fold, in_axes=(0, 0, None, None))(state, order, x, y)
        return {**new, "done": new["done"] | (epoch + 1 >= max_epochs)}, None

    return jax.lax.scan(one, state, (first + jnp.arange(_STRETCH), orders))[0]


def _epoch_of_fold(state, order, x, y):
    def step(carry, index):
        layers, moments, total = carry
        mask = (index >= 0).astype(x.dtype)
        loss, grads = jax.value_and_grad(log_loss)(layers, x[index], y[index], mask, _DECAY)
        updates, next_moments = optax.adam(_LEARNING_RATE).update(grads, moments)
        new = (optax.apply_updates(layers, updates), next_moments)
        is_empty = mask.sum() == 0
        new = jax.tree.map(lambda a, b: jnp.where(is_empty, b, a), new, (layers, moments))
        return (*new, total + loss * mask.sum()), None

    start = (state["layers"], state["moments"], jnp.zeros((), x.dtype))
    (layers, moments, total), _ = jax.lax.scan(step, start, order)
    loss = total / jnp.sum(order >= 0)
    waited = jnp.where(loss > state["best"] - _TOLERANCE, state["waited"] + 1, 0)
    new = {
        "layers": layers,
        "moments": moments,
        "best": jnp.minimum(loss, state["best"]),
        "waited": waited,
        "done": waited > _PATIENCE,
    }
    return jax.tree.map(lambda a, b: jnp.where(state["done"], b, a), new, state)


@jax.jit
def _accuracy(layers, test, x, y):
    def one(layers, rows):
        is_right = (logits(layers, x[rows]) > 0) == (y[rows] > 0.5)
        return jnp.sum(is_right & (rows >= 0)) / jnp.sum(rows >= 0)

    return jax.vmap(one)(layers, test)
