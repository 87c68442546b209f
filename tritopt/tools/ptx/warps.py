"""Exchanges between the threads of a warp: shfl and redux, PTX ISA 9.7.9 and 9.7.13."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tritopt.tools.ptx.arithmetic import LOGIC
from tritopt.tools.ptx.floats import Array, maximum, minimum
from tritopt.tools.ptx.operands import Execute, full, listed, reader, registers_in, undefined, writer
from tritopt.tools.ptx.program import Instruction, Program
from tritopt.tools.ptx.threads import Selection, Threads

_LANES = np.arange(32)
_REDUCE: dict[str, Callable[..., Array]] = {"add": np.add, "min": np.minimum, "max": np.maximum, **LOGIC}


def _whole_warps(found: Instruction, program: Program) -> Callable[[Threads, Selection], int]:
    """Counter of warps, all of whose threads must take part: the last operand, a mask, must name them all."""
    mask = reader(found.operands[-1], "b32", program)

    def count(threads: Threads, some: Selection) -> int:
        if (mask(threads, some) != 0xFFFFFFFF).any():
            raise NotImplementedError(f"{program.name}: the machine does not know `{found}` of a part of a warp")
        return threads.warps(some, "an exchange")

    return count


def decode_shuffle(found: Instruction, program: Program) -> Execute | None:
    """Executable of shfl.sync among all threads of a warp; the predicate says whether the lane was in range."""
    targets, mode = listed(found.operands[0]), found.parts[2]
    count = _whole_warps(found, program)
    write, *notes = [writer(target, program) for target in targets]
    value, read_by, read_clamp = (reader(operand, "b32", program) for operand in found.operands[1:4])
    read_mask = undefined(found.operands[1], "b32", program)
    lanes = registers_in(found.operands[2:4], program)

    def execute(threads: Threads, some: Selection) -> None:
        n_warps = count(threads, some)
        threads.check_defined(lanes, some, "lane of a shuffle from")

        def by_lane(x: Array) -> Array:
            return full(x, some).reshape(n_warps, 32)

        n, c = (by_lane(read(threads, some)).astype(np.int64) for read in (read_by, read_clamp))
        n, segment, last = n & 31, c >> 8 & 31, c & 31
        low, high = _LANES & segment, (_LANES & segment) | (last & ~segment)
        target = {"bfly": _LANES ^ n, "idx": low | (n & ~segment), "down": _LANES + n, "up": _LANES - n}[mode]
        is_valid = target >= high if mode == "up" else target <= high
        lane = np.where(is_valid, target, _LANES)
        both = (by_lane(read(threads, some)) for read in (value, read_mask))
        result, mask = (np.take_along_axis(each, lane, 1).reshape(-1) for each in both)
        write(threads, some, result, mask if mask.any() else None)
        for note in notes:
            note(threads, some, is_valid.reshape(-1), None)

    return execute


def decode_reduction(found: Instruction, program: Program) -> Execute | None:
    """Executable of redux.sync among all threads of a warp."""
    name, *modifiers, kind = found.parts[2:]
    if name not in _REDUCE or name == "not":
        return None
    function, count = _REDUCE[name], _whole_warps(found, program)
    is_float = kind == "f32"
    if set(modifiers) - ({"NaN"} if is_float else set()) or (is_float and name not in ("min", "max")):
        return None
    write, read = writer(found.operands[0], program), reader(found.operands[1], kind, program)
    read_mask = undefined(found.operands[1], kind, program)

    def execute(threads: Threads, some: Selection) -> None:
        n_warps = count(threads, some)
        values = full(read(threads, some), some).reshape(n_warps, 32)
        if is_float:
            pick, result = minimum if name == "min" else maximum, values[:, 0]
            for i in range(1, 32):
                result = pick(result, values[:, i], keeps_nan="NaN" in modifiers)
        else:
            result = function.reduce(values, axis=1).astype(values.dtype)  # type: ignore[attr-defined]
        is_undefined = np.repeat(read_mask(threads, some).reshape(n_warps, 32).any(1), 32)
        write(threads, some, np.repeat(result, 32), is_undefined if is_undefined.any() else None)

    return execute
