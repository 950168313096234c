"""The dependency graph of a model, from the dataflow of its program.

Nodes are sites. An edge `a -> b` says that the distribution of `b` (or its observed value, its
scale, its recorded value, the predicate of a branch it is in) depends on the value of `a`. Edges
between choices are direct: what passes through a `deterministic` site on the way is an edge all
the same, and the `deterministic` site is a node of its own with parents only.

A site under `vmap` or `scan` is one node that stands for all its elements. In a scan, an edge with
`lag=1` means that `b` depends on `a` at some earlier step; a site with an edge to itself depends on
its own past.

The graph is *sound*, not exact: no dependence is missed, but `0 * x` counts as one. So
`d_separated` answers True only if the program implies the independence.

Separation is read off the moral graph of the ancestral set (Lauritzen, Dawid, Larsen and Leimer,
"Independence properties of directed Markov fields", Networks 1990): for acyclic graphs this is
d-separation. With loops of a scan it is still sound, because a path in the moral graph of the
unrolled program maps to a path in that of the collapsed one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
from numpyro.distributions import (
    Delta,
    Distribution,
    ExpandedDistribution,
    ImproperUniform,
    Independent,
    MaskedDistribution,
    Unit,
)

from abduce.errors import InvalidValue, UnknownAddress, suggest
from abduce.ppl.dataflow import Label, Visit, propagate
from abduce.ppl.model import Model
from abduce.ppl.program import Program, SiteInfo
from abduce.ppl.selection import matching
from abduce.ppl.site import DistSpec, Site

__all__ = ["Edge", "Graph", "GraphAxis", "GraphSite", "graph"]


@dataclasses.dataclass(frozen=True)
class GraphAxis:
    """A dimension along which a site is repeated.

    Attributes:
        kind: 'vmap', 'scan', or 'batch' (a named batch dimension of the distribution).
        name: Its name, or None.
        size: Its length.
    """

    kind: str
    name: str | None
    size: int

    def __str__(self) -> str:
        if self.kind == "scan":
            return f"scan: {self.size}"
        return f"{self.name or self.kind}: {self.size}"


@dataclasses.dataclass(frozen=True)
class GraphSite:
    """A node.

    Attributes:
        address: Its address.
        kind: 'sample', 'factor', 'deterministic' or 'param'.
        family: Of the distribution, or the kind.
        shape: Of the value, as users see it.
        observed: Whether the program observes it, wholly or (`partial`) in part.
        partial: Whether it is observed under a mask.
        conditional: Whether it is in a branch.
        axes: What it is repeated along, outermost first.
        normalized: Whether its density integrates to 1 whatever its parents are; not so under
            `ab.scaled`, nor with masked or improper distributions.
    """

    address: str
    kind: str
    family: str
    shape: tuple[int, ...]
    observed: bool
    partial: bool
    conditional: bool
    axes: tuple[GraphAxis, ...]
    normalized: bool

    @property
    def is_latent(self) -> bool:
        """Whether it is a choice that the program does not wholly observe."""
        return self.kind == "sample" and (not self.observed or self.partial)


@dataclasses.dataclass(frozen=True, order=True)
class Edge:
    """A dependence of `target` on `source`; `lag` is 1 if on an earlier step of a scan, else 0."""

    source: str
    target: str
    lag: int = 0

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}" + (" (past)" if self.lag else "")


class Graph:
    """The dependency graph of a model; made by `ab.graph`.

    Attributes:
        name: The model's name.
        sites: Nodes by address, in program order.
        edges: All edges, in program order of their targets.
        groups: For each address, an identifier of each of its `axes`: equal identifiers of two
            sites mean one loop or one mapped axis.
    """

    def __init__(
        self,
        name: str,
        sites: dict[str, GraphSite],
        edges: Iterable[Edge],
        groups: dict[str, tuple[Any, ...]],
    ):
        order = {a: i for i, a in enumerate(sites)}
        self.name, self.sites, self.groups = name, sites, groups
        self.edges = tuple(
            sorted(set(edges), key=lambda e: (order[e.target], order[e.source], e.lag))
        )
        self._parents: dict[str, dict[str, None]] = {a: {} for a in sites}
        for e in self.edges:
            self._parents[e.target][e.source] = None

    def parents(self, address: str) -> tuple[str, ...]:
        """Sites whose values the site depends on, in program order; itself if on its own past.

        Raises:
            UnknownAddress: No site has this address.
        """
        return tuple(self._parents[self._known(address)])

    def children(self, address: str) -> tuple[str, ...]:
        """Sites that depend on the value of this one, in program order.

        Raises:
            UnknownAddress: No site has this address.
        """
        self._known(address)
        return tuple(b for b, parents in self._parents.items() if address in parents)

    def markov_blanket(self, selection: Any) -> tuple[str, ...]:
        """The sites that the conditional distribution of the selected ones involves.

        Parents, children (factors included) and the children's other parents, in program order:
        given their values, the rest of the model does not matter to the selected sites.

        Args:
            selection: An address or a selection.

        Raises:
            UnknownAddress: A part of it matches nothing.
        """
        chosen = matching(selection, self.sites)
        blanket: set[str] = set()
        for family in self._families(a for a, s in self.sites.items() if s.kind != "deterministic"):
            if family & chosen:
                blanket |= family
        for a in chosen:
            blanket.update(self._parents[a])
        return tuple(a for a in self.sites if a in blanket - chosen)

    def d_separated(self, a: Any, b: Any, given: Any = ()) -> bool:
        """Whether the program implies that `a` and `b` are independent given `given`.

        Nodes stand for all their elements. What the program observes counts as given, and so do
        factors and parameters (unless they are in `a` or `b`): the question is about the density
        as the program states it. Where a density does not integrate to 1 (`ab.scaled`, masks), its
        parents are treated as joined, as by a factor.

        Args:
            a, b, given: Addresses or selections, without overlap.

        Returns:
            True only if they are independent; False means that the graph does not tell.

        Raises:
            UnknownAddress: A part of a selection matches nothing.
            InvalidValue: A site is in two of the three.

        Example:
            >>> g = ab.graph(schools, sigma)
            >>> g.d_separated("mu", "tau"), g.d_separated("mu", "tau", given="y")
            (True, False)
        """
        x, y, z = (matching(s, self.sites) for s in (a, b, given))
        _disjoint(a=x, b=y, given=z)
        fixed, joined = set(z), set()
        for address, site in self.sites.items():
            if site.kind in ("factor", "param") or (site.observed and not site.partial):
                fixed.add(address)
            elif site.kind == "sample" and (site.partial or not site.normalized):
                joined.add(address)
        fixed -= x | y
        return self._separated(x, y, fixed, joined)

    def _separated(self, a: set[str], b: set[str], given: set[str], joined: set[str]) -> bool:
        """Separation in the moral graph of the ancestors of all four sets."""
        ancestors: set[str] = set()
        stack = list(a | b | given | joined)
        while stack:
            node = stack.pop()
            if node not in ancestors:
                ancestors.add(node)
                stack.extend(self._parents[node])
        neighbours: dict[str, set[str]] = {n: set() for n in ancestors}
        for family in self._families(ancestors):
            for node in family:
                neighbours[node] |= family
        reached: set[str] = set()
        stack = list(a)
        while stack:
            node = stack.pop()
            if node in b:
                return False
            if node not in reached and node not in given:
                reached.add(node)
                stack.extend(neighbours[node])
        return True

    def _families(self, addresses: Iterable[str]) -> list[set[str]]:
        return [{a, *self._parents[a]} for a in addresses]

    def _known(self, address: str) -> str:
        if address not in self.sites:
            raise UnknownAddress(
                f"{address!r} is no site of `{self.name}`; there are: "
                f"{', '.join(self.sites) or 'none'}.{suggest(str(address), self.sites)}"
            )
        return address

    def render(self, format: str = "text", path: Any = None) -> str:
        """Draws the graph.

        Args:
            format: 'text' for a terminal, or 'svg'.
            path: File to write it to as well, if given.

        Returns:
            The text, or the source of the SVG.

        Raises:
            InvalidValue: The format is unknown.
        """
        from abduce.ppl.render import render_svg, render_text

        renderers = {"text": render_text, "svg": render_svg}
        if format not in renderers:
            raise InvalidValue(
                f"graph.render: unknown format {format!r}; choose from {sorted(renderers)}."
            )
        drawn = renderers[format](self)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(drawn)
        return drawn

    def __repr__(self) -> str:
        return self.render()

    def _repr_svg_(self) -> str:
        return self.render("svg")


def graph(m: Model, *args: Any, **kwargs: Any) -> Graph:
    """The dependency graph of a model on these arguments.

    Args:
        m: A model.
        *args, **kwargs: Its arguments; only their shapes matter, and what is static.

    Returns:
        The graph. Arguments are not nodes.

    Raises:
        InvalidValue: `m` is not a model.

    Example:
        >>> g = ab.graph(schools, sigma)
        >>> g.parents("theta"), g.markov_blanket("theta")
        (('mu', 'tau'), ('mu', 'tau', 'y'))
    """
    if not isinstance(m, Model):
        raise InvalidValue(
            f"ab.graph takes a model, got {type(m).__name__}. Decorate the function with @ab.model."
        )
    return graph_of(m.program(*args, **kwargs))


def graph_of(program: Program) -> Graph:
    """The dependency graph of a staged program."""
    edges: set[Edge] = set()
    scans: dict[str, tuple[Any, ...]] = {}
    conds: dict[Any, str] = {}  # a site of each vmapped conditional
    together: list[tuple[str, str]] = []
    unnormalized: set[str] = set()

    def visit(v: Visit) -> Iterable[Label]:
        site, address = v.site, v.site.address
        if site.kind == "auxiliary":  # no node: what it was made from goes through
            return v.inputs
        edges.update(Edge(str(x.source), address, int(bool(x.past))) for x in v.inputs)
        scans.setdefault(address, v.scans)
        together.extend((conds.setdefault(cond, address), address) for cond, _ in site.branches)
        if site.kind == "deterministic":  # transparent: what follows depends on what went in
            return v.operand("leaf")
        if site.kind == "param":  # one value for all steps
            return {Label(address)}
        if site.kind == "sample" and _may_be_unnormalized(site):
            unnormalized.add(address)
        # An observation that is computed from choices hands on those, too.
        return {v.label(address)} | v.operand("obs") | v.operand("mask")

    propagate(program.jaxpr, visit)
    sites = {
        a: _node(info, a not in unnormalized)
        for a, info in program.sites.items()
        if info.kind != "auxiliary"
    }
    together.extend((e.source, e.target) for e in edges)
    groups = _groups(program.sites, sites, together, scans)
    return Graph(program.name, sites, edges, groups)


def _node(info: SiteInfo, normalized: bool) -> GraphSite:
    names = info.dims[: info.lead_ndim]
    axes = [
        GraphAxis("scan" if p < info.num_scans else "vmap", name, size)
        for p, name, size in zip(info.perm, names, info.shape, strict=False)
    ]
    batch = slice(info.lead_ndim, info.batch_ndim)
    axes += [
        GraphAxis("batch", name, size)
        for name, size in zip(info.dims[batch], info.shape[batch], strict=True)
        if name is not None
    ]
    return GraphSite(
        address=info.address,
        kind=info.kind,
        family=_family(info),
        shape=info.shape,
        observed=info.observed,
        partial=info.partial,
        conditional=info.conditional,
        axes=tuple(axes),
        normalized=normalized,
    )


def _family(info: SiteInfo) -> str:
    """The name that the user wrote, without wrappers and parameterizations."""
    if info.site.spec is None:
        return info.kind
    d = _template(info.site.spec)
    while isinstance(d, (ExpandedDistribution, Independent, MaskedDistribution)):
        d = d.base_dist
    return type(d).__name__.removesuffix("Probs").removesuffix("Logits")


def _template(spec: DistSpec) -> Distribution:
    """The distribution with markers where its arrays go."""
    return jax.tree.unflatten(spec.treedef, spec.static)


def _groups(
    infos: dict[str, SiteInfo],
    sites: dict[str, GraphSite],
    together: Iterable[tuple[str, str]],
    scans: dict[str, tuple[Any, ...]],
) -> dict[str, tuple[Any, ...]]:
    """Identifies axes across sites.

    Scans are known exactly and named axes by their name. An unnamed axis leaves no trace in the
    program but its size: two sites share it if they have the same size and belong together (one
    depends on the other, or they are branches of one conditional).
    """
    component = {a: a for a in sites}

    def find(a):
        while component[a] != a:
            a = component[a]
        return a

    def kind_of(axis):
        return (axis.kind, axis.name, axis.size)

    for a, b in together:
        x, y = sites[a].axes, sites[b].axes
        if x and y and kind_of(x[0]) == kind_of(y[0]):
            component[find(b)] = find(a)
    groups = {}
    for address, site in sites.items():
        parts: list[Any] = []
        for i, axis in enumerate(site.axes):
            if axis.kind == "scan":
                parts.append(("scan", scans[address][infos[address].perm[i]]))
            elif axis.name is not None:
                parts.append((axis.name, axis.size))
            else:
                parts.append((axis.size, find(address), i))
        groups[address] = tuple(parts)
    return groups


def _may_be_unnormalized(site: Site) -> bool:
    """Whether a site's density may integrate to something that depends on its parents."""
    if "scale" in site.roles:
        return True
    assert site.spec is not None
    for d in _parts(_template(site.spec)):
        if isinstance(d, (MaskedDistribution, ImproperUniform, Unit)):
            return True
        if isinstance(d, Delta) and not (isinstance(d.log_density, float) and d.log_density == 0):
            return True
    return False


def _parts(d: Distribution) -> Iterable[Distribution]:
    """A distribution and those it is made of."""
    yield d
    for x in jax.tree.leaves(d, is_leaf=lambda x: isinstance(x, Distribution) and x is not d):
        if isinstance(x, Distribution):
            yield from _parts(x)


def _disjoint(**sets: set[str]) -> None:
    named = list(sets.items())
    for i, (first, x) in enumerate(named):
        for second, y in named[i + 1 :]:
            if x & y:
                raise InvalidValue(
                    f"d_separated: {', '.join(map(repr, sorted(x & y)))} is in both {first} and "
                    f"{second}; the three must not overlap. Leave it out of one of them."
                )
