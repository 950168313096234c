"""Tests of flows run in x64; what concerns float32 switches back locally."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def double_precision():
    """Gives every module of this folder double precision, and takes it back afterwards."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Many small programs run once each, so XLA's costly passes do not pay for themselves."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
