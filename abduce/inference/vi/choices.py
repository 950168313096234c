"""One random choice of an objective: its value and its log factor, by its strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from abduce.inference.vi.strategies import alternative, inspect, zero_valued
from abduce.inference.vi.tape import Input
from abduce.ppl.densities import log_prob
from abduce.ppl.site import Site, elementwise, unwrapped

__all__ = ["draw_choice", "parameter_axes"]


def draw_choice(
    site: Site, strategy: Any, operands: Sequence[Any], keys: Any, given: Input, *,
    varied: str | None, misfit: bool,
) -> dict[str, Any]:  # fmt: skip
    """Draws a site by its strategy.

    Args:
        site: Of kind 'sample', not wholly observed.
        strategy: Its strategy.
        operands: Of the equation.
        keys: One per element.
        given: What is set from outside.
        varied, misfit: As in `Credit`.

    Returns:
        'value'; 'factor', the log factor of each element, for credited strategies; 'extra', what a
        baseline adds.
    """
    which = given.which

    def element(ops, key, index, mask, baseline, target):
        d = site.build(ops)
        guard = site.operand(ops, "guard")
        out: dict[str, Any] = {}
        if index is not None:  # one term of the sum over the support
            x = alternative(d, index)
            size = strategy.num_alternatives(site)
            factor = log_prob(d, x) + jnp.log(jnp.asarray(size, jnp.result_type(float)))
        elif hasattr(strategy, "alternative"):
            x, _ = strategy.draw(d, key)
            coefficient = strategy.drawn(d, x)
            factor = jnp.zeros(site.batch_shape)
            if varied == site.address:
                other, c = strategy.alternative(d, x, jax.random.fold_in(key, 2), which)
                event = (1,) * (jnp.ndim(x) - mask.ndim)
                x = jnp.where(mask.reshape(mask.shape + event), other, x)
                x = jax.lax.stop_gradient(x).astype(site.dtype)
                factor = jnp.where(mask, zero_valued(c), 0.0)
            elif coefficient is not None and varied is None:
                factor = zero_valued(coefficient)
        else:
            x, factor = strategy.draw(d, key)
        x = jnp.asarray(x).astype(site.dtype)
        if factor is not None and strategy.credited:
            if "mask" in site.roles:
                factor = jnp.where(site.operand(ops, "mask"), 0.0, factor)
            if guard is not None:
                factor = jnp.where(guard, factor, 0.0)
            out["factor"] = jnp.broadcast_to(factor, site.batch_shape)
            learned = site.operand(ops, "baseline")
            if misfit:
                if learned is not None and target is not None:
                    out["extra"] = _guarded(guard, jnp.square(target - learned))
            elif varied is None:
                b = learned if learned is not None else baseline
                if b is not None:
                    out["extra"] = -jax.lax.stop_gradient(b) * out["factor"]
        if "mask" in site.roles:
            m: Any = site.operand(ops, "mask")
            m = m.reshape(m.shape + (1,) * (x.ndim - m.ndim))
            seen: Any = site.operand(ops, "obs")
            x = jnp.where(m, seen.astype(x.dtype), x)
        if guard is not None and jnp.issubdtype(site.dtype, jnp.inexact):
            x = jnp.where(guard, x, jax.lax.stop_gradient(x))
        out["value"] = x
        return out

    return elementwise(
        site, element, operands, keys, given.index, given.mask, given.baseline, given.target
    )


def _guarded(guard: Any, x: Any) -> Any:
    return x if guard is None else jnp.where(guard, x, 0.0)


def parameter_axes(site: Site, i: int) -> bool:
    """Whether the leading axes of a parameter are the batch axes of the distribution."""
    if site.roles[i] != "leaf":
        return False

    def ranks(d):
        inner = unwrapped(d)
        events = {c.event_dim for c in inner.arg_constraints.values()}
        return events, len(d.event_shape) - len(inner.event_shape)

    events, extra = inspect(site, ranks)
    shape, _ = site.spec.avals[[j for j, r in enumerate(site.roles) if r == "leaf"].index(i)]
    nb = len(site.batch_shape)
    return (
        len(events) == 1
        and len(shape) == nb + extra + next(iter(events))
        and tuple(shape[:nb]) == site.batch_shape
    )
