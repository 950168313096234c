"""Traces: one run of a model, with its choices and densities, and the operations that edit it."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from abduce.errors import MissingKey, NoDensity, UnknownAddress, suggest
from abduce.ppl import _jax
from abduce.ppl.operations import (
    execute,
    prepare_given,
    prepare_params,
    require_density,
    stage_operation,
    typed_key,
)
from abduce.ppl.program import Arguments, Program
from abduce.ppl.replay import Given, Replay
from abduce.ppl.selection import matching

__all__ = ["Trace"]

TRACE_RECORD = frozenset({"value", "score", "mask"})


class Trace(eqx.Module):
    """One run of a model.

    Attributes:
        arguments: The model and its arguments, packed.
        choices: Values of the sites that are not observed in the program, by address.
        observed: Values observed in the program (`obs=`, `ab.condition`).
        deterministics: Recorded values.
        retval: What the model returned.
        scores: Log densities in nats per site, one per element (mapped axes, then batch); factors
            included. They sum to `log_density`.
        active: For sites in branches, whether they counted, per mapped element.
        params: Values of the `ab.param` sites.
        masks: For sites observed in part, where.
        simulated: Addresses of `dist.Simulator` sites, which have no density.
    """

    arguments: Arguments
    choices: dict[str, Any]
    observed: dict[str, Any]
    deterministics: dict[str, Any]
    retval: Any
    scores: dict[str, Any]
    active: dict[str, Any]
    params: dict[str, Any]
    masks: dict[str, Any]
    _log_density: Any
    simulated: tuple[str, ...] = eqx.field(static=True)

    @property
    def model(self) -> Any:
        """The model that ran."""
        return self.arguments.unpack()[0]

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of the run."""
        return self.arguments.unpack()[1]

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the run."""
        return self.arguments.unpack()[2]

    @property
    def log_density(self) -> Any:
        """Log density of everything in the trace, in nats.

        Raises:
            NoDensity: A site is a simulator.
        """
        self._require_density(set(self.simulated), "trace.log_density")
        return self._log_density

    def _require_density(self, addresses: set[str], call: str) -> None:
        lacking = sorted(addresses & set(self.simulated))
        if lacking:
            raise NoDensity(
                f"{call} needs the density of site {lacking[0]!r}, but it is a dist.Simulator, "
                f"which has none. Replace it with a distribution to score it."
            )

    def _program(self) -> Program:
        model, args, kwargs = self.arguments.unpack()
        return stage_operation(model, args, kwargs)[0]

    def __getitem__(self, address: str) -> Any:
        for group in (self.choices, self.observed, self.deterministics, self.params):
            if address in group:
                return group[address]
        known = [*self.choices, *self.observed, *self.deterministics, *self.params]
        raise UnknownAddress(
            f"the trace has no value at {address!r}; it has {', '.join(known) or 'none'}."
            f"{suggest(address, known)}"
        )

    def project(self, selection: Any) -> Any:
        """Log density of the selected sites, in nats.

        Args:
            selection: Over sample sites (observed ones included) and factors.

        Raises:
            UnknownAddress: A part of the selection matches nothing.
        """
        values = {**self.scores, **self.choices, **self.observed}
        chosen = matching(selection, values)
        self._require_density(chosen, "trace.project")
        zero = jnp.zeros((), jnp.result_type(float))
        return sum((jnp.sum(self.scores[a]) for a in sorted(chosen)), start=zero)

    def update(
        self,
        given: dict[str, Any],
        *args: Any,
        key: Any = None,
        params: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Trace, Any, dict[str, Any]]:
        """Changes choices and, if any are passed, arguments.

        The log weight is `log p(new) - log p(old)`, without the density of sites that had to be
        drawn afresh because new arguments or a flipped branch brought them.

        Args:
            given: New values of some choices.
            *args, **kwargs: New arguments; none keeps the old ones.
            key: Needed only if sites come without a value.
            params: New parameter values; others are kept.

        Returns:
            The new trace, the log weight, and the old values that were replaced or vanished.

        Raises:
            MissingKey: A site needs a value and no key was passed.
        """
        model = self.model
        if not args and not kwargs:
            args, kwargs = self.args, self.kwargs
        program, arguments = stage_operation(model, args, kwargs)
        new = prepare_given(program, given)
        inputs, discarded = self._carry_over(program, new, frozenset())
        inputs.update(self._params(program, params))
        key = None if key is None else typed_key(key, "trace.update")
        require_density(program, "trace.update")
        out = execute(
            Replay(record=TRACE_RECORD | {"missing"}, soft_missing=key is None),
            arguments, key, inputs, weight=True,
        )  # fmt: skip
        weight = _poison(out["weight"], out["records"], "trace.update")
        trace = make_trace(program, arguments, out)
        return trace, weight - self._log_density, discarded

    def regenerate(self, key: Any, selection: Any) -> tuple[Trace, Any]:
        """Draws the selected choices afresh from the prior.

        The log weight is the log acceptance ratio of that proposal: the density of what was kept
        and observed, new minus old.

        Args:
            key: Random key.
            selection: Over the choices.

        Returns:
            The new trace and the log weight.
        """
        key = typed_key(key, "trace.regenerate")
        program = self._program()
        require_density(program, "trace.regenerate")
        chosen = matching(selection, self.choices)
        inputs, _ = self._carry_over(program, {}, chosen)
        inputs.update(self._params(program, None))
        out = execute(Replay(record=TRACE_RECORD), self.arguments, key, inputs, weight=True)
        trace = make_trace(program, self.arguments, out)
        kept = jnp.zeros((), jnp.result_type(float))
        for address, score in self.scores.items():
            if address in chosen:
                if address in self.masks:
                    kept = kept + jnp.sum(jnp.where(self.masks[address], score, 0.0))
                continue
            if address in trace.active and address in self.choices:
                on = trace.active[address]
                score = jnp.where(on.reshape(on.shape + (1,) * (score.ndim - on.ndim)), score, 0.0)
            kept = kept + jnp.sum(score)
        return trace, out["weight"] - kept

    def _params(self, program: Program, params: Any) -> dict[str, Given]:
        kept = {a: v for a, v in self.params.items() if a in program.sites}
        return prepare_params(program, {**kept, **(params or {})})

    def _carry_over(
        self, program: Program, new: dict[str, Given], redraw: set[str] | frozenset[str]
    ) -> tuple[dict[str, Given], dict[str, Any]]:
        """Supplies old values for what is neither new nor to be drawn again."""
        inputs, discarded = {}, {}
        for address, old in self.choices.items():
            info = program.sites.get(address)
            if info is None or not info.is_latent or info.shape != np.shape(old):
                discarded[address] = old
                continue
            if address in redraw:
                continue
            if address in new:
                discarded[address] = old
                continue
            mask = None
            if address in self.active:
                on = self.active[address]
                batch = info.shape[: info.batch_ndim]
                mask = jnp.broadcast_to(on.reshape(on.shape + (1,) * (len(batch) - on.ndim)), batch)
            inputs[address] = Given(old, mask)
        for address, g in new.items():
            if g.mask is not None and address in self.choices:
                # Hidden entries of a masked edit keep their old values.
                old = self.choices[address]
                mask = g.mask.reshape(g.mask.shape + (1,) * (old.ndim - g.mask.ndim))
                g = Given(jnp.where(mask, g.value, old))
            inputs[address] = g
        return inputs, discarded


def make_trace(program: Program, arguments: Arguments, out: dict[str, Any]) -> Trace:
    """Builds a trace from what `execute` returned."""
    records = out["records"]

    def values(test):
        return {
            a: records[a]["value"]
            for a, info in program.sites.items()
            if test(info) and "value" in records.get(a, ())
        }

    log_density = out["log_density"]
    return Trace(
        arguments=arguments,
        choices=values(lambda s: s.is_latent),
        observed=values(lambda s: s.kind == "sample" and not s.is_latent),
        deterministics=values(lambda s: s.kind == "deterministic"),
        retval=out["retval"],
        scores={a: r["score"] for a, r in records.items() if "score" in r},
        active={a: r["active"] for a, r in records.items() if "active" in r},
        params=values(lambda s: s.kind == "param"),
        masks={a: r["mask"] for a, r in records.items() if "mask" in r},
        _log_density=jnp.nan if log_density is None else log_density,
        simulated=tuple(a for a, s in program.of_kind("sample").items() if not s.has_density),
    )


def _poison(weight: Any, records: dict[str, Any], call: str) -> Any:
    """A site that needed a value and got none: an error, or NaN where that is not yet known."""
    for address, record in records.items():
        if "missing" not in record:
            continue
        lacking = jnp.any(record["missing"])
        if _jax.is_concrete(lacking):
            if bool(lacking):
                raise MissingKey(
                    f"{call}: site {address!r} became active and has no value. Pass "
                    f"key=jax.random.key(0) to draw it, or a value for it."
                )
        else:
            weight = jnp.where(lacking, jnp.nan, weight)
    return weight
