"""The Nile with one change of its mean flow in an unknown year."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import abduce as ab
import abduce.dist as dist
from abduce.demo import compare, river_plots
from abduce.demo.report import Report
from abduce.models import classics, data

__all__ = ["infer"]


def infer(report: Report, key: jax.Array, draws: int) -> None:
    """Infers when the Nile changed, and by how much.

    Args:
        report: Prints the steps and keeps the plots.
        key: Typed PRNG key.
        draws: Draws of each chain.
    """
    nuts_key, year_key, predict_key = jax.random.split(key, 3)
    river = data.nile()
    given = {"flow": river.flow}

    report.chapter("The Nile at Aswan, 1871 to 1970: when did its flow change?")
    report.step("The model as one would say it: the year of the change is a choice like any other.")
    report.code(classics.nile_change_year)
    report.say("A year has no gradient, so classics.nile_change_point sums it out: a mixture.")

    report.step("The decorator swapped. Importance sampling gets a proposal, itself a model:")
    report.code(ends_of_the_series)
    algorithms = {
        "nuts": ab.nuts(num_warmup=draws, num_samples=draws, progress_bar=False),
        "importance": ab.importance(num_samples=4 * draws, proposal=ends_of_the_series),
        "laplace": ab.laplace(num_samples=4 * draws),
    }
    with report.warnings():
        posteriors, seconds = compare.run_each(
            algorithms, classics.nile_change_point, nuts_key, river.year, given=given
        )
    compare.show(report, posteriors, seconds, ["before", "after", "noise"])

    report.step("The posterior of the year, and the same from the model that draws the year.")
    report.say("One year in a hundred is right, so few draws count; importance sampling says so.")
    post = posteriors["nuts"]
    summed_out = np.asarray(post.mean("change_probability"))
    importance = ab.importance(num_samples=100 * draws, proposal=ends_of_the_series)
    with report.warnings():
        sampled = importance(classics.nile_change_year).posterior(
            year_key, river.year, given=given
        )
    years = np.asarray(sampled["change"]).ravel()
    counted = np.array([np.mean(years == y) for y in river.year[1:]])
    likely = np.argsort(summed_out)[::-1][:5]
    report.table(
        ["first year of the new regime", *map(str, river.year[1:][likely])],
        [
            ["summed out, nuts", *(f"{p:.2f}" for p in summed_out[likely])],
            ["sampled, importance", *(f"{p:.2f}" for p in counted[likely])],
        ],
    )
    report.say("The first dam at Aswan was begun in 1898 and finished in 1902.")

    report.step("Posterior predictive check: is one change enough?")
    replicated = _replicate(predict_key, post, river.year)
    river_plots.check(report, replicated, river.flow)
    report.figure(
        _plot(river, post, summed_out, replicated),
        "nile-change-point",
        "one step down near 1899; the bars are the probability of each year.",
    )


@ab.model
def ends_of_the_series(given, year):
    """Proposes the two levels and the noise from the first and the last thirty years."""
    early, late = given["flow"][:30], given["flow"][-30:]
    ab.sample("before", dist.Normal(early.mean(), 50.0))
    ab.sample("after", dist.Normal(late.mean(), 40.0))
    ab.sample("noise", dist.LogNormal(jnp.log(late.std()), 0.2))


def _replicate(key, post, year):
    """Draws a flow for each posterior draw: a year from its posterior, then the river given it.

    `post.predict` would draw the year anew too, from its prior, for it is summed out there.
    """
    year_key, flow_key = jax.random.split(key)
    names = ["before", "after", "noise", "change_probability"]
    choices = {a: jnp.reshape(post[a], (-1, *post[a].shape[2:])) for a in names}
    chance = choices.pop("change_probability")
    choices["change"] = year[1:][jax.random.categorical(year_key, jnp.log(chance))]

    def river(key, choices):
        trace, _ = classics.nile_change_year.generate(key, choices, year)
        return trace.choices["flow"]

    return np.asarray(jax.vmap(river)(jax.random.split(flow_key, len(chance)), choices))


def _plot(river, post, probability, replicated):
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    after = np.cumsum(probability)  # chance that each year belongs to the new regime
    after = np.append(0.0, after)
    level = (1 - after) * float(post.mean("before")) + after * float(post.mean("after"))
    river_plots.draw_flow(top, river, level, replicated)
    bottom.bar(river.year[1:], probability, color="tab:red")
    bottom.set(xlabel="year", ylabel="chance of change")
    return figure
