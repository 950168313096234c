"""Every bijection by name, small, for tests that hold of all."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from abduce.inference.vi import flows

CONTEXT_DIM = 2
SMALL = {"hidden": (6,)}


def _stack(key, dim, context_dim=0):
    keys = jax.random.split(key, 3)
    return flows.Stack([flows.Planar(k, dim, context_dim=context_dim, **SMALL) for k in keys])


def _recipe(make, **settings):
    def build(key, dim, context_dim=0):
        return make(key, dim, 2, **{**SMALL, **settings}, context_dim=context_dim)

    return build


def _kind(make, *args, **settings):
    def build(key, dim, context_dim=0):
        return make(key, dim, *args, **{**SMALL, **settings}, context_dim=context_dim)

    return build


def _inverse_of(build):
    return lambda key, dim, context_dim=0: flows.Inverse(build(key, dim, context_dim))


AFFINE, SPLINE = flows.Affine(), flows.RationalQuadratic(num_bins=4, bound=3.0)

# (key, dim, context_dim=0) -> bijection
LAYERS = {
    "planar layer": _kind(flows.Planar),
    "radial layer": _kind(flows.Radial),
    "elementwise affine": _kind(flows.ElementwiseAffine),
    "affine coupling layer": _kind(flows.Coupling, AFFINE),
    "spline coupling layer": _kind(flows.Coupling, SPLINE),
    "masked autoregressive": _kind(flows.MaskedAutoregressive, AFFINE, hidden=(5, 6)),
    "inverse autoregressive": _inverse_of(
        _kind(flows.MaskedAutoregressive, AFFINE, activation="tanh")
    ),
    "spline autoregressive layer": _kind(flows.MaskedAutoregressive, SPLINE),
    "continuous layer": _kind(flows.Continuous, hidden=(6, 5), num_steps=40),
    "stack": _stack,
}
RECIPES = {
    "planar": _recipe(flows.planar),
    "radial": _recipe(flows.radial),
    "affine coupling": _recipe(flows.affine_coupling),
    "affine coupling, permuted": _recipe(flows.affine_coupling, mixing="permute"),
    "spline coupling": _recipe(flows.spline_coupling, num_bins=4, bound=3.0),
    "maf": _recipe(flows.maf),
    "iaf": _recipe(flows.iaf),
    "spline autoregressive": _recipe(flows.spline_autoregressive, num_bins=4, bound=3.0),
    "continuous": _recipe(flows.continuous, num_steps=40),
}
LINEAR = {
    "permutation": lambda key, dim: flows.Permutation.shuffled(dim, seed=3),
    "lu": lambda key, dim: flows.LU(key, dim),
    "lu, permuted": lambda key, dim: flows.LU(key, dim, order=[*range(1, dim), 0]),
}
WITH_CONTEXT = {**LAYERS, **RECIPES}
CASES = {**WITH_CONTEXT, **LINEAR}
NEEDS_TWO = {n for n in CASES if "coupling" in n}

# What the solver of a differential equation leaves, with 40 steps; all else is exact.
TOLERANCE = {"continuous layer": 2e-6, "continuous": 2e-6}


def tolerance(name):
    return TOLERANCE.get(name, 1e-8)


def random_like(flow, seed=0, scale=0.5):
    """The flow with normal numbers for parameters, matrices divided by the root of their fan-in.

    The numbers are NumPy's: nothing is compiled, and `flow` may be shapes alone.
    """
    rng = np.random.default_rng(seed)
    leaves, treedef = jax.tree.flatten(flow)
    roots = [math.sqrt(max(x.shape[-1], 1)) if len(x.shape) > 1 else 1 for x in leaves]
    filled = [scale * rng.normal(size=x.shape) / r for x, r in zip(leaves, roots, strict=True)]
    return treedef.unflatten([jnp.asarray(x, y.dtype) for x, y in zip(filled, leaves, strict=True)])


def make(name, dim=3, context_dim=0, seed=0, scale=0.5):
    """A case with random parameters, away from the identity."""
    settings = {"context_dim": context_dim} if context_dim else {}
    build = CASES[name]
    key = jax.random.key(0)
    return random_like(jax.eval_shape(lambda k: build(k, dim, **settings), key), seed, scale)
