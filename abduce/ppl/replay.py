"""Drawing and scoring: the handler behind `simulate`, `log_density`, `generate` and `update`.

Each site gets its value from one place: an observation in the program, a supplied value (under a
mask: in part), an unconstrained coordinate, or a fresh draw. Everything else is bookkeeping:

    log_density = sum of all log densities (scaled, zero where guarded off)
    weight      = the part that belongs to supplied values and observations

With everything supplied, `weight == log_density`; with nothing supplied and nothing observed it is
0. That is the importance weight of the prior as a proposal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro.distributions import constraints

from abduce.errors import InvalidModel, MissingData, MissingKey, NoDensity
from abduce.ppl.checks import is_whole_space
from abduce.ppl.densities import log_prob
from abduce.ppl.interpreter import broadcast_operand, element_keys
from abduce.ppl.site import Site, elementwise
from abduce.ppl.support import bijection

__all__ = ["Given", "Replay", "Sums", "log_density_of"]


class Given(eqx.Module):
    """What is supplied for one site, in physical layout.

    Attributes:
        value: The value, or unconstrained coordinates.
        mask: Where the value counts as supplied (site batch shape); None for everywhere.
        hidden: Unconstrained coordinates of the entries that the mask hides, or None.
        reference: Subtracted from the scores, element by element, before they are summed: a sum of
            small differences keeps the digits that a large sum loses in float32.
        centering: Degree of centring of each number of a location-scale site; see
            `abduce.inference.centering`.
        unconstrained: `value` holds coordinates (then mask is None).
        trusted: Known to lie in the support, so that no check is compiled.
        shared: Not sliced by scans (parameters).
    """

    value: Any = None
    mask: Any = None
    hidden: Any = None
    reference: Any = None
    centering: Any = None
    unconstrained: bool = eqx.field(default=False, static=True)
    trusted: bool = eqx.field(default=False, static=True)
    shared: bool = eqx.field(default=False, static=True)


class Sums(eqx.Module):
    """The accumulator: log density and importance weight, in nats; `None` is not tracked."""

    log_density: Any = None
    weight: Any = None

    @classmethod
    def zero(cls, *, log_density: bool = True, weight: bool = False) -> Sums:
        zero = jnp.zeros((), jnp.result_type(float))
        return cls(zero if log_density else None, zero if weight else None)

    def add(self, total: Any, supplied: Any) -> Sums:
        def plus(a, x):
            return None if a is None or x is None else a + x.astype(a.dtype)

        return Sums(
            self.log_density if total is None else plus(self.log_density, total),
            self.weight if supplied is None else plus(self.weight, supplied),
        )


@dataclasses.dataclass(frozen=True)
class Replay:
    """Draws what is not supplied, scores everything.

    Attributes:
        record: What to record per site, among 'value', 'score', 'unconstrained', 'missing',
            'location', 'log_scale' (of sites with a degree of centring). 'missing' (scalar bool)
            says that an active entry had no value though none may be drawn.
        score: Whether densities are wanted at all (a draw from the prior needs none).
        soft_missing: With no key, conditional sites without a value are recorded as missing
            where they are active, instead of being an error.
        predictive: Observations in the program are ignored: those sites are drawn anew.
        only_estimates: The key is for estimated densities; nothing may be drawn with it.
    """

    record: frozenset[str] = frozenset({"value"})
    score: bool = True
    soft_missing: bool = False
    predictive: bool = False
    only_estimates: bool = False

    def site(self, site: Site, operands: Sequence[Any], given: Given | None, key: Any, acc: Sums):
        if site.kind == "factor":
            return self._factor(site, operands, acc)
        if site.kind == "param":
            value = jnp.asarray(operands[0] if given is None else given.value, site.dtype)
            return [value], acc, {"value": value} if "value" in self.record else None
        if site.kind == "auxiliary":
            return [self._auxiliary(site, operands, key)], acc, None
        if site.kind == "deterministic":
            value = broadcast_operand(site, operands[0], 0)
            record = {"value": value} if "value" in self.record else {}
            return [value], acc, self._guard_record(site, operands, record)
        return self._sample(site, operands, given, key, acc)

    def _guard_record(self, site, operands, record):
        if not record:
            return None
        if "guard" in site.roles:
            i = site.roles.index("guard")
            record["active"] = broadcast_operand(site, operands[i], i)
        return record

    def _auxiliary(self, site, operands, key):
        if key is None or self.only_estimates:  # then everything it serves is supplied
            return jnp.zeros(site.full_shape, site.dtype)
        keys = element_keys(site, key)
        return elementwise(site, lambda ops, k: site.build(ops).sample(k), operands, keys)

    def _factor(self, site, operands, acc):
        score = elementwise(site, lambda ops: log_density_of(site, ops, None), operands)
        total = jnp.sum(score)
        record = {"score": score} if "score" in self.record else {}
        return [], acc.add(total, total), self._guard_record(site, operands, record)

    def _sample(self, site, operands, given, key, acc):
        has_obs, has_obs_mask = "obs" in site.roles, "mask" in site.roles
        scored = self.score and site.spec.family != "Simulator"  # which has no density
        if self.predictive:
            has_obs = has_obs_mask = False
        wholly_given = given is not None and given.value is not None and given.mask is None
        needs_draw = not (wholly_given or (has_obs and not has_obs_mask))
        if needs_draw and given is not None and given.hidden is not None:
            needs_draw = False
        missing = None
        if needs_draw and (key is None or self.only_estimates):
            if not (self.soft_missing and (site.branches or given is not None)):
                raise _missing(site, given)
            missing = True
        keys = element_keys(site, key) if needs_draw and missing is None else None
        estimate_keys = None
        if scored and is_estimated(site):
            if key is None:
                raise estimate_needs_key(site)
            estimate_keys = element_keys(site, jax.random.fold_in(key, 1))
        value = given.value if given is not None else None
        mask = given.mask if given is not None else None
        hidden = given.hidden if given is not None else None
        centering = given.centering if given is not None else None

        def element(ops, k, estimate_key, value, mask, hidden, centering):
            d = site.build(ops)
            guard = site.operand(ops, "guard")
            bij: Any = None
            jac = None
            if hidden is not None or (value is not None and given.unconstrained):
                bij = bijection(d, site, centering)

            def constrain(u):
                x = bij(u)
                return x, bij.log_abs_det_jacobian(u, x)

            out: dict[str, Any] = {}
            supplied: Any  # where the value is supplied: True, False or a mask
            if has_obs and not has_obs_mask:
                x, supplied, trusted = site.operand(ops, "obs"), True, False
                x = jnp.broadcast_to(x, site.shape)
            else:
                if k is not None:
                    x, supplied, trusted = _draw(d, k, site), False, True
                elif hidden is not None:
                    x, jac = constrain(hidden)
                    supplied, trusted = False, True
                elif value is None or mask is not None:
                    x, supplied, trusted = _stand_in(d, site), False, True
                if value is not None:
                    if given.unconstrained:  # coordinates of a latent: no evidence
                        x, jac = constrain(value)
                        supplied, trusted = False, True
                    elif mask is None:
                        x, supplied, trusted = value.astype(site.dtype), True, given.trusted
                    else:
                        x, supplied, trusted = _select(mask, value, x), mask, given.trusted
                if has_obs_mask:
                    m = site.operand(ops, "mask")
                    x = _select(m, site.operand(ops, "obs"), x)
                    supplied = m if supplied is False else (supplied | m)
                    trusted = False
                    out["mask"] = m
            if guard is not None and jnp.issubdtype(site.dtype, jnp.inexact):
                # A dead branch's value must not send NaN gradients back.
                x = jnp.where(guard, x, jax.lax.stop_gradient(x))
            out["value"] = x
            if scored:
                if estimate_key is None:
                    score, inside = score_element(d, x, site, ops, trusted)
                else:
                    score, inside = d.estimate(estimate_key, x, k is not None), None
                    score = _modified(site, ops, score)
                if inside is not None:
                    out["inside"] = inside
                if jac is not None:
                    jac = _sum_to(jac, len(site.batch_shape))
                    covered = supplied if not (supplied is True or supplied is False) else None
                    if covered is not None and hidden is not None:
                        jac = jnp.where(covered, 0.0, jac)
                    out["jacobian"] = _modified(site, ops, jac, scale=False)
                out["score"] = score
                if supplied is True or supplied is False:
                    out["supplied"] = score if supplied else None
                else:
                    out["supplied"] = jnp.where(supplied, score, 0.0)
            if missing is not None:
                lack = jnp.asarray(True) if mask is None else jnp.any(~mask)
                out["missing"] = lack if guard is None else lack & guard
            if "unconstrained" in self.record:
                b = bijection(d, site, centering)
                out["unconstrained"] = b._inverse(x)
            if centering is not None and "location" in self.record:
                b = bijection(d, site, centering)
                out["location"], out["log_scale"] = b.loc, b.log_scale
            return out

        out = elementwise(
            site, element, operands, keys, estimate_keys, value, mask, hidden, centering
        )
        if scored:
            score = out["score"]
            if given is not None and given.reference is not None:
                score = score - given.reference
            total = jnp.sum(score)
            if "jacobian" in out:
                total = total + jnp.sum(out["jacobian"])
            supplied = None if out["supplied"] is None else jnp.sum(out["supplied"])
            if "inside" in out:
                # One flag for all elements: a select on each would slow the gradient by half.
                everywhere = jnp.all(out["inside"])
                total = jnp.where(everywhere, total, -jnp.inf)
                supplied = None if supplied is None else jnp.where(everywhere, supplied, -jnp.inf)
                out["score"] = jnp.where(out["inside"], out["score"], -jnp.inf)
            acc = acc.add(total, supplied)
        record = {name: out[name] for name in sorted(self.record) if name in out}
        return [out["value"]], acc, self._guard_record(site, operands, record)


def _select(mask, a, b):
    mask = mask.reshape(mask.shape + (1,) * (jnp.ndim(b) - jnp.ndim(mask)))
    return jnp.where(mask, jnp.asarray(a).astype(b.dtype), b)


def _draw(d, key, site):
    try:
        return jnp.asarray(d.sample(key)).astype(site.dtype)
    except (NotImplementedError, ImportError) as e:
        raise NoDensity(
            f"site {site.address!r} ({site.where}): {site.spec.family} cannot be drawn from (it "
            f"is improper or has no sampler{f': {e}' if str(e) else ''}). Give it a value: "
            f'given={{"{site.address}": ...}}, or use a method that only needs the density, such '
            f"as ab.nuts."
        ) from None


def _stand_in(d, site):
    """A value inside the support, for shapes only or for entries that do not count."""
    if jnp.issubdtype(site.dtype, jnp.inexact):
        try:
            b = bijection(d, site)
            return b(jnp.zeros(b.inverse_shape(site.shape), site.dtype))
        except InvalidModel:  # no bijection is known: any value will do
            pass
    return jnp.zeros(site.shape, site.dtype)


def _modified(site, ops, logp, *, scale=True):
    """Applies the scale and the guard of a site to a log density."""
    c = site.operand(ops, "scale")
    if scale and c is not None:
        logp = logp * c
    guard = site.operand(ops, "guard")
    return logp if guard is None else jnp.where(guard, logp, 0.0)


def score_element(d, x, site, ops, trusted):
    """Log density of an element, scaled and guarded, and whether it is in the support.

    The second is None where that needs no check.
    """
    score = _modified(site, ops, jnp.broadcast_to(log_prob(d, x), site.batch_shape))
    inside = None if trusted else _in_support(d, x, site)
    guard = site.operand(ops, "guard")
    if inside is not None and guard is not None:
        inside = inside | ~guard
    return score, inside


def _in_support(d, x, site):
    """Whether each element is in the support; None where it always is."""
    try:
        support = d.support
    except NotImplementedError:
        return None
    if support is None or is_whole_space(support):
        return None
    if constraints.is_dependent(support):
        return None
    inside = jnp.asarray(support(x))
    while inside.ndim > len(site.batch_shape):
        inside = inside.all(-1)
    return inside


def is_estimated(site: Site) -> bool:
    """Whether a site's density is estimated, which takes a random key."""
    return site.spec is not None and site.spec.family == "Estimated"


def estimate_needs_key(site: Site) -> MissingKey:
    """The error for a density that is estimated, where there is no key."""
    return MissingKey(
        f"the density of site {site.address!r} ({site.where}) is estimated, which takes a random "
        f"key: m.log_density(choices, ..., key=key). Of the algorithms, ab.mh, ab.importance and "
        f"ab.smc (as a particle filter) run on estimated densities; gradient methods do not."
    )


def log_density_of(site: Site, ops: Sequence[Any], x: Any) -> Any:
    """Log density of one element, scaled and guarded; of a factor if `x` is None."""
    if is_estimated(site):
        raise estimate_needs_key(site)
    if site.kind == "factor":
        return _modified(site, ops, jnp.asarray(ops[0]))
    score, inside = score_element(site.build(ops), x, site, ops, "obs" not in site.roles)
    return score if inside is None else jnp.where(inside, score, -jnp.inf)


def _sum_to(x, ndim):
    x = jnp.asarray(x)
    return jnp.sum(x, axis=tuple(range(ndim, x.ndim))) if x.ndim > ndim else x


def _missing(site: Site, given: Given | None) -> Exception:
    if given is not None:
        return MissingData(
            f"site {site.address!r} is given only in part (ab.masked), and its hidden entries need "
            f"values. Give them, or use an operation that draws: m.generate(key, given, ...)."
        )
    return MissingKey(
        f"site {site.address!r} ({site.where}) has no value, and no key to draw one was passed. "
        f"Pass key=jax.random.key(0), or supply a value for {site.address!r}."
    )
