"""Many data sets in one compiled program, for algorithms that can be traced."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.checks.densities import density_of_points, posterior_model
from abduce.amortized.checks.prior_predictive import PriorPredictive
from abduce.amortized.posing import as_arguments
from abduce.inference import weighting

__all__ = ["mapped_runs"]


def mapped_runs(
    model: Any, algorithm: Any, pairs: PriorPredictive, keys: Any, index: np.ndarray, num: int
) -> dict[str, Any]:
    """Posteriors of the data sets with these numbers.

    Weighted draws are resampled. A run without a finite weight, or with a NaN one, has `count` 0.

    Returns:
        `draws` by address, `(dataset, draw, ...)`; `active` likewise, of latents in branches;
        `count`, `(dataset,)`; `log_joint` and `log_posterior`, `(dataset, 1 + draw)`, at the true
        value and the draws, or None.
    """

    def take(tree):
        return jax.tree.map(lambda x: x[index], tree)

    batch = (keys, take(pairs.observed), take(pairs.designs), take(pairs.visible(pairs.truths)))
    bare = model.with_algorithm(None) if model.algorithm is not None else model
    _, packed = bare._stage(*pairs.arguments(jax.tree.map(lambda x: x[0], pairs.designs)))
    out = _run(pairs.designs is not None, num, tuple(pairs.truths), packed, algorithm, batch)
    return jax.tree.map(np.asarray, out)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(is_designed, num, latents, packed, algorithm, batch):
    model, fixed_args, fixed_kwargs = packed.unpack()

    def one(key, given, design, truth):
        args, kwargs = as_arguments(design) if is_designed else (fixed_args, fixed_kwargs)
        key_run, key_pick = jax.random.split(key)
        post = algorithm(model).posterior(key_run, *args, given=given, **kwargs)
        total = post.num_chains * post.num_draws
        if post.log_weights is None:
            pick = jnp.arange(num) % total
            count = jnp.asarray(min(num, total))
        else:
            log_weights = post.log_weights.reshape(-1)
            weights = weighting.normalized(log_weights)
            pick = jax.random.choice(key_pick, total, (num,), p=weights)
            effective = jnp.minimum(jnp.round(1 / jnp.sum(weights**2)), min(num, total))
            is_fine = jnp.isfinite(jnp.max(log_weights))
            count = jnp.where(is_fine, effective, 0).astype(jnp.int32)

        def picked(x):
            return weighting.flat(x)[pick]

        draws = {a: picked(post.draws[a]) for a in latents}
        active = {a: picked(x) for a, x in post.active.items() if a in latents}
        # a latent of a branch that was not taken is NaN: any value does where it does not count
        filled = {
            a: jnp.where(jnp.isnan(x), 1, x)
            if a in active and jnp.issubdtype(x.dtype, jnp.inexact) else x
            for a, x in draws.items()
        }  # fmt: skip
        points = {a: jnp.concatenate([truth[a][None], x]) for a, x in filled.items()}
        q = posterior_model(algorithm, model, None)
        return {
            "draws": draws,
            "active": active,
            "count": count,
            "log_joint": density_of_points(model, points, given, args, kwargs),
            "log_posterior": None
            if q is None
            else density_of_points(q, points, {}, (given, *args), kwargs),
        }

    return jax.vmap(one)(*batch)
