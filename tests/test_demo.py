"""The demo, run small: what it says, what it writes, and that its numbers are right."""

import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from rich.console import Console

from abduce import demo
from abduce.demo import river_plots
from abduce.demo.report import Report
from abduce.errors import AbduceWarning
from abduce.models.data import nile


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots")
    printed = io.StringIO()
    console = Console(file=printed, width=110, highlight=False)
    figures = demo.run(folder, report=Report(folder, console), draws=400)
    return folder, figures, printed.getvalue()


def test_every_plot_is_where_the_demo_says(demo_run):
    folder, figures, text = demo_run
    assert sorted(folder.glob("*.png")) == sorted(figures)
    assert len(figures) == len(set(figures)) >= 7
    for path in figures:
        assert path.name in text
        assert plt.imread(path).std() > 0.01  # not an empty canvas
    assert plt.get_fignums() == []
    assert str(folder) in text.replace("\n", "")


def test_the_centred_model_warns_and_the_cure_does_not(demo_run):
    _, _, text = demo_run
    centred, _, rest = text.partition("The cure")
    assert "! ab.nuts: " in centred
    cured = rest.partition("decorator swapped")[0]
    assert "No warnings now" in cured


def test_the_table_compares_three_algorithms(demo_run):
    """Reference: mu 4.4 +- 3.3, tau 3.6 +- 3.2; the tolerance is many standard errors."""
    _, _, text = demo_run
    schools = text.partition("decorator swapped")[2].partition("Posterior predictive")[0]
    for name in ["nuts", "importance"]:
        row = re.search(rf"{name} .*", schools).group()
        mu, tau = (float(m) for m in re.findall(r"([\d.]+) ±", row))
        assert abs(mu - 4.4) < 0.8
        assert abs(tau - 3.6) < 0.8
    assert re.search(r"laplace .*±", schools)


def test_the_change_is_found_near_1899(demo_run):
    _, _, text = demo_run
    row = re.search(r"first year of the new regime +(\d+) +(\d+)", text)
    assert {row[1], row[2]} == {"1899", "1898"} or row[1] == "1899"


def test_warnings_of_others_pass_through(tmp_path):
    report = Report(tmp_path, Console(file=io.StringIO()))
    with pytest.warns(UserWarning, match="not ours"), report.warnings() as texts:
        import warnings

        warnings.warn("ours", AbduceWarning, stacklevel=1)
        warnings.warn("not ours", UserWarning, stacklevel=1)
    assert texts == ["ours"]


def test_lag_one_autocorrelation():
    alternating = np.array([1.0, -1.0, 1.0, -1.0])
    assert river_plots.lag_one(alternating) == pytest.approx(-0.75)
    flow = nile().flow
    expected = np.corrcoef(flow[1:], flow[:-1])[0, 1]
    assert river_plots.lag_one(flow[None])[0] == pytest.approx(expected, abs=0.02)
