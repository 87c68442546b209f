"""The command `tritopt numerics`: its options, and how it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tritopt.commands.console import AsDark, AsJson, AsMarkdown, Column, Line, console, print_table, with_progress
from tritopt.tools import numerics as report
from tritopt.tools.environment import device
from tritopt.tools.numerics import plot as plotting
from tritopt.tools.plotting import check_path


def numerics(
    target: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A class of tritopt.optim; AdamW by default.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(metavar="NAME", help="The same.")] = None,
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
    dark: AsDark = False,
    load: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Show or draw what --json printed before; train nothing."),
    ] = None,
    as_json: AsJson = False,
    markdown: AsMarkdown = False,
) -> None:
    """Show what each storage format costs in bytes, and how far it leads from a float64 truth.

    On a small network (scikit-learn's digits) and on a synthetic stress. Takes minutes; --steps 100 takes seconds.
    """
    try:
        if target and optimizer:
            raise ValueError(f"one optimizer at a time: {target} or --optimizer {optimizer}")
        formats, cls = report.find_formats(storage), report.find_optimizer(target or optimizer or "AdamW")
        for path in plot or ():
            check_path(path)
        if load is not None:
            rows = [row for row in report.load(load) if not storage or row.format in storage]
            if not rows:
                raise ValueError(f"{load} has no results of {', '.join(storage or ['any format'])}")
        else:
            run = report.Report(cls, formats, steps, lr, with_digits=not no_digits)
    except (ImportError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if load is None:
        rows = list(with_progress(run.results(), "training", len(run), shown=not (as_json or markdown)))
    for path in plot or ():
        plotting.save_plot(rows, path, dark)
    if as_json:
        typer.echo("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]")
    else:
        _print_summary(rows, markdown)
        if rows[0].optimizer == "Muon" and not markdown:
            _print_orthogonality()
            if load is None and not no_digits:
                _print_muon_digits(min(steps, report.MUON_STEPS))


def _print_orthogonality() -> None:
    titles = ("coefficients", "steps", "products", "lowest", "highest", "error %")
    print_table(
        console(),
        [Column(name, rank, "right" if rank else "left") for rank, name in enumerate(titles)],
        [
            Line([one.coefficients, str(one.steps), one.dtype, f"{one.lowest:.3f}", f"{one.highest:.3f}",
                  f"{100 * one.error:.1f}"])
            for one in report.orthogonality()
        ],
        title="Newton-Schulz beside a singular value decomposition in fp64",
        caption="Singular values that it ends with, of matrices whose values span a factor of 100; error: distance to "
        "the orthogonal matrix.",
    )  # fmt: skip


def _print_muon_digits(steps: int) -> None:
    print_table(
        console(),
        [Column("optimizer", 0), Column("loss", 1, "right"), Column("accuracy %", 2, "right")],
        [
            Line([one.name, f"{one.loss:.4f}", f"{100 * one.accuracy:.1f}"])
            for one in report.muon_digits(report.Digits.load(), steps)
        ],
        title=f"Muon for the matrices between layers, AdamW for the rest: the digits, {steps} steps",
        caption="Loss over the training images and share of the test images that are recognised, after the last step.",
    )


def _print_summary(rows: Sequence[report.FormatResult], markdown: bool) -> None:
    columns = ["format", *(column.title for column in report.COLUMNS)]
    lines = [[name, *cells] for name, cells in report.summary(rows).items()]
    if markdown:
        rule = ["---", *["---:"] * len(report.COLUMNS)]
        typer.echo("\n".join(f"| {' | '.join(line)} |" for line in [columns, rule, *lines]))
        return
    print_table(
        console(),
        [Column(name, rank, "right" if rank else "left") for rank, name in enumerate(columns)],
        [Line(line) for line in lines],
        title=f"{rows[0].optimizer}, {max(row.steps for row in rows)} steps, {device()}",
        caption=report.EXPLANATION,
    )
    for name, reason in {row.format: row.refused for row in rows if row.refused}.items():
        console().print(f"{name}: {reason}", soft_wrap=True)
