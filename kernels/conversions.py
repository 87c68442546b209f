"""Conversions of 16-bit and 8-bit numbers in PTX, two or four of a register at a time.

As in kernels/assembly.py, each block has names of its own for what it shares with no other.
"""

from __future__ import annotations

from tritopt.kernels.language import tl, triton


@triton.constexpr_function
def _two_bf16(source, low, high):
    """Both halves of a register that holds two bf16 numbers, widened to fp32."""
    return f"shl.b32 {low}, {source}, 16;\n and.b32 {high}, {source}, 0xFFFF0000;"


@triton.jit
def widen_bf16(x):
    """Convert bf16 to fp32, two elements of a register at a time; `is_nvidia` says where."""
    return tl.inline_asm_elementwise(_two_bf16("$2", "$0", "$1"), "=&r,=r,r", [x], tl.float32, is_pure=True, pack=2)


@triton.constexpr_function
def _two_completed(name):
    """$3 and $4 where they round to the halves of $2, or else these, widened; name: PTX's of the 16-bit dtype.

    Behind the rounding, a comparison and a choice for each element.
    """
    low, high = "%lower", "%upper"
    widened = _two_bf16("$2", low, high)
    if name == "f16":
        widened = f"mov.b32 {{%w, %v}}, $2;\n cvt.f32.f16 {low}, %w;\n cvt.f32.f16 {high}, %v;"
    return f"""{{
    .reg .b16 %w, %v;
    .reg .b32 %both, %half;
    .reg .f32 %lower, %upper;
    .reg .pred %same;
    cvt.rn.{name}x2.f32 %both, $4, $3;
    xor.b32 %both, %both, $2;
    {widened}
    and.b32 %half, %both, 0xFFFF;
    setp.eq.u32 %same, %half, 0;
    selp.f32 $0, $3, %lower, %same;
    and.b32 %half, %both, 0xFFFF0000;
    setp.eq.u32 %same, %half, 0;
    selp.f32 $1, $4, %upper, %same;
}}"""


@triton.jit
def complete(weight, value):
    """Choose the fp32 value where it rounds to the very bits of the 16-bit weight, or else the weight, in fp32.

    `is_nvidia` says where.
    """
    name: tl.constexpr = "bf16" if weight.dtype == tl.bfloat16 else "f16"
    return tl.inline_asm_elementwise(
        _two_completed(name), "=&f,=&f,r,f,f", [weight, value], tl.float32, is_pure=True, pack=2
    )


@triton.constexpr_function
def _joined(n_bytes):
    """The weights of each pair of bf16 from $4 or $8 on, and remainders of so many bytes from the register behind them.

    Beside 0, infinity and NaN the remainder is left out.
    """
    n = 4 // n_bytes
    remainders = f"${n + n // 2}"
    lines = []
    for i in range(n):
        high = _two_bf16(f"${n + i // 2}", "%own", "%next") if i % 2 == 0 else "mov.b32 %own, %next;"
        # Of the four bytes to make: 0 is the number 4, the sign of byte i is 8 + i.
        last = n_bytes * i + n_bytes - 1
        selector = (
            f"0x{8 + last:X}{8 + last:X}{2 * i + 1}{2 * i}" if n_bytes == 2 else f"0x{8 + last:X}{8 + last:X}{i}4"
        )
        lines.append(f"""
    {high}
    abs.f32 %size, %own;
    setp.gt.f32 %is_some, %size, 0f00000000;
    setp.lt.and.f32 %is_some, %size, 0f7F800000, %is_some;
    prmt.b32 %rest, {remainders}, 0, {selector};
    mov.b32 ${i}, %own;
    @%is_some add.s32 ${i}, ${i}, %rest;""")
    return f"""{{
    .reg .b32 %rest, %own, %next;
    .reg .f32 %size;
    .reg .pred %is_some;
    {"".join(lines)}
}}"""


@triton.constexpr_function
def _joined_constraints(n_bytes):
    n = 4 // n_bytes
    return ",".join(["=&r"] * n + ["r"] * (n // 2 + 1))


@triton.jit
def join_bits(weight, remainder):
    """Add a remainder, int16 or int8, to the 24 or 32 bits that begin with those of a bf16 weight; result fp32.

    Beside 0, infinity and NaN it is left out. For NVIDIA GPUs, and threads that have four elements or more.
    """
    n_bytes: tl.constexpr = remainder.dtype.primitive_bitwidth // 8
    bits = tl.inline_asm_elementwise(
        _joined(n_bytes), _joined_constraints(n_bytes), [weight, remainder], tl.int32, is_pure=True, pack=4 // n_bytes
    )
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def second_bytes(bits):
    """Bits 8 to 15 of each int32, as int8, four elements a register; `is_nvidia` says where."""
    joined: tl.constexpr = """{
    .reg .b32 %low, %high;
    prmt.b32 %low, $1, $2, 0x51;
    prmt.b32 %high, $3, $4, 0x51;
    prmt.b32 $0, %low, %high, 0x5410;
}"""
    return tl.inline_asm_elementwise(joined, "=r,r,r,r,r", [bits], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def add_down(x, y):
    """x + y, rounded down; `is_nvidia` says where."""
    return tl.inline_asm_elementwise("add.rm.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def add_where_less(bits, x, y):
    """Add 1 to an int32 where x < y, fp32; `is_nvidia` says where. The assembler takes two for a choice."""
    added: tl.constexpr = """{
    .reg .pred %less;
    mov.b32 $0, $1;
    setp.lt.f32 %less, $2, $3;
    @%less add.s32 $0, $0, 1;
}"""
    return tl.inline_asm_elementwise(added, "=&r,r,f,f", [bits, x, y], dtype=tl.int32, is_pure=True, pack=1)


@triton.constexpr_function
def _four_fractions():
    # Behind the exponent of 128, a byte stands for its 256ths.
    lines = [f"prmt.b32 ${i}, $4, 0x43000000, 0x76{i}4;\n add.f32 ${i}, ${i}, 0fC3000000;" for i in range(4)]
    return "\n ".join(lines)


@triton.jit
def fractions(code):
    """Convert bytes, uint8, to 256ths in fp32, four of a register at a time; `is_nvidia` says where."""
    return tl.inline_asm_elementwise(
        _four_fractions(), "=&f,=&f,=&f,=&f,r", [code], dtype=tl.float32, is_pure=True, pack=4
    )


@triton.constexpr_function
def _four_e4m3():
    return """{
    .reg .b16 %low, %high, %a, %b;
    .reg .b32 %pair;
    mov.b32 {%low, %high}, $4;
    cvt.rn.f16x2.e4m3x2 %pair, %low;
    mov.b32 {%a, %b}, %pair;
    cvt.f32.f16 $0, %a;
    cvt.f32.f16 $1, %b;
    cvt.rn.f16x2.e4m3x2 %pair, %high;
    mov.b32 {%a, %b}, %pair;
    cvt.f32.f16 $2, %a;
    cvt.f32.f16 $3, %b;
}"""


@triton.jit
def widen_e4m3(code):
    """Convert bytes that are float8_e4m3fn to fp32; `widens_e4m3` says where."""
    return tl.inline_asm_elementwise(_four_e4m3(), "=&f,=&f,=&f,=&f,r", [code], dtype=tl.float32, is_pure=True, pack=4)


@tl.core.builtin
def widens_e4m3(code, _semantic=None):
    """Whether the target has an instruction for that, from sm_89 on, and a thread four bytes."""
    options = _semantic.builder.options
    if options.backend_name != "cuda":
        return tl.constexpr(False)
    capability = int("".join(filter(str.isdigit, options.arch)))
    return tl.constexpr(capability >= 89 and code.type.numel >= 4 * 32 * options.num_warps)
