"""Changes since a saved run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tritopt.tools.inspect.record import Case, LaunchRecord, steps_of, widths


class Change(NamedTuple):
    """Difference between a saved run and one of now."""

    case: Case
    kernel: str
    column: str
    saved: Any
    now: Any
    is_worse: bool
    is_better: bool = False


_LESS_IS_BETTER = (
    "spilled_bytes",
    "bytes_loaded",
    "bytes_stored",
    "instructions",
    "waits",
    "alu",
    "xu",
    "milliseconds",
)
_MORE_IS_BETTER = ("programs",)
_OF_INTEREST = (
    "registers",
    "shared_bytes",
    "num_warps",
    "elements",
    "arithmetic",
    "in_flight",
    "bound",
    "kernel",
    "triton",
)


def compare(saved: Sequence[LaunchRecord], rows: Sequence[LaunchRecord]) -> list[Change]:
    """List what changed for the cases that both have; worse is what costs time.

    That is more spilled bytes, bytes, instructions, waits for memory, time, accesses for the same bytes, launches, or
    fewer resident programs. Registers as such cost nothing.
    """
    changes = []
    before = {step.rows[0].case.compiled_as: step for step in steps_of(saved)}
    for step in steps_of(rows):
        case = step.rows[0].case
        old = before.get(case.compiled_as)
        if old is None:
            continue
        if len(old.rows) != len(step.rows):
            counts = len(old.rows), len(step.rows)
            changes.append(Change(case, "", "launches", *counts, counts[1] > counts[0], counts[1] < counts[0]))
        for a, b in zip(old.rows, step.rows, strict=False):
            changes.extend(_changes(a, b))
    return changes


def _changes(a: LaunchRecord, b: LaunchRecord) -> Iterator[Change]:
    for column in (*_LESS_IS_BETTER, *_MORE_IS_BETTER, *_OF_INTEREST):
        old, new = getattr(a, column), getattr(b, column)
        is_of_gpu = column in ("milliseconds", "bound")
        if old == new or (is_of_gpu and a.gpu != b.gpu):
            continue
        sign = (column in _LESS_IS_BETTER) - (column in _MORE_IS_BETTER)
        # A hot loop that is no longer found is no improvement.
        growth = sign * ((math.inf if new is None else new) - (math.inf if old is None else old)) if sign else 0
        yield Change(b.case, b.kernel, column, old, new, growth > 0, growth < 0)
    for column in ("loads", "stores"):
        old, new = getattr(a, column) or {}, getattr(b, column) or {}
        if old != new:
            growth = sum(new.values()) - sum(old.values())
            yield Change(b.case, b.kernel, column, widths(old), widths(new), growth > 0, growth < 0)
