"""Timing of steps: on a GPU by its own events, in a rehearsal by a clock that means nothing."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import cycle, islice, pairwise
from typing import Any, NamedTuple

import torch

from tritopt.engine import private
from tritopt.engine.launcher import n_launches
from tritopt.kernels.language import HAS_TRITON, INTERPRETED
from tritopt.tools.bench.machine import cpu_name, driver

Step = Callable[[], Any]
CYCLES = 2e9
"""Cycles of a GPU's clock in a second, at least; they tell how long `_sleep` is asked to take."""
ENOUGH = 5
"""Times that make a median."""
LONGEST_LEAD = 0.1
"""Seconds that the host may need to be ahead of the GPU; a step that takes longer waits for its host."""


class Memory(NamedTuple):
    """Memory that one warm step asks the allocator for."""

    extra: int
    """Bytes beyond what was allocated before, at the most."""
    allocations: int
    """Number of allocations that it asks for."""


class Device:
    """A GPU as the bench sees it.

    Args:
        cuda: torch.cuda, or what pretends to be it.
        where: device of the tensors.
        clock: tells the time of the host, in seconds.
    """

    is_rehearsal = False

    def __init__(
        self, cuda: Any = torch.cuda, where: str = "cuda", clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._cuda, self._clock = cuda, clock
        self.where = torch.device(where)

    @property
    def l2_bytes(self) -> int:
        """Bytes of the cache that a buffer must not fit in."""
        return int(self._cuda.get_device_properties().L2_cache_size)

    @property
    def free_bytes(self) -> int:
        """Bytes of memory that nobody uses."""
        self._cuda.empty_cache()
        return int(self._cuda.mem_get_info()[0])

    def synchronize(self) -> None:
        """Wait until nothing is under way."""
        self._cuda.synchronize()

    def copy_bandwidth(self, n_bytes: int, repeats: int = 20) -> float:
        """Bytes read and written per second by torch's copy of so many bytes, the median of some."""
        source = torch.zeros(n_bytes, dtype=torch.uint8, device=self.where)
        target = torch.empty_like(source)
        target.copy_(source)
        times = self.device_times([lambda: target.copy_(source)], repeats, lead=1e-3)
        if times is None:
            raise RuntimeError("a copy could not be timed: the host is slower than the copy of a large tensor")
        return 2 * n_bytes / statistics.median(times)

    def host_times(self, steps: Sequence[Step], n: int) -> list[float]:
        """Seconds until each of n steps returns, none of which has to wait for the GPU."""
        times = []
        for step in islice(cycle(steps), n):
            self.synchronize()
            start = self._clock()
            step()
            times.append(self._clock() - start)
        self.synchronize()
        return times

    def step_times(self, steps: Sequence[Step], n: int) -> list[float]:
        """Seconds from the end of a step to the end of the next, n of them on end: of host or GPU, the slower."""
        events = [self._cuda.Event(enable_timing=True) for _ in range(n + 1)]
        self.synchronize()
        events[0].record()
        for step, event in zip(cycle(steps), events[1:], strict=False):
            step()
            event.record()
        self.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]

    def device_times(self, steps: Sequence[Step], n: int, lead: float) -> list[float] | None:
        """Seconds that the GPU takes for each of n steps, all of whose launches are in its queue beforehand.

        None where they cannot be: of steps whose host waits for the GPU, or that fill the queue.

        Args:
            steps: taken in turn.
            n: number of times.
            lead: seconds that the host needs for a step, about; more is given where that is too little.
        """
        times: list[float] = []
        turn = cycle(steps)
        while len(times) < n:
            start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
            self.synchronize()
            private.keep_busy(self._cuda, int(2 * lead * CYCLES))
            start.record()
            step = next(turn)
            step()
            end.record()
            was_ahead = not start.query()
            self.synchronize()
            if was_ahead:
                times.append(start.elapsed_time(end) / 1e3)
            elif (lead := 2 * lead) > LONGEST_LEAD:
                return times if len(times) >= ENOUGH else None
        return times

    def memory(self, step: Step) -> Memory:
        """Measure the memory that one more step takes."""
        self.synchronize()
        before, count = self._cuda.memory_allocated(), self._allocations()
        self._cuda.reset_peak_memory_stats()
        step()
        self.synchronize()
        return Memory(self._cuda.max_memory_allocated() - before, self._allocations() - count)

    def _allocations(self) -> int:
        return int(self._cuda.memory_stats().get("allocation.all.allocated", 0))

    def synchronises(self, step: Step) -> bool:
        """Whether a step waits for the GPU, as far as torch notices: `.item()`, copies to the host."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says that the mode is a prototype, after it was set
                self._cuda.set_sync_debug_mode("error")
            step()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            self._cuda.set_sync_debug_mode("default")
        return False

    def launches(self, step: Step) -> int | None:
        """Triton kernels that one more step launches; None where Triton does not say."""
        if not HAS_TRITON:
            return None
        made: list[Any] = []
        hooks = private.launch_hooks()
        hooks.add(made.append)
        try:
            step()
        finally:
            hooks.remove(made.append)
        return len(made)

    def kernels(self, step: Step) -> int | None:
        """Kernels of any kind that one more step launches, copies and fills apart; None where no profiler can tell.

        A profiler may slow down what is measured after it: ask for this in the end.
        """
        from torch.profiler import ProfilerActivity, profile

        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step()
            self.synchronize()
        names = [event.name for event in profiler.events() or () if _is_on_gpu(event)]
        # Without a right to the GPU's counters there are no events at all, and every step launches something.
        return len([name for name in names if not name.startswith(("Memcpy", "Memset"))]) or None

    def describe(self) -> dict[str, Any]:
        """Name of the GPU, driver, memory and cache."""
        return {
            "gpu": self._cuda.get_device_name(),
            "driver": driver(),
            "memory": int(self._cuda.get_device_properties().total_memory),
            "l2": self.l2_bytes,
            "cuda": torch.version.cuda or torch.version.hip,
        }


def _is_on_gpu(event: Any) -> bool:
    return event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)


class Rehearsal(Device):
    """No GPU: the same calls on the CPU, kernels in Triton's interpreter. Its times mean nothing."""

    is_rehearsal = True

    def __init__(self) -> None:
        super().__init__(_Pretended(), "cpu")

    def kernels(self, step: Step) -> int | None:
        """There is no GPU to profile."""
        step()
        return None

    def launches(self, step: Step) -> int | None:
        """Count the launches that this package makes; None where no kernel is interpreted."""
        if not (HAS_TRITON and INTERPRETED):
            return None
        before = n_launches()
        step()
        return n_launches() - before

    def describe(self) -> dict[str, Any]:
        """The CPU's name, as a rehearsal."""
        return {"gpu": None, "driver": None, "memory": None, "l2": None, "cuda": None, "cpu": cpu_name()}


class _PretendedEvent:
    def __init__(self, enable_timing: bool) -> None:
        self._time = 0.0

    def record(self) -> None:
        self._time = time.perf_counter()

    def query(self) -> bool:
        return False

    def elapsed_time(self, other: _PretendedEvent) -> float:
        return 1e3 * (other._time - self._time)


class _PretendedProperties(NamedTuple):
    L2_cache_size: int = 2048
    """Small enough that a miniature runs on several sets."""
    total_memory: int = 2**30


class _Pretended:
    """Stand-in on a CPU for what `Device` needs of torch.cuda."""

    Event = _PretendedEvent

    def get_device_properties(self) -> _PretendedProperties:
        return _PretendedProperties()

    def get_device_name(self) -> str:
        return "none"

    def mem_get_info(self) -> tuple[int, int]:
        return _PretendedProperties().total_memory, _PretendedProperties().total_memory

    def memory_allocated(self) -> int:
        return 0

    def max_memory_allocated(self) -> int:
        return 0

    def memory_stats(self) -> dict[str, int]:
        return {}

    def _nothing(self, *_: Any) -> None:
        """The CPU is never behind, has no allocator to ask, and says nothing of waiting."""

    synchronize = empty_cache = reset_peak_memory_stats = set_sync_debug_mode = _sleep = _nothing
