"""Estimators checked on simulations from the model that they were trained on."""

from __future__ import annotations

from typing import Any

from abduce.amortized.posing import arguments_of, require_model
from abduce.amortized.reading import require_fitted

__all__ = ["check_estimator"]


def check_estimator(
    est: Any, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any], **options: Any
) -> Any:
    """The report of an estimator's `check`; without arguments those of training are taken.

    Raises:
        NotFitted: Before `fit`, or without a model.
    """
    from abduce.amortized.checks import run_all

    require_fitted(est)
    model = require_model(est, "Write est.with_model(model, *args).check(key).")
    designs = None
    if not args and not kwargs:
        designs, args, kwargs = arguments_of(est.simulation)
    return run_all(
        model, est, key, *args, observed=est.observed, designs=designs, **options, **kwargs
    )
