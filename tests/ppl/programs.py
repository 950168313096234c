"""Random programs: nests of vmap, scan, cond, jit, checkpoint and scopes around sites.

A program is a tree. `emit` runs it with JAX and `ab.sample`; `visit` runs the same tree with Python
loops and Python branches over a choice map, and returns the score of every element it meets. The
two share nothing but the tree.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import abduce as ab
import abduce.dist as dist

__all__ = ["FAMILIES", "Seq", "Site", "emit", "label", "programs", "visit"]


@dataclass(frozen=True)
class Site:
    family: str
    name: str = ""


@dataclass(frozen=True)
class Seq:
    parts: tuple


@dataclass(frozen=True)
class Map:
    size: int
    body: object


@dataclass(frozen=True)
class Loop:
    size: int
    reverse: bool
    body: object


@dataclass(frozen=True)
class Branch:
    yes: object
    no: object


@dataclass(frozen=True)
class Wrap:
    kind: str
    body: object


# Each family: the distribution at a number x in (-2, 2), a value's score, and what flows on.
LOG_2PI = math.log(2 * math.pi)
FAMILIES = {
    "normal": (
        lambda x: dist.Normal(x / 2, 1.5),
        lambda v, x: -0.5 * ((v - x / 2) / 1.5) ** 2 - math.log(1.5) - 0.5 * LOG_2PI,
        lambda v: v,
    ),
    "scale": (
        lambda x: dist.Normal(0.3, 1.0 + x**2),
        lambda v, x: -0.5 * ((v - 0.3) / (1 + x**2)) ** 2 - math.log(1 + x**2) - 0.5 * LOG_2PI,
        lambda v: -v,
    ),
    "gamma": (
        lambda x: dist.Gamma(2.0, 1.5 + x / 2),
        lambda v, x: 2 * math.log(1.5 + x / 2) + math.log(v) - (1.5 + x / 2) * v,
        lambda v: v - 1.0,
    ),
    "bernoulli": (
        lambda x: dist.Bernoulli(logits=x),
        lambda v, x: v * x - math.log1p(math.exp(x)),
        lambda v: v - 0.5,
    ),
    "poisson": (
        lambda x: dist.Poisson(2.0 + x / 2),
        lambda v, x: v * math.log(2 + x / 2) - (2 + x / 2) - math.lgamma(v + 1),
        lambda v: v / 2 - 1.0,
    ),
    "pair": (
        lambda x: dist.Normal(x * jnp.array([1.0, -1.0]), 1.0).to_event(1),
        lambda v, x: -0.5 * ((v[0] - x) ** 2 + (v[1] + x) ** 2) - LOG_2PI,
        lambda v: v[0] + v[1],
    ),
}


def squash(x, lib):
    return 2 * lib.tanh(x)


def label(node, counter=None):
    """Gives every site its own name."""
    counter = iter(range(10**6)) if counter is None else counter
    match node:
        case None:
            return None
        case Site():
            return replace(node, name=f"{node.family}{next(counter)}")
        case Seq():
            return Seq(tuple(label(p, counter) for p in node.parts))
        case Branch():
            return Branch(label(node.yes, counter), label(node.no, counter))
        case _:
            return replace(node, body=label(node.body, counter))


def emit(node, x):
    """Runs a program with JAX; returns the number that flows on."""
    match node:
        case None:
            return x
        case Site():
            make, _, out = FAMILIES[node.family]
            return jnp.asarray(out(ab.sample(node.name, make(squash(x, jnp)))), float)
        case Seq():
            for part in node.parts:
                x = emit(part, x)
            return x
        case Map():
            ys = jax.vmap(lambda i: emit(node.body, x + i / 2))(jnp.arange(node.size) * 1.0)
            return jnp.mean(ys)
        case Loop():
            steps = jnp.arange(node.size) * 1.0

            def step(c, t):
                return emit(node.body, c + t / 3), None

            return jax.lax.scan(step, x, steps, reverse=node.reverse)[0]
        case Branch():
            return jax.lax.cond(x > 0, lambda x: emit(node.yes, x), lambda x: emit(node.no, x), x)
        case Wrap("jit"):
            return jax.jit(lambda x: emit(node.body, x))(x)
        case Wrap("checkpoint"):
            return jax.checkpoint(lambda x: emit(node.body, x))(x)
        case Wrap("scope"):
            with ab.scope("s"):
                return emit(node.body, x)
    raise TypeError(node)


def visit(node, x, choices, index=(), prefix="", scores=None):
    """Runs a program by hand over a choice map.

    Returns:
        The number that flows on, and `{(address, index): score}` of the elements it met.
    """
    scores = {} if scores is None else scores
    match node:
        case None:
            return x, scores
        case Site():
            _, score, out = FAMILIES[node.family]
            address = prefix + node.name
            value = np.asarray(choices[address])[index]
            scores[address, index] = score(value, squash(x, math))
            return float(out(value)), scores
        case Seq():
            for part in node.parts:
                x, _ = visit(part, x, choices, index, prefix, scores)
            return x, scores
        case Map():
            ys = [
                visit(node.body, x + i / 2, choices, (*index, i), prefix, scores)[0]
                for i in range(node.size)
            ]
            return sum(ys) / node.size, scores
        case Loop():
            order = range(node.size)
            for t in reversed(order) if node.reverse else order:
                x, _ = visit(node.body, x + t / 3, choices, (*index, t), prefix, scores)
            return x, scores
        case Branch():
            return visit(node.yes if x > 0 else node.no, x, choices, index, prefix, scores)
        case Wrap(kind):
            inner = prefix + "s/" if kind == "scope" else prefix
            return visit(node.body, x, choices, index, inner, scores)
    raise TypeError(node)


def _size(node) -> Iterator[int]:
    """The number of elements of each site."""
    match node:
        case None:
            pass
        case Site():
            yield 1
        case Seq():
            for p in node.parts:
                yield from _size(p)
        case Branch():
            yield from _size(node.yes)
            yield from _size(node.no)
        case Wrap():
            yield from _size(node.body)
        case _:
            yield from (node.size * n for n in _size(node.body))


def _extend(inner):
    sequence = st.lists(inner, min_size=1, max_size=3).map(lambda p: Seq(tuple(p)))
    return st.one_of(
        sequence,
        st.builds(Map, st.integers(2, 3), sequence),
        st.builds(Loop, st.integers(2, 4), st.booleans(), sequence),
        st.builds(Branch, sequence, st.none() | sequence),
        st.builds(Wrap, st.sampled_from(["jit", "checkpoint", "scope"]), sequence),
    )


def programs(max_sites: int = 6, max_elements: int = 60):
    """Strategy: labelled programs that start with a site."""
    site = st.sampled_from(sorted(FAMILIES)).map(Site)
    body = st.recursive(site, _extend, max_leaves=max_sites)
    tree = st.builds(lambda a, b, c: label(Seq((a, b, c))), site, body, _extend(body))
    return tree.filter(lambda p: len(list(_size(p))) <= max_sites and sum(_size(p)) <= max_elements)
