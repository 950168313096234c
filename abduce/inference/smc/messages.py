"""Messages from the future, and kernels tilted by them.

A message g is a non-negative function of the state: the likelihood, under a tractable auxiliary
process, of all that is still to be observed. Each family here knows two things: the backward rule
through a kernel of the auxiliary process, and how to tilt a true kernel K(x, dv) by it,

    q(dv) = K(x, dv) g(v) / (K g)(x),        (K g)(x) = int K(x, dv) g(v).

van der Meulen and Schauer, "Automatic backward filtering forward guiding for Markov processes and
graphical models" (2020), sections 4-6. Gaussian rules are in (I + QH)^-1 form: H may be singular.
"""

from __future__ import annotations

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints

from abduce.errors import InvalidModel
from abduce.ppl.site import elementwise

__all__ = [
    "GammaMessage",
    "Quadratic",
    "Table",
    "categories",
    "gaussian",
    "leaf",
    "marginal",
    "tilt_gamma",
    "tilt_gaussian",
    "tilt_table",
]


def _chol(a: Any) -> Any:
    return jnp.sqrt(a) if a.shape[-1] == 1 else jnp.linalg.cholesky(a)


def _solve(lower: Any, b: Any, *, trans: bool = False) -> Any:
    """Solves with a lower triangular matrix (or its transpose)."""
    if lower.shape[-1] == 1:
        return b / (lower[..., 0] if b.ndim == 1 else lower)
    return jax.scipy.linalg.solve_triangular(lower, b, trans=1 if trans else 0, lower=True)


# ---------------------------------------------------------------------- Gaussian


class Quadratic(eqx.Module):
    """log g(x) = c + F.x - x.H x / 2; shapes (), (n,), (n, n)."""

    c: Any
    F: Any
    H: Any

    def __call__(self, x: Any) -> Any:
        return self.c + self.F @ x - 0.5 * (x @ self.H @ x)

    def __add__(self, other: Quadratic) -> Quadratic:
        """Fuses two messages on the same state (at a fork)."""
        return Quadratic(self.c + other.c, self.F + other.F, self.H + other.H)

    @classmethod
    def zero(cls, n: int, dtype: Any = None) -> Quadratic:
        """The constant 1."""
        dtype = dtype or jnp.result_type(float)
        return cls(jnp.zeros((), dtype), jnp.zeros((n,), dtype), jnp.zeros((n, n), dtype))

    def pull(self, t: Any, offset: Any = None) -> Quadratic:
        """The message on z where x = t z + offset."""
        if offset is None:
            return Quadratic(self.c, t.T @ self.F, t.T @ self.H @ t)
        return Quadratic(
            self(offset), t.T @ (self.F - self.H @ offset), t.T @ self.H @ t
        )  # fmt: skip

    def after(self, n: int, z: Any) -> Quadratic:
        """The message on v at a given z, where x = (z, v) and z has n numbers."""
        if n == 0:
            return self
        fz, fv = self.F[:n], self.F[n:]
        c = self.c + fz @ z - 0.5 * (z @ self.H[:n, :n] @ z)
        return Quadratic(c, fv - self.H[n:, :n] @ z, self.H[n:, n:])

    def beside(self, n: int) -> Quadratic:
        """The message on (z, v) that depends on v alone."""
        return Quadratic(self.c, jnp.pad(self.F, (n, 0)), jnp.pad(self.H, ((n, 0), (n, 0))))


def leaf(y: Any, H: Any, R: Any, d: Any = None, observed: Any = None) -> Quadratic:
    """The message of an observation y ~ N(H x + d, R).

    Args:
        y: Shape (m,).
        H: Shape (m, n).
        R: Shape (m, m).
        d: Shape (m,), or None.
        observed: Mask over y, or None; what is hidden says nothing.
    """
    r = y if d is None else y - d
    count = jnp.asarray(y.shape[0], y.dtype)
    if observed is not None:
        both = observed[:, None] & observed[None, :]
        r = jnp.where(observed, r, 0.0)
        H = jnp.where(observed[:, None], H, 0.0)
        R = jnp.where(both, R, jnp.eye(R.shape[0], dtype=R.dtype))
        count = jnp.sum(observed).astype(y.dtype)
    lower = _chol(R)
    a, b = _solve(lower, H), _solve(lower, r)
    c = -0.5 * (b @ b) - jnp.sum(jnp.log(jnp.diag(lower))) - 0.5 * count * np.log(2 * np.pi)
    return Quadratic(c, a.T @ b, a.T @ a)


def marginal(g: Quadratic, n: int, M: Any, m: Any, lower: Any) -> Quadratic:
    """The message on z of g(z, v) where v ~ N(M z + m, Q), Q = lower lower'.

    Van der Meulen and Schauer (2020), theorem 14, for messages that see z as well. Rewritten so
    that neither H nor Q is inverted.
    """
    Fz, Fv = g.F[:n], g.F[n:]
    Hzz, Hzv, Hvv = g.H[:n, :n], g.H[:n, n:], g.H[n:, n:]
    eye = jnp.eye(Hvv.shape[0], dtype=Hvv.dtype)
    C = _chol(eye + lower.T @ Hvv @ lower)
    S = _solve(C, lower.T)  # P = S'S = (Q^-1 + H)^-1
    P = S.T @ S
    W = eye - P @ Hvv  # = (I + QH)^-1
    rho = Fv - Hvv @ m
    s = S @ rho
    half = _solve(C, lower.T @ Hvv)
    core = Hvv - half.T @ half  # = H (I + QH)^-1
    c = g.c + Fv @ m - 0.5 * (m @ Hvv @ m) + 0.5 * (s @ s) - jnp.sum(jnp.log(jnp.diag(C)))
    F = Fz - Hzv @ (m + P @ rho) + M.T @ (W.T @ rho)
    cross = Hzv @ W @ M
    H = Hzz - Hzv @ P @ Hzv.T + cross + cross.T + M.T @ core @ M
    return Quadratic(c, F, 0.5 * (H + H.T))


class GuidedGaussian(dist.Distribution):
    """A Gaussian kernel tilted by a quadratic message; an array of any shape.

    The value is `loc + lower C'^-1 eps` for standard normal eps, so that no covariance is factored
    twice.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("loc", "lower", "C")
    reparametrized_params: ClassVar[list[str]] = ["loc", "lower", "C"]

    def __init__(self, loc: Any, lower: Any, C: Any, shape: tuple[int, ...]):
        self.loc, self.lower, self.C = loc, lower, C
        super().__init__((), tuple(shape), validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self):
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def mean(self) -> Any:
        return self.loc.reshape(self.event_shape)

    def value(self, noise: Any) -> Any:
        """The value at standard normal noise, shape (d,)."""
        x = self.loc + self.lower @ _solve(self.C, noise, trans=True)
        return x.reshape(self.event_shape)

    def noise(self, value: Any) -> Any:
        """The noise behind a value."""
        return self.C.T @ _solve(self.lower, value.reshape(-1) - self.loc)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        eps = jax.random.normal(key, (*sample_shape, self.loc.shape[-1]), self.loc.dtype)
        flat = jax.vmap(self.value)(eps.reshape((-1, eps.shape[-1])))
        return flat.reshape((*sample_shape, *self.event_shape))

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        def one(v):
            eps = self.noise(v)
            scale = jnp.log(jnp.diag(self.lower)) - jnp.log(jnp.diag(self.C))
            return -0.5 * (eps @ eps) - jnp.sum(scale) - 0.5 * eps.size * np.log(2 * np.pi)

        n = len(self.event_shape)
        lead = value.shape[: value.ndim - n]
        flat = value.reshape((-1, *self.event_shape))
        return jax.vmap(one)(flat).reshape(lead)


def tilt_gaussian(mean: Any, lower: Any, g: Quadratic, shape: Any) -> tuple[Any, Any]:
    """N(mean, lower lower') tilted by g, and log of the integral (K g)."""
    r = g.F - g.H @ mean
    eye = jnp.eye(mean.shape[0], dtype=mean.dtype)
    C = _chol(eye + lower.T @ g.H @ lower)
    w = _solve(C, lower.T @ r)
    log_integral = g(mean) + 0.5 * (w @ w) - jnp.sum(jnp.log(jnp.diag(C)))
    loc = mean + lower @ _solve(C, w, trans=True)
    return GuidedGaussian(loc, lower, C, shape), log_integral


_GAUSSIAN = ("Normal", "MultivariateNormal", "LowRankMultivariateNormal")


def gaussian(site: Any, operands: Any) -> tuple[Any, Any]:
    """Mean `(d,)` and Cholesky factor `(d, d)` of a Gaussian site, flattened."""
    if site.spec.family not in _GAUSSIAN:
        raise InvalidModel(
            f"ab.guided: site {site.address!r} ({site.where}) is {site.spec.family}; Gaussian "
            f"guiding tilts {', '.join(_GAUSSIAN)}. Use ab.guiding.discrete or ab.guiding.gamma, "
            f"or write the state as a function of a Gaussian site and name that one."
        )
    dtype = jnp.promote_types(site.dtype, jnp.result_type(float))

    def one(ops):
        d = site.build(ops)
        mean = jnp.broadcast_to(d.mean, site.shape).astype(dtype)
        if site.spec.family == "Normal":
            return mean, jnp.broadcast_to(jnp.sqrt(d.variance), site.shape).astype(dtype)
        base = d
        while hasattr(base, "base_dist"):
            base = base.base_dist
        lower = base.scale_tril if hasattr(base, "scale_tril") else _chol(base.covariance_matrix)
        return mean, jnp.broadcast_to(lower, (*site.shape, site.shape[-1])).astype(dtype)

    mean, scale = elementwise(site, one, operands)
    size = mean.size
    if site.spec.family == "Normal":
        return mean.reshape(size), jnp.diag(scale.reshape(size))
    k = scale.shape[-1]
    blocks = scale.reshape((-1, k, k))
    n = blocks.shape[0]
    if n == 1:
        return mean.reshape(size), blocks[0]
    full = jnp.zeros((n, k, n, k), dtype).at[jnp.arange(n), :, jnp.arange(n), :].set(blocks)
    return mean.reshape(size), full.reshape((size, size))


# ---------------------------------------------------------------------- discrete


class Table(eqx.Module):
    """log g(k) for the states k = 0, ..., K - 1; shape (K,)."""

    log_g: Any

    def __call__(self, k: Any) -> Any:
        return self.log_g[jnp.reshape(k, ()).astype(int)]

    def __add__(self, other: Table) -> Table:
        """Fuses two messages on the same state."""
        return Table(self.log_g + other.log_g)


class GuidedCategorical(dist.Distribution):
    """A discrete kernel tilted by a table; a value of any shape with one entry."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("log_p",)

    def __init__(self, log_p: Any, shape: tuple[int, ...]):
        self.log_p = log_p
        super().__init__((), tuple(shape), validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        inside = constraints.integer_interval(0, self.log_p.shape[-1] - 1)
        return constraints.independent(inside, len(self.event_shape))

    @property
    def mean(self) -> Any:  # the anchor of a path: the most probable state
        return jnp.argmax(self.log_p).reshape(self.event_shape)

    def value(self, noise: Any) -> Any:
        """The value at standard normal noise, shape (1,): the quantile at its probability."""
        u = jax.scipy.special.ndtr(noise[0])
        below = jnp.cumsum(jnp.exp(self.log_p))
        k = jnp.sum(u * below[-1] > below)
        return jnp.minimum(k, self.log_p.shape[-1] - 1).reshape(self.event_shape)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        k = jax.random.categorical(key, self.log_p, shape=sample_shape)
        return k.reshape((*sample_shape, *self.event_shape))

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        n = len(self.event_shape)
        k = value.reshape(value.shape[: value.ndim - n])
        return self.log_p[k.astype(int)]


def tilt_table(log_p: Any, g: Table, shape: Any) -> tuple[Any, Any]:
    """Probabilities tilted by a table, and log of the sum (K g)."""
    joint = log_p + g.log_g
    total = jax.nn.logsumexp(joint)
    return GuidedCategorical(joint - total, shape), total


def categories(site: Any, operands: Any) -> Any:
    """Log probabilities `(K,)` of a discrete site with one entry."""
    if site.spec.family not in ("Categorical", "Bernoulli") or int(np.prod(site.full_shape)) != 1:
        raise InvalidModel(
            f"ab.guided: site {site.address!r} ({site.where}) is {site.spec.family} of shape "
            f"{site.full_shape}; discrete guiding takes one Categorical or Bernoulli. Encode "
            f"several discrete variables as one state."
        )

    def one(ops):
        d = site.build(ops)
        ks = d.enumerate_support(expand=True)
        return jnp.asarray(d.log_prob(ks))

    log_p = elementwise(site, one, operands)
    return log_p.reshape(-1).astype(jnp.result_type(float))


# ---------------------------------------------------------------------- gamma increments


class GammaMessage(eqx.Module):
    """g(x) = density of Gamma(shape, rate) at end - x; elementwise."""

    end: Any
    shape: Any
    rate: Any

    def __call__(self, x: Any) -> Any:
        return jnp.sum(dist.Gamma(self.shape, self.rate).log_prob(self.end - x))


def log_kummer(a: Any, b: Any, z: Any, terms: int = 160) -> Any:
    """log 1F1(a; b; z) for 0 < a < b; elementwise.

    The series has positive terms after Kummer's transformation to z > 0; where it needs more than
    `terms`, the expansion for large z (Abramowitz and Stegun 13.5.1).
    """
    a, b, z = jnp.broadcast_arrays(*(jnp.asarray(x, jnp.result_type(float)) for x in (a, b, z)))
    flip = z < 0
    a, shift, z = jnp.where(flip, b - a, a), jnp.where(flip, z, 0.0), jnp.abs(z)
    small = z < 0.5 * terms
    safe = jnp.where(small, z, 1.0)
    gammaln = jax.scipy.special.gammaln

    def add(i, state):
        log_term, total = state
        log_term = log_term + jnp.log(a + i) - jnp.log(b + i) + jnp.log(safe) - jnp.log1p(i * 1.0)
        return log_term, jnp.logaddexp(total, log_term)

    safe = jnp.maximum(safe, jnp.finfo(z.dtype).tiny)
    zero = jnp.zeros_like(z)
    series = jax.lax.fori_loop(0, terms, add, (zero, zero))[1]
    large = jnp.where(small, float(terms), z)
    term, total = jnp.ones_like(z), jnp.ones_like(z)
    for i in range(8):
        term = term * (b - a + i) * (1 - a + i) / ((i + 1) * large)
        total = total + term
    far = gammaln(b) - gammaln(a) + large + (a - b) * jnp.log(large) + jnp.log(jnp.abs(total))
    return shift + jnp.where(small, series, far)


class GuidedGamma(dist.Distribution):
    """room * Z with density of Z proportional to z^(a-1) (1-z)^(A-1) exp(-xi z)."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("room", "a", "A", "xi")

    def __init__(self, room: Any, a: Any, A: Any, xi: Any):
        self.room, self.a, self.A, self.xi = jnp.broadcast_arrays(room, a, A, xi)
        super().__init__((), jnp.shape(self.room), validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self):
        return constraints.independent(constraints.positive, len(self.event_shape))

    @property
    def mean(self) -> Any:
        return self.room * self.a / (self.a + self.A)

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        shape = (*sample_shape, *self.event_shape)
        a, A, xi, room = (
            jnp.broadcast_to(x, shape).reshape(-1) for x in (self.a, self.A, self.xi, self.room)
        )
        keys = jax.random.split(key, a.shape[0])
        return (room * jax.vmap(_kummer_beta)(keys, a, A, xi)).reshape(shape)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        z = value / self.room
        inside = (z > 0) & (z < 1)
        z = jnp.where(inside, z, 0.5)
        log_z = (
            (self.a - 1) * jnp.log(z) + (self.A - 1) * jnp.log1p(-z) - self.xi * z
            - jax.scipy.special.betaln(self.a, self.A)
            - log_kummer(self.a, self.a + self.A, -self.xi) - jnp.log(self.room)
        )  # fmt: skip
        score = jnp.where(inside, log_z, -jnp.inf)
        return jnp.sum(score, axis=tuple(range(value.ndim - len(self.event_shape), value.ndim)))


def _kummer_beta(key: Any, a: Any, A: Any, xi: Any) -> Any:
    """Rejection, after the tilt is moved to the side where exp(-xi z) falls (1 - z for xi < 0).

    From Beta(a, A) where that accepts often. Else from Gamma(a, xi), accepted with (1 - z)^(A - 1)
    up to a bound: 1 for A >= 1; for A < 1, 2^(1 - A) on z <= 1/2, with a second component beyond.
    """
    flip = xi < 0
    a, A, xi = jnp.where(flip, A, a), jnp.where(flip, a, A), jnp.abs(xi)
    by_gamma = xi * a > a + A
    safe_xi = jnp.maximum(xi, 1e-6)
    spiked = A < 1
    log_near = (1 - A) * np.log(2) + jax.scipy.special.gammaln(a) - a * jnp.log(safe_xi)
    log_cap = jnp.maximum(1 - a, 0.0) * np.log(2)  # of z^(a - 1) beyond 1/2
    log_far = log_cap - 0.5 * xi - A * np.log(2) - jnp.log(A)
    far_share = jnp.where(spiked, jax.nn.sigmoid(log_far - log_near), 0.0)

    def trial(key):
        k1, k2, k3, k4, k5 = jax.random.split(key, 5)
        u, v, w = (jax.random.uniform(k, dtype=xi.dtype) for k in (k3, k4, k5))
        far = v < far_share
        beyond = 1 - 0.5 * w ** (1 / A)
        near = jax.random.gamma(k2, a, dtype=xi.dtype) / safe_xi
        z = jnp.where(
            by_gamma, jnp.where(far, beyond, near), jax.random.beta(k1, a, A, dtype=xi.dtype)
        )
        inside = (z > 0) & (z < 1) & (far | ~by_gamma | ~spiked | (z <= 0.5))
        safe = jnp.where(inside, z, 0.5)
        power = (A - 1) * jnp.log1p(-safe)
        log_near_accept = jnp.where(spiked, power - (1 - A) * np.log(2), power)
        log_far_accept = (a - 1) * jnp.log(safe) - log_cap - xi * (safe - 0.5)
        log_accept = jnp.where(
            by_gamma, jnp.where(far, log_far_accept, log_near_accept), -xi * safe
        )
        return z, inside & (jnp.log(u) < log_accept)

    def body(state):
        key, _, _ = state
        key, sub = jax.random.split(key)
        return (key, *trial(sub))

    start = (key, jnp.zeros_like(a), jnp.zeros((), bool))
    z = jax.lax.while_loop(lambda s: ~s[2], body, start)[1]
    return jnp.where(flip, 1 - z, z)


def tilt_gamma(shape: Any, rate: Any, room: Any, g: Any) -> tuple[Any, Any]:
    """A Gamma(shape, rate) increment tilted by a gamma message; `room` is end - x > 0.

    The weight of an edge is (rate / g.rate)^shape 1F1(shape; shape + A; -xi) with
    xi = (rate - g.rate) room, beside the auxiliary's own transition density.
    """
    alive = room > 0
    room = jnp.where(alive, room, 1.0)
    xi = (rate - g.rate) * room
    log_integral = (
        dist.Gamma(shape + g.shape, g.rate).log_prob(room)
        + shape * (jnp.log(rate) - jnp.log(g.rate))
        + log_kummer(shape, shape + g.shape, -xi)
    )
    return GuidedGamma(room, shape, g.shape, xi), jnp.sum(jnp.where(alive, log_integral, -jnp.inf))
