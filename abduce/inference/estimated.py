"""`ab.marginal` and `ab.normalize`: programs whose density is estimated by an algorithm.

Both put an algorithm inside a model. The estimates are unbiased, which is all that importance
sampling, Metropolis-Hastings and SMC need to be exact (Andrieu and Roberts 2009; for programs,
Lew, Ghavamizadeh, Rinard and Mansinghka, "Probabilistic programming with stochastic
probabilities", 2023).

The random numbers of the algorithm are an *auxiliary* site, which is no choice. Where the program
is simulated, the choices are read off the run; where they are supplied, the run is not needed, and
the density is estimated by another run, given them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.dist import Estimated
from abduce.errors import InvalidAlgorithm, InvalidModel, InvalidValue
from abduce.inference.algorithm import Algorithm
from abduce.ppl.dataflow import propagate
from abduce.ppl.interpreter import State, walk
from abduce.ppl.model import Model
from abduce.ppl.naming import scoped
from abduce.ppl.operations import outside_scopes
from abduce.ppl.program import Arguments, Program, SiteInfo, relative, stage
from abduce.ppl.selection import matching
from abduce.ppl.site import Site, bind, take_apart, user_location
from abduce.ppl.transforms import Transformed, do

__all__ = ["marginal", "normalize"]


# ---------------------------------------------------------------------- values as words


def _pack(tree: Sequence[Any]) -> Any:
    """Arrays of any type as one vector of words."""
    parts = []
    for x in tree:
        x = jnp.asarray(x)
        if x.dtype == bool:
            x = x.astype(jnp.uint32)
        elif jnp.dtype(x.dtype).itemsize < 4:
            kind = jnp.float32 if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.int32
            x = x.astype(kind)
        parts.append(jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1))
    return jnp.concatenate(parts)


def _unpack(words: Any, like: Sequence[Any]) -> list[Any]:
    """The arrays again; `like` has their shapes and types."""
    out, start = [], 0
    for x in like:
        dtype = jnp.dtype(x.dtype)
        stored = dtype
        if dtype == jnp.dtype(bool):
            stored = jnp.dtype(jnp.uint32)
        elif dtype.itemsize < 4:
            stored = jnp.dtype(
                jnp.float32 if jnp.issubdtype(dtype, jnp.inexact) else jnp.int32
            )  # fmt: skip
        per = 2 if stored.itemsize == 8 else 1
        size = math.prod(x.shape) * per
        part = words[start : start + size].reshape((*x.shape, *((2,) if per == 2 else ())))
        out.append(jax.lax.bitcast_convert_type(part, stored).astype(dtype))
        start += size
    return out


class _Shape:
    """Shape and type of a site's value."""

    def __init__(self, info: SiteInfo):
        self.shape, self.dtype = info.shape, info.dtype


def _support(info: SiteInfo) -> Any:
    return info.site.spec.support


# ---------------------------------------------------------------------- laws


class _Law:
    """What an estimated program does inside; static, one for each time it is staged.

    Attributes:
        static: Of the packed base model, with `count` dynamic arrays.
        addresses: Of the choices whose joint density is estimated.
        like: Their shapes and types.
    """

    def __init__(self, arguments: Arguments, infos: Mapping[str, SiteInfo], via: Any):
        self.static, self.count = arguments.static, len(arguments.dynamic)
        self.addresses = tuple(infos)
        self.like = [_Shape(s) for s in infos.values()]
        self.via = via

    def model(self, dynamic: Sequence[Any]) -> tuple[Model, Any, Any]:
        return Arguments(self.static, list(dynamic)).unpack()

    def run(self, key: Any, *operands: Any) -> Any:
        """The words of a run."""
        raise NotImplementedError

    def estimate(self, key: Any, choices: Any, drawn: bool, words: Any, operands: Any) -> Any:
        """Log density estimate of all choices."""
        raise NotImplementedError


class _Draw:
    """One choice, read off the auxiliary run; every choice but the last counts nothing."""

    def __init__(self, law: Any, index: int):
        self.law, self.index = law, index

    def draw(self, words: Any, *rest: Any) -> Any:
        return _unpack(words, self.law.like)[self.index]

    def estimate(self, key: Any, value: Any, drawn: bool, words: Any, *rest: Any) -> Any:
        if self.index + 1 < len(self.law.addresses):
            return jnp.zeros((), jnp.result_type(float))
        n = len(self.law.addresses) - 1
        others, rest = rest[:n], rest[n:]
        choices = dict(zip(self.law.addresses, (*others, value), strict=True))
        with outside_scopes():
            return self.law.estimate(key, choices, drawn, words, rest)


class _RunDistribution(Estimated):
    """Draws the words of a run."""

    def sample(self, key, sample_shape=()):
        with outside_scopes():
            return self.law.run(key, *self.operands)


class _MarginalLaw(_Law):
    """Operands: values of the kept roots, then the model's arrays."""

    def __init__(self, arguments, infos, via, roots: Sequence[str]):
        super().__init__(arguments, infos, via)
        self.roots = tuple(roots)

    def _split(self, operands):
        roots = dict(zip(self.roots, operands, strict=False))
        model, args, kwargs = self.model(operands[len(self.roots) :])
        return (do(model, roots) if roots else model), args, kwargs

    def run(self, key, *operands):
        model, args, kwargs = self._split(operands)
        trace = model.simulate(key, *args, **kwargs)
        return _pack([trace.choices[a] for a in self.addresses])

    def estimate(self, key, choices, drawn, words, operands):
        model, args, kwargs = self._split(operands)
        post = self.via(model).posterior(key, *args, given=choices, **kwargs)
        return _evidence(post, "ab.marginal", self.via)


class _NormalizedLaw(_Law):
    """Operands: the model's arrays. The words hold the choices and the log evidence of the run."""

    def run(self, key, *operands):
        model, args, kwargs = self.model(operands)
        k1, k2 = jax.random.split(key)
        post = self.via(model).posterior(k1, *args, **kwargs)
        logits = post.log_weights.reshape(-1)
        index = jax.random.categorical(k2, jnp.where(jnp.isnan(logits), -jnp.inf, logits))
        choices = [jnp.nan_to_num(post.draws[a][0, index]) for a in self.addresses]
        return _pack([*choices, _evidence(post, "ab.normalize", self.via)])

    def estimate(self, key, choices, drawn, words, operands):
        model, args, kwargs = self.model(operands)
        joint = model.log_density(choices, *args, **kwargs)
        if drawn:
            zero = jnp.zeros((), jnp.result_type(float))
            evidence = _unpack(words, [*self.like, zero])[-1]
        else:
            evidence = self.via.conditional_evidence(key, model, args, kwargs, choices)
        return joint - evidence


def _evidence(post: Any, call: str, via: Any) -> Any:
    if post.log_evidence is None:
        raise InvalidAlgorithm(
            f"{call}: {via!r} does not estimate the evidence. Use via=ab.smc(...) or "
            f"via=ab.importance(...)."
        )
    return jnp.asarray(post.log_evidence)


# ---------------------------------------------------------------------- models


def _emit(law: _Law, infos: Mapping[str, SiteInfo], operands: Sequence[Any]) -> Any:
    """Binds the auxiliary run and the choices read off it; returns the choices."""
    where = user_location()
    aux = _RunDistribution(law, operands, (), jnp.uint32)
    words = jax.eval_shape(law.run, jax.random.key(0), *operands).shape[0]
    name = "abduce_run/" + "+".join(law.addresses or ("evidence",))
    spec, leaves = take_apart(aux)
    site = Site(
        "auxiliary", scoped(name), (words,), jnp.dtype(jnp.uint32), 1, ("leaf",) * len(leaves),
        spec, where=where,
    )  # fmt: skip
    numbers = bind(site, leaves)
    values: dict[str, Any] = {}
    for i, (address, info) in enumerate(infos.items()):
        earlier = tuple(values.values()) if i + 1 == len(infos) else ()
        d = Estimated(
            _Draw(law, i), (numbers, *earlier, *operands), info.shape, info.dtype, _support(info)
        )  # fmt: skip
        values[address] = _bind_choice(address, d, info, where)
    return values


def _bind_choice(address: str, d: Any, info: SiteInfo, where: str, obs: Any = None) -> Any:
    spec, leaves = take_apart(d)
    roles: tuple[str, ...] = ("leaf",) * len(leaves)
    if obs is not None:
        leaves, roles = [*leaves, obs], (*roles, "obs")
    site = Site(
        "sample", scoped(address), tuple(info.shape), jnp.dtype(info.dtype), len(info.shape),
        roles, spec, dims=tuple(info.dims) if any(info.dims) else (), where=where,
    )  # fmt: skip
    return bind(site, leaves)


def _require_closed(program: Program, call: str) -> None:
    if program.closed:
        raise InvalidModel(
            f"{call}: the model `{program.name}` closes over traced values of the program around "
            f"it. Pass them to it as arguments."
        )


class Marginal(Transformed):
    """A model over some of another's choices."""

    base: Model
    keep: Any = eqx.field(static=True)
    via: Any
    algorithm: Any = None

    def emit(self, *args, **kwargs):
        program, arguments = stage(self.base, args, kwargs)
        _require_closed(program, "ab.marginal")
        sites = relative(program).sites
        latents = {a: s for a, s in sites.items() if s.is_latent}
        kept = [a for a in latents if a in matching(self.keep, latents)]
        if len(kept) == len(latents):
            raise InvalidModel(
                f"ab.marginal: keep={self.keep!r} keeps every latent of `{program.name}`, so there "
                f"is nothing to sum out. Use the model itself."
            )
        roots = _roots(program, sites, kept)
        below = {a: sites[a] for a in kept if a not in roots}
        values = _emit_roots(program, arguments, roots, args, kwargs)
        evidence = any(s.kind == "factor" or s.observed for s in sites.values())
        law = _MarginalLaw(arguments, below, self.via, roots)
        operands = [*(values[a] for a in roots), *arguments.dynamic]
        if below:
            values.update(_emit(law, below, operands))
        elif evidence:
            d = Estimated(_EvidenceOf(law), operands, (), jnp.result_type(float))
            info = _Scalar()
            _bind_choice("abduce_evidence", d, info, user_location(), jnp.zeros(()))  # type: ignore[arg-type]
        return values

    def propose_inside(self, args: Any, kwargs: Any, params: Any, grad: Any) -> Any:
        """How `ab.propose` runs it inside an objective."""
        from abduce.inference.expanded import propose_inside

        return propose_inside(self, args, kwargs, params, grad)

    def log_density_inside(self, choices: Any, args: Any, kwargs: Any) -> Any:
        """How `ab.log_density` scores it inside an objective."""
        from abduce.inference.expanded import log_density_inside

        return log_density_inside(self, choices, args, kwargs)

    def __repr__(self):
        return f"<marginal of {self.base!r} over {self.keep!r}>"


class _Scalar:
    shape: tuple[int, ...] = ()
    dims: tuple[str, ...] = ()

    @property
    def dtype(self):
        return jnp.result_type(float)


class _EvidenceOf:
    """The evidence as the density of an observation without content."""

    def __init__(self, law: _MarginalLaw):
        self.law = law

    def estimate(self, key, value, drawn, *operands):
        with outside_scopes():
            return self.law.estimate(key, {}, False, None, operands)


def _roots(program: Program, sites: Mapping[str, SiteInfo], kept: Sequence[str]) -> list[str]:
    """The kept sites that depend on no site that is summed out."""
    inside = {scoped(a) for a in sites if sites[a].is_latent and a not in kept}
    depends: dict[str, set[Any]] = {}

    def visit(v):
        reached = {x.source for x in v.inputs}
        depends.setdefault(v.site.address, set()).update(reached)
        if v.site.kind == "sample" and v.site.address in inside:
            return {v.label(v.site.address)}
        # A kept site that depends on hidden ones hands them on.
        return set(v.inputs)

    propagate(program.jaxpr, visit)
    return [
        a for a in kept
        if not depends.get(scoped(a), set()) & inside and not sites[a].conditional
    ]  # fmt: skip


class _RootsOnly:
    """Emits some sites again; the others, on which these do not depend, get a stand-in."""

    def __init__(self, roots: set[str]):
        self.roots = roots

    def site(self, site, operands, given, key, acc):
        if site.address in self.roots or site.kind == "param":
            out = bind(site, list(operands))
            return [out], acc, ({"value": out} if site.kind == "sample" else None)
        if site.kind == "factor":
            return [], acc, None
        return [jnp.zeros(site.full_shape, site.dtype)], acc, None


def _emit_roots(program, arguments, roots, args, kwargs) -> dict[str, Any]:
    if not roots:
        return {}
    state = State(None, {}, ())
    handler = _RootsOnly({scoped(a) for a in roots})
    walk(handler, program.jaxpr, program.inputs(arguments), state)
    infos = relative(program).sites
    return {a: infos[a].to_logical(state.records[scoped(a)]["value"]) for a in roots}


def _as_via(via: Any, call: str) -> Any:
    if not isinstance(via, Algorithm):
        raise InvalidAlgorithm(
            f"{call}: via= takes an algorithm that estimates the evidence, such as "
            f"ab.smc(num_particles=100) or ab.importance(num_samples=100); got {via!r}."
        )
    return via


def _base(m: Any, call: str) -> tuple[Model, Any]:
    if not isinstance(m, Model):
        raise InvalidValue(f"{call} takes a model, got {type(m).__name__}.")
    return m.with_algorithm(None), m.algorithm


def marginal(m: Model, keep: Any, *, via: Any) -> Model:
    """A model over some choices of `m` alone; the others are summed out by an algorithm.

    Its density is the algorithm's unbiased estimate of the evidence of the kept choices, so
    `log_density` takes a key. Kept choices that depend on none of the others keep their own
    density, exactly. What is observed inside `m` counts.

    Args:
        m: A model.
        keep: A selection over its latents.
        via: `ab.smc(...)` or `ab.importance(...)`.

    Returns:
        A model, which returns the dict of the kept choices. It can be used wherever a model can:
        in other models, and with ab.mh, ab.importance and ab.smc. Particle marginal Metropolis-
        Hastings is `ab.mh(proposal=walk)(ab.marginal(m, "theta", via=ab.smc()))`.

    Raises:
        InvalidModel: Nothing is left to sum out.
        UnknownAddress: A part of `keep` matches nothing.

    Example:
        >>> m = ab.marginal(schools, ("mu", "tau", "y"), via=ab.importance(num_samples=500))
        >>> m.log_density({"mu": 4., "tau": 3., "y": y}, sigma, key=key)
    """
    base, algorithm = _base(m, "ab.marginal")
    keep = tuple(keep) if isinstance(keep, list) else keep
    return Marginal(base, keep, _as_via(via, "ab.marginal"), algorithm)


class Normalized(Transformed):
    """A conditioned model as a program that draws from its posterior through an algorithm."""

    base: Model
    via: Any
    algorithm: Any = None

    def emit(self, *args, **kwargs):
        program, arguments = stage(self.base, args, kwargs)
        _require_closed(program, "ab.normalize")
        sites = relative(program).sites
        latents = {a: s for a, s in sites.items() if s.is_latent}
        if not latents:
            raise InvalidModel(f"ab.normalize: `{program.name}` has no latent to draw.")
        partial = [a for a, s in latents.items() if s.partial or s.conditional]
        if partial:
            raise InvalidModel(
                f"ab.normalize: site {partial[0]!r} is in a branch or observed in part, which has "
                f"no density of its own as a whole. Make the hidden entries a site of their own."
            )
        law = _NormalizedLaw(arguments, latents, self.via)
        return _emit(law, latents, list(arguments.dynamic))

    def __repr__(self):
        return f"<normalized {self.base!r}, via {self.via!r}>"


def normalize(target: Model, *, via: Any) -> Model:
    """A model that draws from the posterior of a conditioned model, through an algorithm.

    Simulating it runs the algorithm and picks one draw by weight. Its density of a draw is
    `p(draw, data) / Z`, with `Z` the run's own estimate, or that of a conditional run that retains
    the draw: `E[1 / density]` and `E[density]` are what proposals and targets need, so that any
    algorithm stays exact.

    Args:
        target: A model whose data are inside (`obs=`, `ab.condition`).
        via: `ab.importance(...)`, or `ab.smc(...)` for a model with a scan.

    Returns:
        A model over the latents of `target`; it returns the dict of them.

    Example:
        >>> q = ab.normalize(ab.condition(m, {"y": y}), via=ab.smc(num_particles=100))
        >>> trace = q.simulate(key, *args)
    """
    base, algorithm = _base(target, "ab.normalize")
    via = _as_via(via, "ab.normalize")
    if not hasattr(via, "conditional_evidence"):
        raise InvalidAlgorithm(
            f"ab.normalize: {via!r} cannot retain a draw. Use ab.smc(...) or ab.importance(...)."
        )
    return Normalized(base, via, algorithm)
