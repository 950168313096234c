"""Gradient strategies, `ab.grad.*`: see `abduce.inference.vi.strategies`."""

from abduce.inference.vi.strategies import (
    Strategy,
    default,
    enum,
    gumbel_softmax,
    implicit,
    mvd,
    reparam,
    rsvi,
    score,
    stop,
)

__all__ = [
    "Strategy",
    "default",
    "enum",
    "gumbel_softmax",
    "implicit",
    "mvd",
    "reparam",
    "rsvi",
    "score",
    "stop",
]
