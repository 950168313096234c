"""Unconstrained coordinates of some addresses, and laws of addresses made from mixtures there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution, biject_to, constraints

from abduce.amortized.mixtures import GaussianMixture
from abduce.errors import DiscreteLatent, InvalidModel
from abduce.inference.kernel_density import Support
from abduce.ppl.language import sample
from abduce.ppl.model import Model
from abduce.ppl.program import SiteInfo

__all__ = ["Coordinates", "MixtureLaw", "MixtureModel", "emit_mixture", "make_coordinates"]


@dataclasses.dataclass(frozen=True)
class Part:
    """One address: its coordinates are `vector[start:stop]`."""

    address: str
    shape: tuple[int, ...]
    support: Support
    start: int
    stop: int

    @property
    def inner_shape(self) -> tuple[int, ...]:
        """Shape of the coordinates."""
        return tuple(biject_to(self.support.constraint).inverse_shape(self.shape))


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """The coordinates of several addresses in one vector; hashable."""

    parts: tuple[Part, ...]

    @property
    def dim(self) -> int:
        """Length of the vector."""
        return self.parts[-1].stop if self.parts else 0

    @property
    def addresses(self) -> tuple[str, ...]:
        """In the order of the vector."""
        return tuple(p.address for p in self.parts)

    def to_values(self, u: Any) -> dict[str, Any]:
        """Values by address at coordinates `u`, shape `(dim,)`."""
        out = {}
        for p in self.parts:
            x = biject_to(p.support.constraint)(u[p.start : p.stop].reshape(p.inner_shape))
            out[p.address] = x.reshape(p.shape)
        return out

    def to_vector(self, values: Mapping[str, Any]) -> tuple[Any, Any]:
        """Coordinates of values, and the log Jacobian of the values by the coordinates."""
        us, log_det = [], jnp.zeros((), jnp.result_type(float))
        for p in self.parts:
            transform = biject_to(p.support.constraint)
            x = jnp.asarray(values[p.address])
            u = transform._inverse(x)
            log_det = log_det + jnp.sum(transform.log_abs_det_jacobian(u, x))
            us.append(u.reshape(-1))
        return jnp.concatenate(us), log_det

    def to_config(self) -> list[Any]:
        """As plain values, for saving."""
        return [(p.address, p.shape, _encode(p.support.constraint)) for p in self.parts]

    @classmethod
    def from_config(cls, config: list[Any]) -> Coordinates:
        """The inverse of `to_config`."""
        return arrange((a, tuple(shape), _decode(c)) for a, shape, c in config)


def arrange(items: Any) -> Coordinates:
    """Coordinates of `(address, shape, constraint)`, one after the other."""
    parts, start = [], 0
    for address, shape, constraint in items:
        size = math.prod(biject_to(constraint).inverse_shape(shape))
        parts.append(Part(address, tuple(shape), Support(constraint), start, start + size))
        start += size
    return Coordinates(tuple(parts))


def make_coordinates(
    name: str, sites: Mapping[str, SiteInfo], addresses: Any, laws: Mapping[str, Any]
) -> Coordinates:
    """Coordinates of sites of a model.

    Args:
        name: Of the estimator, for messages.
        sites: Of the program.
        addresses: Which.
        laws: Distributions by address, for sites whose support depends on numbers.

    Raises:
        DiscreteLatent: A site is discrete.
        InvalidModel: Its support depends on other choices, or it is in a branch.
    """
    items = []
    for a in addresses:
        info = sites[a]
        if info.is_discrete:
            raise DiscreteLatent(
                f"ab.{name}: site {a!r} is {info.family}, shape {info.shape}, and mixtures of "
                f"normals are laws of continuous sites. Sum it out with ab.marginal, or leave it "
                f"out of prior= and target=."
            )
        support = info.site.spec.support
        if support is None and laws.get(a) is not None:
            support = laws[a].support
        try:
            if support is None or constraints.is_dependent(support) or info.conditional:
                raise NotImplementedError
            biject_to(support)
            constraint = Support(support).constraint
            _encode(constraint)
        except (NotImplementedError, TypeError):
            raise InvalidModel(
                f"ab.{name}: site {a!r} ({info.family}, {info.site.where}) is in a branch, or its "
                f"support depends on other choices, so it has no unconstrained coordinates of its "
                f"own. Draw a standardized variable instead and transform it."
            ) from None
        items.append((a, info.shape, constraint))
    return arrange(items)


_NAMED = (
    "real", "positive", "nonnegative", "unit_interval", "simplex", "real_vector", "ordered_vector",
    "positive_ordered_vector", "corr_cholesky", "lower_cholesky", "positive_definite", "circular",
    "softplus_positive", "softplus_lower_cholesky", "scaled_unit_lower_cholesky", "corr_matrix",
    "unit_interval", "sphere",
)  # fmt: skip


def _encode(constraint: Any) -> Any:
    if isinstance(constraint, type(constraints.independent(constraints.real, 1))):
        inner = _encode(constraint.base_constraint)
        return {"name": "independent", "base": inner, "ndims": constraint.reinterpreted_batch_ndims}
    for name in _NAMED:
        known = getattr(constraints, name, None)
        if known is not None and type(known) is type(constraint) and known == constraint:
            return {"name": name}
    for name, fields in (
        ("interval", ("lower_bound", "upper_bound")),
        ("greater_than", ("lower_bound",)),
        ("less_than", ("upper_bound",)),
    ):
        if type(constraint) is type(getattr(constraints, name)(*(0.0,) * len(fields))):
            return {"name": name, **{f: np.asarray(getattr(constraint, f)) for f in fields}}
    raise NotImplementedError(repr(constraint))


def _decode(config: Any) -> Any:
    name = config["name"]
    if name == "independent":
        return constraints.independent(_decode(config["base"]), config["ndims"])
    if name in _NAMED:
        return getattr(constraints, name)
    if name not in ("interval", "greater_than", "less_than"):
        raise InvalidModel(f"a saved estimator has a support {name!r} that is not known here.")
    bounds = [config[f] for f in ("lower_bound", "upper_bound") if f in config]
    return getattr(constraints, name)(*bounds)


class MixtureLaw(Distribution):
    """The law of one address whose coordinates are a mixture; an event of its whole shape.

    Args:
        mixture: Of the flattened coordinates.
        support: The constraint, wrapped.
        shape: Of a value.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    pytree_data_fields = ("mixture",)
    pytree_aux_fields = ("support_",)

    def __init__(self, mixture: GaussianMixture, support: Support, shape: tuple[int, ...]):
        self.mixture, self.support_ = mixture, support
        super().__init__(batch_shape=(), event_shape=tuple(shape))

    @property
    def support(self):
        inner = self.support_.constraint
        return constraints.independent(inner, len(self.event_shape) - inner.event_dim)

    def sample(self, key, sample_shape=()):
        u = self.mixture.sample(key, math.prod(sample_shape))
        transform = biject_to(self.support_.constraint)
        inner = tuple(transform.inverse_shape(self.event_shape))
        return transform(u.reshape((*sample_shape, *inner)))

    def log_prob(self, value, intermediates=None):
        transform = biject_to(self.support_.constraint)
        lead = jnp.shape(value)[: jnp.ndim(value) - len(self.event_shape)]
        u = transform._inverse(value)
        log_det = transform.log_abs_det_jacobian(u, value)
        log_det = jnp.sum(jnp.reshape(log_det, (*lead, -1)), -1)
        return (
            jnp.vectorize(self.mixture.log_prob, signature="(d)->()")(u.reshape((*lead, -1)))
            - log_det
        )


def emit_mixture(mixture: GaussianMixture, coordinates: Coordinates) -> dict[str, Any]:
    """Samples every address, each from its exact conditional law given those before."""
    out: dict[str, Any] = {}
    for p in coordinates.parts:
        size = p.stop - p.start
        law = MixtureLaw(mixture.marginal(range(size)), p.support, p.shape)
        if mixture.dim == size:
            law = MixtureLaw(mixture, p.support, p.shape)
        out[p.address] = sample(p.address, law)
        if p.stop < coordinates.dim:
            u = biject_to(p.support.constraint)._inverse(out[p.address]).reshape(-1)
            mixture = mixture.condition(size, u)
    return out


class MixtureModel(Model):
    """A Model whose addresses are a mixture in coordinates; arguments are ignored."""

    mixture: GaussianMixture
    coordinates: Coordinates = eqx.field(static=True)
    algorithm: Any = None

    @property
    def name(self) -> str:
        return "mixture"

    def emit(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Samples every address."""
        return emit_mixture(self.mixture, self.coordinates)
