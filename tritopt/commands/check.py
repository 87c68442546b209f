"""The command `tritopt check`: its options, and how it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from tritopt.commands.console import (
    AsJson,
    Column,
    Line,
    Targets,
    call,
    console,
    interpret_without_gpu,
    print_table,
    where,
    with_progress,
)
from tritopt.kernels.formats.weights import MASTERS
from tritopt.kernels.language import HAS_TRITON, INSTALL_TRITON, INTERPRETED
from tritopt.tools.check import CheckResult, find_cases
from tritopt.tools.check.processes import TARGETS, run_cases
from tritopt.tools.environment import environment
from tritopt.tools.optimizers import find_optimizers, registered

MAX_FAILURES = 20


def check(
    target: Targets = None,
    optimizer: Annotated[list[str] | None, typer.Option(metavar="NAME", help="The same; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer combinations, fewer steps.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Compile kernels and run their PTX on the CPU; needs no GPU.")
    ] = False,
    compile_for: Annotated[
        str | None, typer.Option("--target", metavar="ARCH", help=f"With --compiled: {', '.join(TARGETS)}.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check optimizers on this machine: fused against reference, both against a float64 truth.

    Exits with 1 if a check fails. Without a GPU the kernels run in Triton's interpreter, or, with --compiled, as the
    code that a GPU would get, which shows what the interpreter hides: layouts, masks, rounding, alignment, races.
    """
    if compiled:
        compile_for = compile_for or "sm_90"
        _check_compiles(compile_for)
    elif compile_for is not None:
        raise typer.BadParameter(f"--target {compile_for} needs --compiled")
    else:
        interpret_without_gpu()
    try:
        named = [*(target or ()), *(optimizer or ())]
        classes = find_optimizers(named) if named else registered()
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    machine = environment(compile_for)
    terminal = console()
    if not as_json:
        terminal.print(where(machine), soft_wrap=True)
    rows = list(
        with_progress(run_cases(named, quick, compile_for), "checking", len(find_cases(classes, quick)), not as_json)
    )
    passed = _all_passed(rows)
    if as_json:
        typer.echo(
            json.dumps({**machine, "quick": quick, "passed": passed, "rows": [asdict(row) for row in rows]}, indent=2)
        )
    else:
        _print_summary(terminal, rows)
        for note in [] if machine["fused_unavailable"] else _notes(rows):
            terminal.print(note)
        _print_failures(terminal, [row for row in rows if not row.passed], len(rows))
    raise typer.Exit(0 if passed else 1)


def _check_compiles(target: str) -> None:
    if target not in TARGETS:
        raise typer.BadParameter(f"--target {target} must be one of {', '.join(TARGETS)}")
    if not HAS_TRITON:
        raise typer.BadParameter(f"--compiled needs {INSTALL_TRITON}")
    if INTERPRETED:
        raise typer.BadParameter("--compiled runs what Triton compiles, but TRITON_INTERPRET=1: unset it")


def _print_summary(terminal: Console, rows: Sequence[CheckResult]) -> None:
    """The worst of each optimizer and kind of weights."""
    ranks = {"cases": 4, "fused - reference": 0, "fused - truth": 2, "reference - truth": 3, "states": 1}
    columns = [Column(name, rank, "right") for name, rank in ranks.items()]
    lines = []
    groups: dict[tuple[str, str], list[CheckResult]] = {}
    for row in rows:
        groups.setdefault((row.optimizer, _weights(row)), []).append(row)
    for key, members in groups.items():
        numbers = ("fused_vs_reference", "fused_vs_truth", "reference_vs_truth", "states")
        worst = [_worst([getattr(row, number) for row in members]) for number in numbers]
        cells = [*key, str(len(members)), *worst, _verdict(members)]
        lines.append(Line(cells, "" if _all_passed(members) else "red"))
    print_table(
        terminal,
        [Column("optimizer"), Column("weights"), *columns, Column("")],
        lines,
        caption="largest error in ulp of the weights' dtype; of states and masters, in ulp of their own",
    )


def _verdict(rows: Sequence[CheckResult]) -> str:
    return "ok" if _all_passed(rows) else f"{sum(not row.passed for row in rows)} FAILED"


def _notes(rows: Sequence[CheckResult]) -> list[str]:
    """Reasons why kernels of rows that passed were not compared."""
    return sorted({f"{row.optimizer}: {row.reason}" for row in rows if row.passed and row.reason})


def _all_passed(rows: Sequence[CheckResult]) -> bool:
    return all(row.passed for row in rows)


def _worst(errors: Sequence[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{max(known):.3g}" if known else "-"


def _weights(row: CheckResult) -> str:
    master = f" + {MASTERS[row.master].name}" if row.master else ""
    return row.weight_dtype + master + (f", {row.state_dtype} states" if row.state_dtype else "")


def _print_failures(terminal: Console, failures: Sequence[CheckResult], n_cases: int) -> None:
    for row in failures[:MAX_FAILURES]:
        made = call("tritopt.create", {"": row.optimizer, **row.arguments})
        stored = f"weights {_weights(row)}, gradients {row.grad_dtype}"
        terminal.print(f"\n{made}, {stored}:\n  {row.reason}", soft_wrap=True)
    if len(failures) > MAX_FAILURES:
        terminal.print(f"\nand {len(failures) - MAX_FAILURES} more, which --json lists")
    terminal.print(f"\n{len(failures)} of {n_cases} checks failed" if failures else f"all {n_cases} checks passed")
