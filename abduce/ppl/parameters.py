"""`ab.param`: learnable values, from single arrays to whole neural networks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidModel
from abduce.ppl import _jax
from abduce.ppl.naming import absolute, dim_names, path_text
from abduce.ppl.site import Site, as_float, bind, user_location

__all__ = ["param"]


def param(name: str, init: Any, constraint: Any = None, *, dims: Any = None) -> Any:
    """A learnable value without density.

    It has one value however often it is met under `vmap` or `scan`. Operations take `params=`;
    without it, the initial value is used.

    Args:
        name: The address.
        init: An array, or any pytree (Equinox and Flax NNX modules included): each inexact array
            leaf is learnable, at `"name/path"`; other leaves pass through unchanged.
        constraint: A NumPyro constraint that every leaf satisfies; real by default.
        dims: Names of the value's dimensions.

    Returns:
        The value, with the structure of `init`.
    """
    address, where = absolute(name), user_location()
    if type(init).__module__.startswith("flax.nnx") or _is_nnx(init):
        from flax import nnx

        graph, state = nnx.split(init)
        return nnx.merge(graph, _param_tree(address, state, constraint, dims, where))
    return _param_tree(address, init, constraint, dims, where)


def _is_nnx(tree: Any) -> bool:
    return any(c.__module__.startswith("flax.nnx") for c in type(tree).__mro__)


def _param_tree(address: str, init: Any, constraint: Any, dims: Any, where: str) -> Any:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(init)
    out = []
    for path, leaf in leaves:
        is_number = isinstance(leaf, (float, jax.Array, np.ndarray, np.floating))
        if isinstance(leaf, (int, float)) and not isinstance(leaf, bool) and not path:
            leaf, is_number = as_float(leaf), True
        if not is_number or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            out.append(leaf)
            continue
        here = f"{address}/{path_text(path)}" if path else address
        leaf = jnp.asarray(leaf)
        if (
            constraint is not None
            and _jax.is_concrete(leaf)
            and not np.asarray(constraint(leaf)).all()
        ):
            raise InvalidModel(
                f"param {here!r} ({where}): the initial value {leaf} does not satisfy {constraint}."
            )
        site = Site(
            "param", here, leaf.shape, leaf.dtype, roles=("leaf",), where=where,
            constraint=constraint, dims=dim_names(here, dims, leaf.ndim, where),
        )  # fmt: skip
        out.append(bind(site, [leaf]))
    return jax.tree.unflatten(treedef, out)
