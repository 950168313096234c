"""Models that are the field's common ground, written once and well.

Every model here is an ordinary function of JAX: units are mapped with `jax.vmap`, time is a
`jax.lax.scan`. Data come from `abduce.models.data`.
"""

import jax
import jax.numpy as jnp

import abduce.dist as dist
from abduce.ppl.language import deterministic, sample
from abduce.ppl.model import model

__all__ = ["eight_schools", "nile_change_point", "nile_change_year", "nile_local_level"]


@model
def eight_schools(standard_error):
    """Effects of eight experiments that share a population, in its centred form.

    Rubin (1981). The centred form is the one whose posterior is a funnel: where `tau` is small,
    every `theta` is squeezed towards `mu`, and no single step size fits.

    Args:
        standard_error: Known standard errors, shape `(schools,)`.

    Returns:
        The observed effects `y`, shape `(schools,)`.

    Sites: `mu`, `tau`, `theta` `(schools,)`, `y` `(schools,)`; all in points of the test.
    """
    mu = sample("mu", dist.Normal(0.0, 5.0))
    tau = sample("tau", dist.HalfCauchy(5.0))

    def school(error):
        theta = sample("theta", dist.Normal(mu, tau))
        return sample("y", dist.Normal(theta, error))

    return jax.vmap(school, axis_name="school")(standard_error)


@model
def nile_change_year(year):
    """A river whose mean flow changes once, in an unknown year: the change year is a choice.

    The model as one would say it. The discrete site suits `ab.importance`; for methods that need
    gradients, `nile_change_point` is the same model with the year summed out.

    Args:
        year: Consecutive years, shape `(years,)`.

    Returns:
        The flow of each year, in 1e8 cubic metres, shape `(years,)`.

    Sites: `before`, `after`, `noise`, `change` (first year of the new regime), `flow` `(years,)`.
    """
    before = sample("before", dist.Normal(1000.0, 250.0))
    after = sample("after", dist.Normal(1000.0, 250.0))
    noise = sample("noise", dist.HalfNormal(250.0))
    change = sample("change", dist.DiscreteUniform(year[0] + 1, year[-1]))

    def one_year(y):
        mean = jnp.where(y < change, before, after)
        return sample("flow", dist.Normal(mean, noise))

    return jax.vmap(one_year, axis_name="year")(year)


@model
def nile_change_point(year):
    """`nile_change_year` with the change year summed out, so that its density has a gradient.

    The flow is one draw from a mixture with a component for each possible change year. The
    probability of each change year given the flow and the other choices is the deterministic
    `change_probability`; its average over posterior draws is the posterior of the year.

    Args:
        year: Consecutive years, shape `(years,)`.

    Returns:
        The flow of each year, in 1e8 cubic metres, shape `(years,)`.

    Sites: `before`, `after`, `noise`, `flow` (one vector), and the deterministic
    `change_probability` `(years - 1,)`, whose entry `i` belongs to `year[i + 1]`.
    """
    before = sample("before", dist.Normal(1000.0, 250.0))
    after = sample("after", dist.Normal(1000.0, 250.0))
    noise = sample("noise", dist.HalfNormal(250.0))
    mean = jnp.where(year[None, :] < year[1:, None], before, after)  # (change year, year)
    by_change = dist.Normal(mean, noise).to_event(1)
    change = dist.Categorical(logits=jnp.zeros(len(year) - 1))
    flow = sample("flow", dist.MixtureSameFamily(change, by_change))
    deterministic("change_probability", jax.nn.softmax(by_change.log_prob(flow)))
    return flow


@model
def nile_local_level(num_years):
    """A river whose mean flow drifts: a random walk observed with noise, one step a year.

    Durbin and Koopman, "Time Series Analysis by State Space Methods" (2001), chapter 2, fit this
    model to this river.

    Args:
        num_years: How many years to run (an int).

    Returns:
        The flow of each year, in 1e8 cubic metres, shape `(num_years,)`.

    Sites: `start`, `drift` (standard deviation of a year's change of level), `noise` (standard
    deviation of a year's flow around its level), `level` `(num_years,)`, `flow` `(num_years,)`.
    """
    start = sample("start", dist.Normal(1000.0, 250.0))
    drift = sample("drift", dist.HalfNormal(100.0))
    noise = sample("noise", dist.HalfNormal(250.0))

    def step(level, _):
        level = sample("level", dist.Normal(level, drift))
        return level, sample("flow", dist.Normal(level, noise))

    _, flow = jax.lax.scan(step, start, None, length=num_years)
    return flow
