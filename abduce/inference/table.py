"""The table object that a summary is: labelled rows, named columns, adaptive number formats.

The digits shown follow the Monte Carlo error: a number ends at the first digit that is still
uncertain, with two to four significant digits of the standard deviation.
"""

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from abduce.errors import InvalidValue, UnknownAddress, suggest

__all__ = ["Summary", "element_labels"]

MAX_ROWS = 60  # printed; the middle of a longer table is left out
COUNTS = ("ess_bulk", "ess_tail", "ess")


@dataclass(frozen=True)
class Summary:
    """A table of summary statistics; prints as aligned text, and as HTML in a notebook.

    Attributes:
        labels: Row labels, such as "mu" or "theta[Choate]".
        sites: The site of each row.
        columns: Column name to float64 array of shape `(row,)`.
        note: One line on the draws, printed below the table.
        discrete: The sites that hold integers or booleans.

    Example:
        >>> import numpy as np
        >>> s = summarize({"theta": np.zeros((4, 100, 2))})
        >>> s["theta[0]"]["mean"], s["theta"].labels, s["sd"].shape
        (0.0, ('theta[0]', 'theta[1]'), (2,))
    """

    labels: tuple[str, ...]
    sites: tuple[str, ...]
    columns: Mapping[str, np.ndarray]
    note: str = ""
    discrete: frozenset[str] = frozenset()  # sites of integers or booleans

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self):
        return iter(self.labels)

    def __contains__(self, name) -> bool:
        return name in self.labels or name in self.sites or name in self.columns

    def __getitem__(self, name: str):
        """A row (dict of floats) by label, a site's rows (Summary), or a column (array).

        They are looked up in this order; `column` is unambiguous for a site called "mean".

        Raises:
            UnknownAddress: None of the three.
        """
        if name in self.labels:
            row = self.labels.index(name)
            return {column: float(values[row]) for column, values in self.columns.items()}
        if name in self.sites:
            rows = [i for i, site in enumerate(self.sites) if site == name]
            return Summary(
                tuple(self.labels[i] for i in rows),
                tuple(self.sites[i] for i in rows),
                {column: values[rows] for column, values in self.columns.items()},
                self.note,
                self.discrete,
            )
        if name in self.columns:
            return self.columns[name]
        options = list(dict.fromkeys([*self.sites, *self.columns, *self.labels]))
        shown = ", ".join(options[:20]) + (", ..." if len(options) > 20 else "")
        raise UnknownAddress(
            f"summary[{name!r}] is no row, site or column of this table ({shown})."
            + suggest(str(name), options)
        )

    def column(self, name: str) -> np.ndarray:
        """One column, shape `(row,)`.

        Raises:
            UnknownAddress: There is no such column.
        """
        if name not in self.columns:
            raise UnknownAddress(
                f"summary.column({name!r}): the columns are {', '.join(self.columns)}."
                + suggest(name, self.columns)
            )
        return self.columns[name]

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Row label to column name to value."""
        return {label: self[label] for label in self.labels}

    def to_pandas(self):
        """The table as a `pandas.DataFrame`, indexed by row label.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "summary.to_pandas() needs pandas, which is not installed. Install it with "
                "`pip install pandas`, or use summary.to_dict()."
            ) from error
        return pd.DataFrame(dict(self.columns), index=pd.Index(self.labels))

    def __str__(self) -> str:
        rows, skipped = self._shown()
        header = ["", *self.columns]
        cells = [[self.labels[i], *self._format(i)] for i in rows]
        if not cells:
            return "\n".join(["(no rows)"] + [self.note] * bool(self.note))
        widths = [max(len(row[j]) for row in [header, *cells]) for j in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if j == 0 else cell.rjust(width)
                for j, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [header, *cells]
        ]
        if skipped:
            lines.insert(1 + MAX_ROWS // 2, f"... {skipped} rows left out ...")
        if skipped:
            lines.append(f"{len(self)} rows; all are in summary.to_dict() and summary.to_pandas()")
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows, skipped = self._shown()
        right = ' style="text-align: right"'
        head = "".join(f"<th{right}>{html.escape(name)}</th>" for name in self.columns)
        body = [
            f'<tr><th style="text-align: left">{html.escape(self.labels[i])}</th>'
            + "".join(f"<td{right}>{html.escape(cell)}</td>" for cell in self._format(i))
            + "</tr>"
            for i in rows
        ]
        if skipped:
            gap = f'<tr><td colspan="{1 + len(self.columns)}">{skipped} rows left out</td></tr>'
            body.insert(MAX_ROWS // 2, gap)
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return (
            f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
            + note
        )

    def _shown(self) -> tuple[list[int], int]:
        rows = list(range(len(self)))
        if len(rows) <= MAX_ROWS:
            return rows, 0
        half = MAX_ROWS // 2
        return rows[:half] + rows[-half:], len(rows) - 2 * half

    def _format(self, row: int) -> list[str]:
        values = {name: float(column[row]) for name, column in self.columns.items()}
        decimals = _decimals(values)
        whole = self.sites[row] in self.discrete
        scientific = decimals is not None and _needs_exponent(values, decimals)
        return [
            f"{value:.0f}"
            if whole and name.endswith("%") and math.isfinite(value)
            else _cell(name, value, decimals, scientific)
            for name, value in values.items()
        ]


def element_labels(
    site: str,
    shape: Sequence[int],
    dims: Sequence[str | None] | None = None,
    coords: Mapping[str, Sequence] | None = None,
) -> list[str]:
    """Labels of a site's elements in row-major order: "mu", "theta[Choate]", "cov[0, 1]".

    Args:
        site: The site's address.
        shape: Its event shape.
        dims: The names of its axes, one for each; None where an axis has no name.
        coords: Name of an axis to its labels; an axis without labels is numbered.

    Raises:
        InvalidValue: The number of names or of labels does not fit the shape.
    """
    if not shape:
        return [site]
    dims = [None] * len(shape) if dims is None else list(dims)
    if len(dims) != len(shape):
        raise InvalidValue(
            f'dims["{site}"] names {len(dims)} axes ({", ".join(map(str, dims))}), but the site '
            f"has shape {tuple(shape)}. Give one name (or None) for each axis."
        )
    axes = []
    for dim, size in zip(dims, shape, strict=True):
        if coords is None or dim is None or dim not in coords:
            axes.append([str(i) for i in range(size)])
            continue
        names = [str(label) for label in coords[dim]]
        if len(names) != size:
            raise InvalidValue(
                f'coords["{dim}"] has {len(names)} labels, but this axis of site "{site}" has '
                f"length {size}."
            )
        axes.append(names)
    return [f"{site}[{', '.join(parts)}]" for parts in itertools.product(*axes)]


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def _decimals(values: Mapping[str, float]) -> int | None:
    """Decimals worth showing: down to the first digit of the error, two to four digits of the sd.

    None where neither is known.
    """
    sd, error = values["sd"], values["mcse_mean"]
    if not (math.isfinite(sd) and sd > 0):
        return None
    first = -_exponent(sd)
    if not (math.isfinite(error) and error > 0):
        return first + 2
    return min(max(-_exponent(error), first + 1), first + 3)


def _needs_exponent(values: Mapping[str, float], decimals: int) -> bool:
    shown = [abs(v) for name, v in values.items() if name in ("mean", "sd") or name[-1] == "%"]
    return decimals > 6 or (decimals < -2 and max(shown) >= 1e7)


def _cell(name: str, value: float, decimals: int | None, scientific: bool) -> str:
    if math.isnan(value):
        return "-" if name in (*COUNTS, "r_hat", "mcse_mean") else "nan"
    if math.isinf(value):
        return f"{value}"
    if name in COUNTS:
        return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
    if name == "r_hat":
        return f"{value:.3f}" if value < 100 else f"{value:.0f}"
    if name == "mcse_mean":
        return f"{value:.0f}" if value >= 10 and not scientific else f"{value:.2g}"
    if decimals is None:
        return f"{value:.4g}"
    if scientific:
        largest = _exponent(value) if value else 0
        return f"{value:.{min(max(largest + decimals, 1), 16)}e}"
    text = f"{value:.{max(decimals, 0)}f}"
    return text.removeprefix("-") if float(text) == 0 else text
