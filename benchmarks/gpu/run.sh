#!/usr/bin/env bash
# On a machine with an accelerator: the kernel tests there, then the tables that depend on it.
#
#   bash benchmarks/gpu/run.sh          # PYTHON: an interpreter with JAX for the accelerator
#
# The tables are written to benchmarks/results/gpu_*; where OUT is set, they are copied there too.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export XLA_PYTHON_CLIENT_PREALLOCATE="${XLA_PYTHON_CLIENT_PREALLOCATE:-false}"

"$python" - <<'PY'
import importlib.util, sys
missing = [m for m in ("jax", "numpyro", "equinox", "optax") if not importlib.util.find_spec(m)]
if missing:
    sys.exit(f"missing packages: {', '.join(missing)}; install them with pip")
import jax
if jax.default_backend() == "cpu":
    sys.exit(f"JAX {jax.__version__} sees no accelerator here: {jax.devices()}")
print(f"JAX {jax.__version__} on {jax.devices()}")
PY

if "$python" -c "import pytest" 2>/dev/null; then
    "$python" -m pytest tests/kernels -q -p no:cacheprovider
else
    echo "pytest is not installed: the kernel tests are skipped"
fi
"$python" -m benchmarks.resampling --rounds 5 --name gpu_resampling
"$python" -m benchmarks.smc --name gpu_smc
"$python" -m benchmarks.tempering --name gpu_tempering
if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT"
    cp benchmarks/results/gpu_* "$OUT"/
fi
