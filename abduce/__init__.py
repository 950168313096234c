"""abduce: a probabilistic programming language on JAX with amortized inference.

Write a model as an ordinary Python/JAX function, swap the inference algorithm with a decorator.

Example:
    >>> import jax, jax.numpy as jnp, abduce as ab, abduce.dist as dist
    >>> @ab.nuts(num_samples=1000)
    ... @ab.model
    ... def coin(n):
    ...     p = ab.sample("p", dist.Beta(1, 1))
    ...     return ab.sample("heads", dist.Binomial(n, probs=p))
    >>> post = coin.posterior(jax.random.key(0), 10, given={"heads": 7})
"""

from importlib.metadata import PackageNotFoundError as _NotFound
from importlib.metadata import version as _version

from abduce import amortized, dist
from abduce.amortized import checks
from abduce.amortized.checks import sbc
from abduce.amortized.distribution_transformer import distribution_transformer
from abduce.amortized.nle import nle, nre
from abduce.amortized.npe import fmpe, npe, npse
from abduce.amortized.pfn import pfn
from abduce.errors import (
    AbduceError,
    AbduceWarning,
    Degenerate,
    DiscreteLatent,
    DuplicateAddress,
    InitializationError,
    InvalidAlgorithm,
    InvalidModel,
    InvalidValue,
    MissingData,
    MissingKey,
    NoDensity,
    NotFitted,
    OutsideModel,
    UnknownAddress,
)
from abduce.inference import init
from abduce.inference.algorithm import Algorithm
from abduce.inference.estimated import marginal, normalize
from abduce.inference.importance import importance
from abduce.inference.laplace import laplace
from abduce.inference.mcmc.algorithms import hmc, nuts
from abduce.inference.mcmc.mh import mh
from abduce.inference.posterior import Posterior
from abduce.inference.smc import guiding
from abduce.inference.smc.algorithms import smc
from abduce.inference.smc.ensemble import ensemble_kalman
from abduce.inference.smc.guided import guided
from abduce.inference.smc.particle_gibbs import particle_gibbs
from abduce.inference.smc.pmmh import pmmh
from abduce.inference.smc.smc2 import smc2
from abduce.inference.smc.steering import steer
from abduce.inference.smc.steering_checks import check_potential
from abduce.inference.vi import flows, grad, guides, objectives
from abduce.inference.vi.algorithm import vi
from abduce.inference.vi.expectation import expectation
from abduce.inference.vi.gaussian import gaussian_vi
from abduce.inference.vi.pathfinder import pathfinder
from abduce.loading import load
from abduce.ppl.bridge import from_numpyro
from abduce.ppl.graph import Graph, graph
from abduce.ppl.inside import log_density, propose
from abduce.ppl.language import deterministic, factor, sample, scaled, scope, while_loop
from abduce.ppl.masked import masked
from abduce.ppl.model import Model, model
from abduce.ppl.parameters import param
from abduce.ppl.reparam import bijection, noncentered
from abduce.ppl.selection import sel
from abduce.ppl.trace import Trace
from abduce.ppl.transforms import condition, do, reparam, with_prior

try:
    __version__ = _version("abduce")
except _NotFound:  # run from a checkout that is not installed
    __version__ = "0.0.0"

__all__ = [
    "AbduceError",
    "AbduceWarning",
    "Algorithm",
    "Degenerate",
    "DiscreteLatent",
    "DuplicateAddress",
    "Graph",
    "InitializationError",
    "InvalidAlgorithm",
    "InvalidModel",
    "InvalidValue",
    "MissingData",
    "MissingKey",
    "Model",
    "NoDensity",
    "NotFitted",
    "OutsideModel",
    "Posterior",
    "Trace",
    "UnknownAddress",
    "amortized",
    "bijection",
    "check_potential",
    "checks",
    "condition",
    "deterministic",
    "dist",
    "distribution_transformer",
    "do",
    "ensemble_kalman",
    "expectation",
    "factor",
    "flows",
    "fmpe",
    "from_numpyro",
    "gaussian_vi",
    "grad",
    "graph",
    "guided",
    "guides",
    "guiding",
    "hmc",
    "importance",
    "init",
    "laplace",
    "load",
    "log_density",
    "marginal",
    "masked",
    "mh",
    "model",
    "nle",
    "noncentered",
    "normalize",
    "npe",
    "npse",
    "nre",
    "nuts",
    "objectives",
    "param",
    "particle_gibbs",
    "pathfinder",
    "pfn",
    "pmmh",
    "propose",
    "reparam",
    "sample",
    "sbc",
    "scaled",
    "scope",
    "sel",
    "smc",
    "smc2",
    "steer",
    "vi",
    "while_loop",
    "with_prior",
]
