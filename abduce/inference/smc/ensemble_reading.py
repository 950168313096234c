"""What an ensemble Kalman filter must know of a model before it runs.

Which scan holds the data; which latents can be moved, and in which coordinates; and what of a step
follows the old carry otherwise than through the step's latents. The latter is moved itself (a
deterministic state, say); everything else is computed anew from the moved latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from numpyro.distributions import biject_to

from abduce.errors import DiscreteLatent, InvalidModel
from abduce.ppl import _jax
from abduce.ppl.checks import is_whole_space
from abduce.ppl.dataflow import Label, propagate
from abduce.ppl.replay import Given
from abduce.ppl.site import Site, has_sites, site_p

__all__ = ["Follows", "Sites", "bijector", "follows_carry", "read_sites"]

_NAME = "ab.ensemble_kalman"


@dataclasses.dataclass
class Sites:
    """The sites of a model, sorted by what they are here.

    Attributes:
        scan: The equation of the scan with the data, or None.
        outer: Latents before the scan.
        latents: Of a step: those that are moved.
        hidden: Of a step: counts observed in part, whose hidden entries are drawn anew.
        observed: Of a step.
    """

    scan: Any = None
    outer: dict[str, Site] = dataclasses.field(default_factory=dict)
    latents: dict[str, Site] = dataclasses.field(default_factory=dict)
    hidden: dict[str, Site] = dataclasses.field(default_factory=dict)
    observed: dict[str, Site] = dataclasses.field(default_factory=dict)


def read_sites(jaxpr: Any, given: Mapping[str, Given]) -> Sites:
    """Sorts the sites of a program.

    Raises:
        InvalidModel: The model has no scan with data, several scans with sites, data outside of
            the scan, a factor, or a site in a branch or in a scan inside the scan.
        DiscreteLatent: A latent is discrete.
    """
    sites = Sites()
    _outside(_jax.inner_jaxpr(jaxpr)[0], given, sites)
    if sites.scan is None or not sites.observed:
        raise InvalidModel(
            f"{_NAME} moves members at the steps of a jax.lax.scan with data in it, and the model "
            f"has none. Observe a site of the scan (given=), or use ab.smc or ab.nuts."
        )
    return sites


def _outside(jaxpr: Any, given: Mapping[str, Given], sites: Sites) -> None:
    for eqn in jaxpr.eqns:
        if eqn.primitive is site_p:
            site = eqn.params["site"]
            _require_plain(site)
            if site.kind != "sample":
                continue
            if _seen(site, given) is not None:
                raise InvalidModel(
                    f"{_NAME}: site {site.address!r} ({site.where}) is observed outside of the "
                    f"scan, where nothing is moved. Observe it at a step of the scan, or use "
                    f"ab.smc."
                )
            if sites.scan is not None:
                raise InvalidModel(
                    f"{_NAME}: latent {site.address!r} ({site.where}) is drawn after the scan. "
                    f"Leave it out, and draw it from post.predict(model=...)."
                )
            _require_continuous(site)
            sites.outer[site.address] = site
            continue
        if not any(has_sites(s) for s in _jax.subjaxprs(eqn)):
            continue
        if eqn.primitive is _jax.scan_p:
            if sites.scan is not None:
                raise InvalidModel(
                    f"{_NAME}: the model has several scans with sites. Write them as one, or use "
                    f"ab.smc, which takes several."
                )
            sites.scan = eqn
            _inside(_jax.inner_jaxpr(eqn.params["jaxpr"])[0], given, sites)
            continue
        call = _jax.call_jaxpr(eqn)
        if call is None:
            raise _branch(eqn)
        _outside(_jax.inner_jaxpr(call[1])[0], given, sites)


def _inside(jaxpr: Any, given: Mapping[str, Given], sites: Sites) -> None:
    for eqn in jaxpr.eqns:
        if eqn.primitive is site_p:
            _sort(eqn.params["site"], given, sites)
            continue
        if not any(has_sites(s) for s in _jax.subjaxprs(eqn)):
            continue
        call = None if eqn.primitive is _jax.scan_p else _jax.call_jaxpr(eqn)
        if call is None:
            raise _branch(eqn)
        _inside(_jax.inner_jaxpr(call[1])[0], given, sites)


def _sort(site: Site, given: Mapping[str, Given], sites: Sites) -> None:
    _require_plain(site)
    if site.kind != "sample":
        return
    seen = _seen(site, given)
    if seen is None:
        _require_continuous(site)
        sites.latents[site.address] = site
        return
    if site.spec.family == "Categorical":
        raise InvalidModel(
            f"{_NAME}: site {site.address!r} ({site.where}) is Categorical: members cannot be "
            f"moved by a difference of categories. Use ab.smc."
        )
    if "MaskedDistribution" in str(site.spec.treedef):
        raise InvalidModel(
            f"{_NAME}: site {site.address!r} ({site.where}) is observed under d.mask(...). Say "
            f"which entries are observed: given={{{site.address!r}: ab.masked(values, "
            f"observed=...)}}."
        )
    sites.observed[site.address] = site
    if seen == "partly":
        if jnp.issubdtype(site.dtype, jnp.floating):
            sites.latents[site.address] = site
        else:
            sites.hidden[site.address] = site


def _seen(site: Site, given: Mapping[str, Given]) -> str | None:
    supplied = given.get(site.address)
    wholly = "obs" in site.roles and "mask" not in site.roles
    if wholly or (supplied is not None and supplied.mask is None):
        return "wholly"
    return "partly" if "mask" in site.roles or supplied is not None else None


def _branch(eqn: Any) -> InvalidModel:
    return InvalidModel(
        f"{_NAME}: sites inside a `{eqn.primitive.name}` cannot be moved along with the rest. "
        f"Draw them outside of the branch or loop (jax.vmap for a loop whose turns are "
        f"independent), or use ab.smc."
    )


def _require_plain(site: Site) -> None:
    if site.kind == "factor":
        raise InvalidModel(
            f"{_NAME}: factor {site.address!r} ({site.where}) is a weight, which cannot be "
            f"simulated. Write it as an observed site, or use ab.smc."
        )
    if site.kind == "auxiliary" or (site.spec is not None and site.spec.family == "Estimated"):
        raise InvalidModel(
            f"{_NAME}: site {site.address!r} ({site.where}) is a program with an estimated "
            f"density. Inline its model, or use ab.smc."
        )
    if site.kind == "sample" and ("guard" in site.roles or "scale" in site.roles):
        what = "in a branch" if "guard" in site.roles else "under ab.scaled"
        raise InvalidModel(
            f"{_NAME}: site {site.address!r} ({site.where}) is {what}, which has no meaning for a "
            f"filter that only simulates. Use ab.smc."
        )


def _require_continuous(site: Site) -> None:
    if not jnp.issubdtype(site.dtype, jnp.floating):
        raise DiscreteLatent(
            f"{_NAME} moves members by differences, but latent {site.address!r} ({site.where}) is "
            f"{site.spec.family}, shape {site.full_shape}. Use ab.smc, which takes any latent."
        )


def bijector(site: Site) -> Any:
    """The map from unconstrained coordinates to values; None for the identity.

    Raises:
        InvalidModel: The support depends on other choices.
    """
    support = site.spec.support
    if site.spec.family == "Simulator" or (support is not None and is_whole_space(support)):
        return None
    if support is None:
        raise InvalidModel(
            f"{_NAME}: the support of site {site.address!r} ({site.where}, {site.spec.family}) "
            f"depends on other values, so that members have no common coordinates. Write it as a "
            f"function of a site whose support is fixed."
        )
    return biject_to(support)


@dataclasses.dataclass(frozen=True)
class Follows:
    """What of a step follows the old carry otherwise than through the step's latents.

    Attributes:
        outs: The body's outputs.
        sites: Deterministic sites, and latents given their parents, by address.
    """

    outs: tuple[bool, ...]
    sites: dict[str, bool]


def follows_carry(frame: Any, sites: Sites) -> Follows:
    """Follows the carry's slots that differ by member through the body of a scan."""
    inner, _ = _jax.inner_jaxpr(frame.body)
    old = {Label("carry")}
    rest = len(inner.invars) - len(frame.consts) - frame.nk
    inputs = [
        *([()] * len(frame.consts)), *(old if m else () for m in frame.carry_flags), *([()] * rest)
    ]  # fmt: skip
    found: dict[str, bool] = {}

    def comes(labels):
        return any(x.source == "carry" for x in labels)

    def visit(v):
        address = v.site.address
        found[address] = found.get(address, False) or comes(v.inputs)
        if v.site.kind != "sample":
            return set(v.inputs)
        if address in sites.latents or address in sites.hidden:
            return {v.label(address)}
        return set(v.operand("obs"))

    outs = propagate(frame.body, visit, inputs)
    return Follows(tuple(comes(x) for x in outs), found)
