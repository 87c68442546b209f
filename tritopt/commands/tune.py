"""The command `tritopt tune`: its options, and how it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from tritopt.commands.console import AsJson, Column, Line, console, print_table, where, with_progress
from tritopt.engine.tuning import cache
from tritopt.engine.tuning.config import Config, Tiles
from tritopt.kernels.language import HAS_TRITON, INSTALL_TRITON
from tritopt.tools import numerics
from tritopt.tools import tune as tuning
from tritopt.tools.check import device, environment


def tune(
    target: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Classes of tritopt.optim; AdamW by default.")
    ] = None,
    optimizer: Annotated[list[str] | None, typer.Option(metavar="NAME", help="The same; may be repeated.")] = None,
    storage: Annotated[
        list[str] | None,
        typer.Option("--format", metavar="NAME", help="Such as split8+int8, as numerics has them; may be repeated."),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE",
            help="small, medium, large, or a number of elements; may be repeated.",
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the cache and the defaults; measure nothing.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Delete the cache, of all GPUs; measure nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure launch configurations on this GPU, ahead of time, and keep the best.

    Training then takes them without a measurement. Runs on scratch tensors. Results of training do not depend on it.
    """
    if show and clear:
        raise typer.BadParameter("--show and --clear exclude each other")
    if clear:
        _clear(as_json)
        return
    if show:
        _show(as_json)
        return
    named = [*(target or ()), *(optimizer or ())]
    try:
        classes = list(dict.fromkeys(map(numerics.find_optimizer, named or ["AdamW"])))
        formats = numerics.find_formats(storage or tuning.FORMATS)
        sizes = tuning.find_sizes(size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    missing = None
    if not HAS_TRITON:
        missing = f"tritopt tune needs {INSTALL_TRITON}"
    elif device().type != "cuda":
        missing = "tritopt tune measures on a GPU, and there is none (or TRITON_INTERPRET=1 is set)"
    if missing:
        typer.echo(f"{missing}; --show and --clear work without", err=True)
        raise typer.Exit(2)
    if not as_json:
        console().print(where(environment()), soft_wrap=True)
    run = tuning.Tuning(classes, formats, sizes, device())
    rows = list(with_progress(run.rows(), "tuning", len(run), shown=not as_json))
    if as_json:
        typer.echo(json.dumps([row.to_json() for row in rows], indent=2))
    else:
        print_rows(rows)


def print_rows(rows: Sequence[tuning.Row]) -> None:
    """Print the default beside the best."""
    columns = [*map(Column, ("optimizer", "format", "kernel", "size")), Column("default", 5), Column("best")]
    columns += [Column("default us", 3, "right"), Column("best us", 1, "right")]
    columns += [Column("default GB/s", 4, "right"), Column("best GB/s", 2, "right")]
    lines = []
    for row in rows:
        times = (row.microseconds, row.default_microseconds, row.gigabytes_per_second, row.default_gigabytes_per_second)
        if None in times or row.best is None or row.default is None:
            continue
        best_us, default_us, best_gb, default_gb = (f"{number:.4g}" for number in times)
        best = "as it is" if row.best == row.default else _written(row.best)
        names = (row.optimizer, row.format, row.kernel, f"{row.size:,}", _written(row.default), best)
        lines.append(Line([*names, default_us, best_us, default_gb, best_gb]))
    print_table(console(), columns, lines, caption=_EXPLANATION)
    for row in rows:
        if row.reason:
            of = ", ".join(filter(None, (row.optimizer, row.format, row.kernel, str(row.size or ""))))
            console().print(f"{of}: {row.reason}", soft_wrap=True)


_EXPLANATION = (
    "block x elements of a chunk, tail, warps; gram: tile x columns at a time, rows in a group, warps, stages; medians "
    "of a launch on scratch; GB/s: bytes that must move"
)


def _written(config: Config | Tiles | dict[str, Any]) -> str:
    """Text of a configuration in a table."""
    fields = config if isinstance(config, dict) else config._asdict()
    if "block_k" in fields:
        return "{block_size} x {block_k}, {group}, {num_warps}, {num_stages}".format(**fields)
    return "{block_size} x {chunk_size}, {tail_size}, {num_warps}".format(**fields)


def _clear(as_json: bool) -> None:
    try:
        deleted = [str(path) for path in cache.clear()]
    except OSError as error:
        typer.echo(f"cannot delete {error.filename}: {error.strerror}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps({"deleted": deleted}, indent=2))
    else:
        typer.echo("\n".join(f"deleted {path}" for path in deleted) or "nothing to delete")


def _show(as_json: bool) -> None:
    shipped, cached, folder = tuning.shipped_rows(), tuning.cached_rows(), cache.folder()
    if as_json:
        contents = {"folder": None if folder is None else str(folder), "shipped": shipped, "cached": cached}
        typer.echo(json.dumps(contents, indent=2))
        return
    terminal = console()
    columns = ("gpu", "block_size", "chunk_size", "tail_size", "num_warps")
    lines = [Line([str(row[name]) for name in columns]) for row in shipped]
    shown = [Column(name.replace("_", " ")) for name in columns]
    print_table(terminal, shown, lines, title="defaults", caption=_DEFAULTS)
    if not cached:
        terminal.print(f"nothing tuned yet in {folder}" if folder else "no home directory, so there is no cache")
        return
    shown = [*map(Column, ("gpu", "kernel", "formats", "size")), Column("default", 3), Column("best")]
    shown += [Column("default us", 2, "right"), Column("best us", 1, "right")]
    lines = []
    for row in cached:
        configs = [_written(row[name]) for name in ("default", "config")]
        times = [f"{row[name]:.4g}" for name in ("default_microseconds", "microseconds")]
        lines.append(Line([row["gpu"], row["kernel"], _stored(row), f"{row['size']:,}", *configs, *times]))
    print_table(terminal, shown, lines, title=f"tuned, in {folder}")


_DEFAULTS = (
    "by reasons, not measured; fp32: of updates with a tensor in fp32 and without random bits; lists of less than 32 "
    "million elements have smaller chunks"
)


def _stored(row: dict[str, Any]) -> str:
    """Text of how weights and states are stored: the weight's format and dtype, and the states'."""
    weight, *states = row["formats"]
    return f"{row['dtypes'][0]} {weight}" + (f"; {', '.join(states)}" if states else "")
