"""Sequential rounds for one observation: simulations where the posterior is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.layout import Simulation
from abduce.amortized.posterior_model import make_law
from abduce.amortized.posterior_network import flat_discrete
from abduce.amortized.reading import read_example
from abduce.errors import Degenerate, InvalidAlgorithm
from abduce.inference.problem import Problem, make_problem
from abduce.ppl.operations import outside_scopes, run_program, typed_key
from abduce.ppl.program import stage_packed
from abduce.ppl.replay import Given, Replay

__all__ = ["fit_rounds"]

_DRAWS = 10_000  # of the estimate, for its quantile
_BATCH = 8192  # prior draws that are looked at together
_LEAST = 1e-4  # share of prior draws below which a round is not worth its rejections


def fit_rounds(
    est: Any,
    key: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: Any,
    num_rounds: int,
    budget: int,
    tail: float,
    settings: dict[str, Any],
) -> Any:
    """See `PosteriorEstimator.fit_rounds`."""
    key = typed_key(key, f"ab.{est.name}.fit_rounds")
    if est.layout.designs:
        raise InvalidAlgorithm(
            f"ab.{est.name}.fit_rounds: rounds are for one observation with its own arguments; "
            f"make the estimator without designs=."
        )
    if num_rounds > budget // 20:
        raise InvalidAlgorithm(
            f"ab.{est.name}.fit_rounds: budget={budget} leaves fewer than 20 simulations to each "
            f"of {num_rounds} rounds."
        )
    if not args and not kwargs:
        _, args, kwargs = est.simulation["arguments"].unpack()
    problem = make_problem(est.model, args, given, kwargs, None)
    size = budget // num_rounds
    rows: dict[str, np.ndarray] = {}
    shares = []
    fitted = est
    for i in range(num_rounds):
        k_sim, k_fit, k_tail, k_draw = jax.random.split(jax.random.fold_in(key, i), 4)
        if i == 0:
            new = est.simulate(k_sim, size)
        else:
            threshold = _threshold(fitted, problem, k_tail, tail)
            latents, share = _truncated(fitted, problem, k_draw, size, threshold)
            shares.append(share)
            new = _simulate(est, latents, k_sim)
        rows = new if i == 0 else {a: np.concatenate([x, new[a]]) for a, x in rows.items()}
        fitted = est.fit(k_fit, data=rows, **settings)
    return _with_history(fitted, shares)


def _with_history(fitted: Any, shares: list[float]) -> Any:
    history = {**(fitted.history or {}), "prior_share": np.asarray([1.0, *shares])}
    return dataclasses.replace(fitted, history=history)


def _threshold(fitted: Any, problem: Problem, key: Any, tail: float) -> float:
    """The log density that a share `tail` of the estimate's own draws lies below."""
    post = fitted.replace(num_samples=_DRAWS).run(problem, key)
    return float(np.quantile(np.asarray(post.diagnostics["log_density"]), tail))


def _truncated(
    fitted: Any, problem: Problem, key: Any, num: int, threshold: float
) -> tuple[dict[str, np.ndarray], float]:
    """Prior draws of the latents at which the estimate is above the threshold.

    Raises:
        Degenerate: There are next to none, so the estimate is far narrower than the prior.
    """
    parts: list[dict[str, np.ndarray]] = []
    found = tried = 0
    while found < num:
        draws, log_q = _prior_draws(fitted, problem, jax.random.fold_in(key, tried))
        keep = np.asarray(log_q) >= threshold
        parts.append({a: np.asarray(x)[keep] for a, x in draws.items()})
        found, tried = found + int(keep.sum()), tried + _BATCH
        if found < num and tried >= 8 * _BATCH and found < _LEAST * tried:
            raise Degenerate(
                f"ab.{fitted.name}.fit_rounds: of {tried} prior draws {found} lie where the "
                f"estimate is. Fewer rounds, or a narrower prior, keep rejection possible."
            )
    values = {a: np.concatenate([p[a] for p in parts])[:num] for a in parts[0]}
    return values, found / tried


def _prior_draws(fitted: Any, problem: Problem, key: Any) -> Any:
    law, operands = make_law(fitted, problem, read_example(fitted, problem))
    return _draw_and_score(law, problem.arguments, operands, key)


def _draw_and_score_now(law, arguments, operands, key):
    """What the latents do not need, such as the simulator, is never computed: XLA drops it."""
    layout, observed = law.layout, operands[2]["observed"]

    def one(key):
        k1, k2 = jax.random.split(key)
        with outside_scopes():
            program = stage_packed(arguments)
            replay = Replay(record=frozenset({"value"}), score=False)
            records = run_program(replay, program, arguments, k1, {})["records"]
        values = {a: records[a]["value"] for a in layout.addresses}
        # The density over coordinates, of which the threshold is a quantile.
        found = Simulation(layout).arrange({**values, **observed}, arguments, k2)
        discrete = flat_discrete(layout, found["discrete"])
        return values, law.score(found["u"], discrete, operands)

    return jax.vmap(one)(jax.random.split(key, _BATCH))


_draw_and_score = jax.jit(_draw_and_score_now, static_argnums=0)


def _simulate(est: Any, latents: dict[str, np.ndarray], key: Any) -> dict[str, np.ndarray]:
    out = _observe(est.layout.observed, est.simulation["arguments"], latents, key)
    return latents | {a: np.asarray(x) for a, x in out.items()}


def _observe_now(observed, arguments, latents, key):
    def one(values, key):
        given = {a: Given(x, trusted=True) for a, x in values.items()}
        with outside_scopes():
            program = stage_packed(arguments)
            replay = Replay(record=frozenset({"value"}), score=False)
            records = run_program(replay, program, arguments, key, given)["records"]
        return {a: records[a]["value"] for a in observed}

    num = len(jnp.asarray(next(iter(latents.values()))))
    return jax.vmap(one)(latents, jax.random.split(key, num))


_observe = jax.jit(_observe_now, static_argnums=0)
