"""What steering returns: a weighted population of sequences, or a chain of them."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["SequenceChain", "SequencePath", "Steered"]


class Steered(eqx.Module):
    """A weighted population of sequences: N particles, at most T tokens each.

    Attributes:
        states: The user's states at the end, leading axis N.
        tokens: Shape `(N, T)`; after its end a sequence is padded (with the end token, or -1).
        lengths: Tokens of each sequence, the end token included, shape `(N,)`.
        done: Whether a sequence has ended, shape `(N,)`.
        log_weights: Shape `(N,)`, nats; the mean of `exp(log_weights)` is the evidence estimate,
            and that of `exp(log_weights) f(tokens)` is an unbiased estimate of the sum of `gamma f`
            over all sequences.
        log_evidence: Log of an unbiased estimate of Z, in nats; -inf if no weight is left.
        ancestors: Shape `(T, N)`: row t has the place of each particle's parent before token t + 1.
        resampled: Whether there was a resampling before each token, shape `(T,)`.
        ess: Effective sample size after each token, shape `(T,)`.
        num_alive: Particles of positive weight after each token, shape `(T,)`.
        num_unfinished: Sequences of positive weight that had not ended after T tokens.
        num_invalid: Potentials or log probabilities that were NaN or +inf.
        failed_at: Tokens after which no weight was left; -1 for none, 0 the initial state, T + 1
            where only unfinished sequences were left and those are discarded.
    """

    states: Any
    tokens: Any
    lengths: Any
    done: Any
    log_weights: Any
    log_evidence: Any
    ancestors: Any
    resampled: Any
    ess: Any
    num_alive: Any
    num_unfinished: Any
    num_invalid: Any
    failed_at: Any

    @property
    def probabilities(self) -> Any:
        """Normalized weights, shape `(N,)`; all zero if no weight is left."""
        peak = jnp.max(self.log_weights)
        w = jnp.exp(self.log_weights - jnp.where(jnp.isfinite(peak), peak, 0.0))
        return w / jnp.maximum(jnp.sum(w), jnp.finfo(w.dtype).tiny)

    def sample(self, key: Any, num_samples: int) -> Any:
        """Tokens of sequences drawn by weight, shape `(num_samples, T)`."""
        chosen = jax.random.categorical(key, self.log_weights, shape=(num_samples,))
        return self.tokens[chosen]

    def distribution(self) -> dict[tuple[Any, ...], float]:
        """The distinct sequences of positive weight and their probabilities, largest first."""
        total: dict[tuple[Any, ...], float] = {}
        tokens, lengths = np.asarray(self.tokens), np.asarray(self.lengths)
        for row, n, w in zip(tokens, lengths, np.asarray(self.probabilities), strict=True):
            if w > 0:
                key = tuple(row[:n].tolist())
                total[key] = total.get(key, 0.0) + float(w)
        return dict(sorted(total.items(), key=lambda item: -item[1]))


class SequencePath(eqx.Module):
    """One sequence with everything its steps left behind, so that a run can retain it.

    Attributes:
        first: The particle before the first token.
        steps: The particle, token and incremental log weight of each step, leading axis T.
        log_weight: In the run it comes from, nats.
    """

    first: Any
    steps: Any
    log_weight: Any

    @property
    def tokens(self) -> Any:
        """Shape `(T,)`."""
        return self.steps.token


class SequenceChain(eqx.Module):
    """A particle Gibbs chain of S sequences.

    Attributes:
        states: The user's states at the end, leading axis S.
        tokens: Shape `(S, T)`, padded after the end.
        lengths: Shape `(S,)`.
        done: Whether each has ended, shape `(S,)`.
        log_evidence: Of each conditional run, shape `(S,)`; these are not unbiased.
        moved: Whether the sequence differs from the one before it, shape `(S,)`.
        path: The last sequence, to continue the chain from (`initial=`).
    """

    states: Any
    tokens: Any
    lengths: Any
    done: Any
    log_evidence: Any
    moved: Any
    path: SequencePath
