"""Pictures of a dependency graph: an indented list for terminals, an SVG for notebooks.

The SVG is a layered drawing. A site's layer is the length of the longest path to it; loops and
mapped axes are boxes. Sites and boxes are placed from top to bottom, each as near as possible to
its parents, and nothing is put where something is already: so labels and boxes never overlap.
Edges that skip layers get a free passage through those between.
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import matplotlib
import networkx as nx
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.textpath import TextPath

__all__ = ["render_svg", "render_text"]


def render_text(graph: Any) -> str:
    """One line a site, indented by its loops and mapped axes; returns the text."""
    width = max((len(a) for a in graph.sites), default=0)
    family = max((len(s.family) for s in graph.sites.values()), default=0)
    lines = [f"{graph.name}: {len(graph.sites)} sites, {len(graph.edges)} edges"]
    open_groups: tuple[Any, ...] = ()
    deepest = max((len(s.axes) for s in graph.sites.values()), default=0)
    for address, site in graph.sites.items():
        groups = graph.groups[address]
        shared = 0
        while shared < min(len(groups), len(open_groups)) and groups[shared] == open_groups[shared]:
            shared += 1
        for depth in range(shared, len(groups)):
            lines.append("  " * (depth + 1) + f"[{site.axes[depth]}]")
        open_groups = groups
        indent = len(groups) + 1
        pad = "  " * (deepest + 1 - indent)
        sign = {"sample": "~", "deterministic": "=", "factor": "*", "param": "?"}[site.kind]
        label = f"{address:<{width}}{pad} {sign} {site.family:<{family}}"
        parents = [e for e in graph.edges if e.target == address]
        arrows = ", ".join(e.source + (" (past)" if e.lag else "") for e in parents)
        notes = [f"<- {arrows}"] if parents else []
        if site.observed:
            notes.append("partly observed" if site.partial else "observed")
        if site.conditional:
            notes.append("in a branch")
        if not site.normalized:
            notes.append("not normalized")
        lines.append("  " * indent + f"{label}  {'; '.join(notes)}".rstrip())
    return "\n".join(lines)


# Measures in points; a layer is a row.
_SIZE, _SMALL, _ROW, _GAP, _PAD, _NODE = 11.0, 7.5, 64.0, 18.0, 12.0, 34.0
_INK, _FAINT, _SHADE, _PLATE = "#222222", "#777777", "#d9dee5", "#8a94a3"


@dataclasses.dataclass
class _Box:
    """A node, a passage for an edge, or a group of them.

    Attributes:
        width: In points.
        top, bottom: First and last layer.
        items: Of a group.
        x: Left edge, relative to the enclosing group until `_settle`.
        above, below: Points needed outside the layers for a frame.
    """

    name: Any
    width: float
    top: int
    bottom: int
    items: list[_Box] = dataclasses.field(default_factory=list)
    x: float = 0.0
    title: str = ""
    depth: int = 0


def _text_width(text: str, size: float) -> float:
    return float(TextPath((0, 0), text, size=size).get_extents().width) if text else 0.0
