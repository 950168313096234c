"""What a model is written with: `sample`, `factor`, `deterministic`, `scope`, `scaled` and
`while_loop`.

Each binds a site (see `abduce.ppl.site`) into the program being staged; none draws or scores
anything by itself. Ordinary `jax.vmap`, `jax.lax.scan`, `jax.lax.cond`, `jax.jit` and
`jax.checkpoint` around them work.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution

from abduce.errors import InvalidModel, InvalidValue
from abduce.ppl import _jax
from abduce.ppl.checks import check_finite, check_parameters, check_support, checked_mask, coerce
from abduce.ppl.data import as_data
from abduce.ppl.interpreter import first_site
from abduce.ppl.masked import Masked
from abduce.ppl.naming import absolute, dim_names, path_text
from abduce.ppl.site import Site, as_float, bind, has_sites, take_apart, user_location

__all__ = ["deterministic", "factor", "sample", "scaled", "scope", "while_loop"]


class scope(contextlib.ContextDecorator):
    """Prefixes the addresses of what is inside: `"mu"` becomes `"a/mu"`.

    Works as a context manager and as a decorator, also around cached inner `jax.jit` functions:
    JAX traces them once per scope.

    Args:
        name: The prefix; nested scopes join with `/`.

    Example:
        >>> with ab.scope("left"):
        ...     x = ab.sample("x", dist.Normal(0, 1))  # address "left/x"
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise InvalidModel(f"ab.scope takes a non-empty string, got {name!r}.")
        self.name = name
        self._open: list[Any] = []

    def _recreate_cm(self) -> scope:  # a decorated function may be entered recursively
        return scope(self.name)

    def __enter__(self) -> None:
        context = _jax.scope_context((*_jax.scope_context.value, self.name))
        context.__enter__()
        self._open.append(context)

    def __exit__(self, *exc: Any) -> None:
        self._open.pop().__exit__(*exc)


class _Scales(threading.local):
    """The scale behind each token of `token_context`.

    The user context makes JAX trace cached functions afresh (the token is new each time); the
    traced number itself cannot be in a cache key, so it is looked up here.
    """

    def __init__(self) -> None:
        self.values: dict[object, Any] = {}


_scales = _Scales()


@contextlib.contextmanager
def scaled(c: Any) -> Iterator[None]:
    """Multiplies the log density of every site and factor inside by `c`.

    Draws are unaffected. `c` may be traced (a temperature, a minibatch correction); nested scales
    multiply.

    Args:
        c: A non-negative scalar.

    Example:
        >>> with ab.scaled(len(data) / batch_size):
        ...     ab.sample("y", dist.Normal(mu, 1), obs=batch)
    """
    if jnp.ndim(c) != 0:
        raise InvalidModel(
            f"ab.scaled takes a scalar, got shape {jnp.shape(c)} ({user_location()}). For a weight "
            f"per element, vmap over the elements and call ab.scaled inside."
        )
    if _jax.is_concrete(c) and not float(c) >= 0:
        raise InvalidModel(f"ab.scaled takes a non-negative number, got {c} ({user_location()}).")
    token = object()
    _scales.values[token] = c
    try:
        with _jax.token_context((*_jax.token_context.value, token)):
            yield
    finally:
        del _scales.values[token]


def _with_scale(site: Site, operands: list[Any]) -> tuple[Site, list[Any]]:
    tokens = _jax.token_context.value
    if not tokens:
        return site, operands
    scale = as_float(1.0)
    for token in tokens:
        scale = scale * _scales.values[token]
    return site.with_operand(operands, "scale", scale, mapped=False)


def sample(
    name: str,
    d: Any,
    obs: Any = None,
    *,
    dims: str | Sequence[str | None] | None = None,
    grad: Any = None,
) -> Any:
    """A random choice, or an observation.

    Args:
        name: The address, unique among the sites that can be active together; scopes prefix it.
        d: A NumPyro distribution, or a pytree of them (one site per leaf, addressed
            `"name/path/to/leaf"`; the tree of values is returned).
        obs: Conditions in place. Broadcasts against the distribution's batch shape, as in NumPyro;
            `ab.masked(values, observed=mask)` observes part of it. For data that changes between
            calls, `given=` of the operations is the alternative.
        dims: Names of the element's own dimensions (batch, then event).
        grad: A gradient strategy, used by objectives.

    Returns:
        The value, shape `d.batch_shape + d.event_shape` (under `vmap`, of one element).

    Raises:
        InvalidModel: `d` is not a distribution, or has invalid parameters.
        InvalidValue: `obs` has the wrong shape or dtype.
        MissingData: `obs` holds NaN.
    """
    address = absolute(name)
    if isinstance(d, Distribution):
        return _sample_one(address, d, obs, dims, grad)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(
        d, is_leaf=lambda x: isinstance(x, Distribution)
    )
    if not leaves or not all(isinstance(leaf, Distribution) for _, leaf in leaves):
        odd = next((leaf for _, leaf in leaves if not isinstance(leaf, Distribution)), d)
        raise InvalidModel(
            f"ab.sample({address!r}, ...) at {user_location()} takes a numpyro distribution or a "
            f"pytree of them, got {type(odd).__name__}. Write "
            f'ab.sample("{name}", dist.Normal(0, 1)).'
        )
    observed = [None] * len(leaves) if obs is None else treedef.flatten_up_to(obs)
    values = [
        _sample_one(f"{address}/{path_text(path)}", leaf, o, None, grad)
        for (path, leaf), o in zip(leaves, observed, strict=True)
    ]
    return jax.tree.unflatten(treedef, values)


def _sample_one(address: str, d: Any, obs: Any, dims: Any, grad: Any) -> Any:
    where = user_location()
    check_parameters(address, d, where)
    mask = None
    if obs is not None:
        if isinstance(obs, Masked):
            obs, mask = obs.values, obs.observed
        obs = as_data(obs)
        d = _expand_to(address, d, jnp.shape(obs), where)
    spec, leaves = take_apart(d)
    shape = tuple(d.batch_shape) + tuple(d.event_shape)
    site = Site(
        kind="sample",
        address=address,
        shape=shape,
        dtype=_value_dtype(d, spec, leaves, address, where),
        event_dim=len(d.event_shape),
        roles=("leaf",) * len(leaves),
        spec=spec,
        dims=dim_names(address, dims, len(shape), where),
        where=where,
        grad=grad,
    )
    operands: list[Any] = list(leaves)
    if obs is not None:
        value = coerce(obs, site.dtype, address, what=f"obs of site {address!r} ({where})")
        check_finite(value, address, mask, f"obs of site {address!r} ({where})")
        check_support(spec, value, mask, f"obs of site {address!r} ({where})")
        value = jnp.broadcast_to(value, shape)
        site, operands = site.with_operand(operands, "obs", value, mapped=True)
        if mask is not None:
            mask = checked_mask(site, mask, where)
            site, operands = site.with_operand(operands, "mask", mask, mapped=True)
    baseline = getattr(grad, "operand", None)
    if baseline is not None:  # of a score-function gradient; a number of the program
        site = site.replace(grad=grad.without_operand())
        baseline = jnp.broadcast_to(as_float(baseline), site.batch_shape)
        site, operands = site.with_operand(operands, "baseline", baseline, mapped=False)
    site, operands = _with_scale(site, operands)
    return bind(site, operands)


def _expand_to(address: str, d: Any, obs_shape: tuple[int, ...], where: str) -> Any:
    event_dim = len(d.event_shape)
    head = obs_shape[: len(obs_shape) - event_dim]
    tail = obs_shape[len(obs_shape) - event_dim :]
    try:
        if tail != tuple(d.event_shape):
            raise ValueError
        batch = np.broadcast_shapes(head, tuple(d.batch_shape))
    except ValueError:
        raise InvalidValue(
            f"obs of site {address!r} ({where}) has shape {obs_shape}, but the distribution has "
            f"batch shape {tuple(d.batch_shape)} and event shape {tuple(d.event_shape)}."
        ) from None
    return d if batch == tuple(d.batch_shape) else d.expand(batch)


@functools.lru_cache(maxsize=4096)
def _cached_dtype(spec_key: Any, avals: tuple[Any, ...], x64: bool) -> Any:
    treedef, static = spec_key
    from abduce.ppl.site import DistSpec

    spec = DistSpec(treedef, static, "")
    return _draw_dtype(spec, [jax.ShapeDtypeStruct(s, t) for s, t in avals])


def _draw_dtype(spec: Any, leaves: Sequence[Any]) -> Any:
    def draw(key, *leaves):
        return spec.build(leaves).sample(key)

    return jax.eval_shape(draw, jax.eval_shape(lambda: jax.random.key(0)), *leaves).dtype


def _value_dtype(d: Any, spec: Any, leaves: Sequence[Any], address: str, where: str) -> Any:
    if hasattr(d, "value_dtype"):
        return d.value_dtype
    if type(d).__name__ == "ImproperUniform":  # it cannot draw
        return jnp.result_type(float)
    x64 = bool(jax.config.jax_enable_x64)
    try:
        try:
            return _cached_dtype((spec.treedef, spec.static), spec.avals, x64)
        except TypeError:  # unhashable static part
            return _draw_dtype(spec, leaves)
    except (NotImplementedError, ImportError):  # no sampler here: the support tells
        discrete = bool(getattr(d.support, "is_discrete", False))
        return jnp.result_type(int) if discrete else jnp.result_type(float)


def factor(name: str, logw: Any) -> None:
    """Adds `logw` to the log density.

    Args:
        name: The address.
        logw: Log weight in nats; an array is summed.
    """
    address, where = absolute(name), user_location()
    logw = as_float(logw)
    site = Site("factor", address, logw.shape, logw.dtype, roles=("leaf",), where=where)
    site, operands = _with_scale(site, [logw])
    bind(site, operands)


def deterministic(name: str, value: Any, *, dims: Any = None) -> Any:
    """Records a value: it appears in `trace.deterministics` and `post[name]`.

    It is not a choice: `given` refuses it, `ab.do` replaces it.

    Args:
        name: The address.
        value: An array, or a pytree (one record per leaf).
        dims: Names of its own dimensions.

    Returns:
        The value.
    """
    address, where = absolute(name), user_location()
    leaves, treedef = jax.tree_util.tree_flatten_with_path(value)
    out = []
    for path, leaf in leaves:
        leaf = jnp.asarray(leaf)
        here = f"{address}/{path_text(path)}" if path else address
        names = dim_names(here, dims, leaf.ndim, where)
        site = Site(
            "deterministic", here, leaf.shape, leaf.dtype, roles=("leaf",), dims=names, where=where
        )
        out.append(bind(site, [leaf]))
    return jax.tree.unflatten(treedef, out)


def while_loop(
    cond: Callable[[Any], Any],
    body: Callable[[Any], Any],
    init: Any,
    max_steps: int,
    name: str | None = None,
) -> Any:
    """A loop that may contain sites, bounded by `max_steps`.

    It runs as a `lax.scan` of `max_steps` steps whose body is conditional: sites have a leading
    axis of length `max_steps`, and `trace.active` tells the steps that ran. A density exists only
    for runs that end in time, so a run whose condition still holds after `max_steps` steps has
    log density `-inf` (a factor, at `name`, says so in `trace.scores`).

    Args:
        cond: From the state to a boolean scalar; without sites.
        body: From the state to the next state.
        init: The first state, a pytree of arrays.
        max_steps: Bound on the number of steps; static.
        name: Address of the factor; by default `"while_loop(x)"`, with `x` the first site in it.

    Returns:
        The state when the condition first fails.
    """
    if isinstance(max_steps, bool) or not isinstance(max_steps, (int, np.integer)):
        raise InvalidModel(
            f"ab.while_loop: max_steps must be a Python int (a static bound), got {max_steps!r}."
        )
    init = jax.tree.map(jnp.asarray, init)

    def step(state, _):
        go = cond(state)
        return jax.lax.cond(go, body, lambda s: s, state), None

    final, _ = jax.lax.scan(step, init, None, length=int(max_steps))
    if name is None:
        staged = jax.make_jaxpr(body)(init)
        inside = first_site(staged).address.rsplit("/", 1)[-1] if has_sites(staged) else ""
        name = f"while_loop({inside})"
    factor(name, jnp.where(cond(final), -jnp.inf, 0.0))
    return final
