"""Brings the chains to the posterior mass and gives them a first metric."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .chains import Chains, Draws
from .descent import Mass, find_mass
from .linear_map import LinearMap
from .metric_choice import covariance_map, whiten

__all__ = ["approach", "negligible", "rescue"]

_ROUNDS = 3  # starts of a chain that ends far below the best


def approach(
    chains: Chains, unit: LinearMap, propose: Callable[[list[int]], None]
) -> LinearMap | None:
    """Descends with every chain, and again with those that end in a negligible mode.

    A chain may fall into a mode whose mass is nothing next to another's; a sampler would take very
    long to leave it. Such a chain starts anew, and if that does not help from where the best chain
    is. Modes of comparable mass are left alone.

    Args:
        chains: With finite log density at their positions, which are moved.
        unit: A unit metric in the layout to be used.
        propose: Replaces the positions of the listed chains by new, finite starting points.

    Returns:
        A first metric, or None where none could be estimated.
    """
    dim = chains.dim
    pending = list(range(chains.num_chains))
    ends: dict[int, Mass] = {}
    guide = None
    for attempt in range(_ROUNDS):
        if attempt > 0:
            propose(pending)
        found = _finish(chains, unit, {i: find_mass(chains.positions[i], guide) for i in pending})
        for i, end in found.items():
            if i not in ends or end.log_mass() > ends[i].log_mass():
                ends[i] = end
        best = max(ends.values(), key=Mass.log_mass)
        guide = best.covariance
        pending = [
            i for i, end in ends.items() if end.log_mass() < best.log_mass() - negligible(dim)
        ]
        if not pending:
            break
    for i, end in ends.items():
        # a chain that finds no other way starts where one of the others does
        end = best if i in pending else end
        chains.positions[i] = end.descent.position
    good = [
        end.covariance for i, end in ends.items() if i not in pending and end.covariance is not None
    ]
    if not good:
        return None
    # the mean precision: a chain that sees little curvature says little
    try:
        precision = np.mean([np.linalg.inv(c) for c in good], 0)
        metric = covariance_map(np.linalg.inv(precision), unit.factor.shape[1])
    except np.linalg.LinAlgError:  # a flat direction
        return None
    return metric if np.all(np.isfinite(metric.factor)) else None


def _finish(chains: Chains, unit: LinearMap, searches: dict[int, Any]) -> dict[int, Mass]:
    """Advances the searches together until all have ended."""
    ends = {}
    for i, search in searches.items():
        chains.positions[i] = next(search)
    while searches:
        chains.evaluate(unit, list(searches))
        for i, search in list(searches.items()):
            try:  # copies: the arrays of `chains` are overwritten by the next evaluation
                chains.positions[i] = search.send(
                    (float(chains.log_densities[i]), chains.gradients[i].copy())
                )
            except StopIteration as stop:
                ends[i] = stop.value
                del searches[i]
    return ends


def negligible(dim: int) -> float:
    """How far below the best the log mass of a mode must be estimated for the mode not to count.

    Ten nats are a factor of 20 000; the rest allows for the estimate, which is of Laplace's kind.
    """
    return 10.0 + dim


def rescue(chains: Chains, draws: Draws, metric: LinearMap) -> int:
    """Moves chains out of modes of negligible mass, between two windows of the warm-up.

    The mass around a chain is estimated by its mean log density and the volume it covers.

    Returns:
        How many chains were moved, each to a draw of another chain.
    """
    z = whiten(metric, draws.positions.astype(np.float64))
    volume = np.sum(np.log(np.maximum(z.std(1), 1e-6)), -1)
    mass = np.mean(draws.stats["lp"].astype(np.float64), 1) + volume
    lost = np.flatnonzero(~(mass > np.nanmax(mass) - negligible(chains.dim)))
    kept = np.flatnonzero(mass > np.nanmax(mass) - negligible(chains.dim))
    if not len(kept):
        return 0
    for order, i in enumerate(lost):
        donor = kept[order % len(kept)]
        chains.positions[i] = draws.positions[donor, draws.positions.shape[1] // 2]
    return len(lost)
