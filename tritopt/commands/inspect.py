"""The command `tritopt inspect`: its options, and how it prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tritopt.commands.console import AsJson, Column, Line, Targets, console, print_table, with_progress
from tritopt.tools import inspect as report
from tritopt.tools.gpus import ARCHITECTURES, GPUS, find_gpu

_EXPLANATION = """\
regs, shared: registers of a thread, bytes of shared memory of a program
loads, stores: accesses that a thread makes for its elements on the hot path, number x bits
bytes: per parameter, read off the code; what must move stands beside it where that differs
instr: instructions issued per parameter on the hot path; on AMD, those of vector arithmetic
ALU, XU: those of them for the pipe of integers and choices, and for that of roots and conversions
waits: times that a thread waits for memory in one iteration; 1 if it asks for everything first
progs, KB: programs that a multiprocessor holds at once, and kilobytes of loads under way when all of them wait
ms: that 1e9 parameters take by a model: the longest of memory, issue, pipes and latency (tools/inspect/model.py)
Nothing here was measured on a GPU."""


def inspect(
    target_optimizer: Targets = None,
    optimizer: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="The same, or norm; may be repeated.")
    ] = None,
    storage: Annotated[
        list[str] | None,
        typer.Option("--format", metavar="NAME", help="Only this one, such as split8+int8; may be repeated."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"{', '.join(ARCHITECTURES)}; may be repeated.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help=f"Whose time is told: {', '.join(GPUS)}.")] = None,
    grad_dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Of the gradients: {', '.join(report.GRAD_DTYPES)}.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every optimizer, also of tritopt.optim, in every format. Takes minutes.")
    ] = False,
    views: Annotated[
        bool, typer.Option("--views", help="Beside each, weights and gradients at odd places of a flat buffer.")
    ] = False,
    peer: Annotated[bool, typer.Option("--peer", help="Print other packages' AdamW kernels for sm_90 beside.")] = False,
    peer_kernels: Annotated[
        bool, typer.Option("--peer-kernels", help="Likewise, and compile anew those in Triton that are installed.")
    ] = False,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows to it, for --diff.")] = None,
    diff: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compile what it holds again, and show what changed; exits with 1 if worse."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the compiler makes of the kernels, and the time that leaves at least. Needs no GPU.

    Shown are all optimizers with bf16 weights and an fp32 master, and AdamW in the main formats, for sm_90; AdamW's
    also with weights and gradients that are views into a flat buffer.
    """
    optimizer = [*(target_optimizer or ()), *(optimizer or ())] or None
    if save is not None and not save.parent.is_dir():
        raise typer.BadParameter(f"--save {save}: there is no folder {save.parent}")
    try:
        saved = [] if diff is None else report.load(diff)
        is_chosen = everything or any(option is not None for option in (optimizer, storage, target, gpu, grad_dtype))
        if saved and not is_chosen:
            selection = report.Selection([step.rows[0].case for step in report.steps_of(saved)], {})
        else:
            selection = report.select_cases(optimizer, storage, target, gpu, grad_dtype, everything, views)
        if saved:
            selection = report.in_both(selection, saved)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    try:
        records = report.inspect_cases(selection.cases)
        shown = with_progress(records, "compiling", len(selection.cases), not as_json)
        rows = [row for of_case in shown for row in of_case]
    except RuntimeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    changes = report.compare(saved, rows)
    if save is not None:
        save.write_text(report.dump(rows), encoding="utf-8")
    if as_json:
        typer.echo(report.dump(rows), nl=False)
    elif diff is not None:
        _print_changes(changes, len(selection.cases), diff)
    else:
        _print_rows(rows)
        if peer or peer_kernels:
            _print_peers([*report.inspect_peers()] if peer_kernels else [])
        for label, reason in selection.refused.items() if storage else ():
            console().print(f"{label}: {reason}", soft_wrap=True)
    raise typer.Exit(1 if any(change.is_worse for change in changes) else 0)


def _print_rows(rows: Sequence[report.LaunchRecord]) -> None:
    terminal = console()
    steps = report.steps_of(rows)
    for gpu in dict.fromkeys(row.gpu for row in rows):
        _print_table(terminal, [step for step in steps if step.rows[0].gpu == gpu])
    terminal.print(_EXPLANATION)
    for step in steps:
        if not step.moves_what_it_must:
            first = step.rows[0]
            loaded, stored = step.total("bytes_loaded"), step.total("bytes_stored")
            terminal.print(
                f"{first.case.label}, {first.target}: the code loads {loaded:g} and stores {stored:g} bytes per "
                f"parameter, where {first.step_read:g} and {first.step_written:g} must move",
                soft_wrap=True,
            )


def _print_table(terminal: Console, steps: Sequence[report.Step]) -> None:
    gpu = find_gpu(steps[0].rows[0].gpu)
    title = f"{gpu.target}, Triton {steps[0].rows[0].triton}; time on {gpu.name}, {gpu.bandwidth / 1e12:g} TB/s"
    ranks = {"regs": 4, "shared": 8, "loads": 6, "stores": 5, "bytes": 1, "instr": 3, "ALU": 9, "XU": 9, "waits": 4}
    ranks |= {"progs": 7, "KB": 9, "ms": 0}
    if any(row.spilled_bytes for step in steps for row in step.rows):
        ranks["regs"] = 0  # which say it
    columns = [Column("step"), Column("kernel"), *(Column(name, rank, "right") for name, rank in ranks.items())]
    lines = [line for step in steps for line in _lines(step)]
    print_table(terminal, [*columns, Column("bound", 2)], lines, title=title)


def _lines(step: report.Step) -> Iterator[Line]:
    case = step.rows[0].case
    # The first argument says which variant it is: the others are those of a test.
    arguments = [f"{key}={value!r}" for key, value in case.arguments.items()]
    written = f"({arguments[0]}{', ...' if arguments[1:] else ''})" if arguments else ""
    name = f"{case.optimizer}{written} {case.storage}{' views' if case.views else ''}"
    if case.grad_dtype:
        name += f", {case.grad_dtype} gradients"
    for row in step.rows:
        if not row.elements and not row.spilled_bytes:
            continue  # --json has it
        spilled = f"\n{row.spilled_bytes} spilled" if row.spilled_bytes else ""
        cells = (
            name,
            row.kernel.removeprefix("multi_tensor_"),
            f"{row.registers}{spilled}",
            str(row.shared_bytes),
            report.widths(row.loads),
            report.widths(row.stores),
            _bytes(row),
            _number(row.instructions if ARCHITECTURES[row.target].issues_all else row.arithmetic),
            _number(row.alu),
            _number(row.xu),
            "" if row.waits is None else f"{row.waits:g}",
            str(row.programs),
            "" if row.in_flight is None else f"{row.in_flight / 1000:.0f}",
            _number(row.milliseconds, 2),
            row.bound or "",
        )
        yield Line(cells)
        name = ""
    if len(step.hot) > 1:
        total = f"{step.total('bytes_loaded') + step.total('bytes_stored'):g}"
        must = step.rows[0].step_read + step.rows[0].step_written
        issues_all = ARCHITECTURES[step.rows[0].target].issues_all
        cells = (
            *("", "all", "", "", "", ""),
            total if step.moves_what_it_must else f"{total}, must {must:g}",
            _number(step.total("instructions" if issues_all else "arithmetic")),
            _number(step.total("alu")),
            _number(step.total("xu")),
            *("", "", ""),
            _number(step.total("milliseconds"), 2),
            "",
        )
        yield Line(cells)


def _print_peers(compiled: Sequence[report.PeerKernel | report.Skipped]) -> None:
    terminal = console()
    ranks = {"stored": 3, "regs": 4, "threads": 6, "progs": 5, "loads": 6, "bytes": 1, "instr": 0, "KB": 7}
    ranks |= {"waits": 4, "ms": 2} if compiled else {}
    columns = [
        Column("kernel"),
        *(Column(name, rank, "right" if name not in ("stored", "loads") else "left") for name, rank in ranks.items()),
    ]
    kernels = [*report.PEERS, *(kernel for kernel in compiled if isinstance(kernel, report.PeerKernel))]
    caption = "read off machine code in November 2026, not run; see tritopt/tools/inspect/peers.py"
    if compiled:
        columns.append(Column("bound", 2))
        caption += ". With a version: compiled now."
    lines = [Line(_peer_cells(kernel)[: len(columns)]) for kernel in kernels]
    print_table(terminal, columns, lines, title="peers' AdamW, sm_90", caption=caption)
    for skipped in compiled:
        if isinstance(skipped, report.Skipped):
            terminal.print(f"{skipped.kernel}: skipped: {skipped.reason}", soft_wrap=True)


def _peer_cells(kernel: report.PeerKernel) -> list[str]:
    spilled = f"\n{kernel.spilled_bytes} spilled" if kernel.spilled_bytes else ""
    return [
        kernel.kernel,
        kernel.stored,
        f"{kernel.registers}{spilled}",
        str(kernel.threads),
        str(kernel.programs),
        kernel.loads,
        f"{kernel.bytes_moved:g}",
        f"{kernel.instructions:.4g}",
        f"{kernel.in_flight:.0f}",
        "" if kernel.waits is None else f"{kernel.waits:g}",
        _number(kernel.milliseconds, 2),
        kernel.bound,
    ]


def _bytes(row: report.LaunchRecord) -> str:
    if row.bytes_loaded is None or row.bytes_stored is None:
        return ""
    moved = (row.bytes_loaded, row.bytes_stored)
    text = f"{sum(moved):g}"
    if row.must_load is None or row.must_store is None or moved == (row.must_load, row.must_store):
        return text
    return f"{text}, must {row.must_load + row.must_store:g}"


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _print_changes(changes: Sequence[report.Change], n_cases: int, file: Path) -> None:
    terminal = console()
    if not changes:
        terminal.print(f"{n_cases} steps: all as in {file}", soft_wrap=True)
        return
    lines = []
    for change in changes:
        verdict = "worse" if change.is_worse else "better" if change.is_better else ""
        style = {"worse": "red", "better": "green"}.get(verdict, "")
        target = find_gpu(change.case.gpu).target
        values = [f"{value:g}" if isinstance(value, float) else str(value) for value in (change.saved, change.now)]
        lines.append(Line([change.case.label, target, change.kernel, change.column, *values, verdict], style))
    titles = ("step", "target", "kernel", "column", "saved", "now", "")
    print_table(terminal, [Column(title, 2 * (title == "target")) for title in titles], lines)
    n_worse = sum(change.is_worse for change in changes)
    terminal.print(f"{n_cases} steps: {len(changes)} changes, {n_worse} of them worse")
