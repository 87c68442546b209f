"""`pytest -p tests.ptx.plugin`: any tests, with their kernels in the PTX machine.

TRITOPT_PTX=80, 90 or 100 is what they are compiled for; 90 if nothing is said. TRITOPT_PTX_WARPS=7 runs the
warps of each program one after the other, in an order drawn with seed 7.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tritopt.tools.ptx.driver import Record

_records: list[Record] = []


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Say what tests/conftest.py looks for, before it is imported."""
    os.environ.setdefault("TRITOPT_PTX", "90")


def pytest_configure() -> None:
    """Switch the machine on before any test is imported. It is on until the process ends."""
    from tritopt.tools.ptx.driver import switch_on

    record = switch_on(int(os.environ["TRITOPT_PTX"]))
    seed = os.environ.get("TRITOPT_PTX_WARPS")
    record.warp_seed = None if seed is None else int(seed)
    _records.append(record)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what ran, of this process."""
    for record in _records:
        launches = sum(record.launches.values())
        terminalreporter.write_line(
            f"PTX machine, sm_{os.environ['TRITOPT_PTX']}: {launches} launches of {record.n_binaries} binaries, "
            f"{record.seconds:.1f} s, {len(record.faults)} faults"
        )
        for fault in record.faults:
            terminalreporter.write_line(f"  {fault}")
