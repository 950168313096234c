"""Recipes: a Python file that names an estimator, for training from the command line.

A recipe is a program of its user's and is run as one:

    estimator = ab.npe(model, observed=["y"])    # not fitted
    fit = {"num_steps": 20_000}                  # keyword arguments of estimator.fit; optional
    seed = 0                                     # optional

`pretrain` trains it into a folder that `ab.load` reads. The folder appears when there is something
to load, complete: the checkpoint of a run lies beside it, in `FOLDER.checkpoint`, with a copy of
the recipe, and is removed once the result is saved. `check` takes the model from a recipe, since
a saved estimator has none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import shlex
import shutil
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from abduce.amortized.describing import is_checkable, model_name, validated
from abduce.amortized.posing import arguments_of
from abduce.amortized.reading_saved import READERS
from abduce.errors import InvalidAlgorithm, InvalidValue, suggest
from abduce.inference.persistence import CONFIG, WEIGHTS, load_folder

__all__ = ["RecipeFile", "check", "checkpoint_of", "opened", "pretrain", "unfinished"]

INTERRUPTED = 130  # the shell's status of a command ended by Ctrl-C
_CHECKS = 0x636B  # tells the random key of checks from that of training
_MAKERS = "ab.npe, ab.fmpe, ab.npse, ab.nle, ab.nre, ab.pfn or ab.distribution_transformer"


@dataclasses.dataclass(frozen=True)
class RecipeFile:
    """What a recipe says.

    Attributes:
        path: The file.
        source: Its bytes.
        estimator: Not fitted.
        fit: Keyword arguments of `estimator.fit`.
        seed: Of the random key.
    """

    path: Path
    source: bytes
    estimator: Any
    fit: Mapping[str, Any]
    seed: int


# ---------------------------------------------------------------------- reading


@contextlib.contextmanager
def opened(path: Any) -> Iterator[RecipeFile]:
    """Runs a recipe. Inside the context its folder is on the import path, as for a script.

    Args:
        path: The file. Its module is called `abduce_recipe`, so what stands under
            `if __name__ == "__main__":` does not run.

    Raises:
        InvalidValue: There is no such file, it fails (the message has file and line), or what it
            defines does not fit.
    """
    path = Path(path).expanduser()
    try:
        source = path.read_bytes()
    except FileNotFoundError as error:
        raise InvalidValue(f"{path}: there is no such recipe.") from error
    except OSError as error:
        raise InvalidValue(f"{path}: the recipe cannot be read ({error.strerror}).") from error
    module = types.ModuleType("abduce_recipe")
    module.__file__ = str(path)
    before, folder = sys.modules.get(module.__name__), str(path.resolve().parent)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    sys.path.insert(0, folder)
    try:
        _run(source, module, path)
        yield _read(module, source, path)
    finally:
        with contextlib.suppress(ValueError):  # the recipe may have edited it
            sys.path.remove(folder)
        sys.modules.pop(module.__name__, None)
        if before is not None:
            sys.modules[module.__name__] = before


def _run(source: bytes, module: types.ModuleType, path: Path) -> None:
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except SyntaxError as error:  # of the recipe, or of a file that it imports
        text = f": {error.text.strip()}" if error.text else ""
        raise InvalidValue(
            f"{error.filename or path}, line {error.lineno}: {error.msg}{text}"
        ) from error
    except (Exception, SystemExit) as error:
        lines, at = [], error.__traceback__
        while at is not None:
            if at.tb_frame.f_code.co_filename == str(path):
                lines.append(at.tb_lineno)
            at = at.tb_next
        where = f", line {lines[-1]}" if lines else ""
        raise InvalidValue(f"{path}{where}: {type(error).__name__}: {error}") from error


def _read(module: types.ModuleType, source: bytes, path: Path) -> RecipeFile:
    found = vars(module)
    if "estimator" not in found:
        raise InvalidValue(
            f"{path}: the recipe defines no `estimator`. Write estimator = ab.npe(model, "
            f'observed=["y"]), or another of {_MAKERS}.'
        )
    estimator, fit, seed = found["estimator"], found.get("fit", {}), found.get("seed", 0)
    is_one = all(hasattr(estimator, name) for name in ("fit", "save", "network", "name"))
    if not is_one or isinstance(estimator, type):
        raise InvalidValue(
            f"{path}: `estimator` is of type {type(estimator).__name__}; it has to be what "
            f"{_MAKERS} returns."
        )
    if estimator.network is not None:
        raise InvalidValue(
            f"{path}: `estimator` is fitted already. Leave .fit(...) to `abduce pretrain`, and "
            f'write its arguments as fit = {{"num_steps": 20_000}}.'
        )
    if not isinstance(fit, Mapping) or not all(isinstance(k, str) for k in fit):
        raise InvalidValue(
            f"{path}: `fit` has to be a dict of keyword arguments of estimator.fit, as "
            f'{{"num_steps": 20_000}}, got {fit!r}.'
        )
    _check_settings(estimator, fit, path)
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise InvalidValue(f"{path}: `seed` has to be an int from 0 to 2**32 - 1, got {seed!r}.")
    return RecipeFile(path, source, estimator, dict(fit), seed)


def _check_settings(estimator: Any, fit: Mapping[str, Any], path: Path) -> None:
    own = {"key": "from `seed`", "checkpoint_dir": "from --out"}
    parameters = inspect.signature(estimator.fit).parameters
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in own]
    for name in fit:
        if name in own:
            raise InvalidValue(
                f"{path}: fit[{name!r}] is set by `abduce pretrain` itself, {own[name]}. Leave it "
                f"out."
            )
        if name not in known and not is_open:
            raise InvalidValue(
                f"{path}: fit[{name!r}] is no argument of ab.{estimator.name}(...).fit; there are "
                f"{', '.join(known)}.{suggest(name, known)}"
            )


# ---------------------------------------------------------------------- training


def checkpoint_of(folder: Any) -> Path:
    """Where the run that trains into a folder keeps its checkpoint: beside it."""
    target = Path(os.path.abspath(Path(folder).expanduser()))
    return target.parent / f"{target.name}.checkpoint"


def pretrain(recipe: Any, out: Any, *, resume: bool = False, num_steps: int | None = None) -> int:
    """Trains the estimator of a recipe and saves it; says on standard output what it does.

    Args:
        recipe: The recipe's file.
        out: The folder to save in; it must not exist, or be empty.
        resume: Whether to go on where a checkpoint is; without one, training starts at step 0.
        num_steps: In place of the recipe's.

    Returns:
        0; or 130 after a Ctrl-C, when what there is was saved and the checkpoint kept.

    Raises:
        InvalidValue: The recipe or the folder does not fit.
        AbduceError: As `estimator.fit`.
    """
    out = Path(out).expanduser()
    working = checkpoint_of(out)
    again = ["abduce", "pretrain", str(recipe), "--out", str(out), "--resume"]
    again += [] if num_steps is None else ["--steps", str(num_steps)]
    with opened(recipe) as file:
        estimator = file.estimator
        settings = {**file.fit} if num_steps is None else {**file.fit, "num_steps": num_steps}
        _require_steps(settings, file)
        _check_folders(out, working, resume, file)
        working.mkdir(parents=True, exist_ok=True)
        (working / "recipe.py").write_bytes(file.source)
        begin = _step_of(working)
        print(
            f"training ab.{estimator.name} of {model_name(estimator)} from step {begin}; the "
            f"checkpoint is written to {working}",
            flush=True,
        )
        try:
            fitted = estimator.fit(jax.random.key(file.seed), checkpoint_dir=working, **settings)
            fitted.save(out)
        except KeyboardInterrupt:  # outside the steps, or a second time
            print(f"interrupted; {_go_on(working, again)}")
            return INTERRUPTED
        finally:
            if [p.name for p in working.iterdir()] == ["recipe.py"]:  # no step was made
                shutil.rmtree(working)
    losses = fitted.history["loss"]
    if fitted.history["interrupted"]:
        print(f"interrupted at step {len(losses)}: what there is was saved in {out}.")
        print(_go_on(working, again))
        return INTERRUPTED
    shutil.rmtree(working)
    loss = validated(fitted.history)
    print(f"saved {out}: {len(losses)} steps" + (f", validation loss {loss}" if loss else ""))
    if is_checkable(fitted):
        print(f"check it: {shlex.join(['abduce', 'check', str(out), '--recipe', str(recipe)])}")
    return 0


def _require_steps(settings: Mapping[str, Any], file: RecipeFile) -> None:
    steps = inspect.signature(file.estimator.fit).parameters["num_steps"]
    if steps.default is steps.empty and "num_steps" not in settings:
        raise InvalidValue(
            f"{file.path}: ab.{file.estimator.name} has no default number of steps. Write "
            f'fit = {{"num_steps": 10_000}} in the recipe, or pass --steps 10000.'
        )


def _check_folders(out: Path, working: Path, resume: bool, file: RecipeFile) -> None:
    """Refuses what would be overwritten, before hours of training rather than after."""
    if out.exists() and not out.is_dir():
        raise InvalidValue(f"--out {out} is a file. Name a folder that does not exist.")
    entries = sorted(p.name for p in out.iterdir()) if out.exists() else []
    is_begun = (working / "checkpoint").exists()
    if is_begun and not resume:
        raise InvalidValue(
            f"{working} holds the checkpoint of a run that did not end. Go on there with --resume, "
            f"or delete it to start anew."
        )
    if entries and not is_begun:
        what = f"there is no checkpoint {working} to resume from, and" if resume else "the folder"
        listed = ", ".join(entries[:3]) + (", ..." if len(entries) > 3 else "")
        raise InvalidValue(
            f"--out {out}: {what} it is not empty ({listed}). Choose another folder, or move it "
            f"away."
        )
    odd = [n for n in entries if n not in (CONFIG, WEIGHTS)]
    if odd:
        raise InvalidValue(
            f"--out {out} holds {odd[0]}, which abduce did not write and saving would delete. Move "
            f"it away."
        )
    kept = working / "recipe.py"
    if is_begun and kept.exists() and kept.read_bytes() != file.source:
        raise InvalidValue(
            f"{file.path} has changed since the run in {working} began; the recipe as it was is "
            f"{kept}. Resume with that one, or delete {working} to start anew."
        )


def _step_of(working: Path) -> int:
    if not (working / "checkpoint").exists():
        return 0
    step = load_folder(working / "checkpoint")[1].get("step")
    return step if type(step) is int else 0


def unfinished(folder: Any) -> str:
    """Says that a run into a folder has not ended, if so."""
    working = checkpoint_of(folder)
    if not (working / "checkpoint").exists():
        return ""
    return f"unfinished: checkpoint at step {_step_of(working):,} in {working}"


def _go_on(working: Path, again: list[str]) -> str:
    if not (working / "checkpoint").exists():
        return f"no step was made. Start again: {shlex.join(again)}"
    return f"the checkpoint is in {working}. Go on: {shlex.join(again)}"


# ---------------------------------------------------------------------- checking


def check(folder: Any, recipe: Any, *, budget: float | None = 60.0) -> int:
    """Checks a saved estimator on fresh simulations, prints the report and keeps it in the folder.

    Args:
        folder: What `pretrain` or `est.save` wrote.
        recipe: The recipe; its estimator's model, arguments and designs are taken.
        budget: Seconds; None: no limit.

    Returns:
        0 if all checks passed, 1 if not.

    Raises:
        LoadError: See `ab.load`.
        InvalidAlgorithm: A kind of estimator that has no checks.
        InvalidModel: The recipe's model is not the one of training.
    """
    kind, config, arrays = load_folder(folder)
    if kind not in READERS:
        raise InvalidValue(f"{folder} holds a {kind}, not an estimator.")
    est = READERS[kind](config, arrays, str(folder))
    with opened(recipe) as file:
        mine = file.estimator
        for what, which in ((est, folder), (mine, file.path)):
            if not is_checkable(what):
                raise InvalidAlgorithm(
                    f"{which} holds an ab.{what.name}, which has no checks that run on a saved "
                    f"estimator; ab.npe, ab.fmpe, ab.npse, ab.nle and ab.nre have. Compare its "
                    f"answers with those of another algorithm: see docs/checks.md."
                )
        designs, args, kwargs = arguments_of(mine.simulation)
        est = est.with_model(mine.model, *args, designs=designs, **kwargs)
        key = jax.random.fold_in(jax.random.key(file.seed), _CHECKS)
        report = est.check(key, budget=budget)
    print(report)
    est.save(folder, checks=report)
    return 0 if report.passed else 1
