"""The algorithm protocol: frozen configurations that attach to models.

An algorithm is a frozen dataclass made with `@algorithm`. Applied to a model it returns the same
model with itself attached; `m.posterior(...)` then calls its `run`. Arrays and models among its
fields (starting points, proposals) are pytree leaves, everything else is static and hashable.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

from abduce.errors import InvalidAlgorithm, suggest
from abduce.inference.problem import Problem, make_problem
from abduce.ppl.model import Model

__all__ = ["Algorithm", "algorithm", "run_posterior", "run_prior"]

T = TypeVar("T")


class Algorithm:
    """Base of all algorithms.

    `traceable`: whether `run` works inside `jax.jit` and `jax.vmap`, with data that are tracers.
    `needs_density`: whether every site has to have one; estimators that only simulate do not.
    """

    traceable = False  # without annotation: an attribute of the class, not a setting
    needs_density = True

    @property
    def name(self) -> str:
        """As it is called under `ab.`."""
        return type(self).__name__

    def __call__(self, m: Model) -> Model:
        """Attaches the algorithm to a model; attaching again replaces it."""
        if not isinstance(m, Model):
            raise InvalidAlgorithm(
                f"ab.{self.name}(...) decorates a model, got {type(m).__name__}. Put @ab.model "
                f"below it:\n  @ab.{self.name}()\n  @ab.model\n  def f(...): ..."
            )
        return m.with_algorithm(self)

    def replace(self: T, **changes: Any) -> T:
        """The algorithm with some settings changed.

        Example:
            >>> ab.nuts().replace(num_samples=200).num_samples
            200
        """
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def run(self, problem: Problem, key: Any) -> Any:
        """Infers; returns a `Posterior`."""
        raise NotImplementedError


_ARRAY_FIELDS = ("guide", "init", "initial", "kernel", "params", "proposal", "via")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def algorithm(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only dataclass that is a pytree."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True, repr=False)(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    generated = cls.__init__

    @functools.wraps(generated)
    def __init__(self, *args, **settings):
        name = f"ab.{cls.__name__}"
        if args:
            raise InvalidAlgorithm(
                f"{name} takes its settings by name, got {type(args[0]).__name__}. Write "
                f"{name}({names[0]}=...); as a decorator it has parentheses, @{name}()."
            )
        unknown = [n for n in settings if n not in names]
        if unknown:
            raise InvalidAlgorithm(
                f"{name} has no setting {unknown[0]!r}; its settings are {', '.join(names)}."
                f"{suggest(unknown[0], names)}"
            )
        generated(self, **settings)

    cls.__init__ = __init__  # type: ignore[method-assign]
    data = [n for n in names if n in _ARRAY_FIELDS]
    jax.tree_util.register_dataclass(
        cls, data_fields=data, meta_fields=[n for n in names if n not in data]
    )

    def __repr__(self):
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if (f.name in _ARRAY_FIELDS and getattr(self, f.name) is not None)
            or (f.name not in _ARRAY_FIELDS and getattr(self, f.name) != f.default)
        ]
        return f"ab.{type(self).__name__}({', '.join(changed)})"

    cls.__repr__ = __repr__  # type: ignore[method-assign]
    return cls


def check_count(name: str, field: str, value: Any, least: int = 1) -> None:
    """A setting that counts something must be an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise InvalidAlgorithm(f"ab.{name}: {field} must be an int >= {least}, got {value!r}.")


def run_posterior(
    model: Model, key: Any, args: Any, given: Mapping[str, Any] | None, kwargs: dict[str, Any]
) -> Any:
    """Conditions a model and runs its algorithm."""
    alg = model.algorithm
    if alg is None:
        from abduce.inference.mcmc.algorithms import nuts

        alg = nuts()
    name = f"ab.{alg.name}" if alg.needs_density else None
    problem = make_problem(model, args, given, kwargs, name)
    return alg.run(problem, key)


def run_prior(model: Model, key: Any, args: Any, num_samples: int, kwargs: dict[str, Any]) -> Any:
    """Draws from the model without given data."""
    from abduce.inference.posterior import prior_posterior

    check_count("prior", "num_samples", num_samples)
    return prior_posterior(model, key, args, num_samples, kwargs)
