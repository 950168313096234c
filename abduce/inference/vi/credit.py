"""Credit assignment: each additive part of a cost is multiplied by what belongs to it, no more.

An objective is a staged program that returns a scalar. Walking it, a choice with a credited
strategy gets a *log factor* per element, whose value is 0 and whose derivative is that of its log
density (score), or whose exponential is a probability (enumeration). The scalar is taken apart
along sums, negations, products with constants, loops and branches; each part `t` becomes
`t * exp(sum of the log factors of the choices it depends on)`. The derivative of the sum of the
parts is then an unbiased estimate, at every order (Foerster et al., "DiCE: the infinitely
differentiable Monte Carlo estimator", ICML 2018; the parts are the costs of Schulman et al.,
"Gradient estimation using stochastic computation graphs", NeurIPS 2015).

Which choices a part depends on, along which axes, and at which steps of a scan, is known from the
labels of `abduce.inference.vi.labels`: an element of a mapped axis is credited with its own costs
alone, a step of a scan with the costs from it on.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidModel
from abduce.inference.vi.choices import draw_choice, parameter_axes
from abduce.inference.vi.labels import Labels, flow, join, map_axes, mixed
from abduce.inference.vi.linear import LINEAR, RESHAPES
from abduce.inference.vi.strategies import Strategy
from abduce.inference.vi.tape import Input, Node, Tape, Use, as_node
from abduce.ppl import _jax
from abduce.ppl.interpreter import (
    addresses,
    broadcast_operand,
    element_keys,
    first_site,
    loop_error,
    undifferentiable,
    walk,
)
from abduce.ppl.site import Site, has_sites, site_p

__all__ = ["Credit"]


@dataclasses.dataclass
class Credit:
    """The handler.

    Attributes:
        strategies: By address.
        linear: Variables on the way from the parts to the result.
        varied: The choice whose alternatives are run; None in the ordinary run.
        uses, scans: By address, filled by the walk: how parts use a choice, and the scans it is in.
        misfit: Whether `extra` is the misfit of the learned baselines instead of the baselines.
    """

    strategies: Mapping[str, Strategy]
    linear: frozenset[Any]
    varied: str | None = None
    misfit: bool = False
    uses: dict[str, Use] = dataclasses.field(default_factory=dict)
    scans: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    def run(self, jaxpr: Any, args: Sequence[Any], tape: Tape) -> list[Node]:
        """Walks a jaxpr."""
        handler: Any = self
        state: Any = tape
        return [as_node(x) for x in walk(handler, jaxpr, args, state)]

    # ---------------------------------------------------------------- parts

    def part(self, node: Node, tape: Tape) -> Any:
        """The value of a node times the factors of the choices it depends on."""
        if node.credited is not None:
            return node.credited
        labels = join([node.labels, mixed(tape.guards)]) if tape.guards else node.labels
        if self.varied is None and not labels:
            return node.value
        ndim = jnp.ndim(node.value)
        common, own = 0.0, 0.0
        for (address, level), axes in labels.items():
            self._note(address, level, axes, tape)
            factor = tape.factors.get((address, level))
            if factor is None:  # no step of the loop has passed
                continue
            spread = _spread(factor, axes, ndim)
            if address == self.varied:
                own = own + spread
            else:
                common = common + spread
        value = node.value * _exp(common)
        return value if self.varied is None else jax.lax.stop_gradient(value) * own

    def _note(self, address: str, level: int | None, axes: Sequence[int | None], tape: Tape):
        use = self.uses.setdefault(address, Use())
        use.axes.update(i for i, a in enumerate(axes) if a is None)
        mine = self.scans[address]
        if level is None:  # apart are only the steps of the scans that this part is in as well
            pairs = zip(mine, tape.scans, strict=False)
            level = sum(1 for _ in itertools.takewhile(lambda p: p[0] is p[1], pairs))
        use.scans.update(range(level, len(mine)))

    # ---------------------------------------------------------------- equations

    def equation(self, eqn: Any, vals: list[Any], tape: Any) -> list[Node]:
        nodes = [as_node(v) for v in vals]
        if eqn.primitive is site_p:
            return [self.choice(eqn.params["site"], nodes, tape)]
        sited = any(has_sites(s) for s in _jax.subjaxprs(eqn))
        if not sited and not any(n.labels for n in nodes):
            outs = _jax.evaluate(eqn, [n.value for n in nodes])
            never = eqn.primitive.name in RESHAPES and nodes[0].never
            return [Node(x, never=never) for x in outs]
        if eqn.primitive is _jax.scan_p:
            return self._scan(eqn, nodes, tape)
        if eqn.primitive is _jax.cond_p:
            return self._cond(eqn, nodes, tape)
        call = _jax.call_jaxpr(eqn)
        # A jitted helper may be called from several places, of which one leads to the result by
        # sums; elsewhere it is evaluated as it stands.
        summed = any(v in self.linear for v in eqn.outvars)
        if call is not None and (sited or (call[0] == "call" and summed)):
            kind, jaxpr = call
            if kind == "remat":
                return self._remat(eqn, jaxpr, nodes, tape)
            outs = self.run(jaxpr, nodes, tape)
            if kind == "custom":
                name = first_site(jaxpr).address
                outs = [Node(undifferentiable(n.value, name), n.labels) for n in outs]
            return outs
        if sited:
            raise loop_error(eqn)
        values = _jax.evaluate(eqn, [n.value for n in nodes])
        labels = flow(eqn, [n.labels for n in nodes])
        outs = [Node(x, ls) for x, ls in zip(values, labels, strict=True)]
        if len(outs) == 1 and eqn.outvars[0] in self.linear:
            self._sum(eqn, nodes, outs[0], tape)
        return outs

    def _sum(self, eqn: Any, nodes: list[Node], out: Node, tape: Tape) -> None:
        """Gives an output its credited value, where the equation is linear in the parts."""
        name = eqn.primitive.name
        parts = [n.value for n in nodes]
        if name in LINEAR:
            parts = [self.part(n, tape) for n in nodes]
        elif name in ("mul", "dot_general", "div"):
            i = 0 if nodes[0].labels else 1
            if nodes[1 - i].labels or (name == "div" and i == 1):
                return
            parts[i] = self.part(nodes[i], tape)
        elif name == "select_n":
            never = [n.never for n in nodes[1:]]
            if nodes[0].labels and not any(never):
                return
            # Beside -inf, the predicate is a check of the support: true wherever there is a draw.
            parts[1:] = [
                n.value if n.never else self.part(n, tape) for n in nodes[1:]
            ]  # fmt: skip
        else:
            return
        out.credited = _jax.evaluate(eqn, parts)[0]

    # ---------------------------------------------------------------- sites

    def choice(self, site: Site, nodes: list[Node], tape: Tape) -> Node:
        operands = [n.value for n in nodes]
        labels = join(
            _into_site(site, i, n.labels)
            for i, n in enumerate(nodes)
            if site.roles[i] not in ("scale", "baseline")
        )
        given = tape.inputs.get(site.address, Input())
        if site.kind == "deterministic":
            return Node(broadcast_operand(site, operands[0], 0), labels)
        if site.kind == "param":
            value = operands[0] if given.value is None else given.value
            return Node(jnp.asarray(value, site.dtype))
        if site.kind != "sample":
            remedy = "Add it to the result instead."
            if "while_loop(" in site.address:
                remedy = (
                    "It is what ab.while_loop adds where it runs out of steps: write the loop as a "
                    "jax.lax.scan over max_steps, with a flag in the carry."
                )
            raise InvalidModel(
                f"{site.kind} site {site.address!r} ({site.where}) is in an objective, which is "
                f"what it returns: a {site.kind} has no effect. {remedy}"
            )
        if "obs" in site.roles and "mask" not in site.roles:
            i = site.roles.index("obs")
            value = jnp.broadcast_to(broadcast_operand(site, operands[i], i), site.full_shape)
            return Node(value.astype(site.dtype), _into_site(site, i, nodes[i].labels))
        strategy = self.strategies[site.address]
        keys = element_keys(site, tape.key)
        out = draw_choice(
            site, strategy, operands, keys, given, varied=self.varied, misfit=self.misfit
        )
        value = out["value"]
        if "factor" not in out:
            return Node(value, labels)
        self.scans[site.address] = tape.scans
        factor = out["factor"]
        if given.nudge is not None:
            factor = factor + given.nudge
        old = tape.factors.get((site.address, None))
        tape.factors[(site.address, None)] = factor if old is None else old + factor
        if "extra" in out:
            tape.extra = tape.extra + jnp.sum(out["extra"])
        own: Labels = {(site.address, None): tuple(range(len(_batch(site))))}
        return Node(value, join([labels, own]))

    # ---------------------------------------------------------------- control flow

    def _credited_addresses(self, jaxpr: Any) -> dict[str, Site]:
        found: dict[str, Site] = {}
        inner, _ = _jax.inner_jaxpr(jaxpr)
        for eqn in inner.eqns:
            if eqn.primitive is site_p:
                site = eqn.params["site"]
                strategy = self.strategies.get(site.address)
                if site.kind == "sample" and strategy is not None and strategy.credited:
                    found[site.address] = site
            for sub in _jax.subjaxprs(eqn):
                found |= self._credited_addresses(sub)
        return found

    def _scan(self, eqn: Any, nodes: list[Node], tape: Tape) -> list[Node]:
        p = eqn.params
        nc, nk = _jax.scan_split(eqn)
        inner, _ = _jax.inner_jaxpr(p["jaxpr"])
        consts, init, xs = nodes[:nc], nodes[nc : nc + nk], nodes[nc + nk :]
        level, mark = tape.level, object()
        choices = self._credited_addresses(p["jaxpr"])
        carried = inner.invars[nc : nc + nk]
        doubled = [
            k for k in range(nk)
            if carried[k] in self.linear or eqn.outvars[k] in self.linear
        ]  # fmt: skip
        start = [
            n.value if hasattr(n.value, "dtype") else jnp.asarray(n.value, v.aval.dtype)
            for n, v in zip(init, carried, strict=True)
        ]
        zero = {
            a: jnp.zeros(_batch(s), jnp.result_type(float))
            for a, s in choices.items()
        }  # fmt: skip
        counter = jnp.arange(p["length"], dtype=jnp.uint32)
        sliced = {a: g.sliced for a, g in tape.inputs.items() if a in addresses(p["jaxpr"])}
        x_labels = [map_axes(n.labels, {a: a - 1 for a in range(1, jnp.ndim(n.value))}) for n in xs]
        x_credited = [n.credited for n in xs]
        y_credited = [v in self.linear for v in eqn.outvars[nk:]]
        found: dict[str, Any] = {}

        def step(carry, x, carry_labels):
            values, twice, past, extra = carry
            xs_t, xs_credited_t, sliced_t, t = x
            factors = dict(tape.factors)
            factors.update({(a, level): f for a, f in past.items()})
            inputs = {a: g for a, g in tape.inputs.items() if a not in sliced_t}
            inputs |= {a: tape.inputs[a].at(g) for a, g in sliced_t.items()}
            here = tape.inside(
                key=None if tape.key is None else jax.random.fold_in(tape.key, t),
                inputs=inputs, factors=factors, extra=extra, scans=(*tape.scans, mark),
            )  # fmt: skip
            doubles = dict(zip(doubled, twice, strict=True))
            args = [
                *consts,
                *(Node(v, ls, doubles.get(k)) for k, (v, ls) in
                  enumerate(zip(values, carry_labels, strict=True))),
                *(Node(v, ls, c) for v, ls, c in zip(xs_t, x_labels, xs_credited_t, strict=True)),
            ]  # fmt: skip
            outs = self.run(p["jaxpr"], args, here)
            found["labels"] = [o.labels for o in outs]
            new_past = {
                a: f + here.factors.get((a, None), jnp.zeros_like(f)) for a, f in past.items()
            }
            new_carry = (
                [
                    jnp.asarray(o.value, v.aval.dtype)
                    for o, v in zip(outs[:nk], carried, strict=True)
                ],
                [jnp.asarray(self.part(outs[k], here), carried[k].aval.dtype) for k in doubled],
                new_past,
                here.extra,
            )
            ys = [jnp.asarray(o.value) for o in outs[nk:]]
            ys_credited = [
                self.part(o, here) if wanted else None
                for o, wanted in zip(outs[nk:], y_credited, strict=True)
            ]
            return new_carry, (ys, ys_credited)

        carry0 = (
            start,
            [jnp.asarray(self.part(init[k], tape), carried[k].aval.dtype) for k in doubled],
            zero,
            jnp.asarray(tape.extra, jnp.result_type(float)),
        )
        x_all = ([n.value for n in xs], x_credited, sliced, counter)
        carry_labels = [n.labels for n in init]
        if choices or any(n.labels for n in nodes):
            uses = {a: Use(set(u.axes), set(u.scans)) for a, u in self.uses.items()}
            one = jax.tree.map(lambda x: x[0], x_all) if p["length"] else None
            while one is not None:
                jax.eval_shape(lambda c, x, cl=carry_labels: step(c, x, cl), carry0, one)
                new = [
                    join([old, _aged(out, choices, level)])
                    for old, out in zip(carry_labels, found["labels"][:nk], strict=True)
                ]
                if new == carry_labels:
                    break
                carry_labels = new
            self.uses = uses
        carry, (ys, ys_credited) = jax.lax.scan(
            lambda c, x: step(c, x, carry_labels), carry0, x_all,
            length=p["length"], reverse=p["reverse"], unroll=p["unroll"],
        )  # fmt: skip
        values, twice, past, extra = carry
        for a, f in past.items():
            old = tape.factors.get((a, None))
            tape.factors[(a, None)] = f if old is None else old + f
        tape.extra = extra
        labels = [_left(ls, choices, level) for ls in found["labels"]]
        doubles = dict(zip(doubled, twice, strict=True))
        final = [join([_left(c, choices, level), o]) for c, o in
                 zip(carry_labels, labels[:nk], strict=True)]  # fmt: skip
        outs = [Node(v, ls, doubles.get(k)) for k, (v, ls) in
                enumerate(zip(values, final, strict=True))]  # fmt: skip
        for y, c, ls in zip(ys, ys_credited, labels[nk:], strict=True):
            outs.append(Node(y, map_axes(ls, {a: a + 1 for a in range(jnp.ndim(y))}), c))
        return outs

    def _cond(self, eqn: Any, nodes: list[Node], tape: Tape) -> list[Node]:
        index, *operands = nodes
        branches = eqn.params["branches"]
        guards = join([tape.guards, mixed(index.labels)])
        kept = [None if index.labels else n.credited for n in operands]
        choices: dict[str, Site] = {}
        for b in branches:
            choices |= self._credited_addresses(b)
        wanted = [v in self.linear for v in eqn.outvars]
        all_labels: list[list[Labels]] = []

        def runner(branch):
            def run(values, credited, extra):
                args = [Node(v, n.labels, c) for v, n, c in
                        zip(values, operands, credited, strict=True)]  # fmt: skip
                here = tape.inside(extra=extra, guards=guards)
                outs = self.run(branch, args, here)
                all_labels.append([o.labels for o in outs])
                factors = {
                    a: here.factors.get((a, None), jnp.zeros(_batch(s), jnp.result_type(float)))
                    for a, s in choices.items()
                }
                avals = [v.aval for v in _jax.inner_jaxpr(branch)[0].outvars]
                return (
                    [jnp.asarray(o.value, v.dtype) for o, v in zip(outs, avals, strict=True)],
                    [jnp.asarray(self.part(o, here), v.dtype) if w else None
                     for o, v, w in zip(outs, avals, wanted, strict=True)],
                    factors,
                    here.extra,
                )  # fmt: skip

            return run

        values, credited, factors, tape.extra = jax.lax.switch(
            index.value, [runner(b) for b in branches], [n.value for n in operands], kept,
            jnp.asarray(tape.extra, jnp.result_type(float)),
        )  # fmt: skip
        for a, f in factors.items():
            tape.factors[(a, None)] = f
        outs = []
        for i, (v, c) in enumerate(zip(values, credited, strict=True)):
            labels = join([*(ls[i] for ls in all_labels), mixed(index.labels)])
            outs.append(Node(v, labels, c))
        return outs

    def _remat(self, eqn: Any, jaxpr: Any, nodes: list[Node], tape: Tape) -> list[Node]:
        p = eqn.params
        wanted = [v in self.linear for v in eqn.outvars]
        found: dict[str, Any] = {}

        def run(values, credited, key, inputs, factors, extra):
            here = tape.inside(key=key, inputs=inputs, extra=extra)
            here.factors = dict(zip(tape.factors, factors, strict=True))
            args = [Node(v, n.labels, c, n.never) for v, c, n in
                    zip(values, credited, nodes, strict=True)]  # fmt: skip
            outs = self.run(jaxpr, args, here)
            found["labels"] = [o.labels for o in outs]
            found["keys"] = list(here.factors)
            parts = [self.part(o, here) if w else None for o, w in zip(outs, wanted, strict=True)]
            return [o.value for o in outs], parts, list(here.factors.values()), here.extra

        values, credited, factors, tape.extra = jax.checkpoint(
            run, policy=p["policy"], prevent_cse=p["prevent_cse"]
        )(
            [n.value for n in nodes], [n.credited for n in nodes], tape.key, tape.inputs,
            list(tape.factors.values()), jnp.asarray(tape.extra, jnp.result_type(float)),
        )  # fmt: skip
        tape.factors = dict(zip(found["keys"], factors, strict=True))
        return [Node(v, ls, c) for v, ls, c in zip(values, found["labels"], credited, strict=True)]


def _exp(x: Any) -> Any:
    return jnp.exp(x) if not isinstance(x, float) else 1.0


def _batch(site: Site) -> tuple[int, ...]:
    return site.axis_sizes + site.batch_shape


def _spread(factor: Any, axes: Sequence[int | None], ndim: int) -> Any:
    """A log factor laid along the axes of a value; what is mixed is summed."""
    seen: set[int] = set()
    kept: list[int | None] = []
    for a in axes:
        kept.append(None if a is None or a in seen else a)
        seen.update(() if a is None else (a,))
    summed = jnp.sum(factor, tuple(i for i, a in enumerate(kept) if a is None))
    left = [a for a in kept if a is not None]
    order = np.argsort(left)
    shape = [1] * ndim
    for i, a in enumerate(left):
        shape[a] = summed.shape[i]
    return jnp.transpose(summed, order).reshape(shape)


def _aged(labels: Labels, choices: Mapping[str, Site], level: int) -> Labels:
    """Labels after a step of the scan: what was drawn in it is past."""
    return join(
        [{((a, level) if n is None and a in choices else (a, n)): axes}
         for (a, n), axes in labels.items()]
    )  # fmt: skip


def _left(labels: Labels, choices: Mapping[str, Site], level: int) -> Labels:
    """Labels outside of the scan, where its steps are not told apart."""
    return join(
        [{((a, None) if a in choices and n in (None, level) else (a, n)): axes}
         for (a, n), axes in labels.items()]
    )  # fmt: skip


def _into_site(site: Site, i: int, labels: Labels) -> Labels:
    """Labels of operand `i`, along the axes of the site's value."""
    if not labels:
        return {}
    axes = [j for j, a in enumerate(site.axes) if a.mapped[i]]
    where = dict(enumerate(axes))
    nb = len(site.batch_shape)
    n = len(axes)
    if (
        nb
        and site.kind == "sample"
        and (site.roles[i] in ("obs", "mask") or parameter_axes(site, i))
    ):
        where |= {n + j: len(site.axes) + j for j in range(nb)}
    elif site.kind == "deterministic":
        where |= {n + j: len(site.axes) + j for j in range(len(site.shape))}
    return map_axes(labels, where)
