"""`ab.npe`, `ab.fmpe`, `ab.npse`: neural posterior estimation with three kinds of head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from abduce.amortized.composition import require_composable
from abduce.amortized.estimator import PosteriorEstimator
from abduce.amortized.layout import make_layout
from abduce.amortized.pose_equivariance import check_pose, pose_of
from abduce.amortized.posterior_network import PosteriorTask, Settings
from abduce.amortized.robustness import check_robustness, require_perturbable
from abduce.errors import InvalidAlgorithm, InvalidValue, UnknownAddress, suggest
from abduce.inference.algorithm import check_count
from abduce.ppl.model import Model

__all__ = ["fmpe", "npe", "npse"]


def npe(
    model: Model,
    *args: Any,
    observed: Any,
    designs: Model | None = None,
    sizes: Any = None,
    missing: Mapping[str, float] | None = None,
    equivariance: Any = None,
    head: str = "spline",
    num_candidates: int | None = None,
    frame: bool | None = None,
    robustness: float = 0.0,
    num_networks: int = 1,
    width: int = 64,
    depth: int = 2,
    context_dim: int = 64,
    num_layers: int = 4,
    num_bins: int = 8,
    num_components: int = 8,
    sets: str = "pool",
    precision: str | None = None,
    num_samples: int = 4000,
    **kwargs: Any,
) -> PosteriorEstimator:
    """Neural posterior estimation: the posterior of a model as a network of the data.

    Papamakarios and Murray, "Fast epsilon-free Inference of Simulation Models with Bayesian
    Conditional Density Estimation", NeurIPS 2016; Greenberg, Nonnenmacher and Macke, "Automatic
    Posterior Transformation for Likelihood-free Inference", ICML 2019. Trained on simulations of
    the model alone, so its sites need no density.

    What is amortized over is read off the model. Latents are learned in unconstrained coordinates,
    so no draw ever leaves the support; discrete ones get categorical heads, and the rest is
    learned given them. Observed elements along an axis whose order does not matter are encoded as
    a set; the steps of a scan as a sequence; missing entries by indicators.

    Args:
        model: The model.
        *args, **kwargs: Its arguments; fixed, unless `designs=` draws them.
        observed: Address or addresses of what will be observed.
        designs: A Model that draws the arguments and returns them as a tuple or a dict. The
            posterior then depends on them.
        sizes: `(least, greatest)` number of elements of the observed set; the greatest is the
            number with which the model is staged. None: always that number.
        missing: By address, the mean fraction of entries that will be missing; they are then given
            as `ab.masked(values, observed=mask)`.
        equivariance: A latent that moves the data in a known way, as
            `ab.amortized.PoseEquivariance(latent, transform, kernel)`: the network learns from data
            moved back, and a Gibbs chain finds by how much. Then there are draws, but no density.
        head: Law of the continuous latents: 'spline' (autoregressive spline flow), 'coupling'
            (faster draws, coarser) or 'mixture' (of normals).
        num_candidates: Draws of the estimate that join the true latents in the loss, weighted by
            the model's density: less noise, where the model has one (see the docs). None: 7 where
            there is a density, at most 8 continuous coordinates and simulations are fresh, else 0.
        frame: Whether the head works in the coordinates of Laplace's approximation, which a few
            Newton steps on the model's density give for any data. None: where `num_candidates`
            would be positive by default and the approximation covers prior draws.
        robustness: Weight in the loss of the trace of the Fisher information of the posterior
            about the data, in units of their spread (nats per squared spread): how far small
            changes of the data can move the posterior (Gloeckler, Deistler and Macke 2023). Try
            0.001 to 0.1, and `ab.checks.run_attack`. For continuous data; without Laplace's frame.
        num_networks: Networks whose equal mixture is used.
        width, depth, context_dim: Of the networks.
        num_layers, num_bins: Of the flow.
        num_components: Of the mixture.
        sets: How sets are encoded: 'pool' (elements apart, then averages, maxima and products) or
            'transformer' (elements attend to each other; cost grows with the square of their
            number).
        precision: None, or 'bfloat16' for the encoder's arithmetic; weights stay float32.
        num_samples: Draws of a posterior.

    Returns:
        An estimator: `est = est.fit(key, num_steps=...)`, then `est(model).posterior(...)`.

    Raises:
        UnknownAddress: `observed=` or `missing=` names no site.
        InvalidAlgorithm, InvalidValue: A setting does not fit; see the messages.

    Example:
        >>> est = ab.npe(schools, sigma, observed=["y"]).fit(jax.random.key(0), num_steps=5000)
        >>> post = est(schools).posterior(key, sigma, given={"y": y})
    """
    if head not in ("spline", "coupling", "mixture"):
        raise InvalidAlgorithm(
            f"ab.npe: head={head!r} is not 'spline', 'coupling' or 'mixture'. For flow matching "
            f"use ab.fmpe, for scores ab.npse."
        )
    if num_candidates is not None:
        check_count("npe", "num_candidates", num_candidates, 0)
    robustness = check_robustness("npe", robustness, frame)
    settings = {
        "head": head, "width": width, "depth": depth, "context_dim": context_dim,
        "num_layers": num_layers, "num_bins": num_bins, "num_components": num_components,
        "num_candidates": num_candidates, "num_networks": num_networks, "sets": sets,
        "precision": precision, "frame": False if robustness else frame,
        "robustness": robustness,
    }  # fmt: skip
    return _make(
        "npe", model, args, kwargs, observed, designs, sizes, missing, settings, num_samples,
        equivariance,
    )  # fmt: skip


def fmpe(
    model: Model,
    *args: Any,
    observed: Any,
    designs: Model | None = None,
    sizes: Any = None,
    missing: Mapping[str, float] | None = None,
    equivariance: Any = None,
    num_networks: int = 1,
    width: int = 64,
    depth: int = 2,
    context_dim: int = 64,
    sets: str = "pool",
    precision: str | None = None,
    num_samples: int = 4000,
    **kwargs: Any,
) -> PosteriorEstimator:
    """Flow matching posterior estimation: a velocity field from noise to the posterior.

    Dax, Wildberger, Buchholz, Green, Macke and Schoelkopf, "Flow Matching for Scalable
    Simulation-Based Inference", NeurIPS 2023. A regression without densities: cheap steps and no
    restriction on the network, at the price of slower draws.

    Arguments are those of `ab.npe`.

    Example:
        >>> est = ab.fmpe(model, observed=["y"]).fit(jax.random.key(0), num_steps=10_000)
    """
    settings = {
        "head": "flow matching", "width": width, "depth": depth, "context_dim": context_dim,
        "num_networks": num_networks, "sets": sets, "precision": precision,
    }  # fmt: skip
    return _make(
        "fmpe", model, args, kwargs, observed, designs, sizes, missing, settings, num_samples,
        equivariance,
    )  # fmt: skip


def npse(
    model: Model,
    *args: Any,
    observed: Any,
    designs: Model | None = None,
    sizes: Any = None,
    missing: Mapping[str, float] | None = None,
    equivariance: Any = None,
    compose: bool = False,
    num_networks: int = 1,
    width: int = 64,
    depth: int = 2,
    context_dim: int = 64,
    sets: str = "pool",
    precision: str | None = None,
    num_samples: int = 4000,
    **kwargs: Any,
) -> PosteriorEstimator:
    """Neural posterior score estimation: the score of the blurred posterior, by denoising.

    Sharrock, Simons, Liu and Beaumont, "Sequential Neural Score Estimation: Likelihood-Free
    Inference with Conditional Score Based Diffusion Models", ICML 2024. Draws and densities come
    from the probability flow.

    Arguments are those of `ab.npe`, and:

    Args:
        compose: Whether `posterior` takes more elements of the observed set than in training, by
            adding up scores (see `abduce.amortized.composition`). Then there are draws, but no
            density.

    Example:
        >>> est = ab.npse(model, observed=["y"]).fit(jax.random.key(0), num_steps=10_000)
    """
    settings = {
        "head": "score", "width": width, "depth": depth, "context_dim": context_dim,
        "num_networks": num_networks, "sets": sets, "precision": precision, "compose": compose,
    }  # fmt: skip
    return _make(
        "npse", model, args, kwargs, observed, designs, sizes, missing, settings, num_samples,
        equivariance,
    )  # fmt: skip


def require_density(arguments: Any, name: str) -> None:
    """`num_candidates=` and `frame=` use the model's density."""
    from abduce.ppl import operations
    from abduce.ppl.program import stage_packed

    operations.require_density(stage_packed(arguments), f"ab.{name}(num_candidates=..., frame=...)")


def _make(
    name: str,
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observed: Any,
    designs: Any,
    sizes: Any,
    missing: Any,
    settings: dict[str, Any],
    num_samples: int,
    equivariance: Any,
) -> PosteriorEstimator:
    if not isinstance(model, Model):
        raise InvalidAlgorithm(
            f"ab.{name} takes a model first, got {type(model).__name__}: "
            f'ab.{name}(model, *args, observed=["y"]).'
        )
    check_count(name, "num_samples", num_samples)
    model = model.with_algorithm(None)
    layout, simulation = make_layout(
        name, model, args, kwargs, observed, designs, sizes, jax.random.key(0)
    )
    rates = dict(missing or {})
    for a, rate in rates.items():
        if a not in layout.observed:
            raise UnknownAddress(
                f"ab.{name}: missing={{{a!r}: ...}} is no observed site "
                f"({', '.join(layout.observed)}).{suggest(a, layout.observed)}"
            )
        if not 0 < rate <= 0.5:
            raise InvalidValue(
                f"ab.{name}: missing[{a!r}] is the mean fraction of missing entries, above 0 and "
                f"at most 0.5 (each example has its own, up to twice that); got {rate!r}."
            )
    if settings.get("num_candidates") or settings.get("frame"):
        require_density(simulation["arguments"], name)
    if settings.get("compose"):
        require_composable(name, layout)
    if settings.get("robustness"):
        require_perturbable(
            f"ab.{name}(robustness=...)", layout, simulation["arguments"], settings["head"]
        )
    if equivariance is not None:
        pose = pose_of(name, equivariance, layout, settings, rates)
        settings = {**settings, "pose": pose, "num_candidates": 0, "frame": False}
    made = Settings(**settings, missing=tuple(rates.items()))
    est = PosteriorEstimator(
        name, layout, made, model, simulation, num_samples=num_samples, equivariance=equivariance
    )
    if equivariance is not None:
        rows = est.simulate(jax.random.key(0), 256)
        task = PosteriorTask(layout, made)
        batch = task.read(rows, jax.random.key(0), {"simulation": simulation, "scales": None})
        check_pose(name, equivariance, layout, rows, batch, simulation["arguments"])
    return est
