"""What is known of a program before it runs for a population: what differs, what is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abduce.errors import InvalidModel
from abduce.inference.smc.cloud import Cloud, Particles
from abduce.ppl import _jax
from abduce.ppl.replay import Given, is_estimated
from abduce.ppl.site import has_sites, site_p

__all__ = ["carry_flags", "differing", "estimated_addresses", "evidence_scans", "live_variables"]


def live_variables(
    jaxpr: Any, outputs: Sequence[bool] | None = None, *, weighing: bool = False
) -> frozenset[Any]:
    """Variables of a program, at any depth, on which a site or a wanted output depends.

    Args:
        jaxpr: The program.
        outputs: Which of its outputs are wanted; none by default (what a model returns does not
            matter to its posterior).
        weighing: Sites that only record a value do not count.
    """
    live: set[Any] = set()
    inner, _ = _jax.inner_jaxpr(jaxpr)
    wanted = [False] * len(inner.outvars) if outputs is None else outputs
    _mark(inner, wanted, live, weighing)
    return frozenset(live)


def _mark(jaxpr: Any, wanted: Sequence[bool], live: set[Any], weighing: bool) -> None:
    def need(atom):
        if not isinstance(atom, _jax.Literal):
            live.add(atom)

    for atom, w in zip(jaxpr.outvars, wanted, strict=True):
        if w:
            need(atom)
    for eqn in reversed(jaxpr.eqns):
        outs = [v in live for v in eqn.outvars]
        if eqn.primitive is site_p:
            sited = not (weighing and eqn.params["site"].kind == "deterministic")
        else:
            sited = any(has_sites(s) for s in _jax.subjaxprs(eqn))
        if not (sited or any(outs)):
            continue
        for atom in eqn.invars:
            need(atom)
        if eqn.primitive is _jax.scan_p:
            nk = _jax.scan_split(eqn)[1]
            _mark(_jax.inner_jaxpr(eqn.params["jaxpr"])[0], [True] * nk + outs[nk:], live, weighing)
        elif sited and eqn.primitive is not site_p:
            for sub in _jax.subjaxprs(eqn):
                inner, _ = _jax.inner_jaxpr(sub)
                same = len(inner.outvars) == len(outs)
                _mark(inner, outs if same else [True] * len(inner.outvars), live, weighing)


def differing(jaxpr: Any, flags: Sequence[bool], cloud: Cloud) -> list[bool]:
    """Which outputs of a program differ by particle, if these inputs do."""
    inner, _ = _jax.inner_jaxpr(jaxpr)
    env: dict[Any, bool] = dict.fromkeys(inner.constvars, False)
    env.update(zip(inner.invars, flags, strict=True))

    def read(atom):
        return False if isinstance(atom, _jax.Literal) else env[atom]

    for eqn in inner.eqns:
        env.update(zip(eqn.outvars, _differing(eqn, [read(a) for a in eqn.invars], cloud),
                       strict=True))  # fmt: skip
    return [read(a) for a in inner.outvars]


def _differing(eqn: Any, flags: list[bool], cloud: Cloud) -> list[bool]:
    if eqn.primitive is site_p:
        site = eqn.params["site"]
        if site.kind == "param":
            return [False]
        if site.kind != "sample":
            return [any(flags[:1])] * len(eqn.outvars)
        if "obs" in site.roles and "mask" not in site.roles:
            return [flags[site.roles.index("obs")]]
        given = cloud.inputs.get(site.address)
        return [given is None or given.mask is not None or isinstance(given.value, Particles)]
    if not any(has_sites(sub) for sub in _jax.subjaxprs(eqn)):
        return [any(flags)] * len(eqn.outvars)
    if eqn.primitive is _jax.scan_p:
        nc, nk = _jax.scan_split(eqn)
        carry = carry_flags(eqn.params["jaxpr"], flags, nc, nk, cloud)
        return differing(eqn.params["jaxpr"], [*flags[:nc], *carry, *flags[nc + nk :]], cloud)
    if eqn.primitive is _jax.cond_p:
        return [True] * len(eqn.outvars)
    call = _jax.call_jaxpr(eqn)
    if call is None:
        raise InvalidModel(f"`{eqn.primitive.name}` cannot hold sites.")
    return differing(call[1], flags, cloud)


def carry_flags(body: Any, flags: Sequence[bool], nc: int, nk: int, cloud: Cloud) -> list[bool]:
    """Which carry slots of a scan differ by particle: a fixpoint."""
    carry = list(flags[nc : nc + nk])
    while True:
        outs = differing(body, [*flags[:nc], *carry, *flags[nc + nk :]], cloud)[:nk]
        new = [a or b for a, b in zip(carry, outs, strict=True)]
        if new == carry:
            return carry
        carry = new


def estimated_addresses(jaxpr: Any) -> set[str]:
    """Addresses of the sites whose density is estimated, at any depth."""
    inner, _ = _jax.inner_jaxpr(jaxpr)
    found: set[str] = set()
    for eqn in inner.eqns:
        if eqn.primitive is site_p:
            if is_estimated(eqn.params["site"]):
                found.add(eqn.params["site"].address)
        else:
            for sub in _jax.subjaxprs(eqn):
                found |= estimated_addresses(sub)
    return found


def evidence_scans(jaxpr: Any, given: Mapping[str, Given]) -> bool:
    """Whether a scan of the program has an observed site or a factor in it."""
    inner, _ = _jax.inner_jaxpr(jaxpr)

    def weighs(jaxpr):
        inner, _ = _jax.inner_jaxpr(jaxpr)
        for eqn in inner.eqns:
            if eqn.primitive is site_p:
                site = eqn.params["site"]
                if site.kind == "factor" or "obs" in site.roles or site.address in given:
                    return True
            elif any(weighs(s) for s in _jax.subjaxprs(eqn)):
                return True
        return False

    for eqn in inner.eqns:
        if eqn.primitive is _jax.scan_p:
            if weighs(eqn.params["jaxpr"]):
                return True
        elif any(evidence_scans(s, given) for s in _jax.subjaxprs(eqn)):
            return True
    return False
