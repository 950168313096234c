"""Distribution Transformers as folders, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.dt_coordinates import Coordinates
from abduce.amortized.dt_inputs import Plan, Scales
from abduce.amortized.equivariance import ScaleEquivariance
from abduce.amortized.layout import Layout
from abduce.amortized.saving import blueprint, check_lengths, fill, named_arrays, typed
from abduce.errors import AbduceError
from abduce.inference.encoding import LoadError
from abduce.inference.persistence import save_folder

__all__ = ["KIND", "save_transformer", "transformer_from_saved"]

KIND = "distribution transformer"


def save_transformer(est: Any, path: Any) -> Any:
    """See `DistributionTransformer.save`."""
    plan = est.plan
    stored = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    symmetry = plan.equivariance
    stored |= {
        "layout": dataclasses.asdict(plan.layout),
        "prior": plan.prior.to_config(),
        "target": plan.target.to_config(),
        "equivariance": None
        if symmetry is None
        else {"observed": dict(symmetry.observed), "latents": dict(symmetry.latents)},
    }
    config = {
        "plan": stored,
        "num_samples": est.num_samples,
        "features": [list(np.shape(c)) for c, _ in est.scales.features],
        "history": {k: np.asarray(v) for k, v in (est.history or {}).items()},
    }
    arrays = {**named_arrays(est.network, "network"), **named_arrays(est.scales, "scales")}
    return save_folder(path, KIND, config, arrays)


def transformer_from_saved(
    config: dict[str, Any], arrays: dict[str, Any], where: str = "the saved folder"
) -> Any:
    """The estimator in a folder read by `load_folder`; it has no model, and cannot be trained.

    Raises:
        LoadError: The contents do not fit together.
    """
    from abduce.amortized.dt_estimator import DistributionTransformer, make_network

    try:
        plan = _plan(config["plan"])
        shapes = typed(list[tuple[int, ...]], config["features"], "features")
        num_samples, history = int(config["num_samples"]), dict(config["history"])

        def blank(shape):
            return (jax.ShapeDtypeStruct(shape, jnp.result_type(float)),) * 2

        scales = Scales(
            [blank(s) for s in shapes], blank((plan.prior.dim,)), blank((plan.target.dim,))
        )
        sizes = {n: getattr(plan, n) for n in ("num_components", "num_layers", "width", "hidden")}
        check_lengths(sizes, arrays, "network", where)
    except (AbduceError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise LoadError(f"{where}: config.json lacks or garbles {e}.") from None
    network = blueprint(lambda key: make_network(plan, scales, key), where)
    network = fill(network, arrays, "network", where)
    scales = fill(scales, arrays, "scales", where)
    return DistributionTransformer(plan, None, scales, network, history, num_samples)


def _plan(stored: dict[str, Any]) -> Plan:
    stored = dict(stored)
    symmetry = stored["equivariance"]
    stored |= {
        "layout": typed(Layout, stored["layout"], "layout"),
        "families": tuple((a, f) for a, f in stored["families"]),
        "prior": Coordinates.from_config(stored["prior"]),
        "target": Coordinates.from_config(stored["target"]),
        "equivariance": None if symmetry is None else ScaleEquivariance(**symmetry),
    }
    return Plan(**stored)
