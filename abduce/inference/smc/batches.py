"""The density of data that arrive in batches, and the particles that follow it.

With shared latents `x` and, per batch, latents `z_k` drawn for it alone, the target after T batches
is

    log p(x) + sum_k [ log p(z_k | x) + log p(y_k | x, z_k) ]

Batches of one shape are stacked; the sum runs over the filled part of the stack by a loop whose
length is traced, so that a longer stream finds the compiled program again until its stack is full.
The gradient of the sum is added up in the same loop: nothing is kept for a backward pass, and
memory does not grow with the number of batches.

Particles are weighted by each new batch, and moved only where their weights have become uneven
(Chopin 2002): in regular models that happens at ever longer intervals, each time the information
has grown by a constant factor, so T batches cost O(T) evaluations of a batch. A batch that would
leave too few particles enters in parts (Del Moral, Doucet and Jasra 2006).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from abduce.inference.smc.moves import Particles, evaluate
from abduce.inference.smc.paths import no_nan, weighted
from abduce.inference.smc.population import Population, Resampling
from abduce.inference.target import FlatTarget, Split, unconstrain_now
from abduce.ppl.operations import outside_scopes, run_program
from abduce.ppl.program import Arguments, stage_packed
from abduce.ppl.replay import Given, Replay

__all__ = ["BLOCK", "MOST_EVEN", "Base", "Layout", "bridge", "particles_of", "reweigh"]

BLOCK = 8  # batches that are evaluated at once
MOST_EVEN = 0.9  # the effective sample size that a part of a batch aims at is at most this
_SHORTEST = 1e-7, 0.02  # a part of a batch: at least that, and that share of what has entered


@dataclasses.dataclass(frozen=True)
class Portion(Split):
    """`Split`, without the densities of some sites.

    Attributes:
        ignored: Addresses of sites that have a value and no density.
    """

    ignored: frozenset[str] = frozenset()

    def site(self, site, operands, given, key, acc):
        if site.address not in self.ignored:
            return super().site(site, operands, given, key, acc)
        plain = Replay(self.record - {"score"}, score=False)
        return plain.site(site, operands, given, key, acc)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a batch is evaluated; static.

    Attributes:
        target: The program; its slots are the latents drawn for this batch alone.
        shared: Addresses of the latents it shares with the data before.
        num_model: How many leading arrays of its arguments belong to the model.
    """

    target: FlatTarget
    shared: tuple[str, ...]
    num_model: int

    def full(self, model: Any, data: Any, values: Any) -> Any:
        """The data that `target` is run on: all arrays, and the values of the shared latents."""
        dynamic = [*model, *data["dynamic"]]
        program = self.target.program({"dynamic": dynamic})
        shared = {
            a: Given(program.sites[a].to_physical(values[a]), trusted=True) for a in self.shared
        }
        return {
            "dynamic": dynamic, "given": {**data["given"], **shared},
            "hidden": data["hidden"], "centering": {},
        }  # fmt: skip

    def parts(
        self, model: Any, data: Any, values: Any, z: Any, record: Any = ()
    ) -> tuple[Any, Any, Any]:
        """Log density of `z` given the shared latents, log likelihood, and records."""
        own = frozenset(s.address for s in self.target.slots)
        handler = Portion(frozenset(record), latents=own, ignored=frozenset(self.shared))
        return _run_split(self.target, handler, self.full(model, data, values), z)


def _run_split(target: FlatTarget, handler: Portion, data: Any, q: Any) -> tuple[Any, Any, Any]:
    sites = target.program(data).sites
    conditional = [s for s in target.slots if sites[s.address].conditional]
    if conditional:  # branches record `active` with the value
        handler = dataclasses.replace(handler, record=handler.record | {"value"})
    out = target.run(handler, data, q, weight=True)
    prior = out["log_density"]
    for slot in conditional:
        active = sites[slot.address].to_physical(out["records"][slot.address]["active"])
        prior = prior + target._inactive(slot, active, q)
    return prior, out["weight"], out["records"]


@dataclasses.dataclass(frozen=True)
class Base:
    """The density that a stream starts from; static.

    Attributes:
        target: Of the first posterior.
        dropped: Latents of it that the data to come observe, and that nothing depends on.
        weighs: Whether its data count; not after `m.prior(...)`.
    """

    target: FlatTarget
    dropped: tuple[str, ...] = ()
    weighs: bool = True

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(s.address for s in self.target.slots)

    def __call__(self, data: Any, q: Any) -> tuple[Any, dict[str, Any]]:
        """Log density at `q`, and the latents' values."""
        handler = Portion(
            frozenset({"value"}), latents=frozenset(self.addresses),
            ignored=frozenset(self.dropped),
        )  # fmt: skip
        prior, evidence, records = _run_split(self.target, handler, data, q)
        total = prior + evidence if self.weighs else prior
        return total, {a: records[a]["value"] for a in self.addresses}

    def values(self, data: Any, q: Any) -> dict[str, Any]:
        """The latents' values alone; what else is in the program is not computed."""
        replay = Replay(frozenset({"value"}), score=False)
        records = self.target.run(replay, data, q)["records"]
        return {a: records[a]["value"] for a in self.addresses}


# -------------------------------------------------------------------- densities


def _group_sum(layout: Layout, values: Any, z: Any, model: Any, data: Any, count: Any) -> Any:
    """The log densities of the first `count` batches of a stack, added up.

    Differentiable in `values` and `z`. A turn of the loop takes several batches: the operations of
    one alone would be too small.
    """

    def block(values, z, model, data, i):
        def one(row, z, k):
            prior, evidence, _ = layout.parts(model, row, values, z)
            return jnp.where(k < count, prior + evidence, 0.0)

        def rows(x):
            return jax.lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK)

        index = i * BLOCK + jnp.arange(BLOCK)
        return jnp.sum(jax.vmap(one)(jax.tree.map(rows, data), rows(z), index))

    zero = jnp.zeros((), jnp.result_type(float))

    @jax.custom_vjp
    def total(values, z, model, data, turns):
        return jax.lax.fori_loop(
            0, turns, lambda i, acc: acc + block(values, z, model, data, i), zero
        )

    def forward(values, z, model, data, turns):
        def body(i, carry):
            acc, gx, gz = carry
            value, (dx, dz) = jax.value_and_grad(block, argnums=(0, 1))(values, z, model, data, i)
            return acc + value, jax.tree.map(jnp.add, gx, dx), gz + dz

        start = (zero, jax.tree.map(jnp.zeros_like, values), jnp.zeros_like(z))
        acc, gx, gz = jax.lax.fori_loop(0, turns, body, start)
        return acc, (gx, gz)

    def backward(gradients, cotangent):
        gx, gz = jax.tree.map(lambda g: cotangent * g, gradients)
        return gx, gz, None, None, None

    total.defvjp(forward, backward)
    return total(values, z, model, data, (count + BLOCK - 1) // BLOCK)


@dataclasses.dataclass(frozen=True)
class Joint:
    """The density of all batches, the last one entered up to `temperature`; for moves.

    A position is one vector: the shared latents, those of each group, those of the last batch.
    """

    base: Base
    start: Any
    layouts: tuple[Layout, ...]
    stacks: Any
    layout: Layout
    data: Any
    temperature: Any

    def join(self, position: Any, zs: Any, z: Any) -> Any:
        """Positions of all particles, `(N, total)`."""
        n = position.shape[0]
        return jnp.concatenate([position, *(x.reshape(n, -1) for x in zs), z], 1)

    def parted(self, q: Any) -> tuple[Any, list[Any], Any]:
        """The inverse; any leading axes."""
        lead, at = q.shape[:-1], self.base.target.dim
        x, zs = q[..., :at], []
        for layout, (_, z, _) in zip(self.layouts, self.stacks, strict=True):
            size = z.shape[0] * layout.target.dim
            zs.append(q[..., at : at + size].reshape((*lead, z.shape[0], layout.target.dim)))
            at += size
        return x, zs, q[..., at:]

    def parts(self, q: Any) -> tuple[Any, Any]:
        """Log density without the last batch, and its log likelihood, shape `(1,)`."""
        x, zs, z = self.parted(q)
        total, values = self.base(self.start, x)
        for layout, z_k, (data, _, count) in zip(self.layouts, zs, self.stacks, strict=True):
            shared = {a: values[a] for a in layout.shared}
            model = self.start["dynamic"][: layout.num_model]
            total = total + _group_sum(layout, shared, z_k, model, data, count)
        model = self.start["dynamic"][: self.layout.num_model]
        prior, evidence, _ = self.layout.parts(model, self.data, values, z)
        return no_nan(total + prior), no_nan(evidence)[None]

    @property
    def weights(self) -> Any:
        """Of the parts that enter by degrees."""
        return self.temperature[None]

    def temper(self, log_start: Any, log_ratio: Any) -> Any:
        """The log density from its parts; any leading axes."""
        return log_start + weighted(self.weights, log_ratio)

    def tidied(self, q: Any) -> Any:
        """Coordinates that no batch fills drift freely in the moves: they are put back to 0."""
        x, zs, z = self.parted(q)
        kept = []
        for z_k, (_, _, count) in zip(zs, self.stacks, strict=True):
            on = jnp.arange(z_k.shape[1]) < count
            kept.append(jnp.where(on[:, None], z_k, 0.0))
        return self.join(x, kept, z)


# -------------------------------------------------------------------- the compiled programs


def _coordinates(target: FlatTarget, data: Any, values: Any, active: Any, key: Any) -> Any:
    """Flat coordinates of values; where a branch is not taken, a standard normal's."""
    program = target.program(data)
    given = {
        s.address: Given(program.sites[s.address].to_physical(values[s.address]), trusted=True)
        for s in target.slots
    }
    q = unconstrain_now(target, data, given)
    for slot in target.slots:
        info = program.sites[slot.address]
        if not info.conditional:
            continue
        on = info.to_physical(active[slot.address])
        on = on.reshape(on.shape + (1,) * (len(slot.shape) - on.ndim))
        u = jax.random.normal(jax.random.fold_in(key, slot.start), slot.shape, q.dtype)
        old = q[slot.start : slot.stop].reshape(slot.shape)
        q = q.at[slot.start : slot.stop].set(jnp.where(on, old, u).reshape(-1))
    return q


@functools.partial(jax.jit, static_argnums=0)
def particles_of(
    target: FlatTarget, data: Any, values: Any, active: Any, log_weights: Any, start: Any, key: Any
) -> tuple[Any, Population]:
    """Particles from draws.

    Args:
        target, data: The density they are of.
        values, active: By address, `(chain, draw, ...)`.
        log_weights: `(chain, draw)`, or None.
        start: The log evidence so far.
        key: Random key.

    Returns:
        Positions `(N, dim)`, and the population, whose weights have mean 1.
    """
    values, active = jax.tree.map(
        lambda x: x.reshape((x.shape[0] * x.shape[1], *x.shape[2:])), (values, active)
    )
    n = jax.tree.leaves(values)[0].shape[0]
    one = lambda v, a, k: _coordinates(target, data, v, a, k)  # noqa: E731
    position = jax.vmap(one)(values, active, jax.random.split(key, n))
    dtype = jnp.result_type(float)
    if log_weights is None:
        logs = jnp.zeros(n, dtype)
    else:
        logs = jnp.asarray(log_weights, dtype).reshape(-1)
        logs = logs - jax.nn.logsumexp(logs) + jnp.log(jnp.asarray(n, dtype))
    return position, Population.weighted(logs, start)


def _read(base: Base, layout: Layout, start: Any, data: Any, q: Any, z: Any) -> tuple[Any, Any]:
    """Log likelihood of a batch at a particle; its latents and deterministics, and where active."""
    values = base.values(start, q)
    model = start["dynamic"][: layout.num_model]
    _, evidence, records = layout.parts(model, data, values, z, {"value"})
    program = layout.target.program({"dynamic": [*model, *data["dynamic"]]})
    own = [s.address for s in layout.target.slots]
    wanted = {*layout.shared, *own, *program.of_kind("deterministic")}
    kept = {a: r for a, r in records.items() if a in wanted}
    return no_nan(evidence), (
        {a: r["value"] for a, r in kept.items()},
        {a: r["active"] for a, r in kept.items() if "active" in r},
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def reweigh(
    base: Base, layout: Layout, start: Any, data: Any, position: Any, population: Any, key: Any
) -> dict[str, Any]:
    """Draws what is new, and weighs the particles by a batch.

    Returns:
        'population', 'z' `(N, dim)`, 'values' and 'active' by address with axes `(1, N)` in front,
        'log_ratio' `(N,)`.
    """

    def one(q, key):
        z = jnp.zeros(0, q.dtype)
        if layout.target.slots:
            z = _drawn(base, layout, start, data, q, key)
        evidence, draws = _read(base, layout, start, data, q, z)
        return z, evidence, draws

    n = position.shape[0]
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n, dtype=jnp.uint32))
    z, evidence, (values, active) = jax.vmap(one)(position, keys)
    values, active = jax.tree.map(lambda x: x[None], (values, active))
    return {
        "population": population.reweight(evidence), "z": z, "values": values, "active": active,
        "log_ratio": evidence,
    }  # fmt: skip


def _drawn(base: Base, layout: Layout, start: Any, data: Any, q: Any, key: Any) -> Any:
    """New latents of a particle from their prior given the shared ones; flat coordinates."""
    k_draw, k_spare = jax.random.split(key)
    model = start["dynamic"][: layout.num_model]
    full = layout.full(model, data, base.values(start, q))
    with outside_scopes():
        arguments = Arguments(layout.target.static, full["dynamic"])
        program = stage_packed(arguments)
        replay = Replay(frozenset({"value"}), score=False)
        out = run_program(replay, program, arguments, k_draw, full["given"], physical=True)
    records = {s.address: out["records"][s.address] for s in layout.target.slots}
    values = {a: r["value"] for a, r in records.items()}
    active = {a: r["active"] for a, r in records.items() if "active" in r}
    return _coordinates(layout.target, full, values, active, k_spare)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def bridge(
    base: Base,
    layouts: tuple[Layout, ...],
    layout: Layout,
    move: Any,
    num_moves: int,
    resampling: Resampling,
    start: Any,
    stacks: Any,
    data: Any,
    position: Any,
    z: Any,
    population: Population,
    log_step: Any,
    key: Any,
) -> dict[str, Any]:
    """Lets a batch enter in as many parts as it takes, resampling and moving after each.

    Args:
        base, layouts, layout: Static parts of the target; `layout` is of the new batch.
        move, num_moves, resampling: What happens after each part.
        start, stacks, data: Data of the target.
        position, z: Particles; `z` are the new latents.
        population: The weights before the batch.
        log_step: The step size learnt so far; NaN: none.
        key: Random key.

    Returns:
        As `reweigh`, and 'position', 'zs' (per group, batches first), 'log_step', 'num_parts' (at
        whose ends particles were moved), 'acceptance_rate'.
    """
    n = position.shape[0]
    share = min(resampling.threshold, MOST_EVEN)
    always = dataclasses.replace(resampling, threshold=1.0)

    def density(temperature):
        return Joint(base, start, layouts, stacks, layout, data, temperature)

    zero, one = jnp.zeros((), position.dtype), jnp.ones((), position.dtype)
    q = density(zero).join(position, [jnp.moveaxis(s[1], 1, 0) for s in stacks], z)
    particles = evaluate(density(zero), q)
    memory = move.start(density(zero), particles, population.probabilities)
    memory = dataclasses.replace(
        memory, log_step=jnp.where(jnp.isnan(log_step), memory.log_step, log_step)
    )

    def after(population, ratio, step):
        return population.reweight(jnp.where(step > 0, step * ratio, 0.0))

    def keeps(population, ratio, step):
        return after(population, ratio, step).ess >= share * n

    def next_temperature(population, ratio, old):
        least = jnp.maximum(_SHORTEST[0], _SHORTEST[1] * old)

        def halve(_, interval):
            low, high = interval
            middle = 0.5 * (low + high)
            ok = keeps(population, ratio, middle - old)
            return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

        low, _ = jax.lax.fori_loop(0, 30, halve, (old, one))
        new = jnp.minimum(jnp.maximum(low, old + least), 1.0)
        return jnp.where(keeps(population, ratio, one - old), one, new)

    def body(carry):
        old, turn, parts, particles, population, memory, rate = carry
        k1, k2 = jax.random.split(jax.random.fold_in(key, turn))
        ratio = particles.log_ratio[:, 0]
        new = next_temperature(population, ratio, old)
        weighed = after(population, ratio, new - old)

        def moved(particles, memory):
            at = density(new)
            memory = move.tune(memory, particles, weighed.probabilities)
            fresh, particles, _, _ = always(k1, weighed, particles, particles.position)
            local = move.begin(at, particles)

            def step(i, carry):
                particles, memory, local, total = carry
                k = jax.random.fold_in(k2, i)
                particles, memory, local, rate = move.step(k, at, particles, memory, local)
                return particles, memory, local, total + jnp.mean(rate)

            particles, memory, _, total = jax.lax.fori_loop(
                0, num_moves, step, (particles, memory, local, zero)
            )
            tidy = Particles(at.tidied(particles.position), *_logs(particles))
            return fresh, tidy, memory, total / num_moves, parts + 1

        def stays(particles, memory):
            return weighed, particles, memory, rate, parts

        due = (weighed.ess < share * n) | (new < 1)
        alive = weighed.log_mean > -jnp.inf
        out = jax.lax.cond(due & alive, moved, stays, particles, memory)
        population, particles, memory, rate, parts = out
        return new, turn + 1, parts, particles, population, memory, rate

    def unfinished(carry):
        return (carry[0] < 1) & (carry[4].log_mean > -jnp.inf)

    count = jnp.zeros((), jnp.int32)
    carry = (zero, count, count, particles, population, memory, jnp.nan * zero)
    _, _, parts, particles, population, memory, rate = jax.lax.while_loop(unfinished, body, carry)
    position, zs, z = density(one).parted(particles.position)
    read = functools.partial(_read, base, layout, start, data)
    _, (values, active) = jax.vmap(read)(position, z)
    values, active = jax.tree.map(lambda x: x[None], (values, active))
    return {
        "population": population, "z": z, "values": values, "active": active,
        "log_ratio": particles.log_ratio[:, 0], "position": position,
        "zs": [jnp.moveaxis(x, 0, 1) for x in zs], "log_step": memory.log_step,
        "num_parts": parts, "acceptance_rate": rate,
    }  # fmt: skip


def _logs(particles: Particles) -> tuple[Any, Any]:
    return particles.log_start, particles.log_ratio
