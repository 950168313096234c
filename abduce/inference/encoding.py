"""Values as JSON plus arrays, and arrays as safetensors entries.

JSON has no tuples, no infinities and no arrays, and its objects have string keys only. What it
lacks is written as an object with a single key that begins with "$":

    {"$tuple": [...]}             a tuple
    {"$dict": [[key, value], ...]} a dict whose keys are not all plain strings
    {"$float": "nan"}             nan, inf, -inf
    {"$array": "given/y"}         an array, by its name among the arrays

Decoding builds dicts, lists, tuples, numbers, strings and arrays, and nothing else.
"""

import math
from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np

from abduce.errors import AbduceError, InvalidValue

__all__ = ["LoadError", "flatten", "pack", "unflatten", "unpack"]

SAFETENSORS = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "BF16": ml_dtypes.bfloat16,
}
# dtypes that safetensors for numpy does not hold everywhere are stored as integers of their size
VIEWED = {
    np.dtype(t).name: (np.dtype(t), np.dtype(f"u{np.dtype(t).itemsize}"))
    for t in (
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
        ml_dtypes.int4,
        ml_dtypes.uint4,
    )
} | {
    "complex64": (np.dtype(np.complex64), np.dtype(np.float32)),
    "complex128": (np.dtype(np.complex128), np.dtype(np.float64)),
}
NATIVE = {np.dtype(t).name: np.dtype(t) for t in SAFETENSORS.values()}
MAX_INT_BITS = 8192  # Python refuses to read much longer decimal numbers
RESERVED = "__metadata__"  # safetensors keeps this name for itself


class LoadError(AbduceError, ValueError):
    """A saved folder cannot be used: damaged, incomplete, altered, or from a newer release."""


def flatten(
    value, prefix: str = "", *, taken: Mapping[str, object] | None = None
) -> tuple[object, dict[str, object]]:
    """Splits a value into JSON and the arrays it refers to.

    Args:
        value: Nested dicts, lists and tuples of None, bool, int, float, str, numpy scalars,
            arrays (numpy or JAX) and typed PRNG keys. Only these exact types: a subclass (an
            enum, a named tuple) would come back as something else, so it is refused.
        prefix: Begins the names of the arrays.
        taken: Names that must not be used.

    Returns:
        tree: What `json.dumps(tree, allow_nan=False)` accepts.
        arrays: Name (the path to the array, "config/given/y") to array.

    Raises:
        InvalidValue: A value of another type; the message gives its path.

    Example:
        >>> flatten({"a": (1, float("inf"))})[0]
        {'a': {'$tuple': [1, {'$float': 'inf'}]}}
    """
    arrays: dict[str, object] = {}
    try:
        return _encode(value, prefix, arrays, set(taken or ())), arrays
    except RecursionError as error:
        raise InvalidValue(f'save: "{prefix}" is nested too deeply, or contains itself.') from error


def unflatten(tree, arrays: Mapping[str, object]) -> tuple[object, set[str]]:
    """Puts a value together again from what `flatten` returned.

    Args:
        tree: The JSON part.
        arrays: The arrays by name; there may be more than the tree refers to.

    Returns:
        value: As it was given to `flatten`, with numpy arrays for arrays and
            numpy scalars (which become 0-d arrays).
        used: The names that were referred to.

    Raises:
        LoadError: An unknown tag, or an array that is not there.
        RecursionError: The tree is nested too deeply.
    """
    used: set[str] = set()
    return _decode(tree, arrays, used), used


def pack(name: str, value) -> tuple[dict[str, object], np.ndarray]:
    """An array as what is listed about it, and as an array that safetensors can hold.

    Raises:
        InvalidValue: The dtype or the name cannot be stored.
    """
    if not isinstance(name, str) or name == RESERVED or not _is_utf8(name):
        raise InvalidValue(
            f"save: an array is called {name!r}. Names are strings of valid Unicode, other than "
            f"{RESERVED!r}."
        )
    if _is_key(value):
        data = np.asarray(jax.random.key_data(value))
        impl = str(jax.random.key_impl(value))
        return {"dtype": "key", "impl": impl, "shape": list(value.shape)}, data
    array = np.asarray(value)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    array = array if array.flags.c_contiguous else array.copy(order="C")
    entry = {"dtype": array.dtype.name, "shape": list(array.shape)}
    if array.dtype.name in NATIVE:
        return entry, array
    if array.dtype.name in VIEWED:
        _, stored = VIEWED[array.dtype.name]
        if array.dtype.kind == "c":  # real and imaginary part along a last axis
            return entry, np.stack([array.real, array.imag], axis=-1).astype(stored)
        return entry, array.view(stored)
    raise InvalidValue(
        f'save: "{name}" has dtype {array.dtype}, which cannot be stored. Booleans, integers, '
        "floats, complex numbers and typed PRNG keys can; strings belong in lists."
    )


def unpack(name: str, entry, tensor: tuple[str, list[int], bytes]):
    """The inverse of `pack`.

    Args:
        name: The array's name, for messages.
        entry: What `pack` listed about it.
        tensor: dtype, shape and bytes as safetensors gives them.

    Raises:
        LoadError: The two do not fit together.
    """
    tag, shape, data = tensor
    if tag not in SAFETENSORS:
        raise LoadError(f'array "{name}" has the unknown dtype {tag}.')
    dtype = np.dtype(SAFETENSORS[tag])
    if math.prod(shape) * dtype.itemsize != len(data):
        raise LoadError(f'array "{name}" has {len(data)} bytes, its shape is {tuple(shape)}.')
    little = dtype.newbyteorder("<") if dtype.kind in "iuf" else dtype  # as the format says
    try:
        stored = np.frombuffer(data, dtype=little).reshape(shape).astype(dtype, copy=False)
    except (ValueError, OverflowError) as error:  # more axes, or longer ones, than numpy has
        raise LoadError(f'array "{name}" has an impossible shape ({error}).') from error
    if not stored.flags.writeable:
        stored = stored.copy()
    if not isinstance(entry, dict) or type(entry.get("dtype")) is not str:
        raise LoadError(f'array "{name}" is not described in the list of arrays.')
    kind, listed = entry["dtype"], entry.get("shape")
    if kind == "key":
        array = _wrap_key(name, entry.get("impl"), stored)
    elif kind in NATIVE and NATIVE[kind] == dtype:
        array = stored
    elif kind in VIEWED and VIEWED[kind][1] == dtype:
        wanted = VIEWED[kind][0]
        if wanted.kind != "c":
            array = stored.view(wanted)
        elif shape[-1:] == [2]:
            array = np.ascontiguousarray(stored).view(wanted)[..., 0]
        else:
            raise LoadError(f'array "{name}" lacks the axis of real and imaginary parts.')
    else:
        raise LoadError(f'array "{name}" is stored as {tag} but listed as {kind}.')
    if list(array.shape) != listed:
        raise LoadError(f'array "{name}" has shape {array.shape} but is listed as {listed}.')
    return array


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_key(value) -> bool:
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


def _wrap_key(name: str, impl, data: np.ndarray):
    if type(impl) is not str:
        raise LoadError(f'the PRNG key "{name}" names no implementation.')
    try:
        return jax.random.wrap_key_data(data, impl=impl)
    except Exception as error:  # unknown implementation, or data of another shape or dtype
        raise LoadError(f'the PRNG key "{name}" ({impl}) cannot be restored ({error}).') from error


def _encode(value, path: str, arrays: dict[str, object], taken: set[str]):
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        if value.bit_length() > MAX_INT_BITS:
            raise InvalidValue(
                f'save: "{path}" is an integer of {value.bit_length()} bits; at most '
                f"{MAX_INT_BITS} can be stored."
            )
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if type(value) is list:
        return [_encode(v, f"{path}/{i}", arrays, taken) for i, v in enumerate(value)]
    if type(value) is tuple:
        return {"$tuple": [_encode(v, f"{path}/{i}", arrays, taken) for i, v in enumerate(value)]}
    if type(value) is dict:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {k: _encode(v, f"{path}/{k}", arrays, taken) for k, v in value.items()}
        pairs = []
        for key, v in value.items():
            if not _is_plain_key(key):
                raise InvalidValue(
                    f'save: "{path}" has the key {key!r} of type {type(key).__name__}. Keys may be '
                    "strings, numbers, booleans, None, and tuples of these."
                )
            pairs.append(
                [_encode(key, path, {}, set()), _encode(v, f"{path}/{key}", arrays, taken)]
            )
        return {"$dict": pairs}
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        name = stem = path.lstrip("/") or "value"
        count = 1
        while name in arrays or name in taken or name == RESERVED:
            count += 1
            name = f"{stem}#{count}"
        pack(name, value)  # refuse here, where the path is known
        arrays[name] = value
        return {"$array": name}
    raise InvalidValue(
        f'save: "{path}" is a {type(value).__module__}.{type(value).__qualname__}, which cannot '
        "be stored. Dicts, lists, tuples, numbers, strings, None and arrays can."
    )


def _is_plain_key(key) -> bool:
    if type(key) is tuple:
        return all(_is_plain_key(part) for part in key)
    return key is None or type(key) in (bool, int, float, str)


def _decode(tree, arrays: Mapping[str, object], used: set[str]):
    if type(tree) is list:
        return [_decode(v, arrays, used) for v in tree]
    if type(tree) is not dict:
        return tree
    tag = next((key for key in tree if key.startswith("$")), None)
    if tag is None:
        return {key: _decode(v, arrays, used) for key, v in tree.items()}
    body = tree[tag]
    if len(tree) == 1:
        if tag == "$tuple" and type(body) is list:
            return tuple(_decode(v, arrays, used) for v in body)
        if tag == "$float" and body in ("nan", "inf", "-inf"):
            return float(body)
        if tag == "$array" and type(body) is str:
            if body not in arrays:
                raise LoadError(f'the array "{body}" is referred to but missing.')
            used.add(body)
            return arrays[body]
        if tag == "$dict" and type(body) is list:
            return _decode_pairs(body, arrays, used)
    raise LoadError(f"the tag {tag!r} is unknown or its content is malformed.")


def _decode_pairs(body: list, arrays: Mapping[str, object], used: set[str]) -> dict:
    result = {}
    for pair in body:
        if type(pair) is not list or len(pair) != 2:
            raise LoadError("a dict is not stored as pairs of key and value.")
        key = _decode(pair[0], {}, set())
        if not _is_plain_key(key):
            raise LoadError(f"a dict has a key of type {type(key).__name__}.")
        result[key] = _decode(pair[1], arrays, used)
    return result
