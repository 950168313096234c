"""Filtering with a Distribution Transformer: the posterior is the next prior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.amortized.mixture_fits import fit_draws
from abduce.amortized.mixtures import GaussianMixture
from abduce.errors import InvalidValue
from abduce.ppl.operations import typed_key

__all__ = ["Filtered", "LinearGaussian", "run_filter"]


class LinearGaussian(eqx.Module):
    """The transition `u' = matrix u + offset + e`, with `e` normal.

    Args:
        matrix: Shape `(d, d)`.
        noise: Covariance of `e`, `(d, d)`.
        offset: Shape `(d,)`, or 0.
    """

    matrix: Any
    noise: Any
    offset: Any = 0.0

    def __call__(self, mixture: GaussianMixture) -> GaussianMixture:
        """The law one step on, exact for each component."""
        return mixture.push(jnp.asarray(self.matrix), self.offset, jnp.asarray(self.noise))


class Filtered(eqx.Module):
    """What `est.filter` returns; both have a leading axis of steps.

    Attributes:
        predicted: The prior of each step: given the observations before it.
        posterior: Given the observations up to it.
    """

    predicted: GaussianMixture
    posterior: GaussianMixture


def run_filter(
    est: Any,
    prior: GaussianMixture,
    observations: Mapping[str, Any],
    args: Any,
    transition: Any,
    key: Any,
) -> Filtered:
    """See `DistributionTransformer.filter`."""
    plan = est.plan
    if plan.prior.dim != plan.target.dim:
        raise InvalidValue(
            f"est.filter: the posterior has {plan.target.dim} coordinates "
            f"({', '.join(plan.target.addresses)}), the prior {plan.prior.dim} "
            f"({', '.join(plan.prior.addresses)}), so the one cannot be the other of the next step."
        )
    lengths = {a: jnp.shape(x)[0] for a, x in _leading(observations)}
    if len(set(lengths.values())) != 1:
        raise InvalidValue(
            f"est.filter: observations need one leading axis of steps, of equal length, got "
            f"{lengths}."
        )
    steps = next(iter(lengths.values()))
    advance = _advance(est, transition, key)

    def step(carry, xs):
        i, observed, extra = xs
        predicted = jax.lax.cond(i > 0, lambda m: advance(i, m), lambda m: m, carry)
        posterior = est.infer(predicted, observed, *extra)
        return posterior, (predicted, posterior)

    xs = (jnp.arange(steps), dict(observations), tuple(args))
    _, (predicted, posterior) = jax.lax.scan(step, prior, xs)
    return Filtered(predicted, posterior)


def _leading(observations: Mapping[str, Any]) -> Any:
    for a, x in observations.items():
        for leaf in jax.tree.leaves(x):
            if not jnp.ndim(leaf):
                raise InvalidValue(f"est.filter: observations[{a!r}] has no leading axis of steps.")
            yield a, leaf


def _advance(est: Any, transition: Any, key: Any) -> Any:
    """`(step, posterior before) -> prior`."""
    if transition is None:
        return lambda i, mixture: mixture
    if isinstance(transition, LinearGaussian):
        shape = jnp.shape(transition.matrix)
        if shape != (est.plan.prior.dim,) * 2:
            raise InvalidValue(
                f"est.filter: transition.matrix has shape {shape}, expected "
                f"{(est.plan.prior.dim,) * 2}."
            )
        return lambda i, mixture: transition(mixture)
    if not callable(transition):
        raise InvalidValue(
            f"est.filter: transition= takes LinearGaussian(matrix, noise) or a function "
            f"(key, u) -> u of coordinates, got {type(transition).__name__}."
        )
    if key is None:
        raise InvalidValue(
            "est.filter: a transition that is a function needs key=, such as jax.random.key(0)."
        )
    base, num = typed_key(key, "est.filter"), 8 * est.plan.num_fit_draws

    def advance(i, mixture):
        k1, k2 = jax.random.split(jax.random.fold_in(base, i))
        draws = jax.vmap(transition)(jax.random.split(k2, num), mixture.sample(k1, num))
        return fit_draws(draws, mixture.num_components)

    return advance
