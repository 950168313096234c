"""Starting points of Markov chains: `ab.init.uniform`, `ab.init.prior`, choice maps, models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidAlgorithm, InvalidValue
from abduce.inference.problem import Problem
from abduce.inference.proposals import as_proposal
from abduce.inference.target import FlatTarget, unconstrain
from abduce.ppl.checks import check_support
from abduce.ppl.data import as_data
from abduce.ppl.operations import outside_scopes, unknown_address
from abduce.ppl.replay import Replay

__all__ = ["Prior", "Uniform", "prior", "starting_points", "uniform"]


class Uniform(eqx.Module):
    """Made by `uniform`."""

    radius: float = eqx.field(static=True)


class Prior(eqx.Module):
    """Made by `prior`."""


def uniform(radius: float = 2.0) -> Uniform:
    """Starts uniformly in `(-radius, radius)` on the unconstrained scale.

    Args:
        radius: Positive.
    """
    if not radius > 0:
        raise InvalidAlgorithm(f"ab.init.uniform: radius must be positive, got {radius}.")
    return Uniform(float(radius))


def prior() -> Prior:
    """Starts at draws from the prior."""
    return Prior()


Propose = Callable[[Any, int], np.ndarray]


def starting_points(
    init: Any, problem: Problem, target: FlatTarget, data: Any, num_chains: int, name: str
) -> tuple[Propose, Callable[[np.ndarray], str]]:
    """Returns `(key, attempt) -> (num_chains, dim)` and a function that explains a failure."""
    init = uniform() if init is None else init
    dtype = np.dtype(jnp.result_type(float))

    def near_zero(key, attempt, radius):
        # On the host: starting points need no compiled program.
        seed = np.asarray(jax.random.key_data(key)).astype(np.uint64).tolist()
        rng = np.random.default_rng([*seed, attempt])
        shrink = radius / (1 + attempt // 10)  # later attempts stay nearer to the centre
        return rng.uniform(-shrink, shrink, (num_chains, target.dim)).astype(dtype)

    def describe(q):
        return explain(target, data, problem, q)

    if isinstance(init, Uniform):
        return (lambda key, attempt: near_zero(key, attempt, init.radius)), describe
    if isinstance(init, dict):
        points = _from_choices(init, problem, target, data, num_chains)

        def fixed(key, attempt):
            if attempt == 0:
                return points
            noise = near_zero(key, attempt, 0.1)
            return (points + noise).astype(dtype)

        return fixed, describe

    def drawn(key, attempt):
        keys = jax.random.split(jax.random.fold_in(key, attempt), num_chains)
        rows = [_draw(init, k, problem, target, data, name) for k in keys]
        return np.stack([np.asarray(r) for r in rows]).astype(dtype)

    return drawn, describe


def _draw(init: Any, key: Any, problem: Problem, target: FlatTarget, data: Any, name: str) -> Any:
    from abduce.inference.posterior import Posterior
    from abduce.ppl.model import Model

    latents = problem.latents
    given = {a: g.value for a, g in problem.given.items() if g.mask is None}
    if isinstance(init, Posterior):
        choices = {a: x[0] for a, x in init.sample(key, 1).items() if a in latents}
    elif isinstance(init, Prior):
        trace = problem.model.simulate(key, *problem.args, **problem.kwargs)
        choices = {a: x for a, x in trace.choices.items() if a in latents}
    elif isinstance(init, Model) or hasattr(init, "as_model"):
        init = as_proposal(init, problem.model, name.removeprefix("ab."))
        choices = init.simulate(key, given, *problem.args, **problem.kwargs).choices
    else:
        raise InvalidAlgorithm(
            f"{name}: init= takes a choice map, a Model, a Posterior, an estimator, "
            f"ab.init.uniform(2.0) or ab.init.prior(), got {init!r}."
        )
    unknown = sorted(set(choices) - set(latents))
    if unknown:
        raise InvalidValue(
            f"{name}: init has sites {unknown} that are not latents of `{problem.program.name}` "
            f"({', '.join(latents)})."
        )
    return unconstrain(target, data, problem, choices)


def _from_choices(
    init: dict[str, Any], problem: Problem, target: FlatTarget, data: Any, num_chains: int
) -> np.ndarray:
    values = {a: np.asarray(as_data(v)) for a, v in init.items()}
    chains = {}
    for address, value in values.items():
        info = problem.program.sites.get(address)
        if info is None or address not in problem.latents:
            raise unknown_address(address, problem.program, "init")
        if value.shape == info.shape:
            chains[address] = np.broadcast_to(value, (num_chains, *info.shape))
        elif value.shape == (num_chains, *info.shape):
            chains[address] = value
        else:
            raise InvalidValue(
                f'init["{address}"] has shape {value.shape}, expected {info.shape}, or '
                f"{(num_chains, *info.shape)} with a value per chain."
            )
        if problem.given.get(address) is None:  # else only hidden entries count
            check_support(info.site.spec, value, None, f'init["{address}"]')
    return np.stack(
        [
            np.asarray(unconstrain(target, data, problem, {a: v[i] for a, v in chains.items()}))
            for i in range(num_chains)
        ]
    )


def explain(target: FlatTarget, data: Any, problem: Problem, q: np.ndarray) -> str:
    """Says which site makes the density at `q` useless, and with which value."""
    records = _scores(target, data, jnp.asarray(q))
    program = problem.program
    worst = []
    for address, record in records.items():
        if "score" not in record:  # a param
            continue
        score = np.asarray(record["score"])
        bad = ~np.isfinite(score)
        if bad.any():
            info = program.sites[address]
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            value = ""
            if "value" in record:
                x = np.asarray(record["value"])
                value = f" at value {x[index] if index else x}"
            observed = address in problem.given or info.observed
            what = "observed site" if observed else info.kind if info.kind == "factor" else "site"
            worst.append(
                f"{what} {address!r} ({info.family}, {info.site.where}) has log density "
                f"{score[index] if index else score}{f' at index {index}' if index else ''}{value}"
                + (f", as {int(bad.sum())} of {bad.size} elements" if bad.size > 1 else "")
            )
    if not worst:
        return (
            "every site has a finite density there, but a gradient is not finite. Look for sqrt, "
            "log or norm at 0 and for jnp.where around an invalid branch."
        )
    remedy = (
        " If it is the data, correct them or widen the likelihood; if it is where the chains "
        "start, pass init= a choice map in the support, or ab.init.prior()."
    )
    return "; ".join(worst) + "." + remedy


def _scores_now(target, data, q):
    replay = Replay(record=frozenset({"score", "value"}))
    with outside_scopes():
        return target.run(replay, data, q)["records"]


_scores = jax.jit(_scores_now, static_argnums=0)
