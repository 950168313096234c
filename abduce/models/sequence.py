"""Sequence models and conditions on sequences: what `ab.steer` steers.

A sequence model gives the logits of the next token from a state; `next` draws from it, in the form
that `ab.steer` takes. `Constrained` puts a model and an automaton together: sampler, potential and
look-ahead. Models here are small enough for exact answers, from which samplers can be judged.

Example:
    >>> model = NGram.fit(encode(["banana", "cab"], "abcn"), order=2, num_tokens=5)
    >>> task = Constrained(model, Automaton.contains(encode(["nan"], "abcn")[0, :3], 5))
    >>> program = ab.steer(task.initial(), task.next, task.potential, end_token=0, max_steps=8)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import abduce.dist as dist
from abduce.errors import InvalidModel, InvalidValue
from abduce.models.automata import Automaton, Completion, enumerate_sequences
from abduce.ppl.language import factor, sample
from abduce.ppl.model import model

__all__ = [
    "Automaton",
    "CharacterModel",
    "Completion",
    "Constrained",
    "NGram",
    "SequenceModel",
    "constrained_sequence",
    "decode",
    "encode",
    "enumerate_sequences",
    "nonsense_words",
    "reward",
]


class SequenceModel(eqx.Module):
    """Base of models with a distribution of the next token given a state.

    A model defines `initial()`, `logits(state)` and `advance(state, token)`.

    Attributes:
        num_tokens: V, the end token included.
        end_token: Ends a sequence; None where all have the same length.
    """

    num_tokens: eqx.AbstractVar[int]
    end_token: eqx.AbstractVar[int | None]

    def initial(self) -> Any:
        """The state before the first token."""
        raise NotImplementedError

    def logits(self, state: Any) -> Any:
        """Of the next token, shape `(V,)`; normalized or not."""
        raise NotImplementedError

    def advance(self, state: Any, token: Any) -> Any:
        """The state after a token."""
        raise NotImplementedError

    def next(self, key: Any, state: Any) -> tuple[Any, Any, Any, Any]:
        """Draws a token from the model: the `next` of `ab.steer`."""
        log_probs = jax.nn.log_softmax(self.logits(state))
        token = jax.random.categorical(key, log_probs).astype(jnp.int32)
        return self.advance(state, token), token, log_probs[token], log_probs[token]

    def log_prob(self, tokens: Any) -> Any:
        """Log probability of one sequence, shape `(T,)`; tokens after its end do not count."""

        def step(carry, token):
            state, ended = carry
            log_prob = jax.nn.log_softmax(self.logits(state))[token]
            total = jnp.where(ended, 0.0, log_prob)
            if self.end_token is not None:
                ended |= token == self.end_token
            return (self.advance(state, token), ended), total

        start = (self.initial(), jnp.zeros((), bool))
        return jnp.sum(jax.lax.scan(step, start, jnp.asarray(tokens))[1])


class NGram(SequenceModel):
    """The next token depends on the last `order - 1` tokens.

    The state is the context, as one integer in base V; before the first token it is made of end
    tokens (of zeros where there is none).

    Args:
        log_probs: Shape `(V**(order - 1), V)`; rows are normalized.
        end_token: Ends a sequence; None for sequences of fixed length.
    """

    log_probs: Any
    num_tokens: int = eqx.field(static=True)
    end_token: int | None = eqx.field(static=True)

    def __init__(self, log_probs: Any, end_token: int | None = 0):
        self.log_probs = jax.nn.log_softmax(jnp.asarray(log_probs, jnp.result_type(float)))
        contexts, self.num_tokens = self.log_probs.shape
        self.end_token = end_token
        size = 1
        while size < contexts:
            size *= self.num_tokens
        if size != contexts:
            raise InvalidValue(
                f"NGram: log_probs has a row for each context, V**(order - 1) of them; got "
                f"{contexts} rows for V = {self.num_tokens}."
            )

    @classmethod
    def fit(
        cls, sequences: Any, order: int, num_tokens: int, *, end_token: int = 0,
        smoothing: float = 0.1,
    ) -> NGram:  # fmt: skip
        """Counts n-grams.

        Args:
            sequences: Tokens `(num_sequences, T)`, padded with the end token.
            order: n.
            num_tokens: V.
            end_token: Ends a sequence.
            smoothing: Added to every count.
        """
        contexts = num_tokens ** (order - 1)
        counts = np.full((contexts, num_tokens), float(smoothing))
        start = _start_context(num_tokens, contexts, end_token)
        for row in np.asarray(sequences):
            context = start
            for token in row.tolist():
                counts[context, token] += 1
                context = (context * num_tokens + token) % contexts
                if token == end_token:
                    break
        with np.errstate(divide="ignore"):
            return cls(np.log(counts), end_token)

    def initial(self) -> Any:
        start = _start_context(self.num_tokens, len(self.log_probs), self.end_token or 0)
        return jnp.asarray(start, jnp.int32)

    def logits(self, state: Any) -> Any:
        return self.log_probs[state]

    def advance(self, state: Any, token: Any) -> Any:
        return ((state * self.num_tokens + token) % len(self.log_probs)).astype(jnp.int32)


def _start_context(num_tokens: int, contexts: int, fill: int) -> int:
    context = 0
    for _ in range(contexts):  # more turns than digits change nothing
        context = (context * num_tokens + fill) % contexts
    return context


class CharacterModel(SequenceModel):
    """A gated recurrent unit over characters, small enough to train in seconds.

    The state is the hidden vector, after the end token at the start.
    """

    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear
    num_tokens: int = eqx.field(static=True)
    end_token: int | None = eqx.field(static=True)

    def __init__(self, key: Any, num_tokens: int, *, hidden: int = 24, end_token: int = 0):
        first, second = jax.random.split(key)
        self.cell = eqx.nn.GRUCell(num_tokens, hidden, key=first)
        self.head = eqx.nn.Linear(hidden, num_tokens, key=second)
        self.num_tokens, self.end_token = num_tokens, end_token

    @classmethod
    def fit(
        cls, key: Any, sequences: Any, num_tokens: int, *, hidden: int = 24, end_token: int = 0,
        num_steps: int = 200, learning_rate: float = 0.02,
    ) -> CharacterModel:  # fmt: skip
        """Maximizes the mean log probability of the sequences by Adam on all of them at once.

        Args:
            key: Random key of the initial weights.
            sequences: Tokens `(num_sequences, T)`, padded with the end token.
            num_tokens: V.
            hidden: Length of the hidden vector.
            end_token: Ends a sequence.
            num_steps: Gradient steps.
            learning_rate: Of Adam.
        """
        start = cls(key, num_tokens, hidden=hidden, end_token=end_token)
        arrays, rest = eqx.partition(start, eqx.is_inexact_array)
        optimizer = optax.adam(learning_rate)
        rows, counts = np.unique(np.asarray(sequences), axis=0, return_counts=True)
        weights = jnp.asarray(counts / counts.sum(), jnp.result_type(float))

        def loss(arrays, rows, weights):
            return -jnp.vdot(weights, jax.vmap(eqx.combine(arrays, rest).log_prob)(rows))

        @jax.jit
        def train(arrays, rows, weights):
            def step(carry, _):
                arrays, state = carry
                updates, state = optimizer.update(jax.grad(loss)(arrays, rows, weights), state)
                return (optax.apply_updates(arrays, updates), state), None

            carry = (arrays, optimizer.init(arrays))
            return jax.lax.scan(step, carry, None, length=num_steps)[0][0]

        return eqx.combine(train(arrays, jnp.asarray(rows, jnp.int32), weights), rest)

    def initial(self) -> Any:
        zeros = jnp.zeros(self.cell.hidden_size, self.head.weight.dtype)
        return self.advance(zeros, jnp.asarray(self.end_token or 0))

    def logits(self, state: Any) -> Any:
        return self.head(state)

    def advance(self, state: Any, token: Any) -> Any:
        return self.cell(jax.nn.one_hot(token, self.num_tokens, dtype=state.dtype), state)


class _State(eqx.Module):
    model: Any
    automaton: Any
    context: Any
    step: Any


class Constrained(eqx.Module):
    """A sequence model under a condition: sampler, potential and look-ahead for `ab.steer`.

    The target is `p(x) w(x)`, with w the automaton's weight. A prefix has potential 1 where an
    accepting state can still be reached, else 0.

    Args:
        model: A sequence model.
        automaton: Over the same tokens; the end token is not read.
        proposal: What tokens are drawn from: `"model"`, p; `"masked"`, p without the tokens after
            which nothing can be accepted; `"completion"`, p times the weight of the completions.
        completion: A `Completion` of the automaton and an n-gram model, which may be a rough
            replacement of `model`. Where it is the same model, the proposal `"completion"` draws
            from the exact posterior.

    Raises:
        InvalidModel: Numbers of tokens differ, or a completion is needed and absent.
    """

    model: Any
    automaton: Automaton
    completion: Completion | None
    proposal: str = eqx.field(static=True)

    def __init__(
        self, model: Any, automaton: Automaton,
        proposal: Literal["model", "masked", "completion"] = "model",
        completion: Completion | None = None,
    ):  # fmt: skip
        if automaton.transitions.shape[1] != model.num_tokens:
            raise InvalidModel(
                f"Constrained: the model has {model.num_tokens} tokens, the automaton "
                f"{automaton.transitions.shape[1]}."
            )
        if proposal not in ("model", "masked", "completion"):
            raise InvalidModel(
                f"Constrained: proposal is 'model', 'masked' or 'completion', got {proposal!r}."
            )
        if proposal == "completion" and completion is None:
            raise InvalidModel("Constrained: proposal='completion' needs completion=Completion(..)")
        self.model, self.automaton = model, automaton
        self.proposal, self.completion = proposal, completion

    def initial(self) -> _State:
        """The state before the first token."""
        zero = jnp.zeros((), jnp.int32)
        context = zero if self.completion is None else self.completion.model.initial()
        return _State(self.model.initial(), zero, context, zero)

    def advance(self, state: _State, token: Any) -> _State:
        """The state after a token; the automaton does not read the end token."""
        place = self.automaton.advance(state.automaton, token)
        if self.model.end_token is not None:
            place = jnp.where(token == self.model.end_token, state.automaton, place)
        context = state.context
        if self.completion is not None:
            context = self.completion.model.advance(context, token)
        return _State(self.model.advance(state.model, token), place, context, state.step + 1)

    def next(self, key: Any, state: _State) -> tuple[_State, Any, Any, Any]:
        """Draws a token from the proposal."""
        log_p = jax.nn.log_softmax(self.model.logits(state.model))
        log_q = log_p
        if self.proposal != "model":
            tilt = self._tilt(state)
            possible = jnp.any((log_p > -jnp.inf) & (tilt > -jnp.inf))  # else as the model would
            log_q = jax.nn.log_softmax(log_p + jnp.where(possible, tilt, 0.0))
        token = jax.random.categorical(key, log_q).astype(jnp.int32)
        return self.advance(state, token), token, log_q[token], log_p[token]

    def _tilt(self, state: _State) -> Any:
        """Log weight of what each token leads to, shape `(V,)`."""
        tokens = jnp.arange(self.model.num_tokens)
        end = self.model.end_token
        places = self.automaton.transitions[state.automaton]
        if self.proposal == "masked":
            tilt = self.automaton.log_weight(places, False)
            tilt = jnp.where(tilt > -jnp.inf, 0.0, tilt)
        else:
            assert self.completion is not None
            contexts = self.completion.model.advance(state.context, tokens)
            tilt = self.completion.log_value(state.step + 1, contexts, places)
        if end is None:
            return tilt
        final = self.automaton.final[state.automaton]
        if self.proposal == "masked":
            final = jnp.where(final > -jnp.inf, 0.0, final)
        return jnp.where(tokens == end, final, tilt)

    def potential(self, state: _State, done: Any) -> Any:
        """Log weight of the automaton."""
        return self.automaton.log_weight(state.automaton, done)

    def lookahead(self, state: _State, done: Any) -> Any:
        """Log weight of the completions, relative to the potential (needs `completion=`)."""
        if self.completion is None:
            raise InvalidModel("Constrained: the look-ahead needs completion=Completion(...).")
        value = self.completion.log_value(state.step, state.context, state.automaton)
        return jnp.where(done, 0.0, value)


@model
def constrained_sequence(task, max_steps):
    """A constrained sequence as a model of the language, for any algorithm.

    One `lax.scan` of tokens with a factor a step, so that sequential Monte Carlo resamples at the
    tokens. After the end token all tokens are end tokens, with probability 1. The model must have
    one; prefixes that have not ended after `max_steps` keep their weight.

    Args:
        task: A `Constrained`; only its model and potential are used.
        max_steps: How many tokens (an int).

    Returns:
        The tokens, shape `(max_steps,)`.

    Sites: `token` `(max_steps,)`, and the factor `steering`.
    """
    end = task.model.end_token

    def step(carry, _):
        state, done, log_psi = carry
        log_p = jax.nn.log_softmax(task.model.logits(state.model))
        stay = jnp.where(jnp.arange(task.model.num_tokens) == end, 0.0, -jnp.inf)
        token = sample("token", dist.Categorical(logits=jnp.where(done, stay, log_p)))
        new = task.advance(state, token)
        new = jax.tree.map(lambda a, b: jnp.where(done, a, b), state, new)
        ended = done | (token == end)
        after = jnp.where(done, log_psi, task.potential(new, ended))
        before = jnp.where(log_psi > -jnp.inf, log_psi, 0.0)  # a lost prefix stays lost
        factor("steering", jnp.where(done, 0.0, after - before))
        return (new, ended, after), token

    start = task.initial()
    log_psi = task.potential(start, jnp.zeros((), bool))
    carry = (start, jnp.zeros((), bool), jnp.asarray(log_psi, jnp.result_type(float)))
    return jax.lax.scan(step, carry, None, length=max_steps)[1]


def reward(
    score: Callable[..., Any], scale: Literal["log", "logit", "raw"] = "log",
    temperature: float = 1.0,
) -> Callable[..., Any]:  # fmt: skip
    """A potential from the score of a reward model.

    Args:
        score: `score(state, done)`: the probability of success, in [0, 1] (`"raw"`: any number).
        scale: `"log"`: the target is the model given success, `p(x) r(x)`. `"logit"`: weights are
            the softmax of logits, the scale of particle-based inference-time scaling (Puri et al.
            2025), with the target `p(x) r(x) / (1 - r(x))`. `"raw"`: the score in nats.
        temperature: Divides the log potential.

    Example:
        >>> potential = reward(lambda state, done: jax.nn.sigmoid(judge(state)))
    """
    forms: dict[str, Callable[[Any], Any]] = {
        "log": jnp.log,
        "logit": lambda r: jnp.log(r) - jnp.log1p(-r),
        "raw": lambda r: r,
    }
    if scale not in forms:
        raise InvalidValue(f"reward: scale is one of {', '.join(forms)}, got {scale!r}.")
    form = forms[scale]
    return lambda state, done: form(score(state, done)) / temperature


def encode(words: Sequence[str], alphabet: str, max_steps: int | None = None) -> np.ndarray:
    """Words as tokens: character i of the alphabet is token i + 1; 0 ends and pads.

    Args:
        words: Any strings over the alphabet.
        alphabet: Distinct characters.
        max_steps: Width; default, the longest word and its end token.
    """
    width = max_steps or 1 + max((len(w) for w in words), default=0)
    out = np.zeros((len(words), width), np.int32)
    for row, word in zip(out, words, strict=True):
        unknown = sorted(set(word) - set(alphabet))
        if unknown or len(word) > width:
            why = f"has {unknown[0]!r}, not in the alphabet" if unknown else "is too long"
            raise InvalidValue(f"encode: {word!r} {why} (alphabet {alphabet!r}, width {width}).")
        row[: len(word)] = [alphabet.index(c) + 1 for c in word]
    return out


def decode(tokens: Any, alphabet: str) -> str:
    """One sequence of tokens as a word, up to its end token."""
    word = ""
    for token in np.asarray(tokens).tolist():
        if token <= 0:
            break
        word += alphabet[token - 1]
    return word


def nonsense_words(
    seed: int, num_words: int, consonants: str = "bnst", vowels: str = "aio", *, max_syllables=3
) -> list[str]:
    """Words in which some letters prefer others, to train small models on.

    A syllable is a consonant and a vowel; the vowel is the one before it with probability 0.6, and
    one word in four ends with the last consonant.

    Args:
        seed: Of the generator.
        num_words: How many.
        consonants, vowels: The letters.
        max_syllables: Words have 1 to this many.

    Returns:
        The words.
    """
    rng = np.random.default_rng(seed)
    words = []
    for _ in range(num_words):
        word = ""
        for _ in range(rng.integers(1, max_syllables + 1)):
            repeat = bool(word) and rng.random() < 0.6
            vowel = word[-1] if repeat else vowels[rng.integers(len(vowels))]
            word += consonants[rng.integers(len(consonants))] + vowel
        words.append(word + consonants[-1] if rng.random() < 0.25 else word)
    return words
