"""Masked autoregression: each coordinate is transformed as the ones before it say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.inference.vi.flows.bijection import Bijection, check_count
from abduce.inference.vi.flows.networks import MADE
from abduce.inference.vi.flows.transformers import Affine, Transformer
from abduce.ppl.operations import typed_key

__all__ = ["MaskedAutoregressive"]


class MaskedAutoregressive(Bijection):
    """`y[i]` is a transformation of `x[i]` with parameters from `y[:i]`.

    Papamakarios, Pavlakou and Murray, "Masked Autoregressive Flow for Density Estimation", NeurIPS
    2017, with a masked network (`MADE`) for all parameters at once. `inverse`, and so a density,
    is one evaluation of the network; `forward`, and so a draw, is `dim` of them, one after the
    other. `flows.Inverse` of it is the inverse autoregressive flow of Kingma et al. (2016).

    Args:
        key: Typed PRNG key.
        dim: Length of a vector.
        transformer: What is applied to a coordinate: `flows.Affine()` or
            `flows.RationalQuadratic()`.
        hidden: Widths of the network's hidden layers, at least one.
        context_dim: Length of the context, an additional input of the network; 0 for none.
        activation: Of the network.
    """

    network: MADE
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
        name = "flows.MaskedAutoregressive"
        self.dim = check_count(name, "dim", dim)
        self.context_dim = check_count(name, "context_dim", context_dim, 0)
        self.transformer = Affine() if transformer is None else transformer
        num_params = self.transformer.num_params
        key = typed_key(key, name)
        self.network = MADE(key, dim, num_params, hidden, context_dim, activation)

    @property
    def fast_forward(self) -> bool:
        return self.dim == 1

    def _forward(self, x, context):
        def step(y, i):
            params = self.network.row(i, y, context)
            value, log_det = self.transformer.forward(x[i], params)
            return y.at[i].set(value.astype(y.dtype)), log_det

        dtype = jnp.result_type(x, self.network.out_bias)
        y, log_dets = jax.lax.scan(step, jnp.zeros(self.dim, dtype), jnp.arange(self.dim))
        return y, jnp.sum(log_dets)

    def _backward(self, y, context):
        x, log_det = self.transformer.inverse(y, self.network(y, context))
        return x, jnp.sum(log_det)
