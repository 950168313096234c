"""The posterior of a model as a density over one flat vector of unconstrained coordinates.

Gradient methods work on a single vector: thousands of scalar arguments would cost XLA seconds of
compile time. A `FlatTarget` is hashable and takes the data as an argument, so that programs
compiled for it are found again when only the data change.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to

from abduce.errors import InvalidAlgorithm, InvalidValue
from abduce.inference.problem import Problem
from abduce.ppl import _jax
from abduce.ppl.checks import is_whole_space
from abduce.ppl.operations import outside_scopes, run_program, to_physical
from abduce.ppl.program import Arguments, Program, SiteInfo, Static, stage_packed
from abduce.ppl.replay import Given, Replay, Sums
from abduce.ppl.support import unconstrained_shape

__all__ = ["FlatTarget", "Slot", "make_target"]


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one site lies in the flat vector.

    Attributes:
        address: Of the site.
        shape: Of its coordinates, in the program's layout: scans, mapped axes, batch, coordinates.
        start, stop: Range in the vector.
        batch_ndim: Leading dimensions of `shape` that index elements.
        hidden: For a partly observed site, the number of entries to infer; else None.
    """

    address: str
    shape: tuple[int, ...]
    start: int
    stop: int
    batch_ndim: int
    hidden: int | None = None


@dataclasses.dataclass(frozen=True)
class FlatTarget:
    """Log density of a model over unconstrained coordinates; call it with `(data, q)`.

    Attributes:
        static: The static part of the packed model.
        slots: The layout of the vector.
        dim: Its length.
    """

    static: Static
    slots: tuple[Slot, ...]
    dim: int

    def __call__(self, data: Any, q: Any) -> Any:
        """Log density at `q`, shape `(dim,)`, including the log Jacobian; in nats."""
        sites = self.program(data).sites
        conditional = [s for s in self.slots if sites[s.address].conditional]
        record = frozenset({"value"} if conditional else ())  # branches record `active` with it
        out = self.run(Replay(record=record), data, q)
        log_density = out["log_density"]
        for slot in conditional:
            active = sites[slot.address].to_physical(out["records"][slot.address]["active"])
            log_density = log_density + self._inactive(slot, active, q)
        return log_density

    def split(self, data: Any, q: Any) -> tuple[Any, Any]:
        """Log prior density at `q` (with the log Jacobian) and log likelihood, in nats.

        The likelihood is what observed sites and factors contribute; the two add up to the
        density.
        """
        out = self.split_run(data, q)
        return out["log_density"], out["weight"]

    def split_run(self, data: Any, q: Any, record: frozenset[str] = frozenset()) -> dict[str, Any]:
        """`run` with the log prior as `log_density` and the log likelihood as `weight`."""
        sites = self.program(data).sites
        conditional = [s for s in self.slots if sites[s.address].conditional]
        wanted = record | {"value"} if conditional else record
        split = Split(wanted, latents=frozenset(s.address for s in self.slots))
        out = self.run(split, data, q, weight=True)
        for slot in conditional:
            active = sites[slot.address].to_physical(out["records"][slot.address]["active"])
            out["log_density"] = out["log_density"] + self._inactive(slot, active, q)
        return out

    def _inactive(self, slot: Slot, active: Any, q: Any) -> Any:
        """Coordinates of inactive sites get a standard normal density, so that the law is proper.

        The active part keeps its marginal law (Carlin and Chib 1995).
        """
        u = q[slot.start : slot.stop].reshape(slot.shape)
        logp = -0.5 * u**2 - 0.5 * math.log(2 * math.pi)
        active = active.reshape(active.shape + (1,) * (logp.ndim - active.ndim))
        return jnp.sum(jnp.where(active, 0.0, logp))

    def program(self, data: Any) -> Program:
        """The staged program."""
        with outside_scopes():
            return stage_packed(Arguments(self.static, data["dynamic"]))

    def run(self, replay: Replay, data: Any, q: Any, *, weight: bool = False) -> dict[str, Any]:
        """Interprets the model at `q`; per-site records come in the users' layout."""
        with outside_scopes():
            arguments = Arguments(self.static, data["dynamic"])
            program = stage_packed(arguments)
            inputs = dict(data["given"])
            for slot in self.slots:
                inputs[slot.address] = self._given(slot, data, q, inputs.get(slot.address))
            return run_program(
                replay, program, arguments, None, inputs, weight=weight, physical=True
            )

    def _given(self, slot: Slot, data: Any, q: Any, observed: Given | None) -> Given:
        u = q[slot.start : slot.stop]
        if slot.hidden is None:
            return Given(
                u.reshape(slot.shape),
                reference=None if observed is None else observed.reference,
                centering=data["centering"].get(slot.address),
                unconstrained=True,
            )
        n = math.prod(slot.shape[: slot.batch_ndim])
        width = math.prod(slot.shape[slot.batch_ndim :])
        full = jnp.zeros((n, width), q.dtype)
        full = full.at[data["hidden"][slot.address]].set(u.reshape(slot.hidden, width))
        full = full.reshape(slot.shape)
        value = None if observed is None else observed.value
        mask = None if observed is None else observed.mask
        reference = None if observed is None else observed.reference
        return Given(value, mask, hidden=full, reference=reference)


@dataclasses.dataclass(frozen=True)
class Split(Replay):
    """Sums latents and evidence apart: `log_density` is the log prior, `weight` the rest.

    Subtracting one from the total would lose digits where the likelihood is large, and would give
    NaN where it is zero.

    Attributes:
        latents: Addresses of the sites to infer; of one observed in part, the hidden entries.
    """

    latents: frozenset[str] = frozenset()

    def site(self, site, operands, given, key, acc):
        mask = None if given is None else given.mask
        mixed = site.address in self.latents and (mask is not None or "mask" in site.roles)
        inner: Replay = Replay(self.record)
        if mixed:
            inner = Replay(self.record | {"score", "mask", "jacobian"})
        values, sums, record = inner.site(site, operands, given, key, Sums.zero())
        total = sums.log_density
        prior, evidence = (total, None) if site.address in self.latents else (None, total)
        if mixed:
            score, seen = record["score"], record.get("mask")
            if mask is not None:
                seen = mask if seen is None else seen | mask
            evidence = jnp.sum(jnp.where(seen, score, 0.0))
            prior = jnp.sum(jnp.where(seen, 0.0, score))
            if "jacobian" in record:
                prior = prior + jnp.sum(record["jacobian"])
            record = {k: x for k, x in record.items() if k in self.record or k == "active"}
        return values, acc.add(prior, evidence), record


def hidden_index(info: SiteInfo, given: Given | None, program: Program) -> np.ndarray:
    """Flat indices of the entries to infer, over the element dimensions in program layout."""
    mask = program_mask(info) if given is None else info.to_physical(given.mask)
    if not _jax.is_concrete(mask):
        raise InvalidAlgorithm(
            f"site {info.address!r} is masked by a traced array. Gradient methods need to know how "
            f"many entries are hidden: pass the mask as a concrete array, outside jit and vmap."
        )
    return np.flatnonzero(~np.asarray(mask).reshape(-1))


def program_mask(info: SiteInfo) -> Any:
    """A mask given with obs=ab.masked(...) inside the model is not visible from outside."""
    raise InvalidAlgorithm(
        f"site {info.address!r} ({info.site.where}) is partly observed inside the model. For "
        f'gradient methods pass it from outside: given={{"{info.address}": ab.masked(...)}}.'
    )


def make_target(problem: Problem, name: str) -> tuple[FlatTarget, dict[str, Any]]:
    """Lays out the latents of a problem.

    Args:
        problem: With continuous latents only.
        name: Of the algorithm, for messages.

    Returns:
        The target, and the data it is called with.
    """
    problem.require_latents(name)
    problem.require_continuous(name)
    slots, hidden = [], {}
    start = 0
    for address, info in problem.latents.items():
        site = info.site
        scans = tuple(scan_lengths(info))
        element = unconstrained_shape(site)
        batch_ndim = len(scans) + len(site.axes) + len(site.shape) - site.event_dim
        shape = (*scans, *site.axis_sizes, *element)
        count = None
        given = problem.given.get(address)
        if info.partial or (given is not None and given.mask is not None):
            index = hidden_index(info, given, problem.program)
            hidden[address] = jnp.asarray(index, jnp.int32)
            count = len(index)
            if count == 0:
                continue
            width = math.prod(shape[batch_ndim:])
            size = count * width
        else:
            size = math.prod(shape)
        slots.append(Slot(address, shape, start, start + size, batch_ndim, count))
        start += size
    if start == 0:
        raise InvalidAlgorithm(f"{name}: the latents of `{problem.program.name}` are all empty.")
    sites = problem.program.sites
    inputs = {a: to_physical(sites[a], g) for a, g in problem.given.items()}
    for address, index in hidden.items():
        if not len(index):  # nothing is hidden after all
            inputs[address] = dataclasses.replace(inputs[address], mask=None)
    data = {
        "dynamic": problem.arguments.dynamic,
        "given": inputs,
        "hidden": hidden,
        "centering": {},
    }
    return FlatTarget(problem.arguments.static, tuple(slots), start), data


def scan_lengths(info: SiteInfo) -> list[int]:
    """Lengths of the scans around a site, outermost first."""
    sizes = {p: n for p, n in zip(info.perm, info.shape, strict=True)}
    return [sizes[i] for i in range(info.num_scans)]


def constrain(
    target: FlatTarget,
    data: Any,
    program: Program,
    q: np.ndarray,
    *,
    batch: int = 512,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turns flat positions into draws of the sites, deterministics included.

    Sites whose bijection is fixed are mapped all at once, without running the model: for many
    scalar sites that saves most of the compile time. The model runs only if something depends on
    other choices.

    Args:
        target, data: From `make_target`.
        program: The staged program.
        q: Positions, shape `(n, dim)`.
        batch: Positions per compiled call.

    Returns:
        Draws by address, leading axis `n`, in the layout users see; and for sites in branches,
        where they are active.
    """
    simple, rest = {}, []
    for slot in target.slots:
        info = program.sites[slot.address]
        support = None if info.site.coords is not None else info.site.spec.support
        moved = slot.hidden is not None or slot.address in data["centering"]
        if support is None or moved or info.conditional:
            rest.append(slot.address)
        else:
            simple[slot.address] = (slot, info, support)
    extra = [a for a, s in program.sites.items() if s.kind == "deterministic"]
    partly = [a for a, s in program.sites.items() if s.partial or a in data["hidden"]]
    wanted = tuple(dict.fromkeys([*rest, *partly, *extra]))
    draws: dict[str, Any] = {}
    active: dict[str, Any] = {}
    for address, (slot, info, support) in simple.items():
        u = q[:, slot.start : slot.stop].reshape((len(q), *slot.shape))
        x = u if is_whole_space(support) else _apply(support, u)
        draws[address] = _logical(info, x)
    if wanted:
        parts = []
        for i in range(0, len(q), batch):
            part = q[i : i + batch]
            pad = batch - len(part) if len(q) > batch else 0
            part = np.concatenate([part, np.repeat(part[-1:], pad, 0)]) if pad else part
            out = _constrain(target, wanted, data, jnp.asarray(part))
            parts.append(jax.tree.map(lambda x, pad=pad: np.asarray(x)[: len(x) - pad], out))
        values, active = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
        draws.update(values)
    order = [a for a in program.sites if a in draws]
    return {a: draws[a] for a in order}, active


def _apply(support: Any, u: Any) -> Any:
    return np.asarray(_apply_compiled(_Hashable(support), jnp.asarray(u)))


class _Hashable:
    """A constraint as a static argument: equal constraints share a compiled program."""

    def __init__(self, support):
        self.support = support
        leaves, treedef = jax.tree.flatten(support)
        arrays = [np.asarray(x) for x in leaves]
        self.key = (treedef, tuple((a.dtype.str, a.shape, a.tobytes()) for a in arrays))

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return isinstance(other, _Hashable) and self.key == other.key


def _apply_now(hashable, u):
    return biject_to(hashable.support)(u)


_apply_compiled = jax.jit(_apply_now, static_argnums=0)


def _logical(info: SiteInfo, x: Any) -> Any:
    perm = (0, *(p + 1 for p in info.perm))
    return x if perm == tuple(range(len(perm))) else np.transpose(x, perm)


def _constrain_now(target, wanted, data, q):
    def one(q):
        out = target.run(Replay(record=frozenset({"value"}), score=False), data, q)
        records = {a: out["records"][a] for a in wanted}
        active = {a: r["active"] for a, r in records.items() if "active" in r}
        return {a: r["value"] for a, r in records.items()}, active

    return jax.vmap(one)(q)


_constrain = jax.jit(_constrain_now, static_argnums=(0, 1))


def unconstrain(target: FlatTarget, data: Any, problem: Problem, choices: dict[str, Any]) -> Any:
    """Flat coordinates of a choice map that has every latent.

    Raises:
        InvalidValue: A latent is missing.
    """
    missing = [s.address for s in target.slots if s.address not in choices]
    if missing:
        raise InvalidValue(
            f"init: no value for {', '.join(map(repr, missing))}. A choice map for init= has every "
            f"latent; to start from a region instead, use init=ab.init.uniform(2.0)."
        )
    given = {
        a: Given(problem.program.sites[a].to_physical(jnp.asarray(choices[a])), trusted=True)
        for a in choices
        if a in problem.latents
    }
    return _unconstrain(target, data, given)


@dataclasses.dataclass(frozen=True)
class _Coordinates(Replay):
    """Records the coordinates of some sites; others, such as counts observed, may have none."""

    addresses: frozenset[str] = frozenset()

    def site(self, site, operands, given, key, acc):
        if site.address in self.addresses:
            return super().site(site, operands, given, key, acc)
        plain = Replay(record=frozenset(), score=False)
        return plain.site(site, operands, given, key, acc)


def unconstrain_now(target: FlatTarget, data: Any, given: dict[str, Given]) -> Any:
    """Flat coordinates of given values, in the layout of the program."""
    with outside_scopes():
        arguments = Arguments(target.static, data["dynamic"])
        program = stage_packed(arguments)
        centering = data["centering"]
        given = {a: dataclasses.replace(g, centering=centering.get(a)) for a, g in given.items()}
        inputs = {**data["given"], **given}
        replay = _Coordinates(
            frozenset({"unconstrained"}), score=False,
            addresses=frozenset(s.address for s in target.slots),
        )  # fmt: skip
        out = run_program(replay, program, arguments, None, inputs, physical=True)
    parts = []
    for slot in target.slots:
        # Records are in the users' layout, with coordinates in the trailing dimensions.
        info = program.sites[slot.address]
        u = info.to_physical(out["records"][slot.address]["unconstrained"])
        u = u.reshape(slot.shape)
        if info.conditional:
            u = jnp.nan_to_num(u)  # draws of another posterior are NaN where they were inactive
        if slot.hidden is not None:
            n = math.prod(slot.shape[: slot.batch_ndim])
            u = u.reshape(n, -1)[data["hidden"][slot.address]]
        parts.append(u.reshape(-1))
    return jnp.concatenate(parts)


_unconstrain = jax.jit(unconstrain_now, static_argnums=0)
