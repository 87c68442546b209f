"""Parts that commands share: options, the terminal, tables, progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.progress import track
from rich.table import Table

from tritopt.kernels.language import HAS_TRITON

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
AsDark = Annotated[bool, typer.Option("--dark", help="Draw for a dark page.")]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]
Targets = Annotated[
    list[str] | None,
    typer.Argument(metavar="NAME", help="Only these optimizers; MODULE:CLASS names one of your own."),
]
AnyRow = TypeVar("AnyRow")
PLAIN_HEAD = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
"""Lines of a table in ASCII, for what is no terminal: SIMPLE_HEAD as a file or a log can hold it."""


def interpret_without_gpu() -> None:
    """Start over with TRITON_INTERPRET=1 where there is no GPU: Triton has read it when the kernels were imported."""
    if HAS_TRITON and not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, "TRITON_INTERPRET": "1"})


def console() -> Console:
    """The terminal, or a wide page where output goes elsewhere and COLUMNS does not say how wide that is."""
    terminal = Console(markup=False, highlight=False)
    if terminal.is_terminal or os.environ.get("COLUMNS", "").isdecimal():
        return terminal
    # Rich takes 80 columns where the width is unknown, too few for the tables.
    return Console(markup=False, highlight=False, width=132)


class Column(NamedTuple):
    """A column of `print_table`."""

    title: str
    rank: int = 0
    """Columns of the highest rank are the first to be left out where the terminal is narrow. 0: never."""
    justify: JustifyMethod = "left"


class Line(NamedTuple):
    """A line of `print_table`."""

    cells: Sequence[str]
    style: str = ""
    ends_section: bool = False


def print_table(terminal: Console, columns: Sequence[Column], lines: Sequence[Line], **options: Any) -> None:
    """Print a table as wide as the terminal allows, and say which columns it has no room for.

    Rich would shorten words with an ellipsis instead, so that what differs at its end looks alike.
    """
    texts = [[line.cells[i] for line in lines] for i in range(len(columns))]
    titles = [_longest_word(column.title) for column in columns]
    least = [max([title, *map(_longest_word, cells)]) for title, cells in zip(titles, texts, strict=True)]
    most = [max([title, *map(_longest_line, cells)]) for title, cells in zip(titles, texts, strict=True)]
    shown, left_out = list(range(len(columns))), list[int]()
    while (room := terminal.width - 1 - sum(least[i] + 2 for i in shown)) < 0:
        last = max(shown, key=lambda i: columns[i].rank)
        if not columns[last].rank:
            break
        shown.remove(last)
        left_out.append(last)
    widths = {i: least[i] for i in shown}
    for i in sorted(shown, key=lambda i: most[i] - least[i]):
        widths[i] += max(0, min(room, most[i] - least[i]))
        room -= widths[i] - least[i]
    for _ in range(-room):  # not even the words fit: the longest are broken
        widest = max(shown, key=lambda i: widths[i])
        widths[widest] = max(1, widths[widest] - 1)
    table = Table(box=box.SIMPLE_HEAD if terminal.is_terminal else PLAIN_HEAD, padding=(0, 0, 0, 1), **options)
    for i in shown:
        table.add_column(columns[i].title, justify=columns[i].justify, width=widths[i], overflow="fold")
    for line in lines:
        table.add_row(*(line.cells[i] for i in shown), style=line.style, end_section=line.ends_section)
    terminal.print(table)
    if left_out:
        names = "; ".join(columns[i].title or "the column without a title" for i in sorted(left_out))
        terminal.print(f"No room for: {names}. A wider terminal and --json show all.")


def _longest_word(text: str) -> int:
    """Width of a cell's longest word in columns, the text's indentation included."""
    return len(text) - len(text.lstrip(" ")) + max(map(cell_len, text.split()), default=0)


def _longest_line(text: str) -> int:
    return max(map(cell_len, text.split("\n")))


def with_progress(rows: Iterable[AnyRow], what: str, total: int, shown: bool) -> Iterable[AnyRow]:
    """The rows as they come, with a progress bar on stderr if that is a terminal."""
    terminal = Console(stderr=True)
    return track(rows, what, total, console=terminal, transient=True, disable=not (shown and terminal.is_terminal))


def where(machine: dict[str, Any]) -> str:
    """Say what kernels run on, and versions; `machine` as `tritopt.tools.environment.environment` has it."""
    versions = (
        f"tritopt {machine['tritopt']}, torch {machine['torch']}, triton {machine['triton']}, {machine['machine']}\n"
        f"Whether a step is like the last is asked in {machine['walk']}."
    )
    if machine["fused_unavailable"]:
        return f"Reference against truth only: {machine['fused_unavailable']}\n{versions}"
    if target := machine["compiled_for"]:
        return f"No GPU in use: kernels are compiled for {target} and run in the PTX machine, on the CPU.\n{versions}"
    if machine["interpreter"]:
        return f"No GPU in use: the kernels run in Triton's interpreter, on the CPU.\n{versions}"
    return f"The kernels run on {machine['device']}.\n{versions}"


def call(name: str, arguments: dict[str, Any]) -> str:
    """Text of a call; an argument without a name stands for itself."""
    written = [f"{key}={value!r}" if key else repr(value) for key, value in arguments.items()]
    return f"{name}({', '.join(written)})" if written else name
