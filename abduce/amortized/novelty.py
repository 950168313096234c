"""Data unlike any that an estimator was trained on: noticed, and said."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.encoder import features, raw_features
from abduce.inference.static import Static

__all__ = ["Novelty", "measure"]

_MARGIN = 1.25  # beyond the farthest of the stored simulations
_COUNT = 2048  # simulations that are kept in mind


class Novelty(eqx.Module):
    """What simulations look like.

    Attributes:
        centre, spread: Of each summary of the data over simulations.
        farthest: The largest standardized summary of any simulation.
        embedding_centre, embedding_scale: Mean of the network's context over simulations, and the
            inverse Cholesky factor of its covariance.
        embedding_farthest: The largest Mahalanobis distance of any simulation.
    """

    centre: Any
    spread: Any
    farthest: Any
    embedding_centre: Any
    embedding_scale: Any
    embedding_farthest: Any

    def messages(self, est: Any, example: Any, arguments: Any) -> list[str]:
        """A warning where the data are farther out than any simulation."""
        summary, context = _look(est, example, arguments)
        z = np.abs((np.asarray(summary) - self.centre) / self.spread)
        distance = np.linalg.norm(
            np.asarray(self.embedding_scale) @ (np.asarray(context) - self.embedding_centre)
        )
        by_data = float(np.max(z, initial=0.0)) / float(self.farthest)
        by_embedding = float(distance) / float(self.embedding_farthest)
        worst = max(by_data, by_embedding)
        if worst <= _MARGIN:
            return []
        which = "a summary of the data" if by_data >= by_embedding else "the network's embedding"
        has_density = getattr(est.settings, "pose", None) is None
        remedy = "Check the model with prior predictive draws"
        if has_density:
            remedy += (
                ", or correct the result with ab.importance(proposal=est) and look at its Pareto k"
            )
        return [
            f"ab.{est.name}: the data are unlike the simulations the estimator was trained on: "
            f"{which} is {worst:.1f} times as far out as the farthest of {_COUNT} simulations. The "
            f"posterior may be wrong. {remedy}."
        ]





def _summaries(layout: Any, scales: Any, example: Any) -> Any:
    raw = raw_features(layout, example, example["missing"])
    parts = []
    for group, x in zip(layout.groups, features(scales["features"], raw), strict=True):
        if group.kind not in ("set", "sequence", "image"):
            parts.append(x)
            continue
        there = jnp.ones(x.shape[0], bool)
        if group.kind == "set" and example["mask"] is not None:
            there = example["mask"]
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        on = jnp.broadcast_to(there[:, None, None], flat.shape)
        n = jnp.maximum(jnp.sum(on, (0, 1)), 1)
        mean = jnp.sum(jnp.where(on, flat, 0.0), (0, 1)) / n
        square = jnp.sum(jnp.where(on, (flat - mean) ** 2, 0.0), (0, 1)) / n
        parts += [mean, jnp.sqrt(square)]
    return jnp.concatenate(parts)


def _look_now(layout, settings, static, arrays, scales, example, many, arguments):
    from abduce.amortized.posterior_network import encode, find_frame

    network = eqx.combine(arrays, static.value)
    if settings.num_networks > 1:
        network = jax.tree.map(lambda x: x[0] if eqx.is_array(x) else x, network)

    def one(example):
        frame = find_frame(layout, settings, {**example, "discrete": {}}, scales, arguments)
        context = encode(layout, network, scales, example, frame)
        return _summaries(layout, scales, example), context

    return jax.vmap(one)(example) if many else one(example)


_look_compiled = jax.jit(_look_now, static_argnums=(0, 1, 2, 6))


def _look(est: Any, example: Any, arguments: Any, many: bool = False) -> Any:
    arrays, static = eqx.partition(est.network, eqx.is_array)
    return _look_compiled(
        est.layout, est.settings, Static(static), arrays, est.scales, example, many, arguments
    )


def measure(est: Any, sample: Any) -> Novelty:
    """From training examples with a leading axis."""
    keep = ("observed", "arguments", "mask", "missing")
    examples = {k: sample[k] for k in keep}
    summaries, contexts = _look(est, examples, est.simulation["arguments"], many=True)
    s, c = np.asarray(summaries, np.float64), np.asarray(contexts, np.float64)
    low, centre, high = np.nanquantile(s, [0.16, 0.5, 0.84], axis=0)
    spread = np.where(high > low, (high - low) / 2, np.maximum(np.nanstd(s, axis=0), 1e-6))
    farthest = np.nanmax(np.abs((s - centre) / spread), initial=1.0)
    mean = c.mean(0)
    cov = np.cov(c.T).reshape(c.shape[1], c.shape[1])
    cov += 1e-6 * max(float(np.trace(cov)) / len(cov), 1e-12) * np.eye(len(cov))
    scale = np.linalg.inv(np.linalg.cholesky(cov))
    distances = np.linalg.norm((c - mean) @ scale.T, axis=1)
    return Novelty(centre, spread, farthest, mean, scale, distances.max())
