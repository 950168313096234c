"""How close do prior-fitted networks come to exact Gaussian-process predictions?

The prior is a Gaussian process with a squared-exponential kernel (lengthscale 0.6, variance 1) on
uniform inputs in `[0, 1]^d`, observed with noise of variance 1e-2 or 1e-4. A network is trained on
it, then scored on fresh data sets at every context size of a grid: the *excess* is the mean of
`log p(y* | x*, D) - log q(y* | x*, D)`, in nats, with `p` the exact predictive density from a
float64 Cholesky factor. It is the divergence from the exact predictive distribution and cannot be
negative but for noise.

The second table has a prior over the lengthscale, the outputscale and the noise as well, where no
prediction is exact: the network against `ab.nuts` over those three, by the mean log density that
each gives to held-out points of the same data sets, and by the time per data set.

    python -m benchmarks.pfn
    python -m benchmarks.pfn --steps 200 --only 1d-1e-2 --sets 50     # a short look
"""

import argparse
import math
import time
from typing import Any

import numpy as np

from benchmarks.measure import markdown_table, write_results

__all__ = ["main"]

LENGTHSCALE = 0.6
TASKS = {  # name: dimension, noise variance, points of a data set, context sizes that are scored
    "1d-1e-2": (1, 1e-2, 80, (0, 1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 40, 50)),
    "5d-1e-2": (5, 1e-2, 130, (0, 1, 2, 3, 5, 10, 20, 30, 50, 75, 100)),
    "1d-1e-4": (1, 1e-4, 80, (0, 1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 40, 50)),
    "5d-1e-4": (5, 1e-4, 130, (0, 1, 2, 3, 5, 10, 20, 30, 50, 75, 100)),
}
QUERIES = 10  # points scored per data set
HYPER = (20, 10)  # context and held-out points of the comparison with NUTS
_JITTER = 1e-5  # of float32 Cholesky factors in simulation; the noise is lessened by as much


def kernel(x, z, lengthscale=LENGTHSCALE):
    """Squared-exponential covariances of inputs `(..., n, d)` and `(..., m, d)`."""
    distance = ((x[..., :, None, :] - z[..., None, :, :]) ** 2).sum(-1)
    return np.exp(-0.5 * distance / lengthscale**2)


def gp_prior(dimension: int, noise: float):
    """The prior as a Model of `n` points."""
    import jax.numpy as jnp

    import abduce as ab
    import abduce.dist as dist

    @ab.model
    def gp(n):
        x = ab.sample("x", dist.Uniform(0.0, 1.0).expand([n, dimension]))
        distance = jnp.sum((x[:, None] - x[None]) ** 2, axis=-1)
        covariance = jnp.exp(-0.5 * distance / LENGTHSCALE**2) + _JITTER * jnp.eye(n)
        factor = jnp.linalg.cholesky(covariance)
        f = ab.sample("f", dist.MultivariateNormal(jnp.zeros(n), scale_tril=factor))
        ab.sample("y", dist.Normal(f, math.sqrt(noise - _JITTER)))

    return gp


def hyper_prior():
    """A process with unknown lengthscale, outputscale and noise, in one dimension."""
    import jax.numpy as jnp

    import abduce as ab
    import abduce.dist as dist

    @ab.model
    def gp(n, x=None):
        lengthscale = ab.sample("lengthscale", dist.LogNormal(math.log(0.3), 0.5))
        scale = ab.sample("scale", dist.LogNormal(0.0, 0.3))
        noise = ab.sample("noise", dist.LogNormal(math.log(0.1), 0.5))
        if x is None:
            x = ab.sample("x", dist.Uniform(0.0, 1.0).expand([n, 1]))
        distance = jnp.sum((x[:, None] - x[None]) ** 2, axis=-1)
        covariance = scale**2 * jnp.exp(-0.5 * distance / lengthscale**2)
        covariance = covariance + (noise**2 + _JITTER) * jnp.eye(n)
        factor = jnp.linalg.cholesky(covariance)
        ab.sample("y", dist.MultivariateNormal(jnp.zeros(n), scale_tril=factor))

    return gp


def exact_predictions(x, y, size, noise):
    """Mean and variance of every point after the first `size`, by float64 algebra."""
    sets, total = y.shape
    mean, variance = np.zeros((sets, total - size)), np.full((sets, total - size), 1 + noise)
    if size:
        known, new = x[:, :size], x[:, size:]
        factor = np.linalg.cholesky(kernel(known, known) + noise * np.eye(size))
        half = np.linalg.solve(factor, kernel(known, new))
        mean = np.einsum("scm,sc->sm", half, np.linalg.solve(factor, y[:, :size, None])[..., 0])
        variance = variance - np.einsum("scm,scm->sm", half, half)
    return mean, variance


def log_normal(y, mean, variance):
    """Log densities of normals."""
    return -0.5 * (y - mean) ** 2 / variance - 0.5 * np.log(2 * np.pi * variance)


def excess(fitted, dimension, noise, size, sets, rng):
    """Excess negative log density per data set, shape `(sets,)`."""
    import jax
    import jax.numpy as jnp

    x = rng.random((sets, size + QUERIES, dimension))
    factor = np.linalg.cholesky(kernel(x, x) + noise * np.eye(size + QUERIES))
    y = np.einsum("sij,sj->si", factor, rng.standard_normal((sets, size + QUERIES)))
    exact = log_normal(y[:, size:], *exact_predictions(x, y, size, noise))

    @jax.jit
    @jax.vmap
    def score(x, y):
        d = fitted.predict({"x": x[:size], "y": y[:size]}, {"x": x[size:]})
        return d.log_prob(y[size:])

    chunks = [
        np.asarray(score(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)), np.float64)
        for a, b in zip(
            np.array_split(x, max(1, sets // 100)), np.array_split(y, max(1, sets // 100)),
            strict=True,
        )
    ]  # fmt: skip
    return (exact - np.concatenate(chunks)).mean(axis=1)


def measure_task(name, options) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Trains on one task and scores it."""
    import jax

    import abduce as ab

    dimension, noise, num_points, sizes = TASKS[name]
    est = ab.pfn(gp_prior(dimension, noise), num_points, context=["x", "y"], query="y",
                 num_bars=options.bars, width=options.width, num_layers=options.layers)  # fmt: skip
    wall, cpu = time.perf_counter(), time.process_time()
    fitted = est.fit(
        jax.random.key(options.seed), num_steps=options.steps, batch_size=options.batch,
        learning_rate=options.learning_rate,
    )  # fmt: skip
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rng = np.random.default_rng([options.seed, 1])
    rows = []
    for size in sizes:
        values = excess(fitted, dimension, noise, size, options.sets, rng)
        rows.append({
            "task": name,
            "size": size,
            "excess": float(values.mean()),
            "standard_error": float(values.std() / math.sqrt(len(values))),
        })  # fmt: skip
    summary = {
        "task": name,
        "steps": options.steps,
        "parameters": fitted.num_parameters,
        "seconds": wall,
        "cpu_seconds": cpu,
        "excess": float(np.mean([r["excess"] for r in rows])),
        "standard_error": float(np.sqrt(np.sum([r["standard_error"] ** 2 for r in rows])))
        / len(rows),
        "worst": float(max(r["excess"] for r in rows)),
    }
    print(summary, flush=True)
    return summary, rows


def measure_hyper(options) -> dict[str, Any]:
    """The network against NUTS, over a prior of kernel parameters."""
    import jax
    import jax.numpy as jnp

    import abduce as ab

    size, held_out = HYPER
    model = hyper_prior()
    est = ab.pfn(model, 60, context=["x", "y"], query="y", num_bars=options.bars,
                 width=options.width, num_layers=options.layers)  # fmt: skip
    fitted = est.fit(jax.random.key(options.seed), num_steps=options.steps,
                     batch_size=options.batch, learning_rate=options.learning_rate)  # fmt: skip

    keys = jax.random.split(jax.random.key(options.seed + 1), options.nuts_sets)
    traces = [model.simulate(k, size + held_out) for k in keys]
    sets = [(np.asarray(t["x"]), np.asarray(t["y"])) for t in traces]

    def by_network(x, y):
        d = fitted.predict({"x": x[:size], "y": y[:size]}, {"x": x[size:]})
        return np.asarray(d.log_prob(y[size:]), np.float64)

    alg = ab.nuts(num_warmup=options.nuts_draws, num_samples=options.nuts_draws, num_chains=1,
                  progress_bar=False)  # fmt: skip

    def by_nuts(x, y):
        post = alg(model).posterior(keys[0], size, x=jnp.asarray(x[:size]), given={"y": y[:size]})
        draws = {a: np.asarray(post[a], np.float64).reshape(-1) for a in
                 ("lengthscale", "scale", "noise")}  # fmt: skip
        each = []
        for ell, scale, noise in zip(*draws.values(), strict=True):
            ratio = (noise**2 + _JITTER) / scale**2
            both = kernel(x, x, ell)
            factor = np.linalg.cholesky(both[:size, :size] + ratio * np.eye(size))
            half = np.linalg.solve(factor, both[:size, size:])
            mean = half.T @ np.linalg.solve(factor, y[:size])
            variance = scale**2 * (1 + ratio - (half**2).sum(0))
            each.append(log_normal(y[size:], mean, variance))
        top = np.max(each, axis=0)
        return top + np.log(np.mean(np.exp(np.array(each) - top), axis=0))

    found = {}
    for label, run in (("pfn", by_network), ("nuts", by_nuts)):
        run(*sets[0])  # compiles
        start = time.perf_counter()
        scores = [run(x, y).mean() for x, y in sets]
        found[label] = {
            "seconds": (time.perf_counter() - start) / len(sets),
            "log_density": float(np.mean(scores)),
            "each": [float(s) for s in scores],
        }
    gap = np.array(found["pfn"]["each"]) - np.array(found["nuts"]["each"])
    found["difference"] = float(gap.mean())
    found["standard_error"] = float(gap.std() / math.sqrt(len(gap)))
    found["speed"] = found["nuts"]["seconds"] / found["pfn"]["seconds"]
    print({k: v for k, v in found.items() if k not in ("pfn", "nuts")}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pfn", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--bars", type=int, default=1000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sets", type=int, default=500, help="data sets per context size")
    parser.add_argument("--only", nargs="*", default=None, help="of " + ", ".join(TASKS) + ", nuts")
    parser.add_argument("--nuts-sets", type=int, default=50)
    parser.add_argument("--nuts-draws", type=int, default=500, help="and as much warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="pfn", help="stem of the result files")
    options = parser.parse_args()

    chosen = [n for n in (*TASKS, "nuts") if options.only is None or n in options.only]
    summaries, rows = [], []
    for name in chosen:
        if name != "nuts":
            summary, mine = measure_task(name, options)
            summaries.append(summary)
            rows += mine
    parts = []
    if summaries:
        parts.append(
            f"Mean excess over context sizes, {options.sets} data sets of {QUERIES} queries each "
            f"per size; *worst* is the size with the largest.\n\n"
            + markdown_table(
                ["task", "steps", "parameters", "excess, nats", "its standard error", "worst",
                 "training, s", "CPU s"],
                [[s["task"], s["steps"], s["parameters"], f"{s['excess']:.4f}",
                  f"{s['standard_error']:.4f}", f"{s['worst']:.4f}", f"{s['seconds']:.0f}",
                  f"{s['cpu_seconds']:.0f}"] for s in summaries],
            )
            + "\n\n"
            + markdown_table(
                ["task", "context", "excess, nats", "its standard error"],
                [[r["task"], r["size"], f"{r['excess']:.4f}", f"{r['standard_error']:.4f}"]
                 for r in rows],
            )
        )  # fmt: skip
    hyper = None
    if "nuts" in chosen:
        hyper = measure_hyper(options)
        parts.append(
            f"Unknown lengthscale, outputscale and noise; {HYPER[0]} points of context, "
            f"{HYPER[1]} held out, {options.nuts_sets} data sets. The network's log density minus "
            f"that of NUTS ({options.nuts_draws} draws of one chain): {hyper['difference']:.4f} "
            f"+- {hyper['standard_error']:.4f} nats per point; {hyper['speed']:.0f} times as "
            f"fast.\n\n"
            + markdown_table(
                ["method", "log density per point", "seconds per data set"],
                [[m, f"{hyper[m]['log_density']:.4f}", f"{hyper[m]['seconds']:.5f}"]
                 for m in ("pfn", "nuts")],
            )
        )  # fmt: skip
    write_results(
        options.name, "Prior-fitted networks against exact Gaussian processes",
        "\n\n".join(parts), {"tasks": summaries, "sizes": rows, "hyper": hyper},
    )  # fmt: skip


if __name__ == "__main__":
    main()
