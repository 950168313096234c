"""The training loop: optimizer steps in compiled chunks, checkpoints, early stopping.

The random numbers of a step depend on its number alone, so that a run that was stopped and resumed
ends where an undisturbed one does.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidValue
from abduce.inference.mcmc.sweeps import Bar

__all__ = ["Training", "train"]


@dataclasses.dataclass(frozen=True)
class Training:
    """What is compiled.

    Attributes:
        objective: An `Expectation` of the parameters and the data, to be maximized.
        optimizer: An optax transformation.
        num_particles: Draws whose gradients are averaged.
        num_steps: In all.
        chunk: Steps per compiled call.
        slice_data: `(data, key) -> data` of a step; None: all of it.
        baselines: Addresses with a running mean as baseline.
        learned: Whether there are learned baselines to fit.
    """

    objective: Any
    optimizer: Any
    num_particles: int
    num_steps: int
    chunk: int
    slice_data: Callable[[Any, Any], Any] | None
    baselines: tuple[str, ...] = ()
    learned: bool = False


@functools.partial(jax.jit, static_argnums=0)
def _chunk(config: Training, state: Any, key: Any, first: Any, data: Any) -> Any:
    def step(state, i):
        params, opt_state, means, bad, bad_params = state
        k = jax.random.fold_in(key, i)
        k1, k2, k3 = jax.random.split(k, 3)
        mine = data if config.slice_data is None else config.slice_data(data, k2)
        value, grads = config.objective.value_and_grad(
            k1, params, mine, num_samples=config.num_particles, baselines=means or None
        )
        ascent = jax.tree.map(jnp.negative, grads)
        if config.learned:
            misfit = jax.grad(lambda p: config.objective.baseline_loss(k3, p, mine))(params)
            ascent = jax.tree.map(jnp.add, ascent, misfit)
        finite = jnp.isfinite(value)
        for g in jax.tree.leaves(grads):
            finite &= jnp.all(jnp.isfinite(g))
        safe = jax.tree.map(lambda g: jnp.where(finite, g, 0.0), ascent)
        updates, new_opt = config.optimizer.update(safe, opt_state, params)
        new_params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
        go = finite & (i < config.num_steps)

        def keep(new, old):
            return jax.tree.map(lambda a, b: jnp.where(go, a, b), new, old)

        if means:
            costs = config.objective.costs(k3, params, mine)
            means = keep({a: 0.95 * m + 0.05 * jnp.mean(costs[a]) for a, m in means.items()}, means)
        first_bad = ~finite & (bad < 0) & (i < config.num_steps)
        bad_params = jax.tree.map(lambda p, b: jnp.where(first_bad, p, b), params, bad_params)
        bad = jnp.where(first_bad, i, bad)
        new_state = (keep(new_params, params), keep(new_opt, opt_state), means, bad, bad_params)
        return new_state, (value, finite)

    return jax.lax.scan(step, state, first + jnp.arange(config.chunk, dtype=jnp.int32))


@dataclasses.dataclass
class Fit:
    """What a training run ends with.

    Attributes:
        params: The parameters.
        values: The objective at each step that was run (not finite where it was skipped).
        num_nonfinite: Steps that were skipped.
        first_bad: The number of the first of them and the parameters there, or None.
        stopped: 'done', 'early' or 'interrupted'.
        resumed_at: The step at which a checkpoint took over, or 0.
    """

    params: Any
    values: np.ndarray
    num_nonfinite: int
    first_bad: tuple[int, Any] | None
    stopped: str
    resumed_at: int


def train(
    config: Training,
    params: Any,
    key: Any,
    data: Any,
    *,
    patience: int | None,
    checkpoint_dir: Any,
    progress_bar: bool,
    tag: str,
) -> Fit:
    """Runs the optimizer.

    Args:
        config: What is compiled.
        params: Parameters at the start.
        key: Random key.
        data: Handed to the objective.
        patience: Chunks without a better mean of the objective after which to stop; None: never.
        checkpoint_dir: A folder to write to after every chunk, and to resume from; or None.
        progress_bar: Whether to show progress.
        tag: Tells apart the starts within one folder.
    """
    zero = {a: jnp.zeros((), jnp.result_type(float)) for a in config.baselines}
    none = jnp.asarray(-1, jnp.int32)
    state = (params, config.optimizer.init(params), zero, none, params)
    values = np.zeros(0)
    finite = np.zeros(0, bool)
    file, resumed = None, 0
    if checkpoint_dir is not None:
        file = Path(checkpoint_dir) / f"vi-{tag}.npz"
        mark = _fingerprint(config, state, key, data)
        if file.exists():
            state, values, finite = _load(file, mark, state)
            resumed = len(values)
    stopped, waited, best = "done", 0, -np.inf
    first = len(values)
    try:
        with Bar("vi", config.num_steps, progress_bar) as bar:
            while first < config.num_steps:
                state, (v, f) = _chunk(config, state, key, jnp.asarray(first, jnp.int32), data)
                n = min(config.chunk, config.num_steps - first)
                values = np.concatenate([values, np.asarray(v, np.float64)[:n]])
                finite = np.concatenate([finite, np.asarray(f)[:n]])
                first += n
                bar.update(first, "fitting")
                if file is not None:
                    _save(file, mark, state, values, finite)
                if patience is not None:
                    recent = values[-n:][finite[-n:]]
                    mean = recent.mean() if len(recent) else -np.inf
                    se = recent.std() / np.sqrt(max(len(recent), 1)) if len(recent) else 0.0
                    waited = 0 if mean > best + se else waited + 1
                    best = max(best, mean)
                    if waited >= patience:
                        stopped = "early"
                        break
    except KeyboardInterrupt:
        stopped = "interrupted"
    params, _, _, bad, bad_params = state
    at = None if int(bad) < 0 else (int(bad), bad_params)
    values = np.where(~finite & np.isfinite(values), np.nan, values)  # a derivative was not finite
    return Fit(params, values, int((~finite).sum()), at, stopped, resumed)


# ---------------------------------------------------------------------- checkpoints


def _arrays(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree) if eqx.is_array(x)]


def _fingerprint(config: Training, state: Any, key: Any, data: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    about = (config.num_particles, config.num_steps, str(jax.tree.structure(state)))
    digest.update(repr(about).encode())
    for x in [np.asarray(jax.random.key_data(key)), *_arrays(state[0]), *_arrays(data)]:
        digest.update(repr((x.shape, x.dtype.str)).encode())
        digest.update(x.tobytes())
    return digest.hexdigest()


def _save(file: Path, mark: str, state: Any, values: np.ndarray, finite: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"state_{i}": x for i, x in enumerate(_arrays(state))}
    temporary = file.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        np.savez(f, mark=np.array(mark), values=values, finite=finite, **arrays)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, file)


def _load(file: Path, mark: str, state: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as found:
            same = str(found["mark"]) == mark
            values, finite = found["values"], found["finite"]
            arrays = [found[f"state_{i}"] for i in range(len(_arrays(state)))] if same else []
    except Exception as e:
        raise InvalidValue(
            f"checkpoint_dir: {file} cannot be read ({e}). Delete it to start anew."
        ) from None
    if not same:
        raise InvalidValue(
            f"checkpoint_dir: {file} belongs to another run (other data, key, starting parameters, "
            f"num_steps or num_particles). Delete it, or choose another folder."
        )
    leaves, treedef = jax.tree.flatten(state)
    it = iter(arrays)
    return (
        treedef.unflatten([jnp.asarray(next(it)) if eqx.is_array(x) else x for x in leaves]),
        values,
        finite,
    )
