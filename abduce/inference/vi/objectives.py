"""Objectives, `ab.objectives.*`: programs over a model `p` and a guide `q`, to be maximized.

`p(z)` is the log density of model and data at the latents `z`; `q.propose()` draws `z` from the
guide as part of the program and returns it with its log density; `q(z)` is the log density of
given latents; `p.frozen()` and `q.frozen()` hold the parameters fixed; `q.propose(detached=True)`
lets no derivative through the draw. Without densities, `p.simulate()` draws latents and data from
the model, and `q.draw(data)` draws from the guide, given other data than those observed. An
objective of one's own is a function of `p` and `q` written in the same way, for
`ab.vi(objective=...)`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidAlgorithm
from abduce.inference.smc.population import Resampling
from abduce.inference.vi.strategies import zero_valued
from abduce.ppl.model import Model

__all__ = [
    "chi_squared",
    "diwhvi",
    "elbo",
    "fivo",
    "forward_kl",
    "hvi",
    "iwelbo",
    "iwhvi",
    "mmd",
    "renyi",
    "reweighted_wake_sleep",
    "sticking_the_landing",
    "vimco",
]

stop = jax.lax.stop_gradient
Objective = Callable[[Any, Any], Any]


def _count(name: str, field: str, n: Any) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InvalidAlgorithm(f"ab.objectives.{name}: {field} must be an int >= 1, got {n!r}.")
    return n


def _mean_weight(log_w: Any) -> Any:
    return jax.nn.logsumexp(log_w) - math.log(log_w.shape[0])


@dataclasses.dataclass(frozen=True)
class elbo:
    """The evidence lower bound, `E_q[log p(z, x) - log q(z)]`."""

    def __call__(self, p: Any, q: Any) -> Any:
        z, log_q = q.propose()
        return p(z) - log_q


@dataclasses.dataclass(frozen=True)
class sticking_the_landing:
    """The evidence lower bound without the score of the guide, whose mean is zero.

    The derivative vanishes, draw by draw, where the guide is the posterior (Roeder, Wu, Duvenaud
    2017). For guides whose choices have path derivatives.
    """

    def __call__(self, p: Any, q: Any) -> Any:
        z, _ = q.propose()
        return p(z) - q.frozen()(z)


@dataclasses.dataclass(frozen=True)
class iwelbo:
    """The importance-weighted bound, `E log 1/K sum_k p(z_k, x) / q(z_k)` (Burda et al. 2016).

    Args:
        num_particles: `K`.
        doubly_reparametrized: Take the guide's derivative along the paths of the draws, with
            squared weights (Tucker, Lawson, Gu, Maddison 2019, equation 8), which keeps its
            signal-to-noise ratio as `K` grows. For guides whose choices have path derivatives.
    """

    num_particles: int = 5
    doubly_reparametrized: bool = False

    def __post_init__(self):
        _count("iwelbo", "num_particles", self.num_particles)

    def __call__(self, p: Any, q: Any) -> Any:
        if not self.doubly_reparametrized:
            return _mean_weight(
                jax.vmap(lambda _: _log_weight(p, q))(jnp.arange(self.num_particles))
            )

        def one(_):
            z, _ = q.propose()
            by_path = p.frozen()(z) - q.frozen()(z)
            by_model = p(jax.tree.map(stop, z)) - q.frozen()(jax.tree.map(stop, z))
            return by_path, by_model

        by_path, by_model = jax.vmap(one)(jnp.arange(self.num_particles))
        w = stop(jax.nn.softmax(by_path))
        value = stop(_mean_weight(by_path))
        return value + jnp.sum(w**2 * zero_valued(by_path) + w * zero_valued(by_model))


def _log_weight(p: Any, q: Any) -> Any:
    z, log_q = q.propose()
    return p(z) - log_q


@dataclasses.dataclass(frozen=True)
class renyi:
    """The variational Renyi bound of order `alpha` (Li and Turner 2016).

    `1 / (1 - alpha) log 1/K sum_k (p / q)^(1 - alpha)`; `alpha -> 1` is the ELBO, `alpha = 0` the
    importance-weighted bound.

    Args:
        alpha: Order, not 1.
        num_particles: `K`.
    """

    alpha: float = 0.5
    num_particles: int = 10

    def __post_init__(self):
        _count("renyi", "num_particles", self.num_particles)
        if self.alpha == 1:
            raise InvalidAlgorithm("ab.objectives.renyi: alpha=1 is ab.objectives.elbo().")

    def __call__(self, p: Any, q: Any) -> Any:
        log_w = jax.vmap(lambda _: _log_weight(p, q))(jnp.arange(self.num_particles))
        return _mean_weight((1 - self.alpha) * log_w) / (1 - self.alpha)


@dataclasses.dataclass(frozen=True)
class chi_squared:
    """Forward chi-squared: makes the variance of importance weights small, hence heavy tails.

    The guide's parameters lower `log E_q[(p / q)^2]`, the model's raise the importance-weighted
    bound; the chi-squared divergence is infinite where the guide's tails are lighter than the
    square root of the posterior's. The draws are held fixed: the derivative is that of the
    weights, with self-normalized squared weights (biased at finite `K`).

    Args:
        num_particles: `K`.
    """

    num_particles: int = 64

    def __post_init__(self):
        _count("chi_squared", "num_particles", self.num_particles)

    def __call__(self, p: Any, q: Any) -> Any:
        def one(_):
            z, _ = q.propose(detached=True)
            return p(z), q(z)

        log_p, log_q = jax.vmap(one)(jnp.arange(self.num_particles))
        log_w = log_p - log_q
        squared = stop(jax.nn.softmax(2 * log_w))
        w = stop(jax.nn.softmax(log_w))
        # d/dq log E_q[(p/q)^2] = -E_q[(p/q)^2 d log q] / E_q[(p/q)^2]
        return stop(_mean_weight(log_w)) + jnp.sum(
            w * zero_valued(log_p) + squared * zero_valued(log_q)
        )


@dataclasses.dataclass(frozen=True)
class reweighted_wake_sleep:
    """Reweighted wake-sleep with the wake update of the guide (Bornschein and Bengio 2015).

    Model: the importance-weighted bound. Guide: forward KL to the posterior, by self-normalized
    weights (biased at finite `K`). No derivative passes through the draws, so the latents may be
    discrete.

    Args:
        num_particles: `K`.
    """

    num_particles: int = 10

    def __post_init__(self):
        _count("reweighted_wake_sleep", "num_particles", self.num_particles)

    def __call__(self, p: Any, q: Any) -> Any:
        def one(_):
            z, _ = q.propose(detached=True)
            return p(z), q(z)

        log_p, log_q = jax.vmap(one)(jnp.arange(self.num_particles))
        log_w = stop(log_p - log_q)
        w = jax.nn.softmax(log_w)
        return _mean_weight(log_w) + jnp.sum(w * zero_valued(log_p + log_q))


@dataclasses.dataclass(frozen=True)
class forward_kl:
    """Forward KL from the posterior to the guide, by self-normalized importance weights.

    As in reweighted wake-sleep, the guide alone: parameters of the model do not move.

    Args:
        num_particles: Draws; the bias falls as one over their number.
    """

    num_particles: int = 64

    def __post_init__(self):
        _count("forward_kl", "num_particles", self.num_particles)

    def __call__(self, p: Any, q: Any) -> Any:
        return reweighted_wake_sleep(self.num_particles)(p.frozen(), q)


@dataclasses.dataclass(frozen=True)
class vimco:
    """The importance-weighted bound by scores, each against the others (Mnih and Rezende 2016).

    The learning signal of a draw is the bound minus the bound in which its weight is the geometric
    mean of the other weights (their equations 9 and 10). For discrete latents; no strategies are
    needed.

    Args:
        num_particles: `K`, at least 2.
    """

    num_particles: int = 5

    def __post_init__(self):
        if _count("vimco", "num_particles", self.num_particles) < 2:
            raise InvalidAlgorithm("ab.objectives.vimco: num_particles must be at least 2.")

    def __call__(self, p: Any, q: Any) -> Any:
        n = self.num_particles

        def one(_):
            z, _ = q.propose(detached=True)
            return p(z), q(z)

        log_p, log_q = jax.vmap(one)(jnp.arange(n))
        log_w = log_p - log_q
        bound = _mean_weight(log_w)
        others = (jnp.sum(log_w) - log_w) / (n - 1)
        without = jax.vmap(lambda k: _mean_weight(log_w.at[k].set(others[k])))(jnp.arange(n))
        signal = stop(bound - without)
        return bound + jnp.sum(signal * zero_valued(log_q))


@dataclasses.dataclass(frozen=True)
class fivo:
    """The bound of a particle filter, `E log Z_hat`, for models with a `lax.scan` that has data.

    `Z_hat` is the filter's unbiased estimate of the evidence, so its log is a lower bound on
    average, which rises with the number of particles and is tight far beyond `iwelbo` for long
    series (Maddison et al., "Filtering variational objectives", 2017; Naesseth et al., 2018; Le et
    al., 2018). Fitted are the parameters of the model and of the filter's proposals:
    `ab.vi(guide=step, objective=ab.objectives.fivo(16))`, where `step(given, carry, x)` is a Model
    called at each step of the scan as in `ab.smc(proposal=step)`; without `guide=`, particles come
    from the model.

    The posterior of the fit is that of `ab.smc` at the fitted parameters with `num_samples`
    particles; `post.as_model()` is the fitted proposal, and its `initial` that of `initial=`.

    Args:
        num_particles: `N`.
        initial: A Model `initial(given, *args)` of latents outside of the scan, or None.
        resampler, threshold: As of `ab.smc`; None: 'systematic' and 0.5, with
            `resampling_gradient` 'multinomial' and 1. Threshold 0 never resamples, which makes the
            bound that of `iwelbo`.
        resampling_gradient: By default the derivative holds the ancestors that resampling chooses
            fixed: it is **biased**, of low variance, and what is used in practice. True adds the
            score of the ancestors, which makes it unbiased, and noisy. That needs independent
            ancestors at fixed times: 'multinomial', and a threshold of 1 or 0.

    Raises (on use):
        InvalidAlgorithm: The model has no scan with data.
        DiscreteLatent: A latent is discrete, so its draw has no path to follow.
    """

    num_particles: int = 16
    initial: Any = None
    resampler: str | None = None
    threshold: float | None = None
    resampling_gradient: bool = False

    def __post_init__(self):
        _count("fivo", "num_particles", self.num_particles)
        scored = self.resampling_gradient
        if self.resampler is None:
            object.__setattr__(self, "resampler", "multinomial" if scored else "systematic")
        if self.threshold is None:
            object.__setattr__(self, "threshold", 1.0 if scored else 0.5)
        Resampling(str(self.resampler), self.threshold or 0.0)  # checks them
        if scored and (self.resampler != "multinomial" or self.threshold not in (0, 1)):
            raise InvalidAlgorithm(
                f"ab.objectives.fivo: resampling_gradient=True needs resampler='multinomial' and "
                f"threshold=1 (or 0), got {self.resampler!r} and {self.threshold}: of other "
                f"schemes the ancestors have no simple score, and when to resample would jump."
            )
        if self.initial is not None and not isinstance(self.initial, Model):
            raise InvalidAlgorithm(
                f"ab.objectives.fivo: initial= takes a Model, got {type(self.initial).__name__}. "
                f"Decorate the function with @ab.model."
            )

    def __call__(self, p: Any, q: Any) -> Any:
        return p.log_evidence(self, q)


@dataclasses.dataclass(frozen=True)
class mmd:
    """Maximum mean discrepancy between an amortized guide and the posterior, from simulations.

    Neither the model nor the guide needs a density: either may be a `dist.Simulator`. Each step
    draws latents `z` and data `x` from the model and some `u_i` from the guide given `x`, and
    raises the kernel score `2 mean_i k(u_i, z) - mean_(i != j) k(u_i, u_j)`. Its mean is, up to a
    constant, minus the squared discrepancy between the guide and the posterior given `x`, averaged
    over the model's data, so that it is largest where the two agree; gradients are unbiased
    (Gretton et al. 2012; Gneiting and Raftery 2007, section 5; Pacchiardi and Dutta,
    "Likelihood-free inference with generative neural networks via scoring rule minimization",
    2022). The guide has to be a function of the data that it is given; parameters of the model do
    not move. Observed values enter after the fit.

    Each number of a latent is divided by its standard deviation over the other simulations of the
    step.

    Args:
        num_particles: Draws of the guide for each simulation, at least 2.
        num_simulations: Pairs of latents and data at each step, at least 3.
        kernel: 'energy', `k(u, z) = -|u - z|`, whose discrepancy is the energy distance, for laws
            with a mean; or 'gaussian', `exp(-|u - z|^2 / 2 h^2)`, which is bounded.
        bandwidth: `h`, in standard deviations.

    Raises (on use):
        InvalidAlgorithm: Data are observed in the program (`obs=`), so that they cannot be
            simulated.
    """

    num_particles: int = 8
    num_simulations: int = 64
    kernel: str = "energy"
    bandwidth: float = 1.0
    simulates = True

    def __post_init__(self):
        for field, least in (("num_particles", 2), ("num_simulations", 3)):
            if _count("mmd", field, getattr(self, field)) < least:
                raise InvalidAlgorithm(f"ab.objectives.mmd: {field} must be at least {least}.")
        if self.kernel not in ("energy", "gaussian"):
            raise InvalidAlgorithm(
                f"ab.objectives.mmd: kernel={self.kernel!r}; there are 'energy' and 'gaussian'."
            )
        if not self.bandwidth > 0:
            raise InvalidAlgorithm(
                f"ab.objectives.mmd: bandwidth must be positive, got {self.bandwidth!r}."
            )

    def __call__(self, p: Any, q: Any) -> Any:
        m, n = self.num_particles, self.num_simulations

        def one(_):
            z, data = p.simulate()
            return _flat(z), jax.vmap(lambda _: _flat(q.draw(data)))(jnp.arange(m))

        z, u = jax.vmap(one)(jnp.arange(n))
        # of the others alone: the score of a pair stays proper
        mean = (jnp.sum(z, 0) - z) / (n - 1)
        square = (jnp.sum(z**2, 0) - z**2) / (n - 1)
        variance = stop(square - mean**2)
        scale = jnp.where(variance > 0, variance, 1.0) ** -0.5
        to_truth = jax.vmap(jax.vmap(self._k, (0, None, None)))(u, z, scale)
        first, second = np.triu_indices(m, 1)
        among = jax.vmap(jax.vmap(self._k, (0, 0, None)))(u[:, first], u[:, second], scale)
        return 2 * jnp.mean(to_truth) - jnp.mean(among)

    def _k(self, a: Any, b: Any, scale: Any) -> Any:
        square = jnp.sum(((a - b) * scale) ** 2)
        if self.kernel == "gaussian":
            return jnp.exp(-0.5 * square / self.bandwidth**2)
        apart = square > 0  # equal draws of a discrete latent: no derivative of the root
        return -jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)


def _flat(z: Any) -> Any:
    """All latents as one vector."""
    return jnp.concatenate([jnp.ravel(z[a]).astype(jnp.result_type(float)) for a in sorted(z)])


@dataclasses.dataclass(frozen=True)
class iwhvi:
    """A guide with auxiliary choices, which are summed out by importance sampling.

    The guide may have latents that the model has not. Their density is estimated with
    `num_auxiliary` draws from `reverse(z, *args)`, one of them the guide's own (Sobolev and Vetrov
    2019); one draw is hierarchical variational inference.

    Args:
        num_auxiliary: `M`, the number of draws.
        reverse: A Model `reverse(z, *args)` of the auxiliary choices given the latents; None: the
            guide's own law of them.
    """

    num_auxiliary: int = 5
    reverse: Any = None

    def __post_init__(self):
        _count("iwhvi", "num_auxiliary", self.num_auxiliary)

    def __call__(self, p: Any, q: Any) -> Any:
        return elbo()(p, q.marginal(self.num_auxiliary, self.reverse))


def hvi(reverse: Any = None) -> iwhvi:
    """Hierarchical variational inference: `iwhvi` with one draw (Ranganath et al. 2016).

    Args:
        reverse: As of `iwhvi`.
    """
    return iwhvi(1, reverse)


@dataclasses.dataclass(frozen=True)
class diwhvi:
    """Doubly importance-weighted: `iwelbo` over the marginal guide of `iwhvi`.

    Args:
        num_particles: Draws of the latents.
        num_auxiliary, reverse: As of `iwhvi`.
    """

    num_particles: int = 5
    num_auxiliary: int = 5
    reverse: Any = None

    def __post_init__(self):
        _count("diwhvi", "num_particles", self.num_particles)
        _count("diwhvi", "num_auxiliary", self.num_auxiliary)

    def __call__(self, p: Any, q: Any) -> Any:
        return iwelbo(self.num_particles)(p, q.marginal(self.num_auxiliary, self.reverse))
