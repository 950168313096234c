"""Every strategy in every structure: the mean of many gradient estimates is the exact gradient.

False alarms: each test compares one mean at 4.5 standard errors, 7e-6.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unbiased import (
    Bernoulli,
    Categorical,
    Gamma,
    Mixture,
    Normal,
    Poisson,
    VonMises,
    exact,
    exact_gradient,
    program,
)

import abduce as ab

CASES = {
    "reparam-normal": (Normal(), ab.grad.reparam()),
    "implicit-gamma": (Gamma(), ab.grad.implicit()),
    "implicit-vonmises": (VonMises(), ab.grad.implicit()),
    "implicit-mixture": (Mixture(), ab.grad.implicit()),
    "rsvi-gamma": (Gamma(), ab.grad.rsvi()),
    "score-bernoulli": (Bernoulli(), ab.grad.score()),
    "score-normal": (Normal(), ab.grad.score()),
    "enum-bernoulli": (Bernoulli(), ab.grad.enum()),
    "enum-in-turn-categorical": (Categorical(), ab.grad.enum(max_joint=1)),
    "mvd-categorical": (Categorical(), ab.grad.mvd()),
    "mvd-poisson": (Poisson(), ab.grad.mvd()),
    "mvd-normal": (Normal(), ab.grad.mvd()),
    "mvd-gamma": (Gamma(), ab.grad.mvd()),
    "default-poisson": (Poisson(), None),
}
STRUCTURES = ["plain", "vmap", "scan", "cond"]
T = 0.7


def check(case, structure, num_sites, n):
    family, grad = CASES[case]
    f = program(family, grad, structure, num_sites)
    run = jax.jit(jax.vmap(lambda k: f.value_and_grad(k, jnp.asarray(T))))
    values, grads = (np.asarray(x) for x in run(jax.random.split(jax.random.key(7), n)))
    for got, want in (
        (values, exact(family, structure, num_sites, T)),
        (grads, exact_gradient(family, structure, num_sites, T)),
    ):
        se = got.std() / np.sqrt(n)
        assert abs(got.mean() - want) <= 4.5 * se + 1e-7, (got.mean(), want, se)
    return grads


# Each case in one of the structures; the slow test has them all.
SOME = [(case, STRUCTURES[i % 4]) for i, case in enumerate(CASES)]


@pytest.mark.parametrize(("case", "structure"), SOME)
def test_three_dependent_choices(case, structure, x64):
    check(case, structure, 3, 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("num_sites", [1, 3])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("case", CASES)
def test_a_hundred_thousand_estimates(case, structure, num_sites, x64):
    check(case, structure, num_sites, 100_000)
