"""Maps of single numbers with parameters from a network: what couplings and autoregressions apply.

A transformer is a strictly increasing function of one number, with `num_params` parameters. All
zeros (what a new network gives, nearly) are the identity.
"""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.errors import InvalidValue
from abduce.inference.vi.flows.bijection import check_count

__all__ = ["Affine", "RationalQuadratic", "Transformer"]


class Transformer(eqx.Module):
    """Base: an elementwise increasing function and its inverse."""

    @property
    def num_params(self) -> int:
        """How many parameters one number needs."""
        raise NotImplementedError

    def forward(self, x: Any, params: Any) -> tuple[jax.Array, jax.Array]:
        """`(y, log dy/dx)`, each the shape of `x`, from parameters `x.shape + (num_params,)`."""
        raise NotImplementedError

    def inverse(self, y: Any, params: Any) -> tuple[jax.Array, jax.Array]:
        """`(x, log dx/dy)`, each the shape of `y`."""
        raise NotImplementedError


class Affine(Transformer):
    """`y = x exp(s) + t`, with `|s|` below a bound.

    Dinh, Sohl-Dickstein and Bengio, "Density Estimation using Real NVP", ICLR 2017, eq. 7. The
    bound, by a tanh, keeps a deep flow finite far out, where networks extrapolate.

    Args:
        max_log_scale: Bound of `|s|`.
    """

    max_log_scale: float = eqx.field(default=3.0, static=True)

    def __check_init__(self):
        _check_positive("flows.Affine", max_log_scale=self.max_log_scale)

    @property
    def num_params(self) -> int:
        return 2

    def forward(self, x, params):
        shift, s = self._read(params)
        return x * jnp.exp(s) + shift, s

    def inverse(self, y, params):
        shift, s = self._read(params)
        return (y - shift) * jnp.exp(-s), -s

    def _read(self, params):
        bound = self.max_log_scale
        return params[..., 0], bound * jnp.tanh(params[..., 1] / bound)


class RationalQuadratic(Transformer):
    """A monotone rational-quadratic spline on `[-bound, bound]`, the identity outside.

    Durkan, Bekasov, Murray and Papamakarios, "Neural Spline Flows", NeurIPS 2019. The parameters
    are bin widths and heights (before a softmax) and the derivatives at inner knots (before a
    softplus); the derivative at both ends is 1, so it is continuous everywhere.

    Args:
        num_bins: Number of bins, at least 2.
        bound: Half the length of the interval.
        min_bin: Least width and height of a bin, as a fraction of the interval; below
            `1 / num_bins`.
        min_derivative: Least derivative at a knot; below 1.
    """

    num_bins: int = eqx.field(default=8, static=True)
    bound: float = eqx.field(default=5.0, static=True)
    min_bin: float = eqx.field(default=1e-3, static=True)
    min_derivative: float = eqx.field(default=1e-3, static=True)

    def __check_init__(self):
        name = "flows.RationalQuadratic"
        check_count(name, "num_bins", self.num_bins, 2)
        _check_positive(
            name, bound=self.bound, min_bin=self.min_bin, min_derivative=self.min_derivative
        )
        if not (self.min_bin * self.num_bins < 1 and self.min_derivative < 1):
            raise InvalidValue(
                f"{name}: min_bin must be below 1 / num_bins = {1 / self.num_bins:.4g} and "
                f"min_derivative below 1, got {self.min_bin} and {self.min_derivative}."
            )

    @property
    def num_params(self) -> int:
        return 3 * self.num_bins - 1

    def forward(self, x, params):
        xs, ys, slopes = self._knots(params)
        is_inside = jnp.abs(x) < self.bound
        x_in = jnp.where(is_inside, x, 0.0)  # keeps the unused branch's gradient finite
        x0, width, y0, height, d0, d1 = _bin(x_in, xs, xs, ys, slopes)
        s = height / width
        t = _rounded_into_unit((x_in - x0) / width)
        u = t * (1 - t)
        denominator = s + (d0 + d1 - 2 * s) * u
        y = y0 + height * (s * t * t + d0 * u) / denominator  # eq. 4
        log_det = _log_slope(s, t, u, d0, d1, denominator)
        return jnp.where(is_inside, y, x), jnp.where(is_inside, log_det, 0.0)

    def inverse(self, y, params):
        xs, ys, slopes = self._knots(params)
        is_inside = jnp.abs(y) < self.bound
        y_in = jnp.where(is_inside, y, 0.0)
        x0, width, y0, height, d0, d1 = _bin(y_in, ys, xs, ys, slopes)
        s = height / width
        v = _rounded_into_unit((y_in - y0) / height)
        # eqs. 6 to 8 divided by `height`: a t^2 + b t + c = 0
        bend = v * (d0 + d1 - 2 * s)
        a, b, c = s - d0 + bend, d0 - bend, -s * v
        # b^2 - 4 a c is positive (their appendix A.2); rounding may disagree
        root = jnp.sqrt(jnp.maximum(b * b - 4 * a * c, jnp.finfo(b.dtype).tiny))
        # b < 0 has a > 0; of the two forms of the root, the one whose terms do not cancel
        is_bent = b < 0
        t = jnp.where(
            is_bent,
            (root - b) / jnp.where(is_bent, 2 * a, 1.0),
            -2 * c / jnp.where(is_bent, 1.0, b + root),
        )
        t = _rounded_into_unit(t)
        u = t * (1 - t)
        log_det = -_log_slope(s, t, u, d0, d1, s + (d0 + d1 - 2 * s) * u)
        return jnp.where(is_inside, x0 + t * width, y), jnp.where(is_inside, log_det, 0.0)

    def _knots(self, params):
        """Knots along x and along y, and the slopes there, each `(..., num_bins + 1)`."""
        k = self.num_bins
        xs, ys = self._edges(params[..., :k]), self._edges(params[..., k : 2 * k])
        # shifted so that zeros mean a slope of 1
        offset = math.log(math.expm1(1 - self.min_derivative))
        inner = self.min_derivative + jax.nn.softplus(params[..., 2 * k :] + offset)
        end = jnp.ones_like(inner[..., :1])
        return xs, ys, jnp.concatenate([end, inner, end], axis=-1)

    def _edges(self, raw):
        sizes = self.min_bin + (1 - self.min_bin * self.num_bins) * jax.nn.softmax(raw, axis=-1)
        inner = self.bound * (2 * jnp.cumsum(sizes[..., :-1], axis=-1) - 1)
        end = jnp.full_like(inner[..., :1], self.bound)  # exact, which a sum would not be
        return jnp.concatenate([-end, inner, end], axis=-1)


def _rounded_into_unit(t):
    """`t`, which only rounding puts outside [0, 1], put back; its derivative stays 1.

    That of `jnp.clip` is one half at 0 and 1, which knots are.
    """
    return t + jax.lax.stop_gradient(jnp.clip(t, 0.0, 1.0) - t)


def _log_slope(s, t, u, d0, d1, denominator):
    """Logarithm of the derivative, eq. 5."""
    numerator = d1 * t * t + 2 * s * u + d0 * (1 - t) ** 2
    return 2 * jnp.log(s) + jnp.log(numerator) - 2 * jnp.log(denominator)


def _bin(value, knots, xs, ys, slopes):
    """Where the bin of a value starts along x and y, its sizes, and the slopes at its ends.

    A bin is picked by multiplication with a row of zeros and one 1: vectorizes better than a
    gather, whose gradient is a scatter.
    """
    reached = value[..., None] >= knots[..., :-1]
    is_bin = jnp.diff(reached.astype(knots.dtype), axis=-1, append=0.0) < 0
    is_bin = is_bin.astype(knots.dtype)

    def pick(x):
        return jnp.sum(is_bin * x, axis=-1)

    return (
        pick(xs[..., :-1]),
        pick(jnp.diff(xs)),
        pick(ys[..., :-1]),
        pick(jnp.diff(ys)),
        pick(slopes[..., :-1]),
        pick(slopes[..., 1:]),
    )


def _check_positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise InvalidValue(f"{owner}: {name} must be a positive number, got {value!r}.")
