"""Training throughput of an amortized posterior, beside the same training written by hand in JAX.

A posterior of location and scale from a set of 20 numbers, and of four coefficients from 20 rows of
a regression. Both sides have the same network (the one that `ab.npe` makes), simulate every batch
anew, and optimize with the same clipping, schedule, AdamW and moving average. By hand the simulator
and the loss are a few lines of `jax.numpy`, and the step is compiled alone (a loop in Python) or a
hundred at a time (`jax.lax.scan`); the faster counts.

abduce is timed on a second `fit`: nothing compiles, but all that `fit` does besides the steps
(scales, probes, validation, the check for a Laplace frame) is in its time. Sides alternate; medians
of ratios.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --steps 500 --rounds 3
"""

import argparse
import statistics
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import abduce as ab
import abduce.dist as dist
from abduce.amortized.networks import squash
from benchmarks.measure import markdown_table, write_results

N, P, BATCH, RATE, CHUNK = 20, 4, 256, 1e-3, 100


@ab.model
def location_scale():
    mu = ab.sample("mu", dist.Normal(0.0, 1.0))
    sigma = ab.sample("sigma", dist.LogNormal(0.0, 0.5))
    jax.vmap(lambda _: ab.sample("y", dist.Normal(mu, sigma)))(jnp.arange(N))


@ab.model
def regression(x):
    b = ab.sample("b", dist.Normal(0.0, 1.0).expand([P]))
    jax.vmap(lambda row: ab.sample("y", dist.Normal(row @ b, 1.0)))(x)


@ab.model
def design():
    return ab.sample("x", dist.Normal(0.0, 1.0).expand([N, P]))


def simulate_location_scale(key):
    k1, k2, k3 = jax.random.split(key, 3)
    u = jnp.array([jax.random.normal(k1), 0.5 * jax.random.normal(k2)])
    y = u[0] + jnp.exp(u[1]) * jax.random.normal(k3, (N,))
    return y[:, None], u


def simulate_regression(key):
    k1, k2, k3 = jax.random.split(key, 3)
    b, x = jax.random.normal(k1, (P,)), jax.random.normal(k2, (N, P))
    y = x @ b + jax.random.normal(k3, (N,))
    return jnp.concatenate([y[:, None], x], 1), b


SETTINGS: dict[str, Any] = {"observed": "y", "num_candidates": 0, "frame": False}
CASES: dict[str, Any] = {
    "location and scale": (lambda: ab.npe(location_scale, **SETTINGS), simulate_location_scale),
    "regression": (lambda: ab.npe(regression, designs=design, **SETTINGS), simulate_regression),
}


class ByHand:
    """The loop that one writes without a library."""

    def __init__(self, network: Any, scales: Any, simulate: Any, num_steps: int):
        params, static = eqx.partition(network, eqx.is_inexact_array)
        rate = optax.warmup_cosine_decay_schedule(
            0.0, RATE, int(0.05 * num_steps), num_steps, 0.01 * RATE
        )
        optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0)
        )
        decay = 1 - 1 / max(0.02 * num_steps, 1.0)
        (centre, spread), (low, wide) = scales["features"][0], scales["u"]
        self.num_steps = num_steps
        self.start = (params, optimizer.init(params), params)

        def loss(params, key):
            net = eqx.combine(params, static)

            def one(key):
                data, u = simulate(key)
                context = net.encoder([squash((data - centre) / spread)], None, None)
                return -net.head.log_density(context, (u - low) / wide)

            return jnp.mean(jax.vmap(one)(jax.random.split(key, BATCH)))

        def step(state, key):
            params, opt, mean = state
            value, grads = jax.value_and_grad(loss)(params, key)
            updates, opt = optimizer.update(grads, opt, params)
            params = optax.apply_updates(params, updates)
            mean = jax.tree.map(lambda m, p: decay * m + (1 - decay) * p, mean, params)
            return (params, opt, mean), value

        def many(state, key):
            return jax.lax.scan(step, state, jax.random.split(key, CHUNK))

        self.step, self.many = jax.jit(step), jax.jit(many)
        self.simulate = jax.jit(lambda key: jax.vmap(simulate)(jax.random.split(key, BATCH)))

    def loop(self, key: Any) -> list[float]:
        state, losses = self.start, []
        for i in range(self.num_steps):
            state, value = self.step(state, jax.random.fold_in(key, i))
            losses.append(value)
        return [float(x) for x in losses]

    def scanned(self, key: Any) -> list[float]:
        state, losses = self.start, []
        for i in range(self.num_steps // CHUNK):
            state, values = self.many(state, jax.random.fold_in(key, i))
            losses.append(values)
        return np.concatenate(losses).tolist()

    def simulations(self, key: Any) -> list[float]:
        out = None
        for i in range(self.num_steps):
            out = self.simulate(jax.random.fold_in(key, i))
        jax.block_until_ready(out)
        return []


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="throughput", help="stem of the result files")
    options = parser.parse_args()
    if options.steps % CHUNK:
        parser.error(f"--steps has to be a multiple of {CHUNK}")
    records = [_case(name, options.steps, options.rounds) for name in CASES]
    header = [
        "posterior", "abduce, examples/s", "by hand, examples/s", "faster by hand",
        "abduce / by hand", "simulation alone, share of a step", "loss, abduce", "loss, by hand",
    ]  # fmt: skip
    rows = [
        [
            r["name"], f"{r['abduce']:,.0f}", f"{r['by_hand']:,.0f}", r["faster"], r["ratio"],
            f"{r['simulation']:.2f}", r["loss"], r["loss_by_hand"],
        ]
        for r in records
    ]  # fmt: skip
    body = (
        f"{options.steps:,} steps of {BATCH} fresh simulations, {options.rounds} alternating "
        "rounds, medians. Losses are means over the last tenth of the steps, in nats per data "
        "set.\n\n" + markdown_table(header, rows)
    )
    write_results(options.name, "Training throughput", body, {"results": records})


def _case(name: str, num_steps: int, rounds: int) -> dict[str, Any]:
    make, simulate = CASES[name]
    estimator = make()

    def fit(seed):
        fitted = estimator.fit(
            jax.random.key(seed), num_steps=num_steps, batch_size=BATCH, learning_rate=RATE,
            progress_bar=False,
        )  # fmt: skip
        return fitted, fitted.history["loss"].tolist()

    fitted, _ = fit(0)
    start = estimator.fit(jax.random.key(0), num_steps=1, batch_size=BATCH, progress_bar=False)
    hand = ByHand(start.network, fitted.scales, simulate, num_steps)
    sides = {
        "abduce": lambda key: fit(1)[1],
        "loop": hand.loop,
        "scan": hand.scanned,
        "simulation": hand.simulations,
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    losses: dict[str, list[float]] = {}
    for i in range(rounds + 1):
        for side, run in sides.items():
            begin = time.perf_counter()
            losses[side] = run(jax.random.key(i))
            seconds[side] += [time.perf_counter() - begin] if i else []
    middle = {side: statistics.median(s) for side, s in seconds.items()}
    faster = min(("loop", "scan"), key=middle.__getitem__)
    pairs = zip(seconds["abduce"], seconds[faster], strict=True)
    ratio = statistics.median(h / a for a, h in pairs)
    tail = num_steps // 10
    total = num_steps * BATCH
    record = {
        "name": name, "abduce": total / middle["abduce"], "by_hand": total / middle[faster],
        "faster": faster, "ratio": ratio, "simulation": middle["simulation"] / middle[faster],
        "loss": float(np.mean(losses["abduce"][-tail:])),
        "loss_by_hand": float(np.mean(losses[faster][-tail:])), "seconds": seconds,
    }  # fmt: skip
    print({k: v for k, v in record.items() if k != "seconds"}, flush=True)
    return record


if __name__ == "__main__":
    main()
