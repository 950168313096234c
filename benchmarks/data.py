"""Where the reference posteriors lie, and how they are read.

The data are not part of this repository. They are looked for in the folder that the environment
variable `ABDUCE_DATA` names, else in `../shared/data` next to the repository. The folder brings
its own loader, `load.py`; this file imports that loader and nothing else.
"""

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

__all__ = ["folder", "loader", "require"]

REPOSITORY = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """The data folder, whether or not it exists."""
    given = os.environ.get("ABDUCE_DATA")
    return (Path(given).expanduser() if given else REPOSITORY / "../shared/data").resolve()


@cache
def loader() -> ModuleType:
    """The module `load.py` of the data folder.

    Raises:
        FileNotFoundError: There is no data folder, or it has no loader.
    """
    path = folder() / "load.py"
    if not path.is_file():
        raise FileNotFoundError(
            f"no benchmark data: {path} does not exist. Set ABDUCE_DATA to the folder that holds "
            "load.py and posteriordb/."
        )
    spec = importlib.util.spec_from_file_location("abduce_benchmark_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def require() -> None:
    """Ends the program with status 0 and one line when the data are absent.

    A machine without the data can still run every other part of the benchmarks, so their absence
    is not a failure; it is said aloud so that nobody takes an empty table for a result.
    """
    try:
        names = loader().posteriors()
    except FileNotFoundError as problem:
        print(f"skipped: {problem}")
        sys.exit(0)
    if not names:
        print(f"skipped: {folder()} holds no posteriors (posteriordb/ is missing or empty)")
        sys.exit(0)
