"""Division and square root in PTX: the instructions of NVIDIA's assembler, without its branch around each of them.

Out of `sqrt.rn` and `div.rn` the assembler makes an approximation (MUFU), some FMAs that round it right, a test whether
they do so for these operands, and a branch to a subroutine where they do not: a third of the instructions is control,
and a thread's roots wait for one another. Here the same approximation and the same FMAs, which therefore give the same
bits, stand in one block for up to eight elements of a thread. Their tests become one predicate; where it fails,
`sqrt.rn` and `div.rn` compute all of these elements once more.

The FMAs round right what is computed from normal numbers with an exact remainder:

    sqrt(x)                        x from 2^-101 on, finite
    x / y                          y >= 2^-50 and |x / y| >= 2^-50
    x / (sqrt(square) + epsilon)   square as x of the root, |x / ...| min(epsilon, 1) >= 2^-100

Divisors from 2^126 on, infinity and NaN need no test of their own: with them the quotient becomes NaN or 0, which fail.
tests/kernels/test_exact.py has the proofs.

The machine of tritopt/tools/ptx knows registers by name alone, so each block has names of its own for what it shares
with no other.
"""

from __future__ import annotations

from tritopt.kernels.language import INTERPRETED, tl, triton

_INTERPRETED = tl.constexpr(INTERPRETED)
ROOT_FROM, ROOT_END = 0x0D000000, 0x7F800000
"""Bits of 2^-101 and of infinity, between which the FMAs round a root right."""
QUOTIENT_FROM = "0f26800000"
"""Least quotient that the FMAs round right, 2^-50, in PTX."""
DIVIDEND_FROM = "0f0D800000"
"""Least dividend with which they do, 2^-100, in PTX."""


@tl.core.builtin
def n_nvidia_threads(_semantic=None):
    """Number of threads of a program; 0 unless the target is NVIDIA's.

    Triton's options are not public: tried with 3.6 and 3.9.
    """
    options = _semantic.builder.options
    return tl.constexpr(32 * options.num_warps if options.backend_name == "cuda" else 0)


@tl.core.builtin
def is_nvidia(_semantic=None):
    """Whether the target is NVIDIA's."""
    return tl.constexpr(_semantic.builder.options.backend_name == "cuda")


@triton.constexpr_function
def pack_of(numel, n_threads, most):
    """Number of elements that share a block: those of a thread, up to 8; 0 where they are too few for it to pay."""
    n = min(most, numel // n_threads) if n_threads else 0
    return n if n >= 4 else 0


@triton.constexpr_function
def constraints(n, n_operands):
    """Constraints of so many results, and of the operands of each: registers of fp32 that do not overlap."""
    return ",".join(["=&f"] * n + ["f"] * n * n_operands)


@triton.constexpr_function
def _root(x, result, is_first):
    """Root of one element; its bits, unsigned, among those that are tested: a smaller or negative x has larger ones."""
    return f"""
    mov.b32 %bits, {x};
    add.u32 %bits, %bits, {2**32 - ROOT_FROM};
    {"mov.b32 %worst, %bits" if is_first else "max.u32 %worst, %worst, %bits"};
    rsqrt.approx.ftz.f32 %a, {x};
    mul.rn.f32 %q, {x}, %a;
    mul.rn.f32 %h, %a, 0f3F000000;
    neg.f32 %n, %q;
    fma.rn.f32 %e, %n, %q, {x};
    fma.rn.f32 {result}, %e, %h, %q;"""


@triton.constexpr_function
def _quotient(x, y, result, is_first):
    """Quotient of one element, and its size among those that are tested; NaN stays."""
    return f"""
    rcp.approx.ftz.f32 %a, {y};
    neg.f32 %n, {y};
    fma.rn.f32 %e, %n, %a, 0f3F800000;
    fma.rn.f32 %a, %a, %e, %a;
    fma.rn.f32 %q, {x}, %a, 0f00000000;
    fma.rn.f32 %e, %n, %q, {x};
    fma.rn.f32 {result}, %a, %e, %q;
    abs.f32 %h, {result};
    {"mov.b32 %least, %h" if is_first else "min.NaN.f32 %least, %least, %h"};"""


@triton.constexpr_function
def _block(fast, test, slow):
    """One block: what nearly always does, the predicate `good`, and what computes all of it again where that is false.

    The label has a number of its own for each use.
    """
    return f"""{{
    .reg .pred %good;
    .reg .b32 %bits, %worst;
    .reg .f32 %a, %e, %h, %n, %q, %y, %least;
    {"".join(fast)}
    {test}
    @%good bra RIGHT_${{:uid}};
    {"".join(slow)}
RIGHT_${{:uid}}:
}}"""


@triton.constexpr_function
def roots(n):
    """sqrt($n), ... of n elements."""
    fast = [_root(f"${n + i}", f"${i}", i == 0) for i in range(n)]
    slow = [f"sqrt.rn.f32 ${i}, ${n + i};\n" for i in range(n)]
    return _block(fast, f"setp.lt.u32 %good, %worst, {ROOT_END - ROOT_FROM};", slow)


@triton.constexpr_function
def quotients(n):
    """$n / $2n, ... of n elements."""
    fast = [
        f"{_quotient(f'${n + i}', f'${2 * n + i}', f'${i}', i == 0)} min.NaN.f32 %least, %least, ${2 * n + i};"
        for i in range(n)
    ]
    slow = [f"div.rn.f32 ${i}, ${n + i}, ${2 * n + i};\n" for i in range(n)]
    return _block(fast, f"setp.ge.f32 %good, %least, {QUOTIENT_FROM};", slow)


@triton.constexpr_function
def quotients_by_roots(n):
    """$n / (sqrt($2n) + $3n), ... of n elements; $3n is the same for all."""
    fast, slow = [], []
    for i in range(n):
        x, square, result = f"${n + i}", f"${2 * n + i}", f"${i}"
        fast.append(_root(square, "%y", i == 0) + f"add.rn.f32 %y, %y, ${3 * n};" + _quotient(x, "%y", result, i == 0))
        slow.append(f"sqrt.rn.f32 %y, {square};\nadd.rn.f32 %y, %y, ${3 * n};\ndiv.rn.f32 {result}, {x}, %y;\n")
    test = f"""
    min.f32 %h, ${3 * n}, 0f3F800000;
    mul.rn.f32 %least, %least, %h;
    setp.ge.f32 %good, %least, {DIVIDEND_FROM};
    setp.lt.and.u32 %good, %worst, {ROOT_END - ROOT_FROM}, %good;"""
    return _block(fast, test, slow)


@triton.constexpr_function
def _after(n):
    """$2n, ... of n elements, or'ed with what is left of $n and of the fifth one where the bits of $3n are set."""
    copies = "".join(f" mov.b32 ${i}, %bits;" for i in range(n))
    loaded = f"lop3.b32 %bits, ${n}, ${n + 4}, ${3 * n}, 0xA8;\n or.b32 %bits, %bits, ${2 * n};"
    if n == 4:
        loaded = f"lop3.b32 %bits, ${n}, ${2 * n}, ${3 * n}, 0xEC;"
    return f"""{{
    .reg .b32 %bits;
    {loaded}{copies}
}}"""


@triton.constexpr_function
def _after_constraints(n):
    return ",".join(["=&r"] * n + ["r"] * 3 * n)


@triton.jit
def after(x, loaded, zero):
    """Return x, which on NVIDIA GPUs is not known before `loaded` is: for each element if it is fp32.

    To save registers, NVIDIA's assembler moves loads down to what needs them, behind what needs other loads: a warp
    waits for memory twice then. What depends on x comes behind all loads.

    zero is 0, int32, which no compiler knows. Four elements, out of one load, take one instruction: element & zero | x.
    Eight are out of two loads and take two: (element | another) & zero | x.
    """
    if _INTERPRETED or loaded.dtype != tl.float32:
        return x
    else:
        n: tl.constexpr = pack_of(loaded.numel, n_nvidia_threads(), 8)
        if n == 0:
            return x
        else:
            operands = [loaded, x, zero]
            return tl.inline_asm_elementwise(
                _after(n), _after_constraints(n), operands, dtype=tl.float32, is_pure=True, pack=n
            )
