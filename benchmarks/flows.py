"""How well do normalizing flows fit the four energies of Rezende and Mohamed (2015), table 1?

Three of the energies do not decrease along the first coordinate, so that they are densities only
on a bounded region: here the box [-4, 4]^2 that the paper's figure 3 shows. A flow is followed by
the bijection onto the box, and its base is the logistic law, which that bijection makes uniform.
The divergence `KL(q || p) = E_q[log q + U] + log Z` is minimized by Adam over its reparametrized
estimate, with the energy annealed as in the paper (section 6.1), and reported from fresh
independent draws; `log Z` comes from quadrature.

    python -m benchmarks.flows
"""

import argparse
import math
import time
from typing import Any

import numpy as np

from benchmarks.measure import markdown_table, write_results

__all__ = ["main"]

HALF_WIDTH = 4.0
PLANAR_LAYERS = (2, 8, 32)
NUM_FRESH = 2**18  # draws behind a reported divergence
GOLDEN = 1.32471795724474602596  # of Roberts' lattice in two dimensions


def energies():
    """By name: `U(z)` for `z` of shape `(2,)`, in nats."""
    import jax
    import jax.numpy as jnp

    def bump(x, center, scale):
        return -0.5 * ((x - center) / scale) ** 2

    def w1(z):
        return jnp.sin(jnp.pi * z[0] / 2)

    def w2(z):
        return 3 * jnp.exp(bump(z[0], 1, 0.6))

    def w3(z):
        return 3 * jax.nn.sigmoid((z[0] - 1) / 0.3)

    def u1(z):
        ring = -bump(jnp.linalg.norm(z), 2, 0.4)
        return ring - jnp.logaddexp(bump(z[0], 2, 0.6), bump(z[0], -2, 0.6))

    def u2(z):
        return -bump(z[1], w1(z), 0.4)

    def u3(z):
        return -jnp.logaddexp(bump(z[1], w1(z), 0.35), bump(z[1], w1(z) - w2(z), 0.35))

    def u4(z):
        return -jnp.logaddexp(bump(z[1], w1(z), 0.4), bump(z[1], w1(z) - w3(z), 0.35))

    return {"U1, two moons": u1, "U2, wave": u2, "U3, split wave": u3, "U4, fork": u4}


def log_normalizer(energy, n: int = 2000) -> float:
    """`log` of the integral of `exp(-U)` over the box, by the midpoint rule in float64."""
    import jax

    x = ((np.arange(n) + 0.5) / n * 2 - 1) * HALF_WIDTH
    with jax.enable_x64(True):
        rows = jax.jit(jax.vmap(lambda a: jax.vmap(lambda b: energy(jax.numpy.stack([a, b])))(x)))
        values = -np.asarray(rows(x))
    top = values.max()
    return float(top + math.log(np.exp(values - top).sum()) + 2 * math.log(2 * HALF_WIDTH / n))


def cases(options) -> dict[str, tuple[Any, dict[str, Any]]]:
    """By name: how to make a flow from a key, and how to train it."""
    from abduce.inference.vi import flows

    def spline(key):
        return flows.Inverse(
            flows.spline_autoregressive(
                key, 2, 1, num_bins=24, bound=8.0, hidden=(64, 64, 64), mixing="permute"
            )
        )

    planar = {"num_steps": options.planar_steps, "annealed": 0.5}
    found: dict[str, tuple[Any, dict[str, Any]]] = {
        f"planar, K = {k}": (
            lambda key, k=k: flows.planar(key, 2, k),
            {**planar, "rate": 1e-2 if k < 32 else 5e-3},
        )
        for k in PLANAR_LAYERS
    }
    found["spline"] = (spline, {"num_steps": options.spline_steps, "annealed": 0.2, "rate": 2e-3})
    return found


def law(flow):
    """The distribution on the box."""
    import abduce.dist as dist
    from abduce.inference.vi import flows

    box = dist.constraints.interval(-HALF_WIDTH, HALF_WIDTH)
    return flows.distribution(flow, support=box)


def lattice_draws(d, key, n):
    """Draws and their log densities from a randomly shifted lattice in the base.

    Each draw has the law `d`; together they fill the plane evenly, which takes most of the noise
    out of a gradient in two dimensions.
    """
    import jax
    import jax.numpy as jnp

    steps = jnp.array([1 / GOLDEN, 1 / GOLDEN**2])
    u = (jnp.arange(1, n + 1)[:, None] * steps + jax.random.uniform(key, (2,))) % 1
    u = jnp.clip(u, 1e-6, 1 - 1e-6)
    x, intermediates = jax.scipy.stats.norm.ppf(u), []
    for transform in d.transforms:
        before = x
        x, log_det = transform.call_with_intermediates(x)
        intermediates.append([before, log_det])
    return x, d.log_prob(x, intermediates)


def train(flow, energy, key, *, num_steps, annealed, rate, num_draws=512):
    """The flow after Adam with warm-up and cosine decay, in one compiled loop.

    `annealed` is the fraction of the steps over which the energy's weight rises from 0.01 to 1.
    """
    import jax
    import jax.numpy as jnp
    import optax

    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, num_steps // 50, num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))

    def loss(flow, key, weight):
        z, log_q = lattice_draws(law(flow), key, num_draws)
        return jnp.mean(log_q + weight * jax.vmap(energy)(z))

    def step(carry, i):
        flow, state = carry
        weight = jnp.minimum(1.0, 0.01 + i / (annealed * num_steps))
        gradient = jax.grad(loss)(flow, jax.random.fold_in(key, i), weight)
        update, state = optimizer.update(gradient, state, flow)
        return (optax.apply_updates(flow, update), state), None

    @jax.jit
    def run(flow):
        return jax.lax.scan(step, (flow, optimizer.init(flow)), jnp.arange(num_steps))[0][0]

    return jax.block_until_ready(run(flow))


def log_ratios(flow, energy, key, num_chunks: int = 64):
    """`log q + U` at fresh independent draws of the flow, float64, shape `(NUM_FRESH,)`."""
    import jax

    def chunk(key):
        z, log_q = law(flow).sample_and_log_prob(key, (NUM_FRESH // num_chunks,))
        return log_q + jax.vmap(energy)(z)

    run = jax.jit(lambda key: jax.lax.map(chunk, jax.random.split(key, num_chunks)))
    return np.asarray(run(key), np.float64).ravel()


def _measure(name, energy, options):
    import jax

    log_z = log_normalizer(energy)
    rows = []
    for i, (label, (make, settings)) in enumerate(cases(options).items()):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), i), 3)
        wall, cpu = time.perf_counter(), time.process_time()
        flow = train(make(keys[0]), energy, keys[1], **settings)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        gaps = log_ratios(flow, energy, keys[2]) + log_z
        rows.append({
            "energy": name,
            "flow": label,
            "parameters": sum(x.size for x in jax.tree.leaves(flow)),
            "log_z": log_z,
            "kl": float(gaps.mean()),
            "standard_error": float(gaps.std() / math.sqrt(gaps.size)),
            "mass": float(np.exp(-gaps).mean()),
            "seconds": wall,
            "cpu_seconds": cpu,
        })  # fmt: skip
        print({k: v for k, v in rows[-1].items() if k != "log_z"}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flows", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--planar-steps", type=int, default=4000)
    parser.add_argument("--spline-steps", type=int, default=12000)
    parser.add_argument("--only", nargs="*", default=None, help="energies, e.g. U1 U4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="flows", help="stem of the result files")
    options = parser.parse_args()
    results = [
        row
        for name, energy in energies().items()
        if options.only is None or name[:2] in options.only
        for row in _measure(name, energy, options)
    ]
    header = [
        "energy", "flow", "parameters", "KL, nats", "its standard error", "mass found", "seconds",
        "CPU seconds",
    ]  # fmt: skip
    rows = [
        [
            r["energy"],
            r["flow"],
            r["parameters"],
            f"{r['kl']:.4f}",
            f"{r['standard_error']:.4f}",
            f"{r['mass']:.3f}",
            f"{r['seconds']:.0f}",
            f"{r['cpu_seconds']:.0f}",
        ]
        for r in results
    ]
    body = (
        f"`KL(q || p)` from {NUM_FRESH:,} independent draws of the fitted flow; float32; the "
        "normalizer by quadrature over the box [-4, 4]^2. *Mass found* is the mean of `p / q` "
        "under `q`: below 1 where the flow leaves out a part of the target. The spline is one "
        "autoregressive layer, in the direction in which drawing is one pass. Seconds are those "
        "of training, compiling included.\n\n" + markdown_table(header, rows)
    )
    write_results(options.name, "Four energies by normalizing flows", body, {"results": results})


if __name__ == "__main__":
    main()
