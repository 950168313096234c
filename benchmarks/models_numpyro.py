"""The models of the reference posteriors, as NumPyro users write them.

`observed` is a dict of the observed values by address. `jax.lax.scan` appears only where no sample
site lies inside it: NumPyro would need its own `scan` otherwise. Sizes are read off the data: with
`jit_model_args=True`, arguments are traced, integers too.
"""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from benchmarks.lotka_volterra import log_populations

__all__ = ["MODELS"]


def _flat(support, *event_shape):
    return dist.ImproperUniform(support, (), event_shape)


def autoregression(lags, observed):
    alpha = numpyro.sample("alpha", dist.Normal(0, 10))
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([lags.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    with numpyro.plate("time", lags.shape[0]):
        numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=observed["y"])


def diamonds(predictors, observed):
    b = numpyro.sample("b", dist.Normal(0, 1).expand([predictors.shape[1]]).to_event(1))
    intercept = numpyro.sample("Intercept", dist.StudentT(3, 8, 10))
    sigma = numpyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3, 0, 10)))
    with numpyro.plate("stones", predictors.shape[0]):
        numpyro.sample("Y", dist.Normal(intercept + predictors @ b, sigma), obs=observed["Y"])


def _linear(design, sigma, observed):
    beta = numpyro.sample("beta", _flat(constraints.real, design.shape[1]))
    with numpyro.plate("rows", design.shape[0]):
        numpyro.sample("y", dist.Normal(design @ beta, sigma), obs=observed["y"])


def regression(design, observed):
    _linear(design, numpyro.sample("sigma", _flat(constraints.positive)), observed)


def regression_cauchy(design, observed):
    _linear(design, numpyro.sample("sigma", dist.HalfCauchy(2.5)), observed)


def regression_vague(design, observed):
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([design.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10))
    with numpyro.plate("rows", design.shape[0]):
        numpyro.sample("y", dist.Normal(design @ beta, sigma), obs=observed["y"])


def kilpisjarvi(x, alpha_mean, alpha_sd, beta_mean, beta_sd, observed):
    alpha = numpyro.sample("alpha", dist.Normal(alpha_mean, alpha_sd))
    beta = numpyro.sample("beta", dist.Normal(beta_mean, beta_sd))
    sigma = numpyro.sample("sigma", _flat(constraints.positive))
    with numpyro.plate("years", x.shape[0]):
        numpyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=observed["y"])


def schools(sigma, observed):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", sigma.shape[0]):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=observed["y"])


schools_noncentered = numpyro.handlers.reparam(
    schools, config={"theta": numpyro.infer.reparam.LocScaleReparam(centered=0)}
)


def garch(sigma1, num_times, observed):
    mu = numpyro.sample("mu", _flat(constraints.real))
    alpha0 = numpyro.sample("alpha0", _flat(constraints.positive))
    alpha1 = numpyro.sample("alpha1", _flat(constraints.unit_interval))
    # An ImproperUniform over an interval that depends on alpha1 comes back on the wrong scale from
    # NumPyro 0.22 (it does not see that the support is dynamic), hence the proper uniform, and its
    # density taken out again.
    beta1 = numpyro.sample("beta1", dist.Uniform(0, 1 - alpha1))
    numpyro.factor("flat", jnp.log1p(-alpha1))
    y = observed["y"]

    def step(variance, y_before):
        variance = alpha0 + alpha1 * (y_before - mu) ** 2 + beta1 * variance
        return variance, variance

    _, later = jax.lax.scan(step, sigma1**2, y[:-1])
    scale = jnp.sqrt(jnp.concatenate([jnp.atleast_1d(sigma1**2), later]))
    with numpyro.plate("time", y.shape[0]):
        numpyro.sample("y", dist.Normal(mu, scale), obs=y)


def gaussian_process(x, observed):
    rho = numpyro.sample("rho", dist.Gamma(25, 4))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    kernel = alpha**2 * jnp.exp(-0.5 * ((x[:, None] - x) / rho) ** 2)
    covariance = kernel + sigma * jnp.eye(x.shape[0])
    numpyro.sample(
        "y", dist.MultivariateNormal(covariance_matrix=covariance), obs=observed["y"]
    )


def hidden_markov(y, observed):
    rows = [numpyro.sample(f"theta{k}", dist.Dirichlet(jnp.ones(2))) for k in (1, 2)]
    mu = numpyro.sample("mu", _flat(constraints.positive_ordered_vector, 2))
    numpyro.factor("mu_prior", dist.Normal(jnp.array([3.0, 10.0]), 1).log_prob(mu).sum())
    log_transition = jnp.log(jnp.stack(rows))
    emission = dist.Normal(mu, 1).log_prob(y[:, None])

    def forward(log_g, log_emission):
        log_g = jax.nn.logsumexp(log_g[:, None] + log_transition, axis=0) + log_emission
        return log_g, None

    log_g, _ = jax.lax.scan(forward, emission[0], emission[1:])
    numpyro.factor("likelihood", jax.nn.logsumexp(log_g))


def predator_prey(ts, observed):
    centre, spread = jnp.array([1, 0.05, 1, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05])
    theta = numpyro.sample("theta", dist.TruncatedNormal(centre, spread, low=0.0).to_event(1))
    z_init = numpyro.sample("z_init", dist.LogNormal(jnp.log(10.0), 1).expand([2]).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1, 1).expand([2]).to_event(1))
    numpyro.sample("y_init", dist.LogNormal(jnp.log(z_init), sigma), obs=observed["y_init"])
    log_z = log_populations(theta, z_init, ts)
    numpyro.sample("y", dist.LogNormal(log_z, sigma), obs=observed["y"])


def mixture(num_rows, observed):
    mu = numpyro.sample("mu", _flat(constraints.ordered_vector, 2))
    numpyro.factor("mu_prior", dist.Normal(0, 2).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5, 5))
    weights = dist.Categorical(probs=jnp.stack([theta, 1 - theta]))
    y = observed["y"]
    with numpyro.plate("rows", y.shape[0]):
        numpyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)


MODELS = {
    f.__name__: f
    for f in (
        autoregression,
        diamonds,
        regression,
        regression_cauchy,
        regression_vague,
        kilpisjarvi,
        schools,
        garch,
        gaussian_process,
        hidden_markov,
        predator_prey,
        mixture,
    )
} | {"schools_noncentered": schools_noncentered}
