"""The prior of a model as a mixture of normals in unconstrained coordinates.

A prior that is such a mixture already is taken as it stands (one with few components is split into
more). Any other is fitted: in one dimension on a grid of its density, in more on draws.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import Distribution

from abduce.amortized.dt_coordinates import Coordinates, MixtureLaw
from abduce.amortized.mixture_fits import fit_density, fit_draws
from abduce.amortized.mixtures import GaussianMixture, split
from abduce.errors import InvalidValue
from abduce.ppl.checks import is_whole_space
from abduce.ppl.graph import graph_of
from abduce.ppl.interpreter import State, broadcast_operand, walk
from abduce.ppl.operations import outside_scopes, run_program
from abduce.ppl.program import Arguments, Program
from abduce.ppl.replay import Replay, Sums

__all__ = ["FittedPrior", "check_supports", "fit_laws", "prior_of", "read_laws"]

_ROUGH = 16  # draws that say where a law is
_FRESH = 2048  # draws that judge a fit
_MOST_COMPONENTS = 64


class FittedPrior(eqx.Module):
    """A prior as a mixture, and how well it fits.

    Attributes:
        mixture: Over coordinates.
        kl: `KL(prior || mixture)` in nats; 0 where the prior is the mixture.
        kl_se: Its standard error; 0 where it comes from quadrature.
    """

    mixture: GaussianMixture
    kl: Any
    kl_se: Any


def fit_laws(
    laws: Mapping[str, Distribution], coordinates: Coordinates, num_components: int, num_draws: int
) -> FittedPrior:
    """The mixture for independent laws of the addresses.

    Args:
        laws: By address; one with fewer dimensions than its site is that of every element.
        coordinates: Of the addresses.
        num_components: Of the mixture; of an exact one, the least.
        num_draws: To fit, in more than one dimension.
    """
    laws = {p.address: _expanded(laws[p.address], p.shape) for p in coordinates.parts}
    exact = _exact(laws, coordinates)
    zero = jnp.zeros((), jnp.result_type(float))
    if exact is not None:
        if exact.num_components < num_components:
            exact = split(exact, num_components)
        return FittedPrior(exact, zero, zero)

    def draw(key, n):
        keys = jax.random.split(key, len(laws))
        values = {a: d.sample(k, (n,)) for k, (a, d) in zip(keys, laws.items(), strict=True)}
        return jax.vmap(lambda v: coordinates.to_vector(v)[0])(values)

    def log_density(u):
        values = coordinates.to_values(u)
        _, log_det = coordinates.to_vector(values)
        return sum(jnp.sum(d.log_prob(values[a])) for a, d in laws.items()) + log_det

    if coordinates.dim == 1:
        rough = draw(jax.random.key(0), _ROUGH)[:, 0]
        rough = jnp.where(jnp.isfinite(rough), rough, 0.0)
        spread = jnp.maximum(jnp.std(rough), 1e-12 * (1 + jnp.abs(jnp.median(rough))))
        mixture, kl = fit_density(
            lambda x: log_density(x[None]), jnp.median(rough), spread, num_components
        )
        return FittedPrior(mixture, kl, zero)
    mixture = fit_draws(draw(jax.random.key(0), num_draws), num_components)
    fresh = draw(jax.random.key(1), _FRESH)
    return FittedPrior(mixture, *_divergence(jax.vmap(log_density)(fresh), mixture, fresh))


def _divergence(log_p: Any, mixture: GaussianMixture, draws: Any) -> tuple[Any, Any]:
    gap = log_p - jax.vmap(mixture.log_prob)(draws)
    return jnp.mean(gap), jnp.std(gap) / math.sqrt(len(draws))


def _expanded(d: Distribution, shape: tuple[int, ...]) -> Distribution:
    batch = shape[: len(shape) - len(d.event_shape)]
    return d if tuple(d.batch_shape) == batch else d.expand(batch)


def _exact(laws: Mapping[str, Distribution], coordinates: Coordinates) -> GaussianMixture | None:
    """The product of the laws, if each is a mixture of normals in its coordinates."""
    product = None
    for p in coordinates.parts:
        mine = _as_mixture(laws[p.address], p)
        if mine is None:
            return None
        product = mine if product is None else _product(product, mine)
        if product.num_components > _MOST_COMPONENTS:
            return None
    return product


def _product(a: GaussianMixture, b: GaussianMixture) -> GaussianMixture:
    """The law of independent `(u, v)`."""
    i, j = jnp.divmod(jnp.arange(a.num_components * b.num_components), b.num_components)
    trils = jnp.zeros((len(i), a.dim + b.dim, a.dim + b.dim), a.trils.dtype)
    trils = trils.at[:, : a.dim, : a.dim].set(a.trils[i])
    trils = trils.at[:, a.dim :, a.dim :].set(b.trils[j])
    means = jnp.concatenate([a.means[i], b.means[j]], -1)
    return GaussianMixture(a.log_weights[i] + b.log_weights[j], means, trils)


def _as_mixture(d: Any, part: Any) -> GaussianMixture | None:
    while isinstance(d, (dist.ExpandedDistribution, dist.Independent)):
        d = d.base_dist
    if isinstance(d, MixtureLaw):
        same = d.event_shape == part.shape and d.support_ == part.support
        return d.mixture if same else None
    size, n = part.stop - part.start, part.shape
    dtype = jnp.result_type(float)

    def diagonal(loc, scale, lead=()):
        loc = jnp.broadcast_to(loc, (*lead, *n)).reshape((-1, size)).astype(dtype)
        scale = jnp.broadcast_to(scale, (*lead, *n)).reshape((-1, size)).astype(dtype)
        return loc, scale[:, :, None] * jnp.eye(size, dtype=dtype)

    one = jnp.zeros(1, dtype)
    if type(d) is dist.LogNormal and type(part.support.constraint) is type(
        dist.constraints.positive
    ):
        return GaussianMixture(one, *diagonal(d.loc, d.scale))
    if not is_whole_space(part.support.constraint):
        return None
    if type(d) is dist.Normal:
        return GaussianMixture(one, *diagonal(d.loc, d.scale))
    if type(d) is dist.MultivariateNormal and d.shape() == n:
        return GaussianMixture(one, d.loc[None].astype(dtype), d.scale_tril[None].astype(dtype))
    if isinstance(d, dist.MixtureSameFamily) and d.shape() == n:
        parts = d.component_distribution
        while isinstance(parts, dist.Independent):
            parts = parts.base_dist
        mixing = d.mixing_distribution
        log_weights = jax.nn.log_softmax(mixing.logits).astype(dtype)
        k = log_weights.shape[-1]
        if type(parts) is dist.Normal:
            return GaussianMixture(log_weights, *diagonal(parts.loc, parts.scale, (k,)))
        if type(parts) is dist.MultivariateNormal and parts.event_shape == n:
            means = jnp.broadcast_to(parts.loc, (k, size)).astype(dtype)
            trils = jnp.broadcast_to(parts.scale_tril, (k, size, size)).astype(dtype)
            return GaussianMixture(log_weights, means, trils)
    return None


# ---------------------------------------------------------------------- from a staged model


@dataclasses.dataclass(frozen=True)
class _Laws(Replay):
    """Records what the distributions of some sites are made of."""

    addresses: frozenset[str] = frozenset()

    def site(self, site, operands, given, key, acc):
        values, acc, record = super().site(site, operands, given, key, acc)
        if site.kind == "sample" and site.address in self.addresses:
            leaves = [i for i, role in enumerate(site.roles) if role == "leaf"]
            parts = {f"leaf {n}": broadcast_operand(site, operands[i], i)
                     for n, i in enumerate(leaves)}  # fmt: skip
            record = {**(record or {}), **parts}
        return values, acc, record


def read_laws(
    program: Program, arguments: Arguments, addresses: Any, key: Any
) -> dict[str, Distribution | None]:
    """The distributions of sites, by address.

    None for a site that has latent parents, is in a scan or a branch, or whose distribution
    differs along a mapped axis.
    """
    graph = graph_of(program)
    found: dict[str, Distribution | None] = dict.fromkeys(addresses)
    free = [
        a
        for a in addresses
        if not any(graph.sites[p].is_latent for p in _ancestors(graph, a))
        and not program.sites[a].conditional
        and not program.sites[a].num_scans
        and program.sites[a].site.coords is None
    ]
    if not free:
        return found
    with outside_scopes():
        replay = _Laws(record=frozenset({"value"}), score=False, addresses=frozenset(free))
        state = State(key, {}, Sums.zero(log_density=False))
        walk(replay, program.jaxpr, program.inputs(arguments), state)
        records = state.records  # in the layout of the program, mapped axes first
    for a in free:
        info = program.sites[a]
        site = info.site
        leaves = [i for i, role in enumerate(site.roles) if role == "leaf"]
        if any(axis.mapped[i] for axis in site.axes for i in leaves):
            continue
        first = (0,) * len(site.axes)
        found[a] = site.spec.build([records[a][f"leaf {n}"][first] for n in range(len(leaves))])
    return found


def _ancestors(graph: Any, address: str) -> set[str]:
    seen: set[str] = set()
    todo = list(graph.parents(address))
    while todo:
        a = todo.pop()
        if a not in seen:
            seen.add(a)
            todo += graph.parents(a)
    return seen


def prior_of(
    program: Program,
    arguments: Arguments,
    coordinates: Coordinates,
    num_components: int,
    num_draws: int,
) -> FittedPrior:
    """The prior of a staged model as a mixture; see `fit_laws`.

    Sites with latent parents are fitted together, from draws of the joint prior.
    """
    addresses = coordinates.addresses
    laws = read_laws(program, arguments, addresses, jax.random.key(0))
    known = {a: d for a, d in laws.items() if d is not None}
    if len(known) == len(addresses):
        return fit_laws(known, coordinates, num_components, num_draws)

    def draws(key, n, record):
        def one(key):
            replay = Replay(record=frozenset({"value", record}), score=record == "score")
            records = run_program(replay, program, arguments, key, {})["records"]
            u, log_det = coordinates.to_vector({a: records[a]["value"] for a in addresses})
            if record == "value":
                return u, log_det
            return u, log_det + sum(jnp.sum(records[a]["score"]) for a in addresses)

        with outside_scopes():
            return jax.vmap(one)(jax.random.split(key, n))

    mixture = fit_draws(draws(jax.random.key(0), num_draws, "value")[0], num_components)
    parents = {p for a in addresses for p in _ancestors(graph_of(program), a)}
    outside = [p for p in parents if program.sites[p].kind == "sample" and p not in addresses]
    if outside:  # the joint density of the addresses alone is not known
        nan = jnp.full((), jnp.nan)
        return FittedPrior(mixture, nan, nan)
    fresh, log_p = draws(jax.random.key(1), _FRESH, "score")
    return FittedPrior(mixture, *_divergence(log_p, mixture, fresh))


def check_supports(program: Program, arguments: Arguments, coordinates: Coordinates) -> None:
    """A prior has to live where the coordinates belong.

    Raises:
        InvalidValue: The support of a site is another one.
    """
    sites = program.sites
    unknown = [a for a in coordinates.addresses if sites[a].site.spec.support is None]
    laws: dict[str, Any] = {}
    if unknown and not any(isinstance(x, jax.core.Tracer) for x in arguments.dynamic):
        laws = read_laws(program, arguments, unknown, jax.random.key(0))
    for p in coordinates.parts:
        support = program.sites[p.address].site.spec.support
        law = laws.get(p.address)
        if support is None and law is not None:
            support = law.support
        if support is None:
            continue
        mine, other = _inner(p.support.constraint), _inner(support)
        if type(mine) is not type(other) or _bounds(mine) != _bounds(other):
            raise InvalidValue(
                f"prior: site {p.address!r} of `{program.name}` now has the support {other}, but "
                f"the estimator was trained with {mine}. Use a prior on that support, or train an "
                f"estimator for this one."
            )


def _inner(constraint: Any) -> Any:
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    return constraint


def _bounds(constraint: Any) -> tuple[Any, ...]:
    bounds = (getattr(constraint, n, None) for n in ("lower_bound", "upper_bound"))
    return tuple(None if x is None else np.asarray(x).tolist() for x in bounds)
