"""Draws from a prior-fitted network that go on from their own draws.

Each new value joins the context of the next: joint draws over query points, and predictive
resampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.amortized.pfn_context import padded_size, read_context, read_query
from abduce.amortized.pfn_network import PFNNetwork
from abduce.amortized.pfn_sites import Table, features
from abduce.errors import InvalidAlgorithm, InvalidValue

__all__ = ["martingale_posterior", "sample_functions"]


def sample_functions(
    network: PFNNetwork, constants: Any, key: Any, context: Any, query: Any, num_samples: int
) -> Any:
    """See `PFN.sample_functions`."""
    table = network.table
    target = _only_target(table, "sample_functions")
    _check_count("sample_functions", "num_samples", num_samples)
    points, asked = read_context(table, context), read_query(table, query)
    if asked is None:
        raise InvalidValue(
            "pfn.sample_functions: points without inputs differ in nothing; use "
            "pfn.martingale_posterior(key, context, lambda data: data, num_steps=...)."
        )
    size = padded_size(points.num + asked.num)
    values = points.padded(size)
    return _functions(
        network, constants, target, num_samples, key, values, jnp.asarray(points.num), asked.values
    )


@eqx.filter_jit
def _functions(network, constants, target, num_samples, key, values, num, asked):
    many = next(iter(asked.values())).shape[0]

    def one(key):
        k_order, k_draws = jax.random.split(key)
        order = jax.random.permutation(k_order, many)
        inputs = {a: x[order] for a, x in asked.items()}
        filled = _continue(network, constants, target, k_draws, values, num, inputs, many)
        y = jax.lax.dynamic_slice_in_dim(filled[target], num, many)
        return jnp.zeros(many, y.dtype).at[order].set(y)

    return jax.lax.map(one, jax.random.split(key, num_samples), batch_size=32)


def martingale_posterior(
    network: PFNNetwork,
    constants: Any,
    key: Any,
    context: Any,
    functional: Any,
    num_samples: int,
    num_steps: int | None,
    inputs: Mapping[str, Any] | None,
) -> Any:
    """See `PFN.martingale_posterior`."""
    table, call = network.table, "martingale_posterior"
    target = _only_target(table, call)
    points = read_context(table, context)
    if num_steps is None:
        num_steps = max(table.num_points - points.num, 1)
    _check_count(call, "num_samples", num_samples)
    _check_count(call, "num_steps", num_steps)
    if not callable(functional):
        raise InvalidValue(f"pfn.{call}: functional is a function of data, got {functional!r}.")
    given = None
    if inputs is not None:
        asked = read_query(table, inputs)
        if asked is None or asked.num != num_steps:
            raise InvalidValue(
                f"pfn.{call}: inputs has {0 if asked is None else asked.num} points, expected "
                f"num_steps={num_steps}."
            )
        given = asked.values
    elif table.inputs and not points.num:
        raise InvalidValue(
            f"pfn.{call}: without a context there are no inputs to choose from. Pass "
            f'inputs={{"{table.inputs[0]}": ...}}, shape (num_steps, ...).'
        )
    values = points.padded(padded_size(points.num + num_steps))
    return _martingale(
        network, constants, target, functional, num_samples, points.num, num_steps, key, values,
        given,
    )  # fmt: skip


@eqx.filter_jit
def _martingale(
    network, constants, target, functional, num_samples, num, num_steps, key, values, given
):
    def one(key):
        inputs, (k_urn, k_draws) = given, jax.random.split(key)
        if inputs is None:
            index = _urn(k_urn, num, num_steps)
            inputs = {a: values[a][index] for a in network.table.inputs}
        filled = _continue(
            network, constants, target, k_draws, values, jnp.asarray(num), inputs, num_steps
        )
        return functional({a: x[: num + num_steps] for a, x in filled.items()})

    return jax.lax.map(one, jax.random.split(key, num_samples), batch_size=32)


def _urn(key, num, num_steps):
    """For each new point, the point of the context whose inputs it has.

    Each is drawn from all points so far, the new ones included.
    """
    sources = jnp.concatenate([jnp.arange(num), jnp.zeros(num_steps, int)])

    def draw(sources, i):
        j = jax.random.randint(jax.random.fold_in(key, i), (), 0, num + i)
        return sources.at[num + i].set(sources[j]), None

    if not num:
        return sources
    return jax.lax.scan(draw, sources, jnp.arange(num_steps))[0][num:]


def _continue(network, constants, target, key, values, num, inputs, num_steps):
    """Fills in `num_steps` points after the first `num`, one by one."""
    table = network.table
    size = next(iter(values.values())).shape[0]
    place = jnp.arange(size)

    def step(values, i):
        known = place < num + i
        new = {a: x[i][None] for a, x in inputs.items()}
        there = jnp.ones(size, bool)
        tokens = network.tokens(features(table, constants, values, there), there)
        keys_values = network.encode(tokens, known)
        blank = jnp.zeros(1, bool)
        token = network.tokens(features(table, constants, new, blank), blank)
        d = network.predict(target, network.decode(token, keys_values, known)[0], constants[target])
        y = d.sample(jax.random.fold_in(key, i))
        values = {
            a: x.at[num + i].set((y if a == target else new[a][0]).astype(x.dtype))
            for a, x in values.items()
        }
        return values, None

    return jax.lax.scan(step, values, jnp.arange(num_steps))[0]


def _only_target(table: Table, call: str) -> str:
    if len(table.targets) != 1 or table.targets[0] not in table.context:
        raise InvalidAlgorithm(
            f"pfn.{call} needs one target per point that is also in the context, so that a draw "
            f"can join it; this pfn has targets {list(table.targets)} and context "
            f"{list(table.context)}. Make it with context=[..., 'y'], query='y'."
        )
    return table.targets[0]


def _check_count(call: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidValue(f"pfn.{call}: {name} must be an int >= 1, got {value!r}.")
