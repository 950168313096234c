"""What an estimator amortizes over, read off the model.

A `Layout` says which sites are latent and where their coordinates lie in one vector, which are
observed, and how observations and arguments are arranged for a network (`arrangement.py`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.arrangement import Group, make_groups
from abduce.amortized.posing import check_observed, draw_values, pose
from abduce.errors import InvalidAlgorithm, InvalidModel, InvalidValue
from abduce.inference.problem import Problem, make_problem
from abduce.inference.target import FlatTarget, make_target, unconstrain_now
from abduce.ppl.model import Model
from abduce.ppl.operations import outside_scopes, run_program
from abduce.ppl.program import Arguments, Program, SiteInfo, stage_packed
from abduce.ppl.replay import Given, Replay

__all__ = ["Discrete", "Group", "Latent", "Layout", "Simulation", "make_layout", "read_arguments"]


@dataclasses.dataclass(frozen=True)
class Latent:
    """A continuous latent: its coordinates are `vector[start:stop]`."""

    address: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Discrete:
    """A discrete latent with finitely many values `low, ..., low + num_values - 1`."""

    address: str
    shape: tuple[int, ...]
    low: int
    num_values: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """See the module's docstring. Hashable.

    Attributes:
        model_name: For messages.
        latents: The continuous ones; `dim` is the length of their vector.
        discrete: The discrete ones, in the order in which they are drawn.
        groups: What the network reads.
        shapes: Shape of each observed site at the largest size.
        kinds: How each observed site is turned into features: 'real', 'positive', 'count', or
            'classes:<low>:<number>'.
        arguments: Shape of each argument array.
        sizes: Least and greatest number of elements of the sets, or None if it does not vary.
        designs: Whether the arguments are drawn.
        conditional: Whether latents stand in branches.
    """

    model_name: str
    latents: tuple[Latent, ...]
    discrete: tuple[Discrete, ...]
    groups: tuple[Group, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    kinds: tuple[tuple[str, str], ...]
    arguments: tuple[tuple[int, ...], ...]
    sizes: tuple[int, int] | None
    designs: bool
    conditional: bool

    @property
    def addresses(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all latents."""
        found = {s.address: s.shape for s in self.latents}
        return found | {d.address: d.shape for d in self.discrete}

    @property
    def dim(self) -> int:
        """Number of continuous coordinates."""
        return self.latents[-1].stop if self.latents else 0

    @property
    def observed(self) -> tuple[str, ...]:
        """Addresses of what is observed."""
        return tuple(a for a, _ in self.shapes)


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Draws training examples from a model; hashable, for use in compiled programs.

    `data` is what varies: `{"arguments": Arguments, "designs": Arguments or None}`.
    """

    layout: Layout

    def one(self, key: Any, data: Any) -> dict[str, Any]:
        """One example: `u` (coordinates), `discrete`, `observed`, `arguments`."""
        k1, k2 = jax.random.split(key)
        values, arguments = draw_values(data, k1)
        return self.arrange(values, arguments, k2)

    def arrange(self, values: Any, arguments: Arguments, key: Any) -> dict[str, Any]:
        """Values by address, in the users' layout, as a training example."""
        layout = self.layout
        u = jnp.zeros((0,), jnp.result_type(float))
        if layout.dim:
            with outside_scopes():
                program = stage_packed(arguments)
            target, held = continuous_target(layout, program, arguments, values)
            given = {
                s.address: Given(
                    program.sites[s.address].to_physical(values[s.address]), trusted=True
                )
                for s in target.slots
            }
            u = unconstrain_now(target, held, given)
            if layout.conditional:
                replay = Replay(record=frozenset({"value"}), score=False)
                everything = {a: Given(x, trusted=True) for a, x in values.items()}
                with outside_scopes():
                    records = run_program(replay, program, arguments, None, everything)["records"]
                u = fill_inactive(target, program, records, u, key)
        return {
            "u": u,
            "discrete": {
                d.address: (values[d.address].reshape(-1) - d.low).astype(jnp.int32)
                for d in layout.discrete
            },
            "observed": {a: values[a] for a in layout.observed},
            "arguments": tuple(arguments.dynamic) if layout.arguments else (),
        }


def continuous_target(
    layout: Layout, program: Program, arguments: Arguments, values: Any
) -> tuple[FlatTarget, dict[str, Any]]:
    """The continuous latents' target, everything else held at `values`.

    Usable on tracers; `values` has every observed and discrete site.
    """
    from abduce.inference.target import Slot, scan_lengths
    from abduce.ppl.support import unconstrained_shape

    slots, start = [], 0
    for latent in layout.latents:
        info = program.sites[latent.address]
        site = info.site
        scans = tuple(scan_lengths(info))
        shape = (*scans, *site.axis_sizes, *unconstrained_shape(site))
        batch_ndim = len(scans) + len(site.axes) + len(site.shape) - site.event_dim
        size = math.prod(shape)
        slots.append(Slot(latent.address, shape, start, start + size, batch_ndim))
        start += size
    held = {
        a: Given(program.sites[a].to_physical(values[a]), trusted=True)
        for a in (*layout.observed, *(d.address for d in layout.discrete))
    }
    data = {"dynamic": arguments.dynamic, "given": held, "hidden": {}, "centering": {}}
    return FlatTarget(arguments.static, tuple(slots), start), data


def fill_inactive(target: FlatTarget, program: Program, records: Any, u: Any, key: Any) -> Any:
    """Coordinates of sites in branches not taken become standard normal draws.

    That is the density which `FlatTarget` gives them (Carlin and Chib 1995).
    """
    noise = jax.random.normal(key, u.shape, u.dtype)
    for slot in target.slots:
        info = program.sites[slot.address]
        if not info.conditional:
            continue
        active = info.to_physical(records[slot.address]["active"])
        active = active.reshape(active.shape + (1,) * (len(slot.shape) - active.ndim))
        on = jnp.broadcast_to(active, slot.shape).reshape(-1)
        part = jnp.where(on, u[slot.start : slot.stop], noise[slot.start : slot.stop])
        u = u.at[slot.start : slot.stop].set(part)
    return u


# ---------------------------------------------------------------------- made once


def make_layout(
    name: str,
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observed: Any,
    designs: Model | None,
    sizes: Any,
    key: Any,
) -> tuple[Layout, dict[str, Any]]:
    """Reads a model.

    Returns:
        The layout, and the `data` of its `Simulation`.

    Raises:
        UnknownAddress: `observed=` names no site.
        InvalidAlgorithm: A latent that cannot be amortized; sizes that do not fit.
    """
    problem, drawn = pose(name, model, args, kwargs, designs, key)
    sites = check_observed(name, problem, observed)
    trace = problem.model.simulate(key, *problem.args, **problem.kwargs)
    values = {a: jnp.asarray(x) for a, x in trace.choices.items()}
    latents, discrete = _latents(name, problem, sites, values)
    leaves = problem.arguments.dynamic
    groups = make_groups(problem, sites, values, key, drawn is not None)
    used = drawn is not None or any(g.arguments for g in groups)
    layout = Layout(
        problem.program.name, latents, discrete, groups,
        tuple((a, problem.program.sites[a].shape) for a in sites),
        tuple((a, _kind(problem.program.sites[a])) for a in sites),
        tuple(tuple(np.shape(x)) for x in leaves) if used else (),
        _sizes(name, sizes, groups), drawn is not None,
        any(problem.program.sites[s.address].conditional for s in latents),
    )  # fmt: skip
    return layout, {"arguments": problem.arguments, "designs": drawn}


def _latents(
    name: str, problem: Problem, observed: tuple[str, ...], values: dict[str, Any]
) -> tuple[tuple[Latent, ...], tuple[Discrete, ...]]:
    program = problem.program
    discrete = []
    for a, info in program.latents.items():
        if a in observed or not info.is_discrete:
            continue
        if info.conditional:
            raise InvalidAlgorithm(
                f"ab.{name}: the discrete latent {a!r} is in a branch. Draw it outside and use it "
                f"in the branch."
            )
        low, count = _finite(name, info)
        discrete.append(Discrete(a, info.shape, low, count))
    held = (*observed, *(d.address for d in discrete))
    if all(a in held for a in program.latents):
        return (), tuple(discrete)
    for a, info in program.latents.items():
        if a not in held and not info.has_density and info.site.coords is None:
            raise InvalidAlgorithm(
                f"ab.{name}: the latent {a!r} ({info.site.where}) is a dist.Simulator, whose "
                f"support is unknown, so it has no unconstrained coordinates. Observe it, or give "
                f"coordinates with ab.reparam(m, {{{a!r}: ab.bijection(transform)}})."
            )
    conditioned = make_problem(
        problem.model, problem.args, {a: values[a] for a in held}, problem.kwargs, None
    )
    target, _ = make_target(conditioned, f"ab.{name}")
    latents = tuple(
        Latent(s.address, program.sites[s.address].shape, s.start, s.stop) for s in target.slots
    )
    return latents, tuple(discrete)


def _finite(name: str, info: SiteInfo) -> tuple[int, int]:
    """Least value and number of values of a discrete site."""
    support = info.site.spec.support
    low = high = None
    if info.dtype == jnp.bool_ or (support is not None and info.family == "Bernoulli"):
        return 0, 2
    inner = support
    while inner is not None and hasattr(inner, "base_constraint"):
        inner = inner.base_constraint
    if inner is not None and hasattr(inner, "lower_bound") and hasattr(inner, "upper_bound"):
        low = int(np.min(np.asarray(inner.lower_bound)))
        high = int(np.max(np.asarray(inner.upper_bound)))
    if low is None or high is None or high - low > 4096:
        raise InvalidAlgorithm(
            f"ab.{name}: the discrete latent {info.address!r} ({info.family}) needs a support of "
            f"finitely many values that is the same whatever else is drawn. Use a bounded family, "
            f"such as Categorical, or sum it out with ab.marginal(m, keep=[...], via=...)."
        )
    return low, high - low + 1


def _kind(info: SiteInfo) -> str:
    """How the values of an observed site become features."""
    support = info.site.spec.support
    inner = support
    while inner is not None and hasattr(inner, "base_constraint"):
        inner = inner.base_constraint
    lower = getattr(inner, "lower_bound", None)
    if info.is_discrete:
        upper = getattr(inner, "upper_bound", None)
        if info.family == "Categorical" and upper is not None and np.max(np.asarray(upper)) < 64:
            return f"classes:0:{int(np.max(np.asarray(upper))) + 1}"
        return "count" if lower is not None and upper is None else "real"
    positive = lower is not None and not hasattr(inner, "upper_bound")
    return "positive" if positive and np.all(np.asarray(lower) == 0) else "real"


def _sizes(name: str, sizes: Any, groups: tuple[Group, ...]) -> tuple[int, int] | None:
    if sizes is None:
        return None
    sets = [g for g in groups if g.kind == "set"]
    if not sets:
        raise InvalidAlgorithm(
            f"ab.{name}: sizes= varies the number of elements of a set, but no observed site has "
            f"an axis along which the order does not matter (and which no latent shares)."
        )
    if len(sets) > 1:
        raise InvalidAlgorithm(
            f"ab.{name}: sizes= varies one set, but there are {len(sets)}: "
            f"{', '.join('/'.join(g.sites) for g in sets)}."
        )
    try:
        low, high = (int(s) for s in sizes)
    except (TypeError, ValueError):
        raise InvalidValue(
            f"ab.{name}: sizes= takes (least, greatest), as (1, {sets[0].size}), got {sizes!r}."
        ) from None
    if not 0 <= low <= high == sets[0].size:
        raise InvalidValue(
            f"ab.{name}: sizes={sizes!r}, but the model is staged with {sets[0].size} elements of "
            f"{'/'.join(sets[0].sites)}. The greatest size has to be that number, the least at "
            f"least 0."
        )
    return low, high


def read_arguments(layout: Layout, problem: Problem) -> tuple[Any, ...]:
    """The argument arrays that the network reads, checked against the layout.

    Raises:
        InvalidModel: Their number differs.
    """
    if not layout.arguments:
        return ()
    leaves = problem.arguments.dynamic
    if len(leaves) != len(layout.arguments):
        raise InvalidModel(
            f"`{problem.program.name}` has {len(leaves)} argument arrays, but the estimator was "
            f"trained with {len(layout.arguments)}."
        )
    return tuple(leaves)
