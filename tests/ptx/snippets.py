"""Kernels of a few lines of PTX, run in the machine on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tritopt.tools.ptx.machine import Machine
from tritopt.tools.ptx.memory import Memory
from tritopt.tools.ptx.program import parse
from tritopt.tools.ptx.threads import Options

KERNEL = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry snippet({parameters})
.reqntid {n_threads}
{{
    .reg .pred %p<8>;
    .reg .b16 %h<8>;
    .reg .b32 %r<16>;
    .reg .b64 %rd<16>;
    {body}
    ret;
}}
"""
# Registers of each thread's own place in arrays of 1, 2, 4 and 8 bytes.
PLACES = """
    mov.u32 %r15, %tid.x;
    mov.u32 %r14, %ctaid.x;
    mov.u32 %r13, %ntid.x;
    mad.lo.s32 %r15, %r14, %r13, %r15;
"""
SIZE = {"b8": 1, "b16": 2, "b32": 4, "b64": 8}


def machine(body: str, n_parameters: int, n_threads: int = 32, shared: int = 0) -> Machine:
    """Machine of a kernel with so many addresses as parameters, in %rd8, %rd9 ..."""
    parameters = ", ".join(f".param .u64 .ptr .global .align 1 p{i}" for i in range(n_parameters))
    loads = "\n".join(f"ld.param.b64 %rd{8 + i}, [p{i}];" for i in range(n_parameters))
    return Machine(
        parse(KERNEL.format(parameters=parameters, n_threads=n_threads, body=f"{PLACES}{loads}\n{body}")), shared
    )


def run(
    body: str, *arrays: np.ndarray[Any, Any], n_threads: int = 32, grid: int = 1, shared: int = 0,
    options: Options = Options(),  # noqa: B008
) -> None:  # fmt: skip
    """Run PTX on these arrays, whose addresses are in %rd8, %rd9 ...; %r15 is the thread's number in the launch."""
    ranges = [(array.ctypes.data, array.ctypes.data + array.nbytes) for array in arrays]
    addresses = [array.ctypes.data for array in arrays]
    machine(body, len(arrays), n_threads, shared).launch(
        addresses, (grid, 1, 1), Memory(ranges, options.watches), options
    )


def each(space: str, array: int, kind: str, register: str) -> str:
    """Load or store of the thread's own element of an array."""
    place = f"mul.wide.u32 %rd0, %r15, {SIZE[kind]}; add.s64 %rd0, %rd0, %rd{8 + array};"
    access = f"ld.global.{kind} {register}, [%rd0];" if space == "ld" else f"st.global.{kind} [%rd0], {register};"
    return f"{place} {access}"


REGISTER = {"b8": "%h", "b16": "%h", "b32": "%r", "b64": "%rd"}


def compute(body: str, kinds: str, *operands: Sequence[int], n_threads: int = 32) -> list[int]:
    """Results of an instruction, bits for bits: one thread for each place of the operands.

    Args:
        body: the instruction, in which {d} stands for the result and {a}, {b}, {c} for the operands.
        kinds: their types, b16, b32 or b64, of the result first.
        operands: bits of each.
        n_threads: a multiple of 32; what is left over runs on zeros.
    """
    of_result, *others = kinds.split()
    n = len(operands[0])
    assert n <= n_threads
    arrays = [np.zeros(n_threads, f"u{SIZE[kind]}") for kind in kinds.split()]
    loads, names = "", {"d": f"{REGISTER[of_result]}1"}
    for i, (kind, values) in enumerate(zip(others, operands, strict=True), 1):
        width = 256 ** SIZE[kind]
        arrays[i][:n] = [value % width for value in values]
        name = f"{REGISTER[kind]}{i + 1}"
        names["abcd"[i - 1]] = name
        loads += each("ld", i, kind, name)
    names["d"] = f"{REGISTER[of_result]}1"
    run(f"{loads}\n{body.format(**names)}\n{each('st', 0, of_result, names['d'])}", *arrays, n_threads=n_threads)
    return [int(value) for value in arrays[0][:n]]


def f32(*values: float) -> list[int]:
    """Bits of fp32 numbers."""
    with np.errstate(over="ignore"):
        return [int(value) for value in np.array(values, np.float64).astype(np.float32).view(np.uint32)]


def f64(*values: float) -> list[int]:
    """Bits of fp64 numbers."""
    return [int(value) for value in np.array(values, np.float64).view(np.uint64)]
