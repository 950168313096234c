"""Fitting a state-space model and the proposals of its filter: `ab.objectives.fivo`."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.errors import DiscreteLatent, InvalidAlgorithm, InvalidModel
from abduce.inference.problem import Problem
from abduce.inference.smc.algorithms import smc
from abduce.inference.smc.cloud import Settings
from abduce.inference.smc.filtering import filter_posterior, run_filter
from abduce.inference.smc.flow import evidence_scans
from abduce.inference.smc.population import Resampling
from abduce.inference.vi.expectation import Expectation
from abduce.inference.vi.filter_bound import (
    FilterDensity,
    FilterProposal,
    bound,
    untold,
    with_parameters,
)
from abduce.inference.vi.fit_parameters import Parameters, constrained
from abduce.inference.vi.strategies import reparam
from abduce.inference.vi.tasks import Program, as_given, blame
from abduce.inference.warning import warn
from abduce.ppl.inside import propose
from abduce.ppl.model import FunctionModel, Model
from abduce.ppl.operations import outside_scopes
from abduce.ppl.program import pack, stage
from abduce.ppl.transforms import Transformed, condition

__all__ = ["FilterTask"]


class _Bind:
    """`params, data -> p, q`; hashable."""

    def __init__(self, parameters: Parameters):
        self.parameters = parameters

    def __call__(self, params, data):
        model, (step, initial, given, args), kwargs = data.unpack()
        of_model, of_step, of_initial = self.parameters.split(params)
        p = FilterDensity(model, args, kwargs, given, of_model)
        return p, FilterProposal(bound(step, of_step), bound(initial, of_initial))

    def __hash__(self):
        return hash(self.parameters.found)

    def __eq__(self, other):
        return type(other) is type(self) and self.parameters.found == other.parameters.found


class FilterTask:
    """The parameters of a model with a scan, of a step's proposal, and of an initial one."""

    rate = 0.001
    num_particles = 1
    slice_data = None

    def __init__(self, alg: Any, step: Model | None, problem: Problem):
        self.alg, self.problem, self.objective = alg, problem, alg.objective
        program = problem.program
        if not evidence_scans(program.jaxpr, problem.given):
            raise InvalidAlgorithm(
                f"ab.objectives.fivo: `{program.name}` has no lax.scan with observed sites in it, "
                f"so there is nothing to filter. Use ab.objectives.iwelbo(...), or observe a site "
                f"of the scan (given=)."
            )
        if alg.batch is not None or alg.grad:
            raise InvalidAlgorithm(
                "ab.objectives.fivo: batch= and grad= are not for filters: rows of the data have "
                "no evidence of their own, and all choices follow their paths. Leave them out."
            )
        self.step = None if step is None else step.with_algorithm(None)
        initial = alg.objective.initial
        self.initial = None if initial is None else initial.with_algorithm(None)
        args, kwargs = problem.args, problem.kwargs
        self.data = pack(
            problem.model, (self.step, self.initial, problem.given, args), kwargs
        )  # fmt: skip
        given = {a: g.value for a, g in problem.given.items() if g.mask is None}
        calls: list[Any] = [None, None]
        if self.initial is not None:
            calls[1] = (given, *args)
        if self.step is not None:
            calls[0] = self._step_arguments()
        staged: list[Any] = [(program, problem.arguments)]
        for m, call, names in ((self.step, calls[0], {}), (self.initial, calls[1], kwargs)):
            with outside_scopes():
                staged.append(None if m is None else stage(m, call, names))
        self.parameters = Parameters(staged)
        self._messages = self._require_paths(calls)

    def _step_arguments(self) -> tuple[Any, ...]:
        """What the filter calls the proposal of a step with, as zeros."""
        seen: list[Any] = []
        probe = _Probe(self.step, _Seen(seen))
        problem = self.problem
        settings = Settings(1, Resampling(threshold=0.0), store="filter")

        def run(key):
            return run_filter(
                settings, problem.arguments, problem.given, key, proposal=probe,
                initial=self.initial,
            )["population"].total  # fmt: skip

        jax.eval_shape(run, jax.eval_shape(lambda: jax.random.key(0)))
        if not seen:
            raise InvalidAlgorithm(
                f"ab.objectives.fivo: the first lax.scan of `{problem.program.name}` is in a "
                f"branch, where no proposal is called. Leave guide= out."
            )
        return jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x,
            seen[0],
        )

    def _require_paths(self, calls: list[Any]) -> list[str]:
        """Every draw must follow a path; what jumps along it is reported."""
        given = {a: as_given(g) for a, g in self.problem.given.items()}
        model = condition(self.problem.model, given) if given else self.problem.model
        proposed = set()
        messages: list[str] = []
        for m, call, kwargs in (
            (self.step, calls[0], {}),
            (self.initial, calls[1], self.problem.kwargs),
            (model, self.problem.args, self.problem.kwargs),
        ):
            if m is None:
                continue
            program = Expectation(FunctionModel(_Density(m)), ())
            with outside_scopes():
                latents = stage(m, call, kwargs)[0].latents
            for address, info in latents.items():
                if info.is_discrete and address not in proposed:
                    raise DiscreteLatent(
                        f"ab.objectives.fivo follows the paths of the draws, but site {address!r} "
                        f"({info.site.where}) is {info.family}. Sum it out by hand, or estimate "
                        f"with ab.particle_gibbs or ab.pmmh."
                    )
            proposed |= set(latents)
            try:
                found = program.strategies(*call, **kwargs)
            except InvalidModel as e:
                what = str(e).partition(", so the cost")[0]
                messages.append(
                    f"ab.objectives.fivo: in `{m.name}`, {what}. If a density jumps there, the "
                    f"gradient leaves the jumps out."
                )
                continue
            for address, strategy in found.items():
                if not isinstance(strategy, reparam):
                    raise InvalidModel(
                        f"ab.objectives.fivo: the sampler of site {address!r} "
                        f"({latents[address].family}) has no derivative in its parameters, so the "
                        f"gradient would leave it out. Use a family with one, such as a normal "
                        f"pushed through a bijection."
                    )
        return messages

    # ------------------------------------------------------------------ as ab.vi calls it

    def prepare(self, key):
        params = self.parameters.start()
        if not params:
            raise InvalidAlgorithm(
                f"ab.objectives.fivo: neither `{self.problem.program.name}` nor a proposal has a "
                f'parameter to fit: write ab.param("name", init) in it.'
            )
        return None, params

    def warnings(self) -> list[str]:
        return self._messages

    def explain_start(self) -> str:
        return "no particle explains the data at the starting parameters."

    def program(self, fitted, objective):
        return Program(objective, _Bind(self.parameters))

    def public(self, params):
        return constrained(params, self.parameters.constraints)

    def private(self, given, params):
        return self.parameters.private(given, params)

    def posterior(self, fit: Any, key: Any, diagnostics: Any, messages: list[str]) -> Any:
        """The filter at the fitted parameters, with `num_samples` particles."""
        of_model, of_step, of_initial = self.parameters.split(fit.params)
        problem = self.problem
        given = with_parameters(problem.given, of_model)
        step, initial = bound(self.step, of_step), bound(self.initial, of_initial)
        alg = smc(
            num_particles=self.alg.num_samples, resampler=self.objective.resampler,
            threshold=self.objective.threshold, proposal=step, initial=untold(initial, of_model),
        )  # fmt: skip
        post = filter_posterior(alg, dataclasses.replace(problem, given=given), key)
        if fit.num_nonfinite:
            messages.append(blame(fit, fit.first_bad[0], []))
        warn(messages)
        resume = None if step is None else {"guide": FittedProposal(step, initial)}
        return dataclasses.replace(
            post, algorithm="vi", params=self.public(fit.params), resume=resume,
            arguments=pack(bound(problem.model, of_model), problem.args, problem.kwargs),
            given={a: x for a, x in post.given.items() if a in problem.given},
            diagnostics={**diagnostics, **post.diagnostics},
            warnings=(*messages, *post.warnings),
        )  # fmt: skip


class FittedProposal(Transformed):
    """The fitted proposal of a step, with the one of what is outside the scan at hand.

    Attributes:
        initial: A Model called as `initial(given, *args)`, or None.
    """

    base: Model
    initial: Model | None
    algorithm: Any = None

    def emit(self, *args, **kwargs):
        return self.base.emit(*args, **kwargs)


class _Density:
    """The log density of a model at its own draw, as an objective; hashable."""

    def __init__(self, model: Model):
        self.model = model
        self.__name__ = model.name

    def __call__(self, *args, **kwargs):
        return propose(self.model, *args, **kwargs)[1]


class _Seen:
    """A list that is compared by identity."""

    def __init__(self, found: list[Any]):
        self.found = found


class _Probe(Transformed):
    """Notes what the filter calls a proposal with."""

    base: Model
    seen: Any = eqx.field(static=True)
    algorithm: Any = None

    def emit(self, *args, **kwargs):
        self.seen.found.append(
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x,
                args,
            )
        )
        return self.base.emit(*args, **kwargs)
