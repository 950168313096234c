"""How near do posteriors learned from simulations come to the references of sbibm?

Seven tasks of Lueckmann, Boelts, Greenberg, Goncalves and Macke, "Benchmarking Simulation-Based
Inference", AISTATS 2021. For each, an estimator is trained on a fixed number of simulations, with
the same network and training for all tasks; its posteriors of the benchmark's observations are
compared with reference draws by a classifier two-sample test.

    python -m benchmarks.sbibm
    python -m benchmarks.sbibm --tasks two_moons slcp --budget 1000 10000 --correct --resume
"""

# mypy: disable-error-code="attr-defined, name-defined"
# `abduce.dist` passes NumPyro's names on, which are not visible to a type checker.

import argparse
import functools
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import abduce as ab
import abduce.dist as dist
from abduce.amortized.checks import c2st
from benchmarks import data
from benchmarks.measure import RESULTS, markdown_table, write_results
from benchmarks.sbibm_models import (
    bernoulli_glm,
    gaussian_linear,
    gaussian_mixture,
    lotka_volterra,
    sir,
    slcp,
    two_moons,
)

__all__ = ["TASKS", "Task", "main", "observation", "reference"]

# For all tasks alike.
NETWORK: dict[str, Any] = {"head": "spline", "num_networks": 1}  # of ab.npe
TRAINING: dict[str, Any] = {"batch_size": 256, "learning_rate": 1e-3}  # of fit

IMPORTANCE_DRAWS = 20  # for each draw that is compared
# Of ab.smc: few temperatures, for the path begins at the estimate; few particles, for each move
# takes gradients of the model and of the network.
PARTICLES, TEMPERATURES, MOVES = 2_000, 10, 3
REFERENCE_STEPS = 60  # of a Markov chain between two reference draws

# gaussian_mixture of main_paper.csv was run with a fault that sbibm 1.1.0 mends; these are the NPE
# medians of gaussian_mixture_rerun.csv in the same repository.
RERUN = {("gaussian_mixture", 1_000): 0.701, ("gaussian_mixture", 10_000): 0.602,
         ("gaussian_mixture", 100_000): 0.547}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A model of "theta" and "x".

    Attributes:
        model: Its argument, if it has one, is the design matrix of the data folder.
        shape: Of "x"; the data folder has it flat.
        support: Of one coordinate of "theta".
    """

    model: Any
    shape: tuple[int, ...]
    support: Any


TASKS = {
    "two_moons": Task(two_moons, (2,), dist.constraints.interval(-1.0, 1.0)),
    "slcp": Task(slcp, (4, 2), dist.constraints.interval(-3.0, 3.0)),
    "gaussian_linear": Task(gaussian_linear, (10,), dist.constraints.real),
    "gaussian_mixture": Task(gaussian_mixture, (2,), dist.constraints.interval(-10.0, 10.0)),
    "bernoulli_glm": Task(bernoulli_glm, (10,), dist.constraints.real),
    "sir": Task(sir, (10,), dist.constraints.positive),
    "lotka_volterra": Task(lotka_volterra, (2, 10), dist.constraints.positive),
}


def observation(name: str, number: int) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """An observation of the data folder: the model's arguments, the data by address, the record."""
    record = data.loader().sbibm(name, number)
    args = (jnp.asarray(record["design_matrix"]),) if "design_matrix" in record else ()
    x = np.asarray(record["observation"]).reshape(TASKS[name].shape)
    return args, {"x": jnp.asarray(x, jnp.int32 if name == "sir" else float)}, record


# ------------------------------------------------------------------------- more reference draws


@functools.cache
def reference(name: str, number: int, num: int) -> np.ndarray:
    """`num` reference draws: the stored ones, then states of Markov chains that begin at them.

    The stored draws follow the posterior and the chains leave it invariant, so every state follows
    it. Proposals add a multiple of the difference of two other stored draws, in unconstrained
    coordinates (ter Braak and Vrugt 2008, eq. 2); the own start is left out, so that the proposals
    of a chain are independent of its states. A tenth of them take the whole difference, which
    leads from mode to mode.

    Args:
        name, number: Task and observation.
        num: How many; the chains are needed where fewer are stored.

    Returns:
        Of "theta", shape `(num, dim)`.
    """
    task = TASKS[name]
    args, given, record = observation(name, number)
    stored = np.asarray(record["samples"], np.float64)
    rounds = math.ceil(num / len(stored)) - 1
    if rounds < 1:
        return stored[:num]
    bijection = dist.biject_to(task.support)
    starts = jnp.asarray(bijection.inv(jnp.asarray(stored)), float)
    count, dim = starts.shape
    bold = 2.38 / (2 * dim) ** 0.5

    def log_target(u):
        theta = bijection(u)
        jacobian = jnp.sum(bijection.log_abs_det_jacobian(u, theta))
        return task.model.log_density({"theta": theta, **given}, *args) + jacobian

    def step(carry, key):
        u, log_p = carry
        k1, k2, k3, k4 = jax.random.split(key, 4)
        # Two others, by how far behind a chain's own start they are.
        one = jax.random.randint(k1, (count,), 1, count)
        two = jax.random.randint(k2, (count,), 1, count - 1)
        two = two + (two >= one)
        own = jnp.arange(count)
        difference = starts[(own + one) % count] - starts[(own + two) % count]
        kind = jax.random.uniform(k3, (2, count, 1))
        factor = jnp.where(kind[0] < 0.1, 1.0, bold * 10 ** -kind[1])
        new = u + factor * difference
        new_log_p = jax.vmap(log_target)(new)
        accept = jnp.log(jax.random.uniform(k4, (count,))) < new_log_p - log_p
        return (jnp.where(accept[:, None], new, u), jnp.where(accept, new_log_p, log_p)), None

    @jax.jit
    def run(carry, key):
        return jax.lax.scan(step, carry, jax.random.split(key, REFERENCE_STEPS))[0]

    state = (starts, jax.vmap(log_target)(starts))
    draws = [stored]
    # The same reference whatever is trained.
    for k in jax.random.split(jax.random.key(number), rounds):
        state = run(state, k)
        draws.append(np.asarray(bijection(state[0])))
    return np.concatenate(draws)[:num]


# ------------------------------------------------------------------------------------ measuring


def timed(f: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `f` returns, and its seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    out = f()
    return out, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def measure(name: str, budget: int, repeat: int, options: Any) -> dict[str, Any]:
    """Trains one estimator and scores it on every observation."""
    task = TASKS[name]
    numbers = data.loader().sbibm_observations(name)[: options.observations]
    key = jax.random.fold_in(jax.random.key(options.seed), repeat)
    k_rows, k_fit, k_score = jax.random.split(jax.random.fold_in(key, budget), 3)
    args, _, _ = observation(name, numbers[0])
    est = ab.npe(task.model, *args, observed=["x"], num_samples=options.draws, **NETWORK)
    rows, simulation = timed(lambda: est.simulate(k_rows, budget))
    fitted, training = timed(
        lambda: est.fit(k_fit, data=rows, num_steps=options.steps, progress_bar=False, **TRAINING)
    )
    result = {
        "task": name, "budget": budget, "repeat": repeat, "observations": numbers,
        "steps": len(fitted.history["loss"]), "simulation": simulation, "training": training,
        "scores": [],
    }  # fmt: skip
    for i in numbers:
        score = score_observation(name, i, fitted, options, jax.random.fold_in(k_score, i))
        print(name, budget, score, flush=True)
        result["scores"].append(score)
    return result


def score_observation(name: str, number: int, est: Any, options: Any, key: Any) -> dict[str, Any]:
    """C2ST of one posterior, and of the corrected one."""
    task, num = TASKS[name], options.draws
    k_draw, k_test, k_correct = jax.random.split(key, 3)
    args, given, record = observation(name, number)
    exact = reference(name, number, num)
    gap = (exact.mean(0) - record["full_mean"]) / record["full_sd"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ab.AbduceWarning)  # they are in the record
        post = est(task.model).posterior(k_draw, *args, given=given)
        found: dict[str, Any] = {
            "observation": number, "num_stored": len(record["samples"]), "num_draws": num,
            "reference_gap": float(np.abs(gap).max()),
            "c2st": c2st(k_test, exact, np.asarray(post["theta"])[0]),
            "warnings": list(post.warnings),
        }  # fmt: skip
        if options.correct:
            (draws, how), seconds = timed(lambda: corrected(task, est, args, given, num, k_correct))
            score = c2st(k_test, exact[: len(draws)], draws)
            found["corrected"] = {"c2st": score, **how, "seconds": seconds}
    return found


def corrected(task: Task, est: Any, args: Any, given: Any, num: int, key: Any) -> Any:
    """Draws of the posterior with the estimate as proposal, and how they were made.

    Importance sampling where it has at least as many effective draws as are asked for, and no heavy
    tail of weights; else tempering from the estimate to the posterior, with at most `PARTICLES`.
    """
    alg: Any = ab.importance(proposal=est, num_samples=IMPORTANCE_DRAWS * num)
    post = alg(task.model).posterior(key, *args, given=given)
    how = {"ess": post.diagnostics["ess"], "pareto_k": post.diagnostics["pareto_k"]}
    method = "importance"
    if how["ess"] < num or not how["pareto_k"] <= 0.7:
        num = min(num, PARTICLES)
        alg = ab.smc(proposal=est, num_particles=num, min_steps=TEMPERATURES, num_moves=MOVES)
        post = alg(task.model).posterior(jax.random.fold_in(key, 1), *args, given=given)
        method = "smc"
    # Resampled draws are in order, so equal steps through them are a systematic sample. It has the
    # fewest copies; a classifier learns copies by heart, and scores too high.
    draws = np.asarray(post["theta"])[0]
    draws = draws[:: len(draws) // num]
    how |= {"distinct": len(np.unique(draws, axis=0)), "method": method}
    return draws, {**how, "warnings": list(post.warnings)}


# ------------------------------------------------------------------------------------ reporting


def published(name: str, budget: int) -> float | None:
    """The median of NPE in the published results."""
    if (name, budget) in RERUN:
        return RERUN[name, budget]
    for row in data.loader().c2st_median() or []:
        if (row["task"], row["algorithm"], row["num_simulations"]) == (name, "NPE", budget):
            return row["median_c2st"]
    return None


def spread(scores: list[float]) -> str:
    """Median, least and greatest."""
    low, high = min(scores), max(scores)
    return f"{np.median(scores):.3f} ({low:.3f}-{high:.3f})"


def table_row(results: list[dict[str, Any]]) -> list[Any]:
    """Of all repeats of a task and a budget."""
    name, budget = results[0]["task"], results[0]["budget"]
    scores = [s for r in results for s in r["scores"]]
    fixed = [s["corrected"] for s in scores if "corrected" in s]
    better = ""
    if fixed:
        tempered = sum(c["method"] == "smc" for c in fixed)
        better = spread([c["c2st"] for c in fixed]) + (f", {tempered} by smc" if tempered else "")
    known = published(name, budget)

    def seconds(part, clock):
        return f"{np.median([r[part][clock] for r in results]):.1f}"

    return [
        name, budget, spread([s["c2st"] for s in scores]),
        "" if known is None else f"{known:.3f}", better,
        f"{seconds('training', 'cpu')} / {seconds('training', 'wall')}",
        seconds("simulation", "wall"),
    ]  # fmt: skip


def report(results: list[dict[str, Any]], settings: dict[str, Any], out: Path) -> None:
    order = list(TASKS)
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for r in results:
        groups.setdefault((order.index(r["task"]), r["budget"]), []).append(r)
    rows = [table_row(groups[k]) for k in sorted(groups)]
    header = [
        "task", "simulations", "C2ST median (min-max)", "published NPE median",
        "corrected C2ST", "training, CPU / wall s", "simulation, s",
    ]  # fmt: skip
    scores = [s for r in results for s in r["scores"]]
    stored = " or ".join(f"{n:,}" for n in sorted({s["num_stored"] for s in scores}))
    numbers = sorted({s["observation"] for s in scores})
    repeats = 1 + max(r["repeat"] for r in results)
    gap = max(s["reference_gap"] for s in scores)
    steps = "" if settings["steps"] is None else f", num_steps={settings['steps']}"
    body = (
        f"The same settings for all tasks: `ab.npe(model, **{NETWORK})`, `fit(**{TRAINING}{steps})`"
        f" and defaults; {repeats} training(s) each. Training sees simulations alone, of which a "
        f"tenth is held out for early stopping. Seconds include compiling.\n\n"
        f"C2ST: held-out accuracy of a classifier between {settings['draws']:,} draws of the "
        f"posterior and as many of the reference (0.5 best), by "
        f"`abduce.amortized.checks.c2st`, whose settings are those of sbibm: five folds, inputs "
        f"standardized by the reference, two hidden layers of ten times the dimension, the "
        f"optimizer and stopping rule of scikit-learn's `MLPClassifier`. Median and range are "
        f"over observations {', '.join(map(str, numbers))}. The published medians are over ten "
        f"observations, with 10,000 draws of each; gaussian_mixture is held to the published "
        f"rerun.\n\n"
        f"Of the reference draws, {stored} of an observation are stored. Where more are compared, "
        f"they are states of Markov chains that begin at the stored ones and leave the posterior "
        f"invariant, and the classifier sees as many draws as for the published scores. Largest "
        f"distance of the reference's mean from that of all 10,000 published draws: {gap:.3f} "
        f"standard deviations.\n\n"
        f"Corrected: `ab.importance(proposal=est)` with {IMPORTANCE_DRAWS} draws for each that is "
        f"compared or, where too few of them are effective (or Pareto k is above 0.7), "
        f"`ab.smc(proposal=est)` with {PARTICLES:,} particles at most, and as many "
        f"reference draws. This evaluates the likelihood; the published NPE does not.\n\n"
    )
    record = {"settings": settings, "results": results}
    title = "Posteriors learned from simulations: the tasks of sbibm"
    write_results(str(out.with_suffix("")), title, body + markdown_table(header, rows), record)


def options_of_run() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sbibm", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--budget", nargs="+", type=int, default=[10_000], help="simulations")
    parser.add_argument("--observations", type=int, default=10, help="the first so many")
    parser.add_argument("--draws", type=int, default=10_000, help="that are compared")
    parser.add_argument("--correct", action="store_true", help="correct by the likelihood as well")
    parser.add_argument("--repeats", type=int, default=1, help="trainings of each row")
    parser.add_argument("--steps", type=int, help="training steps at most, for a quick look")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="results/sbibm.md", help="in benchmarks/, if relative")
    parser.add_argument("--resume", action="store_true", help="keep the finished rows of --out")
    return parser.parse_args()


def available(wanted: list[str]) -> list[str]:
    """Those tasks that the data folder holds; says which it does not, ends where there is none."""
    try:
        held = data.loader().sbibm_tasks()
    except FileNotFoundError as problem:
        print(f"skipped: {problem}")
        sys.exit(0)
    for name in wanted:
        if name not in held:
            print(f"skipped: {name}: {data.folder() / 'sbibm'} does not hold it")
    found = [name for name in wanted if name in held]
    if not found:
        sys.exit(0)
    return found


def finished(store: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run with the same settings."""
    if not store.is_file():
        return []
    earlier = json.loads(store.read_text())
    if earlier["settings"] != settings:
        sys.exit(
            f"{store} was made with other settings: {earlier['settings']} instead of {settings}. "
            "Choose another --out, or leave --resume out to start anew."
        )
    return earlier["results"]


def main() -> None:
    options = options_of_run()
    tasks = available(options.tasks)
    out = RESULTS.parent / options.out
    store = out.with_suffix(".json")
    shared = ("observations", "draws", "correct", "steps", "seed")
    settings = {
        "network": NETWORK, "training": TRAINING, **{k: getattr(options, k) for k in shared}
    }  # fmt: skip
    results = finished(store, settings) if options.resume else []
    done = {(r["task"], r["budget"], r["repeat"]) for r in results}
    for name in tasks:
        for budget in options.budget:
            for repeat in range(options.repeats):
                if (name, budget, repeat) in done:
                    continue
                results.append(measure(name, budget, repeat, options))
                store.write_text(json.dumps({"settings": settings, "results": results}))
    report(results, settings, out)


if __name__ == "__main__":
    main()
