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
from numpyro.distributions import biject_to

from abduce.errors import InvalidAlgorithm, InvalidModel, InvalidValue, NoDensity
from abduce.inference.init import starting_points
from abduce.inference.problem import Problem
from abduce.inference.target import constrain, make_target
from abduce.inference.vi.bound import FlatDensity, FlatGuide, ModelDensity, ModelGuide
from abduce.inference.vi.expectation import Expectation
from abduce.inference.vi.fitted import FittedFamily, WithParams
from abduce.inference.vi.frame import begin
from abduce.inference.vi.minibatch import Batches, Rescaled, Rows
from abduce.inference.vi.objectives import diwhvi, elbo, iwhvi, sticking_the_landing
from abduce.ppl.language import sample
from abduce.ppl.masked import Masked
from abduce.ppl.model import Model
from abduce.ppl.operations import execute
from abduce.ppl.program import pack
from abduce.ppl.replay import Replay

__all__ = ["FlatTask", "ModelTask"]

_TRIES = 100


class _Program(Model):
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


def _draw(p: Any, q: Any) -> Any:
    """A draw with its log weight, as an 'objective'."""
    z, log_q = q.propose()
    return z, p(z) - log_q


def _density_alone(p: Any, q: Any) -> Any:
    return p(sample("guide", dist.Normal(jnp.zeros(q.family), 1.0).to_event(1)))


def _draw_only(p: Any, q: Any) -> Any:
    return q.propose()[0], jnp.zeros(())


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
        self._explain = describe(np.asarray(start))
        return begin(self.guide, k2, target, data, start)

    def explain_start(self) -> str:
        return str(self._explain)

    def warnings(self) -> list[str]:
        """The density must be continuous for the path derivative to be right."""
        program = Expectation(_Program(_density_alone, _FlatBind(self.target, self.target.dim)), ())
        try:
            program.strategies((), self.data)
        except InvalidModel as e:
            what = str(e).partition(", so the cost")[0].removeprefix("the value of 'guide' ")
            return [
                f"ab.vi: in the log density of `{self.problem.program.name}`, a value that depends "
                f"on the latents {what}. If the density jumps there, the derivative along the path "
                f"leaves the jumps out: pass a Model as guide= with grad=ab.grad.score() at its "
                f"choices, or use ab.smc or ab.mh."
            ]
        return []

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
        return _Program(objective, _FlatBind(self.target, family))

    def default_objective(self, family):
        return sticking_the_landing() if family.sticks else elbo()

    def public(self, params):
        return params

    def private(self, given, params):
        return _like(given, params)

    def draw(self, family, params, key, n):
        bind = _FlatBind(self.full_target, family)
        program = _Program(_draw if family.has_density else _draw_only, bind)
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

    def blame(self, family, fit, key):
        step, params = fit.first_bad
        u, _ = family.draw(params, jax.random.normal(key, (family.noise_dim,)))
        record = frozenset({"score"})
        out = self.full_target.run(Replay(record=record), self.full_data, u)
        bad = [
            a for a, r in out["records"].items()
            if "score" in r and not np.isfinite(np.asarray(r["score"])).all()
        ]  # fmt: skip
        return _blame(fit, step, bad)


@functools.partial(jax.jit, static_argnums=0)
def _density(target, data, u):
    return target(data, u)


def _blame(fit: Any, step: int, bad: list[str]) -> str:
    where = f" (first at step {step}"
    where += f", from site {', '.join(map(repr, bad))})" if bad else ")"
    return (
        f"ab.vi: {fit.num_nonfinite} of {len(fit.values)} steps{where} gave numbers that are not "
        f"finite and were skipped. Look for overflow or a support that the guide leaves; or lower "
        f"the rate of the optimizer."
    )


def _like(given: Any, params: Any) -> Any:
    """Starting parameters in the structure that is fitted."""
    if jax.tree.structure(given) != jax.tree.structure(params):
        raise InvalidValue(
            f"ab.vi: params= has the structure {jax.tree.structure(given)}, the guide "
            f"{jax.tree.structure(params)}. Pass post.params of a fit with the same guide."
        )
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(params), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise InvalidValue(f"ab.vi: params= has shape {jnp.shape(a)}, expected {jnp.shape(b)}.")
    return jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), given, params)


# ---------------------------------------------------------------------- Models


class _ModelBind:
    """`params, data -> p, q` for a guide that is a Model; hashable."""

    def __init__(self, latents, of_model, of_guide, constraints):
        self.key = (latents, of_model, of_guide)
        self.constraints = constraints

    def __call__(self, params, data):
        model, (guide, given, args), kwargs = data.unpack()
        latents, of_model, of_guide = self.key
        values = constrained(params, self.constraints)
        p = ModelDensity(model, args, kwargs, given, {a: values[a] for a in of_model})
        seen = {a: g.values if isinstance(g, Masked) else g for a, g in given.items()}
        q = ModelGuide(guide, latents, (seen, *args), kwargs, {a: values[a] for a in of_guide})
        return p, q

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return type(other) is type(self) and self.key == other.key


def constrained(params: Any, constraints: Any) -> dict[str, Any]:
    """Parameters on their own scale."""
    return {
        a: x if constraints.get(a) is None else biject_to(constraints[a])(x)
        for a, x in params.items()
    }


class ModelTask:
    """A guide that is a Model."""

    rate = 0.001
    num_particles = 1

    def __init__(self, alg: Any, guide: Model, problem: Problem):
        self.alg, self.problem = alg, problem
        model = problem.model
        guide = guide.with_algorithm(None) if getattr(guide, "algorithm", None) else guide
        given = {
            a: g.value if g.mask is None else Masked(g.value, g.mask)
            for a, g in problem.given.items()
        }
        if any(isinstance(g, Masked) for g in given.values()):
            raise InvalidAlgorithm(
                "ab.vi: a guide that is a Model cannot cover data that are observed in part "
                "(ab.masked). Use a family of ab.guides."
            )
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
        self._params(model, guide, given, args, kwargs)
        self._check_latents()

    def _params(self, model, guide, given, args, kwargs):
        self.guide_program, guide_arguments = guide._stage((given, *args), kwargs)
        program, arguments = model._stage(args, kwargs)
        self.initial, self.constraints, found = {}, {}, []
        for prog, packed in ((program, arguments), (self.guide_program, guide_arguments)):
            mine = prog.of_kind("param")
            found.append(tuple(mine))
            values = _param_values(prog, packed) if mine else {}
            for a, info in mine.items():
                old = self.initial.get(a)
                if old is not None and old.shape != values[a].shape:
                    raise InvalidAlgorithm(
                        f"ab.vi: parameter {a!r} has shape {old.shape} in the model and "
                        f"{values[a].shape} in the guide. Give them different names."
                    )
                self.initial[a] = values[a]
                self.constraints[a] = info.site.constraint
        self.of_model, self.of_guide = found

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

    def prepare(self, key):
        params = {}
        for a, x in self.initial.items():
            c = self.constraints[a]
            params[a] = x if c is None else biject_to(c)._inverse(x)
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
        return _ModelBind(
            tuple(self.problem.latents), self.of_model, self.of_guide, self.constraints
        )

    def program(self, fitted, objective):
        return _Program(objective, self._bind())

    def default_objective(self, fitted):
        return elbo()

    def public(self, params):
        return constrained(params, self.constraints)

    def private(self, given, params):
        given = {
            a: x if self.constraints.get(a) is None else biject_to(self.constraints[a])._inverse(x)
            for a, x in given.items()
        }
        return _like(given, params)

    def _objective(self):
        summed = self.alg.objective
        if not isinstance(summed, (iwhvi, diwhvi)):
            return _draw
        return _MarginalDraw(summed.num_auxiliary, summed.reverse)

    def draw(self, fitted, params, key, n):
        program = _Program(self._objective(), self._bind())
        z, log_w = _many(program, params, self.all_data, key, n)
        draws = {a: np.asarray(z[a])[None] for a in self.problem.program.sites if a in z}
        return draws, None, np.asarray(log_w)

    def fitted_model(self, fitted, params):
        values = constrained(params, self.constraints)
        return WithParams(self.guide, {a: values[a] for a in self.of_guide})

    def blame(self, fitted, fit, key):
        step, params = fit.first_bad
        values = constrained(params, self.constraints)
        guide = {a: values[a] for a in self.of_guide}
        model = {a: values[a] for a in self.of_model}
        bad: set[str] = set()
        for k in jax.random.split(key, 20):
            trace = self.guide.simulate(k, self.given, *self.args, params=guide, **self.kwargs)
            z = {a: trace.choices[a] for a in self.problem.latents}
            full, _ = self.model.generate(
                k, {**self.given, **z}, *self.args, params=model, **self.kwargs
            )
            bad |= {a for a, s in full.scores.items() if not np.isfinite(np.asarray(s)).all()}
        return _blame(fit, step, sorted(bad))


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


def _param_values(program: Any, arguments: Any) -> dict[str, Any]:
    """Initial values of the parameters."""
    record = frozenset({"value"})
    out = execute(Replay(record=record, score=False), arguments, jax.random.key(0), {})
    return {a: out["records"][a]["value"] for a in program.of_kind("param")}


def accepts(model: Any) -> list[str]:
    """Names of a model's parameters, as far as its function tells."""
    while hasattr(model, "base"):
        model = model.base
    fn = getattr(model, "fn", None)
    return list(inspect.signature(fn).parameters) if fn is not None else []
