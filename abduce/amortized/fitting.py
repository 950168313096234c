"""What training runs of all estimators begin with: simulations, stored or fresh, and a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from abduce.amortized.posing import draw_values
from abduce.amortized.recipe import Recipe
from abduce.amortized.rows import Rows, split_rows
from abduce.errors import InvalidAlgorithm, InvalidValue
from abduce.inference.algorithm import check_count

__all__ = ["RunPlan", "check_rows", "plan_run", "simulate_rows", "with_arguments"]


_SAMPLE = 2048  # simulations that scales are read off


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a training run begins with.

    Attributes:
        rows: Simulations to train on; None: every step makes its own.
        held: Simulations for validation.
        recipe: How to optimize.
        sample: Up to 2048 simulations by address, for scales.
    """

    rows: Rows | None
    held: Rows
    recipe: Recipe
    sample: dict[str, Any]


def simulate_rows(
    addresses: tuple[str, ...], designs: bool, simulation: Any, key: Any, num: int, batch_size: int
) -> dict[str, np.ndarray]:
    """Simulations by address, one row each; with designs, also `"arguments/<i>"`.

    Args:
        addresses: Which sites.
        designs: Whether the arguments are drawn.
        simulation: `{"arguments", "designs"}`.
        key: Typed random key.
        num: How many.
        batch_size: How many in one compiled call.
    """
    parts = []
    for i in range(0, num, batch_size):
        k = jax.random.fold_in(key, i)
        out = _simulate(addresses, designs, min(batch_size, num), simulation, k)
        parts.append({a: np.asarray(x)[: num - i] for a, x in out.items()})
    return {a: np.concatenate([p[a] for p in parts]) for a in parts[0]}


def _rows_of(addresses, designs, num, simulation, key):
    def one(key):
        values, arguments = draw_values(simulation, key)
        row = {a: values[a] for a in addresses}
        if designs:
            row |= {f"arguments/{i}": x for i, x in enumerate(arguments.dynamic)}
        return row

    return jax.vmap(one)(jax.random.split(key, num))


_simulate = jax.jit(_rows_of, static_argnums=(0, 1, 2))


def with_arguments(row: Mapping[str, Any], arguments: Any) -> tuple[dict[str, Any], Any]:
    """Splits a row into values by address and the arguments it was drawn under."""
    leaves = [row.get(f"arguments/{i}", x) for i, x in enumerate(arguments.dynamic)]
    values = {a: x for a, x in row.items() if not a.startswith("arguments/")}
    return values, type(arguments)(arguments.static, leaves)


def check_rows(
    name: str, data: Any, shapes: Mapping[str, tuple[int, ...]], model_name: str
) -> dict[str, Any]:
    """Simulations made elsewhere, checked against the model.

    Args:
        name: Of the estimator, for messages.
        data: A dict of arrays by address, one row per simulation; with designs also
            `"arguments"`, a tuple of arrays.
        shapes: Of a row of each array that is needed; arguments as `"arguments/<i>"`.
        model_name: For messages.

    Raises:
        InvalidValue: An array is missing, superfluous, or has another shape.
    """
    if not hasattr(data, "items"):
        raise InvalidValue(
            f"ab.{name}.fit: data= takes a dict of arrays by address, got {type(data).__name__}."
        )
    arrays = dict(data)
    if "arguments" in arrays:
        leaves = jax.tree.leaves(arrays.pop("arguments"))
        arrays |= {f"arguments/{i}": x for i, x in enumerate(leaves)}
    for a, shape in shapes.items():
        if a not in arrays:
            raise InvalidValue(f"ab.{name}.fit: data= has no {a!r}; it needs {', '.join(shapes)}.")
        got = tuple(np.shape(arrays[a]))[1:]
        if got != tuple(shape):
            raise InvalidValue(
                f"ab.{name}.fit: data[{a!r}] has rows of shape {got}; site {a!r} of "
                f"`{model_name}` has shape {tuple(shape)}."
            )
    extra = sorted(a for a in arrays if a not in shapes and not a.startswith("arguments/"))
    if extra:
        raise InvalidValue(f"ab.{name}.fit: data= has {extra}, which are no sites.")
    return {a: arrays[a] for a in arrays if a in shapes}


def plan_run(
    name: str,
    *,
    simulate: Callable[[int], dict[str, Any]],
    check: Callable[[Any], dict[str, Any]],
    budget: int | None,
    data: Any,
    num_steps: int | None,
    batch_size: int,
    validate_every: int | None,
    patience: int | None,
    **settings: Any,
) -> RunPlan:
    """What a run begins with.

    A fixed set is trained on for about 60 epochs, and stops once the held-out loss no longer falls.
    With fresh simulations, those for scales and for validation come from one program, apart from
    the training step: samplers are long to compile.

    Args:
        name: Of the estimator, for messages.
        simulate: `simulate(num)` gives that many rows.
        check: Checks rows made elsewhere.
        budget, data, num_steps, batch_size, validate_every, patience: As of `fit`.
        settings: Further fields of `Recipe`.
    """
    if budget is not None and data is not None:
        raise InvalidAlgorithm(f"ab.{name}.fit: budget= and data= exclude each other.")
    rows: Rows | None = None
    fixed = budget is not None or data is not None
    if fixed:
        if data is None:
            check_count(f"{name}.fit", "budget", budget, 20)
            arrays = simulate(int(budget))  # type: ignore[arg-type]
        else:
            arrays = check(data)
        rows, held = split_rows(arrays, 0.1, 0, batch_size, settings.get("accumulate", 1))
        epoch = rows.steps_per_epoch
        num_steps = num_steps or max(4000, min(20_000, 60 * epoch))
        validate_every = validate_every or max(100, epoch)
        patience = patience or 20
        batch_size = rows.batch_size
        sample = next(rows.in_order(_SAMPLE))
    else:
        arrays = simulate(2 * _SAMPLE)
        sample = {a: x[:_SAMPLE] for a, x in arrays.items()}
        rest = {a: x[_SAMPLE : _SAMPLE + max(2, 4 * batch_size)] for a, x in arrays.items()}
        held = Rows(rest, batch_size)
    recipe = Recipe(
        num_steps=num_steps or 10_000, batch_size=batch_size, validate_every=validate_every,
        patience=patience, keep_best=fixed, **settings,
    )  # fmt: skip
    return RunPlan(rows, held, recipe, sample)
