"""Tables of `benchmarks.nuts`: what each package did, and the ratios that sum it up."""

from typing import Any

import numpy as np

from benchmarks.measure import markdown_table, write_results
from benchmarks.metrics import geometric_mean

__all__ = ["report"]

MAX_MEAN_ERROR = 4.0  # combined Monte Carlo standard errors
MAX_SD_ERROR = 0.06
RIVALS = ("numpyro", "blackjax")
RATIOS = {
    "later": "ESS/s, second call",
    "first": "ESS/s, first call",
    "gradient": "ESS/gradient",
    "square_gradient": "square ESS/gradient",
}


def report(results: list[dict[str, Any]], *, name: str) -> None:
    """Writes `results/<name>.md` and `.json` from the results of all processes."""
    rows = [_condense(r) for r in results if "error" not in r]
    failed = [r for r in results if "error" in r]
    by_posterior: dict[str, dict[str, dict]] = {}
    for row in rows:
        kept = by_posterior.setdefault(row["posterior"], {})
        best = kept.get(row["package"])
        # NumPyro runs once per chain method: the one fastest on a later call stands for it, but
        # the first call of whichever method starts fastest.
        if best is None or row["later"] > best["later"]:
            kept[row["package"]] = row | {"first": max(row["first"], best["first"] if best else 0)}
        else:
            best["first"] = max(best["first"], row["first"])

    ratios = {name: _ratios(packages) for name, packages in by_posterior.items()}
    parts = [_summary(by_posterior, ratios), _agreement(by_posterior), _details(by_posterior)]
    if failed:
        lines = [
            f"- {r['posterior']}, {r['package']} {r['method'] or ''}: {r['error']}" for r in failed
        ]
        parts.append("## Failed\n\n" + "\n".join(lines))
    write_results(
        name,
        "NUTS on the reference posteriors",
        "\n\n".join(parts),
        {"ratios": ratios, "condensed": by_posterior, "runs": results},
    )


def _condense(result: dict[str, Any]) -> dict[str, Any]:
    """One process's calls as the figures that the tables show."""
    first, later = result["first"], result["later"] or [result["first"]]

    def median(f):
        return float(np.median([f(call) for call in later]))

    def gradients(call):
        return call["num_gradients_warmup"] + call["num_gradients_sampling"]

    return {
        "posterior": result["posterior"],
        "package": result["package"],
        "method": result["method"],
        "x64": result["x64"],
        "mean_error": first["mean_error"],
        "sd_error": first["sd_error"],
        "sd_error_mcse": first["sd_error_mcse"],
        "min_ess": median(lambda c: c["min_ess"]),
        "min_square_ess": median(lambda c: c["min_square_ess"]),
        "seconds_first": first["seconds"],
        "seconds_later": median(lambda c: c["seconds"]),
        "first": first["min_ess"] / first["seconds"],
        "later": median(lambda c: c["min_ess"] / c["seconds"]),
        "gradient": median(lambda c: c["min_ess"] / gradients(c)),
        "square_gradient": median(lambda c: c["min_square_ess"] / gradients(c)),
        "warmup_gradients": median(lambda c: c["num_gradients_warmup"]),
        "sampling_gradients": median(lambda c: c["num_gradients_sampling"]),
        "divergences": median(lambda c: c["num_divergences"]),
        "compiles_later": max(c["num_compiles"] for c in later),
        "compile_seconds_later": median(lambda c: c["compile_seconds"]),
    }


def _ratios(packages: dict[str, dict]) -> dict[str, dict[str, float]]:
    """abduce over each rival, by measure."""
    own = packages.get("abduce")
    if own is None:
        return {}
    return {
        rival: {key: own[key] / packages[rival][key] for key in RATIOS if packages[rival][key] > 0}
        for rival in RIVALS
        if rival in packages
    }


def _summary(by_posterior, ratios) -> str:
    compared = [(rival, key) for rival in RIVALS for key in RATIOS]
    present = [
        (rival, key)
        for rival, key in compared
        if any(key in r.get(rival, {}) for r in ratios.values())
    ]
    if not present:
        return "## Ratios\n\nNothing to compare: abduce or its peers were skipped."
    header = ["posterior", *(f"{rival}: {RATIOS[key]}" for rival, key in present)]
    rows = [
        [name, *(ratios[name].get(rival, {}).get(key) for rival, key in present)]
        for name in by_posterior
    ]
    means = ["**geometric mean**"]
    for rival, key in present:
        values = [r[rival][key] for r in ratios.values() if key in r.get(rival, {})]
        means.append(geometric_mean(v for v in values if v > 0))
    return (
        "## abduce over its peers\n\n"
        "Smallest bulk ESS over the stored quantities, as a multiple of the peer's: per second of "
        "a call that has nothing left to compile, per second of the first call, and per gradient "
        "with those of the warm-up; and, per gradient, the smallest ESS of squared distances from "
        "the mean. NumPyro stands with its better chain method.\n\n"
        + markdown_table(header, [*rows, means])
    )


def _agreement(by_posterior) -> str:
    header = ["posterior", "package", "precision", "mean, MCSE", "sd, %", "sd, MCSE", "agrees"]
    rows = []
    count: dict[str, int] = {}
    for name, packages in by_posterior.items():
        for package, row in packages.items():
            good = row["mean_error"] <= MAX_MEAN_ERROR and row["sd_error"] <= MAX_SD_ERROR
            count[package] = count.get(package, 0) + good
            rows.append([
                name, package, "x64" if row["x64"] else "float32", row["mean_error"],
                100 * row["sd_error"], row["sd_error_mcse"], good,
            ])
    total = ", ".join(f"{package} {n} of {len(by_posterior)}" for package, n in count.items())
    return (
        "## Agreement with the gold draws\n\n"
        f"First call; the worst quantity. It agrees where every mean lies within "
        f"{MAX_MEAN_ERROR:g} combined MCSE and every sd within {MAX_SD_ERROR:.0%}: {total}.\n\n"
        + markdown_table(header, rows)
    )


def _details(by_posterior) -> str:
    header = [
        "posterior", "package", "first, s", "later, s", "min ESS", "min square ESS",
        "ESS/s first", "ESS/s later", "warm-up gradients", "sampling gradients",
        "ESS/1000 gradients", "divergences",
        "compiles later", "compile s later",
    ]
    rows = [
        [
            name, " ".join(filter(None, (package, row["method"]))), row["seconds_first"],
            row["seconds_later"], row["min_ess"], row["min_square_ess"], row["first"], row["later"],
            int(row["warmup_gradients"]), int(row["sampling_gradients"]), 1000 * row["gradient"],
            int(row["divergences"]), row["compiles_later"], row["compile_seconds_later"],
        ]
        for name, packages in by_posterior.items()
        for package, row in packages.items()
    ]
    return (
        "## In full\n\nMedians over the calls after the first, except where a column says "
        "`first`; gradients are those of all four chains together.\n\n"
        + markdown_table(header, rows)
    )
