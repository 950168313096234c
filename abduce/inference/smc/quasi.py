"""Sequential quasi-Monte Carlo: the particles of a step from one randomised point set.

A step of a particle filter maps N uniform points of dimension 1 + d to particles: the first
coordinate picks the ancestor, by the inverse distribution function of the weights after the
particles are put in order; the others give the step's latents by quantile functions (Gerber and
Chopin 2015, "Sequential quasi Monte Carlo", algorithm 2). The particles are ordered by value in one
dimension and along the Hilbert curve in several, so that both maps keep close points close.

The points are Sobol's, with a fresh scramble at every step: a random lower triangular matrix on the
digits and a digital shift (Matousek 1998). Each point by itself is uniform, and steps are
independent, so that the estimate of the evidence stays unbiased.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as numpyro_dist

from abduce.errors import InvalidAlgorithm, InvalidModel
from abduce.inference.smc.draws import score_site
from abduce.kernels.resampling_draws import stratified_at, uniform_parts, weight_sums
from abduce.ppl import _jax
from abduce.ppl.replay import Given
from abduce.ppl.site import Site, site_p, unwrapped

__all__ = [
    "ancestors",
    "carry_order",
    "drawn_sites",
    "hilbert_order",
    "points",
    "quantiles",
    "require_outermost",
    "scrambled",
    "step_points",
]

_BITS = 32
_MOST_DIMENSIONS = 64  # of a carry that is ordered along the Hilbert curve


# ---------------------------------------------------------------------- points


@functools.lru_cache(maxsize=256)
def _directions(dim: int, log_size: int) -> np.ndarray:
    """Sobol's direction numbers, uint32 `(dim, log_size)`, read off points of the sequence.

    In the order of the Gray code, points `2^c - 1` and `2^c` differ by direction number c.
    """
    from scipy.stats import qmc

    if dim > qmc.Sobol.MAXDIM:
        raise InvalidAlgorithm(
            f"ab.smc(qmc=True): a step needs {dim} uniform numbers for each particle, but Sobol "
            f"points have at most {qmc.Sobol.MAXDIM}. Leave qmc= out."
        )
    columns = []
    for c in range(log_size):
        sampler = qmc.Sobol(dim, scramble=False, bits=_BITS)
        if c:
            sampler.fast_forward(2**c - 1)
        with warnings.catch_warnings():  # that two points are not balanced
            warnings.simplefilter("ignore", UserWarning)
            pair = sampler.random(2)
        a, b = np.round(pair * 2.0**_BITS).astype(np.uint64)
        columns.append((a ^ b).astype(np.uint32))
    return np.stack(columns, 1)


def scrambled(key: Any, size: int, dim: int) -> Any:
    """A scrambled set of Sobol points.

    Args:
        key: Random key.
        size: How many, a power of 2.
        dim: Their dimension.

    Returns:
        uint32, shape `(size, dim)`, in units of 2^-32; each row is uniform, and each coordinate has
        one row in each interval `[i, i + 1) / size`.
    """
    log_size = size.bit_length() - 1
    directions = jnp.asarray(_directions(dim, log_size))
    k_matrix, k_shift = jax.random.split(key)
    # Column i of the matrix: the digit itself, and a random part below it.
    digit = jnp.uint32(1) << (_BITS - 1 - jnp.arange(_BITS, dtype=jnp.uint32))
    columns = digit | (jax.random.bits(k_matrix, (dim, _BITS), jnp.uint32) & (digit - 1))
    mixed = _product((directions[:, None] & digit[:, None]) != 0, columns[:, :, None])
    index = jnp.arange(size, dtype=jnp.uint32)  # the points as in the order of the Gray code
    has = (index >> jnp.arange(log_size, dtype=jnp.uint32)[:, None] & 1) != 0
    shift = jax.random.bits(k_shift, (dim, 1), jnp.uint32)
    return (_product(has[None], mixed[:, :, None]) ^ shift).T


def _product(digits: Any, columns: Any) -> Any:
    """The exclusive or of the columns whose digit is set, along axis 1."""
    chosen = jnp.where(digits, columns, jnp.uint32(0))
    return jax.lax.reduce(chosen, np.uint32(0), jax.lax.bitwise_xor, (1,))


def _uniform(bits: Any) -> Any:
    """Numbers strictly between 0 and 1."""
    dtype = jnp.result_type(float)
    digits = 23 if dtype == jnp.float32 else _BITS  # so that the last is below 1
    return ((bits >> (_BITS - digits)).astype(dtype) + 0.5) * 2.0**-digits


# ---------------------------------------------------------------------- latents


def drawn_sites(jaxpr: Any, inputs: Mapping[str, Given], *, scans: bool) -> dict[str, Site]:
    """The latents that a program draws, in its order; those inside scans if wanted."""
    found: dict[str, Site] = {}

    def look(jaxpr):
        for eqn in _jax.inner_jaxpr(jaxpr)[0].eqns:
            if eqn.primitive is site_p:
                site = eqn.params["site"]
                given = inputs.get(site.address)
                seen = "obs" in site.roles and "mask" not in site.roles
                wholly = given is not None and given.mask is None
                if site.kind == "sample" and not seen and not wholly:
                    found.setdefault(site.address, site)
            elif scans or eqn.primitive is not _jax.scan_p:
                for sub in _jax.subjaxprs(eqn):
                    look(sub)

    look(jaxpr)
    return found


def _width(site: Site) -> int:
    """How many uniform numbers an element takes; its size where there is no quantile function."""
    found: list[int] = []

    def look(*leaves):
        plan = _plan(site.spec.build(leaves))
        found.append(math.prod(site.shape) if plan is None else plan[0])

    jax.eval_shape(look, *(jax.ShapeDtypeStruct(s, t) for s, t in site.spec.avals))
    return found[0]


def _plan(d: Any) -> tuple[int, Any] | None:
    """How many uniform numbers a distribution takes, and the map from them; None: no such map."""
    shape = (*d.batch_shape, *d.event_shape)
    inner = unwrapped(d)
    size = math.prod(shape)
    event = len(inner.event_shape)
    lead = shape[: len(shape) - event]  # independent copies of the inner distribution
    if isinstance(inner, numpyro_dist.TransformedDistribution):
        base = inner.base_dist  # has the batch shape of `inner`
        plan = _plan(base if tuple(base.batch_shape) == tuple(lead) else base.expand(lead))
        if plan is None:
            return None

        def transformed(u):
            x = plan[1](u)
            for t in inner.transforms:
                x = t(x)
            return x

        return plan[0], transformed
    if isinstance(inner, numpyro_dist.MultivariateNormal):

        def multivariate(u):
            z = jax.scipy.special.ndtri(u.reshape(shape))
            return inner.loc + jnp.einsum("...ij,...j->...i", inner.scale_tril, z)

        return size, multivariate
    if isinstance(inner, numpyro_dist.Delta):
        return 0, lambda u: jnp.broadcast_to(inner.v, shape)
    if event:
        return None
    if isinstance(inner, (numpyro_dist.BernoulliProbs, numpyro_dist.BernoulliLogits)):
        return size, lambda u: (u.reshape(shape) > 1 - inner.probs).astype(jnp.int32)
    if isinstance(inner, (numpyro_dist.CategoricalProbs, numpyro_dist.CategoricalLogits)):

        def category(u):
            below = jnp.cumsum(inner.probs, -1)[..., :-1]
            return jnp.sum(u.reshape(shape)[..., None] >= below, -1, dtype=jnp.int32)

        return size, category
    try:
        jax.eval_shape(inner.icdf, jnp.full(shape, 0.5))
    except (NotImplementedError, ImportError):
        return None
    return size, lambda u: inner.icdf(u.reshape(shape))


def quantiles(site: Site, u: Any, operands: Any, mapped: Any, n: int) -> Any:
    """A latent's values for all particles, from uniform numbers.

    Args:
        site: The site.
        u: Shape `(N, *mapped axes, width)`.
        operands, mapped: As of `draw_site`.
        n: N.

    Returns:
        Shape `(N, *site.full_shape)`.

    Raises:
        InvalidModel: The distribution has no map from uniform numbers.
    """

    def element(ops, u):
        plan = _plan(site.build(ops))
        if plan is None:
            raise InvalidModel(
                f"ab.smc(qmc=True): site {site.address!r} ({site.where}) is {site.spec.family}, "
                f"which has no quantile function (icdf) to map uniform numbers to its values. "
                f"Propose it from another distribution (proposal=), or leave qmc= out."
            )
        width, value = plan
        if width > u.shape[-1]:
            raise InvalidModel(
                f"ab.smc(qmc=True): the proposal draws {site.address!r} from {width} uniform "
                f"numbers, but the model's own law takes {u.shape[-1]}. Propose it from a "
                f"distribution of its own form."
            )
        return jnp.broadcast_to(value(u[:width]), site.shape).astype(site.dtype)

    return score_site(site, element, n, operands, mapped, (u, True))


def points(key: Any, n: int, sites: dict[str, Site]) -> dict[str, Any]:
    """Uniform numbers for some latents, `(N, *mapped axes, width)` each, from one point set."""
    return _apart(lambda dim: scrambled(key, n, dim), _shapes(sites, n), 0)[1]


def step_points(key: Any, n: int, sites: dict[str, Site]) -> tuple[Any, dict[str, Any]]:
    """As `points`, with a first coordinate for the ancestors; rows in increasing order of it.

    Returns:
        The first coordinate, uint32 `(N,)`, row i in `[i, i + 1) / N`; and the uniform numbers.
    """

    def sorted_points(dim):
        bits = scrambled(key, n, dim)
        rank = (bits[:, 0] >> (_BITS + 1 - n.bit_length())).astype(jnp.int32)
        rows = jnp.zeros(n, jnp.int32).at[rank].set(jnp.arange(n, dtype=jnp.int32))
        return bits[rows]

    return _apart(sorted_points, _shapes(sites, n), 1)


def _shapes(sites: dict[str, Site], n: int) -> dict[str, tuple[int, ...]]:
    return {a: (n, *s.axis_sizes, _width(s)) for a, s in sites.items()}


def _apart(make: Any, shapes: dict[str, tuple[int, ...]], first: int) -> tuple[Any, dict[str, Any]]:
    dim = first + sum(math.prod(s[1:]) for s in shapes.values())
    if not dim:
        return None, {a: jnp.zeros(s) for a, s in shapes.items()}
    bits, start, out = make(dim), first, {}
    for a, s in shapes.items():
        size = math.prod(s[1:])
        out[a] = _uniform(bits[:, start : start + size]).reshape(s)
        start += size
    return bits[:, 0], out


# ---------------------------------------------------------------------- ancestors


def ancestors(key: Any, coordinate: Any, log_weights: Any, order: Any) -> Any:
    """Ancestors by the inverse distribution function of the ordered particles' weights.

    Args:
        key: For the digits of a shift that the coordinate has no room for.
        coordinate: From `step_points`.
        log_weights: Shape `(N,)`.
        order: The particles in order, `(N,)`.

    Returns:
        int32, shape `(N,)`.
    """
    n = log_weights.shape[0]
    log_size = n.bit_length() - 1
    below = coordinate << log_size  # the place of each point inside its interval
    parts = below | (uniform_parts(key, (n,)).astype(jnp.uint32) & jnp.uint32((1 << log_size) - 1))
    shifts = (parts >> 14).astype(jnp.int32)  # `stratified_at` counts in units of 2^-18
    dead = ~jnp.any(log_weights > -jnp.inf)
    chosen = stratified_at(weight_sums(log_weights[order]), shifts)
    return order[jnp.where(dead, jnp.arange(n), chosen)].astype(jnp.int32)


def require_outermost(number: int, addresses: Any) -> None:
    """Particles are put in order along the scans of the top level only.

    Raises:
        InvalidModel: A scan with sites is anywhere else.
    """
    if number < 0:
        raise InvalidModel(
            f"ab.smc(qmc=True): the scan with {', '.join(map(repr, addresses))} is inside another "
            f"scan, a branch or a proposal, where particles are not put in order. Leave qmc= out, "
            f"or write an inner scan with jax.vmap."
        )


def carry_order(carry: Any, flags: Any, n: int) -> Any:
    """The order of the particles by where they stand; `(N,)`.

    Raises:
        InvalidModel: The carry has no numbers, or too many.
    """
    columns = []
    for i, (c, differs) in enumerate(zip(carry, flags, strict=True)):
        if not differs:
            continue
        is_number = jnp.issubdtype(c.dtype, jnp.number) or c.dtype == bool
        if not is_number or jnp.issubdtype(c.dtype, jnp.complexfloating):
            raise InvalidModel(
                f"ab.smc(qmc=True) puts the particles in order by the scan's carry, but slot {i} "
                f"of it is {c.dtype}, which has no order. Carry real numbers, or leave qmc= out."
            )
        columns.append(c.reshape((n, -1)).astype(jnp.result_type(float)))
    if not columns:  # all particles have the same future
        return jnp.arange(n, dtype=jnp.int32)
    x = jnp.concatenate(columns, 1)
    if x.shape[1] > _MOST_DIMENSIONS:
        raise InvalidModel(
            f"ab.smc(qmc=True) puts the particles in order by the scan's carry, which has "
            f"{x.shape[1]} numbers; beyond {_MOST_DIMENSIONS} nothing is gained. Leave qmc= out."
        )
    return hilbert_order(x)


def hilbert_order(x: Any) -> Any:
    """The order of points along a Hilbert curve; by value in one dimension.

    Args:
        x: Shape `(N, d)`. In several dimensions each is standardised and squeezed into (0, 1).

    Returns:
        int32, shape `(N,)`.
    """
    d = x.shape[1]
    if d == 1:  # floats as integers of the same order
        bits = jax.lax.bitcast_convert_type(x[:, 0].astype(jnp.float32), jnp.uint32)
        sign = jnp.uint32(1 << 31)
        return _argsort([jnp.where(bits & sign != 0, ~bits, bits | sign)])
    num_bits = max(2, min(16, 64 // d))
    scale = jnp.std(x, 0)
    z = jax.nn.sigmoid((x - jnp.mean(x, 0)) / jnp.where(scale > 0, scale, 1.0))
    cells = jnp.clip(jnp.floor(z * 2**num_bits), 0, 2**num_bits - 1).astype(jnp.uint32)
    return _argsort(_hilbert_words([cells[:, i] for i in range(d)], num_bits))


def _argsort(words: list[Any]) -> Any:
    """Stable order by words of 32 bits, the highest first.

    Some digits and the place are packed in one integer, from the lowest digits on: on a CPU, XLA
    sorts integers alone several times faster than pairs or floats.
    """
    n = words[0].shape[0]
    place = (n - 1).bit_length()
    room = _BITS - place
    index = jnp.arange(n, dtype=jnp.uint32)
    order = index
    for word in reversed(words):
        for start in range(0, _BITS, room):
            digits = (word >> start)[order] << place
            order = order[jax.lax.sort(digits | index) & jnp.uint32((1 << place) - 1)]
    return order.astype(jnp.int32)


def _hilbert_words(x: list[Any], num_bits: int) -> list[Any]:
    """Positions along the Hilbert curve, as words of 32 bits, the highest first.

    From cells to the transpose of the position (Skilling 2004, "Programming the Hilbert curve"):
    at each level the lower digits of an axis are reflected or exchanged with those of the first.
    """
    x, d = list(x), len(x)
    for level in range(num_bits - 1, 0, -1):
        bit, low = jnp.uint32(1 << level), jnp.uint32((1 << level) - 1)
        for i in range(d):
            on = (x[i] & bit) != 0
            swap = jnp.where(on, jnp.uint32(0), (x[0] ^ x[i]) & low)
            first = jnp.where(on, x[0] ^ low, x[0] ^ swap)
            if i:
                x[i] = x[i] ^ swap
            x[0] = first
    for i in range(1, d):
        x[i] = x[i] ^ x[i - 1]
    turned = jnp.zeros_like(x[0])
    for level in range(num_bits - 1, 0, -1):
        on = (x[d - 1] & jnp.uint32(1 << level)) != 0
        turned = jnp.where(on, turned ^ jnp.uint32((1 << level) - 1), turned)
    digits = [(v ^ turned) >> level & 1 for level in range(num_bits - 1, -1, -1) for v in x]
    words = []
    for start in range(0, len(digits), _BITS):
        word = jnp.zeros_like(turned)
        for digit in digits[start : start + _BITS]:
            word = (word << 1) | digit
        words.append(word)
    return words
