"""What is fitted: a family over flat coordinates, or a guide that is a Model.

A task knows how to begin, what program the objective is, how a step takes its rows of the data,
and how fitted parameters become draws and a Model.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from abduce.errors import InvalidAlgorithm, InvalidModel, NoDensity
from abduce.inference.init import starting_points
from abduce.inference.problem import Problem
from abduce.inference.target import constrain, make_target
from abduce.inference.vi.bound import FlatDensity, FlatGuide, ModelDensity, ModelGuide
from abduce.inference.vi.expectation import Expectation
from abduce.inference.vi.fit_parameters import Parameters, constrained, like
from abduce.inference.vi.fitted import FittedFamily, WithParams
from abduce.inference.vi.frame import begin
from abduce.inference.vi.minibatch import Batches, Rescaled, Rows
from abduce.inference.vi.objectives import diwhvi, elbo, iwhvi, sticking_the_landing
from abduce.ppl.language import sample
from abduce.ppl.masked import Masked
from abduce.ppl.model import Model
from abduce.ppl.program import pack
from abduce.ppl.replay import Replay

__all__ = ["FlatTask", "ModelTask", "Program", "as_given", "blame"]

_TRIES = 100


class Program(Model):
    """The objective as a program; or, with `draw`, a draw and its log weight."""

    objective: Any = eqx.field(static=True)
    bind: Any = eqx.field(static=True)
    algorithm: Any = None

    @property
    def name(self) -> str:
        return getattr(self.objective, "__name__", type(self.objective).__name__)

    def emit(self, params: Any, data: Any) -> Any:
        p, q = self.bind(params, data)
        return self.objective(p, q)


def as_given(g: Any) -> Any:
    """An observed value as users pass it."""
    return g.value if g.mask is None else Masked(g.value, g.mask)


def _draw(p: Any, q: Any) -> Any:
    """A draw with its log weight, as an 'objective'."""
    z, log_q = q.propose()
    return z, p(z) - log_q


def _density_alone(p: Any, q: Any) -> Any:
    return p(sample("guide", dist.Normal(jnp.zeros(q.family), 1.0).to_event(1)))


def _draw_only(p: Any, q: Any) -> Any:
    return q.propose()[0], jnp.zeros(())


def _choices_only(p: Any, q: Any) -> Any:
    return q.draw(), jnp.zeros(())


@eqx.filter_jit
def _many(program: Model, params: Any, data: Any, key: Any, n: int) -> Any:
    def one(k):
        return program.simulate(k, params, data).retval

    return jax.lax.map(one, jax.random.split(key, n), batch_size=min(n, 500))


class _FlatBind:
    """`params, data -> p, q`; hashable."""

    def __init__(self, target, family):
        self.key = (target, family)

    def __call__(self, params, data):
        target, family = self.key
        return FlatDensity(target, data), FlatGuide(family, params)

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return type(other) is type(self) and self.key == other.key


class FlatTask:
    """A family of `ab.guides`."""

    num_particles = 16

    def __init__(self, alg: Any, guide: Any, problem: Problem):
        if not alg.needs_density:
            raise InvalidAlgorithm(
                f"ab.objectives.{type(alg.objective).__name__} fits a guide to simulated data, so "
                f"it needs a guide that is a Model called as guide(given, *args), got {guide!r}."
            )
        self.rate = guide.rate
        self.alg, self.guide, self.problem = alg, guide, problem
        self.batches = None
        full = problem
        if alg.batch is not None:
            self.batches = Batches(alg.batch, alg.batch_size, problem)
            self.batches.require_no_local(problem)
            problem = self.batches.problem(problem)
        self.target, self.data = make_target(problem, "ab.vi")
        self.full_target, self.full_data = self.target, self.data
        self.slice_data = None
        if self.batches is not None:
            self.full_target, self.full_data = make_target(full, "ab.vi")
            rows = Rows(self.full_data, self.data, self.batches.total, self.batches.size)
            self.data, self.slice_data = self.full_data, rows

    def prepare(self, key):
        k1, k2 = jax.random.split(key)
        target, data = self.full_target, self.full_data
        propose, describe = starting_points(self.alg.init, self.problem, target, data, 1, "ab.vi")
        for attempt in range(_TRIES):
            start = jnp.asarray(np.asarray(propose(jax.random.fold_in(k1, attempt), attempt))[0])
            if np.isfinite(float(_density(target, data, start))):
                break
        self._explain = functools.partial(describe, np.asarray(start))
        return begin(self.guide, k2, target, data, start)

    def explain_start(self) -> str:
        return str(self._explain())

    def warnings(self) -> list[str]:
        """What a family leaves as it is, and where the path derivative may be wrong."""
        kept = list(self.problem.program.of_kind("param"))
        messages = [
            f"ab.vi: the families of ab.guides are over latents alone, so {', '.join(kept)} "
            f"{'keep their initial values' if len(kept) > 1 else 'keeps its initial value'}. To "
            f"fit parameters of the model, pass a Model as guide=."
        ] if kept else []  # fmt: skip
        program = Expectation(Program(_density_alone, _FlatBind(self.target, self.target.dim)), ())
        try:
            program.strategies((), self.data)
        except InvalidModel as e:
            what = str(e).partition(", so the cost")[0].removeprefix("the value of 'guide' ")
            messages += [
                f"ab.vi: in the log density of `{self.problem.program.name}`, a value that depends "
                f"on the latents {what}. If the density jumps there, the derivative along the path "
                f"leaves the jumps out: pass a Model as guide= with grad=ab.grad.score() at its "
                f"choices, or use ab.smc or ab.mh."
            ]
        return messages

    def program(self, family, objective):
        if isinstance(objective, (iwhvi, diwhvi)):
            raise InvalidAlgorithm(
                "ab.vi: this objective sums out choices of the guide that the model has not, which "
                "the families of ab.guides do not have. Pass a Model as guide=."
            )
        if not family.has_density and not isinstance(objective, elbo):
            raise NoDensity(
                "ab.vi: ab.guides.implicit has no density, only an estimate of its entropy: use "
                "objective=ab.objectives.elbo()."
            )
        return Program(objective, _FlatBind(self.target, family))

    def default_objective(self, family):
        return sticking_the_landing() if family.sticks else elbo()

    def public(self, params):
        return params

    def private(self, given, params):
        return like(given, params)

    def draw(self, family, params, key, n):
        bind = _FlatBind(self.full_target, family)
        program = Program(_draw if family.has_density else _draw_only, bind)
        u, log_w = _many(program, params, self.full_data, key, n)
        draws, active = constrain(
            self.full_target, self.full_data, self.problem.program, np.asarray(u)
        )
        draws = {a: x[None] for a, x in draws.items()}
        active = {a: x[None] for a, x in active.items()}
        weights = np.asarray(log_w) if family.has_density else None
        return draws, active, weights

    def fitted_model(self, family, params):
        return FittedFamily(
            params=params, data=self.full_data, target=self.full_target, family=family,
            source=self.problem.program.name,
        )  # fmt: skip

    def fitted_arguments(self, params):
        return self.problem.arguments

    def blame(self, family, fit, key):
        step, params = fit.first_bad
        u, _ = family.draw(params, jax.random.normal(key, (family.noise_dim,)))
        record = frozenset({"score"})
        out = self.full_target.run(Replay(record=record), self.full_data, u)
        bad = [
            a for a, r in out["records"].items()
            if "score" in r and not np.isfinite(np.asarray(r["score"])).all()
        ]  # fmt: skip
        return blame(fit, step, bad)


@functools.partial(jax.jit, static_argnums=0)
def _density(target, data, u):
    return target(data, u)


def blame(fit: Any, step: int, bad: list[str]) -> str:
    where = f" (first at step {step}"
    where += f", from site {', '.join(map(repr, bad))})" if bad else ")"
    return (
        f"ab.vi: {fit.num_nonfinite} of {len(fit.values)} steps{where} gave numbers that are not "
        f"finite and were skipped. Look for overflow or a support that the guide leaves; or lower "
        f"the rate of the optimizer."
    )


# ---------------------------------------------------------------------- Models


class _ModelBind:
    """`params, data -> p, q` for a guide that is a Model; hashable."""

    def __init__(self, latents, parameters):
        self.key = (latents, parameters.found)
        self.parameters = parameters

    def __call__(self, params, data):
        model, (guide, given, args), kwargs = data.unpack()
        of_model, of_guide = self.parameters.split(params)
        p = ModelDensity(model, args, kwargs, given, of_model)
        seen = {a: g.values if isinstance(g, Masked) else g for a, g in given.items()}
        return p, ModelGuide(guide, self.key[0], (seen, *args), kwargs, of_guide)

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return type(other) is type(self) and self.key == other.key


class ModelTask:
    """A guide that is a Model."""

    rate = 0.001
    num_particles = 1

    def __init__(self, alg: Any, guide: Model, problem: Problem):
        self.alg, self.problem = alg, problem
        model = problem.model
        guide = guide.with_algorithm(None) if getattr(guide, "algorithm", None) else guide
        given = {a: as_given(g) for a, g in problem.given.items()}
        if any(isinstance(g, Masked) for g in given.values()):
            raise InvalidAlgorithm(
                "ab.vi: a guide that is a Model cannot cover data that are observed in part "
                "(ab.masked). Use a family of ab.guides."
            )
        if not alg.needs_density:
            require_simulated(alg, problem)
        self.model, self.guide, self.given = model, guide, given
        self.args, self.kwargs = problem.args, problem.kwargs
        self.slice_data = None
        full = pack(model, (guide, given, self.args), self.kwargs)
        self.data = self.all_data = full
        if alg.batch is not None:
            batches = Batches(alg.batch, alg.batch_size, problem)
            local = batches.addresses(model, given, self.args, self.kwargs, given_first=False)
            mine = batches.addresses(guide, given, self.args, self.kwargs, given_first=True)
            scaled = Rescaled(model, tuple(local), batches.scale)
            scaled_guide = Rescaled(guide, tuple(mine), batches.scale)
            self.data = pack(scaled, (scaled_guide, given, self.args), self.kwargs)
            given, args, kwargs = batches.take(given, self.args, self.kwargs, batches.size)
            small = pack(scaled, (scaled_guide, given, args), kwargs)
            self.slice_data = Rows(self.data, small, batches.total, batches.size)
            full = small
        model, (guide, given, args), kwargs = full.unpack()
        self.guide_program, guide_arguments = guide._stage((given, *args), kwargs)
        staged = (model._stage(args, kwargs), (self.guide_program, guide_arguments))
        self.parameters = Parameters(staged)
        self._check_latents()
        self._check_scored()

    def _check_latents(self):
        mine = set(self.problem.latents)
        theirs = {a for a, s in self.guide_program.sites.items() if s.is_latent}
        summed = isinstance(self.alg.objective, (iwhvi, diwhvi))
        if not mine <= theirs or (theirs - mine and not summed):
            raise InvalidAlgorithm(
                f"ab.vi: the guide `{self.guide.name}` must draw the latents of the model. Model: "
                f"{', '.join(sorted(mine))}. Guide: {', '.join(sorted(theirs)) or 'none'}. "
                + (
                    f"Only in the model: {', '.join(sorted(mine - theirs))}. "
                    if mine - theirs else ""
                )
                + (
                    f"Only in the guide: {', '.join(sorted(theirs - mine))} (sum them out with "
                    f"ab.objectives.iwhvi(...) or ab.marginal)."
                    if theirs - mine else ""
                )
            )  # fmt: skip

    def _check_scored(self):
        """The guide has densities.

        Raises:
            NoDensity: It has not, and the objective needs them.
        """
        for address, info in self.guide_program.latents.items():
            if not info.has_density and self.alg.needs_density:
                raise NoDensity(
                    f"ab.vi: site {address!r} of the guide ({info.site.where}) is a "
                    f"dist.Simulator, which has no density. Use objective=ab.objectives.mmd()."
                )

    def prepare(self, key):
        params = self.parameters.start()
        if not params:
            raise InvalidAlgorithm(
                f"ab.vi: neither the model nor the guide `{self.guide.name}` has a parameter to "
                f'fit: write ab.param("name", init) in it.'
            )
        return None, params

    def warnings(self) -> list[str]:
        return []

    def explain_start(self) -> str:
        return "the guide's draws have no density under the model, or the other way round."

    def _bind(self):
        return _ModelBind(tuple(self.problem.latents), self.parameters)

    def program(self, fitted, objective):
        return Program(objective, self._bind())

    def default_objective(self, fitted):
        return elbo()

    def public(self, params):
        return constrained(params, self.parameters.constraints)

    def private(self, given, params):
        return self.parameters.private(given, params)

    def _objective(self):
        summed = self.alg.objective
        if not isinstance(summed, (iwhvi, diwhvi)):
            return _draw
        return _MarginalDraw(summed.num_auxiliary, summed.reverse)

    def draw(self, fitted, params, key, n):
        sites = [*self.problem.program.sites.values(), *self.guide_program.sites.values()]
        scored = all(s.has_density for s in sites if s.kind == "sample")
        program = Program(self._objective() if scored else _choices_only, self._bind())
        z, log_w = _many(program, params, self.all_data, key, n)
        draws = {a: np.asarray(z[a])[None] for a in self.problem.program.sites if a in z}
        return draws, None, np.asarray(log_w) if scored else None

    def fitted_model(self, fitted, params):
        return WithParams(self.guide, self.parameters.split(params)[1])

    def fitted_arguments(self, params):
        """What predictions are made with: the model with its fitted parameters."""
        values = self.parameters.split(params)[0]
        if not values:
            return self.problem.arguments
        return pack(WithParams(self.problem.model, values), self.args, self.kwargs)

    def blame(self, fitted, fit, key):
        step, params = fit.first_bad
        model, guide = self.parameters.split(params)
        bad: set[str] = set()
        for k in jax.random.split(key, 20):
            trace = self.guide.simulate(k, self.given, *self.args, params=guide, **self.kwargs)
            z = {a: trace.choices[a] for a in self.problem.latents}
            full, _ = self.model.generate(
                k, {**self.given, **z}, *self.args, params=model, **self.kwargs
            )
            bad |= {a for a, s in full.scores.items() if not np.isfinite(np.asarray(s)).all()}
        return blame(fit, step, sorted(bad))


def require_simulated(alg: Any, problem: Problem) -> None:
    """The model and its data can be simulated as they are.

    Raises:
        InvalidAlgorithm: They cannot.
    """
    name = f"ab.objectives.{type(alg.objective).__name__}"
    if alg.batch is not None:
        raise InvalidAlgorithm(
            f"{name} simulates all data anew at each step: leave batch= and batch_size= out."
        )
    for address, info in problem.program.sites.items():
        why = None
        if info.kind == "factor":
            why = "is a factor, which cannot be simulated"
        elif info.kind == "sample" and info.observed:
            why = "is observed in the program; pass its value by given= instead of obs="
        elif info.kind == "sample" and info.conditional:
            why = "is in a branch, so that not every simulation has it"
        if why is not None:
            raise InvalidAlgorithm(f"{name}: site {address!r} ({info.site.where}) {why}.")
    if not problem.given:
        raise InvalidAlgorithm(f"{name}: there are no data; pass them by given=.")


class _MarginalDraw:
    """A draw from the marginal guide of `iwhvi`; hashable."""

    def __init__(self, num_auxiliary, reverse):
        self.key = (num_auxiliary, reverse)

    def __call__(self, p, q):
        return _draw(p, q.marginal(*self.key))

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return type(other) is type(self) and self.key == other.key


def accepts(model: Any) -> list[str]:
    """Names of a model's parameters, as far as its function tells."""
    while hasattr(model, "base"):
        model = model.base
    fn = getattr(model, "fn", None)
    return list(inspect.signature(fn).parameters) if fn is not None else []
