"""Training over several devices."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh
import abduce as ab, abduce.dist as dist
from abduce.amortized import training
from abduce.errors import InvalidAlgorithm

@ab.model
def normal():
    mu = ab.sample("mu", dist.Normal(0.0, 1.0))
    jax.vmap(lambda _: ab.sample("y", dist.Normal(mu, 1.0)))(jnp.arange(4))

mesh = Mesh(np.array(jax.devices()), ("data",))
assert mesh.devices.size == 8
est = ab.npe(normal, observed="y", head="mixture", width=16, context_dim=8, frame=False)
settings = {"num_steps": 5, "batch_size": 64, "progress_bar": False}
alone = est.fit(jax.random.key(0), **settings)

# Each device holds and computes an eighth of the batch: the compiled step says so.
seen = []
keep = training._batch
def batch(config, key, data, rows, stored):
    out = keep(config, key, data, rows, stored)
    leaf = jax.tree.leaves(out)[0]
    note = lambda s: seen.append(s.shard_shape(leaf.shape))
    jax.debug.inspect_array_sharding(leaf, callback=note)
    return out
training._batch = batch
shared = est.fit(jax.random.key(0), mesh=mesh, **settings)
assert seen and seen[0][1] == 8, seen
np.testing.assert_allclose(shared.history["loss"], alone.history["loss"], rtol=1e-5)
for a, b in zip(jax.tree.leaves(shared.network), jax.tree.leaves(alone.network)):
    if hasattr(a, "dtype"):
        np.testing.assert_allclose(a, b, atol=1e-5)

try:
    est.fit(jax.random.key(0), mesh=mesh, num_steps=2, batch_size=60, progress_bar=False)
except InvalidAlgorithm as e:
    assert "not divisible by the 8 devices" in str(e)
else:
    raise AssertionError("60 examples on 8 devices")
print("ok")
"""


@pytest.mark.slow  # a minute of compiling for eight devices
def test_training_on_eight_devices_is_that_on_one():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "ok"
