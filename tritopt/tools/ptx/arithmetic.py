"""Arithmetic, logic, comparison and selection: PTX ISA 9.7.1 to 9.7.8, as tables of functions of arrays."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, TypeAlias

import numpy as np

from tritopt.tools.ptx import floats, integers
from tritopt.tools.ptx.floats import Array
from tritopt.tools.ptx.operands import Execute, any_bit, computation
from tritopt.tools.ptx.program import Instruction, Program
from tritopt.tools.ptx.threads import dtype_of

Function: TypeAlias = Callable[..., Any]
"""Function of arrays that gives one array, or one for each part of the first operand."""

LOGIC: dict[str, Function] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
# Each letter is an operand's type: t the instruction's, w twice as wide, u u32.
_INTEGERS: dict[str, tuple[str, Function]] = {
    "add": ("tt", np.add),
    "sub": ("tt", np.subtract),
    "mul.lo": ("tt", np.multiply),
    "mul.hi": ("tt", integers.multiply_high),
    "mul.wide": ("tt", lambda x, y: integers.widened(x) * integers.widened(y)),
    "mad.lo": ("ttt", lambda x, y, z: x * y + z),
    "mad.wide": ("ttw", lambda x, y, z: integers.widened(x) * integers.widened(y) + z),
    "div": ("tt", integers.quotient),
    "rem": ("tt", lambda x, y: x - integers.quotient(x, y) * y),
    "min": ("tt", np.minimum),
    "max": ("tt", np.maximum),
    "abs": ("t", np.abs),
    "neg": ("t", np.negative),
    "shl": ("tu", integers.shift_left),
    "shr": ("tu", integers.shift_right),
    "bfe": ("tuu", integers.extract),
    "bfi": ("ttuu", integers.insert),
    "prmt": ("uuu", integers.permute),
    "lop3": ("tttu", integers.logic3),
    **{name: ("t" if name == "not" else "tt", function) for name, function in LOGIC.items()},
}
_FLOATS: dict[str, tuple[int, Function]] = {
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "mul": (2, np.multiply),
    "div": (2, np.divide),
    "sqrt": (1, np.sqrt),
    "rcp": (1, lambda x: 1 / x),
    "rsqrt": (1, floats.in_double(lambda x: 1 / np.sqrt(x))),
    "ex2": (1, floats.in_double(np.exp2)),
    "lg2": (1, floats.in_double(np.log2)),
    "abs": (1, floats.absolute),
    "neg": (1, floats.negated),
}
"""Number of operands, and the function, of which NaN comes out as the canonical one."""
_COMPARE: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_OF_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_MODIFIERS = {"rn", "ftz", "approx", "full", "NaN"}
WIDEN = {"bf16": floats.from_bf16, "f16": floats.from_f16}


def decode_arithmetic(instruction: Instruction, program: Program, inexact: bool) -> Execute | None:
    """Executable of an instruction that these tables have, else None."""
    if instruction.name == "selp":
        return computation(instruction, _select, [instruction.parts[-1]] * 2 + ["pred"], program, _spread_of_selection)
    typed = _setp(instruction) if instruction.name == "setp" else _typed(instruction, instruction.parts, inexact)
    if typed is None:
        return None
    spread = _SPREAD.get(instruction.name) or _SPREAD.get(instruction.parts[-1], any_bit)
    return computation(instruction, typed[1], typed[0], program, spread)


def _typed(instruction: Instruction, parts: Sequence[str], inexact: bool) -> tuple[list[str], Function] | None:
    """Types of the operands, and the function."""
    kind, modifiers = parts[-1], parts[1:-1]
    if kind.endswith("x2") and (one := _typed(instruction, [*parts[:-1], kind[:-2]], inexact)):
        return [kind] * len(one[0]), _pairwise(one[1], dtype_of(kind[:-2]))
    if kind in WIDEN and parts[-2] == "f32" and (one := _typed(instruction, parts[:-1], inexact)):
        # Mixed precision: all but the last operand are 16 bits wide.
        n, function, widen = len(one[0]) - 1, one[1], WIDEN[kind]
        return [kind] * n + ["f32"], lambda *xs: function(*map(widen, xs[:-1]), xs[-1])
    if kind in WIDEN and _MODIFIERS.issuperset(modifiers):
        return _half(parts[0], kind, modifiers, len(instruction.operands) - 1)
    if kind == "pred":
        is_not = parts[0] == "not"
        return (["pred"] * (1 if is_not else 2), LOGIC[parts[0]]) if parts[0] in LOGIC else None
    if re.fullmatch(r"[bsu]\d+", kind):
        entry = _INTEGERS.get(".".join(parts[:-1]))
        if entry is None:
            return None
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        return [{"t": kind, "w": wide, "u": "u32"}[letter] for letter in entry[0]], entry[1]
    if (parts[0], kind, modifiers) == ("add", "f32", ["rm"]):
        return ["f32", "f32"], lambda x, y: floats.canonical(floats.add_down(x, y))
    if kind not in ("f32", "f64") or not _MODIFIERS.issuperset(modifiers):
        return None
    return _float(parts[0], kind, modifiers, len(instruction.operands) - 1, inexact)


def _float(
    name: str, kind: str, modifiers: Sequence[str], n_sources: int, inexact: bool
) -> tuple[list[str], Function] | None:
    if name in ("fma", "mad") and kind == "f32":
        n, function = 3, floats.fma32
    elif name in ("min", "max"):
        pick = partial(floats.minimum if name == "min" else floats.maximum, keeps_nan="NaN" in modifiers)
        n, function = n_sources, lambda *xs: reduce(pick, xs)
    elif name in _FLOATS:
        n, function = _FLOATS[name]
    else:
        return None
    steps: list[Function] = [] if name in ("abs", "neg") else [floats.canonical]
    steps += [floats.flush] if "ftz" in modifiers else []
    before = floats.flush if "ftz" in modifiers else None

    def compute(*operands: Array) -> Array:
        xs = operands if before is None else tuple(map(before, operands))
        result = reduce(lambda x, step: step(x), steps, function(*xs))
        return floats.one_ulp_off(xs[0], result) if inexact else result

    return [kind] * n, compute


def _half(name: str, kind: str, modifiers: Sequence[str], n_sources: int) -> tuple[list[str], Function] | None:
    """Arithmetic of 16-bit floats: in fp64, where it is exact or rounded so that rounding again does no harm."""
    if name in ("abs", "neg"):
        return [kind], _FLOATS[name][1]
    one = (["f64"] * 3, floats.fma_to_odd) if name == "fma" else _float(name, "f64", modifiers, n_sources, False)
    if one is None or name not in ("fma", "add", "sub", "mul", "min", "max"):
        return None
    function, widen = one[1], WIDEN[kind]
    narrow = floats.f64_to_bf16 if kind == "bf16" else floats.to_f16
    return [kind] * len(one[0]), lambda *xs: narrow(function(*(widen(x).astype(np.float64) for x in xs)))


def _spread_in_halves(values: Sequence[Array], masks: Sequence[Array]) -> Array:
    half = f"u{masks[0].dtype.itemsize // 2}"
    is_undefined = any_bit(values, [mask.view(half) for mask in masks])
    return np.where(is_undefined, ~np.zeros(1, half), np.zeros(1, half)).view(masks[0].dtype)


def _spread_of_shift(shift: Function) -> Function:
    def spread(values: Sequence[Array], masks: Sequence[Array]) -> Array:
        moved = shift(masks[0].view(values[0].dtype), values[1]).view(masks[0].dtype)
        return np.asarray(np.where(masks[1] != 0, ~moved.dtype.type(0), moved))

    return spread


# Compilers pack two numbers of which one is undefined, and take the other one out: its bits must stay apart.
_SPREAD: dict[str, Function] = {
    **dict.fromkeys(("f32x2", "bf16x2", "f16x2", "s16x2", "u16x2"), _spread_in_halves),
    "setp": any_bit,
    "and": lambda v, m: (m[0] | m[1]) & (v[0] | m[0]) & (v[1] | m[1]),
    "or": lambda v, m: (m[0] | m[1]) & (~v[0] | m[0]) & (~v[1] | m[1]),
    "xor": lambda v, m: m[0] | m[1],
    "prmt": lambda v, m: np.where(m[2] != 0, ~np.uint32(0), integers.permute(m[0], m[1], v[2])),
    "shl": _spread_of_shift(integers.shift_left),
    "shr": _spread_of_shift(integers.shift_right),
}


def _pairwise(function: Function, half: np.dtype[Any]) -> Function:
    """Apply a function to both halves of packed numbers."""

    def both(*operands: Array) -> Array:
        pairs = [np.ascontiguousarray(operand).view(half) for operand in np.broadcast_arrays(*operands)]
        return np.ascontiguousarray(function(*pairs)).view(operands[0].dtype)

    return both


def comparison(name: str, kind: str) -> Function:
    """Compare numbers. Beside NaN what ends in u (equ, ltu ...) is true, and all else but `nan` is false."""
    if kind in WIDEN:
        of_f32, widen = comparison(name, "f32"), WIDEN[kind]
        return lambda x, y: of_f32(widen(x), widen(y))
    if kind[0] != "f":
        return _COMPARE[_OF_UNSIGNED.get(name, name)]
    if name in ("num", "nan"):
        return lambda x, y: (np.isnan(x) | np.isnan(y)) == (name == "nan")
    is_unordered = name not in _COMPARE
    compare = _COMPARE[name[:-1] if is_unordered else name]
    return lambda x, y: np.where(np.isnan(x) | np.isnan(y), is_unordered, compare(x, y))


def _setp(instruction: Instruction) -> tuple[list[str], Function] | None:
    """Comparison; p|q get it and its contrary, or, of packed numbers, those of the lower and the upper half."""
    name, *modifiers, kind = instruction.parts[1:]
    join = next((LOGIC[part] for part in modifiers if part in LOGIC), None)
    is_pair = "|" in instruction.operands[0]
    if set(modifiers) - {"ftz", *LOGIC} or (kind.endswith("x2") and (join or not is_pair)):
        return None
    compare = comparison(name, kind.removesuffix("x2"))
    flush = floats.flush if "ftz" in modifiers else lambda x: x

    def halves(x: Array, y: Array) -> list[Array]:
        shifts = np.uint32(0), np.uint32(16)
        return [compare((x >> shift).astype(np.uint16), (y >> shift).astype(np.uint16)) for shift in shifts]

    def both(x: Array, y: Array, *others: Array) -> Array | list[Array]:
        holds = compare(flush(x), flush(y))
        results = [holds if join is None else join(holds, *others) for holds in (holds, ~holds)]
        return results if is_pair else results[0]

    return [kind, kind, "pred"][: len(instruction.operands) - 1], halves if kind.endswith("x2") else both


def _select(x: Array, y: Array, holds: Array) -> Array:
    return np.where(holds, x, y)


def _spread_of_selection(values: Sequence[Array], masks: Sequence[Array]) -> Array:
    """Undefined bits of a selection: those of the selected operand; all, if the predicate is undefined."""
    x, y, by = masks
    return np.where(by, ~x.dtype.type(0), _select(x, y, values[2]))
