"""Programs with known gradients: three kinds of structure over any family, and exact expectations.

Each family gives a distribution from a parameter and the value before, and its expectation
operator by summation or quadrature. The exact gradient is the central difference of nested
expectations, in x64 (error below 1e-8).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

import abduce as ab
import abduce.dist as dist

HERMITE = np.polynomial.hermite_e.hermegauss(24)


class Bernoulli:
    def law(self, t, x):
        return dist.Bernoulli(logits=t + 0.8 * (x - 0.5))

    def mean(self, t, x, g):
        p = special.expit(t + 0.8 * (x - 0.5))
        return (1 - p) * g(0.0) + p * g(1.0)


class Categorical:
    probs = staticmethod(lambda np, t, x: np.stack([1.0 + 0 * t, t + 0.2 * x, 0.5 + 0 * t]))

    def law(self, t, x):
        p = jnp.stack([1.0 + 0 * t, t + 0.2 * x, 0.5 + 0 * t])
        return dist.Categorical(probs=p / p.sum())

    def mean(self, t, x, g):
        p = np.array([1.0, t + 0.2 * x, 0.5])
        return sum(q * g(float(k)) for k, q in enumerate(p / p.sum()))


class Poisson:
    def law(self, t, x):
        return dist.Poisson(t + 0.3 * x)

    def mean(self, t, x, g):
        rate = t + 0.3 * x
        ks = np.arange(int(rate + 12 * math.sqrt(rate) + 20))
        p = np.exp(ks * np.log(rate) - rate - special.gammaln(ks + 1))
        return sum(q * g(float(k)) for k, q in zip(ks, p, strict=True) if q > 1e-17)


class Normal:
    def law(self, t, x):
        return dist.Normal(t + 0.5 * x, 0.4 + 0.3 * t)

    def mean(self, t, x, g):
        nodes, weights = HERMITE
        total = weights.sum()
        scale = 0.4 + 0.3 * t
        return sum(
            w / total * g(t + 0.5 * x + scale * z) for z, w in zip(nodes, weights, strict=True)
        )


class Gamma:
    def law(self, t, x):
        return dist.Gamma(1.0 + t + 0.3 * x, 1.0 + 0.5 * t)

    def mean(self, t, x, g):
        a, rate = 1.0 + t + 0.3 * x, 1.0 + 0.5 * t
        nodes, weights = special.roots_genlaguerre(12, a - 1)
        return sum(w * g(z / rate) for z, w in zip(nodes, weights, strict=True)) / weights.sum()


class VonMises:
    """The cost sees the sine: a cost that is not periodic jumps where the angle wraps around."""

    def law(self, t, x):
        return dist.VonMises(t + 0.5 * x, 1.0 + t)

    def mean(self, t, x, g):
        loc, kappa = t + 0.5 * x, 1.0 + t
        z = np.linspace(-np.pi, np.pi, 48, endpoint=False)
        p = np.exp(kappa * np.cos(z - loc))
        return sum(q * g(math.sin(v)) for v, q in zip(z, p / p.sum(), strict=True))


class Mixture:
    def law(self, t, x):
        p = jax.nn.sigmoid(t)
        return dist.MixtureSameFamily(
            dist.Categorical(probs=jnp.stack([p, 1 - p])),
            dist.Normal(jnp.stack([t + 0.5 * x, -1.0 + 0 * x]), jnp.stack([0.5, 0.3 + 0.2 * t])),
        )

    def mean(self, t, x, g):
        p = special.expit(t)
        parts = [(p, t + 0.5 * x, 0.5), (1 - p, -1.0, 0.3 + 0.2 * t)]
        nodes, weights = np.polynomial.hermite_e.hermegauss(10)
        total = weights.sum()
        return sum(
            q * w / total * g(m + s * z)
            for q, m, s in parts
            for z, w in zip(nodes, weights, strict=True)
        )


def cost(lib, xs, t):
    """Smooth, not additive in the choices; bounded growth for the angle."""
    a, b, c = xs
    return (lib.sin(a) + 0.5 * b * a + 0.3 * c - 0.5) ** 2 + t * c


def single(lib, x, t):
    return (x - 0.3) ** 2 + t * lib.sin(x)


def program(family, grad, structure, num_sites):
    """An objective of one parameter."""

    def draw(name, t, x):
        x = ab.sample(name, family.law(t, x), grad=grad).astype(float)
        return jnp.sin(x) if isinstance(family, VonMises) else x

    def chain(t, x0, name=""):
        if num_sites == 1:
            return single(jnp, draw(f"a{name}", t, x0), t)
        a = draw(f"a{name}", t, x0)
        b = draw(f"b{name}", t, a)
        c = draw(f"c{name}", t, b)
        return cost(jnp, (a, b, c), t)

    def plain(t):
        return chain(t, 0.5)

    def mapped(t):
        f = jax.vmap(lambda x0: chain(t, x0))(jnp.array([0.2, 0.9]))
        return jnp.sum(f) + 0.1 * f[0] * f[1]

    def scanned(t):
        if num_sites == 1:

            def step(total, x0):
                f = single(jnp, draw("a", t, x0), t)
                return total + f, None

            total, _ = jax.lax.scan(step, 0.0, jnp.array([0.2, 0.9]))
            return total + 0.1 * total**2

        def step(x, _):
            x = draw("a", t, x)
            return x, x

        _, xs = jax.lax.scan(step, 0.5, None, length=3)
        return cost(jnp, xs, t)

    def branched(t):
        z = ab.sample("z", dist.Bernoulli(logits=t - 0.2), grad=flag_strategy(grad))
        return jax.lax.cond(
            z == 1, lambda: chain(t, 0.2, "0"), lambda: 1.5 * chain(t, 0.9, "1") + t
        )

    forms = {"plain": plain, "vmap": mapped, "scan": scanned, "cond": branched}
    return ab.expectation(forms[structure])


def flag_strategy(grad):
    return grad if isinstance(grad, (ab.grad.score, ab.grad.enum, ab.grad.mvd)) else ab.grad.score()


def exact(family, structure, num_sites, t):
    """The expectation of the program's value."""

    def chain(g, x0):
        """E[g(cost of a chain)]."""
        if num_sites == 1:
            return family.mean(t, x0, lambda x: g(single(np, x, t)))
        return family.mean(
            t, x0,
            lambda a: family.mean(
                t, a, lambda b: family.mean(t, b, lambda c: g(cost(np, (a, b, c), t)))
            ),
        )  # fmt: skip

    def same(f):
        return f

    if structure == "plain" or (structure == "scan" and num_sites == 3):
        return chain(same, 0.5)
    if structure == "vmap":
        u, v = chain(same, 0.2), chain(same, 0.9)
        return u + v + 0.1 * u * v
    if structure == "scan":
        u, v = chain(same, 0.2), chain(same, 0.9)
        u2, v2 = chain(np.square, 0.2), chain(np.square, 0.9)
        return u + v + 0.1 * (u2 + v2 + 2 * u * v)
    p = special.expit(t - 0.2)
    return p * chain(same, 0.2) + (1 - p) * (1.5 * chain(same, 0.9) + t)


def exact_gradient(family, structure, num_sites, t, h=1e-4):
    ends = [exact(family, structure, num_sites, t + s * h) for s in (-2, -1, 1, 2)]
    return (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * h)
