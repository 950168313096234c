"""The classifier two-sample test: known accuracies, and scikit-learn's."""

import jax
import numpy as np
import pytest
from scipy.stats import norm

from abduce.amortized.checks import c2st
from abduce.amortized.checks.c2st import _batches, _folds
from abduce.amortized.checks.mlp import init_mlp, log_loss, logits
from abduce.errors import InvalidValue, MissingKey

KEY = jax.random.key(0)


def test_folds_partition_the_rows():
    rng = np.random.default_rng(0)
    train, test = _folds(23, 5, rng)
    assert sorted(test[test >= 0].tolist()) == list(range(23))
    for i in range(5):
        assert {*train[i].tolist()} == {*range(23)} - {*test[i][test[i] >= 0].tolist()}
    order = _batches(train, rng)
    assert order.shape == (5, 1, 19)
    for rows, batches in zip(train, order, strict=True):
        assert sorted(batches[batches >= 0].tolist()) == sorted(rows.tolist())
    long = _batches([np.arange(450), np.arange(449)], rng)
    assert long.shape == (2, 3, 200) and (long[:, :2] >= 0).all()  # the last batch alone is short


def test_the_loss_is_the_cross_entropy_of_the_rows_that_count():
    rng = np.random.default_rng(0)
    x, y, mask = (
        rng.normal(size=(6, 3)),
        np.array([0, 1, 1, 0, 1, 0.0]),
        np.array([1, 1, 0, 1, 0, 1]),
    )
    layers = init_mlp(KEY, (3, 4, 4, 1))
    weights = [np.asarray(w, float) for w, _ in layers]
    h = x
    for (_, b), w in zip(layers, weights, strict=True):
        h = np.maximum(h, 0) if h is not x else h
        h = h @ w + np.asarray(b)
    odds = h[:, 0]
    np.testing.assert_allclose(logits(layers, x), odds, atol=1e-5)
    p = 1 / (1 + np.exp(-odds))
    entropy = -(mask * (y * np.log(p) + (1 - y) * np.log(1 - p))).sum() / 4
    penalty = 0.5 * 0.3 * sum((w**2).sum() for w in weights) / 4
    assert float(log_loss(layers, x, y, mask, 0.3)) == pytest.approx(entropy + penalty, rel=1e-5)
    for (w, _), n in zip(layers, ((3, 4), (4, 4), (4, 1)), strict=True):
        assert w.shape == n and np.abs(w).max() <= np.sqrt(6 / sum(n))


def test_a_shift_is_told_apart_as_well_as_it_can_be():
    """N(0, 1) against N(d, 1): the best accuracy is Phi(d / 2). Four standard errors and 0.01."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=1500), rng.normal(size=1500) + 1.5
    best = norm.cdf(0.75)
    assert abs(c2st(KEY, a, b) - best) < 4 * np.sqrt(best * (1 - best) / 3000) + 0.01


def test_equal_laws_give_one_half_and_disjoint_ones_give_one():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(500, 2)), rng.normal(size=(503, 2))
    assert abs(c2st(KEY, a, b) - 0.5) < 4.5 * 0.5 / np.sqrt(1003) + 0.01
    assert c2st(KEY, a, b + 20) == 1.0
    # a law that differs in dependence alone, whatever the units
    c = rng.multivariate_normal([0, 0], [[1, 0.95], [0.95, 1]], size=500)
    scale = np.array([1e3, 1e-3])
    assert c2st(KEY, a * scale, c * scale) > 0.65


@pytest.mark.slow
def test_scikit_learn_agrees():
    """Mean accuracy over 6 seeds to 0.012, on three pairs of laws."""
    model_selection = pytest.importorskip("sklearn.model_selection")
    network = pytest.importorskip("sklearn.neural_network")

    def reference(a, b, seed):
        a, b = (a - a.mean(0)) / a.std(0, ddof=1), (b - a.mean(0)) / a.std(0, ddof=1)
        width = 10 * a.shape[1]
        classifier = network.MLPClassifier((width, width), max_iter=1000, random_state=seed)
        folds = model_selection.KFold(5, shuffle=True, random_state=seed)
        x, y = np.concatenate([a, b]), np.repeat([0, 1], [len(a), len(b)])
        return model_selection.cross_val_score(classifier, x, y, cv=folds).mean()

    rng = np.random.default_rng(3)
    for kind in ("shift", "bent", "wide"):
        a, b = rng.normal(size=(603, 2)), rng.normal(size=(603, 2))
        b = {"shift": b + 0.5, "bent": b + np.c_[0 * b[:, 0], b[:, 0] ** 2 - 1], "wide": 1.4 * b}[
            kind
        ]
        ours = np.mean([c2st(jax.random.key(s), a, b) for s in range(6)])
        theirs = np.mean([reference(a, b, s) for s in range(6)])
        assert abs(ours - theirs) < 0.012, (kind, ours, theirs)


def test_bad_draws_are_refused():
    x = np.zeros((20, 2))
    with pytest.raises(InvalidValue, match=r"\(20, 2\) and \(20, 3\)"):
        c2st(KEY, x, np.zeros((20, 3)))
    with pytest.raises(InvalidValue, match="samples_b holds 1 NaN"):
        c2st(KEY, x, np.where(np.arange(40).reshape(20, 2) == 3, np.nan, x))
    with pytest.raises(MissingKey):
        c2st(0, x, x)
