"""Where things go in a drawing of a dependency graph.

A layered drawing: the layer of a site is the length of the longest path to it, and loops and
mapped axes are frames. Innermost frames are laid out first; then sites and frames are placed layer
by layer, each as near to its neighbours as the things already placed allow, in a few sweeps down
and up (after Sugiyama, Tagawa and Toda, "Methods for visual understanding of hierarchical system
structures", IEEE SMC 1981). Nothing is put where something is, so nothing overlaps. An edge that
skips layers gets a free passage through each of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import networkx as nx

__all__ = ["NODE", "Frame", "Layout", "lay_out"]

# Measures in points; y points down.
NODE = 36.0  # height of a node
_RISE = 26.0  # between the rows, for arrows
_GAP = 16.0  # between neighbours in a row
_PAD = 10.0  # between a frame and what it holds
_TITLE = 12.0  # height of a frame's title
_SWEEPS = 12


class Frame(NamedTuple):
    """The box around a loop or a mapped axis."""

    left: float
    top: float
    right: float
    bottom: float
    title: str


class Layout(NamedTuple):
    """A finished layout.

    Attributes:
        width, height: Of the whole.
        nodes: Centre of each site.
        frames: Outer ones first.
        routes: Points that each edge within a step goes through, ends included.
    """

    width: float
    height: float
    nodes: dict[str, tuple[float, float]]
    frames: list[Frame]
    routes: dict[Any, list[tuple[float, float]]]


def lay_out(graph: Any, widths: dict[str, float], titles: dict[str, float]) -> Layout:
    """Lays out a graph.

    Args:
        graph: An `abduce.ppl.graph.Graph`.
        widths: Of each node.
        titles: Width of each frame title that occurs.
    """
    layers = _layers(graph)
    root, links, routes = _tree(graph, layers, widths)
    _arrange(root, links, titles)
    _settle(root, 0.0)
    rows = _rows(root)
    points: dict[Any, tuple[float, float]] = {}
    frames: list[Frame] = []

    def collect(box):
        if not box.is_frame:
            points[box.name] = (box.x + box.width / 2, rows[box.top])
            return
        if box is not root:
            top, bottom = rows[box.top] - NODE / 2, rows[box.bottom] + NODE / 2
            frames.append(
                Frame(box.x, top - box.head, box.x + box.width, bottom + box.foot, box.title)
            )
        for item in box.items:
            collect(item)

    collect(root)
    height = max([y + NODE / 2 for _, y in points.values()] + [f.bottom for f in frames] + [0.0])
    nodes = {a: points[a] for a in graph.sites}
    ways = {e: [points[p] for p in way] for e, way in routes.items()}
    return Layout(root.width, height, nodes, frames, ways)


@dataclasses.dataclass(eq=False)
class _Box:
    """A site, a passage for an edge through one layer, or a frame around some of them.

    Attributes:
        name: Address, or an identifier of the passage or frame.
        width: In points.
        top, bottom: First and last layer.
        items: What a frame holds.
        is_frame: Whether it is a frame.
        x: Left edge; relative to the enclosing frame until `_settle`.
        title: Of a frame.
        centers: Of all sites and passages inside, relative to the left edge.
    """

    name: Any
    width: float = 0.0
    top: int = 0
    bottom: int = 0
    items: list[_Box] = dataclasses.field(default_factory=list)
    is_frame: bool = False
    x: float = 0.0
    title: str = ""
    centers: dict[Any, float] = dataclasses.field(default_factory=dict)

    @property
    def frames(self) -> list[_Box]:
        return [b for b in self.items if b.is_frame]

    @property
    def head(self) -> float:
        """Room above its first layer for its frame and those inside."""
        return _PAD + max((b.head for b in self.frames if b.top == self.top), default=0.0)

    @property
    def foot(self) -> float:
        inner = max((b.foot for b in self.frames if b.bottom == self.bottom), default=0.0)
        return _TITLE + _PAD / 2 + inner


def _layers(graph: Any) -> dict[str, int]:
    """The layer of each site: every edge within a step points down."""
    order = {a: i for i, a in enumerate(graph.sites)}
    dag = nx.DiGraph()
    dag.add_nodes_from(graph.sites)
    dag.add_edges_from(
        (e.source, e.target)
        for e in graph.edges
        if not e.lag and order[e.source] < order[e.target]
    )
    layers = {a: i for i, gen in enumerate(nx.topological_generations(dag)) for a in gen}
    for a in graph.sites:  # what has no parents stands right above its first child
        if not dag.in_degree(a) and dag.out_degree(a):
            layers[a] = min(layers[b] for b in dag.successors(a)) - 1
    return layers


def _tree(
    graph: Any, layers: dict[str, int], widths: dict[str, float]
) -> tuple[_Box, list[Any], dict[Any, list[Any]]]:
    """Frames with their sites and passages, links between neighbours, and the way of each edge."""
    root = _Box((), is_frame=True)
    frames = {(): root}
    for address, site in graph.sites.items():
        path: tuple[Any, ...] = ()
        for axis, group in zip(site.axes, graph.groups[address], strict=True):
            outer, path = frames[path], (*path, group)
            if path not in frames:
                frames[path] = _Box(path, is_frame=True, title=str(axis))
                outer.items.append(frames[path])
        box = _Box(address, widths[address], layers[address], layers[address])
        frames[path].items.append(box)
    passages: set[Any] = set()
    links: dict[Any, None] = {}
    routes: dict[Any, list[Any]] = {}
    for e in graph.edges:
        if e.lag:
            continue
        way = [e.source]
        common = _shared(graph.groups[e.source], graph.groups[e.target])
        for layer in range(layers[e.source] + 1, layers[e.target]):
            passage = (e.source, common, layer)  # edges from one site share it
            if passage not in passages:
                passages.add(passage)
                frames[common].items.append(_Box(passage, _GAP / 2, layer, layer))
            way.append(passage)
        way.append(e.target)
        routes[e] = way
        links.update(dict.fromkeys(itertools.pairwise(way)))
    return root, list(links), routes


def _shared(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    """The longest common beginning: the frames that are around both."""
    pairs = zip(a, b, strict=False)
    return tuple(x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _arrange(box: _Box, links: list[Any], titles: dict[str, float]) -> None:
    """Places everything inside a frame, innermost frames first."""
    for inner in box.frames:
        _arrange(inner, links, titles)
    for item in box.items:
        if not item.is_frame:
            item.centers = {item.name: item.width / 2}
    box.top = min((b.top for b in box.items), default=0)
    box.bottom = max((b.bottom for b in box.items), default=0)
    owner = {name: item for item in box.items for name in item.centers}
    ends = [
        (_End(owner[a], a), _End(owner[b], b))
        for a, b in links
        if a in owner and b in owner and owner[a] is not owner[b]
    ]
    near: dict[Any, list[tuple[_End, _End]]] = {item.name: [] for item in box.items}
    for a, b in ends:
        near[a.item.name].append((a, b))
        near[b.item.name].append((b, a))
    best, lowest = [item.x for item in box.items], float("inf")
    for sweep in range(_SWEEPS):
        _sweep(box.items, near, sweep)
        cost = _cost(ends)
        if cost < lowest - 1e-9:
            best, lowest = [item.x for item in box.items], cost
    for item, x in zip(box.items, best, strict=True):
        item.x = x
    left = min((b.x for b in box.items), default=0.0)
    right = max((b.x + b.width for b in box.items), default=0.0)
    content = right - left
    margin = _PAD if box.name else 0.0
    box.width = max(content, titles.get(box.title, 0.0)) + 2 * margin
    shift = (box.width - content) / 2 - left
    for item in box.items:
        item.x += shift
        box.centers.update({name: item.x + c for name, c in item.centers.items()})


class _End(NamedTuple):
    """An end of a link: a site or passage, and the item that holds it."""

    item: _Box
    name: Any

    @property
    def offset(self) -> float:
        return self.item.centers[self.name]

    @property
    def x(self) -> float:
        return self.item.x + self.offset


def _sweep(items: list[_Box], near: dict[Any, list[tuple[_End, _End]]], sweep: int) -> None:
    """Places the items once more, layer by layer, each near those it is linked to."""
    order = sorted(items, key=lambda b: b.top)
    if sweep:
        up = sweep % 2 == 1
        order = sorted(items, key=lambda b: (-b.bottom if up else b.top, b.x + b.width / 2))
    middle = sum(b.x + b.width / 2 for b in items) / max(len(items), 1)
    rows: dict[int, list[_Box]] = {}
    placed: set[int] = set()
    for item in order:
        layers = range(item.top, item.bottom + 1)
        rivals = list({id(b): b for r in layers for b in rows.get(r, ())}.values())
        pulls = [
            other.x - end.offset
            for end, other in near[item.name]
            if sweep or id(other.item) in placed
        ]
        if pulls:
            wanted = sum(pulls) / len(pulls)
        elif sweep:  # nothing draws it anywhere: keep to the middle
            wanted = middle - item.width / 2
        else:
            wanted = max((b.x + b.width + _GAP for b in rivals), default=0.0)
        item.x = _nearest_free(wanted, item.width, rivals)
        placed.add(id(item))
        for r in layers:
            rows.setdefault(r, []).append(item)


def _nearest_free(wanted: float, width: float, rivals: list[_Box]) -> float:
    """The left edge nearest to the wanted one at which nothing is in the way."""
    blocked = sorted((b.x - _GAP - width, b.x + b.width + _GAP) for b in rivals)
    below = above = wanted  # nearest free points on either side
    for low, high in blocked:
        if low + 1e-6 < above < high - 1e-6:
            above = high
    for low, high in sorted(blocked, key=lambda span: -span[1]):
        if low + 1e-6 < below < high - 1e-6:
            below = low
    return below if wanted - below < above - wanted else above


def _cost(ends: list[tuple[_End, _End]]) -> float:
    """Length of the links, and a price for each crossing."""
    spans = [(a.item.bottom, a.x, b.x) for a, b in ends]
    few = spans[:300]
    crossings = sum(
        p[0] == q[0] and (p[1] - q[1]) * (p[2] - q[2]) < 0
        for i, p in enumerate(few)
        for q in few[:i]
    )
    return sum(abs(x - y) for _, x, y in spans) + 60.0 * crossings


def _settle(box: _Box, left: float) -> None:
    """Makes positions absolute."""
    box.x += left
    for item in box.items:
        _settle(item, box.x)


def _rows(root: _Box) -> list[float]:
    """The y of each layer, with room for the frames that begin and end there."""
    head = [0.0] * (root.bottom + 1)
    foot = [0.0] * (root.bottom + 1)
    stack = root.frames
    while stack:
        box = stack.pop()
        head[box.top] = max(head[box.top], box.head)
        foot[box.bottom] = max(foot[box.bottom], box.foot)
        stack += box.frames
    rows = [head[0] + NODE / 2]
    for i in range(1, len(head)):
        rows.append(rows[-1] + foot[i - 1] + _RISE + head[i] + NODE)
    return rows
