"""Running a model for the members of an ensemble: latents drawn or known, observations simulated.

Nothing is weighed. At an observed site every member simulates what it would have observed, and the
expected value and the spread of that, where the distribution knows them; what follows in the
program sees the value that was observed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from abduce.errors import InvalidModel
from abduce.inference.smc.cloud import Cloud
from abduce.inference.smc.draws import draw_site, score_site
from abduce.inference.smc.ensemble_analysis import Prediction
from abduce.inference.smc.particles import Walker
from abduce.inference.smc.population import Population
from abduce.ppl import _jax
from abduce.ppl.interpreter import broadcast_operand
from abduce.ppl.replay import _draw
from abduce.ppl.site import Site, has_sites, unwrapped

__all__ = ["Crew", "Members"]


class Members(Cloud):
    """The state of a walk for an ensemble.

    Attributes:
        known: By address, values of latents of all members, `(N, ...)`; others are drawn.
        predictions: By address, what the members say of an observed site.
        looking: Whether predictions are wanted.
    """

    __slots__ = ("known", "looking", "predictions")

    def __init__(self, keys, inputs, n, *, known=None, looking=False):
        super().__init__(keys, inputs, Population.start(n))
        self.known = known or {}
        self.predictions: dict[str, Prediction] = {}
        self.looking = looking
        self.scans = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Crew(Walker):
    """The handler.

    Attributes:
        at_scan: Called as `at_scan(eqn, vals, state)` where a scan with sites stands.
    """

    at_scan: Any = None

    def equation(self, eqn: Any, vals: list[Any], state: Any) -> list[Any]:
        """One equation, for all members."""
        if eqn.primitive is _jax.scan_p and any(has_sites(s) for s in _jax.subjaxprs(eqn)):
            return self.at_scan(eqn, vals, state)
        return super().equation(eqn, vals, state)

    def _sample(self, site: Site, ops: list[Any], mapped: list[bool], state: Any) -> Any:
        given = state.inputs.get(site.address)
        seen, values = _observed(site, ops, mapped, given)
        if values is None:  # a latent
            value = self._value(site, ops, mapped, state)
            out = state.wrap(value)
            self._record(site, ops, mapped, out, state)
            return out
        if state.looking:
            simulated = self._simulate(site, ops, mapped, state)
            state.predictions[site.address] = _predict(
                site, ops, mapped, simulated, values, seen, self.n
            )
        if seen is None:
            return values
        hidden = state.known.get(site.address)
        if hidden is None:  # the same draw as in the prediction: one key
            hidden = self._simulate(site, ops, mapped, state)
        value = jnp.where(_wide(seen, site), values, hidden)
        out = state.wrap(value)
        self._record(site, ops, mapped, out, state)
        return out

    def _value(self, site, ops, mapped, state):
        known = state.known.get(site.address)
        return self._simulate(site, ops, mapped, state) if known is None else known

    def _simulate(self, site, ops, mapped, state):
        return draw_site(
            site, lambda k, o: _draw(site.build(o), k, site), state.keys[site.address], self.n,
            ops, mapped,
        )  # fmt: skip


def _observed(site: Site, ops: list[Any], mapped: list[bool], given: Any) -> tuple[Any, Any]:
    """Where a site is observed (None: everywhere), and the values (None: it is a latent)."""
    partly = "mask" in site.roles
    found = []
    if "obs" in site.roles:
        i = site.roles.index("obs")
        if mapped[i]:
            raise InvalidModel(
                f"ab.ensemble_kalman: site {site.address!r} ({site.where}) is observed at a value "
                f"that depends on a latent. Observe data: obs= an argument of the model, or given=."
            )
        values = jnp.broadcast_to(broadcast_operand(site, ops[i], i), site.full_shape)
        mask: Any = None
        if partly:
            j = site.roles.index("mask")
            mask = jnp.broadcast_to(
                broadcast_operand(site, ops[j], j), (*site.axis_sizes, *site.batch_shape)
            )
        found.append((mask, values))
    if given is not None:
        found.append((given.mask, given.value))
    if not found:
        return None, None
    mask, values = found[-1]
    if len(found) == 2 and mask is not None and found[0][0] is not None:
        values = jnp.where(_wide(mask, site), values, found[0][1])
        mask = mask | found[0][0]
    return mask, jnp.asarray(values).astype(site.dtype)


def _wide(mask: Any, site: Site) -> Any:
    """A mask with the site's event dimensions."""
    return mask.reshape(mask.shape + (1,) * (len(site.full_shape) - mask.ndim))


def _predict(site, ops, mapped, simulated, values, seen, n) -> Prediction:
    dtype = jnp.result_type(float)
    flat = lambda x: x.reshape((n, -1)).astype(dtype)  # noqa: E731
    everywhere = jnp.ones(site.full_shape, bool)
    seen = everywhere if seen is None else jnp.broadcast_to(_wide(seen, site), site.full_shape)
    simulated = flat(simulated)
    size = simulated.shape[1]
    moments = _moments(site, ops, mapped, n)
    if moments is None:
        means, noise = simulated, jnp.zeros((size, size), dtype)
    else:
        means, noise = flat(moments[0]), _noise(moments[1].astype(dtype), size)
    return Prediction(simulated, means, noise, values.reshape(-1).astype(dtype), seen.reshape(-1))


def _moments(site: Site, ops: Any, mapped: Any, n: int) -> tuple[Any, Any] | None:
    """Mean, and variance or covariance matrix, of each member's observation; None if not known."""

    def one(ops):
        d = site.build(ops)
        inner = unwrapped(d)
        mean = jnp.broadcast_to(d.mean, site.shape)
        if not inner.event_shape:
            return mean, jnp.broadcast_to(d.variance, site.shape)
        event = math.prod(inner.event_shape)
        lead = site.shape[: len(site.shape) - len(inner.event_shape)]
        return mean, jnp.broadcast_to(inner.covariance_matrix, (*lead, event, event))

    try:
        found = score_site(site, one, n, ops, mapped)
    except (NotImplementedError, AttributeError):
        return None
    if any(mapped):
        return found
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), found)


def _noise(spread: Any, size: int) -> Any:
    """The mean over the members, as one matrix; blocks where the spread is of matrices."""
    mean = jnp.mean(spread, 0)
    if mean.size == size:
        return jnp.diag(mean.reshape(-1))
    event = mean.shape[-1]
    blocks = mean.reshape((-1, event, event))
    return jax.scipy.linalg.block_diag(*blocks)


