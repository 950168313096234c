"""Fitted guides as Models, for use as proposals, guides and starting points."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from abduce.errors import InvalidModel
from abduce.inference.target import unconstrain_now
from abduce.ppl.language import sample
from abduce.ppl.model import Model
from abduce.ppl.naming import scoped
from abduce.ppl.operations import outside_scopes
from abduce.ppl.replay import Given, Replay
from abduce.ppl.site import Site, bind, take_apart, user_location
from abduce.ppl.transforms import Transformed, emit_again

__all__ = ["FittedFamily", "JointLaw", "WithParams", "emit_joint", "log_jacobian"]


class WithParams(Transformed):
    """A model whose parameters have values."""

    base: Model
    values: dict[str, Any]
    algorithm: Any = None

    def emit(self, *args, **kwargs):
        mine = {scoped(a): x for a, x in self.values.items()}

        def edit(site, operands, given):
            if site.kind == "param" and site.address in mine:
                return site, jnp.asarray(mine[site.address], site.dtype)
            return site, operands

        return emit_again(self.base, args, kwargs, edit, {})


class FittedFamily(Model):
    """A fitted family of `ab.guides`; arguments are ignored."""

    params: Any
    data: Any
    target: Any = eqx.field(static=True)
    family: Any = eqx.field(static=True)
    source: str = eqx.field(static=True)
    algorithm: Any = None

    @property
    def name(self) -> str:
        return f"guide of {self.source}"

    def emit(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        sites = self.target.program(self.data).sites
        addresses = [s.address for s in self.target.slots]
        for slot in self.target.slots:
            if slot.hidden is not None or sites[slot.address].conditional:
                raise InvalidModel(
                    f"the guide is no model of its own: {slot.address!r} is observed in part or in "
                    f"a branch. Use post.as_model(keep=...)."
                )
        shapes = [sites[a].shape for a in addresses]
        law = _FamilyLaw(self.target, self.family)
        return emit_joint(law, (self.params, self.data), addresses, shapes)

    def __repr__(self) -> str:
        return f"<model {self.name}>"


class JointLaw:
    """A law of several sites that is drawn, and scored, as a whole. Hashable.

    Attributes:
        dim: Length of the vector that determines a draw.
    """

    dim: int

    def draw(self, key: Any, operands: Any) -> Any:
        """A vector, shape `(dim,)`."""
        raise NotImplementedError

    def values(self, u: Any, operands: Any) -> list[Any]:
        """The value of each site."""
        raise NotImplementedError

    def log_density(self, values: list[Any], operands: Any) -> Any:
        """Of values of all sites, a scalar in nats."""
        raise NotImplementedError


def emit_joint(
    law: JointLaw, operands: Any, addresses: list[str], shapes: list[tuple[int, ...]]
) -> dict[str, Any]:
    """Emits the sites of a joint law into the program being staged.

    The vector is drawn first, as random numbers that are no choice; every site is a function of
    it. The joint density is exact and stands at the last site, so it needs all sites to be drawn
    together or given together.
    """
    u = _noise(law, operands)
    out: dict[str, Any] = {}
    for i, (address, shape) in enumerate(zip(addresses, shapes, strict=True)):
        last = i == len(addresses) - 1
        out[address] = sample(
            address, _Part(law, u, operands, tuple(out.values()), i, last, shape)
        )
    return out


class _FamilyLaw(JointLaw):
    """A family of `ab.guides`; operands are its parameters and the target's data."""

    def __init__(self, target, family):
        self.key = (target, family)
        self.target, self.family = target, family
        self.dim = target.dim

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return type(other) is type(self) and self.key == other.key

    def draw(self, key, operands):
        e = jax.random.normal(key, (self.family.noise_dim,))
        return self.family.draw(operands[0], e)[0]

    def values(self, u, operands):
        with outside_scopes():
            record = frozenset({"value"})
            records = self.target.run(Replay(record=record, score=False), operands[1], u)["records"]
        return [records[s.address]["value"] for s in self.target.slots]

    def log_density(self, values, operands):
        params, data = operands
        with outside_scopes():
            sites = self.target.program(data).sites
            given = {
                s.address: Given(sites[s.address].to_physical(x), trusted=True)
                for s, x in zip(self.target.slots, values, strict=True)
            }
            u = unconstrain_now(self.target, data, given)
        return self.family.log_density(params, u) - log_jacobian(self.target, data, u)


def log_jacobian(target: Any, data: Any, u: Any) -> Any:
    """Log determinant of the map from coordinates to values, at `u`."""
    with outside_scopes():
        record = frozenset({"jacobian"})
        records = target.run(Replay(record=record), data, u)["records"]
    return sum(jnp.sum(r["jacobian"]) for r in records.values() if "jacobian" in r)


def _noise(law: JointLaw, operands: Any) -> Any:
    spec, leaves = take_apart(_Noise(law, operands))
    site = Site(
        "auxiliary", scoped("abduce_guide"), (law.dim,), jnp.result_type(float),
        event_dim=1, roles=("leaf",) * len(leaves), spec=spec, dims=(None,),
        where=user_location(),
    )  # fmt: skip
    return bind(site, leaves)


class _Noise(dist.Distribution):
    """Draws the vector."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = None

    def __init__(self, law, operands):
        self.law, self.operands = law, operands
        super().__init__((), (law.dim,))

    def sample(self, key, sample_shape=()):
        return self.law.draw(key, self.operands)

    def tree_flatten(self):
        return (self.operands,), self.law

    @classmethod
    def tree_unflatten(cls, aux, children):
        d = cls.__new__(cls)
        d.law, d.operands = aux, children[0]
        dist.Distribution.__init__(d, (), (aux.dim,))
        return d


class _Part(dist.Distribution):
    """One site: a function of the vector."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = None

    def __init__(self, law, u, operands, before, index, last, shape):
        self.law, self.u, self.operands, self.before = law, u, operands, before
        self.index, self.last = index, last
        super().__init__((), tuple(shape))

    def sample(self, key, sample_shape=()):
        return self.law.values(self.u, self.operands)[self.index]

    def log_prob(self, value, intermediates=None):
        if not self.last:
            return jnp.zeros(())
        values = [*self.before, value]
        drawn = self.law.values(self.u, self.operands)
        log_q = self.law.log_density(values, self.operands)
        # Some given and others drawn: the drawn ones do not know of the given ones. Continuous
        # values that are equal were drawn; discrete ones may be equal by chance.
        same = [jnp.all(a == b) for a, b in zip(values, drawn, strict=True)]
        continuous = [
            s for s, v in zip(same, values, strict=True) if jnp.issubdtype(v.dtype, jnp.inexact)
        ]
        if not continuous:
            return log_q
        is_drawn, is_given = jnp.all(jnp.stack(same)), ~jnp.any(jnp.stack(continuous))
        return jnp.where(is_drawn | is_given, log_q, jnp.nan)

    def tree_flatten(self):
        children = (self.u, self.operands, self.before)
        return children, (self.law, self.index, self.last, self.event_shape)

    @classmethod
    def tree_unflatten(cls, aux, children):
        d = cls.__new__(cls)
        d.law, d.index, d.last, shape = aux
        d.u, d.operands, d.before = children
        dist.Distribution.__init__(d, (), shape)
        return d
