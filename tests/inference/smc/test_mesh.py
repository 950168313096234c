"""Particles spread over devices: the same run as on one, in a process with eight devices."""

import os
import subprocess
import sys

import pytest

import abduce as ab

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
import abduce as ab, abduce.dist as dist

@ab.model
def chain(y):
    def step(x, y):
        x = ab.sample("x", dist.Normal(0.9 * x, 0.7))
        ab.sample("y", dist.Normal(x, 0.5), obs=y)
        return x, None
    jax.lax.scan(step, ab.sample("x0", dist.Normal(0.0, 1.0)), y)

assert len(jax.devices()) == 8
y = jnp.array([0.3, -0.5, 1.2, 0.4, 0.1, -0.9, 2.0])
mesh = jax.make_mesh((8,), ("particles",))
for store in ("paths", "filter"):
    alg = ab.smc(num_particles=64, store=store)
    one = alg(chain).posterior(jax.random.key(0), y)
    many = alg.replace(mesh=mesh)(chain).posterior(jax.random.key(0), y)
    assert abs(one.log_evidence - many.log_evidence) < 1e-5
    for a in one.draws:
        np.testing.assert_allclose(one.draws[a], many.draws[a], rtol=1e-5)
run = jax.jit(lambda k: ab.smc(num_particles=64, store="filter", mesh=mesh)(chain).posterior(k, y))
text = run.lower(jax.random.key(0)).compile().as_text()
assert "all-gather" in text or "all-reduce" in text  # the devices talk: resampling is global
print("ok")
"""


def test_particles_on_eight_devices_match_one_device():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "ok"


def test_particles_must_divide_evenly():
    class Mesh:
        devices = type("Devices", (), {"shape": (3,)})()
        axis_names = ("particles",)

    with pytest.raises(ab.InvalidAlgorithm, match="64 particles do not divide evenly over the 3"):
        ab.smc(num_particles=64, mesh=Mesh())
