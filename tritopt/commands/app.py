"""The command line. Each command has its file in tritopt/commands."""

from __future__ import annotations

from typing import Annotated

import typer

import tritopt
from tritopt.commands.bench import bench
from tritopt.commands.check import check
from tritopt.commands.inspect import inspect
from tritopt.commands.list import list_optimizers
from tritopt.commands.numerics import numerics
from tritopt.commands.tune import tune

app = typer.Typer(
    help="Triton fused optimizers for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("list")(list_optimizers)
app.command()(bench)
app.command()(check)
app.command()(inspect)
app.command()(numerics)
app.command()(tune)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tritopt {tritopt.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Triton fused optimizers for PyTorch."""
