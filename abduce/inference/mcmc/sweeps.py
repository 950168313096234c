"""Runs a compiled Markov chain in chunks: bounded memory, a progress bar, interrupts that keep."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.inference.mcmc.report import split_rhat

__all__ = ["ENOUGH", "Bar", "is_traced", "run_sweeps", "unmixed"]

_SECONDS_BEFORE_BAR = 2.0
ENOUGH = 50  # draws per chain, below which warnings would be chance
_RHAT = 1.1  # of a site's worst element, above which chains count as not mixed


def is_traced(tree: Any) -> bool:
    """Whether an array of the tree is a tracer, as under an outer `jax.vmap`."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


class Bar:
    """A progress bar that appears once a run takes long.

    Args:
        name: Of the algorithm.
        total: Iterations in all.
        show: Whether to show it at all.
    """

    def __init__(self, name: str, total: int, show: bool = True):
        self.name, self.total, self.show = name, total, show
        self._begin = time.perf_counter()
        self._bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, what: str = "sampling") -> None:
        """Shows that so many iterations are done."""
        if not self.show:
            return
        if self._bar is None:
            if time.perf_counter() - self._begin < _SECONDS_BEFORE_BAR:
                return
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
            from rich.progress import TimeRemainingColumn as Remaining

            self._bar = Progress(
                TextColumn(f"ab.{self.name} {{task.description}}"), BarColumn(),
                MofNCompleteColumn(), Remaining(), transient=True, refresh_per_second=4,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total)
        self._bar.update(self._task, completed=done, description=what)


def run_sweeps(
    name: str,
    advance: Callable[..., Any],
    state: Any,
    key: Any,
    *,
    num_warmup: int,
    num_samples: int,
    thinning: int = 1,
    chunk: int = 250,
    progress_bar: bool = True,
) -> tuple[Any, Any, Any, list[str]]:
    """Runs warm-up and sampling.

    Args:
        name: Of the algorithm, for messages.
        advance: `(state, key, count, thinning, warming) -> (state, outputs)`, compiled; outputs
            have leading axes `(chain, chunk)`, of which the first `count` are meant.
        state: The chains.
        key: Random key.
        num_warmup, num_samples, thinning: As users set them.
        chunk: Iterations per call.
        progress_bar: Whether to show progress.

    Returns:
        The state; the outputs of sampling, `(chain, num_samples // thinning, ...)`, on the host
        unless traced; the last outputs of the warm-up or None; and messages.
    """
    kept = num_samples // thinning
    parts: list[Any] = []
    messages: list[str] = []
    warm: Any = None
    done, calls = -num_warmup, 0
    with Bar(name, num_warmup + num_samples, progress_bar) as bar:
        try:
            while done < kept:
                warming = done < 0
                count = min(chunk, -done if warming else kept - done)
                each = 1 if warming else thinning
                call_key = jax.random.fold_in(key, calls)
                state, out = advance(state, call_key, count, each, warming)
                calls += 1
                if warming:
                    warm = out
                else:
                    parts.append(out if is_traced(out) else jax.device_get(out))
                done += count
                bar.update(
                    done + num_warmup if warming else num_warmup + done * thinning,
                    "warm-up" if warming else "sampling",
                )
        except KeyboardInterrupt:
            if not parts:
                raise
            messages.append(
                f"ab.{name}: interrupted after {len(parts) * chunk} of {kept} draws per chain; "
                f"those are returned."
            )
    join = jnp.concatenate if is_traced(parts) else np.concatenate
    draws = jax.tree.map(lambda *xs: join(xs, 1)[:, :kept], *parts)
    return state, draws, warm, messages


def unmixed(name: str, draws: Mapping[str, Any], remedy: str) -> list[str]:
    """A message where chains disagree, by split R-hat; of short runs it says nothing.

    Args:
        name: Of the algorithm.
        draws: By address, `(chain, draw, ...)`.
        remedy: What the reader can do.
    """
    worst = {}
    for address, x in draws.items():
        x = np.asarray(x, np.float64)
        if x.shape[1] >= ENOUGH and np.isfinite(x).all():
            worst[address] = float(np.max(split_rhat(x), initial=1.0))
    if not worst or max(worst.values()) < _RHAT:
        return []
    address = max(worst, key=lambda a: worst[a])
    return [
        f"ab.{name}: the chains have not mixed: split R-hat is {worst[address]:.2f} for "
        f"{address!r}. {remedy}"
    ]
