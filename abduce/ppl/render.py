"""Pictures of a dependency graph: an indented list for terminals, an SVG for notebooks."""

from __future__ import annotations

import functools
import io
import itertools
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path
from matplotlib.textpath import text_to_path

from abduce.ppl.layout import NODE, lay_out

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


_FONT, _SMALL = 11.0, 7.5
_LOOP = 22.0  # width of an arrow from a site to itself
_MARGIN = 10.0
_INK, _FAINT, _SHADE, _FRAME = "#20242a", "#6b7480", "#d3dae3", "#a3acb8"


def render_svg(graph: Any) -> str:
    """A drawing of the graph; returns the source of the SVG."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "abduce"}):
        FigureCanvasSVG(draw(graph)).print_svg(out, metadata={"Date": None, "Title": graph.name})
    return out.getvalue()


def draw(graph: Any) -> Figure:
    """Draws the graph on a figure of its own."""
    own = {e.source for e in graph.edges if e.source == e.target}
    widths = {a: _node_width(s) + 2 * _LOOP * (a in own) for a, s in graph.sites.items()}
    titles = {str(x): _text_width(str(x), _SMALL) for s in graph.sites.values() for x in s.axes}
    layout = lay_out(graph, widths, titles)
    notes = _legend(graph)
    width = max(layout.width, _text_width(notes, _SMALL), 40.0)
    height = layout.height + (18.0 if notes else 0.0)
    shift = (width - layout.width) / 2

    figure = Figure(figsize=((width + 2 * _MARGIN) / 72, (height + 2 * _MARGIN) / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-_MARGIN - shift, width - shift + _MARGIN)
    axes.set_ylim(height + _MARGIN, -_MARGIN)
    for f in layout.frames:
        frame = FancyBboxPatch(
            (f.left + 4, f.top + 4), f.right - f.left - 8, f.bottom - f.top - 8,
            boxstyle="round,pad=4", fill=False, ec=_FRAME, lw=0.9, zorder=0,
        )  # fmt: skip
        axes.add_patch(frame)
        style = {"size": _SMALL, "color": _FAINT, "ha": "right", "parse_math": False}
        axes.text(f.right - 6, f.bottom - 4, f.title, **style)
    for edge in graph.edges:
        _draw_edge(axes, graph, layout, edge)
    for address, site in graph.sites.items():
        _draw_site(axes, site, *layout.nodes[address])
    if notes:
        axes.text(
            layout.width / 2, height, notes, size=_SMALL, color=_FAINT, ha="center", va="bottom"
        )
    return figure


@functools.lru_cache(maxsize=4096)
def _text_width(text: str, size: float) -> float:
    font = FontProperties(size=size)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0])


def _caption(site: Any) -> str:
    """The small second line of a node."""
    if site.kind == "factor":
        return ""
    return site.family + (f" {site.shape}" if len(site.shape) > len(site.axes) else "")


def _node_width(site: Any) -> float:
    text = max(_text_width(site.address, _FONT), _text_width(_caption(site), _SMALL))
    return max(text * 1.12 + 26 if site.kind == "sample" else text + 16, 46.0)


def _draw_site(axes: Any, site: Any, x: float, y: float) -> None:
    width = _node_width(site)
    style = {"ec": _INK, "lw": 1.1, "zorder": 3, "ls": (0, (4, 2)) if site.conditional else "-"}
    text = {"ha": "center", "va": "center", "zorder": 4, "parse_math": False}
    if site.kind == "factor":
        axes.add_patch(Rectangle((x - 5, y - NODE / 2), 10, 10, fc=_INK, **style))
        axes.text(x, y + 2, site.address, size=_FONT, **text)
        return
    if site.kind == "sample":
        whole = site.observed and not site.partial
        node = Ellipse((x, y), width, NODE, fc=_SHADE if whole else "white", **style)
        axes.add_patch(node)
        if site.partial:
            half = Rectangle((x - width / 2, y), width, NODE / 2, fc=_SHADE, zorder=3.5)
            half.set_clip_path(Ellipse((x, y), width, NODE, transform=axes.transData))
            axes.add_patch(half)
    else:
        fill = "white" if site.kind == "deterministic" else "#f4efdf"
        style["lw"] = 0.8
        corner = (x - width / 2 + 4, y - NODE / 2 + 4)
        axes.add_patch(
            FancyBboxPatch(corner, width - 8, NODE - 8, boxstyle="round,pad=4", fc=fill, **style)
        )
    axes.text(x, y - 4.5, site.address, size=_FONT, color=_INK, **text)
    axes.text(x, y + 8.5, _caption(site), size=_SMALL, color=_FAINT, **text)


def _draw_edge(axes: Any, graph: Any, layout: Any, edge: Any) -> None:
    arrow = {"arrowstyle": "-|>", "mutation_scale": 9, "lw": 1.0, "color": _INK, "zorder": 2,
             "shrinkA": 0, "shrinkB": 0}  # fmt: skip
    dashed = {**arrow, "linestyle": (0, (3, 2)), "color": _FAINT}
    a, b = layout.nodes[edge.source], layout.nodes[edge.target]
    if edge.source == edge.target:
        site, (x, y) = graph.sites[edge.source], a
        far = x + _node_width(site) / 2 + _LOOP
        leave, enter = (_boundary(site, a, (x + 20, y + d)) for d in (-9, 9))
        loop = [leave, (far, y - 20), (far, y + 20), enter]
        axes.add_patch(FancyArrowPatch(path=Path(loop, [1, 4, 4, 4]), **dashed))
        return
    if edge.lag:
        points = _bowed(a, b)
        arrow = dashed
    else:
        points = layout.routes[edge]
    start = _boundary(graph.sites[edge.source], a, points[1])
    end = _boundary(graph.sites[edge.target], b, points[-2])
    axes.add_patch(FancyArrowPatch(path=_smooth([start, *points[1:-1], end]), **arrow))


def _bowed(a: Any, b: Any) -> list[Any]:
    """A way from a to b that leaves the straight line, for a dashed arrow beside a solid one."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    return [a, ((a[0] + b[0]) / 2 - 0.22 * dy, (a[1] + b[1]) / 2 + 0.22 * dx), b]


def _boundary(site: Any, center: Any, towards: Any) -> tuple[float, float]:
    """Where the line from the centre of a node leaves it."""
    dx, dy = towards[0] - center[0], towards[1] - center[1]
    a, b = _node_width(site) / 2 + 1, NODE / 2 + 1
    if site.kind == "sample":
        t = 1 / ((dx / a) ** 2 + (dy / b) ** 2) ** 0.5
    else:
        a = 8 if site.kind == "factor" else a
        t = min(a / abs(dx) if dx else float("inf"), b / abs(dy) if dy else float("inf"))
    return center[0] + t * dx, center[1] + t * dy


def _smooth(points: list[Any]) -> Path:
    """A curve through the points, vertical at those between: so edges that share them join."""
    if len(points) == 2:
        return Path(points, [Path.MOVETO, Path.LINETO])
    way, codes = [points[0]], [Path.MOVETO]
    last = len(points) - 1
    for i, (p, q) in enumerate(itertools.pairwise(points)):
        dx, dy = q[0] - p[0], q[1] - p[1]
        leave = (0.35 * dx, 0.35 * dy) if i == 0 else (0.0, 0.45 * dy)
        enter = (0.35 * dx, 0.35 * dy) if i + 1 == last else (0.0, 0.45 * dy)
        way += [(p[0] + leave[0], p[1] + leave[1]), (q[0] - enter[0], q[1] - enter[1]), q]
        codes += [Path.CURVE4] * 3
    return Path(way, codes)


def _legend(graph: Any) -> str:
    """What the signs that occur mean."""
    sites = graph.sites.values()
    notes = [
        ("shaded: observed", any(s.observed for s in sites)),
        ("dashed arrow: from an earlier step", any(e.lag for e in graph.edges)),
        ("dashed outline: in a branch", any(s.conditional for s in sites)),
    ]
    return "   ".join(text for text, occurs in notes if occurs)
