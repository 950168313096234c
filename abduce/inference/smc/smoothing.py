"""Backward simulation: paths drawn anew from the particles of every step.

The genealogy of a filter coalesces: early steps are represented by few distinct particles.
Backward simulation (Godsill, Doucet and West 2004) draws, from the last step to the first,

    i_t ~ w_t^i p(step t+1 | carry_t^i),

which needs the step's density at the path's latents given every particle's carry: N work per path
and step. It presumes that the future depends on the past through the carry, and the carry on its
past only through the latents of the step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from abduce.errors import InvalidModel, NoDensity
from abduce.inference.smc.cloud import BACKWARD, STEP
from abduce.inference.smc.population import Population, take
from abduce.ppl import _jax
from abduce.ppl.dataflow import Label, propagate

__all__ = ["require_markov", "require_renewable", "require_unweighed", "simulate_backwards"]


def require_markov(body: Any, num_consts: int, num_carry: int, call: str, differs: Any) -> None:
    """The new carry may depend on the old one only through the step's latents.

    Args:
        body: The jaxpr of a step.
        num_consts, num_carry: As of the scan.
        call: For the message.
        differs: Which carry slots differ by particle; others do not matter.

    Raises:
        InvalidModel: A carry slot is computed from the old carry.
    """
    inner, _ = _jax.inner_jaxpr(body)
    rest = len(inner.invars) - num_consts - num_carry
    inputs = (
        [()] * num_consts
        + [({Label("carry")} if m else ()) for m in differs]
        + [()] * rest
    )  # fmt: skip

    def visit(v):
        if v.site.kind == "sample" and "obs" not in v.site.roles:
            if not v.site.spec or v.site.spec.family == "Simulator":
                raise NoDensity(f"{call} needs the density of site {v.site.address!r}.")
            return {v.label(v.site.address)}
        return {x for x in v.inputs}

    outs = propagate(body, visit, inputs)[:num_carry]
    for i, labels in enumerate(outs):
        if any(x.source == "carry" for x in labels):
            raise InvalidModel(
                f"{call} needs a carry that is known from the step's latents alone, but slot {i} "
                f"of the scan's carry is computed from the old carry (a deterministic state, or "
                f"non-centred noise). Sample the state itself, or use the genealogy: "
                f"smoothing='genealogy', ancestor_sampling=False."
            )


def require_renewable(frame: Any) -> None:
    """Ancestor sampling weighs a new past by the next step alone; the rest may not depend on it.

    Raises:
        InvalidModel: Later steps, or sites after the scan, depend on the past otherwise than
            through the carry.
    """
    call = "ab.particle_gibbs(ancestor_sampling=True)"
    require_markov(frame.body, len(frame.consts), frame.nk, call, frame.carry_flags)
    if any(frame.xs_flags) or any(frame.const_flags):
        raise InvalidModel(
            f"{call}: steps of the scan depend on a state drawn before it otherwise than through "
            f"the carry. Leave it out of states= (it is a parameter then), or set "
            f"ancestor_sampling=False."
        )


def require_unweighed(frame: Any, differs: Any) -> None:
    """As `require_renewable`, of what the scan returns for each step."""
    if any(w and m for w, m in zip(frame.weighed, differs, strict=True)):
        raise InvalidModel(
            "ab.particle_gibbs(ancestor_sampling=True): a site after the scan depends on what the "
            "scan returns for each step. Put what it needs into the carry, or set "
            "ancestor_sampling=False."
        )


def simulate_backwards(frame: Any, state: Any, ys: Any, traced: Any, x: Any, inner_state: Any):
    """Replaces the values of each step by those of N simulated paths.

    Args:
        frame: The scan.
        state: Of the level that holds it; becomes equally weighted.
        ys: Per-step outputs: 'backward' holds the carry and the log weights at the end of a step,
            without the look-ahead.
        traced: Trees of per-step values by particle, to be read along the paths.
        x: The scan's per-step inputs.
        inner_state: Makes the state for walking a step.

    Returns:
        As `traced`, along the paths; which particle each path begins with, before the scan; and
        which it ends with.
    """
    from abduce.inference.smc.scan import score_step

    require_markov(
        frame.body, len(frame.consts), frame.nk, "ab.smc(smoothing='ffbs')", frame.carry_flags
    )
    if any(frame.xs_flags) or any(frame.const_flags):
        raise InvalidModel(
            "ab.smc(smoothing='ffbs'): the steps of the scan depend on a latent drawn before it "
            "other than through the carry (a static parameter). Condition on it (given=), or use "
            "ab.particle_gibbs, which alternates between parameters and paths."
        )
    n, last = frame.n, (0 if frame.reverse else frame.length - 1)
    population: Population = state.population
    k_last, k_steps = jax.random.split(jax.random.fold_in(state.keys[STEP], BACKWARD))
    paths = frame.walker.settings.num_paths or n
    index = jax.random.categorical(k_last, population.log_weights, shape=(paths,))
    index = index.astype(jnp.int32)
    values = jax.tree.map(lambda v: take(v[last], index), traced)
    addresses = [a for a in traced["records"] if a in frame.addresses]

    def latents(values):
        return {a: values["records"][a]["value"] for a in addresses}

    conditional = frame.walker.settings.conditional
    if conditional and ys["nested"]:
        raise InvalidModel(
            "ab.particle_gibbs(backward_sampling=True): the scan has another one with sites "
            "inside, through which paths cannot be redrawn. Use ancestor_sampling alone."
        )

    def choose(later, carry, log_weights, inputs, xs, key, came):
        """The particle that each path comes from, given its next step.

        In conditional runs it can only be redrawn where there was a resampling; elsewhere particles
        continue themselves, and the law of the others given another path would be different.
        """

        def one(held, key):
            logits = log_weights + score_step(
                frame, frame.consts, carry, xs, inputs, held, inner_state
            )
            return jax.random.categorical(key, logits)

        values, index = later
        drawn = jax.lax.map(
            lambda a: one(*a), (latents(values), jax.random.split(key, paths)),
            batch_size=min(paths, max(1, 1_000_000 // n)),
        ).astype(jnp.int32)  # fmt: skip
        return jnp.where(came["resampled"], drawn, index) if conditional else drawn

    def back(later, step):
        (carry, log_weights), here, inputs_next, xs_next, key, came = step
        index = choose(later, carry, log_weights, inputs_next, xs_next, key, came)
        chosen = take(here, index)
        return (chosen, index), chosen

    def earlier(tree):
        return jax.tree.map(lambda v: v[1:] if frame.reverse else v[:-1], tree)

    def later_inputs(tree):
        return jax.tree.map(lambda v: v[:-1] if frame.reverse else v[1:], tree)

    steps = (
        earlier(ys["backward"]), earlier(traced), later_inputs(x["inputs"]),
        later_inputs(x["xs"]), jax.random.split(k_steps, max(frame.length - 1, 0)),
        later_inputs(ys["report"]),
    )  # fmt: skip
    begin, chosen = jax.lax.scan(back, (values, index), steps, reverse=not frame.reverse)
    at = -1 if frame.reverse else 0
    inputs, xs, came = jax.tree.map(lambda v: v[at], (x["inputs"], x["xs"], ys["report"]))
    carry, log_weights = frame.start[0], frame.start[1].log_weights - frame.start[2]
    root = choose(begin, carry, log_weights, inputs, xs, jax.random.fold_in(k_last, 1), came)
    state.population = Population(
        jnp.zeros_like(population.log_weights), population.total,
        jnp.zeros_like(population.log_mean), jnp.full_like(population.ess, n),
    )  # fmt: skip
    join = (lambda a, b: jnp.concatenate([b[None], a])) if frame.reverse else (
        lambda a, b: jnp.concatenate([a, b[None]])
    )  # fmt: skip
    out = jax.tree.map(join, chosen, values)
    if paths < n:
        spread = jnp.arange(n) % paths
        out, root = jax.tree.map(lambda v: jnp.take(v, spread, axis=1), out), root[spread]
        index = index[spread]
    return out, root, index
