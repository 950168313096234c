"""Fixtures that the whole test tree shares."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")  # no test opens a window

import jax


@pytest.fixture(autouse=True, scope="module")
def drop_compiled_programs() -> Iterator[None]:
    """Thousands of tests compile tens of thousands of programs; JAX would keep them all."""
    yield
    jax.clear_caches()


@pytest.fixture
def key() -> jax.Array:
    """A typed PRNG key, the same in every run."""
    return jax.random.key(20260)


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs one test with 64-bit floats; the setting is back to what it was afterwards."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def count_compiles():
    """A context manager that yields an object whose `count` is the number of backend compiles.

    Compiles are counted, not traces: a call that traces nothing can still compile.

        with count_compiles() as compiles:
            model.posterior(key, given=other_data_of_the_same_shape)
        assert compiles.count == 0
    """
    from abduce.ppl._jax import count_compiles

    return count_compiles


@pytest.fixture(scope="session")
def data():
    """The loaders of the reference data in the folder `ABDUCE_DATA`; skips where it is not set."""
    folder = os.environ.get("ABDUCE_DATA")
    if not folder:
        pytest.skip("ABDUCE_DATA is not set: it names the folder of reference data")
    path = Path(folder) / "load.py"
    if not path.is_file():
        pytest.fail(f"ABDUCE_DATA is {folder!r}, but {path} does not exist")
    spec = importlib.util.spec_from_file_location("abduce_reference_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
