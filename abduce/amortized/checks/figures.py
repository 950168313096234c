"""Figures of the checks, made without pyplot: see `abduce.inference.plots`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from abduce.amortized.checks.uniformity import ecdf_band
from abduce.inference.drawing import COLOURS, draw_density, new_figure, shorten

__all__ = ["plot_curves", "plot_ecdf_difference", "plot_statistics"]

MAX_PANELS = 12


def plot_ecdf_difference(u: Mapping[str, np.ndarray], alpha: float = 0.01):
    """ECDF of ranks minus the diagonal, one panel per quantity.

    What to see: a line inside the band. A valley then a hill, or the reverse, is a width that is
    wrong; a line on one side is a shift.

    Args:
        u: By quantity, uniform numbers, shape `(dataset,)`.
        alpha: The band is left at most this often by a correct posterior, per panel.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    names = list(u)[:MAX_PANELS]
    columns = min(len(names), 4)
    rows = math.ceil(len(names) / columns)
    left_out = f" ({len(names)} of {len(u)} quantities)" if len(u) > len(names) else ""
    figure, axes = new_figure(
        rows, columns, (max(2.7 * columns, 4.5), 2.3 * rows + 0.5),
        title=f"ECDF of ranks minus uniform: a correct posterior stays in the band{left_out}",
    )  # fmt: skip
    for axis, name in zip(axes.ravel(), names, strict=False):
        _difference(axis, np.asarray(u[name]), alpha)
        axis.set_title(shorten(name, 26), fontsize=9)
    for axis in axes.ravel()[len(names) :]:
        axis.set_visible(False)
    return figure


def _difference(axis, u, alpha) -> None:
    points, low, high = ecdf_band(len(u), alpha)
    axis.fill_between(points, low - points, high - points, color=COLOURS[6], alpha=0.25, lw=0)
    grid = np.linspace(0, 1, 201)
    ecdf = np.searchsorted(np.sort(u), grid, side="right") / len(u)
    axis.step(grid, ecdf - grid, where="post", color=COLOURS[0], linewidth=1.3)
    axis.axhline(0, color="#999999", linewidth=0.7)
    axis.set_xlim(0, 1)


def plot_curves(
    curves: Mapping[str, np.ndarray],
    bands: Mapping[str, tuple[np.ndarray, np.ndarray]],
    grid: np.ndarray,
    *,
    title: str,
    labels: tuple[str, str],
):
    """Curves that should follow the diagonal, with bands where there are any.

    Args:
        curves: By name, heights at the grid.
        bands: By name, the lower and upper end at the grid.
        grid: Shape `(point,)`.
        title: Of the figure.
        labels: Of the two axes.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    figure, ((axis,),) = new_figure(1, 1, (4.6, 4.4), title=title)
    axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle="--")
    for i, name in enumerate(list(curves)[:MAX_PANELS]):
        colour = COLOURS[i % len(COLOURS)]
        if name in bands:
            axis.fill_between(grid, *bands[name], color=colour, alpha=0.2, linewidth=0)
        axis.plot(grid, curves[name], color=colour, linewidth=1.4, label=shorten(name, 26))
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.set_xlabel(labels[0], fontsize=9)
    axis.set_ylabel(labels[1], fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    return figure


def plot_statistics(null: Mapping[str, np.ndarray], value: Mapping[str, float], *, title: str):
    """What statistics are under the null, and what they were, one panel each.

    Args:
        null: By name, simulated values, shape `(simulation,)`.
        value: By name, the observed value: a black line.
        title: Of the figure.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    names = list(null)[:MAX_PANELS]
    columns = min(len(names), 4)
    rows = math.ceil(len(names) / columns)
    figure, axes = new_figure(
        rows, columns, (max(2.7 * columns, 4.5), 2.1 * rows + 0.5), title=title
    )
    for axis, name in zip(axes.ravel(), names, strict=False):
        draw_density(axis, np.asarray(null[name], np.float64), COLOURS[0], fill=True)
        axis.axvline(value[name], color="black", linewidth=1.6)
        axis.set_title(shorten(name, 26), fontsize=9)
        axis.set_yticks([])
        axis.set_ylim(bottom=0)
    for axis in axes.ravel()[len(names) :]:
        axis.set_visible(False)
    return figure
