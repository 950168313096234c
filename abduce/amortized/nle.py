"""`ab.nle` and `ab.nre`: learned likelihoods and ratios for sites that can only be simulated."""

from __future__ import annotations

from typing import Any

import jax

from abduce.amortized.likelihood_estimator import LikelihoodEstimator
from abduce.amortized.likelihood_network import LikelihoodSettings
from abduce.amortized.posing import check_observed, pose
from abduce.errors import InvalidAlgorithm
from abduce.inference.algorithm import Algorithm
from abduce.inference.mcmc.algorithms import nuts
from abduce.ppl.model import Model

__all__ = ["nle", "nre"]


def nle(
    model: Model,
    *args: Any,
    observed: Any,
    designs: Model | None = None,
    head: str = "spline",
    width: int = 64,
    depth: int = 2,
    context_dim: int = 64,
    num_layers: int = 4,
    num_bins: int = 8,
    num_components: int = 8,
    precision: str | None = None,
    sampler: Any = None,
    **kwargs: Any,
) -> LikelihoodEstimator:
    """Neural likelihood estimation: densities for sites that can only be simulated.

    Papamakarios, Sterratt and Murray, "Sequential Neural Likelihood", AISTATS 2019; for counts,
    Boelts, Lueckmann, Gao and Macke, "Flexible and efficient simulation-based inference for models
    of decision-making", eLife 2022. Here the law of one *element* of a site is learned given the
    operands of its distribution (the arguments of `dist.Simulator`): elements under `vmap` and
    `scan` share it, so the number of observations, designs and priors may change afterwards.

    `est.learned_model()` is the model with the learned laws in place: every algorithm takes it.

    Args:
        model: The model.
        *args, **kwargs: Its arguments; fixed, unless `designs=` draws them.
        observed: Address or addresses of the sites whose laws are learned.
        designs: A Model that draws the arguments and returns them as a tuple or a dict.
        head: Law of continuous values: 'spline', 'coupling' or 'mixture'. Integers get mixtures of
            discretized logistic laws. Values that were all positive in training stay positive.
        width, depth, context_dim: Of the networks.
        num_layers, num_bins: Of the flow.
        num_components: Of the mixtures.
        precision: None, or 'bfloat16' for the arithmetic of the encoder.
        sampler: The algorithm that `est(model).posterior(...)` runs; `ab.nuts()` by default.

    Returns:
        An estimator: `est = est.fit(key, num_steps=...)`, then `est(model).posterior(...)`.

    Raises:
        UnknownAddress: `observed=` names no site.
        InvalidAlgorithm: A setting does not fit; see the messages.

    Example:
        >>> est = ab.nle(model, 10, observed=["y"]).fit(jax.random.key(0), num_steps=5000)
        >>> post = est(model).posterior(key, 50, given={"y": y})
    """
    settings = LikelihoodSettings(
        head=head, width=width, depth=depth, context_dim=context_dim, num_layers=num_layers,
        num_bins=num_bins, num_components=num_components, precision=precision,
    )  # fmt: skip
    return _make("nle", model, args, kwargs, observed, designs, settings, sampler)


def nre(
    model: Model,
    *args: Any,
    observed: Any,
    designs: Model | None = None,
    num_contrast: int = 5,
    balance: float = 0.0,
    width: int = 64,
    depth: int = 2,
    precision: str | None = None,
    sampler: Any = None,
    **kwargs: Any,
) -> LikelihoodEstimator:
    """Neural ratio estimation: a classifier tells pairs that belong together from others.

    Miller, Weniger and Forre, "Contrastive Neural Ratio Estimation", NeurIPS 2022. Its logit is the
    density of an element over its marginal density, which serves as a likelihood: evidence is
    relative to the marginal law of each element. Arguments not listed are those of `ab.nle`, and
    so is what can be done with the result.

    Args:
        num_contrast: Other operands that each value is contrasted with.
        balance: Weight of the condition that makes the classifier balanced, and its posteriors on
            average not too narrow (Delaunoy et al., NeurIPS 2022, who use 100); 0 for none.

    Example:
        >>> est = ab.nre(model, 10, observed=["y"]).fit(jax.random.key(0), num_steps=5000)
        >>> post = est(model).posterior(key, 10, given={"y": y})
    """
    settings = LikelihoodSettings(
        width=width, depth=depth, num_contrast=num_contrast, balance=balance, precision=precision
    )
    return _make("nre", model, args, kwargs, observed, designs, settings, sampler)


def _make(
    name: str,
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observed: Any,
    designs: Any,
    settings: LikelihoodSettings,
    sampler: Any,
) -> LikelihoodEstimator:
    if not isinstance(model, Model):
        raise InvalidAlgorithm(
            f"ab.{name} takes a model first, got {type(model).__name__}: "
            f'ab.{name}(model, *args, observed=["y"]).'
        )
    sampler = nuts() if sampler is None else sampler
    if not isinstance(sampler, Algorithm):
        raise InvalidAlgorithm(
            f"ab.{name}: sampler= is an algorithm such as ab.nuts(), got {sampler!r}."
        )
    model = model.with_algorithm(None)
    problem, drawn = pose(name, model, args, kwargs, designs, jax.random.key(0))
    sites = check_observed(name, problem, observed)
    program = problem.program
    leaves = problem.arguments.dynamic
    return LikelihoodEstimator(
        kind=name, addresses=sites,
        latents=tuple((a, s.shape) for a, s in program.latents.items() if a not in sites),
        shapes=tuple((a, program.sites[a].shape) for a in sites),
        argument_shapes=None if drawn is None else tuple(tuple(x.shape) for x in leaves),
        model_name=program.name, settings=settings, model=model,
        simulation={"arguments": problem.arguments, "designs": drawn}, sampler=sampler,
    )  # fmt: skip
