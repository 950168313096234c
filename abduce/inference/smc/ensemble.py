"""`ab.ensemble_kalman`: the stochastic ensemble Kalman filter on unmodified models."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import Degenerate, InvalidAlgorithm
from abduce.inference.algorithm import Algorithm, algorithm, check_count
from abduce.inference.posterior import Posterior, make_posterior
from abduce.inference.problem import Problem
from abduce.inference.smc.ensemble_filter import EnsembleSettings, run_ensemble

__all__ = ["ensemble_kalman"]


@algorithm
class ensemble_kalman(Algorithm):
    """The stochastic ensemble Kalman filter and smoother, through the `lax.scan` of a model.

    N members run the steps of the scan. At each one they simulate the observation y^i, and are
    moved by `K (y - y^i)` with the gain K from the covariances of the ensemble (Evensen 1994;
    Burgers, van Leeuwen and Evensen 1998). There are no weights, so nothing degenerates where the
    state is large; and no density is asked for, so observations may be `dist.Simulator` draws.
    **The result is approximate**: exact for linear-Gaussian models as N grows, elsewhere it takes
    from each observation what a linear regression on it can tell.

    What is moved: the step's latents, in unconstrained coordinates; the latents before the scan,
    initial states and parameters alike; and parts of the carry that are computed from the old carry
    (a deterministic state), as they are: carry a positive quantity as its logarithm. Whatever
    follows from moved latents is computed anew. A parameter learns from observations that its value
    shifts; one that only scales noise does not. The same analysis moves earlier steps, so that
    draws are paths (Evensen and van Leeuwen 2000).

    Args:
        num_particles: N, the members.
        inflation: Factor of the step's deviations from the ensemble mean after each analysis, at
            least 1: small ensembles underestimate their spread. Latents before the scan are left.
        localization: Positions of what is moved and of what is observed, by address (a part of the
            carry by its name in the scan's body): a dict of arrays `(k, dim)` or `(k,)`, a position
            for each number. Covariances are tapered by the distance (Gaspari and Cohn 1999); those
            without positions are left.
        radius: With `localization`: beyond a distance of `2 radius` the taper is zero.
        store: 'paths' returns whole paths; 'filter' keeps no past but the moments of each step.
        lag: With 'paths': how many earlier steps an analysis moves as well. None: all (T^2 work);
            0: draws of step t know the observations up to t alone.

    The posterior has one chain of N equally weighted draws. `log_evidence` is None; the sum of the
    log densities of the observations under the ensemble's Gaussian forecast is in
    `diagnostics['gaussian_log_evidence']`, by step in `['gaussian_log_evidence_increments']`: an
    approximation, which is neither unbiased nor, off linear-Gaussian models, consistent. Further
    diagnostics: `filtered_mean/<address>`, `filtered_sd/<address>`, and `innovation_ratio`, the
    squared innovations over their variance by step: about 1 where the forecast's spread is right,
    above where it is too small.

    Raises (on use):
        DiscreteLatent: A latent is discrete.
        InvalidModel: No scan has data, or a site is where it cannot be simulated or moved.
        Degenerate: The ensemble is not finite, or its observations have no covariance.

    Example:
        >>> post = ab.ensemble_kalman(num_particles=200)(model).posterior(key, given={"y": y})
        >>> post.diagnostics["filtered_mean/x"]
    """

    num_particles: int = 256
    inflation: float = 1.0
    localization: Any = None
    radius: float | None = None
    store: str = "paths"
    lag: int | None = None

    needs_density = False

    def __post_init__(self):
        name = "ensemble_kalman"
        check_count(name, "num_particles", self.num_particles, 2)
        if self.lag is not None:
            check_count(name, "lag", self.lag, 0)
        if not isinstance(self.inflation, (int, float)) or not 1 <= self.inflation < np.inf:
            raise InvalidAlgorithm(
                f"ab.{name}: inflation is a factor of at least 1, got {self.inflation!r}. 1 leaves "
                f"the spread as it is; 1.02 to 1.1 are common."
            )
        if self.store not in ("paths", "filter"):
            raise InvalidAlgorithm(
                f"ab.{name}: store={self.store!r}; there are 'paths', 'filter'."
            )
        if (self.localization is None) != (self.radius is None):
            raise InvalidAlgorithm(
                f"ab.{name}: localization= (positions by address) and radius= go together, got "
                f"localization={self.localization!r}, radius={self.radius!r}."
            )
        if self.radius is not None:
            if not self.radius > 0:
                raise InvalidAlgorithm(f"ab.{name}: radius must be positive, got {self.radius!r}.")
            object.__setattr__(self, "localization", _positions(self.localization))

    def settings(self) -> EnsembleSettings:
        """How programs are run for the ensemble."""
        return EnsembleSettings(
            self.num_particles, float(self.inflation), self.localization, self.radius, self.store,
            self.lag,
        )  # fmt: skip

    def run(self, problem: Problem, key: Any) -> Posterior:
        out = _run(self.settings(), problem.arguments, problem.given, key)
        values, report = out["values"], out["report"]
        if not isinstance(report["log_density"], jax.core.Tracer):
            _require_finite(report)
        sites = problem.program.sites
        diagnostics = {
            "gaussian_log_evidence": jnp.sum(report["log_density"]),
            "gaussian_log_evidence_increments": report["log_density"],
            "innovation_ratio": report["distance"],
        }
        for address, moments in out["summaries"].items():
            diagnostics[f"filtered_mean/{address}"] = moments["mean"]
            diagnostics[f"filtered_sd/{address}"] = moments["sd"]
        draws = {a: values[a][None] for a in sites if a in values}
        equal = None if draws else jnp.zeros((1, self.num_particles))  # says how many members
        return make_posterior(
            problem, draws, algorithm="ensemble_kalman", log_weights=equal, diagnostics=diagnostics
        )


_run = functools.partial(jax.jit, static_argnums=0)(run_ensemble)


def _positions(localization: Any) -> tuple[Any, ...]:
    """Hashable: pairs of an address and rows of positions."""
    if not isinstance(localization, (Mapping, tuple)):
        raise InvalidAlgorithm(
            f"ab.ensemble_kalman: localization is a dict of positions by address, got "
            f"{type(localization).__name__}."
        )
    pairs = []
    for address, x in dict(localization).items():
        x = np.asarray(x, float)
        x = x[:, None] if x.ndim == 1 else x
        if x.ndim != 2 or not np.isfinite(x).all():
            raise InvalidAlgorithm(
                f"ab.ensemble_kalman: localization[{address!r}] must be finite positions, shape "
                f"(k,) or (k, dim), got shape {x.shape}."
            )
        pairs.append((address, tuple(map(tuple, x.tolist()))))
    if len({len(rows[0]) for _, rows in pairs if rows}) > 1:
        raise InvalidAlgorithm(
            "ab.ensemble_kalman: localization= has positions of different dimensions; distances "
            "between them are not defined."
        )
    return tuple(pairs)


def _require_finite(report: dict[str, Any]) -> None:
    wrong = ~np.isfinite(np.asarray(report["log_density"]))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise Degenerate(
            f"ab.ensemble_kalman: at step {at} of the scan the covariance of the simulated "
            f"observations is not positive, or a member is not finite (an observation without a "
            f"variance, such as Cauchy, or members that diverge). Raise num_particles or "
            f"inflation, or use ab.smc."
        )
