"""Addresses and names of dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abduce.errors import InvalidModel
from abduce.ppl import _jax
from abduce.ppl.site import user_location

__all__ = ["absolute", "dim_names", "path_text", "scoped"]


def absolute(name: Any) -> str:
    """The address of `name` in the current scope."""
    if not isinstance(name, str) or not name:
        raise InvalidModel(
            f"an address is a non-empty string, got {name!r} ({user_location()}). "
            f'Write ab.sample("mu", dist.Normal(0, 1)).'
        )
    return "/".join((*_jax.scope_context.value, name))


def scoped(address: str) -> str:
    """A model's own address, as it is in the current scope."""
    return "/".join((*_jax.scope_context.value, address))


def path_text(path: Sequence[Any]) -> str:
    """'layers/0/weight', from a JAX key path."""
    parts = []
    for entry in path:
        for attr in ("key", "name", "idx"):
            if hasattr(entry, attr):
                parts.append(str(getattr(entry, attr)))
                break
    return "/".join(parts)


def dim_names(address: str, dims: Any, ndim: int, where: str) -> tuple[str | None, ...]:
    """Checks the names of an element's own dimensions."""
    if dims is None:
        return (None,) * ndim
    dims = (dims,) if isinstance(dims, str) else tuple(dims)
    if len(dims) != ndim:
        raise InvalidModel(
            f"site {address!r} ({where}): dims={dims} names {len(dims)} dimensions, the value has "
            f"{ndim}. Axes of vmap are named by jax.vmap(..., axis_name=)."
        )
    return dims
