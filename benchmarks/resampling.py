"""Resampling schemes: time per call inside a compiled loop, and how well counts follow the weights.

Each call of a scheme runs inside a jitted `lax.scan` in which the next weights depend on the last
ancestors, as in a particle filter. The yardstick is the usual inverse of the cumulative weights,
`jnp.searchsorted(jnp.cumsum(w), (jnp.arange(N) + u) / N)`. Programs alternate in random order, and
the quickest round counts; both wall and processor time are given, the latter hardly touched by
other work on the machine. The ratio is that of processor times.

    python -m benchmarks.resampling
    python -m benchmarks.resampling --sizes 1000 10000 --rounds 20
"""

import argparse
import time
from typing import Any

import numpy as np

from benchmarks.measure import markdown_table, write_results

SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
LARGEST = {"ssp": 100_000, "optimal_transport": 1_000}  # a loop over particles; N**2 memory
LARGEST_OTHER = 1_000_000  # of those but systematic and the yardstick
PARTICLES_PER_BLOCK = 1_000_000
YARDSTICK = "searchsorted"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resampling", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5, help="blocks of calls of each scheme")
    parser.add_argument("--name", default="resampling", help="stem of the result files")
    options = parser.parse_args()

    results = [r for n in options.sizes for r in _measure(n, options.rounds)]
    header = ["particles", "scheme", "wall, us", "CPU, us", "speed-up", "max abs(N_i - N w_i)"]
    rows = [
        [r["num_particles"], r["scheme"], r["wall_us"], r["cpu_us"], r["speedup"], r["count_error"]]
        for r in results
    ]
    body = (
        "Log weights are standard normal, float32. Speed-up: processor time of the yardstick "
        f"(`{YARDSTICK}`) over that of the scheme. The last column is of one call, against float64 "
        "weights; systematic and SSP promise at most 1, up to rounding.\n\n"
        + markdown_table(header, rows)
    )
    write_results(options.name, "Resampling schemes", body, {"results": results})


def _schemes(n: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from abduce.kernels.resampling import SCHEMES

    def searchsorted(key, log_weights, positions=None):
        points = (jnp.arange(n) + jax.random.uniform(key)) / n
        return jnp.searchsorted(jnp.cumsum(jax.nn.softmax(log_weights)), points)

    chosen = {YARDSTICK: searchsorted, "systematic": SCHEMES["systematic"]}
    for name, scheme in SCHEMES.items():
        if n <= LARGEST.get(name, LARGEST_OTHER):
            chosen[name] = scheme
    return chosen


def _measure(n: int, rounds: int) -> list[dict[str, Any]]:
    import jax

    log_weights = jax.random.normal(jax.random.key(0), (n,))
    positions = jax.random.normal(jax.random.key(1), (n,))
    schemes = _schemes(n)
    programs, steps, errors = {}, {}, {}
    for name, scheme in schemes.items():
        one_call = jax.jit(scheme)
        ancestors = one_call(jax.random.key(2), log_weights, positions)
        errors[name] = _count_error(np.asarray(log_weights, float), np.asarray(ancestors))
        programs[name] = _loop(scheme, log_weights, positions)
        slow = 100 if name in LARGEST else 1
        steps[name] = int(np.clip(PARTICLES_PER_BLOCK // (slow * n), 2, 1000))
    best = {name: [np.inf, np.inf] for name in schemes}
    rng = np.random.default_rng(0)
    keys = {name: jax.random.split(jax.random.key(4), steps[name]) for name in schemes}
    for name in schemes:
        jax.block_until_ready(programs[name](keys[name]))  # compiles for that number of steps
    for _ in range(rounds):
        for name in rng.permutation(list(schemes)):
            cpu, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(programs[name](keys[name]))
            spent = time.perf_counter() - wall, time.process_time() - cpu
            for i in range(2):
                best[name][i] = min(best[name][i], 1e6 * spent[i] / steps[name])
    results = []
    for name in schemes:
        wall_us, cpu_us = best[name]
        results.append({
            "num_particles": n, "scheme": name, "wall_us": wall_us, "cpu_us": cpu_us,
            "speedup": best[YARDSTICK][1] / cpu_us, "count_error": errors[name],
            "calls_per_block": steps[name],
        })
        print(results[-1], flush=True)
    return results


def _loop(scheme, log_weights, positions):
    """Calls of a scheme in a row; the weights of each depend on the ancestors before."""
    import jax

    def step(ancestors, key):
        shifted = log_weights + 1e-30 * ancestors[0]
        return scheme(key, shifted, positions).astype("int32"), None

    start = jax.numpy.zeros(log_weights.shape, "int32")
    return jax.jit(lambda keys: jax.lax.scan(step, start, keys)[0])


def _count_error(log_weights: np.ndarray, ancestors: np.ndarray) -> float:
    weights = np.exp(log_weights - log_weights.max())
    expected = len(weights) * weights / weights.sum()
    within = np.minimum(ancestors, len(weights) - 1)  # the yardstick's float32 sum may end below 1
    return float(np.abs(np.bincount(within, minlength=len(weights)) - expected).max())


if __name__ == "__main__":
    main()
