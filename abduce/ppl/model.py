"""Models: functions whose random choices can be drawn, scored, conditioned and edited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.errors import InvalidModel, InvalidValue
from abduce.ppl.masked import masked
from abduce.ppl.operations import (
    execute,
    prepare_given,
    prepare_params,
    require_density,
    require_latents,
    stage_operation,
    typed_key,
)
from abduce.ppl.program import Program
from abduce.ppl.replay import Given, Replay
from abduce.ppl.trace import TRACE_RECORD, Trace, _poison, make_trace

__all__ = ["FunctionModel", "Model", "model"]


class Model(eqx.Module):
    """A probabilistic program. `ab.model` makes one from a function; transformations from others.

    Calling a model inside another one runs it in place: its addresses join the caller's (under
    the caller's `ab.scope`). A model is a pytree: the arrays inside it (conditioned data, say) are
    its leaves.
    """

    @property
    def name(self) -> str:
        """Shown in messages."""
        raise NotImplementedError

    def emit(self, *args: Any, **kwargs: Any) -> Any:
        """Emits the model's sites into the program being staged; returns its value."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.emit(*args, **kwargs)

    def _stage(self, args, kwargs):
        bare = self if self.algorithm is None else self.with_algorithm(None)
        bare.check(args, kwargs)
        return stage_operation(bare, args, kwargs)

    def check(self, args: Any, kwargs: Any) -> None:
        """Checks the data inside a transformed model, while they are concrete."""

    def program(self, *args: Any, **kwargs: Any) -> Program:
        """The staged program, with its table of sites (`.sites`).

        Example:
            >>> {a: s.shape for a, s in schools.program(sigma).sites.items()}
            {'mu': (), 'tau': (), 'theta': (8,), 'y': (8,)}
        """
        return self._stage(args, kwargs)[0]

    def with_algorithm(self, algorithm: Any) -> Model:
        """The same model with another algorithm attached (or none)."""
        return eqx.tree_at(lambda m: m.algorithm, self, algorithm, is_leaf=lambda x: x is None)

    def simulate(
        self, key: Any, *args: Any, params: dict[str, Any] | None = None, **kwargs: Any
    ) -> Trace:
        """Draws every choice that is not observed in the program.

        Args:
            key: Random key.
            *args, **kwargs: The model's arguments.
            params: Values of `ab.param` sites; others take their initial value.

        Returns:
            A trace.

        Raises:
            MissingKey: `key` is not a random key.
            NoDensity: A site cannot be drawn (an improper prior).
        """
        key = typed_key(key, "m.simulate")
        program, arguments = self._stage(args, kwargs)
        given = prepare_params(program, params)
        out = execute(Replay(record=TRACE_RECORD), arguments, key, given)
        return make_trace(program, arguments, out)

    def log_density(
        self,
        choices: dict[str, Any],
        *args: Any,
        key: Any = None,
        params: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Log density of choices, in nats; every latent must be given.

        Sites in a branch may be left out where the branch is not taken.

        Args:
            choices: Values by address, in the shapes that `simulate` gives.
            *args, **kwargs: The model's arguments.
            key: Random key, for models whose density is estimated; not used by others.
            params: Values of `ab.param` sites.

        Returns:
            A scalar. `-inf` where a value lies outside a support that depends on other choices.

        Raises:
            MissingData: A latent is not given, or data hold NaN.
            UnknownAddress, InvalidValue, NoDensity: See the messages.
        """
        program, arguments = self._stage(args, kwargs)
        given = prepare_given(program, choices, where="choices")
        require_latents(program, given, "m.log_density")
        require_density(program, "m.log_density")
        key = None if key is None else typed_key(key, "m.log_density")
        for address, info in program.latents.items():
            if address not in given and info.conditional:
                given[address] = absent(info)
        given.update(prepare_params(program, params))
        replay = Replay(record=frozenset({"missing"}), soft_missing=True, only_estimates=True)
        out = execute(replay, arguments, key, given)
        return _poison(out["log_density"], out["records"], "m.log_density")

    def generate(
        self,
        key: Any,
        given: dict[str, Any],
        *args: Any,
        proposal: Any = None,
        params: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Trace, Any]:
        """Draws what is not given, from the prior or from a proposal.

        The log weight is `log p(all) - log q(drawn)`, so its exponential has the evidence of
        `given` as its mean.

        Args:
            key: Random key.
            given: Values of some choices.
            *args, **kwargs: The model's arguments.
            proposal: A model called as `proposal(given, *args)`; its choices are latents of this
                model. What it leaves out comes from the prior.
            params: Values of `ab.param` sites.

        Returns:
            The trace and the log weight.
        """
        key = typed_key(key, "m.generate")
        program, arguments = self._stage(args, kwargs)
        inputs = prepare_given(program, given)
        require_density(program, "m.generate", but=frozenset(set(program.latents) - set(inputs)))
        proposed = None
        if proposal is not None:
            if not isinstance(proposal, Model):
                raise InvalidValue(
                    f"m.generate: proposal must be a model, called as proposal(given, *args); got "
                    f"{type(proposal).__name__}. Decorate the function with @ab.model."
                )
            key, sub = jax.random.split(key)
            proposed = proposal.simulate(sub, dict(given), *args, **kwargs)
            proposed._require_density(set(proposed.simulated), "m.generate(proposal=)")
            inputs.update(proposal_inputs(program, proposed, inputs))
        inputs.update(prepare_params(program, params))
        out = execute(Replay(record=TRACE_RECORD), arguments, key, inputs, weight=True)
        trace = make_trace(program, arguments, out)
        log_q = 0.0 if proposed is None else proposal_density(proposed, trace)
        return trace, out["weight"] - log_q

    def posterior(
        self, key: Any, *args: Any, given: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Runs the attached algorithm (`ab.nuts()` if there is none).

        Args:
            key: Random key.
            *args, **kwargs: The model's arguments, and the algorithm's `coords=`.
            given: Observed values by address; `ab.masked` for partly observed ones.

        Returns:
            A `Posterior`.
        """
        from abduce.inference.algorithm import run_posterior

        return run_posterior(self, typed_key(key, "m.posterior"), args, given, kwargs)

    def prior(self, key: Any, *args: Any, num_samples: int = 1000, **kwargs: Any) -> Any:
        """Draws from the model without conditioning on `given` data.

        Args:
            key: Random key.
            *args, **kwargs: The model's arguments.
            num_samples: Number of draws.

        Returns:
            A `Posterior` of independent draws with equal weights.
        """
        from abduce.inference.algorithm import run_prior

        return run_prior(self, typed_key(key, "m.prior"), args, num_samples, kwargs)


def absent(info: Any) -> Given:
    """No value at all, for a site that may turn out to be inactive."""
    return Given(jnp.zeros(info.shape, info.dtype), jnp.zeros(info.shape[: info.batch_ndim], bool))


def proposal_inputs(program: Program, proposed: Trace, given: dict[str, Given]) -> dict[str, Given]:
    """Checks a proposal's choices against the target's latents, and supplies them."""
    choices = proposed.choices
    unknown = [a for a in choices if a not in program.latents]
    taken = [a for a in choices if a in given and given[a].mask is None]
    if unknown or taken:
        raise InvalidValue(
            f"the proposal's addresses do not fit `{program.name}`: "
            + (f"{unknown} are not latents of it; " if unknown else "")
            + (f"{taken} are given; " if taken else "")
            + f"the proposal has {sorted(choices)}, the latents are "
            f"{sorted(a for a in program.latents if a not in given)}."
        )
    values = {
        a: masked(x, _elements(proposed.active[a], program.sites[a])) if a in proposed.active else x
        for a, x in choices.items()
    }
    return prepare_given(program, values, where="proposal")


def _elements(active: Any, info: Any) -> Any:
    """An activity flag, over the elements of a site."""
    shape = info.shape[: info.batch_ndim]
    return jnp.broadcast_to(active.reshape(active.shape + (1,) * (len(shape) - active.ndim)), shape)


def proposal_density(proposed: Trace, trace: Trace) -> Any:
    """Log density of what a proposal contributed to a trace.

    A value proposed for a branch that is not taken counts for nothing: the target is extended by
    the proposal's own density of it, so that the two cancel.
    """
    total = jnp.zeros((), jnp.result_type(float))
    for address, score in proposed.scores.items():
        on = trace.active.get(address)
        if on is not None:
            if score.shape[: on.ndim] != on.shape:
                raise InvalidValue(
                    f"the proposal scores {address!r} as one event of shape {score.shape}, but the "
                    f"model takes its branches element by element, {on.shape}. Propose it under "
                    f"jax.vmap, as the model has it."
                )
            score = jnp.where(on.reshape(on.shape + (1,) * (score.ndim - on.ndim)), score, 0.0)
        total = total + jnp.sum(score)
    return total


class FunctionModel(Model):
    """A model made from a function."""

    fn: Callable[..., Any] = eqx.field(static=True)
    algorithm: Any = None

    @property
    def name(self) -> str:
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    def emit(self, *args, **kwargs):
        return self.fn(*args, **kwargs)

    def __repr__(self):
        attached = f", {self.algorithm!r}" if self.algorithm is not None else ""
        return f"<model {self.name}{attached}>"


def model(f: Callable[..., Any]) -> Model:
    """Makes a model from a function that calls `ab.sample` and its siblings.

    Args:
        f: An ordinary JAX function. Arrays and floats among its arguments are traced; bool, int,
            str, None and callables are static (a new value stages the model anew).

    Returns:
        A `Model`.

    Example:
        >>> @ab.model
        ... def coin(n):
        ...     p = ab.sample("p", dist.Beta(1, 1))
        ...     return ab.sample("heads", dist.Binomial(n, probs=p))
        >>> coin.simulate(jax.random.key(0), 10).choices.keys()
        dict_keys(['p', 'heads'])
    """
    if isinstance(f, Model):
        return f
    if not callable(f):
        raise InvalidModel(f"ab.model takes a function, got {f!r}.")
    return FunctionModel(f)
