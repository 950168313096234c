"""The costly part of every calibration check: many data sets from the model, a posterior for each.

    theta_i ~ p(theta),   x_i ~ p(x | theta_i),   draws_i ~ q(theta | x_i),   i = 1, ..., N

One set of runs serves all checks. An algorithm that can be traced (`ab.importance`, estimators)
treats many data sets in one compiled program; others run one after the other, and compile once.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from abduce.amortized.checks.calibration import Calibration
from abduce.amortized.checks.densities import density_at, posterior_model
from abduce.amortized.checks.mapped import mapped_runs
from abduce.amortized.checks.prior_predictive import PriorPredictive, simulate_pairs
from abduce.errors import (
    AbduceWarning,
    Degenerate,
    DiscreteLatent,
    InvalidAlgorithm,
    InvalidModel,
    InvalidValue,
    MissingKey,
    NoDensity,
    NotFitted,
    UnknownAddress,
)
from abduce.inference.algorithm import check_count
from abduce.inference.diagnostics import ess_bulk, ess_tail
from abduce.inference.psis import weights_ess
from abduce.ppl.operations import typed_key

__all__ = ["run_calibration"]

# Errors that other data would not cure: the call is wrong, not the posterior.
_MISUSE = (
    DiscreteLatent, InvalidAlgorithm, InvalidModel, MissingKey, NoDensity, NotFitted,
    UnknownAddress,
)  # fmt: skip
_HOPELESS = 10  # so many failures at the start, and none of the others is tried
_PER_CALL = 4_000_000  # numbers drawn in one compiled call of a traceable algorithm


def run_calibration(
    model: Any,
    algorithm: Any,
    key: Any,
    *args: Any,
    observed: Sequence[str] | str | None = None,
    num_datasets: int = 400,
    num_samples: int = 100,
    designs: Any = None,
    budget: float | None = None,
    **kwargs: Any,
) -> Calibration:
    """Draws data sets from the model and runs the algorithm on each.

    Draws are thinned to about independent ones: chains by their effective sample size (the
    smallest over all latents, bulk and tail), weighted draws by Kish's; `counts` tells how many
    are left. A run that raises or gives NaN is counted in `failures`. `KeyboardInterrupt` and
    `budget` end the runs and return those made.

    Args:
        model: The model; what it observes with `obs=` cannot be drawn, so leave that out.
        algorithm: Any algorithm; None for the one that is attached to the model.
        key: Random key.
        *args, **kwargs: The model's arguments.
        observed: Addresses of the data; default: the algorithm's `observed`, if it has them.
        num_datasets: Runs.
        num_samples: Draws of each posterior that are kept, at most.
        designs: A Model that returns the model's arguments of one data set: a tuple, a dict (by
            name), or the only one. Instead of `args`.
        budget: Seconds; the run in progress is finished.

    Returns:
        A `Calibration`.

    Raises:
        MissingData, UnknownAddress: `observed` is missing or wrong.
        InvalidModel: The model's prior predictive cannot be drawn from.
        Degenerate: Every run failed.
    """
    started = time.monotonic()
    check_count("checks", "num_datasets", num_datasets)
    check_count("checks", "num_samples", num_samples)
    if budget is not None and not budget > 0:
        raise InvalidValue(
            f"run_calibration: budget is a positive number of seconds, got {budget}."
        )
    algorithm = _algorithm_of(model, algorithm)
    key_data, key_runs = jax.random.split(typed_key(key, "run_calibration"))
    pairs = simulate_pairs(
        model, key_data, args, kwargs, observed, num_datasets, designs, algorithm
    )
    keys = jax.random.split(key_runs, num_datasets)
    work = _Work(model, algorithm, pairs, num_samples, started, budget)
    run = _run_mapped if getattr(algorithm, "traceable", False) else _run_one_by_one
    try:
        run(work, keys)
    except KeyboardInterrupt:
        work.stopped = "interrupted"
    return work.result()


def _algorithm_of(model: Any, algorithm: Any) -> Any:
    if algorithm is not None:
        return algorithm
    if model.algorithm is not None:
        return model.algorithm
    from abduce.inference.mcmc.algorithms import nuts

    return nuts()


@dataclass(eq=False)
class _Work:
    """Runs in progress."""

    model: Any
    algorithm: Any
    pairs: PriorPredictive
    num_samples: int
    started: float
    budget: float | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    num_warned: int = 0
    first_warning: str = ""
    stopped: str = ""

    def is_over(self) -> bool:
        """Whether the budget is spent, with something to show for it."""
        late = self.budget is not None and time.monotonic() - self.started > self.budget
        if late and (self.rows or self.failures):
            self.stopped = "budget"
        if not self.rows and len(self.failures) >= _HOPELESS:
            return True
        return bool(self.stopped)

    def add(self, number: int, row: dict[str, Any]) -> None:
        """Keeps a run, or counts it as failed."""
        reason = _reason_to_fail(row, self.pairs)
        if reason:
            self.failures.append(f"data set {number}: {reason}")
        else:
            self.rows.append({"number": number, **row})

    def result(self) -> Calibration:
        if not self.rows:
            if self.stopped == "interrupted":
                raise KeyboardInterrupt
            raise Degenerate(
                f"checks: all {len(self.failures)} runs of {self.algorithm!r} failed; the first, "
                f"{self.failures[0]}"
            )
        index = np.array([r["number"] for r in self.rows])
        truths = {a: x[index] for a, x in self.pairs.truths.items()}

        def stacked(name):
            if any(r.get(name) is None for r in self.rows):
                return None
            values = np.stack([r[name] for r in self.rows]).astype(np.float64)
            values = np.where(np.isnan(values), -np.inf, values)
            return values[:, 0], values[:, 1:]

        draws = {a: np.stack([r["draws"][a] for r in self.rows]) for a in truths}
        return Calibration(
            truths=truths,
            draws=draws,
            observed={a: x[index] for a, x in self.pairs.observed.items()},
            counts=np.array([r["count"] for r in self.rows]),
            log_joint=stacked("log_joint"),
            log_posterior=stacked("log_posterior"),
            num_wanted=self.pairs.num_datasets,
            failures=tuple(self.failures),
            num_warned=self.num_warned,
            first_warning=self.first_warning,
            stopped=self.stopped,
            seconds=time.monotonic() - self.started,
            title=f"{self.algorithm!r} on `{self.model.name}`",
        )


def _reason_to_fail(row: dict[str, Any], pairs: PriorPredictive) -> str:
    if row.get("error"):
        return row["error"]
    for address in pairs.truths:
        x = row["draws"][address][: max(row["count"], 1)]
        if np.issubdtype(x.dtype, np.floating) and np.isnan(x).any():
            return f"{int(np.isnan(x).sum())} NaN in the draws of {address!r}"
    return "" if row["count"] else "all draws have weight zero or NaN"


def _run_one_by_one(work: _Work, keys: Any) -> None:
    pairs = work.pairs
    configured = work.algorithm(work.model)
    for i in range(pairs.num_datasets):
        if work.is_over():
            return
        args, kwargs, given, truth = pairs.dataset(i)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AbduceWarning)
            try:
                post = configured.posterior(keys[i], *args, given=given, **kwargs)
            except _MISUSE:
                raise
            except Exception as error:  # counted and reported: a posterior must not raise
                work.add(i, {"error": f"{type(error).__name__}: {error}"})
                continue
        if any("interrupted after" in message for message in post.warnings):
            work.stopped = "interrupted"  # the algorithm caught it: this run is not whole
            return
        if post.warnings:
            work.num_warned += 1
            work.first_warning = work.first_warning or post.warnings[0]
        draws, count = _independent(post, pairs, work.num_samples, keys[i])
        row: dict[str, Any] = {"draws": draws, "count": count}
        if count:
            points = {a: np.concatenate([truth[a][None], x]) for a, x in draws.items()}
            points = pairs.visible(points)
            row["log_joint"] = density_at(work.model, points, given, args, kwargs)
            if (q := posterior_model(work.algorithm, work.model, post)) is not None:
                row["log_posterior"] = density_at(q, points, {}, (given, *args), kwargs)
        work.add(i, row)


def _independent(
    post: Any, pairs: PriorPredictive, num: int, key: Any
) -> tuple[dict[str, np.ndarray], int]:
    """`num` draws, of which the first `count` are about independent."""
    total = post.num_chains * post.num_draws
    on = {a: np.asarray(x) for a, x in post.active.items() if a in pairs.truths}
    raw = {a: pairs.hidden(a, np.asarray(post.draws[a]), on.get(a)) for a in pairs.truths}
    if post.log_weights is not None:
        log_weights = np.asarray(post.log_weights, np.float64).reshape(-1)
        if np.isnan(log_weights).any() or not np.isfinite(log_weights.max()):
            count, index = 0, np.zeros(num, int)
        else:
            w = np.exp(log_weights - log_weights.max())
            count = min(num, total, int(weights_ess(log_weights) + 0.5))
            seed = np.asarray(jax.random.key_data(key)).tolist()
            index = np.random.default_rng(seed).choice(total, num, p=w / w.sum())
    else:
        count = max(min(num, total, _effective(raw)), 1)
        spread = ((np.arange(count) + 0.5) * total / count).astype(int)
        index = np.concatenate([spread, np.zeros(num - count, int)])
    return {a: x.reshape(total, *x.shape[2:])[index] for a, x in raw.items()}, count


def _effective(draws: Mapping[str, np.ndarray]) -> int:
    """Smallest effective sample size over all scalars that vary, bulk and tail."""
    least = math.inf
    for x in draws.values():
        if x.shape[1] < 4 or not x.size:
            continue
        x = x.astype(np.float64)
        x = np.where(np.isneginf(x), np.where(np.isfinite(x), x, np.inf).min() - 1, x)
        for size in (ess_bulk, ess_tail):
            sizes = np.ravel(size(x))
            sizes = sizes[np.isfinite(sizes)]
            least = min(least, sizes.min()) if sizes.size else least
    return int(least) if math.isfinite(least) else next(iter(draws.values())).shape[1]


def _run_mapped(work: _Work, keys: Any) -> None:
    pairs = work.pairs
    n = pairs.num_datasets
    per_run = getattr(work.algorithm, "num_samples", 1000) * pairs.size
    chunk = max(1, min(n, 100, _PER_CALL // max(per_run, 1)))
    for start in range(0, n, chunk):
        if work.is_over():
            return
        index = np.minimum(np.arange(start, start + chunk), n - 1)  # one shape, one program
        out = mapped_runs(work.model, work.algorithm, pairs, keys[index], index, work.num_samples)
        for j, i in enumerate(range(start, min(start + chunk, n))):
            row = {
                name: None if out[name] is None else out[name][j]
                for name in ("log_joint", "log_posterior")
            }
            active = {a: x[j] for a, x in out["active"].items()}
            row["draws"] = {
                a: pairs.hidden(a, x[j], active.get(a)) for a, x in out["draws"].items()
            }
            row["count"] = int(out["count"][j])
            work.add(i, row)
