"""Checks in several processes, since an interpreted kernel takes one core; and in the PTX machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import repeat

import torch

from tritopt.check import N_STEPS, Case, Row, check_case, device

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
"""Compute capabilities of the GPUs that the PTX machine stands in for, by the compiler's names."""
MANY = 64
"""Number of cases from which on processes are worth their start, two seconds each."""
MAX_PROCESSES = 16
"""Limit of processes, each of which has half a gigabyte of libraries in memory."""


def run_cases(cases: Sequence[Case], quick: bool, target: str | None = None) -> Iterator[Row]:
    """A row for each case, in order, as soon as it is known; on the CPU by a process for each core, if there are many.

    Args:
        cases: what to check; their classes are imported again by other processes.
        quick: whether each takes fewer steps.
        target: a key of TARGETS, to compile kernels for it and run them in the PTX machine; None: as they are here.
    """
    is_many = len(cases) >= MANY and device().type == "cpu"
    if target is None and not is_many:
        yield from map(check_case, cases, repeat(N_STEPS[quick]))
        return
    n = min(len(cases), torch.get_num_threads(), MAX_PROCESSES) if is_many else 1
    with ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), _begin, (target,)) as pool:
        yield from pool.map(partial(check_case, n_steps=N_STEPS[quick]), cases)


def _begin(target: str | None) -> None:
    torch.set_num_threads(1)
    if target is not None:
        from tritopt.tools.ptx.driver import switch_on

        switch_on(TARGETS[target])
