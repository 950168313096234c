"""Likelihood estimators: learned laws of sites that can only be simulated."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.fitting import check_rows, plan_run, simulate_rows
from abduce.amortized.likelihood_model import LearnedModel, SiteLaw
from abduce.amortized.likelihood_network import (
    LikelihoodSettings,
    SiteNetwork,
    SitePlan,
    make_plan,
    make_scales,
)
from abduce.amortized.likelihood_task import LikelihoodTask
from abduce.amortized.operands import elements
from abduce.amortized.own_checks import check_estimator
from abduce.amortized.posing import pose, require_model
from abduce.amortized.reading import require_fitted
from abduce.amortized.training import train
from abduce.errors import Degenerate, InvalidAlgorithm, MissingData
from abduce.inference.algorithm import Algorithm
from abduce.inference.posterior import Posterior, with_warnings
from abduce.inference.problem import Problem, make_problem
from abduce.ppl.model import Model
from abduce.ppl.operations import outside_scopes, typed_key
from abduce.ppl.program import stage_packed
from abduce.ppl.replay import Given

__all__ = ["LikelihoodEstimator"]

_LOOK = 256  # posterior draws whose operands are compared with those of training


class LikelihoodEstimator(eqx.Module, Algorithm):
    """What `ab.nle` and `ab.nre` return.

    Attributes:
        kind: 'nle' or 'nre'.
        addresses: The sites whose laws are learned.
        latents: Shape of every other site, by address.
        shapes: Shape of each learned site, with its mapped axes.
        argument_shapes: Of the arguments that designs draw, or None.
        model_name: For messages.
        settings: Of the networks.
        sampler: The algorithm that `posterior` runs on the model with the learned laws.
        laws: The trained networks by address; None before `fit`.
        history: Of training: `loss` per step, `validation_step`, `validation_loss`.
        report: The checks it was saved with, or None.
    """

    kind: str = eqx.field(static=True)
    addresses: tuple[str, ...] = eqx.field(static=True)
    latents: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)
    argument_shapes: tuple[tuple[int, ...], ...] | None = eqx.field(static=True)
    model_name: str = eqx.field(static=True)
    settings: LikelihoodSettings = eqx.field(static=True)
    model: Any
    simulation: Any
    sampler: Any
    laws: dict[str, SiteLaw] | None = None
    history: Any = None
    report: Any = None

    needs_density = False

    @property
    def name(self) -> str:
        return self.kind

    @property
    def network(self) -> Any:
        """The trained networks by address, or None."""
        return None if self.laws is None else {a: law.network for a, law in self.laws.items()}

    @property
    def observed(self) -> tuple[str, ...]:
        """Addresses of what is observed."""
        return self.addresses

    def replace(self, **changes: Any) -> Any:
        """The estimator with another `sampler`; its networks stay as trained."""
        unknown = sorted(set(changes) - {"sampler"})
        if unknown:
            raise InvalidAlgorithm(
                f"ab.{self.name}: only sampler can be replaced after the estimator is made, got "
                f"{', '.join(unknown)}. Make another one."
            )
        return dataclasses.replace(self, **changes)

    # ------------------------------------------------------------------ training

    def fit(
        self,
        key: Any,
        *,
        num_steps: int | None = None,
        budget: int | None = None,
        data: Any = None,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        accumulate: int = 1,
        ema: float = 0.02,
        validate_every: int | None = None,
        patience: int | None = None,
        checkpoint_dir: Any = None,
        mesh: Any = None,
        progress_bar: bool = True,
    ) -> Any:
        """Trains the networks; returns the fitted estimator. Arguments are those of `ab.npe`'s.

        The loss of `ab.nle` is `-log q` per element, in nats; that of `ab.nre` a cross-entropy.

        Raises:
            Degenerate: The loss or a simulation was not finite; the message names the site.
            InvalidValue: `data=` or a checkpoint does not fit.
            InvalidModel: The law of a site depends on nothing that is drawn.
        """
        key = typed_key(key, f"ab.{self.name}.fit")
        require_model(self, f"Make a new one with ab.{self.name}(model, ...).")
        k_rows, k_sample, k_network, k_train = jax.random.split(key, 4)
        plan = plan_run(
            self.name, simulate=lambda num: self.simulate(k_rows, num), check=self._check_rows,
            budget=budget, data=data, num_steps=num_steps, batch_size=batch_size,
            learning_rate=learning_rate, weight_decay=weight_decay, accumulate=accumulate, ema=ema,
            validate_every=validate_every, patience=patience,
        )  # fmt: skip
        if plan.recipe.batch_size < 2:
            raise InvalidAlgorithm(f"ab.{self.name}.fit: batch_size must be at least 2.")
        ratio = self.kind == "nre"
        task = LikelihoodTask((), self.addresses, ratio)
        sample = _read(task, plan.sample, k_sample, {"simulation": self.simulation})
        plans, scales, networks = [], {}, {}
        with outside_scopes():
            sites = stage_packed(self.simulation["arguments"]).sites
        for i, a in enumerate(self.addresses):
            values, operands = jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), sample[a])
            bad = self._not_finite(values, operands)
            if bad:
                raise Degenerate(f"ab.{self.name}.fit: {task.explain({a: (values, operands)})}")
            site = make_plan(self.name, sites[a], values, operands)
            plans.append(site)
            scales[a] = make_scales(site, values, operands)
            k = jax.random.fold_in(k_network, i)
            networks[a] = SiteNetwork(k, site, self.settings, ratio)
        s = self.settings
        task = LikelihoodTask(tuple(plans), self.addresses, ratio, s.num_contrast, s.balance)
        out = train(
            task, networks, k_train, {"simulation": self.simulation, "scales": scales},
            plan.recipe, rows=plan.rows, held_out=plan.held, checkpoint_dir=checkpoint_dir,
            mesh=mesh, progress_bar=progress_bar, name=self.name,
        )  # fmt: skip
        laws = {p.address: SiteLaw(out.network[p.address], scales[p.address], p, ratio)
                for p in plans}  # fmt: skip
        return dataclasses.replace(self, laws=laws, history=out.history)

    @staticmethod
    def _not_finite(values: Any, operands: Any) -> bool:
        parts = [np.asarray(x) for x in (values, *operands)]
        return any(not np.isfinite(x).all() for x in parts if x.dtype.kind == "f")

    def simulate(self, key: Any, num: int, batch_size: int = 2048) -> dict[str, np.ndarray]:
        """Simulations as `fit(data=...)` takes them, one row each.

        Args:
            key: Random key.
            num: How many.
            batch_size: How many in one compiled call.
        """
        key = typed_key(key, f"ab.{self.name}.simulate")
        addresses = tuple(a for a, _ in self.latents + self.shapes)
        designs = self.argument_shapes is not None
        return simulate_rows(addresses, designs, self.simulation, key, num, batch_size)

    def _check_rows(self, data: Any) -> dict[str, Any]:
        shapes: dict[str, tuple[int, ...]] = dict(self.latents + self.shapes)
        shapes |= {f"arguments/{i}": s for i, s in enumerate(self.argument_shapes or ())}
        return check_rows(self.name, data, shapes, self.model_name)

    # ------------------------------------------------------------------ use

    def __call__(self, m: Model) -> Model:
        """Attaches the estimator to a model; `posterior` then runs `sampler`.

        Raises:
            NotFitted: Before `fit`.
            InvalidAlgorithm: `m` is no model.
        """
        require_fitted(self)
        return Algorithm.__call__(self, m)

    def learned_model(self, model: Any = None) -> Model:
        """The model with the learned laws in the place of its simulators.

        Every algorithm and operation takes it: the sites have densities now. Its priors and
        everything else may differ from the model of training.

        Args:
            model: The model; needed for an estimator that was loaded from disk.

        Raises:
            NotFitted: Before `fit`, or without a model.
            InvalidModel: On use, where a learned site is not what it was in training.
        """
        require_fitted(self)
        model = require_model(self, "Write est.learned_model(model).", model)
        return LearnedModel(model.with_algorithm(None), dict(self.laws or {}))

    def run(self, problem: Problem, key: Any) -> Posterior:
        lacking = [a for a in self.addresses if a not in problem.given]
        if lacking:
            raise MissingData(
                f"ab.{self.name}: given= lacks {lacking[0]!r}, whose likelihood was learned "
                f"({', '.join(self.addresses)}). To draw it, use est.learned_model(model)."
            )
        learned = make_problem(
            self.learned_model(problem.model), problem.args, None, problem.kwargs,
            f"ab.{self.sampler.name}",
        )  # fmt: skip
        learned = dataclasses.replace(learned, given=problem.given, coords=problem.coords)
        post = self.sampler.run(learned, key)
        if problem.is_traced or isinstance(key, jax.core.Tracer):
            return post
        return with_warnings(post, self._extrapolation(problem, post))

    def _extrapolation(self, problem: Problem, post: Posterior) -> list[str]:
        """Posterior draws whose operands lie outside those of training."""
        sites = problem.program.sites
        latents = [a for a in problem.program.latents if a not in problem.given]
        if not all(a in post.draws for a in latents) or any(sites[a].conditional for a in latents):
            return []
        draws = {a: jnp.asarray(post[a]).reshape((-1, *sites[a].shape)) for a in latents}
        num = len(next(iter(draws.values())))
        some = np.linspace(0, num - 1, min(num, _LOOK)).astype(int)
        draws = {a: x[some] for a, x in draws.items()}
        given = {a: g.value for a, g in problem.given.items()}
        out = []
        outside = _outside(self.addresses, self._ranges(), draws, given, problem.arguments)
        for a in self.addresses:
            share = float(np.mean(np.asarray(outside[a])))
            if share > 0.02:
                out.append(
                    f"ab.{self.name}: in {100 * share:.0f}% of the posterior draws the parameters "
                    f"of site {a!r} lie outside those of training, where its learned law is not to "
                    f"be trusted. Train with a prior that covers them."
                )
        return out

    def _ranges(self) -> Any:
        return {a: (law.plan, law.scales["range"]) for a, law in (self.laws or {}).items()}

    def check(
        self,
        key: Any,
        *args: Any,
        given: Any = None,
        num_datasets: int = 200,
        num_samples: int = 100,
        budget: float | None = 60.0,
        alpha: float = 0.01,
        **kwargs: Any,
    ) -> Any:
        """Calibration checks on fresh simulations, by the sampler on the learned model.

        Arguments and result are those of the `check` of `ab.npe`.
        """
        return check_estimator(
            self, key, args, kwargs, given=given, num_datasets=num_datasets,
            num_samples=num_samples, budget=budget, alpha=alpha,
        )  # fmt: skip

    def with_model(self, model: Model, *args: Any, designs: Model | None = None, **kwargs: Any):
        """A loaded estimator with its model again, for `check`.

        Args:
            model: The model of training.
            *args, **kwargs: Its arguments.
            designs: Or the Model that draws them.

        Raises:
            InvalidModel: A learned site is not what it was in training.
        """
        require_fitted(self)
        problem, drawn = pose(self.name, model, args, kwargs, designs, jax.random.key(0))
        make_problem(self.learned_model(problem.model), problem.args, None, problem.kwargs, None)
        simulation = {"arguments": problem.arguments, "designs": drawn}
        return dataclasses.replace(self, model=problem.model, simulation=simulation)

    def save(self, path: Any, *, checks: Any = None) -> Any:
        """Writes the estimator as a folder, without the model; `ab.load` reads it.

        Args:
            path: The folder.
            checks: What `check` returned, to be kept with it.
        """
        from abduce.amortized.likelihood_saving import save_likelihood

        require_fitted(self)
        return save_likelihood(self, path, self.report if checks is None else checks.as_dict())

    def __repr__(self) -> str:
        state = "not fitted" if self.laws is None else "fitted"
        return f"<ab.{self.kind} of {self.model_name}, {state}>"


_read = jax.jit(lambda task, rows, key, data: task.read(rows, key, data), static_argnums=0)


def _outside(addresses, ranges, draws, given, arguments):
    plans = tuple(ranges[a][0] for a in addresses)
    return _outside_compiled(plans, [ranges[a][1] for a in addresses], draws, given, arguments)


def _outside_now(plans: tuple[SitePlan, ...], ranges, draws, given, arguments):
    addresses = tuple(p.address for p in plans)

    def one(draw):
        values = {**draw, **given}
        with outside_scopes():
            program = stage_packed(arguments)
            known = {a: Given(values[a], trusted=True) for a in program.latents}
            found = elements(program, arguments, None, known, addresses)
        out = {}
        for plan, (low, high) in zip(plans, ranges, strict=True):
            x = jax.vmap(plan.features)(found[plan.address][1])
            room = 0.02 * (high - low)
            out[plan.address] = jnp.any((x < low - room) | (x > high + room))
        return out

    return jax.vmap(one)(draws)


_outside_compiled = jax.jit(_outside_now, static_argnums=0)
