"""Saving and loading: a folder of `config.json` and `weights.safetensors`.

`config.json` says what the folder holds (kind, schema, version, settings), lists every array with
its dtype and shape, and carries SHA-256 checksums of both files; `weights.safetensors` holds the
arrays. Loading parses JSON and copies bytes: nothing is executed or unpickled. Whatever is wrong
with a folder (missing, cut off, altered, written by a newer release) is a `LoadError` that says
which file and what to do.

A save is complete or absent: files are written to a temporary folder beside the target, which is
then renamed. An existing folder is replaced only if abduce wrote everything in it.

Values in `config` may be nested dicts, lists and tuples of `None`, bool, int, float, str and
arrays, typed PRNG keys included; see `flatten`.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from abduce.errors import AbduceError
from abduce.inference.encoding import LoadError, flatten, pack, unflatten, unpack

__all__ = ["ForeignFolder", "LoadError", "MissingFile", "load_folder", "peek", "save_folder"]

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
FORMAT = "abduce"
SCHEMA = 1  # raised when an older release could misread what is written


class MissingFile(LoadError, FileNotFoundError):
    """The folder, or one of its two files, is not there."""


class ForeignFolder(AbduceError, FileExistsError):
    """Saving would overwrite something that abduce did not write."""


def save_folder(
    path: str | os.PathLike, kind: str, config: Mapping, arrays: Mapping[str, object]
) -> Path:
    """Writes a folder that `load_folder` reads back.

    Args:
        path: The folder; `~` is expanded and parents are made. An existing one is replaced if
            abduce wrote it, or if it is empty.
        kind: What it holds, such as "posterior".
        config: Settings and metadata, any value that `flatten` takes; keys are strings.
        arrays: Flat name to array: bool, int, float (float16 and bfloat16 too), complex, of any
            shape, or a typed PRNG key array.

    Returns:
        The path of the folder.

    Raises:
        ForeignFolder: Something else is at `path`.
        InvalidValue: A value cannot be stored; the message names it.
        OSError: The disk refuses.
    """
    target = Path(os.path.realpath(Path(path).expanduser()))
    _check_replaceable(target)
    tree, referenced = flatten(dict(config), "config", taken=arrays)
    table, tensors = {}, {}
    for name, value in {**arrays, **referenced}.items():
        table[name], tensors[name] = pack(name, value)
    weights = _serialize(tensors)
    document = {
        "format": FORMAT,
        "schema": SCHEMA,
        "kind": kind,
        "abduce": _version(),
        "weights": {
            "file": WEIGHTS,
            "bytes": len(weights),
            "sha256": hashlib.sha256(weights).hexdigest(),
        },
        "arrays": table,
        "config": tree,
    }
    document["sha256"] = _document_checksum(document)
    text = json.dumps(document, indent=1, allow_nan=False).encode("ascii")

    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        new.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        _write(new / WEIGHTS, weights)
        _write(new / CONFIG, text)
        _sync_folder(new)
        _swap(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return target


def load_folder(path: str | os.PathLike) -> tuple[str, dict, dict[str, object]]:
    """Reads a folder written by `save_folder`, checking all of it.

    Args:
        path: The folder.

    Returns:
        kind: What it holds.
        config: As it was given, tuples and arrays included.
        arrays: Flat name to numpy array, or to a typed PRNG key array.

    Raises:
        MissingFile: The folder or a file is missing.
        LoadError: Anything else is wrong with it; the message names the file and the reason.
    """
    folder = Path(path).expanduser()
    document = _read_document(folder)
    weights = _read_weights(folder / WEIGHTS, document["weights"])
    tensors = _deserialize(folder / WEIGHTS, weights)
    table = document["arrays"]
    if set(table) != set(tensors):
        odd = sorted(set(table) ^ set(tensors))[:5]
        raise LoadError(
            f"{folder / WEIGHTS}: its arrays differ from those listed in {CONFIG}: "
            f"{', '.join(odd)}. {_AGAIN}"
        )
    try:
        arrays = {name: unpack(name, table[name], tensors[name]) for name in table}
        config, used = unflatten(document["config"], arrays)
    except RecursionError as error:
        raise LoadError(f"{folder / CONFIG}: nested too deeply. {_AGAIN}") from error
    except LoadError as error:
        raise LoadError(f"{folder}: {error} {_AGAIN}") from error
    if not isinstance(config, dict):
        raise LoadError(f'{folder / CONFIG}: "config" must be an object. {_AGAIN}')
    return document["kind"], config, {k: v for k, v in arrays.items() if k not in used}


def peek(path: str | os.PathLike) -> tuple[str, str]:
    """Kind and abduce version of a saved folder, without reading its arrays.

    Raises:
        LoadError: As `load_folder`, as far as `config.json` goes.
    """
    document = _read_document(Path(path).expanduser())
    return document["kind"], document["abduce"]


_AGAIN = "Save it again, or copy it again from its source."


def _version() -> str:
    return getattr(sys.modules.get("abduce"), "__version__", "unknown")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _document_checksum(document: Mapping) -> str:
    """Over everything but the checksum itself, independent of white space and key order."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _serialize(tensors: dict[str, np.ndarray]) -> bytes:
    import safetensors.numpy

    return safetensors.numpy.save(tensors)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    remedy = "Choose another path, or move it away first."
    if not target.is_dir():
        raise ForeignFolder(f"save: {target} is a file, not a saved folder. {remedy}")
    entries = {entry.name for entry in target.iterdir()}
    others = sorted(entries - {CONFIG, WEIGHTS})
    if others:
        listed = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise ForeignFolder(
            f"save: {target} holds files that abduce did not write ({listed}), and replacing the "
            f"folder would delete them. {remedy}"
        )
    if entries:
        try:
            document = json.loads((target / CONFIG).read_bytes())
            ours = isinstance(document, dict) and document.get("format") == FORMAT
        except (OSError, ValueError, RecursionError):
            ours = False
        if not ours:
            raise ForeignFolder(
                f"save: {target} was not written by abduce (its {CONFIG} says otherwise, or is "
                f"missing or damaged). {remedy}"
            )


def _swap(new: Path, target: Path) -> None:
    """Puts `new` at `target`; what was there goes away last, and comes back on failure."""
    if not target.exists():
        os.rename(new, target)
        _sync_folder(target.parent)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    try:
        os.rename(target, old / target.name)
    except BaseException:
        old.rmdir()
        raise
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old / target.name, target)
        old.rmdir()
        raise
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise MissingFile(
            f"{path}: the file is missing from the saved folder. Copy the whole folder, "
            f"{CONFIG} and {WEIGHTS}."
        ) from error
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _read_document(folder: Path) -> dict:
    path = folder / CONFIG
    try:
        is_there, is_folder = folder.exists(), folder.is_dir()
    except (OSError, ValueError) as error:  # a name too long, or with a null character
        raise MissingFile(f"{folder}: not a path of a saved folder ({error}).") from error
    if not is_there:
        left = [p for p in _leftovers(folder) if p.is_dir()]
        hint = f" A save was interrupted; the previous one is in {left[0]}." if left else ""
        raise MissingFile(f"{folder}: there is no such folder.{hint}")
    if not is_folder:
        raise LoadError(f"{folder}: is a file; abduce saves folders with {CONFIG} and {WEIGHTS}.")
    data = _read(path)
    try:
        document = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        what = "is empty" if not data.strip() else f"is damaged or cut off ({error})"
        raise LoadError(f"{path}: {what}. {_AGAIN}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise LoadError(f'{path}: is not from abduce (no "format": "{FORMAT}").')
    schema = document.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise LoadError(
            f"{path}: written by abduce {document.get('abduce')} in format {schema}; this "
            f"release, {_version()}, reads formats up to {SCHEMA}. Upgrade with "
            "`pip install -U abduce`."
        )
    _check_document(path, document)
    return document


def _leftovers(folder: Path) -> list[Path]:
    try:
        return sorted(folder.parent.glob(f".{_glob_escape(folder.name)}.old-*/{folder.name}"))
    except (OSError, ValueError, NotImplementedError):
        return []


def _glob_escape(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _check_document(path: Path, document: dict) -> None:
    expected = {
        "schema": int,
        "kind": str,
        "abduce": str,
        "weights": dict,
        "arrays": dict,
        "config": dict,
        "sha256": str,
    }
    for key, kind in expected.items():
        if type(document.get(key)) is not kind:
            raise LoadError(f'{path}: "{key}" is missing or not of type {kind.__name__}. {_AGAIN}')
    weights = document["weights"]
    if type(weights.get("sha256")) is not str or type(weights.get("bytes")) is not int:
        raise LoadError(f'{path}: "weights" lacks its size or checksum. {_AGAIN}')
    try:
        checksum = _document_checksum(document)
    except (ValueError, RecursionError) as error:  # a number beyond float64, or too deep
        raise LoadError(f"{path}: is damaged ({error}). {_AGAIN}") from error
    if checksum != document["sha256"]:
        raise LoadError(f"{path}: its checksum does not match: the file was altered. {_AGAIN}")


def _read_weights(path: Path, entry: dict) -> bytes:
    data = _read(path)
    if len(data) != entry["bytes"]:
        how = "cut off" if len(data) < entry["bytes"] else "longer than it was"
        raise LoadError(
            f"{path}: is {how}: {len(data)} bytes, {entry['bytes']} were written. {_AGAIN}"
        )
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise LoadError(
            f"{path}: its checksum differs from the one in {CONFIG}: the file was altered, or "
            f"belongs to another save. {_AGAIN}"
        )
    return data


def _deserialize(path: Path, data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    import safetensors

    try:
        entries = safetensors.deserialize(data)
    except Exception as error:  # the library documents no closed set of errors
        raise LoadError(f"{path}: is not a valid safetensors file ({error}). {_AGAIN}") from error
    return {name: (e["dtype"], list(e["shape"]), e["data"]) for name, e in entries}
