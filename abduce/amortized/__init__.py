"""Amortized inference: posteriors that are trained once, then answer in milliseconds."""

from abduce.amortized import checks
from abduce.amortized.dt_filter import LinearGaussian
from abduce.amortized.equivariance import ScaleEquivariance
from abduce.amortized.mixtures import GaussianMixture
from abduce.amortized.pose_equivariance import PoseEquivariance

__all__ = [
    "GaussianMixture",
    "LinearGaussian",
    "PoseEquivariance",
    "ScaleEquivariance",
    "checks",
]
