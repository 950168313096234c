"""Brings the chains to the posterior mass and gives them a first metric."""

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import numpy as np

from .chains import Chains
from .descent import Descent, descend, local_covariance
from .linear_map import LinearMap
from .metric_choice import covariance_map

__all__ = ["approach"]

_ROUNDS = 3  # starts of a chain that ends far below the best
_LEGS = 6  # descents of one start, each with the curvature found by the one before


class _End(NamedTuple):
    descent: Descent
    covariance: np.ndarray | None

    def gain(self) -> float:
        """What is left to gain up to the top, in nats, were the density Gaussian here."""
        if self.covariance is None:
            return 0.0
        gradient = self.descent.gradient
        return 0.5 * float(gradient @ self.covariance @ gradient)

    def log_mass(self) -> float:
        """Laplace's estimate of the log of the mass around here, up to a constant."""
        if self.covariance is None:
            return self.descent.value
        return self.descent.value + self.gain() + 0.5 * np.linalg.slogdet(self.covariance)[1]


def approach(chains: Chains, unit: LinearMap, propose: Callable[[list[int]], None]
             ) -> LinearMap | None:
    """Descends with every chain, and again with those that end in a negligible mode.

    A chain may fall into a mode whose mass is nothing next to another's; a sampler would take very
    long to leave it. Such a chain starts anew and keeps the best of its ends. Modes of comparable
    mass are left alone.

    Args:
        chains: With finite log density at their positions, which are moved.
        unit: A unit metric in the layout to be used.
        propose: Replaces the positions of the listed chains by new, finite starting points.

    Returns:
        A first metric, or None where none could be estimated.
    """
    dim = chains.dim
    pending = list(range(chains.num_chains))
    ends: dict[int, _End] = {}
    guide = None
    for attempt in range(_ROUNDS):
        if attempt > 0:
            propose(pending)
        found = _finish(chains, unit, {i: _search(chains.positions[i], guide) for i in pending})
        for i, end in found.items():
            if i not in ends or end.log_mass() > ends[i].log_mass():
                ends[i] = end
        best = max(ends.values(), key=_End.log_mass)
        guide = best.covariance
        pending = [i for i, end in ends.items() if end.log_mass() < best.log_mass() - 10 - dim]
        if not pending:
            break
    for i, end in ends.items():
        chains.positions[i] = end.descent.position
    good = [end.covariance for i, end in ends.items()
            if i not in pending and end.covariance is not None]
    if not good:
        return None
    # the mean precision: a chain that sees little curvature says little
    precision = np.mean([np.linalg.inv(c) for c in good], 0)
    metric = covariance_map(np.linalg.inv(precision), unit.factor.shape[1])
    return metric if np.all(np.isfinite(metric.factor)) else None


def _search(position: np.ndarray, guide: np.ndarray | None
            ) -> Generator[np.ndarray, tuple[float, np.ndarray], _End]:
    for _ in range(_LEGS):
        descent = yield from descend(position, guide)
        if descent.inverse_hessian is None:
            return _End(descent, None)
        found = yield from local_covariance(descent)
        if found is None:
            return _End(descent, None)
        end, reliable = _End(descent, found[0]), found[1]
        if reliable and end.gain() < len(position) + 5:
            break
        position, guide = descent.position, end.covariance
    return end


def _finish(chains: Chains, unit: LinearMap, searches: dict[int, Any]) -> dict[int, _End]:
    """Advances the searches together until all have ended."""
    ends = {}
    for i, search in searches.items():
        chains.positions[i] = next(search)
    while searches:
        chains.evaluate(unit, list(searches))
        for i, search in list(searches.items()):
            try:  # copies: the arrays of `chains` are overwritten by the next evaluation
                chains.positions[i] = search.send(
                    (float(chains.log_densities[i]), chains.gradients[i].copy()))
            except StopIteration as stop:
                ends[i] = stop.value
                del searches[i]
    return ends
