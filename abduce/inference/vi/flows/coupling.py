"""Coupling: half of the coordinates choose what happens to the other half."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from abduce.errors import InvalidValue
from abduce.inference.vi.flows.bijection import Bijection, check_count
from abduce.inference.vi.flows.networks import MLP
from abduce.inference.vi.flows.transformers import Affine, Transformer
from abduce.ppl.operations import typed_key

__all__ = ["Coupling"]


class Coupling(Bijection):
    """The first `dim // 2` coordinates pass; a network of them transforms the rest.

    Dinh, Sohl-Dickstein and Bengio, "Density Estimation using Real NVP", ICLR 2017, eqs. 4 to 8.
    Both directions cost one evaluation of the network. Permute or mix between two couplings, or
    the same coordinates pass each time.

    Args:
        key: Typed PRNG key.
        dim: Length of a vector, at least 2.
        transformer: What is applied to a coordinate: `flows.Affine()` or
            `flows.RationalQuadratic()`.
        hidden: Widths of the network's hidden layers.
        context_dim: Length of the context, an additional input of the network; 0 for none.
        activation: Of the network.

    Raises:
        InvalidValue: `dim` is below 2: one coordinate has no other half.
    """

    network: MLP
    transformer: Transformer
    dim: int = eqx.field(static=True)
    context_dim: int = eqx.field(static=True)

    def __init__(
        self,
        key: Any,
        dim: int,
        transformer: Transformer | None = None,
        *,
        hidden: Sequence[int] = (64, 64),
        context_dim: int = 0,
        activation: str = "silu",
    ):
        self.dim = check_count("flows.Coupling", "dim", dim)
        if dim < 2:
            raise InvalidValue(
                "flows.Coupling splits a vector into two parts, so it needs dim >= 2, got 1. For "
                "one coordinate use flows.spline_autoregressive(key, 1, num_layers=2)."
            )
        self.context_dim = check_count("flows.Coupling", "context_dim", context_dim, 0)
        self.transformer = Affine() if transformer is None else transformer
        num_out = (dim - dim // 2) * self.transformer.num_params
        key = typed_key(key, "flows.Coupling")
        self.network = MLP(key, dim // 2 + context_dim, num_out, hidden, activation)

    def _forward(self, x, context):
        return self._run(x, context, self.transformer.forward)

    def _backward(self, y, context):
        return self._run(y, context, self.transformer.inverse)

    def _run(self, x, context, function):
        kept, moved = x[: self.dim // 2], x[self.dim // 2 :]
        inputs = kept if context is None else jnp.concatenate([kept, context])
        params = self.network(inputs).reshape(moved.shape[0], -1)
        moved, log_det = function(moved, params)
        return jnp.concatenate([kept, moved]), jnp.sum(log_det)
