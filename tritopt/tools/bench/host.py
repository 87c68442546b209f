"""Time that a step takes of the host: `tritopt bench --host`, which needs no GPU.

Kernels are replaced by nothing, so what is left is Python, dispatch and the tables; the reference on the CPU computes.
Contestants take turns, so that a busy machine is as busy for each, and a time is the median of theirs. In a turn's
first step the processor's caches hold what others left there, as they do in training after a backward pass; a few steps
on they are the contestant's own. So the first is told apart, the next few are not timed, and those after them are the
step "with all tables warm".
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from tritopt.kernels.language import HAS_TRITON, INSTALL_TRITON
from tritopt.tools.bench import peers
from tritopt.tools.bench.contestants import OURS, Case, Step, contestants
from tritopt.tools.bench.machine import commit, cpu_name, now
from tritopt.tools.environment import environment, fused_unavailable

WARM = 3
ROUNDS = 15
SETTLING = 10
"""Steps of a turn until the caches are the contestant's own."""
TURN = 20
"""Steps of a turn that are timed, after those."""

CASES = (
    *(Case(tensors, groups, clip) for tensors, groups in ((400, 1), (400, 400), (4000, 1)) for clip in (False, True)),
    Case(400, sets=4),
    Case(400, sets=400),
    Case(400, face="mxnet"),
    Case(400, face="gluon"),
    Case(100, fused=False, elements=10_000),
)


@dataclass
class HostTime:
    """Time that a step of one contestant takes of the host. None: not measured."""

    contestant: str
    tensors: int
    groups: int
    clip: bool
    sets: int
    face: str
    fused: bool
    elements: int
    title: str
    """These fields, of `Case`, in words."""
    replaced: str
    """Functions that were replaced by nothing, in words."""
    ms: float | None = None
    """Median of the steps of all rounds, milliseconds."""
    best_ms: float | None = None
    """Shortest of these steps, milliseconds."""
    cold_ms: float | None = None
    """Median of the turns' first steps, milliseconds."""
    ratio: float | None = None
    """Multiple that `ms` is of the baseline's for the same list; None also where that was not measured."""
    refused: str | None = None
    """Reason why it was not measured; None: it was."""


def host_times(
    cases: Sequence[Case] = CASES,
    rounds: int = ROUNDS,
    chosen_peers: Sequence[str] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[HostTime]:
    """Measure the host's time of a warm step of AdamW: of ours, torch's and whichever peers are installed.

    Args:
        cases: the lists.
        rounds: turns of each contestant; fewer for lists of thousands.
        chosen_peers: names as `bench --peer` has them; None: all.
        clock: tells the time in seconds.

    Raises:
        ValueError: an unknown peer, no rounds, or a list that a face cannot take. RuntimeError: no kernels of ours
        that could be left out.
    """
    return [row for case in cases for row in case_times(case, rounds, chosen_peers, clock)]


def case_times(
    case: Case,
    rounds: int = ROUNDS,
    chosen_peers: Sequence[str] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[HostTime]:
    """Take `host_times` of one list."""
    if rounds < 1:
        raise ValueError(f"rounds={rounds!r} must be at least 1")
    if not HAS_TRITON:
        raise RuntimeError(f"the host's part of a step needs {INSTALL_TRITON}")
    if reason := fused_unavailable():
        raise RuntimeError(reason)
    case.check()
    rivals = peers.find_peers(chosen_peers)
    rows, running = [], []
    for contestant in contestants(case, rivals):
        row = HostTime(contestant.name, *case, case.title, contestant.replaced)
        rows.append(row)
        try:
            with contestant.without_kernels():
                step = contestant.make(case)
                for _ in range(WARM):
                    step()
        except Exception as error:  # whatever a library comes up with: the others go on
            if contestant.name == OURS:
                raise
            row.refused = f"{type(error).__name__}: {error}".partition("\n")[0]
            continue
        running.append((row, step, contestant.without_kernels))
    times = interleaved(
        [(step, without) for _, step, without in running],
        max(min(rounds, 5), rounds // max(1, case.tensors // 1000)),
        clock,
    )
    for (row, *_), times_of in zip(running, times, strict=True):
        row.ms, row.best_ms = 1e3 * statistics.median(times_of.warm), 1e3 * min(times_of.warm)
        row.cold_ms = 1e3 * statistics.median(times_of.cold)
    baseline = next((row.ms for row in rows if row.contestant == case.baseline), None)
    for row in rows:
        if row.ms is not None and baseline:
            row.ratio = row.ms / baseline
    return rows


def document(rows: Sequence[HostTime]) -> dict[str, Any]:
    """Collect for JSON what the numbers belong to, and the rows."""
    machine = environment()
    return {
        "machine": {
            "cpu": cpu_name(),
            "date": now(),
            "platform": machine["machine"],
            "commit": commit(),
            **{name: machine[name] for name in ("device", "python", "torch", "triton", "tritopt", "walk")},
            "peers": peers.versions(),
        },
        "rows": [asdict(row) for row in rows],
    }


class Times(NamedTuple):
    """Times of single steps, in seconds."""

    cold: list[float]
    """First steps of turns."""
    warm: list[float]


def interleaved(
    steps: Sequence[tuple[Step, Callable[[], AbstractContextManager[Any]]]],
    rounds: int,
    clock: Callable[[], float],
) -> list[Times]:
    """Time each step in its context, in turns."""
    times = [Times([], []) for _ in steps]
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for (step, without_kernels), times_of in zip(steps, times, strict=True):
                with without_kernels():
                    times_of.cold.append(_timed(step, clock))
                    for _ in range(SETTLING - 1):
                        step()
                    times_of.warm.extend(_timed(step, clock) for _ in range(TURN))
    finally:
        if was_enabled:
            gc.enable()
    return times


def _timed(step: Step, clock: Callable[[], float]) -> float:
    step.prepare()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    step.run()
    return clock() - start
