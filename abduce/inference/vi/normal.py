"""What methods that fit normals in unconstrained coordinates share: starts, gradients, weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import Degenerate, InitializationError, InvalidAlgorithm
from abduce.inference.init import Propose
from abduce.inference.laplace import _value_and_grad
from abduce.inference.problem import Problem
from abduce.inference.psis import khat_threshold, psis, weights_ess

__all__ = ["Weights", "densities_and_gradients", "finite_starts", "refuse_tracing", "weigh"]

_AT_ONCE = 500  # points per compiled step, which bounds memory


def refuse_tracing(problem: Problem, key: Any, name: str, what: str) -> None:
    """These methods run on the host, between compiled calls."""
    if problem.is_traced or isinstance(key, jax.core.Tracer):
        raise InvalidAlgorithm(
            f"{name} {what} between compiled calls, so it cannot run inside jax.jit or jax.vmap. "
            f"Loop over the data sets in Python: with equal shapes nothing is compiled again. "
            f"ab.importance can be mapped."
        )


def finite_starts(
    target: Any,
    data: Any,
    key: Any,
    propose: Propose,
    describe: Callable[[np.ndarray], str],
    name: str,
) -> np.ndarray:
    """Starting points with a finite density and gradient.

    Args:
        target, data: From `make_target`.
        key: Random key.
        propose, describe: From `starting_points`.
        name: Of the algorithm, for messages.

    Returns:
        Shape `(at most num_chains, dim)`: points that stay bad are left out.

    Raises:
        InitializationError: All are bad.
    """
    starts = np.asarray(propose(key, 0))
    for attempt in range(1, 100):
        found = [_value_and_grad(target, data, jnp.asarray(start)) for start in starts]
        good = np.array([np.isfinite(v) and np.isfinite(g).all() for v, g in found])
        if good.all():
            return starts
        starts = np.where(good[:, None], starts, propose(key, attempt))
    if not good.any():
        raise InitializationError(
            f"{name}: no starting point with a finite log density and gradient: "
            f"{describe(starts[0])}"
        )
    return starts[good]


def densities_and_gradients(target: Any, data: Any, q: np.ndarray) -> tuple[Any, Any]:
    """Log densities, shape `(n,)`, and their gradients, `(n, dim)`, on the host in float64.

    Args:
        target, data: From `make_target`.
        q: Points in the precision to compute in, shape `(n, dim)`.
    """
    values, gradients = _values_and_grads(target, data, jnp.asarray(q))
    return np.asarray(values, np.float64), np.asarray(gradients, np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _values_and_grads(target, data, q):
    one = jax.value_and_grad(lambda q: target(data, q))
    return jax.lax.map(one, q, batch_size=min(len(q), _AT_ONCE))


@dataclasses.dataclass(frozen=True)
class Weights:
    """Importance weights of draws of an approximation.

    Attributes:
        smoothed: Pareto-smoothed, unnormalized, in nats, shape `(draw,)`.
        pareto_k: Shape of their tail.
        threshold: Largest shape that can be trusted with as many draws.
        ess: Kish's effective sample size of the raw weights.
        log_evidence: Log of the mean raw weight, in nats.
        log_evidence_se: Its standard error (delta method).
    """

    smoothed: np.ndarray
    pareto_k: float
    threshold: float
    ess: float
    log_evidence: float
    log_evidence_se: float

    @property
    def is_reliable(self) -> bool:
        """Whether the tail is light enough, or carries next to nothing.

        Where nearly all weights are equal, the few that are not give `k` any value.
        """
        return self.pareto_k <= self.threshold or self.ess >= 0.95 * len(self.smoothed)


def weigh(log_ratio: np.ndarray, name: str) -> Weights:
    """Weighs draws by log density minus log density of the approximation.

    Args:
        log_ratio: Shape `(draw,)`, in nats; NaN and `+inf` count as weight zero.
        name: Of the algorithm, for messages.

    Raises:
        Degenerate: Every weight is zero.
    """
    log_ratio = np.where(np.isfinite(log_ratio), log_ratio, -np.inf)
    if not np.isfinite(log_ratio).any():
        raise Degenerate(
            f"{name}: none of the {len(log_ratio)} draws of the fitted normal has a density. Raise "
            f"num_samples, start nearer to the posterior (init=), or use ab.nuts."
        )
    smoothed, k = psis(log_ratio)
    peak = log_ratio.max()
    relative = np.exp(log_ratio - peak)
    return Weights(
        smoothed=smoothed,
        pareto_k=float(k),
        threshold=khat_threshold(max(len(log_ratio), 2)),
        ess=float(weights_ess(log_ratio)),
        log_evidence=float(peak + np.log(relative.mean())),
        log_evidence_se=float(relative.std() / relative.mean() / np.sqrt(len(relative))),
    )
