"""NUTS side by side: abduce, NumPyro and BlackJAX on the reference posteriors, in one run.

Every posterior and package gets its own process, so that compiled programs and caches are its own.
In it, the first call is timed (staging, compiling, warm-up, sampling, draws on the host; not the
imports), then further calls with other keys and with data changed by one part in a million, which
moves no posterior noticeably but is other data of the same shapes: nothing may compile.

    python -m benchmarks.nuts                         # everything
    python -m benchmarks.nuts --only nes1972-nes --repeats 5
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data, metrics, posteriors
from benchmarks.measure import RESULTS, run_in_subprocess
from benchmarks.nuts_report import report

CHAIN_METHODS = ("sequential", "vectorized", "parallel")
JITTER = 1e-6  # relative change of the observed data from call to call


def main() -> None:
    options = _options()
    if options.worker:
        Path(options.out).write_text(json.dumps(_work(options)))
        return
    data.require()
    wanted = options.only or posteriors.names()
    unknown = set(wanted) - set(posteriors.names())
    if unknown:
        raise SystemExit(f"unknown posterior {sorted(unknown)}; there are {posteriors.names()}")
    runs = [("abduce", None), ("blackjax", None)]
    runs += [("numpyro", method) for method in options.chain_methods]
    store = RESULTS / f"{options.name}.tmp"  # a long run that is interrupted goes on from here
    results = json.loads(store.read_text()) if options.resume and store.is_file() else []
    finished = {r["posterior"] for r in results}
    for name in wanted:
        if name in finished:
            continue
        found = []
        counted = None  # NumPyro's warm-up steps: the same for every chain method, counted once
        for package, method in runs:
            if package in options.skip:
                continue
            result = _measure(name, package, method, options, counted)
            if package == "numpyro" and "error" not in result:
                counted = result["first"]["num_gradients_warmup"]
            found.append(result)
            print(_progress_line(result), flush=True)
        results += found
        store.write_text(json.dumps(results))
    report(results, name=options.name)
    store.unlink(missing_ok=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nuts", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these posteriors alone")
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="PACKAGE",
        choices=["abduce", "numpyro", "blackjax"],
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="calls after the first; medians are reported"
    )
    parser.add_argument(
        "--budget", type=float, default=60.0,
        help="start no further repeat once the repeats have taken this many seconds",
    )
    parser.add_argument("--x64", action="store_true", help="double precision throughout")
    parser.add_argument(
        "--chain-methods", nargs="+", default=list(CHAIN_METHODS), choices=CHAIN_METHODS,
        help="NumPyro's; the best one counts",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds per process")
    parser.add_argument("--name", default="nuts", help="stem of the result files")
    parser.add_argument(
        "--resume", action="store_true", help="go on with a run of the same name that was stopped"
    )
    for hidden in ("--worker", "--posterior", "--method", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--counted", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(name, package, method, options, counted: int | None) -> dict[str, Any]:
    """Runs one posterior with one package in its own process."""
    x64 = options.x64 or name in posteriors.NEEDS_X64
    result = run_in_subprocess(
        "benchmarks.nuts",
        [
            "--worker", package,
            "--posterior", name,
            "--method", method or "",
            "--repeats", str(options.repeats),
            "--budget", str(options.budget),
            "--seed", str(options.seed),
            *(["--counted", str(counted)] if counted is not None else []),
        ],
        x64=x64,
        num_devices=4 if method == "parallel" else 1,
        timeout=options.timeout,
    )
    load = round(os.getloadavg()[0], 2)
    return {
        "posterior": name, "package": package, "method": method, "x64": x64, "load": load, **result
    }


def _work(options) -> dict[str, Any]:
    """The body of the process that `_measure` starts."""
    from benchmarks.measure import CompileLog
    from benchmarks.runners import Size, make_runner

    posterior = posteriors.load(options.posterior)
    size = Size()
    compiles = CompileLog()
    runner = make_runner(options.worker, posterior, size, options.method)

    calls = []
    spent = 0.0
    for i in range(1 + options.repeats):
        if i > 1 and spent > options.budget:
            break
        given, args = posterior.given, posterior.args
        if i > 0:
            given, args = _jittered(given, args, seed=i)
        with compiles:
            start = time.perf_counter()
            run = runner(options.seed + i, args, given)
            seconds = time.perf_counter() - start
        spent += seconds if i else 0.0
        draws = posteriors.quantities(run.draws, posterior.names)
        calls.append(_summary(posterior, run, draws, seconds, compiles.seconds))
    if calls[0]["num_gradients_warmup"] is None:
        counted = options.counted
        if counted is None:
            counted = runner.count_warmup(options.seed, posterior.args, posterior.given)
        for call in calls:
            call["num_gradients_warmup"] = counted
    return {"first": calls[0], "later": calls[1:]}


def _jittered(given: dict, args: tuple, seed: int) -> tuple[dict, tuple]:
    """Other data: what is observed, or the arguments where nothing is, changed in the last digits.

    Only the first array argument is changed in the latter case; a design matrix never is.
    """
    rng = np.random.default_rng(seed)

    def change(x: np.ndarray) -> np.ndarray:
        return (x * (1 + JITTER * rng.standard_normal(x.shape))).astype(x.dtype)

    if given:
        return {address: change(value) for address, value in given.items()}, args
    return given, (change(args[0]), *args[1:])


def _summary(posterior, run, draws, seconds, compile_seconds) -> dict[str, Any]:
    gold = (posterior.mean, posterior.sd, posterior.mcse_mean, posterior.mcse_sd)
    return {
        "seconds": seconds,
        "min_ess": metrics.min_bulk_ess(draws),
        "min_square_ess": metrics.min_square_ess(draws),
        **metrics.agreement(draws, *gold),
        "num_gradients_warmup": run.num_gradients_warmup,
        "num_gradients_sampling": run.num_gradients_sampling,
        "num_divergences": run.num_divergences,
        "num_compiles": len(compile_seconds),
        "compile_seconds": float(np.sum(compile_seconds)),
        "notes": run.notes,
    }


def _progress_line(result: dict[str, Any]) -> str:
    label = f"{result['posterior']:45s} {result['package']} {result['method'] or ''}"
    if "error" in result:
        return f"{label:68s} failed: {result['error']}"
    first, later = result["first"], result["later"]
    seconds = np.median([c["seconds"] for c in later]) if later else float("nan")
    return (
        f"{label:68s} first {first['seconds']:7.2f} s, later {seconds:7.2f} s, "
        f"ess {first['min_ess']:6.0f}, mean {first['mean_error']:.2f} mcse, "
        f"sd {first['sd_error']:.1%}"
    )


if __name__ == "__main__":
    main()
