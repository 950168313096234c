"""Paths of distributions from a start, that can be drawn, to a posterior.

Along a path the log density is

    log pi_w(x) = log_start(x) + sum_k w_k log_ratio_k(x)

with weights that grow from 0 to 1, one component after the other: at temperature `t` in [0, 1],
`w_k = clip(t K - k, 0, 1)`. With one component, the likelihood, this is tempering; with a component
for each block of observations it is data tempering, in which an observation may enter in parts;
with the ratios of successive models it leads from one to the next.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from abduce.errors import InvalidAlgorithm
from abduce.inference.problem import Problem, make_problem
from abduce.inference.target import FlatTarget, Split, make_target, unconstrain_now
from abduce.ppl.masked import Masked
from abduce.ppl.model import Model
from abduce.ppl.operations import outside_scopes, run_program
from abduce.ppl.program import Arguments, stage_packed
from abduce.ppl.replay import Given, Replay
from abduce.ppl.transforms import condition

__all__ = ["Density", "Path", "make_path"]

_FAR = 80.0  # where a draw that rounding put on the edge of its support goes, unconstrained


@dataclasses.dataclass(frozen=True)
class Path:
    """The static part of a path; the arrays are in the `inputs` that `make_path` returns too.

    Particles are flat vectors of unconstrained coordinates, or choice maps.

    Attributes:
        target: For flat particles, the density of the model; None for choice maps.
        kind: 'likelihood', 'data' or 'models'.
        latents: Addresses of the sites to infer.
        covered: Those among them that the proposal draws.
        pointwise: For `kind='data'`, the observed sites whose leading axis enters in blocks.
        num_blocks, num_rows: Their number, and the length of that axis.
        num_components: Length of `log_ratio`.
    """

    target: FlatTarget | None
    kind: str
    latents: tuple[str, ...]
    covered: tuple[str, ...] = ()
    pointwise: tuple[str, ...] = ()
    num_blocks: int = 0
    num_rows: int = 0
    num_components: int = 1

    @property
    def is_flat(self) -> bool:
        """Whether particles are vectors."""
        return self.target is not None

    # ---------------------------------------------------------------- temperatures

    def weights(self, temperature: Any) -> Any:
        """Weights of the components, shape `(K,)`."""
        k = self.num_components
        return jnp.clip(temperature * k - jnp.arange(k), 0.0, 1.0)

    def increment(self, log_ratio: Any, old: Any, new: Any) -> Any:
        """Log weight of a step between temperatures; `log_ratio` has shape `(..., K)`."""
        if self.num_components == 1:
            step = jnp.reshape(new - old, (1,))  # no detour that would round a tiny step away
        else:
            step = self.weights(new) - self.weights(old)
        return weighted(step, log_ratio)

    # ---------------------------------------------------------------- particles

    def draw(self, inputs: Any, key: Any) -> Any:
        """One particle from the start."""
        arguments, given = inputs["model"], inputs["given"]
        if inputs["models"]:
            arguments, given = inputs["models"][0][0], {}  # only its prior counts
        model, args, kwargs = arguments.unpack()
        trace, _ = model.generate(key, given, *args, proposal=inputs["proposal"], **kwargs)
        choices = {a: trace.choices[a] for a in self.latents}
        if self.target is None:
            return choices
        data = inputs["flat"]
        program = self.target.program(data)
        given = {
            a: Given(program.sites[a].to_physical(x), trusted=True) for a, x in choices.items()
        }
        q = unconstrain_now(self.target, data, given)
        q = jnp.nan_to_num(q, nan=0.0, posinf=_FAR, neginf=-_FAR)
        for slot in self.target.slots:
            info = program.sites[slot.address]
            if not info.conditional:
                continue
            on = info.to_physical(trace.active[slot.address])  # elsewhere a standard normal
            on = on.reshape(on.shape + (1,) * (len(slot.shape) - on.ndim))
            u = jax.random.normal(jax.random.fold_in(key, slot.start), slot.shape, q.dtype)
            old = q[slot.start : slot.stop].reshape(slot.shape)
            q = q.at[slot.start : slot.stop].set(jnp.where(on, old, u).reshape(-1))
        return q

    def values(self, inputs: Any, position: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Latents and deterministics of a particle in the users' layout, and where active."""
        replay = Replay(record=frozenset({"value"}), score=False)
        if self.target is not None:
            records = self.target.run(replay, inputs["flat"], position)["records"]
        else:
            records = _at(replay, inputs["conditioned"], position)["records"]
        kept = {
            a: r
            for a, r in records.items()
            if "value" in r and (a in self.latents or a in self._deterministics(inputs))
        }
        return (
            {a: r["value"] for a, r in kept.items()},
            {a: r["active"] for a, r in kept.items() if "active" in r},
        )

    def _deterministics(self, inputs: Any) -> Any:
        with outside_scopes():
            return stage_packed(inputs["model"]).of_kind("deterministic")

    # ---------------------------------------------------------------- densities

    def parts(self, inputs: Any, position: Any) -> tuple[Any, Any]:
        """`log_start` and `log_ratio`, shape `(K,)`, of a particle; in nats.

        With flat particles `log_start` includes the log Jacobian.
        """
        record: set[str] = set()
        if self.pointwise:
            record |= {"score"}
        if self.covered:
            record |= {"score", "value"}
        if self.kind == "models":
            record |= {"value", "jacobian"}
        out = self._evaluate(inputs, position, frozenset(record))
        prior, evidence, records = out["log_density"], out["weight"], out["records"]
        choices = position
        if self.is_flat and "value" in record:
            choices = {a: records[a]["value"] for a in self.latents}
        if self.kind == "data":
            ratios = self._blocks(records, evidence)
        elif self.kind == "models":
            prior, ratios = self._sequence(inputs, choices, prior, evidence, records)
        else:
            ratios = [evidence]
        if self.covered:
            given, (_, args, kwargs) = inputs["given"], inputs["model"].unpack()
            drawn = {a: choices[a] for a in self.covered}
            log_q = inputs["proposal"].log_density(drawn, dict(given), *args, **kwargs)
            scores = sum(jnp.sum(records[a]["score"]) for a in self.covered)
            correction = scores - log_q
            prior = prior - correction
            if self.num_components > len(ratios):
                ratios = [correction, *ratios]
            else:
                ratios = [ratios[0] + correction, *ratios[1:]]
        return jnp.asarray(prior), jnp.stack(ratios)

    def _evaluate(self, inputs: Any, position: Any, record: frozenset[str]) -> dict[str, Any]:
        if self.target is not None:
            return self.target.split_run(inputs["flat"], position, record)
        return _at(Split(record, latents=frozenset(self.latents)), inputs["conditioned"], position)

    def _blocks(self, records: Any, evidence: Any) -> list[Any]:
        """Log likelihood of each block of rows; what has no rows enters with the first block."""
        rows = 0.0
        for address in self.pointwise:
            score = records[address]["score"]
            rows = rows + jnp.sum(score.reshape(self.num_rows, -1), 1)
        size = math.ceil(self.num_rows / self.num_blocks)
        rows = jnp.pad(jnp.asarray(rows), (0, size * self.num_blocks - self.num_rows))
        blocks = list(jnp.sum(rows.reshape(self.num_blocks, size), 1))
        others = [a for a, r in records.items() if a in self._scalars(records)]
        if others:
            blocks[0] = blocks[0] + sum(jnp.sum(records[a]["score"]) for a in others)
        return blocks

    def _scalars(self, records: Any) -> set[str]:
        skipped = {*self.latents, *self.pointwise}
        return {a for a, r in records.items() if "score" in r and a not in skipped}

    def _sequence(self, inputs, choices, prior, evidence, records):
        """From the prior of the first model through all of them to the posterior."""
        latents = frozenset(self.latents)
        total, parts = None, []
        for arguments, given in inputs["models"]:
            out = _at(Split(frozenset(), latents=latents), arguments, choices, given)
            log_p, log_l = out["log_density"], out["weight"]
            parts.append(log_l if total is None else log_p + log_l - total)
            start = log_p if total is None else start  # noqa: F821
            total = log_p + log_l
        jacobian = 0.0
        if self.is_flat:  # the coordinates are those of the last model, for all
            jacobian = sum(jnp.sum(r["jacobian"]) for r in records.values() if "jacobian" in r)
        own = prior - jacobian + evidence
        return start + jacobian, [*parts, own - total]

    def lost(self, inputs: Any, position: Any) -> dict[str, Any]:
        """By address, whether a site's log density is not finite somewhere."""
        records = self._evaluate(inputs, position, frozenset({"score"}))["records"]
        return {a: ~jnp.all(jnp.isfinite(r["score"])) for a, r in records.items() if "score" in r}


@dataclasses.dataclass(frozen=True)
class Density:
    """One distribution of a path: what a move leaves invariant.

    Attributes:
        path, inputs: Of the path.
        weights: Of the components, shape `(K,)`.
    """

    path: Path
    inputs: Any
    weights: Any

    def parts(self, position: Any) -> tuple[Any, Any]:
        """`log_start` and `log_ratio` of one particle."""
        return self.path.parts(self.inputs, position)

    def temper(self, log_start: Any, log_ratio: Any) -> Any:
        """The log density from its parts; any leading axes."""
        return log_start + weighted(self.weights, log_ratio)


def weighted(weights: Any, log_ratio: Any) -> Any:
    """`sum_k w_k r_k`, in which 0 times -inf is 0."""
    on = weights > 0
    return jnp.sum(jnp.where(on, weights * jnp.where(on, log_ratio, 0.0), 0.0), -1)


def no_nan(x: Any) -> Any:
    """What is NaN or infinitely large becomes -inf: a density of zero."""
    return jnp.where(jnp.isnan(x) | (x == jnp.inf), -jnp.inf, x)


def _at(replay: Replay, arguments: Arguments, choices: Any, given: Any = None) -> dict[str, Any]:
    """Runs a program at a choice map."""
    with outside_scopes():
        program = stage_packed(arguments)
        inputs = {**(given or {}), **{a: Given(x) for a, x in choices.items()}}
        return run_program(replay, program, arguments, None, inputs, weight=True)


# -------------------------------------------------------------------- construction


def make_path(problem: Problem, kind: Any, proposal: Any, flat: bool) -> tuple[Path, Any]:
    """Builds the path of a problem.

    Args:
        problem: The model and its data.
        kind: 'likelihood', 'data', or a sequence of models that ends in the model itself.
        proposal: What to start from; None: the prior.
        flat: Whether particles are flat vectors (continuous latents only).

    Returns:
        The path and its inputs.
    """
    given = {
        a: g.value if g.mask is None else Masked(g.value, g.mask) for a, g in problem.given.items()
    }
    latents = tuple(problem.latents)
    covered = _covered(problem, proposal, given)
    inputs: dict[str, Any] = {
        "model": problem.arguments, "given": given, "proposal": proposal, "flat": None,
        "conditioned": None, "models": (),
    }  # fmt: skip
    target = None
    if flat:
        target, inputs["flat"] = make_target(problem, "ab.smc")
    else:
        model = condition(problem.model, given) if given else problem.model
        inputs["conditioned"] = model._stage(problem.args, problem.kwargs)[1]
    path = Path(target, "likelihood", latents, covered)
    if kind == "likelihood":
        return path, inputs
    if kind == "data":
        sites, rows = _rows(problem)
        blocks = min(rows, 128)
        size = math.ceil(rows / blocks)
        blocks = math.ceil(rows / size)
        return dataclasses.replace(
            path, kind="data", pointwise=sites, num_rows=rows, num_blocks=blocks,
            num_components=blocks + bool(covered),
        ), inputs  # fmt: skip
    if isinstance(kind, str) or not isinstance(kind, (tuple, list)):
        raise InvalidAlgorithm(
            f"ab.smc: path= is 'likelihood', 'data' or a tuple of models that ends in the model "
            f"itself, got {kind!r}."
        )
    if proposal is not None:
        raise InvalidAlgorithm(
            "ab.smc: a path of models starts from the prior of the first one, so it takes no "
            "proposal=. Put a model with that prior first."
        )
    inputs["models"] = _models(problem, kind)
    return dataclasses.replace(path, kind="models", num_components=len(kind)), inputs


def _covered(problem: Problem, proposal: Any, given: Any) -> tuple[str, ...]:
    if proposal is None:
        return ()
    if not isinstance(proposal, Model):
        raise InvalidAlgorithm(
            f"ab.smc: proposal= takes a Model called as proposal(given, *args), got "
            f"{type(proposal).__name__}. Decorate the function with @ab.model."
        )
    found = proposal.program(given, *problem.args, **problem.kwargs)
    for address, info in found.latents.items():
        own = problem.latents.get(address)
        if own is None:
            raise InvalidAlgorithm(
                f"ab.smc: the proposal draws {address!r}, which is not a latent of "
                f"`{problem.program.name}` ({', '.join(problem.latents)})."
            )
        if own.partial or address in given or info.conditional or own.conditional:
            raise InvalidAlgorithm(
                f"ab.smc: the proposal draws {address!r}, which is partly observed or in a "
                f"branch. Tempering cannot start from that: leave it to its prior."
            )
    return tuple(found.latents)


def _rows(problem: Problem) -> tuple[tuple[str, ...], int]:
    """The sites with evidence that have rows, and how many rows."""
    lengths: dict[str, int] = {}
    for address, info in problem.program.sites.items():
        seen = info.kind == "sample" and (info.observed or address in problem.given)
        if not seen:
            continue
        if address in problem.latents:
            raise InvalidAlgorithm(
                f"ab.smc: path='data' needs wholly observed sites, but {address!r} is observed in "
                f"part. Use path='likelihood'."
            )
        if info.batch_ndim:
            lengths[address] = info.shape[0]
    if not lengths or len(set(lengths.values())) > 1:
        text = ", ".join(f"{a} {n}" for a, n in lengths.items()) or "none has one"
        raise InvalidAlgorithm(
            f"ab.smc: path='data' lets the observations enter along the leading axis of the "
            f"observed sites, which must be of one length ({text}). Use path='likelihood'."
        )
    return tuple(lengths), next(iter(lengths.values()))


def _models(problem: Problem, models: Any) -> Any:
    own = problem.model
    last = models[-1] if models else None
    if not isinstance(last, Model) or last.with_algorithm(None) != own:
        raise InvalidAlgorithm(
            f"ab.smc: path= must end in the model itself, `{problem.program.name}`: "
            f"path=(simpler, ..., {problem.program.name})."
        )
    out = []
    for m in models[:-1]:
        if not isinstance(m, Model):
            raise InvalidAlgorithm(f"ab.smc: path= takes models, got {type(m).__name__}.")
        bare = m.with_algorithm(None)
        sites = bare.program(*problem.args, **problem.kwargs).sites
        given = {a: g.value for a, g in problem.given.items() if a in sites}
        other = make_problem(bare, problem.args, given, problem.kwargs, "ab.smc")
        if {a: s.shape for a, s in other.latents.items()} != {
            a: s.shape for a, s in problem.latents.items()
        } or any(problem.given[a].mask is not None for a in problem.given):
            raise InvalidAlgorithm(
                f"ab.smc: path=: the models must have the same latents, wholly unobserved; "
                f"`{other.program.name}` has {sorted(other.latents)}, `{problem.program.name}` has "
                f"{sorted(problem.latents)}."
            )
        out.append((other.arguments, other.given))
    return tuple(out)
