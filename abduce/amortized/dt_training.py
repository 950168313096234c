"""How a Distribution Transformer is trained: simulations inside the compiled step, and the loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.dt_coordinates import MixtureModel
from abduce.amortized.dt_inputs import Plan, features_of, place, place_back, tokens_of
from abduce.amortized.dt_priors import fit_laws
from abduce.amortized.mixtures import GaussianMixture
from abduce.amortized.posing import design
from abduce.ppl.operations import outside_scopes, run_program
from abduce.ppl.program import Arguments, pack, stage_packed
from abduce.ppl.replay import Given, Replay
from abduce.ppl.transforms import with_prior

__all__ = ["TransformerTask", "draw_prior_law", "with_law"]


def draw_prior_law(priors: Arguments, key: Any) -> Any:
    """What the meta-prior returns: distributions by address, or a mixture."""
    with outside_scopes():
        program = stage_packed(priors)
        replay = Replay(record=frozenset(), score=False)
        return run_program(replay, program, priors, key, {})["retval"]


def with_law(plan: Plan, arguments: Arguments, law: Any) -> Arguments:
    """The model with its prior replaced."""
    model, args, kwargs = arguments.unpack()
    prior = MixtureModel(law, plan.prior) if isinstance(law, GaussianMixture) else law
    return pack(with_prior(model, prior), args, kwargs)


@dataclasses.dataclass(frozen=True)
class TransformerTask:
    """See `abduce.amortized.training.Task`.

    `data` is `{"arguments": Arguments, "designs": Arguments or None, "priors": Arguments,
    "scales": Scales or None}`.
    """

    plan: Plan

    def simulate(self, key: Any, num: int, data: Any) -> Any:
        """Priors from the meta-prior, each with latents and observations."""
        per = self.plan.draws_per_prior if num % self.plan.draws_per_prior == 0 else 1

        def one(key):
            k1, k2 = jax.random.split(key)
            law = draw_prior_law(data["priors"], k1)
            mixture = law
            if not isinstance(law, GaussianMixture):
                plan = self.plan
                fit = fit_laws(law, plan.prior, plan.num_components, plan.num_fit_draws)
                mixture = fit.mixture
            keys = jax.random.split(k2, per)
            examples = jax.vmap(lambda k: self._example(k, data, law, mixture))(keys)
            return {**examples, **_repeated({"law": law, "mixture": mixture}, per)}

        out = jax.vmap(one)(jax.random.split(key, num // per))
        return jax.tree.map(lambda x: x.reshape((num, *x.shape[2:])), out)

    def _example(self, key: Any, data: Any, law: Any, mixture: GaussianMixture) -> dict[str, Any]:
        plan = self.plan
        k1, k2, k3 = jax.random.split(key, 3)
        arguments = data["arguments"]
        if data["designs"] is not None:
            arguments = design(arguments, data["designs"], k1)
        with outside_scopes():
            posed = with_law(plan, arguments, law)
            replay = Replay(record=frozenset({"value"}), score=False)
            records = run_program(replay, stage_packed(posed), posed, k2, {})["records"]
        values = {a: r["value"] for a, r in records.items()}
        observed = {a: values[a] for a in plan.layout.observed}
        gone = self._hidden(k3, observed, records, arguments) if plan.missing else None
        _, moved, g = place(plan, mixture, observed, gone)
        args = tuple(arguments.dynamic)[plan.skipped :]
        return {
            "prior_u": plan.prior.to_vector(values)[0],
            "target_u": plan.target.to_vector(values)[0],
            "observed": observed,
            "arguments": args,
            "gone": gone,
            "raw": features_of(plan, moved, args, gone),
            "g": g,
        }

    def _hidden(self, key: Any, observed: Any, records: Any, arguments: Any) -> dict[str, Any]:
        k1, k2, k3 = jax.random.split(key, 3)
        rate = jax.random.uniform(k2) * (jax.random.uniform(k1) < self.plan.missing)
        keys = jax.random.split(k3, len(observed))
        with outside_scopes():
            sites = stage_packed(arguments).sites
        return {
            a: jax.random.uniform(k, sites[a].shape[: sites[a].batch_ndim]) < rate
            for k, a in zip(keys, observed, strict=True)
        }

    def read(self, rows: Any, key: Any, data: Any) -> Any:
        """Stored examples are used as they stand."""
        return rows

    def standardized(self, example: Any, scales: Any) -> tuple[Any, Any, Any]:
        """Prior, tokens and masks that the network reads."""
        plan = self.plan
        prior = example["mixture"]
        if plan.equivariance is not None:
            prior = plan.equivariance.on_mixture(-example["g"], prior, plan.prior)
        centre, spread = scales.prior
        prior = prior.scaled(1 / spread, -centre / spread)
        return (prior, *tokens_of(plan, scales, example["raw"], example["gone"]))

    def posterior(self, network: Any, example: Any, scales: Any) -> tuple[GaussianMixture, Any]:
        """The posterior over target coordinates, and what un-conditioned tokens stand for."""
        prior, tokens, masks = self.standardized(example, scales)
        centre, spread = scales.target
        q = network(prior, tokens, masks).scaled(spread, centre)
        again = network.decode(network.tokens(prior), prior=True)
        centre, spread = scales.prior if self.plan.prior.dim else (0.0, 1.0)
        again = again.scaled(spread, centre)
        if self.plan.equivariance is not None:
            again = self.plan.equivariance.on_mixture(example["g"], again, self.plan.prior)
        return place_back(self.plan, example["g"], q), again

    def loss(self, network: Any, key: Any, batch: Any, data: Any) -> Any:
        """`-log q(x | z, phi) - log q(x | phi)`, the mean over a batch, in nats.

        With candidates, the gradient of the first term is that of a cross-entropy under
        self-normalized weights of the true latents and of draws of `q`, see `_candidates`.
        """

        def one(key, example):
            q, again = self.posterior(network, example, data["scales"])
            loss = -q.log_prob(example["target_u"])
            if self.plan.num_candidates:
                better = self._candidates(key, q, example, data)
                loss = jax.lax.stop_gradient(loss - better) + better
            return loss - again.log_prob(example["prior_u"])

        keys = jax.random.split(key, len(batch["g"]))
        return jnp.mean(jax.vmap(one)(keys, batch))

    def _candidates(self, key: Any, q: GaussianMixture, example: Any, data: Any) -> Any:
        """A loss whose gradient has the right mean and little noise.

        The true latents are a draw from the posterior. Together with `K` draws from `q` held fixed,
        under self-normalized weights `p / q`, they still give exact expectations over the posterior
        (invariance of iterated sampling importance resampling). Scores of draws from `q` have mean
        zero, so `1 / (K + 1)` may be taken off their weights: nothing is left at `q = p`.
        """
        k = self.plan.num_candidates
        fixed = jax.lax.stop_gradient(q)
        points = jnp.concatenate([example["target_u"][None], fixed.sample(key, k)])
        log_w = jax.vmap(lambda u: self._log_joint(u, example, data) - fixed.log_prob(u))(points)
        log_w = jnp.where(jnp.isnan(log_w), -jnp.inf, log_w)
        log_w = log_w.at[0].set(jnp.where(jnp.isfinite(log_w[0]), log_w[0], jnp.max(log_w)))
        weights = jax.nn.softmax(log_w)
        weights = weights - jnp.where(jnp.arange(k + 1) > 0, 1 / (k + 1), 0.0)
        weights = jax.lax.stop_gradient(weights)
        return -weights @ jax.vmap(q.log_prob)(jax.lax.stop_gradient(points))

    def _log_joint(self, u: Any, example: Any, data: Any) -> Any:
        """Log density of latents and seen observations, over target coordinates."""
        plan = self.plan
        values = plan.target.to_values(u)
        _, log_det = plan.target.to_vector(values)
        arguments = data["arguments"]
        if data["designs"] is not None:
            dynamic = [*arguments.dynamic[: plan.skipped], *example["arguments"]]
            arguments = Arguments(arguments.static, dynamic)
        given = {a: Given(x, trusted=True) for a, x in {**values, **example["observed"]}.items()}
        with outside_scopes():
            posed = with_law(plan, arguments, example["law"])
            program = stage_packed(posed)
            replay = Replay(record=frozenset({"score"}))
            out = run_program(replay, program, posed, None, given)
        if example["gone"] is None:
            return out["log_density"] + log_det
        total = log_det
        for a, record in out["records"].items():
            if "score" in record:
                score = record["score"]
                if a in example["gone"]:
                    score = jnp.where(example["gone"][a], 0.0, score)
                total = total + jnp.sum(score)
        return total

    def explain(self, batch: Any) -> str:
        """Names what is not finite in a batch."""
        parts = {
            "the prior's mixture": batch["mixture"],
            "the latents drawn from the prior": batch["prior_u"],
            "the latents to infer": batch["target_u"],
            **{f"observed site {a!r}": x for a, x in batch["observed"].items()},
        }
        for name, tree in parts.items():
            leaves = [np.asarray(x) for x in jax.tree.leaves(tree)]
            bad = sum(int((~np.isfinite(x)).sum()) for x in leaves if x.dtype.kind == "f")
            if bad:
                return f"{name} has {bad} values that are not finite."
        return "the simulations are finite. Lower the learning rate."


def _repeated(tree: Any, num: int) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num, *jnp.shape(x))), tree)
