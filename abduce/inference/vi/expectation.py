"""`ab.expectation`: unbiased estimates of an expectation and of its derivatives.

An objective is a function with random choices in it that returns a scalar. Staged, it is a program
like any model; this module plans how each choice gets its derivative, and runs it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidModel, InvalidValue, UnknownAddress
from abduce.inference.vi.plan import Plan, grid_indices, make_plan, physical_shape, walk_parts
from abduce.inference.vi.strategies import (
    Strategy,
    score,
)
from abduce.inference.vi.tape import Input
from abduce.ppl.model import FunctionModel, Model
from abduce.ppl.naming import scoped
from abduce.ppl.operations import outside_scopes, prepare_params, stage_operation, typed_key
from abduce.ppl.program import Program, prepare_argument, stage
from abduce.ppl.selection import matching
from abduce.ppl.transforms import emit_again

__all__ = ["Expectation", "expectation"]

_CHUNK = 64  # alternatives that run as one batch


class Expectation(eqx.Module):
    """The expectation of what a program returns, over its random choices.

    Made by `ab.expectation`. Inside another program a call runs the objective in place.
    """

    model: Model
    grad: tuple[tuple[Any, Strategy], ...] = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the objective as part of the program at hand; its strategies come along."""
        if not self.grad:
            return self.model.emit(*args, **kwargs)
        chosen = self._chosen(self.model.program(*args, **kwargs))
        strategies = {scoped(a): s for a, s in chosen.items()}

        def edit(site, operands, given):
            strategy = strategies.get(site.address, site.grad)
            return site.replace(grad=strategy), operands

        return emit_again(self.model, args, kwargs, edit, {})

    def estimate(
        self,
        key: Any,
        *args: Any,
        num_samples: int = 1,
        params: Mapping[str, Any] | None = None,
        baselines: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """An unbiased estimate, whose derivatives (`jax.grad`, `jax.jvp`) are unbiased too.

        Args:
            key: Random key.
            *args, **kwargs: The objective's arguments.
            num_samples: How many independent runs are averaged.
            params: Values of `ab.param` sites; others take their initial value.
            baselines: Numbers to subtract from the cost of score-function sites, by address.

        Returns:
            A scalar.

        Example:
            >>> @ab.expectation
            ... def square(mu):
            ...     return ab.sample("x", dist.Normal(mu, 1.0)) ** 2
            >>> jax.grad(lambda mu: square.estimate(key, mu, num_samples=1000))(3.0)  # near 6
        """
        key = typed_key(key, "expectation.estimate")
        _check_samples(num_samples)
        args, kwargs = _as_arrays((args, kwargs))
        return _estimate(self, key, args, kwargs, _as_params(params), baselines, num_samples)

    def value_and_grad(
        self,
        key: Any,
        *args: Any,
        num_samples: int = 1,
        params: Mapping[str, Any] | None = None,
        baselines: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Unbiased estimates of the value and of its gradient.

        Args:
            key: Random key.
            *args, **kwargs: The objective's arguments.
            num_samples: How many independent runs are averaged.
            params: Values of `ab.param` sites. If given, the gradient is in them; otherwise it is
                in the first argument (any pytree; leaves that are no floats get None).
            baselines: As in `estimate`.

        Returns:
            The value and the gradient.
        """
        key = typed_key(key, "expectation.value_and_grad")
        _check_samples(num_samples)
        if params is None and not args:
            raise InvalidValue(
                "expectation.value_and_grad: there is nothing to differentiate in: pass the "
                "parameters as first argument, or params= for ab.param sites."
            )
        args, kwargs = _as_arrays((args, kwargs))
        return _value_and_grad(self, key, args, kwargs, _as_params(params), baselines, num_samples)

    def jvp(
        self, key: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...], *,
        num_samples: int = 1, params: Mapping[str, Any] | None = None,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Unbiased estimates of the value and of a directional derivative.

        Args:
            key: Random key.
            primals: The objective's arguments.
            tangents: A direction for each, in its structure.
            num_samples: How many independent runs are averaged.
            params: Values of `ab.param` sites.
        """
        key = typed_key(key, "expectation.jvp")
        _check_samples(num_samples)

        def f(*args):
            return _estimate(self, key, args, {}, params, None, num_samples)

        return jax.jvp(f, tuple(primals), tuple(tangents))

    def costs(
        self, key: Any, *args: Any, params: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """One draw of the costs that score-function choices are credited with.

        Returns:
            By address, the cost of each element (mapped axes, then batch shape).
        """
        key = typed_key(key, "expectation.costs")
        return _costs(self, key, *_as_arrays((args, kwargs)), params)

    def baseline_loss(
        self, key: Any, *args: Any, params: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Squared distance between the costs and the learned baselines, to be made small.

        Differentiable in what the baselines are computed from; the costs are held fixed.
        """
        key = typed_key(key, "expectation.baseline_loss")
        return _baseline_loss(self, key, *_as_arrays((args, kwargs)), params)

    def plan(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        """Which strategy each choice has, and how many runs of the program it costs.

        Example:
            >>> elbo.plan(params)
            {'z': 'ab.grad.enum(): summed out with 2 alternatives', 'x': 'ab.grad.reparam()'}
        """
        program, _ = stage_operation(self.model, args, kwargs)
        found = make_plan(self._chosen(program), program)
        out = {}
        for a, s in found.strategies.items():
            out[a] = s.name
            if a in found.joint:
                out[a] += f": summed out with {found.joint[a][1]} alternatives"
            elif a in found.varied:
                out[a] += f": {found.varied[a][1]} more runs"
        return out

    def strategies(self, *args: Any, **kwargs: Any) -> dict[str, Strategy]:
        """The strategy of each choice, by address."""
        program = stage_operation(self.model, args, kwargs)[0]
        return make_plan(self._chosen(program), program).strategies

    def has_learned_baselines(self, *args: Any, **kwargs: Any) -> bool:
        """Whether a choice has a baseline that is computed in the program."""
        sites = stage_operation(self.model, args, kwargs)[0].sites
        return any("baseline" in s.site.roles for s in sites.values())

    def _chosen(self, program: Program) -> dict[str, Strategy]:
        """Strategies from outside, by address."""
        latents = {a: s for a, s in program.sites.items() if s.is_latent}
        chosen: dict[str, Strategy] = {}
        for selection, strategy in self.grad:
            chosen |= dict.fromkeys(matching(selection, latents), strategy)
        return chosen


def expectation(
    f: Callable[..., Any] | None = None, *, grad: Mapping[Any, Strategy] | None = None
) -> Any:
    """An objective: the expectation of what `f` returns, over the random choices in it.

    How the derivative passes through each choice is set where it is made,
    `ab.sample("z", d, grad=ab.grad.enum())`, or here. See `ab.grad` for the strategies; without
    one, each distribution has a default (`ab.grad.default`).

    Everything a model may contain may be in an objective: `vmap`, `scan`, `cond`, inner `jit`,
    sub-models. `ab.propose(guide, ...)` runs a model as part of it, `ab.log_density(model, ...)`
    scores choices.

    Args:
        f: Returns a scalar float.
        grad: Strategies by address or selection.

    Raises (on use):
        InvalidModel: A strategy does not fit a distribution; the objective does not return a
            scalar; a choice with a path derivative visibly makes the cost jump.
        UnknownAddress: A selection matches no choice.

    Example:
        >>> @ab.expectation
        ... def elbo(params):
        ...     z, log_q = ab.propose(guide, data, params)
        ...     return ab.log_density(model, {**z, **data}) - log_q
        >>> value, gradient = elbo.value_and_grad(key, params)

    Reference: Lew, Huot, Staton, Mansinghka, "ADEV: sound automatic differentiation of expected
    values of probabilistic programs" (POPL 2023); Becker et al. (PLDI 2024).
    """
    if f is None:
        return functools.partial(expectation, grad=grad)
    pairs = tuple((grad or {}).items())
    for _, strategy in pairs:
        if not isinstance(strategy, Strategy):
            raise InvalidModel(
                f"ab.expectation: grad= takes strategies such as ab.grad.score(), got {strategy!r}."
            )
        if getattr(strategy, "operand", None) is not None:
            raise InvalidModel(
                "ab.expectation: a baseline that is an array is part of the program. Write it "
                "where the choice is made: ab.sample(..., grad=ab.grad.score(baseline=b))."
            )
    if isinstance(f, Expectation):
        return Expectation(f.model, f.grad + pairs)
    if not isinstance(f, Model):
        if not callable(f):
            raise InvalidModel(f"ab.expectation takes a function, got {type(f).__name__}.")
        f = FunctionModel(f)
    return Expectation(f, pairs)


def _as_arrays(tree: Any) -> Any:
    """Numbers become arrays, so that other numbers compile nothing; see `prepare_argument`."""
    args, kwargs = tree
    tree = (tuple(map(prepare_argument, args)), {k: prepare_argument(v) for k, v in kwargs.items()})
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, (float, np.ndarray)) else x, tree)


def _as_params(params: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if params is None else {a: jnp.asarray(x) for a, x in params.items()}


def _check_samples(n: Any) -> None:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise InvalidValue(f"num_samples must be an int >= 1, got {n!r}.")


# ------------------------------------------------------------------------ running


def _one(
    plan: Plan, program: Program, values: Any, key: Any, inputs: dict[str, Input],
    *, misfit: bool = False,
) -> Any:  # fmt: skip
    """One unbiased estimate: the ordinary run, averaged over the grid, and the alternatives."""
    grid = plan.grid

    def ordinary(index, varied=None, which=None, mask=None):
        credit = plan.credit(varied=varied, misfit=misfit)
        mine = dict(inputs)
        for address, i in index.items():
            mine[address] = dataclasses.replace(mine.get(address, Input()), index=i)
        if varied is not None:
            mine[varied] = Input(which=which, mask=mask)
        part, extra = walk_parts(credit, program, values, key, mine)
        return extra if misfit else part + (extra if varied is None else 0.0)

    def averaged(**settings):
        if grid == 1:
            return ordinary(grid_indices(plan, program, jnp.zeros((), jnp.int32)), **settings)
        runs = jax.vmap(lambda m: ordinary(grid_indices(plan, program, m), **settings))(
            jnp.arange(grid, dtype=jnp.int32)
        )
        return jnp.mean(runs)

    total = averaged()
    if misfit:
        return total
    for address, (axes, runs) in plan.varied.items():
        shape = physical_shape(program.sites[address])
        sizes = [shape[i] for i in axes]
        elements = math.prod(sizes)

        def alternative(r, address=address, axes=axes, shape=shape, sizes=sizes, n=elements):
            at = jnp.unravel_index(r % n, sizes) if sizes else ()
            mask = jnp.ones(shape, bool)
            for i, j in zip(axes, at, strict=True):
                here = jnp.arange(shape[i]) == j
                mask = mask & here.reshape((-1,) + (1,) * (len(shape) - i - 1))
            return averaged(varied=address, which=r // n, mask=mask)

        r = jnp.arange(runs, dtype=jnp.int32)
        if runs <= _CHUNK:
            total = total + jnp.sum(jax.vmap(alternative)(r))
        else:
            total = total + jnp.sum(jax.lax.map(alternative, r, batch_size=_CHUNK))
    return total


def _stage(objective: Expectation, args: Any, kwargs: Any, params: Any) -> Any:
    with outside_scopes():
        objective.model.check(args, kwargs)
        program, arguments = stage(objective.model, args, kwargs)
    inputs = {a: Input(value=g.value) for a, g in prepare_params(program, params).items()}
    return program, program.inputs(arguments), inputs


def _with_baselines(plan: Plan, program: Program, inputs: Any, baselines: Any) -> dict[str, Input]:
    out = dict(inputs)
    for address, b in (baselines or {}).items():
        strategy = plan.strategies.get(address)
        if not isinstance(strategy, score):
            known = [a for a, s in plan.strategies.items() if isinstance(s, score)]
            raise UnknownAddress(
                f"baselines[{address!r}] is no choice of `{program.name}` with ab.grad.score() "
                f"({', '.join(known) or 'it has none'})."
            )
        info = program.sites[address]
        if jnp.ndim(b):
            b = info.to_physical(jnp.asarray(b))
        b = jnp.broadcast_to(b, physical_shape(info))
        out[address] = dataclasses.replace(out.get(address, Input()), baseline=b)
    return out


def _nudged(plan: Plan, program: Program, inputs: Any, nudges: Any) -> dict[str, Input]:
    out = dict(inputs)
    for address, x in nudges.items():
        out[address] = dataclasses.replace(out.get(address, Input()), nudge=x)
    return out


def _one_costs(plan, program, values, key, inputs, addresses):
    """The derivative in a nudge of the log factor of each element is its cost."""
    zeros = {
        a: jnp.zeros(physical_shape(program.sites[a]), jnp.result_type(float)) for a in addresses
    }
    if not zeros:
        return {}

    def f(nudges):
        return _one(plan, program, values, key, _nudged(plan, program, inputs, nudges))

    return jax.lax.stop_gradient(jax.grad(f)(zeros))


def _run(objective, key, args, kwargs, params, baselines, num_samples):
    program, values, inputs = _stage(objective, args, kwargs, params)
    plan = make_plan(objective._chosen(program), program)
    inputs = _with_baselines(plan, program, inputs, baselines)
    others = [
        a for a, s in plan.strategies.items()
        if isinstance(s, score) and s.baseline == "leave_one_out"
    ]  # fmt: skip
    if num_samples == 1:
        if others:
            raise InvalidValue(
                f"the baseline 'leave_one_out' of {others[0]!r} needs num_samples >= 2."
            )
        return _one(plan, program, values, key, inputs)
    keys = jax.random.split(key, num_samples)
    if not others:
        return jnp.mean(jax.vmap(lambda k: _one(plan, program, values, k, inputs))(keys))
    fixed = jax.lax.stop_gradient(values)
    costs = jax.vmap(lambda k: _one_costs(plan, program, fixed, k, inputs, others))(keys)
    rest = jax.tree.map(lambda c: (c.sum(0) - c) / (num_samples - 1), costs)

    def one(k, baselines):
        mine = dict(inputs)
        for a, b in baselines.items():
            mine[a] = dataclasses.replace(mine.get(a, Input()), baseline=b)
        return _one(plan, program, values, k, mine)

    return jnp.mean(jax.vmap(one)(keys, rest))


@eqx.filter_jit
def _estimate(objective, key, args, kwargs, params, baselines, num_samples):
    return _run(objective, key, args, kwargs, params, baselines, num_samples)


@eqx.filter_jit
def _value_and_grad(objective, key, args, kwargs, params, baselines, num_samples):
    if params is not None:

        def of_params(params):
            return _run(objective, key, args, kwargs, params, baselines, num_samples)

        return eqx.filter_value_and_grad(of_params)(params)

    def of_first(first):
        return _run(objective, key, (first, *args[1:]), kwargs, None, baselines, num_samples)

    return eqx.filter_value_and_grad(of_first)(args[0])


@eqx.filter_jit
def _costs(objective, key, args, kwargs, params):
    program, values, inputs = _stage(objective, args, kwargs, params)
    plan = make_plan(objective._chosen(program), program)
    addresses = [a for a, s in plan.strategies.items() if isinstance(s, score)]
    costs = _one_costs(plan, program, values, key, inputs, addresses)
    return {a: program.sites[a].to_logical(c) for a, c in costs.items()}


@eqx.filter_jit
def _baseline_loss(objective, key, args, kwargs, params):
    program, values, inputs = _stage(objective, args, kwargs, params)
    plan = make_plan(objective._chosen(program), program)
    learned = [
        a for a in plan.strategies if "baseline" in program.sites[a].site.roles
    ]  # fmt: skip
    if not learned:
        raise InvalidModel(
            f"`{program.name}` has no learned baseline: give a site "
            f"grad=ab.grad.score(baseline=b) with an array b."
        )
    costs = _one_costs(plan, program, jax.lax.stop_gradient(values), key, inputs, learned)
    for a, c in costs.items():
        inputs[a] = dataclasses.replace(inputs.get(a, Input()), target=c)
    return _one(plan, program, values, key, inputs, misfit=True)
