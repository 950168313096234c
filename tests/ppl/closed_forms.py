"""Log densities written out by hand, in `jax.numpy`, so that references differentiate too.

Nothing here uses `numpyro` or `abduce`: an error in a distribution's rebuilding, in a batch axis
or in an order of parameters cannot cancel. Every function sums over its arguments' broadcast
shape and returns a scalar in nats. Parametrisations are NumPyro's.
"""

import jax.numpy as jnp
from jax.scipy.special import betaln, gammaln, logsumexp

LOG_2PI = 1.8378770664093453


def normal(x, loc=0.0, scale=1.0):
    z = (x - loc) / scale
    return jnp.sum(-0.5 * z**2 - jnp.log(scale) - 0.5 * LOG_2PI)


def half_normal(x, scale=1.0):
    return jnp.sum(jnp.log(2.0) - 0.5 * (x / scale) ** 2 - jnp.log(scale) - 0.5 * LOG_2PI)


def half_cauchy(x, scale=1.0):
    return jnp.sum(jnp.log(2.0 / jnp.pi) - jnp.log(scale) - jnp.log1p((x / scale) ** 2))


def cauchy(x, loc=0.0, scale=1.0):
    return jnp.sum(-jnp.log(jnp.pi * scale) - jnp.log1p(((x - loc) / scale) ** 2))


def laplace(x, loc=0.0, scale=1.0):
    return jnp.sum(-jnp.abs(x - loc) / scale - jnp.log(2.0 * scale))


def student_t(x, df, loc=0.0, scale=1.0):
    z = (x - loc) / scale
    norm = gammaln((df + 1) / 2) - gammaln(df / 2) - 0.5 * jnp.log(df * jnp.pi) - jnp.log(scale)
    return jnp.sum(norm - (df + 1) / 2 * jnp.log1p(z**2 / df))


def exponential(x, rate=1.0):
    return jnp.sum(jnp.log(rate) - rate * x)


def gamma(x, concentration, rate=1.0):
    a, b = concentration, rate
    return jnp.sum(a * jnp.log(b) - gammaln(a) + (a - 1) * jnp.log(x) - b * x)


def beta(x, a, b):
    return jnp.sum((a - 1) * jnp.log(x) + (b - 1) * jnp.log1p(-x) - betaln(a, b))


def log_normal(x, loc=0.0, scale=1.0):
    z = (jnp.log(x) - loc) / scale
    return jnp.sum(-0.5 * z**2 - jnp.log(x) - jnp.log(scale) - 0.5 * LOG_2PI)


def uniform(x, low, high):
    shape = jnp.broadcast_shapes(jnp.shape(x), jnp.shape(low), jnp.shape(high))
    density = jnp.where((x >= low) & (x <= high), -jnp.log(high - low), -jnp.inf)
    return jnp.sum(jnp.broadcast_to(density, shape))


def bernoulli(x, probs):
    return jnp.sum(jnp.where(x == 1, jnp.log(probs), jnp.log1p(-probs)))


def bernoulli_logits(x, logits):
    return jnp.sum(x * logits - jnp.logaddexp(0.0, logits))


def categorical(x, probs):
    table = jnp.log(probs) - jnp.log(jnp.sum(probs, -1, keepdims=True))
    shape = jnp.broadcast_shapes(jnp.shape(x), table.shape[:-1])
    index = jnp.broadcast_to(x, shape)[..., None]
    return jnp.sum(
        jnp.take_along_axis(jnp.broadcast_to(table, (*shape, table.shape[-1])), index, -1)
    )


def poisson(x, rate):
    return jnp.sum(x * jnp.log(rate) - rate - gammaln(x + 1.0))


def binomial(x, n, probs):
    choose = gammaln(n + 1.0) - gammaln(x + 1.0) - gammaln(n - x + 1.0)
    return jnp.sum(choose + x * jnp.log(probs) + (n - x) * jnp.log1p(-probs))


def dirichlet(x, concentration):
    a = concentration
    kernel = jnp.sum((a - 1) * jnp.log(x), -1)
    return jnp.sum(kernel + gammaln(jnp.sum(a, -1)) - jnp.sum(gammaln(a), -1))


def multivariate_normal(x, loc, covariance):
    d = x - loc
    _, logdet = jnp.linalg.slogdet(covariance)
    quad = jnp.einsum("...i,...i->...", d, jnp.linalg.solve(covariance, d[..., None])[..., 0])
    return jnp.sum(-0.5 * (quad + logdet + d.shape[-1] * LOG_2PI))


def normal_mixture(x, weights, locs, scales):
    z = (x[..., None] - locs) / scales
    return jnp.sum(logsumexp(jnp.log(weights) - 0.5 * z**2 - jnp.log(scales) - 0.5 * LOG_2PI, -1))


def lkj_cholesky_2(chol, concentration):
    """LKJ over 2x2 correlation matrices, as a density of the Cholesky factor's free element.

    In two dimensions `rho = L[1, 0]` and `det = 1 - rho**2 = L[1, 1]**2`; the matrix has density
    `det**(eta - 1) / (2**(2 eta - 1) B(eta, eta))` and the map from `L[1, 0]` to `rho` is the
    identity.
    """
    eta = concentration
    log_norm = (2 * eta - 1) * jnp.log(2.0) + betaln(eta, eta)
    return jnp.sum(2 * (eta - 1) * jnp.log(chol[..., 1, 1]) - log_norm)
