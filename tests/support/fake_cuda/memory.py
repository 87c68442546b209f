"""Memory of a GPU, as torch's caching allocator hands it out: freed to the stream that it was allocated on.

What nobody has written is all ones: NaN, or an address that is none. So is what was freed, as soon as the stream gets
there, since the next who allocates on it may have it. A graph's memory goes back to the graph.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right, insort
from collections.abc import Iterable

import torch

from tests.support.fake_cuda.streams import GpuError, Graph, Stream, Work

POISON = 0xFF


class Block:
    """Bytes of one allocation.

    Args:
        n: number of bytes.
        stream: what they are allocated on; None: on the host, pinned.
    """

    def __init__(self, n: int, stream: Stream | None) -> None:
        # One byte of an empty tensor too: addresses tell blocks apart.
        self.bytes = torch.full((max(n, 1) + 16,), POISON, dtype=torch.uint8, device="cpu")
        # 16-byte aligned, as torch's allocations are.
        self.address = -(-self.bytes.data_ptr() // 16) * 16
        self.size = n
        self.stream = stream
        self.graph: Graph | None = None if stream is None else stream.graph
        self.users: list[Stream] = []
        """Other streams, by `record_stream`."""
        self.is_reused = False

    @property
    def device(self) -> int | None:
        """Index of the GPU; None: on the host."""
        return None if self.stream is None else self.stream.device

    def tensor(self, shape: Iterable[int], strides: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the CPU that lies in it."""
        start = self.address - self.bytes.data_ptr()
        flat = self.bytes[start : start + self.size].view(dtype)
        return flat.as_strided(tuple(shape), tuple(strides))

    def check(self, who: str) -> None:
        """GpuError if this may be somebody else's by now."""
        if self.is_reused:
            raise GpuError(f"{who} uses {self.size} bytes that were freed before it ran")

    def overwrite(self) -> None:
        """Overwrite freed memory, as whoever gets it next does."""
        self.bytes.fill_(POISON)

    def free(self) -> None:
        """Give it back; it is reused after what its stream has queued, and those of `record_stream`."""
        if self.stream is None:
            self._reuse()
        elif self.graph is None:
            for other in self.users:
                self.stream.wait_stream(other)
            self.stream.queue_uncaptured("reuse", self._reuse)
        elif not self.graph.is_captured:
            self.graph.works.append(Work("reuse", self.overwrite))

    def _reuse(self) -> None:
        self.overwrite()
        self.is_reused = True


class Memory:
    """All blocks of some GPUs, and the pinned ones.

    Args:
        capacity: bytes of each GPU.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blocks: dict[int, Block] = {}
        """All that there ever were, by address: what is freed is not given to others, and shows."""
        self._starts: list[int] = []
        """Their addresses in order."""
        self.taken: dict[int, int] = {}
        """Bytes that are in use, by device."""
        self.peak: dict[int, int] = {}
        """Most bytes that were ever allocated at once."""

    def allocate(self, n: int, stream: Stream) -> Owner:
        """Allocate so many bytes, for as long as the owner lives; torch.OutOfMemoryError if there is too little."""
        taken = self.taken.get(stream.device, 0)
        if taken + n > self.capacity:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {n} bytes")
        self.taken[stream.device] = taken + n
        self.peak[stream.device] = max(taken + n, self.peak.get(stream.device, 0))
        return Owner(self._new(n, stream), self)

    def pin(self, host: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor in pinned memory, which is reused as soon as nobody holds it."""
        block = self._new(host.nbytes, None)
        pinned = block.tensor(host.shape, host.stride(), host.dtype).copy_(host)
        weakref.finalize(pinned, block.free)
        return pinned

    def at(self, address: int, device: int | None) -> Block | None:
        """The block of a device, or of the host, in which an address lies."""
        before = bisect_right(self._starts, address)
        block = self._blocks[self._starts[before - 1]] if before else None
        if block is None or block.device != device or address >= block.address + max(block.size, 1):
            return None
        return block

    def _new(self, n: int, stream: Stream | None) -> Block:
        block = Block(n, stream)
        self._blocks[block.address] = block
        insort(self._starts, block.address)
        return block


class Owner:
    """Holder of a block: tensors, and views of them, share one."""

    def __init__(self, block: Block, memory: Memory) -> None:
        self.block = block
        weakref.finalize(self, _give_back, block, memory)


def _give_back(block: Block, memory: Memory) -> None:
    assert block.stream is not None
    memory.taken[block.stream.device] -= block.size
    block.free()
