"""Every family of `numpyro.distributions` that has a density, as data for the tests.

`FAMILIES[name] = Family(make, params, ...)`: `make(*params_i)` builds one distribution and every
array in `params` has a leading axis of length 3, over which tests map.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as nd
from numpyro.distributions import constraints, transforms

LENGTH = 3
SPD = np.array([[2.0, 0.3], [0.3, 1.0]])
TRIL = np.linalg.cholesky(SPD)


@dataclass(frozen=True)
class Family:
    """One construction.

    Attributes:
        make: Builds the distribution from one slice of each of `params`.
        params: Arrays of shape `(3, ...)`.
        batchable: Whether `make(*params)` is the same with a batch axis.
        has_sampler: Whether it can be drawn from (an improper density cannot).
        value: For a family without a sampler, three values stacked.
        covers: Classes of `numpyro.distributions` that this covers beyond `type(make(...))`.
    """

    make: Callable
    params: tuple
    batchable: bool = True
    has_sampler: bool = True
    value: np.ndarray | None = None
    covers: tuple[str, ...] = ()

    def element(self, i):
        """Returns the i-th distribution, unmapped."""
        return self.make(*(p[i] for p in self.params))


LOC = np.array([-0.5, 0.2, 1.3])
POS = np.array([0.7, 1.4, 2.2])
POS2 = np.array([1.9, 0.8, 1.1])
PROB = np.array([0.3, 0.5, 0.8])
LOGIT = np.array([-0.7, 0.1, 1.2])
VEC = np.array([[0.1, -0.3, 0.5], [1.0, 0.2, -0.4], [-0.6, 0.8, 0.3]])
SIMPLEX = np.array([[0.2, 0.3, 0.5], [0.6, 0.1, 0.3], [0.25, 0.25, 0.5]])
PAIR = np.array([[0.4, -0.1], [0.0, 0.9], [-1.2, 0.5]])
COUNT = np.array([4, 7, 5])
CHOLS = np.stack([TRIL, 1.5 * TRIL, np.array([[0.5, 0.0], [-0.2, 0.9]])])
CORR = np.array([[1.0, 0.4], [0.4, 1.0]])
ADJ = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])


def _sde(x, t):
    return -0.5 * x, 0.3 * jnp.ones_like(x)


FAMILIES: dict[str, Family] = {
    # the real line
    "Normal": Family(nd.Normal, (LOC, POS)),
    "Cauchy": Family(nd.Cauchy, (LOC, POS)),
    "Laplace": Family(nd.Laplace, (LOC, POS)),
    "Logistic": Family(nd.Logistic, (LOC, POS)),
    "Gumbel": Family(nd.Gumbel, (LOC, POS)),
    "StudentT": Family(nd.StudentT, (POS + 2.0, LOC, POS2)),
    "SoftLaplace": Family(nd.SoftLaplace, (LOC, POS)),
    "AsymmetricLaplace": Family(nd.AsymmetricLaplace, (LOC, POS, POS2)),
    "AsymmetricLaplaceQuantile": Family(nd.AsymmetricLaplaceQuantile, (LOC, POS, PROB)),
    # half lines and intervals
    "Exponential": Family(nd.Exponential, (POS,)),
    "Gamma": Family(nd.Gamma, (POS, POS2)),
    "Chi2": Family(nd.Chi2, (POS + 1.0,)),
    "InverseGamma": Family(nd.InverseGamma, (POS + 1.0, POS2)),
    "HalfNormal": Family(nd.HalfNormal, (POS,)),
    "HalfCauchy": Family(nd.HalfCauchy, (POS,)),
    "LogNormal": Family(nd.LogNormal, (LOC, POS)),
    "LogUniform": Family(nd.LogUniform, (POS, POS + 3.0)),
    "Weibull": Family(nd.Weibull, (POS, POS2)),
    "Gompertz": Family(nd.Gompertz, (POS, POS2)),
    "Dagum": Family(nd.Dagum, (POS, POS2, POS + 1.0)),
    "Pareto": Family(nd.Pareto, (POS, POS2 + 1.0)),
    "Levy": Family(nd.Levy, (LOC, POS)),
    "Uniform": Family(nd.Uniform, (LOC, LOC + POS)),
    "Beta": Family(nd.Beta, (POS, POS2)),
    "BetaProportion": Family(nd.BetaProportion, (PROB, POS + 2.0)),
    "Kumaraswamy": Family(nd.Kumaraswamy, (POS, POS2)),
    "RelaxedBernoulliLogits": Family(lambda t, lo: nd.RelaxedBernoulli(t, logits=lo), (POS, LOGIT)),
    "FoldedDistribution": Family(lambda m, s: nd.FoldedDistribution(nd.Normal(m, s)), (LOC, POS)),
    # truncated
    "TruncatedNormal/low": Family(
        lambda m, s, a: nd.TruncatedNormal(m, s, low=a), (LOC, POS, LOC - 0.3)
    ),
    "TruncatedNormal/high": Family(
        lambda m, s, b: nd.TruncatedNormal(m, s, high=b), (LOC, POS, LOC + 0.4)
    ),
    "TruncatedNormal/both": Family(
        lambda m, s, a, b: nd.TruncatedNormal(m, s, low=a, high=b), (LOC, POS, LOC - 1, LOC + 0.4)
    ),
    "TruncatedCauchy": Family(
        lambda m, s, a: nd.TruncatedCauchy(m, s, low=a), (LOC, POS, LOC - 0.3)
    ),
    "TruncatedDistribution/Logistic": Family(
        lambda m, s, a, b: nd.TruncatedDistribution(nd.Logistic(m, s), a, b),
        (LOC, POS, LOC - 1.0, LOC + 2.0),
    ),
    "LeftTruncatedGamma": Family(
        lambda a, b, lo: nd.LeftTruncatedGamma(nd.Gamma(a, b), lo), (POS, POS2, PROB)
    ),
    "RightTruncatedGamma": Family(
        lambda a, b, hi: nd.RightTruncatedGamma(nd.Gamma(a, b), hi), (POS, POS2, POS + 1.0)
    ),
    "TwoSidedTruncatedGamma": Family(
        lambda a, b, lo, hi: nd.TwoSidedTruncatedGamma(nd.Gamma(a, b), lo, hi),
        (POS, POS2, PROB, POS + 1.0),
    ),
    "LowerTruncatedPowerLaw": Family(nd.LowerTruncatedPowerLaw, (-POS - 1.2, POS2)),
    "DoublyTruncatedPowerLaw": Family(nd.DoublyTruncatedPowerLaw, (-POS - 1.2, POS2, POS2 + 2.0)),
    "TruncatedPolyaGamma": Family(
        lambda z: nd.TransformedDistribution(
            nd.TruncatedPolyaGamma(),
            transforms.AffineTransform(0.0, z, domain=constraints.positive),
        ),
        (POS,),
        batchable=False,
        covers=("TruncatedPolyaGamma",),
    ),
    # discrete
    "BernoulliProbs": Family(lambda p: nd.Bernoulli(probs=p), (PROB,)),
    "BernoulliLogits": Family(lambda lo: nd.Bernoulli(logits=lo), (LOGIT,)),
    "BinomialProbs": Family(lambda n, p: nd.Binomial(n, probs=p), (COUNT, PROB)),
    "BinomialLogits": Family(lambda n, lo: nd.Binomial(n, logits=lo), (COUNT, LOGIT)),
    "BetaBinomial": Family(lambda a, b, n: nd.BetaBinomial(a, b, n), (POS, POS2, COUNT)),
    "BetaNegativeBinomial": Family(nd.BetaNegativeBinomial, (POS + 2, POS2, POS + 1)),
    "CategoricalProbs": Family(lambda p: nd.Categorical(probs=p), (SIMPLEX,)),
    "CategoricalLogits": Family(lambda lo: nd.Categorical(logits=lo), (VEC,)),
    "OrderedLogistic": Family(nd.OrderedLogistic, (LOC, np.sort(VEC, -1))),
    "DiscreteUniform": Family(nd.DiscreteUniform, (np.array([0, 2, -3]), np.array([4, 3, 1]))),
    "GeometricProbs": Family(lambda p: nd.Geometric(probs=p), (PROB,)),
    "GeometricLogits": Family(lambda lo: nd.Geometric(logits=lo), (LOGIT,)),
    "Poisson": Family(nd.Poisson, (POS + 2.0,)),
    "GammaPoisson": Family(nd.GammaPoisson, (POS, POS2)),
    "NegativeBinomial2": Family(nd.NegativeBinomial2, (POS, POS2)),
    "NegativeBinomialProbs": Family(
        lambda n, p: nd.NegativeBinomial(n, probs=p), (POS + 1.0, PROB)
    ),
    "NegativeBinomialLogits": Family(
        lambda n, lo: nd.NegativeBinomial(n, logits=lo), (POS + 1.0, LOGIT)
    ),
    "ZeroInflatedPoisson": Family(nd.ZeroInflatedPoisson, (PROB, POS + 1.0)),
    "ZeroInflatedProbs": Family(
        lambda g, r: nd.ZeroInflatedDistribution(nd.Poisson(r), gate=g), (PROB, POS + 1.0)
    ),
    "ZeroInflatedLogits": Family(
        lambda g, r: nd.ZeroInflatedDistribution(nd.Poisson(r), gate_logits=g), (LOGIT, POS + 1.0)
    ),
    "HurdlePoisson": Family(nd.HurdlePoisson, (PROB, POS + 1.0)),
    "HurdleProbs": Family(
        lambda g, r: nd.HurdleDistribution(nd.Poisson(r), gate=g), (PROB, POS + 1.0)
    ),
    "HurdleLogits": Family(
        lambda g, r: nd.HurdleDistribution(nd.Poisson(r), gate_logits=g), (LOGIT, POS + 1.0)
    ),
    "HurdleGamma": Family(nd.HurdleGamma, (PROB, POS, POS2)),
    "HurdleLogNormal": Family(nd.HurdleLogNormal, (PROB, LOC, POS)),
    "Multinomial/probs": Family(lambda p: nd.Multinomial(6, probs=p), (SIMPLEX,)),
    "Multinomial/logits": Family(lambda lo: nd.Multinomial(6, logits=lo), (VEC,)),
    "DirichletMultinomial": Family(lambda a: nd.DirichletMultinomial(a, 5), (3 * SIMPLEX,)),
    # vectors and matrices
    "MultivariateNormal/tril": Family(
        lambda m, tril: nd.MultivariateNormal(m, scale_tril=tril), (PAIR, CHOLS)
    ),
    "MultivariateNormal/covariance": Family(
        lambda m, s: nd.MultivariateNormal(m, covariance_matrix=s), (PAIR, POS[:, None, None] * SPD)
    ),
    "MultivariateNormal/precision": Family(
        lambda m, s: nd.MultivariateNormal(m, precision_matrix=s), (PAIR, POS[:, None, None] * SPD)
    ),
    "MultivariateNormal/shared-covariance": Family(
        lambda m: nd.MultivariateNormal(m, covariance_matrix=SPD), (PAIR,)
    ),
    "MultivariateStudentT": Family(
        lambda v, m, tril: nd.MultivariateStudentT(v, m, tril), (POS + 2, PAIR, CHOLS)
    ),
    "LowRankMultivariateNormal": Family(
        lambda m, d: nd.LowRankMultivariateNormal(m, np.array([[0.5], [0.2], [-0.4]]), d),
        (VEC, np.exp(VEC)),
    ),
    "CirculantNormal": Family(
        lambda m: nd.CirculantNormal(m, covariance_row=np.array([1.0, 0.4, 0.4])), (VEC,)
    ),
    "GaussianRandomWalk": Family(lambda s: nd.GaussianRandomWalk(s, 4), (POS,)),
    "GaussianStateSpace": Family(
        lambda tril: nd.GaussianStateSpace(3, np.array([[0.9, 0.1], [0.0, 0.7]]), scale_tril=tril),
        (CHOLS,),
        batchable=False,
    ),
    "ZeroSumNormal": Family(lambda s: nd.ZeroSumNormal(s, (3,)), (POS,), batchable=False),
    "CAR": Family(lambda m, r, t: nd.CAR(m, r, t, ADJ), (VEC, PROB, POS)),
    "EulerMaruyama": Family(
        lambda m: nd.EulerMaruyama(np.linspace(0.0, 1.0, 4), _sde, nd.Normal(m, 1.0)),
        (LOC,),
        batchable=False,
    ),
    "MatrixNormal": Family(
        lambda m, row: nd.MatrixNormal(m, row, np.eye(3)),
        (np.stack([VEC[:2], 2 * VEC[:2], VEC[1:]]), CHOLS),
    ),
    "Dirichlet": Family(nd.Dirichlet, (4 * SIMPLEX,)),
    "ProjectedNormal": Family(nd.ProjectedNormal, (PAIR,)),
    "LKJ": Family(lambda eta: nd.LKJ(3, eta), (POS,)),
    "LKJCholesky": Family(lambda eta: nd.LKJCholesky(3, eta), (POS,)),
    "LKJCholesky/cvine": Family(lambda eta: nd.LKJCholesky(3, eta, "cvine"), (POS,)),
    "Wishart": Family(lambda v: nd.Wishart(v, scale_matrix=SPD), (POS + 2.0,)),
    "WishartCholesky": Family(
        lambda v, tril: nd.WishartCholesky(v, scale_tril=tril), (POS + 2.0, CHOLS)
    ),
    "InverseWishart": Family(lambda v: nd.InverseWishart(v, scale_matrix=SPD), (POS + 3.0,)),
    "InverseWishartCholesky": Family(
        lambda v: nd.InverseWishartCholesky(v, scale_matrix=SPD), (POS + 3.0,)
    ),
    "GaussianCopula": Family(
        lambda m: nd.GaussianCopula(nd.Normal(m, 1.2), correlation_matrix=CORR),
        (PAIR,),
        batchable=False,
    ),
    # directions
    "VonMises": Family(nd.VonMises, (LOC, POS)),
    "SineBivariateVonMises": Family(
        lambda a, b, k: nd.SineBivariateVonMises(a, b, k, k + 1.0, correlation=0.3),
        (LOC, LOGIT, POS),
    ),
    "SineSkewed": Family(
        lambda m, k, s: nd.SineSkewed(nd.VonMises(m, k).expand((1,)).to_event(1), s[None]),
        (LOC, POS, LOGIT / 3.0),
        batchable=False,
    ),
    # built from others
    "Delta": Family(lambda v, w: nd.Delta(v, w), (LOC, LOGIT)),
    "Delta/event": Family(lambda v: nd.Delta(v, event_dim=1), (PAIR,)),
    "Unit": Family(lambda w: nd.Unit(w), (LOGIT,)),
    "Independent": Family(lambda m, s: nd.Normal(m, s[..., None]).to_event(1), (VEC, POS)),
    "ExpandedDistribution": Family(lambda m: nd.Normal(m, 1.5).expand((4,)), (LOC,), False),
    "ExpandedDistribution/event": Family(
        lambda m: nd.Normal(m, 1.5).expand((4,)).to_event(1), (LOC,), False
    ),
    "MaskedDistribution": Family(
        lambda m: nd.Normal(m, 1.0).mask(np.array([True, False, True])), (VEC,)
    ),
    "MixtureSameFamily": Family(
        lambda w, m: nd.MixtureSameFamily(nd.Categorical(probs=w), nd.Normal(m, 0.7)),
        (SIMPLEX, VEC),
    ),
    "MixtureSameFamily/vector": Family(
        lambda w, m: nd.MixtureSameFamily(
            nd.Categorical(probs=w), nd.Normal(m[..., None] * np.ones(2), 0.7).to_event(1)
        ),
        (SIMPLEX, VEC),
    ),
    "MixtureGeneral": Family(
        lambda w, m, s: nd.MixtureGeneral(
            nd.Categorical(probs=w), [nd.Normal(m, s), nd.Laplace(m, 1.0), nd.Cauchy(0.0 * m, s)]
        ),
        (SIMPLEX, LOC, POS),
    ),
    "TransformedDistribution/exp": Family(
        lambda m, s: nd.TransformedDistribution(nd.StudentT(4.0, m, s), transforms.ExpTransform()),
        (LOC, POS),
    ),
    "TransformedDistribution/composed": Family(
        lambda m, s: nd.TransformedDistribution(
            nd.Normal(0.0, 1.0), [transforms.AffineTransform(m, s), transforms.SigmoidTransform()]
        ),
        (LOC, POS),
        batchable=False,
    ),
    "TransformedDistribution/ordered": Family(
        lambda m: nd.TransformedDistribution(
            nd.Normal(m, 1.0).to_event(1), transforms.OrderedTransform()
        ),
        (VEC,),
    ),
    "ImproperUniform/real": Family(
        lambda _: nd.ImproperUniform(constraints.real, (), ()), (LOC,), False, False, LOC
    ),
    "ImproperUniform/ordered": Family(
        lambda _: nd.ImproperUniform(constraints.ordered_vector, (), (3,)),
        (LOC,),
        False,
        False,
        np.sort(VEC, -1),
    ),
    "ImproperUniform/batched": Family(
        lambda _: nd.ImproperUniform(constraints.positive, (2,), ()),
        (LOC,),
        False,
        False,
        np.exp(PAIR),
    ),
    # censored data: a density of the observed value and its censoring flag
    "LeftCensoredDistribution": Family(
        lambda m, c: nd.LeftCensoredDistribution(nd.Normal(m, 1.0), c),
        (LOC, np.array([True, False, True])),
    ),
    "RightCensoredDistribution": Family(
        lambda m, c: nd.RightCensoredDistribution(nd.Normal(m, 1.0), c),
        (LOC, np.array([True, False, True])),
    ),
    "IntervalCensoredDistribution": Family(
        lambda m: nd.IntervalCensoredDistribution(
            nd.Normal(m, 1.0), left_censored=np.array(False), right_censored=np.array(False)
        ),
        (LOC,),
        batchable=False,
        has_sampler=False,
        value=np.stack([LOC - 0.5, LOC + 0.5], -1),
    ),
    "GaussianCopulaBeta": Family(
        lambda a, b: nd.GaussianCopulaBeta(a, b, correlation_matrix=CORR),
        (np.exp(PAIR), np.exp(PAIR[::-1])),
        batchable=False,
        has_sampler=False,  # its quantile function needs a package that is no dependency
        value=np.array([[0.3, 0.6], [0.7, 0.2], [0.45, 0.5]]),
    ),
}
