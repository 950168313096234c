"""The command `abduce`."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status: 0 on success, 1 for an error that abduce explains, 2 for a wrong call.

    Example:
        >>> main(["demo", "--out", "plots"])  # doctest: +SKIP
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 2
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="abduce", description="Probabilistic programming on JAX: a model is a function."
    )
    parser.add_argument("--version", action="version", version=f"abduce {version('abduce')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="infer eight schools and the Nile on real data, with plots",
        description="Infers eight schools and the Nile's annual flow on real data; explains each "
        "step and writes plots.",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="folder for the plots, made if missing (default: %(default)s)",
    )
    demo.set_defaults(run=_demo)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(
            f"abduce demo: cannot write to {arguments.out}: {error.strerror}. "
            "Name another folder: abduce demo --out DIR",
            file=sys.stderr,
        )
        return 1
    from abduce.demo import run

    run(arguments.out)
    return 0
