"""Runs the benchmarks one after the other and leaves their tables in `benchmarks/results/`.

    python -m benchmarks.run           # everything; hours on two cores, most of them NumPyro's
    python -m benchmarks.run --quick   # some minutes: four posteriors, small models, few repeats
"""

import argparse
import subprocess
import sys

__all__ = ["FULL", "QUICK"]

FULL = [
    ["benchmarks.gradient"],
    ["benchmarks.gradient", "--x64"],
    ["benchmarks.compile"],
    ["benchmarks.nuts"],
    ["benchmarks.resampling"],
    ["benchmarks.smc"],
    ["benchmarks.tempering"],
    ["benchmarks.updating"],
    ["benchmarks.sequence"],
    ["benchmarks.flows"],
    ["benchmarks.vi"],
    ["benchmarks.vae"],
    ["benchmarks.air"],
    ["benchmarks.throughput"],
    ["benchmarks.amortized"],
    ["benchmarks.distribution_transformer"],
    ["benchmarks.pfn"],
    ["benchmarks.sbibm"],
]
QUICK_POSTERIORS = [
    "arK-arK",
    "eight_schools-eight_schools_noncentered",
    "garch-garch11",
    "nes1976-nes",
]
QUICK = [
    ["benchmarks.gradient", "--rounds", "200", "--name", "quick_gradient"],
    ["benchmarks.compile", "--sites", "5", "50", "--repeats", "1", "--name", "quick_compile"],
    [
        "benchmarks.nuts", "--only", *QUICK_POSTERIORS, "--repeats", "1",
        "--chain-methods", "parallel", "--name", "quick_nuts",
    ],
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="a subset, in minutes")
    commands = QUICK if parser.parse_args().quick else FULL
    failed = []
    for command in commands:
        print(f"\n==> python -m {' '.join(command)}\n", flush=True)
        if subprocess.run([sys.executable, "-m", *command]).returncode != 0:
            failed.append(command[0])
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
