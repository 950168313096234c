"""Is this the model that the estimator was trained on? A few draws, and their densities, tell.

Names and shapes do not see a changed prior scale or a changed likelihood; densities at stored
points do. The points and their log densities are saved with the estimator, so that the comparison
also works for one loaded from disk, on another version of JAX and on another device.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.layout import Layout
from abduce.errors import InvalidModel
from abduce.inference.problem import Problem
from abduce.ppl.operations import outside_scopes, run_program
from abduce.ppl.program import Arguments, stage_packed
from abduce.ppl.replay import Given, Replay

__all__ = ["Probes", "make_probes", "verify"]

_NUM = 3
_TOLERANCE = 2e-3  # relative to 1 + |log density|; float32 sums differ by far less


class Probes(eqx.Module):
    """Stored draws.

    Attributes:
        values: By address, `(probes, ...)`.
        arguments: Argument arrays, each `(probes, ...)`, without those inside the model.
        scores: By address, the log density summed over the site, `(probes,)`, in nats.
    """

    values: dict[str, Any]
    arguments: tuple[Any, ...]
    scores: dict[str, Any]


def _inside(arguments: Arguments) -> int:
    """How many of the arrays belong to the model itself."""
    from abduce.ppl.program import pack

    return len(pack(arguments.unpack()[0], (), {}).dynamic)


def make_probes(layout: Layout, simulation: Any, rows: dict[str, Any]) -> Probes:
    """From simulations of training, one row each."""
    arguments, inside = simulation["arguments"], _inside(simulation["arguments"])
    values = {a: np.asarray(rows[a][:_NUM]) for a in (*layout.addresses, *layout.observed)}
    rest = tuple(
        np.asarray(rows[f"arguments/{i}"][:_NUM])
        if layout.designs
        else np.broadcast_to(np.asarray(x), (_NUM, *np.shape(x)))
        for i, x in enumerate(arguments.dynamic)
    )[inside:]
    return Probes(values, rest, _scores(arguments, values, rest, inside))


def _scores(arguments: Arguments, values: Any, rest: Any, inside: int) -> dict[str, np.ndarray]:
    out = _score_all(arguments.static, list(arguments.dynamic[:inside]), rest, values)
    return {a: np.asarray(x, np.float64) for a, x in out.items()}


def _score_now(static, own, rest, values):
    def one(rest, values):
        arguments = Arguments(static, [*own, *rest])
        with outside_scopes():
            program = stage_packed(arguments)
            known = {
                a: Given(x.astype(program.sites[a].dtype), trusted=True)
                for a, x in values.items()
                if program.sites[a].has_density
            }
            silent = {
                a: Given(x, trusted=True) for a, x in values.items() if a not in known
            }
            replay = Replay(record=frozenset({"score"}))
            records = run_program(replay, program, arguments, None, {**known, **silent})["records"]
        return {a: jnp.sum(records[a]["score"]) for a in known if "score" in records[a]}

    return jax.vmap(one)(tuple(rest), values)


_score_all = jax.jit(_score_now, static_argnums=0)


def verify(est: Any, problem: Problem) -> list[str]:
    """Compares the model of a problem with the one of training.

    Raises:
        InvalidModel: A site has another density; the message names it.
    """
    probes: Probes | None = est.probes
    if probes is None:
        return []
    inside = _inside(problem.arguments)
    own = [np.shape(x) for x in problem.arguments.dynamic[inside:]]
    stored = [x.shape[1:] for x in probes.arguments]
    if len(own) != len(stored):
        raise InvalidModel(
            f"ab.{est.name}: `{problem.program.name}` has {len(own)} argument arrays; the "
            f"estimator was trained with {len(stored)}."
        )
    rest: Any = probes.arguments
    if not est.layout.designs and own == stored:
        rest = tuple(
            np.broadcast_to(np.asarray(x), (_NUM, *np.shape(x)))
            for x in problem.arguments.dynamic[inside:]
        )
    if not _fits(problem, rest, probes, inside):
        return []  # the number of elements is a static argument, so other shapes cannot be staged
    scores = _scores(problem.arguments, probes.values, rest, inside)
    for address, before in probes.scores.items():
        after = scores.get(address)
        if after is None:
            continue
        gap = np.abs(after - before) / (1 + np.abs(before))
        if not (np.nan_to_num(gap, nan=np.inf) <= _TOLERANCE).all():
            i = int(np.argmax(np.nan_to_num(gap, nan=np.inf)))
            raise InvalidModel(
                f"ab.{est.name}: site {address!r} of `{problem.program.name}` has another density "
                f"than in training: {after[i]:.4g} instead of {before[i]:.4g} at a stored draw. "
                f"Its prior, its likelihood or an argument has changed. Train an estimator on this "
                f"model; for arguments that vary, give designs= (a Model that draws them)."
            )
    return []


def _fits(problem: Problem, rest: Any, probes: Probes, inside: int) -> bool:
    dynamic = [*problem.arguments.dynamic[:inside], *(x[0] for x in rest)]
    with outside_scopes():
        sites = stage_packed(Arguments(problem.arguments.static, dynamic)).sites
    return all(sites[a].shape == x.shape[1:] for a, x in probes.values.items() if a in sites)
