"""What an objective is written with: the density `p` and the guide `q`, with parameters bound.

Two kinds: a guide that is a Model, over choice maps; and a guide over the flat vector of
unconstrained coordinates (`abduce.inference.vi.guides`), for which the model is a `FlatTarget`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from abduce.errors import InvalidAlgorithm
from abduce.inference.estimated import marginal
from abduce.inference.importance import importance
from abduce.inference.target import FlatTarget
from abduce.inference.vi.strategies import reparam, stop
from abduce.ppl.inside import log_density, propose
from abduce.ppl.interpreter import State, walk
from abduce.ppl.language import sample, scope
from abduce.ppl.model import Model
from abduce.ppl.naming import scoped
from abduce.ppl.operations import prepare_params
from abduce.ppl.program import relative, stage
from abduce.ppl.site import bind

__all__ = ["FlatDensity", "FlatGuide", "ModelDensity", "ModelGuide"]

_fixed = jax.lax.stop_gradient


_SCOPE = "abduce_simulated"


class _Emit:
    """Emits the sites again, without scoring them.

    Args:
        grad: A gradient strategy for all of them, or None for their own.
    """

    def __init__(self, grad: Any):
        self.grad = grad

    def site(self, site, operands, given, key, acc):
        if site.kind == "param" and given is not None:
            return [jnp.asarray(given.value, site.dtype)], acc, None
        if self.grad is not None and site.kind == "sample":
            site = site.replace(grad=self.grad)
        out = bind(site, list(operands))
        return [out], acc, {"value": out} if site.kind == "sample" else None


def emit_choices(
    m: Model, args: Any, kwargs: Any, params: Mapping[str, Any], grad: Any = None
) -> dict[str, Any]:
    """Runs a model as part of the program at hand; its choices by the model's own addresses."""
    program, arguments = stage(m.with_algorithm(None), args, dict(kwargs))
    infos = relative(program).sites
    here = dataclasses.replace(program, sites=infos)
    inputs = {scoped(a): g for a, g in prepare_params(here, params).items()}
    state = State(None, inputs, jnp.zeros(()))
    walk(_Emit(grad), program.jaxpr, program.inputs(arguments), state)
    found = {a: s for a, s in infos.items() if scoped(a) in state.records}
    return {a: s.to_logical(state.records[scoped(a)]["value"]) for a, s in found.items()}


@dataclasses.dataclass(frozen=True)
class ModelDensity:
    """`p(z)`, the log density of a model and its data at a choice map."""

    model: Model
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    given: Mapping[str, Any]
    params: Mapping[str, Any]

    def __call__(self, z: Mapping[str, Any]) -> Any:
        choices = {**z, **self.given}
        return self.model.log_density(choices, *self.args, params=dict(self.params), **self.kwargs)

    def simulate(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Latents and data of the model, drawn as part of the program; no derivative passes."""
        with scope(_SCOPE):
            z = emit_choices(self.model, self.args, self.kwargs, self.params, stop())
        data = {a: z.pop(a) for a in self.given}
        return z, data

    def frozen(self) -> ModelDensity:
        """With parameters that are held fixed."""
        return dataclasses.replace(self, params=jax.tree.map(_fixed, self.params))


@dataclasses.dataclass(frozen=True)
class ModelGuide:
    """`q`, a Model called as `q(given, *args)`."""

    model: Model
    latents: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    params: Mapping[str, Any]

    def propose(self, *, detached: bool = False) -> tuple[dict[str, Any], Any]:
        """A draw, as part of the program, and its log density."""
        grad = stop() if detached else None
        return propose(self.model, *self.args, params=self.params, grad=grad, **self.kwargs)

    def draw(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A draw without its log density, given other data if there are any."""
        seen, *rest = self.args
        args = (seen if given is None else dict(given), *rest)
        found = emit_choices(self.model, args, self.kwargs, self.params)
        return {a: found[a] for a in self.latents}

    def __call__(self, z: Mapping[str, Any]) -> Any:
        return log_density(self.model, z, *self.args, params=self.params, **self.kwargs)

    def frozen(self) -> ModelGuide:
        """With parameters that are held fixed."""
        return dataclasses.replace(self, params=jax.tree.map(_fixed, self.params))

    def marginal(self, num_auxiliary: int, reverse: Any) -> ModelGuide:
        """Without what the model does not have, by importance sampling."""
        via = importance(num_samples=num_auxiliary, proposal=reverse)
        return dataclasses.replace(self, model=marginal(self.model, self.latents, via=via))


@dataclasses.dataclass(frozen=True)
class FlatDensity:
    """`p(u)`, the log density of model and data at unconstrained coordinates."""

    target: FlatTarget
    data: Any

    def __call__(self, u: Any) -> Any:
        return self.target(self.data, u)

    def frozen(self) -> FlatDensity:
        """The same: there are no parameters."""
        return self


@dataclasses.dataclass(frozen=True)
class FlatGuide:
    """`q`, a family over unconstrained coordinates."""

    family: Any
    params: Any

    def propose(self, *, detached: bool = False) -> tuple[Any, Any]:
        """A draw, as part of the program, and its log density."""
        d = dist.Normal(jnp.zeros(self.family.noise_dim), 1.0).to_event(1)
        e = sample("guide", d, grad=reparam(assume_smooth=True))  # `FlatTask.jumps` has looked
        u, log_q = self.family.draw(self.params, e)
        if detached:
            u = _fixed(u)
            return u, self(u)
        return u, log_q

    def __call__(self, u: Any) -> Any:
        return self.family.log_density(self.params, u)

    def frozen(self) -> FlatGuide:
        """With parameters that are held fixed."""
        params = jax.tree.map(lambda x: _fixed(x) if eqx.is_array(x) else x, self.params)
        return dataclasses.replace(self, params=params)

    def marginal(self, num_auxiliary: int, reverse: Any) -> Any:
        """There is nothing to sum out."""
        raise InvalidAlgorithm(
            "this objective is for a guide with choices that the model has not: pass a Model as "
            "guide=."
        )
