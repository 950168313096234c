"""How likelihoods and ratios are trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.fitting import with_arguments
from abduce.amortized.likelihood_network import SitePlan
from abduce.amortized.operands import elements
from abduce.amortized.posing import draw_values
from abduce.ppl.operations import outside_scopes
from abduce.ppl.program import stage_packed
from abduce.ppl.replay import Given

__all__ = ["LikelihoodTask"]

_MOST = 16  # elements of a simulation that enter one step; they share their latents


@dataclasses.dataclass(frozen=True)
class LikelihoodTask:
    """See `abduce.amortized.training.Task`. `data` is `{"simulation", "scales"}`.

    Attributes:
        plans: The sites; empty while they are still to be read off a sample.
        addresses: Theirs.
        ratio: Whether ratios are learned.
        num_contrast, balance: Of `ab.nre`.
    """

    plans: tuple[SitePlan, ...]
    addresses: tuple[str, ...]
    ratio: bool
    num_contrast: int = 5
    balance: float = 0.0

    def simulate(self, key: Any, num: int, data: Any) -> Any:
        """By address, values `(num, elements, ...)` and operands."""

        def one(key):
            k1, k2 = jax.random.split(key)
            return self._example(*draw_values(data["simulation"], k1), k2)

        return jax.vmap(one)(jax.random.split(key, num))

    def read(self, rows: Any, key: Any, data: Any) -> Any:
        """The same from stored latents and values."""
        arguments = data["simulation"]["arguments"]

        def one(row, key):
            return self._example(*with_arguments(row, arguments), key)

        return jax.vmap(one)(rows, jax.random.split(key, len(next(iter(rows.values())))))

    def _example(self, values: Any, arguments: Any, key: Any) -> Any:
        given = {a: Given(x, trusted=True) for a, x in values.items()}
        with outside_scopes():
            program = stage_packed(arguments)
            found = elements(program, arguments, None, given, self.addresses)

        def some(i, tree):
            n = len(tree[0])
            if n <= _MOST:
                return tree
            keep = jax.random.choice(jax.random.fold_in(key, i), n, (_MOST,), replace=False)
            return jax.tree.map(lambda x: x[keep], tree)

        return {a: some(i, found[a]) for i, a in enumerate(self.addresses)}

    def loss(self, network: Any, key: Any, batch: Any, data: Any) -> Any:
        """The sum over sites of the mean loss per element."""
        total = jnp.zeros((), jnp.result_type(float))
        for i, plan in enumerate(self.plans):
            site = self._ratio_loss if self.ratio else self._likelihood_loss
            scales = data["scales"][plan.address]
            k = jax.random.fold_in(key, i)
            total = total + site(network[plan.address], plan, scales, k, batch[plan.address])
        return total

    def _likelihood_loss(self, network, plan, scales, key, pairs):
        def one(y, operands):
            return -network.log_density(plan, scales, y, operands)

        return jnp.mean(jax.vmap(jax.vmap(one))(*pairs))

    def _ratio_loss(self, network, plan, scales, key, pairs):
        """Contrastive neural ratio estimation.

        Miller, Weniger and Forre, "Contrastive Neural Ratio Estimation", NeurIPS 2022, eq. 10 with
        `gamma = 1`; `balance` adds the condition of Delaunoy, Hermans, Rozet, Wehenkel and Louppe,
        "Towards Reliable Simulation-Based Inference with Balanced Neural Ratio Estimation",
        NeurIPS 2022, eq. 8. Contrasting operands come from other simulations and any element.
        """
        values, operands = pairs
        num, size = values.shape[:2]
        count = self.num_contrast

        def moved(k, shift):
            order = jax.random.permutation(k, size)
            return jax.tree.map(lambda x: jnp.roll(x, shift, 0)[:, order], operands)

        def ratio(y, x):
            return network.log_ratio(plan, scales, y, x)

        both = jax.vmap(jax.vmap(ratio))
        k_shift, key = jax.random.split(key)
        # Different shifts, none of them 0: each contrast is another simulation.
        shifts = 1 + jax.random.permutation(k_shift, max(num - 1, 1))[:count]
        keys = jax.random.split(key, count)
        here = both(values, operands)
        there = jnp.stack([both(values, moved(keys[i], shifts[i % len(shifts)]))
                           for i in range(count)])  # fmt: skip
        log_k = jnp.log(jnp.asarray(float(count), here.dtype))
        none = jnp.logaddexp(log_k, jax.nn.logsumexp(there, 0)) - log_k
        among = jnp.concatenate([here[None], there[1:]])
        some = jnp.logaddexp(log_k, jax.nn.logsumexp(among, 0)) - here
        loss = 0.5 * jnp.mean(none) + 0.5 * jnp.mean(some)
        if self.balance:
            sums = jnp.mean(jax.nn.sigmoid(here)) + jnp.mean(jax.nn.sigmoid(there))
            loss = loss + self.balance * (sums - 1) ** 2
        return loss

    def explain(self, batch: Any) -> str:
        """Names what is not finite in a batch."""
        for a, (values, operands) in batch.items():
            for what, x in [("values", values), *(("operands", x) for x in operands)]:
                bad = int((~np.isfinite(np.asarray(x, np.float64))).sum())
                if bad:
                    return (
                        f"{bad} {what} of site {a!r} are not finite. Make the simulator return "
                        f"finite values there."
                    )
        return "the simulations are finite. Lower learning_rate= or clip=."
