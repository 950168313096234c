"""What the Distribution Transformer reads: a prior and observations, in a standard position."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from abduce.amortized.dt_coordinates import Coordinates
from abduce.amortized.encoder import feature_scales, features, raw_features
from abduce.amortized.layout import Group, Layout
from abduce.amortized.mixtures import GaussianMixture

__all__ = ["Plan", "Scales", "features_of", "make_scales", "place", "place_back", "tokens_of"]

_WAVES = 8  # features of a step's position in a sequence


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an estimator is made for. Hashable.

    Attributes:
        layout: Which observations and arguments there are, and how they are grouped.
        families: Of the observed sites' distributions, by address.
        skipped: How many argument arrays the model itself holds; they come first in the layout.
        prior: Coordinates of the addresses whose prior is read.
        target: Coordinates of the addresses inferred.
        num_components: Of the fitted prior and of the posterior.
        num_fit_draws: To fit a prior of several dimensions while training; 8 times as many after.
        draws_per_prior: Training examples that share a prior.
        num_candidates: Draws of the network that join the true latents in the loss.
        missing: Probability that a training example has hidden observations; 0: none ever.
        equivariance: A symmetry, or None.
        width, num_layers, num_heads, hidden: Of the network.
    """

    layout: Layout
    families: tuple[tuple[str, str], ...]
    skipped: int
    prior: Coordinates
    target: Coordinates
    num_components: int
    num_fit_draws: int
    draws_per_prior: int
    num_candidates: int
    missing: float
    equivariance: Any
    width: int
    num_layers: int
    num_heads: int
    hidden: int


class Scales(eqx.Module):
    """Centre and spread of features and coordinates, from simulations.

    Attributes:
        features: For each group of observations.
        prior, target: Of the coordinates, shape `(dim,)` each.
    """

    features: list[tuple[Any, Any]]
    prior: tuple[Any, Any]
    target: tuple[Any, Any]


def place(plan: Plan, prior: GaussianMixture, observed: Any, gone: Any) -> tuple[Any, Any, Any]:
    """Prior and data in the standard position of the symmetry, and how they came there."""
    if plan.equivariance is None:
        return prior, observed, jnp.zeros((), jnp.result_type(float))
    seen = {
        a: jnp.ones(jnp.shape(x), bool) if gone is None else ~_spread(gone[a], x)
        for a, x in observed.items()
    }
    g = plan.equivariance.log_scale(prior, plan.prior, observed, seen)
    prior = plan.equivariance.on_mixture(-g, prior, plan.prior)
    return prior, plan.equivariance.on_observed(-g, observed), g


def place_back(plan: Plan, g: Any, mixture: GaussianMixture) -> GaussianMixture:
    """A mixture over target coordinates from the standard position back."""
    if plan.equivariance is None:
        return mixture
    return plan.equivariance.on_mixture(g, mixture, plan.target)


def _spread(gone: Any, x: Any) -> Any:
    gone = jnp.reshape(gone, jnp.shape(gone) + (1,) * (jnp.ndim(x) - jnp.ndim(gone)))
    return jnp.broadcast_to(gone, jnp.shape(x))


def features_of(plan: Plan, observed: Any, arguments: Any, gone: Any) -> list[Any]:
    """Per group, features that are not standardized yet; hidden values count as 0."""
    if gone is not None:
        observed = {a: jnp.where(_spread(gone[a], x), 0, x) for a, x in observed.items()}
    example = {"observed": observed, "arguments": (None,) * plan.skipped + tuple(arguments)}
    return raw_features(plan.layout, example, gone)


def tokens_of(plan: Plan, scales: Scales, raw: list[Any], gone: Any) -> tuple[Any, Any]:
    """For each group tokens `(n, features)`, and which of them are there, `(n,)`."""
    data, masks = [], []
    for group, x in zip(plan.layout.groups, features(scales.features, raw), strict=True):
        if group.kind == "sequence":
            t = jnp.linspace(0.0, 1.0, x.shape[0])[:, None]
            x = jnp.concatenate([x, jnp.cos(math.pi * t * jnp.arange(1, _WAVES + 1))], -1)
        elif group.kind != "set":
            x = x.reshape(1, -1)
        data.append(x)
        masks.append(_there(group, x.shape[0], gone))
    return data, masks


def _there(group: Group, n: int, gone: Any) -> Any:
    if gone is None or not group.sites:
        return jnp.ones(n, bool)
    missing = [gone[a].reshape(n if group.kind in ("set", "sequence") else 1, -1)
               for a in group.sites]  # fmt: skip
    return ~jnp.all(jnp.concatenate(missing, -1), -1)


def make_scales(plan: Plan, raw: list[Any], prior: Any, target: Any) -> Scales:
    """Scales from simulations in the standard position, leading axis over simulations."""

    def one(u):
        u = np.asarray(u, np.float64)
        low, mid, high = np.nanquantile(np.where(np.isfinite(u), u, np.nan), [0.1, 0.5, 0.9], 0)
        spread = np.where(high > low, (high - low) / 2.56, 1.0)
        dtype = jnp.result_type(float)
        return jnp.asarray(mid, dtype), jnp.asarray(spread, dtype)

    return Scales(feature_scales(plan.layout, raw), one(prior), one(target))
