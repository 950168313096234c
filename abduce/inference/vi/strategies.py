"""Gradient strategies: how the derivative of an expectation passes through a random choice.

For a choice `x ~ p(x; a)` and a cost `f`, the derivative of `E[f(x)]` in `a` is estimated

* along the path (`reparam`, `implicit`): `x` is a differentiable function of `a`;
* by the score (`score`): `f(x) * d log p(x; a)`;
* by both (`rsvi`);
* by alternatives (`enum`, `mvd`): the rest of the program runs again with other values of `x`,
  and the derivative is `sum_k dc_k(a) f(x_k)`.

A strategy says what one element of a site does; `abduce.inference.vi.credit` does the rest.

References: Mohamed, Rosca, Figurnov, Mnih, "Monte Carlo gradient estimation in machine learning"
(JMLR 2020); Figurnov, Mohamed, Mnih, "Implicit reparameterization gradients" (2018); Naesseth,
Ruiz, Linderman, Blei, "Reparameterization gradients through acceptance-rejection sampling" (2017).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from abduce.dist import Simulator
from abduce.errors import InvalidModel
from abduce.inference.vi.implicit import implicit_path, is_implicit
from abduce.ppl.densities import log_prob
from abduce.ppl.site import Site, unwrapped

__all__ = [
    "Strategy",
    "default",
    "enum",
    "gumbel_softmax",
    "implicit",
    "mvd",
    "num_alternatives",
    "reparam",
    "rsvi",
    "score",
    "stop",
]


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Base of all strategies.

    Attributes:
        credited: Whether costs that depend on the choice are multiplied by something (a score or a
            probability), so that it must be known which costs do.
        biased: Whether the estimate is biased by design.
    """

    credited = False
    biased = False

    def check(self, site: Site) -> None:
        """Raises InvalidModel where the strategy does not apply to a site."""

    def draw(self, d: Any, key: Any) -> tuple[Any, Any]:
        """A draw of one element and its log factor (batch shape; value 0), or None."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        return f"ab.grad.{type(self).__name__}()"


def _refuse(site: Site, strategy: Strategy, why: str) -> InvalidModel:
    return InvalidModel(
        f"site {site.address!r} ({site.where}) is {site.spec.family}: {strategy.name} {why}."
    )


def zero_valued(x: Any) -> Any:
    """`x - stop_gradient(x)`: value 0, derivative that of `x`."""
    return x - jax.lax.stop_gradient(x)


def inspect(site: Site, fn: Callable[[Any], Any]) -> Any:
    """What `fn` says of one element's distribution, before there are numbers."""
    found: list[Any] = []

    def run(*leaves):
        found.append(fn(site.spec.build(leaves)))
        return 0

    jax.eval_shape(run, *(jax.ShapeDtypeStruct(s, t) for s, t in site.spec.avals))
    return found[0]


def has_path(d: Any) -> bool:
    """Whether the sampler is a differentiable function of all parameters."""
    d = unwrapped(d)
    if isinstance(d, Simulator):
        return True
    if isinstance(d, (dist.MixtureSameFamily, dist.MixtureGeneral, dist.VonMises)):
        return False
    base = getattr(d, "base_dist", None)
    if base is not None:  # transformed, truncated, folded
        return has_path(base)
    return bool(d.has_rsample)


def num_alternatives(site: Site) -> int | None:
    """The number of values of a finite discrete choice; None if it has no fixed finite support."""
    if jnp.issubdtype(site.dtype, jnp.inexact) and site.spec.family != "OneHotCategorical":
        return None

    def count(d):
        try:
            return int(np.shape(_support(d))[0])
        except Exception:  # a bound that is an array: not known before the run
            return None

    return inspect(site, count)


def _support(d: Any) -> Any:
    inner = unwrapped(d)
    if not inner.has_enumerate_support or inner.event_shape != d.event_shape:
        raise NotImplementedError
    values = unwrapped(d).enumerate_support(expand=False)
    k, event = values.shape[0], len(d.event_shape)
    return values.reshape((k, *values.shape[values.ndim - event :]))


def alternative(d: Any, index: Any) -> Any:
    """The value with this number (batch shape) in the support."""
    return _support(d)[index]


@dataclasses.dataclass(frozen=True)
class reparam(Strategy):
    """Along the path of the sampler (pathwise, reparametrization).

    Right where the cost is continuous in the value. A value that decides a `lax.cond`, is
    rounded or turned into a flag and then a number is refused while the program is staged;
    `jnp.where` and comparisons inside it are taken as continuous.

    Args:
        assume_smooth: Skip that check: the cost is continuous all the same.
    """

    assume_smooth: bool = False

    def check(self, site: Site) -> None:
        if not jnp.issubdtype(site.dtype, jnp.inexact) or not inspect(site, has_path):
            raise _refuse(
                site, self, "needs a sampler that is differentiable in the parameters. Use "
                "ab.grad.score()" + (" or ab.grad.implicit()" if inspect(site, is_implicit) else "")
            )  # fmt: skip

    def draw(self, d, key):
        return d.sample(key), None


@dataclasses.dataclass(frozen=True)
class implicit(Strategy):
    """Implicit reparametrization: the path `dx = -dF(x; a) / p(x; a)` of the distribution function.

    For gamma, beta, Dirichlet and what is made of them (JAX's samplers do this already), for von
    Mises, for every univariate family with a distribution function, and for mixtures of such
    families, of their products and of multivariate normals.

    Args:
        assume_smooth: As in `ab.grad.reparam`.
    """

    assume_smooth: bool = False

    def check(self, site: Site) -> None:
        if not jnp.issubdtype(site.dtype, jnp.inexact) or not inspect(
            site, lambda d: has_path(d) or is_implicit(d)
        ):
            raise _refuse(site, self, "needs a distribution function. Use ab.grad.score()")

    def draw(self, d, key):
        if has_path(d):
            return d.sample(key), None
        return implicit_path(d, d.sample(key)), None


@dataclasses.dataclass(frozen=True)
class score(Strategy):
    """Score function (REINFORCE): any distribution, any cost; the variance is high.

    Costs that do not depend on the choice are left out (as far as the program shows it).

    Args:
        baseline: Subtracted from the cost, which leaves the mean of the estimate unchanged. A
            number or array (batch shape of the site), computed in the program from what comes
            before the choice, such as a network of the data (`baseline_loss` fits it);
            'leave_one_out': the mean cost of the other samples, with `num_samples` of at least 2;
            'running_mean': of the earlier steps, in `ab.vi`; None.
    """

    baseline: Any = None
    credited = True

    def __post_init__(self):
        if isinstance(self.baseline, str) and self.baseline not in (
            "leave_one_out", "running_mean"
        ):  # fmt: skip
            raise InvalidModel(
                f"ab.grad.score: baseline={self.baseline!r}; there are 'leave_one_out', "
                f"'running_mean', and arrays."
            )

    @property
    def operand(self) -> Any:
        """What becomes an operand of the site: a baseline that is an array."""
        return None if self.baseline is None or isinstance(self.baseline, str) else self.baseline

    def without_operand(self) -> score:
        """The static part."""
        return score() if self.operand is not None else self

    def draw(self, d, key):
        x = jax.lax.stop_gradient(d.sample(key))
        return x, zero_valued(log_prob(d, x))


@dataclasses.dataclass(frozen=True)
class stop(Strategy):
    """No derivative passes: right only where the cost accounts for it (biased otherwise)."""

    biased = True

    def draw(self, d, key):
        return jax.lax.stop_gradient(d.sample(key)), None


@dataclasses.dataclass(frozen=True)
class gumbel_softmax(Strategy):
    """Straight-through Gumbel-softmax for `dist.OneHotCategorical`; biased.

    The value is a one-hot vector, the derivative that of the relaxed one (Jang, Gu, Poole 2017).

    Args:
        temperature: Of the relaxation; the bias falls and the variance grows as it goes to 0.
    """

    temperature: float = 0.5
    biased = True

    def __post_init__(self):
        if not self.temperature > 0:
            raise InvalidModel(
                f"ab.grad.gumbel_softmax: temperature must be positive, got {self.temperature}."
            )

    def check(self, site: Site) -> None:
        if site.spec.family != "OneHotCategorical":
            raise _refuse(
                site, self, "needs a value that can move: write the site with "
                "dist.OneHotCategorical(logits=...)"
            )  # fmt: skip

    def draw(self, d, key):
        logits = unwrapped(d).logits
        noise = jax.random.gumbel(key, (*d.batch_shape, *d.event_shape), logits.dtype)
        noisy = logits + noise
        hard = jax.nn.one_hot(jnp.argmax(noisy, -1), logits.shape[-1], dtype=logits.dtype)
        return hard + zero_valued(jax.nn.softmax(noisy / self.temperature)), None


@dataclasses.dataclass(frozen=True)
class enum(Strategy):
    """Enumeration of a finite choice: zero variance from it.

    All values of all enumerated choices are run together, as a batch, which sums the choices out
    exactly, in the value as in the derivative. Elements of a mapped axis that no cost mixes count
    once, so that a batch of a thousand independent choices costs no more than one. Where the joint
    number of alternatives exceeds `max_joint`, each element's alternatives are run in turn, the
    other choices as drawn: unbiased, no longer free of variance.

    Args:
        max_joint: The largest joint number of alternatives.
    """

    max_joint: int = 256
    credited = True

    def check(self, site: Site) -> None:
        if num_alternatives(site) is None:
            raise _refuse(
                site, self, "needs a finite support that is known before the run, one choice per "
                "element (no .to_event). Use ab.grad.score()"
            )  # fmt: skip

    def draw(self, d, key):
        return jax.lax.stop_gradient(d.sample(key)), None

    def num_alternatives(self, site: Site) -> int:
        """How many runs an element needs beside the drawn one."""
        k = num_alternatives(site)
        assert k is not None  # `check` has seen to it
        return k

    def alternative(self, d: Any, x: Any, key: Any, which: Any) -> tuple[Any, Any]:
        """The value number `which` and its coefficient, whose derivative counts."""
        index = jnp.full(d.batch_shape, which)
        value = alternative(d, index)
        return value, jnp.exp(log_prob(d, value))

    def drawn(self, d: Any, x: Any) -> Any:
        """The coefficient of the drawn value; None is 0."""
        return None


@dataclasses.dataclass(frozen=True)
class mvd(Strategy):
    """Measure-valued derivatives: the derivative of the law as a difference of two laws.

    For Poisson, Bernoulli, categorical (and other finite choices), normal, exponential and gamma
    (its rate; the concentration by the score). The cost may be discontinuous. The alternatives are
    coupled with the drawn value. (Heidergott, Vazquez-Abad, Volk-Makarewicz 2008; Mohamed et al.
    2020, section 6.)
    """

    credited = True

    def check(self, site: Site) -> None:
        if num_alternatives(site) is None and not inspect(
            site, lambda d: isinstance(unwrapped(d), _MVD) and not d.event_shape
        ):
            raise _refuse(
                site, self, "is for Poisson, finite choices, normal, exponential and gamma, one "
                "number per element (no .to_event). Use ab.grad.score()"
            )  # fmt: skip

    def draw(self, d, key):
        return jax.lax.stop_gradient(d.sample(key)), None

    def num_alternatives(self, site: Site) -> int:
        k = num_alternatives(site)
        if k is not None:
            return k - 1
        return inspect(site, lambda d: 3 if isinstance(unwrapped(d), dist.Normal) else 1)

    def alternative(self, d, x, key, which):
        inner = unwrapped(d)
        shape = (*d.batch_shape, *d.event_shape)
        if isinstance(inner, dist.Poisson):
            return x + 1, jnp.broadcast_to(inner.rate, shape)
        if isinstance(inner, dist.Normal):
            return _normal_alternative(inner, x, key, which, shape)
        if isinstance(inner, (dist.Gamma, dist.Exponential)):
            shape_parameter = getattr(inner, "concentration", 1.0)
            step = jax.random.exponential(key, shape, x.dtype)
            value = x + jax.lax.stop_gradient(step / inner.rate)
            return value, -_relative(inner.rate, shape) * jax.lax.stop_gradient(shape_parameter)
        values = _support(d)
        event = tuple(range(-(values.ndim - 1), 0))
        same = (x[..., None, *(slice(None),) * len(event)] == values).all(event)
        index = (jnp.argmax(same, -1) + 1 + which) % values.shape[0]
        value = values[index]
        return value, jnp.exp(log_prob(d, value))

    def drawn(self, d, x):
        inner = unwrapped(d)
        shape = (*d.batch_shape, *d.event_shape)
        if isinstance(inner, dist.Poisson):
            return -jnp.broadcast_to(inner.rate, shape)
        if isinstance(inner, dist.Normal):
            return -_relative(inner.scale, shape)
        if isinstance(inner, (dist.Gamma, dist.Exponential)):
            a = getattr(inner, "concentration", None)
            by_rate = _relative(inner.rate, shape)
            if a is None:
                return by_rate
            by_shape = log_prob(dist.Gamma(a, jax.lax.stop_gradient(inner.rate)), x)
            return by_rate * jax.lax.stop_gradient(a) + by_shape
        return jnp.exp(log_prob(d, x))


_MVD = (dist.Poisson, dist.Normal, dist.Gamma, dist.Exponential)


def _relative(a: Any, shape: tuple[int, ...]) -> Any:
    """`a / stop_gradient(a)`: value 1, derivative that of log a."""
    return jnp.broadcast_to(a / jax.lax.stop_gradient(a), shape)


def _normal_alternative(d: Any, x: Any, key: Any, which: Any, shape: tuple[int, ...]) -> Any:
    """The mean by two Rayleigh (Weibull) steps, the scale by a two-sided Maxwell draw.

    A Maxwell draw times a uniform one is half normal, so that given the normal draw `e`, the
    Maxwell draw is `sqrt(e^2 + 2 E)` with `E` exponential: the coupling of the two laws.
    """
    loc, scale = jnp.broadcast_to(d.loc, shape), jnp.broadcast_to(d.scale, shape)
    fixed_loc, fixed = jax.lax.stop_gradient(loc), jax.lax.stop_gradient(scale)
    twice = 2 * jax.random.exponential(key, shape, x.dtype)
    e = (x - fixed_loc) / fixed
    rayleigh = jnp.sqrt(twice)
    maxwell = jnp.where(e < 0, -1.0, 1.0) * jnp.sqrt(e * e + twice)
    step = jnp.stack([rayleigh, -rayleigh, maxwell])[which]
    by_loc = loc / (fixed * math.sqrt(2 * math.pi))
    coefficient = jnp.stack([by_loc, -by_loc, _relative(scale, shape)])[which]
    return fixed_loc + fixed * step, coefficient


@dataclasses.dataclass(frozen=True)
class rsvi(Strategy):
    """Through the accepted proposal of a rejection sampler, for gamma, beta and Dirichlet.

    A gamma draw is Marsaglia and Tsang's transformation `h(e; a + B)` of a nearly normal `e`,
    times powers of `B` uniform numbers; what the law of `e` still depends on is corrected by its
    score (Naesseth et al. 2017, equations 5 to 8 and section 5).

    Args:
        shape_augmentation: `B`; a larger one leaves less to the correction.
    """

    shape_augmentation: int = 1
    credited = True

    def __post_init__(self):
        if not isinstance(self.shape_augmentation, int) or self.shape_augmentation < 0:
            raise InvalidModel(
                f"ab.grad.rsvi: shape_augmentation must be an int >= 0, got "
                f"{self.shape_augmentation!r}."
            )

    def check(self, site: Site) -> None:
        kinds = (dist.Gamma, dist.Beta, dist.Dirichlet)
        if not inspect(site, lambda d: isinstance(unwrapped(d), kinds)):
            raise _refuse(site, self, "is for Gamma, Beta and Dirichlet")

    def draw(self, d, key):
        inner = unwrapped(d)
        shape = (*d.batch_shape, *d.event_shape)
        if isinstance(inner, dist.Gamma):
            g, ell = self._gamma(key, jnp.broadcast_to(inner.concentration, shape))
            x = g / inner.rate
        elif isinstance(inner, dist.Beta):
            a = jnp.broadcast_to(inner.concentration1, shape)
            b = jnp.broadcast_to(inner.concentration0, shape)
            g, ell = self._gamma(key, jnp.stack([a, b]))
            x, ell = g[0] / (g[0] + g[1]), ell.sum(0)
        else:
            g, ell = self._gamma(key, jnp.broadcast_to(inner.concentration, shape))
            x, ell = g / g.sum(-1, keepdims=True), ell.sum(-1)
        axes = tuple(range(len(d.batch_shape), ell.ndim))  # of an event made of independent ones
        return x, ell.sum(axes)

    def _gamma(self, key: Any, a: Any) -> tuple[Any, Any]:
        """Standard gamma draws and their log factors."""
        k1, k2 = jax.random.split(key)
        b = self.shape_augmentation
        raised = a + b
        z = jax.lax.stop_gradient(jax.random.gamma(k1, raised, dtype=a.dtype))
        c, root = raised - 1 / 3, jnp.sqrt(9 * raised - 3)
        e = jax.lax.stop_gradient(root * (jnp.cbrt(z / c) - 1))
        inside = 1 + e / root
        h = c * inside**3
        # log of q(h; a) |dh/de|: the density of e before and after acceptance, up to constants
        log_slope = jnp.log(c) + 2 * jnp.log(jnp.abs(inside)) - jnp.log(root)
        ell = (raised - 1) * jnp.log(h) - h - jax.lax.lgamma(raised) + log_slope
        for i in range(b):
            u = jax.random.uniform(
                jax.random.fold_in(k2, i), a.shape, a.dtype, jnp.finfo(a.dtype).tiny
            )
            h = h * u ** (1 / (a + i))
        return h, zero_valued(ell)


@dataclasses.dataclass(frozen=True)
class default(Strategy):
    """What a site without a strategy does.

    Continuous: `reparam`, or `implicit` where the sampler has no derivative, or `score` where there
    is no distribution function either. Discrete: `enum` if the joint number of alternatives is at
    most 64, `mvd` for Poisson if it needs at most 64 runs, else `score`.
    """

    credited = True
    max_runs = 64


def resolve_continuous(site: Site) -> Strategy | None:
    """The default strategy of a continuous site; None for a discrete one."""
    if not jnp.issubdtype(site.dtype, jnp.inexact) or site.spec.family == "OneHotCategorical":
        return None
    if inspect(site, has_path):
        return reparam()
    return implicit() if inspect(site, is_implicit) else score()
