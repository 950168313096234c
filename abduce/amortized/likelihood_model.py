"""Models whose sites have learned laws."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro.distributions import Distribution, constraints

from abduce.amortized.likelihood_network import SiteNetwork, SitePlan
from abduce.errors import InvalidModel
from abduce.inference.static import Static
from abduce.ppl.model import Model
from abduce.ppl.naming import scoped
from abduce.ppl.program import relative, stage
from abduce.ppl.site import take_apart
from abduce.ppl.transforms import Transformed, emit_again

__all__ = ["LearnedLikelihood", "LearnedModel", "SiteLaw"]


class SiteLaw(eqx.Module):
    """The trained network of one site.

    Attributes:
        network: Trained.
        scales: Of values and operands.
        plan: The site.
        ratio: Whether the network is a ratio.
    """

    network: SiteNetwork
    scales: Any
    plan: SitePlan = eqx.field(static=True)
    ratio: bool = eqx.field(static=True)


class LearnedLikelihood(Distribution):
    """A law with the operands of another one, and a density from a network.

    A ratio is drawn from the law it replaces, and its density is relative to the marginal law of
    the values, which no latent changes; a learned likelihood is drawn from itself.

    Args:
        base: The law that was learned; its array leaves are what the network is conditioned on.
        law: The network.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, base: Distribution, law: SiteLaw):
        self.base = base
        self.arrays, static = eqx.partition(law, eqx.is_array)
        self.static = Static(static)
        super().__init__(batch_shape=(), event_shape=law.plan.shape)

    @property
    def _law(self) -> SiteLaw:
        return eqx.combine(self.arrays, self.static.value)

    @property
    def _operands(self) -> list[Any]:
        return [x for x in jax.tree.leaves(self.base) if hasattr(x, "dtype")]

    @property
    def support(self) -> Any:
        law: SiteLaw = self.static.value
        if law.ratio:
            return self.base.support
        plan = law.plan
        if plan.kind == "counts":
            inner = constraints.integer if plan.low is None else constraints.nonnegative_integer
        else:
            inner = constraints.positive if plan.kind == "positive" else constraints.real
        return constraints.independent(inner, len(plan.shape)) if plan.shape else inner

    def sample(self, key, sample_shape=()):
        law = self._law
        if law.ratio:
            return self.base.sample(key, sample_shape)

        def one(key):
            return law.network.draw(law.plan, law.scales, key, self._operands)

        if not sample_shape:
            return one(key)
        keys = jax.random.split(key, math.prod(sample_shape))
        return jax.vmap(one)(keys).reshape((*sample_shape, *law.plan.shape))

    def log_prob(self, value, intermediates=None):
        law = self._law
        score = law.network.log_ratio if law.ratio else law.network.log_density

        def one(y):
            return score(law.plan, law.scales, y, self._operands)

        value = jnp.asarray(value)
        lead = value.shape[: value.ndim - len(law.plan.shape)]
        if not lead:
            return one(value)
        return jax.vmap(one)(value.reshape((-1, *law.plan.shape))).reshape(lead)

    def tree_flatten(self):
        return (self.base, self.arrays), self.static

    @classmethod
    def tree_unflatten(cls, aux, children):
        d = cls.__new__(cls)
        d.base, d.arrays = children
        d.static = aux
        Distribution.__init__(d, (), aux.value.plan.shape)
        return d


class LearnedModel(Transformed):
    """A model some of whose sites are scored by networks; everything else is as it was."""

    base: Model
    laws: dict[str, SiteLaw]
    algorithm: Any = None

    def emit(self, *args, **kwargs):
        program = relative(stage(self.base, args, kwargs)[0])
        for address, law in self.laws.items():
            _check(program, address, law.plan)
        laws = {scoped(a): law for a, law in self.laws.items()}

        def edit(site, operands, g):
            law = laws.get(site.address)
            return (site, operands) if law is None else _replace(site, operands, law)

        return emit_again(self.base, args, kwargs, edit, {})


def _check(program: Any, address: str, plan: SitePlan) -> None:
    info = program.sites.get(address)
    if info is None or info.kind != "sample":
        raise InvalidModel(
            f"the likelihood of {address!r} was learned, but `{program.name}` has no such site "
            f"({', '.join(a for a, s in program.sites.items() if s.kind == 'sample')})."
        )
    site = info.site
    shapes = [s for s, _ in site.spec.avals]
    mine = {i: s for i, s, _ in plan.operands}
    same = len(shapes) == plan.num_operands and all(shapes[i] == s for i, s in mine.items())
    if not same or tuple(site.shape) != plan.shape:
        raise InvalidModel(
            f"the likelihood of site {address!r} was learned for elements of shape {plan.shape} "
            f"with {plan.num_operands} operands (shapes {list(mine.values())} vary); in "
            f"`{program.name}` it has elements of shape {tuple(site.shape)} and operands of shapes "
            f"{shapes}. Train on this model."
        )


def _replace(site: Any, operands: list[Any], law: SiteLaw) -> tuple[Any, list[Any]]:
    """The site with the learned law: its own operands keep their axes, the network has none."""
    leaves = [i for i, role in enumerate(site.roles) if role == "leaf"]
    others = [i for i in range(len(operands)) if i not in leaves]
    stand_ins = [jnp.zeros(shape, dtype) for shape, dtype in site.spec.avals]
    spec, arrays = take_apart(LearnedLikelihood(site.spec.build(stand_ins), law))
    arrays = arrays[len(leaves) :]
    extra = (False,) * len(arrays)
    axes = tuple(
        dataclasses.replace(
            a, mapped=(*(a.mapped[i] for i in leaves), *extra, *(a.mapped[i] for i in others))
        )
        for a in site.axes
    )
    roles = ("leaf",) * (len(leaves) + len(arrays)) + tuple(site.roles[i] for i in others)
    site = site.replace(
        spec=spec, event_dim=len(site.shape), axes=axes, roles=roles, coords=None, grad=None
    )
    return site, [*(operands[i] for i in leaves), *arrays, *(operands[i] for i in others)]
