"""`ab.importance`: self-normalized importance sampling."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import Degenerate
from abduce.inference.algorithm import Algorithm, algorithm, check_count
from abduce.inference.posterior import Posterior, make_posterior
from abduce.inference.problem import Problem, lost_sites
from abduce.inference.proposals import as_proposal
from abduce.inference.psis import khat_threshold, psis, weights_ess
from abduce.ppl.masked import Masked

__all__ = ["importance"]


@algorithm
class importance(Algorithm):
    """Importance sampling from the prior or from a proposal.

    Latents are drawn from the proposal `q` (what it leaves out, from the prior), and weighted by
    `p(latents, data) / q(latents)`. The mean weight estimates the evidence without bias. Pareto
    smoothing (Vehtari et al. 2024) diagnoses the weights and stabilizes them.

    Args:
        num_samples: Draws.
        proposal: A Model called as `proposal(given, *args)`, a posterior (its `as_model()` is
            taken) or an estimator; None: the prior.
        smooth: Whether the draws carry Pareto-smoothed weights; the evidence uses raw ones.

    The posterior has one chain of weighted draws, `log_evidence`, and the diagnostics `ess`
    (Kish), `pareto_k` and `log_evidence_se` (standard error of the log evidence, delta method).

    Raises (on use):
        Degenerate: Every weight is zero.

    Example:
        >>> post = ab.importance(num_samples=10_000)(model).posterior(key, given={"y": y})
        >>> post.log_evidence
    """

    num_samples: int = 10_000
    proposal: Any = None
    smooth: bool = True
    traceable = True

    def __post_init__(self):
        check_count("importance", "num_samples", self.num_samples)

    def run(self, problem: Problem, key: Any) -> Posterior:
        problem.require_latents("ab.importance")
        proposal = self.proposal
        if proposal is not None:
            proposal = as_proposal(proposal, problem.model, "importance")
        given = {
            a: g.value if g.mask is None else Masked(g.value, g.mask)
            for a, g in problem.given.items()
        }
        draws, active, log_weights, lost = _draw(
            self.num_samples, problem.model, proposal, given, problem.arguments, key
        )
        values = {a: draws[a][None] for a in problem.program.sites if a in draws}
        active = {a: x[None] for a, x in active.items()}
        if isinstance(log_weights, jax.core.Tracer):
            return make_posterior(
                problem, values, algorithm="importance", log_weights=log_weights[None],
                log_evidence=jax.nn.logsumexp(log_weights) - jnp.log(self.num_samples),
                active=active,
            )  # fmt: skip
        log_weights = np.asarray(log_weights, np.float64)
        if not np.isfinite(log_weights).any():
            raise Degenerate(
                f"ab.importance: all {self.num_samples} draws have weight zero"
                f"{' or NaN' if np.isnan(log_weights).any() else ''}: {problem.culprit(lost)}. "
                f"Correct the data, use a proposal nearer to the posterior (proposal=), or another "
                f"algorithm, such as ab.nuts."
            )
        return self._checked(problem, values, active, log_weights)

    def conditional_evidence(
        self, key: Any, model: Any, args: Any, kwargs: Any, choices: dict[str, Any]
    ) -> Any:
        """Log evidence estimate of a run in which one draw is `choices`.

        Its weight and those of `num_samples - 1` fresh draws are averaged.
        """
        k1, k2 = jax.random.split(key)
        if self.proposal is None:
            trace, weight = model.generate(k1, choices, *args, **kwargs)
            own = weight - sum((jnp.sum(trace.scores[a]) for a in choices), start=0.0)
        else:
            q, _ = self.proposal.generate(k1, choices, {}, *args, **kwargs)
            trace, weight = model.generate(k1, choices, *args, **kwargs)
            rest = [a for a in choices if a not in q.choices]
            own = weight - q.log_density - sum((jnp.sum(trace.scores[a]) for a in rest), start=0.0)
        keys = jax.random.split(k2, self.num_samples)[1:]
        others = jax.vmap(
            lambda k: model.generate(k, {}, *args, proposal=self.proposal, **kwargs)[1]
        )(keys)
        weights = jnp.concatenate([own[None], others])
        return jax.nn.logsumexp(weights) - jnp.log(self.num_samples)

    def _checked(self, problem, values, active, log_weights):
        bad = np.isnan(log_weights) | (log_weights == np.inf)
        messages = []
        if bad.any():
            log_weights = np.where(bad, -np.inf, log_weights)
            messages.append(
                f"ab.importance: {int(bad.sum())} of {self.num_samples} weights were NaN or "
                f"infinite and count as zero. Look for invalid operations in the model."
            )
        smoothed, k = psis(log_weights)
        ess = float(weights_ess(log_weights))
        threshold = khat_threshold(max(self.num_samples, 2))
        if not k <= threshold:
            messages.append(
                f"ab.importance: Pareto k is {float(k):.2f} (above {threshold:.2f}) and the "
                f"effective sample size {ess:.0f} of {self.num_samples}: the weights are too "
                f"uneven to trust the result. Raise num_samples, pass a proposal= nearer to the "
                f"posterior, or use ab.nuts."
            )
        peak = log_weights.max()
        relative = np.exp(log_weights - peak)
        se = float(relative.std() / relative.mean() / np.sqrt(len(relative)))
        return make_posterior(
            problem,
            values,
            algorithm="importance",
            log_weights=(smoothed if self.smooth else log_weights)[None],
            log_evidence=float(peak + np.log(relative.mean())),
            diagnostics={"ess": ess, "pareto_k": float(k), "log_evidence_se": se},
            messages=messages,
            active=active,
        )


def _draw_now(n, model, proposal, given, arguments, key):
    model, args, kwargs = arguments.unpack()

    def one(key):
        trace, log_weight = model.generate(key, given, *args, proposal=proposal, **kwargs)
        latents = {a: x for a, x in trace.choices.items() if not _wholly_given(given, a)}
        values = {**latents, **trace.deterministics}
        active = {a: x for a, x in trace.active.items() if a in values}
        return values, active, log_weight, lost_sites(trace)

    # One key per draw by its number: a larger run begins with the same draws.
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n, dtype=jnp.uint32))
    return jax.vmap(one)(keys)


def _wholly_given(given: dict[str, Any], address: str) -> bool:
    return address in given and not isinstance(given[address], Masked)


_draw = jax.jit(_draw_now, static_argnums=0)
