"""Coordinates that adapt: how far each hierarchical site is centred, found during the warm-up.

A site `theta ~ Normal(loc, scale)` whose parameters are inferred makes a funnel in its own
coordinates when its data say little, and in non-centred ones when they say much. In between is

    u ~ Normal(c * loc, scale**c),     theta = loc + scale**(1 - c) * (u - c * loc)

(Papaspiliopoulos, Roberts and Sköld 2007), with `c = 1` centred and `c = 0` non-centred. Gorinova,
Moore and Hoffman ("Automatic reparameterisation of probabilistic programs", 2020) choose `c` by
variational inference. Here it is chosen from the warm-up's own draws: among the degrees on a grid,
each number takes the one whose coordinate is nearest to an independent normal, in the divergence
KL(posterior || normals), which up to a constant is

    log sd(u) + (1 - c) * E[log scale].

The joint distribution, the draws and the addresses are untouched; `c` is data of the compiled
program, so that nothing is compiled when it changes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.inference.problem import Problem
from abduce.inference.target import FlatTarget, Slot
from abduce.ppl.graph import graph_of
from abduce.ppl.replay import Replay

__all__ = ["Centering", "hierarchical_sites"]

_FAMILIES = ("Normal", "StudentT", "Cauchy", "Laplace", "Logistic", "Gumbel")
_GRID = np.linspace(0.0, 1.0, 5)
_GAIN = 0.02  # nats per number; less is noise
_MOST_DRAWS = 256  # how many draws are looked at


def hierarchical_sites(problem: Problem, target: FlatTarget) -> tuple[str, ...]:
    """Latents of a location-scale family whose parameters depend on other latents."""
    sites = problem.program.sites
    found = [
        s.address
        for s in target.slots
        if s.hidden is None
        and sites[s.address].family in _FAMILIES
        and sites[s.address].site.coords is None
        and not sites[s.address].conditional
        and "leaf" in sites[s.address].site.roles  # else its parameters are constants
    ]
    if not found:
        return ()
    graph = graph_of(problem.program)
    latents = set(problem.latents)
    return tuple(a for a in found if latents & set(graph.parents(a)))


class Centering:
    """Chooses degrees of centring from draws.

    Args:
        target: The flat target.
        sites: From `hierarchical_sites`.
    """

    def __init__(self, target: FlatTarget, sites: tuple[str, ...]):
        self.target, self.sites = target, sites
        self.slots: dict[str, Slot] = {s.address: s for s in target.slots if s.address in sites}

    def start(self, data: Any) -> Any:
        """Data in which every site is centred."""
        dtype = jnp.result_type(float)
        degrees = {a: jnp.ones(s.shape, dtype) for a, s in self.slots.items()}
        return {**data, "centering": degrees}

    def choose(self, data: Any, positions: np.ndarray) -> dict[str, np.ndarray] | None:
        """Picks the degrees for draws; None if those in use are as good.

        Args:
            data: As now used.
            positions: Draws in the coordinates now used, shape `(n, dim)`.
        """
        step = max(1, -(-len(positions) // _MOST_DRAWS))
        some = self._resized(positions[::step])
        values = self._records(data, some)
        chosen, gained = {}, False
        for address, (theta, loc, log_scale) in values.items():
            now = np.asarray(data["centering"][address], np.float64)
            best = now
            least = _divergence(now, theta, loc, log_scale)
            for c in _GRID:
                value = _divergence(np.full_like(now, c), theta, loc, log_scale)
                better = value < least - _GAIN
                best, least = np.where(better, c, best), np.where(better, value, least)
            gained |= bool((best != now).any())
            chosen[address] = best
        return chosen if gained else None

    def move(self, data: Any, chosen: dict[str, np.ndarray], positions: np.ndarray) -> np.ndarray:
        """The same points in the coordinates of the chosen degrees, shape `(n, dim)`."""
        moved = np.array(positions, np.float64)
        for start in range(0, len(positions), _MOST_DRAWS):
            part = positions[start : start + _MOST_DRAWS]
            values = self._records(data, self._resized(part))
            for address, (theta, loc, log_scale) in values.items():
                slot = self.slots[address]
                u = _coordinate(chosen[address], theta, loc, log_scale)[: len(part)]
                moved[start : start + len(part), slot.start : slot.stop] = u.reshape(len(part), -1)
        return moved.astype(positions.dtype)

    def replaced(self, data: Any, chosen: dict[str, np.ndarray]) -> Any:
        """Data with the chosen degrees."""
        dtype = jnp.result_type(float)
        return {**data, "centering": {a: jnp.asarray(c, dtype) for a, c in chosen.items()}}

    def _resized(self, positions: np.ndarray) -> np.ndarray:
        """Repeats rows up to a fixed number, so that one compiled program serves all calls."""
        index = np.arange(_MOST_DRAWS) % len(positions)
        return positions if len(positions) == _MOST_DRAWS else positions[index]

    def _records(self, data: Any, positions: np.ndarray) -> dict[str, tuple[np.ndarray, ...]]:
        out = _locations(self.target, self.sites, data, jnp.asarray(positions))
        return {a: tuple(np.asarray(x, np.float64) for x in v) for a, v in out.items()}


def _coordinate(c: np.ndarray, theta: np.ndarray, loc: np.ndarray, log_scale: np.ndarray) -> Any:
    return c * loc + np.exp((c - 1) * log_scale) * (theta - loc)


def _divergence(c: np.ndarray, theta: np.ndarray, loc: np.ndarray, log_scale: np.ndarray) -> Any:
    sd = _coordinate(c, theta, loc, log_scale).std(0)
    return np.log(np.maximum(sd, 1e-300)) + (1 - c) * log_scale.mean(0)


def _locations_now(target, sites, data, positions):
    replay = Replay(record=frozenset({"value", "location", "log_scale"}), score=False)
    infos = target.program(data).sites

    def one(q):
        records = target.run(replay, data, q)["records"]
        fields = ("value", "location", "log_scale")
        return {a: tuple(infos[a].to_physical(records[a][f]) for f in fields) for a in sites}

    return jax.vmap(one)(positions)


_locations = jax.jit(_locations_now, static_argnums=(0, 1))
