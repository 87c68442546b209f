"""The command `tritopt list`: its options, and how it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tritopt.commands.console import AsDark, AsJson, AsMarkdown, Column, Line, Targets, call, console, print_table
from tritopt.mxnet import registry
from tritopt.mxnet.optimizer import Optimizer
from tritopt.tools import cost, cost_plot, docs, support
from tritopt.tools.optimizers import find_optimizers
from tritopt.tools.plotting import check_path


def list_optimizers(
    target: Targets = None,
    show_support: Annotated[
        bool, typer.Option("--support", help="What each takes: formats, sparse gradients, sharding, CUDA graphs.")
    ] = False,
    plot: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Draw where a step's bytes go, as .png or .svg; may be repeated."),
    ] = None,
    dark: AsDark = False,
    as_json: AsJson = False,
    markdown: AsMarkdown = False,
) -> None:
    """List the optimizers: their launches, states, and bytes that a step reads and writes per parameter."""
    try:
        classes = find_optimizers(target) if target else None
        for path in plot or ():
            check_path(path)
        if show_support:
            _print_support(classes, as_json, markdown)
            return
        listings = list(cost.listings(classes))
    except (ImportError, TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    for path in plot or ():
        cost_plot.save_plot(classes or [registry.find("adamw")], path, dark)
    if as_json:
        typer.echo(json.dumps([listing.to_json() for listing in listings], indent=2))
        return
    if markdown:
        _print_markdown(documented(listings))
        return
    header = [*_FIRST, *(f"bytes, {name}" for name in cost.PRECISIONS)]
    ranks = {"launches": len(cost.PRECISIONS) + 1, "states": len(cost.PRECISIONS)}
    columns = [Column(name, ranks.get(name, 0)) for name in _FIRST]
    columns += [Column(name, rank, "right") for rank, name in enumerate(header[3:])]
    print_table(
        console(),
        columns,
        [Line(_listed(listing)) for listing in listings],
        caption="numbers: bytes that a step reads and writes per parameter; gradients have the weights' dtype",
    )


def documented(listings: Sequence[cost.Listing]) -> list[list[str]]:
    """Make the table that --markdown prints, its header and the rule below that first."""
    header = [_FIRST[0], "source of the formula", *_FIRST[1:], *(f"bytes, {name}" for name in cost.PRECISIONS)]
    lines = [[*header, "differs from MXNet's in"], [*["---"] * 4, *["---:"] * len(cost.PRECISIONS), "---"]]
    for listing in listings:
        name, *cells = _listed(listing)
        cls = registry.find(listing.optimizer)
        # What all of an optimizer's rows have in common stands in its first.
        source, differences = ("", "") if listing.arguments else (docs.source(cls), docs.differences(cls))
        lines.append([name, source, *cells, differences])
    return lines


_FIRST = ("optimizer", "launches", "states")


def _listed(listing: cost.Listing) -> list[str]:
    # "-": the optimizer refuses it.
    moved = [
        _short(listing.moved[name].total) if name in listing.moved else "-" if listing.moved else "?"
        for name in cost.PRECISIONS
    ]
    launches = f"{len(listing.kernels)}: {', '.join(listing.kernels)}" if listing.kernels else "no kernel"
    return [call(listing.optimizer, listing.arguments), launches, ", ".join(listing.states) or "none", *moved]


def _short(n: float) -> str:
    return f"{n:.1f}".removesuffix(".0")


def _print_markdown(lines: Sequence[Sequence[str]]) -> None:
    typer.echo("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _print_support(classes: Sequence[type[Optimizer]] | None, as_json: bool, markdown: bool) -> None:
    records = list(support.supported(classes))
    if as_json:
        typer.echo(json.dumps([record.to_json() for record in records], indent=2))
        return
    for face in (support.TORCH, support.MXNET):
        cells = [record.cells() for record in records if record.face == face]
        if not cells:
            continue
        header = list(cells[0])
        if markdown:
            rows = [list(row.values()) for row in cells]
            _print_markdown([["face", *header], ["---"] * (len(header) + 1), *([f"`{face}`", *row] for row in rows)])
        else:
            columns = [Column(name, rank) for rank, name in enumerate(header)]
            print_table(console(), columns, [Line(list(row.values())) for row in cells], title=face)
    if not markdown:
        for column, words in support.LEGEND.items():
            for word, meaning in words.items():
                console().print(f"{column}, {word}: {meaning}", soft_wrap=True)
