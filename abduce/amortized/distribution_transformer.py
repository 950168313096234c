"""`ab.distribution_transformer`: a posterior network that takes the prior as an input."""

from __future__ import annotations

from typing import Any

from abduce.amortized.dt_estimator import DistributionTransformer
from abduce.amortized.dt_plan import make_plan
from abduce.inference.algorithm import check_count
from abduce.ppl.model import Model

__all__ = ["distribution_transformer"]


def distribution_transformer(
    model: Model,
    *args: Any,
    observed: Any,
    priors: Model,
    prior: Any = None,
    target: Any = None,
    designs: Model | None = None,
    equivariance: Any = None,
    num_components: int = 5,
    num_candidates: int | None = None,
    draws_per_prior: int = 4,
    num_fit_draws: int = 512,
    missing: float = 0.0,
    width: int = 64,
    num_layers: int = 3,
    num_heads: int = 4,
    hidden: int = 256,
    num_samples: int = 4000,
    **kwargs: Any,
) -> DistributionTransformer:
    """A posterior network for every prior that a meta-prior can draw.

    A prior, as a mixture of normals in unconstrained coordinates, and observations go in; the
    posterior, as such a mixture, comes out. The prior is read from the model that the estimator is
    applied to, so changing the prior is an edit of the model and needs no training.

    Whittle, Ziomek, Rawling and Osborne, "Distribution Transformers: Fast Approximate Bayesian
    Inference With On-The-Fly Prior Adaptation" (2025).

    Args:
        model: A Model; its own prior does not matter.
        *args, **kwargs: Its arguments, fixed.
        observed: Addresses of what will be observed.
        priors: The meta-prior: a Model without arguments that returns priors, a dict of
            distributions by address (or a `GaussianMixture` over the coordinates of `prior=`).
        prior: Addresses whose prior varies. None: those that `priors` returns.
        target: Addresses to infer. None: those of `prior`. Others make a filter of which the
            transition is a part: `prior=["x0"], target=["x1"]`.
        designs: A Model that draws the arguments, where they vary; then give none.
        equivariance: A symmetry, such as `ab.amortized.ScaleEquivariance`; it is checked against
            the density.
        num_components: Of the prior's fit and of the posterior.
        num_candidates: Draws of the network itself that join the true latents in the loss, weighted
            by the model's density; they take out noise. None: 7 where the density is there and
            the targets are all the latents, else 0.
        draws_per_prior: Training examples that share a prior, whose fit is costly.
        num_fit_draws: Draws by which a prior of several dimensions is fitted while training;
            8 times as many when applied.
        missing: Probability that a training example has hidden observations; above 0,
            `ab.masked` data can be given.
        width, num_layers, num_heads, hidden: Of the transformer.
        num_samples: Draws of a posterior.

    Returns:
        An estimator; train it with `fit`.

    Raises:
        UnknownAddress, InvalidAlgorithm, InvalidValue, DiscreteLatent: See the messages.

    Example:
        >>> @ab.model
        ... def priors():
        ...     a = ab.sample("a", dist.InverseGamma(4.0, 6.0))
        ...     b = ab.sample("b", dist.InverseGamma(4.0, 6.0))
        ...     return {"variance": dist.InverseGamma(a, b)}
        >>> est = ab.distribution_transformer(model, observed=["z"], priors=priors)
        >>> est = est.fit(key, num_steps=2000)
        >>> mine = ab.with_prior(model, {"variance": dist.InverseGamma(3.0, 2.0)})
        >>> post = est(mine).posterior(key, given={"z": z})
    """
    plan, data = make_plan(
        model, args, kwargs, observed=observed, priors=priors, prior=prior, target=target,
        designs=designs, equivariance=equivariance, num_components=num_components,
        num_candidates=num_candidates, draws_per_prior=draws_per_prior,
        num_fit_draws=num_fit_draws, missing=missing, width=width, num_layers=num_layers,
        num_heads=num_heads, hidden=hidden,
    )  # fmt: skip
    check_count("distribution_transformer", "num_samples", num_samples)
    return DistributionTransformer(plan, data, num_samples=num_samples)
