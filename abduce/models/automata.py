"""Weighted automata over tokens, and what can be computed exactly about sequences they accept.

An automaton reads a sequence token by token; the state it ends in has a log weight. Conditions such
as "contains this word", "the values sum to 12" and their conjunctions are automata. With an n-gram
model, the weight of all completions of a prefix is a dynamic programme over (context, automaton
state): it is the evidence, the ideal look-ahead, and the exact posterior at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidValue

__all__ = ["Automaton", "Completion", "enumerate_sequences"]


class Automaton(eqx.Module):
    """A deterministic automaton with a log weight for each state to end in.

    The start state is 0. The end token of a model is not read.

    Args:
        transitions: `transitions[s, v]` is the state after token `v` in state `s`; ints, shape
            `(S, V)`.
        final: Log weight of ending in each state, shape `(S,)`; -inf rejects.

    Example:
        >>> word = Automaton.contains([2, 1], num_tokens=3) & Automaton.total([0, 1, 2], 5)
        >>> word.weight([2, 1, 2])
        0.0
    """

    transitions: Any
    final: Any
    alive: Any

    def __init__(self, transitions: Any, final: Any):
        table = np.asarray(transitions)
        weights = np.asarray(final, float)
        if table.ndim != 2 or not np.issubdtype(table.dtype, np.integer):
            raise InvalidValue(
                f"Automaton: transitions are ints of shape (states, tokens), got {table.dtype} of "
                f"shape {table.shape}."
            )
        if weights.shape != table.shape[:1]:
            raise InvalidValue(
                f"Automaton: final has a log weight for each of the {len(table)} states, got shape "
                f"{weights.shape}."
            )
        if table.size and (table.min() < 0 or table.max() >= len(table)):
            raise InvalidValue(
                f"Automaton: transitions lead to states 0 to {len(table) - 1}, got "
                f"{table.min()} to {table.max()}."
            )
        alive = weights > -np.inf
        while True:  # states from which an accepting one can be reached
            more = alive | alive[table].any(1)
            if (more == alive).all():
                break
            alive = more
        self.transitions = jnp.asarray(table, jnp.int32)
        self.final = jnp.asarray(weights, jnp.result_type(float))
        self.alive = jnp.asarray(alive)

    @classmethod
    def contains(cls, word: Sequence[int], num_tokens: int) -> Automaton:
        """Accepts what contains `word` (consecutive tokens)."""
        table = _search_table(word, num_tokens)
        table[-1] = len(word)  # found is found
        return cls(table, np.where(np.arange(len(table)) == len(word), 0.0, -np.inf))

    @classmethod
    def avoids(cls, word: Sequence[int], num_tokens: int) -> Automaton:
        """Accepts what does not contain `word`."""
        found = cls.contains(word, num_tokens)
        return cls(np.asarray(found.transitions), np.where(np.isfinite(found.final), -np.inf, 0.0))

    @classmethod
    def total(cls, values: Sequence[int], final: Any) -> Automaton:
        """Weighs the sum of the tokens' values.

        Args:
            values: A non-negative int for each token.
            final: The sum to accept (an int), or the log weight of each sum 0, 1, ...
        """
        v = np.asarray(values)
        if v.ndim != 1 or not np.issubdtype(v.dtype, np.integer) or (v < 0).any():
            raise InvalidValue(
                f"Automaton.total: values are non-negative ints, one for each token, got {values!r}"
            )
        if np.ndim(final) == 0:
            final = np.where(np.arange(int(final) + 1) == int(final), 0.0, -np.inf)
        over = len(final)
        table = np.minimum(np.arange(over + 1)[:, None] + v, over)
        return cls(table, np.append(np.asarray(final, float), -np.inf))

    def __and__(self, other: Automaton) -> Automaton:
        """Both: the weights multiply."""
        a, b = np.asarray(self.transitions), np.asarray(other.transitions)
        if a.shape[1] != b.shape[1]:
            raise InvalidValue(
                f"Automaton: two automata over {a.shape[1]} and {b.shape[1]} tokens have no "
                f"conjunction."
            )
        table = (a[:, None] * len(b) + b[None]).reshape(-1, a.shape[1])
        final = np.add.outer(np.asarray(self.final), np.asarray(other.final))
        return Automaton(table, final.ravel())

    @property
    def num_states(self) -> int:
        """S."""
        return self.transitions.shape[0]

    def advance(self, state: Any, token: Any) -> Any:
        """The state after a token."""
        return self.transitions[state, token]

    def log_weight(self, state: Any, done: Any) -> Any:
        """Its log weight at the end; before it, 0, or -inf where no accepting state is in reach."""
        return jnp.where(done, self.final[state], jnp.where(self.alive[state], 0.0, -jnp.inf))

    def weight(self, tokens: Sequence[int]) -> float:
        """Log weight of a whole sequence, without its end token."""
        state, table = 0, np.asarray(self.transitions)
        for token in tokens:
            state = int(table[state, token])
        return float(self.final[state])


def _search_table(word: Sequence[int], num_tokens: int) -> np.ndarray:
    """State k: the last k tokens are the first k of the word (Knuth, Morris and Pratt)."""
    word = [int(x) for x in word]
    if not word or not all(0 <= x < num_tokens for x in word):
        raise InvalidValue(
            f"Automaton: a word is a non-empty list of tokens from 0 to {num_tokens - 1}, got "
            f"{word!r}."
        )
    table = np.zeros((len(word) + 1, num_tokens), int)
    for k in range(len(word) + 1):
        for token in range(num_tokens):
            seen = [*word[:k], token]
            table[k, token] = next(
                j for j in range(min(len(word), k + 1), -1, -1) if seen[len(seen) - j :] == word[:j]
            )
    return table


class Completion(eqx.Module):
    """The weight of all completions of every prefix, for an n-gram model and an automaton.

    `log_values[t, c, s]` is the log of the expected final weight, given that after t tokens the
    context is c and the automaton in state s; by backward recursion in float64. At the start it is
    the log evidence. It costs `O(max_steps * V**order * S)`.

    Args:
        model: An `NGram`.
        automaton: Over the same tokens.
        max_steps: Tokens at most, the end token included; without an end token, exactly.
        unfinished: `"discard"` gives sequences that have not ended weight zero, `"keep"` that of
            their prefix.
    """

    model: Any
    automaton: Automaton
    log_values: Any
    max_steps: int = eqx.field(static=True)

    def __init__(
        self, model: Any, automaton: Automaton, max_steps: int, unfinished: str = "discard"
    ):
        log_probs = np.asarray(model.log_probs, float)
        contexts, size = log_probs.shape
        to_context = (np.arange(contexts)[:, None] * size + np.arange(size)) % contexts
        final, table = np.asarray(automaton.final, float), np.asarray(automaton.transitions)
        end = model.end_token
        prefix = np.where(np.asarray(automaton.alive), 0.0, -np.inf)
        last = final if end is None else prefix if unfinished == "keep" else -np.inf
        values = [np.broadcast_to(last, (contexts, len(final)))]
        for _ in range(max_steps):
            after = values[-1][to_context[:, :, None], table.T[None]]  # (context, token, state)
            if end is not None:
                after[:, end] = final
            values.append(np.logaddexp.reduce(log_probs[:, :, None] + after, 1))
        self.model, self.automaton, self.max_steps = model, automaton, max_steps
        self.log_values = jnp.asarray(np.stack(values[::-1]), jnp.result_type(float))

    @property
    def log_evidence(self) -> Any:
        """Log of the total weight of all sequences, in nats."""
        return self.log_values[0, self.model.initial(), 0]

    def log_value(self, step: Any, context: Any, state: Any) -> Any:
        """Log expected final weight after `step` tokens."""
        return self.log_values[step, context, state]


def enumerate_sequences(
    model: Any, automaton: Automaton, max_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every sequence of positive weight and its log weight, for any sequence model.

    Goes through the tree of prefixes that the automaton still allows: small cases only.

    Args:
        model: A sequence model.
        automaton: Over the same tokens.
        max_steps: Tokens at most, the end token included; without an end token, exactly.

    Returns:
        Tokens `(M, max_steps)`, padded with the end token, and `log p + log weight` `(M,)`. Their
        logsumexp is the log evidence.
    """
    end, size = model.end_token, model.num_tokens
    log_probs = jax.jit(jax.vmap(lambda s: jax.nn.log_softmax(model.logits(s))))
    advance = jax.jit(jax.vmap(model.advance))
    alive, final = np.asarray(automaton.alive), np.asarray(automaton.final, float)
    table = np.asarray(automaton.transitions)
    state = jax.tree.map(lambda x: jnp.asarray(x)[None], model.initial())
    prefix, score, place = np.zeros((1, 0), int), np.zeros(1), np.zeros(1, int)
    found, weights = [], []

    def keep(tokens, log_weight):
        ok = log_weight > -np.inf
        padding = ((0, 0), (0, max_steps - tokens.shape[1]))
        found.append(np.pad(tokens[ok], padding, constant_values=0 if end is None else end))
        weights.append(log_weight[ok])

    for t in range(max_steps):
        step = np.asarray(log_probs(state), float)
        if end is not None:
            ended = np.column_stack([prefix, np.full(len(prefix), end)])
            keep(ended, score + step[:, end] + final[place])
        row, token = np.divmod(np.arange(len(prefix) * size), size)
        there = table[place[row], token]
        go = alive[there] & (token != (-1 if end is None else end))
        row, token, place = row[go], token[go], there[go]
        score = score[row] + step[row, token]
        prefix = np.column_stack([prefix[row], token])
        if end is None and t == max_steps - 1:
            keep(prefix, score + final[place])
        elif t < max_steps - 1:
            state = advance(jax.tree.map(lambda x, row=row: x[row], state), jnp.asarray(token))
    return np.concatenate(found), np.concatenate(weights)
