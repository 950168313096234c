"""What the two models of the Nile show alike: the flow with its level, and how well they fit."""

import numpy as np
from matplotlib.axes import Axes

from abduce.demo.report import Report
from abduce.models.data import Nile

__all__ = ["check", "draw_flow", "lag_one"]


def lag_one(flow: np.ndarray) -> np.ndarray:
    """Autocorrelation between neighbouring years; shape `(..., years)` gives shape `(...)`."""
    centred = flow - flow.mean(-1, keepdims=True)
    return (centred[..., 1:] * centred[..., :-1]).sum(-1) / (centred**2).sum(-1)


def check(report: Report, replicated: np.ndarray, observed: np.ndarray) -> None:
    """Prints where the river stands among replicated rivers, by three statistics.

    Args:
        report: Prints the table.
        replicated: Flows the model predicts, shape `(draws, years)`.
        observed: The river's flow, shape `(years,)`.
    """
    statistics = {
        "smallest flow": lambda x: x.min(-1),
        "largest flow": lambda x: x.max(-1),
        "correlation of neighbours": lag_one,
    }
    rows = []
    for name, statistic in statistics.items():
        here, there = statistic(observed), statistic(replicated)
        low, high = np.quantile(there, [0.05, 0.95])
        digits = 2 if abs(here) < 10 else 0
        rows.append(
            [
                name,
                f"{here:.{digits}f}",
                f"{low:.{digits}f} to {high:.{digits}f}",
                f"{np.mean(there <= here):.2f}",
            ]
        )
    report.table(["", "observed", "90% of replicates", "share below"], rows)


def draw_flow(axes: Axes, river: Nile, level: np.ndarray, replicated: np.ndarray) -> None:
    """Draws the observed flow, the inferred level, and the band of replicated flows.

    Args:
        axes: Where to draw.
        river: The data.
        level: Mean level of each year, shape `(years,)`.
        replicated: Predicted flows, shape `(draws, years)`.
    """
    low, high = np.quantile(replicated, [0.05, 0.95], axis=0)
    axes.fill_between(river.year, low, high, color="tab:blue", alpha=0.15, label="90% predictive")
    axes.plot(river.year, river.flow, ".-", color="black", linewidth=0.6, label="observed")
    axes.plot(river.year, level, color="tab:blue", label="level")
    axes.set(ylabel="flow (1e8 m³)")
    axes.legend(loc="upper right", fontsize="small")
