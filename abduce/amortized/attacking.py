"""The worst small perturbation of data, by projected gradient ascent."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from abduce.amortized.frames import to_frame
from abduce.amortized.posterior_model import AmortizedLaw
from abduce.amortized.posterior_network import (
    PosteriorTask,
    encode,
    find_frame,
    flat_discrete,
    standardized,
)
from abduce.amortized.robustness import no_perturbation, perturbed
from abduce.ppl.program import Arguments

__all__ = ["attack_all", "perturbed_scores"]

_TOGETHER = 32  # data sets that are attacked side by side
_FIRST, _LAST = 0.5, 0.02  # length of steps, relative to that of the perturbation


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def attack_all(
    law: AmortizedLaw,
    num_steps: int,
    num_samples: int,
    num_random: int,
    arrays: Any,
    scales: Any,
    dynamic: list[Any],
    batch: Any,
    epsilon: Any,
    key: Any,
) -> dict[str, Any]:
    """Attacks each example of a batch; see `ab.checks.run_attack`.

    Returns:
        `kl_attacked`, `kl_random` (nats), `ranks`, `ranks_untouched`, shape `(n,)` each, and
        `perturbation` by address.
    """

    def one(inputs):
        example, key = inputs
        mine = list(example["arguments"]) if law.layout.arguments else dynamic
        seen = {k: example[k] for k in ("observed", "arguments", "mask", "missing")}
        truth = (example["u"], flat_discrete(law.layout, example["discrete"]))
        return _attack(
            law, num_steps, num_samples, num_random, (arrays, scales, seen, mine), truth, epsilon,
            key,
        )  # fmt: skip

    n = len(jax.tree.leaves(batch["observed"])[0])
    return jax.lax.map(one, (batch, jax.random.split(key, n)), batch_size=_TOGETHER)


def _attack(law, num_steps, num_samples, num_random, operands, truth, epsilon, key):
    _, scales, example, _ = operands
    k_draws, k_random, k_after = jax.random.split(key, 3)
    flat, unravel = ravel_pytree(no_perturbation(example))
    present, _ = ravel_pytree(_present(law.layout, example))

    def draws(key, num, operands):
        vectors = jax.vmap(lambda k: law.draw(k, operands))(jax.random.split(key, num))
        dim = law.layout.dim
        return vectors[:, :dim], vectors[:, dim:].astype(jnp.int32)

    def scores(delta, points):
        return perturbed_scores(law, operands, unravel(delta), points)

    def objective(delta):  # the divergence, less a constant
        return -jnp.mean(scores(delta, points))

    both = draws(k_draws, 2 * num_samples, operands)
    points, fresh = (jax.tree.map(lambda x, i=i: x[i::2], both) for i in (0, 1))
    noise = jax.random.normal(k_random, (num_random, flat.size), flat.dtype) * present
    around = epsilon * noise / _length(noise)[:, None]
    start = around[jnp.argmax(jax.vmap(objective)(around))]

    def step(i, state):
        delta, best, most = state
        value, slope = jax.value_and_grad(objective)(delta)
        is_better = value > most
        best, most = jnp.where(is_better, delta, best), jnp.where(is_better, value, most)
        slope = jnp.where(jnp.isfinite(slope), slope, 0.0)
        rate = _FIRST + (_LAST - _FIRST) * i / num_steps
        moved = delta + rate * epsilon * slope / _length(slope)
        return moved * jnp.minimum(1.0, epsilon / _length(moved)), best, most

    first = (start, start, jnp.asarray(-jnp.inf, flat.dtype))
    _, best, _ = jax.lax.fori_loop(0, num_steps + 1, step, first)  # each looks at the one before

    def with_truth(draws):
        return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), truth, draws)

    there = jnp.concatenate([flat[None], best[None], around])
    found = jax.vmap(lambda d: scores(d, with_truth(fresh)))(there)
    means = jnp.mean(found[:, 1:], 1)
    moved = (*operands[:2], perturbed(law.layout, scales, example, unravel(best)), operands[3])
    after = scores(best, with_truth(draws(k_after, num_samples, moved)))
    return {
        "kl_attacked": means[0] - means[1],
        "kl_random": means[0] - jnp.mean(means[2:]),
        "ranks": _rank(after),
        "ranks_untouched": _rank(found[0]),
        "perturbation": unravel(best),
    }


def _rank(scores: Any) -> Any:
    """Share of the scores that lie above the first; discrete latents tie."""
    share = jnp.mean(scores[1:] > scores[0]) + 0.5 * jnp.mean(scores[1:] == scores[0])
    return jnp.where(jnp.isnan(scores[0]), 1.0, share)  # then no region holds it


def _length(x: Any) -> Any:
    return jnp.maximum(jnp.linalg.norm(x, axis=-1), jnp.finfo(x.dtype).tiny)


def _present(layout: Any, example: Any) -> dict[str, Any]:
    """1 where an observed value is there; elsewhere the network does not see it."""
    out = no_perturbation(example)
    for group in layout.groups:
        for a in group.sites:
            there = jnp.ones_like(out[a])
            if group.kind == "set" and example["mask"] is not None:
                there = there * example["mask"].reshape((-1,) + (1,) * (there.ndim - 1))
            if example["missing"] is not None:
                there = there * ~example["missing"][a]
            out[a] = there
    return out


def perturbed_scores(law: AmortizedLaw, operands: Any, delta: Any, points: Any) -> Any:
    """Log densities of latents under the posterior of data moved by `delta`, up to a constant.

    Args:
        law: Of the estimator.
        operands: Of the law, with the data as they are.
        delta: By address, in spreads.
        points: Coordinates `(n, dim)` and discrete latents `(n, d)`, counted from 0.

    Returns:
        Shape `(n,)`, nats; differentiable in `delta`.
    """
    _, scales, example, dynamic = operands
    layout = law.layout
    nets = law.networks(operands)
    moved = perturbed(layout, scales, example, delta)
    u, discrete = points
    v = standardized(scales, u)
    frame = find_frame(
        layout, law.settings, {**moved, "discrete": {}}, scales, Arguments(law.static, dynamic)
    )
    volume = jnp.zeros(())
    if frame is not None:
        frame = _with_gradient(law, frame, moved, scales, dynamic)
        v = jax.vmap(lambda x: to_frame(frame, x))(v)
        volume = jnp.sum(jnp.log(jnp.diagonal(frame[1])))
    each = []
    for net in nets:
        context = encode(layout, net, scales, moved, frame)
        score = functools.partial(net.log_density, context)
        each.append(jax.vmap(score)(v, discrete))
    return jax.nn.logsumexp(jnp.stack(each), axis=0) - jnp.log(1.0 * len(nets)) - volume


def _with_gradient(law, frame, example, scales, dynamic):
    """Laplace's frame with its derivative in the data, by the implicit function theorem.

    `frame` is found by Newton steps that are held fixed in derivatives. At the mode the slope `g`
    is 0, so `dm = P dg` with `P = L L^T` the inverse of the curvature `H`; and
    `dL = L phi(-L^T dH L)`, where `phi` takes the lower triangle and half the diagonal.
    """
    task = PosteriorTask(law.layout, law.settings)
    data = {"scales": scales, "simulation": {"arguments": Arguments(law.static, dynamic)}}
    example = {**example, "discrete": {}}

    def log_joint(v):
        return task.log_joint(v, example, data)

    def change(x):
        return jnp.nan_to_num(x - jax.lax.stop_gradient(x), nan=0.0, posinf=0.0, neginf=0.0)

    m, tril = frame
    m = m + tril @ (tril.T @ change(jax.grad(log_joint)(m)))
    inner = tril.T @ change(jax.hessian(log_joint)(m)) @ tril  # minus that of the curvature
    return m, tril + tril @ (jnp.tril(inner) - 0.5 * jnp.diag(jnp.diagonal(inner)))
