"""Conversions and moves: cvt, mov and cvta, PTX ISA 9.7.9."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tritopt.tools.ptx import floats
from tritopt.tools.ptx.arithmetic import WIDEN
from tritopt.tools.ptx.floats import Array
from tritopt.tools.ptx.operands import Execute, any_bit, computation, listed
from tritopt.tools.ptx.program import Instruction, Program
from tritopt.tools.ptx.threads import dtype_of

_WHOLE: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_NARROW = {"bf16": floats.to_bf16, "f16": floats.to_f16}


def decode_conversion(instruction: Instruction, program: Program) -> Execute | None:
    """Executable of cvt; None if its pair of types or a modifier is not known."""
    types = [part for part in instruction.parts[1:] if re.fullmatch(r"[suf]\d+(x2)?|bf16(x2)?|e4m3x2", part)]
    modifiers = set(instruction.parts[1:]) - set(types)
    if len(types) != 2 or modifiers - {"rn", "ftz", *_WHOLE}:
        return None
    target, source = types
    if types == ["f16x2", "e4m3x2"] and modifiers == {"rn"}:
        return computation(instruction, _from_e4m3, ["b16"], program)
    if target.endswith("x2"):
        if source != "f32" or modifiers != {"rn"}:
            return None
        narrow = _NARROW[target[:-2]]
        function = lambda high, low: (narrow(high).astype(np.uint32) << np.uint32(16)) | narrow(low)  # noqa: E731
        return computation(instruction, function, ["f32", "f32"], program, _halves)
    of_one = _conversion(target, source, modifiers)
    if of_one is None:
        return None
    is_of_integers = "f" not in source + target
    spread = (lambda values, masks: of_one(masks[0].view(values[0].dtype))) if is_of_integers else any_bit
    return computation(instruction, of_one, [source], program, spread)


def _conversion(target: str, source: str, modifiers: set[str]) -> Callable[[Array], Array] | None:
    is_from_float, is_to_float = "f" in source, "f" in target
    to = dtype_of(target)
    whole = next((_WHOLE[part] for part in modifiers if part in _WHOLE), None)
    if not is_from_float:
        return (lambda x: x.astype(to)) if target not in _NARROW else None
    steps: list[Callable[[Array], Array]] = [WIDEN[source]] if source in WIDEN else []
    steps += [floats.flush] if "ftz" in modifiers and source != "f64" else []
    steps += [whole] if whole else []
    if not is_to_float:
        if whole is None:
            return None
        steps += [lambda x: floats.to_integer(x, to)]
    elif target in _NARROW:
        if source == "f64" or whole:
            return None
        steps += [_NARROW[target]]
    else:
        # bf16 widens with its NaN as it is.
        steps += [] if source in WIDEN else [lambda x: floats.canonical(x.astype(to))]
        steps += [lambda x: x.astype(to)] if source in WIDEN and target == "f64" else []
        steps += [floats.flush] if "ftz" in modifiers and target == "f32" else []

    def convert(x: Array) -> Array:
        for step in steps:
            x = step(x)
        return x

    return convert


def _from_e4m3(codes: Array) -> Array:
    """Two bytes of float8_e4m3fn, exact in fp16. All ones but the sign are NaN; there is no infinity."""
    code = np.ascontiguousarray(codes).view(np.uint8)
    # Exponents of fp16 are 8 more: (code & 0x7F) << 7 is 2^8 times too small.
    size = ((code & np.uint8(0x7F)).astype(np.uint16) << np.uint16(7)).view(np.float16) * np.float16(256)
    bits = size.view(np.uint16) | ((code & np.uint8(0x80)).astype(np.uint16) << np.uint16(8))
    return np.where((code & 0x7F) == 0x7F, floats.NAN[2], bits).astype(np.uint16).view(np.uint32)


def _halves(values: Sequence[Array], masks: Sequence[Array]) -> Array:
    high, low = (np.where(mask != 0, np.uint32(0xFFFF), np.uint32(0)) for mask in masks)
    return high << np.uint32(16) | low


def decode_move(instruction: Instruction, program: Program) -> Execute:
    """Executable of mov, also between a register and several narrower ones, the lowest bits first."""
    kind, (to, of) = instruction.parts[-1], instruction.operands
    size = dtype_of(kind).itemsize

    def split(x: Array) -> list[Array]:
        n = len(listed(to))
        return list(np.ascontiguousarray(x).view(f"u{size // n}").reshape(-1, n).T)

    def join(*xs: Array) -> Array:
        return np.stack(np.broadcast_arrays(*xs), -1).view(f"u{size}").reshape(-1)

    n = len(listed(of))
    function: Callable[..., Any] = split if to.startswith("{") else join if n > 1 else lambda x: x
    types = [f"b{8 * size // n}"] * n if kind != "pred" else [kind]
    # Undefined bits go where all bits go.
    return computation(instruction, function, types, program, lambda values, masks: function(*masks))
