"""Settings of HMC and NUTS, and what a run hands back."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from abduce.errors import InvalidAlgorithm

__all__ = ["HMCConfig", "HMCRun"]


@dataclass(frozen=True)
class HMCConfig:
    """Settings of one run; hashable.

    Attributes:
        num_warmup: Most warm-up draws per chain.
        num_samples: Draws per chain after the warm-up; `num_samples // thinning` are kept.
        num_chains: Chains.
        thinning: Keep each n-th draw.
        target_accept_prob: Mean acceptance rate that the step size is adapted to. The one kept
            is the most efficient one near it; its rate may be 0.1 higher or, where the curvature is
            even, lower.
        max_tree_depth: Most doublings of a NUTS trajectory (`2**max_tree_depth - 1` steps).
        dense_mass: None lets the warm-up choose; False a diagonal, True a dense metric.
        step_size: Initial step size, in whitened coordinates; None searches one.
        kind: "nuts" or "hmc".
        num_steps: Leapfrog steps of an HMC trajectory.
        trajectory_length: Instead of `num_steps`: steps times step size, in whitened coordinates.
        adapt_step_size: Adapt the step size during the warm-up.
        adapt_mass_matrix: Adapt the metric during the warm-up.
        end_warmup_early: End the warm-up when a refit would not help and the chains agree.
        chain_method: "auto", "threads" (one program called from threads) or "vectorized".
        progress_bar: Show one when the run takes more than about two seconds.
    """

    num_warmup: int = 1000
    num_samples: int = 1000
    num_chains: int = 4
    thinning: int = 1
    target_accept_prob: float = 0.8
    max_tree_depth: int = 10
    dense_mass: bool | None = None
    step_size: float | None = None
    kind: str = "nuts"
    num_steps: int | None = None
    trajectory_length: float | None = None
    adapt_step_size: bool = True
    adapt_mass_matrix: bool = True
    end_warmup_early: bool = True
    chain_method: str = "auto"
    progress_bar: bool = True

    def __post_init__(self):
        for name, least in (
            ("num_warmup", 0),
            ("num_samples", 1),
            ("num_chains", 1),
            ("thinning", 1),
            ("max_tree_depth", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
                raise InvalidAlgorithm(
                    f"{self.kind}: {name}={value!r}; expected an integer of at least {least}."
                )
        if self.max_tree_depth > 20:
            raise InvalidAlgorithm(
                f"{self.kind}: max_tree_depth={self.max_tree_depth}; expected at "
                "most 20, which is a million steps a draw."
            )
        if self.thinning > self.num_samples:
            raise InvalidAlgorithm(
                f"{self.kind}: thinning={self.thinning} keeps no draw of num_samples="
                f"{self.num_samples}; expected thinning <= num_samples."
            )
        if not 0 < self.target_accept_prob < 1:
            raise InvalidAlgorithm(
                f"{self.kind}: target_accept_prob={self.target_accept_prob!r}; "
                "expected a number between 0 and 1, such as 0.8."
            )
        if self.step_size is not None and not 0 < self.step_size < np.inf:
            raise InvalidAlgorithm(
                f"{self.kind}: step_size={self.step_size!r}; expected a positive number, or None."
            )
        if self.kind not in ("nuts", "hmc"):
            raise InvalidAlgorithm(f"kind={self.kind!r}; expected 'nuts' or 'hmc'.")
        if self.kind == "hmc" and (self.num_steps is None) == (self.trajectory_length is None):
            raise InvalidAlgorithm(
                f"hmc: num_steps={self.num_steps!r} and trajectory_length="
                f"{self.trajectory_length!r}; give num_steps or trajectory_length, and not both."
            )
        for name in ("num_steps", "trajectory_length"):
            value = getattr(self, name)
            if value is not None and not 0 < value < np.inf:
                raise InvalidAlgorithm(
                    f"{self.kind}: {name}={value!r}; expected a positive number."
                )
        if self.chain_method not in ("auto", "threads", "vectorized"):
            raise InvalidAlgorithm(
                f"{self.kind}: chain_method={self.chain_method!r}; expected "
                "'auto', 'threads' or 'vectorized'."
            )


@dataclass
class HMCRun:
    """What a run hands back; all arrays are numpy.

    Attributes:
        positions: `(num_chains, num_draws, dim)`.
        stats: `(num_chains, num_draws)` each: `lp`, `energy` (nats), `n_steps`, `tree_depth`,
            `acceptance_rate`, `diverging`, `step_size`.
        warmup: Result of the warm-up.
        num_gradients_warmup: Gradient evaluations up to the first kept draw, all chains.
        num_gradients_sampling: Those after it.
        step_size: In use while sampling.
        metric_kind: "diagonal", "low rank" or "dense".
        warnings: What the reader must know, each with a remedy.
        interrupted: True if stopped from the keyboard; then there are fewer draws.
    """

    positions: np.ndarray
    stats: dict[str, np.ndarray]
    warmup: Any
    num_gradients_warmup: int
    num_gradients_sampling: int
    step_size: float
    metric_kind: str
    warnings: list[str] = field(default_factory=list)
    interrupted: bool = False
