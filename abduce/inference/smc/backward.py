"""The backward filter: a path to expand about, and messages fused along parents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidValue
from abduce.inference.smc.messages import Quadratic, categories, gaussian
from abduce.inference.smc.reading import Chain

__all__ = [
    "Anchor",
    "Auxiliary",
    "along",
    "as_tuple",
    "entry",
    "expand",
    "flat",
    "make_anchor",
    "parents_of",
    "refined",
    "shaped",
]


class Auxiliary(eqx.Module):
    """A tractable process that stands in for the model in the backward pass.

    Attributes:
        state: Address of the site that is drawn at each step.
        initial: Address of the latent that the scan starts from; None for the only one.
    """

    state: eqx.AbstractVar[str]
    initial: eqx.AbstractVar[str | None]

    def messages(self, chain: Chain) -> tuple[Any, Any]:
        """Messages at the steps (a leading axis of steps), and on the initial latent or None."""
        raise NotImplementedError


# ---------------------------------------------------------------------- the anchor


class Anchor(eqx.Module):
    """A path about which a model is expanded.

    Attributes:
        carry: The carry that enters each step.
        v: The states, flat.
        first: The initial latent, flat, or None.
        score: Log density of path and observations; zero unless the path was guided.
    """

    carry: list[Any]
    v: Any
    first: Any
    score: Any


def flat(x: Any) -> Any:
    x = jnp.asarray(x)
    return x.reshape(-1).astype(jnp.result_type(float))


def shaped(site: Any, v: Any) -> Any:
    return v.reshape(site.full_shape).astype(site.dtype)


def _center(site: Any, operands: Any) -> Any:
    """A typical value of a kernel: its mean, or its mode."""
    if jnp.issubdtype(site.dtype, jnp.floating):
        return flat(gaussian(site, operands)[0])
    return flat(jnp.argmax(categories(site, operands)))


def make_anchor(chain: Chain) -> Anchor:
    """The path of the kernels' means (or modes)."""
    first, carry = None, chain.first_carry()
    if chain.initial is not None:
        site, operands = chain.initial_law()
        first = _center(site, operands)
        carry = chain.first_carry(shaped(site, first))

    def step(carry, inputs):
        xs, given, _ = inputs
        site, operands = chain.law(carry, xs, given)
        v = _center(site, operands)
        out, _ = chain.run(carry, xs, shaped(site, v), given)
        return _like(out, carry), (carry, v)

    _, (carries, vs) = chain.scan(step, carry)
    return Anchor(carries, vs, first, jnp.zeros((), jnp.result_type(float)))


def _moved(chain: Chain, old: Anchor, local: Any, root: Any, share: Any) -> Anchor:
    """The path moved by a share of the way to its guided mean."""
    first, carry = None, chain.first_carry()
    score = jnp.zeros((), jnp.result_type(float))

    def move(site, operands, message, carry, old):
        target = flat(message.tilt(site, operands, carry)[0].mean)
        v = old + share * (target - old)
        mean, lower = gaussian(site, operands)
        r = jax.scipy.linalg.solve_triangular(lower, v - mean, lower=True)
        return v, -0.5 * (r @ r) - jnp.sum(jnp.log(jnp.diag(lower)))

    if root is not None:
        site, operands = chain.initial_law()
        first, score = move(site, operands, root, None, old.first)
        carry = chain.first_carry(shaped(site, first))

    def step(loop, inputs):
        carry, score = loop
        xs, given, (local, old) = inputs
        site, operands = chain.law(carry, xs, given)
        v, add = move(site, operands, local, carry, old)
        out, weight = chain.run(carry, xs, shaped(site, v), given)
        return (_like(out, carry), score + add + weight), (carry, v)

    (_, score), (carries, vs) = chain.scan(step, (carry, score), (local, old.v))
    return Anchor(carries, vs, first, score)


def _like(out: Any, carry: Any) -> list[Any]:
    return [jnp.asarray(o, c.dtype) for o, c in zip(out, carry, strict=True)]


_SHARES = np.array([1.0, 0.5, 0.25, 0.1, 0.03, 0.0])


def refined(chain: Chain, backward: Any, num_iterations: int) -> tuple[Any, Any]:
    """Messages about an anchor that has moved to its own guided mean.

    Each iteration is a Gauss-Newton step towards the most probable path, of the length (among a
    few) that leads to the most probable one: a full step may overshoot.
    """
    anchor = make_anchor(chain)

    def improve(_, anchor):
        local, root = backward(anchor)
        tried = jax.vmap(lambda s: _moved(chain, anchor, local, root, s))(jnp.asarray(_SHARES))
        best = jnp.argmax(jnp.where(jnp.isnan(tried.score), -jnp.inf, tried.score))
        return jax.tree.map(lambda x: x[best], tried)

    if num_iterations:
        anchor = jax.lax.fori_loop(0, num_iterations, improve, anchor)
    return backward(anchor)


def expand(value_of: Callable[[Any], Any], x: Any) -> Quadratic:
    """Second order about x, made concave; 1 where the value is not finite."""
    value, slope = jax.value_and_grad(value_of)(x)
    curvature = -jax.hessian(value_of)(x)
    curvature = 0.5 * (curvature + curvature.T)
    fine = jnp.isfinite(value) & jnp.all(jnp.isfinite(slope)) & jnp.all(jnp.isfinite(curvature))
    curvature = jnp.where(fine, curvature, 0.0)
    w, vectors = jnp.linalg.eigh(curvature)
    concave = (vectors * jnp.maximum(w, 0.0)) @ vectors.T
    concave = jnp.where(jnp.all(w >= 0), curvature, concave)
    return Quadratic(jnp.where(fine, value, 0.0), jnp.where(fine, slope, 0.0), concave)


# ---------------------------------------------------------------------- along parents


def parents_of(parents: Any, chain: Chain) -> Any:
    """Indices of the parents in the scan; the root is the number of steps."""
    n = chain.length
    if parents is None:
        t = np.arange(n)
        return t + 1 if chain.reverse else np.where(t == 0, n, t - 1)
    p = np.asarray(parents)
    if p.shape != (n,):
        raise InvalidValue(
            f"ab.guiding: parents has {p.size} entries, but the scan has {n} steps, one for each "
            f"node."
        )
    t = np.arange(n)
    before = (p > t) & (p < n) if chain.reverse else p < t
    wrong = (p >= 0) & ~before
    if wrong.any():
        i = int(np.argmax(wrong))
        raise InvalidValue(
            f"ab.guiding: the parent of node {i} is {int(p[i])}, which the scan does not visit "
            f"before it. Order the nodes parents first; -1 is the root outside of the scan."
        )
    return np.where(p < 0, n, p)


def along(
    chain: Chain, parents: Any, seen: Any, rule: Any, root: Any, blank: Any, *, keep: bool
) -> Any:
    """The backward filter on a tree.

    Args:
        chain: Gives the order.
        parents: From `parents_of`.
        seen: Messages of the observations at the nodes.
        rule: `(message, node) -> message on its parent`.
        root: The same for children of the root outside of the scan, or None.
        blank: The constant message on a node, and on that root.
        keep: Whether to return the waiting.

    Returns:
        The messages at the nodes; for each step, by node, what is still to come from the node's
        other children (the waiting); the message on the root or None.
    """
    n = chain.length
    zeros = jax.tree.map(lambda x: jnp.zeros((n + 1, *x.shape), x.dtype), blank[0])

    def back(loop, inputs):
        pending, first = loop
        seen, parent, node = inputs
        g = seen + jax.tree.map(lambda x: x[node], pending)
        t = jnp.arange(n + 1)
        there = ((t > node) if chain.reverse else (t < node)) & (t < n)
        waiting = jax.tree.map(
            lambda x: jnp.where(there.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0.0)[:n], pending
        )
        up = rule(g, node)
        pending = jax.tree.map(lambda x, u: x.at[parent].add(u), pending, up)
        if root is not None:
            add = root(g, node)
            first = jax.tree.map(lambda x, u: x + jnp.where(parent == n, u, 0.0), first, add)
        return (pending, first), (g, waiting if keep else None)

    (_, first), (g, waiting) = jax.lax.scan(
        back, (zeros, blank[1]), (seen, jnp.asarray(parents), jnp.arange(n)),
        reverse=not chain.reverse,
    )  # fmt: skip
    return g, waiting, (first if root is not None else None)


def entry(x: Any, t: Any, ndim: int) -> Any:
    """Entry t of what may differ by step."""
    return x[t] if x.ndim > ndim else x


def as_tuple(parents: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if parents is None else tuple(int(p) for p in np.asarray(parents))
