"""Posteriors of many observations from scores that were learned on few."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from abduce.amortized.layout import Layout
from abduce.amortized.posterior_model import AmortizedLaw, make_law
from abduce.amortized.posterior_network import PosteriorTask, encode
from abduce.errors import InvalidAlgorithm, InvalidValue
from abduce.inference.problem import Problem
from abduce.ppl.program import Arguments

__all__ = ["compose", "composes", "require_composable"]

_LEVELS = 50  # noise levels, from pure noise to the posterior
_STEPS = 6  # Langevin steps at each
_LAST = 60  # and at the end
_BLUR = 0.02  # variance of the last noise, in units of a block's posterior variance
_STEP = 0.25  # in units of the local variance


def require_composable(name: str, layout: Layout) -> None:
    """Composition is for one exchangeable set whose elements share all latents.

    Raises:
        InvalidAlgorithm: Something else is observed, or latents are discrete or in branches.
    """
    kinds = [g.kind for g in layout.groups if g.sites]
    if kinds != ["set"] or layout.discrete or layout.conditional or not layout.dim:
        raise InvalidAlgorithm(
            f"ab.{name}(compose=True) needs one exchangeable set of observations and continuous "
            f"latents outside branches; here {', '.join(layout.observed)} are read as "
            f"{', '.join(kinds)}. Make the estimator with at least 2 elements under vmap; "
            f"sizes=(1, 2) trains on one and two."
        )


def composes(est: Any, problem: Problem) -> bool:
    """Whether the data have more elements than the network was trained on."""
    size = _set(est.layout).size
    shape = problem.program.sites[est.layout.observed[0]].shape
    return bool(est.settings.compose and shape and shape[0] > size)


def _set(layout: Layout) -> Any:
    return next(g for g in layout.groups if g.kind == "set")


def compose(est: Any, problem: Problem, key: Any) -> tuple[Any, Any, Any]:
    """Draws for more elements than in training.

    Geffner, Papamakarios and Mnih, "Compositional Score Modeling for Simulation-Based Inference",
    ICML 2023, eq. 7: the scores of blocks of elements add up, less that of the prior for all but
    one. The path that this defines is not the diffusion of the posterior, so it is followed by
    Langevin steps at each noise level: preconditioned with the score's Jacobian at the mean, and
    in the scheme of Leimkuhler and Matthews, "Rational construction of stochastic numerical methods
    for molecular sampling", AMRX 2013, eq. 7, which has no error on normal laws.

    Returns:
        The law, its operands, and vectors of coordinates `(num_samples, dim)`.

    Raises:
        InvalidValue: The number of elements is no multiple of the size that was trained on.
    """
    layout: Layout = est.layout
    size = _set(layout).size
    values = {a: _value(est.name, problem, a) for a in layout.observed}
    count = next(iter(values.values())).shape[0]
    if layout.sizes is None and count % size:
        raise InvalidValue(
            f"ab.{est.name}: {count} elements are no multiple of {size}, the size of training. "
            f"Train with sizes=(1, {size})."
        )
    example = {"observed": values, "arguments": tuple(problem.arguments.dynamic), "mask": None,
               "missing": None}  # fmt: skip
    law, operands = make_law(est, problem, example)
    return law, operands, _langevin(law, count, est.num_samples, operands, key)


def _value(name: str, problem: Problem, address: str) -> Any:
    given = problem.given.get(address)
    if given is None or given.mask is not None:
        raise InvalidValue(
            f"ab.{name}(compose=True): given[{address!r}] has to be there, without hidden entries."
        )
    return jnp.asarray(given.value)


def blocks(layout: Layout, example: Any, count: int) -> Any:
    """The elements in blocks of the size of training, the last one filled up under a mask."""
    group = _set(layout)
    num = -(-count // group.size)
    index = jnp.minimum(jnp.arange(num * group.size), count - 1).reshape(num, group.size)
    there = (jnp.arange(num * group.size) < count).reshape(num, group.size)

    def split(x):
        return jnp.asarray(x)[index]

    arguments = ()
    if layout.arguments:
        arguments = tuple(
            split(x) if i in group.arguments else jnp.broadcast_to(x, (num, *jnp.shape(x)))
            for i, x in enumerate(example["arguments"])
        )
    return {
        "observed": {a: split(x) for a, x in example["observed"].items()},
        "arguments": arguments,
        "mask": there,
        "missing": None,
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _langevin(law: AmortizedLaw, count: int, num: int, operands: Any, key: Any) -> Any:
    layout = law.layout
    _, scales, example, dynamic = operands
    nets = law.networks(operands)
    parts = blocks(layout, example, count)
    num_blocks = parts["mask"].shape[0]
    contexts = [jax.vmap(lambda e, n=n: encode(layout, n, scales, e))(parts) for n in nets]
    task = PosteriorTask(layout, law.settings)
    data = {"scales": scales, "simulation": {"arguments": Arguments(law.static, list(dynamic))}}
    prior = jax.grad(lambda v: task.log_prior(v, example, data))

    def score(v, r):
        each = jnp.stack([
            jnp.sum(jax.vmap(lambda c, n=n: n.head.score(c, r, v))(context), 0)
            for n, context in zip(nets, contexts, strict=True)
        ])  # fmt: skip
        rest = jnp.where(r < 1, (1 - num_blocks) * (1 - r) * prior(v), 0.0)
        return jnp.mean(each, 0) + rest

    dim = layout.dim
    k0, k1 = jax.random.split(key)
    start = jax.random.normal(k0, (num, dim)) / jnp.sqrt(1.0 * num_blocks)

    def level(carry, inputs):
        particles, last = carry
        (r, steps), key = inputs
        r = jnp.maximum(r, last)

        def precision(v):
            return -jax.jacfwd(lambda x: score(x, r))(v)

        centre = jnp.median(particles[0], 0)
        rate, basis = jnp.linalg.eigh(_symmetric(precision(centre)))
        rate = jnp.maximum(jnp.abs(rate), 1.0)
        root = basis / jnp.sqrt(rate)

        def step(i, state):
            v, noise = state
            new = jax.random.normal(jax.random.fold_in(key, i), (num, dim))
            drift = jax.vmap(lambda x: score(x, r))(v) @ root @ root.T
            moved = jnp.sqrt(_STEP / 2) * (noise + new) @ root.T
            return v + _STEP * drift + moved, new

        # A network's error in the noise is divided by it in the score, and errors add up over
        # blocks: no lower than where blocks are widened by a hundredth of their spread.
        enough = nets[0].head.noise(r)[1] ** 2 * jnp.max(rate) < _BLUR * num_blocks
        last = jnp.where(enough, r, last)
        return (jax.lax.fori_loop(0, steps, step, particles), last), None

    t = jnp.linspace(1.0, 0.0, _LEVELS)
    levels = 1e-3 + (1 - 1e-3) * t**2
    steps = jnp.where(t > 0, _STEPS, _LAST)
    noise = jax.random.normal(k1, (num, dim))
    keys = jax.random.split(jax.random.fold_in(key, 1), _LEVELS)
    first = ((start, noise), jnp.zeros(()))
    ((v, _), _), _ = jax.lax.scan(level, first, ((levels, steps), keys))
    centre, spread = scales["u"]
    return centre + spread * v


def _symmetric(x):
    return (x + x.T) / 2
