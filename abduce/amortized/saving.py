"""Posterior estimators as folders, and back."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.gnpe import new_network
from abduce.amortized.layout import Layout
from abduce.amortized.novelty import Novelty
from abduce.amortized.posterior_network import Settings
from abduce.amortized.probes import Probes
from abduce.inference.encoding import LoadError
from abduce.inference.persistence import save_folder

__all__ = [
    "KIND",
    "KeptReport",
    "blueprint",
    "check_lengths",
    "estimator_from_saved",
    "fill",
    "named_arrays",
    "save_estimator",
    "typed",
]

KIND = "posterior estimator"


@jax.tree_util.register_static
class KeptReport(dict):
    """The checks an estimator was saved with: a dict that compiled programs do not take apart.

    An estimator is handed to them whole, and the strings in a report are no arrays.
    """

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True, default=str))


def named_arrays(tree: Any, prefix: str) -> dict[str, np.ndarray]:
    """The arrays of a module by their path in it."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_array))
    return {prefix + jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def blueprint(make: Callable[[Any], Any], where: str) -> Any:
    """A network with `jax.ShapeDtypeStruct` for its arrays, for `fill`.

    Args:
        make: From a random key to the network.
        where: The folder, for messages.

    Raises:
        LoadError: The settings describe no network.
    """
    try:
        return eqx.filter_eval_shape(make, jax.random.key(0))
    except Exception as e:  # garbled sizes and names fail in as many ways as there are layers
        raise LoadError(f"{where}: config.json describes no network ({e}).") from e


def fill(like: Any, arrays: dict[str, Any], prefix: str, where: str) -> Any:
    """A module of the same structure, with the arrays of `named_arrays`.

    Args:
        like: The module, with arrays or `jax.ShapeDtypeStruct` in their place.
        arrays: By name.
        prefix: Of the names.
        where: The folder, for messages.

    Raises:
        LoadError: An array is missing, superfluous, of another shape, or holds no real numbers
            where they are needed.
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
        if jnp.issubdtype(x.dtype, jnp.inexact) != jnp.issubdtype(found.dtype, jnp.inexact):
            raise LoadError(f"{where}: the array {name!r} has dtype {found.dtype}, not {x.dtype}.")
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
        "checks": None if report is None else dict(report),
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
        layout = typed(Layout, config["layout"], "layout")
        settings = _settings(config["settings"], where)
        shapes = typed(list[tuple[int, ...]], config["shapes"], "shapes")
        features = typed(list[tuple[int, ...]], config["features"], "features")
        kind = typed(str, config["estimator"], "estimator")
        num_samples = typed(int, config["num_samples"], "num_samples")
        history = typed(dict, config["history"], "history")
        report = typed(dict | None, config["checks"], "checks")
        report = None if report is None else KeptReport(report)
        if num_samples < 1:
            raise ValueError(f"num_samples {num_samples}")
        if [s[-1:] for s in shapes] != features or len(shapes) != len(layout.groups):
            raise ValueError(f"shapes {shapes} of features {features}")
    except (KeyError, TypeError, ValueError) as e:
        raise LoadError(f"{where}: config.json lacks or garbles {e}.") from None

    def blank(shape):
        return (jax.ShapeDtypeStruct(shape, jnp.result_type(float)),) * 2

    scales: dict[str, Any] = {"u": blank((layout.dim,)), "features": [blank(s) for s in features]}
    if settings.pose is not None:
        proxy = blank((len(settings.pose.kernel),))
        scales["start"] = {"u": proxy, "features": scales["features"]}
        scales["moved"] = {a: blank(s)[0] for a, s in layout.shapes}
        if not settings.pose.exact:
            scales["proxy"] = proxy
    scales = fill(scales, arrays, "scales", where)
    _check_network(layout, settings, arrays, where)
    network = blueprint(lambda key: new_network(key, layout, settings, shapes), where)
    if settings.num_networks > 1:
        network = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((settings.num_networks, *x.shape), x.dtype)
            if isinstance(x, jax.ShapeDtypeStruct) else x,
            network,
        )  # fmt: skip
    network = fill(network, arrays, "network", where)
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
    if not isinstance(arrays[name], np.ndarray):
        raise LoadError(f"{where}: {name!r} is a random key, not numbers.")
    return arrays[name]


def _settings(stored: dict[str, Any], where: str) -> Settings:
    known = {f.name for f in dataclasses.fields(Settings)}
    unknown = sorted(set(stored) - known)
    if unknown:
        raise LoadError(
            f"{where}: the settings {', '.join(unknown)} are unknown to this release. Upgrade with "
            f"`pip install -U abduce`."
        )
    return typed(Settings, stored, "settings")


def typed(hint: Any, value: Any, name: str) -> Any:
    """A stored value as a declared type: dataclasses were stored as dicts, tuples maybe as lists.

    Raises:
        ValueError: It is something else; the message has its name.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, np.ndarray) and not value.ndim:  # a NumPy scalar was stored
        value = value.item()
    if origin in (types.UnionType, typing.Union):
        present = [a for a in args if a is not types.NoneType]
        return None if value is None else typed(present[0], value, name)
    if origin in (tuple, list):
        if isinstance(value, (tuple, list)):
            each = args if origin is tuple and args[-1] is not ... else args[:1] * len(value)
            if len(each) == len(value):
                items = enumerate(zip(each, value, strict=True))
                return origin(typed(a, v, f"{name}/{i}") for i, (a, v) in items)
    elif hasattr(hint, "__dataclass_fields__"):
        hints = typing.get_type_hints(hint)
        if isinstance(value, dict) and set(value) <= set(hints):
            return hint(**{k: typed(hints[k], v, f"{name}/{k}") for k, v in value.items()})
    elif type(value) is hint or (hint is float and type(value) is int):
        return value
    raise ValueError(f"{name}, which is {str(value)[:40]!r} instead of {hint}")


def check_lengths(lengths: Mapping[str, int], arrays: Any, prefix: str, where: str) -> None:
    """Every length that the settings ask for is that of some array, every layer has arrays.

    A network is built from the settings before its arrays are compared with the stored ones;
    garbled settings would ask for more than time and memory allow.

    Args:
        lengths: Widths and counts by name.
        arrays: By name.
        prefix: Of the names of the network's arrays.
        where: The folder, for messages.

    Raises:
        LoadError: A length is out of reach.
    """
    stored = [np.shape(x) for n, x in arrays.items() if n.startswith(prefix)]
    most = max([len(stored), *(n for s in stored for n in s)])
    for name, length in lengths.items():
        if length > most:
            raise LoadError(
                f"{where}: the settings ask for {name} {length}, but no array of the network is "
                f"that large."
            )


def _check_network(layout: Layout, settings: Settings, arrays: Any, where: str) -> None:
    names = ["width", "context_dim", "depth"]
    if layout.dim and settings.head == "mixture":
        names.append("num_components")
    if layout.dim and settings.head in ("spline", "coupling"):
        names.append("num_bins")
        if layout.dim > 1:  # a single coordinate has a single layer
            names.append("num_layers")
    lengths = {n: getattr(settings, n) for n in names}
    check_lengths(lengths, arrays, "network", where)
    drawn = sum(d.size for d in layout.discrete)
    part = "network" if settings.pose is None else "network.main"
    nets = np.shape(arrays.get(f"{part}.choices.nets.first.bias", ()))
    if layout.discrete and nets[-2:-1] != (drawn,):
        raise LoadError(f"{where}: there are no networks for {drawn} discrete latents.")
