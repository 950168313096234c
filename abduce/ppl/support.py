"""Unconstrained coordinates of a site.

By default the bijection of the distribution's support (which may depend on other choices, as in
`Uniform(0, sigma)`). `ab.reparam` puts other coordinates in its place: a non-centred site has
`theta = loc + scale * u`, so that the density of `u` is standard while `theta`, its address and
the joint density stay what they are.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import biject_to, constraints
from numpyro.distributions import transforms as T

from abduce.errors import InvalidModel
from abduce.ppl.site import unwrapped

__all__ = ["PartlyCentered", "bijection", "support_bijection", "unconstrained_shape"]


class PartlyCentered:
    """`x = loc + scale**(1 - c) * (u - c * loc)`: centred at `c = 1`, non-centred at `c = 0`.

    Args:
        d: A location-scale distribution.
        c: Degree of centring of each number, the shape of a value.
    """

    def __init__(self, d: Any, c: Any):
        inner = unwrapped(d)
        self.loc = jnp.broadcast_to(inner.loc, c.shape)
        self.log_scale = jnp.broadcast_to(jnp.log(inner.scale), c.shape)
        self.c = c

    def __call__(self, u: Any) -> Any:
        return self.loc + jnp.exp((1 - self.c) * self.log_scale) * (u - self.c * self.loc)

    def _inverse(self, x: Any) -> Any:
        return self.c * self.loc + jnp.exp((self.c - 1) * self.log_scale) * (x - self.loc)

    def log_abs_det_jacobian(self, u: Any, x: Any) -> Any:
        return (1 - self.c) * self.log_scale


def bijection(d: Any, site: Any, centering: Any = None) -> Any:
    """The map from unconstrained coordinates to the values of one element.

    Args:
        d: The element's distribution.
        site: Its site.
        centering: Degree of centring of a location-scale family, or None.

    Raises:
        InvalidModel: No bijection is known for the support.
    """
    if centering is not None:
        return PartlyCentered(d, centering)
    if site.coords is not None:
        return site.coords.bijection(d, site)
    return support_bijection(d, site)


def support_bijection(d: Any, site: Any) -> T.Transform:
    """The bijection onto the support of a distribution."""
    try:
        support = d.support
        if support is None or constraints.is_dependent(support):
            raise NotImplementedError
        return biject_to(support)
    except NotImplementedError:
        raise InvalidModel(
            f"site {site.address!r} ({site.where}): no unconstrained coordinates are known for "
            f"{site.spec.family}, so gradient methods cannot move it. Choose coordinates with "
            f'ab.reparam(m, {{"{site.address}": ab.bijection(transform)}}), or use ab.mh or '
            f"ab.importance."
        ) from None


@functools.lru_cache(maxsize=65536)
def unconstrained_shape(site: Any) -> tuple[int, ...]:
    """Shape of one element's unconstrained coordinates."""
    support = site.spec.support
    if support is not None and site.coords is None and support.event_dim == 0:
        return site.shape
    found: list[tuple[int, ...]] = []

    def look(*leaves):
        found.append(tuple(bijection(site.spec.build(leaves), site).inverse_shape(site.shape)))

    jax.eval_shape(look, *(jax.ShapeDtypeStruct(s, t) for s, t in site.spec.avals))
    return found[0]
