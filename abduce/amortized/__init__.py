"""Amortized inference: posteriors that are trained once, then answer in milliseconds."""

from abduce.amortized import checks
from abduce.amortized.dt_filter import LinearGaussian
from abduce.amortized.equivariance import ScaleEquivariance
from abduce.amortized.mixtures import GaussianMixture

__all__ = ["GaussianMixture", "LinearGaussian", "ScaleEquivariance", "checks"]
