"""Group-equivariant standardization: what is known of a model by symmetry need not be learned.

If `p(g z | g x) = p(z | x)` (up to the Jacobian) for a group of transformations `g`, then the
posterior for a transformed prior and transformed data is the transformed posterior. So an
estimator may bring prior and data into a standard position, infer there, and transform back; it is
then exactly equivariant, and what it has learned at one scale holds at all.

Dax et al., "Group equivariant neural posterior estimation" (2022), have the idea; where the group
element can be computed from prior and data, as here, no iteration is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to
from numpyro.distributions.transforms import ExpTransform

from abduce.amortized.dt_coordinates import Coordinates
from abduce.amortized.mixtures import GaussianMixture
from abduce.errors import InvalidAlgorithm, UnknownAddress, suggest
from abduce.ppl.operations import outside_scopes, run_program
from abduce.ppl.program import Arguments, Program
from abduce.ppl.replay import Given, Replay

__all__ = ["ScaleEquivariance", "check_equivariance"]

_FAINT = 1e-8  # weight of the prior's scale where data are exactly zero


@dataclasses.dataclass(frozen=True)
class ScaleEquivariance:
    """A change of units: the value of site `a` becomes `s ** powers[a]` times itself.

    The scale `s` of an example is a weighted mean, on the log scale, of what the data and the prior
    say: `n` observations weigh `2 n`, the precision with which they tell a scale; a positive latent
    weighs its prior precision.

    Args:
        observed: Powers by address of the observed sites; others do not change.
        latents: Powers by address of latents, positive or real.

    An estimator checks the symmetry against the model's density, and refuses a wrong one.

    Example:
        >>> ScaleEquivariance(observed={"z": 1.0}, latents={"variance": 2.0})
    """

    observed: tuple[tuple[str, float], ...]
    latents: tuple[tuple[str, float], ...]

    def __init__(self, observed: Mapping[str, float], latents: Mapping[str, float]):
        for name, powers in (("observed", observed), ("latents", latents)):
            items = dict(powers).items()
            object.__setattr__(self, name, tuple(sorted((a, float(p)) for a, p in items)))
        if not self.observed:
            raise InvalidAlgorithm(
                "ab.amortized.ScaleEquivariance: observed= names the sites that change with the "
                "scale, such "
                'as observed={"z": 1.0}; it is empty.'
            )

    @property
    def powers(self) -> dict[str, float]:
        """By address, of all sites named."""
        return {**dict(self.observed), **dict(self.latents)}

    def log_scale(
        self,
        prior: GaussianMixture,
        coordinates: Coordinates,
        observed: Mapping[str, Any],
        seen: Mapping[str, Any],
    ) -> Any:
        """The group element `log s`; it shifts by `log t` if prior and data scale by `t`.

        Args:
            prior: Over coordinates.
            coordinates: Of the prior's addresses.
            observed: Values by address.
            seen: By address, boolean masks of the same shapes.
        """
        dtype = jnp.result_type(float)
        total, weight = jnp.zeros((), dtype), jnp.zeros((), dtype)
        mean = prior.mean
        variance = jnp.diagonal(prior.covariance)
        faint = -jnp.inf
        for p in coordinates.parts:
            power = dict(self.latents).get(p.address, 0.0)
            if not power:
                continue
            m, v = mean[p.start : p.stop], variance[p.start : p.stop]
            if _is_positive(p):
                mine, precision = m / power, power**2 / v
            else:
                mine, precision = 0.5 * jnp.log(m**2 + v) / power, jnp.ones_like(v)
            total, weight = total + jnp.sum(mine * precision), weight + jnp.sum(precision)
            faint = jnp.logaddexp(faint, 2 * jnp.mean(mine))
        for a, power in self.observed:
            on, x = seen[a], jnp.asarray(observed[a], dtype)
            n = jnp.sum(on)
            tiny = jnp.finfo(dtype).tiny
            log_square = jnp.log(jnp.maximum(jnp.abs(x), tiny)) * (2 / power)
            top = jax.nn.logsumexp(jnp.where(on, log_square, -jnp.inf)) - jnp.log(jnp.maximum(n, 1))
            top = jnp.logaddexp(top, faint + jnp.log(_FAINT))
            total = total + jnp.where(n > 0, n * jnp.where(n > 0, top, 0.0), 0.0)
            weight = weight + 2 * n
        return total / jnp.maximum(weight, jnp.finfo(dtype).tiny)

    def on_mixture(self, g: Any, mixture: GaussianMixture, coordinates: Coordinates) -> Any:
        """The mixture after the change by `g`; `-g` undoes it."""
        return mixture.scaled(*self.on_coordinates(g, coordinates, mixture.means.dtype))

    def on_coordinates(self, g: Any, coordinates: Coordinates, dtype: Any) -> tuple[Any, Any]:
        """Factor and offset, shape `(dim,)` each, that the change applies to coordinates."""
        factors, offsets = [], []
        for p in coordinates.parts:
            shift = jnp.full(p.stop - p.start, dict(self.latents).get(p.address, 0.0), dtype) * g
            still = jnp.zeros_like(shift)
            factors.append(jnp.exp(still if _is_positive(p) else shift))
            offsets.append(shift if _is_positive(p) else still)
        return jnp.concatenate(factors), jnp.concatenate(offsets)

    def on_observed(self, g: Any, observed: Mapping[str, Any]) -> dict[str, Any]:
        """The data after the change by `g`."""
        powers = dict(self.observed)
        return {a: x * jnp.exp(powers[a] * g) if a in powers else x for a, x in observed.items()}


def _is_positive(part: Any) -> bool:
    """Whether coordinates are logarithms."""
    inner = part.support.constraint
    while hasattr(inner, "base_constraint"):
        inner = inner.base_constraint
    return isinstance(biject_to(inner), ExpTransform)


def check_equivariance(
    equivariance: ScaleEquivariance,
    program: Program,
    arguments: Arguments,
    prior: tuple[str, ...],
    key: Any,
) -> None:
    """Compares the density of everything but the prior before and after a change of scale.

    Raises:
        UnknownAddress: A site is not there.
        InvalidAlgorithm: The densities differ, or there is none.
    """
    sites = program.sites
    for a in equivariance.powers:
        if a not in sites:
            raise UnknownAddress(
                f"equivariance: {a!r} matches no site of `{program.name}` ({', '.join(sites)})."
                f"{suggest(a, sites)}"
            )
    lacking = [a for a, s in sites.items() if s.kind == "sample" and not s.has_density]
    if lacking:
        raise InvalidAlgorithm(
            f"equivariance: site {lacking[0]!r} is a dist.Simulator, without a density that the "
            f"symmetry could be checked against. Leave equivariance= out."
        )
    record = frozenset({"value", "score"})

    def rest(key, values):
        given = {} if values is None else {a: Given(x, trusted=True) for a, x in values.items()}
        with outside_scopes():
            records = run_program(Replay(record=record), program, arguments, key, given)["records"]
        free = [a for a, s in sites.items() if s.kind == "sample" and a not in prior]
        score = sum(jnp.sum(records[a]["score"]) for a in free)
        return score, {a: records[a]["value"] for a, s in sites.items() if s.kind == "sample"}

    powers = equivariance.powers
    gaps = []
    for i, log_s in enumerate((0.5, -0.7, 0.9, 0.3)):
        before, values = rest(jax.random.fold_in(key, i), None)
        moved = {a: x * np.exp(powers.get(a, 0.0) * log_s) for a, x in values.items()}
        after, _ = rest(None, moved)
        volume = sum(powers.get(a, 0.0) * x.size for a, x in values.items() if a not in prior)
        gaps.append(float(after - before + volume * log_s))
    scale = 1 + abs(float(before))
    if not np.max(np.abs(gaps)) <= 1e-3 * scale:
        raise InvalidAlgorithm(
            f"equivariance: `{program.name}` does not have this symmetry: its log density of all "
            f"but {', '.join(prior)} changes by {max(gaps, key=abs):.3g} nats beyond the Jacobian "
            f"when sites are scaled by {dict(powers)}. Correct the powers (a variance scales with "
            f"twice the power of the data), or leave equivariance= out."
        )
