"""Runs the Python blocks of a Markdown page and shows what they print.

The tests run every page through `run_page`; the site build (`docs/site_hooks.py`) puts the output
under each block. The blocks of a page share one namespace, in order, as a reader would type them.
The value of a block's last expression is shown, as in a notebook, and so are abduce's warnings.

A block that demonstrates an error says so in its fence, and fails if the error does not come:

    ```python raises=UnknownAddress
"""

import ast
import contextlib
import io
import re
import textwrap
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt

FENCE = re.compile(r"^```python(?P<options>[^\n]*)\n(?P<code>.*?)^```[ ]*$", re.M | re.S)


@dataclass
class Block:
    """One fenced block: where it stands, its code, and what running it gave."""

    line: int
    span: tuple[int, int]
    code: str
    raises: str | None
    output: str = ""
    figures: list[bytes] = field(default_factory=list)


def read_blocks(text: str) -> list[Block]:
    """Finds the Python blocks of a page, in order."""
    blocks = []
    for match in FENCE.finditer(text):
        options = match["options"].split()
        unknown = [o for o in options if not o.startswith("raises=")]
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r} in a fence; there is only raises=NAME")
        raises = options[0].removeprefix("raises=") if options else None
        line = text.count("\n", 0, match.start()) + 1
        blocks.append(Block(line, match.span(), match["code"], raises))
    return blocks


def run_page(path: Path, text: str | None = None) -> list[Block]:
    """Runs a page's blocks in order in one namespace.

    Args:
        path: The page, named in errors.
        text: Its contents, where they were read already.

    Returns:
        The blocks, with their output and figures.

    Raises:
        RuntimeError: A block failed, or did not raise the error its fence announces.
    """
    blocks = read_blocks(path.read_text() if text is None else text)
    namespace: dict = {"__name__": "__main__"}
    for block in blocks:
        _run(block, namespace, path)
    return blocks


def _run(block: Block, namespace: dict, path: Path) -> None:
    where = f"{path.name}, line {block.line}"
    printed = io.StringIO()
    plt.close("all")
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        try:
            _execute(block.code, namespace, where)
        except Exception as error:
            if type(error).__name__ != block.raises:
                raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error
            print(f"{block.raises}: {error}")
        else:
            if block.raises:
                raise RuntimeError(f"{where}: expected {block.raises}, but nothing was raised")
    for warning in caught:
        if warning.category.__name__ == "AbduceWarning":
            printed.write(f"AbduceWarning: {warning.message}\n")
    block.output = textwrap.dedent(printed.getvalue().rstrip())
    for number in plt.get_fignums():
        image = io.BytesIO()
        plt.figure(number).savefig(image, format="png", dpi=110, bbox_inches="tight")
        block.figures.append(image.getvalue())
    plt.close("all")


def _execute(code: str, namespace: dict, where: str) -> None:
    """Executes a block; the value of a last expression is printed unless it is `None`."""
    tree = ast.parse(code, filename=where)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, where, "exec"), namespace)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), where, "eval"), namespace)
        is_artist = type(value).__module__.startswith("matplotlib")  # the figure itself is shown
        if value is not None and not is_artist:
            print(value)
