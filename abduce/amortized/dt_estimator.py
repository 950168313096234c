"""The Distribution Transformer as an estimator: training, posteriors, filtering."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.dt_coordinates import MixtureModel
from abduce.amortized.dt_filter import Filtered, run_filter
from abduce.amortized.dt_inputs import Plan, features_of, make_scales, place, place_back, tokens_of
from abduce.amortized.dt_model import TransformerModel
from abduce.amortized.dt_network import DTNetwork
from abduce.amortized.dt_plan import match, read_given
from abduce.amortized.dt_priors import FittedPrior, check_supports, prior_of
from abduce.amortized.dt_training import TransformerTask
from abduce.amortized.mixtures import GaussianMixture
from abduce.amortized.reading import require_fitted
from abduce.amortized.training import Recipe, train
from abduce.errors import InvalidAlgorithm, InvalidValue
from abduce.inference.algorithm import Algorithm, check_count
from abduce.inference.posterior import Posterior, make_posterior
from abduce.inference.predict import run_at_draws
from abduce.inference.problem import Problem, make_problem
from abduce.inference.static import Static
from abduce.ppl.model import Model
from abduce.ppl.operations import outside_scopes, typed_key
from abduce.ppl.program import stage_packed
from abduce.ppl.replay import Given, Replay

__all__ = ["DistributionTransformer", "make_network"]

_PILOT = 2048  # simulations that set the scales
_POOR_FIT = 0.02  # nats between a prior and its mixture from which there is a warning


class DistributionTransformer(eqx.Module, Algorithm):
    """What `ab.distribution_transformer` returns.

    Attributes:
        plan: What it is made for.
        data: The training model and the meta-prior; None after loading.
        scales, network: None before `fit`.
        history: Of training: `loss` per step, `validation_step`, `validation_loss` (nats).
        num_samples: Draws of a posterior.
    """

    plan: Plan = eqx.field(static=True)
    data: Any
    scales: Any = None
    network: Any = None
    history: Any = None
    num_samples: int = eqx.field(static=True, default=4000)

    traceable = True
    needs_density = False

    @property
    def name(self) -> str:
        return "distribution_transformer"

    def replace(self, **changes: Any) -> Any:
        """The estimator with another `num_samples`; its network stays as trained."""
        unknown = sorted(set(changes) - {"num_samples"})
        if unknown:
            raise InvalidAlgorithm(
                f"ab.{self.name}: only num_samples can be replaced after the estimator is made, "
                f"got {', '.join(unknown)}. Make another one."
            )
        check_count(self.name, "num_samples", changes["num_samples"])
        return dataclasses.replace(self, **changes)

    # ------------------------------------------------------------------ training

    def fit(
        self,
        key: Any,
        *,
        num_steps: int = 5000,
        batch_size: int = 1000,
        learning_rate: float = 1e-3,
        ema: float = 0.02,
        accumulate: int = 1,
        validate_every: int | None = None,
        patience: int | None = None,
        checkpoint_dir: Any = None,
        mesh: Any = None,
        progress_bar: bool = True,
    ) -> DistributionTransformer:
        """Trains the network; returns the fitted estimator, this one is left as it is.

        Every step draws priors from the meta-prior, latents from them and observations from the
        model, inside the compiled step.

        Args:
            key: Random key; with the same key and settings the result is the same, bit for bit.
            num_steps, batch_size, learning_rate, ema, accumulate, validate_every, patience: See
                `abduce.amortized.training.Recipe`.
            checkpoint_dir: A folder to resume from; or None.
            mesh: A `jax.sharding.Mesh` along whose first axis the batch is split.
            progress_bar: Whether to show progress.

        Raises:
            InvalidAlgorithm: It was loaded from disk; or a setting does not fit.
            Degenerate: The loss is not finite; the message names the site.
        """
        if self.data is None:
            raise InvalidAlgorithm(
                f"ab.{self.name}.fit: an estimator loaded from disk has no model to simulate from. "
                f"Make a new one, ab.{self.name}(model, ..., priors=...)."
            )
        recipe = Recipe(
            num_steps=num_steps, batch_size=batch_size, learning_rate=learning_rate, ema=ema,
            accumulate=accumulate, validate_every=validate_every, patience=patience,
        )  # fmt: skip
        k1, k2, k3 = jax.random.split(typed_key(key, f"ab.{self.name}.fit"), 3)
        task = TransformerTask(self.plan)
        scales = self._scales(task, k1)
        data = {**self.data, "scales": scales}
        network = eqx.filter_jit(lambda key: make_network(self.plan, scales, key))(k2)
        trained = train(
            task, network, k3, data, recipe, checkpoint_dir=checkpoint_dir, mesh=mesh,
            progress_bar=progress_bar, name=self.name,
        )  # fmt: skip
        history = {**trained.history, "seconds": np.asarray(trained.seconds)}
        return dataclasses.replace(self, scales=scales, network=trained.network, history=history)

    def _scales(self, task: TransformerTask, key: Any) -> Any:
        plan = self.plan
        batch = jax.jit(task.simulate, static_argnums=1)(key, _PILOT, {**self.data, "scales": None})
        target, prior = batch["target_u"], batch["prior_u"]
        if plan.equivariance is not None:

            def undo(coordinates, u):
                def one(g, u):
                    factor, offset = plan.equivariance.on_coordinates(-g, coordinates, u.dtype)
                    return factor * u + offset

                return jax.vmap(one)(batch["g"], u)

            target, prior = undo(plan.target, target), undo(plan.prior, prior)
        return make_scales(plan, batch["raw"], prior, target)

    # ------------------------------------------------------------------ use

    def run(self, problem: Problem, key: Any) -> Posterior:
        """Reads the prior and the data of a problem; see `Model.posterior`."""
        fitted, q, values = self._answer(problem, key)
        draws = {a: x[None] for a, x in values.items()}
        draws.update(self._deterministics(problem, draws))
        messages = []
        if not isinstance(fitted.kl, jax.core.Tracer) and not (
            fitted.kl - 2 * fitted.kl_se <= _POOR_FIT or np.isnan(fitted.kl)
        ):
            messages.append(
                f"ab.{self.name}: the mixture of {self.plan.num_components} normals that the "
                f"network sees is {float(fitted.kl):.3f} nats (KL) from the prior of "
                f"{', '.join(self.plan.prior.addresses)}. The posterior is that of the mixture. "
                f"Correct it with ab.importance(proposal=est.as_model(model)), or train with more "
                f"num_components."
            )
        return make_posterior(
            problem,
            draws,
            algorithm=self.name,
            diagnostics={
                "prior_fit_kl": fitted.kl,
                "prior_fit_kl_se": fitted.kl_se,
                "mixture_log_weights": q.log_weights,
                "mixture_means": q.means,
                "mixture_trils": q.trils,
            },
            messages=messages,
            resume={"guide": MixtureModel(q, self.plan.target)},
        )

    def _answer(self, problem: Problem, key: Any) -> Any:
        observed, gone, arguments = self._read(problem)
        arrays, static = eqx.partition((self.network, self.scales), eqx.is_array)
        with outside_scopes():
            return _answer(
                self.plan, Static(static), self.num_samples, arrays, problem.arguments, observed,
                gone, arguments, key,
            )  # fmt: skip

    def _read(self, problem: Problem) -> Any:
        require_fitted(self)
        match(self.plan, problem, self.name)
        check_supports(problem.program, problem.arguments, self.plan.prior)
        observed, gone = read_given(
            self.plan,
            {a: (g.value, g.mask) for a, g in problem.given.items()},
            self.name,
        )
        return observed, gone, self._arguments(problem)

    def _arguments(self, problem: Problem) -> tuple[Any, ...]:
        """The argument arrays that the network reads."""
        if not self.plan.layout.arguments:
            return ()
        inside = sum(map(eqx.is_array_like, jax.tree.leaves(problem.model)))
        found = tuple(problem.arguments.dynamic[inside:])
        expected = self.plan.layout.arguments[self.plan.skipped :]
        if len(found) != len(expected):
            raise InvalidValue(
                f"ab.{self.name}: `{problem.program.name}` has {len(found)} argument arrays, but "
                f"the estimator was trained with {len(expected)}, of shapes {expected}."
            )
        return found

    def _deterministics(self, problem: Problem, draws: dict[str, Any]) -> dict[str, Any]:
        wanted = tuple(problem.program.of_kind("deterministic"))
        if not wanted or any(a not in draws for a in problem.latents):
            return {}
        kept = {a: Given(x, trusted=True) for a, x in draws.items()}
        replay = Replay(record=frozenset({"value"}), score=False)
        return run_at_draws(
            replay, wanted, ("value",), problem.program, problem.arguments, None, problem.given,
            kept, (1, self.num_samples), None,
        )["value"]  # fmt: skip

    def prior(self, model: Model, *args: Any, **kwargs: Any) -> FittedPrior:
        """The prior of a model as the network sees it: a mixture, and how well it fits.

        Args:
            model: A model with the addresses of training.
            *args, **kwargs: Its arguments.

        Returns:
            `mixture`, `kl` (nats) and `kl_se`.
        """
        problem = make_problem(model, args, None, kwargs, None)
        match(self.plan, problem, self.name)
        check_supports(problem.program, problem.arguments, self.plan.prior)
        with outside_scopes():
            return _prior(self.plan, problem.arguments)

    def mixture(self, model: Model, *args: Any, given: Mapping[str, Any], **kwargs: Any) -> Any:
        """The posterior of a model as a mixture over unconstrained coordinates of the targets.

        Args:
            model: A model with the addresses of training.
            *args, **kwargs: Its arguments.
            given: Observed values by address.
        """
        problem = make_problem(model, args, given, kwargs, None)
        observed, gone, arguments = self._read(problem)
        prior = _prior(self.plan, problem.arguments).mixture
        return self._posterior(prior, observed, gone, arguments)

    def infer(
        self, prior: GaussianMixture, observations: Mapping[str, Any], *args: Any
    ) -> GaussianMixture:
        """The posterior for a prior that is a mixture: one pass of the network.

        Works under `jax.jit` and `jax.vmap`, where a thousand posteriors cost little more than one.

        Args:
            prior: Over unconstrained coordinates of the prior's addresses.
            observations: Values by address, or `ab.masked`.
            *args: The model's argument arrays, if the estimator reads any.

        Returns:
            A mixture over unconstrained coordinates of the targets, with `log_prob`, `sample`,
            `mean`, `covariance`.

        Raises:
            NotFitted, MissingData, InvalidValue: See the messages.

        Example:
            >>> many = jax.jit(jax.vmap(lambda z: est.infer(prior, {"z": z})))(zs)
        """
        require_fitted(self)
        if not isinstance(prior, GaussianMixture) or prior.dim != self.plan.prior.dim:
            what = type(prior).__name__
            if isinstance(prior, GaussianMixture):
                what = f"{prior.dim} dimensions"
            raise InvalidValue(
                f"ab.{self.name}.infer: the prior is a mixture over {self.plan.prior.dim} "
                f"coordinates ({', '.join(self.plan.prior.addresses)}), got {what}. Take that of a "
                f"model with est.prior(model).mixture."
            )
        given = {}
        for a, x in observations.items():
            masked = hasattr(x, "observed")
            given[a] = (x.values, x.observed) if masked else (jnp.asarray(x), None)
        observed, gone = read_given(self.plan, given, self.name)
        expected = self.plan.layout.arguments[self.plan.skipped :]
        if len(args) != len(expected):
            raise InvalidValue(
                f"ab.{self.name}.infer: the estimator reads {len(expected)} argument arrays, of "
                f"shapes {expected}, got {len(args)}."
            )
        return self._posterior(prior, observed, gone, tuple(map(jnp.asarray, args)))

    def _posterior(self, prior: Any, observed: Any, gone: Any, arguments: Any) -> GaussianMixture:
        arrays, static = eqx.partition((self.network, self.scales), eqx.is_array)
        return _infer(self.plan, Static(static), arrays, prior, observed, gone, arguments)

    def filter(
        self,
        prior: GaussianMixture,
        observations: Mapping[str, Any],
        *args: Any,
        transition: Any = None,
        key: Any = None,
    ) -> Filtered:
        """Sequential inference: each posterior, sent through the transition, is the next prior.

        Args:
            prior: Of the first state, as for `infer`; with a learned transition, of the state
                before.
            observations: Values by address, with a leading axis of steps.
            *args: Argument arrays, with a leading axis of steps.
            transition: `ab.amortized.LinearGaussian`, exact for each component; a function
                `(key, u) -> u` of coordinates, applied to draws to which a mixture is fitted; or
                None: there is none, or the model has it in it (`prior=["x0"], target=["x1"]`).
            key: Random key, for a transition that is a function.

        Returns:
            `predicted` (the prior of each step) and `posterior`, mixtures with a leading axis.
        """
        return run_filter(self, prior, observations, args, transition, key)

    def as_model(self, model: Model) -> TransformerModel:
        """The posterior as a Model `q(given, *args)`: a proposal, a guide, a starting point.

        Every address has its exact conditional law under the posterior mixture, so that any of
        them may be given or drawn.

        Args:
            model: The model whose prior is read, with the addresses of training.

        Example:
            >>> ab.importance(proposal=est.as_model(model))(model).posterior(key, given={"z": z})
        """
        require_fitted(self)
        return TransformerModel(self, model.with_algorithm(None))

    def save(self, path: Any) -> Any:
        """Writes a folder that `ab.load` reads back; the model is code and is not kept."""
        from abduce.amortized.dt_saving import save_transformer

        require_fitted(self)
        return save_transformer(self, path)

    def __repr__(self) -> str:
        plan = self.plan
        state = "not fitted" if self.network is None else "fitted"
        return (
            f"<distribution_transformer of {', '.join(plan.target.addresses)} given "
            f"{', '.join(plan.layout.observed)} and the prior of {', '.join(plan.prior.addresses)},"
            f" {state}>"
        )


def make_network(plan: Plan, scales: Any, key: Any) -> DTNetwork:
    """A network that fits the plan."""
    extra = {"sequence": 8}
    lengths = tuple(
        int(np.size(centre)) + extra.get(g.kind, 0)
        for g, (centre, _) in zip(plan.layout.groups, scales.features, strict=True)
    )
    return DTNetwork(
        key, plan.prior.dim, plan.target.dim, lengths, width=plan.width,
        num_layers=plan.num_layers, num_heads=plan.num_heads, hidden=plan.hidden,
    )  # fmt: skip


def _infer_now(plan, static, arrays, prior, observed, gone, arguments):
    network, scales = eqx.combine(arrays, static.value)
    prior, observed, g = place(plan, prior, observed, gone)
    data, masks = tokens_of(plan, scales, features_of(plan, observed, arguments, gone), gone)
    centre, spread = scales.prior
    q = network(prior.scaled(1 / spread, -centre / spread), data, masks)
    centre, spread = scales.target
    return place_back(plan, g, q.scaled(spread, centre))


def _prior_now(plan, arguments):
    draws = 8 * plan.num_fit_draws
    return prior_of(stage_packed(arguments), arguments, plan.prior, plan.num_components, draws)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _answer(plan, static, num, arrays, model_arguments, observed, gone, arguments, key):
    fitted = _prior_now(plan, model_arguments)
    q = _infer_now(plan, static, arrays, fitted.mixture, observed, gone, arguments)
    return fitted, q, jax.vmap(plan.target.to_values)(q.sample(key, num))


_infer = jax.jit(_infer_now, static_argnums=(0, 1))
_prior = jax.jit(_prior_now, static_argnums=0)
