"""What calibration checks look at: true values, data, and draws of the posteriors of the data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from abduce.errors import InvalidValue
from abduce.inference.table import element_labels

__all__ = ["Calibration"]

_FEWEST = 20  # effective draws in the median run, below which errors of its law are hidden


@dataclass(frozen=True, eq=False)
class Calibration:
    """True values, and draws of the posteriors of the data that they produced.

    Made by `run_calibration`, or by hand from anything that infers:

        >>> runs = Calibration(truths={"mu": mu}, draws={"mu": draws})

    Attributes:
        truths: By address, `(dataset, ...)`.
        draws: By address, `(dataset, draw, ...)`: about independent, equally weighted. Sites in a
            branch that was not taken are `-inf`.
        observed: The data, by address, `(dataset, ...)`.
        counts: How many of a data set's draws count, the first ones, `(dataset,)`; None for all.
        log_joint: `log p(theta, x)` at the true values and at the draws, `(dataset,)` and
            `(dataset, draw)`, in nats; None where the model has no density.
        log_posterior: Log density of the posterior itself there, where it has one; else None.
        num_wanted: Data sets asked for; None: as many as there are.
        failures: A message for each run that raised or gave NaN. They are in no array above.
        num_warned: Runs whose posterior came with warnings.
        first_warning: The first of those.
        stopped: "", "budget" or "interrupted".
        seconds: Taken in all.
        title: What was checked, for print.
    """

    truths: Mapping[str, np.ndarray]
    draws: Mapping[str, np.ndarray]
    observed: Mapping[str, np.ndarray] = field(default_factory=dict)
    counts: np.ndarray | None = None
    log_joint: tuple[np.ndarray, np.ndarray] | None = None
    log_posterior: tuple[np.ndarray, np.ndarray] | None = None
    num_wanted: int | None = None
    failures: tuple[str, ...] = ()
    num_warned: int = 0
    first_warning: str = ""
    stopped: str = ""
    seconds: float = 0.0
    title: str = "posterior"

    def __post_init__(self) -> None:
        if not self.truths or set(self.truths) != set(self.draws):
            raise InvalidValue(
                f"Calibration: truths ({', '.join(self.truths) or 'none'}) and draws "
                f"({', '.join(self.draws) or 'none'}) must have the same addresses."
            )
        size = {np.shape(x)[:2] for x in self.draws.values()}
        for address, x in self.draws.items():
            shape, truth = np.shape(x), np.shape(self.truths[address])
            if len(shape) < 2 or len(size) > 1 or shape[:1] + shape[2:] != truth:
                raise InvalidValue(
                    f'Calibration: draws["{address}"] has shape {shape}, expected (dataset, draw, '
                    f"...) for true values of shape {truth}, alike for every address."
                )

    @property
    def num_datasets(self) -> int:
        """Data sets that count: those whose run did not fail."""
        return len(next(iter(self.truths.values())))

    @property
    def num_draws(self) -> int:
        """Most draws of a data set."""
        return np.shape(next(iter(self.draws.values())))[1]

    @property
    def used(self) -> np.ndarray:
        """How many draws of each data set count, `(dataset,)`."""
        n = self.num_datasets
        return np.full(n, self.num_draws) if self.counts is None else np.asarray(self.counts)

    @property
    def share_failed(self) -> float:
        """Failed runs among those made."""
        made = self.num_datasets + len(self.failures)
        return len(self.failures) / made if made else math.nan

    def is_complete(self, max_failed: float) -> bool:
        """Whether few enough runs failed, and draws are enough, for a check to mean something."""
        return self.share_failed <= max_failed and not self._is_starved

    @property
    def _is_starved(self) -> bool:
        return bool(np.median(self.used) < min(_FEWEST, self.num_draws))

    def elements(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Every scalar: labels, true values `(dataset, k)`, draws `(dataset, draw, k)`."""
        labels, truths, draws = [], [], []
        n, s = self.num_datasets, self.num_draws
        for address, truth in self.truths.items():
            names = element_labels(address, np.shape(truth)[1:])
            labels += names
            truths.append(np.asarray(truth).reshape(n, len(names)).astype(np.float64))
            draws.append(np.asarray(self.draws[address]).reshape(n, s, len(names)))
        return labels, np.concatenate(truths, 1), np.concatenate(draws, 2).astype(np.float64)

    def features(self) -> np.ndarray:
        """The data as vectors, `(dataset, k)`, float64."""
        if not self.observed:
            raise InvalidValue(
                "Calibration: the runs hold no data. Pass observed={address: (dataset, ...)}."
            )
        n = self.num_datasets
        rows = [
            np.asarray(x).reshape(n, math.prod(np.shape(x)[1:])) for x in self.observed.values()
        ]
        return np.concatenate(rows, 1).astype(np.float64)

    def notes(self) -> tuple[str, ...]:
        """What a reader of any check of these runs must know."""
        found = []
        wanted = self.num_wanted or self.num_datasets + len(self.failures)
        if self.stopped:
            why = "the budget ran out" if self.stopped == "budget" else "interrupted"
            done = self.num_datasets + len(self.failures)
            found.append(f"Only {done} of {wanted} data sets were run: {why}.")
        if self.failures:
            found.append(
                f"{len(self.failures)} of {self.num_datasets + len(self.failures)} runs failed "
                f"and are not in the ranks; the first: {self.failures[0]}"
            )
        if self.counts is not None and self.num_datasets:
            low, mid = np.min(self.counts), np.median(self.counts)
            if low < self.num_draws:
                found.append(
                    f"Draws were thinned to about independent ones: {mid:.0f} of {self.num_draws} "
                    f"in the median run, {low} in the worst."
                    + (
                        f" Fewer than {_FEWEST} are too few to pass: let the algorithm draw more."
                        if self._is_starved
                        else ""
                    )
                )
        if self.num_warned:
            found.append(f"{self.num_warned} runs gave warnings; the first: {self.first_warning}")
        return tuple(found)

    def select(self, index: Any) -> Calibration:
        """The runs with these numbers."""

        def take(x):
            return None if x is None else np.asarray(x)[index]

        def pair(p):
            return None if p is None else (take(p[0]), take(p[1]))

        return dataclasses.replace(
            self,
            truths={a: take(x) for a, x in self.truths.items()},
            draws={a: take(x) for a, x in self.draws.items()},
            observed={a: take(x) for a, x in self.observed.items()},
            counts=take(self.counts),
            log_joint=pair(self.log_joint),
            log_posterior=pair(self.log_posterior),
        )
