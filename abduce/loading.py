"""`ab.load`: whatever abduce saved."""

from __future__ import annotations

from typing import Any

from abduce.errors import InvalidValue
from abduce.inference.persistence import load_folder
from abduce.inference.stored import posterior_from_saved

__all__ = ["load"]


def load(path: Any) -> Any:
    """Reads what `save` wrote: a posterior or an estimator. Nothing in the folder is executed.

    Args:
        path: The folder.

    Returns:
        A `Posterior` (without its model: pass `model=` to `predict`), or an estimator (attach it
        to its model: `est(model)`).

    Raises:
        LoadError: The folder is damaged, incomplete, or from a newer version; the message says
            which.
    """
    kind, config, arrays = load_folder(path)
    if kind == "posterior":
        return posterior_from_saved(config, arrays)
    from abduce.amortized.reading_saved import READERS

    if kind in READERS:
        return READERS[kind](config, arrays, str(path))
    raise InvalidValue(f"ab.load: {path} holds a {kind!r}, which this version cannot load.")
