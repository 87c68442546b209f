"""A process that checks cases for another: it reads their places from standard input, and writes a line for each."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import NamedTuple

import torch

from tritopt.tools.check.cases import MEASURED, Case, CheckResult, find_cases
from tritopt.tools.check.run import N_STEPS, check_case
from tritopt.tools.interpreter import speed_up
from tritopt.tools.optimizers import find_optimizers, registered

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
"""Compute capabilities of the GPUs that the PTX machine stands in for, by the compiler's names."""
READY = "ready"


class Selection(NamedTuple):
    """The cases of one call of the command, in words that reach another process."""

    names: Sequence[str]
    """Optimizers as users name them, which each process looks up for itself; none: all that are registered."""
    quick: bool = False
    """Whether there are fewer cases of fewer steps."""
    formats: Sequence[str] = ()
    """Storage formats, keys of CHECKED; none: all."""
    target: str | None = None
    """Key of TARGETS, if kernels are compiled for it and run in the PTX machine; None: they run as they are here."""

    def cases(self) -> list[Case]:
        """Find the cases; ValueError or TypeError for a name that leads to none."""
        classes = find_optimizers(self.names) if self.names else registered()
        return find_cases(classes, self.quick, self.formats)

    def check(self, case: Case) -> CheckResult:
        """Check one of them in this process."""
        return check_case(case, N_STEPS[self.quick])


def main() -> None:
    """Check what is asked for until standard input closes; `tritopt.tools.check.processes` says how this starts."""
    # What an optimizer prints must not stand between results.
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    selection = Selection(*json.loads(sys.argv[2]))
    _prepare(selection.target)
    cases = selection.cases()
    try:
        print(READY, file=results, flush=True)
        for place in _asked():
            result = selection.check(cases[place])
            measured = {name: getattr(result, name) for name in MEASURED}
            print(json.dumps(measured), file=results, flush=True)
    except BrokenPipeError:
        os._exit(1)


def _asked() -> Iterator[int]:
    """Yield the places as they arrive. The process ends when whoever asked has closed the pipe, or is gone."""
    places: SimpleQueue[int] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            places.put(int(line))
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        yield places.get()


def _prepare(target: str | None) -> None:
    torch.set_num_threads(1)
    if target is not None:
        from tritopt.tools.ptx.driver import switch_on

        switch_on(TARGETS[target])
    else:
        # Tapes are millions of objects that stay: to go through them takes the garbage collector a tenth of the time.
        gc.freeze()
        gc.set_threshold(10_000)
    speed_up()
