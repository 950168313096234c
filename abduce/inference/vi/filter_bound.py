"""The log evidence estimate of a particle filter, as an objective: `ab.objectives.fivo`.

The filter is the one of `ab.smc`, run inside the objective as one random number whose sampler is a
differentiable function of parameters: the draws follow their paths, and the ancestors that
resampling chooses are held fixed. What that leaves out is the effect of the parameters on which
ancestors are chosen. With `resampling_gradient` it is put back by its score:

    d E[log Z] = E[ d log Z + sum_t (log Z - log Z_t) d log p(ancestors at t | weights) ]

where `log Z_t` is the estimate before the ancestors at `t` are drawn, on which they have no effect
(Maddison et al. 2017, equation 7; Naesseth et al. 2018, equation 8). It is carried along with the
weights: each increment of the log evidence is multiplied by `exp(L - stop(L))`, `L` the log
probability of all ancestors chosen before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.dist import Simulator
from abduce.inference.smc.cloud import Settings
from abduce.inference.smc.filtering import run_filter
from abduce.inference.smc.population import Population, Resampling, take
from abduce.inference.vi.fitted import WithParams
from abduce.inference.vi.strategies import zero_valued
from abduce.ppl.language import sample
from abduce.ppl.model import Model
from abduce.ppl.operations import outside_scopes
from abduce.ppl.program import Arguments, Static, pack
from abduce.ppl.replay import Given
from abduce.ppl.transforms import Transformed

__all__ = [
    "FilterDensity",
    "FilterProposal",
    "HeldResampling",
    "ScoredPopulation",
    "bound",
    "untold",
    "with_parameters",
]


@dataclasses.dataclass(frozen=True)
class FilterProposal:
    """The proposals of a filter, with parameters bound: of a step, and of what is outside the scan.

    Either may be None: latents come from the model.
    """

    step: Model | None
    initial: Model | None


@dataclasses.dataclass(frozen=True)
class FilterDensity:
    """A model with a scan and its data, with parameters bound."""

    model: Model
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    given: Mapping[str, Any]
    params: Mapping[str, Any]

    def log_evidence(self, settings: Any, q: FilterProposal) -> Any:
        """The log of a filter's estimate of the evidence, as part of the program, in nats.

        Args:
            settings: An `ab.objectives.fivo`.
            q: The proposals.
        """
        given = with_parameters(self.given, self.params)
        initial = untold(q.initial, self.params)
        packed = pack(self.model, (q.step, initial, given, self.args), dict(self.kwargs))
        run = _Run(packed.static, settings)
        return sample("log_evidence", Simulator(run, *packed.dynamic))


@dataclasses.dataclass(frozen=True)
class _Run:
    """One filter; hashable, so that the program is staged once."""

    static: Static
    settings: Any

    def __call__(self, key: Any, *dynamic: Any) -> Any:
        model, (step, initial, given, args), kwargs = Arguments(
            self.static, list(dynamic)
        ).unpack()  # fmt: skip
        scored, n = self.settings.resampling_gradient, self.settings.num_particles
        rule = ScoredResampling if scored else HeldResampling
        resampling = rule(self.settings.resampler, self.settings.threshold)
        with outside_scopes():
            out = run_filter(
                Settings(n, resampling, store="filter"), pack(model, args, kwargs), given, key,
                proposal=step, initial=initial,
                population=ScoredPopulation.start(n) if scored else None,
            )  # fmt: skip
        return out["population"].total


class HeldResampling(Resampling):
    """Resampling through which derivatives pass along the chosen ancestors alone."""

    def ancestors(self, key: Any, log_weights: Any, positions: Any = None) -> Any:
        """Draws ancestors, shape `(N,)`; the weights are held fixed."""
        fixed = jax.lax.stop_gradient((log_weights, positions))
        return super().ancestors(key, *fixed)


class ScoredPopulation(Population):
    """A population that knows the log probability of the ancestors chosen so far.

    Attributes:
        log_choices: Value 0; its derivative is that of the log probability.
    """

    log_choices: Any = None

    @classmethod
    def start(cls, num_particles: int, dtype: Any = None) -> ScoredPopulation:
        """Equal weights, evidence 1, nothing chosen."""
        start = Population.start(num_particles, dtype)
        return _scored(start, jnp.zeros_like(start.log_mean))

    @property
    def total(self) -> Any:
        """Log evidence so far; the last increment is credited to the choices before it."""
        return self.log_evidence + self.log_mean * jnp.exp(self.log_choices)

    def reweight(self, increments: Any) -> ScoredPopulation:
        """Adds log weights, shape `(N,)` or scalar; a NaN counts as zero weight."""
        return _scored(super().reweight(increments), self.log_choices)


def _scored(p: Population, log_choices: Any) -> ScoredPopulation:
    return ScoredPopulation(p.log_weights, p.log_evidence, p.log_mean, p.ess, log_choices)


class ScoredResampling(HeldResampling):
    """Independent ancestors at every step (or none), whose log probability is added up."""

    def __call__(
        self, key: Any, population: Any, tree: Any, positions: Any = None, choose: Any = None
    ) -> Any:
        """As of `Resampling`; `choose` is of filters on points, which this one is not."""
        n = population.log_weights.shape[0]
        due = self.due(population)
        if self.threshold == 0:
            return population, tree, jnp.arange(n, dtype=jnp.int32), due
        ancestors = self.ancestors(key, population.log_weights, positions)
        log_p = population.log_weights - population.log_mean - math.log(n)
        fresh = Population.weighted(jnp.zeros_like(population.log_weights), population.total)
        chosen = population.log_choices + zero_valued(jnp.sum(log_p[ancestors]))
        return _scored(fresh, chosen), take(tree, ancestors), ancestors.astype(jnp.int32), due


# ---------------------------------------------------------------------- parameters


def bound(model: Model | None, values: Mapping[str, Any]) -> Model | None:
    """A proposal whose parameters have these values."""
    return WithParams(model, dict(values)) if model is not None and values else model


def with_parameters(given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Given]:
    """What a filter's program is given, data and parameters of the model.

    `WithParams` would emit the scan anew, without the names of its carry, which proposals need.
    """
    return {**given, **{a: Given(x, shared=True) for a, x in values.items()}}


def untold(initial: Model | None, values: Mapping[str, Any]) -> Model | None:
    """An initial proposal that sees the data alone."""
    return _Untold(initial, tuple(values)) if initial is not None and values else initial


class _Untold(Transformed):
    base: Model
    names: tuple[str, ...] = eqx.field(static=True)
    algorithm: Any = None

    def emit(self, given, *args, **kwargs):
        data = {a: x for a, x in given.items() if a not in self.names}
        return self.base.emit(data, *args, **kwargs)
