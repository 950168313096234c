"""Steered sequence samplers against best-of-N and beam search, at the same number of model calls.

Two models of made-up words: a bigram of words of up to 13 letters, for which a dynamic programme
gives the exact posterior, and a small gated recurrent unit, trained here on words of up to 7
letters, for which enumeration does. The condition: the word contains "na", and its letters
(consonants 1, vowels 2) have a given sum. Compared is the law of the first two letters.

    python -m benchmarks.sequence
"""

import argparse
import dataclasses
from typing import Any

import numpy as np

from benchmarks.measure import markdown_table, write_results

LETTERS = "bnstaio"
SIZE = 1 + len(LETTERS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sequence", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--particles", type=int, nargs="+", default=[16, 128, 1024])
    parser.add_argument("--runs", type=int, default=100, help="independent runs of each method")
    parser.add_argument("--name", default="sequence", help="stem of the result files")
    options = parser.parse_args()

    records, notes = [], []
    for case in (_bigram(), _recurrent()):
        notes.append(case.note)
        for n in options.particles:
            for method, run in _methods(case, n):
                runs = 1 if method == "beam search" else options.runs
                found = {"model": case.name, "method": method, "particles": n}
                records.append(found | case.judge(run, runs))
                print(records[-1], flush=True)
    header = ["model", "method", *(f"TV, N = {n}" for n in options.particles), "slope",
              "no word found", "Z / exact", "standard error"]  # fmt: skip
    rows = []
    for key in dict.fromkeys((r["model"], r["method"]) for r in records):
        own = [r for r in records if (r["model"], r["method"]) == key]
        tv = [r["tv"] for r in own]
        slope = float(np.polyfit(np.log(options.particles), np.log(tv), 1)[0])
        rows.append([*key, *tv, slope if len(tv) > 1 else None, f"{own[0]['failed']:.0%}",
                     own[0]["ratio"], own[0]["ratio_se"]])  # fmt: skip
    body = (
        'Words that contain "na" and whose letters have a given sum; the law of their first two '
        "letters. Every method grows N sequences, one model call a token. TV: total variation "
        f"between the weighted result and the exact law, mean over {options.runs} runs (1 where no "
        "word was found); slope: of log TV against log N. The last three columns are at "
        f"N = {options.particles[0]}: runs without a word, the mean of the evidence estimates over "
        "the exact value, and its standard error. Best of N draws from the model and keeps what is "
        "wanted; beam search keeps the N likeliest prefixes that can still be completed, weighed "
        "by their probability (where N exceeds the number of likely words, that is an "
        "enumeration). SMC is `ab.steer`: tokens from the model; from the model without what leads "
        "nowhere, with a look-ahead; and guided by completions. Look-ahead and completions come "
        "from a bigram, also for the recurrent model.\n\n"
        + "\n".join(f"- {x}" for x in notes)
        + "\n\n"
        + markdown_table(header, rows)
    )
    write_results(options.name, "Steering sequence samplers", body, {"results": records})


@dataclasses.dataclass
class _Case:
    """A model, a condition, the exact law of the first two letters."""

    name: str
    model: Any
    bigram: Any
    condition: Any
    steps: int
    law: np.ndarray
    log_z: float
    note: str

    def judge(self, run, num_runs: int) -> dict[str, float | None]:
        tokens, log_weights, log_evidence = run(num_runs)
        distances = []
        for x, w in zip(tokens, log_weights, strict=True):
            alive = w > -np.inf
            if not alive.any():
                distances.append(1.0)
                continue
            p = np.exp(w[alive] - w[alive].max())
            law = np.bincount(_first_two(x[alive]), p / p.sum(), minlength=SIZE**2)
            distances.append(0.5 * np.abs(law - self.law).sum())
        ratio = None if log_evidence is None else np.exp(log_evidence - self.log_z)
        return {
            "tv": float(np.mean(distances)),
            "tv_se": float(np.std(distances) / np.sqrt(num_runs)),
            "failed": float(np.mean([not (w > -np.inf).any() for w in log_weights])),
            "ratio": None if ratio is None else float(ratio.mean()),
            "ratio_se": None if ratio is None else float(ratio.std() / np.sqrt(num_runs)),
        }


def _first_two(tokens: np.ndarray) -> np.ndarray:
    return tokens[:, 0].astype(int) * SIZE + tokens[:, 1]


def _condition(total: int) -> Any:
    from abduce.models.sequence import Automaton, encode

    values = [0, *(1 if c in "bnst" else 2 for c in LETTERS)]
    return Automaton.contains(encode(["na"], LETTERS)[0, :2], SIZE) & Automaton.total(values, total)


def _bigram() -> _Case:
    from abduce.models.sequence import Completion, NGram, encode, nonsense_words

    model = NGram.fit(encode(nonsense_words(0, 3000, max_syllables=6), LETTERS), 2, SIZE)
    condition, steps = _condition(16), 14
    completion = Completion(model, condition, steps)
    log_p, table = np.asarray(model.log_probs, float), np.asarray(condition.transitions)
    letters = np.arange(SIZE)
    place = table[table[0]]  # after two letters
    value = np.asarray(completion.log_values, float)[2][letters[None], place]
    joint = log_p[0][:, None] + log_p + value
    joint[0], joint[:, 0] = -np.inf, -np.inf  # no word ends here
    log_z = float(completion.log_evidence)
    law = np.exp(joint - log_z).ravel()
    note = f"bigram: sum 16, Z = {np.exp(log_z):.2e}; the exact law adds up to {law.sum():.6f}."
    return _Case("bigram", model, model, condition, steps, law, log_z, note)


def _recurrent() -> _Case:
    import jax

    from abduce.models.sequence import (
        CharacterModel,
        NGram,
        encode,
        enumerate_sequences,
        nonsense_words,
    )  # fmt: skip

    tokens = encode(nonsense_words(0, 3000), LETTERS)
    model = CharacterModel.fit(jax.random.key(0), tokens, SIZE, num_steps=300)
    condition, steps = _condition(10), 8
    words, log_weights = enumerate_sequences(model, condition, steps)
    log_z = float(np.logaddexp.reduce(log_weights))
    p = np.exp(log_weights - log_z)
    law = np.bincount(_first_two(words), p, minlength=SIZE**2)
    note = (
        f"recurrent: sum 10, Z = {np.exp(log_z):.2e}; {len(p)} possible words, of which "
        f"{int(np.searchsorted(np.cumsum(np.sort(p)[::-1]), 0.9)) + 1} hold 90% of the mass."
    )
    return _Case("recurrent", model, NGram.fit(tokens, 2, SIZE), condition, steps, law, log_z, note)


def _methods(case: _Case, n: int):
    from abduce.models.sequence import Completion, Constrained

    completion = Completion(case.bigram, case.condition, case.steps)

    def smc(proposal, lookahead, **settings):
        task = Constrained(case.model, case.condition, proposal, completion)
        settings["lookahead"] = task.lookahead if lookahead else None
        return lambda num_runs: _run_smc(task, case.steps, n, num_runs, **settings)

    return [
        ("best of N", smc("model", False, threshold=0.0)),
        ("beam search", lambda num_runs: _beam(case, n)),
        ("SMC", smc("model", False)),
        ("SMC, masked, look-ahead", smc("masked", True)),
        ("SMC, guided", smc("completion", True)),
    ]


def _run_smc(task, steps, n, num_runs, **settings):
    import jax

    from abduce.inference.smc.steering import steer

    program = steer(
        task.initial(), task.next, task.potential, end_token=0, max_steps=steps, num_particles=n,
        unfinished="discard", **settings,
    )  # fmt: skip

    @jax.jit
    def runs(keys):
        def one(key):
            out = program.run(key)
            return out.tokens, out.log_weights, out.log_evidence

        return jax.lax.map(one, keys, batch_size=20)

    out = runs(jax.random.split(jax.random.key(n), num_runs))
    tokens, log_weights, log_evidence = (np.asarray(x) for x in out)
    return tokens, log_weights.astype(float), log_evidence.astype(float)


def _beam(case, width):
    """The `width` likeliest prefixes that can still be completed; ended ones keep their place."""
    import jax
    import jax.numpy as jnp

    model, condition = case.model, case.condition
    log_probs = jax.vmap(lambda s: jax.nn.log_softmax(model.logits(s)))
    advance = jax.vmap(model.advance)
    table, final = np.asarray(condition.transitions), np.asarray(condition.final, float)
    alive, size = np.asarray(condition.alive), model.num_tokens
    state = jax.tree.map(lambda x: jnp.asarray(x)[None], model.initial())
    tokens, score, place, done = (
        np.zeros((1, 0), int),
        np.zeros(1),
        np.zeros(1, int),
        np.zeros(1, bool),
    )
    for _ in range(case.steps):
        step = np.asarray(log_probs(state), float)
        step[done] = -np.inf
        step[done, 0] = 0.0  # an ended word is only padded
        row, token = np.divmod(np.arange(len(tokens) * size), size)
        new = score[row] + step[row, token]
        there = np.where(token == 0, place[row], table[place[row], token])
        new = np.where(token == 0, np.where(final[place[row]] > -np.inf, new, -np.inf), new)
        new = np.where((token > 0) & ~alive[there], -np.inf, new)
        best = np.argsort(-new, kind="stable")[:width]
        best = best[new[best] > -np.inf]
        row, token, score, place = row[best], token[best], new[best], there[best]
        tokens, done = np.column_stack([tokens[row], token]), done[row] | (token == 0)
        state = advance(jax.tree.map(lambda x, row=row: x[row], state), jnp.asarray(token))
    return tokens[None], np.where(done, score, -np.inf)[None], None


if __name__ == "__main__":
    main()
