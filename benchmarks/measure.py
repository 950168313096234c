"""What every benchmark needs: counting compiles, fresh processes, the machine, result files."""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "COMPILE_EVENT",
    "RESULTS",
    "CompileLog",
    "cell",
    "machine_line",
    "markdown_table",
    "run_in_subprocess",
    "write_results",
]

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
RESULTS.mkdir(exist_ok=True)
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
PACKAGES = ("jax", "jaxlib", "numpyro", "blackjax", "numpy")


class CompileLog:
    """Seconds of every backend compile in this process since the log was made.

    Example:
        >>> log = CompileLog()
        >>> with log:
        ...     jax.jit(jnp.sin)(1.0)
        >>> len(log.seconds)  # compiles inside the last `with`
        1
    """

    def __init__(self) -> None:
        import jax

        self.seconds: list[float] = []
        self._open = False
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        if self._open and event == COMPILE_EVENT:
            self.seconds.append(duration)

    def __enter__(self) -> "CompileLog":
        self.seconds = []
        self._open = True
        return self

    def __exit__(self, *_: Any) -> None:
        self._open = False


def run_in_subprocess(
    module: str,
    options: Sequence[str],
    *,
    x64: bool = False,
    num_devices: int = 1,
    timeout: float = 1800.0,
) -> dict[str, Any]:
    """Runs `python -m module ... --out FILE` with empty caches and returns what it wrote.

    Args:
        module: A module of this folder whose `--out FILE` writes one JSON object.
        options: Its other command-line options.
        x64: Whether JAX runs in double precision there.
        num_devices: How many CPU devices JAX sees there.
        timeout: Seconds after which the process is ended.

    Returns:
        The object, or `{"error": text}` where the process failed or ran out of time.
    """
    environment = dict(os.environ)
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # a cache on disk would hide compiles
    environment["JAX_ENABLE_X64"] = "1" if x64 else "0"
    environment["JAX_PLATFORMS"] = "cpu"
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(REPOSITORY), environment.get("PYTHONPATH")])
    )
    if num_devices > 1:
        flag = f"--xla_force_host_platform_device_count={num_devices}"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}".strip()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", module, *options, "--out", str(out)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no result within {timeout:g} s"}
        if done.returncode != 0 or not out.is_file():
            return {"error": _last_error(done.stderr) or f"exit status {done.returncode}"}
        return json.loads(out.read_text())


def _last_error(stderr: str) -> str:
    """The line of a traceback that names the exception."""
    named = [line for line in stderr.splitlines() if re.match(r"[\w.]+(Error|Exception)?: ", line)]
    return named[-1] if named else "\n".join(stderr.splitlines()[-1:])


def _machine() -> dict[str, Any]:
    """Processor, cores, load and versions: what a timing cannot be read without."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m", _module_name(), *sys.argv[1:]]),
    }


def _module_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).stem


def machine_line(machine: dict[str, Any]) -> str:
    """One line of Markdown that says where and how the numbers were made."""
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    return (
        f"`{machine['command']}`, {machine['date']}; {machine['cores']} cores, {machine['cpu']}, "
        f"load average {machine['load_average']} before the run; Python {machine['python']}, "
        f"{versions}."
    )


def write_results(name: str, title: str, body: str, record: dict[str, Any]) -> None:
    """Writes `results/<name>.md` and `results/<name>.json`, and prints the table.

    Args:
        name: Stem of the two files.
        title: Heading of the Markdown file.
        body: The tables, in Markdown.
        record: Everything measured; the machine is added to it.
    """
    machine = _machine()
    text = f"# {title}\n\n{machine_line(machine)}\n\n{body.rstrip()}\n"
    (RESULTS / f"{name}.md").write_text(text)
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"machine": machine, **record}, indent=1, allow_nan=True) + "\n"
    )
    print(text)
    print(f"written: {RESULTS / name}.md and .json")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell(x) for x in line) + " |" for line in lines)


def cell(value: Any) -> str:
    """A value as a table shows it: three significant digits, large numbers in full."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
