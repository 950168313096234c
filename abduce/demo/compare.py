"""One model, several algorithms: the table that compares them."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from abduce.demo.report import Report

__all__ = ["run_each", "show"]


def run_each(
    algorithms: Mapping[str, Any], model: Any, key: jax.Array, *args: Any, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    """Attaches each algorithm to the model in turn and asks for the posterior.

    Returns:
        The posteriors and the seconds each took, compilation included, by name.
    """
    posteriors, seconds = {}, {}
    for name, algorithm in algorithms.items():
        start = time.perf_counter()
        posteriors[name] = algorithm(model).posterior(key, *args, **kwargs)
        seconds[name] = time.perf_counter() - start
    return posteriors, seconds


def show(
    report: Report,
    posteriors: Mapping[str, Any],
    seconds: Mapping[str, float],
    sites: Sequence[str],
) -> None:
    """Prints mean and standard deviation of scalar sites, the log evidence, and the time."""
    rows = []
    for name, post in posteriors.items():
        numbers = [_with_error(float(post.mean(s)), float(post.std(s))) for s in sites]
        evidence = "" if post.log_evidence is None else f"{float(post.log_evidence):.2f}"
        rows.append([name, *numbers, evidence, f"{seconds[name]:.1f}"])
    report.table(["", *sites, "log evidence", "seconds"], rows)
    report.say("Mean ± standard deviation; seconds include compiling what was not compiled yet.")


def _with_error(mean, sd):
    """Two digits of the standard deviation, and the mean to the same place."""
    digits = 0 if sd >= 10 else 1
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"
