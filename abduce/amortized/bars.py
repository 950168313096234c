"""The Riemann distribution: a histogram with fixed borders, and half-normal tails.

Mueller, Hollmann, Pineda Arango, Grabocka and Hutter, "Transformers Can Do Bayesian Inference",
ICLR 2022, section 4. Any density is matched as closely as the bars are narrow, and learning it is
classification. An outermost bar towards an end without a bound becomes half of a normal that
begins at the bar's inner border, with half of its mass inside the bar.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

from abduce.amortized.predictive import Predictive, within
from abduce.errors import InvalidValue

__all__ = ["Bars", "equal_mass_borders"]

_MEDIAN = 0.6744897501960817  # of a half-normal with scale 1
_LOG_HALF_NORMAL = 0.5 * np.log(2 / np.pi)  # log density at its mode


class Bars(Predictive):
    """A histogram over fixed borders, with half-normal tails.

    Args:
        logits: Unnormalized log masses, shape `(..., num_bars)`.
        borders: Increasing, shape `(num_bars + 1,)`.
        lower_tail, upper_tail: Whether the outermost bars are half-normals; False where the
            support ends at the border.

    Raises:
        InvalidValue: The shapes do not fit, or borders do not increase.

    Example:
        >>> d = Bars(jnp.zeros(3), jnp.array([0.0, 1.0, 2.0, 4.0]), False, False)
        >>> round(float(d.mean), 3)
        1.667
    """

    arrays = ("logits", "borders")
    settings = ("lower_tail", "upper_tail")

    def __init__(self, logits: Any, borders: Any, lower_tail: bool = True, upper_tail: bool = True):
        num = jnp.shape(logits)[-1]
        if jnp.shape(borders)[-1] != num + 1:
            raise InvalidValue(
                f"Bars: {num} bars have {num + 1} borders, got borders of shape "
                f"{jnp.shape(borders)}."
            )
        if num < lower_tail + upper_tail:
            raise InvalidValue(f"Bars: {num} bar cannot be both tails; use at least 2.")
        if not isinstance(borders, jax.core.Tracer) and (np.diff(np.asarray(borders)) <= 0).any():
            raise InvalidValue("Bars: borders must increase strictly.")
        self.logits, self.borders = jnp.asarray(logits), jnp.asarray(borders)
        self.lower_tail, self.upper_tail = bool(lower_tail), bool(upper_tail)
        super().__init__()

    @property
    def support(self) -> Any:
        borders = self._beside(self.borders)
        return within(
            None if self.lower_tail else borders[..., 0],
            None if self.upper_tail else borders[..., -1],
        )

    def _each(self, fn: Any, x: Any) -> Any:
        """`fn(log_mass, borders, x)` for every number of the batch."""
        x = jnp.asarray(x, jnp.result_type(self.borders, float))
        mapped = jnp.vectorize(fn, signature="(k),(j),()->()")
        return mapped(self.log_mass, self._beside(self.borders), x)

    @jax.jit
    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        """Log density in nats, shape `value.shape` broadcast with `batch_shape`.

        Outside of a bounded support it is `-inf`.
        """

        def one(log_mass, borders, x):
            i = self._index(borders, x)
            out = log_mass[i] - jnp.log(borders[i + 1] - borders[i])
            last = log_mass.shape[0] - 1
            if self.lower_tail:
                z, scale = self._below(borders, x)
                tail = log_mass[0] + _LOG_HALF_NORMAL - jnp.log(scale) - 0.5 * z**2
                out = jnp.where(i == 0, tail, out)
            else:
                out = jnp.where(x < borders[0], -jnp.inf, out)
            if self.upper_tail:
                z, scale = self._above(borders, x)
                tail = log_mass[last] + _LOG_HALF_NORMAL - jnp.log(scale) - 0.5 * z**2
                out = jnp.where(i == last, tail, out)
            else:
                out = jnp.where(x > borders[-1], -jnp.inf, out)
            return jnp.where(jnp.isnan(x), jnp.nan, out)

        return self._each(one, value)

    @jax.jit
    def cdf(self, value: Any) -> Any:
        """Probability of at most `value`."""

        def one(log_mass, borders, x):
            mass = jnp.exp(log_mass)
            i = self._index(borders, x)
            part = jnp.clip((x - borders[i]) / (borders[i + 1] - borders[i]), 0, 1)
            if self.lower_tail:
                part = jnp.where(i == 0, 2 * ndtr(-self._below(borders, x)[0]), part)
            if self.upper_tail:
                z = self._above(borders, x)[0]
                part = jnp.where(i == mass.shape[0] - 1, 1 - 2 * ndtr(-z), part)
            return jnp.cumsum(mass)[i] - mass[i] * (1 - part)

        return jnp.clip(self._each(one, value), 0, 1)

    @jax.jit
    def icdf(self, q: Any) -> Any:
        """Quantiles, `q` broadcast with `batch_shape`; infinite at 0 and 1 of a tail."""

        def one(log_mass, borders, q):
            mass = jnp.exp(log_mass)
            total = jnp.cumsum(mass)
            i = jnp.minimum(jnp.searchsorted(total, q * total[-1]), mass.shape[0] - 1)
            part = 1 - (total[i] - q * total[-1]) / jnp.maximum(mass[i], 1e-30)
            return self._inside(borders, i, jnp.clip(part, 0, 1))

        return self._each(one, q)

    @functools.partial(jax.jit, static_argnums=2)
    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        """Draws, shape `sample_shape + batch_shape`."""
        shape = (*sample_shape, *self.batch_shape)
        dtype = jnp.result_type(self.borders, float)
        k1, k2 = jax.random.split(key)
        part = jax.random.uniform(k2, shape, dtype, jnp.finfo(dtype).tiny)

        def one(log_mass, borders, q):  # the bar; where in it comes from other random bits
            total = jnp.cumsum(jnp.exp(log_mass))
            found = jnp.searchsorted(total, q * total[-1], side="right")
            return jnp.minimum(found, log_mass.shape[0] - 1)

        index = self._each(one, jax.random.uniform(k1, shape, dtype))
        place = jnp.vectorize(self._inside, signature="(j),(),()->()")
        return place(self._beside(self.borders), index, part)

    @property
    @jax.jit
    def mean(self) -> Any:
        """Mean, shape `batch_shape`."""
        return jnp.sum(jnp.exp(self.log_mass) * self._moments()[0], axis=-1)

    @property
    @jax.jit
    def variance(self) -> Any:
        """Variance, shape `batch_shape`."""
        mean, spread = self._moments()
        centred = mean - self.mean[..., None]
        return jnp.sum(jnp.exp(self.log_mass) * (centred**2 + spread), axis=-1)

    # ------------------------------------------------------------------ one number

    @staticmethod
    def _index(borders, x):
        found = jnp.searchsorted(borders, x, side="right") - 1
        return jnp.clip(found, 0, borders.shape[0] - 2)

    @staticmethod
    def _below(borders, x):
        """Standardized distance below the inner border of the lowest bar, and the scale."""
        scale = (borders[1] - borders[0]) / _MEDIAN
        return jnp.maximum(borders[1] - x, 0) / scale, scale

    @staticmethod
    def _above(borders, x):
        scale = (borders[-1] - borders[-2]) / _MEDIAN
        return jnp.maximum(x - borders[-2], 0) / scale, scale

    def _inside(self, borders, i, part):
        """The value below which a fraction of bar `i` lies."""
        x = borders[i] + part * (borders[i + 1] - borders[i])
        if self.lower_tail:
            scale = (borders[1] - borders[0]) / _MEDIAN
            x = jnp.where(i == 0, borders[1] + scale * ndtri(0.5 * part), x)
        if self.upper_tail:
            scale = (borders[-1] - borders[-2]) / _MEDIAN
            x = jnp.where(
                i == borders.shape[0] - 2, borders[-2] - scale * ndtri(0.5 * (1 - part)), x
            )
        return x

    def _moments(self):
        """Mean and variance within each bar."""
        borders = self._beside(self.borders)
        width = borders[..., 1:] - borders[..., :-1]
        mean, spread = borders[..., :-1] + 0.5 * width, width**2 / 12
        scale = width / _MEDIAN
        if self.lower_tail:
            tail = borders[..., 1] - scale[..., 0] * np.sqrt(2 / np.pi)
            mean = mean.at[..., 0].set(tail)
            spread = spread.at[..., 0].set(scale[..., 0] ** 2 * (1 - 2 / np.pi))
        if self.upper_tail:
            tail = borders[..., -2] + scale[..., -1] * np.sqrt(2 / np.pi)
            mean = mean.at[..., -1].set(tail)
            spread = spread.at[..., -1].set(scale[..., -1] ** 2 * (1 - 2 / np.pi))
        return mean, spread


def equal_mass_borders(
    values: Any, num_bars: int, lower: float | None = None, upper: float | None = None
) -> np.ndarray:
    """Borders between which draws lie in equal numbers.

    At an end without a bound, the outermost border is put where the half-normal tail of `Bars`
    has the mean of the draws that lie there.

    Args:
        values: Draws, any shape.
        num_bars: How many bars.
        lower, upper: Ends of the support, which become the outermost borders; or None.

    Returns:
        Float32, strictly increasing, `(num_bars + 1,)`, or fewer where draws coincide.

    Raises:
        InvalidValue: There are fewer than two different values.
    """
    x = np.sort(np.asarray(values, np.float64).reshape(-1))
    borders = np.quantile(x, np.linspace(0, 1, num_bars + 1))
    below, above = x[x < borders[1]], x[x > borders[-2]]
    width = _MEDIAN * np.sqrt(np.pi / 2)  # per unit of the mean of a half-normal
    if lower is not None:
        borders[0] = lower
    elif below.size:
        borders[0] = borders[1] - width * np.mean(borders[1] - below)
    if upper is not None:
        borders[-1] = upper
    elif above.size:
        borders[-1] = borders[-2] + width * np.mean(above - borders[-2])
    borders = np.maximum.accumulate(borders.astype(np.float32))
    borders = borders[np.concatenate([[True], np.diff(borders) > 0])]
    if len(borders) < 3:
        raise InvalidValue(
            f"draws from the prior take fewer than two different values ({x[0]:g} to {x[-1]:g}): "
            f"there is nothing to predict."
        )
    return borders
