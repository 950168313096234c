"""Random numbers from counters, cheap inside a loop that makes one gradient per turn.

`jax.random` lowers Threefry on a CPU to a loop of small kernels, which costs more than the
gradient of a small model. Here the same block cipher (Threefry-2x32, 20 rounds; Salmon, Moraes,
Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011) is unrolled, so that XLA fuses
it with its neighbours. The counter says which number it is (which draw, which leaf or coordinate);
no state is carried, and the numbers do not depend on how the draws are split into calls.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["chain_seeds", "normals", "threefry", "uniform"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


class Words(NamedTuple):
    """Two independent uniform 32-bit words per counter."""

    first: jax.Array
    second: jax.Array


def threefry(seed: jax.Array, high: jax.Array, low: jax.Array) -> Words:
    """Encrypts counters under a seed.

    Args:
        seed: uint32, shape `(2,)`: the cipher's key.
        high: uint32 counter word, any shape.
        low: uint32 counter word, broadcast against `high`.

    Returns:
        Two uint32 arrays of the broadcast shape.
    """
    keys = (seed[0], seed[1], seed[0] ^ seed[1] ^ _PARITY)
    x, y = high + keys[0], low + keys[1]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x = x + y
            y = (y << np.uint32(distance)) | (y >> np.uint32(32 - distance))
            y = x ^ y
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return Words(x, y)


def uniform(words: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Turns words into numbers in the open interval (0, 1), on a grid of 2**-23."""
    return ((words >> np.uint32(9)).astype(dtype) + 0.5) * np.array(2.0**-23, dtype)


def normals(
    seed: jax.Array, high: jax.Array, size: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Standard normal numbers for one value of the high counter word.

    Args:
        seed: uint32, shape `(2,)`.
        high: uint32 scalar: which draw. Low words `2**31 + i` are used up.
        size: How many (static).
        dtype: float32 or float64. float64 uses 53 random bits, float32 as many as it resolves.

    Returns:
        The numbers, shape `(size,)`, and one further random bit, int32 0 or 1, shape `()`.
    """
    low = np.arange(size, dtype=np.uint32) + np.uint32(1 << 31)
    words = threefry(seed, high, low)
    tail = (words.first.astype(dtype) + 0.5) * np.array(2.0**-32, dtype)
    if dtype == jnp.float64:  # fill the lower half of the mantissa as well
        tail = tail + (words.second >> np.uint32(11)).astype(dtype) * np.array(2.0**-53, dtype)
    # the argument of erf_inv must stay above -1; in float32 this cuts 1e-7 of the mass at 5.4 sd
    resolution = 0.5 * float(jnp.finfo(dtype).eps)
    magnitude = -lax.erf_inv(jnp.maximum(tail, resolution) - 1.0) * np.array(np.sqrt(2.0), dtype)
    values = jnp.where(words.second & np.uint32(1) == 1, magnitude, -magnitude)
    return values, (words.second[0] >> np.uint32(1) & np.uint32(1)).astype(jnp.int32)


def chain_seeds(key: jax.Array, num_chains: int) -> np.ndarray:
    """Derives one seed per chain on the host, so that nothing compiles.

    Args:
        key: Typed PRNG key, shape `()`, any implementation.
        num_chains: How many.

    Returns:
        uint32, shape `(num_chains, 2)`. Chain `i` has the same seed whatever `num_chains` is.
    """
    words = np.asarray(jax.random.key_data(key), dtype=np.uint32).ravel()
    entropy = [int(word) for word in words]
    return np.stack(
        [
            np.random.SeedSequence(entropy, spawn_key=(chain,)).generate_state(2, np.uint32)
            for chain in range(num_chains)
        ]
    )
