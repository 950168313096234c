"""How observations are arranged for a network: sets, sequences, images and vectors.

Whether the order of elements matters is not guessed: values and arguments are permuted along an
axis, and every element's score (of a site without a density, every operand) has to come out
permuted, up to rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from abduce.amortized.operands import OperandReplay, operands_of
from abduce.inference.problem import Problem
from abduce.ppl.operations import outside_scopes, run_program
from abduce.ppl.program import Arguments, Program
from abduce.ppl.replay import Given

__all__ = ["Group", "make_groups"]

_LONG = 16  # steps from which an ordered axis is a sequence rather than features
_PIXELS = 8  # least height and width of an image


@dataclasses.dataclass(frozen=True)
class Group:
    """Observations and arguments that a network reads together.

    Attributes:
        kind: 'set', 'sequence', 'image' or 'vector'.
        sites: Addresses.
        arguments: Indices of argument arrays whose elements go with those of the sites.
        size: Elements of a set or a sequence; 0 for others.
    """

    kind: str
    sites: tuple[str, ...]
    arguments: tuple[int, ...]
    size: int


def make_groups(
    problem: Problem, observed: tuple[str, ...], values: dict[str, Any], key: Any, drawn: bool
) -> tuple[Group, ...]:
    """Arranges the observed sites, and the arguments where they are `drawn`.

    Args:
        problem: The model.
        observed: Addresses.
        values: A draw of all sites.
        key: Random key, for the shuffles that are tried.
        drawn: Whether the arguments vary.
    """
    program = problem.program
    groups, left = [], list(observed)
    by_size: dict[int, list[str]] = {}
    for a in observed:
        info = program.sites[a]
        is_scan = info.shape and info.perm[0] < info.num_scans
        if info.batch_ndim and not is_scan and info.shape[0] > 1:
            by_size.setdefault(info.shape[0], []).append(a)
    shared = {
        s.shape[0] for a, s in program.latents.items()
        if a not in observed and s.batch_ndim and s.shape[0] > 1
    }  # fmt: skip
    for size, sites in by_size.items():
        if size in shared:
            continue  # a latent for each element: which is which matters
        aligned = _exchangeable(problem, sites, size, values, key)
        if aligned is not None:
            groups.append(Group("set", tuple(sites), aligned, size))
            left = [a for a in left if a not in sites]
    for a in left:
        info = program.sites[a]
        is_scan = bool(info.shape) and info.perm[0] < info.num_scans
        if info.shape and info.shape[0] >= _LONG and (is_scan or len(info.shape) == 1):
            groups.append(Group("sequence", (a,), (), info.shape[0]))
        elif len(info.shape) >= 2 and min(info.shape[:2]) >= _PIXELS:
            groups.append(Group("image", (a,), (), 0))
        else:
            groups.append(Group("vector", (a,), (), 0))
    used = {i for g in groups for i in g.arguments}
    rest = tuple(i for i in range(len(problem.arguments.dynamic)) if i not in used)
    if drawn and rest:
        groups.append(Group("vector", (), rest, 0))
    return tuple(groups)


def _exchangeable(
    problem: Problem, sites: list[str], size: int, values: dict[str, Any], key: Any
) -> tuple[int, ...] | None:
    """Indices of the arguments that go along with the elements; None if their order matters."""
    leaves = problem.arguments.dynamic
    candidates = [i for i, x in enumerate(leaves) if np.ndim(x) and np.shape(x)[0] == size]
    before = _element_records(problem.program, problem.arguments, values, sites)
    shuffles = [np.roll(np.arange(size), 1), np.asarray(jax.random.permutation(key, size))]
    for moved in ((), tuple(candidates)) if candidates else ((),):
        good = True
        for shuffle in shuffles:
            dynamic = [x[shuffle] if i in moved else x for i, x in enumerate(leaves)]
            new = {a: x[shuffle] if a in sites else x for a, x in values.items()}
            after = _element_records(
                problem.program, Arguments(problem.arguments.static, dynamic), new, sites
            )
            good = good and all(
                a.shape == b.shape
                and a.shape[:1] == (size,)
                and np.allclose(a[shuffle], b, rtol=1e-4, atol=1e-5, equal_nan=True)
                for a, b in zip(before, after, strict=True)
            )
        if good:
            return moved
    return None


def _element_records(
    program: Program, arguments: Arguments, values: dict[str, Any], sites: list[str]
) -> list[np.ndarray]:
    """The score of each element, or what determines its law."""
    given = {a: Given(x, trusted=True) for a, x in values.items()}
    replay = OperandReplay(record=frozenset({"value", "score"}))
    with outside_scopes():
        out = run_program(replay, program, arguments, None, given)
    found = []
    for a in sites:
        record = out["records"][a]
        if program.sites[a].has_density:
            found.append(np.asarray(record["score"]))
        else:
            operands = operands_of(record) or [np.zeros(program.sites[a].shape[:1])]
            found += [np.asarray(x) for x in operands]
    return found
