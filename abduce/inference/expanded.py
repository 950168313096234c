"""Marginals inside objectives: the importance sampler becomes part of the program.

`ab.marginal(m, keep, via=ab.importance(num_samples=K, proposal=r))` of a guide `m(z, u)` has the
density estimate

    q(z) ~ 1/K sum_k  m(z, u_k) / r(u_k | z),     u_1 from m given z, the others from r

whose logarithm is, on average, at least `log q(z)`; so that the bound on the evidence stays one
(Ranganath, Tran, Blei, "Hierarchical variational models", 2016, for K = 1; Sobolev and Vetrov,
"Importance weighted hierarchical variational inference", 2019). Its draws are choices of the
objective, with gradient strategies like any other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from abduce.errors import InvalidAlgorithm
from abduce.inference.importance import importance
from abduce.ppl.inside import propose, propose_scored
from abduce.ppl.language import scope
from abduce.ppl.selection import matching

__all__ = ["log_density_inside", "propose_inside"]

_SCOPE = "abduce_marginal"


def _sampler(m: Any) -> importance:
    if not isinstance(m.via, importance):
        raise InvalidAlgorithm(
            f"inside an objective, ab.marginal works via=ab.importance(...), got {m.via!r}: its "
            f"random numbers have to have derivatives."
        )
    return m.via


def propose_inside(m: Any, args: Any, kwargs: Any, params: Any, grad: Any) -> tuple[Any, Any]:
    """A draw of what is kept, and the estimate of its log density."""
    via = _sampler(m)
    choices, _, scores = propose_scored(m.base, args, kwargs, params=params, grad=grad)
    keep = matching(m.keep, choices)
    kept = {a: x for a, x in choices.items() if a in keep}
    hidden = {a: x for a, x in choices.items() if a not in keep}
    joint = sum(scores.values(), start=jnp.zeros(()))
    if via.proposal is None:
        own = sum((scores[a] for a in kept), start=jnp.zeros(()))
    else:
        own = joint - via.proposal.log_density(hidden, kept, *args, **kwargs)
    others = _weights(m, via, kept, args, kwargs, params, grad, via.num_samples - 1)
    weights = jnp.concatenate([own[None], others])
    return kept, jax.nn.logsumexp(weights) - jnp.log(via.num_samples)


def log_density_inside(m: Any, choices: dict[str, Any], args: Any, kwargs: Any) -> Any:
    """An estimate of the log density of what is kept, of which no draw is known."""
    via = _sampler(m)
    kwargs = {k: v for k, v in kwargs.items() if k != "key"}
    params = kwargs.pop("params", None)
    weights = _weights(m, via, choices, args, kwargs, params, None, via.num_samples)
    return jax.nn.logsumexp(weights) - jnp.log(via.num_samples)


def _weights(m, via, kept, args, kwargs, params, grad, n):
    """Log weights of fresh draws of what is summed out."""
    if n == 0:
        return jnp.zeros((0,))

    def one(_):
        with scope(_SCOPE):
            if via.proposal is None:
                hidden, _, scores = propose_scored(m.base, args, kwargs, params=params, grad=grad)
                hidden = {a: x for a, x in hidden.items() if a not in kept}
                log_q = sum((scores[a] for a in hidden), start=jnp.zeros(()))
            else:
                hidden, log_q = propose(via.proposal, kept, *args, grad=grad, **kwargs)
        return m.base.log_density({**hidden, **kept}, *args, params=params, **kwargs) - log_q

    return jax.vmap(one)(jnp.arange(n))
