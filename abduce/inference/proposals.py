"""Everything that proposes, as a Model."""

from __future__ import annotations

from typing import Any

from abduce.errors import InvalidAlgorithm
from abduce.ppl.model import Model

__all__ = ["as_proposal", "is_proposal"]


def is_proposal(x: Any) -> bool:
    """Whether `as_proposal` takes it."""
    return isinstance(x, Model) or hasattr(x, "as_model")


def as_proposal(x: Any, model: Any, name: str) -> Model:
    """A Model called as `q(given, *args)`.

    Args:
        x: A Model, a Posterior (its `as_model()`), or an estimator (its `as_model(model)`).
        model: The model that is inferred.
        name: Of the algorithm, for messages.

    Raises:
        InvalidAlgorithm: It is none of these.
    """
    from abduce.inference.posterior import Posterior

    if isinstance(x, Posterior):
        x = x.as_model()
    elif not isinstance(x, Model) and hasattr(x, "as_model"):
        x = x.as_model(model)
    if not isinstance(x, Model):
        raise InvalidAlgorithm(
            f"ab.{name}: proposal= takes a Model called as q(given, *args), a posterior or an "
            f"estimator, got {type(x).__name__}. Decorate a function with @ab.model."
        )
    return x if x.algorithm is None else x.with_algorithm(None)
