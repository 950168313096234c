"""Compiled zoo models, shared by the tests of one run.

Staging and compiling a model costs more than any check on it, so each is done once: `case(name)`
holds the model and a handful of traces drawn by one `jit(vmap(simulate))`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import abduce as ab

from .zoo import ZOO, Entry

__all__ = ["DRAWS", "SIMULATED", "Case", "case", "close", "keys_of", "row", "total"]

DRAWS = 4
SIMULATED = sorted(name for name, entry in ZOO.items() if entry.values is None)


@dataclass(frozen=True)
class Case:
    """A zoo model, ready to be asked.

    Attributes:
        entry: Its description and reference.
        model: `ab.model(entry.program)`.
        traces: `DRAWS` simulations, stacked; None for an improper density.
        draws: The choice maps of these, stacked.
        expected: Their log densities, by the reference.
        evaluate: The reference, `choices -> log density`.
    """

    name: str
    entry: Entry
    model: Any
    traces: Any
    draws: dict
    expected: np.ndarray
    evaluate: Callable

    @property
    def options(self) -> dict:
        return {} if self.entry.params is None else {"params": dict(self.entry.params)}

    def simulate(self, key):
        return self.model.simulate(key, *self.entry.args, **self.options)

    def log_density(self, choices):
        return self.model.log_density(choices, *self.entry.args, **self.options)

    def generate(self, choices, key=None):
        key = jax.random.key(0) if key is None else key
        return self.model.generate(key, choices, *self.entry.args, **self.options)

    def choices(self, i: int = 0) -> dict:
        """The i-th choice map."""
        return row(self.draws, i)

    def finite(self, n: int = 2) -> list[tuple[int, dict]]:
        """Index and choice map of n simulations with a density."""
        found = [(i, self.choices(i)) for i in range(DRAWS) if np.isfinite(self.expected[i])]
        assert len(found) >= n, f"{self.name}: too few draws with a density; choose another key"
        return found[:n]

    def reference(self, choices):
        return self.evaluate(choices)

    def reference_gradient(self, choices, smooth) -> dict:
        """Gradient of the reference with respect to `smooth`, a part of the choices."""
        return _quick(jax.grad(lambda s, c: self.entry.reference({**c, **s}, *self.entry.args)))(
            smooth, choices
        )

    def smooth(self, choices) -> dict:
        """The part of a choice map in which the density is differentiable."""
        names = self.entry.smooth or [
            a for a, v in choices.items() if jnp.issubdtype(v.dtype, jnp.floating)
        ]
        return {a: choices[a] for a in names}


def keys_of(name: str):
    """The keys of a case's simulations; the seed makes every branch of every model be taken."""
    return jax.random.split(jax.random.key(sum(map(ord, name)) + 1), DRAWS)


@functools.cache
def case(name: str) -> Case:
    """The zoo model of this name, simulated `DRAWS` times by one compiled call."""
    entry = ZOO[name]
    model = ab.model(entry.program)
    options = {} if entry.params is None else {"params": dict(entry.params)}
    traces = None
    if entry.values is None:
        simulate = jax.jit(jax.vmap(lambda k: model.simulate(k, *entry.args, **options)))
        traces = simulate(keys_of(name))
        draws = {a: traces.choices[a] for a in entry.shapes}
    else:
        draws = {a: jnp.broadcast_to(v, (DRAWS, *np.shape(v))) for a, v in entry.values.items()}
    evaluate = _quick(lambda c: entry.reference(c, *entry.args))
    expected = [float(evaluate(row(draws, i))) for i in range(DRAWS)]
    return Case(name, entry, model, traces, draws, np.array(expected), evaluate)


def _quick(f: Callable) -> Callable:
    """Compiles a reference as a whole; one that branches on values runs operation by operation."""
    compiled = jax.jit(f)
    plain = False

    def call(*args):
        nonlocal plain
        if not plain:
            try:
                return compiled(*args)
            except TypeError:  # JAX's errors for Python control flow on traced values
                plain = True
        return f(*args)

    return call


def row(tree, i: int):
    """The i-th element of every leaf."""
    return jax.tree.map(lambda x: x[i], tree)


def total(scores) -> float:
    """Sum of everything in a tree of scores."""
    return sum(float(jnp.sum(x)) for x in jax.tree.leaves(scores))


def close(actual, expected, tolerance: float = 1e-6) -> None:
    """Asserts agreement within `tolerance`, absolute or relative, infinities included."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
