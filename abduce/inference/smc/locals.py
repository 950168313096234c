"""What the future says at one step, ready to tilt the true kernel there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.errors import InvalidModel, InvalidValue
from abduce.inference.smc.messages import (
    GammaMessage,
    Quadratic,
    Table,
    categories,
    gaussian,
    tilt_gamma,
    tilt_gaussian,
    tilt_table,
)
from abduce.inference.smc.reading import float_part
from abduce.ppl.site import elementwise

__all__ = ["Local", "LocalGamma", "LocalQuadratic", "LocalTable", "Waiting", "gamma_parameters"]


class Local(eqx.Module):
    """A message on the state of one step, which may depend on the carry there."""

    def tilt(self, site: Any, operands: Any, carry: Any, tree: Any = None) -> tuple[Any, Any]:
        """The kernel of the state tilted by the message.

        Args:
            site, operands: The true kernel.
            carry: The carry's leaves.
            tree: Gives the carry in the user's structure.

        Returns:
            A distribution over the state, and log (K g), the integral of the message.
        """
        raise NotImplementedError

    def waiting(self, tree: Any) -> Any:
        """On a tree: the log message on other nodes that still wait for their children."""
        return 0.0


class Waiting(eqx.Module):
    """Messages on all nodes of a tree, from children that no step has visited yet.

    Attributes:
        g: Messages, by node; constant where there is nothing to wait for.
        v: By node, the anchor that quadratics are about, or None.
        nodes: Gives the values of all nodes from the carry.
    """

    g: Any
    v: Any
    nodes: Callable[[Any], Any] | None = eqx.field(static=True)

    def __call__(self, tree: Any) -> Any:
        x = tree if self.nodes is None else self.nodes(tree)
        size = (self.g.c if isinstance(self.g, Quadratic) else self.g.log_g).shape[0]
        if not hasattr(x, "shape") or x.shape[:1] != (size,):
            raise InvalidValue(
                f"ab.guiding: parents= describes {size} nodes, but the carry is not an array of "
                f"their values. Pass nodes=, a function from the carry to such an array."
            )
        x = x.reshape((size, -1))
        if self.v is None:
            return jnp.sum(jax.vmap(lambda g, k: g(k))(self.g, x))
        return jnp.sum(jax.vmap(lambda g, k: g(k))(self.g, x - self.v))


class LocalQuadratic(Local):
    """A quadratic in the deviation of (carry, state) from (z, v); of the state alone if z is None.

    Deviations from an anchor keep the digits that large coefficients would lose in float32.
    """

    g: Quadratic
    z: Any
    v: Any
    others: Waiting | None = None

    def waiting(self, tree):
        return 0.0 if self.others is None else self.others(tree)

    def tilt(self, site, operands, carry, tree=None):
        mean, lower = gaussian(site, operands)
        g = self.g
        if self.z is not None:
            g = g.after(self.z.shape[0], float_part(carry)[0] - self.z)
        q, log_integral = tilt_gaussian(mean - self.v, lower, g, site.full_shape)
        return eqx.tree_at(lambda q: q.loc, q, q.loc + self.v), log_integral


class LocalTable(Local):
    """A table over the state."""

    g: Table
    others: Waiting | None = None

    def waiting(self, tree):
        return 0.0 if self.others is None else self.others(tree)

    def tilt(self, site, operands, carry, tree=None):
        return tilt_table(categories(site, operands), self.g, site.full_shape)


class LocalGamma(Local):
    """A gamma message on where an increment leads."""

    g: GammaMessage
    position: Callable[[Any], Any] | None = eqx.field(static=True)

    def tilt(self, site, operands, carry, tree=None):
        shape, rate = gamma_parameters(site, operands)
        where = tree()
        room = self.g.end - (where if self.position is None else self.position(where))
        return tilt_gamma(shape, rate, jnp.broadcast_to(room, site.full_shape), self.g)


def gamma_parameters(site: Any, operands: Any) -> tuple[Any, Any]:
    """Shape and rate of a gamma site, of its full shape."""
    if site.spec.family not in ("Gamma", "Exponential"):
        raise InvalidModel(
            f"ab.guided: site {site.address!r} ({site.where}) is {site.spec.family}; "
            f"ab.guiding.gamma tilts Gamma increments."
        )

    def one(ops):
        d = site.build(ops)
        while hasattr(d, "base_dist"):
            d = d.base_dist
        a = getattr(d, "concentration", jnp.ones(()))
        return jnp.broadcast_to(a, site.shape), jnp.broadcast_to(d.rate, site.shape)

    shape, rate = elementwise(site, one, operands)
    dtype = jnp.result_type(float)
    return shape.astype(dtype), rate.astype(dtype)
