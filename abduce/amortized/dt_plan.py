"""Reading a model for a Distribution Transformer, and checking problems against what was read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution

from abduce.amortized.dt_coordinates import Coordinates, make_coordinates
from abduce.amortized.dt_inputs import Plan
from abduce.amortized.dt_priors import read_laws
from abduce.amortized.dt_training import draw_prior_law, with_law
from abduce.amortized.equivariance import ScaleEquivariance, check_equivariance
from abduce.amortized.layout import make_layout
from abduce.amortized.mixtures import GaussianMixture
from abduce.errors import (
    InvalidAlgorithm,
    InvalidModel,
    InvalidValue,
    MissingData,
    UnknownAddress,
    suggest,
)
from abduce.inference.algorithm import check_count
from abduce.inference.problem import Problem
from abduce.ppl import _jax
from abduce.ppl.graph import graph_of
from abduce.ppl.model import Model
from abduce.ppl.operations import outside_scopes
from abduce.ppl.program import Program, pack, stage_packed

__all__ = ["make_plan", "match", "read_given"]

_NAME = "distribution_transformer"
_CANDIDATES = 7


def make_plan(
    model: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    observed: Any,
    priors: Any,
    prior: Any,
    target: Any,
    designs: Any,
    equivariance: Any,
    missing: float,
    num_candidates: int | None,
    **sizes: int,
) -> tuple[Plan, dict[str, Any]]:
    """The plan, and the data of a `TransformerTask` but for the scales.

    Raises:
        UnknownAddress, InvalidAlgorithm, InvalidValue, DiscreteLatent: See the messages.
    """
    if not isinstance(model, Model) or not isinstance(priors, Model):
        got = type(priors if isinstance(model, Model) else model).__name__
        raise InvalidAlgorithm(
            f"ab.{_NAME} takes a model and priors=, a Model that returns priors such as "
            f'{{"variance": dist.InverseGamma(a, b)}}; got {got}.'
        )
    for name, value in sizes.items():
        check_count(_NAME, name, value)
    if not 0 <= missing < 1:
        raise InvalidAlgorithm(f"ab.{_NAME}: missing= is a probability below 1, got {missing!r}.")
    model = model.with_algorithm(None)
    key = jax.random.key(0)
    layout, data = make_layout(_NAME, model, args, kwargs, observed, designs, None, key)
    arguments = data["arguments"]
    with outside_scopes():
        program = stage_packed(arguments)
        prior_arguments = priors.with_algorithm(None)._stage((), {})[1]
        law = draw_prior_law(prior_arguments, key)
    addresses = _addresses(program, law, prior)
    wanted = addresses if target is None else _listed(target)
    for a in (*addresses, *wanted):
        if a not in program.latents or a in layout.observed:
            known = [x for x in program.latents if x not in layout.observed]
            raise UnknownAddress(
                f"ab.{_NAME}: {a!r} is no latent of `{program.name}`, which are "
                f"{', '.join(known)}.{suggest(a, known)}"
            )
    laws = read_laws(program, arguments, tuple(dict.fromkeys((*addresses, *wanted))), key)
    prior_at = make_coordinates(_NAME, program.sites, addresses, laws)
    target_at = make_coordinates(_NAME, program.sites, wanted, laws)
    _check_law(law, prior_at, program)
    skipped = len(pack(model, (), {}).dynamic)
    inside = [i for g in layout.groups for i in g.arguments if i < skipped]
    if inside:
        raise InvalidAlgorithm(
            f"ab.{_NAME}: `{program.name}` holds arrays that go with its observations. Pass them "
            f"as arguments instead."
        )
    if equivariance is not None:
        if not isinstance(equivariance, ScaleEquivariance):
            raise InvalidAlgorithm(
                f"ab.{_NAME}: equivariance= takes an "
                f"ab.amortized.ScaleEquivariance(observed=, latents=), "
                f"got {type(equivariance).__name__}."
            )
        with outside_scopes():
            posed = arguments if isinstance(law, GaussianMixture) else _posed(arguments, law)
            check_equivariance(equivariance, stage_packed(posed), posed, addresses, key)
    plan = Plan(
        layout=layout,
        families=tuple((a, program.sites[a].family) for a in layout.observed),
        skipped=skipped,
        prior=prior_at,
        target=target_at,
        num_candidates=_candidates(num_candidates, program, layout.observed, wanted, missing),
        missing=float(missing),
        equivariance=equivariance,
        **sizes,
    )
    if isinstance(law, GaussianMixture) and law.dim == prior_at.dim:
        with_law(plan, arguments, law)
    return plan, {**data, "priors": prior_arguments}


def _posed(arguments: Any, law: Any) -> Any:
    from abduce.ppl.transforms import with_prior

    model, args, kwargs = arguments.unpack()
    return pack(with_prior(model, law), args, kwargs)


def _listed(addresses: Any) -> tuple[str, ...]:
    return (addresses,) if isinstance(addresses, str) else tuple(addresses)


def _addresses(program: Program, law: Any, prior: Any) -> tuple[str, ...]:
    if isinstance(law, GaussianMixture):
        if prior is None:
            raise InvalidAlgorithm(
                f'ab.{_NAME}: priors= returns a mixture; say of which sites, as in prior=["x"].'
            )
        return _listed(prior)
    if (
        not isinstance(law, Mapping)
        or not law
        or not all(isinstance(d, Distribution) for d in law.values())
    ):
        raise InvalidAlgorithm(
            f"ab.{_NAME}: the Model given as priors= returns {type(law).__name__}. It returns a "
            f'dict of distributions by address, such as {{"variance": dist.InverseGamma(a, b)}}, '
            f"or a GaussianMixture."
        )
    named = tuple(a for a in program.sites if a in law) + tuple(
        a for a in law if a not in program.sites
    )
    if prior is not None and set(_listed(prior)) != set(named):
        raise InvalidAlgorithm(
            f"ab.{_NAME}: prior={list(_listed(prior))}, but priors= returns distributions for "
            f"{list(named)}."
        )
    return named if prior is None else _listed(prior)


def _check_law(law: Any, coordinates: Coordinates, program: Program) -> None:
    if isinstance(law, GaussianMixture):
        if law.means.ndim != 2 or law.dim != coordinates.dim:
            raise InvalidValue(
                f"ab.{_NAME}: priors= returns a mixture with means of shape {law.means.shape}; "
                f"expected (num_components, {coordinates.dim}), for the coordinates of "
                f"{', '.join(coordinates.addresses)}."
            )
        return
    for p in coordinates.parts:
        shape = tuple(law[p.address].shape())
        if p.shape[len(p.shape) - len(shape) :] != shape:
            raise InvalidValue(
                f"ab.{_NAME}: priors= gives {p.address!r} a distribution of shape {shape}, but the "
                f"site has shape {p.shape} in `{program.name}`."
            )


def _candidates(
    wished: int | None, program: Program, observed: Any, target: Any, missing: float
) -> int:
    """How many draws join the truth in the loss; see `TransformerTask`."""
    why = None
    latent = [a for a in program.latents if a not in observed]
    graph = graph_of(program)
    if set(target) != set(latent):
        rest = [a for a in latent if a not in target]
        why = f"their joint density with the other latents, {', '.join(rest)}, is not that of them"
    elif any(not s.has_density for s in program.sites.values() if s.kind == "sample"):
        why = "a site is a dist.Simulator, which has none"
    elif missing and any(p in observed for a in observed for p in graph.parents(a)):
        why = "observations depend on observations that may be hidden"
    if wished is None:
        return 0 if why else _CANDIDATES
    if isinstance(wished, bool) or not isinstance(wished, (int, np.integer)) or wished < 0:
        raise InvalidAlgorithm(f"ab.{_NAME}: num_candidates is an int >= 0, got {wished!r}.")
    if wished and why:
        raise InvalidAlgorithm(
            f"ab.{_NAME}: num_candidates={wished} needs the density of the targets and the data, "
            f"but {why}. Use num_candidates=0."
        )
    return int(wished)


# ---------------------------------------------------------------------- problems


def match(plan: Plan, problem: Problem, name: str) -> None:
    """The sites of a problem have to be those of training.

    Raises:
        InvalidModel: They are not.
    """
    program = problem.program
    trained = f"the estimator was trained on `{plan.layout.model_name}`"
    for p in (*plan.prior.parts, *plan.target.parts):
        info = program.sites.get(p.address)
        if info is None or p.address not in problem.latents:
            known = ", ".join(problem.latents) or "none"
            raise InvalidModel(
                f"ab.{name}: {trained} with the latent {p.address!r}, shape {p.shape}; the latents "
                f"of `{program.name}` are {known}.{suggest(p.address, problem.latents)}"
            )
        if info.shape != p.shape:
            raise InvalidModel(
                f"ab.{name}: {trained} with {p.address!r} of shape {p.shape}; in `{program.name}` "
                f"its shape is {info.shape}. Train another one."
            )
        if info.is_discrete or info.conditional or info.site.coords is not None:
            raise InvalidModel(
                f"ab.{name}: {p.address!r} of `{program.name}` is discrete, in a branch or has "
                f"other coordinates (ab.reparam), unlike in training. Use the model as it was."
            )
    for a, family in plan.families:
        info = program.sites.get(a)
        if info is None or info.kind != "sample":
            raise InvalidModel(
                f"ab.{name}: {trained} with {a!r} observed; `{program.name}` has no such site."
            )
        if info.family != family:
            raise InvalidModel(
                f"ab.{name}: {trained}, where {a!r} is {family}; in `{program.name}` it is "
                f"{info.family}. Only the prior may change; train another one."
            )


def read_given(
    plan: Plan, given: Mapping[str, tuple[Any, Any]], name: str
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Observations and, if any were hidden in training, what is hidden.

    Args:
        plan: Of the estimator.
        given: By address, values and a mask or None.
        name: For messages.

    Raises:
        MissingData: A site is missing, or has NaN.
        InvalidValue, UnknownAddress: See the messages.
    """
    observed, gone = {}, {}
    for a in given:
        if a not in plan.layout.observed:
            raise UnknownAddress(
                f"ab.{name}: {a!r} is given, but the estimator was trained with "
                f"{', '.join(plan.layout.observed)} observed.{suggest(a, plan.layout.observed)}"
            )
    for a, shape in plan.layout.shapes:
        if a not in given:
            raise MissingData(
                f'ab.{name}: given["{a}"] is missing. The estimator was trained with '
                f"{', '.join(plan.layout.observed)} observed, and needs all of them."
            )
        value, mask = given[a]
        value = jnp.asarray(value)
        _check_shape(plan, a, shape, value.shape, name)
        ndim = value.ndim if mask is None else jnp.ndim(mask)
        hidden = jnp.zeros(value.shape[:ndim], bool) if mask is None else ~jnp.asarray(mask)
        complete = mask is None or (_jax.is_concrete(hidden) and not np.any(hidden))
        if not complete and not plan.missing:
            raise InvalidAlgorithm(
                f'ab.{name}: given["{a}"] has hidden entries, but the estimator was trained on '
                f"complete data. Train it with missing=0.5."
            )
        if _jax.is_concrete(value) and jnp.issubdtype(value.dtype, jnp.inexact):
            wide = np.reshape(hidden, np.shape(hidden) + (1,) * (value.ndim - hidden.ndim))
            bad = np.isnan(value) & ~wide
            if bad.any():
                raise MissingData(
                    f'ab.{name}: given["{a}"] has {int(bad.sum())} NaN among {value.size} values, '
                    f"first at index {tuple(int(i) for i in np.argwhere(bad)[0])}. Train with "
                    f"missing=, and pass ab.masked(x, observed=~jnp.isnan(x))."
                )
        observed[a], gone[a] = value, hidden
    return observed, gone if plan.missing else None


def _check_shape(plan: Plan, address: str, shape: Any, got: Any, name: str) -> None:
    if tuple(shape) == tuple(got):
        return
    group = next(g for g in plan.layout.groups if address in g.sites)
    is_set = group.kind == "set" and tuple(shape[1:]) == tuple(got[1:])
    if is_set and plan.missing and got[0] <= shape[0]:
        return
    hint = ""
    if is_set:
        hint = " Sets of fewer elements can be read by an estimator that was trained with missing=."
    raise InvalidValue(
        f'ab.{name}: given["{address}"] has shape {tuple(got)}; the estimator was trained on '
        f"{tuple(shape)}.{hint}"
    )
