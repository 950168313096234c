"""Models written for NumPyro, as models of ours.

While the function is staged, a NumPyro handler at the bottom of NumPyro's stack receives each
message as the handlers inside the function leave it (plates expanded, masks and scales applied)
and emits the site it stands for. So `numpyro.handlers.reparam`, `scope`, `mask`, `scale`, ...
inside the function mean what they mean in NumPyro, and the density is NumPyro's.

What has no counterpart is an error: a plate that draws its own minibatch, `numpyro.prng_key`,
mutable state.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.contrib.control_flow.cond import cond_wrapper
from numpyro.contrib.control_flow.scan import scan_wrapper
from numpyro.distributions import (
    Distribution,
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
    Unit,
)
from numpyro.ops.pytree import PytreeTrace

from abduce.errors import InvalidModel
from abduce.ppl.language import deterministic, factor, sample, scaled
from abduce.ppl.masked import masked
from abduce.ppl.model import Model
from abduce.ppl.parameters import param

__all__ = ["from_numpyro"]

# NumPyro's handlers are no part of JAX's trace-cache key; a new value here makes each staging
# trace inner jitted functions afresh, so that none is reused under other handlers.
_staging = jax.make_user_context(None)


class NumPyroModel(Model):
    """A model made from a NumPyro model function."""

    fn: Callable[..., Any] = eqx.field(static=True)
    algorithm: Any = None

    @property
    def name(self) -> str:
        f: Any = self.fn
        while getattr(f, "fn", None) is not None:  # handlers wrap the function they act on
            f = f.fn
        return getattr(f, "__name__", type(f).__name__)

    def emit(self, *args, **kwargs):
        with _staging(object()), _Bridge(self.name):
            return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<model {self.name}, from numpyro>"


def from_numpyro(f: Callable[..., Any]) -> Model:
    """Makes a model from a NumPyro model function.

    Sites keep their NumPyro names and shapes: plates are batch dimensions (named after the plate),
    a `numpyro.contrib.control_flow.scan` adds a leading dimension. `numpyro.sample(obs_mask=)` is
    one partly observed site here, where NumPyro makes two.

    Args:
        f: A function that calls `numpyro.sample` and its siblings; handlers around it are fine.
            Arguments follow the rules of `ab.model`.

    Returns:
        A model with the same density.

    Raises:
        InvalidModel: `f` is not a function. On use: the function draws a minibatch in a plate,
            asks for a random key, keeps mutable state, or scales elements differently.

    Example:
        >>> def regression(x, y=None):
        ...     b = numpyro.sample("b", dist.Normal(0, 1))
        ...     with numpyro.plate("n", len(x)):
        ...         numpyro.sample("y", dist.Normal(b * x, 1), obs=y)
        >>> ab.from_numpyro(regression).posterior(key, x, given={"y": y})
    """
    if isinstance(f, Model):
        raise InvalidModel(f"ab.from_numpyro takes a NumPyro model function; {f!r} is one of ours.")
    if not callable(f):
        raise InvalidModel(f"ab.from_numpyro takes a NumPyro model function, got {f!r}.")
    return NumPyroModel(f)


class _Bridge(numpyro.primitives.Messenger):
    """Emits what a NumPyro message stands for.

    Args:
        name: Of the model.
        outer: Handlers that stand around the control flow whose body this bridge serves; they act
            on each message of the body.
    """

    def __init__(self, name: str, outer: Sequence[Any] = ()):
        super().__init__()
        self.name = name
        self.outer = outer
        self.joined: dict[Any, Any] = {}  # values of partly observed sites, by caller's frame

    def process_message(self, msg):
        for handler in reversed(self.outer):
            handler.process_message(msg)
        msg["stop"] = True  # handlers outside of the model are none of its business
        rule = _RULES.get(msg["type"])
        if rule is None:
            raise InvalidModel(
                f"ab.from_numpyro: `{self.name}` has a numpyro.{msg['type']} statement "
                f"({msg.get('name')!r}), which has no counterpart. Pass the state as an argument "
                f"and return it."
            )
        rule(self, msg)

    def sample(self, msg):
        frame = None if "obs_mask" in msg else _masked_observe_frame()
        if frame is not None:
            msg["value"] = self.partly_observed(frame)
            return
        d = msg["fn"]
        shape = msg["kwargs"].get("sample_shape", ())
        if shape:
            d = d.expand((*shape, *d.batch_shape))
        with _scale_of(msg, self.name):
            if isinstance(_innermost(d), Unit):
                factor(msg["name"], d.log_prob(msg["value"]))
            else:
                msg["value"] = _emit(msg, d)

    def partly_observed(self, frame):
        """`numpyro.sample(obs_mask=)`: three messages there, one site here."""
        if frame not in self.joined:
            call = frame.f_locals
            stack = numpyro.primitives._PYRO_STACK
            half = stack.pop()  # the mask that the function put around the observed half
            try:
                out = numpyro.primitives.apply_stack(
                    {
                        "type": "sample", "name": call["name"], "fn": call["fn"], "args": (),
                        "kwargs": {"rng_key": None, "sample_shape": ()}, "value": call["obs"],
                        "scale": None, "is_observed": call["obs"] is not None,
                        "intermediates": [], "cond_indep_stack": [], "infer": {},
                        "obs_mask": call["obs_mask"],
                    }
                )  # fmt: skip
            finally:
                stack.append(half)
            self.joined[frame] = out["value"]
        return self.joined[frame]

    def deterministic(self, msg):
        frame = _masked_observe_frame()
        if frame is not None:
            del self.joined[frame]
            return
        msg["value"] = deterministic(msg["name"], msg["value"])

    def param(self, msg):
        value = msg["value"] if msg["value"] is not None else (msg["args"] or (None,))[0]
        if value is None:
            raise InvalidModel(
                f"ab.from_numpyro: param {msg['name']!r} of `{self.name}` has no initial array "
                f"(a callable, or a network module, draws one). Pass an array: "
                f'numpyro.param("{msg["name"]}", jnp.zeros(...)); or write the model with '
                f"ab.param, which takes whole modules."
            )
        msg["value"] = param(msg["name"], value, msg["kwargs"].get("constraint"))

    def plate(self, msg):
        if msg["value"] is None:
            size, subsample = msg["args"]
            raise InvalidModel(
                f"ab.from_numpyro: plate {msg['name']!r} of `{self.name}` draws a minibatch "
                f"(subsample_size={subsample} of {size}), and a density does not draw. Pass the "
                f"minibatch as an argument, make the plate of its size, and weight what is inside "
                f"by numpyro.handlers.scale(scale={size} / {subsample}), or by ab.scaled."
            )

    def prng_key(self, msg):
        if msg["value"] is None and msg["kwargs"].get("rng_key") is None:
            raise InvalidModel(
                f"ab.from_numpyro: `{self.name}` asks for a random key (numpyro.prng_key, or a "
                f"site hidden by numpyro.handlers.block or uncondition), but a density has none. "
                f"Make the draw a visible site, or pass it as an argument."
            )

    def control_flow(self, msg):
        stack = numpyro.primitives._PYRO_STACK
        outer = [h for h in stack[stack.index(self) + 1 :] if _acts_inside(h, self.name)]
        inside = _Bridge(self.name, outer)
        given = msg["kwargs"]["substitute_stack"]
        if msg["fn"] is scan_wrapper:
            msg["value"] = _scan(inside, given, *msg["args"])
        elif msg["fn"] is cond_wrapper:
            msg["value"] = _cond(inside, given, *msg["args"])
        else:
            raise InvalidModel(
                f"ab.from_numpyro: `{self.name}` has control flow by {msg['fn']!r}; known are "
                f"scan and cond of numpyro.contrib.control_flow."
            )


_RULES: dict[str, Callable[[Any, Any], Any]] = {
    "sample": _Bridge.sample,
    "deterministic": _Bridge.deterministic,
    "param": _Bridge.param,
    "plate": _Bridge.plate,
    "prng_key": _Bridge.prng_key,
    "control_flow": _Bridge.control_flow,
    "inspect": lambda bridge, msg: None,
    "subsample": lambda bridge, msg: None,  # the plates themselves take the rows
}


def _emit(msg: Any, d: Distribution) -> Any:
    """The site of a `sample` message whose distribution, with plates, is `d`."""
    name, obs = msg["name"], msg["value"]
    batch = tuple(d.batch_shape)
    if obs is not None:
        head = jnp.shape(obs)[: jnp.ndim(obs) - d.event_dim]
        batch = np.broadcast_shapes(batch, head)
    dims: list[str | None] = [None] * (len(batch) + d.event_dim)
    for plate in msg["cond_indep_stack"]:
        if -plate.dim <= len(batch):
            dims[len(batch) + plate.dim] = plate.name
    if obs is None:
        return sample(name, d, dims=dims)
    counted = _counted(d)
    filled = obs
    if counted is not None:
        # What a mask takes out of the density may be anything, NaN included.
        obs = jnp.asarray(obs)
        filled = jnp.where(counted, obs, d.support.feasible_like(obs))
    if "obs_mask" in msg:
        shape = batch + tuple(d.event_shape)
        filled = masked(jnp.broadcast_to(filled, shape), jnp.broadcast_to(msg["obs_mask"], batch))
    out = sample(name, d, obs=filled, dims=dims)
    return out if counted is None else jnp.where(counted, out, obs)


def _counted(d: Distribution) -> Any | None:
    """Which entries of a value count in the log density of a masked distribution; None if all."""
    counted = None
    while isinstance(d, (MaskedDistribution, ExpandedDistribution, Independent)):
        if isinstance(d, MaskedDistribution) and d._mask is not True:
            mask = jnp.asarray(d._mask)
            mask = mask.reshape(mask.shape + (1,) * d.event_dim)
            counted = mask if counted is None else counted & mask
        d = d.base_dist
    return counted


def _innermost(d: Distribution) -> Distribution:
    while isinstance(d, (MaskedDistribution, ExpandedDistribution, Independent)):
        d = d.base_dist
    return d


def _scale_of(msg: Any, name: str) -> contextlib.AbstractContextManager[None]:
    scale = msg["scale"]
    if scale is None:
        return contextlib.nullcontext()
    if jnp.ndim(scale):
        known = None if isinstance(scale, jax.core.Tracer) else np.asarray(scale)
        if known is None or not (known == known.flat[0]).all():
            raise InvalidModel(
                f"ab.from_numpyro: site {msg['name']!r} of `{name}` is scaled by an array of shape "
                f"{jnp.shape(scale)}. Scale by a scalar; or, for weights per element, write the "
                f"site under jax.vmap with ab.scaled(weight) inside."
            )
        scale = known.flat[0]
    if not isinstance(scale, jax.core.Tracer) and float(scale) == 1.0:
        return contextlib.nullcontext()
    return scaled(scale)


def _masked_observe_frame() -> Any | None:
    """The frame of `numpyro.sample(obs_mask=)` that sent this message, if one did."""
    statements = (numpyro.sample.__code__, numpyro.deterministic.__code__)
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code not in statements:
        frame = frame.f_back
    caller = None if frame is None else frame.f_back
    observe = numpyro.primitives._masked_observe.__code__
    return caller if caller is not None and caller.f_code is observe else None


def _acts_inside(handler: Any, name: str) -> bool:
    """Whether a handler around control flow is applied to each message of the body.

    Raises:
        InvalidModel: It has no meaning there.
    """
    if isinstance(handler, (handlers.condition, handlers.substitute, handlers.seed)):
        return False  # the first two reach the body as `substitute_stack`; draws need no key
    extent = {handlers.mask: "mask", handlers.scale: "scale"}.get(type(handler))
    if extent is not None and jnp.ndim(getattr(handler, extent)) == 0:
        return True
    if isinstance(handler, (handlers.scope, handlers.reparam, handlers.infer_config)):
        return True
    what = f"{extent} with an array" if extent else type(handler).__name__
    raise InvalidModel(
        f"ab.from_numpyro: `{name}` has numpyro.handlers.{what} around a scan or cond, where it "
        f"cannot be taken apart into steps. Put it inside the body function."
    )


def _scan(inside, given, f, init, xs, length, reverse):
    if length is None:
        length = jnp.shape(jax.tree.leaves(xs)[0])[0]

    def body(carry, x):
        i, x = x
        with inside:
            return _substituted(f, given, _Step(i, length, reverse))(carry, x)

    carry, ys = jax.lax.scan(body, init, (jnp.arange(length), xs), length=length, reverse=reverse)
    return (length, None, carry), (PytreeTrace({}), ys)


def _cond(inside, given, predicate, if_true, if_false, operand):
    def branch(f):
        def run(operand):
            with inside:
                return _substituted(f, given, None)(operand)

        return run

    return jax.lax.cond(predicate, branch(if_true), branch(if_false), operand), PytreeTrace({})


class _Step(NamedTuple):
    """A step of a scan."""

    index: Any
    length: int
    reverse: bool


def _substituted(f: Callable[..., Any], given: Sequence[Any], step: _Step | None) -> Any:
    """The body under the `condition` and `substitute` handlers that stand around it."""
    for kind, values in given:
        fn = functools.partial(_value_for, values, step)
        f = getattr(handlers, kind)(f, **{f"{kind}_fn": fn})
    return f


def _value_for(values: Any, step: _Step | None, msg: Any) -> Any | None:
    if step is not None and msg["type"] != "sample":
        return None
    value = values(msg) if callable(values) else values.get(msg["name"])
    if value is None or step is None:
        return value
    one = len(msg["kwargs"]["sample_shape"] + tuple(msg["fn"].shape()))
    if jnp.ndim(value) == one:
        return value
    if jnp.ndim(value) != one + 1 or jnp.shape(value)[0] != step.length or step.reverse:
        raise InvalidModel(
            f"ab.from_numpyro: site {msg['name']!r} in a {'reverse ' * step.reverse}scan of "
            f"{step.length} steps is set by a handler to a value of shape {jnp.shape(value)}. "
            f"Remove that handler and pass the value as given={{...}} or through ab.condition."
        )
    return jnp.asarray(value)[step.index]
