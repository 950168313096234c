"""Saving and loading posteriors."""

from __future__ import annotations

from typing import Any

import numpy as np

from abduce.inference.persistence import save_folder
from abduce.inference.posterior import Posterior
from abduce.ppl.masked import Masked

__all__ = ["posterior_from_saved", "save_posterior"]


def save_posterior(post: Posterior, path: Any) -> Any:
    """Writes a posterior as a folder; see `Posterior.save`."""
    config = {
        "given": {a: _as_stored(v) for a, v in post.given.items()},
        "params": {a: np.asarray(v) for a, v in post.params.items()},
        "diagnostics": {
            k: str(v) if isinstance(v, str)
            else v if isinstance(v, (int, float, bool)) or v is None else np.asarray(v)
            for k, v in post.diagnostics.items()
        },
        "log_evidence": None if post.log_evidence is None else float(np.asarray(post.log_evidence)),
        "warnings": list(post.warnings),
        "coords": {k: [_plain(x) for x in v] for k, v in post.coords},
        "dims": {k: list(v) for k, v in post.dims},
        "deterministic": list(post.deterministic),
        "algorithm": post.algorithm,
    }
    arrays = {f"draws/{a}": np.asarray(x) for a, x in post.draws.items()}
    arrays.update({f"active/{a}": np.asarray(x) for a, x in post.active.items()})
    if post.log_weights is not None:
        arrays["log_weights"] = np.asarray(post.log_weights)
    return save_folder(path, "posterior", config, arrays)


def _as_stored(x: Any) -> Any:
    if isinstance(x, Masked):
        return {"values": np.asarray(x.values), "observed": np.asarray(x.observed)}
    return np.asarray(x)


def _plain(x: Any) -> Any:
    return x if isinstance(x, (int, float)) else str(x)


def posterior_from_saved(config: dict[str, Any], arrays: dict[str, Any]) -> Posterior:
    """The posterior in a folder read by `load_folder`."""
    draws = {n[len("draws/") :]: x for n, x in arrays.items() if n.startswith("draws/")}
    return Posterior(
        draws=draws,
        active={n[len("active/") :]: x for n, x in arrays.items() if n.startswith("active/")},
        log_weights=arrays.get("log_weights"),
        log_evidence=config["log_evidence"],
        params=config["params"],
        diagnostics=config["diagnostics"],
        arguments=None,
        given={
            a: Masked(**v) if isinstance(v, dict) else v for a, v in config["given"].items()
        },
        warnings=tuple(config["warnings"]),
        coords=tuple((k, tuple(v)) for k, v in config["coords"].items()),
        dims=tuple((k, tuple(v)) for k, v in config["dims"].items()),
        deterministic=tuple(config["deterministic"]),
        algorithm=config["algorithm"],
    )
