"""Splits a run into calls that are short enough to notice an interrupt, and shows progress."""

import time
from typing import Any

import numpy as np

from .chains import Chains, Draws, joined
from .settings import HMCConfig

__all__ = ["Pacer"]

_SECONDS_PER_CALL = 0.3
_SECONDS_BEFORE_BAR = 2.0
_FIRST_CALL = 50  # draws


class Pacer:
    """Advances chains in calls of about `_SECONDS_PER_CALL`.

    Attributes:
        interrupted: Whether a keyboard interrupt ended the last `advance`.
    """

    def __init__(self, chains: Chains, config: HMCConfig):
        self.chains, self.config = chains, config
        self.interrupted = False
        self._per_call: int | None = None
        self._begin = time.perf_counter()
        self._bar: Any = None
        self._task: Any = None
        self._done = 0

    def advance(
        self, num_draws: int, metric, *, keep_on_interrupt: bool = False, **options
    ) -> Draws:
        """As `Chains.advance`, for any number of draws.

        Args:
            num_draws: Kept draws per chain.
            metric: The linear map.
            keep_on_interrupt: Return the draws so far instead of raising, if there are any.
            **options: As for `Chains.advance`.
        """
        parts: list[Draws] = []
        done = 0
        while done < num_draws:
            count = min(
                num_draws - done,
                self._draws_per_call(options.get("thinning", 1)),
                self.chains.max_draws(),
            )
            begin = time.perf_counter()
            try:
                parts.append(
                    self.chains.advance(
                        count, metric, target=self.config.target_accept_prob, **options
                    )
                )
            except KeyboardInterrupt:
                if not (keep_on_interrupt and parts):
                    raise
                self.interrupted = True
                break
            seconds = max(time.perf_counter() - begin, 1e-6)
            self._per_call = max(1, int(min(4 * count, count * _SECONDS_PER_CALL / seconds)))
            done += count
            self._show(count, keep_on_interrupt)
        return joined(parts)

    def _draws_per_call(self, thinning: int) -> int:
        if self._per_call is None:  # before the first draws: from the cost of a gradient
            seconds = self.chains.seconds_per_gradient() * 16 * self.chains.num_chains
            self._per_call = int(np.clip(_SECONDS_PER_CALL / max(seconds, 1e-9), 1, _FIRST_CALL))
        return max(1, self._per_call // thinning)

    def _show(self, count: int, sampling: bool) -> None:
        if not self.config.progress_bar:
            return
        self._done += count * (self.config.thinning if sampling else 1)
        if self._bar is None:
            if time.perf_counter() - self._begin < _SECONDS_BEFORE_BAR:
                return
            self._open()
        chains = self.chains
        self._bar.update(
            self._task,
            completed=self._done,
            total=None if not sampling else self._total,
            description="sampling" if sampling else "warm-up",
            steps=f"{chains.num_gradients:,} gradients",
        )

    def start_sampling(self, warmup_draws: int) -> None:
        """Tells how much of the run is behind, now that the length of the warm-up is known."""
        self._done = warmup_draws
        self._total = warmup_draws + self.config.num_samples

    def _open(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self._bar = Progress(
            TextColumn(f"ab.{self.config.kind} {{task.description}}"),
            BarColumn(),
            MofNCompleteColumn(),
            Remaining(),
            TextColumn("{task.fields[steps]}"),
            transient=True,
            refresh_per_second=4,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=None, steps="")

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
