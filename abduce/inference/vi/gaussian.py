"""`ab.gaussian_vi`: the normal with the largest ELBO, by steps in the geometry of normals.

Let `V` be minus the log density in unconstrained coordinates and `N(m, S)` the normal,
`S = C C'`. The negative ELBO, `E V - entropy`, has the gradient `E grad V` in `m` and
`(E hess V - S^-1) / 2` in `S`. Two ways of stepping:

- `wasserstein`: Diao, Balasubramanian, Chewi and Salim, "Forward-backward Gaussian variational
  inference via JKO in the Bures-Wasserstein space" (ICML 2023), Algorithm 1. The energy `E V` is
  followed forward; the entropy, which is not smooth, has a proximal step in closed form.
- `natural_gradient`: Khan and Rue, "The Bayesian learning rule" (JMLR 2023), with the update of
  Lin, Schmidt and Khan, "Handling the positive-definite constraint in the Bayesian learning rule"
  (ICML 2020), which keeps the precision positive definite. It does not depend on coordinates.

Expectations are over points `m + C z`. With `h = C' grad V` there, Price's theorem gives
`C' (E hess V) C = E[h z']`, estimated as `I + mean (h - z) z'`: the term taken away and added has
mean `I`, and the error vanishes at the optimum of a Gaussian target. One gradient for each point
suffices; no Hessian is formed. `gaussian_steps` has the steps, and makes the estimate symmetric.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import qmc

from abduce.errors import InvalidAlgorithm
from abduce.inference.algorithm import Algorithm, algorithm, check_count
from abduce.inference.init import starting_points
from abduce.inference.laplace import _sample
from abduce.inference.posterior import Posterior, make_posterior
from abduce.inference.problem import Problem
from abduce.inference.target import constrain, make_target
from abduce.inference.vi.gaussian_steps import (
    ADVANCE,
    Evaluator,
    Expectations,
    Normal,
    fixed_points,
    fresh_points,
    triangular,
)
from abduce.inference.vi.normal import finite_starts, refuse_tracing, weigh

__all__ = ["gaussian_vi"]

_NOISY_STEP = 0.3  # of the natural gradient, or over the largest curvature
_MOST_TRIES = 40
_FAR = 1e-2  # nats; a gap to the optimum worth a warning


@algorithm
class gaussian_vi(Algorithm):
    """Gaussian variational inference with a full covariance, in unconstrained coordinates.

    Fits the normal of largest ELBO. Unlike Laplace's approximation it averages over the posterior
    instead of looking at the mode. Steps need no tuning: without `step_size` they are shortened
    until the ELBO rises.

    Args:
        method: "natural_gradient", whose speed does not depend on how the posterior is scaled, or
            "wasserstein", forward-backward steps in Bures-Wasserstein space, whose number grows
            with the condition number of the posterior's covariance. For a log concave density
            both have one optimum, and `wasserstein` converges by theorem for
            `step_size <= 1 / L`, `L` the largest eigenvalue of any Hessian of V.
        num_steps: At most; without `stochastic` it stops when no more is to be gained.
        step_size: Fixed: for `natural_gradient` in (0, 1], for `wasserstein` about `1 / L`.
            None: chosen, and adapted to the ELBO; with `stochastic`, held for the first half of
            the steps and lowered in the second.
        num_draws: Points for each expectation, even. None: 256, or 4 times the dimension if that
            is more; with `stochastic`, 16, or twice the dimension.
        stochastic: Whether each step has fresh random points, unbiased. If not, all have the same
            points, antithetic, quasi-random and with covariance I: exact on Gaussian targets, and
            the ELBO never falls.
        init_scale: Standard deviations of the first normal.
        num_samples: Draws of the fitted normal.
        init: Where the first normal is centred, as in `ab.nuts`.

    `log_evidence` is the log of the mean importance weight of the draws, whose exponential is
    unbiased. Diagnostics: `elbo`, its trace over the steps, with the normal before the first, in
    nats; `location` and `scale_tril` of the fit (unconstrained); `num_gradients`; `pareto_k` and
    `ess` of the weights, `log_evidence_se`.

    Raises (on use):
        DiscreteLatent: A latent is discrete.
        InitializationError: No starting point has a finite density and gradient.
        InvalidAlgorithm: Too few `num_draws` for the dimension.

    Example:
        >>> post = ab.gaussian_vi()(model).posterior(key, given={"y": y})
        >>> mean, tril = post.diagnostics["location"], post.diagnostics["scale_tril"]
    """

    method: str = "natural_gradient"
    num_steps: int = 1000
    step_size: float | None = None
    num_draws: int | None = None
    stochastic: bool = False
    init_scale: float = 1.0
    num_samples: int = 1000
    init: Any = None

    def __post_init__(self):
        for field in ("num_steps", "num_samples"):
            check_count("gaussian_vi", field, getattr(self, field))
        if self.method not in ADVANCE:
            raise InvalidAlgorithm(
                f"ab.gaussian_vi: method must be one of {', '.join(map(repr, ADVANCE))}, got "
                f"{self.method!r}."
            )
        if self.num_draws is not None:
            check_count("gaussian_vi", "num_draws", self.num_draws, 2)
            if self.num_draws % 2:
                raise InvalidAlgorithm(
                    f"ab.gaussian_vi: num_draws must be even, for draws come in pairs z and -z; "
                    f"got {self.num_draws}."
                )
        if not isinstance(self.stochastic, bool):
            raise InvalidAlgorithm(
                f"ab.gaussian_vi: stochastic must be True or False, got {self.stochastic!r}."
            )
        most = 1.0 if self.method == "natural_gradient" else math.inf
        for field, largest in (("step_size", most), ("init_scale", math.inf)):
            value = getattr(self, field)
            if field == "step_size" and value is None:
                continue
            is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
            if not is_number or not (0 < value <= largest and math.isfinite(value)):
                limit = f" and at most {largest:g} with {self.method}" if largest < 2 else ""
                raise InvalidAlgorithm(
                    f"ab.gaussian_vi: {field} must be a positive number{limit}, got {value!r}."
                )

    def run(self, problem: Problem, key: Any) -> Posterior:
        refuse_tracing(problem, key, "ab.gaussian_vi", "fits")
        target, data = make_target(problem, "ab.gaussian_vi")
        key_start, key_fit, key_draw = jax.random.split(key, 3)
        draws = self._draws(target.dim, key_fit)
        propose, describe = starting_points(self.init, problem, target, data, 1, "ab.gaussian_vi")
        start = finite_starts(target, data, key_start, propose, describe, "ab.gaussian_vi")[0]
        evaluate = Evaluator(target, data, start.dtype)
        fit = self._fit(evaluate, draws, start.astype(np.float64))
        messages = list(fit.messages)
        scale_tril = triangular(fit.normal.scale)
        q, log_ratio = _sample(
            target, self.num_samples, data, key_draw,
            jnp.asarray(fit.normal.location, start.dtype), jnp.asarray(scale_tril, start.dtype),
        )  # fmt: skip
        log_det = np.log(np.diag(scale_tril)).sum()
        weights = weigh(np.asarray(log_ratio, np.float64) + log_det, "ab.gaussian_vi")
        if not weights.is_reliable:
            messages.append(
                f"ab.gaussian_vi: Pareto k is {weights.pareto_k:.2f} (above "
                f"{weights.threshold:.2f}): the posterior is far from normal in these coordinates, "
                f"so intervals are unreliable. Correct the draws, "
                f"ab.importance(proposal=post.as_model()), use ab.nuts(init=post), or other "
                f"coordinates (ab.reparam)."
            )
        values, active = constrain(target, data, problem.program, np.asarray(q))
        return make_posterior(
            problem,
            {a: x[None] for a, x in values.items()},
            active={a: x[None] for a, x in active.items()},
            algorithm="gaussian_vi",
            log_evidence=weights.log_evidence,
            diagnostics={
                "elbo": np.array(fit.elbos),
                "location": fit.normal.location,
                "scale_tril": scale_tril,
                "num_gradients": evaluate.num_gradients,
                "pareto_k": weights.pareto_k,
                "ess": weights.ess,
                "log_evidence_se": weights.log_evidence_se,
            },
            messages=messages,
        )

    def _draws(self, dim: int, key: Any) -> Callable[[], np.ndarray]:
        """A function that gives the standard normal points of a step, shape `(num_draws, dim)`."""
        if dim > qmc.Sobol.MAXDIM:
            raise InvalidAlgorithm(
                f"ab.gaussian_vi: a full covariance of {dim} coordinates is too large. Use "
                f"ab.pathfinder, whose cost is linear in the dimension, or ab.nuts."
            )
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).astype(np.uint64).tolist())
        if self.stochastic:
            half = max(self.num_draws or 2 * dim, 2 if self.num_draws else 16) // 2
            return lambda: fresh_points(half, dim, rng)
        num_draws = self.num_draws or max(256, 4 * dim)
        if num_draws < 2 * dim:
            raise InvalidAlgorithm(
                f"ab.gaussian_vi: num_draws={num_draws} fixed points cannot show all {dim} "
                f"directions: take at least {2 * dim}, or stochastic=True."
            )
        points = fixed_points(num_draws // 2, dim, rng)
        return lambda: points

    def _fit(self, evaluate: Evaluator, draws: Callable[[], np.ndarray], m: np.ndarray) -> Fit:
        z = draws()
        normal = Normal(m, self.init_scale * np.eye(len(m)))
        now = evaluate(normal, z)
        while not now.is_finite:  # the start itself has a density, so this ends
            normal = Normal(m, normal.scale / 2)
            now = evaluate(normal, z)
        fit = self._descend_noisily if self.stochastic else self._descend
        return fit(evaluate, draws, normal, now)

    def _descend(self, evaluate: Evaluator, draws: Any, normal: Normal, now: Expectations) -> Fit:
        """On fixed points; steps are halved until the ELBO rises, unless their size is fixed."""
        eps = float(np.finfo(evaluate.dtype).eps)
        is_fixed = self.step_size is not None
        tolerance = 1e-14 if is_fixed else max(eps, 1e-13)
        advance = ADVANCE[self.method]
        step, largest = self._first_step(normal, now)
        z, elbos, messages = draws(), [now.elbo], []
        best, since = now, 0
        for number in range(1, self.num_steps + 1):
            if now.gap < tolerance or (since > 50 and not is_fixed):
                break
            # What rounding in the log densities can hide.
            slack = 10 * eps * (1 + abs(now.log_density))
            for tries in range(1, _MOST_TRIES + 1):  # noqa: B007 (how many it took matters)
                candidate = advance(normal, now, step)
                then = evaluate(candidate, z)
                accepted = then.is_finite and (is_fixed or then.elbo >= now.elbo - slack)
                if accepted or is_fixed:
                    break
                step /= 2
            if not accepted:
                if is_fixed:
                    messages.append(
                        f"ab.gaussian_vi: step {number} with step_size={self.step_size} left the "
                        f"region where the density is finite; the fit is the one before. Lower "
                        f"step_size, or leave it None."
                    )
                break
            normal, now = candidate, then
            elbos.append(now.elbo)
            if now.elbo > best.elbo + slack or now.gap < 0.5 * best.gap:
                best, since = now, 0
            elif tries > 1 or step == largest:  # longer steps will not help
                since += 1
            if not is_fixed and tries == 1:
                step = min(1.5 * step, largest)
        if now.gap > _FAR and not messages:
            hint = ", or use the natural_gradient method" if self.method == "wasserstein" else ""
            messages.append(
                f"ab.gaussian_vi: after {len(elbos) - 1} steps the fit is not at the optimum "
                f"(about {now.gap:.2g} nats are missing). Raise num_steps or num_draws, leave "
                f"step_size None{hint}."
            )
        return Fit(normal, elbos, messages)

    def _descend_noisily(
        self, evaluate: Evaluator, draws: Any, normal: Normal, now: Expectations
    ) -> Fit:
        """On fresh points; without a fixed size, steps shrink harmonically in the second half."""
        advance = ADVANCE[self.method]
        z = draws()
        first = _NOISY_STEP * math.sqrt(min(1.0, len(z) / (2 * z.shape[1])))
        elbos, skipped = [now.elbo], 0
        curvature = now.curvature(normal) if self.method == "wasserstein" else 1.0
        for number in range(self.num_steps):
            if self.step_size is None:
                late = max(0, number - self.num_steps // 2)
                step = 1 / (1 / first + late)
                if self.method == "wasserstein":
                    curvature = max(0.95 * curvature, now.curvature(normal))
                    step /= curvature
            else:
                step = self.step_size
            candidate = advance(normal, now, step)
            if self.step_size is None:
                candidate = _near(normal, candidate)
            then = evaluate(candidate, draws())
            if then.is_finite:
                normal, now = candidate, then
            else:
                skipped += 1
                now = evaluate(normal, draws())
                if not now.is_finite:
                    break
            elbos.append(now.elbo)
        messages = []
        if skipped:
            messages.append(
                f"ab.gaussian_vi: {skipped} of {self.num_steps} steps were not taken, because some "
                f"draws had no finite density. Lower step_size, or look for invalid operations in "
                f"the model."
            )
        return Fit(normal, elbos, messages)

    def _first_step(self, normal: Normal, now: Expectations) -> tuple[float, float]:
        """The size of the first step and the largest one."""
        if self.step_size is not None:
            return float(self.step_size), float(self.step_size)
        if self.method == "natural_gradient":
            return 1.0, 1.0
        return 1 / max(now.curvature(normal), 1e-300), math.inf


def _near(normal: Normal, candidate: Normal) -> Normal:
    """The candidate with its mean within the bulk of the normal: far out, noise is wild."""
    move = candidate.location - normal.location
    distance = np.linalg.norm(np.linalg.solve(normal.scale, move)) / math.sqrt(len(move))
    return Normal(normal.location + move / max(distance, 1.0), candidate.scale)


class Fit(NamedTuple):
    """The last normal, the ELBOs on the way, in nats, and what the reader must know."""

    normal: Normal
    elbos: list[float]
    messages: list[str]
