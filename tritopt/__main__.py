"""The command line: `tritopt list`, `check` and `numerics`. Arguments and tables; their modules do the work."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tritopt
from tritopt import cost, docs, numerics_plot, registry
from tritopt import numerics as report
from tritopt.check import Row, cases, device, environment, load_optimizer, registered, run_checks
from tritopt.kernels.formats import MASTERS
from tritopt.kernels.language import HAS_TRITON

MAX_FAILURES = 20

app = typer.Typer(
    help="Triton fused optimizers for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]
AnyRow = TypeVar("AnyRow")


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


@app.command("list")
def list_optimizers(
    as_json: AsJson = False,
    markdown: AsMarkdown = False,
) -> None:
    """List the optimizers: their launches, states, and bytes that a step reads and writes per parameter."""
    listings = list(cost.listings())
    if as_json:
        typer.echo(json.dumps([listing.to_json() for listing in listings], indent=2))
        return
    header = ["optimizer", "launches", "states", *(f"bytes, {name}" for name in cost.PRECISIONS)]
    rows = [_listed(listing) for listing in listings]
    if markdown:
        lines = [header, ["---"] * 3 + ["---:"] * len(cost.PRECISIONS), *rows]
        for line, extra in zip(lines, [_DOCUMENTED, ["---"] * 2, *map(_documented, listings)], strict=True):
            line[1:1], line[len(line) :] = extra[:1], extra[1:]
        typer.echo("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    table = Table(
        caption="numbers: bytes that a step reads and writes per parameter; gradients have the weights' dtype",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    for i, name in enumerate(header[:3]):
        table.add_column(name, width=max(len(part) + 1 for row in rows for part in row[i].split(", ")))
    for name in cost.PRECISIONS:
        # One word a line: without a terminal there are 120 columns.
        table.add_column(name.replace(" ", "\n"), justify="right")
    for row in rows:
        table.add_row(*row)
    _console().print(table)


_DOCUMENTED = ["source of the formula", "differs from MXNet's in"]


def _documented(listing: cost.Listing) -> list[str]:
    """Source and differences, of an optimizer's first row only."""
    cls = registry.find(listing.optimizer)
    return ["", ""] if listing.arguments else [docs.source(cls), docs.differences(cls)]


def _listed(listing: cost.Listing) -> list[str]:
    # "-": the optimizer refuses it.
    moved = [
        _short(listing.moved[name].total) if name in listing.moved else "-" if listing.moved else "?"
        for name in cost.PRECISIONS
    ]
    launches = f"{len(listing.kernels)}: {', '.join(listing.kernels)}" if listing.kernels else "no kernel"
    return [_call(listing.optimizer, listing.arguments), launches, ", ".join(listing.states) or "none", *moved]


def _short(n: float) -> str:
    return f"{n:.1f}".removesuffix(".0")


@app.command()
def check(
    target: Annotated[str | None, typer.Argument(metavar="MODULE:CLASS", help="An optimizer of your own.")] = None,
    optimizer: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this one; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer combinations, fewer steps.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check optimizers on this machine: fused against reference, both against a float64 truth.

    Exits with 1 if a check fails. Without a GPU the kernels run in Triton's interpreter.
    """
    _interpret_without_gpu()
    try:
        # A target alone stands for itself, not for everybody.
        classes = registered(optimizer or ([] if target else None))
        if target:
            classes.append(load_optimizer(target))
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    machine = environment()
    console = _console()
    if not as_json:
        console.print(_where(machine), soft_wrap=True)
    rows = list(_with_progress(run_checks(classes, quick), "checking", len(cases(classes, quick)), not as_json))
    passed = _all_passed(rows)
    if as_json:
        typer.echo(
            json.dumps({**machine, "quick": quick, "passed": passed, "rows": [asdict(row) for row in rows]}, indent=2)
        )
    else:
        console.print(_summary(rows))
        for note in [] if machine["fused_unavailable"] else _notes(rows):
            console.print(note)
        _print_failures(console, [row for row in rows if not row.passed], len(rows))
    raise typer.Exit(0 if passed else 1)


@app.command()
def numerics(
    optimizer: Annotated[str, typer.Option(metavar="NAME", help="A class of tritopt.optim.")] = "AdamW",
    storage: Annotated[
        list[str] | None,
        typer.Option("--format", metavar="NAME", help="Only this one, such as split8+int8; may be repeated."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates of each format.")] = report.STEPS,
    lr: Annotated[float, typer.Option(help="Learning rate of the network.")] = report.DIGITS_LR,
    no_digits: Annotated[bool, typer.Option("--no-digits", help="No network, which needs scikit-learn.")] = False,
    plot: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="Draw it, as .png or .svg; may be repeated.")
    ] = None,
    as_json: AsJson = False,
    markdown: AsMarkdown = False,
) -> None:
    """What each storage format costs in bytes, and how far it leads from a float64 truth.

    On a small network (scikit-learn's digits) and on a synthetic stress. Takes minutes; --steps 100 takes seconds.
    """
    try:
        formats, cls = report.find_formats(storage), report.find_optimizer(optimizer)
        for path in plot or ():
            numerics_plot.check_path(path)
        run = report.Report(cls, formats, steps, lr, with_digits=not no_digits)
    except (ImportError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    rows = list(_with_progress(run.rows(), "training", len(run), shown=not (as_json or markdown)))
    for path in plot or ():
        numerics_plot.save_plot(rows, path)
    if as_json:
        typer.echo("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]")
    else:
        _print_summary(rows, markdown)


def _print_summary(rows: Sequence[report.Row], markdown: bool) -> None:
    columns = ["format", *(column.title for column in report.COLUMNS)]
    lines = [[name, *cells] for name, cells in report.summary(rows).items()]
    if markdown:
        rule = ["---", *["---:"] * len(report.COLUMNS)]
        typer.echo("\n".join(f"| {' | '.join(line)} |" for line in [columns, rule, *lines]))
        return
    table = Table(
        title=f"{rows[0].optimizer}, {max(row.steps for row in rows)} steps, {device()}",
        caption=report.EXPLANATION,
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    for at, name in enumerate(columns):
        # One word a line: without a terminal there are 120 columns.
        table.add_column(name.replace(" ", "\n"), justify="right" if at else "left")
    for line in lines:
        table.add_row(*line)
    _console().print(table)
    for name, reason in {row.format: row.refused for row in rows if row.refused}.items():
        _console().print(f"{name}: {reason}", soft_wrap=True)


def _interpret_without_gpu() -> None:
    """Start over with TRITON_INTERPRET=1 where there is no GPU: Triton has read it when the kernels were imported."""
    if HAS_TRITON and not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, {**os.environ, "TRITON_INTERPRET": "1"})


def _console() -> Console:
    # Rich takes 80 columns where the width is unknown, too few for the tables.
    console = Console(markup=False, highlight=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, width=120)


def _with_progress(rows: Iterable[AnyRow], what: str, total: int, shown: bool) -> Iterable[AnyRow]:
    console = Console(stderr=True)
    return track(rows, what, total, console=console, transient=True, disable=not (shown and console.is_terminal))


def _where(machine: dict[str, Any]) -> str:
    versions = (
        f"tritopt {machine['tritopt']}, torch {machine['torch']}, triton {machine['triton']}, {machine['machine']}"
    )
    if machine["fused_unavailable"]:
        return f"Reference against truth only: {machine['fused_unavailable']}\n{versions}"
    if machine["interpreter"]:
        return f"No GPU in use: the kernels run in Triton's interpreter, on the CPU.\n{versions}"
    return f"The kernels run on {machine['device']}.\n{versions}"


def _summary(rows: Sequence[Row]) -> Table:
    """The worst of each optimizer and kind of weights."""
    table = Table(
        "optimizer",
        "weights",
        caption="largest error in ulp of the weights' dtype; of states and masters, in ulp of their own",
    )
    for name in ("cases", "fused -\nreference", "fused -\ntruth", "reference -\ntruth", "states"):
        table.add_column(name, justify="right")
    table.add_column("")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.optimizer, _weights(row)), []).append(row)
    for key, members in groups.items():
        columns = ("fused_vs_reference", "fused_vs_truth", "reference_vs_truth", "states")
        worst = [_worst([getattr(row, column) for row in members]) for column in columns]
        style = "" if _all_passed(members) else "red"
        table.add_row(*key, str(len(members)), *worst, _verdict(members), style=style)
    return table


def _verdict(rows: Sequence[Row]) -> str:
    return "ok" if _all_passed(rows) else f"{sum(not row.passed for row in rows)} FAILED"


def _notes(rows: Sequence[Row]) -> list[str]:
    """Why kernels of rows that passed were not compared."""
    return sorted({f"{row.optimizer}: {row.reason}" for row in rows if row.passed and row.reason})


def _all_passed(rows: Sequence[Row]) -> bool:
    return all(row.passed for row in rows)


def _worst(errors: Sequence[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{max(known):.3g}" if known else "-"


def _weights(row: Row) -> str:
    master = f" + {MASTERS[row.master].name}" if row.master else ""
    return row.weight_dtype + master + (f", {row.state_dtype} states" if row.state_dtype else "")


def _print_failures(console: Console, failures: Sequence[Row], n_cases: int) -> None:
    for row in failures[:MAX_FAILURES]:
        call = _call("tritopt.create", {"": row.optimizer, **row.arguments})
        console.print(f"\n{call}, weights {_weights(row)}, gradients {row.grad_dtype}:\n  {row.reason}", soft_wrap=True)
    if len(failures) > MAX_FAILURES:
        console.print(f"\nand {len(failures) - MAX_FAILURES} more, which --json lists")
    console.print(f"\n{len(failures)} of {n_cases} checks failed" if failures else f"all {n_cases} checks passed")


def _call(name: str, arguments: dict[str, Any]) -> str:
    written = [f"{key}={value!r}" if key else repr(value) for key, value in arguments.items()]
    return f"{name}({', '.join(written)})" if written else name


if __name__ == "__main__":
    app(prog_name="tritopt")
