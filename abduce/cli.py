"""The command `abduce`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from abduce.errors import AbduceError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status: 0 on success, 1 for an error that abduce explains or checks that failed, 2
        for a wrong call, 130 for training that was interrupted.

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
    pretrain = commands.add_parser(
        "pretrain",
        help="train the estimator of a recipe, and save it",
        description="Trains the estimator that a recipe defines and saves it in a folder that "
        "ab.load reads. A recipe is a Python file, and is run: it defines `estimator`, and "
        "optionally `fit` (arguments of estimator.fit) and `seed`.",
    )
    pretrain.add_argument("recipe", type=Path, metavar="RECIPE", help="a Python file")
    pretrain.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    pretrain.add_argument("--resume", action="store_true", help="go on where a checkpoint is")
    pretrain.add_argument("--steps", type=_steps, metavar="N", help="in place of the recipe's")
    pretrain.set_defaults(run=_explained(_pretrain))
    check = commands.add_parser(
        "check",
        help="check a saved estimator on fresh simulations",
        description="Checks ranks, coverage and TARP of a saved estimator on fresh simulations, "
        "prints the report and keeps it in the folder. Status 0: passed, 1: failed.",
    )
    check.add_argument("folder", type=Path, metavar="DIR", help="a saved estimator")
    check.add_argument(
        "--recipe", type=Path, required=True, help="the recipe whose model it was trained on"
    )
    check.add_argument(
        "--budget", type=_seconds, default=60.0, metavar="SECONDS", help="(default: %(default)s)"
    )
    check.set_defaults(run=_explained(_check))
    info = commands.add_parser(
        "info", help="say what is in a saved folder", description="Says what is in a saved folder."
    )
    info.add_argument("folder", type=Path, metavar="DIR", help="what `save` or `pretrain` wrote")
    info.set_defaults(run=_explained(_info))
    return parser


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def _explained(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """An error that abduce explains, or of the disk, becomes one line."""

    def command(arguments: argparse.Namespace) -> int:
        try:
            return run(arguments)
        except (AbduceError, OSError) as error:
            text = " ".join(str(error).split())
            print(f"abduce {arguments.command}: {text}", file=sys.stderr)
            return 1

    return command


def _pretrain(arguments: argparse.Namespace) -> int:
    from abduce.amortized.recipes import pretrain

    return pretrain(
        arguments.recipe, arguments.out, resume=arguments.resume, num_steps=arguments.steps
    )


def _check(arguments: argparse.Namespace) -> int:
    from abduce.amortized.recipes import check

    return check(arguments.folder, arguments.recipe, budget=arguments.budget)


def _info(arguments: argparse.Namespace) -> int:
    from abduce.amortized.describing import info
    from abduce.amortized.recipes import unfinished

    print(info(arguments.folder))
    left = unfinished(arguments.folder)
    if left:
        print(left)
    return 0


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
