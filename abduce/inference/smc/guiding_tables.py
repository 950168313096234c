"""Auxiliary processes with other than Gaussian messages: finite chains, gamma increments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.errors import InvalidValue
from abduce.inference.smc.backward import (
    Auxiliary,
    along,
    as_tuple,
    entry,
    make_anchor,
    parents_of,
    shaped,
)
from abduce.inference.smc.locals import LocalGamma, LocalTable, Waiting, gamma_parameters
from abduce.inference.smc.messages import GammaMessage, Table, categories

__all__ = ["DiscreteProcess", "GammaProcess", "discrete", "gamma"]


class DiscreteProcess(Auxiliary):
    """Made by `discrete`."""

    state: str = eqx.field(static=True)
    initial: str | None = eqx.field(static=True)
    transition: Any
    emission: Callable[[Any], Any] | None = eqx.field(static=True)
    observed: str | None = eqx.field(static=True)
    parents: tuple[int, ...] | None = eqx.field(static=True)
    nodes: Callable[[Any], Any] | None = eqx.field(static=True)

    def messages(self, chain):
        parents = jnp.asarray(parents_of(self.parents, chain))
        anchor = make_anchor(chain)
        site = chain.info.site
        num = jax.eval_shape(
            lambda: categories(*chain.law(step_of(anchor.carry, 0), step_of(chain.xs, 0),
                                          step_of(chain.observed, 0)))
        ).shape[0]  # fmt: skip
        states = jnp.arange(num)
        if self.emission is None:

            def likelihood(xs, given, carry):
                one = lambda k: chain.run(carry, xs, shaped(site, k), given)[1]  # noqa: E731
                return jax.vmap(one)(states)

            seen = Table(chain.map(likelihood, anchor.carry))
        else:
            seen = Table(self._emissions(chain, self.emission, num))
        log_p, log_root = self._transitions(chain, anchor, parents, num)

        def up(log_p):
            return lambda g, t: Table(jax.nn.logsumexp(entry(log_p, t, 2) + g.log_g, axis=-1))

        root = up(log_root) if log_root is not None else None
        blank = Table(jnp.zeros(num, log_p.dtype))
        first = Table(jnp.zeros(log_root.shape[-2], log_p.dtype)) if root is not None else None
        tree = self.parents is not None
        g, waiting, first = along(
            chain, parents, seen, up(log_p), root, (blank, first), keep=tree
        )  # fmt: skip
        others = Waiting(waiting, None, self.nodes) if tree else None
        return LocalTable(g, others), None if first is None else LocalTable(first)

    def _emissions(self, chain, emission, num):
        y = chain.observed.get(self.observed)
        if y is None:
            raise InvalidValue(
                f"ab.guiding.discrete: emission= is for the observed site {self.observed!r}, but "
                f"the scan has no data for it (there are {', '.join(chain.observed) or 'none'}). "
                f"Pass observed= its address."
            )
        log_g = jax.vmap(lambda v: jnp.reshape(emission(v), (num,)))(y.value)
        if y.mask is None:
            return log_g
        return jnp.where(y.mask.reshape(chain.length, -1).all(-1)[:, None], log_g, 0.0)

    def _transitions(self, chain, anchor, parents, num):
        """log P of each step, and of the steps after the initial latent."""
        site = chain.info.site
        initial = chain.initial
        if self.transition is not None:
            log_p = jnp.log(jnp.asarray(self.transition, jnp.result_type(float)))
            return log_p, (log_p if initial is not None else None)

        def outputs(xs, given, carry, v):
            run = lambda k: chain.run(carry, xs, shaped(site, k), given)[0]  # noqa: E731
            return jax.vmap(run)(jnp.arange(num)), run(v)

        moved, kept = chain.map(outputs, anchor.carry, anchor.v)
        from_parent = jnp.minimum(parents, chain.length - 1)
        moved, kept = (jax.tree.map(lambda x: x[from_parent], y) for y in (moved, kept))

        def rows(xs, given, carry, moved, kept):
            def one(m):
                return categories(*chain.law(_graft(carry, m, kept), xs, given))

            return jax.vmap(one)(moved)

        log_p = chain.map(rows, anchor.carry, moved, kept)
        if initial is None:
            return log_p, None
        outer, operands = chain.initial_law()
        if jnp.issubdtype(outer.dtype, jnp.floating):
            raise InvalidValue(
                f"ab.guiding.discrete: the scan starts from {initial!r}, which is "
                f"{outer.spec.family}; a table of messages needs a discrete one."
            )
        num_first = categories(outer, operands).shape[0]
        start = lambda k: chain.first_carry(shaped(outer, k))  # noqa: E731
        moved0, kept0 = jax.vmap(start)(jnp.arange(num_first)), start(anchor.first)
        return log_p, chain.map(
            lambda xs, given, carry: rows(xs, given, carry, moved0, kept0), anchor.carry
        )


def step_of(tree: Any, t: Any) -> Any:
    return jax.tree.map(lambda x: x[t], tree)


def _graft(carry: Any, moved: Any, kept: Any) -> list[Any]:
    """The carry with a change that an earlier step would have made to it."""
    return [
        m if c.dtype == bool else c + (m - k) for c, m, k in zip(carry, moved, kept, strict=True)
    ]


def discrete(
    state: str,
    *,
    transition: Any = None,
    emission: Callable[[Any], Any] | None = None,
    observed: str | None = None,
    initial: str | None = None,
    parents: Sequence[int] | None = None,
    nodes: Callable[[Any], Any] | None = None,
) -> Auxiliary:
    """A finite Markov chain; the model's own by default, which is exact.

    Args:
        state: Address of a Categorical or Bernoulli site of the scan's body.
        transition: Probabilities, shape (K, K) or (steps, K, K), rows sum to 1; None reads them
            from the model, which holds where the carry depends on the past through the last state.
        emission: `emission(y)` gives the log likelihood of each state, shape (K,); None reads it
            from the model.
        observed: Address that `emission` describes.
        initial: Address of the latent that the scan starts from; None for the only one.
        parents: For a tree: the parent of the node that each step visits, -1 for the root outside.
        nodes: For a tree: `nodes(carry)` gives the values of all nodes, steps in front; None where
            the carry is that array.
    """
    return DiscreteProcess(state, initial, transition, emission, observed, as_tuple(parents), nodes)


# ---------------------------------------------------------------------- gamma increments


class GammaProcess(Auxiliary):
    """Made by `gamma`."""

    state: str = eqx.field(static=True)
    initial: str | None = eqx.field(static=True)
    end: Any
    shape: Any
    rate: Any
    position: Callable[[Any], Any] | None = eqx.field(static=True)

    def messages(self, chain):
        site = chain.info.site
        dtype = jnp.result_type(float)

        def step(carry, inputs):
            xs, given, _ = inputs
            a, rate = gamma_parameters(*chain.law(carry, xs, given))
            out, _ = chain.run(carry, xs, (a / rate).astype(site.dtype), given)
            return [jnp.asarray(o, c.dtype) for o, c in zip(out, carry, strict=True)], a

        _, a = chain.scan(step, chain.first_carry())
        total = jnp.cumsum(a, axis=0) if chain.reverse else jnp.cumsum(a[::-1], axis=0)[::-1]
        spread = lambda x: jnp.broadcast_to(jnp.asarray(x, dtype), a.shape)  # noqa: E731
        g = GammaMessage(spread(self.end), self.shape + total - a, spread(self.rate))
        return LocalGamma(g, self.position), None


def gamma(
    state: str,
    *,
    end: Any,
    shape: Any,
    rate: Any,
    position: Callable[[Any], Any] | None = None,
) -> Auxiliary:
    """Gamma increments of one rate, that lead to an observed end: end - x_T ~ Gamma(shape, rate).

    The message after a step is the density of Gamma(A, rate) at end - x, where A adds the shapes of
    the increments that are left. Exact where the model's increments have this rate throughout; a
    rate that depends on the state is weighed.

    Args:
        state: Address of a Gamma site of the scan's body, the increment; its shape must not depend
            on the state.
        end: The observed level, a number or of the site's shape.
        shape, rate: Of the last increment, from the level after the scan to `end`.
        position: `position(carry)` gives the current level; None where the carry is the level.
    """
    return GammaProcess(state, None, end, shape, rate, position)
