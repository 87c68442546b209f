"""Streams: work that is queued, and runs when somebody waits for it, which is the latest that a GPU could be."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

_handles = count(1)


class GpuError(Exception):
    """Something that a GPU would do to memory which it must not, or would not do at all."""


class Work(NamedTuple):
    """One copy, fill, operation or launch."""

    name: str
    run: Callable[[], None]


class Stream:
    """A queue of one device. Whatever is queued runs in order, and as late as can be.

    Args:
        device: index of the GPU.
        log: takes the name of each work when it runs.
    """

    def __init__(self, device: int, log: list[str]) -> None:
        self.device = device
        self.cuda_stream = next(_handles)
        self.graph: Graph | None = None
        """Graph that captures this stream; None: none does."""
        self._log = log
        self._queue: deque[Work] = deque()
        self._n_done = 0

    def queue(self, name: str, run: Callable[[], None]) -> None:
        """Have this run after all that was queued before, or with each replay."""
        if self.graph is not None:
            self.graph.works.append(Work(name, run))
        else:
            self.queue_uncaptured(name, run)

    def queue_uncaptured(self, name: str, run: Callable[[], None]) -> None:
        """Have this run after all that was queued before, whether or not the stream is captured."""
        self._queue.append(Work(name, run))

    def mark(self) -> Callable[[], None]:
        """Something to call: it runs all that has been queued so far."""
        end = self._n_done + len(self._queue)
        return lambda: self._run_until(end)

    def wait_stream(self, other: Stream) -> None:
        """Let what is queued from now on run after all that is queued on the other stream now, as torch's does."""
        self.queue_uncaptured("wait", other.mark())

    def keep(self, tensor: Any) -> None:
        """`tensor.record_stream`, which insists on streams of torch's own type."""
        tensor.record_stream(self)

    def synchronize(self) -> None:
        """Run all that is queued."""
        if self.graph is not None:
            raise GpuError("operation not permitted when stream is capturing")
        self.mark()()

    def _run_until(self, end: int) -> None:
        while self._n_done < end:
            work = self._queue.popleft()
            self._n_done += 1
            self._log.append(work.name)
            work.run()


class Event:
    """A point in a stream, and the time when it got there: a millisecond for each work that any stream has run."""

    def __init__(self, log: list[str]) -> None:
        self._log = log
        self._time: int | None = None

    def record(self, stream: Stream) -> None:
        """Take the place behind all that is queued."""
        stream.queue("event", self._note)

    def query(self) -> bool:
        """Whether the stream got there."""
        return self._time is not None

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds until another event."""
        assert self._time is not None
        assert other._time is not None
        return float(other._time - self._time)

    def _note(self) -> None:
        self._time = len(self._log)


class Graph:
    """Work that was captured. It owns the memory that was allocated meanwhile, and keeps alive nothing else."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.is_captured = False

    def replay(self, stream: Stream) -> None:
        """Queue all of it."""
        for work in self.works:
            stream.queue(work.name, work.run)
