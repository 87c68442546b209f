"""Printed outcome of `tritopt check`: a matrix of optimizers and storage formats, and what failed in it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from tritopt.commands.console import Column, Line, call, print_table
from tritopt.kernels.formats.weights import MASTERS
from tritopt.tools.check import Case, CheckResult
from tritopt.tools.check.cases import CHECKED
from tritopt.tools.check.worker import Selection

MAX_FAILURES = 20
"""Number of cells of the matrix that are explained."""
LONGEST_WORD = 7
"""Number of letters above which a word above a column is broken in two."""
OF_WEIGHTS = ("fused_vs_reference", "fused_vs_truth", "reference_vs_truth")
EXPLANATION = """\
Number: largest error of a weight, fused against reference and both against a float64 truth, in ulp of the weights' \
dtype. Columns: fp32, fp64 and fp16 weights; none and the rest up to stochastic are bf16 weights, with what is kept \
beside them; a plus stands before how states are stored. -: does not go together. --verbose shows all numbers."""


@dataclass
class Cell:
    """Results of one optimizer in one storage format."""

    rows: list[CheckResult] = field(default_factory=list)

    @property
    def failed(self) -> list[CheckResult]:
        """Results that did not pass."""
        return [row for row in self.rows if not row.passed]

    def text(self, passes: str, fails: str) -> str:
        """Write the largest error of a weight, and whether all passed."""
        error = _largest([getattr(row, number) for row in self.rows for number in OF_WEIGHTS])
        return f"{'' if error is None else _short(error)}{fails if self.failed else passes}".strip()


class Report:
    """Results of a call of the command, in words."""

    def __init__(
        self, cases: Sequence[Case], rows: Sequence[CheckResult], names: Mapping[str, str], selection: Selection
    ) -> None:
        """Sort the results of these cases into cells; `names` has the user's own names of optimizers, where given."""
        self._rows, self._names, self._selection = rows, names, selection
        self._cells: dict[tuple[str, str], Cell] = {}
        for case, row in zip(cases, rows, strict=True):
            self._cells.setdefault((row.optimizer, case.storage), Cell()).rows.append(row)

    def print(self, terminal: Console, verbose: bool, explains_skipped: bool) -> None:
        """Print the matrix (or with `verbose` the long table), what was not compared and why, and what failed."""
        if verbose:
            _print_table(terminal, self._rows)
        else:
            for line in self._matrix(terminal):
                terminal.print(line, no_wrap=True, crop=False)
            terminal.print(f"\n{EXPLANATION}")
        if explains_skipped:
            for note in sorted({f"{row.optimizer}: {row.reason}" for row in self._rows if row.passed and row.reason}):
                terminal.print(note)
        failures = [(key, cell) for key, cell in self._cells.items() if cell.failed]
        for (optimizer, storage), cell in failures[:MAX_FAILURES]:
            self._explain(terminal, optimizer, storage, cell, verbose)
        if len(failures) > MAX_FAILURES:
            terminal.print(f"\nand {len(failures) - MAX_FAILURES} more cells, which --json lists")
        n_failed = sum(len(cell.failed) for _, cell in failures)
        n = len(self._rows)
        terminal.print(f"\n{n_failed} of {n} checks failed" if n_failed else f"all {n} checks passed")

    def _matrix(self, terminal: Console) -> Iterator[Text]:
        """Yield the matrix line by line, in as many blocks of columns as the width takes."""
        is_plain = not terminal.is_terminal or not terminal.encoding.startswith("utf")
        marks, rule = ((" ok", " FAILED"), "-") if is_plain else (("✓", "✗"), "─")
        optimizers = list(dict.fromkeys(optimizer for optimizer, _ in self._cells))
        texts = {key: cell.text(*marks) for key, cell in self._cells.items()}
        columns = [name for name in CHECKED if any(storage == name for _, storage in texts)]
        words = {name: _words(name) for name in columns}
        widths = {
            name: max(len(text) for text in (*words[name], *(texts.get((key, name), "-") for key in optimizers)))
            for name in columns
        }
        first = max(map(len, ("optimizer", *optimizers)))
        for block in _blocks(columns, widths, terminal.width - first):
            height = max(len(words[name]) for name in block)
            titles = {name: [""] * (height - len(words[name])) + words[name] for name in block}
            yield Text()
            for i in range(height):
                start = ("optimizer" if i == height - 1 else "").ljust(first)
                yield Text(" ".join([start, *(titles[name][i].rjust(widths[name]) for name in block)]), "bold")
            yield Text(rule * (first + sum(widths[name] + 1 for name in block)))
            for optimizer in optimizers:
                line = Text(optimizer.ljust(first))
                for name in block:
                    cell = self._cells.get((optimizer, name))
                    style = "" if cell is None else "bold red" if cell.failed else "green"
                    line.append(" " + texts.get((optimizer, name), "-").rjust(widths[name]), style)
                yield line

    def _explain(self, terminal: Console, optimizer: str, storage: str, cell: Cell, verbose: bool) -> None:
        failed = cell.failed
        terminal.print(f"\n{optimizer}, {storage}: {len(failed)} of {len(cell.rows)} FAILED", style="bold red")
        for row in failed if verbose else failed[:1]:
            made = call("tritopt.create", {"": row.optimizer, **row.arguments})
            stored = f"weights {_weights(row)}, gradients {row.grad_dtype}"
            terminal.print(f"{made}, {stored}:\n  {row.reason}", soft_wrap=True)
        _, quick, _, target = self._selection
        options = " --quick" * quick + (f" --compiled --target {target}" if target else "")
        name = self._names.get(optimizer, optimizer)
        terminal.print(f"  to run these alone: tritopt check {name} --format {storage}{options}", soft_wrap=True)


def _words(name: str) -> list[str]:
    """Break the name of a storage format into lines of a column's title."""
    words = []
    for word in re.findall(r"\+?[^+-]+-?", name):
        half = len(word) // 2
        words += [f"{word[:half]}-", word[half:]] if len(word) > LONGEST_WORD else [word]
    return words


def _blocks(columns: Sequence[str], widths: Mapping[str, int], room: int) -> list[list[str]]:
    """Share the columns among as few blocks as there is room for side by side, of about one length."""
    for n in range(1, len(columns) + 1):
        size = math.ceil(len(columns) / n)
        blocks = [list(columns[i : i + size]) for i in range(0, len(columns), size)]
        if all(sum(widths[name] + 1 for name in block) <= room for block in blocks):
            return blocks
    return [[name] for name in columns]


def _short(error: float) -> str:
    """Write an error in at most four letters, but for the absurd."""
    if error < 10:
        return f"{error:.1f}"
    return f"{error:.0f}" if error < 1000 else f"{error:.0e}".replace("e+0", "e").replace("e+", "e")


def _print_table(terminal: Console, rows: Sequence[CheckResult]) -> None:
    """Print the worst of each optimizer and kind of weights."""
    ranks = {"cases": 4, "fused - reference": 0, "fused - truth": 2, "reference - truth": 3, "states": 1}
    columns = [Column(name, rank, "right") for name, rank in ranks.items()]
    lines = []
    groups: dict[tuple[str, str], list[CheckResult]] = {}
    for row in rows:
        groups.setdefault((row.optimizer, _weights(row)), []).append(row)
    for key, members in groups.items():
        numbers = (*OF_WEIGHTS, "states")
        worst = [_largest([getattr(row, number) for row in members]) for number in numbers]
        n_failed = sum(not row.passed for row in members)
        verdict = f"{n_failed} FAILED" if n_failed else "ok"
        cells = [*key, str(len(members)), *("-" if error is None else f"{error:.3g}" for error in worst), verdict]
        lines.append(Line(cells, "red" if n_failed else ""))
    print_table(
        terminal,
        [Column("optimizer"), Column("weights"), *columns, Column("")],
        lines,
        caption="largest error in ulp of the weights' dtype; of states and masters, in ulp of their own",
    )


def _largest(errors: Sequence[float | None]) -> float | None:
    return max((error for error in errors if error is not None), default=None)


def _weights(row: CheckResult) -> str:
    master = f" + {MASTERS[row.master].name}" if row.master else ""
    return row.weight_dtype + master + (f", {row.state_dtype} states" if row.state_dtype else "")
