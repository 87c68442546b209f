"""Instruction by instruction, bit for bit: what the PTX ISA says that each one gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx.snippets import compute, each, f32, f64, machine, run
from tritopt.tools.ptx.threads import Options

NAN, INF = math.nan, math.inf
# A NaN with a sign and a payload, which no arithmetic hands on.
ODD_NAN = 0xFFC12345
CANONICAL = 0x7FFFFFFF
ULP = 2.0**-23

B32 = "b32 b32 b32"
CASES: list[tuple[str, str, list[list[int]], list[int]]] = [
    # Rounding to nearest, of ties to even.
    ("add.rn.f32 {d}, {a}, {b};", B32, [f32(1, 1, 1 + ULP, -1), f32(2**-24, 2**-24 + 2**-40, 2**-24, -(2.0**-24))],
     f32(1, 1 + ULP, 1 + 2 * ULP, -1)),
    ("sub.rn.f32 {d}, {a}, {b};", B32, [f32(1, 0, INF), f32(1, 0, INF)], [*f32(0, 0), CANONICAL]),
    ("mul.rn.f32 {d}, {a}, {b};", B32, [f32(1 + ULP, 3e38, -0.0, INF), f32(1 + ULP, 10, 5, 0)],
     [*f32(1 + 2 * ULP, INF, -0.0), CANONICAL]),
    ("div.rn.f32 {d}, {a}, {b};", B32, [f32(1, 1, -1, 0), f32(3, 0, 0, 0)], [0x3EAAAAAB, *f32(INF, -INF), CANONICAL]),
    ("sqrt.rn.f32 {d}, {a};", "b32 b32", [f32(2, -0.0, -1, INF)], [0x3FB504F3, *f32(-0.0), CANONICAL, *f32(INF)]),
    ("sqrt.rn.f64 {d}, {a};", "b64 b64", [f64(2, -1)], [0x3FF6A09E667F3BCD, 0x7FFFFFFFFFFFFFFF]),
    ("add.rn.f64 {d}, {a}, {b};", "b64 b64 b64", [f64(1, 1), f64(2.0**-53, 2.0**-53 + 2.0**-80)], f64(1, 1 + 2.0**-52)),
    # NaN: canonical out of arithmetic, as it is through abs, neg and moves.
    ("add.rn.f32 {d}, {a}, {b};", B32, [[ODD_NAN], f32(1)], [CANONICAL]),
    ("abs.f32 {d}, {a};", "b32 b32", [[*f32(-1, -0.0), ODD_NAN]], [*f32(1, 0), 0x7FC12345]),
    ("neg.f32 {d}, {a};", "b32 b32", [[*f32(1, 0), ODD_NAN]], [*f32(-1, -0.0), 0x7FC12345]),
    ("mov.b32 {d}, {a};", "b32 b32", [[ODD_NAN]], [ODD_NAN]),
    # min and max: -0 is below +0; NaN loses, or wins with .NaN.
    ("min.f32 {d}, {a}, {b};", B32, [[*f32(0, -0.0, 1, NAN), ODD_NAN], [*f32(-0.0, 0, NAN, 2), ODD_NAN]],
     [*f32(-0.0, -0.0, 1, 2), CANONICAL]),
    ("max.f32 {d}, {a}, {b};", B32, [f32(0, -0.0, 1, NAN, -0.0), f32(-0.0, 0, NAN, 2, -0.0)], f32(0, 0, 1, 2, -0.0)),
    ("min.NaN.f32 {d}, {a}, {b};", B32, [f32(1, NAN, 3), f32(NAN, 1, 2)], [CANONICAL, CANONICAL, *f32(2)]),
    ("max.NaN.f32 {d}, {a}, {b};", B32, [f32(1, NAN, 3), f32(NAN, 1, 2)], [CANONICAL, CANONICAL, *f32(3)]),
    ("max.f32 {d}, {a}, {b}, {c};", "b32 b32 b32 b32", [f32(1, 5), f32(2, NAN), f32(3, 4)], f32(3, 5)),
    ("max.f64 {d}, {a}, {b};", "b64 b64 b64", [f64(-0.0, NAN), f64(0.0, 7)], f64(0, 7)),
    # Flushing: subnormals are zeros of their sign, as operands and as results.
    ("add.ftz.f32 {d}, {a}, {b};", B32, [[1, 0x80000001], [0, 0x80000000]], [0, 0x80000000]),
    ("add.f32 {d}, {a}, {b};", B32, [[1], [1]], [2]),
    ("mul.ftz.f32 {d}, {a}, {b};", B32, [f32(-(2.0**-100)), f32(2.0**-40)], [0x80000000]),
    # One rounding: 1 - 2^-46 exactly, where two would give 1 or 0.
    ("fma.rn.f32 {d}, {a}, {b}, {c};", "b32 b32 b32 b32",
     [f32(1 + ULP, 0, INF, 1), f32(1 - ULP, 5, 0, 1), f32(-1, -0.0, 1, -1)],
     [*f32(-(2.0**-46), 0), CANONICAL, *f32(0)]),
    # A product half way between two numbers, and a sum that says to which side: far below the last bit of fp64.
    ("fma.rn.f32 {d}, {a}, {b}, {c};", "b32 b32 b32 b32",
     [f32(*[1 + 2.0**-12] * 2, *[-1 - 2.0**-12] * 2), f32(*[1 + 2.0**-12] * 4), f32(2.0**-80, -(2.0**-80)) * 2],
     f32(1 + 2.0**-11 + ULP, 1 + 2.0**-11, -1 - 2.0**-11, -1 - 2.0**-11 - ULP)),
    # Approximate ones are exact here, and rounded.
    ("sqrt.approx.ftz.f32 {d}, {a};", "b32 b32", [f32(2, 4)], [0x3FB504F3, *f32(2)]),
    ("ex2.approx.ftz.f32 {d}, {a};", "b32 b32", [f32(0.5, 3, -INF)], [0x3FB504F3, *f32(8, 0)]),
    ("lg2.approx.f32 {d}, {a};", "b32 b32", [f32(8, 0, -1)], [*f32(3, -INF), CANONICAL]),
    ("rsqrt.approx.f32 {d}, {a};", "b32 b32", [f32(4, 0)], f32(0.5, INF)),
    ("rcp.approx.ftz.f32 {d}, {a};", "b32 b32", [f32(4, -0.0)], f32(0.25, -INF)),
    # Down, where 1 has an ulp of 2^-23, and below it the half of that.
    ("add.rm.f32 {d}, {a}, {b};", "b32 b32 b32",
     [f32(1, 1, -1, 1, 0, NAN), f32(2.0**-24, -(2.0**-80), -(2.0**-80), -1, 0, 1)],
     [*f32(1), 0x3F7FFFFF, 0xBF800001, 0x80000000, 0, CANONICAL]),
    # Two fp32 numbers in 64 bits; and operands of 16 bits beside fp32, sm_100.
    ("add.rn.f32x2 {d}, {a}, {b};", "b64 b64 b64", [[f32(1)[0] | f32(2)[0] << 32], [f32(3)[0] | f32(NAN)[0] << 32]],
     [f32(4)[0] | CANONICAL << 32]),
    ("add.rn.f32.bf16 {d}, {a}, {b};", "b32 b16 b32", [[0x3F80], f32(2.0**-20)], f32(1 + 2.0**-20)),
    ("fma.rn.f32.f16 {d}, {a}, {b}, {c};", "b32 b16 b16 b32", [[0x3C00], [0x4000], f32(0.5)], f32(2.5)),
    # 16-bit floats, alone and two at a time: rounded once, to even; the canonical NaN.
    ("add.rn.bf16 {d}, {a}, {b};", "b16 b16 b16", [[0x3F80, 0x3F81, 0x7F7F, 0x7FC1], [0x3B80, 0x3B80, 0x7F7F, 0]],
     [0x3F80, 0x3F82, 0x7F80, 0x7FFF]),
    ("sub.rn.f16 {d}, {a}, {b};", "b16 b16 b16", [[0x3C00, 0x7C00], [0x0C00, 0x7C00]], [0x3C00, 0x7FFF]),
    ("add.rn.f16x2 {d}, {a}, {b};", B32, [[0x3C003C01], [0x10001000]], [0x3C003C02]),
    ("mul.rn.bf16x2 {d}, {a}, {b};", B32, [[0x3F81BF81], [0x3F813F81]], [0x3F82BF82]),
    ("add.s16x2 {d}, {a}, {b};", B32, [[0x0001FFFF], [0x00010001]], [0x00020000]),
    ("max.s16x2 {d}, {a}, {b};", B32, [[0x0001FFFF], [0xFFFF0001]], [0x00010001]),
    ("neg.bf16x2 {d}, {a};", "b32 b32", [[0x3F80FFC1]], [0xBF807FC1]),
    ("abs.f16 {d}, {a};", "b16 b16", [[0xBC00]], [0x3C00]),
    ("max.NaN.bf16 {d}, {a}, {b};", "b16 b16 b16", [[0x3F80, 0x8000], [0x7FC0, 0x0000]], [0x7FFF, 0]),
    ("min.f16x2 {d}, {a}, {b};", B32, [[0x3C007E00], [0x40003C00]], [0x3C003C00]),
    # 1.0625^2 is half way between two numbers: a third operand of 2^-126 says to which side.
    ("fma.rn.bf16 {d}, {a}, {b}, {c};", "b16 b16 b16 b16", [[0x3F88, 0x3F88, 0x3F88], [0x3F88, 0x3F88, 0x3F88],
     [0x0080, 0x8080, 0x0000]], [0x3F91, 0x3F90, 0x3F90]),
    # Integers wrap around.
    ("add.s32 {d}, {a}, {b};", B32, [[0x7FFFFFFF, 0xFFFFFFFF], [1, 1]], [0x80000000, 0]),
    ("sub.s64 {d}, {a}, {b};", "b64 b64 b64", [[0], [1]], [2**64 - 1]),
    ("mul.lo.s32 {d}, {a}, {b};", B32, [[0x10001], [0x10001]], [0x20001]),
    ("mul.hi.u32 {d}, {a}, {b};", B32, [[0xFFFFFFFF], [0xFFFFFFFF]], [0xFFFFFFFE]),
    ("mul.hi.s32 {d}, {a}, {b};", B32, [[-1], [2]], [0xFFFFFFFF]),
    ("mul.hi.u64 {d}, {a}, {b};", "b64 b64 b64", [[-1], [-1]], [2**64 - 2]),
    ("mul.wide.s32 {d}, {a}, {b};", "b64 b32 b32", [[-1], [3]], [2**64 - 3]),
    ("mul.wide.u32 {d}, {a}, {b};", "b64 b32 b32", [[-1], [3]], [3 * (2**32 - 1)]),
    ("mul.wide.s16 {d}, {a}, {b};", "b32 b16 b16", [[-2], [3]], [2**32 - 6]),
    ("mad.wide.s32 {d}, {a}, {b}, {c};", "b64 b32 b32 b64", [[-1], [24], [2**40]], [2**40 - 24]),
    ("mad.lo.s32 {d}, {a}, {b}, {c};", "b32 b32 b32 b32", [[5], [7], [-1]], [34]),
    ("div.s32 {d}, {a}, {b};", B32, [[-7, 7, -7, 6], [2, -2, -2, 3]], [2**32 - 3, 2**32 - 3, 3, 2]),
    ("rem.s32 {d}, {a}, {b};", B32, [[-7, 7, -7], [2, -2, -2]], [2**32 - 1, 1, 2**32 - 1]),
    ("div.u32 {d}, {a}, {b};", B32, [[-7], [2]], [(2**32 - 7) // 2]),
    ("min.s32 {d}, {a}, {b};", B32, [[-1], [1]], [2**32 - 1]),
    ("max.u32 {d}, {a}, {b};", B32, [[-1], [1]], [2**32 - 1]),
    ("abs.s32 {d}, {a};", "b32 b32", [[-5, 0x80000000]], [5, 0x80000000]),
    ("neg.s32 {d}, {a};", "b32 b32", [[5]], [2**32 - 5]),
    ("not.b32 {d}, {a};", "b32 b32", [[0xF0F0F0F0]], [0x0F0F0F0F]),
    ("xor.b32 {d}, {a}, {b};", B32, [[0b1100], [0b1010]], [0b0110]),
    # Shifts by the width or more.
    ("shl.b32 {d}, {a}, {b};", B32, [[1, 1, 1, 1], [31, 32, 33, -1]], [0x80000000, 0, 0, 0]),
    ("shr.u32 {d}, {a}, {b};", B32, [[-1, -1, -1], [31, 32, 64]], [1, 0, 0]),
    ("shr.s32 {d}, {a}, {b};", B32, [[-8, -8, 8], [1, 40, 40]], [2**32 - 4, 2**32 - 1, 0]),
    ("shl.b64 {d}, {a}, {b};", "b64 b64 b32", [[1, 1], [63, 64]], [1 << 63, 0]),
    ("shr.s64 {d}, {a}, {b};", "b64 b64 b32", [[-8], [64]], [2**64 - 1]),
    ("shl.b16 {d}, {a}, {b};", "b16 b16 b32", [[1, 1], [15, 16]], [0x8000, 0]),
    # Bytes: of eight, the lower four are a's; 8 more asks for the sign.
    ("prmt.b32 {d}, {a}, {b}, {c};", "b32 b32 b32 b32", [[0x44332211] * 3, [0x88776655] * 3, [0x3210, 0x7654, 0xF048]],
     [0x44332211, 0x88776655, 0xFF115500]),
    ("lop3.b32 {d}, {a}, {b}, {c}, 0xE8;", "b32 b32 b32 b32", [[0b11110000], [0b11001100], [0b10101010]], [0b11101000]),
    ("lop3.b32 {d}, {a}, {b}, {c}, 0x96;", "b32 b32 b32 b32", [[0b1100], [0b1010], [0b0001]], [0b0111]),
    ("bfe.u32 {d}, {a}, {b}, {c};", "b32 b32 b32 b32",
     [[0xABCD1234] * 4, [8, 28, 0, 32], [8, 8, 0, 4]], [0x12, 0xA, 0, 0]),
    ("bfe.s32 {d}, {a}, {b}, {c};", "b32 b32 b32 b32", [[0xABCD1234] * 4, [12, 28, 40, 8], [4, 8, 4, 8]],
     [1, 0xFFFFFFFA, 0xFFFFFFFF, 0x12]),
    ("bfi.b32 {d}, {a}, {b}, 8, {c};", "b32 b32 b32 b32", [[0xFF, 0xFF, 0xFFFF], [0, 0xFFFFFFFF, 0], [4, 0, 40]],
     [0xF00, 0xFFFFFFFF, 0xFFFF00]),
    # Conversions: widening keeps a payload of bf16, narrowing gives the canonical NaN of 16 bits.
    ("cvt.rn.bf16.f32 {d}, {a};", "b16 b32", [[*f32(1 + 2**-8, 1 + 3 * 2**-8, 3.4e38), ODD_NAN, 0x00010001]],
     [0x3F80, 0x3F82, 0x7F80, 0x7FFF, 0x0001]),
    ("cvt.rn.f16.f32 {d}, {a};", "b16 b32", [[*f32(1 + 2**-11, 65520, 2**-25, 3 * 2**-25, -0.0), ODD_NAN]],
     [0x3C00, 0x7C00, 0, 2, 0x8000, 0x7FFF]),
    ("cvt.rn.bf16x2.f32 {d}, {a}, {b};", B32, [f32(1, NAN), f32(2, 0)], [0x3F804000, 0x7FFF0000]),
    ("cvt.rn.f16x2.f32 {d}, {a}, {b};", B32, [f32(1), f32(-2)], [0x3C00C000]),
    # Lower byte first: 1, -0.875, the largest (448), the smallest (2^-9), NaN, -0.
    ("cvt.rn.f16x2.e4m3x2 {d}, {a};", "b32 b16", [[0xB638, 0x017E, 0x807F]], [0xBB003C00, 0x18005F00, 0x80007FFF]),
    ("cvt.f32.bf16 {d}, {a};", "b32 b16", [[0x3F81, 0xFFC1]], [0x3F810000, 0xFFC10000]),
    ("cvt.f32.f16 {d}, {a};", "b32 b16", [[0x3C01, 0x0001, 0xFE01]], [*f32(1 + 2.0**-10, 2.0**-24), CANONICAL]),
    ("cvt.rn.f32.f64 {d}, {a};", "b32 b64", [f64(1 + 2.0**-24, 1e39, NAN)], [*f32(1, INF), CANONICAL]),
    ("cvt.f64.f32 {d}, {a};", "b64 b32", [[*f32(0.1), ODD_NAN]], [*f64(float(np.float32(0.1))), 2**63 - 1]),
    ("cvt.rmi.ftz.f32.f32 {d}, {a};", "b32 b32", [[*f32(-1.5, 2.5), 0x80000001]], [*f32(-2, 2), 0x80000000]),
    ("cvt.rni.f32.f32 {d}, {a};", "b32 b32", [f32(0.5, 1.5, 2.5)], f32(0, 2, 2)),
    # To integers: out of range the nearest; NaN 0, or the lowest where 64 bits take part.
    ("cvt.rzi.s32.f32 {d}, {a};", "b32 b32", [f32(-1.9, 3e9, -INF, NAN)], [2**32 - 1, 0x7FFFFFFF, 0x80000000, 0]),
    ("cvt.rni.s32.f32 {d}, {a};", "b32 b32", [f32(2.5, -3.5)], [2, 2**32 - 4]),
    ("cvt.rzi.u32.f32 {d}, {a};", "b32 b32", [f32(-1, 4e9, 5e9)], [0, 4000000000, 0xFFFFFFFF]),
    ("cvt.rzi.s64.f32 {d}, {a};", "b64 b32", [f32(2.0**63, -2, NAN)], [2**63 - 1, 2**64 - 2, 1 << 63]),
    ("cvt.rzi.s32.f64 {d}, {a};", "b32 b64", [f64(2147483646.9, 1e300, NAN)], [2147483646, 0x7FFFFFFF, 0x80000000]),
    # From integers, and between them: cut, then extended by the sign or by zeros.
    ("cvt.rn.f32.s32 {d}, {a};", "b32 b32", [[-1, 16777217]], f32(-1, 16777216)),
    ("cvt.rn.f32.u32 {d}, {a};", "b32 b32", [[-1]], f32(2.0**32)),
    ("cvt.rn.f32.s64 {d}, {a};", "b32 b64", [[-3]], f32(-3)),
    ("cvt.rn.f64.s64 {d}, {a};", "b64 b64", [[2**53 + 1]], f64(2.0**53)),
    ("cvt.rn.f32.s16 {d}, {a};", "b32 b16", [[-2]], f32(-2)),
    ("cvt.rn.f32.u16 {d}, {a};", "b32 b16", [[-2]], f32(65534)),
    ("cvt.s64.s32 {d}, {a};", "b64 b32", [[-2]], [2**64 - 2]),
    ("cvt.u64.u32 {d}, {a};", "b64 b32", [[-2]], [2**32 - 2]),
    ("cvt.s32.s8 {d}, {a};", "b32 b32", [[0x1FE]], [2**32 - 2]),
    ("cvt.s8.s32 {d}, {a};", "b32 b32", [[0x180]], [2**32 - 128]),
    ("cvt.s16.s8 {d}, {a};", "b16 b16", [[0x80]], [0xFF80]),
    ("cvt.u16.u32 {d}, {a};", "b16 b32", [[0x12345678]], [0x5678]),
    # Registers in parts.
    ("mov.b32 {d}, {{{a}, {b}}};", "b32 b16 b16", [[0x1111], [0x2222]], [0x22221111]),
    ("mov.b32 {{{d}, %h7}}, {a};", "b16 b32", [[0x22221111]], [0x1111]),
    ("mov.b32 {{_, {d}}}, {a};", "b16 b32", [[0x22221111]], [0x2222]),
    ("mov.b64 {d}, {{{a}, {b}}};", "b64 b32 b32", [[1], [2]], [1 | 2 << 32]),
    ("mov.b32 {d}, 0f3F800000;", "b32 b32", [[0]], f32(1)),
    ("mov.b64 {d}, 0d3FF0000000000000;", "b64 b32", [[0]], f64(1)),
]  # fmt: skip


@pytest.mark.parametrize(("body", "kinds", "operands", "expected"), CASES, ids=[case[0] for case in CASES])
def test_result(body: str, kinds: str, operands: list[list[int]], expected: list[int]) -> None:
    assert [hex(x) for x in compute(body, kinds, *operands)] == [hex(x) for x in expected]


def holds(comparison: str, kinds: str, *operands: Sequence[int]) -> list[int]:
    return compute(f"setp.{comparison} %p1, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, %p1;", f"b32 {kinds}", *operands)


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons_beside_nan_are_false_or_with_u_true(name: str) -> None:
    pairs = [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (-0.0, 0.0), (INF, INF)]
    a, b = f32(*(x for x, _ in pairs), NAN, 1), f32(*(y for _, y in pairs), 1, NAN)
    python = {"eq": "__eq__", "ne": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__"}[name]
    ordered = [int(getattr(x, python)(y)) for x, y in pairs]
    assert holds(f"{name}.f32", "b32 b32", a, b) == [*ordered, 0, 0]
    assert holds(f"{name}u.f32", "b32 b32", a, b) == [*ordered, 1, 1]


def test_other_comparisons() -> None:
    assert holds("num.f32", "b32 b32", f32(1, NAN), f32(1, 1)) == [1, 0]
    assert holds("nan.f32", "b32 b32", f32(1, NAN), f32(1, 1)) == [0, 1]
    assert holds("lt.s32", "b32 b32", [-1], [0]) == [1]
    assert holds("lt.u32", "b32 b32", [-1], [0]) == [0]
    assert holds("lo.u32", "b32 b32", [0], [-1]) == [1]
    assert holds("gt.bf16", "b16 b16", [0x3F81, 0xBF80], [0x3F80, 0x7FC0]) == [1, 0]
    assert holds("lt.f16", "b16 b16", [0x3C00], [0x4000]) == [1]
    assert holds("lt.f64", "b64 b64", f64(1, NAN), f64(2, 1)) == [1, 0]


def test_comparison_with_two_results() -> None:
    both = "setp.lt.f32 %p1|%p2, {a}, {b}; selp.b32 %r9, 1, 0, %p1; selp.b32 {d}, 2, 0, %p2; or.b32 {d}, {d}, %r9;"
    assert compute(both, "b32 b32 b32", f32(1, 2, NAN), f32(2, 1, 1)) == [1, 2, 2]
    halves = both.replace("lt.f32", "lt.bf16x2")
    assert compute(halves, "b32 b32 b32", [0x3F803F80], [0x40003F00]) == [2]


def test_comparison_joined_with_a_predicate() -> None:
    body = "setp.eq.b32 %p1, {a}, 1; setp.lt.and.s32 %p2, {b}, 5, %p1; selp.b32 {d}, 1, 0, %p2;"
    assert compute(body, "b32 b32 b32", [1, 1, 0], [4, 5, 4]) == [1, 0, 0]


def test_logic_of_predicates() -> None:
    body = "setp.ne.b32 %p1, {a}, 0; setp.ne.b32 %p2, {b}, 0; {op}.pred %p3, %p1, %p2; selp.b32 {d}, 1, 0, %p3;"
    for op, expected in {"and": [0, 0, 0, 1], "or": [0, 1, 1, 1], "xor": [0, 1, 1, 0]}.items():
        assert compute(body.replace("{op}", op), "b32 b32 b32", [0, 0, 1, 1], [0, 1, 0, 1]) == expected
    negated = "setp.ne.b32 %p1, {a}, 0; not.pred %p2, %p1; selp.b32 {d}, 1, 0, %p2;"
    assert compute(negated, "b32 b32", [0, 1]) == [1, 0]


def test_fma_rounds_once() -> None:
    """Against exact fractions, with sums near ties, cancellations, and results that are subnormal."""
    random = np.random.default_rng(0)
    n = 992
    exponents = random.integers(-160, 30, n)
    a = np.ldexp(random.integers(-(2**24), 2**24, n).astype(np.float32), exponents // 2).astype(np.float32)
    b = np.ldexp(random.integers(-(2**24), 2**24, n).astype(np.float32), exponents // 2).astype(np.float32)
    near = np.nextafter(-(a * b), random.choice([-np.inf, np.inf], n).astype(np.float32))
    half = np.ldexp(a * b, random.integers(-26, 26, n)).astype(np.float32)
    c = np.where(random.random(n) < 0.5, near, half).astype(np.float32)
    results = compute(
        "fma.rn.f32 {d}, {a}, {b}, {c};", "b32 b32 b32 b32", *([int(v) for v in x.view(np.uint32)] for x in (a, b, c)),
        n_threads=992,
    )  # fmt: skip
    wrong = 0
    for x, y, z, bits in zip(a, b, c, results, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        value = Fraction(float(np.uint32(bits).view(np.float32)))
        gap = abs(value - exact)
        below, above = (np.nextafter(np.uint32(bits).view(np.float32), np.float32(to)) for to in (-np.inf, np.inf))
        others = [abs(Fraction(float(other)) - exact) for other in (below, above)]
        is_tie = gap in others
        wrong += any(other < gap for other in others) or (is_tie and bits & 1)
    assert wrong == 0


UNKNOWN = [
    "atom.global.add.u32 %r1, [%rd8], 1;",
    "red.global.add.f32 [%rd8], %r1;", "cp.async.ca.shared.global [%r1], [%rd8], 4;",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2}, {%r3}, {%r4};", "call.uni foo;",
    "ld.local.b32 %r1, [%rd8];", "add.rz.f32 %r1, %r2, %r3;", "add.sat.s32 %r1, %r2, %r3;", "cvt.sat.u8.s32 %r1, %r2;",
    "cvt.rna.tf32.f32 %r1, %r2;", "min.xorsign.abs.f32 %r1, %r2, %r3;", "bar.sync 1, 64;", "bar.arrive 0, 64;",
    "mov.u32 %r1, %clock;", "add.sat.f16 %h1, %h2, %h3;",
    "fma.rn.f64 %rd1, %rd2, %rd3, %rd4;", "setp.lt.xnor.s32 %p1, %r1, %r2;",
    "fma.rn.relu.bf16 %h1, %h2, %h3, %h4;",
    "vote.sync.any.pred %p1, %p2, -1;",
    "ld.global.acquire.gpu.b32 %r1, [%rd8];", "bra $nowhere;", "elect.sync %r1|%p1, -1;",
]  # fmt: skip


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_is_unknown_raises_when_it_is_loaded(text: str) -> None:
    with pytest.raises(NotImplementedError) as error:
        machine(text, 1)
    assert text.rstrip(";") in str(error.value)


def test_local_memory_may_be_declared_but_not_used() -> None:
    declared = ".local .align 1 .b8 \t__local_depot0[1];\n.reg .b64 %SP;\n"
    assert machine(declared, 1).program.blocks
    with pytest.raises(NotImplementedError, match="__local_depot0"):
        machine(f"{declared}mov.b64 %SP, __local_depot0;", 1)


def test_approximations_can_be_an_ulp_off() -> None:
    values = np.linspace(1, 2, 32, dtype=np.float32)
    results = {}
    for name in ("sqrt.approx.f32", "sqrt.rn.f32"):
        for inexact in (False, True):
            out = np.zeros(32, np.float32)
            body = f"{each('ld', 1, 'b32', '%r1')} {name} %r2, %r1; {each('st', 0, 'b32', '%r2')}"
            run(body, out, values, options=Options(inexact=inexact))
            results[name, inexact] = out.view(np.int32) - np.sqrt(values).view(np.int32)
    assert set(results["sqrt.approx.f32", True].tolist()) == {-1, 0, 1}
    del results["sqrt.approx.f32", True]
    assert not np.any(list(results.values()))
