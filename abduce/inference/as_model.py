"""Posteriors as models: a kernel density of draws with the algebra of a prior.

Let `v` be the continuous latents of a draw in unconstrained coordinates, each made nearly normal
by a sinh-arcsinh transformation fitted to its draws (Jones and Pewsey 2009), with mean `m` and
covariance `V = L L'` over the draws, and `y = L^-1 (v - m)`. Liu and West, "Combined parameter and
state estimation in simulation-based filtering" (2001), shrink the draws towards the mean and add
what that takes away:

    p(y) = (1 - e) sum_k w_k N(y; a y_k, h^2 I) + e N(y; 0, I),      a^2 + h^2 = 1

so that mean and covariance are those of the draws for every bandwidth `h`: at `h = 1` it is their
normal approximation, near 0 the draws themselves. `h` maximizes the leave-one-out predictive
density of the draws. The last term (`e` = 0.02) keeps tails, and moments too.

Discrete latents carry atoms: component `k` has mass `1 - d` at its draw, entry by entry, and `d`
spread by a law with full support; so has the last term. That law has the frequencies over the
draws, but for a share `d` that is uniform over the support; where the support has no end, uniform
over the range of the draws with geometric tails beyond. `d` is about one over the number of draws.

The joint density factorizes into a chain over addresses: discrete ones first, on whose values the
others are regressed (`v` above includes them, without kernels), then in the order of the model.
Since the kernel has no correlation in `y`, and `L` is triangular, the conditional of an address is
a mixture again, whose weights have been multiplied by the components' densities of the addresses
before.

Limits: the mixture is built from at most some hundreds of draws, so with many dimensions the
bandwidth tends to 1, a normal density of the transformed coordinates; tails beyond the draws are
those of that normal, whatever those of the posterior are.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import biject_to, constraints
from scipy.optimize import minimize

from abduce.errors import InvalidModel, InvalidValue
from abduce.inference import weighting
from abduce.inference.algorithm import check_count
from abduce.inference.kernel_density import AtomMixture, KernelDensity, Support, warped
from abduce.inference.predict import _everything, run_at_draws
from abduce.ppl.language import sample
from abduce.ppl.masked import Masked
from abduce.ppl.model import Model
from abduce.ppl.operations import stage_operation
from abduce.ppl.program import Arguments, Program, SiteInfo
from abduce.ppl.replay import Replay
from abduce.ppl.selection import matching
from abduce.ppl.site import elementwise

__all__ = ["DrawsModel", "as_model"]

_BROAD = 0.02
_MOST_VALUES = 100_000  # of a discrete latent
_MOST_FITTED = 4000  # draws, by which a transformation is chosen
_MOST_WARPED = 200  # coordinates of one address
_BANDWIDTHS = np.concatenate([np.geomspace(0.02, 0.9, 24), [0.95, 0.98, 1.0]])


class Continuous(eqx.Module):
    """What the mixture knows of a continuous address; `before` is from earlier coordinates."""

    centres: Any
    tril: Any
    before: Any
    loc: Any
    warp: Any
    support: Support = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)


class Discrete(eqx.Module):
    """What the mixture knows of a discrete address."""

    atoms: Any
    mixing: Any
    table: Any
    tril: Any
    before: Any
    loc: Any
    low: int = eqx.field(static=True)
    support: Support = eqx.field(static=True)
    tails: tuple[bool, bool] = eqx.field(static=True)


class DrawsModel(Model):
    """The model that `post.as_model()` returns.

    Attributes:
        log_weights, scales: Of the components.
        blocks: By address, in order.
        addresses: Their order.
        bandwidth: `h`, between 0.02 (the draws) and 1 (a normal).
        num_components: Distinct draws used.
    """

    log_weights: Any
    scales: Any
    blocks: tuple[Any, ...]
    addresses: tuple[str, ...] = eqx.field(static=True)
    bandwidth: float = eqx.field(static=True)
    num_components: int = eqx.field(static=True)
    source: str = eqx.field(static=True)
    algorithm: Any = None

    @property
    def name(self) -> str:
        return f"posterior of {self.source}"

    def emit(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Draws the addresses one after the other; arguments are ignored."""
        log_weights, out = self.log_weights, {}
        y = jnp.zeros(0, self.scales.dtype)
        for address, block in zip(self.addresses, self.blocks, strict=True):
            if isinstance(block, Discrete):
                atoms = AtomMixture(
                    log_weights, block.atoms, block.mixing, block.table, block.low,
                    block.support, block.tails,
                )  # fmt: skip
                value = sample(address, atoms)
                log_weights = log_weights + atoms.components(value)
                x = value.reshape(-1).astype(y.dtype) - block.loc - block.before @ y
                new = jax.scipy.linalg.solve_triangular(block.tril, x, lower=True)
            else:
                loc = block.loc + block.before @ y
                d = KernelDensity(
                    log_weights, block.centres, self.scales, block.tril, loc, block.warp,
                    block.support, block.shape,
                )  # fmt: skip
                value = sample(address, d)
                new, _ = d.parts(value)
                log_weights = log_weights + d.components(new)
            y = jnp.concatenate([y, new])
            out[address] = value
        return out

    def __repr__(self) -> str:
        return (
            f"<model {self.name}: {', '.join(self.addresses)}; {self.num_components} components, "
            f"bandwidth {self.bandwidth:.2f}>"
        )


# -------------------------------------------------------------------- fitting


def as_model(post: Any, *, keep: Any, num_components: int) -> DrawsModel:
    """See `Posterior.as_model`."""
    check_count("as_model", "num_components", num_components, 2)
    if post.arguments is None:
        raise InvalidValue(
            "post.as_model: this posterior was loaded from disk, so the supports of its latents "
            "are not known. Call it before saving; or run m.posterior(...) again."
        )
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((post.draws, post.log_weights))):
        raise InvalidValue(
            "post.as_model fits on the host, so it cannot run inside jax.jit or jax.vmap. Return "
            "the posterior and call it outside."
        )
    model, args, kwargs = post.arguments.unpack()
    program, arguments = stage_operation(model, args, kwargs)
    latents = [
        a for a in program.sites
        if a in post.draws and a not in post.deterministic
        and not isinstance(post.given.get(a), Masked)
    ]  # fmt: skip
    if keep is not None:
        chosen = matching(keep, latents)
        latents = [a for a in latents if a in chosen]
    if not latents:
        raise InvalidValue("post.as_model: there are no draws of latents to make a model of.")
    supports = _supports(program, arguments, {a: program.sites[a] for a in latents}, post)
    draws, weights = _components(post, latents, num_components)
    latents.sort(key=lambda a: not program.sites[a].is_discrete)  # discrete ones first
    blocks, scales, log_weights, h = _fit(post, program, latents, supports, draws, weights)
    return DrawsModel(
        log_weights=log_weights, scales=scales, blocks=blocks, addresses=tuple(latents),
        bandwidth=float(h), num_components=len(weights), source=program.name,
    )  # fmt: skip


def _components(post: Any, latents: list[str], most: int) -> tuple[dict[str, np.ndarray], Any]:
    """At most so many distinct draws, with weights."""
    flat = {a: weighting.flat(np.asarray(post.draws[a])) for a in latents}
    weights = post._weights
    n = len(next(iter(flat.values())))
    weights = np.full(n, 1 / n) if weights is None else np.asarray(weights, np.float64)
    if n > most:
        index = np.floor((np.arange(most) + 0.5) * n / most).astype(int)
        if post.log_weights is not None:
            cdf = np.cumsum(weights)
            index = np.searchsorted(cdf, (np.arange(most) + 0.5) / most * cdf[-1])
            index = np.minimum(index, n - 1)
        flat, weights = {a: x[index] for a, x in flat.items()}, np.full(most, 1 / most)
    rows = np.concatenate([x.reshape(len(x), -1).astype(np.float64) for x in flat.values()], 1)
    # Copies of a draw would look like evidence for a narrow kernel.
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    summed = np.bincount(inverse.reshape(-1), weights, len(first))
    used = summed > 0
    return {a: x[first[used]] for a, x in flat.items()}, summed[used] / summed[used].sum()


def _fit(post, program, latents, supports, draws, weights):
    dtype = jnp.result_type(float)
    sites = program.sites
    everything = {a: weighting.flat(np.asarray(post.draws[a])) for a in latents}
    full = {a: _unconstrained(a, sites[a], supports[a], x) for a, x in everything.items()}
    total = post._weights
    size = len(next(iter(full.values())))
    total = np.full(size, 1 / size) if total is None else np.asarray(total, np.float64)
    warps = {a: _warp(x, total) for a, x in full.items() if not sites[a].is_discrete}

    def straight(a: str, x: np.ndarray) -> np.ndarray:
        return warped(x, warps[a], np)[0] if a in warps else x

    columns = [
        straight(a, _unconstrained(a, sites[a], supports[a], draws[a])) for a in latents
    ]  # fmt: skip
    u = np.concatenate(columns, 1)
    mean, tril = _moments(np.concatenate([straight(a, x) for a, x in full.items()], 1), total)
    y = _whitened(u, mean, tril, weights)
    ess = 1 / np.sum(weights**2)
    num_discrete = sum(
        c.shape[1] for a, c in zip(latents, columns, strict=True) if sites[a].is_discrete
    )
    laws = {
        a: _law(a, sites[a], supports[a], draws[a], weights, ess)
        for a in latents if sites[a].is_discrete
    }  # fmt: skip
    matches: Any = sum(_matches(draws[a], law) for a, law in laws.items())
    h = _bandwidth(y[:, num_discrete:], weights, matches)
    centres = np.concatenate([np.sqrt(1 - h**2) * y, np.zeros((1, y.shape[1]))])
    scales = np.append(np.full(len(weights), h), 1.0)
    log_weights = np.log(np.append((1 - _BROAD) * weights, _BROAD))
    blocks: list[Any] = []
    at = 0
    for a, column in zip(latents, columns, strict=True):
        rows = slice(at, at + column.shape[1])
        line = [jnp.asarray(x, dtype) for x in (tril[rows, rows], tril[rows, :at], mean[rows])]
        if a in laws:
            law = laws[a]
            atoms = np.concatenate([draws[a], draws[a][np.argmax(weights)][None]])
            mixing = np.append(np.full(len(weights), law.share), 1 - 1e-6)  # the law alone
            blocks.append(
                Discrete(
                    jnp.asarray(atoms), jnp.asarray(mixing, dtype), jnp.asarray(law.table, dtype),
                    *line, law.low, supports[a], law.tails,
                )
            )
        else:
            kernels = jnp.asarray(centres[:, rows], dtype)
            warp = jnp.asarray(warps[a], dtype)
            blocks.append(Continuous(kernels, *line, warp, supports[a], sites[a].shape))
        at += column.shape[1]
    return tuple(blocks), jnp.asarray(scales, dtype), jnp.asarray(log_weights, dtype), h


def _unconstrained(
    address: str, info: SiteInfo, support: Support, x: np.ndarray
) -> np.ndarray:
    """Coordinates of draws, `(draws, d)`; of discrete ones, the values."""
    if info.is_discrete:
        return x.reshape(len(x), -1).astype(np.float64)
    u = np.asarray(biject_to(support.constraint)._inverse(jnp.asarray(x)), np.float64)
    u = u.reshape(len(x), -1)
    if not np.isfinite(u).all():
        raise InvalidValue(
            f"post.as_model: {int((~np.isfinite(u)).any(1).sum())} of {len(x)} draws of "
            f"{address!r} lie on the edge of its support, or are not finite."
        )
    return u


def _warp(u: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The transformation of each coordinate, `(4, d)`, by maximum likelihood of a normal."""
    step = max(1, len(u) // _MOST_FITTED)
    u, w = u[::step], weights[::step] / weights[::step].sum()
    out = np.empty((4, u.shape[1]))
    for j, x in enumerate(u.T):
        m = w @ x
        s = max(np.sqrt(w @ (x - m) ** 2), 1e-6 * max(abs(m), 1.0), 1e-30)
        out[:, j] = m, s, 0.0, 1.0
        if u.shape[1] > _MOST_WARPED or len(x) < 50:
            continue
        t = (x - m) / s

        def loss(p, t=t):
            v, slope = warped(t, (p[0], np.exp(p[1]), p[2], np.exp(p[3])), np)
            return -w @ (slope - 0.5 * v**2)

        bounds = [(-3, 3), (-2, 2), (-3, 3), (math.log(0.5), math.log(3.0))]
        p = minimize(loss, np.zeros(4), method="L-BFGS-B", bounds=bounds).x
        if loss(p) < loss(np.zeros(4)) - 2 * np.sum(w**2):  # worth its parameters
            out[:, j] = m + s * p[0], s * np.exp(p[1]), p[2], np.exp(p[3])
    return out


def _moments(full: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and Cholesky factor of the covariance, from all draws."""
    d = full.shape[1]
    mean = w @ full
    centred = full - mean
    cov = (w[:, None] * centred).T @ centred
    ess = 1 / np.sum(w**2)
    if ess < 10 * d:  # too few draws for all correlations
        share = d / (d + ess)
        cov = (1 - share) * cov + share * np.diag(np.diag(cov))
    floor = 1e-10 + 1e-8 * np.maximum(np.diag(cov), mean**2 * 1e-4)
    return mean, np.linalg.cholesky(cov + np.diag(floor))


def _whitened(u, mean, tril, weights):
    """Whitened draws, moved so that those kept have mean 0 and covariance 1 exactly."""
    d = u.shape[1]
    if not d:
        return u
    y = np.linalg.solve(tril, (u - mean).T).T
    if len(u) < 3 * d:
        return y
    y = y - weights @ y
    cov = (weights[:, None] * y).T @ y
    values, vectors = np.linalg.eigh(cov)
    if values.min() < 0.01:  # a direction that the kept draws hardly span
        return y
    return y @ (vectors / np.sqrt(values)) @ vectors.T


@dataclasses.dataclass(frozen=True)
class _Law:
    """The smoothing law of a discrete address: log probabilities from `low` on."""

    table: np.ndarray
    share: float
    low: int
    tails: tuple[bool, bool]


def _matches(x: np.ndarray, law: _Law) -> np.ndarray:
    """Log mass of each draw under the atoms of each other one, `(n, n)`."""
    cells = x.reshape(len(x), -1)
    table, total = law.table.reshape(cells.shape[1], -1), np.zeros((len(x), len(x)))
    for j, column in enumerate(cells.T):
        smooth = law.share * np.exp(table[j][column.astype(np.int64) - law.low])[:, None]
        hit = np.where(column[:, None] == column[None], 1 - law.share, 0.0)
        total += np.log(hit + smooth)
    return total


def _bandwidth(y: np.ndarray, weights: np.ndarray, matches: Any) -> float:
    """Maximizes the leave-one-out predictive density of the draws, discrete latents included."""
    n, d = y.shape
    if n < 3 or not d:
        return 1.0
    square, inner = np.sum(y**2, 1), y @ y.T
    log_w = np.log(weights)[None, :] - np.log1p(-np.minimum(weights, 1 - 1e-12))[:, None]
    normal = -0.5 * square - 0.5 * d * math.log(2 * math.pi)
    best, chosen = -np.inf, 1.0
    for h in _BANDWIDTHS:
        a = math.sqrt(1 - h**2)
        distance = square[:, None] - 2 * a * inner + a**2 * square[None, :]
        each = log_w - 0.5 * distance / h**2 - d * math.log(h) - 0.5 * d * math.log(2 * math.pi)
        each = each + matches
        np.fill_diagonal(each, -np.inf)
        peak = each.max(1)
        kernel = peak + np.log(np.exp(each - peak[:, None]).sum(1))
        both = np.logaddexp(math.log(1 - _BROAD) + kernel, math.log(_BROAD) + normal)
        score = float(weights @ both)
        if score > best:
            best, chosen = score, float(h)
    return chosen


def _law(address, info, support, x, weights, ess) -> _Law:
    """The smoothing law of each entry of a discrete address."""
    low, high = _ends(address, info, support.constraint)
    first = int(x.min()) - 1 if low is None else low  # the tails begin beyond the draws
    last = int(x.max()) + 1 if high is None else high
    size = last - first + 1
    if size > _MOST_VALUES:
        raise InvalidModel(
            f"post.as_model: {address!r} takes {size} values; leave it out with keep=."
        )
    cells = x.reshape(len(x), -1).astype(np.int64) - first
    table = np.stack([np.bincount(c, weights, size) for c in cells.T])
    share = 1 / (2 + ess)
    table = (1 - share) * table / table.sum(1, keepdims=True) + share / size
    table = np.log(table).reshape((*info.shape, size))
    return _Law(table, share, first, (low is None, high is None))


def _ends(address: str, info: SiteInfo, constraint: Any) -> tuple[int | None, int | None]:
    """First and last integer of a support; None where it has no end."""
    if info.event_dim:
        raise InvalidModel(
            f"post.as_model: {address!r} is a discrete vector ({info.family}), of which there is "
            f"no smooth law here. Leave it out with keep=."
        )
    if constraint is constraints.boolean:
        return 0, 1
    low = getattr(constraint, "lower_bound", None)
    high = getattr(constraint, "upper_bound", None)
    ends = [None if x is None else np.asarray(x) for x in (low, high)]
    low, high = ends
    return None if low is None else int(low.min()), None if high is None else int(high.max())


# -------------------------------------------------------------------- supports


def _supports(
    program: Program, arguments: Arguments, sites: dict[str, SiteInfo], post: Any
) -> dict[str, Support]:
    out = {}
    for address, info in sites.items():
        if info.conditional:
            raise InvalidModel(
                f"post.as_model: {address!r} ({info.site.where}) is in a branch, so it has no "
                f"density of its own. Leave it out with keep=."
            )
        support = info.site.spec.support
        if support is None:
            support = _measured(program, arguments, address, info, post)
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        out[address] = Support(support)
    return out


@dataclasses.dataclass(frozen=True)
class _Bounds(Replay):
    """Records the arrays in the support of one site."""

    address: str = ""

    def site(self, site, operands, given, key, acc):
        values, acc, record = super().site(site, operands, given, key, acc)
        if site.address == self.address:

            def element(ops):
                leaves = jax.tree.leaves(_elementary(site.build(ops)))
                return [jnp.broadcast_to(x, site.shape) for x in leaves]

            bounds = elementwise(site, element, operands)
            record = {f"bound {i}": x for i, x in enumerate(bounds)}
        return values, acc, record


def _elementary(d: Any) -> Any:
    support = d.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def _measured(
    program: Program, arguments: Arguments, address: str, info: SiteInfo, post: Any
) -> Any:
    """The support of a site whose parameters give it, if it is the same for all draws."""
    found: list[Any] = []

    def look(*leaves):
        found.append(jax.tree.structure(_elementary(info.site.spec.build(leaves))))
        found.append(_elementary(info.site.spec.build(leaves)).event_dim)

    try:
        jax.eval_shape(look, *(jax.ShapeDtypeStruct(s, t) for s, t in info.site.spec.avals))
    except NotImplementedError:
        raise _dependent(address, info) from None
    treedef, event_dim = found
    if event_dim:
        raise _dependent(address, info)
    names = tuple(f"bound {i}" for i in range(treedef.num_leaves))
    fixed, kept = _everything(post)
    out = run_at_draws(
        _Bounds(frozenset(), score=False, address=address), (address,), names, program, arguments,
        None, fixed, kept, (post.num_chains, post.num_draws), None,
    )  # fmt: skip
    leaves = []
    for name in names:
        x = np.asarray(out[name][address])
        x = x.reshape((-1, *x.shape[2:]))
        if not (x == x[:1]).all():
            raise _dependent(address, info)
        leaves.append(x[0] if x[0].size and not (x[0] == x[0].flat[0]).all() else x[0].flat[0])
    return jax.tree.unflatten(treedef, leaves)


def _dependent(address: str, info: SiteInfo) -> InvalidModel:
    return InvalidModel(
        f"post.as_model: the support of {address!r} ({info.family}, {info.site.where}) depends on "
        f"other latents, so a density of the draws cannot keep to it. Rescale it in the model, as "
        f'in x = scale * ab.sample("{address}", dist.Uniform(0, 1)), or leave it out with keep=.'
    )
