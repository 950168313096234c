"""Can a small change of the data carry a learned posterior far away?

For simulated data `x` the check looks for the worst perturbation `delta` of a given size,

    max KL(q(. | x) || q(. | x + delta))   with   |delta| <= epsilon,

`delta` in units of the simulations' spread and `|delta|` the Euclidean length over all entries
(Gloeckler, Deistler and Macke, "Adversarial robustness of amortized Bayesian inference", ICML
2023). What matters is what it does to the answer: whether the credible regions at `x + delta` still
hold the true latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np
from scipy import stats

from abduce.amortized.attacking import attack_all
from abduce.amortized.checks.result import Check, check_alpha
from abduce.amortized.gnpe import refuse_density
from abduce.amortized.posing import require_model
from abduce.amortized.posterior_model import AmortizedLaw
from abduce.amortized.posterior_network import PosteriorTask
from abduce.amortized.reading import require_fitted
from abduce.amortized.robustness import require_perturbable
from abduce.errors import InvalidAlgorithm, InvalidValue
from abduce.inference.algorithm import check_count
from abduce.inference.static import Static
from abduce.ppl.operations import typed_key

__all__ = ["check_attack", "run_attack"]

LEVELS = (0.5, 0.8, 0.95)


def run_attack(
    est: Any,
    key: Any,
    *,
    epsilon: float = 0.5,
    num_steps: int = 40,
    num_datasets: int = 200,
    num_samples: int = 200,
    num_random: int = 8,
    tolerance: float = 0.15,
    alpha: float = 0.01,
) -> Check:
    """Attacks the posterior of each of some simulated data sets.

    Projected gradient ascent on the divergence, from the worst of `num_random` random perturbations
    of length `epsilon`. The draws of `q(. | x)` that estimate the divergence are the same in every
    step; the numbers reported come from fresh ones.

    Args:
        est: What `ab.npe(...).fit(...)` returns; a loaded one needs `est.with_model(...)` first.
        key: Random key.
        epsilon: Greatest Euclidean length of a perturbation, in spreads of the simulated data (of
            the logarithm, for positive data). 0.5 in one entry, or 0.05 in each of a hundred.
        num_steps: Of the ascent.
        num_datasets: Data sets simulated with the model and arguments of training.
        num_samples: Draws of each posterior.
        num_random: Random perturbations of each data set to compare with.
        tolerance: How much of their coverage credible regions may lose.
        alpha: False-alarm rate.

    Returns:
        A `Check`: see `check_attack`. `arrays["perturbation"]` has the perturbations by address.

    Raises:
        NotFitted: Before `fit`, or the estimator does not know its model.
        InvalidAlgorithm: No posterior estimator with an exact density, or data that are discrete.
        NoDensity: The estimator has an `equivariance=`.
        InvalidValue: `epsilon` is not a positive number.

    Example:
        >>> check = ab.checks.run_attack(est, jax.random.key(0), epsilon=0.3)
        >>> print(check)
    """
    from abduce.amortized.estimator import PosteriorEstimator

    name = "run_attack"
    if not isinstance(est, PosteriorEstimator):
        raise InvalidAlgorithm(
            f"{name} attacks an estimator made by ab.npe, got {type(est).__name__}."
        )
    for setting, value in (
        ("num_steps", num_steps), ("num_datasets", num_datasets), ("num_samples", num_samples),
        ("num_random", num_random),
    ):  # fmt: skip
        check_count(name, setting, value)
    if not (np.isscalar(epsilon) and np.isfinite(epsilon) and epsilon > 0):
        raise InvalidValue(
            f"{name}: epsilon is a positive length, in spreads of the simulated data, got "
            f"{epsilon!r}."
        )
    require_fitted(est)
    refuse_density(est, name)
    require_model(est, "Write run_attack(est.with_model(model, *args), key).")
    simulation = est.simulation
    require_perturbable(name, est.layout, simulation["arguments"], est.settings.head)
    k_sim, k_read, k_attack = jax.random.split(typed_key(key, name), 3)
    rows = est.simulate(k_sim, num_datasets, batch_size=num_datasets)
    task = PosteriorTask(est.layout, est.settings)
    batch = task.read(rows, k_read, {"simulation": simulation, "scales": None})
    arrays, static = eqx.partition(est.network, eqx.is_array)
    law = AmortizedLaw(
        est.layout, est.settings, simulation["arguments"].static, Static(static)
    )
    out = attack_all(
        law, num_steps, num_samples, num_random, arrays, est.scales,
        list(simulation["arguments"].dynamic), batch, float(epsilon), k_attack,
    )  # fmt: skip
    out = jax.tree.map(np.asarray, out)
    check = check_attack(
        out["kl_attacked"], out["kl_random"], out["ranks"], out["ranks_untouched"],
        epsilon=epsilon, tolerance=tolerance, alpha=alpha,
    )  # fmt: skip
    check.arrays["perturbation"] = out["perturbation"]  # type: ignore[index]
    return check


def check_attack(
    kl_attacked: Any,
    kl_random: Any,
    ranks: Any,
    ranks_untouched: Any,
    *,
    epsilon: float,
    tolerance: float = 0.15,
    alpha: float = 0.01,
) -> Check:
    """Tests whether credible regions keep their coverage when the data are attacked.

    The hypothesis is that regions of credibility 50%, 80% and 95% lose at most `tolerance` of it;
    the p-values are binomial. The exact posterior loses coverage too where `epsilon` exceeds the
    noise of the data: then the model itself cannot tell the attacked data from others.

    Args:
        kl_attacked: Divergence of the attacked posterior from that of the same data set untouched,
            in nats, shape `(n,)`.
        kl_random: The mean over random perturbations of the same length, shape `(n,)`.
        ranks: Share of draws of the attacked posterior that are denser than the true latents there,
            shape `(n,)`.
        ranks_untouched: The same of the posterior of the data as they were.
        epsilon: Length of the perturbations.
        tolerance: How much of their coverage regions may lose.
        alpha: False-alarm rate.

    Returns:
        A `Check`. Its columns are the coverage at attacked and at untouched data; its arrays hold
        the arguments.

    Raises:
        InvalidValue: Shapes or settings do not fit.
    """
    check_alpha("check_attack", alpha)
    if not 0 < tolerance < LEVELS[0]:
        raise InvalidValue(
            f"check_attack: tolerance is the coverage that may be lost, between 0 and "
            f"{LEVELS[0]}, got {tolerance!r}."
        )
    names = ("kl_attacked", "kl_random", "ranks", "ranks_untouched")
    arrays = {
        a: np.asarray(x, np.float64)
        for a, x in zip(names, (kl_attacked, kl_random, ranks, ranks_untouched), strict=True)
    }
    n = arrays["ranks"].size
    if not n or any(x.shape != (n,) for x in arrays.values()):
        shapes = ", ".join(f"{a} {x.shape}" for a, x in arrays.items())
        raise InvalidValue(f"check_attack: expected vectors of one length, got {shapes}.")
    p_values, attacked, untouched = {}, {}, {}
    for level in LEVELS:
        region = f"{100 * level:.0f}% regions"
        inside = arrays["ranks"] < level
        p_values[region] = float(stats.binom.cdf(inside.sum(), n, level - tolerance))
        attacked[region] = float(inside.mean())
        untouched[region] = float((arrays["ranks_untouched"] < level).mean())
    least = min(float(stats.binom.cdf(0, n, level - tolerance)) for level in LEVELS)
    notes = [
        f"{n} data sets, perturbations of length {epsilon:.3g}; regions may lose "
        f"{100 * tolerance:.3g} points of coverage."
    ]
    if is_short := least * len(LEVELS) > alpha:
        notes.append(
            f"With {n} data sets no p-value can be below alpha={alpha}. Raise num_datasets."
        )
    passed = len(LEVELS) * min(p_values.values()) > alpha
    verdict, remedy = _verdict(arrays, attacked, untouched, passed)
    return Check(
        name="attack",
        p_values=p_values,
        alpha=alpha,
        verdict=verdict,
        remedy=remedy,
        notes=tuple(notes),
        columns={"attacked": attacked, "untouched": untouched},
        is_complete=not is_short,
        arrays={**arrays, "epsilon": epsilon},
        figure=_figure,
    )


def _verdict(
    arrays: Mapping[str, np.ndarray],
    attacked: Mapping[str, float],
    untouched: Mapping[str, float],
    passed: bool,
) -> tuple[str, str]:
    worst = max(attacked, key=lambda r: untouched[r] - attacked[r])
    found = (
        f"the posterior moves by {np.mean(arrays['kl_attacked']):.3g} nats on average (random "
        f"perturbations of the same length: {np.mean(arrays['kl_random']):.3g}), and {worst} hold "
        f"the true latents in {100 * attacked[worst]:.0f}% of attacked data sets "
        f"({100 * untouched[worst]:.0f}% untouched)"
    )
    if passed:
        return f"Credible regions withstand the attack: {found}.", ""
    remedy = (
        "Train with ab.npe(..., robustness=0.01), and raise that until the attack fails; more "
        "simulations help too. If epsilon exceeds the noise of the data, the exact posterior "
        "would fail as well: lower epsilon."
    )
    return f"Small changes of the data overturn the posterior: {found}.", remedy


def _figure(arrays: Mapping[str, Any]) -> Any:
    from abduce.amortized.checks.figures import plot_curves

    grid = np.linspace(0, 1, 201)
    curves = {
        label: np.array([(arrays[name] < c).mean() for c in grid])
        for label, name in (("untouched", "ranks_untouched"), ("attacked", "ranks"))
    }
    return plot_curves(
        curves, {}, grid, title="Coverage: far below the diagonal, the attack succeeds",
        labels=("credibility", "share of true values inside"),
    )  # fmt: skip
