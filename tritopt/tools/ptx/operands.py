"""Operands of instructions: readers and writers of registers, constants and addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, TypeAlias

import numpy as np

from tritopt.tools.ptx.floats import Array
from tritopt.tools.ptx.program import Instruction, Program
from tritopt.tools.ptx.threads import SPECIAL, Selection, Threads, bits_of, dtype_of, size_of

Read: TypeAlias = Callable[[Threads, Selection], Array]
Write: TypeAlias = "Callable[[Threads, Selection, Array, Array | None], None]"
Execute: TypeAlias = Callable[[Threads, Selection], None]


def listed(operand: str) -> list[str]:
    """Parts of `{a, b}` and of `p|q`."""
    return [part.strip() for part in operand.strip("{} ").replace("|", ",").split(",")]


def registers_in(operands: Sequence[str], program: Program) -> list[str]:
    """Names of the registers among these operands."""
    return [part for operand in operands for part in listed(operand) if part in program.registers]


def undefined(operand: str, kind: str, program: Program) -> Read:
    """Bits of an operand that are undefined, as `reader` has its values."""
    bits = bits_of(kind)

    def read(threads: Threads, selection: Selection) -> Array:
        mask = threads.undefined.get(operand)
        return np.zeros(size_of(selection), bits) if mask is None else mask[selection].astype(bits)

    return read


def reader(operand: str, kind: str, program: Program) -> Read:
    """Values of an operand as this type: of a wider register its lower bits, a narrower one is extended by zeros."""
    dtype, bits = dtype_of(kind), bits_of(kind)
    if operand in program.registers:
        if bits_of(program.registers[operand]) == bits:
            return lambda threads, selection: threads.registers[operand][selection].view(dtype)
        return lambda threads, selection: threads.registers[operand][selection].astype(bits).view(dtype)
    if operand.startswith("%"):
        if operand not in SPECIAL:
            raise KeyError(operand)
        return lambda threads, selection: threads.special[operand][selection].astype(bits).view(dtype)
    number = 0 if operand == program.shared_symbol else _number(operand)
    constant = np.array([number % 256**dtype.itemsize if dtype.kind != "b" else number], bits).view(dtype)
    return lambda threads, selection: constant


def _number(text: str) -> int:
    return int(text[2:], 16) if text[:2].lower() in ("0f", "0d") else int(text.rstrip("U"), 0)


def writer(operand: str, program: Program) -> Write:
    """Setter of a register: signed values are extended by their sign, all others by zeros."""
    if operand == "_":
        return lambda threads, selection, value, undefined: None
    bits = bits_of(program.registers[operand])

    def write(threads: Threads, selection: Selection, value: Array, undefined: Array | None) -> None:
        if value.dtype.itemsize != bits.itemsize:
            assert value.dtype.kind in "iu", value.dtype
            value = value.astype(bits)
        if undefined is not None:
            is_bool = undefined.dtype.kind == "b"
            undefined = np.where(undefined, ~bits.type(0), bits.type(0)) if is_bool else undefined.astype(bits)
        threads.write(operand, selection, value.view(bits), undefined)

    return write


def address(operand: str, kind: str, program: Program) -> Read:
    """Addresses, int64 [threads], of `[register + offset]`. Fault if they come of something that was never written."""
    base, _, offset = operand.strip("[] ").partition("+")
    read, plus = reader(base.strip(), kind, program), np.int64(int(offset.strip() or "0", 0))
    names = registers_in([base], program)

    def addresses(threads: Threads, selection: Selection) -> Array:
        threads.check_defined(names, selection, "address of")
        return full(read(threads, selection).astype(np.int64) + plus, selection)

    return addresses


def full(value: Array, selection: Selection) -> Array:
    """One value per thread, where a constant has one for all."""
    return value if len(value) == size_of(selection) else np.broadcast_to(value, size_of(selection))


def any_bit(values: Sequence[Array], masks: Sequence[Array]) -> Array:
    """Whether any bit of any operand is undefined: so is then all of the result."""
    return np.asarray(reduce(np.logical_or, (mask != 0 for mask in masks)))


def computation(
    instruction: Instruction, function: Callable[..., Any], types: Sequence[str], program: Program,
    spread: Callable[[Sequence[Array], Sequence[Array]], Any] = any_bit,
) -> Execute:  # fmt: skip
    """Instruction that computes its first operand, or each part of it, from the others.

    Args:
        instruction: the instruction, with its operands.
        function: function of the operands' values; gives the result, or one for each part of the first operand.
        types: types of the operands that it reads.
        program: the kernel.
        spread: undefined bits of the results (or a bool, for all of them), from the values of the operands and their
            undefined bits.
    """
    targets, sources = (
        listed(instruction.operands[0]),
        [part for operand in instruction.operands[1:] for part in listed(operand)],
    )
    reads = [reader(source, kind, program) for source, kind in zip(sources, types, strict=True)]
    read_masks = [undefined(source, kind, program) for source, kind in zip(sources, types, strict=True)]
    writes, names = [writer(target, program) for target in targets], set(sources)

    def execute(threads: Threads, selection: Selection) -> None:
        values = [read(threads, selection) for read in reads]
        results = function(*values)
        results = results if len(writes) > 1 else (results,)
        masks: Any = [None] * len(writes)
        if not threads.undefined.keys().isdisjoint(names):
            # Nothing comes of bits that are defined where one bit is like any other.
            wanted = threads.undefined if spread is any_bit else sources
            undefined_bits = [
                read(threads, selection) for name, read in zip(sources, read_masks, strict=True) if name in wanted
            ]
            masks = spread(values, undefined_bits)
            masks = masks if isinstance(masks, list) else [masks] * len(writes)
        for write, result, mask in zip(writes, results, masks, strict=True):
            write(threads, selection, result, mask)

    return execute
