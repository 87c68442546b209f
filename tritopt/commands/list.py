"""The command `tritopt list`: its options, and how it prints."""

from __future__ import annotations

import json

import typer

from tritopt.commands.console import AsJson, AsMarkdown, Column, Line, Targets, call, console, print_table
from tritopt.mxnet import registry
from tritopt.tools import cost, docs
from tritopt.tools.optimizers import find_optimizers


def list_optimizers(
    target: Targets = None,
    as_json: AsJson = False,
    markdown: AsMarkdown = False,
) -> None:
    """List the optimizers: their launches, states, and bytes that a step reads and writes per parameter."""
    try:
        listings = list(cost.listings(find_optimizers(target) if target else None))
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
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
    ranks = {"launches": len(cost.PRECISIONS) + 1, "states": len(cost.PRECISIONS)}
    columns = [Column(name, ranks.get(name, 0)) for name in header[:3]]
    columns += [Column(name, rank, "right") for rank, name in enumerate(cost.PRECISIONS)]
    print_table(
        console(),
        columns,
        [Line(row) for row in rows],
        caption="numbers: bytes that a step reads and writes per parameter; gradients have the weights' dtype",
    )


_DOCUMENTED = ["source of the formula", "differs from MXNet's in"]


def _documented(listing: cost.Listing) -> list[str]:
    """Source and differences, for an optimizer's first row only."""
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
