"""Summary tables: values, labels, weights, and how they print."""

import sys

import ml_dtypes
import numpy as np
import pytest

from abduce.errors import Degenerate, InvalidValue, UnknownAddress
from abduce.inference import diagnostics
from abduce.inference.psis import weights_ess
from abduce.inference.summary import element_labels, summarize, weighted_quantile

SCHOOLS = ["Choate", "Deerfield", "St. Paul's"]


def example():
    rng = np.random.default_rng(0)
    return {
        "mu": 4 + 3 * rng.normal(size=(4, 250)),
        "theta": rng.normal(size=(4, 250, 3)) * [1, 10, 100],
        "cov": rng.normal(size=(4, 250, 2, 3)),
        "k": rng.poisson(3.0, size=(4, 250)),
        "flag": rng.random((4, 250)) < 0.3,
    }


LABELLED = {
    "dims": {"theta": ["school"], "cov": [None, "school"]},
    "coords": {"school": SCHOOLS},
}


def test_values_of_every_column():
    draws = example()
    table = summarize(draws, interval=0.8)
    assert list(table.columns) == [
        "mean", "sd", "10%", "90%", "ess_bulk", "ess_tail", "r_hat", "mcse_mean",
    ]  # fmt: skip
    x = draws["theta"][:, :, 1]
    row = table["theta[1]"]
    assert row["mean"] == pytest.approx(x.mean(), rel=1e-12)
    assert row["sd"] == pytest.approx(x.std(ddof=1), rel=1e-12)
    assert (row["10%"], row["90%"]) == pytest.approx(tuple(np.quantile(x, [0.1, 0.9])))
    assert row["ess_bulk"] == pytest.approx(diagnostics.ess_bulk(x))
    assert row["ess_tail"] == pytest.approx(diagnostics.ess_tail(x))
    assert row["r_hat"] == pytest.approx(diagnostics.rhat(x))
    assert row["mcse_mean"] == pytest.approx(diagnostics.mcse_mean(x))


def test_labels_rows_sites_and_columns():
    table = summarize(example(), **LABELLED)
    assert table.labels == (
        "mu", "theta[Choate]", "theta[Deerfield]", "theta[St. Paul's]",
        "cov[0, Choate]", "cov[0, Deerfield]", "cov[0, St. Paul's]",
        "cov[1, Choate]", "cov[1, Deerfield]", "cov[1, St. Paul's]", "k", "flag",
    )  # fmt: skip
    assert len(table) == 12 and list(table) == list(table.labels)
    assert table["theta"].labels == table.labels[1:4]
    np.testing.assert_array_equal(table["theta"]["mean"], table.column("mean")[1:4])
    draws = example()["cov"]
    assert table["cov[1, Deerfield]"]["mean"] == pytest.approx(draws[:, :, 1, 1].mean())
    assert "mu" in table and "theta" in table and "r_hat" in table and "nu" not in table
    assert element_labels("x", (2, 2)) == ["x[0, 0]", "x[0, 1]", "x[1, 0]", "x[1, 1]"]


def test_a_site_called_like_a_column():
    table = summarize({"mean": np.ones((1, 10)), "sd": np.zeros((1, 10, 2))})
    assert table["mean"]["mean"] == 1 and table["sd"].labels == ("sd[0]", "sd[1]")
    np.testing.assert_array_equal(table.column("mean"), [1, 0, 0])


def test_to_dict_and_to_pandas():
    table = summarize(example(), **LABELLED)
    as_dict, frame = table.to_dict(), table.to_pandas()
    assert list(as_dict) == list(table.labels) == list(frame.index)
    assert as_dict["k"]["mean"] == frame.loc["k", "mean"] == table["k"]["mean"]


def test_to_pandas_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        summarize(example()).to_pandas()


def test_quantiles_of_discrete_sites_are_values_that_occur():
    table = summarize({"k": np.array([[0, 1, 2, 3]]), "b": np.array([[True, False] * 2])})
    assert table["k"]["mean"] == 1.5 and table["k"]["5%"] == 0 and table["k"]["95%"] == 3
    half = summarize({"k": np.array([[0, 1]])}, interval=1e-6)
    assert set(list(half["k"].values())[2:4]) <= {0, 1}
    assert table["b"]["mean"] == 0.5 and table["b"]["95%"] == 1


def test_weighted_columns():
    rng = np.random.default_rng(1)
    x, log_weights = rng.normal(size=(1, 4000)), rng.normal(size=(1, 4000))
    table = summarize({"x": x}, log_weights=log_weights - 800)
    assert list(table.columns) == ["mean", "sd", "5%", "95%", "ess", "mcse_mean"]
    w = np.exp(log_weights) / np.exp(log_weights).sum()
    mean = np.sum(w * x)
    row = table["x"]
    assert row["mean"] == pytest.approx(mean)
    assert row["sd"] == pytest.approx(np.sqrt(np.sum(w * (x - mean) ** 2)))
    assert row["mcse_mean"] == pytest.approx(np.sqrt(np.sum(w**2 * (x - mean) ** 2)))
    assert row["ess"] == pytest.approx(weights_ess(log_weights[0]))
    assert "4000 weighted draws" in str(table)


def test_importance_sampling_error_is_calibrated():
    """N(0, 1) weighted to N(0.5, 1): 400 runs, squared errors over squared MCSEs average to 1.

    Chi-square(400) / 400 lies in (0.68, 1.4) with probability 1 - 1e-6; the MCSE's own noise
    is covered by the rest.
    """
    x = np.random.default_rng(2).normal(size=(400, 1, 2000))
    ratios = []
    for draws in x:
        row = summarize({"x": draws}, log_weights=0.5 * draws)["x"]
        ratios.append(((row["mean"] - 0.5) / row["mcse_mean"]) ** 2)
    assert 0.65 < np.mean(ratios) < 1.45


def test_equal_weights_change_nothing_but_the_columns():
    draws = example()
    plain = summarize(draws)
    weighted = summarize(draws, log_weights=np.full((4, 250), -3.0))
    for name in ("mean", "5%", "95%"):
        np.testing.assert_allclose(weighted[name], plain[name], rtol=1e-9)
    np.testing.assert_allclose(weighted["ess"], 1000)


def test_weighted_quantiles():
    x, w = np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 2.0])
    # levels of 1, 2, 3 by the formula: 0, (0.25 + 0.25 - 0.125) / 0.75 = 0.5, 1
    np.testing.assert_allclose(weighted_quantile(x, w, [0, 0.25, 0.5, 1]), [1, 1.5, 2, 3])
    repeated = np.repeat([1, 2, 3], [10, 20, 10])
    np.testing.assert_allclose(
        weighted_quantile(np.array([3, 1, 2]), w, [0.1, 0.5, 0.9]),
        np.quantile(repeated, [0.1, 0.5, 0.9], method="inverted_cdf"),
    )
    dead = weighted_quantile(np.array([np.nan, 1.0, 2.0]), np.array([0.0, 1, 1]), [0.5])
    np.testing.assert_allclose(dead, [1.5])


def test_dead_draws_may_hold_anything():
    x = np.array([[1.0, np.nan, 3.0]])
    table = summarize({"x": x}, log_weights=np.array([[0.0, -np.inf, 0.0]]))
    assert table["x"]["mean"] == 2 and table["x"]["ess"] == pytest.approx(2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 0), (4, 3)])
def test_few_draws_give_nan_not_errors(shape):
    table = summarize({"x": np.ones(shape), "empty": np.ones((*shape, 0))})
    assert table.labels == ("x",)
    assert np.isnan(table["x"]["r_hat"]) and "x" in str(table)


def test_nothing_to_summarize():
    assert str(summarize({})).startswith("(no rows)") and len(summarize({})) == 0


def test_small_dtypes():
    x = np.linspace(0, 1, 100).reshape(1, 100)
    for dtype in (np.float16, np.float32, ml_dtypes.bfloat16):
        assert summarize({"x": x.astype(dtype)})["x"]["mean"] == pytest.approx(0.5, abs=1e-2)


def test_text_shows_digits_that_mean_something():
    rng = np.random.default_rng(3)
    draws = {
        "unit": rng.normal(size=(4, 1000)),
        "tiny": 1e-7 * rng.normal(size=(4, 1000)),
        "huge": 3e9 + 1e8 * rng.normal(size=(4, 1000)),
        "offset": 1000 + 1e-3 * rng.normal(size=(4, 1000)),
        "count": rng.poisson(3.0, size=(4, 1000)),
        "constant": np.full((4, 1000), 2.5),
    }
    lines = str(summarize(draws)).splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines[1:-1]}
    assert lines[0].split()[:4] == ["mean", "sd", "5%", "95%"]
    assert cells["unit"][1] in ("0.99", "1.00", "1.01")
    assert cells["tiny"][1].endswith("e-07") or cells["tiny"][1].endswith("e-08")
    assert cells["huge"][0].endswith("e+09") and len(cells["huge"][0]) <= 9
    assert cells["offset"][0].startswith(("999.9999", "1000.0000"))
    assert cells["count"][2:4] == ["0", "6"]
    assert cells["constant"] == ["2.5", "0", "2.5", "2.5", "-", "-", "-", "-"]
    assert all(line == line.rstrip() for line in lines)
    assert lines[-1] == "4 chains x 1000 draws, 90% equal-tailed interval"
    assert "-0.00" not in str(summarize({"x": draws["unit"] - draws["unit"].mean() - 1e-9}))


def test_long_tables_are_cut_in_the_middle():
    table = summarize({"x": np.random.default_rng(0).normal(size=(2, 50, 100))})
    text = str(table)
    assert "x[29]" in text and "x[30]" not in text and "x[69]" not in text and "x[70]" in text
    assert "... 40 rows left out ..." in text and "100 rows; all are in" in text
    assert len(text.splitlines()) == 1 + 60 + 1 + 2
    assert "40 rows left out" in table._repr_html_()
    assert repr(table) == text


def test_html_is_escaped():
    table = summarize({"x": np.zeros((1, 9, 1))}, dims={"x": ["d"]}, coords={"d": ["<script>"]})
    assert "<script>" not in table._repr_html_() and "&lt;script&gt;" in table._repr_html_()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: summarize({"x": np.zeros(5)}), InvalidValue, r'draws\["x"\].*got \(5,\)'),
        (lambda: summarize({"x": np.zeros((1, 5))}, interval=90), InvalidValue, "interval=0.9"),
        (
            lambda: summarize({"x": np.zeros((1, 5, 3))}, dims={"x": ["a", "b"]}),
            InvalidValue,
            r'dims\["x"\] names 2 axes \(a, b\).*\(3,\)',
        ),
        (
            lambda: summarize(
                {"x": np.zeros((1, 5, 3))}, dims={"x": ["a"]}, coords={"a": ["p", "q"]}
            ),
            InvalidValue,
            r'coords\["a"\] has 2 labels.*"x" has length 3',
        ),
        (
            lambda: summarize({"x": np.zeros((2, 5))}, log_weights=np.zeros(10)),
            InvalidValue,
            r'\(2, 5\) for site "x", got \(10,\)',
        ),
        (
            lambda: summarize({"x": np.zeros((1, 2))}, log_weights=np.full((1, 2), -np.inf)),
            Degenerate,
            "all 2 log weights",
        ),
        (
            lambda: summarize({"x": np.zeros((1, 5), complex)}),
            InvalidValue,
            'draws\\["x"\\] must be real',
        ),
        (
            lambda: summarize({"theta": np.zeros((1, 5))})["theat"],
            UnknownAddress,
            'Did you mean "theta"',
        ),
        (
            lambda: summarize({"mu": np.zeros((1, 5))}).column("rhat"),
            UnknownAddress,
            'Did you mean "r_hat"',
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()
