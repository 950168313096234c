"""`ab.vi`: variational inference as an algorithm."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from abduce.errors import InitializationError, InvalidAlgorithm
from abduce.inference.algorithm import Algorithm, algorithm, check_count
from abduce.inference.posterior import Posterior, make_posterior
from abduce.inference.problem import Problem
from abduce.inference.psis import khat_threshold, psis, weights_ess
from abduce.inference.vi.expectation import Expectation
from abduce.inference.vi.guides import Family, mean_field
from abduce.inference.vi.objectives import fivo
from abduce.inference.vi.strategies import Strategy
from abduce.inference.vi.training import Fit, Training, train
from abduce.ppl.model import Model

__all__ = ["vi"]


@algorithm
class vi(Algorithm):
    """Variational inference: fits a guide `q` to the posterior, and the model's parameters.

    Args:
        guide: A family of `ab.guides`, over the unconstrained coordinates of continuous latents;
            or a Model called as `guide(given, *args)` with the model's latents, whose `ab.param`
            sites are fitted (a network of the data makes it amortized). With
            `ab.objectives.fivo`: the proposal of a step, `guide(given, carry, x)`, or None.
        objective: From `ab.objectives`, or a function of `p` and `q`; None: the ELBO, for families
            with path derivatives by `ab.objectives.sticking_the_landing()`.
        optimizer: An optax transformation; None: Adam with a rate that falls to a hundredth of
            itself, from 0.02 for normal families, 0.003 for flows, 0.001 for Models.
        num_steps: Optimizer steps.
        num_particles: Draws whose gradients are averaged at each step; None: 16 for families, 1
            for Models.
        batch: The data axis of arguments (by name) and observed sites: `{"X": 0, "y": 0}`. Each
            step sees `batch_size` random rows; all sites whose size follows the rows are scaled.
        batch_size: Rows of a step.
        grad: Gradient strategies by address, in place of the guide's own.
        num_samples: Draws of the posterior.
        num_starts: Fits from different starting points; the best one is returned, and a warning
            tells if they disagree.
        patience: Stop when the mean objective has not risen in so many twentieths of the run;
            None: never.
        init: Starting points, as in `ab.nuts` (families).
        params: Parameters to start from, as in `post.params`.
        checkpoint_dir: A folder for checkpoints; a stopped run resumes from it, to the same result.
        progress_bar: Show progress in runs that take long.

    The posterior holds equally weighted draws from the guide. `post.params` are the fitted
    parameters, `post.as_model()` is the fitted guide (for `ab.importance(proposal=...)`), and the
    diagnostics are `objective` (each step), `elbo`, `pareto_k` and `ess` of the importance
    weights, and `num_nonfinite` (steps skipped because a number was not finite). A
    `KeyboardInterrupt` ends the fit and returns what there is.

    Raises (on use):
        InvalidAlgorithm: The guide's latents are not the model's; `batch=` names nothing.
        DiscreteLatent: A family is asked to cover a discrete latent.

    Example:
        >>> post = ab.vi(guide=ab.guides.full_rank())(model).posterior(key, given={"y": y})
        >>> post.diagnostics["pareto_k"]
    """

    guide: Any = None
    objective: Any = None
    optimizer: Any = None
    num_steps: int = 4000
    num_particles: int | None = None
    batch: Any = None
    batch_size: int | None = None
    grad: Any = None
    num_samples: int = 4000
    num_starts: int = 1
    patience: int | None = None
    init: Any = None
    params: Any = None
    checkpoint_dir: Any = None
    progress_bar: bool = True

    def __post_init__(self):
        for field in ("num_steps", "num_samples", "num_starts"):
            check_count("vi", field, getattr(self, field))
        for field in ("num_particles", "patience", "batch_size"):
            if getattr(self, field) is not None:
                check_count("vi", field, getattr(self, field))
        if self.objective is not None and (
            isinstance(self.objective, type) or not callable(self.objective)
        ):
            raise InvalidAlgorithm(
                f"ab.vi: objective= takes ab.objectives.elbo(), one of its siblings, or a function "
                f"of p and q; got {self.objective!r}."
            )
        if (self.batch is None) != (self.batch_size is None):
            raise InvalidAlgorithm("ab.vi: batch= and batch_size= come together.")
        for field in ("batch", "grad"):
            value = getattr(self, field)
            if isinstance(value, Mapping):
                object.__setattr__(self, field, tuple(value.items()))
        for _, strategy in self.grad or ():
            if not isinstance(strategy, Strategy):
                raise InvalidAlgorithm(
                    f"ab.vi: grad= takes strategies such as ab.grad.score(), got {strategy!r}."
                )

    @property
    def needs_density(self) -> bool:  # type: ignore[override]
        """Not for objectives that only simulate."""
        return not getattr(self.objective, "simulates", False)

    def run(self, problem: Problem, key: Any) -> Posterior:
        if problem.is_traced or isinstance(key, jax.core.Tracer):
            raise InvalidAlgorithm(
                "ab.vi trains between compiled calls, so it cannot run inside jax.jit or jax.vmap. "
                "Loop over the data sets in Python: with equal shapes nothing is compiled again; "
                "or fit one amortized guide."
            )
        if self.guide is not None and not isinstance(self.guide, (Family, Model)):
            shown = getattr(self.guide, "__name__", None) or type(self.guide).__name__
            raise InvalidAlgorithm(
                f"ab.vi: guide= takes a family such as ab.guides.full_rank() or a Model, got "
                f"{shown}."
            )
        problem.require_latents("ab.vi")
        task = self._task(problem)
        k1, k2, k3 = jax.random.split(key, 3)
        fits = [self._fit(task, k, i) for i, k in enumerate(jax.random.split(k1, self.num_starts))]
        means = [_tail_mean(f.values) for _, f in fits]
        best = int(np.nanargmax(np.where(np.isnan(means), -np.inf, means)))
        fitted, fit = fits[best]
        messages = task.warnings() + _messages(self, task, fit, means)
        diagnostics: dict[str, Any] = {
            "objective": fit.values,
            "num_nonfinite": fit.num_nonfinite,
            "num_steps": len(fit.values),
        }
        if self.num_starts > 1:
            diagnostics["objective_of_starts"] = np.asarray(means)
        if hasattr(task, "posterior"):  # draws by an algorithm of its own
            return task.posterior(fit, k2, diagnostics, messages)
        draws, active, log_w = task.draw(fitted, fit.params, k2, self.num_samples)
        if log_w is not None:
            messages += _weigh(log_w, diagnostics, self.num_samples)
        if fit.num_nonfinite:
            messages.append(task.blame(fitted, fit, k3))
        post = make_posterior(
            problem, draws, algorithm="vi", diagnostics=diagnostics, messages=messages,
            active=active, resume={"guide": task.fitted_model(fitted, fit.params)},
        )  # fmt: skip
        return dataclasses.replace(
            post, params=task.public(fit.params), arguments=task.fitted_arguments(fit.params)
        )

    def _task(self, problem: Problem) -> Any:
        from abduce.inference.vi.filter_task import FilterTask
        from abduce.inference.vi.tasks import FlatTask, ModelTask

        if isinstance(self.objective, fivo):
            if isinstance(self.guide, Family):
                raise InvalidAlgorithm(
                    f"ab.vi: with ab.objectives.fivo, guide= is the proposal of a step, a Model "
                    f"called as guide(given, carry, x), or None; got {self.guide!r}."
                )
            return FilterTask(self, self.guide, problem)
        guide = mean_field() if self.guide is None else self.guide
        if isinstance(guide, Family):
            return FlatTask(self, guide, problem)
        return ModelTask(self, guide, problem)

    def _fit(self, task: Any, key: Any, number: int) -> tuple[Any, Fit]:
        k1, k2 = jax.random.split(key)
        fitted, params = task.prepare(k1)
        if self.params is not None:
            params = task.private(self.params, params)
        objective = self.objective or task.default_objective(fitted)
        program = Expectation(task.program(fitted, objective), tuple(self.grad or ()))
        optimizer = self.optimizer or _adam(task.rate, self.num_steps)
        plan = program.strategies(params, task.data)
        config = Training(
            program, optimizer, self.num_particles or task.num_particles, self.num_steps,
            max(1, min(500, -(-self.num_steps // 20))), task.slice_data,
            tuple(a for a, s in plan.items() if getattr(s, "baseline", None) == "running_mean"),
            program.has_learned_baselines(params, task.data),
        )  # fmt: skip
        fit = train(
            config, params, k2, task.data, patience=self.patience,
            checkpoint_dir=self.checkpoint_dir, progress_bar=self.progress_bar, tag=str(number),
        )  # fmt: skip
        return fitted, fit


@functools.lru_cache(maxsize=64)
def _adam(rate: float, num_steps: int) -> Any:
    """One object per setting, so that a second call finds what the first has compiled."""
    return optax.adam(optax.cosine_decay_schedule(rate, num_steps, 0.01))


def _tail_mean(values: np.ndarray) -> float:
    """The mean objective over the last tenth of the steps that were finite."""
    tail = values[-max(1, len(values) // 10) :]
    tail = tail[np.isfinite(tail)]
    return float(tail.mean()) if len(tail) else float("nan")


def _messages(alg: vi, task: Any, fit: Fit, means: list[float]) -> list[str]:
    messages = []
    if not np.isfinite(fit.values).any():
        raise InitializationError(
            f"ab.vi: the objective was never finite in {len(fit.values)} steps: "
            f"{task.explain_start()} Pass init= or other starting parameters, or check the data."
        )
    if fit.stopped == "interrupted":
        messages.append(
            f"ab.vi: interrupted after {len(fit.values)} of {alg.num_steps} steps; the guide is as "
            f"it was then."
        )
    found = np.asarray(means)
    if len(found) > 1:
        spread = np.nanmax(found) - np.nanmin(found)
        tail = fit.values[-max(10, len(fit.values) // 10) :]
        tail = tail[np.isfinite(tail)]
        noise = tail.std() / np.sqrt(max(len(tail), 1))
        if not spread <= max(0.5, 6 * noise):
            messages.append(
                f"ab.vi: {len(found)} starts ended at objectives from {np.nanmin(found):.2f} to "
                f"{np.nanmax(found):.2f}: the fit depends on where it starts (several modes, or "
                f"too few steps). The best one is returned. Raise num_steps, or use a richer guide."
            )
    return messages


def _weigh(log_w: np.ndarray, diagnostics: dict[str, Any], n: int) -> list[str]:
    """Adds what the importance weights say; a message where they are uneven."""
    log_w = np.where(np.isnan(log_w), -np.inf, np.asarray(log_w, np.float64))
    smoothed, k = psis(log_w)
    diagnostics["elbo"] = float(log_w.mean())
    diagnostics["elbo_se"] = float(log_w.std() / np.sqrt(n))
    diagnostics["pareto_k"] = float(k)
    diagnostics["ess"] = float(weights_ess(smoothed))
    threshold = min(khat_threshold(max(n, 2)), 0.7)
    if k <= threshold:
        return []
    return [
        f"ab.vi: Pareto k is {float(k):.2f} (above {threshold:.2f}): the guide is far from the "
        f"posterior, so its means and intervals may be off. Use a richer guide "
        f"(ab.guides.full_rank(), ab.guides.flow()), correct it with "
        f"ab.importance(proposal=post), or use ab.nuts."
    ]
