"""What is in a saved folder, in words."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from abduce.amortized.dt_estimator import DistributionTransformer
from abduce.amortized.pfn import PFN
from abduce.amortized.reading_saved import READERS
from abduce.amortized.training import num_parameters
from abduce.inference.persistence import CONFIG, WEIGHTS, load_folder

__all__ = ["info", "is_checkable", "model_name", "validated"]


def info(folder: Any) -> str:
    """What is in a saved folder, in lines of a name and a value; no model is needed.

    Raises:
        LoadError: See `ab.load`.
    """
    folder = Path(folder).expanduser()
    kind, config, arrays = load_folder(folder)
    lines = {"kind": kind}
    if kind in READERS:
        est = READERS[kind](config, arrays, str(folder))
        history = est.history or {}
        lines = {"kind": est.name, "model": model_name(est), **_describe(est)}
        lines["parameters"] = f"{num_parameters(est.network):,}"
        lines["training steps"] = f"{np.size(history.get('loss', ())):,}"
        lines["validation loss"] = validated(history) or "none"
        lines["checks"] = _verdict(est)
    else:
        lines["arrays"] = f"{len(arrays):,}"
    document = json.loads((folder / CONFIG).read_bytes())
    size = sum((folder / name).stat().st_size for name in (CONFIG, WEIGHTS))
    lines["written by"] = f"abduce {document['abduce']}, schema {document['schema']}"
    lines["size"] = f"{size:,} bytes"
    width = max(map(len, lines)) + 2
    text = [
        textwrap.fill(value, 100, initial_indent=f"{name:<{width}}", subsequent_indent=" " * width)
        for name, value in lines.items()
    ]
    return "\n".join(text)


def model_name(est: Any) -> str:
    """Of the model of training."""
    if isinstance(est, PFN):
        return est.table.model_name
    if isinstance(est, DistributionTransformer):
        return est.plan.layout.model_name
    return getattr(est, "layout", est).model_name


def _describe(est: Any) -> dict[str, str]:
    """Sites, sizes and settings of an estimator."""
    if isinstance(est, PFN):
        table, own = est.table, {"missing": est.missing, "shuffle": est.shuffle}
        return {
            "sites": _shapes((c.address, c.shape) for c in table.columns) + ", a point's shape",
            "context": ", ".join(table.context),
            "query": ", ".join((*table.targets, *table.latents)),
            "sizes": f"0 to {table.num_points - 1} points of context",
            "settings": _listed({**dataclasses.asdict(est.architecture), **own}),
        }
    if isinstance(est, DistributionTransformer):
        plan, layout = est.plan, est.plan.layout
        inferred, prior = ", ".join(plan.target.addresses), ", ".join(plan.prior.addresses)
        sites = f"{inferred}, given {', '.join(layout.observed)} and the prior of {prior}"
        settings = {
            f.name: getattr(plan, f.name)
            for f in dataclasses.fields(plan)
            if isinstance(getattr(plan, f.name), (int, float)) and f.name != "skipped"
        }
    elif not hasattr(est, "layout"):
        settings = dataclasses.asdict(est.settings)
        return {"observed": ", ".join(est.observed), "settings": _listed(settings)}
    else:
        layout, settings = est.layout, dataclasses.asdict(est.settings)
        sites = _shapes([*layout.addresses.items(), *layout.shapes])
    sizes = "fixed" if layout.sizes is None else "{} to {} elements".format(*layout.sizes)
    return {
        "sites": sites,
        "observed": ", ".join(layout.observed),
        "sizes": sizes + (", arguments drawn by designs" if layout.designs else ""),
        "settings": _listed(settings),
    }


def _shapes(sites: Any) -> str:
    return ", ".join(f"{address} {tuple(shape)}" for address, shape in sites)


def _listed(settings: Mapping[str, Any]) -> str:
    shown = {k: dict(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value not in (None, {}))


def _verdict(est: Any) -> str:
    if not is_checkable(est):
        return "none for this kind"
    if not isinstance(est.report, Mapping):
        return "not made"
    if est.report.get("passed"):
        return f"passed (false alarms: {est.report.get('alpha')})"
    adjusted = est.report.get("adjusted_p_values", {})
    low = [name for name, p in adjusted.items() if p <= est.report.get("alpha", 0)]
    return f"FAILED: {'; '.join(low) or 'too few runs'}"


def validated(history: Mapping[str, Any]) -> str:
    """The last validation loss, or nothing."""
    values = np.ravel(history.get("validation_loss", ()))
    return f"{float(values[-1]):.4g} nats" if values.size else ""


def is_checkable(est: Any) -> bool:
    """Whether its checks run on a loaded estimator."""
    return hasattr(est, "check") and hasattr(est, "with_model")
