"""The demo: two classic problems, from data to a checked posterior.

`abduce demo` runs it. Each chapter is a module with one function that reads as the analysis does;
`report` prints the steps and keeps the plots.
"""

import time
from pathlib import Path

import jax

from abduce.demo import change_point, eight_schools, local_level
from abduce.demo.report import Report

__all__ = ["run"]


def run(folder: Path, *, report: Report | None = None, draws: int = 1000) -> list[Path]:
    """Runs the whole demo on real data.

    Args:
        folder: Existing folder for the plots.
        report: Where to print; the terminal by default.
        draws: Draws of each of the four chains, and as many warm-up steps.

    Returns:
        The plots that were written.

    Example:
        >>> run(Path("plots"))  # doctest: +SKIP
    """
    start = time.perf_counter()
    report = report or Report(folder)
    schools_key, change_key, level_key = jax.random.split(jax.random.key(0), 3)
    eight_schools.infer(report, schools_key, draws)
    change_point.infer(report, change_key, draws)
    local_level.infer(report, level_key, draws)
    report.chapter("Done")
    report.say(f"{time.perf_counter() - start:.0f} s in all.")
    report.say(f"{len(report.figures)} plots in {folder.resolve()}")
    return report.figures
