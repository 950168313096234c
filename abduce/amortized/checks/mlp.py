"""A small classifier: the multilayer perceptron that two-sample tests train."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["init_mlp", "log_loss", "logits"]

Layers = list[tuple[Any, Any]]


def init_mlp(key: Any, sizes: tuple[int, ...]) -> Layers:
    """Weights and biases, uniform in +-sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010).

    Args:
        key: Random key.
        sizes: Widths from the input to the output.

    Returns:
        A pair for each layer, float32.
    """
    layers = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        k1, k2 = jax.random.split(jax.random.fold_in(key, i))
        bound = math.sqrt(6 / (fan_in + fan_out))
        weight = jax.random.uniform(k1, (fan_in, fan_out), jnp.float32, -bound, bound)
        layers.append((weight, jax.random.uniform(k2, (fan_out,), jnp.float32, -bound, bound)))
    return layers


def logits(layers: Layers, x: Any) -> Any:
    """Log odds of class 1: `(row, feature)` to `(row,)`, with ReLU in between."""
    for weight, bias in layers[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = layers[-1]
    return (x @ weight + bias)[:, 0]


def log_loss(layers: Layers, x: Any, y: Any, mask: Any, decay: float) -> Any:
    """Mean cross-entropy in nats over the rows of the mask, plus a quadratic penalty.

    The penalty is `decay / 2 * |weights|^2 / rows`, without biases.

    Args:
        layers: The classifier.
        x: Shape `(row, feature)`.
        y: Class 0 or 1, shape `(row,)`.
        mask: 1 for rows that count, shape `(row,)`.
        decay: Strength of the penalty.
    """
    rows = jnp.maximum(mask.sum(), 1.0)
    odds = logits(layers, x)
    entropy = jnp.sum(mask * (jax.nn.softplus(odds) - y * odds)) / rows
    penalty = sum(jnp.sum(w**2) for w, _ in layers)
    return entropy + 0.5 * decay * penalty / rows
