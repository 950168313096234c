"""Steering: an autoregressive sampler and a potential, run by sequential Monte Carlo.

A sampler draws sequences token by token, `x_t ~ q(. | x_<t)`; a model scores them, `p(x_t | x_<t)`;
a potential `psi_t(x_1..t) >= 0` says what is wanted. The target over whole sequences is

    gamma(x) = p(x) psi(x),        Z = sum_x gamma(x),

with `psi(x)` the potential where the sequence ends. The potentials of prefixes only guide: with the
incremental weight

    log p(x_t | x_<t) - log q(x_t | x_<t) + log psi_t - log psi_(t-1)

they cancel, so any prefix potential gives the same target, as long as it is zero only where no
extension has a positive weight. A look-ahead `h_t` takes part in the choice of ancestors and is
undone at once. Finished sequences are frozen, weight and all, by masks of fixed shape.

Naesseth, Lindsten and Schon (2019), "Elements of sequential Monte Carlo"; for
language models Lew et al. (2023), arXiv 2306.03081, and Puri et al. (2025), arXiv 2502.01618.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import Degenerate, InvalidAlgorithm, MissingKey
from abduce.inference.algorithm import check_count
from abduce.inference.smc.population import Resampling
from abduce.inference.smc.steered import SequenceChain, SequencePath, Steered
from abduce.inference.smc.steering_checks import as_state, check_program
from abduce.inference.smc.steering_sweep import draw_path, sweep
from abduce.inference.warning import warn
from abduce.ppl import _jax

__all__ = ["steer"]


class steer(eqx.Module):
    """Sequential Monte Carlo over the sequences of a sampler, weighted by a potential.

    All functions are written for one sequence; the engine maps them over particles. They may be
    methods of `equinox.Module`s, whose arrays then are arguments of the compiled program.

    Args:
        init: The state before the first token, any pytree of arrays; or `init(key) -> state`.
        next: `next(key, state) -> (state, token, logq, logp)`: draws a token; `logq` is the log
            probability with which it was drawn, `logp` that under the model, in nats.
        potential: `potential(state, done) -> log psi`, in nats, -inf allowed; `done` says whether
            the sequence ends here. Also called for `init`, with `done=False`. A NaN or +inf counts
            as weight zero, with a warning.
        lookahead: `lookahead(state, done) -> log h`: sequences are resampled by weight times `h`,
            after which `h` is divided out. It must be positive wherever weight can still come. The
            ideal is the log of the mean factor by which the weight is going to change.
        is_done: `is_done(state) -> bool`: the sequence has ended.
        end_token: The token that ends a sequence. With neither, sequences have `max_steps` tokens.
        positions: `positions(state)`, shape `(d,)`: for `resampler="optimal_transport"` only.
        num_particles: Sequences kept at a time, N.
        max_steps: Tokens at most, T.
        resampler: A scheme of `abduce.kernels.resampling.SCHEMES`.
        threshold: Resample where the effective sample size is below this fraction of N.
        schedule: Resample at fixed times instead: after every `schedule` tokens (an int), or after
            these numbers of tokens (a collection of ints).
        weighting: `"telescoping"` as above, or `"current"`: the incremental weight has `log psi_t`
            alone, so particles are resampled by the softmax of their current scores, as
            particle-based inference-time scaling does (Puri et al. 2025). **That is another
            target**, `p(x) prod_t psi_t(x_1..t)` over t >= 1, which depends on the length of a
            sequence and on its scores along the way, not `p(x) psi(x)`.
        unfinished: Sequences that have not ended after `max_steps`: `"keep"` with the weight of
            their prefix and a warning, or `"discard"` (weight zero: the target is over the
            sequences of at most `max_steps` tokens).

    Example:
        >>> program = ab.steer(model.initial(), model.next, potential, end_token=0, max_steps=20)
        >>> result = program.run(jax.random.key(0))
        >>> result.log_evidence, result.tokens.shape
    """

    init: Any = eqx.field(converter=as_state)
    next: Callable[..., Any]
    potential: Callable[..., Any]
    _: dataclasses.KW_ONLY
    lookahead: Callable[..., Any] | None = None
    is_done: Callable[..., Any] | None = None
    positions: Callable[..., Any] | None = None
    end_token: int | None = eqx.field(default=None, static=True)
    num_particles: int = eqx.field(default=256, static=True)
    max_steps: int = eqx.field(default=64, static=True)
    resampler: str = eqx.field(default="systematic", static=True)
    threshold: float = eqx.field(default=0.5, static=True)
    schedule: int | tuple[int, ...] | None = eqx.field(
        default=None, static=True, converter=lambda s: _as_schedule(s)
    )
    weighting: Literal["telescoping", "current"] = eqx.field(default="telescoping", static=True)
    unfinished: Literal["keep", "discard"] = eqx.field(default="keep", static=True)

    def __check_init__(self):
        check_count("steer", "num_particles", self.num_particles)
        check_count("steer", "max_steps", self.max_steps)
        Resampling(self.resampler, self.threshold)  # raises where they are not known
        for field, known in [
            ("weighting", ("telescoping", "current")),
            ("unfinished", ("keep", "discard")),
        ]:
            if getattr(self, field) not in known:
                raise InvalidAlgorithm(
                    f"ab.steer: {field} is one of {', '.join(map(repr, known))}, got "
                    f"{getattr(self, field)!r}."
                )
        if self.resampler == "optimal_transport" and self.positions is None:
            raise InvalidAlgorithm(
                'ab.steer: resampler="optimal_transport" moves particles to near ones and needs '
                "positions=, a function from a state to a vector."
            )
        check_program(self)

    def __eq__(self, other):  # by identity, so that `jax.jit(program.run)` can be cached
        return self is other

    def __hash__(self):
        return id(self)

    def replace(self, **changes: Any) -> steer:
        """A copy with other settings."""
        return dataclasses.replace(self, **changes)

    def run(self, key: Any) -> Steered:
        """Draws one weighted population of sequences.

        Works under `jax.jit` and `jax.vmap`, where nothing is raised or warned about: a run that
        lost all its particles has log evidence -inf.

        Args:
            key: Random key.

        Returns:
            The sequences, their weights, the evidence and the genealogy.

        Raises:
            Degenerate: All weights are zero; the message has the step.

        Warns:
            AbduceWarning: Sequences have not ended, or a potential was NaN or +inf.
        """
        _check_key(key)
        out = _run(self, key)
        if _jax.is_concrete(out.log_evidence):
            self._require_alive(out)
            self._warn(out)
        return out

    def particle_gibbs(
        self, key: Any, num_samples: int, *, initial: SequencePath | None = None
    ) -> SequenceChain:
        """A Markov chain of sequences that leaves the target exactly invariant, for any N >= 2.

        Each turn is a run in which particle 0 is the current sequence, kept as it is (conditional
        sequential Monte Carlo), and from whose final weights the next one is drawn. Andrieu, Doucet
        and Holenstein (2010), section 2.4.3. There is no ancestor sampling: where long sequences
        keep their beginnings, take more particles.

        Memory: the states of all particles at all steps of one turn.

        Args:
            key: Random key.
            num_samples: Length of the chain (the start is not part of it).
            initial: Where to start, such as `chain.path` of an earlier chain; default, a draw from
                an ordinary run.

        Returns:
            The chain of sequences.

        Raises:
            Degenerate: The ordinary run at the start lost all its particles.
        """
        _check_key(key)
        check_count("steer", "num_samples", num_samples)
        start_key, key = jax.random.split(key)
        if initial is None:
            start, initial = _start_chain(self, start_key)
            if _jax.is_concrete(start.log_evidence):
                self._require_alive(start)
        return _continue_chain(self, key, initial, num_samples)

    def _require_alive(self, out: Steered) -> None:
        step = int(np.max(out.failed_at))
        if step < 0:
            return
        invalid = int(np.max(out.num_invalid))
        because = (
            "no sequence ended within max_steps, and unfinished ones are discarded"
            if step > self.max_steps
            else "the potential of the initial state is zero"
            if step == 0
            else f"no prefix of {step} tokens has a positive potential"
        )
        nan = f" ({invalid} potentials or log probabilities were NaN or +inf)" if invalid else ""
        raise Degenerate(
            f"ab.steer, step {min(step, self.max_steps)} of {self.max_steps}: all "
            f"{self.num_particles} particles have log weight -inf: {because}{nan}. Raise "
            f"num_particles (or max_steps), let next= propose tokens that the potential allows, or "
            f"see ab.check_potential."
        )

    def _warn(self, out: Steered) -> None:
        unfinished, invalid = int(out.num_unfinished), int(out.num_invalid)
        if unfinished and self.unfinished == "keep":
            warn([
                f"ab.steer: {unfinished} of {self.num_particles} sequences have not ended after "
                f"max_steps={self.max_steps} tokens; they carry the weight of their prefix. Raise "
                f'max_steps, or leave them out with unfinished="discard".'
            ])  # fmt: skip
        if invalid:
            warn([
                f"ab.steer: {invalid} potentials or log probabilities were NaN or +inf and count "
                f"as weight zero. Look for invalid operations in `potential` and `next`."
            ])  # fmt: skip


@eqx.filter_jit
def _run(program: steer, key: Any) -> Steered:
    return sweep(program, key)[0]


@eqx.filter_jit
def _start_chain(program: steer, key: Any) -> tuple[Steered, SequencePath]:
    key, choice = jax.random.split(key)
    out, history = sweep(program, key, record=True)
    return out, draw_path(out, history, choice)


@eqx.filter_jit
def _continue_chain(
    program: steer, key: Any, path: SequencePath, num_samples: int
) -> SequenceChain:
    def turn(path, key):
        key, choice = jax.random.split(key)
        out, history = sweep(program, key, path, record=True)
        new = draw_path(out, history, choice)
        moved = jnp.any(new.steps.token != path.steps.token)
        last = jax.tree.map(lambda x: x[-1], new.steps.particles)
        return new, (new.steps.token, last, out.log_evidence, moved)

    path, (tokens, last, log_evidence, moved) = jax.lax.scan(
        turn, path, jax.random.split(key, num_samples)
    )
    return SequenceChain(
        states=last.state, tokens=tokens, lengths=last.length, done=last.done,
        log_evidence=log_evidence, moved=moved, path=path,
    )  # fmt: skip


def _as_schedule(schedule: Any) -> int | tuple[int, ...] | None:
    if schedule is None:
        return None
    if isinstance(schedule, (int, np.integer)) and not isinstance(schedule, bool) and schedule > 0:
        return int(schedule)
    if isinstance(schedule, (Collection, np.ndarray)) and not isinstance(schedule, str):
        whole = [isinstance(t, (int, np.integer)) and not isinstance(t, bool) for t in schedule]
        if all(whole):
            return tuple(int(t) for t in schedule)
    raise InvalidAlgorithm(
        f"ab.steer: schedule is a positive int k (resample after every k tokens), or a collection "
        f"of numbers of tokens, got {schedule!r}."
    )


def _check_key(key: Any) -> None:
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise MissingKey(
            f"ab.steer needs a random key, got {type(key).__name__}. Write "
            f"program.run(jax.random.key(0))."
        )
