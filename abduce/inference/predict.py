"""Running a model again at the draws of a posterior: predictions, likelihoods, prior draws."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidValue
from abduce.inference import weighting
from abduce.inference.problem import Problem
from abduce.ppl.masked import Masked
from abduce.ppl.operations import (
    outside_scopes,
    prepare_given,
    run_program,
    stage_operation,
    typed_key,
)
from abduce.ppl.program import Arguments, Program, stage_packed
from abduce.ppl.replay import Given, Replay
from abduce.ppl.selection import matching

__all__ = ["draw_prior", "log_likelihood", "observations", "predict", "with_gaps"]

_BATCH_ELEMENTS = 20_000_000  # numbers produced per step when batch_size is not given


def _model_of(
    post: Any, model: Any, call: str, remedy: str
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if post.arguments is None:
        if model is None:
            raise InvalidValue(
                f"{call}: this posterior was loaded from disk, and models are code, which is not "
                f"stored. {remedy}"
            )
        return model, (), {}
    own, args, kwargs = post.arguments.unpack()
    return (own if model is None else model), args, kwargs


def predict(
    post: Any,
    key: Any,
    new_args: tuple[Any, ...],
    new_kwargs: dict[str, Any],
    *,
    given: Mapping[str, Any] | None,
    redraw: Any,
    model: Any,
    batch_size: int | None,
) -> dict[str, Any]:
    """See `Posterior.predict`."""
    key = typed_key(key, "post.predict")
    shape = (post.num_chains, post.num_draws)
    model, args, kwargs = _model_of(
        post, model, "post.predict",
        "Pass the model and its arguments: post.predict(key, *args, model=m).",
    )  # fmt: skip
    if new_args or new_kwargs:
        args, kwargs = new_args, new_kwargs
    if model.algorithm is not None:
        model = model.with_algorithm(None)
    program, arguments = stage_operation(model, args, kwargs)
    fixed = prepare_given(program, given)
    latent = [a for a in post.draws if a not in post.deterministic]
    chosen = matching(redraw, latent) if redraw else set()
    stale = descendants(program, chosen) if chosen else set()
    kept = {}
    for address in latent:
        info = program.sites.get(address)
        if info is None or address in fixed or address in stale or info.kind != "sample":
            continue
        draws = post.draws[address]
        if np.shape(draws)[2:] != info.shape:
            raise InvalidValue(
                f"post.predict: the draws of {address!r} have shape {np.shape(draws)[2:]}, but "
                f"with these arguments the site has shape {info.shape}. To draw it anew from its "
                f'prior given the rest (new groups, say), pass redraw="{address}".'
            )
        kept[address] = _kept(post, address, info)
    partly = [a for a, v in post.given.items() if isinstance(v, Masked)]
    wanted = tuple(
        a for a, s in program.sites.items()
        if s.kind in ("sample", "deterministic")
        and (a not in kept or a in partly) and a not in fixed
    )  # fmt: skip
    if not wanted:
        raise InvalidValue(
            f"post.predict: nothing in `{program.name}` is left to draw: every site has a draw or "
            f'a given value. Choose latents to draw anew with redraw="...".'
        )
    replay = Replay(record=frozenset({"value"}), score=False, predictive=True)
    out = run_at_draws(
        replay, wanted, ("value",), program, arguments, key, fixed, kept, shape, batch_size
    )["value"]
    return _resampled(post, out)


def _resampled(post: Any, out: dict[str, Any]) -> dict[str, Any]:
    """In the order of `post[...]`."""
    if post.log_weights is None:
        return out
    index = post._resampled
    return {a: weighting.flat(x)[index][None] for a, x in out.items()}


def _kept(post: Any, address: str, info: Any) -> Given:
    """The draws of a site; it has no value where it was not active, or was observed."""
    draws = jnp.asarray(post.draws[address])
    shape = draws.shape[: 2 + info.batch_ndim]
    masks = []
    if address in post.active:
        on = jnp.asarray(post.active[address])
        masks.append(on.reshape(on.shape + (1,) * (len(shape) - on.ndim)))
    if isinstance(data := post.given.get(address), Masked):
        masks.append(~jnp.asarray(data.observed))
    if not masks:
        return Given(draws, trusted=True)
    mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), shape)
    return Given(draws, mask, trusted=True)


def descendants(program: Program, chosen: set[str]) -> set[str]:
    """The chosen sites and the latents that depend on them."""
    from abduce.ppl.graph import graph_of

    graph = graph_of(program)
    found, todo = set(chosen), list(chosen)
    while todo:
        for child in graph.children(todo.pop()):
            if child not in found:
                found.add(child)
                todo.append(child)
    return found


def observations(post: Any) -> dict[str, tuple[Any, Any]]:
    """Data by address, given or observed in the program: values, and a mask or None."""
    data = {
        a: (v.values, v.observed) if isinstance(v, Masked) else (v, None)
        for a, v in post.given.items()
    }
    if post.arguments is None:
        return data
    model, args, kwargs = post.arguments.unpack()
    program, arguments = stage_operation(model, args, kwargs)
    inside = tuple(a for a in program.observed if a not in data)
    if inside:
        fixed, kept = _everything(post, 1)
        replay = Replay(record=frozenset({"value", "mask"}), score=False)
        out = run_at_draws(
            replay, inside, ("value", "mask"), program, arguments, None, fixed, kept, (1, 1), None
        )
        for address in inside:
            mask = out["mask"].get(address)
            data[address] = out["value"][address][0, 0], None if mask is None else mask[0, 0]
    return {a: data[a] for a in program.sites if a in data}


def _everything(post: Any, num: int | None = None) -> tuple[dict[str, Given], dict[str, Given]]:
    """A value for every choice: data, and the draws (of chains and draws the first `num`)."""
    fixed = {a: Given(jnp.asarray(v)) for a, v in post.given.items() if a not in post.draws}
    kept = {
        a: Given(jnp.asarray(x[:num, :num]), trusted=True)
        for a, x in post.draws.items()
        if a not in post.deterministic
    }
    return fixed, kept


def with_gaps(values: Any, mask: Any) -> np.ndarray:
    """Data with NaN where nothing was observed."""
    values = np.asarray(values)
    if mask is None:
        return values
    mask = np.reshape(mask, np.shape(mask) + (1,) * (values.ndim - np.ndim(mask)))
    return np.where(mask, values, np.nan)


def log_likelihood(post: Any, *, batch_size: int | None) -> dict[str, Any]:
    """See `Posterior.log_likelihood`."""
    model, args, kwargs = _model_of(
        post, None, "post.log_likelihood", "Call it before saving, or run m.posterior(...) again."
    )
    program, arguments = stage_operation(model, args, kwargs)
    data = observations(post)
    fixed, kept = _everything(post)
    replay = Replay(record=frozenset({"score"}))
    shape = (post.num_chains, post.num_draws)
    scores = run_at_draws(
        replay, tuple(data), ("score",), program, arguments, None, fixed, kept, shape, batch_size
    )["score"]
    for address, (_, mask) in data.items():
        if mask is not None:
            scores[address] = jnp.where(mask, scores[address], jnp.nan)
    return _resampled(post, scores)


def run_at_draws(
    replay: Replay,
    wanted: tuple[str, ...],
    fields: tuple[str, ...],
    program: Program,
    arguments: Arguments,
    key: Any,
    fixed: dict[str, Given],
    kept: dict[str, Given],
    shape: tuple[int, int],
    batch_size: int | None,
) -> dict[str, dict[str, Any]]:
    """Runs the program once per draw; returns the fields, each by address, of the wanted sites."""
    flat = jax.tree.map(weighting.flat, kept)
    per_draw = sum(math.prod(program.sites[a].shape) for a in wanted) + 1
    total = shape[0] * shape[1]
    if batch_size is None:
        batch_size = max(1, min(total, _BATCH_ELEMENTS // per_draw))
    with outside_scopes():
        out = _run_at_draws(
            replay, wanted, fields, min(batch_size, total), total, arguments, key, fixed, flat
        )
    return jax.tree.map(lambda x: x.reshape((*shape, *x.shape[1:])), out)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run_at_draws(replay, wanted, fields, batch_size, total, arguments, key, fixed, flat):
    program = stage_packed(arguments)

    def one(i, values):
        k = None if key is None else jax.random.fold_in(key, i)
        records = run_program(replay, program, arguments, k, {**fixed, **values})["records"]
        return {f: {a: records[a][f] for a in wanted if f in records[a]} for f in fields}

    index = jnp.arange(total, dtype=jnp.uint32)
    if batch_size >= total:
        return jax.vmap(one)(index, flat)
    return jax.lax.map(lambda t: one(*t), (index, flat), batch_size=batch_size)


def draw_prior(problem: Problem, key: Any, num_samples: int) -> tuple[Any, Any]:
    """Independent draws of every unobserved site and deterministic, and where they are active.

    Both by address, `(1, draw, ...)`.
    """
    wanted = tuple(
        a for a, s in problem.program.sites.items() if s.is_latent or s.kind == "deterministic"
    )
    replay = Replay(record=frozenset({"value"}), score=False)
    out = run_at_draws(
        replay, wanted, ("value", "active"), problem.program, problem.arguments, key, {}, {},
        (1, num_samples), None,
    )  # fmt: skip
    return out["value"], out["active"]
