"""Steering against exact answers: enumeration, dynamic programmes, exact samplers.

Statistical bounds are 4.5 standard errors, or a chi-square at 1e-5: false alarms below 1e-5 each.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

import abduce as ab
from abduce.inference.smc.steering import _start_chain, steer
from abduce.inference.smc.steering_checks import check_potential
from abduce.inference.smc.steering_sweep import sweep
from abduce.kernels.resampling import SCHEMES
from abduce.models.sequence import (
    Automaton,
    CharacterModel,
    Completion,
    Constrained,
    NGram,
    constrained_sequence,
    decode,
    encode,
    enumerate_sequences,
    nonsense_words,
    reward,
)

SE = 4.5
KEY = jax.random.key(31)
V, T = 4, 6  # token 0 ends
RNG = np.random.default_rng(0)
MODEL = NGram(RNG.normal(size=(V, V)) - 0.5 * (np.arange(V) == 0))
CONDITION = Automaton.contains([1, 2], V) & Automaton.total([0, 1, 2, 1], 5)
COMPLETION = Completion(MODEL, CONDITION, T)
TASK = Constrained(MODEL, CONDITION, completion=COMPLETION)
SETTINGS = {"end_token": 0, "max_steps": T, "unfinished": "discard"}
TOKENS, LOG_WEIGHTS = enumerate_sequences(MODEL, CONDITION, T)
EXACT = np.exp(LOG_WEIGHTS - logsumexp(LOG_WEIGHTS))
CODES = {tuple(row): i for i, row in enumerate(TOKENS.tolist())}


def program(task=TASK, **settings):
    settings = SETTINGS | {"num_particles": 16} | settings
    return steer(task.initial(), task.next, task.potential, **settings)


PLAIN = program()
ALL = Automaton.avoids([0], V)  # letters only, and those are all


def by_brute_force(score, max_steps=T):
    """Sums exp(score(tokens)) over all sequences that end within `max_steps`, in plain Python."""
    total = [
        score((*x, 0)) for n in range(max_steps) for x in itertools.product(range(1, V), repeat=n)
    ]
    return logsumexp(total)


def log_p(tokens):
    table = np.asarray(MODEL.log_probs, float)
    return sum(table[c, t] for c, t in zip((0, *tokens), tokens, strict=False))


def index_of(tokens):
    """The place of each sequence among `TOKENS`; -1 for others."""
    return np.array([CODES.get(tuple(row), -1) for row in np.asarray(tokens).tolist()])


def frequencies(tokens, weights=None):
    place = index_of(tokens)
    assert (place[np.ones(len(place), bool) if weights is None else weights > 0] >= 0).all()
    return np.bincount(np.maximum(place, 0), weights, minlength=len(TOKENS))


def fits(counts):
    """Chi-square of counts against the exact posterior, rare sequences taken together."""
    expected = EXACT * counts.sum()
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    return stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-5


def is_unbiased(run, truth, num_runs=3000, key=KEY):
    ratio = np.exp(np.asarray(run(jax.random.split(key, num_runs)), float) - truth)
    error = ratio.std() / np.sqrt(num_runs)
    assert error < 0.1
    return abs(ratio.mean() - 1) < SE * error


def evidences(p):
    return jax.jit(jax.vmap(lambda k: p.run(k).log_evidence))


# --- what is exact -------------------------------------------------------------------------------


def test_the_dynamic_programme_the_enumeration_and_brute_force_agree():
    brute = by_brute_force(lambda x: log_p(x) + CONDITION.weight(x[:-1]))
    assert logsumexp(LOG_WEIGHTS) == pytest.approx(brute, abs=1e-5)
    assert float(COMPLETION.log_evidence) == pytest.approx(brute, abs=1e-5)
    np.testing.assert_allclose(
        jax.vmap(MODEL.log_prob)(TOKENS), [log_p(x[: x.index(0) + 1]) for x in CODES], atol=1e-5
    )


def test_orders_and_fixed_lengths():
    """A trigram without an end token, and a soft weight of the sum."""
    model = NGram(RNG.normal(size=(9, 3)), end_token=None)
    soft = Automaton.total([0, 1, 2], -0.3 * (np.arange(9) - 5.0) ** 2) & Automaton.avoids(
        [2, 2], 3
    )
    _, log_weights = enumerate_sequences(model, soft, 4)
    table, total = np.asarray(model.log_probs, float), []
    for x in itertools.product(range(3), repeat=4):
        y = (0, 0, *x)
        score = sum(table[3 * y[i] + y[i + 1], y[i + 2]] for i in range(4))
        ok = (2, 2) not in itertools.pairwise(x)
        total.append(score - 0.3 * (sum(x) - 5) ** 2 if ok else -np.inf)
    assert logsumexp(log_weights) == pytest.approx(logsumexp(total), abs=1e-5)
    task = Constrained(model, soft, "completion", Completion(model, soft, 4))
    assert float(task.completion.log_evidence) == pytest.approx(logsumexp(total), abs=1e-5)
    out = steer(task.initial(), task.next, task.potential, num_particles=8, max_steps=4).run(KEY)
    assert bool(out.done.all()) and out.lengths.tolist() == [4] * 8


def test_the_exact_proposal_gives_the_evidence_with_every_particle():
    """Weight times look-ahead is the same for all at every step: nothing is resampled."""
    task = Constrained(MODEL, CONDITION, "completion", COMPLETION)
    out = program(task, lookahead=task.lookahead).run(KEY)
    np.testing.assert_allclose(out.log_weights, COMPLETION.log_evidence, atol=1e-4)
    assert not out.resampled.any()


@pytest.mark.slow
def test_a_potential_of_completions_gives_constant_weights(x64):
    model = NGram(np.asarray(MODEL.log_probs, float))
    task = Constrained(model, CONDITION, "completion", Completion(model, CONDITION, T))

    def potential(state, done):  # zero at once where nothing can follow
        return task.potential(state, done) + task.lookahead(state, done)

    out = steer(task.initial(), task.next, potential, num_particles=32, **SETTINGS).run(KEY)
    assert float(jnp.ptp(out.log_weights)) < 1e-10
    assert float(out.log_evidence) == pytest.approx(float(task.completion.log_evidence), abs=1e-10)
    assert (np.asarray(out.ess) > 32 - 1e-9).all()


# --- what is unbiased ----------------------------------------------------------------------------

MASKED = Constrained(MODEL, CONDITION, "masked")
VARIANTS = {
    "systematic": {},
    "lookahead": {"lookahead": TASK.lookahead, "threshold": 1.0, "resampler": "multinomial"},
}
SLOW = {
    **{name: {"resampler": name} for name in SCHEMES if name != "systematic"},
    "scheduled": {"schedule": (1, 4), "task": MASKED},
    "never": {"threshold": 0.0, "num_particles": 64},
    "every second": {"schedule": 2},
    "bad lookahead": {"lookahead": lambda s, done: jnp.where(done, 0.0, 1.0 * s.model)},
    "masked": {"task": MASKED},
    "one particle": {"num_particles": 1, "task": MASKED},
}


@pytest.mark.parametrize(
    "name", [*VARIANTS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_the_evidence_is_unbiased(name):
    settings = (VARIANTS | SLOW)[name]
    if name == "optimal_transport":
        settings = settings | {"positions": lambda s: jnp.stack([s.automaton, s.model]) * 1.0}
    p = program(**settings)
    assert is_unbiased(evidences(p), float(COMPLETION.log_evidence))


@pytest.mark.slow
def test_unfinished_sequences_keep_the_weight_of_their_prefix():
    p = program(unfinished="keep", max_steps=4)
    truth = Completion(MODEL, CONDITION, 4, unfinished="keep").log_evidence
    assert truth > Completion(MODEL, CONDITION, 4).log_evidence + 0.1
    assert is_unbiased(evidences(p), float(truth))


@pytest.mark.slow
def test_a_good_look_ahead_helps():
    """With proposals that only avoid the impossible, and a resampling at every step."""
    spread = {}
    task = Constrained(MODEL, CONDITION, "masked", COMPLETION)
    for name, h in [("without", None), ("with", task.lookahead)]:
        z = evidences(program(task, lookahead=h, threshold=1.0))(jax.random.split(KEY, 1000))
        spread[name] = np.exp(np.asarray(z, float) - float(COMPLETION.log_evidence)).std()
    assert spread["with"] < 0.9 * spread["without"], spread


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["log", "logit"])
def test_current_scores_target_another_law(scale):
    """p(x) prod_t psi_t, as documented, and not p(x) psi."""
    potential = reward(lambda s, done: jax.nn.sigmoid(s["last"] - 1.5 + 0.5 * done), scale)
    log_r = {"log": stats.logistic.logcdf, "logit": lambda x: x}[scale]

    def move(key, s):
        state, token, q, p = MODEL.next(key, s["model"])
        return {"model": state, "last": 1.0 * token}, token, q, p

    laws = {
        "current": by_brute_force(
            lambda x: log_p(x) + sum(log_r(t - 1.5 + 0.5 * (t == 0)) for t in x)
        ),
        "telescoping": by_brute_force(lambda x: log_p(x) + log_r(-1.0)),
    }
    assert abs(laws["current"] - laws["telescoping"]) > 0.2
    start = {"model": MODEL.initial(), "last": 0.0}
    for weighting, truth in laws.items():
        p = steer(start, move, potential, num_particles=16, weighting=weighting, **SETTINGS)
        assert is_unbiased(evidences(p), truth, 1000)


def distance(n, num_runs):
    """Mean total variation between the weighted particles and the exact posterior."""
    out = jax.jit(jax.vmap(program(MASKED, num_particles=n).run))(jax.random.split(KEY, num_runs))
    place = index_of(np.asarray(out.tokens).reshape(-1, T)).reshape(num_runs, n)
    w = np.exp(np.asarray(out.log_weights, float) - np.asarray(out.log_weights).max(1)[:, None])
    w /= w.sum(1)[:, None]
    laws = [np.bincount(np.maximum(i, 0), x, len(TOKENS)) for i, x in zip(place, w, strict=True)]
    return 0.5 * np.abs(np.stack(laws) - EXACT).sum(1).mean()


@pytest.mark.slow
def test_total_variation_falls_as_the_root_of_the_number_of_particles():
    """Slope -1/2 within 0.08 from N = 64 to 1024; over keys it scatters by about 0.02."""
    near, far = distance(1024, 50), distance(64, 200)
    slope = np.log(near / far) / np.log(1024 / 64)
    assert abs(slope + 0.5) < 0.08, (far, near, slope)


# --- genealogies ---------------------------------------------------------------------------------


def test_tokens_states_weights_and_ancestors_belong_together():
    """Replaying the tokens of a particle gives its state, and its weights were made of them."""
    p = program(num_particles=128, threshold=1.0, unfinished="keep", max_steps=4)
    with pytest.warns(ab.AbduceWarning, match="have not ended after max_steps=4.*discard"):
        out = p.run(KEY)
    tokens, place = np.asarray(out.tokens), np.arange(128)
    open_ = ~np.asarray(out.done) & (np.asarray(out.log_weights) > -np.inf)
    assert int(out.num_unfinished) == open_.sum() > 0
    for row in reversed(np.asarray(out.ancestors)):
        place = row[place]
    assert place.min() >= 0 and len(np.unique(np.asarray(out.ancestors)[-1])) < 128
    for i in range(128):
        state = TASK.initial()
        for token in tokens[i, : int(out.lengths[i])]:
            state = TASK.advance(state, int(token))
        assert all(
            np.array_equal(a, b[i])
            for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(out.states), strict=True)
        )
    after_end = np.arange(4) >= np.asarray(out.lengths)[:, None]
    assert (tokens[after_end] == 0).all()
    expected = float(logsumexp(out.log_weights) - np.log(128))
    assert float(out.log_evidence) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_without_resampling_the_weights_are_those_of_the_tokens():
    out = program(num_particles=200, threshold=0.0).run(KEY)
    expected = [
        CONDITION.weight(x[: int(n) - 1]) if d else -np.inf
        for x, n, d in zip(np.asarray(out.tokens), out.lengths, out.done, strict=True)
    ]
    np.testing.assert_allclose(out.log_weights, expected, atol=1e-5)
    assert (np.asarray(out.ancestors) == np.arange(200)).all()
    law = out.distribution()
    assert sum(law.values()) == pytest.approx(1, abs=1e-5)
    assert list(law.values()) == sorted(law.values(), reverse=True)
    drawn = {tuple(x[: x.index(0) + 1]) for x in out.sample(KEY, 50).tolist()}
    assert drawn <= set(law)


# --- particle Gibbs ------------------------------------------------------------------------------


GIBBS = program(num_particles=32)


def test_particle_gibbs_really_retains_its_path():
    """Particle 0 follows it from its first token to its last, through every resampling."""
    path = _start_chain(GIBBS, KEY)[1]
    out, _ = jax.jit(lambda k: sweep(program(threshold=1.0), k, path))(KEY)
    assert (out.tokens[0] == path.tokens).all() and (out.ancestors[:, 0] == 0).all()
    assert index_of(out.tokens[:1])[0] >= 0


@pytest.mark.slow
def test_one_particle_repeats_its_path():
    path = _start_chain(GIBBS, KEY)[1]
    single = program(num_particles=1).particle_gibbs(KEY, 20, initial=path)
    assert not single.moved.any() and (single.tokens == path.tokens).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 1.0, "lookahead": TASK.lookahead},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"resampler": "multinomial", "schedule": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_turn_of_particle_gibbs_leaves_the_posterior_invariant(settings):
    """Exact draws (plain rejection), one turn of 3 particles each: still exact, by chi-square."""
    single, few = program(num_particles=1), program(num_particles=3, **settings)

    @jax.jit
    @jax.vmap
    def turn(key):
        first, second = jax.random.split(key)
        start = _start_chain(single, first)[1]
        chain = few.particle_gibbs(second, 1, initial=start)
        accepted = start.log_weight > -jnp.inf
        return accepted, start.tokens, chain.tokens[0], chain.moved[0]

    accepted, before, after, moved = turn(jax.random.split(KEY, 120_000))
    accepted = np.asarray(accepted)
    before, after = np.asarray(before)[accepted], np.asarray(after)[accepted]
    assert len(before) > 1500 and np.asarray(moved)[accepted].mean() > 0.01
    assert fits(frequencies(before))
    assert fits(frequencies(after))


@pytest.mark.slow
def test_a_long_chain_of_particle_gibbs_finds_the_posterior():
    """Batch means give the standard errors; a continued chain goes on from its path."""
    first = GIBBS.particle_gibbs(KEY, 2000)
    chain = GIBBS.particle_gibbs(jax.random.key(5), 2000, initial=first.path)
    tokens = np.concatenate([first.tokens, chain.tokens])
    assert float(chain.moved.mean()) > 0.3 and bool(chain.done.all())
    hits = index_of(tokens)[:, None] == np.arange(len(TOKENS))
    batches = hits.reshape(40, -1, len(TOKENS)).mean(1)
    error = batches.std(0, ddof=1) / np.sqrt(40)
    common = EXACT > 0.02
    assert common.sum() >= 5
    assert (np.abs(batches.mean(0) - EXACT)[common] < 6 * error[common]).all()  # t, 39 degrees


# --- corners -------------------------------------------------------------------------------------


def test_no_weight_left_names_the_step():
    def potential(state, done):
        return jnp.where(state.step >= 3, -jnp.inf, 0.0)

    endless = NGram(np.zeros((V, V)) - 50.0 * (np.arange(V) == 0))
    p = program(num_particles=8).replace(potential=potential, next=Constrained(endless, ALL).next)
    message = r"ab\.steer, step 3 of 6: all 8 particles have log weight -inf.*3 tokens.*num_part"
    with pytest.raises(ab.Degenerate, match=message):
        p.run(KEY)
    out = jax.jit(p.run)(KEY)
    assert out.log_evidence == -jnp.inf and int(out.failed_at) == 3
    assert all(not np.isnan(x).any() for x in jax.tree.leaves(out) if x.dtype.kind == "f")


@pytest.mark.slow
def test_no_weight_left_for_other_reasons():
    endless = Constrained(NGram(np.zeros((V, V)) - 50.0 * (np.arange(V) == 0)), ALL)
    with pytest.raises(ab.Degenerate, match="no sequence ended within max_steps"):
        program(endless, num_particles=4).run(KEY)
    with pytest.raises(ab.Degenerate, match=r"step 0 of 6.*initial state is zero"):
        PLAIN.replace(potential=lambda s, d: -jnp.inf).particle_gibbs(KEY, 1)


def test_a_nan_potential_is_weight_zero():
    def potential(state, done):
        return jnp.where(state.model == 2, jnp.nan, 0.0)

    p = program(num_particles=64).replace(potential=potential)
    with pytest.warns(ab.AbduceWarning, match="were NaN or \\+inf and count as weight zero"):
        out = p.run(KEY)
    assert int(out.num_invalid) > 0 and np.isfinite(out.log_evidence)
    for tokens in out.distribution():
        assert 2 not in tokens


@pytest.mark.slow
def test_a_run_is_reproducible_and_can_be_mapped():
    keys = jax.random.split(jax.random.key(7), 2)
    one = [PLAIN.run(k) for k in keys]
    again = PLAIN.run(keys[0])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one[0], again))
    both = jax.vmap(PLAIN.run)(keys)
    np.testing.assert_array_equal(both.tokens, np.stack([o.tokens for o in one]))
    np.testing.assert_allclose(both.log_weights, np.stack([o.log_weights for o in one]), rtol=1e-5)


@pytest.mark.slow
def test_other_arrays_of_a_model_compile_nothing(count_compiles):
    def run(seed):
        model = NGram(np.random.default_rng(seed).normal(size=(V, V)))
        p = program(Constrained(model, CONDITION, "masked"))
        with count_compiles() as compiles:
            jax.block_until_ready(p.run(jax.random.key(seed)).log_evidence)
        return compiles.count

    first = run(1)
    assert first > 0 and run(2) == 0


@pytest.mark.slow
def test_a_random_start_and_vector_tokens():
    """A Gaussian walk observed through its potential: a bootstrap filter. Kalman's evidence."""
    y = jnp.array([0.3, -0.2, 0.8])

    def start(key):
        return {"x": jax.random.normal(key), "t": 0, "log_psi": 0.0}

    def move(key, s):
        x = s["x"] + jax.random.normal(key)
        seen = s["log_psi"] + jax.scipy.stats.norm.logpdf(y[s["t"]], x)
        return {"x": x, "t": s["t"] + 1, "log_psi": seen}, jnp.stack([x, x**2]), 0.0, 0.0

    p = steer(start, move, lambda s, done: s["log_psi"], num_particles=64, max_steps=3)
    out = p.run(KEY)
    assert out.tokens.shape == (64, 3, 2) and bool(out.done.all())
    np.testing.assert_allclose(out.tokens[..., 1], out.tokens[..., 0] ** 2, rtol=1e-6)
    cov = np.minimum.outer(np.arange(2, 5), np.arange(2, 5)) + np.eye(3)
    truth = stats.multivariate_normal(np.zeros(3), cov).logpdf(np.asarray(y))
    assert is_unbiased(evidences(p), truth, 1000)


def test_what_does_not_fit_is_named():
    good = (TASK.initial(), TASK.next, TASK.potential)
    for change, error, message in [
        ({"num_particles": 0}, ab.InvalidAlgorithm, "num_particles must be an int >= 1"),
        ({"resampler": "sytematic"}, ab.InvalidAlgorithm, 'Did you mean "systematic"'),
        ({"threshold": 1.5}, ab.InvalidAlgorithm, "threshold is a fraction"),
        ({"weighting": "now"}, ab.InvalidAlgorithm, "'telescoping', 'current'"),
        ({"schedule": 0}, ab.InvalidAlgorithm, "schedule is a positive int"),
        ({"resampler": "optimal_transport"}, ab.InvalidAlgorithm, "needs positions="),
        ({"lookahead": 3}, ab.InvalidModel, "lookahead is a function, got int"),
        (
            {"lookahead": lambda s, d: jnp.zeros(2)},
            ab.InvalidModel,
            r"shape \(2,\), expected a scal",
        ),
    ]:
        with pytest.raises(error, match=message):
            steer(*good, **(SETTINGS | change))
    with pytest.raises(
        ab.InvalidModel, match=r"returns \(state, token, logq, logp\), got 3 values"
    ):
        steer(0, lambda k, s: (s, s, 0.0), lambda s, d: 0.0)
    with pytest.raises(
        ab.InvalidModel, match=r"changed state\['n'\] from int32\[\] to float32\[\]"
    ):
        steer({"n": 0}, lambda k, s: ({"n": s["n"] + 0.5}, 0, 0.0, 0.0), lambda s, d: 0.0)
    with pytest.raises(ab.MissingKey, match="needs a random key, got int"):
        PLAIN.run(0)
    with pytest.raises(ab.InvalidModel, match="4 tokens, the automaton 5"):
        Constrained(MODEL, Automaton.contains([1], 5))


def test_the_checker_names_the_violation():
    shy = PLAIN.replace(
        potential=lambda s, d: jnp.where(d | (s.step != 2), 0.0, -jnp.inf), max_steps=4
    )
    message = r"after 2 tokens \(\[\d, \d\]\) the potential is zero, but positive again after 3"
    with pytest.raises(ab.InvalidModel, match=message):
        check_potential(shy, KEY)


@pytest.mark.slow
def test_the_checker_on_other_programs():
    assert check_potential(PLAIN, KEY) == pytest.approx(np.exp(COMPLETION.log_evidence), abs=0.03)
    doom = PLAIN.replace(lookahead=lambda s, d: jnp.where(s.step == 1, -jnp.inf, 0.0))
    with pytest.raises(ab.InvalidModel, match=r"after 1 tokens .* lookahead is zero, but the"):
        check_potential(doom, KEY)
    with pytest.raises(ab.InvalidModel, match="the potential is nan"):
        check_potential(PLAIN.replace(potential=lambda s, d: jnp.nan * s.step), KEY)


# --- models --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_character_model_learns_and_is_steered():
    """Trained on made-up words it beats a bigram; its steered evidence is the enumerated one."""
    alphabet = "bnstaio"
    words = nonsense_words(0, 400)
    tokens = encode(words, alphabet)
    assert [decode(t, alphabet) for t in tokens[:5]] == words[:5]
    gru = CharacterModel.fit(KEY, tokens, 8, hidden=16, num_steps=60, learning_rate=0.03)
    bigram = NGram.fit(tokens, 2, 8)
    test = encode(nonsense_words(1, 200), alphabet)
    loss = {m: -float(jax.vmap(f.log_prob)(test).mean()) for m, f in
            [("gru", gru), ("bigram", bigram)]}  # fmt: skip
    assert loss["gru"] < loss["bigram"]

    a = encode(["a"], alphabet)[0, 0]
    condition = Automaton.contains([a], 8) & Automaton.total([0, 1, 1, 1, 1, 2, 2, 2], 4)
    _, log_weights = enumerate_sequences(gru, condition, 5)
    task = Constrained(gru, condition, "masked", Completion(bigram, condition, 5))
    p = steer(
        task.initial(), task.next, task.potential, lookahead=task.lookahead, end_token=0,
        num_particles=16, max_steps=5, unfinished="discard",
    )  # fmt: skip
    assert is_unbiased(evidences(p), logsumexp(log_weights), 1000)


def test_a_constrained_sequence_is_a_model():
    """Its log density is log p + log w; importance sampling finds the evidence."""
    m = constrained_sequence
    for row, w in zip(TOKENS[:5], LOG_WEIGHTS[:5], strict=True):
        assert float(m.log_density({"token": row}, TASK, T)) == pytest.approx(w, abs=1e-4)
    assert m.log_density({"token": np.array([1, 0, 0, 0, 0, 0])}, TASK, T) == -np.inf
    alg = ab.importance(num_samples=100, smooth=False)

    @jax.jit
    @jax.vmap
    def run(key):
        return alg(m).posterior(key, TASK, T).log_evidence

    truth = Completion(MODEL, CONDITION, T, unfinished="keep").log_evidence
    assert is_unbiased(run, float(truth), 300)


def test_automata_say_what_they_accept():
    word = Automaton.contains([1, 1, 2], 3)
    for x in itertools.product(range(3), repeat=6):
        there = any(x[i : i + 3] == (1, 1, 2) for i in range(4))
        assert (word.weight(x) == 0) == there
        assert (Automaton.avoids([1, 1, 2], 3).weight(x) == 0) == (not there)
    for bad, message in [
        (lambda: Automaton([[0, 2]], [0.0]), "lead to states 0 to 0, got 0 to 2"),
        (lambda: Automaton.contains([], 3), "a word is a non-empty list"),
        (lambda: Automaton.total([1, -1], 3), "non-negative ints"),
        (lambda: word & Automaton.contains([1], 4), "no conjunction"),
        (lambda: encode(["xyz"], "xy"), "'xyz' has 'z', not in the alphabet"),
        (lambda: NGram(np.zeros((5, 2))), "5 rows for V = 2"),
    ]:
        with pytest.raises(ab.InvalidValue, match=message):
            bad()
