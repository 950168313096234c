"""How to optimize, and parameters as one vector."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from abduce.errors import InvalidAlgorithm
from abduce.inference.static import Static

__all__ = ["Flat", "Recipe"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to optimize.

    Attributes:
        num_steps: Optimizer steps.
        batch_size: Examples per step (and per accumulated part).
        learning_rate: At the top of the schedule: linear warm-up, then a cosine.
        warmup: Fraction of the steps that warm up.
        final: Fraction of the rate that is left at the end.
        weight_decay: Of AdamW, times the rate.
        clip: Largest norm of a gradient.
        ema: Horizon of the exponential moving average of the weights, as a fraction of the steps;
            0 for none. It has to scale with the run: a long horizon ruins a short run.
        accumulate: Parts whose gradients are averaged in one step.
        b2: Second-moment decay of Adam.
        validate_every: Steps between validations; None: a twentieth of the run.
        patience: Validations without improvement after which to stop; None: never.
        keep_best: Whether to return the weights that validated best rather than the last ones.
    """

    num_steps: int
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup: float = 0.05
    final: float = 0.01
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.02
    accumulate: int = 1
    b2: float = 0.999
    validate_every: int | None = None
    patience: int | None = None
    keep_best: bool = False

    def __post_init__(self):
        for field in ("num_steps", "batch_size", "accumulate", "validate_every", "patience"):
            value = getattr(self, field)
            if value is None and field in ("validate_every", "patience"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise InvalidAlgorithm(f"fit: {field} must be an int >= 1, got {value!r}.")
        for field in ("learning_rate", "clip"):
            value = getattr(self, field)
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise InvalidAlgorithm(f"fit: {field} must be positive, got {value!r}.")
        for field in ("warmup", "final", "ema", "weight_decay"):
            value = getattr(self, field)
            if not (isinstance(value, (int, float)) and 0 <= value <= 1):
                raise InvalidAlgorithm(f"fit: {field} must be between 0 and 1, got {value!r}.")

    @property
    def every(self) -> int:
        """Steps between validations."""
        return self.validate_every or max(1, -(-self.num_steps // 20))

    @functools.cached_property
    def decay(self) -> float:
        """Of the moving average, per step."""
        horizon = self.ema * self.num_steps
        return 1 - 1 / horizon if horizon > 1 else 0.0

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Clipping, then AdamW on the schedule."""
        warm = int(self.warmup * self.num_steps)
        rate = optax.warmup_cosine_decay_schedule(
            0.0 if warm else self.learning_rate, self.learning_rate, warm, self.num_steps,
            self.final * self.learning_rate,
        )  # fmt: skip
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(rate, b2=self.b2, weight_decay=0.0),
        )

    @functools.cached_property
    def decay_rate(self) -> Any:
        """Weight decay per step: the schedule's rate times `weight_decay`."""
        warm = int(self.warmup * self.num_steps)
        return optax.warmup_cosine_decay_schedule(
            0.0 if warm else 1.0, 1.0, warm, self.num_steps, self.final
        )


class Flat:
    """Parameters as one vector: an optimizer of a hundred arrays would cost seconds to compile.

    Hashable; equal layouts share compiled programs.
    """

    def __init__(self, network: Any):
        params, static = eqx.partition(network, eqx.is_inexact_array)
        leaves, self.treedef = jax.tree.flatten(params)
        self.shapes = tuple((tuple(x.shape), jnp.dtype(x.dtype)) for x in leaves)
        self.static = Static(static)
        self.key = (self.treedef, self.shapes, self.static)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Flat) and self.key == other.key

    def vector(self, network: Any) -> Any:
        """All parameters, shape `(n,)`."""
        leaves = jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))
        flat = [np.asarray(x).reshape(-1) for x in leaves]
        return jnp.asarray(np.concatenate(flat) if flat else np.zeros(0, np.float32))

    def network(self, vector: Any) -> Any:
        """The module with these parameters."""
        leaves, start = [], 0
        for shape, dtype in self.shapes:
            size = math.prod(shape)
            leaves.append(vector[start : start + size].reshape(shape).astype(dtype))
            start += size
        return eqx.combine(jax.tree.unflatten(self.treedef, leaves), self.static.value)

    def matrices(self) -> np.ndarray:
        """Which entries belong to matrices: only these decay, biases and scales do not."""
        parts = [np.full(math.prod(s), len(s) >= 2) for s, _ in self.shapes]
        return np.concatenate(parts) if parts else np.zeros(0, bool)
