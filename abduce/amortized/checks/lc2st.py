"""Local classifier two-sample test: is the posterior of *this* observation right?

Calibration over many data sets can hide errors that cancel, and says nothing of one of them. A
classifier trained on pairs `(theta, x)` to tell true values (class 0) from posterior draws of the
same data (class 1) estimates, at a given `x`, the ratio of the posterior to the exact one. Where
they are equal, it says 1/2 at every draw; the statistic is the mean of `(p - 1/2)^2` over posterior
draws at the observation (Linhart, Gramfort and Rodrigues 2023).

The null distribution comes from exchanging true value and draw within random pairs, which for an
exact posterior changes nothing: the test's p-value is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from abduce.amortized.checks.calibration import Calibration
from abduce.amortized.checks.mlp import init_mlp, log_loss, logits
from abduce.amortized.checks.result import Check, check_alpha
from abduce.amortized.checks.runs import run_calibration
from abduce.errors import InvalidValue, UnknownAddress
from abduce.inference.algorithm import check_count
from abduce.ppl.operations import typed_key

__all__ = ["check_lc2st", "run_lc2st"]

_HELD_OUT = 0.15  # of the pairs, to choose the step at which training was best
_LEARNING_RATE, _DECAY = 3e-3, 1e-3
_EVERY = 10


def run_lc2st(
    model: Any,
    algorithm: Any,
    key: Any,
    *args: Any,
    given: Mapping[str, Any],
    num_datasets: int = 2000,
    num_samples: int = 1000,
    num_null: int = 200,
    alpha: float = 0.01,
    budget: float | None = None,
    **kwargs: Any,
) -> Check:
    """Runs the algorithm on the observation and on data sets from the model, and compares.

    Args:
        model: A model whose data are not observed inside.
        algorithm: Any algorithm; a fast one, such as an estimator, since it runs often.
        key: Random key.
        *args, **kwargs: The model's arguments.
        given: The observation, by address.
        num_datasets: Data sets that the classifier learns from.
        num_samples: Draws of the posterior at the observation.
        num_null: Classifiers trained on exchanged pairs; at least `1 / alpha`.
        alpha: False-alarm rate.
        budget: Seconds for the runs.

    Returns:
        A `Check`: see `check_lc2st`.
    """
    key_runs, key_post, key_pick, key_test = jax.random.split(typed_key(key, "run_lc2st"), 4)
    runs = run_calibration(
        model, algorithm, key_runs, *args, observed=tuple(given), num_datasets=num_datasets,
        num_samples=1, budget=budget, **kwargs,
    )  # fmt: skip
    configured = model if algorithm is None else algorithm(model)
    post = configured.posterior(key_post, *args, given=dict(given), **kwargs)
    draws = post.sample(key_pick, num_samples)
    return check_lc2st(
        key_test, runs, {a: draws[a] for a in runs.truths}, given, num_null=num_null, alpha=alpha
    )


def check_lc2st(
    key: Any,
    runs: Calibration,
    draws: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    num_null: int = 200,
    num_steps: int = 300,
    alpha: float = 0.01,
) -> Check:
    """Tests the posterior of one observation.

    Args:
        key: Random key: of starting weights and exchanges.
        runs: From `run_calibration`; the first draw of each data set is used.
        draws: Posterior draws at the observation, by address, `(draw, ...)`.
        given: The observation, by address.
        num_null: Classifiers trained on exchanged pairs.
        num_steps: Optimizer steps of each classifier, on all pairs at once; the weights kept are
            those with the smallest loss on held-out pairs.
        alpha: False-alarm rate.

    Returns:
        A `Check`. Its arrays `shift` and `width`, by scalar, come from the classifier's estimate
        of the exact posterior: `shift` is positive where the posterior lies too high, in its
        standard deviations; `width` is its standard deviation relative to the estimate's.

    Raises:
        UnknownAddress, InvalidValue: Draws or data do not fit the runs.
    """
    check_alpha("check_lc2st", alpha)
    for name, value in (("num_null", num_null), ("num_steps", num_steps)):
        check_count("check_lc2st", name, value)
    labels, truths, others = runs.elements()
    points = _flat("draws", draws, runs.truths, first=None)
    x = runs.features()
    at = _flat("given", given, runs.observed, first=1)
    theta = np.concatenate([truths, others[:, 0]])
    theta, points = _standardized(theta, theta), _standardized(points, theta)
    x, at = _standardized(x, x), _standardized(at, x)
    n = len(truths)
    pairs = np.stack([np.concatenate([theta[:n], x], 1), np.concatenate([theta[n:], x], 1)], 1)
    rows = np.concatenate([points, np.repeat(at, len(points), 0)], 1)
    key = typed_key(key, "check_lc2st")
    key_flip, key_null, key_first = jax.random.split(key, 3)
    flips = jax.random.bernoulli(key_flip, 0.5, (num_null, n))
    keys = jnp.concatenate([key_first[None], jax.random.split(key_null, num_null)])
    flips = jnp.concatenate([jnp.zeros((1, n), bool), flips])
    data = jnp.asarray(pairs, jnp.float32), jnp.asarray(rows, jnp.float32)
    width = 10 * truths.shape[1]
    probability = np.concatenate(
        [  # in parts, so that an interrupt gets through
            np.asarray(_classify(width, num_steps, keys[i : i + 20], flips[i : i + 20], *data))
            for i in range(0, num_null + 1, 20)
        ]
    )
    statistic = ((probability - 0.5) ** 2).mean(1)
    p_value = (1 + (statistic[1:] >= statistic[0]).sum()) / (num_null + 1)
    shift, ratio = _directions(points, probability[0])
    notes = [f"{runs.title}: {n} pairs, {num_null} null classifiers.", *runs.notes()]
    if num_null + 1 < 1 / alpha:
        notes.append(
            f"With num_null={num_null} no p-value is below {1 / (num_null + 1):.3g}, so this can "
            f"never fail at alpha={alpha}. Raise num_null to at least {int(np.ceil(1 / alpha))}."
        )
    verdict, remedy = _verdict(labels, shift, ratio, p_value > alpha)
    return Check(
        name="local c2st",
        p_values={"posterior at the observation": float(p_value)},
        alpha=alpha,
        verdict=verdict,
        remedy=remedy,
        notes=tuple(notes),
        is_complete=num_null + 1 >= 1 / alpha,
        arrays={
            "probability": probability[0],
            "statistic": statistic[0],
            "null": statistic[1:],
            "shift": dict(zip(labels, shift.tolist(), strict=True)),
            "width": dict(zip(labels, ratio.tolist(), strict=True)),
        },
        figure=_figure,
    )


def _flat(
    name: str, values: Mapping[str, Any], like: Mapping[str, Any], first: int | None
) -> np.ndarray:
    """Values by address as rows of numbers, in the order of the runs; `first=1`: a single row."""
    missing = [a for a in like if a not in values]
    if missing:
        raise UnknownAddress(f"check_lc2st: {name} lacks {missing[0]!r}, which the runs have.")
    rows = []
    for address, x in like.items():
        value = np.asarray(values[address], np.float64)
        value = value[None] if first else value
        if value.shape[1:] != np.shape(x)[1:]:
            raise InvalidValue(
                f'check_lc2st: {name}["{address}"] has shape {np.shape(values[address])}, but the '
                f"runs have {np.shape(x)[1:]} for one {'data set' if first else 'draw'}."
            )
        rows.append(value.reshape(len(value), int(np.prod(value.shape[1:]))))
    return np.concatenate(rows, 1)


def _standardized(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    """By median and quartiles, so that a few far values do not squeeze the rest."""
    finite = np.where(np.isfinite(like), like, np.nan)
    low, middle, high = np.nanquantile(finite, [0.25, 0.5, 0.75], axis=0)
    scale = np.where(high > low, (high - low) / 1.349, np.nanstd(finite, 0))
    z = (x - middle) / np.where(scale > 0, scale, 1.0)
    return np.clip(np.where(np.isfinite(z), z, -5.0), -8, 8)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _classify(width, num_steps, keys, flips, pairs, rows):
    """Probability of class 1 at the rows, for each way to exchange the pairs."""
    n, _, size = pairs.shape
    held_out = int(_HELD_OUT * n)
    optimizer = optax.adam(_LEARNING_RATE)

    def one(key, flip):
        both = jnp.where(flip[:, None, None], pairs[:, ::-1], pairs)
        train, test = both[held_out:], both[:held_out]

        def loss(layers, part, decay):
            x = part.reshape(-1, size)
            y = jnp.tile(jnp.asarray([0.0, 1.0], x.dtype), len(part))
            return log_loss(layers, x, y, jnp.ones(len(x), x.dtype), decay * len(x))

        def step(carry, _):
            layers, moments = carry
            grads = jax.grad(loss)(layers, train, _DECAY)
            updates, moments = optimizer.update(grads, moments)
            return (optax.apply_updates(layers, updates), moments), None

        def stretch(carry, _):
            layers, moments, best, least = carry
            (layers, moments), _ = jax.lax.scan(step, (layers, moments), None, length=_EVERY)
            value = loss(layers, test, 0.0)
            best = jax.tree.map(lambda a, b: jnp.where(value < least, a, b), layers, best)
            return (layers, moments, best, jnp.minimum(value, least)), None

        layers = init_mlp(key, (size, width, width, 1))
        carry = (layers, optimizer.init(layers), layers, jnp.asarray(jnp.inf))
        carry, _ = jax.lax.scan(stretch, carry, None, length=max(1, num_steps // _EVERY))
        return jax.nn.sigmoid(logits(carry[2], rows))

    return jax.vmap(one)(keys, flips)


def _directions(points: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shift and width of the posterior against the classifier's idea of the exact one.

    The log odds of class 0 estimate `log p - log q`. A least-squares parabola of them in each
    scalar, at draws of mean 0 and deviation 1, makes a normal `q` a normal `p` of precision
    `1 - 2 curvature`. (Draws reweighted by the odds could not tell a `p` wider than `q`.)
    """
    sd = points.std(0)
    z = (points - points.mean(0)) / np.where(sd > 0, sd, 1.0)
    probability = np.clip(probability, 1e-6, 1 - 1e-6)
    odds = np.log1p(-probability) - np.log(probability)
    design = np.concatenate([np.ones((len(z), 1)), z, z**2], 1)
    fit = np.linalg.lstsq(design, odds, rcond=None)[0]
    slope, curvature = fit[1 : 1 + z.shape[1]], fit[1 + z.shape[1] :]
    precision = np.clip(1 - 2 * curvature, 0.01, 100.0)
    return -slope / precision, np.sqrt(precision)


def _verdict(labels, shift, ratio, is_fine) -> tuple[str, str]:
    if is_fine:
        return "A classifier cannot tell the posterior from the exact one at this observation.", ""
    i, j = int(np.argmax(np.abs(shift))), int(np.argmax(np.abs(np.log(ratio))))
    words = []
    if abs(shift[i]) >= 0.1:
        words.append(f"{labels[i]} lies about {abs(shift[i]):.1f} sd too "
                     f"{'high' if shift[i] > 0 else 'low'}")  # fmt: skip
    if abs(ratio[j] - 1) >= 0.04:  # classifiers understate it
        words.append(f"{labels[j]} is too {'wide' if ratio[j] > 1 else 'narrow'}, by at least "
                     f"{100 * abs(ratio[j] - 1):.0f}%")  # fmt: skip
    return (
        "The posterior at this observation is off: "
        + (", and ".join(words) or "in shape or dependence rather than in place or width")
        + ".",
        "Correct it with ab.importance(proposal=...), or train on data nearer to the observation.",
    )


def _figure(arrays: Mapping[str, Any]) -> Any:
    from abduce.amortized.checks.figures import plot_statistics

    return plot_statistics(
        {"mean (p - 1/2)^2": arrays["null"]}, {"mean (p - 1/2)^2": arrays["statistic"]},
        title="Local C2ST: the black line among classifiers of exchanged pairs",
    )  # fmt: skip
