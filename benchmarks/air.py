"""Attend, infer, repeat: how each way to differentiate a discrete choice counts objects.

Canvases of 20 by 20 pixels with 0 to 3 of scikit-learn's 8 by 8 digits. The model draws objects one
after the other until one is absent: presence (Bernoulli), position (2 numbers), appearance (10
numbers), which a network turns into pixels. The guide goes through an image with a recurrent
network: presence, given what came before; position; appearance, from a glimpse at that position
(Eslami et al. 2016, without their scale: all digits have one size). Positions and appearances have
path derivatives; for the presences we compare

* `enum`: the 8 joint values of an image's three presences run together;
* `mvd`: measure-valued derivatives, three more runs;
* `score`: the score function, no baseline;
* `iwae2 score`, `iwae2 mvd`: the last two in the importance-weighted bound of two particles.

All have the same networks, optimizer, rates, annealed prior and number of epochs; none was tuned on
its own. Reported are seconds an epoch and the accuracy of the count, one draw of the guide for each
of 1,000 canvases made of digits that training has not seen.

The batch is a `jax.vmap` inside the objective: the labels show that images do not mix, so that the
number of alternatives does not depend on the batch. A `vmap` outside of `expectation.estimate`
takes about as long (`--outside` times both).

    python -m benchmarks.air
    python -m benchmarks.air --only mvd score --epochs 5
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import abduce as ab
import abduce.dist as dist
from benchmarks.measure import markdown_table, write_results

CANVAS, DIGIT, MOST = 20, 8, 3
APPEARANCE, HIDDEN = 10, 128
NOISE = 0.3  # standard deviation of a pixel
BATCH, NUM_TRAIN, NUM_TEST = 64, 5056, 1000
RATE = 1e-3
PRIOR = (0.9, 1e-3)  # of one more object: falls geometrically, over the first half of the run
GOOD = 0.9


# ------------------------------------------------------------------------ canvases


def canvases(num: int, digits: np.ndarray, seed: int) -> tuple[Any, Any]:
    """Images, shape (num, 20, 20), and numbers of digits; boxes share a row or column at most."""
    rng = np.random.default_rng(seed)
    images = np.zeros((num, CANVAS, CANVAS), np.float32)
    counts = rng.integers(0, MOST + 1, num)
    for image, count in zip(images, counts, strict=True):
        for r, c in _corners(rng, count):
            part = image[r : r + DIGIT, c : c + DIGIT]
            np.maximum(part, digits[rng.integers(len(digits))], out=part)
    return jnp.asarray(images), jnp.asarray(counts)


def _corners(rng: Any, count: int) -> list[tuple[int, int]]:
    while True:
        found = [tuple(rng.integers(0, CANVAS - DIGIT + 1, 2)) for _ in range(count)]
        gaps = [
            max(abs(a[0] - b[0]), abs(a[1] - b[1]))
            for i, a in enumerate(found) for b in found[:i]
        ]  # fmt: skip
        if all(g >= DIGIT - 1 for g in gaps):
            return found


def _weights(where: Any) -> tuple[Any, Any]:
    """Bilinear interpolation between a digit's rows or columns and a canvas's, shape (8, 20)."""
    corner = 6.0 + 3.7 * where  # uniform corners have this mean and standard deviation
    grid = jnp.arange(DIGIT)[:, None] - jnp.arange(CANVAS)
    rows, columns = (jnp.maximum(0.0, 1.0 - jnp.abs(c + grid)) for c in corner)
    return rows, columns


def glimpse(image: Any, where: Any) -> Any:
    """The 8 by 8 pixels at a position."""
    rows, columns = _weights(where)
    return rows @ image @ columns.T


def placed(digit: Any, where: Any) -> Any:
    """A canvas with a digit at a position."""
    rows, columns = _weights(where)
    return rows.T @ digit @ columns


# ------------------------------------------------------------------------ model and guide


class Mlp(eqx.Module):
    """One hidden layer."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self, inputs, outputs, key):
        k1, k2 = jax.random.split(key)
        self.first = eqx.nn.Linear(inputs, HIDDEN, key=k1)
        self.second = eqx.nn.Linear(HIDDEN, outputs, key=k2)

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x)))


class Inference(eqx.Module):
    """The networks of the guide."""

    look: Mlp
    cell: eqx.nn.GRUCell
    locate: Mlp
    recognize: Mlp

    def __init__(self, key):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        self.look = Mlp(CANVAS**2, HIDDEN, k1)
        self.cell = eqx.nn.GRUCell(HIDDEN + 2 + APPEARANCE, HIDDEN, key=k2)
        self.locate = Mlp(HIDDEN, 5, k3)
        self.recognize = Mlp(DIGIT**2, 2 * APPEARANCE, k4)


def _if(on: Any, name: str, d: Any) -> Any:
    """A choice that is made where `on` is 1, and zero elsewhere.

    The networks stay outside: under `vmap` both branches of a `cond` run, and its operands get the
    mapped axis, weights included.
    """
    zero = jnp.zeros(d.event_shape, int if name == "present" else float)
    return jax.lax.cond(on == 1, lambda: ab.sample(name, d), lambda: zero)


def _repeat(step: Callable[[Any], Any], start: Any) -> Any:
    return jax.lax.scan(lambda c, _: (step(c), None), start, length=MOST, unroll=MOST)[0]


@ab.model
def guide(image, net):
    features = jax.nn.relu(net.look(image.reshape(-1)))

    def step(carry):
        h, where, what, present = carry
        h = net.cell(jnp.concatenate([features, where, what]), h)
        out = net.locate(h)
        present = _if(present, "present", dist.Bernoulli(logits=out[0]))
        law = dist.Normal(out[1:3], jnp.exp(out[3:] - 2.0)).to_event(1)
        where = _if(present, "where", law)
        out = net.recognize(glimpse(image, where).reshape(-1))
        law = dist.Normal(out[:APPEARANCE], jnp.exp(out[APPEARANCE:] - 1.0)).to_event(1)
        return h, where, _if(present, "what", law), present

    _repeat(step, (jnp.zeros(HIDDEN), jnp.zeros(2), jnp.zeros(APPEARANCE), jnp.ones((), int)))


@ab.model
def model(decoder, more):
    """`more`: probability of one more object."""

    def step(carry):
        canvas, present = carry
        present = _if(present, "present", dist.Bernoulli(probs=more))
        where = _if(present, "where", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        what = _if(present, "what", dist.Normal(jnp.zeros(APPEARANCE), 1.0).to_event(1))
        digit = jax.nn.sigmoid(decoder(what) - 2.0).reshape(DIGIT, DIGIT)  # faint at first
        return canvas + present * placed(digit, where), present

    canvas, _ = _repeat(step, (jnp.zeros((CANVAS, CANVAS)), jnp.ones((), int)))
    ab.sample("image", dist.Normal(canvas, NOISE).to_event(2))


def _log_weight(params: Any, image: Any, more: Any) -> Any:
    net, decoder = params
    z, log_q = ab.propose(guide, image, net)
    return ab.log_density(model, {**z, "image": image}, decoder, more) - log_q


def elbo(params: Any, images: Any, more: Any) -> Any:
    return jnp.mean(jax.vmap(lambda x: _log_weight(params, x, more))(images))


def iwae2(params: Any, images: Any, more: Any) -> Any:
    def one(x):
        log_w = jax.vmap(lambda _: _log_weight(params, x, more))(jnp.arange(2))
        return jax.nn.logsumexp(log_w) - jnp.log(2.0)

    return jnp.mean(jax.vmap(one)(images))


ESTIMATORS = {
    "enum": (elbo, ab.grad.enum()),
    "mvd": (elbo, ab.grad.mvd()),
    "score": (elbo, ab.grad.score()),
    "iwae2 score": (iwae2, ab.grad.score()),
    "iwae2 mvd": (iwae2, ab.grad.mvd()),
}


# ------------------------------------------------------------------------ training


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.air", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, from other networks")
    parser.add_argument("--only", nargs="+", choices=list(ESTIMATORS), default=list(ESTIMATORS))
    parser.add_argument("--outside", action="store_true", help="time a vmap outside, train nothing")
    parser.add_argument("--name", default="air", help="stem of the result files")
    options = parser.parse_args()

    from sklearn.datasets import load_digits

    digits = load_digits().images / 16.0
    train = canvases(NUM_TRAIN, digits[:1500], seed=0)
    test = canvases(NUM_TEST, digits[1500:], seed=1)
    if options.outside:
        _time_outside(options.only, train[0][:BATCH])
        return
    records = []
    for name in options.only:
        records += _train(name, train, test, options.epochs, options.seeds)
        _write(records, options)  # a run that is stopped leaves what it has


def _write(records: list[dict[str, Any]], options: argparse.Namespace) -> None:
    shown = sorted({1, 2, *range(0, options.epochs + 1, 4)} - {0})
    header = [
        "presences", "run", "plan", "s / epoch", "CPU s / epoch", "first call, s",
        f"first epoch above {GOOD:g}", "accuracy at the end", "ELBO or bound",
    ]  # fmt: skip
    rows = [
        [
            r["name"], r["seed"], r["plan"], r["s"], r["cpu_s"], r["compile_s"],
            r["first_good"] or "never", f"{r['accuracy'][-1]:.3f}", r["bound"][-1],
        ]
        for r in records
    ]  # fmt: skip
    over = [
        [f"{r['name']}, {r['seed']}", *(f"{r['accuracy'][e - 1]:.3f}" for e in shown)]
        for r in records
    ]
    body = (
        f"{NUM_TRAIN:,} canvases in batches of {BATCH}, {options.epochs} epochs, Adam at {RATE:g}; "
        f"the prior of one more object falls from {PRIOR[0]:g} to {PRIOR[1]:g} over the first "
        "half. Medians of the epochs after the first; CPU seconds count both cores, and other work "
        "on the machine hardly touches them.\n\n"
        + markdown_table(header, rows)
        + "\n\nAccuracy of the count over epochs.\n\n"
        + markdown_table(["presences, run", *map(str, shown)], over)
    )
    write_results(options.name, "Attend, infer, repeat", body, {"results": records})


def _parameters(seed: int) -> Any:
    k1, k2 = jax.random.split(jax.random.key(seed))
    return Inference(k1), Mlp(APPEARANCE, DIGIT**2, k2)


def _train(name: str, train: Any, test: Any, epochs: int, seeds: int) -> list[dict[str, Any]]:
    objective, strategy = ESTIMATORS[name]
    bound = ab.expectation(objective, grad={"present": strategy})
    optimizer = optax.adam(RATE)
    images = train[0]

    @jax.jit
    def step(params, state, key, rows, more):
        value, grads = bound.value_and_grad(key, params, images[rows], more)
        updates, state = optimizer.update(jax.tree.map(jnp.negative, grads), state, params)
        return optax.apply_updates(params, updates), state, value

    num_batches = NUM_TRAIN // BATCH
    half = max(1, epochs * num_batches // 2)
    records = []
    for seed in range(seeds):
        params, rng = _parameters(seed), np.random.default_rng(seed)
        state, key, i = optimizer.init(params), jax.random.key(100 + seed), 0
        seconds, cpu, accuracy, bounds = [], [], [], []
        compile_s = None
        if not records:
            begin = time.perf_counter()
            rows = np.arange(BATCH)
            jax.block_until_ready(step(params, state, key, rows, jnp.float32(0.5)))
            compile_s = time.perf_counter() - begin
        for epoch in range(epochs):
            values = []
            begin, cpu_begin = time.perf_counter(), time.process_time()
            for rows in rng.permutation(NUM_TRAIN).reshape(num_batches, BATCH):
                more = PRIOR[0] * (PRIOR[1] / PRIOR[0]) ** min(1.0, i / half)
                params, state, value = step(
                    params, state, jax.random.fold_in(key, i), rows, jnp.float32(more)
                )
                values.append(value)
                i += 1
            jax.block_until_ready(params)
            seconds.append(time.perf_counter() - begin)
            cpu.append(time.process_time() - cpu_begin)
            accuracy.append(float(_accuracy(params[0], jax.random.key(epoch), *test)))
            bounds.append(float(np.mean(values)))
            print(
                f"{name} {seed}, epoch {epoch + 1}: {seconds[-1]:.1f} s, bound {bounds[-1]:.1f}, "
                f"accuracy {accuracy[-1]:.3f}", flush=True,
            )  # fmt: skip
        good = [e + 1 for e, a in enumerate(accuracy) if a > GOOD]
        plan = bound.plan(params, images[:BATCH], 0.5)["present"]
        records.append({
            "name": name, "seed": seed, "plan": plan.rpartition(": ")[2].removeprefix("ab.grad."),
            "s": statistics.median(seconds[1:] or seconds),
            "cpu_s": statistics.median(cpu[1:] or cpu), "compile_s": compile_s,
            "first_good": good[0] if good else None, "accuracy": accuracy, "bound": bounds,
            "seconds": seconds, "cpu_seconds": cpu,
        })  # fmt: skip
    return records


@jax.jit
def _accuracy(net: Any, key: Any, images: Any, counts: Any) -> Any:
    """How often one draw of the guide has the right number of objects."""

    def count(key, image):
        trace = guide.simulate(key, image, net)
        return jnp.sum(jnp.where(trace.active["present"], trace.choices["present"], 0))

    return jnp.mean(jax.vmap(count)(jax.random.split(key, len(images)), images) == counts)


def _time_outside(names: list[str], images: Any) -> None:
    """Prints processor seconds of a gradient with the batch mapped inside and outside."""
    params, key = _parameters(0), jax.random.key(0)
    for name in names:
        objective, strategy = ESTIMATORS[name]
        bound = ab.expectation(objective, grad={"present": strategy})

        def inside(params, key, bound=bound):
            return bound.value_and_grad(key, params, images, 0.5)

        def outside(params, key, bound=bound):
            def mean(params):
                keys = jax.random.split(key, len(images))
                return jnp.mean(
                    jax.vmap(lambda k, x: bound.estimate(k, params, x[None], 0.5))(keys, images)
                )

            return jax.value_and_grad(mean)(params)

        calls = {"inside": jax.jit(inside), "outside": jax.jit(outside)}
        times: dict[str, list[float]] = {where: [] for where in calls}
        for i in range(16):
            for where, call in calls.items():
                begin = time.process_time()
                jax.block_until_ready(call(params, jax.random.fold_in(key, i)))
                times[where] += [time.process_time() - begin] if i else []
        print(name, {where: f"{1e3 * statistics.median(t):.1f} ms" for where, t in times.items()})


if __name__ == "__main__":
    main()
