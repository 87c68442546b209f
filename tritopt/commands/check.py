"""The command `tritopt check`: its options, and how it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Annotated

import typer

from tritopt.commands.check_report import Report
from tritopt.commands.console import AsJson, Targets, console, where, with_progress
from tritopt.kernels.language import HAS_TRITON, INSTALL_TRITON, INTERPRETED
from tritopt.tools.check import Case, CheckResult
from tritopt.tools.check.processes import interprets, n_processes, run_cases
from tritopt.tools.check.worker import TARGETS, Selection
from tritopt.tools.environment import environment
from tritopt.tools.optimizers import find_optimizers


def check(
    target: Targets = None,
    optimizer: Annotated[list[str] | None, typer.Option(metavar="NAME", help="The same; may be repeated.")] = None,
    storage: Annotated[
        list[str] | None,
        typer.Option("--format", metavar="NAME", help="Only this storage, such as split8+int8; may be repeated."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer combinations, fewer steps.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Compile kernels and run their PTX on the CPU; needs no GPU.")
    ] = False,
    compile_for: Annotated[
        str | None, typer.Option("--target", metavar="ARCH", help=f"With --compiled: {', '.join(TARGETS)}.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Most processes; by default one a core. No use on a GPU.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="All numbers, a line for each kind of weights.")
    ] = False,
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
    names = [*(target or ()), *(optimizer or ())]
    selection = Selection(names, quick, storage or (), compile_for)
    try:
        cases = selection.cases()
        names_of = {cls.__name__.lower(): name for name in names for cls in find_optimizers([name])}
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    machine = environment(compile_for, interpreted=compile_for is None and interprets())
    n = n_processes(selection, len(cases), jobs)
    terminal = console()
    if not as_json:
        terminal.print(where(machine), soft_wrap=True)
        terminal.print(f"{len(cases)} cases{f', shared by {n} processes' if n > 1 else ''}")
    rows = _results(selection, cases, n, shows_progress=not as_json)
    passed = all(row.passed for row in rows)
    if as_json:
        typer.echo(
            json.dumps({**machine, "quick": quick, "passed": passed, "rows": [asdict(row) for row in rows]}, indent=2)
        )
    else:
        report = Report(cases, rows, names_of, selection)
        report.print(terminal, verbose, explains_skipped=not machine["fused_unavailable"])
    raise typer.Exit(0 if passed else 1)


def _results(selection: Selection, cases: Sequence[Case], n: int, shows_progress: bool) -> list[CheckResult]:
    rows: list[CheckResult] = []
    try:
        with closing(run_cases(selection, cases, n)) as results:
            rows.extend(with_progress(results, "checking", len(cases), shows_progress))
    except KeyboardInterrupt:
        failed = sum(not row.passed for row in rows)
        typer.echo(f"interrupted: {len(rows)} of {len(cases)} cases were checked, {failed} failed", err=True)
        raise typer.Exit(130) from None
    except RuntimeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    return rows


def _check_compiles(target: str) -> None:
    if target not in TARGETS:
        raise typer.BadParameter(f"--target {target} must be one of {', '.join(TARGETS)}")
    if not HAS_TRITON:
        raise typer.BadParameter(f"--compiled needs {INSTALL_TRITON}")
    if INTERPRETED:
        raise typer.BadParameter("--compiled runs what Triton compiles, but TRITON_INTERPRET=1: unset it")
