"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

from abduce.errors import AbduceWarning

__all__ = ["warn"]

_INSIDE = ("abduce", "equinox", "jax")  # packages whose frames are not the user's


def warn(messages: Iterable[str]) -> None:
    """Raises each message as an `AbduceWarning` at the line that called abduce."""
    for message in messages:
        warnings.warn(message, AbduceWarning, stacklevel=_users_level())


def _users_level() -> int:
    """Stack level, for `warnings.warn` in the calling function, of the line that called abduce."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    return level
