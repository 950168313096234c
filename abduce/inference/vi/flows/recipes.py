"""Ready flows: layers of one kind, mixed in between, all starting near the identity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from abduce.errors import InvalidValue
from abduce.inference.vi.flows.autoregressive import MaskedAutoregressive
from abduce.inference.vi.flows.bijection import Bijection, Inverse, check_count
from abduce.inference.vi.flows.chain import Chain, Stack
from abduce.inference.vi.flows.continuous import Continuous
from abduce.inference.vi.flows.coupling import Coupling
from abduce.inference.vi.flows.linear import LU, ElementwiseAffine, Permutation
from abduce.inference.vi.flows.planar_radial import Planar, Radial
from abduce.inference.vi.flows.transformers import Affine, RationalQuadratic
from abduce.ppl.operations import typed_key

__all__ = [
    "affine_coupling",
    "continuous",
    "iaf",
    "maf",
    "planar",
    "radial",
    "spline_autoregressive",
    "spline_coupling",
]

_HIDDEN = (64, 64)
_MIXING = ("lu", "permute", "reverse")


def planar(
    key: Any,
    dim: int,
    num_layers: int = 8,
    *,
    hidden: Sequence[int] = _HIDDEN,
    context_dim: int = 0,
) -> Chain:
    """A learned scale and shift, then planar layers: the flow of Rezende and Mohamed (2015).

    Args:
        key: Typed PRNG key.
        dim: Length of a vector.
        num_layers: Number of planar layers.
        hidden: Hidden layers of the network of the context; unused without one.
        context_dim: Length of the context; 0 for none.
    """
    return _around_points("flows.planar", Planar, key, dim, num_layers, hidden, context_dim)


def radial(
    key: Any,
    dim: int,
    num_layers: int = 8,
    *,
    hidden: Sequence[int] = _HIDDEN,
    context_dim: int = 0,
) -> Chain:
    """A learned scale and shift, then radial layers.

    Args:
        key: Typed PRNG key.
        dim: Length of a vector.
        num_layers: Number of radial layers.
        hidden: Hidden layers of the network of the context; unused without one.
        context_dim: Length of the context; 0 for none.
    """
    return _around_points("flows.radial", Radial, key, dim, num_layers, hidden, context_dim)


def affine_coupling(
    key: Any,
    dim: int,
    num_layers: int = 6,
    *,
    hidden: Sequence[int] = _HIDDEN,
    context_dim: int = 0,
    mixing: str = "lu",
    activation: str = "silu",
    max_log_scale: float = 3.0,
) -> Chain:
    """Affine coupling layers (real NVP): both directions fast.

    Args:
        key: Typed PRNG key.
        dim: Length of a vector, at least 2.
        num_layers: Number of couplings.
        hidden: Hidden layers of each network.
        context_dim: Length of the context; 0 for none.
        mixing: After each layer: "lu" (a learned matrix), "permute" (a fixed random order,
            another one after each layer) or "reverse".
        activation: Of the networks.
        max_log_scale: Bound of a layer's log scales.
    """

    def layer(k):
        return Coupling(
            k, dim, Affine(max_log_scale), hidden=hidden, context_dim=context_dim,
            activation=activation,
        )  # fmt: skip

    return _mixed("flows.affine_coupling", layer, key, dim, num_layers, mixing)


def spline_coupling(
    key: Any,
    dim: int,
    num_layers: int = 4,
    *,
    hidden: Sequence[int] = _HIDDEN,
    context_dim: int = 0,
    num_bins: int = 8,
    bound: float = 5.0,
    mixing: str = "lu",
    activation: str = "silu",
) -> Chain:
    """Rational-quadratic coupling layers (neural spline flow): both directions fast.

    Args:
        key: Typed PRNG key.
        dim: Length of a vector, at least 2.
        num_layers: Number of couplings.
        hidden: Hidden layers of each network.
        context_dim: Length of the context; 0 for none.
        num_bins: Bins of each spline.
        bound: Splines act on `[-bound, bound]`; outside they are the identity.
        mixing: After each layer: "lu", "permute" or "reverse".
        activation: Of the networks.
    """

    def layer(k):
        return Coupling(
            k, dim, RationalQuadratic(num_bins, bound), hidden=hidden, context_dim=context_dim,
            activation=activation,
        )  # fmt: skip

    return _mixed("flows.spline_coupling", layer, key, dim, num_layers, mixing)


def maf(
    key: Any,
    dim: int,
    num_layers: int = 4,
    *,
    hidden: Sequence[int] = _HIDDEN,
    context_dim: int = 0,
    mixing: str = "reverse",
    activation: str = "silu",
    max_log_scale: float = 3.0,
) -> Chain:
    """Masked autoregressive layers: densities fast, draws `dim` times slower.

    Args:
        key: Typed PRNG key.
        dim: Length of a vector.
        num_layers: Number of layers.
        hidden: Hidden layers of each network.
        context_dim: Length of the context; 0 for none.
        mixing: After each layer: "lu", "permute" or "reverse".
        activation: Of the networks.
        max_log_scale: Bound of a layer's log scales.
    """

    def layer(k):
        return MaskedAutoregressive(
            k, dim, Affine(max_log_scale), hidden=hidden, context_dim=context_dim,
            activation=activation,
        )  # fmt: skip

    return _mixed("flows.maf", layer, key, dim, num_layers, mixing)


def iaf(
    key: Any,
    dim: int,
    num_layers: int = 4,
    *,
    hidden: Sequence[int] = _HIDDEN,
    context_dim: int = 0,
    mixing: str = "reverse",
    activation: str = "silu",
    max_log_scale: float = 3.0,
) -> Chain:
    """Inverse autoregressive layers: draws fast, densities of other points `dim` times slower.

    Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling, "Improved Variational Inference with
    Inverse Autoregressive Flow", NeurIPS 2016: made for variational inference, which scores its
    own draws (`Flow.sample_and_log_prob`).

    Args:
        key: Typed PRNG key.
        dim: Length of a vector.
        num_layers: Number of layers.
        hidden: Hidden layers of each network.
        context_dim: Length of the context; 0 for none.
        mixing: After each layer: "lu", "permute" or "reverse".
        activation: Of the networks.
        max_log_scale: Bound of a layer's log scales.
    """

    def layer(k):
        inverse = MaskedAutoregressive(
            k, dim, Affine(max_log_scale), hidden=hidden, context_dim=context_dim,
            activation=activation,
        )  # fmt: skip
        return Inverse(inverse)

    return _mixed("flows.iaf", layer, key, dim, num_layers, mixing)


def spline_autoregressive(
    key: Any,
    dim: int,
    num_layers: int = 2,
    *,
    hidden: Sequence[int] = _HIDDEN,
    context_dim: int = 0,
    num_bins: int = 8,
    bound: float = 5.0,
    mixing: str = "lu",
    activation: str = "silu",
) -> Chain:
    """Rational-quadratic autoregressive layers: densities fast, draws `dim` times slower.

    `flows.Inverse` of the result exchanges the two.

    Args:
        key: Typed PRNG key.
        dim: Length of a vector.
        num_layers: Number of layers.
        hidden: Hidden layers of each network.
        context_dim: Length of the context; 0 for none.
        num_bins: Bins of each spline.
        bound: Splines act on `[-bound, bound]`; outside they are the identity.
        mixing: After each layer: "lu", "permute" or "reverse".
        activation: Of the networks.
    """

    def layer(k):
        return MaskedAutoregressive(
            k, dim, RationalQuadratic(num_bins, bound), hidden=hidden, context_dim=context_dim,
            activation=activation,
        )  # fmt: skip

    return _mixed("flows.spline_autoregressive", layer, key, dim, num_layers, mixing)


def continuous(
    key: Any,
    dim: int,
    num_layers: int = 1,
    *,
    hidden: Sequence[int] = (64,),
    context_dim: int = 0,
    num_steps: int = 20,
) -> Chain:
    """Continuous flows, one after the other, then a learned scale and shift.

    Args:
        key: Typed PRNG key.
        dim: Length of a vector.
        num_layers: Number of velocity fields, each for one unit of time.
        hidden: Hidden layers of each velocity field.
        context_dim: Length of the context; 0 for none.
        num_steps: Runge-Kutta steps for each; see `flows.Continuous` for the error.
    """

    def layer(k):
        return Continuous(k, dim, hidden=hidden, num_steps=num_steps, context_dim=context_dim)

    key = typed_key(key, "flows.continuous")
    keys = jax.random.split(key, check_count("flows.continuous", "num_layers", num_layers) + 1)
    return Chain([Stack(jax.vmap(layer)(keys[1:])), ElementwiseAffine(keys[0], dim)])


def _around_points(
    name: str,
    kind: Callable[..., Bijection],
    key: Any,
    dim: int,
    num_layers: int,
    hidden: Sequence[int],
    context_dim: int,
) -> Chain:
    key = typed_key(key, name)
    keys = jax.random.split(key, check_count(name, "num_layers", num_layers) + 1)
    settings: dict[str, Any] = {"hidden": hidden, "context_dim": context_dim}
    layers = jax.vmap(lambda k: kind(k, dim, **settings))(keys[1:])
    return Chain([ElementwiseAffine(keys[0], dim, **settings), Stack(layers)])


def _mixed(
    name: str,
    layer: Callable[[Any], Bijection],
    key: Any,
    dim: int,
    num_layers: int,
    mixing: str,
) -> Chain:
    """Layers with mixing in between, and a scale and shift at the end."""
    check_count(name, "num_layers", num_layers)
    if mixing not in _MIXING:
        raise InvalidValue(f"{name}: unknown mixing {mixing!r}; choose from {list(_MIXING)}.")
    key_layers, key_end = jax.random.split(typed_key(key, name))
    keys = jax.random.split(key_layers, num_layers)
    if mixing == "lu":

        def block(keys):
            return Chain([layer(keys[0]), LU(keys[1], dim)])

        # the last matrix has a scale and shift of its own
        return Chain([Stack(jax.vmap(block)(jax.vmap(jax.random.split)(keys)))])
    end = ElementwiseAffine(key_end, dim)
    if mixing == "reverse":
        reverse = Permutation.reverse(dim)
        return Chain([Stack(jax.vmap(lambda k: Chain([layer(k), reverse]))(keys)), end])
    parts: list[Bijection] = []
    for i in range(num_layers):
        parts += [layer(keys[i]), Permutation.shuffled(dim, seed=i)]
    return Chain([*parts, end])
