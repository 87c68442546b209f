"""`tritopt inspect` for AMD: what it counts in some kernels for gfx942 is what is committed. Nothing here runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tritopt.tools import inspect as report
from tritopt.tools.inspect import Case, LaunchRecord, compare, inspect_cases, steps_of

pytestmark = pytest.mark.xdist_group("compiles")

COUNTS = Path(__file__).parents[1] / "data" / "counts_gfx942.json"
SAVED = report.load(COUNTS)
CASES = [step.rows[0].case for step in steps_of(SAVED)]
"""AdamW in the main formats, and one optimizer of each other kind of launch: all of them take half a minute."""
REFRESH = f"if that is meant: tritopt inspect --diff tests/data/{COUNTS.name} --save tests/data/{COUNTS.name}"
WHAT_IS_ASKED = ("launches", "spilled_bytes", "bytes_loaded", "bytes_stored", "elements", "loads", "stores")
"""Columns in which Triton 3.6 and 3.9 agree. Instructions differ by a third: 3.6 takes a shorter root."""


@pytest.fixture(scope="module")
def rows() -> list[LaunchRecord]:
    """The committed cases, and one for gfx950, compiled afresh."""
    pytest.importorskip("triton")
    newer = Case("adamw", {}, "split8+fp8", None, "MI355X")
    return [row for records in inspect_cases([*CASES, newer], 1) for row in records]


def test_the_compiled_code_is_as_committed(rows: list[LaunchRecord]) -> None:
    is_same = rows[0].triton == SAVED[0].triton
    changes = [change for change in compare(SAVED, rows) if is_same or change.column in WHAT_IS_ASKED]
    lines = [
        f"{change.case.label} {change.kernel}: {change.column} {change.saved} -> {change.now}" for change in changes
    ]
    assert not lines, "\n".join(["the compiled code has changed;", REFRESH, *lines])


def test_nothing_spills_and_every_step_moves_what_it_must(rows: list[LaunchRecord]) -> None:
    assert {row.target for row in rows} == {"gfx942", "gfx950"}
    for step in steps_of(rows):
        assert step.hot
        assert step.moves_what_it_must, step.rows[0].case
        assert step.total("spilled_bytes") == 0, step.rows[0].case


def test_whole_blocks_are_moved_by_wide_accesses() -> None:
    """Only scales, one for 64 elements, and sums of rows are narrower than a thread's elements."""
    for row in SAVED:
        for accesses in (row.loads or {}, row.stores or {}):
            narrow = {bits for bits in accesses if row.elements and int(bits) < 8 * row.elements}
            assert narrow <= ({"16"} if "+" in row.storage else {"32"} if "factored" in row.kernel else set())


def test_a_thread_waits_once() -> None:
    assert {row.waits for row in SAVED if (row.waits or 0) > 1} == set()
