"""Where a fit of a family begins: the normal that Pathfinder finds, and coordinates made of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.inference.vi.path_normals import Normal
from abduce.inference.vi.pathfinder import pathfinder

__all__ = ["Framed", "begin"]


@dataclasses.dataclass(frozen=True)
class Framed:
    """A family in coordinates `v` in which a given normal over `u` is standard.

    `u = location + scale (v + Q (L - I) Q' v)`, see `abduce.inference.vi.path_normals`.
    """

    inner: Any

    @property
    def dim(self) -> int:
        return self.inner.dim

    @property
    def noise_dim(self) -> int:
        return self.inner.noise_dim

    @property
    def sticks(self) -> bool:
        return self.inner.sticks

    @property
    def has_density(self) -> bool:
        return self.inner.has_density

    def draw(self, params, e):
        frame = jax.tree.map(jax.lax.stop_gradient, params["frame"])
        v, log_q = self.inner.draw(params["family"], e)
        inside = frame["basis"].T @ v
        change = frame["basis"] @ (frame["factor"] @ inside - inside)
        return frame["location"] + frame["scale"] * (v + change), log_q - frame["half_log_det"]

    def log_density(self, params, u):
        frame = jax.tree.map(jax.lax.stop_gradient, params["frame"])
        w = (u - frame["location"]) / frame["scale"]
        inside = frame["basis"].T @ w
        solved = jax.scipy.linalg.solve_triangular(frame["factor"], inside, lower=True)
        v = w + frame["basis"] @ (solved - inside)
        return self.inner.log_density(params["family"], v) - frame["half_log_det"]


def begin(family: Any, key: Any, target: Any, data: Any, start: Any) -> tuple[Any, Any]:
    """A family ready to be fitted, and its parameters, from Pathfinder's normal."""
    k1, k2 = jax.random.split(key)
    normal = pathfinder(num_paths=1)._path(target, data, k1, np.asarray(start)).best
    if normal is None:
        scale = np.full(len(start), 0.1)
        empty = np.zeros((len(start), 0))
        normal = Normal(np.asarray(start), scale, empty, np.zeros((0, 0)), 2 * np.log(scale).sum())
    frame = {
        "location": normal.location,
        "scale": normal.scale,
        "basis": normal.basis,
        "factor": normal.factor,
        "half_log_det": np.asarray(0.5 * normal.log_det),
    }
    frame = {k: jnp.asarray(x, start.dtype) for k, x in frame.items()}
    if family.framed:
        zero, one = jnp.zeros_like(start), jnp.ones_like(start)

        inner, params = family.prepare(k2, target, data, zero, one)
        return Framed(inner), {"frame": frame, "family": params}
    half = normal.basis @ normal.factor @ normal.basis.T - normal.basis @ normal.basis.T
    spread = normal.scale * np.sqrt(np.sum((np.eye(len(start)) + half) ** 2, 1))
    scale = jnp.asarray(spread, start.dtype)
    return family.prepare(k2, target, data, frame["location"], scale)
