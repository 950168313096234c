"""How far a posterior moves when its data are moved a little, and training that keeps that small.

Data `x` are moved by `delta`, counted in units of the simulations' spread: an observed value `x`
becomes `x + spread * delta`, a positive one `x * exp(spread * delta)`, with the spread of its
logarithm. For small `delta`

    KL(q(. | x) || q(. | x + delta)) = delta^T I(x) delta / 2 + o(|delta|^2),
    I(x) = E_q[s s^T],   s = d log q(theta | x + delta) / d delta at delta = 0,

so the trace of the Fisher information `I` bounds what any small perturbation can do (Gloeckler,
Deistler and Macke, "Adversarial robustness of amortized Bayesian inference", ICML 2023, whose
regularizer this is).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from abduce.amortized.layout import Layout
from abduce.errors import InvalidAlgorithm
from abduce.ppl.operations import outside_scopes
from abduce.ppl.program import Arguments, stage_packed

__all__ = [
    "EXACT_HEADS",
    "check_robustness",
    "fisher_trace",
    "no_perturbation",
    "perturbed",
    "require_perturbable",
    "sensitivity",
]

EXACT_HEADS = ("spline", "coupling", "mixture")
_DRAWS = 2  # of q per example: the least that leaves each draw another one to compare with


def check_robustness(name: str, robustness: Any, frame: bool | None) -> float:
    """The weight of the penalty.

    Raises:
        InvalidAlgorithm: It is no number of at least 0, or comes with Laplace's frame.
    """
    is_number = isinstance(robustness, (int, float)) and not isinstance(robustness, bool)
    if not (is_number and 0 <= robustness < math.inf):
        raise InvalidAlgorithm(
            f"ab.{name}: robustness= is the weight of the Fisher information in the loss, a finite "
            f"number of at least 0 (such as 0.01), got {robustness!r}."
        )
    if robustness and frame:
        raise InvalidAlgorithm(
            f"ab.{name}: robustness= trains the network against perturbed data, but frame=True "
            f"leaves most of the work to Laplace's approximation, which is not trained. Leave "
            f"frame= out."
        )
    return float(robustness)


def require_perturbable(name: str, layout: Layout, arguments: Arguments, head: str) -> None:
    """Perturbations are for continuous data, and their effect for heads with exact densities.

    Args:
        name: What asks, for messages.
        layout: Of the estimator.
        arguments: The model and its arguments.
        head: Of the network.

    Raises:
        InvalidAlgorithm: An observed site is discrete, or the head has no exact density.
    """
    if head not in EXACT_HEADS:
        raise InvalidAlgorithm(
            f"{name} needs the exact density of the posterior, which a {head!r} head only has by "
            f"integrating an equation. Use ab.npe(..., head='spline', 'coupling' or 'mixture')."
        )
    with outside_scopes():
        sites = stage_packed(arguments).sites
    discrete = [a for a in layout.observed if sites[a].is_discrete]
    if discrete:
        raise InvalidAlgorithm(
            f"{name} moves the data a little, but the observed site {discrete[0]!r} "
            f"({sites[discrete[0]].family}, shape {sites[discrete[0]].shape}) is discrete. It is "
            f"for estimators whose observed sites are all continuous."
        )


def no_perturbation(example: Any) -> dict[str, Any]:
    """Zeros by address, in the shapes of the observed values."""
    dtype = jnp.result_type(float)
    return {a: jnp.zeros(jnp.shape(x), dtype) for a, x in example["observed"].items()}


def perturbed(layout: Layout, scales: Any, example: Any, delta: Any) -> dict[str, Any]:
    """An example with its observed values moved.

    Args:
        layout: Of the estimator.
        scales: Of its features.
        example: As `encode` takes it.
        delta: By address, in the shape of the value, in units of the simulations' spread.
    """
    spread = _spreads(layout, scales, example["missing"] is not None)
    kinds, dtype = dict(layout.kinds), jnp.result_type(float)
    observed = {}
    for a, x in example["observed"].items():
        step = spread[a] * delta[a]
        x = jnp.asarray(x, dtype)
        observed[a] = x * jnp.exp(step) if kinds[a] == "positive" else x + step
    return {**example, "observed": observed}


def _spreads(layout: Layout, scales: Any, has_indicators: bool) -> dict[str, Any]:
    """Spread of each observed site, read off those of the features that it is turned into.

    Elements of a set, steps of a sequence and pixels share theirs.
    """
    shapes, out = dict(layout.shapes), {}
    shared = {"set": 1, "sequence": 1, "image": 2}
    for group, (_, spread) in zip(layout.groups, scales["features"], strict=True):
        start = 0
        for a in group.sites:
            inner = shapes[a][shared.get(group.kind, 0) :]
            size = math.prod(inner)
            out[a] = spread[start : start + size].reshape(inner)
            start += size * (2 if has_indicators else 1)  # each site is followed by its indicators
    return out


def sensitivity(
    network: Any, context: Callable[[Any], Any], delta: Any, key: Any, num_draws: int = _DRAWS
) -> Any:
    """An unbiased estimate of the trace of the Fisher information, with an unbiased gradient.

    Args:
        network: A `PosteriorNetwork`.
        context: The context of the data moved by its argument.
        delta: No perturbation, where the trace is taken.
        key: Random key.
        num_draws: Draws of `q`, at least 2.

    Returns:
        Shape `()`, in nats per squared spread.
    """
    frozen = jax.lax.stop_gradient(network)
    at = jax.lax.stop_gradient(context(delta))

    def draw(key):
        k1, k2 = jax.random.split(key)
        length = 0 if frozen.head is None else frozen.head.noise_dim
        v, discrete, _ = frozen.draw(at, k1, jax.random.normal(k2, (length,)))
        return v, discrete

    draws = jax.lax.stop_gradient(jax.vmap(draw)(jax.random.split(key, num_draws)))
    return fisher_trace(lambda d, x: network.log_density(context(d), *x), delta, draws)


def fisher_trace(log_density: Callable[[Any, Any], Any], delta: Any, draws: Any) -> Any:
    """`E_q |d log q / d delta|^2`, from draws of `q`.

    The draws are held fixed when the squared norm is differentiated, as in the paper. `q` itself
    depends on the weights too: without the second term, the score-function term of that dependence,
    a normal head would be pushed to twice the width that minimizes the loss. Each draw is compared
    with the mean of the others, which leaves the term unbiased.

    Args:
        log_density: Of `(delta, draw)`, in nats.
        delta: Where the derivative is taken.
        draws: Of `q`, with a leading axis of at least 2.

    Returns:
        Shape `()`. Its value is the mean of the squared norms.
    """

    def one(draw):
        score, slope = jax.value_and_grad(log_density)(delta, draw)
        return score, sum(jnp.sum(g**2) for g in jax.tree.leaves(slope))

    scores, squares = jax.vmap(one)(draws)
    others = (jnp.sum(squares) - squares) / (squares.shape[0] - 1)
    credit = jax.lax.stop_gradient(squares - others)
    return jnp.mean(squares + credit * (scores - jax.lax.stop_gradient(scores)))
