"""What every bijection of a normalizing flow is.

A bijection maps a vector `x` of `dim` numbers to `y` and back, each direction together with its
log determinant `log |det dy/dx|`. It is an Equinox module whose array leaves are all parameters,
and at the same time a NumPyro `Transform`, so it goes wherever one of those goes:
`dist.TransformedDistribution`, `ab.reparam`, `ab.bijection`.

Papamakarios, Nalisnick, Rezende, Mohamed and Lakshminarayanan, "Normalizing Flows for
Probabilistic Modeling and Inference", JMLR 2021, is the survey behind the choice of bijections.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from abduce.errors import InvalidValue

__all__ = ["Bijection", "Conditioned", "Inverse", "check_count"]


class _RegisteredByEquinox:
    """NumPyro registers every subclass of `Transform` as a pytree; Equinox already does."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


class Bijection(eqx.Module, _RegisteredByEquinox, Transform):
    """A differentiable map of R^dim onto itself with a differentiable inverse.

    `forward` and `inverse` take one vector; use `jax.vmap` for more. As a NumPyro `Transform` the
    bijection acts on the last axis of an array of any shape.

    A subclass has the fields `dim` and `context_dim` (static) and the methods `_forward` and
    `_backward`.

    Attributes:
        dim: Length of a vector.
        context_dim: Length of the context on which the map depends; 0 for none.
    """

    dim: eqx.AbstractVar[int]
    context_dim: eqx.AbstractVar[int]

    def forward(self, x: Any, context: Any = None) -> tuple[jax.Array, jax.Array]:
        """From the base space to the data space, the direction of sampling.

        Args:
            x: Shape `(dim,)`.
            context: Shape `(context_dim,)`; None for a bijection without context.

        Returns:
            y: Shape `(dim,)`.
            log_det: `log |det dy/dx|`, shape `()`.

        Raises:
            InvalidValue: A shape is not the one above.
        """
        return self._forward(*self._checked(x, context, "forward"))

    def inverse(self, y: Any, context: Any = None) -> tuple[jax.Array, jax.Array]:
        """From the data space to the base space, the direction of densities.

        Args:
            y: Shape `(dim,)`.
            context: Shape `(context_dim,)`; None for a bijection without context.

        Returns:
            x: Shape `(dim,)`.
            log_det: `log |det dx/dy|`, shape `()`: minus that of `forward` at `x`.

        Raises:
            InvalidValue: A shape is not the one above.
        """
        return self._backward(*self._checked(y, context, "inverse"))

    def condition(self, context: Any) -> "Conditioned":
        """The bijection at a fixed context, which then needs none.

        Args:
            context: Shape `(..., context_dim)`. Leading axes broadcast against those of the values
                when the result is used as a NumPyro `Transform`.
        """
        return Conditioned(self, context)

    def _forward(self, x: Any, context: Any) -> tuple[jax.Array, jax.Array]:
        """`forward` without its checks."""
        raise NotImplementedError

    def _backward(self, y: Any, context: Any) -> tuple[jax.Array, jax.Array]:
        """`inverse` without its checks."""
        raise NotImplementedError

    def _checked(self, x: Any, context: Any, method: str) -> tuple[jax.Array, Any]:
        name = type(self).__name__
        x = _as_float(x)
        if x.shape != (self.dim,):
            raise InvalidValue(
                f"{name}.{method} takes one vector of shape ({self.dim},), got {x.shape}. For "
                f"several, jax.vmap(flow.{method})(values)."
            )
        if context is None:
            self._check_needs_no_context()
            return x, None
        context = _as_float(context)
        if not self.context_dim:
            raise InvalidValue(
                f"{name}.{method} got a context of shape {context.shape}, but this {name} takes "
                f"none. Make it with context_dim={context.shape[-1] if context.ndim else 1}."
            )
        if context.shape != (self.context_dim,):
            raise InvalidValue(
                f"{name}.{method} takes a context of shape ({self.context_dim},), got "
                f"{context.shape}. For several, jax.vmap(flow.{method})(values, contexts)."
            )
        return x, context

    def _check_needs_no_context(self) -> None:
        if self.context_dim:
            raise InvalidValue(
                f"this {type(self).__name__} depends on a context of shape ({self.context_dim},), "
                f"but none was given. Pass context=, or fix it: flow.condition(context)."
            )

    # Which directions are one pass over the network, rather than one per coordinate or iteration.
    @property
    def fast_forward(self) -> bool:
        """Whether `forward` is as cheap as one evaluation."""
        return True

    @property
    def fast_inverse(self) -> bool:
        """Whether `inverse` is as cheap as one evaluation."""
        return True

    # NumPyro's protocol, over any leading axes.
    @property
    def domain(self) -> Any:
        """NumPyro's name for where the map starts."""
        return constraints.real_vector

    @property
    def codomain(self) -> Any:
        """NumPyro's name for where the map ends."""
        return constraints.real_vector

    @property
    def inv(self) -> "Bijection":
        """The inverse map."""
        return Inverse(self)

    def __call__(self, x: Any) -> jax.Array:
        return self._over_axes(x)[0]

    def _inverse(self, y: Any) -> jax.Array:
        return self._over_axes(y, inverse=True)[0]

    def call_with_intermediates(self, x: Any) -> tuple[jax.Array, jax.Array]:
        """The value, and the log determinant for `log_abs_det_jacobian`."""
        return self._over_axes(x)

    def inverse_with_log_det(self, y: Any) -> tuple[jax.Array, jax.Array]:
        """`inverse` over any leading axes."""
        return self._over_axes(y, inverse=True)

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> jax.Array:
        """The log determinant of `forward`, shape of `x` without its last axis."""
        if intermediates is not None:
            return intermediates
        if self.fast_forward or not self.fast_inverse:
            return self._over_axes(x)[1]
        return -self._over_axes(y, inverse=True)[1]

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the values, which is that of the arguments."""
        if not shape or shape[-1] != self.dim:
            raise InvalidValue(
                f"{type(self).__name__} acts on vectors of length {self.dim}, the last axis; got "
                f"shape {tuple(shape)}."
            )
        return tuple(shape)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the arguments, which is that of the values."""
        return self.forward_shape(shape)

    def _over_axes(self, x: Any, *, inverse: bool = False) -> tuple[jax.Array, jax.Array]:
        self._check_needs_no_context()
        x = _as_float(x)
        self.forward_shape(x.shape)
        run = self._backward if inverse else self._forward
        return jnp.vectorize(lambda v: run(v, None), signature="(d)->(d),()")(x)


class Inverse(Bijection):
    """A bijection run backwards: its `forward` is the other's `inverse`.

    `Inverse(MaskedAutoregressive(...))` is the inverse autoregressive flow: fast to sample, slow
    to score.

    Args:
        bijection: What to invert.
    """

    bijection: Bijection

    @property
    def dim(self) -> int:
        return self.bijection.dim

    @property
    def context_dim(self) -> int:
        return self.bijection.context_dim

    @property
    def fast_forward(self) -> bool:
        return self.bijection.fast_inverse

    @property
    def fast_inverse(self) -> bool:
        return self.bijection.fast_forward

    @property
    def inv(self) -> "Bijection":
        return self.bijection

    def _forward(self, x, context):
        return self.bijection._backward(x, context)

    def _backward(self, y, context):
        return self.bijection._forward(y, context)

    def _over_axes(self, x, *, inverse=False):
        return self.bijection._over_axes(x, inverse=not inverse)

    def forward_shape(self, shape):
        return self.bijection.inverse_shape(shape)

    def inverse_shape(self, shape):
        return self.bijection.forward_shape(shape)


class Conditioned(Bijection):
    """A bijection at a fixed context; `bijection.condition(context)` makes it.

    Args:
        bijection: One with `context_dim > 0`.
        context: Shape `(..., context_dim)`. With leading axes it is a batch of bijections, for
            use as a NumPyro `Transform`: the axes broadcast against those of the values.
    """

    bijection: Bijection
    context: jax.Array

    def __init__(self, bijection: Bijection, context: Any):
        context = _as_float(context)
        if not bijection.context_dim:
            raise InvalidValue(
                f"this {type(bijection).__name__} takes no context. Make it with context_dim="
                f"{context.shape[-1] if context.ndim else 1}."
            )
        if context.shape[-1:] != (bijection.context_dim,):
            raise InvalidValue(
                f"{type(bijection).__name__} takes a context of shape (..., "
                f"{bijection.context_dim}), got {context.shape}."
            )
        self.bijection, self.context = bijection, context

    @property
    def dim(self) -> int:
        return self.bijection.dim

    @property
    def context_dim(self) -> int:
        return 0

    @property
    def fast_forward(self) -> bool:
        return self.bijection.fast_forward

    @property
    def fast_inverse(self) -> bool:
        return self.bijection.fast_inverse

    def _forward(self, x, context):
        return self._at_one_context(self.bijection._forward, x)

    def _backward(self, y, context):
        return self._at_one_context(self.bijection._backward, y)

    def _at_one_context(self, function, x):
        if self.context.ndim != 1:
            raise InvalidValue(
                f"a bijection conditioned on contexts of shape {self.context.shape} is a batch of "
                f"{self.context.shape[:-1]}: call it on values of shape (..., {self.dim}), or use "
                f"jax.vmap(lambda x, c: flow.forward(x, c))(values, contexts)."
            )
        return function(x, self.context)

    def _over_axes(self, x, *, inverse=False):
        x = _as_float(x)
        self.forward_shape(x.shape)
        run = self.bijection._backward if inverse else self.bijection._forward
        return jnp.vectorize(run, signature="(d),(c)->(d),()")(x, self.context)

    def forward_shape(self, shape):
        shape = super().forward_shape(shape)
        try:
            batch = np.broadcast_shapes(shape[:-1], self.context.shape[:-1])
        except ValueError:
            raise InvalidValue(
                f"values of shape {shape} and contexts of shape {self.context.shape} do not "
                f"broadcast but for their last axes."
            ) from None
        return (*batch, shape[-1])


def check_count(owner: str, name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least `least`, as a Python int."""
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_whole or value < least:
        raise InvalidValue(f"{owner}: {name} must be a whole number >= {least}, got {value!r}.")
    return int(value)


def _as_float(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.result_type(float))
