"""Loads and stores of parameters, global and shared memory, and of matrices in the latter: PTX ISA 9.7.9."""

from __future__ import annotations

from typing import Any

import numpy as np

from tritopt.tools.ptx.operands import Execute, address, full, listed, reader, registers_in, undefined, writer
from tritopt.tools.ptx.program import Instruction, Program
from tritopt.tools.ptx.threads import Selection, Threads, dtype_of

_VECTORS = {"v2": 2, "v4": 4, "v8": 8}
# Hints, which change no result.
_HINTS = {
    "nc", "ca", "cg", "cs", "wb", "wt", "L1", "L2", "evict_first", "evict_last", "evict_normal", "evict_unchanged",
    "no_allocate", "cache_hint", "cta",
}  # fmt: skip


def decode_access(instruction: Instruction, program: Program) -> Execute | None:
    """Executable of ld or st; None if the space or a modifier is not known."""
    space, *modifiers, kind = instruction.parts[1:]
    if space not in ("param", "global", "shared") or not (_HINTS | _VECTORS.keys()).issuperset(modifiers):
        return None
    n, dtype = next((_VECTORS[part] for part in modifiers if part in _VECTORS), 1), dtype_of(kind)
    if space == "param":
        return _parameter(instruction, dtype, program) if instruction.name == "ld" else None
    if instruction.name == "ld":
        return (_load if space == "global" else _load_shared)(instruction, dtype, n, program)
    return (_store if space == "global" else _store_shared)(instruction, dtype, n, program)


def _parameter(instruction: Instruction, dtype: np.dtype[Any], program: Program) -> Execute:
    name, write = instruction.operands[1].strip("[] "), writer(listed(instruction.operands[0])[0], program)
    if name not in dict(program.parameters):
        raise NotImplementedError(f"{instruction}: not a whole parameter")

    def execute(threads: Threads, selection: Selection) -> None:
        write(threads, selection, threads.parameters[name].astype(f"u{dtype.itemsize}").view(dtype), None)

    return execute


def _load(instruction: Instruction, dtype: np.dtype[Any], n: int, program: Program) -> Execute:
    where = address(instruction.operands[1], "u64", program)
    writes = [writer(name, program) for name in listed(instruction.operands[0])]

    def execute(threads: Threads, selection: Selection) -> None:
        words = threads.memory.load(where(threads, selection), dtype.itemsize, n, threads.id[selection], instruction)
        for write, word in zip(writes, words, strict=True):
            write(threads, selection, word.view(dtype), None)

    return execute


def _store(instruction: Instruction, dtype: np.dtype[Any], n: int, program: Program) -> Execute:
    where, values = address(instruction.operands[0], "u64", program), listed(instruction.operands[1])
    reads, names = [reader(name, f"b{8 * dtype.itemsize}", program) for name in values], registers_in(values, program)
    assert len(reads) == n, instruction

    def execute(threads: Threads, selection: Selection) -> None:
        threads.check_defined(names, selection, "store of")
        values = [read(threads, selection) for read in reads]
        threads.memory.store(where(threads, selection), values, threads.id[selection], instruction)

    return execute


def _load_shared(instruction: Instruction, dtype: np.dtype[Any], n: int, program: Program) -> Execute:
    where = address(instruction.operands[1], "u32", program)
    writes = [writer(name, program) for name in listed(instruction.operands[0])]

    def execute(threads: Threads, selection: Selection) -> None:
        ids, size = threads.id[selection], dtype.itemsize
        places = threads.shared.places(where(threads, selection), n * size, threads.program[selection], ids)
        values, masks = threads.shared.load(places, threads.warp[selection], ids)
        for write, value, mask in zip(writes, values.view(dtype).T, masks.view(f"u{size}").T, strict=True):
            write(threads, selection, np.ascontiguousarray(value), mask if mask.any() else None)

    return execute


def _store_shared(instruction: Instruction, dtype: np.dtype[Any], n: int, program: Program) -> Execute:
    where, values = address(instruction.operands[0], "u32", program), listed(instruction.operands[1])
    kind = f"b{8 * dtype.itemsize}"
    reads, read_masks = ([read(name, kind, program) for name in values] for read in (reader, undefined))

    def execute(threads: Threads, selection: Selection) -> None:
        ids, size = threads.id[selection], dtype.itemsize
        places = threads.shared.places(where(threads, selection), n * size, threads.program[selection], ids)
        both = [[full(read(threads, selection), selection) for read in each] for each in (reads, read_masks)]
        data, masks = (np.stack(each, -1).view(np.uint8) for each in both)
        threads.shared.store(places, data, masks, threads.warp[selection], ids)

    return execute


def decode_matrices(instruction: Instruction, program: Program) -> Execute | None:
    """Executable of ldmatrix or stmatrix: n matrices of eight rows, each of 16 bytes.

    Thread 8 i + r has the address of row r of matrix i; thread 4 r + c holds elements 2 c and 2 c + 1 of row r of each
    matrix, or, with .trans, of column r.
    """
    is_load = instruction.name == "ldmatrix"
    if instruction.parts[-1] != "b16" or "m8n8" not in instruction.parts:
        return None
    place, values = (instruction.operands[1], instruction.operands[0]) if is_load else instruction.operands
    where, names = address(place, "u32", program), listed(values)
    is_transposed, n = "trans" in instruction.parts, len(names)
    reads = [] if is_load else [reader(name, "b32", program) for name in names]
    read_masks = [undefined(name, "b32", program) for name in names]
    writes = [writer(name, program) for name in names] if is_load else []

    def execute(threads: Threads, selection: Selection) -> None:
        n_warps = threads.warps(selection, "matrices of shared memory")
        ids, warp, program = threads.id[selection], threads.warp[selection], threads.program[selection]
        # Only the first 8 n threads of a warp say where a row is.
        says = np.tile(np.arange(32) < 8 * n, n_warps)
        rows = threads.shared.places(where(threads, selection)[says], 16, program[says], ids[says])
        tiles = rows.reshape(n_warps, n, 8, 8, 2)
        tiles = (tiles.swapaxes(2, 3) if is_transposed else tiles).reshape(n_warps, n, 32, 4)
        for i in range(n):
            places = tiles[:, i].reshape(-1, 4)
            if is_load:
                value, mask = (x.view(np.uint32).reshape(-1) for x in threads.shared.load(places, warp, ids))
                writes[i](threads, selection, value, mask if mask.any() else None)
            else:
                both = (full(read[i](threads, selection), selection) for read in (reads, read_masks))
                data, masks = (np.ascontiguousarray(x).view(np.uint8).reshape(-1, 4) for x in both)
                threads.shared.store(places, data, masks, warp, ids)

    return execute
