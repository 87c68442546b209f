"""The command `tritopt bench`: its options, and how it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tritopt.commands.console import (
    AsJson,
    Column,
    Line,
    console,
    interpret_without_gpu,
    print_table,
    with_progress,
)
from tritopt.tools.bench import host, plot
from tritopt.tools.bench.measure import Measurement
from tritopt.tools.bench.peers import names
from tritopt.tools.bench.plan import plan
from tritopt.tools.bench.run import Bench, check_file, find_device
from tritopt.tools.bench.shapes import MODELS
from tritopt.tools.bench.targets import judge

WARNING = "A REHEARSAL: sizes are miniatures, kernels run in Triton's interpreter, and no time below means anything."
MISSING = "not installed"


def bench(
    target: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Only these optimizers, classes of tritopt.optim.")
    ] = None,
    shapes: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"One of {', '.join(MODELS)}; may be repeated.")
    ] = None,
    optimizer: Annotated[list[str] | None, typer.Option(metavar="NAME", help="The same; may be repeated.")] = None,
    storage: Annotated[
        list[str] | None,
        typer.Option("--format", metavar="NAME", help="As in `numerics`, such as split8+int8; may be repeated."),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help=f"Only this one beside ours, or none; may be repeated: {', '.join(names())}."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few cases of ResNet-50 and tiny tensors.")] = False,
    seconds: Annotated[
        float | None, typer.Option(help="To spend; the most important is measured first. Without it: no limit.")
    ] = None,
    on_host: Annotated[
        bool, typer.Option("--host", help="The host's time alone, kernels replaced by nothing. Needs no GPU.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contestant, for --host.")] = host.ROUNDS,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="All of it without a GPU, in sizes and times that mean nothing.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Keep what --json prints in a file, written with every row.")
    ] = None,
    draw: Annotated[
        list[Path] | None, typer.Option("--plot", metavar="PATH", help="Draw it, as .png or .svg; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what a step takes on this GPU, beside the bandwidth of a copy and beside other libraries.

    Every optimizer and format is checked before it is measured: a red check gets no numbers, and exit code 1.
    """
    if on_host or rehearse:
        interpret_without_gpu()
    optimizer = [*(target or ()), *(optimizer or ())] or None
    of_gpu = {
        "--shapes": shapes, "--optimizer": optimizer, "--format": storage, "--quick": quick, "--seconds": seconds,
        "--rehearse": rehearse, "--plot": draw,
    }  # fmt: skip
    try:
        if save is not None:
            check_file(save)
        if on_host:
            if unused := [name for name, value in of_gpu.items() if value]:
                raise ValueError(f"--host measures AdamW on lists of its own: leave out {', '.join(unused)}")
            _bench_host(rounds, peer, save, as_json)
            return
        for path in draw or ():
            plot.check_path(path)
        run = Bench(find_device(rehearse), plan(shapes, optimizer, storage, peer, quick), seconds)
    except (ImportError, RuntimeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    _bench_device(run, save, draw or (), as_json)


def _bench_device(run: Bench, save: Path | None, draw: Sequence[Path], as_json: bool) -> None:
    """Measure, keep and draw what was measured, print it, and exit."""
    if not as_json:
        console().print(_where(run), soft_wrap=True)
    for _ in with_progress(run.rows(), "measuring", len(run), not as_json):
        if save is not None:
            run.save(save)
    if run.copy is not None:
        for path in draw:
            plot.save_plot(run.done, run.copy, _title(run), path)
    if as_json:
        typer.echo(json.dumps(run.document(), indent=1))
    else:
        _print(run)
    raise typer.Exit(0 if run.passed else 1)


def _where(run: Bench) -> str:
    machine = run.machine
    commit = f" ({machine['commit']})" if machine["commit"] else ""
    versions = f"tritopt {machine['tritopt']}{commit}, torch {machine['torch']}, triton {machine['triton']}"
    if run.device.is_rehearsal:
        return f"{WARNING}\n{versions}"
    return f"{machine['gpu']}, driver {machine['driver']}\n{versions}"


def _title(run: Bench) -> str:
    assert run.copy is not None
    where = ": a REHEARSAL, times mean nothing" if run.device.is_rehearsal else f" on {run.machine['gpu']}"
    return f"tritopt bench{where}; a copy moves {run.copy / 1e9:,.0f} GB/s"


def _print(run: Bench) -> None:
    terminal = console()
    if run.copy is not None:
        terminal.print(f"a copy moves {run.copy / 1e9:,.1f} GB/s, read and written")
    ranks = {
        "ms": 0, "GPU ms": 3, "host ms": 5, "GB": 6, "GB/s": 1, "of a copy": 4, "launches": 8, "extra MiB": 7, "": 9,
        "times": 0,
    }  # fmt: skip
    columns = [Column(""), *(Column(name, rank, "right") for name, rank in ranks.items())]
    caption = (
        "ms: of steps on end. GPU ms: of the GPU alone. GB: must move. extra: of memory, at the most; a: times "
        "that a warm step allocates, s: it waits for the GPU. launches: of Triton kernels/of all kernels. "
        "times: its ms in units of ours"
    )
    lines = []
    cases = dict.fromkeys((row.shapes, row.optimizer, row.format) for row in run.done)
    for case in cases:
        rows = [row for row in run.done if (row.shapes, row.optimizer, row.format) == case and row.ms is not None]
        if rows:
            lines.append(Line([f"{case[0]}: {case[1]}, {case[2]}", *[""] * len(ranks)], "bold"))
        lines += [Line(_cells(row)) for row in rows]
    print_table(terminal, columns, lines, caption=caption)
    _print_refused(run.done)
    _print_targets(run)


def _cells(row: Measurement) -> list[str]:
    warm = ("" if not row.allocations else f"{row.allocations}a") + ("s" if row.synchronises else "")
    return [
        f"  {row.contestant}",
        _number(row.ms),
        _number(row.device_ms),
        _number(row.host_ms),
        _number(None if row.moved is None else row.moved / 1e9),
        "-" if row.gb_per_s is None else f"{row.gb_per_s:,.1f}",
        "-" if row.share is None else f"{100 * row.share:.1f}%",
        _launches(row),
        "-" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:,.1f}",
        warm,
        "" if row.ratio is None else f"{row.ratio:.3g}",
    ]


def _launches(row: Measurement) -> str:
    known = [str(n) for n in (row.launches, row.kernels) if n is not None]
    return "/".join(known) or "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 100 else f"{value:,.0f}"


def _print_refused(rows: Sequence[Measurement]) -> None:
    terminal = console()
    if missing := dict.fromkeys(row.contestant for row in rows if (row.refused or "").startswith(MISSING)):
        terminal.print(f"{MISSING}: {', '.join(missing)}", soft_wrap=True)
    for row in rows:
        if row.refused and not row.refused.startswith(MISSING):
            what = f"{row.shapes}, {row.optimizer}, {row.format}, {row.contestant}"
            terminal.print(f"{what}: {row.refused}", soft_wrap=True)


def _print_targets(run: Bench) -> None:
    columns = [Column("target, for an H200"), Column("", 2), Column("measured, the worst"), Column("of", 1), Column("")]
    lines = []
    for judged in judge(run.done, run.device.is_rehearsal):
        style = {"met": "green", "missed": "red", "not measured": "dim"}[judged.verdict]
        cells = [judged.target, judged.required, judged.measured or "-", str(judged.of or ""), judged.verdict]
        lines.append(Line(cells, style))
    print_table(console(), columns, lines)


def _bench_host(rounds: int, peer: Sequence[str] | None, save: Path | None, as_json: bool) -> None:
    rows: list[host.HostTime] = []
    for case in with_progress(host.CASES, "measuring", len(host.CASES), not as_json):
        rows += host.case_times(case, rounds, peer)
        document = host.document(rows)
        if save is not None:  # what is stopped leaves what it had
            save.write_text(json.dumps(document, indent=1) + "\n")
    if as_json:
        typer.echo(json.dumps(document, indent=1))
        return
    _print_host(rows, document["machine"]["cpu"])


def _print_host(rows: Sequence[host.HostTime], cpu: str) -> None:
    ranks = {"ms, median": 0, "best": 2, "cold": 1, "times": 0}
    columns = [Column(""), *(Column(name, rank, "right") for name, rank in ranks.items())]
    lines = []
    for title in dict.fromkeys(row.title for row in rows):
        lines.append(Line([title, *[""] * len(ranks)], "bold"))
        for row in [row for row in rows if row.title == title]:
            times = [_number(ms) for ms in (row.ms, row.best_ms, row.cold_ms)]
            lines.append(Line([f"  {row.contestant}", *times, "-" if row.ratio is None else f"{row.ratio:.2f}"]))
    terminal = console()
    print_table(
        terminal,
        columns,
        lines,
        title=f"Host time of an AdamW step, kernels replaced by nothing; {cpu}",
        caption="replayed: a step that repeats an earlier one; built: the first with its set of gradients\n"
        "median: of steps after others of the same optimizer; cold: of those after other optimizers' steps\n"
        "times: the median in units of torch fused's; with fused=False, of torch for-loop's",
    )
    for name, replaced in dict.fromkeys((row.contestant, row.replaced) for row in rows):
        terminal.print(f"replaced, {name}: {replaced}", soft_wrap=True)
    for row in rows:
        if row.refused:
            terminal.print(f"{row.title}, {row.contestant}: {row.refused}", soft_wrap=True)
