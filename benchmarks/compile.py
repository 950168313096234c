"""Time to the first posterior of models with many scalar sites, and what compiles again later.

The model has K independent `Normal(0, 1)` sites and one observation of their sum: nothing but the
number of sites makes it hard. In a fresh process each, abduce and NumPyro are timed from the call
to the draws on the host, then called again with other data, another number of draws and another
number of chains, counting backend compiles.

    python -m benchmarks.compile
    python -m benchmarks.compile --sites 5 50 --skip numpyro
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import markdown_table, run_in_subprocess, write_results

SITES = (5, 50, 200)
# NumPyro's two methods that compile one program for all chains; the quicker one counts.
RUNS = (("abduce", ""), ("numpyro", "vectorized"), ("numpyro", "parallel"))
CALLS = {  # what differs from the default of 4 chains and 1000 draws
    "first": {},
    "other data": {},
    "500 draws": {"num_samples": 500},
    "2 chains": {"num_chains": 2},
}
PEER_CALLS = ("first", "other data")  # enough of NumPyro, which compiles anew in every call
OBSERVED = {"first": 1.0, "other data": 2.0, "500 draws": 2.0, "2 chains": 2.0}


def main() -> None:
    options = _options()
    if options.worker:
        result = _work(options.worker, options.num_sites, options.method)
        Path(options.out).write_text(json.dumps(result))
        return
    results = []
    for num_sites in options.sites:
        for package, method in RUNS:
            if package in options.skip:
                continue
            repeats = [
                _measure(package, method, num_sites, options.timeout)
                for _ in range(options.repeats)
            ]
            results.append(_median(package, method, num_sites, repeats))
            print(json.dumps(results[-1]), flush=True)
    _report(results, options.name)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sites", nargs="+", type=int, default=list(SITES))
    parser.add_argument("--skip", nargs="+", default=[], choices=["abduce", "numpyro"])
    parser.add_argument("--repeats", type=int, default=3, help="processes each; medians count")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds per process")
    parser.add_argument("--name", default="compile", help="stem of the result files")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--num-sites", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args()


def _calls(package: str) -> dict[str, dict[str, int]]:
    return {k: v for k, v in CALLS.items() if package == "abduce" or k in PEER_CALLS}


def _measure(package: str, method: str, num_sites: int, timeout: float) -> dict[str, Any]:
    worker = ["--worker", package, "--method", method, "--num-sites", str(num_sites)]
    devices = 4 if method == "parallel" else 1
    return run_in_subprocess("benchmarks.compile", worker, num_devices=devices, timeout=timeout)


def _median(package: str, method: str, num_sites: int, repeats: list[dict]) -> dict[str, Any]:
    """Medians over processes; the counts are the largest seen."""
    good = [r for r in repeats if "error" not in r]
    base: dict[str, Any] = {
        "package": package, "method": method, "num_sites": num_sites
    }
    if not good:
        return base | {"error": repeats[0]["error"]}
    for call in _calls(package):
        base[call] = {
            "seconds": float(np.median([r[call]["seconds"] for r in good])),
            "num_compiles": max(r[call]["num_compiles"] for r in good),
            "longest_compile": float(np.median([r[call]["longest_compile"] for r in good])),
        }
    return base


def _work(package: str, num_sites: int, method: str) -> dict[str, Any]:
    """The body of the process that `_measure` starts."""
    from benchmarks.measure import CompileLog

    sample = {"abduce": _abduce, "numpyro": _numpyro}[package](num_sites, method)
    log = CompileLog()
    out = {}
    for seed, (call, lengths) in enumerate(_calls(package).items()):
        with log:
            start = time.perf_counter()
            draws = sample(seed, np.float32(OBSERVED[call]), lengths)
            seconds = time.perf_counter() - start
        expected = (lengths.get("num_chains", 4), lengths.get("num_samples", 1000))
        _check(draws, expected, OBSERVED[call] * num_sites / (num_sites + 1), num_sites)
        out[call] = {
            "seconds": seconds,
            "num_compiles": len(log.seconds),
            "longest_compile": max(log.seconds, default=0.0),
        }
    return out


def _check(draws: dict[str, np.ndarray], shape: tuple, mean: float, num_sites: int) -> None:
    """The sum of the sites has mean `mean` and variance K / (K + 1): a fast wrong answer is none.

    The bound is ten times the standard error of a sampler that is worth 100 independent draws.
    """
    total = sum(draws.values())
    if len(draws) != num_sites or total.shape != shape:
        raise RuntimeError(f"{len(draws)} sites of shape {total.shape}; {num_sites}, {shape} due")
    if abs(total.mean() - mean) > 1.0:
        raise RuntimeError(f"the sum of the sites has mean {total.mean():.3f}, not {mean:.3f}")


def _abduce(num_sites: int, method: str):
    import jax

    import abduce as ab
    import abduce.dist as dist

    @ab.model
    def model():
        total = 0.0
        for i in range(num_sites):
            total = total + ab.sample(f"x{i}", dist.Normal(0, 1))
        return ab.sample("y", dist.Normal(total, 1))

    def sample(seed, y, lengths):
        post = ab.nuts(**lengths)(model).posterior(jax.random.key(seed), given={"y": y})
        return {f"x{i}": np.asarray(post[f"x{i}"]) for i in range(num_sites)}

    return sample


def _numpyro(num_sites: int, method: str):
    import jax
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import MCMC, NUTS

    def model(y):
        total = 0.0
        for i in range(num_sites):
            total = total + numpyro.sample(f"x{i}", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(total, 1), obs=y)

    def sample(seed, y, lengths):
        size = {"num_warmup": 1000, "num_samples": 1000, "num_chains": 4} | lengths
        # A kernel cannot be used again with the vectorized method (NumPyro 0.22 raises).
        kernel = NUTS(model)
        common = {"progress_bar": False, "jit_model_args": True}
        mcmc = MCMC(kernel, chain_method=method, **common, **size)
        mcmc.run(jax.random.key(seed), y)
        return {k: np.asarray(v) for k, v in mcmc.get_samples(group_by_chain=True).items()}

    return sample


def _report(results: list[dict[str, Any]], name: str) -> None:
    header = ["model", "package"]
    for call in CALLS:
        header += [f"{call}: s", "compiles", "longest, s"]
    rows, failed = [], []
    first: dict[tuple[int, str], float] = {}
    for result in results:
        package = " ".join(filter(None, (result["package"], result["method"])))
        if "error" in result:
            failed.append(f"- {result['num_sites']} sites, {package}: {result['error']}")
            continue
        row = [f"{result['num_sites']} sites", package]
        for call in _calls(result["package"]):
            measured = result[call]
            row += [measured["seconds"], measured["num_compiles"], measured["longest_compile"]]
        rows.append(row + [None] * (len(header) - len(row)))
        place = result["num_sites"], result["package"]
        first[place] = min(result["first"]["seconds"], first.get(place, np.inf))

    both = [
        (k, first[k, "abduce"], first[k, "numpyro"])
        for k in dict.fromkeys(k for k, _ in first)
        if (k, "abduce") in first and (k, "numpyro") in first
    ]
    ratios = [[f"{k} sites", own, rival, own / rival] for k, own, rival in both]
    body = (
        "Scalar `Normal(0, 1)` sites and one observation of their sum; 4 chains of 1000 + 1000, "
        "float32. From the call to the draws on the host, imports not counted.\n\n"
        "## First posterior\n\n"
        + markdown_table(["model", "abduce, s", "NumPyro, s", "abduce / NumPyro"], ratios)
        + "\n\n## All calls, in order, in one process\n\n"
        "`longest` is the longest single compile of a call: the transition is the long one, and "
        "where it does not appear it was not compiled again.\n\n"
        + markdown_table(header, rows)
        + ("\n\n## Failed\n\n" + "\n".join(failed) if failed else "")
    )
    write_results(name, "Time to the first posterior", body, {"results": results})


if __name__ == "__main__":
    main()
