"""Figures: what they show, at the level of the drawn data, and that odd input is handled."""

import numpy as np
import pytest

from abduce.errors import InvalidValue, UnknownAddress
from abduce.inference.drawing import density
from abduce.inference.plots import (
    plot_compare,
    plot_intervals,
    plot_objective,
    plot_pairs,
    plot_predictive_check,
    plot_trace,
)


def example(chains=4, draws=200):
    rng = np.random.default_rng(0)
    return {
        "mu": rng.normal(size=(chains, draws)),
        "tau": rng.exponential(size=(chains, draws)),
        "theta": rng.normal(size=(chains, draws, 3)),
        "k": rng.poisson(3.0, size=(chains, draws)),
    }


LABELLED = {"dims": {"theta": ["school"]}, "coords": {"school": ["a", "b", "c"]}}
DIVERGENCES = np.random.default_rng(1).random((4, 200)) < 0.02


def render(figure, tmp_path):
    path = tmp_path / "figure.png"
    figure.savefig(path)
    assert path.stat().st_size > 5000


def test_density_is_one_and_stays_inside_its_support():
    rng = np.random.default_rng(0)
    for x in (rng.normal(size=2000), rng.exponential(size=2000), rng.random(2000)):
        grid, height = density(x)
        assert np.trapezoid(height, grid) == pytest.approx(1, abs=0.02)
        assert (height >= 0).all()
    grid, height = density(rng.exponential(size=20_000))
    assert grid[0] >= 0 and height[0] == pytest.approx(1, abs=0.15)  # reflected: no dip at 0
    grid, height = density(rng.normal(size=20_000))
    middle = np.argmin(np.abs(grid))
    assert height[middle] == pytest.approx(0.3989, abs=0.03)
    grid, height = density(1 + rng.random(20_000))  # both ends are edges
    assert grid[0] >= 1 and grid[-1] <= 2
    np.testing.assert_allclose(height[[0, -1]], 1, atol=0.15)
    heavy = rng.standard_cauchy(size=20_000)
    grid, height = density(heavy)  # far draws do not make the middle a single bin
    assert height.max() == pytest.approx(1 / np.pi, abs=0.08)
    assert np.isfinite(density(np.r_[np.zeros(999), 1.0])[1]).all()


def test_trace(tmp_path):
    figure = plot_trace(example(), divergences=DIVERGENCES, **LABELLED)
    labels = [axis.get_ylabel().replace("\n", "") for axis in figure.axes[::2]]
    assert labels == ["mu", "tau", "theta[a]", "theta[b]", "theta[c]", "k"]
    path = figure.axes[1].lines[2].get_ydata()
    np.testing.assert_array_equal(path, example()["mu"][2])
    render(figure, tmp_path)


def test_names_choose_and_too_many_rows_are_announced(tmp_path):
    figure = plot_trace(example(), ["theta[1]", "mu"])
    assert [a.get_ylabel() for a in figure.axes[::2]] == ["theta[1]", "mu"]
    figure = plot_intervals({"x": np.zeros((1, 5, 100))}, max_rows=10)
    assert figure.get_suptitle().startswith("10 of 100 elements")
    render(figure, tmp_path)


def test_intervals_show_the_quantiles(tmp_path):
    figure = plot_intervals(example(), ["mu"], interval=0.8, reference=0.0)
    outer = figure.axes[0].lines[0].get_xdata()
    np.testing.assert_allclose(outer, np.quantile(example()["mu"], [0.1, 0.9]))
    render(figure, tmp_path)


@pytest.mark.parametrize("kind", ["density", "interval"])
def test_compare(kind, tmp_path):
    other = {**example(1, 900), "extra": np.zeros((1, 900))}
    figure = plot_compare({"nuts": example(), "laplace": other}, kind=kind, **LABELLED)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["nuts", "laplace"]
    render(figure, tmp_path)


def test_pairs_mark_the_divergences(tmp_path):
    figure = plot_pairs(example(), ["mu", "tau", "k"], divergences=DIVERGENCES)
    scatter = figure.axes[3]  # second row, first column: tau against mu
    red = scatter.lines[1]
    np.testing.assert_array_equal(red.get_xdata(), example()["mu"][DIVERGENCES])
    np.testing.assert_array_equal(red.get_ydata(), example()["tau"][DIVERGENCES])
    assert figure.texts[0].get_text() == f"{DIVERGENCES.sum()} divergent"
    render(figure, tmp_path)


@pytest.mark.parametrize("kind", ["density", "band", "counts"])
def test_predictive_check(kind, tmp_path):
    rng = np.random.default_rng(0)
    if kind == "counts":
        figure = plot_predictive_check(rng.poisson(3, 40), rng.poisson(3, (2, 100, 40)))
    else:
        observed, replicated = rng.normal(size=(4, 10)), rng.normal(size=(2, 100, 4, 10))
        observed[0, 0] = np.nan
        figure = plot_predictive_check(observed, replicated, kind=kind, label="flow")
    assert "observed" in [t.get_text() for t in figure.legends[0].get_texts()]
    render(figure, tmp_path)


def test_bands_sort_by_x():
    rng = np.random.default_rng(0)
    x, observed = rng.permutation(20), rng.normal(size=20)
    figure = plot_predictive_check(observed, rng.normal(size=(1, 50, 20)), x=x)
    line = figure.axes[0].lines[-1]
    np.testing.assert_array_equal(line.get_xdata(), np.arange(20))
    np.testing.assert_array_equal(line.get_ydata(), observed[np.argsort(x)])


def test_odd_draws(tmp_path):
    draws = {
        "constant": np.ones((2, 50)),
        "nan": np.full((2, 50), np.nan),
        "some nan": np.where(np.arange(100).reshape(2, 50) % 7, 1.5, np.nan) + np.arange(50),
        "infinite": np.r_[np.inf, np.arange(99.0)].reshape(2, 50),
        "nearly constant": np.r_[np.zeros(99), 1.0].reshape(2, 50),
        "flag": np.arange(100).reshape(2, 50) % 2 == 0,
        "one draw": np.ones((1, 1)),
    }
    for figure in (plot_trace(draws), plot_intervals(draws)):
        render(figure, tmp_path)
    render(plot_compare({"a": draws, "b": draws}), tmp_path)
    render(plot_pairs({k: v for k, v in draws.items() if k != "one draw"}), tmp_path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plot_trace(example(), ["muu"]), UnknownAddress, 'Did you mean "mu"'),
        (lambda: plot_trace({}), InvalidValue, "nothing to show"),
        (lambda: plot_trace({"x": np.zeros(3)}), InvalidValue, r"got \(3,\)"),
        (lambda: plot_trace(example(), divergences=np.zeros(3)), InvalidValue, r"got \(3,\)"),
        (lambda: plot_intervals(example(), interval=90), InvalidValue, "between 0 and 1, got 90"),
        (lambda: plot_pairs(example(), ["mu"]), InvalidValue, "at least two"),
        (lambda: plot_compare({"a": example()}, kind="bar"), InvalidValue, "unknown kind 'bar'"),
        (
            lambda: plot_compare({"a": {"x": np.zeros((1, 3))}, "b": {"y": np.zeros((1, 3))}}),
            InvalidValue,
            "no site in common",
        ),
        (
            lambda: plot_predictive_check(np.zeros(3), np.zeros((1, 5, 4))),
            InvalidValue,
            r"\(chain, draw, 3\), got \(1, 5, 4\)",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_objective_has_its_median_and_the_skipped_steps(tmp_path):
    """The median of a noisy climb is the climb; skipped steps are marked where they are."""
    rng = np.random.default_rng(4)
    steps = np.arange(1, 2001)
    climb = -1000 * np.exp(-steps / 150)
    values = climb + rng.normal(size=2000) * np.where(rng.random(2000) < 0.02, 200, 1)
    values[[9, 700]] = np.nan, -np.inf
    figure = plot_objective(values)
    (axis,) = figure.axes
    noisy, median, marks, _ = axis.lines
    assert noisy.get_label() == "objective" and median.get_label() == "median of 40 steps"
    late = median.get_xdata() > 500
    apart = median.get_ydata() - climb[median.get_xdata() - 1]
    assert np.abs(apart[late]).max() < 5 * 1.25 / 40**0.5 + 2
    np.testing.assert_array_equal(marks.get_xdata(), [10, 701])
    assert axis.get_ylim()[0] > -700  # the start does not squeeze the rest
    assert [t.get_text() for t in figure.legends[0].texts][-1] == "2 skipped"
    render(figure, tmp_path)


def test_the_histories_of_fits_are_taken_as_they_are(tmp_path):
    """`post.diagnostics` of `ab.vi` and `ab.gaussian_vi`, `est.history`."""
    curve = np.linspace(3.0, 1.0, 100)
    (axis,) = plot_objective({"objective": -curve, "elbo": -1.0, "num_nonfinite": 0}).axes
    assert axis.get_ylabel() == "objective"
    (axis,) = plot_objective({"elbo": -curve}, label="ELBO (nats)", window=3).axes
    assert axis.get_ylabel() == "ELBO (nats)"
    np.testing.assert_allclose(axis.lines[1].get_ydata()[1:-1], -curve[1:-1])
    history = {"loss": curve, "validation_step": [50, 100], "validation_loss": [2.5, 4.0]}
    figure = plot_objective(history)
    (axis,) = figure.axes
    np.testing.assert_array_equal(axis.lines[2].get_xydata(), [[50, 2.5], [100, 4.0]])
    assert axis.get_ylim()[1] > 4
    render(figure, tmp_path)
    plot_objective([1.0]).savefig(tmp_path / "one.png")
    with pytest.raises(InvalidValue, match=r"needs 'objective', 'loss' or 'elbo'.*'ess'"):
        plot_objective({"ess": curve, "elbo": 3.0})
    with pytest.raises(InvalidValue, match="none of the 2 steps is finite"):
        plot_objective([np.nan, np.inf])
    with pytest.raises(InvalidValue, match=r"shape \(steps,\), got \(2, 3\)"):
        plot_objective(np.zeros((2, 3)))
    with pytest.raises(InvalidValue, match="window must be an int"):
        plot_objective(curve, window=0)
