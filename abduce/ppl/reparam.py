"""Coordinates: how a site's value is made from unconstrained numbers.

A reparameterization leaves the joint distribution alone and changes the space in which gradient
methods move. For a location-scale family, `noncentered()` uses `x = loc + scale * u`: the density
of `u` is then free of `loc` and `scale`, which removes the funnel of a hierarchical model
(Papaspiliopoulos, Roberts and Sköld, "A general framework for the parametrization of hierarchical
models", Statistical Science 2007). A degree of centring in between is `centered=c`.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from numpyro.distributions import Distribution, TransformedDistribution
from numpyro.distributions import transforms as T

from abduce.errors import InvalidModel, InvalidValue
from abduce.ppl.support import support_bijection

__all__ = ["Bijection", "Coordinates", "NonCentered", "as_coordinates", "bijection", "noncentered"]


class Coordinates(eqx.Module):
    """Base: makes the bijection of a site from its distribution."""

    def bijection(self, d: Any, site: Any) -> T.Transform:
        """From unconstrained numbers to the value of one element."""
        raise NotImplementedError


class NonCentered(Coordinates):
    """Made by `noncentered`."""

    centered: float = eqx.field(default=0.0, static=True)

    def bijection(self, d, site):
        transform = _standardizer(d, self.centered)
        if transform is None:
            raise InvalidModel(
                f"ab.noncentered: site {site.address!r} is {site.spec.family}, which is not a "
                f"location-scale family or a transformation of one. Choose coordinates with "
                f"ab.bijection(transform)."
            )
        return transform


def noncentered(centered: float = 0.0) -> Coordinates:
    """Non-centred coordinates for `ab.reparam`.

    Args:
        centered: 0 for fully non-centred, 1 for centred, between for a compromise. The coordinate
            is distributed as `loc * c + scale**c * eps`, eps standard.

    Works for location-scale families (Normal, StudentT, Cauchy, Laplace, Logistic, Gumbel,
    MultivariateNormal, ...), scale families on the positive numbers (HalfNormal, HalfCauchy,
    Exponential, Gamma, ...), and transformations of them.
    """
    if not 0 <= centered <= 1:
        raise InvalidValue(f"ab.noncentered: centered must be in [0, 1], got {centered}.")
    return NonCentered(float(centered))


_LOC_SCALE = (
    "Normal", "StudentT", "Cauchy", "Laplace", "Logistic", "Gumbel", "AsymmetricLaplace",
    "SoftLaplace",
)  # fmt: skip
_SCALE = {"HalfNormal": "scale", "HalfCauchy": "scale", "Weibull": "scale", "Exponential": "rate",
          "Gamma": "rate", "InverseGamma": "rate"}  # fmt: skip


def _standardizer(d: Any, c: float) -> T.Transform | None:
    name = type(d).__name__
    if name in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        return _standardizer(d.base_dist, c)
    if name in _LOC_SCALE:
        scale = d.scale ** (1 - c) if c else d.scale
        loc = jnp.asarray(d.loc) * 1.0
        return T.AffineTransform(loc - c * loc * scale if c else loc, scale)
    if name in ("MultivariateNormal", "MultivariateStudentT") and not c:
        loc = jnp.broadcast_to(d.loc, d.batch_shape + d.event_shape)
        return T.LowerCholeskyAffine(loc, d.scale_tril)
    if name in _SCALE and not c:
        scale = getattr(d, _SCALE[name])
        if name in ("Exponential", "Gamma"):
            scale = 1 / scale
        positive = T.ExpTransform()
        return T.ComposeTransform(
            [positive, T.AffineTransform(0.0, scale, domain=positive.codomain)]
        )
    if isinstance(d, TransformedDistribution) or name == "LogNormal":
        base = _standardizer(d.base_dist, c)
        return None if base is None else T.ComposeTransform([base, *d.transforms])
    return None


class Bijection(Coordinates):
    """Made by `bijection`."""

    transform: Any

    def bijection(self, d, site):
        return self.transform


def bijection(transform: Any) -> Coordinates:
    """Coordinates by a bijection from the real numbers onto the support, for `ab.reparam`.

    Args:
        transform: A NumPyro `Transform` (flows included) whose domain is the real space.
    """
    if not isinstance(transform, T.Transform):
        raise InvalidValue(
            f"ab.bijection takes a numpyro.distributions.transforms.Transform, got {transform!r}."
        )
    return Bijection(transform)


class TransformCoordinates(Coordinates):
    """Moves in the base space of a `TransformedDistribution`, as NumPyro's TransformReparam."""

    def bijection(self, d, site):
        inner = d
        while type(inner).__name__ in ("Independent", "ExpandedDistribution"):
            inner = inner.base_dist
        if not isinstance(inner, TransformedDistribution):
            raise InvalidModel(
                f"TransformReparam: site {site.address!r} is {site.spec.family}, not a "
                f"TransformedDistribution."
            )
        base = support_bijection(inner.base_dist, site)
        parts = [] if isinstance(base, T.IdentityTransform) else [base]
        return T.ComposeTransform([*parts, *inner.transforms])


def as_coordinates(address: str, c: Any) -> Coordinates:
    """Reads what `ab.reparam` accepts for one site."""
    if isinstance(c, Coordinates):
        return c
    if isinstance(c, T.Transform):
        return Bijection(c)
    name = type(c).__name__
    if name == "LocScaleReparam":
        if not isinstance(c.centered, (int, float)) or c.shape_params:
            raise InvalidValue(
                f'reparam["{address}"]: LocScaleReparam needs a fixed centered= and no '
                f"shape_params here; use ab.noncentered(c)."
            )
        return noncentered(float(c.centered))
    if name == "TransformReparam":
        return TransformCoordinates()
    if isinstance(c, Distribution):
        raise InvalidValue(
            f'reparam["{address}"] is a distribution; to change the prior use ab.with_prior.'
        )
    raise InvalidValue(
        f'reparam["{address}"]: expected ab.noncentered(), ab.bijection(transform), or a NumPyro '
        f"LocScaleReparam or TransformReparam, got {c!r}."
    )
