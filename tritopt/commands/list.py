"""`tritopt list`."""

from __future__ import annotations

import json

import typer
from rich import box
from rich.table import Table

from tritopt import cost, docs, registry
from tritopt.commands.console import AsJson, AsMarkdown, call, console


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
    console().print(table)


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
    return [call(listing.optimizer, listing.arguments), launches, ", ".join(listing.states) or "none", *moved]


def _short(n: float) -> str:
    return f"{n:.1f}".removesuffix(".0")
