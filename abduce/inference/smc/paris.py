"""Smoothed sums over the steps, online: PaRIS.

The smoothed expectation of an additive function of the path, `sum_t h_t(x_{t-1}, x_t)`, follows
forwards in time: each particle carries an estimate tau of the expectation given where it stands,

    tau_t^i = mean over j of [ tau_{t-1}^j + h_t(x_{t-1}^j, x_t^i) ],
    j ~ B_t(i, j), proportional to w_{t-1}^j p(x_t^i, y_t | x_{t-1}^j),

and the estimate is the weighted mean of tau (Olsson and Westerborn 2017, "Efficient particle-based
online smoothing in general hidden Markov models: the PaRIS algorithm", eq. 10). Two indices are
enough to keep the variance from growing as that of the genealogy does. The first is the particle's
own ancestor, the second one Metropolis-Hastings step from it that leaves B_t invariant: N work a
step, without a bound on the densities (Dau and Chopin 2023, "On backward smoothing algorithms",
section 3.3). Since the kernel is invariant, the estimate times that of Z is unbiased.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from abduce.errors import InvalidModel, InvalidValue
from abduce.inference.smc.cloud import Particles
from abduce.inference.smc.population import take
from abduce.inference.smc.proposals import observations
from abduce.inference.smc.smoothing import require_markov
from abduce.kernels.resampling import SCHEMES

__all__ = ["advance", "require_smoothable", "start"]


def require_smoothable(frame: Any) -> None:
    """The backward kernel must be known from the carry.

    Raises:
        InvalidModel: A density is estimated, a step depends on a latent before it otherwise than
            through the carry, or the carry on its past otherwise than through the step's latents.
    """
    call = "ab.smc(smoothing='paris')"
    if frame.estimated:
        raise InvalidModel(
            f"{call} compares densities of a step, but that of site "
            f"{sorted(frame.estimated)[0]!r} is estimated. Use smoothing='genealogy'."
        )
    require_markov(frame.body, len(frame.consts), frame.nk, call, frame.carry_flags)
    if any(frame.xs_flags) or any(frame.const_flags):
        raise InvalidModel(
            f"{call}: the steps of the scan depend on a latent drawn before it other than through "
            f"the carry (a static parameter). Condition on it (given=)."
        )


def _value(frame: Any, name: str, h: Any, consts: Any, before: Any, after: Any, x: Any) -> Any:
    """`h(given, carry, x, new_carry)` of every particle, shape `(N, ...)`."""
    xs, inputs = x
    carry, at = frame.trees(consts, before, xs)
    values = (observations(inputs, None), carry, at, frame.trees(consts, after, xs)[0])
    is_particles = lambda v: isinstance(v, Particles)  # noqa: E731
    leaves, treedef = jax.tree.flatten(values, is_leaf=is_particles)
    axes = [0 if is_particles(v) else None for v in leaves]
    arrays = [v.array if is_particles(v) else v for v in leaves]

    def one(*leaves):
        out = h(*jax.tree.unflatten(treedef, leaves))
        if not isinstance(out, (jax.Array, float, int)) and not hasattr(out, "__array__"):
            raise InvalidValue(
                f"ab.smc(functionals=): {name!r} must return an array, got {type(out).__name__}. "
                f"Give each array a name of its own."
            )
        return jnp.asarray(out, jnp.result_type(float))

    if not any(a == 0 for a in axes):
        out = one(*arrays)
        return jnp.broadcast_to(out, (frame.n, *out.shape))
    return jax.vmap(one, in_axes=axes, axis_size=frame.n)(*arrays)


def start(frame: Any, functionals: Any, x: Any) -> dict[str, Any]:
    """Sums before the first step: zeros.

    Args:
        frame: The scan.
        functionals: Pairs `(name, function)`.
        x: Inputs and observations of one step.
    """
    return {
        name: jnp.zeros(s.shape, s.dtype)
        for name, h in functionals
        for s in [
            jax.eval_shape(
                lambda c, x, name=name, h=h: _value(frame, name, h, frame.consts, c, c, x),
                frame.carry, x,
            )
        ]
    }  # fmt: skip


def advance(
    frame: Any,
    functionals: Any,
    key: Any,
    before: Any,
    after: Any,
    ancestors: Any,
    x: Any,
    log_density: Any,
) -> dict[str, Any]:
    """The sums after a step.

    Args:
        frame: The scan.
        functionals: Pairs `(name, function)`.
        key: Random key.
        before: The carry, the filter's log weights `(N,)` and the sums before the step.
        after: The carry after the step.
        ancestors: Which particle before the step each one comes from, `(N,)`.
        x: Inputs and observations of the step.
        log_density: Of the step's latents and observations, for a carry of each particle; `(N,)`.
    """  # fmt: skip
    carry, log_weights, sums = before
    n, flags = frame.n, frame.carry_flags

    def pick(index):
        return [take(c, index) if m else c for c, m in zip(carry, flags, strict=True)]

    k_draw, k_mix, k_accept = jax.random.split(key, 3)
    # Independent draws, which the scheme sorts.
    drawn = jax.random.permutation(k_mix, SCHEMES["multinomial"](k_draw, log_weights, None))
    log_ratio = log_density(pick(drawn)) - log_density(pick(ancestors))
    accept = jnp.log(jax.random.uniform(k_accept, (n,), log_ratio.dtype)) < log_ratio
    moved = jnp.where(accept, drawn, ancestors)
    out = {}
    for name, h in functionals:
        terms = [
            take(sums[name], j) + _value(frame, name, h, frame.consts, pick(j), after, x)
            for j in (ancestors, moved)
        ]
        out[name] = 0.5 * (terms[0] + terms[1])
    return out
