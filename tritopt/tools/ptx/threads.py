"""State of the threads that run together: registers, special registers, shared memory, and where each one is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from tritopt.tools.ptx.floats import Array
from tritopt.tools.ptx.memory import POISON, Fault, Memory, Shared
from tritopt.tools.ptx.program import Instruction, Program

Selection: TypeAlias = "slice | Array"
"""Threads: a slice where they are a run, which needs no copies of registers; else their numbers, ascending."""
DONE = np.iinfo(np.int32).max
"""Block of a thread that has returned."""
SPECIAL = {
    "%tid.x",
    "%ntid.x",
    "%laneid",
    "%warpid",
    *(f"%{name}.{axis}" for name in ("ctaid", "nctaid") for axis in "xyz"),
}
"""Special registers that are known."""


@dataclass
class Options:
    """Options of a launch in the machine."""

    watches: bool = True
    """Whether races are looked for."""
    order: Callable[[Array], Array] | None = None
    """Permutes or selects the numbers of programs; None: all, ascending."""
    warp_seed: int | None = None
    """Warps of a program run one after the other between barriers, in an order drawn anew each time; None: lockstep."""
    inexact: bool = False
    """Whether results of approximate instructions are an ulp off."""


_PACKED = {"s16x2": "u4", "u16x2": "u4", "bf16": "u2", "f16": "u2", "bf16x2": "u4", "f16x2": "u4", "f32x2": "u8"}


def dtype_of(kind: str) -> np.dtype[Any]:
    """NumPy's type of a PTX type; 16-bit floats and packed ones are bits."""
    if kind == "pred":
        return np.dtype(bool)
    if kind in _PACKED:
        return np.dtype(_PACKED[kind])
    return np.dtype(f"{ {'b': 'u', 's': 'i', 'u': 'u', 'f': 'f'}[kind[0]] }{int(kind[1:]) // 8}")


def bits_of(kind: str) -> np.dtype[Any]:
    """Type of a register's bits: unsigned, or bool."""
    dtype = dtype_of(kind)
    return dtype if dtype.kind == "b" else np.dtype(f"u{dtype.itemsize}")


class _Registers(dict[str, Array]):
    """Bits of each register, [threads], made when it is first touched."""

    def __init__(self, types: dict[str, str], n: int) -> None:
        self._kinds, self._n = types, n

    def __missing__(self, name: str) -> Array:
        dtype = bits_of(self._kinds[name])
        value = np.full(self._n, POISON % 256**dtype.itemsize if dtype.kind != "b" else 0, dtype)
        self[name] = value
        return value


class Threads:
    """Threads of some programs, one program after the other.

    Args:
        program: the kernel.
        parameters: bits of its parameters.
        numbers: numbers of the programs in the launch.
        grid: number of programs along x, y, z.
        shared: bytes of shared memory of each.
        memory: global memory.
        options: options of the launch.
    """

    def __init__(
        self, program: Program, parameters: dict[str, Array], numbers: Array, grid: Sequence[int], shared: int,
        memory: Memory, options: Options,
    ) -> None:  # fmt: skip
        per = program.n_threads
        n = self.n = len(numbers) * per
        self.n_programs, self.parameters, self.memory = len(numbers), parameters, memory
        self._kinds, self.registers = program.registers, _Registers(program.registers, n)
        types = {kind: bits_of(kind) for kind in program.registers.values()}
        self._all = {kind: np.full(n, -1 % 256**bits.itemsize, bits) for kind, bits in types.items()}
        self.undefined = {name: self._all[kind] for name, kind in program.registers.items()}
        """Set bits are those of a register that come of something that was never written; without an entry: none."""
        tid, number = np.tile(np.arange(per, dtype=np.uint32), len(numbers)), np.repeat(numbers, per)
        self.program = np.repeat(np.arange(len(numbers)), per)
        self.warp = tid // 32
        self.id = number.astype(np.int64) * per + tid
        """Number of each thread in the launch."""
        self.special = {"%tid.x": tid, "%ntid.x": np.full(n, per, np.uint32), "%laneid": tid % 32, "%warpid": self.warp}
        for axis, size, step in zip("xyz", grid, (1, grid[0], grid[0] * grid[1]), strict=True):
            self.special[f"%ctaid.{axis}"] = (number // step % size).astype(np.uint32)
            self.special[f"%nctaid.{axis}"] = np.full(n, size, np.uint32)
        self.shared = Shared(len(numbers), shared, options.watches)
        self.at = np.zeros(n, np.int32)
        """Block where each thread goes on."""
        self.is_waiting = np.zeros(n, bool)
        """Whether it waits at a barrier."""
        self.instruction = Instruction("", ())
        """Instruction that runs now."""

    def write(self, name: str, selection: Selection, value: Array, undefined: Array | None) -> None:
        """Set a register, and which of its bits are undefined; None: none."""
        self.registers[name][selection] = value
        mask = self.undefined.get(name)
        if undefined is None and (mask is None or size_of(selection) == self.n):
            self.undefined.pop(name, None)
            return
        if mask is None or mask is self._all[self._kinds[name]]:
            mask = np.zeros_like(self.registers[name]) if mask is None else mask.copy()
        mask[selection] = 0 if undefined is None else undefined
        self.undefined[name] = mask
        if not mask.any():
            del self.undefined[name]

    def check_defined(self, names: Sequence[str], selection: Selection, use: str) -> None:
        """Fault if one of these registers is undefined where it decides on something."""
        for name in self.undefined.keys() & set(names):
            is_undefined = self.undefined[name][selection] != 0
            if is_undefined.any():
                what = f"{use} {name}, which comes of something that was never written"
                raise Fault(what, self.id[selection][int(is_undefined.argmax())])

    def warps(self, selection: Selection, what: str) -> int:
        """Number of warps that these threads are; Fault if they are not all of them whole."""
        lanes = np.bincount(np.arange(self.n)[selection] // 32)
        partial = np.flatnonzero((lanes > 0) & (lanes < 32))
        if len(partial):
            raise Fault(f"{what} without all threads of the warp", self.id[32 * partial[0]])
        return int(np.count_nonzero(lanes))


def size_of(selection: Selection) -> int:
    """Number of threads that are selected."""
    return selection.stop - selection.start if isinstance(selection, slice) else len(selection)


def among(mask: Array, within: Selection) -> Selection | None:
    """Select those of some threads for which the mask holds; None: none of them."""
    places = np.flatnonzero(mask)
    if len(places) in (0, len(mask)):
        return within if len(places) else None
    if not isinstance(within, slice):
        return within[places]
    first, last = int(places[0]) + within.start, int(places[-1]) + within.start
    return slice(first, last + 1) if last - first + 1 == len(places) else places + within.start
