"""Data of a problem as an example for the network, checked against what it was trained on."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from abduce.amortized.layout import Layout, read_arguments
from abduce.errors import InvalidAlgorithm, InvalidModel, InvalidValue, MissingData, NotFitted
from abduce.inference.problem import Problem
from abduce.ppl import _jax

__all__ = ["check_sites", "read_example", "require_fitted"]


def require_fitted(est: Any) -> None:
    """An estimator has to be trained before it is used.

    Raises:
        NotFitted: It is not.
    """
    if est.network is None:
        raise NotFitted(
            f"ab.{est.name}: the estimator is not trained. Use what fit returns: "
            f"est = est.fit(key, num_steps=20_000)."
        )


def read_example(est: Any, problem: Problem) -> dict[str, Any]:
    """Observations, arguments and masks for `encode`; works on tracers.

    Raises:
        NotFitted, MissingData, InvalidValue, InvalidModel, InvalidAlgorithm: See the messages.
    """
    require_fitted(est)
    layout: Layout = est.layout
    check_sites(est.name, layout, problem)
    observed, missing = {}, {}
    rates = dict(est.settings.missing)
    for address, shape in layout.shapes:
        given = problem.given.get(address)
        if given is None:
            raise MissingData(
                f'ab.{est.name}: given["{address}"] is missing. The estimator was trained with '
                f"{', '.join(layout.observed)} observed, and needs all of them."
            )
        value = given.value
        _check_shape(est.name, layout, address, shape, jnp.shape(value))
        gone = jnp.zeros(jnp.shape(value), bool)
        if given.mask is not None:
            mask = jnp.asarray(given.mask)
            gone = jnp.broadcast_to(
                ~mask.reshape(mask.shape + (1,) * (len(gone.shape) - mask.ndim)), gone.shape
            )
            if address not in rates and not (_jax.is_concrete(gone) and not np.any(gone)):
                raise InvalidAlgorithm(
                    f'ab.{est.name}: given["{address}"] has hidden entries, but the estimator was '
                    f"trained on complete data. Train it with "
                    f'missing={{"{address}": 0.2}} (the mean fraction that is missing).'
                )
        value = jnp.asarray(value)
        if given.mask is not None and est.probes is not None:
            # Hidden entries may be NaN; a value of the support keeps the density finite there.
            stand_in = jnp.asarray(est.probes.values[address][0], value.dtype)
            stand_in = stand_in[: value.shape[0]] if value.ndim else stand_in
            value = jnp.where(gone, stand_in, value)
        observed[address], missing[address] = value, gone
    extra = [a for a in problem.given if a not in observed]
    if extra:
        raise InvalidAlgorithm(
            f"ab.{est.name}: {extra[0]!r} is given, but the estimator has it as a latent. Train "
            f"another one with observed={[*layout.observed, *extra]}, or use "
            f"ab.importance(proposal=...) or ab.nuts."
        )
    return {
        "observed": observed,
        "arguments": read_arguments(layout, problem),
        "mask": None,
        "missing": missing if rates else None,
    }


def _check_shape(name: str, layout: Layout, address: str, shape: Any, got: Any) -> None:
    if tuple(shape) == tuple(got):
        return
    group = next(g for g in layout.groups if address in g.sites)
    if group.kind == "set" and tuple(shape[1:]) == tuple(got[1:]):
        if layout.sizes is None:
            raise InvalidValue(
                f'ab.{name}: given["{address}"] has {got[0]} elements, but the estimator was '
                f"trained on {shape[0]} only. Train it with sizes=(1, {max(shape[0], got[0])})."
            )
        low, high = layout.sizes
        if low <= got[0] <= high:
            return
        raise InvalidValue(
            f'ab.{name}: given["{address}"] has {got[0]} elements; the estimator was trained on '
            f"{low} to {high}."
        )
    raise InvalidValue(
        f'ab.{name}: given["{address}"] has shape {tuple(got)}; the estimator was trained on '
        f"{tuple(shape)}."
    )


def check_sites(name: str, layout: Layout, problem: Problem) -> None:
    """The model's sites have to be those of training.

    Raises:
        InvalidModel: They are not; the message lists both.
    """
    program = problem.program
    known = {a for a, s in program.sites.items() if s.kind == "sample"}
    mine = layout.addresses
    trained = set(mine) | set(layout.observed)
    if known != trained:
        raise InvalidModel(
            f"ab.{name}: the estimator was trained on `{layout.model_name}` with sites "
            f"{', '.join(sorted(trained))}; `{program.name}` has {', '.join(sorted(known))}."
        )
    for address, shape in mine.items():
        got = program.sites[address].shape
        if tuple(got) != tuple(shape):
            raise InvalidModel(
                f"ab.{name}: latent {address!r} has shape {tuple(got)} in `{program.name}`, but "
                f"the estimator was trained with {tuple(shape)}."
            )
