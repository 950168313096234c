"""One gradient of a model's log density against the same density written by hand in JAX.

Both sides are `jax.jit(jax.value_and_grad(...))` of the same choices, with the data as arguments.
Values and gradients are compared first. Then blocks of calls of the two alternate, in random order
within a round, so that a change of the machine's load falls on both; what is reported is the median
over rounds of the ratio of the two blocks, the median time of each, and the ratio of CPU times.

    python -m benchmarks.gradient
    python -m benchmarks.gradient --rounds 200 --x64
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.measure import markdown_table, write_results

BLOCK_SECONDS = 0.002  # as many calls as fit: above the clock's grain, below a scheduler's slice


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradient", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=1000, help="blocks of calls of each side")
    parser.add_argument("--x64", action="store_true", help="double precision")
    parser.add_argument("--name", default="gradient", help="stem of the result files")
    options = parser.parse_args()

    import jax

    jax.config.update("jax_enable_x64", options.x64)
    from benchmarks.gradient_cases import CASES

    results = [_compare(name, make, options) for name, make in CASES.items()]
    header = [
        "log density", "abduce, us", "by hand, us", "ratio", "its quartiles", "CPU time, ratio",
        "largest relative difference",
    ]
    rows = [
        [r["case"], r["abduce_us"], r["by_hand_us"], r["ratio"],
         f"{r['ratio_quartiles'][0]:.3f} to {r['ratio_quartiles'][1]:.3f}",
         r["cpu_ratio"],
         f"{r['difference']:.1e}"]
        for r in results
    ]
    body = (
        f"Value and gradient, {'float64' if options.x64 else 'float32'}; medians over "
        f"{options.rounds} interleaved blocks of each side. The ratio of CPU times is that of all "
        "blocks together; other work on the machine hardly touches it.\n\n"
        + markdown_table(header, rows)
    )
    name = options.name + ("_x64" if options.x64 else "")
    write_results(name, "One gradient against a hand-written density", body, {"results": results})


def _compare(name: str, make: Callable[[], tuple], options) -> dict[str, Any]:
    import jax

    density, by_hand, choices, data = make()
    functions = [jax.jit(jax.value_and_grad(f)) for f in (density, *by_hand)]
    values = [f(choices, *data) for f in functions]
    difference = max(_largest_difference(values[0], v) for v in values[1:])
    tolerance = 1e-10 if options.x64 else 1e-3
    if not difference < tolerance:
        raise RuntimeError(f"{name}: the densities differ by {difference:.2e}, relatively")

    count = max(1, min(_calls_in(f, choices, data) for f in functions))
    rng = np.random.default_rng(0)
    wall, cpu = np.empty((2, options.rounds, len(functions)))
    for i in range(options.rounds):
        for j in rng.permutation(len(functions)):
            wall[i, j], cpu[i, j] = _block(functions[j], choices, data, count)
    best = 1 + int(np.argmin(np.median(wall, axis=0)[1:]))
    ratios = wall[:, 0] / wall[:, best]
    return {
        "case": name,
        "abduce_us": float(1e6 * np.median(wall[:, 0])),
        "by_hand_us": float(1e6 * np.median(wall[:, best])),
        "by_hand": by_hand[best - 1].__name__.strip("_"),
        "ratio": float(np.median(ratios)),
        "ratio_quartiles": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
        "cpu_ratio": float(cpu[:, 0].sum() / cpu[:, best].sum()),
        "difference": difference,
        "calls_per_block": count,
    }


def _block(f, choices, data, count: int) -> tuple[float, float]:
    """Wall and processor seconds a call, over `count` calls.

    Each call is waited for, as a sampler waits for its gradient.
    """
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        f(choices, *data)[0].block_until_ready()
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count


def _calls_in(f, choices, data) -> int:
    """How many calls fit into a block."""
    _block(f, choices, data, 10)
    return int(BLOCK_SECONDS / _block(f, choices, data, 20)[0])


def _largest_difference(a, b) -> float:
    """Largest difference of two values and gradients, relative to the largest entry of a leaf."""
    import jax

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(x - y)) / (np.max(np.abs(y)) + 1e-30)) for x, y in pairs)


if __name__ == "__main__":
    main()
