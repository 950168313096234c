"""How an objective is run: which strategy each choice has, and what it costs in runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidModel
from abduce.inference.vi.analysis import require_smooth, tainted_variables
from abduce.inference.vi.credit import Credit
from abduce.inference.vi.linear import linear_variables
from abduce.inference.vi.strategies import (
    Strategy,
    default,
    enum,
    inspect,
    mvd,
    num_alternatives,
    resolve_continuous,
    score,
)
from abduce.inference.vi.tape import Tape
from abduce.ppl import _jax
from abduce.ppl.program import Program, SiteInfo
from abduce.ppl.site import unwrapped

__all__ = ["Plan", "grid_indices", "make_plan", "physical_shape", "walk_parts"]


@dataclasses.dataclass
class Plan:
    """How an objective is run.

    Attributes:
        strategies: By address.
        linear: As `Credit` takes it.
        joint: Choices that are summed out: mixed axes and number of alternatives.
        varied: Choices whose alternatives are run in turn: mixed axes and number of runs.
    """

    strategies: dict[str, Strategy]
    linear: frozenset[Any]
    joint: dict[str, tuple[tuple[int, ...], int]]
    varied: dict[str, tuple[tuple[int, ...], int]]

    def credit(self, **settings: Any) -> Credit:
        return Credit(self.strategies, self.linear, **settings)

    @property
    def grid(self) -> int:
        return math.prod(n for _, n in self.joint.values())


def physical_shape(info: SiteInfo) -> tuple[int, ...]:
    """Scans, mapped axes and batch shape, as they are in the program."""
    shape = [0] * len(info.shape)
    for size, p in zip(info.shape, info.perm, strict=True):
        shape[p] = size
    return tuple(shape[: len(shape) - info.event_dim])


def make_plan(chosen: Mapping[str, Strategy], program: Program) -> Plan:
    """Plans a staged objective.

    Args:
        chosen: Strategies from outside, by address; they take precedence over those of sites.
        program: The objective.

    Raises:
        InvalidModel: See `ab.expectation`.
    """
    avals = [v.aval for v in _jax.inner_jaxpr(program.jaxpr)[0].outvars]
    if len(avals) != 1 or avals[0].shape != () or not jnp.issubdtype(avals[0].dtype, jnp.inexact):
        raise InvalidModel(
            f"objective `{program.name}` must return one float scalar, got "
            f"{', '.join(str(a) for a in avals) or 'nothing'}. Sum or average over its elements."
        )
    latents = {a: s for a, s in program.sites.items() if s.is_latent}
    strategies: dict[str, Strategy] = {}
    for address, info in latents.items():
        strategy = chosen.get(address, info.site.grad)
        if strategy is not None and not isinstance(strategy, Strategy):
            raise InvalidModel(
                f"site {address!r} ({info.site.where}): grad= takes a strategy such as "
                f"ab.grad.score(), got {strategy!r}."
            )
        if strategy is None or isinstance(strategy, default):
            strategy = resolve_continuous(info.site) or default()
        strategy.check(info.site)
        strategies[address] = strategy
    if not any(s.credited for s in strategies.values()):
        require_smooth(program.jaxpr, strategies)
        return Plan(strategies, frozenset(), {}, {})
    linear = linear_variables(program.jaxpr, tainted_variables(program.jaxpr, strategies))
    uses = _uses(program, strategies, linear)
    joint, varied = {}, {}
    budget: dict[str, int] = {}
    sizes = {}
    for address, info in latents.items():
        strategy = strategies[address]
        if not isinstance(strategy, (enum, mvd, default)):
            continue
        axes = _mixed_axes(info, uses.get(address))
        elements = math.prod(physical_shape(info)[i] for i in axes)
        k = num_alternatives(info.site)
        sizes[address] = (axes, elements, k)
        if k is not None and not isinstance(strategy, mvd):
            budget[address] = k**elements if elements < 64 else 2**64
    total = 1
    for address in sorted(budget, key=lambda a: budget[a]):
        strategy = strategies[address]
        most = getattr(strategy, "max_joint", default.max_runs)
        if total * budget[address] <= most:
            total *= budget[address]
            joint[address] = (sizes[address][0], budget[address])
            strategies[address] = enum()
    for address, (axes, elements, _) in sizes.items():
        site = latents[address].site
        strategy = strategies[address]
        if isinstance(strategy, default):
            poisson = inspect(site, lambda d: type(unwrapped(d)).__name__ == "Poisson")
            poisson = poisson and elements <= default.max_runs and not site.event_dim
            strategies[address] = strategy = mvd() if poisson else score()
        if isinstance(strategy, (enum, mvd)) and address not in joint:
            varied[address] = (axes, elements * strategy.num_alternatives(site))
    require_smooth(program.jaxpr, strategies)
    return Plan(strategies, linear, joint, varied)


def _mixed_axes(info: SiteInfo, use: Any) -> tuple[int, ...]:
    """Axes of the program's layout along which some part of the cost mixes elements."""
    if use is None:
        return ()
    n = info.num_scans
    return tuple(sorted({s for s in use.scans if s < n} | {n + a for a in use.axes}))


def _uses(program: Program, strategies: Any, linear: Any) -> dict[str, Any]:
    plain = {a: score() if isinstance(s, default) else s for a, s in strategies.items()}
    credit = Credit(plain, linear)
    invars = _jax.inner_jaxpr(program.jaxpr)[0].invars
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in invars]

    def run(key, values):
        return walk_parts(credit, program, values, key, {})[0]

    jax.eval_shape(run, jax.eval_shape(lambda: jax.random.key(0)), avals)
    return credit.uses


def walk_parts(
    credit: Credit, program: Program, values: Any, key: Any, inputs: Any
) -> tuple[Any, Any]:
    zero = jnp.zeros((), jnp.result_type(float))
    tape = Tape(key, inputs, {}, zero, {}, ())
    (out,) = credit.run(program.jaxpr, values, tape)
    return credit.part(out, tape), tape.extra


def grid_indices(plan: Plan, program: Program, m: Any) -> dict[str, Any]:
    """Which value each summed-out choice takes in run `m` of the grid."""
    out = {}
    for address, (axes, runs) in plan.joint.items():
        info = program.sites[address]
        shape = physical_shape(info)
        k = num_alternatives(info.site)
        mine, m = m % runs, m // runs
        sizes = [shape[i] for i in axes]
        digits = (mine // (k ** np.arange(math.prod(sizes)))) % k
        full = [shape[i] if i in axes else 1 for i in range(len(shape))]
        out[address] = jnp.broadcast_to(digits.reshape(full), shape)
    return out
