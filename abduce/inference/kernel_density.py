"""The distributions that posteriors become as models; see `abduce.inference.as_model`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution, biject_to, constraints

__all__ = ["AtomMixture", "KernelDensity", "Support", "unwarped", "warped"]

_FAR = 40.0  # where the sinh of a coordinate would overflow


def warped(u: Any, warp: Any, xp: Any = jnp) -> tuple[Any, Any]:
    """Coordinates made nearly normal, `v = sinh(delta asinh((u - m) / s) - epsilon)`.

    The sinh-arcsinh transformation (Jones and Pewsey 2009) takes out skewness and tail weight.

    Args:
        u: Coordinates, `(..., d)`.
        warp: m, s, epsilon and delta, `(4, d)`.
        xp: jax.numpy or numpy.

    Returns:
        `v`, and `log dv/du`.
    """
    m, s, epsilon, delta = warp
    t = (u - m) / s
    a = xp.clip(delta * xp.arcsinh(t) - epsilon, -_FAR, _FAR)
    slope = xp.logaddexp(a, -a) - math.log(2.0) - 0.5 * xp.log1p(t**2) + xp.log(delta / s)
    return xp.sinh(a), slope


def unwarped(v: Any, warp: Any) -> Any:
    """The inverse of `warped`."""
    m, s, epsilon, delta = warp
    return m + s * jnp.sinh(jnp.clip((jnp.arcsinh(v) + epsilon) / delta, -_FAR, _FAR))


class Support:
    """A constraint as a static, hashable field."""

    def __init__(self, constraint: Any):
        self.constraint = constraint
        leaves, treedef = jax.tree.flatten(constraint)
        arrays = [np.asarray(x) for x in leaves]
        self.key = (treedef, tuple((a.dtype.str, a.shape, a.tobytes()) for a in arrays))

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return isinstance(other, Support) and self.key == other.key


class KernelDensity(Distribution):
    """One address of the mixture given those before: an event of the site's whole shape.

    Args:
        log_weights: Of the components, given what came before, `(K,)`.
        centres: In whitened coordinates, `(K, d)`.
        scales: Of the kernels, `(K,)`.
        tril: From whitened to warped coordinates, `(d, d)`.
        loc: The rest of that map, `(d,)`.
        warp: Of each coordinate, see `warped`; `(4, d)`.
        support: The constraint.
        shape: Of a value.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    pytree_data_fields = ("log_weights", "centres", "scales", "tril", "loc", "warp")
    pytree_aux_fields = ("support_", "inner_shape")

    def __init__(self, log_weights, centres, scales, tril, loc, warp, support, shape):
        self.log_weights, self.centres, self.scales = log_weights, centres, scales
        self.tril, self.loc, self.warp, self.support_ = tril, loc, warp, support
        self.inner_shape = tuple(biject_to(support.constraint).inverse_shape(shape))
        super().__init__(batch_shape=(), event_shape=tuple(shape))

    @property
    def support(self):
        inner = self.support_.constraint
        return constraints.independent(inner, len(self.event_shape) - inner.event_dim)

    def sample(self, key, sample_shape=()):
        k1, k2 = jax.random.split(key)
        k = jax.random.categorical(k1, self.log_weights, shape=sample_shape)
        noise = jax.random.normal(k2, (*sample_shape, self.loc.size), self.centres.dtype)
        y = self.centres[k] + self.scales[k][..., None] * noise
        u = unwarped(self.loc + y @ self.tril.T, self.warp)
        x = biject_to(self.support_.constraint)(u.reshape((*sample_shape, *self.inner_shape)))
        return x.reshape((*sample_shape, *self.event_shape))

    def parts(self, value: Any) -> tuple[Any, Any]:
        """Whitened coordinates of a value, and the log Jacobian from there to the value."""
        transform = biject_to(self.support_.constraint)
        u = transform._inverse(value)
        jacobian = jnp.sum(transform.log_abs_det_jacobian(u, value))
        v, slope = warped(u.reshape(-1), self.warp)
        y = jax.scipy.linalg.solve_triangular(self.tril, v - self.loc, lower=True)
        return y, jacobian - jnp.sum(slope) + jnp.sum(jnp.log(jnp.diagonal(self.tril)))

    def components(self, y: Any) -> Any:
        """Log density of each component in whitened coordinates."""
        z = (y - self.centres) / self.scales[:, None]
        d = self.centres.shape[1]
        return -0.5 * jnp.sum(z**2, 1) - d * (jnp.log(self.scales) + 0.5 * math.log(2 * math.pi))

    def log_prob(self, value, intermediates=None):
        if jnp.ndim(value) > len(self.event_shape):
            return jax.vmap(self.log_prob)(value)
        y, jacobian = self.parts(value)
        each = self.components(y)
        total = jax.nn.logsumexp(self.log_weights + each) - jax.nn.logsumexp(self.log_weights)
        return total - jacobian


class AtomMixture(Distribution):
    """One discrete address of the mixture given those before.

    Args:
        log_weights: `(K,)`.
        atoms: `(K, *shape)`.
        mixing: Share of the smoothing law in each entry, `(K,)`.
        table: Log probabilities of the smoothing law at `low, low + 1, ...`, `(*shape, S)`.
        low: Integer of the first column.
        support: The constraint.
        tails: Whether the law goes on to the left, to the right: then the outermost column holds
            the mass of the whole tail, half of it at its own place, and so on.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    pytree_data_fields = ("log_weights", "atoms", "mixing", "table")
    pytree_aux_fields = ("low", "support_", "tails")

    def __init__(self, log_weights, atoms, mixing, table, low, support, tails):
        self.log_weights, self.atoms, self.mixing, self.table = log_weights, atoms, mixing, table
        self.low, self.support_, self.tails = low, support, tails
        super().__init__(batch_shape=(), event_shape=tuple(atoms.shape[1:]))

    @property
    def support(self):
        return constraints.independent(self.support_.constraint, len(self.event_shape))

    def _smooth(self, value: Any) -> Any:
        """Log probability of the smoothing law, entry by entry."""
        size = self.table.shape[-1]
        at = value.astype(jnp.int32) - self.low
        inside = jnp.clip(at, 0, size - 1)
        index = jnp.broadcast_to(inside, self.table.shape[:-1])[..., None]
        found = jnp.take_along_axis(self.table, index, -1)[..., 0]
        left, right = self.tails
        beyond = jnp.where(at < 0, -at, at - (size - 1))
        # The outermost column holds the whole tail: a geometric law with ratio 1/2 spreads it.
        tail = (jnp.asarray(left) & (at <= 0)) | (jnp.asarray(right) & (at >= size - 1))
        found = jnp.where(tail, found - (jnp.maximum(beyond, 0) + 1) * math.log(2.0), found)
        outside = (at < 0) & (not left) | (at >= size) & (not right)
        return jnp.where(outside, -jnp.inf, found)

    def components(self, value: Any) -> Any:
        """Log probability of each component at a value."""
        shape = (-1,) + (1,) * len(self.event_shape)
        d = self.mixing.reshape(shape)
        hit = jnp.where(value == self.atoms, jnp.log1p(-d), -jnp.inf)
        each = jnp.logaddexp(hit, jnp.log(d) + self._smooth(value))
        return jnp.sum(each.reshape(each.shape[0], -1), 1)

    def sample(self, key, sample_shape=()):
        if sample_shape:
            keys = jax.random.split(key, math.prod(sample_shape))
            out = jax.vmap(self.sample)(keys)
            return out.reshape((*sample_shape, *self.event_shape))
        k1, k2, k3, k4 = jax.random.split(key, 4)
        k = jax.random.categorical(k1, self.log_weights)
        smooth = jax.random.uniform(k2, self.event_shape) < self.mixing[k]
        at = jax.random.categorical(k3, self.table)
        steps = jax.random.geometric(k4, 0.5, self.event_shape) - 1
        left, right = self.tails
        last = self.table.shape[-1] - 1
        at = at + jnp.where((at == last) & right, steps, 0) - jnp.where((at == 0) & left, steps, 0)
        return jnp.where(smooth, at + self.low, self.atoms[k]).astype(self.atoms.dtype)

    def log_prob(self, value, intermediates=None):
        if jnp.ndim(value) > len(self.event_shape):
            return jax.vmap(self.log_prob)(value)
        each = self.components(value)
        return jax.nn.logsumexp(self.log_weights + each) - jax.nn.logsumexp(self.log_weights)
