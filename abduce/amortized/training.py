"""The training loop of every estimator: compiled steps, validation, checkpoints, early stopping.

The random numbers of a step depend on the key and on the step's number alone, so a run that was
killed and resumed from its checkpoint ends bit for bit where an undisturbed one does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from abduce.amortized.recipe import Flat, Recipe
from abduce.amortized.rows import Rows
from abduce.errors import Degenerate, InvalidAlgorithm, InvalidValue
from abduce.inference.mcmc.sweeps import Bar
from abduce.inference.persistence import load_folder, save_folder
from abduce.ppl.operations import typed_key

__all__ = ["Flat", "Recipe", "Task", "Trained", "num_parameters", "train"]

_BUFFER = 256  # steps per compiled call at most
_SECONDS_PER_CALL = 2.0
_SECONDS_PER_CHECKPOINT = 30.0
_VALIDATION_BATCHES = 4


class Task(Protocol):
    """What is trained. Hashable: equal tasks share compiled programs."""

    def simulate(self, key: Any, num: int, data: Any) -> Any:
        """A pytree of arrays with leading axis `num`: fresh training examples."""

    def read(self, rows: Any, key: Any, data: Any) -> Any:
        """The same from rows of a stored set; the key is for what is drawn anew in each epoch."""

    def loss(self, network: Any, key: Any, batch: Any, data: Any) -> Any:
        """The mean loss over a batch, a scalar in nats where the loss is a density's."""

    def explain(self, batch: Any) -> str:
        """What is not finite in a batch: names the site."""


class Trained(eqx.Module):
    """What a run ends with.

    Attributes:
        network: With the averaged (or best) weights.
        history: Arrays by name: `loss` per step (nats), `validation_step`, `validation_loss`, and
            whether training was `interrupted`.
        num_steps: Steps that were run.
        seconds: Of this process.
        stopped: 'done', 'early' or 'interrupted'.
        resumed_at: The step at which a checkpoint took over, or 0.
    """

    network: Any
    history: dict[str, np.ndarray]
    num_steps: int
    seconds: float
    stopped: str = eqx.field(static=True)
    resumed_at: int = 0


def num_parameters(network: Any) -> int:
    """How many numbers are trained."""
    return sum(x.size for x in jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array)))


def train(
    task: Task,
    network: Any,
    key: Any,
    data: Any,
    recipe: Recipe,
    *,
    rows: Rows | None = None,
    held_out: Rows | None = None,
    checkpoint_dir: Any = None,
    mesh: Any = None,
    progress_bar: bool = True,
    name: str = "fit",
) -> Trained:
    """Trains a network.

    Args:
        task: What is trained.
        network: An Equinox module; its inexact arrays are the parameters.
        key: Random key.
        data: A pytree of arrays handed to the task, such as a model's arguments.
        recipe: How.
        rows: A fixed set of simulations; None: every step simulates its own.
        held_out: Another one for validation; None: simulated once.
        checkpoint_dir: A folder to write to twice a minute, and to resume from; or None.
        mesh: A `jax.sharding.Mesh`; the batch is split along its first axis.
        progress_bar: Whether to show progress.
        name: Of the estimator, for messages.

    Raises:
        Degenerate: The loss was not finite. The batch is saved in `checkpoint_dir`, where there is
            one, and the message names the site.
        InvalidValue: The checkpoint belongs to another run, or cannot be read.
    """
    key = typed_key(key, f"ab.{name}.fit")
    flat = Flat(network)
    config = _Config(task, flat, recipe, mesh, None if rows is None else rows.on_device)
    if mesh is not None and recipe.batch_size % mesh.devices.shape[0]:
        raise InvalidAlgorithm(
            f"fit: batch_size {recipe.batch_size} is not divisible by the {mesh.devices.shape[0]} "
            f"devices of the mesh."
        )
    run = _Run(config, flat.vector(network), key, data, rows, held_out, checkpoint_dir, name)
    stopped = run.loop(progress_bar)
    history = {**run.history(), "interrupted": np.asarray(stopped == "interrupted")}
    return Trained(
        flat.network(run.result()), history, run.step, run.seconds, stopped, run.resumed
    )


@dataclasses.dataclass(frozen=True)
class _Config:
    """What is compiled."""

    task: Any
    flat: Flat
    recipe: Recipe
    mesh: Any
    stored: bool | None  # rows are gathered on the device; None: there are none


class _Run:
    """The state of a run between compiled calls."""

    def __init__(self, config, params, key, data, rows, held_out, checkpoint_dir, name):
        self.config, self.key, self.data, self.rows = config, key, data, rows
        self.name = name
        recipe = config.recipe
        self.state = {
            "params": params,
            "opt": jax.tree.map(jnp.copy, recipe.optimizer.init(params)),
            "ema": jnp.copy(params),
            "bad": jnp.asarray(-1, jnp.int32),
        }
        self.best = (np.inf, jnp.copy(params))  # the state's own arrays are donated
        # An operand: as a constant it would be copied into every compiled program.
        self.decaying = jnp.asarray(config.flat.matrices()) if recipe.weight_decay else None
        self.step, self.resumed, self.waited, self.seconds = 0, 0, 0, 0.0
        self.losses: list[np.ndarray] = []
        self.validations: list[tuple[int, float]] = []
        self.validation_key = jax.random.fold_in(key, 0x7FFFFFFF)
        self.held_out = held_out
        self.folder = None if checkpoint_dir is None else Path(checkpoint_dir).expanduser()
        self.mark = _fingerprint(config, self.state, key)
        if self.folder is not None:
            self._resume()

    # ------------------------------------------------------------------ the loop

    def loop(self, progress_bar: bool) -> str:
        recipe = self.config.recipe
        begin = saved = time.perf_counter()
        per_call, first, stopped = 1, self.step, "done"
        try:
            with Bar(self.name, recipe.num_steps, progress_bar) as bar:
                while self.step < recipe.num_steps and stopped == "done":
                    boundary = (self.step // recipe.every + 1) * recipe.every
                    count = min(per_call, _BUFFER, boundary - self.step,
                                recipe.num_steps - self.step)  # fmt: skip
                    start = time.perf_counter()
                    with _whole():
                        self._advance(count)
                        elapsed = max(time.perf_counter() - start, 1e-6)
                        if self.step == boundary or self.step == recipe.num_steps:
                            stopped = self._validate()
                    wanted = count * _SECONDS_PER_CALL / elapsed
                    per_call = max(1, int(min(8 * per_call, wanted)))
                    now = time.perf_counter()
                    rate = recipe.batch_size * recipe.accumulate * (self.step - first)
                    bar.update(self.step, f"loss {self._recent():.4g}, "
                                          f"{rate / (now - begin):,.0f} examples/s")  # fmt: skip
                    if self.folder is not None and now - saved > _SECONDS_PER_CHECKPOINT:
                        self._save()
                        saved = now
        except KeyboardInterrupt:
            stopped = "interrupted"
        self.seconds += time.perf_counter() - begin
        if self.folder is not None:
            self._save()
        return stopped

    def _advance(self, count: int) -> None:
        rows = None if self.rows is None else self.rows.batches(self.step, count, _BUFFER)
        stored = self.rows.arrays if self.rows is not None and self.rows.on_device else None
        state, losses = _steps(
            self.config, self.state, self.key, jnp.asarray(self.step, jnp.int32),
            jnp.asarray(count, jnp.int32), self.data, rows, stored, self.decaying,
        )  # fmt: skip
        self.state = state  # the old one was donated
        bad = int(state["bad"])
        done = count if bad < 0 else bad - self.step
        self.losses.append(np.asarray(losses, np.float64)[:done])
        first, self.step = self.step, self.step + done
        if bad >= 0:
            self.state = {**state, "bad": jnp.asarray(-1, jnp.int32)}
            mine = None if rows is None else jax.tree.map(lambda x: x[bad - first], rows)
            self._stop_at(mine, stored)

    def _recent(self) -> float:
        tail = self.losses[-1][-50:] if self.losses else np.zeros(1)
        return float(np.mean(tail))

    def _validate(self) -> str:
        recipe = self.config.recipe
        total, count = 0.0, 0
        rows = self.held_out
        if rows is None:
            for i in range(_VALIDATION_BATCHES):
                k = jax.random.fold_in(self.validation_key, i)
                total += float(_validate(self.config, self.state, k, self.data, None))
                count += 1
        else:
            for i, batch in enumerate(rows.in_order(recipe.batch_size)):
                k = jax.random.fold_in(self.validation_key, i)
                n = len(jax.tree.leaves(batch)[0])
                total += n * float(_validate(self.config, self.state, k, self.data, batch))
                count += n
        value = total / max(count, 1)
        self.validations.append((self.step, value))
        if value < self.best[0]:
            self.best = (value, jnp.copy(self._averaged()))
            self.waited = 0
        else:
            self.waited += 1
        early = recipe.patience is not None and self.waited >= recipe.patience
        return "early" if early else "done"

    def _averaged(self) -> Any:
        return self.state["ema"] if self.config.recipe.decay else self.state["params"]

    def result(self) -> Any:
        keep = self.config.recipe.keep_best and np.isfinite(self.best[0])
        return self.best[1] if keep else self._averaged()

    def history(self) -> dict[str, np.ndarray]:
        losses = np.concatenate(self.losses) if self.losses else np.zeros(0)
        table = np.asarray(self.validations, np.float64).reshape(-1, 2)
        return {
            "loss": losses,
            "validation_step": table[:, 0].astype(np.int64),
            "validation_loss": table[:, 1],
        }

    def _stop_at(self, rows: Any, stored: Any) -> None:
        bad = self.step
        batch = _batch(self.config, jax.random.fold_in(self.key, bad), self.data, rows, stored)
        where = ""
        if self.folder is not None:
            named = {f"{j}": np.asarray(x) for j, x in enumerate(jax.tree.leaves(batch))}
            path = save_folder(self.folder / "bad-batch", "batch", {"step": bad}, named)
            self._save()
            where = f" The batch is in {path}, and the weights before it in {self.folder}."
        raise Degenerate(
            f"ab.{self.name}.fit: the loss or its gradient is not finite at step {bad}: "
            f"{self.config.task.explain(batch)}{where}"
        )

    # ------------------------------------------------------------------ checkpoints

    def _arrays(self) -> dict[str, np.ndarray]:
        tree = (self.state, self.best[1])
        return {f"{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(tree))}

    def _save(self) -> None:
        assert self.folder is not None
        config = {
            "mark": self.mark, "step": self.step, "waited": self.waited,
            "best": np.asarray(self.best[0]), "seconds": self.seconds, **self.history(),
        }  # fmt: skip
        save_folder(self.folder / "checkpoint", "training checkpoint", config, self._arrays())

    def _resume(self) -> None:
        assert self.folder is not None
        path = self.folder / "checkpoint"
        if not path.exists():
            return
        kind, config, arrays = load_folder(path)
        if kind != "training checkpoint" or config.get("mark") != self.mark:
            raise InvalidValue(
                f"checkpoint_dir: {path} belongs to another run (other key, network, settings, or "
                f"not a training checkpoint). Choose another folder, or delete it to start anew."
            )
        tree = (self.state, self.best[1])
        leaves = [jnp.asarray(arrays[f"{i}"]) for i in range(len(jax.tree.leaves(tree)))]
        self.state, best = jax.tree.unflatten(jax.tree.structure(tree), leaves)
        self.best = (float(config["best"]), best)
        self.step = self.resumed = config["step"]
        self.waited, self.seconds = config["waited"], config["seconds"]
        self.losses = [config["loss"]]
        self.validations = list(
            zip(config["validation_step"].tolist(), config["validation_loss"].tolist(), strict=True)
        )


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done.

    It would come while Python waits for the device, when the weights have moved on and the step's
    number has not: a checkpoint written then would repeat those steps.
    """
    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    held: list[Any] = []
    signal.signal(signal.SIGINT, lambda *args: held.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held and callable(before):
        before(*held[0])


def _fingerprint(config: _Config, state: Any, key: Any) -> str:
    """Tells runs apart; the number of steps is part of it, since the schedule depends on it."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((config.recipe, str(jax.tree.structure(state)))).encode())
    for x in [jax.random.key_data(key), *jax.tree.leaves(state["params"])]:
        digest.update(np.asarray(x).tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------- compiled


def _batch(config: _Config, key: Any, data: Any, rows: Any, stored: Any) -> Any:
    """The examples of one step, with leading axes (accumulate, batch)."""
    recipe = config.recipe

    def one(key, rows):
        key = jax.random.fold_in(key, 0)
        if config.stored is None:
            batch = config.task.simulate(key, recipe.batch_size, data)
        else:
            if config.stored:
                rows = jax.tree.map(lambda x: x[rows], stored)
            batch = config.task.read(rows, key, data)
        if config.mesh is not None:
            axis = NamedSharding(config.mesh, PartitionSpec(config.mesh.axis_names[0]))
            batch = jax.lax.with_sharding_constraint(batch, axis)
        return batch

    parts = [
        one(
            jax.random.fold_in(key, j),
            None if rows is None else jax.tree.map(lambda x, j=j: x[j], rows),
        )
        for j in range(recipe.accumulate)
    ]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *parts)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _steps(config, state, key, first, count, data, rows, stored, decaying):
    recipe = config.recipe

    def loss(params, key, batch):
        return config.task.loss(config.flat.network(params), key, batch, data)

    def gradient(params, key, batch):
        if recipe.accumulate == 1:
            part = jax.tree.map(lambda x: x[0], batch)
            return jax.value_and_grad(loss)(params, jax.random.fold_in(key, 0), part)

        def add(total, xs):
            i, batch = xs
            out = jax.value_and_grad(loss)(params, jax.random.fold_in(key, i), batch)
            return jax.tree.map(jnp.add, total, out), None

        start = (jnp.zeros((), jnp.result_type(float)), jnp.zeros_like(params))
        total, _ = jax.lax.scan(add, start, (jnp.arange(recipe.accumulate), batch))
        return jax.tree.map(lambda x: x / recipe.accumulate, total)

    def body(carry):
        i, state, losses = carry
        step = first + i
        k = jax.random.fold_in(key, step)
        mine = None if rows is None else jax.tree.map(lambda x: x[i], rows)
        batch = _batch(config, k, data, mine, stored)
        value, grads = gradient(state["params"], jax.random.fold_in(k, 1 << 20), batch)
        ok = jnp.isfinite(value) & jnp.isfinite(jnp.sum(grads * grads))
        updates, opt = recipe.optimizer.update(grads, state["opt"], state["params"])
        params = state["params"] + updates
        if recipe.weight_decay:
            rate = recipe.learning_rate * recipe.weight_decay * recipe.decay_rate(step)
            params = params - rate * decaying * state["params"]
        # Shorter at first, so that where the run began is forgotten.
        decay = jnp.minimum(recipe.decay, (1.0 + step) / (10.0 + step))
        decay = decay if recipe.decay else jnp.zeros(())
        ema = (decay * state["ema"] + (1 - decay) * params).astype(params.dtype)
        new = {"params": params, "opt": opt, "ema": ema, "bad": state["bad"]}
        old = {**state, "bad": step.astype(jnp.int32)}
        state = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
        return i + 1, state, losses.at[i].set(value.astype(losses.dtype))

    def goes_on(carry):
        i, state, _ = carry
        return (i < count) & (state["bad"] < 0)

    zeros = jnp.zeros(_BUFFER, jnp.result_type(float))
    _, state, losses = jax.lax.while_loop(
        goes_on, body, (jnp.zeros((), jnp.int32), state, zeros)
    )
    return state, losses


@functools.partial(jax.jit, static_argnums=0)
def _validate(config, state, key, data, rows):
    params = state["ema"] if config.recipe.decay else state["params"]
    network = config.flat.network(params)
    k1, k2 = jax.random.split(key)
    if rows is None:
        batch = config.task.simulate(k1, config.recipe.batch_size, data)
    else:
        batch = config.task.read(rows, k1, data)
    return config.task.loss(network, k2, batch, data)
