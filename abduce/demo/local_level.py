"""The Nile again, with a level that drifts a little every year: a `jax.lax.scan` with sites."""

import jax
import matplotlib.pyplot as plt
import numpy as np

import abduce as ab
from abduce.demo import river_plots
from abduce.demo.report import Report
from abduce.inference.summary import summarize
from abduce.models import classics, data

__all__ = ["infer"]


def infer(report: Report, key: jax.Array, draws: int) -> None:
    """Infers the level of the Nile in every year.

    Args:
        report: Prints the steps and keeps the plots.
        key: Typed PRNG key.
        draws: Draws of each chain.
    """
    nuts_key, predict_key = jax.random.split(key)
    river = data.nile()

    report.chapter("The Nile once more: a level that drifts")
    report.step("The model: a random walk observed with noise, one step of jax.lax.scan a year.")
    report.code(classics.nile_local_level)

    report.step("A hundred levels and three parameters by NUTS, in non-centred coordinates.")
    model = ab.reparam(classics.nile_local_level, {"level": ab.noncentered()})
    nuts = ab.nuts(
        num_warmup=draws, num_samples=draws, target_accept_prob=0.95, progress_bar=False
    )
    with report.warnings():
        post = nuts(model).posterior(nuts_key, len(river.flow), given={"flow": river.flow})
    report.text(str(summarize({a: np.asarray(post[a]) for a in ["noise", "drift", "start"]})))
    report.say("Durbin and Koopman (2001) find, by maximum likelihood, noise 123 and drift 38.")

    report.step("Posterior predictive check: does a drifting level explain the river?")
    replicated = np.asarray(post.predict(predict_key)["flow"]).reshape(-1, len(river.flow))
    river_plots.check(report, replicated, river.flow)
    report.figure(
        _plot(river, np.asarray(post["level"]), replicated),
        "nile-local-level",
        "the level falls about 1899; this model was not told of any change point.",
    )


def _plot(river, level, replicated):
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    level = level.reshape(-1, level.shape[-1])
    river_plots.draw_flow(axes, river, level.mean(0), replicated)
    low, high = np.quantile(level, [0.05, 0.95], axis=0)
    axes.fill_between(river.year, low, high, color="tab:blue", alpha=0.35)
    axes.set(xlabel="year")
    return figure
