"""Flows as distributions."""

from __future__ import annotations

from typing import Any

import jax
import numpyro.distributions as dist
from numpyro.distributions.util import sum_rightmost, validate_sample

from abduce.errors import InvalidValue
from abduce.inference.vi.flows.bijection import Bijection

__all__ = ["Flow", "distribution"]


class Flow(dist.TransformedDistribution):
    """A base distribution pushed through bijections; `flows.distribution` makes it.

    A NumPyro `TransformedDistribution` that computes values and log determinants together, in
    `log_prob` by one inverse pass and in `sample_and_log_prob` without any.
    """

    def sample_and_log_prob(
        self, key: Any, sample_shape: tuple[int, ...] = ()
    ) -> tuple[jax.Array, jax.Array]:
        """Draws, and their log densities, by the forward direction alone.

        For a planar or an inverse autoregressive flow this is far cheaper than `log_prob` of the
        draw, and exact where that is the result of an iteration.

        Args:
            key: Typed PRNG key.
            sample_shape: Leading axes.

        Returns:
            value: Shape `sample_shape + batch_shape + event_shape`.
            log_prob: In nats, shape `sample_shape + batch_shape`.
        """
        value, intermediates = self.sample_with_intermediates(key, sample_shape)
        return value, super().log_prob(value, intermediates)

    @validate_sample
    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        """Log density in nats, shape `value.shape` without the event."""
        if intermediates is not None:
            return super().log_prob(value, intermediates)
        event_dim = len(self.event_shape)
        total: Any = 0.0
        for transform in reversed(self.transforms):
            batch_ndim = event_dim - transform.codomain.event_dim
            if isinstance(transform, Bijection):
                value, log_det = transform.inverse_with_log_det(value)
            else:
                x = transform.inv(value)
                log_det = -transform.log_abs_det_jacobian(x, value)
                value = x
            total = total + sum_rightmost(log_det, batch_ndim)
            event_dim = transform.domain.event_dim + batch_ndim
        base_log_prob = self.base_dist.log_prob(value)
        return total + sum_rightmost(base_log_prob, event_dim - len(self.base_dist.event_shape))


def distribution(
    bijection: Bijection,
    base: dist.Distribution | None = None,
    *,
    context: Any = None,
    support: Any = None,
) -> Flow:
    """The law of `bijection(x)` for `x` from the base, for `ab.sample` or anywhere else.

    Its density is `log p(y) = log p(x) + log |det dx/dy|`, exact wherever the inverse is.

    Args:
        bijection: Of dimension `dim`.
        base: A distribution of event shape `(dim,)` on all of R^dim (or of batch shape `(dim,)`
            over scalars, which are then taken as independent); the standard normal by default.
        context: Shape `(..., context_dim)`, for a bijection that takes one; leading axes become
            the batch shape.
        support: A NumPyro constraint for the values; the bijection from the real numbers onto it
            is applied last. By default all of R^dim.

    Raises:
        InvalidValue: A shape does not fit, a context is missing or superfluous, or no bijection
            onto the support is known.

    Example:
        >>> flow = flows.spline_coupling(key, dim=3, num_layers=4)
        >>> z = ab.sample("z", flows.distribution(flow))
        >>> p = ab.sample("p", flows.distribution(flow, support=dist.constraints.simplex))
    """
    if not isinstance(bijection, Bijection):
        raise InvalidValue(
            f"flows.distribution takes a bijection, got {type(bijection).__name__}. Make one with "
            f"flows.spline_coupling(key, dim, num_layers)."
        )
    if context is not None:
        bijection = bijection.condition(context)
    bijection._check_needs_no_context()
    if base is None:
        base = dist.Normal(0.0, 1.0).expand([bijection.dim]).to_event(1)
    shape = tuple(base.batch_shape) + tuple(base.event_shape)
    if len(base.event_shape) > 1 or shape[-1:] != (bijection.dim,):
        raise InvalidValue(
            f"flows.distribution: the bijection acts on vectors of length {bijection.dim}, but the "
            f"base has batch shape {tuple(base.batch_shape)} and event shape "
            f"{tuple(base.event_shape)}. Use dist.Normal(0, 1).expand([{bijection.dim}])"
            f".to_event(1)."
        )
    transforms: list[Any] = [bijection]
    if support is not None:
        try:
            onto = dist.biject_to(support)
        except NotImplementedError:
            raise InvalidValue(
                f"flows.distribution: no bijection from the real numbers onto {support} is known."
            ) from None
        if onto.domain.event_dim > 1:
            raise InvalidValue(
                f"flows.distribution: {support} is a support of arrays with more than one axis; a "
                f"flow gives vectors of length {bijection.dim}."
            )
        if not isinstance(onto, dist.transforms.IdentityTransform):
            transforms.append(onto)
    return Flow(base, transforms)
