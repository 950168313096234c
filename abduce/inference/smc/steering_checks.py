"""Checks of a steered sampler: the signatures of its functions, the contract of its potential."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidModel
from abduce.inference.algorithm import check_count

__all__ = ["as_state", "check_potential", "check_program"]


def as_state(state: Any) -> Any:
    """A state as arrays of fixed dtypes (Python numbers have none); a function stays one."""
    if callable(state) and not jax.tree.leaves(eqx.filter(state, eqx.is_array)):
        return state

    def leaf(x):
        if not eqx.is_array_like(x):
            raise InvalidModel(
                f"ab.steer: a state is a pytree of arrays, but has a leaf of type "
                f"{type(x).__name__}. Keep constants in the functions, not in the state."
            )
        x = jnp.asarray(x)
        return x if jnp.issubdtype(x.dtype, jax.dtypes.extended) else x.astype(x.dtype)

    return jax.tree.map(leaf, state)


def check_program(program: Any) -> None:
    """The functions of a program must return what the engine carries; nothing is computed."""
    for field in ("next", "potential", "lookahead", "is_done", "positions"):
        function = getattr(program, field)
        if function is not None and not callable(function):
            raise InvalidModel(f"ab.steer: {field} is a function, got {type(function).__name__}.")
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = program.init
    if callable(state):
        state = eqx.filter_eval_shape(lambda k: as_state(program.init(k)), key)
    out = eqx.filter_eval_shape(program.next, key, state)
    if not isinstance(out, tuple) or len(out) != 4:
        raise InvalidModel(
            f"ab.steer: next(key, state) returns (state, token, logq, logp), got "
            f"{f'{len(out)} values' if isinstance(out, tuple) else type(out).__name__}."
        )
    new, token, *log_probs = out
    _same_structure(state, new)
    if not hasattr(token, "shape"):
        raise InvalidModel(f"ab.steer: a token is an array, got {type(token).__name__}.")
    if program.end_token is not None and token.shape != ():
        raise InvalidModel(
            f"ab.steer: end_token= compares with tokens that are scalars, but next() gives tokens "
            f"of shape {token.shape}. Use is_done=."
        )
    for name, x in zip(("logq", "logp"), log_probs, strict=True):
        _scalar(f"next() returned {name}", x)
    flag = jax.ShapeDtypeStruct((), bool)
    for field in ("potential", "lookahead"):
        if getattr(program, field) is not None:
            x = eqx.filter_eval_shape(getattr(program, field), state, flag)
            _scalar(f"{field}(state, done) returned a value", x)
    if program.is_done is not None:
        _scalar("is_done(state) returned a flag", eqx.filter_eval_shape(program.is_done, state))


def _same_structure(old: Any, new: Any) -> None:
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise InvalidModel(
            f"ab.steer: next() must return a state like the one it got. Got\n  "
            f"{jax.tree.structure(new)}\nexpected\n  {jax.tree.structure(old)}"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True)
    for (path, a), b in pairs:
        b = b if hasattr(b, "dtype") else jnp.asarray(b)
        if a.shape != b.shape or a.dtype != b.dtype:
            where = f"state{jax.tree_util.keystr(path)}"
            raise InvalidModel(
                f"ab.steer: next() changed {where} from {a.dtype}{list(a.shape)} to "
                f"{b.dtype}{list(b.shape)}. A state has fixed shapes and dtypes: write "
                f"{where}.astype({str(a.dtype)!r}), or start with the other dtype."
            )


def _scalar(what: str, x: Any) -> None:
    shape = getattr(x, "shape", None if not isinstance(x, (bool, int, float)) else ())
    if shape != ():
        got = type(x).__name__ if shape is None else f"shape {shape}"
        raise InvalidModel(
            f"ab.steer: {what} of {got}, expected a scalar. The functions are written for one "
            f"sequence; sum over what is inside it."
        )


def check_potential(program: Any, key: Any, num_sequences: int = 1000) -> float:
    """Tests a potential's contract on sequences drawn from the sampler alone, without weights.

    The contract: where a prefix has weight zero, so has every extension of it (else steering loses
    that extension and its evidence is too small); the same for the look-ahead of a prefix; nothing
    is NaN or +inf. What the sampler never draws is not seen.

    Args:
        program: An `ab.steer`.
        key: Random key.
        num_sequences: How many sequences to draw.

    Returns:
        The fraction of the sequences whose potential is positive at the end. At 0, no violation
        can be seen: the check says nothing.

    Raises:
        InvalidModel: With the sequence that violates the contract, and where.

    Example:
        >>> ab.check_potential(program, jax.random.key(1))
        0.042
    """
    check_count("check_potential", "num_sequences", num_sequences)
    tokens, length, log_psi, log_h, log_ratio = (
        np.asarray(x) for x in _free_run(program, key, num_sequences)
    )
    for name, values in [("potential", log_psi), ("lookahead", log_h)]:
        _report(
            name, np.isnan(values) | (values == np.inf), tokens,
            lambda n, t, values=values: f"is {values[n, t]}, expected a log weight below +inf",
        )  # fmt: skip
    _report(
        "log p - log q", np.isnan(log_ratio) | (log_ratio == np.inf), tokens,
        lambda n, t: f"is {log_ratio[n, t]}: next() drew a token that logq calls impossible",
    )  # fmt: skip
    zero = log_psi == -np.inf
    later = np.flip(np.maximum.accumulate(np.flip(~zero, 1), 1), 1)  # positive now or later
    _report(
        "potential", zero & later, tokens,
        lambda n, t: f"is zero, but positive again after {t + int(np.argmax(~zero[n, t:]))} tokens "
        f"({_show(tokens[n, : t + int(np.argmax(~zero[n, t:]))])}). A prefix of weight zero is lost"
        f" with all its extensions: make its potential positive",
    )  # fmt: skip
    ends = log_psi[np.arange(num_sequences), length] > -np.inf
    steps = np.arange(log_psi.shape[1])
    doomed = (log_h == -np.inf) & ends[:, None] & (steps < length[:, None])
    _report(
        "lookahead", doomed, tokens,
        lambda n, t: f"is zero, but the sequence ends with a positive potential "
        f"({_show(tokens[n, : length[n]])}): make it positive there",
    )  # fmt: skip
    return float(ends.mean())


def _report(name: str, bad: np.ndarray, tokens: np.ndarray, message: Any) -> None:
    if bad.any():
        n, t = (int(i) for i in np.argwhere(bad)[0])
        raise InvalidModel(
            f"ab.check_potential: after {t} tokens ({_show(tokens[n, :t])}) the {name} "
            f"{message(n, t)}. {int(bad.any(1).sum())} of {len(bad)} sequences do so."
        )


def _show(tokens: np.ndarray) -> str:
    return "[" + ", ".join(str(x) for x in tokens.tolist()) + "]"


@eqx.filter_jit
def _free_run(program: Any, key: Any, num_sequences: int) -> Any:
    """Tokens, lengths, and for every prefix its log potential, look-ahead and log p - log q."""

    def score(state, done):
        h = jnp.zeros(()) if program.lookahead is None else program.lookahead(state, done)
        return jnp.asarray(program.potential(state, done), float), jnp.asarray(h, float)

    def one(key):
        init_key, key = jax.random.split(key)
        state = program.init
        if callable(state):
            state = as_state(program.init(init_key))
        done = jnp.zeros((), bool)
        if program.is_done is not None:
            done = jnp.asarray(program.is_done(state), bool)

        def step(carry, x):
            state, done, length = carry
            t, key = x
            new, token, logq, logp = program.next(key, state)
            ended = jnp.zeros((), bool)
            if program.is_done is not None:
                ended |= program.is_done(new)
            if program.end_token is not None:
                ended |= token == program.end_token
            if program.is_done is None and program.end_token is None:
                ended |= t == program.max_steps - 1
            state = jax.tree.map(lambda a, b: jnp.where(done, a, b), state, new)
            psi, h = score(state, ended | done)
            # a finished sequence is not scored again: as if nothing had happened
            outs = (token, psi, h, jnp.where(done, 0.0, logp - logq), done)
            return (state, done | ended, length + ~done), outs

        first = score(state, done)
        xs = (jnp.arange(program.max_steps), jax.random.split(key, program.max_steps))
        carry = (state, done, jnp.zeros((), jnp.int32))
        (_, _, length), (tokens, psi, h, ratio, frozen) = jax.lax.scan(step, carry, xs)
        held = jnp.concatenate([first[0][None], psi])
        last = held[length]
        psi = jnp.where(frozen, last, psi)
        return (
            tokens, length, jnp.concatenate([first[0][None], psi]),
            jnp.concatenate([first[1][None], jnp.where(frozen, 0.0, h)]),
            jnp.concatenate([jnp.zeros(1), ratio]),
        )  # fmt: skip

    return jax.vmap(one)(jax.random.split(key, num_sequences))
