"""torch.cuda, as far as tritopt asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.fake_cuda.launches import Launches
from tests.support.fake_cuda.memory import Memory
from tests.support.fake_cuda.streams import Event, Graph, Stream
from tests.support.fake_cuda.tensors import Factories, Operations

L2_BYTES = 2**16


class FakeCuda:
    """Some GPUs.

    Args:
        n_devices: how many.
        capacity: bytes of each.
    """

    def __init__(self, n_devices: int = 2, capacity: int = 2**28) -> None:
        self.log: list[str] = []
        """Names of what ran, in order."""
        self.memory = Memory(capacity)
        self.device = 0
        self.all_streams: list[Stream] = []
        self.streams = [self.new_stream(i) for i in range(n_devices)]
        """The current one of each device."""
        self._capture_stream = self.new_stream()

    def new_stream(self, device: int = 0) -> Stream:
        """Make one more stream of a device."""
        made = Stream(device, self.log)
        self.all_streams.append(made)
        return made

    def current_stream(self, device: Any = None) -> Stream:
        """Current stream of a device."""
        return self.streams[self._index(device)]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Stand in for `torch.cuda.stream`."""
        before = self.device, self.streams[stream.device]
        self.device, self.streams[stream.device] = stream.device, stream
        yield
        self.device, self.streams[stream.device] = before

    @contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        """Stand in for `torch.cuda.device`."""
        before, self.device = self.device, self._index(device)
        yield
        self.device = before

    @contextmanager
    def capture(self, stream: Stream | None = None) -> Iterator[Graph]:
        """`torch.cuda.graph`: by default on a stream that all captures share."""
        stream, graph = stream or self._capture_stream, Graph()
        self.synchronize()
        with self.on(stream):
            stream.graph = graph
            try:
                yield graph
            finally:
                stream.graph, graph.is_captured = None, True

    def replay(self, graph: Graph) -> None:
        """Queue it on the current stream."""
        graph.replay(self.current_stream())

    def synchronize(self, *streams: Stream) -> None:
        """Run what is queued: of these streams first, then of all."""
        for stream in (*streams, *self.all_streams):
            stream.synchronize()

    def event(self, enable_timing: bool = False) -> CurrentEvent:
        """Stand in for `torch.cuda.Event`."""
        return CurrentEvent(self)

    def _install(self, patch: pytest.MonkeyPatch) -> None:
        """Put it in place of torch.cuda, and of a compiled Triton."""
        from triton.runtime import driver, interpreter

        from tritopt.engine import plan, walk

        cuda: Any = torch.cuda
        for name, value in {
            "_lazy_init": lambda: None,
            "is_initialized": lambda: True,
            "current_device": lambda: self.device,
            "current_stream": self.current_stream,
            "device": self.on_device,
            "is_current_stream_capturing": lambda: self.current_stream().graph is not None,
            "mem_get_info": self._mem_get_info,
            "empty_cache": lambda: None,
            "synchronize": self.synchronize,
            "Event": self.event,
            "_sleep": lambda cycles: self.current_stream().queue("sleep", lambda: None),
            "get_device_properties": lambda device=None: SimpleNamespace(name="Fake", major=9, minor=0),
        }.items():
            patch.setattr(cuda, name, value)
        on_cpu = torch.Generator
        patch.setattr(torch, "Generator", lambda device=None: on_cpu())
        # With which Triton measures.
        patch.setattr(
            driver,
            "_active",
            SimpleNamespace(
                get_device_interface=lambda: torch.cuda,
                get_empty_cache_for_benchmark=lambda: torch.empty(L2_BYTES, dtype=torch.int8, device="cuda"),
                clear_cache=lambda cache: cache.zero_(),
            ),
        )
        launches = Launches(self.memory, self.current_stream)
        patch.setattr(interpreter.GridExecutor, "__call__", launches.wrap(interpreter.GridExecutor.__call__))
        patch.setattr(plan, "kernel_device", "cuda")
        # What is in C asks torch for addresses, past what a subclass says of its own.
        patch.setattr(walk, "_chosen", [walk.MEANT])

    @contextmanager
    def running(self) -> Iterator[FakeCuda]:
        """Run what is inside with it in place of torch.cuda, and torch's operations on its GPUs."""
        with ExitStack() as stack:
            self._install(stack.enter_context(pytest.MonkeyPatch.context()))
            stack.enter_context(Operations(self.memory, self.current_stream))
            stack.enter_context(Factories(self.memory))
            yield self

    def _index(self, device: Any) -> int:
        index = device.index if isinstance(device, torch.device) else device
        return self.device if index is None else index

    def _mem_get_info(self, device: Any = None) -> tuple[int, int]:
        free = self.memory.capacity - self.memory.taken.get(self._index(device), 0)
        return free, self.memory.capacity


class CurrentEvent(Event):
    """An event that is recorded on the current stream, if on no other."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__(cuda.log)
        self._cuda = cuda

    def record(self, stream: Stream | None = None) -> None:
        """Take the place behind all that is queued on a stream; None: the current one."""
        super().record(stream or self._cuda.current_stream())
