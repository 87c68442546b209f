"""Global memory, which is the process's own, and shared memory, with the checks of compute-sanitizer on both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tritopt.tools.ptx.floats import Array
from tritopt.tools.ptx.program import Instruction

# Lowest and highest address that a process of Linux on x86-64 can have.
_START, _END = 1 << 12, 1 << 47
POISON = 0xA5A5A5A5A5A5A5A5
"""Bits of what was never written, cut to size."""


class Fault(Exception):
    """A mistake that compute-sanitizer would report."""

    def __init__(self, what: str, thread: int, address: int | None = None) -> None:
        super().__init__(what)
        self.thread = int(thread)
        """Number of the thread in the launch, then in its program."""
        self.address = None if address is None else int(address)
        """Address in global or shared memory; None where no memory takes part."""
        self.program = 0
        """Number of the program in the launch."""
        self.kernel = ""
        self.instruction: Instruction | None = None

    def locate(self, kernel: str, instruction: Instruction, n_threads: int) -> None:
        """Add what only the machine knows."""
        self.kernel, self.instruction = kernel, instruction
        self.program, self.thread = divmod(self.thread, n_threads)

    def __str__(self) -> str:
        at = "" if self.address is None else f" at {self.address:#x}"
        where = f"program {self.program}, thread {self.thread}"
        return f"{self.kernel}: {self.args[0]}{at}; {where}; {self.instruction}"


class _Everything:
    """All addresses of the process as one array, of which nothing is touched that is not asked for."""

    def __init__(self, width: int) -> None:
        self.__array_interface__ = {
            "data": (_START, False), "shape": ((_END - _START) // width,), "typestr": f"<u{width}", "version": 3,
        }  # fmt: skip


_WORDS = {width: np.asarray(_Everything(width)) for width in (1, 2, 4, 8)}


class Memory:
    """Global memory of one launch.

    Args:
        ranges: (first address, end) of what the launch may touch.
        watches: whether to note accesses, for `check_races`.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]], watches: bool = True) -> None:
        merged: list[list[int]] = []
        for first, end in sorted(ranges):
            if merged and first < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            elif end > first:
                merged.append([first, end])
        self._starts, self._ends = np.array(merged or [[0, 0]], dtype=np.int64).T.copy()
        self._watches = watches
        self._reads: list[tuple[Array, int, Array, Instruction]] = []
        self._writes: list[tuple[Array, int, Array, Instruction]] = []

    def load(self, address: Array, width: int, n: int, ids: Array, by: Instruction) -> list[Array]:
        """Read n neighbouring words of `width` bytes for each of these threads."""
        index = self._index(address, width, n, ids, "read")
        if self._watches:
            self._reads.append((address, width * n, ids, by))
        return [_WORDS[width][index + i] for i in range(n)]

    def store(self, address: Array, values: Sequence[Array], ids: Array, by: Instruction) -> None:
        """Write neighbouring words, all of one width."""
        width = values[0].dtype.itemsize
        index = self._index(address, width, len(values), ids, "write")
        if self._watches:
            self._writes.append((address, width * len(values), ids, by))
        for i, value in enumerate(values):
            _WORDS[width][index + i] = value

    def _index(self, address: Array, width: int, n: int, ids: Array, what: str) -> Array:
        check_aligned(address, width * n, ids, f"{what} of global memory")
        place = np.searchsorted(self._starts, address, "right") - 1
        is_outside = (place < 0) | (address + width * n > self._ends[place])
        if is_outside.any():
            first = int(is_outside.argmax())
            what = f"{what} of {width * n} bytes outside of live tensors, by {is_outside.sum()} threads"
            raise Fault(what, ids[first], address[first])
        return (address - _START) // width

    def check_races(self, kernel: str, n_threads: int) -> None:
        """Fault if two threads wrote the same bytes, or a program read what another one wrote."""
        if not self._writes:
            return
        start, end, thread, by = _joined(self._writes)
        order = np.argsort(start, kind="stable")
        start, end, thread, by = start[order], end[order], thread[order], by[order]
        clash = (start[1:] < end[:-1]) & (thread[1:] != thread[:-1])
        if clash.any():
            at = int(clash.argmax())
            other = "program {}, thread {}".format(*divmod(int(thread[at]), n_threads))
            fault = Fault(f"race: write of what {other} writes too", thread[at + 1], start[at + 1])
            fault.locate(kernel, self._writes[by[at + 1]][3], n_threads)
            raise fault
        if not self._reads:
            return
        first, last, reader, read_by = _joined(self._reads)
        place = np.searchsorted(start, last - 1, "right") - 1
        clash = (place >= 0) & (end[place] > first) & (thread[place] // n_threads != reader // n_threads)
        if clash.any():
            at = int(clash.argmax())
            fault = Fault(f"race: read of what program {thread[place[at]] // n_threads} writes", reader[at], first[at])
            fault.locate(kernel, self._reads[read_by[at]][3], n_threads)
            raise fault


def _joined(log: Sequence[tuple[Array, int, Array, Instruction]]) -> tuple[Array, Array, Array, Array]:
    """First address, end, thread, and place in the log, of every access."""
    start = np.concatenate([address for address, _, _, _ in log])
    lengths = [len(address) for address, _, _, _ in log]
    end = start + np.repeat([size for _, size, _, _ in log], lengths)
    return start, end, np.concatenate([ids for _, _, ids, _ in log]), np.repeat(np.arange(len(log)), lengths)


def check_aligned(address: Array, size: int, ids: Array, what: str) -> None:
    """Fault if an address is no multiple of the access's size."""
    misaligned = address % size
    if misaligned.any():
        first = int((misaligned != 0).argmax())
        raise Fault(f"misaligned {what}, {size} bytes", ids[first], address[first])


class Shared:
    """Shared memory of several programs, one after the other; and which warps touched what since the last barrier.

    Args:
        n_programs: that have it.
        size: bytes of each.
        watches: whether to look for accesses of two warps to the same bytes without a barrier between.
    """

    def __init__(self, n_programs: int, size: int, watches: bool) -> None:
        self._size = size
        self._bytes = np.full(n_programs * size, POISON & 255, np.uint8)
        self._is_defined = np.zeros(n_programs * size, bool)
        self._watches = watches
        # One bit per warp, of which a program has 32 at most.
        self._readers, self._writers = np.zeros((2, n_programs * size), np.uint32)

    def places(self, offset: Array, n_bytes: int, program: Array, ids: Array) -> Array:
        """Index of each byte, [threads, n_bytes], of accesses at these addresses."""
        is_outside = (offset < 0) | (offset + n_bytes > self._size)
        if is_outside.any():
            first = int(is_outside.argmax())
            what = f"access of {n_bytes} bytes outside of shared memory, which has {self._size}"
            raise Fault(what, ids[first], offset[first])
        check_aligned(offset, n_bytes, ids, "access to shared memory")
        return (program * self._size + offset)[:, None] + np.arange(n_bytes)

    def load(self, places: Array, warp: Array, ids: Array) -> tuple[Array, Array]:
        """Bytes at these places, and which of them were written."""
        if self._watches:
            self._check(self._writers[places], warp, places, ids, "read of what another warp wrote")
            np.bitwise_or.at(self._readers, places, _bit(warp))
        return self._bytes[places], self._is_defined[places]

    def store(self, places: Array, values: Array, is_defined: Array, warp: Array, ids: Array) -> None:
        """Write bytes. Layouts with copies of an element write it several times: that is no race."""
        if self._watches:
            self._check(self._readers[places], warp, places, ids, "write of what another warp read")
            same = self._bytes[places] == values
            self._check(self._writers[places] * ~same, warp, places, ids, "write of what another warp wrote")
            np.bitwise_or.at(self._writers, places, _bit(warp))
        self._bytes[places], self._is_defined[places] = values, is_defined
        if self._watches:
            differs = self._bytes[places] != values
            self._check(differs * ~np.uint32(0), warp, places, ids, "write of what another thread writes")

    def _check(self, warps: Array, warp: Array, places: Array, ids: Array, what: str) -> None:
        clash = (warps & ~_bit(warp)).any(1)
        if clash.any():
            first = int(clash.argmax())
            raise Fault(f"race: {what}, with no barrier between", ids[first], places[first, 0] % self._size)

    def pass_barrier(self) -> None:
        """Forget who touched what."""
        self._readers[:] = self._writers[:] = 0


def _bit(warp: Array) -> Array:
    return (np.uint32(1) << warp.astype(np.uint32))[:, None]
