"""What the demo prints and where it puts its plots."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from abduce.errors import AbduceWarning
from abduce.ppl.model import FunctionModel

__all__ = ["Report"]


class Report:
    """Prints numbered steps, tables and warnings; saves figures and remembers where.

    Args:
        folder: Where figures go; it must exist.
        console: Where text goes; the terminal by default.
    """

    def __init__(self, folder: Path, console: Console | None = None) -> None:
        self.folder = folder
        self.console = console or Console(highlight=False)
        self.figures: list[Path] = []
        self._step = 0

    def chapter(self, title: str) -> None:
        """Begins a part of the demo."""
        self._step = 0
        self.console.print()
        self.console.rule(f"[bold]{escape(title)}", align="left")

    def step(self, text: str) -> None:
        """Says in a sentence what happens next."""
        self._step += 1
        self.console.print()
        self._print(f"[bold]{escape(text)}[/bold]", f"{self._step}. ")

    def say(self, text: str) -> None:
        """Prints a remark below a step."""
        self._print(escape(text), "   ")

    def code(self, model: FunctionModel) -> None:
        """Shows a model as it stands in its file, without the docstring."""
        self.console.print()
        code = Syntax(_source(model.fn), "python", background_color="default")
        self.console.print(Padding(code, (0, 0, 1, 6)))

    def text(self, text: str) -> None:
        """Prints preformatted lines, such as a summary table."""
        self.console.print()
        for line in text.splitlines():
            self.console.print(f"   {line}", markup=False, soft_wrap=True)
        self.console.print()

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Prints a table; the first column names the row."""
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        self.console.print()
        self.console.print(Padding(table, (0, 0, 1, 3)))

    @contextmanager
    def warnings(self) -> Iterator[list[str]]:
        """Shows the warnings of abduce raised inside the block; yields the list of their texts."""
        texts: list[str] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", AbduceWarning)
            yield texts
        for warning in caught:
            if issubclass(warning.category, AbduceWarning):
                texts.append(str(warning.message))
                self.console.print()
                self._print(f"[yellow]{escape(str(warning.message))}[/yellow]", "   ! ")
            else:
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )

    def figure(self, figure: Figure, name: str, what: str) -> Path:
        """Saves a figure as PNG and says in a sentence what to see in it."""
        path = self.folder / f"{name}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        plt.close(figure)
        self.figures.append(path)
        self._print(f"[green]{escape(path.name)}[/green]: {escape(what)}", "   -> ")
        return path

    def _print(self, markup: str, lead: str) -> None:
        """Prints a paragraph whose further lines align with the first, after `lead`."""
        text = Text.from_markup(markup)
        for i, line in enumerate(text.wrap(self.console, self.console.width - len(lead))):
            self.console.print(Text(lead if i == 0 else " " * len(lead)) + line)


def _source(function: Callable) -> str:
    """The lines of a function, without its docstring."""
    source = inspect.getsource(function)
    doc = function.__doc__
    if doc and '"""' in source:
        head, _, rest = source.partition('    """')
        source = head + rest.partition('"""\n')[2]
    return source.rstrip()
