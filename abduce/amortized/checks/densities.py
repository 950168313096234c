"""Log densities at draws: of the joint, and of the posterior where it has one."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from abduce.errors import MissingKey
from abduce.inference.proposals import as_proposal
from abduce.ppl.model import Model

__all__ = ["density_at", "density_of_points", "posterior_model"]


def posterior_model(algorithm: Any, model: Any, post: Any) -> Model | None:
    """The Model `q(given, *args)` that the draws come from, if the algorithm has one.

    Estimators have `as_model(model)`, and a fitted guide is kept with its posterior. The kernel
    density that `post.as_model()` makes of draws does not count: it depends on the draws
    themselves, which would then not be exchangeable with the true value.
    """
    has_draws_alone = getattr(getattr(algorithm, "settings", None), "pose", None) is not None
    if hasattr(algorithm, "as_model") and not has_draws_alone:
        return as_proposal(algorithm, model, "checks")
    if post is not None and isinstance(post.resume, dict) and "guide" in post.resume:
        return post.as_model()
    return None


def density_at(
    model: Model, points: dict[str, Any], given: dict[str, Any], args: Any, kwargs: Any
) -> np.ndarray | None:
    """Log density at each of some points.

    Args:
        model: Whose density.
        points: By address, `(point, ...)`.
        given: Further choices, the same for all points.
        args, kwargs: The model's arguments.

    Returns:
        Shape `(point,)`, nats; None if the density is unknown or only estimated.
    """
    bare = model.with_algorithm(None) if model.algorithm is not None else model
    if not _covers(bare, {**points, **given}, args, kwargs):
        return None
    _, arguments = bare._stage(args, kwargs)
    try:
        return np.asarray(_evaluate(arguments, points, given))
    except MissingKey:  # a density that takes random numbers to estimate
        return None


def density_of_points(
    model: Model, points: dict[str, Any], given: dict[str, Any], args: Any, kwargs: Any
) -> Any | None:
    """`density_at` inside a compiled program."""
    bare = model.with_algorithm(None) if model.algorithm is not None else model
    if not _covers(bare, {**points, **given}, args, kwargs):
        return None
    try:
        return jax.vmap(lambda z: bare.log_density({**z, **given}, *args, **kwargs))(points)
    except MissingKey:
        return None


def _covers(model: Model, choices: dict[str, Any], args: Any, kwargs: Any) -> bool:
    """Whether the density is of exactly these choices."""
    program = model.program(*args, **kwargs)
    is_known = all(s.has_density for s in program.sites.values() if s.kind == "sample")
    return is_known and set(program.latents) == set(choices)


@jax.jit
def _evaluate(arguments, points, given):
    model, args, kwargs = arguments.unpack()
    return jax.vmap(lambda z: model.log_density({**z, **given}, *args, **kwargs))(points)
