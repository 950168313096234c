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

__all__ = ["FittedFamily", "WithParams"]


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
    """A fitted family of `ab.guides`; arguments are ignored.

    The coordinates are drawn first, as random numbers that are no choice; every latent is a
    function of them. The joint density is exact and stands at the last latent, so it needs all
    latents to be drawn together or given together.
    """

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
        operands = (self.params, self.data)
        law = _Law(self.target, self.family)
        u = _noise(law, operands)
        out: dict[str, Any] = {}
        for i, address in enumerate(addresses):
            d = _Part(law, u, operands, tuple(out.values()), i, sites[address].shape)
            out[address] = sample(address, d)
        return out

    def __repr__(self) -> str:
        return f"<model {self.name}>"


class _Law:
    """The joint law; hashable."""

    def __init__(self, target, family):
        self.key = (target, family)
        self.target, self.family = target, family

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return type(other) is type(self) and self.key == other.key

    def draw(self, key, params):
        e = jax.random.normal(key, (self.family.noise_dim,))
        return self.family.draw(params, e)[0]

    def values(self, u, data):
        with outside_scopes():
            record = frozenset({"value"})
            records = self.target.run(Replay(record=record, score=False), data, u)["records"]
        return [records[s.address]["value"] for s in self.target.slots]

    def log_density(self, values, params, data):
        with outside_scopes():
            sites = self.target.program(data).sites
            given = {
                s.address: Given(sites[s.address].to_physical(x), trusted=True)
                for s, x in zip(self.target.slots, values, strict=True)
            }
            u = unconstrain_now(self.target, data, given)
            record = frozenset({"jacobian"})
            records = self.target.run(Replay(record=record), data, u)["records"]
        jacobian = sum(jnp.sum(r["jacobian"]) for r in records.values() if "jacobian" in r)
        return self.family.log_density(params, u) - jacobian


def _noise(law: _Law, operands: Any) -> Any:
    spec, leaves = take_apart(_Noise(law, operands))
    site = Site(
        "auxiliary", scoped("abduce_guide"), (law.target.dim,), jnp.result_type(float),
        event_dim=1, roles=("leaf",) * len(leaves), spec=spec, dims=(None,),
        where=user_location(),
    )  # fmt: skip
    return bind(site, leaves)


class _Noise(dist.Distribution):
    """Draws the coordinates."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = None

    def __init__(self, law, operands):
        self.law, self.operands = law, operands
        super().__init__((), (law.target.dim,))

    def sample(self, key, sample_shape=()):
        return self.law.draw(key, self.operands[0])

    def tree_flatten(self):
        return (self.operands,), self.law

    @classmethod
    def tree_unflatten(cls, aux, children):
        d = cls.__new__(cls)
        d.law, d.operands = aux, children[0]
        dist.Distribution.__init__(d, (), (aux.target.dim,))
        return d


class _Part(dist.Distribution):
    """One latent: a function of the coordinates."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = None

    def __init__(self, law, u, operands, before, index, shape):
        self.law, self.u, self.operands, self.before = law, u, operands, before
        self.index = index
        super().__init__((), tuple(shape))

    def sample(self, key, sample_shape=()):
        return self.law.values(self.u, self.operands[1])[self.index]

    def log_prob(self, value, intermediates=None):
        if self.index < len(self.law.target.slots) - 1:
            return jnp.zeros(())
        params, data = self.operands
        values = [*self.before, value]
        drawn = self.law.values(self.u, data)
        same = jnp.stack([jnp.all(a == b) for a, b in zip(values, drawn, strict=True)])
        log_q = self.law.log_density(values, params, data)
        # Some given and others drawn: the drawn ones do not know of the given ones.
        return jnp.where(jnp.all(same) | ~jnp.any(same), log_q, jnp.nan)

    def tree_flatten(self):
        children = (self.u, self.operands, self.before)
        return children, (self.law, self.index, self.event_shape)

    @classmethod
    def tree_unflatten(cls, aux, children):
        d = cls.__new__(cls)
        d.law, d.index, shape = aux
        d.u, d.operands, d.before = children
        dist.Distribution.__init__(d, (), shape)
        return d
