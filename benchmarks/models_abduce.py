"""The models of the reference posteriors, as abduce users write them.

Ordinary functions: rows are mapped with `jax.vmap`, time is a `jax.lax.scan`, sites lie inside
both. What is observed is named when the posterior is asked for, not here.
"""

import jax
import jax.numpy as jnp

import abduce as ab
import abduce.dist as dist
from benchmarks.lotka_volterra import log_populations

__all__ = ["MODELS"]

constraints = dist.constraints


def _flat(support, *event_shape):
    return dist.ImproperUniform(support, (), event_shape)


@ab.model
def autoregression(lags):
    alpha = ab.sample("alpha", dist.Normal(0, 10))
    beta = ab.sample("beta", dist.Normal(0, 10).expand([lags.shape[1]]))
    sigma = ab.sample("sigma", dist.HalfCauchy(2.5))
    return jax.vmap(lambda past: ab.sample("y", dist.Normal(alpha + past @ beta, sigma)))(lags)


@ab.model
def diamonds(predictors):
    b = ab.sample("b", dist.Normal(0, 1).expand([predictors.shape[1]]))
    intercept = ab.sample("Intercept", dist.StudentT(3, 8, 10))
    sigma = ab.sample("sigma", dist.FoldedDistribution(dist.StudentT(3, 0, 10)))
    return ab.sample("Y", dist.Normal(intercept + predictors @ b, sigma))


def _linear(design, sigma):
    beta = ab.sample("beta", _flat(constraints.real, design.shape[1]))
    return jax.vmap(lambda row: ab.sample("y", dist.Normal(row @ beta, sigma)))(design)


@ab.model
def regression(design):
    return _linear(design, ab.sample("sigma", _flat(constraints.positive)))


@ab.model
def regression_cauchy(design):
    return _linear(design, ab.sample("sigma", dist.HalfCauchy(2.5)))


@ab.model
def regression_vague(design):
    beta = ab.sample("beta", dist.Normal(0, 10).expand([design.shape[1]]))
    sigma = ab.sample("sigma", dist.HalfNormal(10))
    return ab.sample("y", dist.Normal(design @ beta, sigma))


@ab.model
def kilpisjarvi(x, alpha_mean, alpha_sd, beta_mean, beta_sd):
    alpha = ab.sample("alpha", dist.Normal(alpha_mean, alpha_sd))
    beta = ab.sample("beta", dist.Normal(beta_mean, beta_sd))
    sigma = ab.sample("sigma", _flat(constraints.positive))
    return jax.vmap(lambda year: ab.sample("y", dist.Normal(alpha + beta * year, sigma)))(x)


@ab.model
def schools(sigma):
    mu = ab.sample("mu", dist.Normal(0, 5))
    tau = ab.sample("tau", dist.HalfCauchy(5))

    def school(s):
        theta = ab.sample("theta", dist.Normal(mu, tau))
        return ab.sample("y", dist.Normal(theta, s))

    return jax.vmap(school, axis_name="school")(sigma)


schools_noncentered = ab.reparam(schools, {"theta": ab.noncentered()})


@ab.model
def garch(sigma1, num_times):
    mu = ab.sample("mu", _flat(constraints.real))
    alpha0 = ab.sample("alpha0", _flat(constraints.positive))
    alpha1 = ab.sample("alpha1", _flat(constraints.unit_interval))
    beta1 = ab.sample("beta1", _flat(constraints.interval(0.0, 1 - alpha1)))

    def step(variance, _):
        y = ab.sample("y", dist.Normal(mu, jnp.sqrt(variance)))
        return alpha0 + alpha1 * (y - mu) ** 2 + beta1 * variance, y

    _, y = jax.lax.scan(step, sigma1**2, length=num_times)
    return y


@ab.model
def gaussian_process(x):
    rho = ab.sample("rho", dist.Gamma(25, 4))
    alpha = ab.sample("alpha", dist.HalfNormal(2))
    sigma = ab.sample("sigma", dist.HalfNormal(1))
    kernel = alpha**2 * jnp.exp(-0.5 * ((x[:, None] - x) / rho) ** 2)
    covariance = kernel + sigma * jnp.eye(x.shape[0])
    return ab.sample("y", dist.MultivariateNormal(covariance_matrix=covariance))


@ab.model
def hidden_markov(y):
    rows = [ab.sample(f"theta{k}", dist.Dirichlet(jnp.ones(2))) for k in (1, 2)]
    mu = ab.sample("mu", _flat(constraints.positive_ordered_vector, 2))
    ab.factor("mu_prior", dist.Normal(jnp.array([3.0, 10.0]), 1).log_prob(mu).sum())
    log_transition = jnp.log(jnp.stack(rows))
    emission = dist.Normal(mu, 1).log_prob(y[:, None])

    def forward(log_g, log_emission):
        log_g = jax.nn.logsumexp(log_g[:, None] + log_transition, axis=0) + log_emission
        return log_g, None

    log_g, _ = jax.lax.scan(forward, emission[0], emission[1:])
    ab.factor("likelihood", jax.nn.logsumexp(log_g))


@ab.model
def predator_prey(ts):
    centre, spread = jnp.array([1, 0.05, 1, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05])
    theta = ab.sample("theta", dist.TruncatedNormal(centre, spread, low=0.0))
    z_init = ab.sample("z_init", dist.LogNormal(jnp.log(10.0), 1).expand([2]))
    sigma = ab.sample("sigma", dist.LogNormal(-1, 1).expand([2]))
    ab.sample("y_init", dist.LogNormal(jnp.log(z_init), sigma))
    log_z = log_populations(theta, z_init, ts)
    return jax.vmap(lambda row: ab.sample("y", dist.LogNormal(row, sigma)))(log_z)


@ab.model
def mixture(num_rows):
    mu = ab.sample("mu", _flat(constraints.ordered_vector, 2))
    ab.factor("mu_prior", dist.Normal(0, 2).log_prob(mu).sum())
    sigma = ab.sample("sigma", dist.HalfNormal(2).expand([2]))
    theta = ab.sample("theta", dist.Beta(5, 5))
    weights = dist.Categorical(probs=jnp.stack([theta, 1 - theta]))
    rows = dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)).expand([num_rows])
    return ab.sample("y", rows)


MODELS = {
    "autoregression": autoregression,
    "diamonds": diamonds,
    "regression": regression,
    "regression_cauchy": regression_cauchy,
    "regression_vague": regression_vague,
    "kilpisjarvi": kilpisjarvi,
    "schools": schools,
    "schools_noncentered": schools_noncentered,
    "garch": garch,
    "gaussian_process": gaussian_process,
    "hidden_markov": hidden_markov,
    "predator_prey": predator_prey,
    "mixture": mixture,
}
