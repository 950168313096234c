"""Prior-fitted networks: trained once on data sets from a prior, they predict in one pass.

Mueller, Hollmann, Pineda Arango, Grabocka and Hutter, "Transformers Can Do Bayesian Inference",
ICLR 2022. The prior is a Model of whole data sets. Each training step draws data sets, takes the
first points of each as its context, and lowers `-log q(target | query, context)` of the others,
whose mean is the divergence from the exact posterior predictive distribution plus a constant.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np

from abduce.amortized.pfn_context import Cache, read_context
from abduce.amortized.pfn_draws import martingale_posterior, sample_functions
from abduce.amortized.pfn_network import Architecture, PFNNetwork, make_architecture
from abduce.amortized.pfn_sites import Table, make_table
from abduce.amortized.pfn_store import pack, table_from, table_to, unpack
from abduce.amortized.pfn_task import (
    PFNTask,
    estimate_constants,
    num_draws,
    redrawable,
    simulate,
    stored_sets,
)
from abduce.amortized.rows import Rows, split_rows
from abduce.amortized.training import Recipe, num_parameters, train
from abduce.errors import InvalidAlgorithm, NotFitted, suggest
from abduce.inference.persistence import LoadError, save_folder
from abduce.ppl.model import Model
from abduce.ppl.operations import stage_operation, typed_key
from abduce.ppl.program import Arguments, stage_packed

__all__ = ["KIND", "PFN", "from_saved", "pfn"]

KIND = "pfn"
_REDRAWS = 16
_HELD_OUT = 0.05  # of stored data sets, for validation


def pfn(
    prior: Model,
    *args: Any,
    context: Any,
    query: Any,
    width: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    num_bars: int = 1000,
    head: str = "bars",
    num_components: int = 10,
    missing: float | bool = 0.0,
    shuffle: bool = False,
    precision: str = "float32",
    **kwargs: Any,
) -> PFN:
    """A prior-fitted network for the data sets of a prior.

    Args:
        prior: A Model of a data set: the leading axis of every site in `context` runs over its
            points, in an order that does not matter (or see `shuffle`). The number of points
            there decides the largest context that is trained, one less.
        *args, **kwargs: The prior's arguments.
        context: Address, or list of addresses, of what is known of a point in the context.
        query: What is predicted: addresses of scalar sites with a value per point (given the
            point's other context sites), and of global sites, such as a lengthscale. Of a global
            site with several numbers, each is predicted by its own marginal distribution. Integer
            and boolean sites get probabilities of classes.
        width: Length of a token.
        num_layers, num_heads: Of the transformer.
        num_bars: Bars of the histogram that a continuous target gets.
        head: 'bars', or 'mixture' for a mixture of normals in unconstrained coordinates.
        num_components: Of the mixture.
        missing: Largest fraction of entries that is hidden in training. Above 0, values may be
            missing when predicting (NaN, or `ab.masked`); True is 0.3.
        shuffle: Whether to put points in random order before they are split into context and
            queries: for priors whose points come in an order, such as a grid.
        precision: 'float32', or 'bfloat16' for the products inside the layers.

    Returns:
        An estimator to be fitted.

    Raises:
        UnknownAddress: `context` or `query` names no site.
        InvalidAlgorithm: A setting, or the shapes of sites, do not fit.

    Example:
        >>> @ab.model
        ... def prior(n):
        ...     w = ab.sample("w", dist.Normal(0, 1))
        ...     x = ab.sample("x", dist.Uniform(-1, 1).expand([n]))
        ...     ab.sample("y", dist.Normal(w * x, 0.1))
        >>> lines = ab.pfn(prior, 20, context=["x", "y"], query="y")
        >>> lines = lines.fit(jax.random.key(0), num_steps=1000)
        >>> d = lines.predict({"x": x, "y": y}, {"x": jnp.linspace(-1, 1, 50)})
        >>> d.mean.shape
        (50,)
    """
    if not isinstance(prior, Model):
        raise InvalidAlgorithm(
            f"ab.pfn takes a model of data sets, got {type(prior).__name__}. Decorate the function "
            f"with @ab.model."
        )
    architecture = make_architecture(
        width=width, num_layers=num_layers, num_heads=num_heads, head=head, num_bars=num_bars,
        num_components=num_components, precision=precision,
    )  # fmt: skip
    rate = 0.3 if missing is True else float(missing)
    if not 0 <= rate < 1:
        raise InvalidAlgorithm(f"ab.pfn: missing must lie in [0, 1), got {missing!r}.")
    bare = prior.with_algorithm(None) if prior.algorithm is not None else prior
    program, arguments = stage_operation(bare, args, kwargs)
    other = None
    if args and type(args[0]) is int:  # with one more point, sites of points grow
        try:
            other, _ = stage_operation(bare, (args[0] + 1, *args[1:]), kwargs)
        except (TypeError, ValueError):
            other = None
    table = make_table(program, other, context, query, rate > 0)
    return PFN(
        arguments=arguments,
        table=table,
        architecture=architecture,
        missing=rate,
        shuffle=bool(shuffle),
        is_single=isinstance(query, str),
    )


class PFN(eqx.Module):
    """A prior-fitted network; `ab.pfn` makes it, `fit` trains it.

    Attributes:
        arguments: The prior and its arguments; None after loading.
        table: The sites, by role.
        architecture: Settings of the network.
        missing: Largest fraction of hidden entries in training.
        shuffle: Whether points are put in random order in training.
        is_single: Whether the query is one address, so that a prediction is one distribution.
        network: The trained network, or None.
        constants: By address, arrays that features and heads need.
        history: `loss` per step, `validation_step` and `validation_loss`, in nats.
    """

    arguments: Arguments | None
    table: Table = eqx.field(static=True)
    architecture: Architecture = eqx.field(static=True)
    missing: float = eqx.field(static=True)
    shuffle: bool = eqx.field(static=True)
    is_single: bool = eqx.field(static=True)
    network: PFNNetwork | None = None
    constants: dict[str, dict[str, Any]] | None = None
    history: dict[str, np.ndarray] | None = None

    @property
    def name(self) -> str:
        """As it is called under `ab.`."""
        return "pfn"

    @property
    def is_fitted(self) -> bool:
        """Whether it can predict."""
        return self.network is not None

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return num_parameters(self._fitted("num_parameters")[0])

    def _fitted(self, call: str) -> tuple[PFNNetwork, dict[str, dict[str, Any]]]:
        if self.network is None or self.constants is None:
            raise NotFitted(
                f"pfn.{call}: this pfn of `{self.table.model_name}` is not fitted. Call "
                f"pfn = pfn.fit(jax.random.key(0), num_steps=10_000), or ab.load a saved one."
            )
        return self.network, self.constants

    def fit(
        self,
        key: Any,
        *,
        num_steps: int,
        batch_size: int = 16,
        learning_rate: float = 1e-3,
        checkpoint_dir: Any = None,
        validate_every: int | None = None,
        mesh: Any = None,
        progress_bar: bool = True,
        data: Mapping[str, Any] | None = None,
        **recipe: Any,
    ) -> PFN:
        """Trains the network on data sets drawn from the prior in every step.

        A fitted one goes on from its weights.

        Args:
            key: Random key.
            num_steps: Optimizer steps.
            batch_size: Data sets per step.
            learning_rate: At its top; it warms up, and falls to nearly nothing along a cosine.
            checkpoint_dir: Folder to write to, and to resume from after an interruption.
            validate_every: Steps between validations.
            mesh: A `jax.sharding.Mesh` over which data sets of a step are spread.
            progress_bar: Whether to show progress.
            data: Data sets made elsewhere instead of the prior's: by address,
                `(num_sets, num_points, ...)`, and `(num_sets, ...)` for global sites.
            **recipe: Other fields of `training.Recipe`, such as `accumulate`, `patience`, `ema`.

        Returns:
            A new, fitted estimator; this one stays as it is.

        Raises:
            Degenerate: The loss was not finite; the message names the site.
            InvalidAlgorithm, InvalidValue: Settings, checkpoint or data do not fit.
        """
        key = typed_key(key, "pfn.fit")
        k_draws, k_init, k_train = jax.random.split(key, 3)
        known = [f.name for f in dataclasses.fields(Recipe)]
        for name in recipe:
            if name not in known:
                raise InvalidAlgorithm(
                    f"pfn.fit has no setting {name!r}; there are "
                    f"{', '.join(inspect.signature(PFN.fit).parameters)} and {', '.join(known)}."
                    f"{suggest(name, known)}"
                )
        settings = Recipe(
            num_steps=num_steps, batch_size=batch_size, learning_rate=learning_rate,
            validate_every=validate_every, **recipe,
        )  # fmt: skip
        rows = held_out = None
        redrawn: tuple[str, ...] = ()
        if data is None:
            if self.arguments is None:
                raise InvalidAlgorithm(
                    "pfn.fit: a loaded pfn has no prior to draw from. Pass data={...}, or fit "
                    "ab.pfn(prior, ...) anew."
                )
            redrawn = redrawable(stage_packed(self.arguments), self.table)
        else:
            arrays = stored_sets(self.table, data)
            seed = int(jax.random.bits(k_draws) >> 1)
            rows, held_out = split_rows(arrays, _HELD_OUT, seed, batch_size, settings.accumulate)
        table, constants = self.table, self.constants
        if constants is None:
            draws = self._draws(k_draws, rows)
            table, constants = estimate_constants(
                table, draws, self.architecture.num_bars, self.architecture.head
            )
        network = self.network or PFNNetwork(k_init, table, self.architecture)
        task = PFNTask(
            table=table,
            redrawn=redrawn,
            num_redraws=_REDRAWS,
            shuffle=self.shuffle,
            missing=self.missing,
        )
        trained = train(
            task, network, k_train, {"arguments": self.arguments, "constants": constants},
            settings, rows=rows, held_out=held_out, checkpoint_dir=checkpoint_dir, mesh=mesh,
            progress_bar=progress_bar, name="pfn",
        )  # fmt: skip
        return dataclasses.replace(
            self, table=table, network=trained.network, constants=constants,
            history=trained.history,
        )  # fmt: skip

    def _draws(self, key: Any, rows: Rows | None) -> dict[str, np.ndarray]:
        """Data sets that constants are estimated from."""
        if rows is not None:
            index = np.sort(rows.index)[:: max(1, rows.num_rows // num_draws(self.table))]
            return {a: np.asarray(x[index]) for a, x in rows.arrays.items()}
        assert self.arguments is not None
        return simulate(key, self.arguments, self.table.addresses, num_draws(self.table))

    # ------------------------------------------------------------------ predicting

    def predict(self, context: Any, query: Any = None) -> Any:
        """Posterior predictive distributions.

        A query's prediction depends on the context and on its own inputs alone: neither on the
        order of the context, nor on what else is asked. For several data sets of equal size, use
        `jax.vmap`. For many queries of one context, `cache` is faster.

        Args:
            context: By address, `(num_context, ...)`; `{}` or None for none. NaN and `ab.masked`
                mark missing entries, if `missing=` allows them.
            query: By address, inputs of the points to predict, `(num_queries, ...)`; None where
                there are none: only global targets, or points without inputs.

        Returns:
            A NumPyro distribution with `mean`, `variance`, `std`, `quantile(q)`, `interval`,
            `log_prob`, `cdf` and `sample`, of batch shape `(num_queries,)`, `()` without inputs,
            or that of a global site; a dict of them by address if `query=` was a list.

        Raises:
            NotFitted: `fit` was not called.
            UnknownAddress, MissingData, InvalidValue: Data do not fit; see the message.
        """
        return self.cache(context, _call="predict").predict(query)

    def cache(self, context: Any, *, _call: str = "cache") -> Cache:
        """Reads a context once, for any number of later queries.

        Args:
            context: As in `predict`. It is copied.

        Returns:
            An object with `.predict(query)`, equal to `pfn.predict(context, query)`.
        """
        network, constants = self._fitted(_call)
        points = read_context(self.table, context)
        return Cache.of(network, constants, points, self.is_single)

    def sample_functions(self, key: Any, context: Any, query: Any, num_samples: int = 100) -> Any:
        """Joint draws of the targets at the query points.

        Points are drawn one after the other, in an order of each draw's own, and join the context
        of the next, so that a draw is coherent across points; observation noise is part of it.

        Args:
            key: Random key.
            context, query: As in `predict`.
            num_samples: Number of draws.

        Returns:
            Shape `(num_samples, num_queries)`.

        Raises:
            InvalidAlgorithm: There is not exactly one target that is part of the context.
        """
        network, constants = self._fitted("sample_functions")
        key = typed_key(key, "pfn.sample_functions")
        return sample_functions(network, constants, key, context, query, num_samples)

    def martingale_posterior(
        self,
        key: Any,
        context: Any,
        functional: Any,
        num_samples: int = 100,
        num_steps: int | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Draws of a functional of the whole population, by predictive resampling.

        Fong, Holmes and Walker, "Martingale posterior distributions", JRSS B 2023: the data are
        continued by draws from the predictive distribution, each of which joins the context of
        the next; what the functional says of the continued data is a posterior draw.

        Args:
            key: Random key.
            context: As in `predict`.
            functional: From the continued data, a dict of `(num_context + num_steps, ...)` by
                address, to a pytree of arrays. Compiled.
            num_samples: Number of posterior draws.
            num_steps: How far data are continued; None: up to the size of a training data set.
            inputs: Inputs of the new points, by address, `(num_steps, ...)`; None: each is that of
                a point so far, chosen at random (a Polya urn, the Bayesian bootstrap).

        Returns:
            What the functional returns, with a leading axis of `num_samples`.
        """
        network, constants = self._fitted("martingale_posterior")
        key = typed_key(key, "pfn.martingale_posterior")
        return martingale_posterior(
            network, constants, key, context, functional, num_samples, num_steps, inputs
        )

    # ------------------------------------------------------------------ storing

    def save(self, path: Any) -> Any:
        """Writes a folder of `config.json` and `weights.safetensors`, which `ab.load` reads.

        The prior is not stored: a loaded one predicts, bit for bit the same, and can be fitted on
        with `data=`.

        Returns:
            The path.
        """
        network, constants = self._fitted("save")
        config = {
            "table": table_to(self.table),
            "architecture": dataclasses.asdict(self.architecture),
            "missing": self.missing,
            "shuffle": self.shuffle,
            "is_single": self.is_single,
        }
        return save_folder(path, KIND, config, pack(network, constants, self.history or {}))

    def __repr__(self) -> str:
        t = self.table
        return (
            f"<pfn of {t.model_name}: context {', '.join(t.context)}, query "
            f"{', '.join((*t.targets, *t.latents))}, {'' if self.is_fitted else 'not '}fitted>"
        )


def from_saved(
    config: Mapping[str, Any], arrays: dict[str, Any], where: str = "the saved folder"
) -> PFN:
    """A fitted pfn from what `PFN.save` stored.

    Raises:
        LoadError: Something is missing or does not fit.
    """
    try:
        table = table_from(config["table"])
        architecture = Architecture(**config["architecture"])
        missing, shuffle = float(config["missing"]), bool(config["shuffle"])
        is_single = bool(config["is_single"])
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"{where}: lacks a setting, or has an odd one: {error!r}.") from error
    network, constants, history = unpack(table, architecture, arrays, where)
    return PFN(
        arguments=None,
        table=table,
        architecture=architecture,
        missing=missing,
        shuffle=shuffle,
        is_single=is_single,
        network=network,
        constants=constants,
        history=history,
    )
