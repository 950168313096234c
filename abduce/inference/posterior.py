"""Posteriors: what every algorithm returns."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import AbduceWarning, InvalidValue, UnknownAddress, suggest
from abduce.inference.problem import Problem
from abduce.ppl.program import Arguments

__all__ = ["Posterior", "make_posterior"]


class Posterior(eqx.Module):
    """Draws of the latents of a conditioned model.

    Attributes:
        draws: By address, `(chain, draw, ...)`: latents and deterministics. Weighted draws are
            kept as they were drawn; `post[a]` resamples them once.
        log_weights: None for equal weights, else `(chain, draw)`, in nats, unnormalized.
        log_evidence: Log of the evidence of the data, in nats, or None.
        params: Values of the `ab.param` sites used.
        diagnostics: Arrays and numbers by name; per-draw ones are `(chain, draw)`.
        warnings: What the reader must know, each with a remedy.
        arguments: The packed model and its arguments; None after loading from disk.
        given: The data it was conditioned on.
        active: For sites in branches, whether they counted, `(chain, draw, mapped axes)`. Where
            they did not, float draws are NaN; `mean`, `std`, `quantile` and `summary` are over the
            draws where they did.
        coords: Labels by dimension name.
        dims: Names of the dimensions of each site.
        deterministic: Which of the draws are not choices.
        algorithm: What made it, for the record.
    """

    draws: dict[str, Any]
    log_weights: Any
    log_evidence: Any
    params: dict[str, Any]
    diagnostics: dict[str, Any]
    arguments: Arguments | None
    given: dict[str, Any]
    active: dict[str, Any]
    warnings: tuple[str, ...] = eqx.field(static=True)
    coords: Any = eqx.field(static=True)
    dims: Any = eqx.field(static=True)
    deterministic: tuple[str, ...] = eqx.field(static=True)
    algorithm: str = eqx.field(static=True)

    # ---------------------------------------------------------------- draws

    @property
    def num_chains(self) -> int:
        """Number of chains."""
        return next(iter(self.draws.values())).shape[0]

    @property
    def num_draws(self) -> int:
        """Draws per chain."""
        return next(iter(self.draws.values())).shape[1]

    def __contains__(self, address: str) -> bool:
        return address in self.draws

    def keys(self) -> list[str]:
        """The addresses there are draws of."""
        return list(self.draws)

    def __getitem__(self, address: str) -> Any:
        """Equally weighted draws, `(chain, draw, ...)`; weighted ones are resampled once."""
        draws = self._raw(address)
        if self.log_weights is None:
            return draws
        index = self._resampled
        flat = draws.reshape((-1, *draws.shape[2:]))
        return flat[index][None]

    def _raw(self, address: str) -> Any:
        if address not in self.draws:
            raise UnknownAddress(
                f"the posterior has no draws of {address!r}; there are {', '.join(self.draws)}."
                f"{suggest(address, self.draws)}"
            )
        return self.draws[address]

    @functools.cached_property
    def _weights(self) -> Any:
        """Normalized weights, flat over chains and draws; float64 on the host."""
        log_weights = np.asarray(self.log_weights, np.float64).reshape(-1)
        w = np.exp(log_weights - log_weights.max())
        return w / w.sum()

    @functools.cached_property
    def _resampled(self) -> Any:
        """Systematic resampling with a fixed offset: the same draws on every access."""
        n = self._weights.size
        cdf = np.cumsum(self._weights)
        points = (np.arange(n) + 0.5) / n * cdf[-1]
        return np.minimum(np.searchsorted(cdf, points), n - 1)

    def sample(self, key: Any, n: int) -> dict[str, Any]:
        """Draws from the draws, with replacement, by weight.

        Args:
            key: Random key.
            n: How many.

        Returns:
            Equally weighted draws by address, leading axis `n`.
        """
        from abduce.ppl.operations import typed_key

        key = typed_key(key, "post.sample")
        total = self.num_chains * self.num_draws
        p = None if self.log_weights is None else jnp.asarray(self._weights)
        index = jax.random.choice(key, total, (n,), p=p)
        return {a: jnp.asarray(x).reshape((-1, *x.shape[2:]))[index] for a, x in self.draws.items()}

    # ---------------------------------------------------------------- expectations

    def map(self, f: Callable[[dict[str, Any]], Any], *, batch_size: int | None = None) -> Any:
        """Applies `f` to each draw's flat dict.

        Args:
            f: From a dict of values (without chain and draw axes) to a pytree of arrays.
            batch_size: Draws per step; bounds memory. None runs all at once.

        Returns:
            The results with leading axes `(chain, draw)`.
        """
        shape = (self.num_chains, self.num_draws)
        flat = {a: jnp.asarray(x).reshape((-1, *x.shape[2:])) for a, x in self.draws.items()}
        out = jax.vmap(f)(flat) if batch_size is None else jax.lax.map(
            f, flat, batch_size=batch_size
        )  # fmt: skip
        return jax.tree.map(lambda x: x.reshape((*shape, *x.shape[1:])), out)

    def expect(self, f: Callable[[dict[str, Any]], Any], *, batch_size: int | None = None) -> Any:
        """Posterior mean of `f` of a draw's flat dict, by weight."""
        return jax.tree.map(self._mean, self.map(f, batch_size=batch_size))

    def _mean(self, x: Any, on: Any = None) -> Any:
        """Weighted mean over chains and draws, of the entries where `on` is true."""
        x = np.asarray(x)
        flat = x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)
        flat = flat.reshape((-1, *flat.shape[2:]))
        if self.log_weights is None and on is None:
            return flat.mean(0)
        weights = np.ones(len(flat)) if self.log_weights is None else self._weights
        weights = weights.reshape((-1,) + (1,) * (flat.ndim - 1))
        if on is not None:
            on = on.reshape(flat.shape)
            flat, weights = np.where(on, flat, 0), np.where(on, weights, 0)
        with np.errstate(invalid="ignore"):  # never active: NaN
            return (weights * flat).sum(0) / weights.sum(0)

    def _on(self, address: str) -> Any | None:
        """Where a conditional site is active, in the shape of its draws; None for others."""
        if address not in self.active:
            return None
        on, shape = np.asarray(self.active[address]), np.shape(self.draws[address])
        return np.broadcast_to(on.reshape(on.shape + (1,) * (len(shape) - on.ndim)), shape)

    def mean(self, address: str) -> Any:
        """Posterior mean of a site."""
        return self._mean(self._raw(address), self._on(address))

    def std(self, address: str) -> Any:
        """Posterior standard deviation of a site."""
        x, on = np.asarray(self._raw(address), np.float64), self._on(address)
        return np.sqrt(self._mean((x - self._mean(x, on)) ** 2, on))

    def quantile(self, address: str, q: Any) -> Any:
        """Posterior quantiles of a site.

        Args:
            address: Of the site.
            q: Probability or probabilities.

        Returns:
            Shape `jnp.shape(q) + site shape`.
        """
        from abduce.inference.summary import weighted_quantile

        q = np.asarray(q, np.float64)
        if ((q < 0) | (q > 1)).any():
            raise InvalidValue(f"post.quantile: probabilities lie in [0, 1], got {q}.")
        x = np.asarray(self._raw(address))
        flat = x.reshape((-1, *x.shape[2:]))
        on = self._on(address)
        if self.log_weights is None and on is None:
            return np.quantile(flat, q, axis=0)
        weights = np.ones(len(flat)) if self.log_weights is None else self._weights
        columns = flat.reshape(len(flat), -1).T
        used = np.ones(columns.shape, bool) if on is None else on.reshape(len(flat), -1).T
        out = [
            weighted_quantile(c[u], weights[u], np.atleast_1d(q)) if u.any() else q + np.nan
            for c, u in zip(columns, used, strict=True)
        ]
        return np.reshape(np.moveaxis(np.array(out), 0, -1), (*q.shape, *x.shape[2:]))

    def summary(self, *, interval: float = 0.9) -> Any:
        """Mean, sd, interval, effective sample sizes, R-hat and MCSE of every element.

        Args:
            interval: Probability of the equal-tailed interval.

        Returns:
            A `Summary` table.
        """
        from abduce.inference.summary import summarize

        table = summarize(
            {a: np.asarray(x) for a, x in self.draws.items()},
            None if self.log_weights is None else np.asarray(self.log_weights),
            interval=interval,
            dims=self.dims_by_site,
            coords=dict(self.coords),
        )
        sites = np.array(table.sites)
        for address in self.active:  # its rows are over the draws where it was active
            rows = sites == address
            columns = {"mean": self.mean(address), "sd": self.std(address)}
            for p in ((1 - interval) / 2, (1 + interval) / 2):
                columns[f"{100 * p:.6g}%"] = self.quantile(address, p)
            for name, values in table.columns.items():
                values[rows] = np.ravel(columns[name]) if name in columns else np.nan
        return table

    @property
    def dims_by_site(self) -> dict[str, tuple[str | None, ...]]:
        """Names of the dimensions of each site."""
        return dict(self.dims)

    # ---------------------------------------------------------------- the model again

    def predict(
        self,
        key: Any,
        *new_args: Any,
        given: Mapping[str, Any] | None = None,
        redraw: Any = (),
        model: Any = None,
        batch_size: int | None = None,
        **new_kwargs: Any,
    ) -> dict[str, Any]:
        """Posterior predictive draws.

        Latents keep their draws; observed sites, deterministics, `redraw` sites and everything
        that depends on those are drawn anew.

        Args:
            key: Random key.
            *new_args, **new_kwargs: Arguments for the model; none keeps the original ones.
            given: Values to hold fixed, by address.
            redraw: A selection of latents to draw from their (conditional) prior, such as the
                effects of new groups.
            model: Sends the draws through another model, such as `ab.do(m, {...})`.
            batch_size: Draws per step, to bound memory.

        Returns:
            By address, `(chain, draw, ...)`: everything that was drawn anew.

        Raises:
            InvalidValue: A latent no longer fits the arguments.
        """
        from abduce.inference.predict import predict

        return predict(
            self, key, new_args, new_kwargs, given=given, redraw=redraw, model=model,
            batch_size=batch_size,
        )  # fmt: skip

    def log_likelihood(self, *, batch_size: int | None = None) -> dict[str, Any]:
        """Pointwise log likelihood of the observed sites, `(chain, draw, ...)`, in nats."""
        from abduce.inference.predict import log_likelihood

        return log_likelihood(self, batch_size=batch_size)

    # ---------------------------------------------------------------- elsewhere

    def to_arviz(self, *, log_likelihood: bool = True, predictive: Any = None) -> Any:
        """The ArviZ object of the installed version.

        Args:
            log_likelihood: Whether to compute the pointwise log likelihood (for LOO).
            predictive: What `predict` returned, to add as `posterior_predictive`.
        """
        from abduce.inference.arviz import to_arviz

        stats = {
            k: np.asarray(v)
            for k, v in self.diagnostics.items()
            if np.shape(v)[:2] == (self.num_chains, self.num_draws) and self.log_weights is None
        }
        likelihood = None
        if log_likelihood and self.arguments is not None and self._observed_addresses():
            likelihood = {a: np.asarray(v) for a, v in self.log_likelihood().items()}
        draws = {a: np.asarray(self[a]) for a in self.draws}
        if self.log_weights is not None:
            likelihood = None
        return to_arviz(
            draws,
            sample_stats=stats or None,
            log_likelihood=likelihood,
            posterior_predictive=predictive,
            observed_data={a: np.asarray(v) for a, v in self.given.items()} or None,
            dims=self.dims_by_site,
            coords=dict(self.coords),
            attrs={"inference_library": "abduce", "algorithm": self.algorithm},
        )

    def _observed_addresses(self) -> list[str]:
        from abduce.inference.predict import observed_addresses

        return observed_addresses(self)

    def save(self, path: Any) -> Any:
        """Writes a folder that `ab.load` reads back.

        Draws, weights, data and diagnostics are kept; the model is code and is not: pass it to
        `predict(model=...)` after loading.

        Args:
            path: The folder to write.
        """
        from abduce.inference.stored import save_posterior

        return save_posterior(self, path)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{a} {tuple(np.shape(x)[2:])}" for a, x in self.draws.items())
        weighted = "" if self.log_weights is None else ", weighted"
        evidence = ""
        if self.log_evidence is not None and not isinstance(self.log_evidence, jax.core.Tracer):
            evidence = f", log evidence {float(np.asarray(self.log_evidence).mean()):.3f}"
        return (
            f"<Posterior by {self.algorithm}: {self.num_chains} x {self.num_draws} draws"
            f"{weighted} of {shapes}{evidence}>"
        )


def make_posterior(
    problem: Problem,
    draws: dict[str, Any],
    *,
    algorithm: str,
    log_weights: Any = None,
    log_evidence: Any = None,
    diagnostics: dict[str, Any] | None = None,
    messages: list[str] | None = None,
    active: dict[str, Any] | None = None,
) -> Posterior:
    """Builds a posterior and raises its warnings once."""
    sites = problem.program.sites
    messages = messages or []
    draws = {a: _hide_inactive(x, (active or {}).get(a)) for a, x in draws.items()}
    for message in messages:
        warnings.warn(message, AbduceWarning, stacklevel=4)
    used = {d for a in sites for d in sites[a].dims if d}
    return Posterior(
        draws=draws,
        log_weights=log_weights,
        log_evidence=log_evidence,
        params={},
        diagnostics=diagnostics or {},
        arguments=problem.arguments,
        given={a: g.value for a, g in problem.given.items()},
        active=active or {},
        warnings=tuple(messages),
        coords=tuple((k, tuple(v)) for k, v in problem.coords.items() if k in used),
        dims=tuple((a, sites[a].dims) for a in draws),
        deterministic=tuple(a for a in draws if sites[a].kind == "deterministic"),
        algorithm=algorithm,
    )


def _hide_inactive(x: Any, active: Any) -> Any:
    """Float draws of a site that did not count become NaN: a stand-in is no draw."""
    if active is None or not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    xp = jnp if isinstance(x, jax.core.Tracer) else np
    return xp.where(active.reshape(active.shape + (1,) * (x.ndim - active.ndim)), x, xp.nan)


def prior_posterior(model: Any, key: Any, args: Any, num_samples: int, kwargs: Any) -> Posterior:
    """Independent draws of everything in the model, as a posterior with equal weights."""
    from abduce.inference.predict import draw_prior
    from abduce.inference.problem import _accepts

    kwargs = dict(kwargs)
    coords = {} if _accepts(model, "coords") else dict(kwargs.pop("coords", None) or {})
    bare = model if model.algorithm is None else model.with_algorithm(None)
    program, arguments = bare._stage(args, kwargs)
    problem = Problem(bare, program, arguments, {}, args, kwargs, coords)
    draws, active = draw_prior(problem, key, num_samples)
    return make_posterior(problem, draws, algorithm="prior", active=active)
