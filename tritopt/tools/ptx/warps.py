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


def _whole_warps(instruction: Instruction, program: Program) -> Callable[[Threads, Selection], int]:
    """Counter of warps, all of whose threads must take part: the last operand, a mask, must name them all."""
    mask = reader(instruction.operands[-1], "b32", program)

    def count(threads: Threads, selection: Selection) -> int:
        if (mask(threads, selection) != 0xFFFFFFFF).any():
            raise NotImplementedError(f"{program.name}: the machine does not know `{instruction}` of a part of a warp")
        return threads.warps(selection, "an exchange")

    return count


def decode_shuffle(instruction: Instruction, program: Program) -> Execute | None:
    """Executable of shfl.sync among all threads of a warp; the predicate says whether the lane was in range."""
    targets, mode = listed(instruction.operands[0]), instruction.parts[2]
    count = _whole_warps(instruction, program)
    write, *notes = [writer(target, program) for target in targets]
    value, read_by, read_clamp = (reader(operand, "b32", program) for operand in instruction.operands[1:4])
    read_mask = undefined(instruction.operands[1], "b32", program)
    lanes = registers_in(instruction.operands[2:4], program)

    def execute(threads: Threads, selection: Selection) -> None:
        n_warps = count(threads, selection)
        threads.check_defined(lanes, selection, "lane of a shuffle from")

        def by_lane(x: Array) -> Array:
            return full(x, selection).reshape(n_warps, 32)

        n, c = (by_lane(read(threads, selection)).astype(np.int64) for read in (read_by, read_clamp))
        n, segment, last = n & 31, c >> 8 & 31, c & 31
        low, high = _LANES & segment, (_LANES & segment) | (last & ~segment)
        target = {"bfly": _LANES ^ n, "idx": low | (n & ~segment), "down": _LANES + n, "up": _LANES - n}[mode]
        is_valid = target >= high if mode == "up" else target <= high
        lane = np.where(is_valid, target, _LANES)
        both = (by_lane(read(threads, selection)) for read in (value, read_mask))
        result, mask = (np.take_along_axis(each, lane, 1).reshape(-1) for each in both)
        write(threads, selection, result, mask if mask.any() else None)
        for note in notes:
            note(threads, selection, is_valid.reshape(-1), None)

    return execute


def decode_reduction(instruction: Instruction, program: Program) -> Execute | None:
    """Executable of redux.sync among all threads of a warp."""
    name, *modifiers, kind = instruction.parts[2:]
    if name not in _REDUCE or name == "not":
        return None
    function, count = _REDUCE[name], _whole_warps(instruction, program)
    is_float = kind == "f32"
    if set(modifiers) - ({"NaN"} if is_float else set()) or (is_float and name not in ("min", "max")):
        return None
    write, read = writer(instruction.operands[0], program), reader(instruction.operands[1], kind, program)
    read_mask = undefined(instruction.operands[1], kind, program)

    def execute(threads: Threads, selection: Selection) -> None:
        n_warps = count(threads, selection)
        values = full(read(threads, selection), selection).reshape(n_warps, 32)
        if is_float:
            pick, result = minimum if name == "min" else maximum, values[:, 0]
            for i in range(1, 32):
                result = pick(result, values[:, i], keeps_nan="NaN" in modifiers)
        else:
            result = function.reduce(values, axis=1).astype(values.dtype)  # type: ignore[attr-defined]
        is_undefined = np.repeat(read_mask(threads, selection).reshape(n_warps, 32).any(1), 32)
        write(threads, selection, np.repeat(result, 32), is_undefined if is_undefined.any() else None)

    return execute
