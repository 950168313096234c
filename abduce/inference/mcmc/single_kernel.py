"""Compiles a small function into one CPU kernel.

XLA's CPU runtime launches one kernel per fusion, about 50 ns each, and compiles each of them on its
own. A step of a sampler is some sixty tiny operations, so launching dominates it. XLA can emit a
called computation as a single kernel, control flow included (it does so for small loops); two
frontend attributes ask for it. Measured on the NUTS turn at dimension 10: from 1.6 us to 0.4-0.9 us
a step, and half the compile time. A version of XLA that does not know the attributes
ignores them; but one that knows them and emits something else could abort the process, so versions
of JAX newer than the tested ones launch kernel by kernel.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata

__all__ = ["single_kernel"]

_TESTED = (0, 13)  # below this version of JAX


def single_kernel(function: Callable[..., Any], enabled: bool = True) -> Callable[..., Any]:
    """Wraps a function of arrays so that a surrounding `jit` emits it as one kernel.

    Args:
        function: Made of elementwise operations, reductions, small matrix products, slices and
            control flow. Sorting, scatter, FFT, linear solvers and callbacks are not possible
            inside.
        enabled: False returns `function` unchanged (for devices other than CPUs).

    Returns:
        A function with the same arguments and results.
    """
    if not enabled or jax.__version_info__[:2] >= _TESTED:
        return function

    def call(*args):
        def body():
            # the attributes belong to the call, not to every operation in it
            with set_xla_metadata(xla_cpu_small_call=None, inlineable=None):
                return function(*args)

        # by closure, so that only values that are used become operands: XLA aborts on others
        with set_xla_metadata(xla_cpu_small_call="true", inlineable="false"):
            return jax.jit(body)()

    return call
