"""Particles spread over devices, of one process or of two: the same run as on one device."""

import os
import socket
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

def talks(run):  # whether devices exchange anything at the steps: in what loops and branches call
    text = run.lower(jax.random.key(0)).compile().as_text()
    steps = text[: text.index("ENTRY")]
    return any(f" {c}(" in steps for c in ("all-gather", "all-reduce", "collective-permute"))

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
    alg = alg.replace(islands=16)
    one = alg(chain).posterior(jax.random.key(0), y)
    many = alg.replace(mesh=mesh)(chain).posterior(jax.random.key(0), y)
    assert abs(one.log_evidence - many.log_evidence) < 1e-5
    for a in one.draws:
        np.testing.assert_allclose(one.draws[a], many.draws[a], rtol=1e-5)
    for a in one.diagnostics:
        np.testing.assert_allclose(one.diagnostics[a], many.diagnostics[a], rtol=1e-4)
run = jax.jit(lambda k: ab.smc(num_particles=64, store="filter", mesh=mesh)(chain).posterior(k, y))
assert talks(run)  # resampling is global
alone = ab.smc(num_particles=64, islands=8, mesh=mesh)(chain)
run = jax.jit(lambda k: alone.posterior(k, y).log_evidence)
assert not talks(run)
print("ok")
"""

PROCESS = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
try:
    jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
    jax.devices()
except Exception as error:
    print(f"cannot: {error}")
    raise SystemExit
import numpy as np
import abduce as ab, abduce.dist as dist
import jax.numpy as jnp

@ab.model
def chain(y):
    def step(x, y):
        x = ab.sample("x", dist.Normal(0.9 * x, 0.7))
        ab.sample("y", dist.Normal(x, 0.5), obs=y)
        return x, None
    jax.lax.scan(step, ab.sample("x0", dist.Normal(0.0, 1.0)), y)

assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
y = np.array([0.3, -0.5, 1.2, 0.4, 0.1, -0.9, 2.0], np.float32)
mesh = jax.make_mesh((4,), ("particles",))
for settings in ({}, {"islands": 4}):
    alg = ab.smc(num_particles=64, **settings)
    one = alg(chain).posterior(jax.random.key(0), y)
    many = alg.replace(mesh=mesh)(chain).posterior(jax.random.key(0), y)
    assert abs(one.log_evidence - many.log_evidence) < 1e-5
    for a in one.draws:
        np.testing.assert_allclose(one.draws[a], many.draws[a], rtol=1e-5)
    for a in one.diagnostics:
        np.testing.assert_allclose(one.diagnostics[a], many.diagnostics[a], rtol=1e-4)
assert all(x.is_fully_addressable for x in jax.tree.leaves(many.resume))  # it can go on
print("ok", float(many.log_evidence))
"""


def test_particles_on_eight_devices_match_one_device():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "ok"


def test_devices_of_two_processes_match_one_device():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    env["JAX_PLATFORMS"] = "cpu"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, port, str(i)], env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        done = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    if any(out.startswith("cannot") for out, _ in done):
        pytest.skip(f"two processes cannot be joined on this backend: {done[0][0].strip()}")
    assert [process.returncode for process in running] == [0, 0], done[0][1][-2000:]
    assert done[0][0].splitlines()[-1] == done[1][0].splitlines()[-1]
    assert done[0][0].splitlines()[-1].startswith("ok")


def test_particles_must_divide_evenly():
    class Mesh:
        devices = type("Devices", (), {"shape": (3,)})()
        axis_names = ("particles",)

    with pytest.raises(ab.InvalidAlgorithm, match="64 particles do not divide evenly over the 3"):
        ab.smc(num_particles=64, mesh=Mesh())
