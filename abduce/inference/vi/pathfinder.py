"""`ab.pathfinder`: normal approximations along quasi-Newton paths to the mode.

Reference: Zhang, Carpenter, Gelman and Vehtari, "Pathfinder: parallel quasi-Newton variational
inference", Journal of Machine Learning Research 23 (2022). L-BFGS climbs from a tail of the
posterior to its mode. Each iterate gives a normal, from its gradient and the inverse Hessian that
L-BFGS knows there (`path_normals`). Kept is the one with the largest ELBO, which is usually
reached before the mode.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp

from abduce.errors import Degenerate, InvalidAlgorithm
from abduce.inference.algorithm import Algorithm, algorithm, check_count
from abduce.inference.init import starting_points
from abduce.inference.laplace import _value_and_grad
from abduce.inference.posterior import Posterior, make_posterior
from abduce.inference.problem import Problem
from abduce.inference.target import constrain, make_target
from abduce.inference.vi.normal import finite_starts, refuse_tracing, weigh
from abduce.inference.vi.path_normals import Normal, local_normals, log_density, points_of

__all__ = ["pathfinder"]

_AT_ONCE = 16  # iterates whose ELBOs one compiled call estimates
_LOG_2PI = math.log(2 * math.pi)


@algorithm
class pathfinder(Algorithm):
    """Pathfinder: normal approximations along quasi-Newton paths, corrected by importance.

    Each path is an L-BFGS run from its own start. Along it, normals in unconstrained coordinates
    come from the inverse Hessian estimates, and the one with the largest ELBO is drawn from
    (Zhang, Carpenter, Gelman and Vehtari 2022). Draws of all paths together are weighted against
    the exact density, with Pareto-smoothed weights. It needs some hundred gradients for each
    path, far fewer than MCMC, and finds good starting points even where no normal fits.

    Two things differ from the paper, for less variance: the ELBOs of a path share their random
    numbers, and draws are weighted by the mixture of all paths' normals rather than by the normal
    that they came from, so that modes found by several paths are not counted several times.

    Args:
        num_paths: L-BFGS runs; 1 is single-path Pathfinder.
        num_samples: Draws in all, split evenly between the paths.
        max_steps: L-BFGS iterations of each path.
        num_elbo_draws: Draws for each estimate of an ELBO.
        history_size: Steps that make an inverse Hessian.
        init: Starting points, as in `ab.nuts`: one for each path, best far from one another.
        importance: Whether the draws carry weights (`post[a]` resamples them once). If not, all
            paths count equally, and `log_evidence` is None.

    The posterior has one chain. With `importance`, `log_evidence` is the log of the mean raw
    weight, whose exponential is unbiased. Diagnostics: `pareto_k` and `ess` of the weights,
    `log_evidence_se`, and for each path `elbo` (nats; `-inf` for a failed path), `num_steps` and
    `num_gradients`.

    Raises (on use):
        DiscreteLatent: A latent is discrete.
        InitializationError: No starting point has a finite density and gradient.
        Degenerate: No normal of any path has a draw with a density.

    Example:
        >>> post = ab.pathfinder()(model).posterior(key, given={"y": y})
        >>> exact = ab.nuts(init=post)(model).posterior(key, given={"y": y})
    """

    num_paths: int = 4
    num_samples: int = 1000
    max_steps: int = 1000
    num_elbo_draws: int = 25
    history_size: int = 6
    init: Any = None
    importance: bool = True

    def __post_init__(self):
        counts = ("num_paths", "num_samples", "max_steps", "num_elbo_draws", "history_size")
        for field in counts:
            check_count("pathfinder", field, getattr(self, field))
        if not isinstance(self.importance, bool):
            raise InvalidAlgorithm(
                f"ab.pathfinder: importance must be True or False, got {self.importance!r}."
            )

    def run(self, problem: Problem, key: Any) -> Posterior:
        refuse_tracing(problem, key, "ab.pathfinder", "climbs to the mode")
        target, data = make_target(problem, "ab.pathfinder")
        propose, describe = starting_points(
            self.init, problem, target, data, self.num_paths, "ab.pathfinder"
        )
        key_start, key_elbo, key_draw = jax.random.split(key, 3)
        starts = finite_starts(target, data, key_start, propose, describe, "ab.pathfinder")
        runs = [
            self._path(target, data, jax.random.fold_in(key_elbo, i), start)
            for i, start in enumerate(starts)
        ]
        messages = self._messages(runs)
        normals = [run.best for run in runs if run.best is not None]
        q, log_p, log_q = self._draw(target, data, key_draw, normals, starts.dtype)
        weights = weigh(log_p - log_q, "ab.pathfinder")
        if not weights.is_reliable:
            messages.append(
                f"ab.pathfinder: Pareto k is {weights.pareto_k:.2f} (above "
                f"{weights.threshold:.2f}) and the effective sample size {weights.ess:.0f} of "
                f"{self.num_samples}: the posterior is far from the normals found. The draws are "
                f"good starting points, ab.nuts(init=post); do not report intervals from them. "
                f"Other coordinates (ab.reparam) can help."
            )
        draws, active = constrain(target, data, problem.program, q)
        return make_posterior(
            problem,
            {a: x[None] for a, x in draws.items()},
            active={a: x[None] for a, x in active.items()},
            algorithm="pathfinder",
            log_weights=weights.smoothed[None] if self.importance else None,
            log_evidence=weights.log_evidence if self.importance else None,
            diagnostics={
                "pareto_k": weights.pareto_k,
                "ess": weights.ess,
                "log_evidence_se": weights.log_evidence_se,
                "elbo": np.array([run.elbo for run in runs]),
                "num_steps": np.array([run.num_steps for run in runs]),
                "num_gradients": np.array([run.num_gradients for run in runs]),
            },
            messages=messages,
        )

    def _path(self, target: Any, data: Any, key: Any, start: np.ndarray) -> Run:
        """Single-path Pathfinder up to the choice of a normal (Algorithm 1)."""
        jitter = np.random.default_rng(0).normal(size=(3, target.dim))
        num_gradients = 0
        for attempt in range(3):
            # A start at the mode itself gives no step to learn a curvature from.
            point = (start + 0.3 * attempt * jitter[attempt]).astype(start.dtype)
            found = _climb(target, data, point, self.max_steps, self.history_size)
            num_gradients += found.num_gradients
            if attempt == 0 or len(found.points) > 1:
                path = found
            if len(path.points) > 1:
                break
        best, best_score, best_step = None, (0.0, -math.inf), 0
        u = _standard_normals(self.num_elbo_draws, target.dim, start.dtype, key)
        normals = local_normals(path.points, path.gradients, self.history_size)
        while chunk := list(itertools.islice(normals, _AT_ONCE)):
            scores = _elbos(target, data, u, [normal for _, normal in chunk])
            for (step, normal), score in zip(chunk, scores, strict=True):
                if score > best_score:
                    best, best_score, best_step = normal, score, step
        num_steps = len(path.points) - 1
        return Run(
            best=best,
            elbo=best_score[1] if best_score[0] == 1 else -math.inf,
            num_steps=num_steps,
            num_gradients=num_gradients,
            is_cut=num_steps == self.max_steps == best_step,
        )

    def _draw(
        self, target: Any, data: Any, key: Any, normals: list[Normal], dtype: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws of all paths, their log densities, and those of the mixture of the normals."""
        size = -(-self.num_samples // self.num_paths)
        full = self.num_paths - (size * self.num_paths - self.num_samples)
        parts, shares = [], np.zeros(len(normals))
        for i in range(self.num_paths):
            index = i % len(normals)  # the share of a failed path goes to the others
            q, log_p = _draw(
                target, size, data, jax.random.fold_in(key, i), _cast(normals[index], dtype)
            )
            count = size if i < full else size - 1
            parts.append((np.asarray(q)[:count], np.asarray(log_p, np.float64)[:count]))
            shares[index] += count / self.num_samples
        q, log_p = (np.concatenate(x) for x in zip(*parts, strict=True))
        log_q = [
            math.log(share) + log_density(normal, q)
            for normal, share in zip(normals, shares, strict=True)
            if share > 0
        ]
        return q, log_p, logsumexp(log_q, axis=0)

    def _messages(self, runs: list[Run]) -> list[str]:
        failed = sum(run.best is None for run in runs)
        cut = sum(run.is_cut for run in runs)
        if failed == len(runs):
            raise Degenerate(
                f"ab.pathfinder: none of the normals along {failed} paths has a draw with a finite "
                f"log density. Start nearer to the posterior (init=), use other coordinates "
                f"(ab.reparam), or ab.nuts."
            )
        messages = []
        if failed:
            messages.append(
                f"ab.pathfinder: along {failed} of {len(runs)} paths no normal has a draw with a "
                f"finite log density; the other paths gave the draws. Start nearer to the "
                f"posterior (init=) if modes may be missing."
            )
        if cut:
            messages.append(
                f"ab.pathfinder: the ELBO of {cut} of {len(runs)} paths still rose after "
                f"{self.max_steps} steps. Raise max_steps."
            )
        return messages


@dataclasses.dataclass(frozen=True)
class Run:
    """What a path led to.

    Attributes:
        best: The normal with the largest ELBO; None if none of them has draws with a density.
        elbo: In nats; `-inf` if some draws have no density.
        num_steps: L-BFGS iterations.
        num_gradients: Evaluations of density and gradient.
        is_cut: Whether the last of `max_steps` iterates is the best.
    """

    best: Normal | None
    elbo: float
    num_steps: int
    num_gradients: int
    is_cut: bool


@dataclasses.dataclass(frozen=True)
class Path:
    """Iterates of L-BFGS, the start first, and gradients of the log density; float64."""

    points: list[np.ndarray]
    gradients: list[np.ndarray]
    num_gradients: int


def _climb(target: Any, data: Any, start: np.ndarray, max_steps: int, history_size: int) -> Path:
    """L-BFGS (SciPy's, on the host); no step if the start has no density."""
    dtype = start.dtype
    eps = float(np.finfo(dtype).eps)
    points, gradients, values, heights = [], [], [], []
    evaluated: dict[bytes, tuple[np.ndarray, float, np.ndarray]] = {}
    num_gradients = 0

    def evaluate(q):
        nonlocal num_gradients
        found = evaluated.get(q.tobytes())
        if found is None:
            num_gradients += 1
            rounded = q.astype(dtype)
            value, gradient = _value_and_grad(target, data, jnp.asarray(rounded))
            found = rounded.astype(np.float64), float(value), np.asarray(gradient, np.float64)
            evaluated[q.tobytes()] = found
        return found

    def height(point, value, gradient):
        """The log density, less a constant, finer than rounding lets it be.

        Small rises come from the gradients, by the trapezoidal rule. Else wide directions, which
        add little to the density, would be lost in its rounding, and their curvatures never seen.
        """
        rise = value - values[-1]
        if abs(rise) < 100 * eps * max(1, abs(value)):
            rise = (gradients[-1] + gradient) @ (point - points[-1]) / 2
        return heights[-1] + rise

    def accept(q):
        point, value, gradient = evaluate(q)
        heights.append(height(point, value, gradient) if points else 0.0)
        points.append(point)
        values.append(value)
        gradients.append(gradient)
        evaluated.clear()

    def loss(q):
        point, value, gradient = evaluate(q)
        if np.isfinite(value) and np.isfinite(gradient).all():
            return -height(point, value, gradient), -gradient
        # No density there: a parabola around the last iterate turns the line search back.
        step = q - points[-1]
        rise = 10 * (abs(gradients[-1] @ step) + 1)
        return rise - heights[-1], 2 * rise / (step @ step) * step

    accept(start.astype(np.float64))
    if np.isfinite(values[0]) and np.isfinite(gradients[0]).all():
        minimize(
            loss, start.astype(np.float64), jac=True, method="L-BFGS-B", callback=accept,
            options={"maxiter": max_steps, "maxcor": history_size, "ftol": 1e-13, "gtol": 0.0},
        )  # fmt: skip
    return Path(points, gradients, num_gradients)


def _elbos(target: Any, data: Any, u: jax.Array, chunk: list[Normal]) -> list[tuple[float, float]]:
    """For each normal the share of its draws with a density, and the ELBO over those.

    In this order, normals that reach beyond the support of the density come last, but are not
    lost. The draws come from standard normal ones, `u`.
    """
    padded = chunk + chunk[-1:] * (_AT_ONCE - len(chunk))
    log_p = np.asarray(_at_iterates(target, data, u, _stacked(padded, u.dtype)), np.float64)
    squares = np.sum(np.asarray(u, np.float64) ** 2, 1)
    scores = []
    for normal, values in zip(chunk, log_p, strict=False):
        ratios = values + 0.5 * (squares + normal.log_det + target.dim * _LOG_2PI)
        alive = ratios[np.isfinite(ratios)]
        mean = float(alive.mean()) if len(alive) else -math.inf
        scores.append((len(alive) / len(ratios), mean))
    return scores


def _cast(normal: Normal, dtype: Any) -> Normal:
    return Normal(*(np.asarray(x, dtype) for x in normal))


def _stacked(normals: list[Normal], dtype: Any) -> Normal:
    return Normal(*(np.stack(x).astype(dtype) for x in zip(*normals, strict=True)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _standard_normals(n, dim, dtype, key):
    return jax.random.normal(key, (n, dim), dtype)


@functools.partial(jax.jit, static_argnums=0)
def _at_iterates(target, data, u, normals):
    """Log densities where normals put standard normal draws, shape `(normals, draws)`."""
    density = jax.vmap(lambda q: target(data, q))
    return jax.vmap(lambda normal: density(points_of(normal, u)))(normals)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(target, n, data, key, normal):
    q = points_of(normal, jax.random.normal(key, (n, target.dim), normal.location.dtype))
    return q, jax.lax.map(lambda q: target(data, q), q, batch_size=min(n, 1000))
