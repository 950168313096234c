"""A posterior estimator as a Model `q(given, *args)`: a proposal, a guide, a starting point."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.amortized.frames import to_frame
from abduce.amortized.layout import Layout, continuous_target
from abduce.amortized.posterior_network import encode, find_frame, flat_discrete
from abduce.amortized.reading import read_example
from abduce.inference.problem import Problem, make_problem
from abduce.inference.static import Static
from abduce.inference.target import unconstrain_now
from abduce.inference.vi.fitted import JointLaw, emit_joint, log_jacobian
from abduce.ppl.model import Model
from abduce.ppl.operations import outside_scopes
from abduce.ppl.program import Arguments, stage_packed
from abduce.ppl.replay import Given, Replay

__all__ = ["AmortizedLaw", "AmortizedModel"]


class AmortizedModel(Model):
    """The latents of a model given data, as a trained network has them.

    Called as `q(given, *args)`: `given` holds the observed values (other entries are ignored),
    `args` are the model's own. All latents are drawn together.
    """

    estimator: Any
    model: Model
    algorithm: Any = None

    @property
    def name(self) -> str:
        return f"{self.estimator.name} of {self.model.name}"

    def emit(self, given: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        est = self.estimator
        with outside_scopes():
            seen = {a: x for a, x in given.items() if a in est.layout.observed}
            problem = make_problem(self.model, args, seen, kwargs, None)
            example = read_example(est, problem)
            law, operands = make_law(est, problem, example)
        sites = problem.program.sites
        addresses = [a for a in problem.program.latents if a in law.addresses]
        return emit_joint(law, operands, addresses, [sites[a].shape for a in addresses])


def make_law(est: Any, problem: Problem, example: Any) -> tuple[AmortizedLaw, Any]:
    """An estimator's law for an example, and its operands."""
    arrays, static = eqx.partition(est.network, eqx.is_array)
    law = AmortizedLaw(est.layout, est.settings, problem.arguments.static, Static(static))
    return law, (arrays, est.scales, example, list(problem.arguments.dynamic))


class AmortizedLaw(JointLaw):
    """Coordinates and discrete latents; operands are the network, its scales, the example and the
    model's arguments."""

    def __init__(self, layout: Layout, settings: Any, static: Any, network: Static):
        self.key = (layout, settings, static, network)
        self.layout, self.settings, self.static, self.network = self.key
        self.num_discrete = sum(d.size for d in layout.discrete)
        self.dim = layout.dim + self.num_discrete

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return type(other) is type(self) and self.key == other.key

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of all latents."""
        return tuple(self.layout.addresses)

    def networks(self, operands: Any) -> list[Any]:
        """Those of the ensemble."""
        network = eqx.combine(operands[0], self.network.value)
        if self.settings.num_networks == 1:
            return [network]
        arrays, static = eqx.partition(network, eqx.is_array)
        return [
            eqx.combine(jax.tree.map(lambda x, i=i: x[i], arrays), static)
            for i in range(self.settings.num_networks)
        ]

    def draw(self, key: Any, operands: Any) -> Any:
        """Coordinates, then discrete latents as floats."""
        return self.draw_with_density(key, operands)[0]

    def draw_with_density(self, key: Any, operands: Any) -> tuple[Any, Any]:
        """The vector, and its log density over coordinates and discrete latents."""
        nets = self.networks(operands)
        _, scales, example, _ = operands
        frame = self._frame(operands)
        k1, k2, k3 = jax.random.split(key, 3)
        draws = []
        for net in nets:
            e = jnp.zeros((0,))
            if net.head is not None:
                e = jax.random.normal(k2, (net.head.noise_dim,))
            draws.append(net.draw(encode(self.layout, net, scales, example, frame), k1, e))
        w, discrete, log_q = draws[0]
        if len(nets) > 1:
            i = jax.random.randint(k3, (), 0, len(nets))
            w, discrete, _ = jax.tree.map(lambda *xs: jnp.stack(xs)[i], *draws)
            log_q = self._score(nets, scales, example, frame, w, discrete)
        centre, spread = scales["u"]
        v = w if frame is None else frame[0] + frame[1] @ w
        u = centre + spread * v
        vector = jnp.concatenate([u, discrete.astype(u.dtype)])
        return vector, log_q - self._log_volume(scales, frame)

    def _frame(self, operands):
        _, scales, example, dynamic = operands
        arguments = Arguments(self.static, list(dynamic))
        example = {**example, "discrete": {}}
        return find_frame(self.layout, self.settings, example, scales, arguments)

    @staticmethod
    def _log_volume(scales, frame):
        total = jnp.sum(jnp.log(scales["u"][1]))
        return total if frame is None else total + jnp.sum(jnp.log(jnp.diagonal(frame[1])))

    def _score(self, nets, scales, example, frame, w, discrete):
        scores = [
            net.log_density(encode(self.layout, net, scales, example, frame), w, discrete)
            for net in nets
        ]
        return jax.nn.logsumexp(jnp.stack(scores)) - jnp.log(len(nets))

    def score(self, u: Any, discrete: Any, operands: Any) -> Any:
        """Log density over coordinates `u` and discrete latents counted from 0."""
        nets = self.networks(operands)
        _, scales, example, _ = operands
        frame = self._frame(operands)
        centre, spread = scales["u"]
        v = (u - centre) / spread
        w = v if frame is None else to_frame(frame, v)
        found = self._score(nets, scales, example, frame, w, discrete)
        return found - self._log_volume(scales, frame)

    def by_address(self, vector: Any, operands: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Values of all latents and deterministics, and where those in branches are active."""
        example, dynamic = operands[2], operands[3]
        u, rest = vector[: self.layout.dim], vector[self.layout.dim :]
        values, start = dict(example["observed"]), 0
        found = {}
        for d in self.layout.discrete:
            x = rest[start : start + d.size].reshape(d.shape).astype(jnp.int32) + d.low
            found[d.address] = values[d.address] = x
            start += d.size
        arguments = Arguments(self.static, dynamic)
        with outside_scopes():
            program = stage_packed(arguments)
            for d in self.layout.discrete:
                x = found[d.address].astype(program.sites[d.address].dtype)
                found[d.address] = values[d.address] = x
            target, held = continuous_target(self.layout, program, arguments, values)
            replay = Replay(record=frozenset({"value"}), score=False)
            records = target.run(replay, held, u)["records"]
        wanted = {a for a, s in program.sites.items() if s.kind == "deterministic"}
        wanted |= {s.address for s in self.layout.latents}
        found |= {a: r["value"] for a, r in records.items() if a in wanted}
        active = {a: r["active"] for a, r in records.items() if a in wanted and "active" in r}
        return found, active

    def values(self, u: Any, operands: Any) -> list[Any]:
        """In the order of the program."""
        found, _ = self.by_address(u, operands)
        return [found[a] for a in self._order(operands)]

    def _order(self, operands: Any) -> list[str]:
        with outside_scopes():
            program = stage_packed(Arguments(self.static, operands[3]))
        return [a for a in program.latents if a in self.addresses]

    def log_density(self, values: list[Any], operands: Any) -> Any:
        """Over the values themselves: with the Jacobian of the coordinates."""
        by_address = dict(zip(self._order(operands), values, strict=True))
        example, dynamic = operands[2], operands[3]
        arguments = Arguments(self.static, dynamic)
        everything = {**example["observed"], **by_address}
        discrete = flat_discrete(
            self.layout,
            {d.address: by_address[d.address].astype(jnp.int32) - d.low
             for d in self.layout.discrete},
        )  # fmt: skip
        u, correction = jnp.zeros((0,)), jnp.zeros(())
        if self.layout.dim:
            with outside_scopes():
                program = stage_packed(arguments)
                target, held = continuous_target(self.layout, program, arguments, everything)
                given = {
                    s.address: Given(
                        program.sites[s.address].to_physical(by_address[s.address]), trusted=True
                    )
                    for s in target.slots
                }
                u = unconstrain_now(target, held, given)
            correction = log_jacobian(target, held, u)
        return self.score(u, discrete, operands) - correction
