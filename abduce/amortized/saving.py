"""Posterior estimators as folders, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.layout import Discrete, Group, Latent, Layout
from abduce.amortized.networks import stacked
from abduce.amortized.novelty import Novelty
from abduce.amortized.posterior_network import PosteriorNetwork, Settings
from abduce.amortized.probes import Probes
from abduce.inference.encoding import LoadError
from abduce.inference.persistence import save_folder

__all__ = ["KIND", "estimator_from_saved", "fill", "named_arrays", "save_estimator", "tuples"]

KIND = "posterior estimator"


def named_arrays(tree: Any, prefix: str) -> dict[str, np.ndarray]:
    """The arrays of a module by their path in it."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_array))
    return {prefix + jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def fill(like: Any, arrays: dict[str, Any], prefix: str, where: str) -> Any:
    """A module of the same structure, with the arrays of `named_arrays`.

    Args:
        like: The module, with arrays or `jax.ShapeDtypeStruct` in their place.
        arrays: By name.
        prefix: Of the names.
        where: The folder, for messages.

    Raises:
        LoadError: An array is missing, superfluous, or of another shape.
    """
    used = set()

    def one(path, x):
        if not (eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)):
            return x
        name = prefix + jax.tree_util.keystr(path)
        if name not in arrays:
            raise LoadError(f"{where}: the array {name!r} is missing.")
        found = arrays[name]
        if tuple(np.shape(found)) != tuple(x.shape):
            raise LoadError(
                f"{where}: the array {name!r} has shape {tuple(np.shape(found))}; the settings "
                f"ask for {tuple(x.shape)}."
            )
        used.add(name)
        return jnp.asarray(found)

    out = jax.tree_util.tree_map_with_path(one, like)
    extra = sorted(n for n in arrays if n.startswith(prefix) and n not in used)
    if extra:
        raise LoadError(f"{where}: {extra[0]!r} does not belong to the network of the settings.")
    return out


def save_estimator(est: Any, path: Any, report: Any = None) -> Any:
    """See `PosteriorEstimator.save`."""
    config = {
        "estimator": est.kind,
        "layout": dataclasses.asdict(est.layout),
        "settings": dataclasses.asdict(est.settings),
        "num_samples": est.num_samples,
        "features": [list(np.shape(c)) for c, _ in est.scales["features"]],
        "shapes": [list(s) for s in feature_shapes(est)],
        "history": {k: np.asarray(v) for k, v in (est.history or {}).items()},
        "checks": report,
    }
    arrays = named_arrays(est.network, "network")
    arrays |= named_arrays(est.scales, "scales")
    arrays |= named_arrays(_as_arrays(est.novelty), "novelty")
    arrays |= named_arrays(_as_arrays(est.probes), "probes")
    return save_folder(path, KIND, config, arrays)


def _as_arrays(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def feature_shapes(est: Any) -> list[tuple[int, ...]]:
    """Shape of each group's features at the size of training."""
    from abduce.amortized.encoder import raw_features

    layout: Layout = est.layout
    observed = {a: jax.ShapeDtypeStruct(s, jnp.result_type(float)) for a, s in layout.shapes}
    kinds = dict(layout.kinds)
    observed = {
        a: jax.ShapeDtypeStruct(x.shape, jnp.int32) if kinds[a].startswith("classes") else x
        for a, x in observed.items()
    }
    example = {
        "observed": observed,
        "arguments": tuple(
            jax.ShapeDtypeStruct(s, jnp.result_type(float)) for s in layout.arguments
        ),
        "missing": {a: jax.ShapeDtypeStruct(s, bool) for a, s in layout.shapes}
        if est.settings.missing
        else None,
    }
    out = jax.eval_shape(lambda e: raw_features(layout, e, e["missing"]), example)
    return [tuple(x.shape) for x in out]


def estimator_from_saved(config: dict[str, Any], arrays: dict[str, Any], where: str) -> Any:
    """The estimator in a folder read by `load_folder`.

    Raises:
        LoadError: The contents do not fit together.
    """
    from abduce.amortized.estimator import PosteriorEstimator

    try:
        layout = _layout(config["layout"])
        settings = _settings(config["settings"], where)
        shapes = [tuple(s) for s in config["shapes"]]
        kind, num_samples = config["estimator"], config["num_samples"]
        history, report = config["history"], config["checks"]
    except (KeyError, TypeError, ValueError) as e:
        raise LoadError(f"{where}: config.json lacks or garbles {e}.") from None

    def make(key):
        return PosteriorNetwork(key, layout, settings, shapes)

    network = eqx.filter_eval_shape(make, jax.random.key(0))
    if settings.num_networks > 1:
        network = eqx.filter_eval_shape(lambda n: stacked([n] * settings.num_networks), network)
    network = fill(network, arrays, "network", where)
    scalars = jnp.zeros(layout.dim)
    scales = {
        "u": (scalars, scalars),
        "features": [(jnp.zeros(s), jnp.zeros(s)) for s in map(tuple, config["features"])],
    }
    scales = fill(scales, arrays, "scales", where)
    novelty = Novelty(
        **{
            f.name: _one(arrays, f"novelty.{f.name}", where)
            for f in dataclasses.fields(Novelty)
        }
    )
    count = sum(n.startswith("probes.arguments") for n in arrays)

    def by_address(field):
        start = f"probes.{field}['"
        return {n[len(start) : -2]: x for n, x in arrays.items() if n.startswith(start)}

    probes = Probes(
        by_address("values"),
        tuple(_one(arrays, f"probes.arguments[{i}]", where) for i in range(count)),
        by_address("scores"),
    )
    return PosteriorEstimator(
        kind, layout, settings, None, None, scales, network, novelty, probes, history,
        num_samples, report,
    )  # fmt: skip


def _one(arrays: dict[str, Any], name: str, where: str) -> np.ndarray:
    if name not in arrays:
        raise LoadError(f"{where}: the array {name!r} is missing.")
    return np.asarray(arrays[name])


def tuples(x: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(tuples(y) for y in x) if isinstance(x, (list, tuple)) else x


def _layout(stored: dict[str, Any]) -> Layout:
    stored = dict(stored)
    return Layout(
        **{
            **{k: tuples(v) for k, v in stored.items()},
            "latents": tuple(
                Latent(**{**d, "shape": tuple(d["shape"])}) for d in stored["latents"]
            ),
            "discrete": tuple(
                Discrete(**{**d, "shape": tuple(d["shape"])}) for d in stored["discrete"]
            ),
            "groups": tuple(
                Group(**{k: tuples(v) for k, v in d.items()}) for d in stored["groups"]
            ),
        }
    )


def _settings(stored: dict[str, Any], where: str) -> Settings:
    known = {f.name for f in dataclasses.fields(Settings)}
    unknown = sorted(set(stored) - known)
    if unknown:
        raise LoadError(
            f"{where}: the settings {', '.join(unknown)} are unknown to this release. Upgrade with "
            f"`pip install -U abduce`."
        )
    stored = dict(stored)
    if "missing" in stored:
        stored["missing"] = tuple(tuple(x) for x in stored["missing"])
    return Settings(**stored)
