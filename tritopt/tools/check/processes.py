"""Checks in several processes, since an interpreted kernel takes one core; and in the PTX machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from typing import IO, NamedTuple

import torch

from tritopt.tools.check.cases import Case, CheckResult, find_cases, unchecked
from tritopt.tools.check.run import N_STEPS, check_case
from tritopt.tools.environment import device
from tritopt.tools.interpreter import speed_up
from tritopt.tools.optimizers import find_optimizers, registered

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
"""Compute capabilities of the GPUs that the PTX machine stands in for, by the compiler's names."""
MANY = 64
"""Number of cases from which on processes are worth their start, two seconds each."""
MAX_PROCESSES = 16
"""Limit of processes, each of which has half a gigabyte of libraries in memory."""


class Part(NamedTuple):
    """The share of one process: every `n`-th case, beginning with case `first`."""

    names: list[str]
    """Optimizers as users name them, which each process looks up for itself; none: all that are registered."""
    quick: bool
    target: str | None
    """Key of TARGETS, if kernels run in the PTX machine; None: as they are here."""
    first: int
    n: int

    def cases(self) -> list[Case]:
        """Return all cases, those of other processes too."""
        return find_cases(find_optimizers(self.names) if self.names else registered(), self.quick)

    def results(self) -> Iterator[CheckResult]:
        """Check this share of the cases."""
        speed_up()
        for case in self.cases()[self.first :: self.n]:
            yield check_case(case, N_STEPS[self.quick])


def run_cases(names: Sequence[str], quick: bool, target: str | None = None) -> Iterator[CheckResult]:
    """Check the cases, and yield each result in order; processes share many of them, if kernels run on the CPU.

    Args:
        names: optimizers as `tritopt.tools.optimizers.find_optimizers` takes them; none: all that are registered.
        quick: whether there are fewer cases of fewer steps.
        target: a key of TARGETS, to compile kernels for it and run them in the PTX machine; None: as they are here.
    """
    whole = Part(list(names), quick, target, 0, 1)
    chosen = whole.cases()
    is_shared = len(chosen) >= MANY and (target is not None or device().type == "cpu")
    n = min(_n_cores(), MAX_PROCESSES) if is_shared else 1
    if target is None and n == 1:
        yield from whole.results()
        return
    processes = [_start(whole._replace(first=i, n=n)) for i in range(n)]
    try:
        for i, case in enumerate(chosen):
            yield _next_result(processes[i % n], case)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _n_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(part: Part) -> subprocess.Popen[str]:
    """Start a process that writes a line of JSON for each result; when nobody reads any more, it ends."""
    command = [sys.executable, "-m", "tritopt.tools.check.processes", json.dumps(part)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _next_result(process: subprocess.Popen[str], case: Case) -> CheckResult:
    assert process.stdout is not None
    result, line = unchecked(case), process.stdout.readline()
    if not line:
        result.fail(f"the process that was to check it ended with exit code {process.wait()}")
        return result
    record = json.loads(line)
    # Only this process has them as they were given: JSON has no tuples.
    kept = {"arguments": result.arguments, "variant": result.variant}
    return CheckResult(**{field.name: record[field.name] for field in fields(CheckResult)} | kept)


def _write_results(part: Part, out: IO[str]) -> None:
    torch.set_num_threads(1)
    if part.target is not None:
        from tritopt.tools.ptx.driver import switch_on

        switch_on(TARGETS[part.target])
    for result in part.results():
        out.write(json.dumps(asdict(result), default=str) + "\n")
        out.flush()


if __name__ == "__main__":
    # What an optimizer prints must not stand between results.
    results, sys.stdout = sys.stdout, sys.stderr
    try:
        _write_results(Part(*json.loads(sys.argv[1])), results)
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(1)
