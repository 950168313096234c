"""Faithful inversion: in which order to draw the latents, and given which others.

A guide that draws the latents one after the other, each given some of those before it, holds the
posterior if it has no conditional independence that the posterior lacks (it is *faithful*), and is
small if it has all others (*minimally* so). Webb, Golinski, Zinkov, Siddharth, Rainforth, Teh and
Wood, "Faithful inversion of generative models for effective amortized inference" (NeurIPS 2018),
get it by eliminating latents from the moral graph: who is eliminated gets its neighbours as
parents, and these are joined.

Two things make the result minimal for its order. A latent on which no data depend is eliminated
first, with the parents it has in the model, without joining them: summed over, its density is 1.
What is left are ancestors of data, and among those separation in the moral graph is d-separation
(Lauritzen et al. 1990), so that a parent is needed if and only if elimination makes it one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from abduce.inference.vi.elements import Families

__all__ = ["faithful_inverse"]


def faithful_inverse(found: Families) -> tuple[list[int], dict[int, list[int]]]:
    """The order to draw coordinates in, and the parents of each.

    The least connected one is eliminated first (minimum degree), so drawn last: the elements of a
    plate given the global latents, and the steps of a chain from one end. Of equals the one that
    the program draws first is drawn first.
    """
    terms = [row.tolist() for row in np.split(found.all.indices, found.all.indptr[1:-1])]
    own = [row.tolist() for row in np.split(found.own.indices, found.own.indptr[1:-1])]
    dim = found.own.shape[1]
    removed, parents, alive = _barren(terms, own, found.normalized, dim)
    neighbours: dict[int, set[int]] = {i: set() for i in range(dim) if i not in parents}
    for term in (t for t, on in zip(terms, alive, strict=True) if on):
        for i in term:
            neighbours[i].update(term)
    for i, around in neighbours.items():
        around.discard(i)
    while neighbours:
        i = min(neighbours, key=lambda a: (len(neighbours[a]), -a))  # globals come first
        around = neighbours.pop(i)
        parents[i] = sorted(around)
        for a in around:
            neighbours[a] |= around - {a}
            neighbours[a].discard(i)
        removed.append(i)
    return removed[::-1], parents


def _barren(
    terms: list[list[int]], own: list[list[int]], normalized: np.ndarray, dim: int
) -> tuple[list[int], dict[int, list[int]], list[bool]]:
    """Latents on which no data depend, from the ends of the model inwards."""
    used = np.zeros(dim, int)  # in how many terms a coordinate is
    owner: dict[int, int] = {}
    for f, term in enumerate(terms):
        used[term] += 1
        owner.update(dict.fromkeys(own[f], f))
    alive = [True] * len(terms)
    removed: list[int] = []
    parents: dict[int, list[int]] = {}
    waiting = [f for f in range(len(terms)) if own[f]]
    while waiting:
        f = waiting.pop()
        if not alive[f] or not normalized[f] or any(used[i] > 1 for i in own[f]):
            continue
        alive[f] = False
        mine = sorted(own[f])
        outside: Any = sorted(set(terms[f]) - set(mine))
        for k in reversed(range(len(mine))):
            parents[mine[k]] = outside + mine[:k]
            removed.append(mine[k])
        used[terms[f]] -= 1
        waiting += [owner[i] for i in outside if i in owner]
    return removed, parents, alive
