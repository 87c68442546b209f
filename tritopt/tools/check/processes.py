"""Checks in several processes: an interpreted kernel takes one core, and Triton's interpreter knows no threads."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import torch

from tritopt.kernels.language import HAS_TRITON, INTERPRETED
from tritopt.tools import resources
from tritopt.tools.check.cases import Case, CheckResult, unchecked
from tritopt.tools.check.worker import READY, Selection
from tritopt.tools.environment import device
from tritopt.tools.interpreter import speed_up

START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from tritopt.tools.check.worker import main; main()"
"""Program of a worker, which finds modules where this process does."""
MANY = 64
"""Number of cases from which on processes are worth their start where this one could do without them."""


def interprets() -> bool:
    """Tell whether checks run in Triton's interpreter, because TRITON_INTERPRET=1 or for want of a GPU.

    The latter takes other processes: Triton looked at the variable when this one imported the kernels.
    """
    return INTERPRETED or (HAS_TRITON and not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ)


def n_processes(selection: Selection, n_cases: int, jobs: int | None = None) -> int:
    """Count the processes to start for so many cases; 0: this one checks them all.

    A GPU is one process's: several would share its time, each with a context of half a gigabyte on the device.

    jobs: most processes; None: one a core, as far as memory and the number of cases go.
    """
    if selection.target is None and device().type == "cuda":
        return 0
    is_fit = selection.target is None and interprets() == INTERPRETED
    n = min(jobs or (1 if is_fit and n_cases < MANY else resources.n_processes(n_cases)), n_cases)
    return 0 if n <= 1 and is_fit else max(n, 1)


def run_cases(selection: Selection, cases: Sequence[Case], n: int) -> Generator[CheckResult, None, None]:
    """Check the cases and yield each result in their order; `n` processes share them, 0: this process checks them.

    A process that ends while it checks a case fails this case, and another takes its place.

    Args:
        selection: what `cases` were found with, from which each process finds them again.
        cases: all cases of the selection.
        n: number of processes, as `n_processes` has it. Close the iterator to end them.

    Raises RuntimeError where a process ends before it could check anything.
    """
    if n == 0:
        speed_up()
        yield from map(selection.check, cases)
        return
    workers = _Workers(selection, n)
    try:
        # Threads only wait for processes; the pool hands a case to whichever is free, and keeps the order.
        with ThreadPoolExecutor(n) as threads:
            try:
                yield from threads.map(workers.check, range(len(cases)), cases)
            finally:
                workers.kill()
    finally:
        workers.close()


class _Workers:
    """Processes, each of which checks one case at a time."""

    def __init__(self, selection: Selection, n: int) -> None:
        warnings = [f"-W{option}" for option in sys.warnoptions]
        self._command = [sys.executable, *warnings, "-c", START, json.dumps(sys.path), json.dumps(selection)]
        interpreter = {"TRITON_INTERPRET": "1"} if selection.target is None and interprets() else {}
        self._environment = {**os.environ, **interpreter}
        self._all: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._lock, self._is_killed = threading.Lock(), False
        for _ in range(n):
            self._start()

    def check(self, place: int, case: Case) -> CheckResult:
        """Check the case at this place of the selection."""
        result = unchecked(case)
        worker = self._idle.get()
        measured = worker.measure(place)
        if measured is not None:
            self._idle.put(worker)
            return replace(result, **measured)
        result.fail(f"the process that was to check it {worker.fate()}")
        self._start()
        return result

    def _start(self) -> None:
        with self._lock:
            if not self._is_killed:
                worker = _Worker(self._command, self._environment)
                self._all.append(worker)
                self._idle.put(worker)

    def kill(self) -> None:
        """End all processes, busy or not. Threads that wait for one get no answer, and start no other."""
        with self._lock:
            self._is_killed = True
        for worker in self._all:
            worker.kill()
            self._idle.put(worker)

    def close(self) -> None:
        """Close the pipes of processes that were killed."""
        for worker in self._all:
            worker.close()


class _Worker:
    """A process, and the pipes to it and from it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        # In a session of its own Ctrl-C does not reach it: who started it ends it.
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._is_ready = False

    def measure(self, place: int) -> dict[str, Any] | None:
        """Let it check the case at this place, and return what it measured; None: it ended. RuntimeError: too soon."""
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.write(f"{place}\n")
            pipe.flush()
        if not self._is_ready and self._read() != READY:
            raise RuntimeError(f"a process for checks {self.fate()} before the first: it says why above")
        self._is_ready = True
        answer = self._read()
        return json.loads(answer) if answer else None

    def _read(self) -> str:
        """Read a line; empty: the process has ended, in the middle of it or before."""
        pipe = self._process.stdout
        assert pipe is not None
        line = pipe.readline()
        return line.removesuffix("\n") if line.endswith("\n") else ""

    def fate(self) -> str:
        """Say how it ended."""
        code = self._process.wait()
        if code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name
        hint = " (as the system does when memory runs out; --jobs 1 takes least)" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}"

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Close the pipes to it and from it."""
        for pipe in filter(None, (self._process.stdin, self._process.stdout)):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
