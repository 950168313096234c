"""`ab.mh`: Metropolis-Hastings with models as proposals."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InitializationError, InvalidAlgorithm, InvalidValue
from abduce.inference.algorithm import Algorithm, algorithm, check_count
from abduce.inference.mcmc.sweeps import ENOUGH, is_traced, run_sweeps, unmixed
from abduce.inference.posterior import Posterior, make_posterior
from abduce.inference.problem import Problem, lost_sites
from abduce.inference.proposals import as_proposal
from abduce.ppl.masked import Masked
from abduce.ppl.model import Model, proposal_density
from abduce.ppl.transforms import condition

__all__ = ["mh"]

_CHUNK = 250  # iterations per compiled call: bounds device memory, and lets an interrupt through
_REMEDY = (
    "Run longer (num_warmup, num_samples), start nearer to the posterior (init=), propose better "
    "moves (proposal=), or use ab.nuts for continuous latents."
)
_TRIES = 64  # prior draws per chain among which a starting point is sought, per attempt


@algorithm
class mh(Algorithm):
    """Metropolis-Hastings; any model over any subset of the latents is a proposal.

    One iteration applies each proposal once. A proposal is called as `q(given, *args)`, where
    `given` holds the observed values and the current state, and proposes values for the addresses
    it samples; the move is accepted with the ratio of Metropolis et al. (1953) and Hastings (1970),
    `p(new) q(old | new) / (p(old) q(new | old))`. Discrete and continuous latents are alike.

    Latents that no proposal covers are drawn afresh from their prior given the rest, each in turn
    (single-site Metropolis-Hastings). So are those in a branch that a proposal opens without
    covering them. What is proposed for a branch that is not taken is dropped, and so is its
    density; nothing else in the proposal may depend on it.

    Args:
        proposal: A Model, or a tuple of Models applied in turn. None: every latent is drawn from
            its prior.
        num_warmup: Iterations that are dropped.
        num_samples: Iterations that are kept, before thinning.
        num_chains: Chains.
        thinning: Keep each n-th draw.
        init: Starting points: a choice map (a chain axis allowed), a Model, a Posterior, or
            `ab.init.prior()`. None: prior draws with a finite density.
        progress_bar: Show progress when a run takes more than about two seconds.

    Diagnostics: `acceptance_rate` per iteration, `lp`, and `num_nan`, the proposals rejected
    because a density was NaN.

    Example:
        >>> @ab.model
        ... def walk(given, *args):
        ...     ab.sample("mu", dist.Normal(given["mu"], 0.5))
        >>> post = ab.mh(proposal=walk)(model).posterior(key, given={"y": y})
    """

    proposal: Any = None
    num_warmup: int = 1000
    num_samples: int = 1000
    num_chains: int = 4
    thinning: int = 1
    init: Any = None
    progress_bar: bool = True

    def __post_init__(self):
        check_count("mh", "num_warmup", self.num_warmup, 0)
        for field in ("num_samples", "num_chains", "thinning"):
            check_count("mh", field, getattr(self, field))
        if self.thinning > self.num_samples:
            raise InvalidAlgorithm(
                f"ab.mh: thinning={self.thinning} keeps no draw of num_samples={self.num_samples}."
            )

    def run(self, problem: Problem, key: Any) -> Posterior:
        problem.require_latents("ab.mh")
        proposals = as_proposals(self.proposal, problem.model)
        given = {
            a: g.value if g.mask is None else Masked(g.value, g.mask)
            for a, g in problem.given.items()
        }
        observed = {a: v for a, v in given.items() if not isinstance(v, Masked)}
        model = condition(problem.model, given) if given else problem.model
        _, arguments = model._stage(problem.args, problem.kwargs)
        setup = (arguments, proposals, observed)
        key_init, key_run = jax.random.split(key)
        state = _start(self, problem, setup, key_init)

        def advance(state, key, count, thinning, warming):
            return _advance(_CHUNK, count, thinning, setup, state, key)

        state, (draws, active, stats), _, messages = run_sweeps(
            "mh", advance, state, key_run, num_warmup=self.num_warmup,
            num_samples=self.num_samples, thinning=self.thinning, chunk=_CHUNK,
            progress_bar=self.progress_bar,
        )  # fmt: skip
        traced = is_traced(draws)
        order = [a for a in problem.program.sites if a in draws]
        if not traced:
            messages += _messages(stats) + unmixed("mh", draws, _REMEDY)
        stats["num_nan"] = stats["num_nan"].sum()
        return make_posterior(
            problem, {a: draws[a] for a in order}, algorithm="mh", diagnostics=stats,
            messages=messages, active=active,
        )  # fmt: skip


def _messages(stats: dict[str, Any]) -> list[str]:
    rates = np.asarray(stats["acceptance_rate"])
    rate = rates.mean(1)
    messages = []
    stuck = np.flatnonzero((rate < 0.005) & (rates.shape[1] >= ENOUGH))
    if len(stuck):
        messages.append(
            f"ab.mh: chains {stuck.tolist()} accepted {rate[stuck].max():.1%} of the proposals and "
            f"are stuck. Propose smaller moves or fewer sites at once, or use ab.nuts for "
            f"continuous latents."
        )
    nans = int(np.asarray(stats["num_nan"]).sum())
    if nans:
        messages.append(
            f"ab.mh: {nans} proposals were rejected because a density was NaN. Look for invalid "
            f"operations in the model."
        )
    return messages


def as_proposals(proposal: Any, model: Any = None) -> tuple[Model, ...]:
    """One proposal or several as Models."""
    proposals = () if proposal is None else proposal
    proposals = proposals if isinstance(proposals, (tuple, list)) else (proposals,)
    return tuple(as_proposal(q, model, "mh") for q in proposals)


def _start(alg: mh, problem: Problem, setup: Any, key: Any) -> Any:
    n = alg.num_chains
    init = alg.init
    if isinstance(init, dict):
        trace, _ = _generate_at(n, setup, _chain_values(init, problem, n), key)
        values = np.zeros(1) if is_traced(trace) else np.asarray(trace._log_density)
        if not np.isfinite(values).all():
            raise InitializationError(
                f"ab.mh: init= has log density {values[~np.isfinite(values)][0]} in chain "
                f"{int(np.argmin(np.isfinite(values)))}. Start inside the support."
            )
        return trace
    for attempt in range(20):
        k = jax.random.fold_in(key, attempt)
        if init is None or type(init).__name__ == "Prior":
            trace, ok = _generate_prior(n, setup, k)
        else:
            draws = _init_draws(init, problem, n, k)
            trace, ok = _generate_at(n, setup, draws, k)
        if is_traced(ok) or bool(np.all(ok)):
            return trace
    raise InitializationError(
        f"ab.mh: no starting point with a finite log density among {20 * _TRIES} prior draws per "
        f"chain: {problem.culprit(jax.vmap(lost_sites)(trace))} chains. Correct the data if they "
        f"are wrong; if they are only far from what the prior expects, pass init= a choice map "
        f"with plausible values."
    )


def _init_draws(init: Any, problem: Problem, n: int, key: Any) -> dict[str, Any]:
    if isinstance(init, Posterior):
        return {a: x for a, x in init.sample(key, n).items() if a in problem.latents}
    if isinstance(init, Model):
        given = {a: g.value for a, g in problem.given.items() if g.mask is None}
        traces = [
            init.simulate(k, given, *problem.args, **problem.kwargs).choices
            for k in jax.random.split(key, n)
        ]
        return jax.tree.map(lambda *xs: jnp.stack(xs), *traces)
    raise InvalidAlgorithm(
        f"ab.mh: init= takes a choice map, a Model, a Posterior or ab.init.prior(), got {init!r}."
    )


def _chain_values(init: dict[str, Any], problem: Problem, n: int) -> dict[str, Any]:
    from abduce.ppl.operations import unknown_address

    out = {}
    for address, value in init.items():
        info = problem.latents.get(address)
        if info is None:
            raise unknown_address(address, problem.program, "init")
        value = jnp.asarray(value)
        if value.shape == info.shape:
            value = jnp.broadcast_to(value, (n, *info.shape))
        if value.shape != (n, *info.shape):
            raise InvalidValue(
                f'init["{address}"] has shape {value.shape}, expected {info.shape}, or '
                f"{(n, *info.shape)} with a value per chain."
            )
        out[address] = value
    return out


@functools.partial(jax.jit, static_argnums=0)
def _generate_at(n, setup, values, key):
    model, args, kwargs = setup[0].unpack()

    def one(key, values):
        return model.generate(key, values, *args, **kwargs)[0]

    trace = jax.vmap(one)(jax.random.split(key, n), values)
    return trace, jnp.isfinite(trace._log_density)


@functools.partial(jax.jit, static_argnums=0)
def _generate_prior(n, setup, key):
    model, args, kwargs = setup[0].unpack()

    def chain(key):
        draw = lambda k: model.generate(k, {}, *args, **kwargs)[0]  # noqa: E731
        traces = jax.vmap(draw)(jax.random.split(key, _TRIES))
        ok = jnp.isfinite(traces._log_density)
        return jax.tree.map(lambda x: x[jnp.argmax(ok)], traces), ok.any()

    return jax.vmap(chain)(jax.random.split(key, n))


@functools.partial(jax.jit, static_argnums=0)
def _advance(size, count, thinning, setup, state, key):
    arguments, proposals, observed = setup
    model, args, kwargs = arguments.unpack()
    partial = {a for a, s in model.program(*args, **kwargs).sites.items() if s.partial}

    def select(ok, new, old):
        return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)

    def accept(key, new, old, log_ratio):
        nan = jnp.isnan(log_ratio)
        log_ratio = jnp.where(nan, -jnp.inf, log_ratio)
        ok = jnp.log(jax.random.uniform(key)) < log_ratio
        return select(ok, new, old), ok, nan

    def propose(q, key, trace):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        moved = q.simulate(k1, {**observed, **trace.choices}, *args, **kwargs)
        if both := sorted(partial & set(moved.choices)):
            raise InvalidAlgorithm(
                f"ab.mh: the proposal covers {both}, which are partly observed. Leave them to "
                f"their prior (proposal=None), or make the hidden entries a site of their own."
            )
        new, log_weight, _ = trace.update(moved.choices, key=k2)
        back = {a: trace.choices[a] for a in moved.choices}
        reverse, _ = q.generate(k4, back, {**observed, **new.choices}, *args, **kwargs)
        forwards, backwards = proposal_density(moved, new), proposal_density(reverse, trace)
        possible = gives_all(moved, new) & gives_all(reverse, trace)
        for a in set(trace.active) & set(trace.choices) - set(moved.choices):
            # The way back draws from the prior what vanishes here.
            score = trace.scores[a]
            backwards += jnp.sum(jnp.where(spread(~new.active[a], score), score, 0.0))
        log_ratio = log_weight + backwards - forwards
        return accept(k3, new, trace, jnp.where(possible, log_ratio, -jnp.inf))

    def covered(trace):
        state = {**observed, **trace.choices}
        return {a for q in proposals for a in q.program(state, *args, **kwargs).latents}

    def refresh(address, key, trace):
        k1, k2 = jax.random.split(key)
        new, log_weight = trace.regenerate(k1, address)
        return accept(k2, new, trace, log_weight)

    def iterate(trace, key):
        moves = [functools.partial(propose, q) for q in proposals]
        moves += [functools.partial(refresh, a) for a in trace.choices if a not in covered(trace)]
        oks, nans = [], []
        for move, k in zip(moves, jax.random.split(key, len(moves)), strict=True):
            trace, ok, nan = move(k, trace)
            oks.append(ok)
            nans.append(nan)
        rate = jnp.mean(jnp.stack(oks).astype(jnp.float32))
        return trace, rate, jnp.stack(nans).sum(dtype=jnp.int32)

    def chain(trace, key):
        def step(trace, i):
            def inner(j, carry):
                trace, rate, nans = carry
                k = jax.random.fold_in(jax.random.fold_in(key, i), j)
                trace, ok, nan = iterate(trace, k)
                return trace, rate + ok / thinning, nans + nan

            n = jnp.where(i < count, thinning, 0)
            trace, rate, nans = jax.lax.fori_loop(
                0, n, inner, (trace, jnp.float32(0), jnp.int32(0))
            )
            values = {**trace.choices, **trace.deterministics}
            active = {a: x for a, x in trace.active.items() if a in values}
            stats = {"acceptance_rate": rate, "lp": trace._log_density, "num_nan": nans}
            return trace, (values, active, stats)

        return jax.lax.scan(step, trace, jnp.arange(size))

    keys = jax.random.split(key, jax.tree.leaves(state)[0].shape[0])
    return jax.vmap(chain)(state, keys)


def gives_all(proposed: Any, trace: Any) -> Any:
    """Whether a proposal with branches gave a value wherever the model counts one of its sites."""
    possible = jnp.asarray(True)
    for address in set(proposed.active) & set(proposed.choices):
        score = proposed.scores[address]
        lacking = spread(~proposed.active[address], score)
        if address in trace.active:
            lacking &= spread(trace.active[address], score)
        possible &= ~jnp.any(lacking)
    return possible


def spread(on: Any, score: Any) -> Any:
    """A flag per mapped element, for every element of a batch."""
    return on.reshape(on.shape + (1,) * (score.ndim - on.ndim))
