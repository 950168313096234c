"""Evidence by tempering on two hard targets of known evidence, with default settings.

Many-well-32 has 2^16 modes in 32 dimensions (log Z = 164.6957); funnel-10 is Neal's funnel, whose
width spans five orders of magnitude (log Z = 0). Both start from N(0, I), with 2,000 particles.
"""

import argparse
import math
import time

import numpy as np

from benchmarks.measure import markdown_table, write_results

__all__ = ["main"]

MANY_WELL_LOG_Z = 16 * (math.log(11784.50927) + 0.5 * math.log(2 * math.pi))


def models():
    """By name: a model whose prior is N(0, I), and its log evidence."""
    import jax.numpy as jnp

    import abduce as ab
    import abduce.dist as dist

    def standard(dim):
        x = ab.sample("x", dist.Normal(0.0, 1.0).expand([dim]))
        return x, jnp.sum(dist.Normal(0.0, 1.0).log_prob(x))

    @ab.model
    def many_well():
        x, log_prior = standard(32)
        a, b = x[::2], x[1::2]
        log_density = jnp.sum(-(a**4) + 6 * a**2 + 0.5 * a - 0.5 * b**2)
        ab.factor("target", log_density - log_prior)

    @ab.model
    def funnel():
        x, log_prior = standard(10)
        v = x[0]
        log_density = dist.Normal(0.0, 3.0).log_prob(v)
        log_density += jnp.sum(dist.Normal(0.0, jnp.exp(v / 2)).log_prob(x[1:]))
        ab.factor("target", log_density - log_prior)

    return {"many-well-32": (many_well, MANY_WELL_LOG_Z), "funnel-10": (funnel, 0.0)}


def _measure(name, m, truth, options):
    import jax

    import abduce as ab

    alg = ab.smc(num_particles=options.num_particles)(m)
    start = time.perf_counter()
    alg.posterior(jax.random.key(2**31 - 1))
    first = time.perf_counter() - start
    errors, wall, cpu, steps = [], [], [], []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        t, c = time.perf_counter(), time.process_time()
        post = alg.posterior(jax.random.key(seed))
        wall.append(time.perf_counter() - t)
        cpu.append(time.process_time() - c)
        errors.append(post.log_evidence - truth)
        steps.append(int(post.diagnostics["num_steps"]))
    e = np.asarray(errors)
    return {
        "target": name,
        "bias": float(e.mean()),
        "sd": float(e.std(ddof=1)),
        "rmse": float(np.sqrt(np.mean(e**2))),
        "largest": float(np.abs(e).max()),
        "steps": float(np.mean(steps)),
        "seconds": float(np.median(wall)),
        "cpu_seconds": float(np.median(cpu)),
        "first_call": first,
        "errors": e.tolist(),
        "wall": wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--num-particles", type=int, default=2000)
    parser.add_argument("--name", default="tempering", help="stem of the result files")
    options = parser.parse_args()
    results = [_measure(name, m, z, options) for name, (m, z) in models().items()]
    columns = {
        "target": "target", "bias": "bias", "sd": "sd", "rmse": "RMSE", "largest": "largest error",
        "steps": "temperatures", "seconds": "seconds a run", "cpu_seconds": "CPU seconds",
        "first_call": "first call, s",
    }  # fmt: skip
    rows = [
        [
            r["target"],
            *(f"{r[c]:+.3f}" if c == "bias" else f"{r[c]:.3f}" for c in ("bias", "sd", "rmse")),
            f"{r['largest']:.3f}",
            f"{r['steps']:.0f}",
            *(f"{r[c]:.2f}" for c in ("seconds", "cpu_seconds", "first_call")),
        ]
        for r in results
    ]
    body = (
        f"`ab.smc(num_particles={options.num_particles})` and nothing else, for both; float32; "
        f"errors of the log evidence in nats over {options.seeds} seeds; medians of seconds. The "
        "first call compiles.\n\n" + markdown_table(list(columns.values()), rows)
    )
    write_results(
        options.name, "Log evidence by tempering from N(0, I)", body, {"results": results}
    )


if __name__ == "__main__":
    main()
