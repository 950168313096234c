"""Auxiliary processes for `ab.guided`: where its messages come from.

Each is a configuration whose `messages(chain)` runs the backward filter. An auxiliary process
covers the steps of a chain, or with `parents=` the edges of a tree whose nodes the scan visits,
parents first: the message of a node is fused from its observation and from its children.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidValue
from abduce.inference.smc.backward import (
    Auxiliary,
    along,
    as_tuple,
    entry,
    expand,
    parents_of,
    refined,
    shaped,
)
from abduce.inference.smc.guiding_tables import DiscreteProcess, GammaProcess, discrete, gamma
from abduce.inference.smc.locals import LocalQuadratic, Waiting
from abduce.inference.smc.messages import Quadratic, gaussian, leaf, marginal
from abduce.inference.smc.reading import float_part

__all__ = [
    "Auxiliary",
    "DiscreteProcess",
    "GammaProcess",
    "LinearGaussian",
    "Linearized",
    "diffusion",
    "discrete",
    "gamma",
    "linear_gaussian",
    "linearized",
]


# ---------------------------------------------------------------------- linearised


class Linearized(Auxiliary):
    """Made by `linearized`."""

    state: str = eqx.field(static=True)
    initial: str | None = eqx.field(static=True)
    num_iterations: int = eqx.field(static=True)

    def messages(self, chain):
        return refined(chain, lambda a: self.backward(chain, a), self.num_iterations)

    def backward(self, chain, anchor):
        site = chain.info.site

        def linearize(xs, given, carry, v):
            z, back = float_part(carry)
            n = z.shape[0]

            def run(u):
                out, weight = chain.run(back(u[:n]), xs, shaped(site, u[n:]), given)
                return float_part(out)[0], weight

            def mean(z):
                m, lower = gaussian(*chain.law(back(z), xs, given))
                return m, lower

            u = jnp.concatenate([z, v])
            forward = jax.jacfwd(lambda u: run(u)[0])(u)
            M, lower = jax.jacfwd(mean, has_aux=True)(z)
            return expand(lambda u: run(u)[1], u), forward, M, mean(z)[0] - v, lower, z

        seen, forward, M, m, lower, z = chain.map(linearize, anchor.carry, anchor.v)
        n = z.shape[-1]

        def back(h, inputs):
            seen, forward, M, m, lower = inputs
            g = seen + h.pull(forward)
            return marginal(g, n, M, m, lower), g

        h, g = jax.lax.scan(
            back, Quadratic.zero(n, z.dtype), (seen, forward, M, m, lower),
            reverse=not chain.reverse,
        )  # fmt: skip
        local, root = LocalQuadratic(g, z, anchor.v), None
        if chain.initial is not None:
            outer, _ = chain.initial_law()

            def start(v):
                return float_part(chain.first_carry(shaped(outer, v)))[0]

            root = LocalQuadratic(h.pull(jax.jacfwd(start)(anchor.first)), None, anchor.first)
        return local, root


def linearized(state: str, *, initial: str | None = None, num_iterations: int = 8) -> Auxiliary:
    """The model itself, linearised about a path: the extended Kalman smoother run backwards.

    Transitions are linearised and observations expanded to second order, about the mean of the
    guided path, which is then moved up to `num_iterations` times. The message is on the whole
    carry, so that second-order chains, trees whose carry holds all nodes, and noise that enters
    through a function are covered. Exact for linear Gaussian models.

    Args:
        state: Address of a Gaussian site of the scan's body.
        initial: Address of the Gaussian latent that the scan starts from; None for the only one.
        num_iterations: Times the path is moved; 0 keeps the prior mean.
    """
    return Linearized(state, initial, int(num_iterations))


class LinearGaussian(Auxiliary):
    """Made by `linear_gaussian` and `diffusion`."""

    state: str = eqx.field(static=True)
    initial: str | None = eqx.field(static=True)
    B: Any
    b: Any
    Q: Any
    H: Any
    R: Any
    d: Any
    observed: str | None = eqx.field(static=True)
    parents: tuple[int, ...] | None = eqx.field(static=True)
    nodes: Callable[[Any], Any] | None = eqx.field(static=True)
    num_iterations: int = eqx.field(static=True)

    def messages(self, chain):
        if self.H is not None:
            return self.backward(chain, None)
        return refined(chain, lambda a: self.backward(chain, a), self.num_iterations)

    def backward(self, chain, anchor):
        parents = parents_of(self.parents, chain)
        dtype = jnp.result_type(float)
        n = int(np.prod(chain.info.site.full_shape))
        B, Q = (jnp.asarray(x, dtype) for x in (self.B, self.Q))
        b = jnp.asarray(self.b, dtype)
        if B.shape[-2:] != (n, n) or Q.shape[-2:] != (n, n) or b.shape[-1:] != (n,):
            raise InvalidValue(
                f"ab.guiding.linear_gaussian: B {B.shape}, b {b.shape}, Q {Q.shape} do not fit "
                f"site {self.state!r} of {n} numbers: they end in ({n}, {n}), ({n},), ({n}, {n}); "
                f"an axis of {chain.length} steps may stand in front."
            )
        lower = _root_of(Q)
        if anchor is None:
            seen, v = self._leaves(chain, n, dtype), jnp.zeros((chain.length, n), dtype)
            first = jnp.zeros((n,), dtype)
        else:
            site, v = chain.info.site, anchor.v
            first = v[0] if anchor.first is None else anchor.first

            def likelihood(xs, given, carry, v):
                return expand(
                    lambda u: chain.run(carry, xs, shaped(site, u), given)[1], v
                )  # fmt: skip

            seen = chain.map(likelihood, anchor.carry, anchor.v)
        anchors = jnp.concatenate([v, first[None]])

        def rule(g, t):
            M = entry(B, t, 2)
            m = M @ anchors[jnp.asarray(parents)[t]] + entry(b, t, 1) - v[t]
            return marginal(g.beside(n), n, M, m, entry(lower, t, 2))

        blank = Quadratic.zero(n, dtype)
        guided = rule if chain.initial is not None else None
        tree = self.parents is not None
        g, waiting, root = along(
            chain, parents, seen, rule, guided, (blank, blank), keep=tree
        )  # fmt: skip
        others = None
        if tree:
            others = Waiting(waiting, jnp.broadcast_to(v, (chain.length, *v.shape)), self.nodes)
        return LocalQuadratic(g, None, v, others), (
            None if root is None else LocalQuadratic(root, None, first)
        )

    def _leaves(self, chain, n, dtype):
        name = self.observed
        given = chain.observed.get(name)
        if given is None:
            raise InvalidValue(
                f"ab.guiding.linear_gaussian: H and R are for the observed site "
                f"{name!r}, but the scan has no data for it (there are "
                f"{', '.join(chain.observed) or 'none'}). Pass observed= its address."
            )
        H, R = jnp.asarray(self.H, dtype), jnp.asarray(self.R, dtype)
        d = jnp.zeros((H.shape[-2],), dtype) if self.d is None else jnp.asarray(self.d, dtype)
        y = given.value.reshape((chain.length, -1)).astype(dtype)
        mask = jnp.ones(given.value.shape, bool)
        if given.mask is not None:
            m = given.mask
            mask = jnp.broadcast_to(
                m.reshape(m.shape + (1,) * (given.value.ndim - m.ndim)), given.value.shape
            )
        mask = mask.reshape(y.shape)
        if H.shape[-2:] != (y.shape[1], n) or R.shape[-2:] != (y.shape[1],) * 2:
            raise InvalidValue(
                f"ab.guiding.linear_gaussian: H {H.shape} and R {R.shape} do not fit: "
                f"{name!r} has {y.shape[1]} numbers a step, {self.state!r} has {n}."
            )
        t = jnp.arange(chain.length)
        return jax.vmap(
            lambda y, m, t: leaf(y, entry(H, t, 2), entry(R, t, 2), entry(d, t, 1), m)
        )(y, mask, t)  # fmt: skip


def _root_of(Q: Any) -> Any:
    """A factor of a covariance, which may be singular."""
    w, vectors = jnp.linalg.eigh(Q)
    return vectors * jnp.sqrt(jnp.maximum(w, 0.0))[..., None, :]


def linear_gaussian(
    state: str,
    *,
    B: Any,
    Q: Any,
    b: Any = None,
    H: Any = None,
    R: Any = None,
    d: Any = None,
    observed: str | None = None,
    initial: str | None = None,
    parents: Sequence[int] | None = None,
    nodes: Callable[[Any], Any] | None = None,
    num_iterations: int = 8,
) -> Auxiliary:
    """The auxiliary process x' ~ N(B x + b, Q), observed as y ~ N(H x + d, R).

    Args:
        state: Address of the Gaussian site of the scan's body, n numbers.
        B, Q: Shape (n, n), or (steps, n, n).
        b: Shape (n,) or (steps, n); 0 by default.
        H, R, d: Shape (m, n), (m, m), (m,), or with steps in front. Without H, the model's own
            observations are expanded to second order about the guided path.
        observed: Address of what H and R describe.
        initial: Address of the latent that the scan starts from; None for the only one.
        parents: For a tree: the parent of the node that each step visits, -1 for the root outside.
        nodes: For a tree: `nodes(carry)` gives the values of all nodes, steps in front; None where
            the carry is that array.
        num_iterations: Without H: times the path is moved.
    """
    B = jnp.asarray(B)
    if H is not None and (R is None or observed is None):
        raise InvalidValue(
            "ab.guiding.linear_gaussian: H comes with R= and observed=, the address it describes."
        )
    b = jnp.zeros(B.shape[-1:]) if b is None else b
    return LinearGaussian(
        state, initial, B, b, Q, H, R, d, observed, as_tuple(parents), nodes, int(num_iterations)
    )


def diffusion(state: str, *, B: Any, beta: Any, sigma: Any, dt: Any, **options: Any) -> Auxiliary:
    """The auxiliary diffusion dX = (B X + beta) dt + sigma dW, for Euler-Maruyama steps in a scan.

    Its messages are those of the discretised process, x' ~ N(x + (B x + beta) dt, sigma sigma' dt),
    so the weights are exact for the model as it is discretised; they tend to those of the backward
    ordinary differential equations of Mider, Schauer and van der Meulen (2021) as dt goes to 0.

    Args:
        state: Address of the site x' of the scan's body.
        B, beta, sigma: Shape (n, n), (n,), (n, k), or with steps in front.
        dt: Step length, a number or one for each step.
        **options: `H`, `R`, `d`, `observed`, `initial`, `parents`, as of `linear_gaussian`.
    """
    B, beta, sigma, dt = (jnp.asarray(x, jnp.result_type(float)) for x in (B, beta, sigma, dt))
    h2 = dt[..., None, None]
    Q = sigma @ jnp.swapaxes(sigma, -1, -2) * h2
    eye = jnp.eye(B.shape[-1])
    return linear_gaussian(state, B=eye + B * h2, b=beta * dt[..., None], Q=Q, **options)
