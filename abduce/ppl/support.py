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
from numpyro.distributions import biject_to, constraints
from numpyro.distributions import transforms as T

from abduce.errors import InvalidModel

__all__ = ["bijection", "support_bijection", "unconstrained_shape"]


def bijection(d: Any, site: Any) -> T.Transform:
    """The map from unconstrained coordinates to the values of one element.

    Args:
        d: The element's distribution.
        site: Its site.

    Raises:
        InvalidModel: No bijection is known for the support.
    """
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
