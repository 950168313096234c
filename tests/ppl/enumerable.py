"""Models whose every outcome can be listed, so that laws about weights are checked exactly.

Each has finitely many latent configurations; `outcomes()` lists them as choice maps and
`weight(choices)` is the joint probability with the data, by hand. `evidence` is their sum.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import abduce as ab
import abduce.dist as dist

__all__ = ["ENUMERABLE", "Enumerable"]


@dataclass(frozen=True)
class Enumerable:
    """A finite model.

    Attributes:
        program: The model's function; the data are given under `given`.
        given: Observations.
        latents: Address to shape; every latent takes integers.
        sizes: Address to the number of values.
        prior: `choices -> probability of the latents`, by hand.
        likelihood: `choices -> density of the data`, by hand.
    """

    program: Callable
    given: dict
    latents: dict
    sizes: dict
    prior: Callable
    likelihood: Callable

    def outcomes(self):
        cells = [(a, i) for a, shape in self.latents.items() for i in np.ndindex(*shape)]
        for values in itertools.product(*(range(self.sizes[a]) for a, _ in cells)):
            choices = {a: np.zeros(shape, int) for a, shape in self.latents.items()}
            for (a, i), v in zip(cells, values, strict=True):
                choices[a][i] = v
            yield choices

    def weight(self, choices) -> float:
        prior = self.prior(choices)
        return float(prior * self.likelihood(choices)) if prior > 0 else 0.0

    @property
    def evidence(self) -> float:
        return sum(self.weight(c) for c in self.outcomes())


ENUMERABLE: dict[str, Enumerable] = {}


# -- three sites and an observation ----------------------------------------------------------

_K = np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])


def _small():
    a = ab.sample("a", dist.Bernoulli(0.3))
    k = ab.sample("k", dist.Categorical(jnp.asarray(_K)[a]))
    b = ab.sample("b", dist.Bernoulli(0.2 + 0.3 * k))
    ab.sample("y", dist.Normal(a + k - b, 1.0))


ENUMERABLE["small"] = Enumerable(
    _small,
    {"y": 0.9},
    {"a": (), "k": (), "b": ()},
    {"a": 2, "k": 3, "b": 2},
    lambda c: (
        stats.bernoulli.pmf(c["a"], 0.3)
        * _K[int(c["a"]), int(c["k"])]
        * stats.bernoulli.pmf(c["b"], 0.2 + 0.3 * c["k"])
    ),
    lambda c: stats.norm.pdf(0.9, c["a"] + c["k"] - c["b"], 1.0),
)


# -- a chain in a scan, with a factor --------------------------------------------------------

_YS = np.array([0.3, 1.2, -0.4, 1.5])


def _chain():
    def step(z, t):
        z = ab.sample("z", dist.Bernoulli(0.2 + 0.5 * z))
        ab.sample("y", dist.Normal(z, 0.8))
        ab.factor("f", 0.1 * z * t)
        return z * 1.0, None

    jax.lax.scan(step, 0.0, jnp.arange(4))


def _chain_prior(c):
    p, z = 1.0, 0
    for t in range(4):
        p *= stats.bernoulli.pmf(c["z"][t], 0.2 + 0.5 * z)
        z = c["z"][t]
    return p


ENUMERABLE["chain"] = Enumerable(
    _chain,
    {"y": _YS},
    {"z": (4,)},
    {"z": 2},
    _chain_prior,
    lambda c: np.prod(stats.norm.pdf(_YS, c["z"], 0.8) * np.exp(0.1 * c["z"] * np.arange(4))),
)


# -- a branch under vmap: s exists only where r is true --------------------------------------


_YB = np.array([0.2, 1.0, 2.2])


def _branch():
    def element(i):
        r = ab.sample("r", dist.Bernoulli(0.3 + 0.1 * i))
        v = jax.lax.cond(
            r == 1,
            lambda: ab.sample("s", dist.Categorical(jnp.array([0.2, 0.3, 0.5]))) * 1.0,
            lambda: -1.0,
        )
        ab.sample("y", dist.Normal(v, 1.0))

    jax.vmap(element)(jnp.arange(3))


def _branch_prior(c):
    p = 1.0
    for i in range(3):
        p *= stats.bernoulli.pmf(c["r"][i], 0.3 + 0.1 * i)
        if c["r"][i]:
            p *= [0.2, 0.3, 0.5][c["s"][i]]
        elif c["s"][i]:
            return 0.0  # an inactive site has no value; list it once, as 0
    return p


ENUMERABLE["branch"] = Enumerable(
    _branch,
    {"y": _YB},
    {"r": (3,), "s": (3,)},
    {"r": 2, "s": 3},
    _branch_prior,
    lambda c: np.prod(stats.norm.pdf(_YB, np.where(c["r"] == 1, c["s"], -1.0), 1.0)),
)


# -- scopes, an inner jit and a scaled likelihood --------------------------------------------


@jax.jit
def _coin(p):
    return ab.sample("x", dist.Bernoulli(p))


def _tempered():
    with ab.scope("u"):
        u = _coin(0.4)
    with ab.scope("v"):
        v = _coin(0.2 + 0.5 * u)
    with ab.scaled(0.5):
        ab.sample("y", dist.Poisson(1.0 + u + 2.0 * v))


ENUMERABLE["tempered"] = Enumerable(
    _tempered,
    {"y": 3},
    {"u/x": (), "v/x": ()},
    {"u/x": 2, "v/x": 2},
    lambda c: (
        stats.bernoulli.pmf(c["u/x"], 0.4) * stats.bernoulli.pmf(c["v/x"], 0.2 + 0.5 * c["u/x"])
    ),
    lambda c: np.sqrt(stats.poisson.pmf(3, 1.0 + c["u/x"] + 2.0 * c["v/x"])),
)
