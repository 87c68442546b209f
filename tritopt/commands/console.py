"""What commands share: options, the terminal, progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import track

from tritopt.kernels.language import HAS_TRITON

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]
AnyRow = TypeVar("AnyRow")


def interpret_without_gpu() -> None:
    """Start over with TRITON_INTERPRET=1 where there is no GPU: Triton has read it when the kernels were imported."""
    if HAS_TRITON and not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, "TRITON_INTERPRET": "1"})


def console() -> Console:
    """The terminal, or a wide page where output goes elsewhere."""
    # Rich takes 80 columns where the width is unknown, too few for the tables.
    terminal = Console(markup=False, highlight=False)
    return terminal if terminal.is_terminal else Console(markup=False, highlight=False, width=120)


def with_progress(rows: Iterable[AnyRow], what: str, total: int, shown: bool) -> Iterable[AnyRow]:
    """The rows as they come, with a progress bar on stderr if that is a terminal."""
    terminal = Console(stderr=True)
    return track(rows, what, total, console=terminal, transient=True, disable=not (shown and terminal.is_terminal))


def where(machine: dict[str, Any]) -> str:
    """What kernels run on, and versions; `machine` as `tritopt.check.environment` has it."""
    versions = (
        f"tritopt {machine['tritopt']}, torch {machine['torch']}, triton {machine['triton']}, {machine['machine']}"
    )
    if machine["fused_unavailable"]:
        return f"Reference against truth only: {machine['fused_unavailable']}\n{versions}"
    if machine["interpreter"]:
        return f"No GPU in use: the kernels run in Triton's interpreter, on the CPU.\n{versions}"
    return f"The kernels run on {machine['device']}.\n{versions}"


def call(name: str, arguments: dict[str, Any]) -> str:
    """How a call is written; an argument without a name stands for itself."""
    written = [f"{key}={value!r}" if key else repr(value) for key, value in arguments.items()]
    return f"{name}({', '.join(written)})" if written else name
