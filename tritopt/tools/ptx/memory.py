"""Global memory, which is the process's own, and shared memory, with the checks of compute-sanitizer on both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from tritopt.tools.ptx.floats import Array
from tritopt.tools.ptx.program import Instruction

# Lowest and highest address that a process of Linux on x86-64 can have.
_START, _END = 1 << 12, 1 << 47
POISON = 0xA5A5A5A5A5A5A5A5
"""Bits of what was never written, cut to size."""
_Access: TypeAlias = tuple[Array, int, Array, Instruction]
"""Addresses, size in bytes, threads and instruction of an access."""


class Fault(Exception):  # noqa: N818  the GPU's word, and compute-sanitizer's
    """A mistake that compute-sanitizer would report."""

    def __init__(self, what: str, thread: int, address: int | None = None) -> None:
        super().__init__(what)
        self.program, self.thread = 0, int(thread)
        """Numbers of the program in the launch and of the thread in it; of the thread in the launch until `locate`."""
        self.address = None if address is None else int(address)
        """Address in global or shared memory; None where no memory takes part."""
        self.kernel, self.instruction = "", ""

    def locate(self, kernel: str, instruction: Instruction, n_threads: int) -> Fault:
        """Add what only the machine knows. Returns itself."""
        self.kernel, self.instruction = kernel, str(instruction)
        self.program, self.thread = divmod(self.thread, n_threads)
        return self

    def __str__(self) -> str:
        at = "" if self.address is None else f" at {self.address:#x}"
        return f"{self.kernel}: {self.args[0]}{at}; program {self.program}, thread {self.thread}; {self.instruction}"


class _Everything:
    """All addresses of the process as one array, of which nothing is touched that is not asked for."""

    def __init__(self, width: int) -> None:
        n = (_END - _START) // width
        self.__array_interface__ = {"data": (_START, False), "shape": (n,), "typestr": f"<u{width}", "version": 3}


_WORDS = {width: np.asarray(_Everything(width)) for width in (1, 2, 4, 8)}


class Memory:
    """Global memory of one launch.

    Args:
        ranges: (first address, end) of what the launch may touch.
        watches: whether to note accesses, for `check_races`.
        all_ranges: finds more that it may touch, at the first access outside of `ranges`; None: there is no more.
    """

    def __init__(
        self,
        ranges: Sequence[tuple[int, int]],
        watches: bool = True,
        all_ranges: Callable[[], Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        self._all_ranges = all_ranges
        self._starts, self._ends = _merged(ranges)
        self._watches = watches
        self._reads: list[_Access] = []
        self._writes: list[_Access] = []

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
        size = width * n
        is_outside = self._is_outside(address, size)
        if self._all_ranges is not None and is_outside.any():
            self._starts, self._ends = _merged(self._all_ranges())
            self._all_ranges, is_outside = None, self._is_outside(address, size)
        _refuse(is_outside, f"{what} of {size} bytes outside of live tensors", ids, address)
        _refuse(address % size != 0, f"misaligned {what} of {size} bytes", ids, address)
        return np.asarray((address - _START) // width)

    def _is_outside(self, address: Array, size: int) -> Array:
        place = np.searchsorted(self._starts, address, "right") - 1
        return np.asarray((place < 0) | (address + size > self._ends[place]))

    def check_races(self, kernel: str, n_threads: int) -> None:
        """Fault if two threads wrote the same bytes, or a program read what another one wrote."""
        if not self._writes:
            return
        start, end, thread, by = _joined(self._writes)
        order = np.argsort(start, kind="stable")
        start, end, thread, by = start[order], end[order], thread[order], by[order]
        # Of the writes up to each one, the one that reaches furthest: what it does not overlap none of them does.
        reach = np.maximum.accumulate(end)
        top = np.maximum.accumulate(np.where(end == reach, np.arange(len(end)), 0))
        clash = np.flatnonzero((start[1:] < reach[:-1]) & (thread[1:] != thread[top[:-1]]))
        if len(clash):
            other, i = divmod(int(thread[top[clash[0]]]), n_threads), clash[0] + 1
            fault = Fault("race: write of what program {}, thread {} writes".format(*other), thread[i], start[i])
            raise fault.locate(kernel, self._writes[by[i]][3], n_threads)
        first, last, reader, by = _joined(self._reads)
        # A read of several writes overlaps the first one that ends behind its start, and the last that begins in it.
        for place in (np.searchsorted(reach, first, "right"), np.searchsorted(start, last, "left") - 1):
            at = np.clip(place, 0, len(start) - 1)
            writer = thread[at] // n_threads
            clash = np.flatnonzero((start[at] < last) & (end[at] > first) & (writer != reader // n_threads))
            if len(clash):
                i = clash[0]
                fault = Fault(f"race: read of what program {writer[i]} writes", reader[i], first[i])
                raise fault.locate(kernel, self._reads[by[i]][3], n_threads)


def _merged(ranges: Sequence[tuple[int, int]]) -> tuple[Array, Array]:
    """First addresses, ascending, and ends of ranges that do not overlap."""
    merged: list[list[int]] = [[0, 0]]
    for first, end in sorted(ranges):
        if first < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        elif end > first:
            merged.append([first, end])
    starts, ends = np.array(merged, dtype=np.int64).T.copy()
    return starts, ends


def _joined(log: Sequence[_Access]) -> tuple[Array, Array, Array, Array]:
    """First address, end, thread, and place in the log, of every access."""
    empty = np.zeros(0, np.int64)
    start = np.concatenate([empty, *(address for address, _, _, _ in log)])
    lengths = [len(address) for address, _, _, _ in log]
    end = start + np.repeat(np.array([size for _, size, _, _ in log], np.int64), lengths)
    ids = np.concatenate([empty, *(ids for _, _, ids, _ in log)])
    return start, end, ids, np.repeat(np.arange(len(log)), lengths)


def _refuse(is_wrong: Array, what: str, ids: Array, address: Array) -> None:
    if is_wrong.any():
        first = int(is_wrong.argmax())
        raise Fault(f"{what}, by {is_wrong.sum()} threads", ids[first], address[first])


class Shared:
    """Shared memory of several programs, one after the other; and which warps touched what since the last barrier.

    Args:
        n_programs: that have it.
        size: bytes of each.
        watches: whether to look for accesses of two warps to the same bytes without a barrier between.
    """

    def __init__(self, n_programs: int, size: int, watches: bool) -> None:
        self._size, self._watches = size, watches
        self._bytes = np.full(n_programs * size, POISON & 255, np.uint8)
        self._undefined = np.full(n_programs * size, 255, np.uint8)
        # A bit per warp, of which a program has 32 at most.
        self._readers, self._writers = np.zeros((2, n_programs * size), np.uint32)

    def places(self, offset: Array, n_bytes: int, program: Array, ids: Array) -> Array:
        """Index of each byte, [threads, n_bytes], of accesses at these addresses."""
        is_outside = (offset < 0) | (offset + n_bytes > self._size)
        _refuse(is_outside, f"access of {n_bytes} bytes outside of shared memory, {self._size} bytes", ids, offset)
        _refuse(offset % n_bytes != 0, f"misaligned access of {n_bytes} bytes to shared memory", ids, offset)
        return (program * self._size + offset)[:, None] + np.arange(n_bytes)

    def load(self, places: Array, warp: Array, ids: Array) -> tuple[Array, Array]:
        """Bytes at these places, and their undefined bits."""
        if self._watches:
            self._check(self._writers[places], warp, places, ids, "read of what another warp wrote")
            np.bitwise_or.at(self._readers, places, _bit(warp))
        return self._bytes[places], self._undefined[places]

    def store(self, places: Array, values: Array, undefined: Array, warp: Array, ids: Array) -> None:
        """Write bytes and their undefined bits. Two threads may write the same value: layouts have copies."""
        before = self._bytes[places]
        self._bytes[places], self._undefined[places] = values, undefined
        if self._watches:
            others = self._readers[places] | np.where(before == values, np.uint32(0), self._writers[places])
            self._check(others, warp, places, ids, "write of what another warp read or wrote")
            is_lost = np.where(self._bytes[places] != values, ~_bit(warp), np.uint32(0))
            self._check(is_lost, warp, places, ids, "write of what another thread writes")
            np.bitwise_or.at(self._writers, places, _bit(warp))

    def _check(self, warps: Array, warp: Array, places: Array, ids: Array, what: str) -> None:
        is_wrong = np.asarray((warps & ~_bit(warp)).any(1))
        _refuse(is_wrong, f"race in shared memory: {what} with no barrier between", ids, places[:, 0] % self._size)

    def pass_barrier(self) -> None:
        """Forget who touched what."""
        self._readers[:] = self._writers[:] = 0


def _bit(warp: Array) -> Array:
    return (np.uint32(1) << warp.astype(np.uint32))[:, None]
