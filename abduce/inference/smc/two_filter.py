"""Smoothing by a backward information filter, from whose particles paths are drawn forwards.

What the observations after step t say of the carry there,

    psi_t(c) = p(y_{t+1:T} | carry_t = c) = int p(x, y_{t+1} | c) psi_{t+1}(carry(x)) dx,

is no density of x_t, so that artificial densities gamma_t are put in to sample from (Briers, Doucet
and Maskell 2010, "Smoothing algorithms for state-space models", section 3): here normal ones in
unconstrained coordinates, fitted to the forward filter's particles of the step and widened. With
x_t^k from gamma_t,

    psi_t(c) = mean over k of p(x_{t+1}^k, y_{t+1} | c) psi_{t+1}^k / gamma_{t+1}(x_{t+1}^k)

in N^2 work and without bias; and paths are drawn from the first step to the last by

    p(x_t^k | path so far) ~ p(x_t^k, y_t | carry of the path) psi_t^k / gamma_t(x_t^k).

The forward filter gives the evidence and the artificial densities alone: unlike in backward
simulation, paths are not made of its particles, which may be few where later observations point.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import biject_to

from abduce.errors import DiscreteLatent, InvalidModel
from abduce.inference.smc.cloud import BACKWARD, STEP, Particles
from abduce.inference.smc.population import Population, take
from abduce.inference.smc.smoothing import require_markov
from abduce.ppl import _jax
from abduce.ppl.checks import is_whole_space
from abduce.ppl.interpreter import walk
from abduce.ppl.replay import Given
from abduce.ppl.site import Site, has_sites, site_p

__all__ = ["simulate_forwards"]

_CALL = "ab.smc(smoothing='two_filter')"
_WIDER = 1.5  # standard deviations of the artificial densities over those of the filter


def _latents(jaxpr: Any, inputs: Any, found: dict[str, Site]) -> dict[str, Site]:
    """The latents of a step.

    Raises:
        DiscreteLatent: One has no density to fit a normal to.
        InvalidModel: One is in a branch or a scan, or observed in part; or a density is estimated.
    """
    for eqn in _jax.inner_jaxpr(jaxpr)[0].eqns:
        if eqn.primitive is not site_p:
            for sub in _jax.subjaxprs(eqn):
                if has_sites(sub):
                    if _jax.call_jaxpr(eqn) is None or eqn.primitive is _jax.scan_p:
                        raise InvalidModel(
                            f"{_CALL}: sites inside a `{eqn.primitive.name}` of the step cannot be "
                            f"drawn backwards. Use smoothing='ffbs'."
                        )
                    _latents(sub, inputs, found)
            continue
        site = eqn.params["site"]
        given = inputs.get(site.address)
        if site.kind == "auxiliary" or (site.spec is not None and site.spec.family == "Estimated"):
            raise InvalidModel(
                f"{_CALL} compares densities of a step, but that of site {site.address!r} is "
                f"estimated. Use smoothing='genealogy'."
            )
        seen = "obs" in site.roles and "mask" not in site.roles
        if site.kind != "sample" or seen or (given is not None and given.mask is None):
            continue
        if given is not None or "mask" in site.roles or "guard" in site.roles:
            what = "in a branch" if "guard" in site.roles else "observed in part"
            raise InvalidModel(
                f"{_CALL}: site {site.address!r} ({site.where}) is {what}. Use smoothing='ffbs'."
            )
        if not jnp.issubdtype(site.dtype, jnp.floating):
            raise DiscreteLatent(
                f"{_CALL} samples latents from fitted normals, but {site.address!r} "
                f"({site.where}) is {site.spec.family}. Use smoothing='ffbs'."
            )
        if site.spec.support is None:
            raise InvalidModel(
                f"{_CALL}: the support of site {site.address!r} ({site.where}) depends on other "
                f"values, so that its particles have no common coordinates. Use smoothing='ffbs'."
            )
        found[site.address] = site
    return found


class _Artificial:
    """The artificial densities, by step."""

    def __init__(self, sites: dict[str, Site], n: int):
        self.sites, self.n = sites, n
        self.maps = {
            a: None if is_whole_space(s.spec.support) else biject_to(s.spec.support)
            for a, s in sites.items()
        }

    def _coordinates(self, values: dict[str, Any]) -> Any:
        us = []
        for a, b in self.maps.items():
            u = values[a] if b is None else b._inverse(values[a])
            us.append(u.reshape((self.n, -1)).astype(jnp.result_type(float)))
        return jnp.concatenate(us, 1)

    def draw(self, key: Any, values: dict[str, Any], log_weights: Any) -> tuple[Any, Any]:
        """Particles of one step, and their log densities `(N,)`.

        Args:
            key: Random key.
            values: Of the filter's particles, `(N, ...)`.
            log_weights: Theirs.
        """
        u, w = self._coordinates(values), jax.nn.softmax(log_weights)
        k = u.shape[1]
        mean = w @ u
        cov = (w * (u - mean).T) @ (u - mean)
        scale = jnp.sqrt(jnp.maximum(jnp.diag(cov), 1e-12 * (1 + mean**2)))
        unit = cov / (scale[:, None] * scale) * (1 - 1e-3) + 1e-3 * jnp.eye(k)  # few particles
        unit = unit + jnp.diag(1 - jnp.diag(unit))
        lower = _WIDER * scale[:, None] * jnp.linalg.cholesky(unit)
        z = jax.random.normal(key, (self.n, k), u.dtype)
        new = mean + z @ lower.T
        log_density = -0.5 * jnp.sum(z * z, 1) - 0.5 * k * math.log(2 * math.pi)
        log_density = log_density - jnp.sum(jnp.log(jnp.diag(lower)))
        out, start = {}, 0
        for a, b in self.maps.items():
            shape = values[a].shape if b is None else jax.eval_shape(b._inverse, values[a]).shape
            size = math.prod(shape[1:])
            v = new[:, start : start + size].reshape(shape)
            start += size
            if b is not None:
                x = b(v)
                jacobian = b.log_abs_det_jacobian(v, x).reshape((self.n, -1))
                log_density, v = log_density - jnp.sum(jacobian, 1), x
            out[a] = v.astype(values[a].dtype)
        return out, log_density


def simulate_forwards(frame: Any, state: Any, ys: Any, traced: Any, x: Any, inner_state: Any):
    """Replaces the values of each step by those of N paths.

    Args:
        frame: The scan.
        state: Of the level that holds it; becomes equally weighted.
        ys: Per-step outputs: 'backward' holds the carry and the log weights at the end of a step,
            without the look-ahead.
        traced: Trees of per-step values of the filter's particles.
        x: The scan's per-step inputs.
        inner_state: Makes the state for walking a step.

    Returns:
        As `traced`, along the paths; which particle each path begins with, before the scan; and
        the carry at its end.
    """
    from abduce.inference.smc.scan import score_step

    require_markov(frame.body, len(frame.consts), frame.nk, _CALL, frame.carry_flags)
    if any(frame.xs_flags) or any(frame.const_flags):
        raise InvalidModel(
            f"{_CALL}: the steps of the scan depend on a latent drawn before it other than through "
            f"the carry (a static parameter). Condition on it (given=), or use ab.particle_gibbs."
        )
    n, first_carry = frame.n, frame.start[0]
    sites = _latents(frame.body, state.inputs, {})
    artificial = _Artificial(sites, n)
    k_draw, k_root, k_paths = jax.random.split(
        jax.random.fold_in(state.keys[STEP], BACKWARD), 3
    )
    order = (lambda a: a[::-1]) if frame.reverse else (lambda a: a)
    steps = jax.tree.map(order, (x["xs"], x["inputs"]))  # from here on in the order of the model
    ends, log_weights = jax.tree.map(order, ys["backward"])
    begins = [
        jnp.concatenate([jnp.asarray(c, e.dtype)[None], e[:-1]])
        for c, e in zip(first_carry, ends, strict=True)
    ]
    drawn = {a: order(traced["records"][a]["value"]) for a in sites}
    particles, log_gamma = jax.vmap(artificial.draw)(
        jax.random.split(k_draw, frame.length), drawn, log_weights
    )

    def run(carry, values, xs, inputs):
        """A step with these latents: the new carry, and what it leaves."""
        known = {a: Given(Particles(v), trusted=True, shared=True) for a, v in values.items()}
        inner = inner_state({}, {**inputs, **known}, {}, Population.start(n))
        outs = walk(frame.walker, frame.body, frame.wrapped(frame.consts, carry, xs), inner)
        pairs = [inner.resolve(o) for o in outs]
        wide = lambda a, m: a if m else jnp.broadcast_to(a, (n, *jnp.shape(a)))  # noqa: E731
        new = [
            jnp.asarray(wide(a, m) if flag else a, c.dtype)
            for (a, m), flag, c in zip(pairs, frame.carry_flags, carry, strict=False)
        ]
        left = {
            "ys": [
                None if old is None else wide(*pair)
                for old, pair in zip(traced["ys"], pairs[frame.nk :], strict=True)
            ],
            "records": {
                a: {
                    k: None if old is None else wide(*inner.resolve(inner.records[a][k]))
                    for k, old in r.items()
                }
                for a, r in traced["records"].items()
            },
        }
        return new, left

    def terms(carry, values, offsets, xs, inputs):
        """log p(x^k, y | carry^i) + offset^k, shape (k, i)."""

        def one(held, offset):
            return offset + score_step(
                frame, frame.consts, carry, xs, inputs, held, inner_state
            )

        return jax.lax.map(
            lambda a: one(*a), (values, offsets), batch_size=min(n, max(1, 1_000_000 // n))
        )

    def information(carry, values, offsets, xs, inputs):
        return jax.nn.logsumexp(terms(carry, values, offsets, xs, inputs), axis=0) - math.log(n)

    stands = jax.lax.map(lambda a: run(*a)[0], (begins, particles, *steps))
    stands = [s if m else e for s, e, m in zip(stands, ends, frame.carry_flags, strict=True)]

    def back(psi, step):
        carry, values, log_gamma, xs, inputs = step
        return (new := information(carry, values, psi - log_gamma, xs, inputs)), new

    later = jax.tree.map(lambda a: a[1:], (particles, log_gamma, *steps))
    last = jnp.zeros((n,), log_gamma.dtype)
    _, psi = jax.lax.scan(back, last, ([s[:-1] for s in stands], *later), reverse=True)
    psi = jnp.concatenate([psi, last[None]])

    zeroth = jax.tree.map(lambda a: a[0], (particles, psi - log_gamma, *steps))
    prior = frame.start[1].log_weights - frame.start[2]
    root = jax.random.categorical(k_root, prior + information(first_carry, *zeroth), shape=(n,))
    root = root.astype(jnp.int32)
    carry = [take(c, root) if m else c for c, m in zip(first_carry, frame.carry_flags, strict=True)]

    def forth(carry, step):
        values, offsets, xs, inputs, key = step
        chosen = jax.random.categorical(key, terms(carry, values, offsets, xs, inputs), axis=0)
        return run(carry, take(values, chosen), xs, inputs)

    keys = jax.random.split(k_paths, frame.length)
    carry, out = jax.lax.scan(forth, carry, (particles, psi - log_gamma, *steps, keys))
    population: Population = state.population
    state.population = Population(
        jnp.zeros_like(population.log_weights), population.total,
        jnp.zeros_like(population.log_mean), jnp.full_like(population.ess, n),
    )  # fmt: skip
    return jax.tree.map(order, out), root, carry
