"""A bootstrap particle filter: ours, one written by hand in JAX, and the `particles` package.

Stochastic volatility on 1,000 daily returns of the S&P 500 (made-up returns where the data folder
is absent). All three filter the same model with systematic resampling below an effective sample
size of N / 2. The calls alternate; medians and their ratios are reported. The filter by hand uses
our `systematic`, so that the ratio shows what the language costs, and is timed with
`jnp.searchsorted` too.

A second report, `results/smc_history`, is of memory: what compiled filters hold, in exact bytes, by
the number of steps and by what they keep of the past.

    python -m benchmarks.smc
    python -m benchmarks.smc --only history
    python -m benchmarks.smc --only history --history-steps 50 200 --history-particles 100
    python -m benchmarks.smc --particles-python /path/to/python     # that has `particles`
"""

import argparse
import functools
import json
import statistics
import subprocess
import time
from typing import Any

import numpy as np

from benchmarks import data
from benchmarks.measure import markdown_table, write_results

PHI, SIGMA, MU = 0.98, 0.2, -0.5
SIZES = (1_000, 10_000, 100_000)
HISTORY_STEPS, HISTORY_PARTICLES, HISTORY_DIM = (100, 1_000, 10_000), 1_000, 16

PEER = """
import json, sys, time, statistics, warnings
warnings.filterwarnings("ignore")
import numpy as np, particles
from particles import state_space_models as ssm, distributions as d
y = np.asarray(json.loads(sys.stdin.read()))
class SV(ssm.StateSpaceModel):
    def PX0(self): return d.Normal(loc=-0.5, scale=1.0)
    def PX(self, t, xp): return d.Normal(loc=-0.5 + .98 * (xp + 0.5), scale=.2)
    def PY(self, t, xp, x): return d.Normal(loc=0., scale=np.exp(x / 2))
out = {}
for n in json.loads(sys.argv[1]):
    times = []
    for _ in range(3):
        pf = particles.SMC(fk=ssm.Bootstrap(ssm=SV(), data=y), N=n, resampling="systematic",
                           ESSrmin=0.5)
        t = time.perf_counter(); pf.run(); times.append(time.perf_counter() - t)
    out[n] = [statistics.median(times), float(pf.logLt)]
print(json.dumps(out))
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smc", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--particles-python", help="an interpreter that has `particles`")
    parser.add_argument("--name", default="smc", help="stem of the result files")
    parser.add_argument("--only", choices=("filters", "history"), help="one of the two reports")
    parser.add_argument("--history-steps", type=int, nargs="+", default=HISTORY_STEPS)
    parser.add_argument("--history-particles", type=int, default=HISTORY_PARTICLES)
    options = parser.parse_args()
    if options.only != "history":
        _filters(options)
    if options.only != "filters":
        _histories(options)


def _filters(options: argparse.Namespace) -> None:
    y, source = _returns()
    rows, records = [], []
    peer = _peer(options.particles_python, y) if options.particles_python else {}
    for n in SIZES:
        record = _compare(n, y, options.repeats if n < 100_000 else max(3, options.repeats // 2))
        record["particles_s"], record["particles_log_evidence"] = peer.get(str(n), (None, None))
        records.append(record)
        peer_s = record["particles_s"]
        ratio = None if peer_s is None else peer_s / record["abduce_s"]
        rows.append([
            n, record["abduce_s"], record["by_hand_s"], record["abduce_s"] / record["by_hand_s"],
            record["searchsorted_s"], record["particles_s"], ratio, record["rbg_s"],
            record["log_evidence"],
        ])  # fmt: skip
        print(rows[-1], flush=True)
    header = [
        "N",
        "abduce, s",
        "by hand, s",
        "ratio",
        "by hand with searchsorted, s",
        "particles, s",
        "particles / abduce",
        "abduce with rbg keys, s",
        "log evidence",
    ]
    scaling = [_scaling(y, t) for t in (250, 500, 1000)]
    body = (
        f"Bootstrap filter of stochastic volatility, {len(y)} steps ({source}), float32; medians "
        f"of alternating calls.\n\n{markdown_table(header, rows)}\n\n"
        f"N = 10,000, `store='filter'`: time and temporary memory by the number of steps.\n\n"
        + markdown_table(
            ["steps", "ns per particle and step", "temporary memory, bytes"],
            [[s["steps"], s["ns"], s["bytes"]] for s in scaling],
        )
    )
    memory = [_memory(y, dim, store) for dim in (1, 16) for store in ("paths", "tree", "filter")]
    body += (
        f"\n\nWhat is stored of the past, at N = 1,000, {len(y)} steps and states of 1 and 16 "
        "numbers, of which the first is observed.\n\n"
        + markdown_table(
            ["numbers", "store", "seconds", "temporary memory, bytes", "output, bytes", "nodes"],
            [[m[c] for c in ("dim", "store", "s", "bytes", "output", "nodes")] for m in memory],
        )
    )
    results = {"filters": records, "scaling": scaling, "memory": memory}
    write_results(options.name, "Particle filters", body, results)


def _histories(options: argparse.Namespace) -> None:
    """Bytes that compiled filters hold, by the number of steps and what is kept of the past."""
    n = options.history_particles
    records = [
        _history(t, n, store)
        for t in options.history_steps
        for store in ("filter", "tree", "paths")
    ]
    columns = {
        "steps": "steps", "store": "store", "temporary": "temporary, bytes",
        "output": "output, bytes", "total": "together",
        "kept": "kept of the past as it runs, bytes",
        "nodes": "nodes", "log_n": "nodes beyond T, over N log N", "share": "nodes / (N T)",
    }  # fmt: skip
    body = (
        f"{n} particles, states of {HISTORY_DIM} numbers in float32, of which the first is "
        f"observed; resampling below an effective sample size of N / 2. Temporary and output bytes "
        f"are those that XLA allots to the compiled filter; its outputs are the draws and the "
        f"evidence, so that 'tree' and 'paths' end with the same N paths; what still grows with "
        f"the steps in 'filter' are their random keys, 16 bytes a step. What is kept of the past "
        f"as the filter runs: all values and ancestors ('paths'), the pool of nodes ('tree'), "
        f"nothing ('filter'). Nodes: the most that were alive at once (Jacob, Murray and "
        f"Rubenthaler 2015: at most T + c N log N on average).\n\n"
        + markdown_table(list(columns.values()), [[r[c] for c in columns] for r in records])
    )
    write_results(f"{options.name}_history", "Memory of particle filters", body, {
        "particles": n, "dim": HISTORY_DIM, "histories": records,
    })  # fmt: skip


def _history(steps: int, n: int, store: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    import abduce as ab
    from abduce.inference.smc.tree import Tree, default_capacity

    model = ab.smc(num_particles=n, store=store)(_level_model(HISTORY_DIM))
    y = jnp.asarray(np.random.default_rng(0).normal(size=steps), jnp.float32)

    def run(key, y):
        post = model.posterior(key, y)
        return post.draws, post.log_evidence

    memory = jax.jit(run).lower(jax.random.key(0), y).compile().memory_analysis()
    out: dict[str, Any] = {
        "steps": steps, "store": store, "temporary": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes, "nodes": None, "log_n": None, "share": None,
    }  # fmt: skip
    out["total"] = out["temporary"] + out["output"]
    values = jax.ShapeDtypeStruct((n, HISTORY_DIM), jnp.float32)
    if store == "filter":
        out["kept"] = 0
    elif store == "paths":
        out["kept"] = steps * n * (HISTORY_DIM + 1) * 4
    else:
        pool = jax.eval_shape(lambda: Tree.start(values, n, default_capacity(n, steps)))
        out["kept"] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pool))
        count = jax.jit(lambda k, y: model.posterior(k, y).diagnostics["num_nodes"])
        nodes = [int(count(jax.random.key(i), y)) for i in range(3)]  # paths are not read
        out["nodes"] = round(statistics.mean(nodes))
        out["log_n"] = (out["nodes"] - steps) / (n * np.log(n))
        out["share"] = out["nodes"] / (n * steps)
    return out


def _returns() -> tuple[np.ndarray, str]:
    try:
        loader = data.loader()
    except FileNotFoundError:
        rng = np.random.default_rng(0)
        h = np.zeros(1000)
        for t in range(1, 1000):
            h[t] = PHI * h[t - 1] + SIGMA * rng.normal()
        return np.exp((MU + h) / 2) * rng.normal(size=1000), "made-up returns"
    series = loader.series("SP500")
    values = next(np.asarray(v) for v in series.values() if np.asarray(v).size > 1000)
    values = np.asarray(values, np.float64).reshape(-1)[-1000:]
    return values / values.std(), "daily returns of the S&P 500, in standard deviations"


def _model():
    import jax
    import jax.numpy as jnp

    import abduce as ab
    import abduce.dist as dist

    @ab.model
    def volatility(y):
        def step(h, y):
            h = ab.sample("h", dist.Normal(MU + PHI * (h - MU), SIGMA))
            ab.sample("y", dist.Normal(0.0, jnp.exp(h / 2)), obs=y)
            return h, None

        jax.lax.scan(step, ab.sample("h0", dist.Normal(MU, 1.0)), y)

    return volatility


def _by_hand(search: bool):
    import jax
    import jax.numpy as jnp

    from abduce.kernels.resampling import systematic

    def searched(key, log_weights):
        n = log_weights.shape[0]
        cdf = jnp.cumsum(jax.nn.softmax(log_weights))
        points = (jnp.arange(n) + jax.random.uniform(key)) / n * cdf[-1]
        return jnp.searchsorted(cdf, points)

    scheme = searched if search else systematic

    @functools.partial(jax.jit, static_argnums=2)
    def run(key, y, n):
        k0, k1 = jax.random.split(key)
        h = MU + jax.random.normal(k0, (n,))

        def step(carry, inputs):
            h, log_w, log_z, log_mean, ess = carry
            y, key = inputs
            k1, k2 = jax.random.split(key)

            def resample(h, log_w, log_z):
                return h[scheme(k1, log_w)], jnp.zeros_like(log_w), log_z + log_mean

            h, log_w, log_z = jax.lax.cond(
                ess < n / 2, resample, lambda *x: x, h, log_w, log_z
            )  # fmt: skip
            h = MU + PHI * (h - MU) + SIGMA * jax.random.normal(k2, (n,))
            log_w = log_w - 0.5 * (y * y * jnp.exp(-h) + h + jnp.log(2 * jnp.pi))
            peak = log_w.max()
            w = jnp.exp(log_w - peak)
            s1, s2 = w.sum(), (w * w).sum()
            return (h, log_w, log_z, peak + jnp.log(s1 / n), s1 * s1 / s2), None

        start = (h, jnp.zeros(n), jnp.zeros(()), jnp.zeros(()), jnp.full((), n, h.dtype))
        end, _ = jax.lax.scan(step, start, (y, jax.random.split(k1, len(y))))
        return end[2] + end[3]

    return run


def _compare(n: int, y: np.ndarray, repeats: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    import abduce as ab

    y = jnp.asarray(y, jnp.float32)
    model = ab.smc(num_particles=n, store="filter")(_model())
    hand, searched = _by_hand(False), _by_hand(True)
    calls = {
        "abduce_s": lambda k: model.posterior(k, y).log_evidence,
        "by_hand_s": lambda k: float(hand(k, y, n)),
        "searchsorted_s": lambda k: float(searched(k, y, n)),
        "rbg_s": lambda k: (
            model.posterior(
                jax.random.key(int(jax.random.bits(k) % 1000), impl="rbg"), y
            ).log_evidence
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    values: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            value = call(jax.random.key(i))
            if i:  # the first call compiles
                times[name].append(time.perf_counter() - begin)
                values[name].append(value)
    out: dict[str, Any] = {name: statistics.median(t) for name, t in times.items()}
    out["num_particles"] = n
    out["log_evidence"] = statistics.mean(values["abduce_s"])
    out["log_evidence_by_hand"] = statistics.mean(values["by_hand_s"])
    return out


def _scaling(y: np.ndarray, steps: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    import abduce as ab

    n = 10_000
    y = jnp.asarray(y[:steps], jnp.float32)
    model = ab.smc(num_particles=n, store="filter")(_model())
    run = jax.jit(lambda k, y: model.posterior(k, y).log_evidence)
    compiled = run.lower(jax.random.key(0), y).compile()
    times = []
    for i in range(5):
        begin = time.perf_counter()
        compiled(jax.random.key(i), y).block_until_ready()
        times.append(time.perf_counter() - begin)
    return {
        "steps": steps,
        "ns": statistics.median(times) / (steps * n) * 1e9,
        "bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def _level_model(dim: int):
    import jax

    import abduce as ab
    import abduce.dist as dist

    @ab.model
    def level(y):
        def step(x, y):
            x = ab.sample("x", dist.Normal(0.9 * x, 0.6))
            ab.sample("y", dist.Normal(x[0], 0.5), obs=y)
            return x, None

        jax.lax.scan(step, ab.sample("x0", dist.Normal(0.0, 1.0).expand([dim])), y)

    return level


def _memory(y: np.ndarray, dim: int, store: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    import abduce as ab

    model = ab.smc(num_particles=1000, store=store)(_level_model(dim))

    def run(key, y):
        post = model.posterior(key, y)
        return post.draws, post.log_evidence, post.diagnostics.get("num_nodes")

    y = jnp.asarray(y, jnp.float32)
    compiled = jax.jit(run).lower(jax.random.key(0), y).compile()
    memory, times = compiled.memory_analysis(), []
    for i in range(5):
        begin = time.perf_counter()
        out = jax.block_until_ready(compiled(jax.random.key(i), y))
        times.append(time.perf_counter() - begin)
    return {
        "dim": dim, "store": store, "s": statistics.median(times),
        "bytes": memory.temp_size_in_bytes, "output": memory.output_size_in_bytes,
        "nodes": None if out[2] is None else int(out[2]),
    }  # fmt: skip


def _peer(python: str, y: np.ndarray) -> dict[str, Any]:
    done = subprocess.run(
        [python, "-c", PEER, json.dumps(SIZES)], input=json.dumps(y.tolist()),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
