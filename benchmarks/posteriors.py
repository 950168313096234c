"""The twenty reference posteriors: their data, made ready for a model, and their gold draws.

A posterior names a model. `models_abduce.py` and `models_numpyro.py` each hold a function of that
name with the same density, the same arguments and the same addresses, so that one record serves
every package. Addresses are the stored names without their index: `beta[2]` is entry 1 of `beta`.

The models are those of posteriordb (Magnusson et al. 2022), as the data folder states them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import data

__all__ = ["NEEDS_X64", "Posterior", "load", "names", "quantities"]

# Posteriors that cannot be sampled in float32. Measured, not assumed: see `benchmarks/README.md`.
NEEDS_X64: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Posterior:
    """One reference posterior.

    Attributes:
        name: posteriordb's name.
        model: Name of the function in `models_abduce` and `models_numpyro`.
        args: Arguments of that function.
        given: Observed values by address.
        names: Stored quantities, in order, `num_quantities` of them.
        mean: Their gold means, shape `(num_quantities,)`.
        sd: Their gold standard deviations, shape `(num_quantities,)`.
        mcse_mean: Monte Carlo standard errors of the gold means, shape `(num_quantities,)`.
        mcse_sd: Monte Carlo standard errors of the gold sds, shape `(num_quantities,)`.
    """

    name: str
    model: str
    args: tuple
    given: dict[str, np.ndarray]
    names: tuple[str, ...]
    mean: np.ndarray
    sd: np.ndarray
    mcse_mean: np.ndarray
    mcse_sd: np.ndarray

    @property
    def needs_x64(self) -> bool:
        """Whether single precision is not enough for this posterior."""
        return self.name in NEEDS_X64

    @property
    def addresses(self) -> tuple[str, ...]:
        """Addresses of the stored quantities, each once, in order."""
        return tuple(dict.fromkeys(_split(name)[0] for name in self.names))


def names() -> list[str]:
    """The names of all reference posteriors that lie in the data folder and have a model here."""
    return [name for name in data.loader().posteriors() if name in _PREPARE]


def load(name: str) -> Posterior:
    """Reads one posterior.

    Raises:
        KeyError: No posterior of that name has both data and a model.
    """
    if name not in names():
        raise KeyError(f"no posterior {name!r}; there are: {', '.join(names())}")
    stored = data.loader().posterior(name)
    model, args, given = _PREPARE[name](stored["data"])
    return Posterior(
        name=name,
        model=model,
        args=tuple(_floats(a) for a in args),
        given={address: _floats(value) for address, value in given.items()},
        names=tuple(stored["names"]),
        mean=np.asarray(stored["mean"]),
        sd=np.asarray(stored["sd"]),
        mcse_mean=np.asarray(stored["mcse_mean"]),
        mcse_sd=np.asarray(stored["mcse_sd"]),
    )


def quantities(draws: Mapping[str, np.ndarray], stored_names: tuple[str, ...]) -> np.ndarray:
    """Draws in the order of the stored names.

    Args:
        draws: By address, each of shape `(num_chains, num_draws, ...)`.
        stored_names: Such as `("alpha", "beta[1]", "beta[2]")`.

    Returns:
        Array of shape `(num_chains, num_draws, num_quantities)`, float64.
    """
    columns = []
    for name in stored_names:
        address, index = _split(name)
        value = np.asarray(draws[address], dtype=np.float64)
        columns.append(value if index is None else value[..., index])
    return np.stack(columns, axis=-1)


def _split(name: str) -> tuple[str, int | None]:
    """`"beta[2]"` to `("beta", 1)`, `"sigma"` to `("sigma", None)`."""
    address, index = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", name).groups()
    return address, None if index is None else int(index) - 1


def _floats(value: Any) -> Any:
    """Arrays and numbers as floats of JAX's default precision; an int stays, it is a size."""
    if isinstance(value, int):
        return value
    import jax  # here, so that the process that only reads results needs no JAX

    return np.asarray(value, dtype=jax.dtypes.canonicalize_dtype(np.float64))


# ---------------------------------------------------------------- data, made ready for the models
# Each function takes the stored data and returns (model, args, given).


def _ar(d):
    y, order = d["y"], d["K"]
    lags = np.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], axis=1)
    return "autoregression", (lags,), {"y": y[order:]}


def _diamonds(d):
    predictors = d["X"][:, 1:]
    return "diamonds", (predictors - predictors.mean(axis=0),), {"Y": d["Y"]}


def _design(*columns):
    """A design matrix with a leading column of ones."""
    return np.stack([np.ones(len(columns[0])), *columns], axis=1)


def _earn_height(d):
    return "regression", (_design(d["height"]),), {"y": d["earn"]}


def _logearn_interaction(d):
    design = _design(d["height"], d["male"], d["height"] * d["male"])
    return "regression", (design,), {"y": np.log(d["earn"])}


def _schools(model):
    return lambda d: (model, (d["sigma"],), {"y": d["y"]})


def _garch(d):
    return "garch", (d["sigma1"], len(d["y"])), {"y": d["y"]}


def _gp(d):
    return "gaussian_process", (d["x"],), {"y": d["y"]}


def _hmm(d):
    return "hidden_markov", (d["y"],), {}


def _lynx_hare(d):
    return "predator_prey", (d["ts"],), {"y_init": d["y_init"], "y": d["y"]}


def _kidiq_interaction(d):
    design = _design(d["mom_hs"], d["mom_iq"], d["mom_hs"] * d["mom_iq"])
    return "regression_cauchy", (design,), {"y": d["kid_score"]}


def _kidiq_momhs(d):
    return "regression_cauchy", (_design(d["mom_hs"]),), {"y": d["kid_score"]}


def _kidiq_centred(d):
    school, iq = d["mom_hs"] - d["mom_hs"].mean(), d["mom_iq"] - d["mom_iq"].mean()
    return "regression", (_design(school, iq, school * iq),), {"y": d["kid_score"]}


def _kilpisjarvi(d):
    priors = (d["pmualpha"], d["psalpha"], d["pmubeta"], d["psbeta"])
    return "kilpisjarvi", (d["x"], *map(float, priors)), {"y": d["y"]}


def _mixture(d):
    return "mixture", (len(d["y"]),), {"y": d["y"]}


_MESQUITE = ("diam1", "diam2", "canopy_height", "total_height", "density")


def _mesquite(d):
    design = _design(*(d[c] for c in _MESQUITE), d["group"])
    return "regression", (design,), {"y": d["weight"]}


def _log_mesquite(d):
    design = _design(*(np.log(d[c]) for c in _MESQUITE), d["group"])
    return "regression", (design,), {"y": np.log(d["weight"])}


def _nes(d):
    ages = [d["age_discrete"] == k for k in (2, 3, 4)]
    rest = (d["educ1"], d["gender"], d["income"])
    return "regression", (_design(d["real_ideo"], d["race_adj"], *ages, *rest),), {
        "y": d["partyid7"]
    }


def _blr(d):
    return "regression_vague", (d["X"],), {"y": d["y"]}


_PREPARE = {
    "arK-arK": _ar,
    "diamonds-diamonds": _diamonds,
    "earnings-earn_height": _earn_height,
    "earnings-logearn_interaction": _logearn_interaction,
    "eight_schools-eight_schools_centered": _schools("schools"),
    "eight_schools-eight_schools_noncentered": _schools("schools_noncentered"),
    "garch-garch11": _garch,
    "gp_pois_regr-gp_regr": _gp,
    "hmm_example-hmm_example": _hmm,
    "hudson_lynx_hare-lotka_volterra": _lynx_hare,
    "kidiq-kidscore_interaction": _kidiq_interaction,
    "kidiq-kidscore_momhs": _kidiq_momhs,
    "kidiq_with_mom_work-kidscore_interaction_c": _kidiq_centred,
    "kilpisjarvi_mod-kilpisjarvi": _kilpisjarvi,
    "low_dim_gauss_mix-low_dim_gauss_mix": _mixture,
    "mesquite-logmesquite": _log_mesquite,
    "mesquite-mesquite": _mesquite,
    "nes1972-nes": _nes,
    "nes1976-nes": _nes,
    "sblrc-blr": _blr,
}
