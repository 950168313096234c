"""Likelihood estimators as folders, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.likelihood_estimator import LikelihoodEstimator
from abduce.amortized.likelihood_model import SiteLaw
from abduce.amortized.likelihood_network import LikelihoodSettings, SiteNetwork, SitePlan
from abduce.amortized.saving import fill, named_arrays, tuples
from abduce.inference.encoding import LoadError
from abduce.inference.mcmc.algorithms import nuts
from abduce.inference.persistence import save_folder

__all__ = ["KIND", "likelihood_from_saved", "save_likelihood"]

KIND = "likelihood estimator"
_FIELDS = ("addresses", "latents", "shapes", "argument_shapes", "model_name")


def save_likelihood(est: LikelihoodEstimator, path: Any, report: Any = None) -> Any:
    """See `LikelihoodEstimator.save`."""
    laws = est.laws or {}
    config = {
        "estimator": est.kind,
        **{f: getattr(est, f) for f in _FIELDS},
        "settings": dataclasses.asdict(est.settings),
        "plans": [dataclasses.asdict(law.plan) for law in laws.values()],
        "history": {k: np.asarray(v) for k, v in (est.history or {}).items()},
        "checks": report,
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
        fields = {f: tuples(config[f]) for f in _FIELDS}
        settings = LikelihoodSettings(**config["settings"])
        plans = [SitePlan(**{k: tuples(v) for k, v in p.items()}) for p in config["plans"]]
        kind, history, report = config["estimator"], config["history"], config["checks"]
        if kind not in ("nle", "nre"):
            raise ValueError(f"estimator {kind!r}")
    except (KeyError, TypeError, ValueError) as e:
        raise LoadError(f"{where}: config.json lacks or garbles {e}.") from None
    ratio = kind == "nre"
    laws = {}
    for plan in plans:
        like = eqx.filter_eval_shape(
            lambda key, plan=plan: SiteNetwork(key, plan, settings, ratio), jax.random.key(0)
        )
        network = fill(like, arrays, f"network/{plan.address}", where)
        value, operands = jnp.zeros(plan.dim), jnp.zeros(plan.operand_dim)
        scales = {
            "value": (value, value), "operands": (operands, operands),
            "range": (operands, operands),
        }  # fmt: skip
        scales = fill(scales, arrays, f"scales/{plan.address}", where)
        laws[plan.address] = SiteLaw(network, scales, plan, ratio)
    return LikelihoodEstimator(
        kind=kind, settings=settings, model=None, simulation=None, sampler=nuts(), laws=laws,
        history=history, report=report, **fields,
    )  # fmt: skip
