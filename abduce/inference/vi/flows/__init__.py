"""Normalizing flows: bijections with tractable determinants, and the laws they make of a base.

A bijection is an Equinox module (all of its array leaves are parameters) and a NumPyro
`Transform`. Recipes such as `spline_coupling` build whole flows; `distribution` makes a
distribution of one, for `ab.sample` or for a guide.

| recipe | draws | densities | good for |
|---|---|---|---|
| `planar`, `radial` | fast | iterative, closed form | mild corrections of a normal |
| `affine_coupling` | fast | fast | many dimensions |
| `spline_coupling` | fast | fast | several modes, sharp edges; the first to try |
| `maf`, `spline_autoregressive` | `dim` passes | fast | densities of data |
| `iaf` | fast | `dim` passes | variational inference, which scores its own draws |
| `continuous` | ODE | ODE | smooth maps without a split or an order |

Example:
    >>> flow = flows.spline_coupling(jax.random.key(0), dim=2, num_layers=4)
    >>> d = flows.distribution(flow)
    >>> x, log_prob = d.sample_and_log_prob(jax.random.key(1), (1000,))
"""

from abduce.inference.vi.flows.autoregressive import MaskedAutoregressive
from abduce.inference.vi.flows.bijection import Bijection, Conditioned, Inverse
from abduce.inference.vi.flows.chain import Chain, Stack
from abduce.inference.vi.flows.continuous import Continuous
from abduce.inference.vi.flows.coupling import Coupling
from abduce.inference.vi.flows.distribution import Flow, distribution
from abduce.inference.vi.flows.linear import LU, ElementwiseAffine, Permutation
from abduce.inference.vi.flows.networks import MADE, MLP
from abduce.inference.vi.flows.planar_radial import Planar, Radial
from abduce.inference.vi.flows.recipes import (
    affine_coupling,
    continuous,
    iaf,
    maf,
    planar,
    radial,
    spline_autoregressive,
    spline_coupling,
)
from abduce.inference.vi.flows.transformers import Affine, RationalQuadratic, Transformer

__all__ = [
    "LU",
    "MADE",
    "MLP",
    "Affine",
    "Bijection",
    "Chain",
    "Conditioned",
    "Continuous",
    "Coupling",
    "ElementwiseAffine",
    "Flow",
    "Inverse",
    "MaskedAutoregressive",
    "Permutation",
    "Planar",
    "Radial",
    "RationalQuadratic",
    "Stack",
    "Transformer",
    "affine_coupling",
    "continuous",
    "distribution",
    "iaf",
    "maf",
    "planar",
    "radial",
    "spline_autoregressive",
    "spline_coupling",
]
