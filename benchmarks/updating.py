"""`post.update` over a thousand batches of a regression, against NUTS on all the data.

The stream starts from draws of the prior. Reported are its posterior and NUTS's, in Monte Carlo
standard errors of their difference; the evidence against the closed form of the same model with
known noise is in the tests. The cost is counted, not only timed: evaluations of one batch at one
particle, which grow linearly if they double when the number of batches doubles.

    python -m benchmarks.updating
    python -m benchmarks.updating --batches 200 --particles 500
"""

import argparse
import time

import numpy as np

from benchmarks.measure import CompileLog, markdown_table, write_results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.updating", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=5, help="in a batch")
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--name", default="updating", help="stem of the result files")
    options = parser.parse_args()

    import jax
    import jax.numpy as jnp

    import abduce as ab
    import abduce.dist as dist
    from abduce.inference import diagnostics

    @ab.model
    def regression(x):
        w = ab.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        s = ab.sample("s", dist.HalfNormal(1.0))
        ab.sample("y", dist.Normal(x @ w, s))

    rng = np.random.default_rng(0)
    count = options.batches
    x = rng.normal(size=(count, options.rows, 3)).astype(np.float32)
    noise = 0.7 * rng.normal(size=x.shape[:2])
    y = (x @ np.array([1.0, -0.5, 0.3]) + noise).astype(np.float32)

    log = CompileLog()
    post = regression.prior(jax.random.key(0), x[0], num_samples=options.particles)
    marks = sorted({count * k // 8 for k in (1, 2, 4, 8)})
    steps, at_marks, num_compiles, compile_s = [], [], 0, 0.0
    for t, key in enumerate(jax.random.split(jax.random.key(1), count)):
        start = time.perf_counter()
        with log:
            post = post.update(key, x[t], given={"y": y[t]})
        seconds = time.perf_counter() - start
        num_compiles += len(log.seconds)
        compile_s += sum(log.seconds)
        moved = post.diagnostics["num_parts"] > 0
        steps.append({"seconds": seconds, "moved": moved, "compiles": len(log.seconds)})
        if t + 1 in marks:
            at_marks.append(
                {
                    "batches": t + 1,
                    "evaluations": int(post.diagnostics["evaluations"]),
                    "moves": int(post.diagnostics["num_moved"]),
                    "compiles": num_compiles,
                    "seconds": sum(s["seconds"] for s in steps) - compile_s,
                }
            )
    quiet = [s["seconds"] for s in steps if not s["moved"] and not s["compiles"]]

    nuts = ab.nuts(num_chains=2, num_warmup=500, num_samples=2000)(regression)
    start = time.perf_counter()
    full = nuts.posterior(jax.random.key(2), jnp.asarray(x.reshape(-1, 3)), given={"y": y.ravel()})
    nuts_s = time.perf_counter() - start

    names, rows, largest = [], [], 0.0
    ess = post.diagnostics["ess"]
    for address in ("w", "s"):
        own = np.atleast_1d(post.mean(address)), np.atleast_1d(post.std(address))
        draws = np.asarray(full[address], float).reshape(*full[address].shape[:2], -1)
        for i in range(draws.shape[-1]):
            reference = draws[..., i]
            se = np.hypot(own[1][i] / ess**0.5, diagnostics.mcse_mean(reference))
            z = float((own[0][i] - reference.mean()) / se)
            largest = max(largest, abs(z))
            names.append(f"{address}[{i}]" if address == "w" else address)
            rows.append(
                [names[-1], f"{own[0][i]:.4f}", f"{reference.mean():.4f}",
                 f"{own[1][i]:.4f}", f"{reference.std():.4f}", z]
            )  # fmt: skip
    header = ["latent", "mean", "NUTS", "sd", "NUTS", "difference of means, standard errors"]
    costs = [
        [m["batches"], m["evaluations"], m["evaluations"] / (m["batches"] * options.particles),
         m["moves"], m["compiles"], m["seconds"]]
        for m in at_marks
    ]  # fmt: skip
    body = (
        f"{count} batches of {options.rows} rows, 3 coefficients and the noise, "
        f"{options.particles} particles, float32. NUTS: 2 chains of 2000 draws on all the data, "
        f"{nuts_s:.1f} s with compilation. Standard errors take the particles' effective sample "
        f"size as it stands ({ess:.0f}).\n\n"
        + markdown_table(header, rows)
        + "\n\nAn update without moves takes "
        + f"{1e3 * float(np.median(quiet)):.1f} ms (median). Seconds are without compilation, "
        + f"which took {compile_s:.0f} s; evaluations are of one batch at one particle.\n\n"
        + markdown_table(
            ["batches", "evaluations", "for each batch and particle", "moves", "compiles",
             "seconds"],
            costs,
        )
    )
    record = {
        "options": vars(options), "latents": rows, "largest_z": largest, "costs": at_marks,
        "ms_without_moves": 1e3 * float(np.median(quiet)), "nuts_s": nuts_s,
        "log_evidence": post.log_evidence,
    }  # fmt: skip
    write_results(options.name, "Updating a posterior a thousand times", body, record)


if __name__ == "__main__":
    main()
