"""Running a model: the compiled core of every operation, and the checks at its boundary."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidValue, MissingData, MissingKey, NoDensity, UnknownAddress, suggest
from abduce.ppl import _jax
from abduce.ppl.checks import check_finite, check_support, coerce, is_whole_space
from abduce.ppl.data import as_data
from abduce.ppl.interpreter import State, walk
from abduce.ppl.masked import Masked
from abduce.ppl.program import Arguments, Program, SiteInfo, stage, stage_packed
from abduce.ppl.replay import Given, Replay, Sums

__all__ = ["execute", "prepare_given", "prepare_params", "stage_operation", "typed_key"]


def typed_key(key: Any, call: str = "m.simulate") -> Any:
    """Checks a random key; a legacy uint32 key is wrapped.

    Raises:
        MissingKey: It is not a key.
    """
    if isinstance(key, jax.Array) and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.shape != ():
            raise MissingKey(
                f"{call}: expected one key, got keys of shape {key.shape}. Map over them: "
                f"jax.vmap(lambda k: {call}(k, ...))(keys)."
            )
        return key
    if (
        isinstance(key, (jax.Array, np.ndarray))
        and key.dtype == jnp.uint32
        and key.shape in ((2,), (4,))
    ):
        return jax.random.wrap_key_data(jnp.asarray(key), impl=_legacy_impl(key.shape[0]))
    what = f"the int {key}" if isinstance(key, int) else f"{type(key).__name__}"
    seed = key if isinstance(key, int) else 0
    raise MissingKey(
        f"{call}: the first argument is a random key, got {what}. "
        f"Call {call}(jax.random.key({seed}), ...)."
    )


def _legacy_impl(words: int) -> str:
    return "threefry2x32" if words == 2 else "rbg"


@contextlib.contextmanager
def outside_scopes() -> Iterator[None]:
    """Addresses of an operation are relative to its model, wherever it is called."""
    with _jax.scope_context(()), _jax.token_context(()), _jax.scan_depth_context(0):
        yield


def stage_operation(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Program, Arguments]:
    """Stages a model for an operation of its own (addresses are not scoped)."""
    with outside_scopes():
        return stage(model, args, kwargs)


def execute(
    replay: Replay,
    arguments: Arguments,
    key: Any,
    given: dict[str, Given],
    *,
    weight: bool = False,
) -> dict[str, Any]:
    """Runs a program under a `Replay`, in one compiled call.

    Args:
        replay: What to draw, score and record.
        arguments: The packed model.
        key: Random key or None.
        given: Per address, values in the layout users see.
        weight: Whether to track the importance weight.

    Returns:
        `retval`, `log_density`, `weight` (None if not tracked) and `records`, per address, in the
        layout users see.
    """
    with outside_scopes():
        return _execute(replay, weight, arguments, key, given)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _execute(replay, weight, arguments, key, given):
    return run_program(replay, stage_packed(arguments), arguments, key, given, weight=weight)


def run_program(
    replay: Replay,
    program: Program,
    arguments: Arguments,
    key: Any,
    given: dict[str, Given],
    *,
    weight: bool = False,
    physical: bool = False,
) -> dict[str, Any]:
    """`execute` without its compiled boundary, for use inside compiled programs."""
    if not physical:
        given = {a: to_physical(program.sites[a], g) for a, g in given.items()}
    sums = Sums.zero(log_density=replay.score, weight=weight)
    state = State(key, given, sums)
    outs = walk(replay, program.jaxpr, program.inputs(arguments), state)
    records: dict[str, dict[str, Any]] = {}
    for address, info in program.sites.items():
        record = state.records.get(address)
        if record is None:
            continue
        if info.kind == "param":  # one value, however many steps met it
            records[address] = {
                "value": record["value"][(0,) * (record["value"].ndim - len(info.shape))]
            }
            continue
        records[address] = {name: info.to_logical(x) for name, x in record.items()}
    return {
        "retval": jax.tree.unflatten(program.out_tree, outs),
        "log_density": state.acc.log_density,
        "weight": state.acc.weight,
        "records": records,
    }


def to_physical(info: SiteInfo, g: Given) -> Given:
    """Moves a supplied value into the program's layout."""
    if g.shared:
        return g

    def move(x):
        return None if x is None else info.to_physical(x)

    return Given(
        move(g.value),
        move(g.mask),
        move(g.hidden),
        move(g.reference),
        move(g.centering),
        g.unconstrained,
        g.trusted,
        g.shared,
    )


def describe_sites(program: Program) -> str:
    """'mu, theta (8,), y (8,)': the choices of a program."""
    parts = [
        a + (f" {s.shape}" if s.shape else "")
        for a, s in program.sites.items()
        if s.kind == "sample"
    ]
    return ", ".join(parts) or "it has no sites"


def unknown_address(address: str, program: Program, where: str = "given") -> UnknownAddress:
    """The error for an address that no site has."""
    return UnknownAddress(
        f'{where}["{address}"] matches no site of `{program.name}` ({describe_sites(program)}).'
        f"{suggest(str(address), program.sites)}"
    )


def prepare_given(
    program: Program, given: Mapping[str, Any] | None, *, where: str = "given"
) -> dict[str, Given]:
    """Checks supplied values against a program; nothing is broadcast, nothing is ignored.

    Raises:
        UnknownAddress, InvalidValue, MissingData: See the messages.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InvalidValue(
            f"{where} is a dict of values by address, got {type(given).__name__}. "
            f'Write {where}={{"y": y}}.'
        )
    return {a: prepare_one(program, a, v, where) for a, v in given.items()}


def prepare_one(program: Program, address: str, value: Any, where: str) -> Given:
    """Checks the value for one address."""
    info = program.sites.get(address)
    if info is None:
        raise unknown_address(address, program, where)
    label = f'{where}["{address}"]'
    if info.kind == "deterministic":
        raise InvalidValue(
            f'{label}: "{address}" is deterministic, not a choice. To replace it, use '
            f'ab.do(m, {{"{address}": value}}).'
        )
    if info.kind == "param":
        raise InvalidValue(f'{label}: "{address}" is a parameter; pass it as params={{...}}.')
    if info.kind == "factor":
        raise InvalidValue(f'{label}: "{address}" is a factor, not a choice.')
    if info.observed and not info.partial:
        raise InvalidValue(
            f'{label}: site "{address}" is observed already, by obs= or ab.condition '
            f"({info.site.where}). Drop one of the two."
        )
    mask = None
    if isinstance(value, Masked):
        value, mask = value.values, value.observed
    value = as_data(value)
    if np.shape(value) != info.shape:
        raise InvalidValue(
            f"{label} has shape {np.shape(value)}, but site {address!r} has shape {info.shape}"
            f"{_dims_text(info)}. Values are never broadcast; reshape it, or check the model's "
            f"arguments."
        )
    if mask is not None:
        batch = info.shape[: info.batch_ndim]
        if np.shape(mask) != batch:
            inside = " It reaches inside an event; observe whole events." if (
                info.event_dim and np.shape(mask) == info.shape
            ) else ""  # fmt: skip
            raise InvalidValue(
                f"{label}: the mask has shape {np.shape(mask)}, expected {batch}.{inside}"
            )
    value = coerce(value, info.dtype, address, what=label)
    if info.conditional:  # where the branch is not taken, the value is a stand-in
        return Given(jnp.asarray(value), None if mask is None else jnp.asarray(mask))
    check_finite(value, address, mask, label)
    spec = info.site.spec
    check_support(spec, value, mask, label)
    known = _jax.is_concrete(value) and (mask is None or _jax.is_concrete(mask))
    trusted = spec.support is not None and (known or is_whole_space(spec.support))
    return Given(jnp.asarray(value), None if mask is None else jnp.asarray(mask), trusted=trusted)


def _dims_text(info: SiteInfo) -> str:
    return f" (dimensions {', '.join(str(d) for d in info.dims)})" if any(info.dims) else ""


def prepare_params(program: Program, params: Mapping[str, Any] | None) -> dict[str, Given]:
    """Checks values for the `ab.param` sites of a program."""
    found = {}
    for address, value in (params or {}).items():
        info = program.sites.get(address)
        if info is None or info.kind != "param":
            known = ", ".join(program.of_kind("param")) or "none"
            raise UnknownAddress(
                f'params["{address}"] matches no parameter of `{program.name}` '
                f"(there are: {known})."
            )
        value = as_data(value)
        if np.shape(value) != info.shape:
            raise InvalidValue(
                f'params["{address}"] has shape {np.shape(value)}, expected {info.shape}.'
            )
        found[address] = Given(jnp.asarray(value), shared=True)
    return found


def require_latents(program: Program, given: Mapping[str, Given], call: str) -> None:
    """Every latent must be given where nothing may be drawn."""
    missing = [a for a, s in program.latents.items() if a not in given and not s.partial]
    hard = [a for a in missing if not program.sites[a].conditional]
    if hard:
        raise MissingData(
            f"{call}: no value for site{'s' if len(hard) > 1 else ''} "
            f"{', '.join(map(repr, hard))} of `{program.name}` ({describe_sites(program)}). Pass "
            f"every latent, or draw the rest with m.generate(key, given, ...)."
        )


def require_density(program: Program, call: str, *, but: frozenset[str] = frozenset()) -> None:
    """A density is needed: simulators have none."""
    for address, info in program.sites.items():
        if info.kind == "sample" and not info.has_density and address not in but:
            raise NoDensity(
                f"{call} needs the density of site {address!r} ({info.site.where}), but it is a "
                f"dist.Simulator, which has none. m.simulate and m.prior work; replace it with a "
                f"distribution to score it."
            )
