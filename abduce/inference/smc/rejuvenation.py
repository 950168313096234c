"""Resample-move: after a resampling, copies of a particle are made to differ again.

After step t the particles stand for p(x_{0:t} | y_{1:t}), times the look-ahead weight psi of the
new carry where there is one. A Metropolis-Hastings kernel on the latents of step t alone, given the
carry that entered the step, leaves that law of whole paths as it is; its target is

    p(x_t | carry_{t-1}) p(y_t | x_t, carry_{t-1}) psi(carry_t).

So weights stay what they are, and the evidence estimate stays unbiased (Gilks and Berzuini 2001,
"Following a moving target"; Del Moral, Doucet and Jasra 2006). Values before step t are not moved:
the kernel delays the collapse of the genealogy, it does not prevent it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from abduce.errors import InvalidAlgorithm, InvalidModel
from abduce.inference.smc.cloud import Cloud, Particles
from abduce.inference.smc.population import Population
from abduce.inference.smc.proposals import proposed_latents, stage_proposal, walk_proposal
from abduce.ppl import _jax
from abduce.ppl.interpreter import walk
from abduce.ppl.replay import Given
from abduce.ppl.site import Site, has_sites, site_p

__all__ = ["Step", "movable_latents", "resample_move"]


def movable_latents(frame: Any, inputs: dict[str, Given]) -> dict[str, Site]:
    """The latents of a step, which a kernel can move.

    Raises:
        InvalidModel: A latent is in a branch or in another scan, or a density is estimated.
    """
    found: dict[str, Site] = {}
    _find(_jax.inner_jaxpr(frame.body)[0], inputs, False, found)
    if frame.estimated:
        raise InvalidModel(
            f"ab.smc(kernel=...): site {sorted(frame.estimated)[0]!r} has an estimated density; a "
            f"move would need its value. Leave kernel= out."
        )
    return found


def _find(jaxpr: Any, inputs: dict[str, Given], branch: bool, found: dict[str, Site]) -> None:
    for eqn in jaxpr.eqns:
        if eqn.primitive is site_p:
            site = eqn.params["site"]
            given = inputs.get(site.address)
            if site.kind == "auxiliary":
                raise InvalidModel(
                    f"ab.smc(kernel=...): the scan's step has {site.address!r}, whose density is "
                    f"estimated with random numbers of its own. Leave kernel= out."
                )
            seen = "obs" in site.roles and "mask" not in site.roles
            if site.kind != "sample" or seen or (given is not None and given.mask is None):
                continue
            if branch or "guard" in site.roles:
                raise InvalidModel(
                    f"ab.smc(kernel=...): latent {site.address!r} is in a branch, so that a move "
                    f"could open or close it. Draw it outside of the branch and select its value, "
                    f"or leave kernel= out."
                )
            found[site.address] = site
            continue
        for sub in _jax.subjaxprs(eqn):
            if not has_sites(sub):
                continue
            if eqn.primitive is _jax.scan_p:
                raise InvalidModel(
                    "ab.smc(kernel=...): the step of the scan has another scan with sites inside, "
                    "which is a filter of its own. Leave kernel= out, or write the inner scan as "
                    "one with jax.vmap."
                )
            inner, _ = _jax.inner_jaxpr(sub)
            _find(inner, inputs, branch or eqn.primitive is _jax.cond_p, found)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One step of a scan, for particles whose latents there are moved.

    Attributes:
        frame: The scan.
        latents: From `movable_latents`.
        carry, consts, xs: What enters the step; those that differ have the particles in front.
        inputs: Observations of the step.
        beside: Other arrays with the particles in front, resampled along.
        psi: The look-ahead log weight `(N,)` of `(consts, new carry, beside)`, or None.
    """

    frame: Any
    latents: dict[str, Site]
    carry: Any
    consts: Any
    xs: Any
    inputs: dict[str, Given]
    beside: Any
    psi: Callable[..., Any] | None

    def walk(self, mode: str, retained: Any, shared: Any, keys: Any = None) -> tuple[Any, Cloud]:
        """Runs the step; `retained` are scored, `shared` are taken as they are."""
        known = {a: Given(Particles(v), trusted=True, shared=True) for a, v in shared.items()}
        cloud = Cloud(
            keys or {}, {**self.inputs, **known}, Population.start(self.frame.n),
            retained={a: Particles(v) for a, v in retained.items()}, mode=mode,
        )  # fmt: skip
        cloud.scans = -1
        frame = self.frame
        outs = walk(
            frame.walker, frame.body, frame.wrapped(self.consts, self.carry, self.xs), cloud
        )
        cloud.settle()
        return outs, cloud

    def joint(self, scored: Any, shared: Any) -> Any:
        """Log density of the step, without the sites in `shared`; with the look-ahead; `(N,)`."""
        outs, cloud = self.walk("score", scored, shared)
        log_density = cloud.population.log_weights
        if self.psi is not None:
            log_density = log_density + self.psi(self.consts, self.ends(outs, cloud), self.beside)
        return jnp.where(jnp.isnan(log_density), -jnp.inf, log_density)

    def ends(self, outs: Any, cloud: Cloud) -> list[Any]:
        """The new carry, in the shape of the loop."""
        frame = self.frame
        pairs = [cloud.resolve(o) for o in outs[: frame.nk]]
        return [
            frame._wide(a, m, want) for (a, m), want in zip(pairs, frame.carry_flags, strict=True)
        ]

    # ------------------------------------------------------------------ kernels

    def refresh(self, address: str, key: Any, values: dict[str, Any]) -> tuple[Any, Any]:
        """Draws a latent from its prior given the rest; of several elements, a random part.

        The share of the elements is log-uniform between one and all. The density of what is drawn
        cancels against the proposal's, element by element, so that the ratio is of the others.
        """
        site, n = self.latents[address], self.frame.n
        k_draw, k_share, k_part, k_accept = jax.random.split(key, 4)
        rest = {a: v for a, v in values.items() if a != address}
        _, cloud = self.walk("propose", {}, rest, {address: k_draw})
        old = values[address]
        new = cloud.resolve(cloud.records[address]["value"])[0].astype(old.dtype)
        batch = (*site.axis_sizes, *site.batch_shape)
        size = math.prod(batch)
        if size > 1:
            low = -math.log(size)
            share = jnp.exp(jax.random.uniform(k_share, (n,), minval=low, maxval=0.0))
            part = jax.random.uniform(k_part, (n, *batch)) < share.reshape((n,) + (1,) * len(batch))
            new = jnp.where(part.reshape(part.shape + (1,) * (old.ndim - part.ndim)), new, old)
        log_ratio = self.joint(rest, {address: new}) - self.joint(rest, {address: old})
        return self.choose(k_accept, log_ratio, {**values, address: new}, values)

    def propose(self, q: Any, key: Any, values: dict[str, Any]) -> tuple[Any, Any]:
        """A model's proposal, called as `q(given, carry, x)`; `given` has the latents."""
        k_draw, k_back, k_accept = jax.random.split(key, 3)
        walker = self.frame.walker
        program, forward = walk_proposal(walker, q, self._call(values), k_draw, retained={})
        drawn = {}
        for a in self._covered(program):
            if "active" in forward.records[a]:
                raise InvalidModel(
                    f"ab.smc(kernel=...): the proposal `{program.name}` draws {a!r} in a branch. "
                    f"Draw it outside of the branch and select its value."
                )
            x = forward.resolve(forward.records[a]["value"])[0]
            if x.shape != values[a].shape:
                raise InvalidModel(
                    f"ab.smc(kernel=...): the proposal `{program.name}` draws {a!r} with shape "
                    f"{x.shape[1:]}, but the model has it with shape {values[a].shape[1:]}."
                )
            drawn[a] = x.astype(values[a].dtype)
        new = {**values, **drawn}
        held = {a: Particles(values[a]) for a in drawn}
        _, backward = walk_proposal(walker, q, self._call(new), k_back, retained=held, mode="score")
        log_ratio = (
            self.joint(new, {}) - self.joint(values, {})
            + backward.population.log_weights - forward.population.log_weights
        )  # fmt: skip
        return self.choose(k_accept, log_ratio, new, values)

    def _call(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """Arguments of a proposal."""
        seen = {a: g.value for a, g in self.inputs.items() if g.mask is None}
        at = {a: Particles(v) for a, v in values.items()}
        return ({**seen, **at}, *self.frame.trees(self.consts, self.carry, self.xs))

    def _covered(self, program: Any) -> list[str]:
        covered = list(proposed_latents(program, list(self.latents), self.inputs))
        partial = [
            a for a in covered if a in self.inputs or "mask" in self.latents[a].roles
        ]  # fmt: skip
        if partial:
            raise InvalidAlgorithm(
                f"ab.smc(kernel=...): the proposal covers {partial}, which are partly observed. "
                f"Leave them to their prior."
            )
        return covered

    def choose(self, key: Any, log_ratio: Any, new: Any, old: Any) -> tuple[Any, Any]:
        """The rule of Metropolis and Hastings; a NaN rejects. Also the acceptance probability."""
        rate = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio), 0.0))
        accept = jax.random.uniform(key, rate.shape, rate.dtype) < rate

        def rows(a, b):
            return jnp.where(accept.reshape(accept.shape + (1,) * (a.ndim - 1)), a, b)

        return jax.tree.map(rows, new, old), jnp.mean(rate)

    def move(self, key: Any, values: dict[str, Any], count: int) -> tuple[dict[str, Any], Any]:
        """Every proposal once, then each latent that none covers; `count` times."""
        kernels: list[Callable[..., Any]] = []
        covered: set[str] = set()
        for q in self.frame.walker.moves:
            kernels.append(functools.partial(self.propose, q))
            covered |= set(self._covered(stage_proposal(q, self._call(values))[0]))
        kernels += [functools.partial(self.refresh, a) for a in self.latents if a not in covered]

        def once(i, loop):
            values, total = loop
            for j, kernel in enumerate(kernels):
                k = jax.random.fold_in(key, i * len(kernels) + j)
                values, rate = kernel(k, values)
                total = total + rate
            return values, total

        zero = jnp.zeros((), jnp.result_type(float))
        values, total = jax.lax.fori_loop(0, count, once, (values, zero))
        return values, total / (count * len(kernels))


def resample_move(step: Step, cloud: Cloud, pairs: Any, due: Any, key: Any, rule: Any) -> Any:
    """Resamples at the end of a step, and moves the latents of the step.

    Args:
        step: The step as it was run.
        cloud: Of the run; its population is weighted.
        pairs: Outputs of the body, `(array, differs by particle)`.
        due: Whether to; scalar bool.
        key: Random key.
        rule: `(key, population, tree) -> (population, tree, ancestors)`, which always resamples.

    Returns:
        A cloud with the new population and records, the outputs, the constants, `beside`, the
        ancestors `(N,)`, and the acceptance rate (NaN where nothing was moved).
    """
    frame = step.frame
    flags = [m for _, m in pairs]
    records = {
        a: {k: cloud.resolve(v) for k, v in r.items()} for a, r in cloud.records.items()
    }  # fmt: skip

    def split(values, flags):
        return [v if m else None for v, m in zip(values, flags, strict=True)]

    def merge(new, old):
        return [o if x is None else x for x, o in zip(new, old, strict=True)]

    def leaves(records):
        return {a: {k: x if m else None for k, (x, m) in r.items()} for a, r in records.items()}

    tree = {
        "outs": split([a for a, _ in pairs], flags), "records": leaves(records),
        "beside": step.beside, "carry": split(step.carry, frame.carry_flags),
        "consts": split(step.consts, frame.const_flags), "xs": split(step.xs, frame.xs_flags),
    }  # fmt: skip

    def yes(tree, population):
        k1, k2 = jax.random.split(key)
        population, tree, ancestors = rule(k1, population, tree)
        at = dataclasses.replace(
            step, carry=merge(tree["carry"], step.carry), consts=merge(tree["consts"], step.consts),
            xs=merge(tree["xs"], step.xs), beside=tree["beside"],
        )  # fmt: skip
        values = {a: tree["records"][a]["value"] for a in step.latents}
        values, rate = at.move(k2, values, frame.walker.settings.num_moves)
        outs_moved, moved = at.walk("run", {}, values)
        new = [moved.resolve(o)[0] for o in outs_moved]
        outs = [
            None if old is None else jnp.broadcast_to(x, old.shape).astype(old.dtype)
            for x, old in zip(new, tree["outs"], strict=True)
        ]
        records = {
            a: {
                k: None if old is None
                else jnp.broadcast_to(moved.resolve(moved.records[a][k])[0], old.shape)
                for k, old in r.items()
            }
            for a, r in tree["records"].items()
        }  # fmt: skip
        tree = {**tree, "outs": outs, "records": records}
        if at.psi is not None:
            psi = at.psi(at.consts, at.ends(outs_moved, moved), at.beside)
            tree["beside"] = {**tree["beside"], "psi": psi}
        return population, tree, ancestors.astype(jnp.int32), rate.astype(jnp.result_type(float))

    def no(tree, population):
        still = jnp.arange(frame.n, dtype=jnp.int32)
        return population, tree, still, jnp.full((), jnp.nan, jnp.result_type(float))

    population, tree, ancestors, rate = jax.lax.cond(due, yes, no, tree, cloud.population)
    after = Cloud({}, {}, population)
    after.summaries, after.reports = cloud.summaries, cloud.reports
    after.records = {
        a: {
            k: x if new is None else Particles(new)
            for (k, (x, _)), new in zip(r.items(), tree["records"][a].values(), strict=True)
        }
        for a, r in records.items()
    }
    pairs = [(a if n is None else n, m) for (a, m), n in zip(pairs, tree["outs"], strict=True)]
    return after, pairs, merge(tree["consts"], step.consts), tree["beside"], ancestors, rate
