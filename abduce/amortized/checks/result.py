"""What a check returns: p-values, a verdict in words with a remedy, and the arrays behind a figure.

A check tests that a posterior is what it claims to be, so a small p-value is bad news. Each check
holds one p-value per quantity; `p_value` corrects for their number (Bonferroni), so that a check
fails a correct posterior at most `alpha` of the time, whatever the dependence between quantities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from abduce.errors import InvalidValue

__all__ = ["Check", "check_alpha", "holm", "text_table"]

MAX_ROWS = 20


@dataclass(frozen=True, eq=False)
class Check:
    """The outcome of one check.

    Attributes:
        name: What was checked: "sbc", "coverage", ...
        p_values: By quantity: how often a correct posterior looks at least this bad. Each is valid
            on its own.
        alpha: False-alarm rate of `passed`: at most this share of correct posteriors fail.
        verdict: What was found, in words.
        remedy: What to do about it; empty if nothing.
        notes: What else the reader must know: failed runs, few effective draws, ...
        columns: Further numbers by column, each by quantity.
        is_complete: False if too many runs failed, or too few were made, to pass at all.
        arrays: What the figure shows, by name.
        figure: Makes the figure from `arrays`.
    """

    name: str
    p_values: Mapping[str, float]
    alpha: float
    verdict: str
    remedy: str = ""
    notes: tuple[str, ...] = ()
    columns: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    is_complete: bool = True
    arrays: Mapping[str, Any] = field(default_factory=dict)
    figure: Callable[[Mapping[str, Any]], Any] | None = None

    @property
    def p_value(self) -> float:
        """The smallest p-value times their number, at most 1; NaN if there is none."""
        values = list(self.p_values.values())
        return min(1.0, len(values) * min(values)) if values else math.nan

    @property
    def passed(self) -> bool:
        """Whether nothing was found at the rate `alpha`, from enough runs to say so."""
        return self.is_complete and self.p_value > self.alpha

    @property
    def worst(self) -> str:
        """The quantity with the smallest p-value."""
        if not self.p_values:
            raise InvalidValue(f"{self.name}: there are no quantities. {self.verdict}")
        return min(self.p_values, key=lambda q: self.p_values[q])

    def plot(self) -> Any:
        """A `matplotlib.figure.Figure`; what to see stands in its title."""
        if self.figure is None:
            raise InvalidValue(f"{self.name}: there is nothing to show. {self.verdict}")
        return self.figure(self.arrays)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the arrays, as plain values that JSON can hold."""
        return {
            "name": self.name,
            "passed": self.passed,
            "p_value": _plain(self.p_value),
            "alpha": self.alpha,
            "verdict": self.verdict,
            "remedy": self.remedy,
            "notes": list(self.notes),
            "p_values": {q: _plain(p) for q, p in self.p_values.items()},
            "columns": {
                c: {q: _plain(x) for q, x in values.items()} for c, values in self.columns.items()
            },
        }

    def __str__(self) -> str:
        state = "passed" if self.passed else "FAILED"
        head = f"{self.name}: {state}, p = {_number(self.p_value)} (fails below {self.alpha:.4g})"
        lines = [head, self.verdict]
        if self.remedy:
            lines.append(self.remedy)
        lines += list(self.notes)
        shown = sorted(self.p_values, key=lambda q: self.p_values[q])[:MAX_ROWS]
        if shown:
            shown = [q for q in self.p_values if q in set(shown)]
            rows = [
                [_number(self.p_values[q])]
                + [_number(column.get(q, math.nan)) for column in self.columns.values()]
                for q in shown
            ]
            lines += ["", text_table(shown, ["p-value", *self.columns], rows)]
            if len(shown) < len(self.p_values):
                lines.append(f"({len(self.p_values) - len(shown)} with larger p-values left out)")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.__str__()


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's adjusted p-values: those at most `alpha` are rejected at family-wise rate `alpha`.

    Holds under any dependence (Holm 1979). NaN counts as 1.

    Args:
        p_values: Shape `(n,)`.

    Returns:
        Shape `(n,)`, in the given order.
    """
    p = np.nan_to_num(np.asarray(p_values, np.float64), nan=1.0)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def check_alpha(name: str, alpha: float) -> None:
    """A false-alarm rate lies strictly between 0 and 1."""
    if not 0 < alpha < 1:
        raise InvalidValue(f"{name}: alpha is a false-alarm rate in (0, 1), got {alpha}.")


def text_table(labels: Sequence[str], header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Labels on the left, numbers right-aligned below their names."""
    left = max((len(label) for label in labels), default=0)
    widths = [max(len(h), *(len(row[i]) for row in rows)) for i, h in enumerate(header)]
    lines = [" " * left + "".join(f"  {h:>{w}}" for h, w in zip(header, widths, strict=True))]
    for label, row in zip(labels, rows, strict=True):
        cells = "".join(f"  {x:>{w}}" for x, w in zip(row, widths, strict=True))
        lines.append(f"{label:<{left}}{cells}")
    return "\n".join(lines)


def _number(x: float) -> str:
    if not math.isfinite(x):
        return "-" if math.isnan(x) else str(x)
    return f"{x:.3f}" if 0.001 <= abs(x) < 1000 or x == 0 else f"{x:.1e}"


def _plain(x: Any) -> float | None:
    """A number that JSON has: it has no NaN or infinity."""
    x = float(x)
    return x if math.isfinite(x) else None
