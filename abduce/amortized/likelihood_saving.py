"""Likelihood estimators as folders, and back."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.likelihood_estimator import LikelihoodEstimator
from abduce.amortized.likelihood_model import SiteLaw
from abduce.amortized.likelihood_network import LikelihoodSettings, SiteNetwork, SitePlan
from abduce.amortized.saving import (
    KeptReport,
    blueprint,
    check_lengths,
    fill,
    named_arrays,
    typed,
)
from abduce.inference.encoding import LoadError
from abduce.inference.mcmc.algorithms import nuts
from abduce.inference.persistence import save_folder

__all__ = ["KIND", "likelihood_from_saved", "save_likelihood"]

KIND = "likelihood estimator"
_SHAPES = tuple[tuple[str, tuple[int, ...]], ...]
_FIELDS: dict[str, Any] = {
    "addresses": tuple[str, ...],
    "latents": _SHAPES,
    "shapes": _SHAPES,
    "argument_shapes": tuple[tuple[int, ...], ...] | None,
    "model_name": str,
}


def save_likelihood(est: LikelihoodEstimator, path: Any, report: Any = None) -> Any:
    """See `LikelihoodEstimator.save`."""
    laws = est.laws or {}
    config = {
        "estimator": est.kind,
        **{f: getattr(est, f) for f in _FIELDS},
        "settings": dataclasses.asdict(est.settings),
        "plans": [dataclasses.asdict(law.plan) for law in laws.values()],
        "history": {k: np.asarray(v) for k, v in (est.history or {}).items()},
        "checks": None if report is None else dict(report),
    }
    arrays = {}
    for a, law in laws.items():
        arrays |= named_arrays(law.network, f"network/{a}")
        arrays |= named_arrays(law.scales, f"scales/{a}")
    return save_folder(path, KIND, config, arrays)


def likelihood_from_saved(config: dict[str, Any], arrays: dict[str, Any], where: str) -> Any:
    """The estimator in a folder read by `load_folder`; its sampler is `ab.nuts()`.

    Raises:
        LoadError: The contents do not fit together.
    """
    try:
        fields = {f: typed(hint, config[f], f) for f, hint in _FIELDS.items()}
        settings = typed(LikelihoodSettings, config["settings"], "settings")
        plans = typed(list[SitePlan], config["plans"], "plans")
        kind = typed(str, config["estimator"], "estimator")
        history = typed(dict, config["history"], "history")
        report = typed(dict | None, config["checks"], "checks")
        report = None if report is None else KeptReport(report)
        if kind not in ("nle", "nre"):
            raise ValueError(f"estimator {kind!r}")
    except (KeyError, TypeError, ValueError) as e:
        raise LoadError(f"{where}: config.json lacks or garbles {e}.") from None
    ratio = kind == "nre"
    laws = {}
    for plan in plans:
        prefix = f"network/{plan.address}"
        lengths = {n: getattr(settings, n) for n in _lengths(plan, settings, ratio)}
        check_lengths({**lengths, "elements": plan.dim}, arrays, prefix, where)
        make = functools.partial(SiteNetwork, plan=plan, settings=settings, ratio=ratio)
        like = blueprint(make, where)
        network = fill(like, arrays, prefix, where)
        value, operands = (
            (jax.ShapeDtypeStruct((n,), jnp.result_type(float)),) * 2
            for n in (plan.dim, plan.operand_dim)
        )
        scales = {"value": value, "operands": operands, "range": operands}
        scales = fill(scales, arrays, f"scales/{plan.address}", where)
        laws[plan.address] = SiteLaw(network, scales, plan, ratio)
    return LikelihoodEstimator(
        kind=kind, settings=settings, model=None, simulation=None, sampler=nuts(), laws=laws,
        history=history, report=report, **fields,
    )  # fmt: skip


def _lengths(plan: SitePlan, settings: LikelihoodSettings, ratio: bool) -> list[str]:
    """Settings that are lengths of the network's arrays."""
    if ratio:
        return ["width", "depth"]
    names = ["width", "depth", "context_dim"]
    if plan.kind == "counts" or settings.head == "mixture":
        return [*names, "num_components"]
    return [*names, "num_bins", *(["num_layers"] if plan.dim > 1 else [])]
