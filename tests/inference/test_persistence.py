"""Saving and loading folders: round trips, safety of what is on disk, and damaged files."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abduce.errors import AbduceError, InvalidValue
from abduce.inference import persistence
from abduce.inference.encoding import flatten, unflatten
from abduce.inference.persistence import (
    ForeignFolder,
    LoadError,
    MissingFile,
    load_folder,
    peek,
    save_folder,
)

DTYPES = [
    np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64,
    np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
    ml_dtypes.int4, np.complex64, np.complex128,
]  # fmt: skip


def example(path):
    config = {"args": (1, 2.5, np.arange(3.0)), "given": {"y": jnp.ones((2, 2))}, "nuts": [True]}
    arrays = {
        "mu": np.linspace(0, 1, 20).reshape(2, 10),
        "a/theta": np.arange(12, dtype=np.float32).reshape(2, 2, 3),
        "key": jax.random.key(3),
    }
    return save_folder(path, "posterior", config, arrays)


def damage(path, name, change):
    file = path / name
    file.write_bytes(change(file.read_bytes()))


def rewrite(path, change):
    """Alters the config and makes its checksum right again, as an adversary would."""
    document = json.loads((path / "config.json").read_text())
    change(document)
    document["sha256"] = persistence._document_checksum(document)
    (path / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("shape", [(), (0, 3), (4,), (2, 3)])
def test_arrays_come_back_bit_for_bit(tmp_path, dtype, shape):
    rng = np.random.default_rng(0)
    array = np.asarray(
        rng.integers(0, 2, shape) if dtype == np.bool_ else rng.integers(-4, 5, shape)
    )
    array = array.astype(dtype)
    save_folder(tmp_path / "s", "test", {}, {"a": array})
    _, _, arrays = load_folder(tmp_path / "s")
    assert arrays["a"].dtype == array.dtype and arrays["a"].shape == shape
    assert arrays["a"].tobytes() == array.tobytes()
    assert arrays["a"].flags.writeable


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3).T,
        np.arange(6, dtype=">i4"),
        np.arange(20.0)[::-3],
        np.array([np.nan, np.inf, -np.inf, -0.0]),
    ],
)
def test_layouts_and_special_values(tmp_path, array):
    save_folder(tmp_path / "s", "test", {}, {"a": array})
    np.testing.assert_array_equal(load_folder(tmp_path / "s")[2]["a"], array)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_prng_keys_come_back_as_keys(tmp_path, impl, shape):
    key = jax.random.key(7, impl=impl)
    keys = jax.random.split(key, shape) if shape else key
    save_folder(tmp_path / "s", "test", {"key": keys}, {"keys": keys})
    _, config, arrays = load_folder(tmp_path / "s")
    for loaded in (config["key"], arrays["keys"]):
        assert loaded.dtype == keys.dtype and loaded.shape == shape
        np.testing.assert_array_equal(jax.random.key_data(loaded), jax.random.key_data(keys))


def test_config_comes_back_with_its_types(tmp_path):
    config = {
        "args": (1, (2.5, None), [True, "x", -0.0]),
        "inf": float("inf"),
        "odd": {3: "int", ("a", 1.5): "tuple", None: False, "$array": "not a reference"},
        "y": {"a/b": np.arange(3), "a": {"b": np.zeros(2)}},
        "text": 'quotes " and \u00e9 and \ud800',
        "big": 2**200,
    }
    save_folder(tmp_path / "s", "posterior", config, {"config/y/a/b": np.full(4, 9.0)})
    kind, loaded, arrays = load_folder(tmp_path / "s")
    assert kind == "posterior" and peek(tmp_path / "s")[0] == "posterior"
    assert set(arrays) == {"config/y/a/b"} and arrays["config/y/a/b"][0] == 9
    np.testing.assert_array_equal(loaded["y"].pop("a/b"), np.arange(3))
    np.testing.assert_array_equal(loaded.pop("y")["a"]["b"], np.zeros(2))
    del config["y"]
    assert repr(loaded) == repr(config)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(
            st.text(max_size=4) | st.integers() | st.just("$tuple"), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(plain)
def test_encoding_is_invertible(value):
    tree, arrays = flatten(value)
    again, used = unflatten(json.loads(json.dumps(tree, allow_nan=False)), arrays)
    assert repr(again) == repr(value) and not used


def test_what_cannot_be_stored_is_named(tmp_path):
    class Colour(int):
        pass

    for value in (Colour(3), {1, 2}, object(), np.array(["a"], dtype=object), b"x", 1 << 10_000):
        with pytest.raises(InvalidValue, match='"config/args/1"'):
            save_folder(tmp_path / "s", "test", {"args": [0, value]}, {})
    cycle = []
    cycle.append(cycle)
    with pytest.raises(InvalidValue, match="contains itself"):
        save_folder(tmp_path / "s", "test", {"args": cycle}, {})
    with pytest.raises(InvalidValue, match='"x" has dtype'):
        save_folder(tmp_path / "s", "test", {}, {"x": np.array(["text"])})
    with pytest.raises(InvalidValue, match="__metadata__"):
        save_folder(tmp_path / "s", "test", {}, {"__metadata__": np.zeros(1)})
    assert os.listdir(tmp_path) == []


def test_overwriting_is_for_our_own_folders_only(tmp_path):
    path = example(tmp_path / "deep" / "er" / "s")
    save_folder(path, "other", {"n": 2}, {})
    assert load_folder(path)[:2] == ("other", {"n": 2})
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ForeignFolder, match=r"notes\.txt"):
        example(path)
    assert (path / "notes.txt").read_text() == "mine" and load_folder(path)[0] == "other"

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    example(foreign)  # an empty folder is free
    foreign = tmp_path / "theirs"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileExistsError, match="not written by abduce"):
        example(foreign)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ForeignFolder, match="is a file"):
        example(file)
    assert file.read_text() == "x"
    assert sorted(os.listdir(tmp_path)) == ["deep", "file", "foreign", "theirs"]


@pytest.mark.parametrize("failing", ["_write", "_sync_folder", "rename"])
def test_a_failed_save_leaves_the_old_one(tmp_path, monkeypatch, failing):
    path = example(tmp_path / "s")
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    calls = []

    def fail(*args):
        calls.append(args)
        if failing != "rename" or str(args[1]) == str(path):
            if failing == "rename" and len(calls) > 2:  # let the old folder come back
                return original(*args)
            raise OSError("disk full")
        return original(*args)

    original = os.rename
    if failing == "rename":
        monkeypatch.setattr(persistence.os, "rename", fail)
    else:
        monkeypatch.setattr(persistence, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        save_folder(path, "new", {}, {})
    monkeypatch.undo()
    assert calls
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert os.listdir(tmp_path) == ["s"]


def test_messages_say_which_file_and_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_folder(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoadError, match="is a file"):
        load_folder(tmp_path / "file")

    def broken(change, *, file=None, document=None):
        path = tmp_path / "broken"
        shutil.rmtree(path, ignore_errors=True)
        example(path)
        if file is not None:
            damage(path, file, change)
        elif document:
            rewrite(path, change)
        else:
            change(path)
        with pytest.raises(LoadError) as caught:
            load_folder(path)
        assert isinstance(caught.value, AbduceError) and isinstance(caught.value, ValueError)
        return str(caught.value)

    assert "config.json: the file is missing" in broken(lambda p: (p / "config.json").unlink())
    text = broken(lambda p: (p / "weights.safetensors").unlink())
    assert "weights.safetensors: the file is missing" in text
    assert "config.json: is damaged or cut off" in broken(lambda b: b[:-40], file="config.json")
    assert "config.json: is empty" in broken(lambda b: b"", file="config.json")
    text = broken(lambda b: b'{"model_type": "bert"}', file="config.json")
    assert "not from abduce" in text
    text = broken(lambda b: b.replace(b"2.5", b"2.6"), file="config.json")
    assert "its checksum does not match" in text
    text = broken(lambda b: b[:-3], file="weights.safetensors")
    assert "weights.safetensors: is cut off" in text
    text = broken(lambda b: b[:-1] + bytes([b[-1] ^ 1]), file="weights.safetensors")
    assert "checksum differs" in text
    text = broken(lambda d: d.update(schema=9, abduce="7.0"), document=True)
    assert "written by abduce 7.0" in text and "pip install -U abduce" in text
    text = broken(lambda d: d["arrays"]["key"].update(impl="rot13"), document=True)
    assert 'PRNG key "key" (rot13)' in text
    text = broken(lambda d: d["arrays"].pop("mu"), document=True)
    assert "differ from those listed" in text and "mu" in text
    text = broken(lambda d: d["arrays"]["mu"].update(shape=[20]), document=True)
    assert "listed as [20]" in text
    text = broken(lambda d: d["arrays"]["mu"].update(dtype="complex128"), document=True)
    assert "lacks the axis of real and imaginary parts" in text
    text = broken(lambda d: d["arrays"]["mu"].update(dtype="float32"), document=True)
    assert "stored as F64 but listed as float32" in text
    text = broken(lambda d: d["config"].update(x={"$call": "os.system"}), document=True)
    assert "$call" in text
    text = broken(lambda d: d["config"].update(x={"$array": "gone"}), document=True)
    assert '"gone"' in text
    assert MissingFile.__mro__.index(LoadError) < MissingFile.__mro__.index(FileNotFoundError)


def test_an_interrupted_replacement_is_pointed_out(tmp_path):
    path = example(tmp_path / "s")
    kept = tmp_path / ".s.old-1"
    kept.mkdir()
    os.rename(path, kept / "s")
    with pytest.raises(MissingFile, match="interrupted"):
        load_folder(path)
    assert load_folder(kept / "s")[0] == "posterior"


def mutations(data, rng):
    """One damaged copy of a file."""
    choice = rng.randrange(8)
    data = bytearray(data)
    if choice == 0:
        return bytes(data[: rng.randrange(len(data))])
    if choice == 1:
        for _ in range(rng.choice([1, 1, 4, 40])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if choice == 2:
        at = rng.randrange(len(data))
        return bytes(data[:at]) + rng.randbytes(rng.randrange(1, 30)) + bytes(data[at:])
    if choice == 3:
        at = rng.randrange(len(data))
        return bytes(data[:at] + data[at + rng.randrange(1, 60) :])
    if choice == 4:
        return rng.randbytes(rng.randrange(200))
    if choice == 5:  # the header's length
        return struct.pack("<Q", rng.choice([0, 1, 2**63, 2**64 - 1, 10**6])) + bytes(data[8:])
    if choice == 6:
        return bytes(data) + rng.randbytes(rng.randrange(1, 9))
    return b"[" * rng.randrange(1, 200_000)


@pytest.mark.parametrize("file", ["config.json", "weights.safetensors"])
@pytest.mark.parametrize("repaired", [False, True])
def test_damaged_files_always_give_load_error(tmp_path, file, repaired):
    """`repaired`: the checksums fit the damaged file, so that parsing itself must hold."""
    rng = random.Random(f"{file}{repaired}")
    pristine = example(tmp_path / "pristine")
    loaded_anyway = 0
    for _ in range(250):
        path = tmp_path / "s"
        shutil.copytree(pristine, path)
        before = (path / file).read_bytes()
        after = mutations(before, rng)
        (path / file).write_bytes(after)
        if repaired and file == "weights.safetensors":
            entry = {"bytes": len(after), "sha256": hashlib.sha256(after).hexdigest()}
            rewrite(path, lambda d, e=entry: d["weights"].update(e))
        elif repaired:
            # what is not even JSON stays as it is
            with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError):
                rewrite(path, lambda d: None)
        try:
            load_folder(path)
        except LoadError:
            pass
        else:  # other numbers, or the same ones in other white space, are not damage
            loaded_anyway += 1
            assert repaired or json.loads(after) == json.loads(before)
        shutil.rmtree(path)
    assert loaded_anyway < 100


def crafted(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


@pytest.mark.parametrize(
    "header",
    [
        {"mu": {"dtype": "F64", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}},
        {"mu": {"dtype": "F64", "shape": [1] * 100, "data_offsets": [0, 8]}},
        {"mu": {"dtype": "F64", "shape": [2**61], "data_offsets": [0, 8]}},
        {"mu": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}},
        {"mu": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}},
        {"mu": {"dtype": "F64", "shape": [1], "data_offsets": [8, 0]}},
        {"mu": {"dtype": "F64", "shape": [-1], "data_offsets": [0, 8]}},
        {"mu": [], "__metadata__": 3},
        {"__metadata__": {"x": "y"}},
        [],
    ],
)
def test_crafted_weights_give_load_error(tmp_path, header):
    path = save_folder(tmp_path / "s", "test", {}, {"mu": np.zeros(1)})
    data = crafted(header)
    (path / "weights.safetensors").write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(path, lambda d: d["weights"].update(entry))
    with pytest.raises(LoadError):
        load_folder(path)


def test_hostile_configs_give_load_error(tmp_path):
    """Right checksums, wrong content: every leaf of the document replaced by every odd value."""
    pristine = example(tmp_path / "s")
    text = (pristine / "config.json").read_text()
    odd = [None, True, -1, 10**400, 1e308, "x", [], {}, [[1]], {"$dict": [1]}, {"$tuple": 3}]
    paths = []

    def walk(node, path):
        paths.append(path)
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            if isinstance(child, (dict, list)):
                walk(child, [*path, key])
            else:
                paths.append([*path, key])

    walk(json.loads(text), [])
    tried = 0
    for path in paths[1:]:
        for value in odd:

            def change(document, path=path, value=value):
                for key in path[:-1]:
                    document = document[key]
                document[path[-1]] = value

            rewrite(pristine, change)
            try:
                kind, config, _ = load_folder(pristine)
                assert type(kind) is str and type(config) is dict
            except LoadError:
                tried += 1
            (pristine / "config.json").write_text(text)
    assert tried > 200
