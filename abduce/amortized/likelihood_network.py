"""Networks for the law of a site given its operands, and for the ratio to its marginal."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.counts import Counts, position
from abduce.amortized.encoder import robust_scale
from abduce.amortized.heads import Flow, Mixture
from abduce.amortized.networks import SIZES, Residual, cast, check_settings, squash
from abduce.errors import Degenerate, InvalidAlgorithm, InvalidModel

__all__ = ["LikelihoodSettings", "SiteNetwork", "SitePlan", "make_plan", "make_scales"]

HEADS = ("spline", "coupling", "mixture")


@dataclasses.dataclass(frozen=True)
class LikelihoodSettings:
    """What a likelihood network is made of; see `ab.nle` and `ab.nre`."""

    head: str = "spline"
    width: int = 64
    depth: int = 2
    context_dim: int = 64
    num_layers: int = 4
    num_bins: int = 8
    num_components: int = 8
    num_contrast: int = 5
    balance: float = 0.0
    precision: str | None = None

    def __post_init__(self):
        check_settings(self, HEADS, (*SIZES, "num_contrast"))
        if not (isinstance(self.balance, (int, float)) and 0 <= self.balance < math.inf):
            raise InvalidAlgorithm(f"balance={self.balance!r} must be at least 0.")


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """How an element of a site and its operands become numbers. Hashable.

    Attributes:
        address: Of the site.
        shape: Of one element.
        dtype: Of a value.
        kind: 'real', 'positive' or 'counts'.
        low: Least count, or None.
        operands: Index, shape and kind ('real' or 'positive') of those that vary.
        num_operands: How many the site has.
    """

    address: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    low: int | None
    operands: tuple[tuple[int, tuple[int, ...], str], ...]
    num_operands: int

    @property
    def dim(self) -> int:
        """Numbers in an element."""
        return math.prod(self.shape)

    @property
    def operand_dim(self) -> int:
        """Numbers in the operands."""
        return sum(math.prod(s) for _, s, _ in self.operands)

    def value(self, y: Any) -> tuple[Any, Any]:
        """An element on the whole line, shape `(dim,)`, and the log determinant of the map."""
        x = jnp.asarray(y).astype(jnp.result_type(float)).reshape(-1)
        if self.kind == "positive":
            log = jnp.log(jnp.where(x > 0, x, 1.0))
            return log, jnp.where(jnp.all(x > 0), -jnp.sum(log), -jnp.inf)
        return x, jnp.zeros((), x.dtype)

    def place(self, y: Any) -> Any:
        """A value for networks: counts on their logistic scale."""
        x, _ = self.value(y)
        return position(x) if self.kind == "counts" else x

    def features(self, operands: Any) -> Any:
        """The operands as a vector, not standardized."""
        parts = []
        for i, _, kind in self.operands:
            x = jnp.asarray(operands[i]).astype(jnp.result_type(float)).reshape(-1)
            if kind == "positive":
                x = jnp.log(jnp.maximum(x, jnp.finfo(x.dtype).tiny))
            parts.append(x)
        return jnp.concatenate(parts)


def make_plan(name: str, info: Any, values: Any, operands: Any) -> SitePlan:
    """Reads a site off simulations of it.

    Args:
        name: Of the estimator, for messages.
        info: The site.
        values: `(elements, *shape)`.
        operands: Each `(elements, ...)`.

    Raises:
        InvalidModel: The law depends on nothing that varies, or on something that is no number.
        Degenerate: No value is finite.
    """
    values = np.asarray(values)
    if not np.isfinite(np.asarray(values, np.float64)).any():
        raise Degenerate(f"ab.{name}.fit: no simulated value of site {info.address!r} is finite.")
    used = []
    for i, x in enumerate(operands):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            raise InvalidModel(
                f"ab.{name}: the law of site {info.address!r} ({info.site.where}) depends on a "
                f"random key, which is no parameter. Let the simulator draw from its own key."
            )
        x = np.asarray(x)
        if (x != x[:1]).any():
            positive = x.dtype.kind == "f" and (x > 0).all()
            used.append((i, tuple(x.shape[1:]), "positive" if positive else "real"))
    if not used:
        raise InvalidModel(
            f"ab.{name}: the law of site {info.address!r} ({info.site.where}) depends on nothing "
            f"that is drawn before it, so there is no likelihood to learn."
        )
    kind, low = "real", None
    if values.dtype.kind in "iub":
        kind, low = "counts", 0 if values.min() >= 0 else None
    elif (values[np.isfinite(values)] > 0).all():
        kind = "positive"
    return SitePlan(
        info.address, tuple(info.site.shape), str(np.dtype(info.dtype)), kind, low, tuple(used),
        len(operands),
    )  # fmt: skip


def make_scales(plan: SitePlan, values: Any, operands: Any) -> dict[str, Any]:
    """Centre and spread of values and operands, and the range of the operands in training."""
    dtype = jnp.result_type(float)
    y = jax.vmap(plan.place)(values)
    x = np.asarray(jax.vmap(plan.features)(operands), np.float64)

    def pair(z):
        return tuple(jnp.asarray(part, dtype) for part in robust_scale(z))

    return {
        "value": pair(y), "operands": pair(x),
        "range": (jnp.asarray(x.min(0), dtype), jnp.asarray(x.max(0), dtype)),
    }  # fmt: skip


class SiteNetwork(eqx.Module):
    """The law of an element given its operands, or its ratio to the marginal law.

    Args:
        key: Typed PRNG key.
        plan: The site.
        settings: Sizes.
        ratio: Whether to learn the ratio.
    """

    encoder: Residual
    head: Any
    precision: str | None = eqx.field(static=True)

    def __init__(self, key: Any, plan: SitePlan, settings: LikelihoodSettings, ratio: bool):
        k1, k2 = jax.random.split(key)
        s = settings
        inputs = plan.operand_dim + (plan.dim if ratio else 0)
        self.encoder = Residual(
            k1, inputs, 1 if ratio else s.context_dim, s.width, s.depth, 0.0 if ratio else 1.0
        )
        self.head = None
        self.precision = s.precision
        if ratio:
            return
        if plan.kind == "counts":
            self.head = Counts(k2, s.context_dim, plan.dim, s.width, s.num_components, plan.low)
        elif s.head == "mixture":
            self.head = Mixture(k2, s.context_dim, plan.dim, s.num_components)
        else:
            self.head = Flow(
                k2, s.context_dim, plan.dim, s.num_layers, (s.width, s.width), s.num_bins,
                s.head == "coupling",
            )  # fmt: skip

    def _encode(self, x: Any) -> Any:
        me, x = cast((self.encoder, squash(x)), self.precision)
        return me(x).astype(jnp.result_type(float))

    def _context(self, plan: SitePlan, scales: Any, operands: Any) -> Any:
        centre, spread = scales["operands"]
        return (plan.features(operands) - centre) / spread

    def log_density(self, plan: SitePlan, scales: Any, y: Any, operands: Any) -> Any:
        """Of one element, in nats."""
        context = self._encode(self._context(plan, scales, operands))
        x, log_det = plan.value(y)
        centre, spread = scales["value"]
        if plan.kind == "counts":
            return self.head.log_density(context, x, (centre, spread))
        total = self.head.log_density(context, (x - centre) / spread)
        return total + log_det - jnp.sum(jnp.log(spread))

    def log_ratio(self, plan: SitePlan, scales: Any, y: Any, operands: Any) -> Any:
        """Logarithm of the density of one element over its marginal density."""
        centre, spread = scales["value"]
        z = (plan.place(y) - centre) / spread
        both = jnp.concatenate([self._context(plan, scales, operands), z])
        return self._encode(both)[0]

    def draw(self, plan: SitePlan, scales: Any, key: Any, operands: Any) -> Any:
        """One element."""
        context = self._encode(self._context(plan, scales, operands))
        centre, spread = scales["value"]
        if plan.kind == "counts":
            x = self.head.draw(context, key, (centre, spread))
        else:
            noise = jax.random.normal(key, (self.head.noise_dim,), centre.dtype)
            x = centre + spread * self.head.draw(context, noise)[0]
            x = jnp.exp(x) if plan.kind == "positive" else x
        return x.reshape(plan.shape).astype(plan.dtype)
