"""Posterior draws as the ArviZ object of the installed version.

ArviZ 0.x has `InferenceData`, ArviZ 1.x uses `xarray.DataTree`; both are a set of xarray datasets
with agreed names. The datasets are built here, the same for both, and only `_container` knows the
version. Group and field names are ArviZ's: `posterior`, `sample_stats` (`diverging`, `energy`,
`n_steps`, `tree_depth`, `acceptance_rate`, `step_size`, `lp`), `log_likelihood`, and so on.

A "/" in an address becomes ".", since neither a `DataTree` nor a netCDF file can hold it:
`"school/mu"` is found as `posterior["school.mu"]`.
"""

import datetime
import importlib.metadata
from collections.abc import Mapping, Sequence

import numpy as np

from abduce.errors import InvalidValue

__all__ = ["to_arviz"]


def to_arviz(
    posterior: Mapping[str, np.ndarray],
    *,
    sample_stats: Mapping[str, np.ndarray] | None = None,
    log_likelihood: Mapping[str, np.ndarray] | None = None,
    posterior_predictive: Mapping[str, np.ndarray] | None = None,
    prior: Mapping[str, np.ndarray] | None = None,
    prior_predictive: Mapping[str, np.ndarray] | None = None,
    observed_data: Mapping[str, np.ndarray] | None = None,
    constant_data: Mapping[str, np.ndarray] | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    coords: Mapping[str, Sequence] | None = None,
    attrs: Mapping[str, object] | None = None,
):
    """Builds the ArviZ object from plain dicts of arrays.

    Args:
        posterior: Site to draws, `(chain, draw, ...)`, equally weighted.
        sample_stats: Name to statistic, `(chain, draw, ...)`; one of shape `(chain,)` or `()` is
            repeated over the draws. `lp` is the log density (nats, larger is more plausible).
        log_likelihood: Observed site to pointwise log likelihood, `(chain, draw, ...)`, nats.
        posterior_predictive: Observed site to replicated data, `(chain, draw, ...)`.
        prior: Site to prior draws, `(chain, draw, ...)`.
        prior_predictive: Observed site to prior predictive draws, `(chain, draw, ...)`.
        observed_data: Observed site to data, `(...)`.
        constant_data: Name to a model argument, `(...)`.
        dims: Site to the names of its axes after `(chain, draw)`, None for one without a name,
            which is then called "theta_dim_0". A name met twice in a site, or with different
            lengths in a group, is made unique ("feature_1", "theta_feature").
        coords: Name of an axis to its labels.
        attrs: Attributes added to every group; numbers and strings only.

    Returns:
        An `arviz.InferenceData` (ArviZ 0.x) or an `xarray.DataTree` (ArviZ 1.x).

    Raises:
        InvalidValue: Shapes, axis names or labels do not fit, or two addresses become one name.
        ImportError: ArviZ is not installed.

    Example:
        >>> import numpy as np
        >>> to_arviz({"mu": np.zeros((4, 100))}).posterior["mu"].shape
        (4, 100)
    """
    shape = _sample_shape("posterior", posterior)
    stats = None
    if sample_stats is not None and shape is not None:
        stats = {name: _spread(name, value, shape) for name, value in sample_stats.items()}
    groups = {
        "posterior": (posterior, 2),
        "posterior_predictive": (posterior_predictive, 2),
        "log_likelihood": (log_likelihood, 2),
        "sample_stats": (stats if stats is not None else sample_stats, 2),
        "prior": (prior, 2),
        "prior_predictive": (prior_predictive, 2),
        "observed_data": (observed_data, 0),
        "constant_data": (constant_data, 0),
    }
    common = _attributes(attrs or {})
    datasets = {
        group: _dataset(group, values, num_leading, dims or {}, coords or {}, common)
        for group, (values, num_leading) in groups.items()
        if values is not None
    }
    return _container(datasets)


def _container(datasets):
    """The one place that knows ArviZ's version."""
    if _arviz_major() >= 1:
        import xarray

        return xarray.DataTree.from_dict({f"/{group}": ds for group, ds in datasets.items()})
    import arviz

    return arviz.InferenceData(**datasets)


def _arviz_major() -> int:
    try:
        version = importlib.metadata.version("arviz")
        import xarray  # noqa: F401  (a dependency of every ArviZ)
    except ImportError as error:
        raise ImportError(
            "to_arviz needs ArviZ, which is not installed. Install it with `pip install arviz`."
        ) from error
    return int(version.split(".")[0])


def _installed_version() -> str:
    try:
        return importlib.metadata.version("abduce")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _attributes(extra: Mapping[str, object]) -> dict[str, object]:
    return {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "inference_library": "abduce",
        "inference_library_version": _installed_version(),
        **extra,
    }


def _sample_shape(group: str, values: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
    for value in values.values():
        if np.ndim(value) >= 2:
            return np.shape(value)[:2]
    return None


def _spread(name: str, value, shape: tuple[int, int]) -> np.ndarray:
    value = np.asarray(value)
    if value.ndim == 0:
        return np.broadcast_to(value, shape)
    if value.shape == shape[:1]:
        return np.broadcast_to(value[:, None], shape)
    return value


def _dataset(group, values, num_leading, dims, coords, attrs):
    import xarray

    variables, sizes = {}, {}
    reserved = {"chain", "draw"} | {site.replace("/", ".") for site in values}
    leading = ("chain", "draw")[:num_leading]
    first = None
    for site, value in values.items():
        array = _plain(group, site, value)
        if array.ndim < num_leading:
            raise InvalidValue(
                f'to_arviz: {group}["{site}"] must have shape (chain, draw, ...), got '
                f"{array.shape}."
            )
        first = first or (site, array.shape[:num_leading])
        if array.shape[:num_leading] != first[1]:
            raise InvalidValue(
                f'to_arviz: {group}["{site}"] has (chain, draw) = {array.shape[:num_leading]}, '
                f'but {group}["{first[0]}"] has {first[1]}. A group needs one such shape.'
            )
        name = site.replace("/", ".")
        if name in variables:
            raise InvalidValue(
                f'to_arviz: two sites of {group} would both be called "{name}", since ArviZ '
                'cannot store "/". Rename one of them.'
            )
        shape = array.shape[num_leading:]
        own = _axis_names(site, name, shape, dims.get(site), coords, sizes, reserved)
        variables[name] = ((*leading, *(axis for axis, _ in own)), array)
        for (axis, labels), size in zip(own, shape, strict=True):
            sizes[axis] = (size, labels)
    index = {}
    if first is not None:
        index = {axis: np.arange(n) for axis, n in zip(leading, first[1], strict=True)}
    for axis, (size, labels) in sizes.items():
        index[axis] = np.arange(size) if labels is None else labels
    return xarray.Dataset(variables, coords=index, attrs=attrs)


def _plain(group: str, site: str, value) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind == "V" and array.dtype.names is None:  # bfloat16 and its kin
        array = array.astype(np.float32)
    if array.dtype.kind not in "fiubcSU":
        raise InvalidValue(
            f'to_arviz: {group}["{site}"] has dtype {array.dtype}; numbers, booleans or strings '
            "are expected."
        )
    return array


def _axis_names(
    site, name, shape, given, coords, sizes, reserved
) -> list[tuple[str, np.ndarray | None]]:
    """For each axis its name, unique in the site and of one length in the group, and labels."""
    given = [None] * len(shape) if given is None else list(given)
    if len(given) != len(shape):
        raise InvalidValue(
            f'to_arviz: dims["{site}"] names {len(given)} axes ({", ".join(map(str, given))}), '
            f"but the site has shape {tuple(shape)}. Give one name (or None) for each axis."
        )
    result = []
    for position, (axis, size) in enumerate(zip(given, shape, strict=True)):
        if axis is None:
            result.append((f"{name}_dim_{position}", None))
            continue
        labels = coords.get(axis)
        if labels is not None:
            labels = np.asarray(labels)
            if labels.shape != (size,):
                raise InvalidValue(
                    f'to_arviz: coords["{axis}"] has {labels.size} labels, but this axis of site '
                    f'"{site}" has length {size}.'
                )
        unique = str(axis).replace("/", ".")
        if unique in reserved:  # xarray would take the variable for the axis' labels
            unique = f"{unique}_dim"
        if sizes.get(unique, (size,))[0] != size:
            unique = f"{name}_{unique}"
        taken, stem, count = {a for a, _ in result}, unique, 0
        while unique in taken:
            count += 1
            unique = f"{stem}_{count}"
        result.append((unique, labels))
    return result
