"""`ab.laplace`: a normal approximation at the posterior mode."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from abduce.errors import InitializationError, InvalidAlgorithm
from abduce.inference.algorithm import Algorithm, algorithm, check_count
from abduce.inference.init import starting_points
from abduce.inference.posterior import Posterior, make_posterior
from abduce.inference.problem import Problem
from abduce.inference.psis import khat_threshold, psis
from abduce.inference.target import constrain, make_target

__all__ = ["laplace"]


@algorithm
class laplace(Algorithm):
    """Laplace's approximation: a normal at the mode, in unconstrained coordinates.

    The mode is found by L-BFGS from several starting points and polished by Newton steps; the
    covariance is the inverse of the negative Hessian there. `log_evidence` is Laplace's estimate,
    `log p(mode) + d/2 log(2 pi) - 1/2 log det(-H)` (Tierney and Kadane 1986). The diagnostics
    tell how far from normal the posterior is: `pareto_k` of importance weights against the
    exact density, and `ess` of those weights.

    Args:
        num_samples: Draws.
        num_starts: Optimizations from different starting points; the best mode wins.
        max_steps: L-BFGS iterations for each.
        init: Starting points, as in `ab.nuts`.

    Raises (on use):
        DiscreteLatent: A latent is discrete.
        InitializationError: No starting point has a finite density.

    Example:
        >>> post = ab.laplace()(model).posterior(key, given={"y": y})
    """

    num_samples: int = 4000
    num_starts: int = 4
    max_steps: int = 500
    init: Any = None

    def __post_init__(self):
        for field in ("num_samples", "num_starts", "max_steps"):
            check_count("laplace", field, getattr(self, field))

    def run(self, problem: Problem, key: Any) -> Posterior:
        if problem.is_traced or isinstance(key, jax.core.Tracer):
            raise InvalidAlgorithm(
                "ab.laplace climbs to the mode between compiled calls, so it cannot run inside "
                "jax.jit or jax.vmap. Loop over the data sets in Python: with equal shapes nothing "
                "is compiled again. ab.importance can be mapped."
            )
        target, data = make_target(problem, "ab.laplace")
        propose, describe = starting_points(
            self.init, problem, target, data, self.num_starts, "ab.laplace"
        )
        key_start, key_draw = jax.random.split(key)
        starts = self._starts(target, data, key_start, propose, describe)
        climbs = [_climb(target, data, start, self.max_steps) for start in starts]
        mode, value, converged = max(climbs, key=lambda climb: climb[1])
        mode, value, precision = _newton(target, data, mode, value, starts.dtype)
        eigenvalues, vectors = np.linalg.eigh(precision)
        messages = []
        floor = 1e-8 * max(float(eigenvalues.max()), 1e-300)
        flat = int((eigenvalues <= floor).sum())
        if flat:
            messages.append(
                f"ab.laplace: at the mode found, the density is flat or curves upwards in {flat} "
                f"of {target.dim} directions, so there is no normal approximation there (an "
                f"unidentified or unbounded posterior, as in a centred hierarchical model). "
                f"Reparametrize, add prior information, or use ab.nuts."
            )
            eigenvalues = np.maximum(eigenvalues, 1e-2)
        elif not converged:
            messages.append(
                f"ab.laplace: the optimizer did not converge in {self.max_steps} steps. Raise "
                f"max_steps, or pass init= nearer to the mode."
            )
        log_det = float(np.log(eigenvalues).sum())
        log_evidence = value + 0.5 * target.dim * math.log(2 * math.pi) - 0.5 * log_det
        scale = jnp.asarray(vectors / np.sqrt(eigenvalues), starts.dtype)
        centre = jnp.asarray(mode, starts.dtype)
        q, log_ratio = _sample(target, self.num_samples, data, key_draw, centre, scale)
        log_ratio = np.asarray(log_ratio, np.float64) - 0.5 * log_det
        log_ratio = np.where(np.isnan(log_ratio), -np.inf, log_ratio)
        smoothed, k = psis(log_ratio)
        weights = np.exp(smoothed - smoothed.max())
        ess = float(weights.sum() ** 2 / (weights**2).sum())
        threshold = khat_threshold(self.num_samples)
        if not k <= threshold and not flat:
            messages.append(
                f"ab.laplace: Pareto k is {float(k):.2f} (above {threshold:.2f}): the posterior is "
                f"far from normal in these coordinates, so intervals are unreliable. Use ab.nuts, "
                f"or other coordinates (ab.reparam)."
            )
        draws, active = constrain(target, data, problem.program, np.asarray(q))
        return make_posterior(
            problem,
            {a: x[None] for a, x in draws.items()},
            active={a: x[None] for a, x in active.items()},
            algorithm="laplace",
            log_evidence=None if flat else float(log_evidence),
            diagnostics={
                "pareto_k": float(k),
                "ess": ess,
                "mode": np.asarray(mode),
                "log_density_at_mode": float(value),
            },
            messages=messages,
        )

    def _starts(self, target, data, key, propose, describe):
        starts = np.asarray(propose(key, 0))
        for attempt in range(1, 100):
            values = np.asarray(_density(target, data, jnp.asarray(starts)))
            bad = ~np.isfinite(values)
            if not bad.any():
                return starts
            starts = np.where(bad[:, None], propose(key, attempt), starts)
        if bad.all():
            raise InitializationError(
                f"ab.laplace: no starting point with a finite log density: {describe(starts[0])}"
            )
        return starts[~bad]


@functools.partial(jax.jit, static_argnums=0)
def _density(target, data, q):
    return jax.vmap(lambda q: target(data, q))(q)


@functools.partial(jax.jit, static_argnums=0)
def _hessian(target, data, q):
    return jax.hessian(lambda q: target(data, q))(q)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_grad(target, data, q):
    return jax.value_and_grad(lambda q: target(data, q))(q)


def _newton(
    target: Any, data: Any, mode: np.ndarray, value: float, dtype: Any
) -> tuple[np.ndarray, float, np.ndarray]:
    """Polishes a mode; returns it with its value and the negative Hessian there."""
    for step_number in range(4):
        q = jnp.asarray(mode, dtype)
        hessian = np.asarray(_hessian(target, data, q), np.float64)
        precision = np.nan_to_num(-(hessian + hessian.T) / 2)
        if step_number == 3:
            break
        gradient = np.asarray(_value_and_grad(target, data, q)[1], np.float64)
        try:
            step = np.linalg.solve(precision, gradient)
        except np.linalg.LinAlgError:
            break
        better = float(_value_and_grad(target, data, jnp.asarray(mode + step, dtype))[0])
        if not better > value:  # also when rounding hides the difference
            break
        mode, value = mode + step, better
    return mode, value, precision


def _climb(target: Any, data: Any, start: np.ndarray, max_steps: int) -> tuple[Any, float, bool]:
    """L-BFGS (SciPy's, on the host) from one start; returns the point, its value, convergence."""
    dtype = start.dtype

    def loss(q):
        value, grad = _value_and_grad(target, data, jnp.asarray(q, dtype))
        value, grad = -float(value), -np.asarray(grad, np.float64)
        # The line search backs off from points without a density.
        return (value, grad) if np.isfinite(value) else (1e300, np.nan_to_num(grad))

    eps = float(np.finfo(dtype).eps)
    found = minimize(
        loss, start.astype(np.float64), jac=True, method="L-BFGS-B",
        options={"maxiter": max_steps, "ftol": 0.1 * eps, "gtol": eps**0.5},
    )  # fmt: skip
    # Stopping in the line search means that rounding hides further progress: that is converged.
    return found.x, -float(found.fun), found.nit < max_steps


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(target, n, data, key, mode, scale):
    z = jax.random.normal(key, (n, target.dim), mode.dtype)
    q = mode + z @ scale.T
    log_p = jax.lax.map(lambda q: target(data, q), q, batch_size=min(n, 1000))
    log_q = -0.5 * jnp.sum(z**2, 1) - 0.5 * target.dim * math.log(2 * math.pi)
    return q, log_p - log_q
