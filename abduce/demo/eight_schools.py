"""Eight schools: a posterior that breaks a sampler, the warning, and the cure."""

import jax
import matplotlib.pyplot as plt
import numpy as np

import abduce as ab
from abduce.demo import compare
from abduce.demo.report import Report
from abduce.inference import plots
from abduce.inference.diagnostics import ess_bulk
from abduce.models import classics, data

__all__ = ["infer"]


def infer(report: Report, key: jax.Array, draws: int) -> None:
    """Infers the effects of coaching in eight schools.

    Args:
        report: Prints the steps and keeps the plots.
        key: Typed PRNG key.
        draws: Draws of each chain.
    """
    centred_key, cured_key, swap_key, predict_key = jax.random.split(key, 4)
    default_key = jax.random.fold_in(key, 4)
    schools = data.eight_schools()
    question = {"given": {"y": schools.effect}, "coords": {"school": list(schools.school)}}
    nuts = ab.nuts(num_warmup=draws, num_samples=draws, progress_bar=False)

    report.chapter("Eight schools: how much does coaching help?")
    report.step("The data: eight experiments, each with a standard error (Rubin 1981).")
    report.table(
        ["school", *schools.school],
        [
            ["effect", *(f"{x:.0f}" for x in schools.effect)],
            ["standard error", *(f"{x:.0f}" for x in schools.standard_error)],
        ],
    )
    report.step("The model: an ordinary function, mapped over schools with jax.vmap.")
    report.code(classics.eight_schools)

    report.step("Its posterior by NUTS in the coordinates as written, which are known to be hard.")
    report.say("ab.nuts(adapt_coordinates=False)(model)")
    with report.warnings():
        centred = nuts.replace(adapt_coordinates=False)(classics.eight_schools).posterior(
            centred_key, schools.standard_error, **question
        )
    report.figure(
        plots.plot_pairs(
            {"theta[A]": centred["theta"][..., 0], "log tau": np.log(centred["tau"])},
            divergences=centred.diagnostics["diverging"],
        ),
        "schools-centred",
        "where tau is small theta is squeezed; divergences (red) gather at the neck.",
    )

    report.step("The cure: the same model in non-centred coordinates, and smaller steps.")
    report.say('cured = ab.reparam(model, {"theta": ab.noncentered()})')
    report.say("ab.nuts(target_accept_prob=0.95)(cured)")
    cured_model = ab.reparam(classics.eight_schools, {"theta": ab.noncentered()})
    nuts = nuts.replace(target_accept_prob=0.95)
    with report.warnings() as texts:
        cured = nuts(cured_model).posterior(cured_key, schools.standard_error, **question)
    if not texts:
        report.say("No warnings now.")
    report.text(str(cured.summary()))
    report.figure(
        _funnels({"centred": centred, "non-centred": cured}),
        "schools-cure",
        "the draws now reach down the neck, where the centred sampler never went.",
    )
    report.figure(
        _effects(cured, schools.effect),
        "schools-effects",
        "each school's effect is pulled from what it observed (cross) towards the others'.",
    )

    report.step("By default NUTS finds such coordinates itself, while it warms up.")
    report.say("ab.nuts()(model)")
    with report.warnings() as texts:
        default = nuts(classics.eight_schools).posterior(
            default_key, schools.standard_error, **question
        )
    if not texts:
        report.say("No warnings, with the model as it was first written.")
    for name, post in {"as written": centred, "by hand": cured, "by default": default}.items():
        ess = ess_bulk(np.log(post["tau"]))
        report.say(f"effective draws of log tau, {name}: {float(ess):.0f}")

    report.step("The same model with the decorator swapped.")
    algorithms = {
        "nuts": nuts,
        "importance": ab.importance(num_samples=100 * draws),
        "laplace": ab.laplace(num_samples=4 * draws),
    }
    with report.warnings():
        posteriors, seconds = compare.run_each(
            algorithms, cured_model, swap_key, schools.standard_error, **question
        )
    compare.show(report, posteriors, seconds, ["mu", "tau"])
    report.figure(
        plots.plot_compare(
            {
                name: {"mu": post["mu"], "log tau": np.log(post["tau"])}
                for name, post in posteriors.items()
            }
        ),
        "schools-algorithms",
        "NUTS and importance sampling agree; the mode of this posterior is far from its bulk.",
    )

    report.step("Posterior predictive check: would this model produce such data?")
    replicated = cured.predict(predict_key)["y"]
    for name, statistic in {"largest effect": np.max, "spread of effects": np.std}.items():
        share = np.mean(statistic(replicated, axis=-1) >= statistic(schools.effect))
        report.say(
            f"{name}: {statistic(schools.effect):.1f} observed; "
            f"{share:.0%} of replicated data sets reach it."
        )
    figure = plots.plot_predictive_check(
        schools.effect, replicated, x=np.arange(8), label="effect", x_label="school"
    )
    figure.axes[0].set_xticks(np.arange(8), schools.school)
    report.figure(
        figure,
        "schools-predictive",
        "the observed effects lie well inside what the model predicts.",
    )


def _funnels(posteriors):
    """The same two coordinates of each posterior, on the same axes."""
    figure, axes = plt.subplots(
        1, len(posteriors), figsize=(8, 4), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (name, post) in zip(axes, posteriors.items(), strict=True):
        theta, log_tau = np.ravel(post["theta"][..., 0]), np.ravel(np.log(post["tau"]))
        diverging = np.ravel(post.diagnostics["diverging"])
        axis.plot(theta[~diverging], log_tau[~diverging], ".", markersize=2, alpha=0.4)
        axis.plot(theta[diverging], log_tau[diverging], ".", color="tab:red")
        axis.set(title=name, xlabel="theta[A]")
    axes[0].set_ylabel("log tau")
    return figure


def _effects(post, observed):
    """The interval of each effect, with a cross where its school's observation is."""
    figure = plots.plot_intervals(
        {"theta": post["theta"]}, reference=0.0, dims=post.dims_by_site, coords=dict(post.coords)
    )
    (axis,) = figure.axes
    heights = axis.get_yticks()  # one for each school, in their order
    axis.plot(observed, heights, "x", color="tab:red")
    return figure
