"""`ab.guided`: backward filtering, forward guiding.

A backward pass with a tractable auxiliary process turns all future observations into a message at
each step; the model's own transitions are tilted by these messages. What remains of the true model
is in the weights: where the auxiliary process is the truth, every weight is the evidence.

M. van der Meulen and M. Schauer, "Automatic backward filtering forward guiding for Markov processes
and graphical models" (2020); M. Mider, M. Schauer and F. van der Meulen, "Continuous-discrete
smoothing of diffusions" (2021). As a particle filter this is a twisted one (Whiteley and Lee 2014).
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.errors import InvalidModel, InvalidValue
from abduce.inference.smc.backward import Auxiliary
from abduce.inference.smc.reading import Body, Chain, Visit, without_path
from abduce.ppl import _jax
from abduce.ppl.interpreter import State, walk
from abduce.ppl.language import deterministic, factor, sample
from abduce.ppl.model import FunctionModel, Model
from abduce.ppl.naming import scoped
from abduce.ppl.operations import outside_scopes
from abduce.ppl.program import pack
from abduce.ppl.replay import Given, Sums, log_density_of
from abduce.ppl.site import bind, elementwise

__all__ = ["Guided", "guided"]


class Message(eqx.Module):
    """A message at one step, with what is needed to read the true kernel there."""

    local: Any
    consts: list[Any]
    body: Body = eqx.field(static=True)

    def tilt(self, inputs: Any, given: Any) -> tuple[Any, Any]:
        """The tilted kernel and log (K g)."""
        site, operands = self.body.law(inputs, given)
        nc, nk = self.body.num_consts, self.body.num_carry
        return self.local.tilt(
            site, operands, inputs[nc : nc + nk], lambda: self.body.carry_tree(inputs)
        )

    def at(self, given: Any, carry: Any, x: Any) -> tuple[Any, Any]:
        """The same from the user's carry and x."""
        inputs = self.body.inputs(self.consts, carry, x)
        return self.tilt(inputs, {a: Given(v, trusted=True) for a, v in given.items()})


class Start(eqx.Module):
    """The message on the initial latent, with its prior taken apart."""

    local: Any
    operands: list[Any]
    site: Any = eqx.field(static=True)

    def tilt(self) -> tuple[Any, Any]:
        """The tilted prior and the log of its integral."""
        return self.local.tilt(self.site, self.operands, None)


def _step(given, carry, x, message):
    return sample(message.body.state, message.at(given, carry, x)[0])


def _start(*args):
    message = args[-1]
    return None if message is None else sample(message.site.address, message.tilt()[0])


class Guided(Model):
    """A proposal for a model's path, guided by its observations; made by `ab.guided`.

    As a Model it is called as `guide(given, *args)` and draws the state at all steps (and the
    initial latent): a proposal for `m.generate`, `ab.importance` and `ab.mh`. In `ab.smc` it
    proposes step by step, with the integral of the next message as look-ahead.
    """

    base: Model
    auxiliary: Auxiliary
    algorithm: Any = None

    @property
    def name(self) -> str:
        return f"guided {self.base.name}"

    # ------------------------------------------------------------ for particle filters

    def messages(self, given: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Runs the backward filter; traceable.

        Args:
            given: Observed values by address, of all steps.
            *args, **kwargs: The model's arguments.

        Returns:
            Messages with a leading axis of steps, and the message on the initial latent or None.
        """
        return self._messages(self._chain(given, args, kwargs))

    def _chain(self, given, args, kwargs):
        return Chain(self.base, self.auxiliary.state, self.auxiliary.initial, given, args, kwargs)

    def _messages(self, chain):
        with outside_scopes():
            local, root = self.auxiliary.messages(chain)
            body = chain.body
            consts = [
                jnp.broadcast_to(c, (chain.length, *jnp.shape(c)))
                if need and not body.in_carry(i)
                else None
                for i, (c, need) in enumerate(zip(chain.consts, body.needs, strict=True))
            ]
            start = None
            if root is not None:
                site, operands = chain.initial_law()
                start = Start(root, [jnp.asarray(o) for o in operands], site)
        return Message(local, consts, body), start

    @property
    def step(self) -> Model:
        """The proposal of a step, called as `step(given, carry, x, message)`."""
        return FunctionModel(_step)

    @property
    def start(self) -> Model:
        """The proposal of the initial latent, called as `start(given, *args, message)`."""
        return FunctionModel(_start)

    def lookahead(self, given: Any, carry: Any, x: Any, message: Any) -> Any:
        """The log integral of a step's message under the true kernel, (K g)."""
        inputs = message.body.inputs(message.consts, carry, x)
        return message.at(given, carry, x)[1] + message.local.waiting(
            message.body.carry_tree(inputs)
        )

    # ------------------------------------------------------------ whole paths

    def emit(self, given: Any, *args: Any, **kwargs: Any) -> Any:
        auxiliary = self.auxiliary
        given = without_path(self.base, auxiliary.state, auxiliary.initial, given, args, kwargs)
        self._forward(given, args, kwargs, lambda address, q, noise: sample(address, q), None)

    def noise_shapes(self, given: Any, *args: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of the standard normal noise that `path` takes, by address."""
        arguments = pack(self, args, kwargs)
        return {a: x.shape for a, x in jax.eval_shape(_noise_like, arguments, given).items()}

    def path(
        self, noise: dict[str, Any], given: Any, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], Any]:
        """The guided path that standard normal noise leads to, and its log weight.

        A differentiable function of the noise for Gaussian states. With noise drawn from N(0, 1),
        the weight is unbiased for the evidence; as a density over noise, N(0, 1) times the weight
        is the posterior, in coordinates fit for preconditioned Crank-Nicolson or NUTS.

        Args:
            noise: By address, of the shapes that `noise_shapes` gives.
            given: Observed values by address; `ab.masked` for partly observed ones.
            *args, **kwargs: The model's arguments.

        Returns:
            The choices (state, and initial latent) and log p(path, given) - log q(path), in nats.
        """
        shapes = self.noise_shapes(given, *args, **kwargs)
        for address, shape in shapes.items():
            if address not in noise or jnp.shape(noise[address]) != shape:
                got = jnp.shape(noise[address]) if address in noise else "nothing"
                raise InvalidValue(
                    f"path: noise[{address!r}] must have shape {shape}, got {got}. "
                    f"guide.noise_shapes(given, ...) gives the shapes."
                )

        return _path(pack(self, args, kwargs), noise, given)

    def _path(self, noise, given, args, kwargs):
        def choose(address, q, noise):
            if not hasattr(q, "value"):
                raise InvalidModel(
                    f"path: {address!r} has no map from normal noise to its value (gamma "
                    f"increments). Use the guide as a proposal: m.generate(key, given, "
                    f"proposal=guide), ab.importance or ab.smc."
                )
            return q.value(noise)

        return self._forward(given, args, kwargs, choose, noise)

    @property
    def in_noise(self) -> Model:
        """The posterior of the path in noise coordinates, a Model called as `(given, *args)`.

        Its sites are 'noise/<address>', standard normal; the path is recorded as deterministic
        values under the model's addresses, and the log weight is a factor, 'weight'.

        Example:
            >>> post = ab.nuts()(guide.in_noise).posterior(key, {"y": y}, *args)
        """
        return InNoise(self)

    def _forward(self, given, args, kwargs, choose, noise):
        """Runs the model with its state chosen under the messages."""
        chain = self._chain(given, args, kwargs)
        message, start = self._messages(chain)
        emitting = noise is None
        others = [
            a for a in chain.program.latents
            if a not in chain.given and a not in (chain.state, chain.initial)
        ]  # fmt: skip
        if others and not emitting:
            raise InvalidModel(
                f"path: {', '.join(map(repr, others))} of `{self.base.name}` would be drawn from "
                f"the prior, which noise does not cover. Condition on them, or use the guide as a "
                f"proposal."
            )
        zero = jnp.zeros((), jnp.result_type(float))
        choices: dict[str, Any] = {}

        def weigh(site, operands, q, value):
            if emitting:
                return zero
            score = elementwise(site, lambda o, x: log_density_of(site, o, x), operands, value)
            return jnp.sum(score) - q.log_prob(value)

        def cast(site, value):
            return jnp.reshape(value, site.full_shape).astype(site.dtype)

        def first(site, operands, state):
            q, _ = start.tilt()
            value = choose(site.address, q, None if emitting else noise[site.address])
            value = cast(site, value)
            choices[site.address] = value
            state.acc = state.acc.add(None, weigh(site, operands, q, value))
            return value

        def again(site, operands, state):
            return bind(site.replace(address=scoped(site.address)), operands)

        fixed = {a: again for a in others} if emitting else {}

        def steps(eqn, vals, state):
            body, p = chain.body, eqn.params
            nc, nk = body.num_consts, body.num_carry
            avals = [v.aval for v in _jax.inner_jaxpr(body.jaxpr)[0].invars[nc : nc + nk]]
            init = [jnp.asarray(x, a.dtype) for x, a in zip(vals[nc : nc + nk], avals, strict=True)]

            def step(loop, x):
                carry, weight = loop
                xs, given, local, eps = x
                inputs = [*vals[:nc], *carry, *xs]
                q, _ = Message(local, [], body).tilt(inputs, given)
                got: dict[str, Any] = {}

                def state_rule(site, operands, _):
                    got["value"] = cast(site, choose(site.address, q, eps))
                    got["weight"] = weigh(site, operands, q, got["value"])
                    return got["value"]

                inner = State(chain.key, given, Sums.zero(log_density=False, weight=True))
                visit = Visit({body.state: state_rule, **fixed})
                outs = walk(visit, body.jaxpr, inputs, inner)
                weight = weight + got["weight"] + inner.acc.weight
                return (outs[:nk], weight), (outs[nk:], got["value"])

            (carry, weight), (ys, values) = jax.lax.scan(
                step, (init, zero),
                (list(vals[nc + nk :]), chain.observed, message.local,
                 None if emitting else noise[body.state]),
                length=p["length"], reverse=p["reverse"],
            )  # fmt: skip
            choices[body.state] = values
            state.acc = state.acc.add(None, weight)
            return [*carry, *ys]

        rules: dict[str, Any] = dict(fixed)
        if start is not None:
            rules[chain.initial] = first
        elif chain.initial is not None and emitting:
            rules[chain.initial] = again
        state = State(chain.key, chain.given, Sums.zero(log_density=False, weight=True))
        program = chain.program
        walk(
            Visit(rules, (chain.state, steps)),
            program.jaxpr,
            program.inputs(chain.arguments),
            state,
        )
        logical = {a: program.sites[a].to_logical(x) for a, x in choices.items()}
        return logical, state.acc.weight


@jax.jit
def _path(arguments, noise, given):
    guide, args, kwargs = arguments.unpack()
    return guide._path(noise, given, args, kwargs)


def _noise_like(arguments, given):
    guide, args, kwargs = arguments.unpack()
    chain = guide._chain(given, args, kwargs)
    shapes: dict[str, tuple[int, ...]] = {chain.state: (chain.length, _size(chain.info))}
    if chain.initial is not None:
        shapes = {chain.initial: (_size(chain.program.sites[chain.initial]),), **shapes}
    return {a: jnp.zeros(shape) for a, shape in shapes.items()}


def _size(info: Any) -> int:
    size = 1
    for n in info.site.full_shape:
        size *= n
    return size


class InNoise(Model):
    """Made by `Guided.in_noise`."""

    guide: Guided
    algorithm: Any = None

    @property
    def name(self) -> str:
        return f"{self.guide.base.name} in noise"

    def emit(self, given: Any, *args: Any, **kwargs: Any) -> Any:
        import numpyro.distributions as dist

        shapes = self.guide.noise_shapes(given, *args, **kwargs)
        noise = {
            a: sample(f"noise/{a}", dist.Normal(jnp.zeros(shape), 1.0))
            for a, shape in shapes.items()
        }
        choices, log_weight = self.guide.path(noise, given, *args, **kwargs)
        factor("weight", log_weight)
        return {a: deterministic(a, x) for a, x in choices.items()}


def guided(model: Model, auxiliary: Auxiliary) -> Guided:
    """Guides a model's path by its observations: backward filtering, forward guiding.

    The model is unmodified: its state is a site of a `lax.scan`, and the true transition is read
    from that site. The result proposes paths and weighs them, whatever the auxiliary process is;
    the closer that is to the model, the more even the weights. With the true one all are equal to
    the evidence.

    Args:
        model: A model with a scan that draws the state once in each step.
        auxiliary: `ab.guiding.linearized(state)`, `linear_gaussian`, `diffusion`, `discrete` or
            `gamma`.

    Returns:
        A Model: pass it as `proposal=` to `ab.smc`, `ab.importance`, `ab.mh` or `m.generate`; with
        `.path(noise, given, *args)` and `.in_noise` for samplers with explicit noise.

    Raises (on use):
        UnknownAddress, InvalidModel: The state is not such a site, or its steps depend on a latent
            outside of the scan.

    Example:
        >>> guide = ab.guided(model, ab.guiding.linearized("x"))
        >>> post = ab.smc(num_particles=100, proposal=guide)(model).posterior(key, given={"y": y})
    """
    if not isinstance(model, Model):
        raise InvalidValue(f"ab.guided takes a model, got {type(model).__name__}.")
    if not isinstance(auxiliary, Auxiliary):
        raise InvalidValue(
            f"ab.guided: auxiliary= takes one of ab.guiding (linearized, linear_gaussian, "
            f"diffusion, discrete, gamma), got {type(auxiliary).__name__}."
        )
    return Guided(model.with_algorithm(None), auxiliary)
