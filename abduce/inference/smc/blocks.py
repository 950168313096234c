"""Parameters and states: which latents of a sequential model belong to the particles' paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abduce.errors import InvalidAlgorithm
from abduce.inference.problem import Problem
from abduce.ppl import _jax
from abduce.ppl.selection import matching
from abduce.ppl.site import has_sites, site_p

__all__ = ["split_latents"]


def split_latents(problem: Problem, states: Any, name: str) -> tuple[list[str], list[str]]:
    """Splits the latents into parameters and states.

    States are the latents inside scans, and those before one that enter it through its first carry
    alone (an initial state). Whatever else a scan uses is a parameter.

    Args:
        problem: The conditioned model.
        states: A selection that decides instead, or None.
        name: For messages.

    Returns:
        Addresses of the parameters and of the states, in program order.
    """
    latents = problem.latents
    if states is not None:
        chosen = matching(states, latents)
    else:
        constant, initial = _roles(problem.program.jaxpr)
        chosen = {
            a for a, s in latents.items() if s.num_scans or (a in initial and a not in constant)
        }
    if not any(latents[a].num_scans for a in chosen):
        raise InvalidAlgorithm(
            f"{name}: `{problem.program.name}` has no latent inside a scan, so there is no path to "
            f"draw with particles. Use ab.nuts or ab.smc."
        )
    return [a for a in latents if a not in chosen], [a for a in latents if a in chosen]


def _roles(jaxpr: Any) -> tuple[set[str], set[str]]:
    """Addresses outside of scans that reach one as a constant or input, and as first carry."""
    constant: set[str] = set()
    initial: set[str] = set()

    def run(jaxpr: Any, args: Sequence[frozenset[str]]) -> list[frozenset[str]]:
        inner, _ = _jax.inner_jaxpr(jaxpr)
        env: dict[Any, frozenset[str]] = dict.fromkeys(inner.constvars, frozenset())
        env.update(zip(inner.invars, args, strict=True))

        def read(atom):
            return frozenset() if isinstance(atom, _jax.Literal) else env[atom]

        for eqn in inner.eqns:
            vals = [read(a) for a in eqn.invars]
            union = frozenset().union(*vals)
            outs = [union] * len(eqn.outvars)
            if eqn.primitive is site_p:
                site = eqn.params["site"]
                if site.kind == "sample" and "obs" not in site.roles:
                    outs = [frozenset({site.address})] * len(outs)
            elif any(has_sites(s) for s in _jax.subjaxprs(eqn)):
                if eqn.primitive is _jax.scan_p:
                    nc, nk = _jax.scan_split(eqn)
                    constant.update(*vals[:nc], *vals[nc + nk :])
                    initial.update(*vals[nc : nc + nk])
                    outs = [frozenset()] * len(outs)
                elif (call := _jax.call_jaxpr(eqn)) is not None:
                    outs = run(call[1], vals)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in inner.outvars]

    inner, _ = _jax.inner_jaxpr(jaxpr)
    run(jaxpr, [frozenset()] * len(inner.invars))
    return constant, initial
