"""The samplers under comparison, behind one function each.

A runner is made once per process for one posterior. Calling it samples that posterior, possibly
with other data of the same shapes, and returns when the draws are numpy arrays on the constrained
scale, which is what a user waits for. Every package uses its own defaults and the same number of
chains and iterations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.posteriors import Posterior

__all__ = ["RUNNERS", "Run", "Size", "make_runner"]


@dataclass(frozen=True)
class Size:
    """How long a run is."""

    num_warmup: int = 1000
    num_samples: int = 1000
    num_chains: int = 4


@dataclass
class Run:
    """What one call returned.

    Attributes:
        draws: By address, shape `(num_chains, num_samples, ...)`.
        num_gradients_sampling: Leapfrog steps after warm-up, all chains together.
        num_gradients_warmup: Leapfrog steps in warm-up, all chains together; None where the timed
            call does not report them (see `NumPyro.count_warmup`).
        num_divergences: Divergent transitions after warm-up.
        notes: Warnings worth a line in the record.
    """

    draws: Mapping[str, np.ndarray]
    num_gradients_sampling: int
    num_gradients_warmup: int | None
    num_divergences: int | None
    notes: list[str] = field(default_factory=list)


class Abduce:
    """`ab.nuts()` as it comes."""

    def __init__(self, posterior: Posterior, size: Size, method: str) -> None:
        import abduce as ab
        from benchmarks.models_abduce import MODELS

        # The defaults are what is measured, so nothing is passed that equals them.
        lengths = {k: v for k, v in vars(size).items() if v != getattr(Size, k)}
        self.model = ab.nuts(**lengths)(MODELS[posterior.model])
        self.addresses = posterior.addresses

    def __call__(self, seed: int, args: tuple, given: dict) -> Run:
        import warnings

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            post = self.model.posterior(jax.random.key(seed), *args, given=given)
            draws = {address: np.asarray(post[address]) for address in self.addresses}
        found = post.diagnostics
        return Run(
            draws=draws,
            num_gradients_sampling=int(np.sum(found["num_gradients_sampling"])),
            num_gradients_warmup=int(np.sum(found["num_gradients_warmup"])),
            num_divergences=int(np.sum(found["diverging"])),
            notes=[str(w.message) for w in caught],
        )


class NumPyro:
    """`MCMC(NUTS(model))`; `method` is the chain method.

    `jit_model_args=True` is NumPyro's own way to run again with other data of the same shapes
    (without it a second vectorized run raises in NumPyro 0.22); it makes no run slower.
    """

    def __init__(self, posterior: Posterior, size: Size, method: str) -> None:
        from numpyro.infer import MCMC, NUTS

        from benchmarks.models_numpyro import MODELS

        self.addresses = posterior.addresses

        def sampler(chain_method):
            kernel = NUTS(MODELS[posterior.model])
            common = {"progress_bar": False, "jit_model_args": True}
            return MCMC(kernel, chain_method=chain_method, **common, **vars(size))

        self.sampler, self.new_sampler = sampler(method), sampler

    def __call__(self, seed: int, args: tuple, given: dict) -> Run:
        fields = ("num_steps", "diverging")
        self.sampler.run(jax.random.key(seed), *args, observed=given, extra_fields=fields)
        samples = self.sampler.get_samples(group_by_chain=True)
        extra = self.sampler.get_extra_fields()
        return Run(
            draws={address: np.asarray(samples[address]) for address in self.addresses},
            num_gradients_sampling=int(np.sum(extra["num_steps"])),
            num_gradients_warmup=None,
            num_divergences=int(np.sum(extra["diverging"])),
        )

    def count_warmup(self, seed: int, args: tuple, given: dict) -> int:
        """Leapfrog steps of a warm-up, from a separate call, so that no timed call collects them.

        The steps that NumPyro's searches for a first step size take are not among them. Chains run
        one after the other whatever the timed method: the number of steps does not depend on it.
        """
        sampler = self.new_sampler("sequential")
        sampler.warmup(
            jax.random.key(seed),
            *args,
            observed=given,
            extra_fields=("num_steps",),
            collect_warmup=True,
        )
        return int(np.sum(sampler.get_extra_fields()["num_steps"]))


class BlackJAX:
    """Window adaptation and NUTS for all chains under `vmap`, in one `jit` that takes the data.

    The log density is NumPyro's, on the unconstrained scale. Chains start where NumPyro's do: at a
    uniform draw from [-2, 2] in every coordinate with a finite density and gradient.
    """

    NUM_CANDIDATES = 20  # tries for such a point; a chain takes the first good one

    def __init__(self, posterior: Posterior, size: Size, method: str) -> None:
        self.posterior, self.size, self.program = posterior, size, None

    def __call__(self, seed: int, args: tuple, given: dict) -> Run:
        if self.program is None:
            self.program = jax.jit(self._program(args, given))
        draws, steps, warmup_steps, divergent = self.program(
            jax.random.key(seed), _arrays(args), given
        )
        return Run(
            draws={a: np.asarray(draws[a]) for a in self.posterior.addresses},
            num_gradients_sampling=int(np.sum(steps)),
            num_gradients_warmup=int(np.sum(warmup_steps)),
            num_divergences=int(np.sum(divergent)),
        )

    def _program(self, args: tuple, given: dict) -> Callable[..., Any]:
        import blackjax
        from numpyro.infer.util import initialize_model

        from benchmarks.models_numpyro import MODELS

        made = initialize_model(
            jax.random.key(0),
            MODELS[self.posterior.model],
            model_args=args,
            model_kwargs={"observed": given},
            dynamic_args=True,
        )
        template = made.param_info.z

        def chain(key, arrays, given):
            full = _with_arrays(args, arrays)
            potential = made.potential_fn(*full, observed=given)
            constrain = made.postprocess_fn(*full, observed=given)

            def log_density(z):
                return -potential(z)

            init_key, warmup_key, sample_key = jax.random.split(key, 3)
            start = self._start(init_key, log_density, template)
            warmup = blackjax.window_adaptation(blackjax.nuts, log_density)
            (state, tuned), warmup_info = warmup.run(warmup_key, start, self.size.num_warmup)
            step = blackjax.nuts(log_density, **tuned).step

            def body(state, key):
                state, info = step(key, state)
                kept = (state.position, info.num_integration_steps, info.is_divergent)
                return state, kept

            keys = jax.random.split(sample_key, self.size.num_samples)
            _, (positions, steps, divergent) = jax.lax.scan(body, state, keys)
            warmup_steps = warmup_info.info.num_integration_steps
            return jax.vmap(constrain)(positions), steps, warmup_steps, divergent

        def program(key, arrays, given):
            keys = jax.random.split(key, self.size.num_chains)
            return jax.vmap(chain, in_axes=(0, None, None))(keys, arrays, given)

        return program

    def _start(self, key, log_density, template):
        leaves, treedef = jax.tree.flatten(template)

        def candidate(key):
            keys = jax.random.split(key, len(leaves))
            draws = [
                jax.random.uniform(k, jnp.shape(x), jnp.result_type(x), -2, 2)
                for k, x in zip(keys, leaves, strict=True)
            ]
            z = jax.tree.unflatten(treedef, draws)
            value, gradient = jax.value_and_grad(log_density)(z)
            finite = [jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradient)]
            return z, jnp.isfinite(value) & jnp.all(jnp.stack(finite))

        candidates, good = jax.vmap(candidate)(jax.random.split(key, self.NUM_CANDIDATES))
        return jax.tree.map(lambda x: x[jnp.argmax(good)], candidates)


def _arrays(args: tuple) -> tuple:
    """The traced part of a model's arguments: everything but sizes."""
    return tuple(None if isinstance(a, int) else a for a in args)


def _with_arrays(args: tuple, arrays: tuple) -> tuple:
    return tuple(a if isinstance(a, int) else x for a, x in zip(args, arrays, strict=True))


RUNNERS = {"abduce": Abduce, "numpyro": NumPyro, "blackjax": BlackJAX}


def make_runner(package: str, posterior: Posterior, size: Size, method: str) -> Any:
    """The runner of `package`; `method` is NumPyro's chain method and unused by the others."""
    return RUNNERS[package](posterior, size, method)
