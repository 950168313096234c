"""What a walk over an objective carries: values with their labels, log factors, keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import numpy as np

__all__ = ["Input", "Node", "Tape", "Use", "as_node"]


class Input(eqx.Module):
    """What is set from outside for one site, in the program's layout (scans, then batch).

    Attributes:
        index: Which value of the support to take (enumeration).
        which: Which alternative to take where `mask` holds; a scalar.
        mask: Elements that take the alternative.
        nudge: Added to the log factor; the derivative in it is the cost of each element.
        baseline: Subtracted from the cost of each element.
        target: Costs that a learned baseline is compared with.
        value: Of a parameter.
    """

    index: Any = None
    which: Any = None
    mask: Any = None
    nudge: Any = None
    baseline: Any = None
    target: Any = None
    value: Any = None

    def at(self, x: Any) -> Input:
        """With the sliced arrays of one step."""
        index, mask, nudge, baseline, target = x
        return Input(index, self.which, mask, nudge, baseline, target, self.value)

    @property
    def sliced(self) -> tuple[Any, ...]:
        return self.index, self.mask, self.nudge, self.baseline, self.target


class Node:
    """A value of the program.

    Attributes:
        value: The array.
        labels: The choices it depends on.
        credited: Its parts, multiplied by their factors and added up again; None where nobody
            asked.
        never: Whether it is the constant -inf.
    """

    __slots__ = ("credited", "labels", "never", "value")

    def __init__(self, value, labels=None, credited=None, never=False):
        self.value, self.labels, self.credited = value, labels or {}, credited
        self.never = never


def as_node(x: Any) -> Node:
    if isinstance(x, Node):
        return x
    number = isinstance(x, (float, np.floating)) or (isinstance(x, np.ndarray) and x.shape == ())
    return Node(x, never=bool(number and x == -np.inf))


class Tape:
    """What a walk carries.

    Attributes:
        key: Random key of these loop counters.
        inputs: Per address, an `Input`.
        factors: Log factors by `(address, level)`: batch axes of the site; level None: of this
            round, level n: summed over the earlier steps of scan number n.
        extra: A scalar beside the parts: baselines, and the misfit of learned ones.
        guards: Labels of the predicates of the enclosing branches.
        scans: A mark for each enclosing scan, outermost first.
    """

    __slots__ = ("extra", "factors", "guards", "inputs", "key", "scans")

    def __init__(self, key, inputs, factors, extra, guards, scans):
        self.key, self.inputs, self.factors = key, inputs, dict(factors)
        self.extra, self.guards, self.scans = extra, guards, scans

    @property
    def level(self) -> int:
        """The number of enclosing scans."""
        return len(self.scans)

    def inside(self, **changes: Any) -> Tape:
        parts = {n: getattr(self, n) for n in self.__slots__}
        return Tape(**{**parts, **changes})


@dataclasses.dataclass
class Use:
    """How the parts of the cost use a choice."""

    axes: set[int] = dataclasses.field(default_factory=set)  # batch axes that a part mixes
    scans: set[int] = dataclasses.field(default_factory=set)  # scans whose steps a part mixes
