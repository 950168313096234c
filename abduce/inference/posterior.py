"""Posteriors: what every algorithm returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidValue, UnknownAddress, suggest
from abduce.inference import weighting
from abduce.inference.problem import Problem, make_problem
from abduce.inference.warning import warn
from abduce.ppl.masked import Masked
from abduce.ppl.program import Arguments

__all__ = ["Posterior", "make_posterior", "prior_posterior", "with_warnings"]



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
        given: The data it was conditioned on; partly observed ones as `ab.masked` makes them.
        active: For sites in branches, whether they counted, `(chain, draw, mapped axes)`. Where
            they did not, float draws are NaN; `mean`, `std`, `quantile` and `summary` are over the
            draws where they did.
        coords: Labels by dimension name.
        dims: Names of the dimensions of each site.
        deterministic: Which of the draws are not choices.
        algorithm: What made it, for the record.
        resume: What a particle method needs to go on with new data, or None.
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
    resume: Any = None

    # ---------------------------------------------------------------- draws

    @property
    def num_chains(self) -> int:
        """Number of chains."""
        return self._shape[0]

    @property
    def num_draws(self) -> int:
        """Draws per chain."""
        return self._shape[1]

    @property
    def _shape(self) -> tuple[int, int]:
        if not self.draws:  # a filter that keeps no past, of a model without other latents
            return np.shape(self.log_weights)[-2:]
        address, draws = next(iter(self.draws.items()))
        shape = np.shape(draws)
        extra = len(shape) - 2 - len(self.dims_by_site[address])
        if extra > 0:
            raise InvalidValue(
                f"this is a stack of posteriors, shape {shape[:extra]}, as jax.vmap makes. Take "
                f"one of them, jax.tree.map(lambda x: x[0], post), or compute inside the mapped "
                f"function."
            )
        return shape[:2]

    def __contains__(self, address: str) -> bool:
        return address in self.draws

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        """The addresses there are draws of, in the order of the model."""
        return [a for a, _ in self.dims if a in self.draws]  # trees are sorted by address

    def __getitem__(self, address: str) -> Any:
        """Equally weighted draws, `(chain, draw, ...)`; weighted ones are resampled once."""
        draws = self._raw(address)
        if self.log_weights is None:
            return draws
        index = self._resampled
        return weighting.flat(draws)[index][None]

    def _raw(self, address: str) -> Any:
        _ = self._shape  # refuses stacks of posteriors
        if address not in self.draws:
            raise UnknownAddress(
                f"the posterior has no draws of {address!r}; there are {', '.join(self.draws)}."
                f"{suggest(address, self.draws)}"
            )
        return self.draws[address]

    @property
    def _weights(self) -> Any:
        """Normalized weights, flat over chains and draws; None if equal."""
        return None if self.log_weights is None else weighting.normalized(self.log_weights)

    @property
    def _resampled(self) -> Any:
        """Indices of equally weighted draws, the same on every access."""
        return weighting.resampling_index(self._weights)

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
        weights = self._weights
        p = None if weights is None else jnp.asarray(weights)
        index = jax.random.choice(key, total, (n,), p=p)
        return {a: weighting.flat(jnp.asarray(x))[index] for a, x in self.draws.items()}

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
        flat = {a: weighting.flat(jnp.asarray(x)) for a, x in self.draws.items()}
        out = jax.vmap(f)(flat) if batch_size is None else jax.lax.map(
            f, flat, batch_size=batch_size
        )  # fmt: skip
        return jax.tree.map(lambda x: x.reshape((*shape, *x.shape[1:])), out)

    def expect(self, f: Callable[[dict[str, Any]], Any], *, batch_size: int | None = None) -> Any:
        """Posterior mean of `f` of a draw's flat dict, by weight."""
        weights = self._weights
        values = self.map(f, batch_size=batch_size)
        return jax.tree.map(lambda x: weighting.mean(x, weights), values)

    def _on(self, address: str) -> Any | None:
        """Where a conditional site is active, in the shape of its draws; None for others."""
        if address not in self.active:
            return None
        on, shape = self.active[address], np.shape(self.draws[address])
        xp = jnp if isinstance(on, jax.core.Tracer) else np
        return xp.broadcast_to(on.reshape(on.shape + (1,) * (len(shape) - on.ndim)), shape)

    def mean(self, address: str) -> Any:
        """Posterior mean of a site."""
        return weighting.mean(self._raw(address), self._weights, self._on(address))

    def std(self, address: str) -> Any:
        """Posterior standard deviation of a site."""
        x, on, weights = self._raw(address), self._on(address), self._weights
        return weighting.mean((x - weighting.mean(x, weights, on)) ** 2, weights, on) ** 0.5

    def quantile(self, address: str, q: Any) -> Any:
        """Posterior quantiles of a site.

        Args:
            address: Of the site.
            q: Probability or probabilities.

        Returns:
            Shape `jnp.shape(q) + site shape`.
        """
        q = np.asarray(q, np.float64)
        if ((q < 0) | (q > 1)).any():
            raise InvalidValue(f"post.quantile: probabilities lie in [0, 1], got {q}.")
        return weighting.quantile(self._raw(address), q, self._weights, self._on(address))

    def summary(self, *, interval: float = 0.9) -> Any:
        """Mean, sd, interval, effective sample sizes, R-hat and MCSE of every element.

        Args:
            interval: Probability of the equal-tailed interval.

        Returns:
            A `Summary` table.
        """
        from abduce.inference.summary import summarize

        table = summarize(
            {a: np.asarray(self.draws[a]) for a in self.keys()},
            None if self.log_weights is None else np.asarray(self.log_weights),
            interval=interval,
            dims={a: d for a, d in self.dims if a in self.draws},
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
        """Pointwise log likelihood of the observed sites, in nats.

        Returns:
            By address, `(chain, draw, ...)`, in the order of `post[...]`: an entry per element
            (mapped axes, then batch). Entries that were not observed are NaN.
        """
        from abduce.inference.predict import log_likelihood

        return log_likelihood(self, batch_size=batch_size)

    def update(
        self,
        key: Any,
        *new_args: Any,
        given: Mapping[str, Any] | None = None,
        redraw: Any = (),
        via: Any = None,
        **new_kwargs: Any,
    ) -> Posterior:
        """The posterior given new data as well (sequential updating).

        Arguments and `given` describe the new data alone; latents are shared with the data before.
        Draws are weighted by the likelihood of the new data. Where the effective sample size falls
        below a threshold they are resampled and moved, leaving the posterior given *all* data
        invariant (Chopin 2002); a batch that says much enters in parts. In regular models moves
        become rarer and rarer: the total cost grows linearly with the number of batches.

        The posterior of a particle filter goes on with the new steps of its scans instead, from
        where they ended, at a cost that does not grow. Its draws are paths of the new steps.
        `ab.factor` counts as data: it is added with each update.

        Args:
            key: Random key.
            *new_args, **new_kwargs: Arguments of the model for the new data.
            given: The new data, by address.
            redraw: A selection of latents drawn anew for the new data, from their prior given the
                shared ones (effects of new groups); so is what depends on them. `post[...]` has
                the latest.
            via: An `ab.smc(...)` whose `threshold`, `resampler`, `kernel` and `num_moves` apply
                from now on. None: those so far, at first those that made the posterior, or the
                defaults.

        Returns:
            Weighted draws in one chain. `arguments` and `given` are those of the new data;
            `log_evidence` is that of all data if that of the start was known (draws of
            `m.prior(...)` start from 0), else None. Diagnostics: `ess`; `num_parts`, after how
            many parts of the batch particles were moved; since the start, `num_batches`,
            `num_moved` and `evaluations` (of one batch at one particle).

        Raises:
            InvalidValue: A latent does not fit the new arguments; or the posterior was loaded.
            DiscreteLatent: A latent is discrete (filters excepted).
            Degenerate: No draw explains the new data.

        Example:
            >>> post = m.posterior(key, x, given={"y": y})
            >>> post = post.update(key2, x_new, given={"y": y_new})
        """
        from abduce.inference.smc.updating import update

        return update(self, key, new_args, new_kwargs, given=given, redraw=redraw, via=via)

    def as_model(self, *, keep: Any = None, num_components: int = 512) -> Any:
        """A model of the latents, for use as prior, proposal or guide.

        A kernel density of the draws in transformed coordinates, shrunk so that mean and
        covariance there are kept (Liu and West 2001); of `ab.vi`, without `keep`, the fitted guide.

        Args:
            keep: A selection of the latents; None: all but missing data.
            num_components: Most draws to use.

        Raises:
            InvalidValue, InvalidModel: See the messages; a posterior loaded from disk has none.

        Example:
            >>> later = ab.with_prior(m, post.as_model())  # its arguments are ignored
        """
        from abduce.inference.as_model import as_model

        guide = self.resume.get("guide") if isinstance(self.resume, dict) else None  # of ab.vi
        if guide is not None and keep is None:
            return guide
        return as_model(self, keep=keep, num_components=num_components)

    # ---------------------------------------------------------------- elsewhere

    def to_arviz(self, *, log_likelihood: bool = True, predictive: Any = None) -> Any:
        """The ArviZ object of the installed version.

        The log likelihood of a partly observed site `y` is called `y_observed` and holds the
        observed entries, flattened.

        Args:
            log_likelihood: Whether to compute the pointwise log likelihood (for LOO).
            predictive: What `predict` returned, to add as `posterior_predictive`.
        """
        from abduce.inference.arviz import to_arviz
        from abduce.inference.predict import observations, with_gaps

        stats = {
            k: np.asarray(v)
            for k, v in self.diagnostics.items()
            if np.shape(v)[:2] == self._shape and self.log_weights is None
        }
        data = observations(self)
        likelihood = None
        if log_likelihood and self.arguments is not None and data:
            found = {a: np.asarray(v) for a, v in self.log_likelihood().items()}
            likelihood = {  # leave-one-out estimates cannot take gaps
                a if data[a][1] is None else f"{a}_observed": x
                if data[a][1] is None
                else x[:, :, np.asarray(data[a][1])]
                for a, x in found.items()
            }
        return to_arviz(
            {a: np.asarray(self[a]) for a in self.keys()},
            sample_stats=stats or None,
            log_likelihood=likelihood,
            posterior_predictive=predictive,
            observed_data={a: with_gaps(*x) for a, x in data.items()} or None,
            dims=self.dims_by_site,
            coords=dict(self.coords),
            attrs={"inference_library": "abduce", "algorithm": self.algorithm},
        )

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
        shapes = ", ".join(f"{a} {tuple(np.shape(self.draws[a])[2:])}" for a in self.keys())
        weighted = "" if self.log_weights is None else ", weighted"
        evidence = ""
        if self.log_evidence is not None and not isinstance(self.log_evidence, jax.core.Tracer):
            evidence = f", log evidence {float(np.asarray(self.log_evidence).mean()):.3f}"
        return (
            f"<Posterior by {self.algorithm}: {self.num_chains} x {self.num_draws} draws"
            f"{weighted} of {shapes}{evidence}>"
        )


@jax.tree_util.register_static
class _Text(str):
    """A diagnostic in words; without leaves, so that a posterior can enter compiled functions."""

    __slots__ = ()


def with_warnings(post: Posterior, messages: list[str]) -> Posterior:
    """The posterior with more warnings, which are raised."""
    warn(messages)
    return dataclasses.replace(post, warnings=(*post.warnings, *messages))


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
    resume: Any = None,
) -> Posterior:
    """Builds a posterior and raises its warnings once."""
    sites = problem.program.sites
    messages = messages or []
    draws = {a: _hide_inactive(draws[a], (active or {}).get(a)) for a in sites if a in draws}
    warn(messages)
    used = {d for a in sites for d in sites[a].dims if d}
    return Posterior(
        draws=draws,
        log_weights=log_weights,
        log_evidence=log_evidence,
        params={},
        diagnostics={
            k: _Text(v) if isinstance(v, str) else v for k, v in (diagnostics or {}).items()
        },
        arguments=problem.arguments,
        given={
            a: g.value if g.mask is None else Masked(g.value, g.mask)
            for a, g in problem.given.items()
        },
        active=active or {},
        warnings=tuple(messages),
        coords=tuple((k, tuple(v)) for k, v in problem.coords.items() if k in used),
        dims=tuple((a, s.dims) for a, s in sites.items()),
        deterministic=tuple(a for a in draws if sites[a].kind == "deterministic"),
        algorithm=algorithm,
        resume=resume,
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

    problem = make_problem(model, args, None, kwargs, None)
    draws, active = draw_prior(problem, key, num_samples)
    return make_posterior(problem, draws, algorithm="prior", active=active)
