"""Selections: which sites an operation is about.

A selection is an address, a glob (`"school/*"`), a tuple of those (their union), or `ab.sel(...)`
objects combined with `|`, `&` and `~`. A part that matches no site is an error.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

from abduce.errors import InvalidValue, UnknownAddress, suggest

__all__ = ["Selection", "matching", "sel"]


class Selection:
    """A set of addresses, decided when the sites are known. Made by `sel`."""

    def __init__(self, resolve: Callable[[list[str]], set[str]], text: str):
        self._resolve, self._text = resolve, text

    def __or__(self, other: Any) -> Selection:
        other = sel(other)
        return Selection(
            lambda known: self._resolve(known) | other._resolve(known),
            f"({self._text} | {other._text})",
        )

    def __and__(self, other: Any) -> Selection:
        other = sel(other)
        return Selection(
            lambda known: self._resolve(known) & other._resolve(known),
            f"({self._text} & {other._text})",
        )

    def __invert__(self) -> Selection:
        return Selection(lambda known: set(known) - self._resolve(known), f"~{self._text}")

    def __repr__(self) -> str:
        return f"ab.sel({self._text})"


def sel(*parts: Any) -> Selection:
    """Builds a selection; several parts are a union, none selects everything.

    Args:
        *parts: Addresses, globs, tuples, or selections.

    Example:
        >>> ab.sel("mu") | ab.sel("school/*")
        ab.sel(('mu' | 'school/*'))
        >>> everything_else = ~ab.sel("mu")
    """
    if not parts:
        return Selection(set, "")
    if len(parts) > 1:
        return _union(parts)
    part = parts[0]
    if isinstance(part, Selection):
        return part
    if isinstance(part, str):
        return Selection(lambda known: _match(part, known), repr(part))
    if isinstance(part, (tuple, list, set, frozenset)):
        return _union(tuple(part))
    raise InvalidValue(
        f"a selection is an address, a glob, a tuple of them or ab.sel(...), got {part!r}."
    )


def _union(parts: Iterable[Any]) -> Selection:
    members = [sel(p) for p in parts]
    if not members:
        return Selection(lambda known: set(), "()")
    return Selection(
        lambda known: set().union(*(m._resolve(known) for m in members)),
        " | ".join(m._text for m in members),
    )


def _match(pattern: str, known: list[str]) -> set[str]:
    if pattern in known:
        return {pattern}
    found = (
        set(fnmatch.filter(known, pattern)) if any(c in pattern for c in "*?[") else set()
    )  # fmt: skip
    if not found:
        raise UnknownAddress(
            f"selection {pattern!r} matches no site; there are: {', '.join(known) or 'none'}."
            f"{suggest(pattern, known)}"
        )
    return found


def matching(selection: Any, known: Iterable[str]) -> set[str]:
    """The addresses among `known` that a selection picks.

    Raises:
        UnknownAddress: A part of it matches nothing.
    """
    return sel(selection)._resolve(list(known))
