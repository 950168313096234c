"""Distributions of one number, as networks predict them: classes, and mixtures of normals.

Every one is a NumPyro distribution with `quantile`, `std` and `interval` besides, and its batch
shape is read off its arrays, so that it may be returned from `jax.vmap`.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import logsumexp, ndtr
from numpyro.distributions import constraints

from abduce.errors import InvalidValue

__all__ = ["Classes", "Mixture", "Predictive", "within"]


class Predictive(dist.Distribution):
    """A predictive distribution of a scalar; the base of `Bars`, `Classes` and `Mixture`.

    `logits`, shape `batch_shape + (K,)`, is the first of `arrays`; the other arrays are laid out
    along its leading axes.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    arrays: ClassVar[tuple[str, ...]] = ("logits",)
    settings: ClassVar[tuple[str, ...]] = ()
    logits: Any

    def __init__(self):
        super().__init__(batch_shape=(), event_shape=(), validate_args=False)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the predicted numbers."""
        return jnp.shape(self.logits)[:-1]

    def tree_flatten(self):
        return tuple(getattr(self, a) for a in self.arrays), tuple(
            getattr(self, a) for a in self.settings
        )

    @classmethod
    def tree_unflatten(cls, aux, leaves):
        self = cls.__new__(cls)
        for name, x in zip((*cls.arrays, *cls.settings), (*leaves, *aux), strict=True):
            setattr(self, name, x)
        dist.Distribution.__init__(self, (), (), validate_args=False)
        return self

    @property
    def log_mass(self) -> Any:
        """Log probability of each bar, class or component, shape `batch_shape + (K,)`."""
        return jax.nn.log_softmax(self.logits, axis=-1)

    @property
    def std(self) -> Any:
        """Standard deviation, shape `batch_shape`."""
        return jnp.sqrt(self.variance)

    def quantile(self, q: Any) -> Any:
        """Quantiles.

        Args:
            q: Probabilities, any shape.

        Returns:
            Shape `q.shape + batch_shape`.

        Raises:
            InvalidValue: A probability is outside [0, 1].
        """
        if not isinstance(q, jax.core.Tracer):
            q = np.asarray(q, np.float64)
            if not ((q >= 0) & (q <= 1)).all():
                raise InvalidValue(f"quantile: probabilities lie between 0 and 1, got {q}.")
        q = jnp.asarray(q, jnp.result_type(float))
        return self.icdf(q.reshape(q.shape + (1,) * len(self.batch_shape)))

    def interval(self, level: float = 0.9) -> tuple[Any, Any]:
        """The central interval with probability `level`: lower and upper end."""
        low, high = self.quantile(jnp.array([(1 - level) / 2, (1 + level) / 2]))
        return low, high

    def _beside(self, x: Any) -> Any:
        """An array `(..., j)` that has some of the leading axes of the logits, aligned to them."""
        missing = jnp.ndim(self.logits) - jnp.ndim(x)
        return x.reshape((*x.shape[:-1], *(1,) * max(missing, 0), x.shape[-1]))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch_shape={self.batch_shape}, K={self.logits.shape[-1]})"


class Classes(Predictive):
    """Probabilities of the integers `low, ..., low + K - 1`.

    An open end stands for that integer and everything beyond it, with probabilities that halve
    from one integer to the next: counts have no largest value.

    Args:
        logits: Unnormalized log probabilities, shape `(..., K)`.
        low: The first integer.
        open_below, open_above: Whether the ends are open.
    """

    settings = ("low", "open_below", "open_above")

    def __init__(
        self, logits: Any, low: int = 0, open_below: bool = False, open_above: bool = False
    ):
        self.logits = jnp.asarray(logits)
        self.low, self.open_below, self.open_above = low, open_below, open_above
        super().__init__()

    @property
    def probs(self) -> Any:
        """Of each class, shape `batch_shape + (K,)`."""
        return jnp.exp(self.log_mass)

    @property
    def high(self) -> int:
        """The last integer that is a class."""
        return self.low + self.logits.shape[-1] - 1

    @property
    def support(self) -> Any:
        if self.open_below:
            return constraints.integer
        if self.open_above:
            return constraints.integer_greater_than(self.low - 1)
        return constraints.integer_interval(self.low, self.high)

    @jax.jit
    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        """Log probability in nats, shape `value.shape` broadcast with `batch_shape`."""
        value = jnp.asarray(value)
        index = jnp.clip(value - self.low, 0, self.high - self.low).astype(jnp.int32)
        out = jnp.vectorize(lambda p, i: p[i], signature="(k),()->()")(self.log_mass, index)
        above, below = value - self.high, self.low - value
        half = np.log(0.5)
        out = out + jnp.where(above >= 0, half * (above + 1), 0.0) * self.open_above
        out = out + jnp.where(below >= 0, half * (below + 1), 0.0) * self.open_below
        inside = ((below <= 0) | self.open_below) & ((above <= 0) | self.open_above)
        return jnp.where(inside & (value == jnp.floor(value)), out, -jnp.inf)

    @jax.jit
    def cdf(self, value: Any) -> Any:
        """Probability of at most `value`."""
        value = jnp.floor(jnp.asarray(value, jnp.result_type(float)))

        def one(p, v):
            i = jnp.clip(v - self.low, -1, len(p) - 1).astype(jnp.int32)
            total = jnp.where(i < 0, 0.0, jnp.cumsum(p)[i])
            if self.open_above:
                beyond = p[-1] * 0.5 ** (jnp.maximum(v - self.high, 0) + 1)
                total = jnp.where(v >= self.high, 1 - beyond, total)
            if self.open_below:
                total = jnp.where(v <= self.low, p[0] * 0.5 ** jnp.maximum(self.low - v, 0), total)
            return total

        return jnp.vectorize(one, signature="(k),()->()")(self.probs, value)

    @jax.jit
    def icdf(self, q: Any) -> Any:
        """The least integer whose cdf reaches `q`."""

        def one(p, q):
            total = jnp.cumsum(p)
            i = jnp.minimum(jnp.sum(total < q * total[-1]), len(p) - 1)
            value = self.low + i.astype(q.dtype)
            if self.open_above:
                steps = jnp.ceil(-jnp.log2((1 - q) / p[-1])) - 1
                value = jnp.where(i == len(p) - 1, self.high + jnp.maximum(steps, 0), value)
            if self.open_below:
                steps = jnp.floor(-jnp.log2(q / p[0]))
                value = jnp.where(q <= p[0], self.low - jnp.maximum(steps, 0), value)
            return value

        out = jnp.vectorize(one, signature="(k),()->()")(self.probs, q)
        is_finite = not (self.open_below or self.open_above)
        return out.astype(jnp.int32) if is_finite else out

    @functools.partial(jax.jit, static_argnums=2)
    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """Draws, int32, shape `sample_shape + batch_shape`."""
        k1, k2 = jax.random.split(key)
        shape = (*sample_shape, *self.batch_shape)
        i = jax.random.categorical(k1, self.logits, shape=shape)
        value = self.low + i
        if self.open_below or self.open_above:
            tiny = jnp.finfo(jnp.result_type(float)).tiny
            steps = jnp.floor(-jnp.log2(jax.random.uniform(k2, shape, minval=tiny)))
            steps = steps.astype(value.dtype)
            last = self.logits.shape[-1] - 1
            value = value + jnp.where((i == last) & self.open_above, steps, 0)
            value = value - jnp.where((i == 0) & self.open_below, steps, 0)
        return value.astype(jnp.int32)

    def _values(self) -> tuple[Any, Any]:
        """Mean and variance within each class."""
        k = self.logits.shape[-1]
        value = self.low + np.arange(k, dtype=np.float64)
        spread = np.zeros(k)
        value[-1] += self.open_above  # a geometric law of 1/2 has mean 1 and variance 2
        value[0] -= self.open_below
        spread[-1] += 2 * self.open_above
        spread[0] += 2 * self.open_below
        return value, spread

    @property
    @jax.jit
    def mean(self) -> Any:
        """Mean, shape `batch_shape`."""
        return jnp.sum(self.probs * self._values()[0], axis=-1)

    @property
    @jax.jit
    def variance(self) -> Any:
        """Variance, shape `batch_shape`."""
        value, spread = self._values()
        centred = value - self.mean[..., None]
        return jnp.sum(self.probs * (centred**2 + spread), axis=-1)


class Mixture(Predictive):
    """A mixture of normals in unconstrained coordinates.

    The coordinate of `x` is `x` itself, `log(x - lower)`, `-log(upper - x)`, or
    `log(x - lower) - log(upper - x)`, by which ends the support has.

    Args:
        logits: Unnormalized log weights, shape `(..., K)`.
        loc, scale: Of the normals, the same shape.
        lower, upper: Ends of the support, or None.
    """

    arrays = ("logits", "loc", "scale")
    settings = ("lower", "upper")

    def __init__(
        self,
        logits: Any,
        loc: Any,
        scale: Any,
        lower: float | None = None,
        upper: float | None = None,
    ):
        self.logits, self.loc, self.scale = logits, loc, scale
        self.lower, self.upper = lower, upper
        super().__init__()

    @property
    def support(self) -> Any:
        return within(self.lower, self.upper)

    def coordinate(self, x: Any) -> tuple[Any, Any]:
        """The unconstrained coordinate of a value, and the log derivative; outside: NaN-free."""
        lower, upper = self.lower, self.upper
        tiny = jnp.finfo(jnp.result_type(float)).tiny
        left = None if lower is None else jnp.log(jnp.maximum(x - lower, tiny))
        right = None if upper is None else jnp.log(jnp.maximum(upper - x, tiny))
        if left is not None and right is not None:
            return left - right, np.log(upper - lower) - left - right  # type: ignore[operator]
        if left is not None:
            return left, -left
        if right is not None:
            return -right, -right
        return x, jnp.zeros_like(x)

    def value(self, u: Any) -> Any:
        """The inverse of `coordinate`."""
        if self.lower is not None and self.upper is not None:
            return self.lower + (self.upper - self.lower) * jax.nn.sigmoid(u)
        if self.lower is not None:
            return self.lower + jnp.exp(u)
        if self.upper is not None:
            return self.upper - jnp.exp(-u)
        return u

    @jax.jit
    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        """Log density in nats, shape `value.shape` broadcast with `batch_shape`."""
        value = jnp.asarray(value, jnp.result_type(float))
        u, log_derivative = self.coordinate(value)
        z = (u[..., None] - self.loc) / self.scale
        each = -0.5 * z**2 - jnp.log(self.scale) - 0.5 * np.log(2 * np.pi)
        out = logsumexp(self.log_mass + each, axis=-1) + log_derivative
        return jnp.where(self.support(value), out, -jnp.inf)

    @jax.jit
    def cdf(self, value: Any) -> Any:
        """Probability of at most `value`."""
        value = jnp.asarray(value, jnp.result_type(float))
        total = self._cdf(self.coordinate(value)[0])
        if self.lower is not None:
            total = jnp.where(value <= self.lower, 0.0, total)
        return total if self.upper is None else jnp.where(value >= self.upper, 1.0, total)

    def _cdf(self, u: Any) -> Any:
        z = (u[..., None] - self.loc) / self.scale
        return jnp.sum(jnp.exp(self.log_mass) * ndtr(z), axis=-1)

    @jax.jit
    def icdf(self, q: Any) -> Any:
        """Quantiles, by bisection between those of the components."""
        q = jnp.asarray(q, jnp.result_type(float))
        each = self.loc + self.scale * jax.scipy.special.ndtri(q)[..., None]
        low, high = jnp.min(each, axis=-1), jnp.max(each, axis=-1)

        def halve(_, ends):
            low, high = ends
            mid = 0.5 * (low + high)
            below = self._cdf(mid) < q
            return jnp.where(below, mid, low), jnp.where(below, high, mid)

        low, high = jax.lax.fori_loop(0, 60, halve, (low, high))
        u = jnp.where(low == high, low, 0.5 * (low + high))  # infinite ends stay
        return self.value(u)

    @functools.partial(jax.jit, static_argnums=2)
    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """Draws, shape `sample_shape + batch_shape`."""
        k1, k2 = jax.random.split(key)
        shape = (*sample_shape, *self.batch_shape)
        i = jax.random.categorical(k1, self.logits, shape=shape)
        pick = jnp.vectorize(lambda x, i: x[i], signature="(k),()->()")
        noise = jax.random.normal(k2, shape, jnp.result_type(float))
        return self.value(pick(self.loc, i) + pick(self.scale, i) * noise)

    @property
    @jax.jit
    def mean(self) -> Any:
        """Mean, shape `batch_shape`; by Gauss-Hermite quadrature where the support has an end."""
        return self._moments()[0]

    @property
    @jax.jit
    def variance(self) -> Any:
        """Variance, shape `batch_shape`."""
        return self._moments()[1]

    def _moments(self) -> tuple[Any, Any]:
        nodes, weights = np.polynomial.hermite_e.hermegauss(32)
        mass = jnp.exp(self.log_mass)[..., None] * (weights / weights.sum())
        x = self.value(self.loc[..., None] + self.scale[..., None] * nodes)
        mean = jnp.sum(mass * x, axis=(-2, -1))
        return mean, jnp.sum(mass * (x - mean[..., None, None]) ** 2, axis=(-2, -1))


def within(lower: Any, upper: Any) -> Any:
    """The constraint of a number between two ends, each of which may be None."""
    if lower is not None and upper is not None:
        return constraints.interval(lower, upper)
    if lower is not None:
        return constraints.greater_than_eq(lower)
    return constraints.real if upper is None else constraints.less_than_eq(upper)
