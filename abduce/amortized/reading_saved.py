"""Which reader each kind of saved estimator has."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from abduce.amortized import dt_saving, likelihood_saving, pfn, saving

__all__ = ["READERS"]

READERS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        saving.KIND: saving.estimator_from_saved,
        dt_saving.KIND: dt_saving.transformer_from_saved,
        likelihood_saving.KIND: likelihood_saving.likelihood_from_saved,
        pfn.KIND: pfn.from_saved,
    }
)
