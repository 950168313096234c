"""Parameters and states: which latents of a sequential model belong to the particles' paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abduce.errors import InvalidAlgorithm, InvalidModel
from abduce.inference.problem import Problem
from abduce.ppl import _jax
from abduce.ppl.selection import matching
from abduce.ppl.site import has_sites, site_p

__all__ = ["require_no_late_use", "split_latents"]


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
        constant, initial, _ = _roles(problem.program.jaxpr)
        chosen = {
            a for a, s in latents.items() if s.num_scans or (a in initial and a not in constant)
        }
    if not any(latents[a].num_scans for a in chosen):
        raise InvalidAlgorithm(
            f"{name}: `{problem.program.name}` has no latent inside a scan, so there is no path to "
            f"draw with particles. Use ab.nuts or ab.smc."
        )
    return [a for a in latents if a not in chosen], [a for a in latents if a in chosen]


def require_no_late_use(problem: Problem, states: Sequence[str], call: str) -> None:
    """A past that is drawn anew may be weighed by nothing after the scan but what it returns.

    Raises:
        InvalidModel: A site after the scan, or another scan, uses a state drawn before it.
    """
    late = _roles(problem.program.jaxpr)[2] & set(states)
    if late:
        raise InvalidModel(
            f"{call} draws the past of a path anew, but {', '.join(map(repr, sorted(late)))}, "
            f"drawn before the scan, is used after it too. Put it into the scan's carry, leave it "
            f"out of states=, or set ancestor_sampling=False and backward_sampling=False."
        )


def _roles(jaxpr: Any) -> tuple[set[str], set[str], set[str]]:
    """Addresses outside of scans: that reach one as a constant or input; as first carry; and that
    reach a site after the first scan otherwise than through it.
    """
    constant: set[str] = set()
    initial: set[str] = set()
    late: set[str] = set()
    passed = False  # a scan with sites

    def run(jaxpr: Any, args: Sequence[frozenset[str]]) -> list[frozenset[str]]:
        nonlocal passed
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
                if passed and site.kind in ("sample", "factor"):
                    late.update(union)
                if site.kind == "sample" and "obs" not in site.roles:
                    outs = [frozenset({site.address})] * len(outs)
            elif any(has_sites(s) for s in _jax.subjaxprs(eqn)):
                if passed and _jax.call_jaxpr(eqn) is None:
                    late.update(union)
                if eqn.primitive is _jax.scan_p:
                    passed = True
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
    return constant, initial, late
