"""Division and square root in one block (kernels/assembly.py) round right: on the CPU, and as compiled code.

The FMAs are those of NVIDIA's assembler and no better. Of 2^24 roots 17 come out right only if the approximation is
nearer than 2 ulps, or errs to the other side; so does 1 by a divisor of 1.11...1, the exception of Markstein's theorem.
That MUFU does so there is what NVIDIA's own `sqrt.rn` and `div.rn` stand on.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from tests.kernels.exact import OFF, compiler, load, wrong_among, wrong_dividends, wrong_quotients, wrong_roots

EDGES = [
    *(0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x00800001),  # 0, subnormal, the smallest normal
    *(0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001),  # the largest, infinity, NaN
    *(0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x3FFFFFFF),
    *(0x0CFFFFFF, 0x0D000000, 0x0D000001, 0x0D7FFFFF, 0x0D800000, 0x0D800001),  # 2^-101 and 2^-100
    *(0x267FFFFF, 0x26800000, 0x26800001, 0x58800000),  # 2^-50, and 2^50
    *(0x7E7FFFFF, 0x7E800000, 0x7E800001, 0x7EFFFFFF, 0x7F000000),  # 2^126, whose inverse is the smallest normal, 2^127
    *(0x322BCC77, 0x219392EF, 0x0DA24260),  # epsilons of 1e-8, 1e-18 and 1e-30
]
"""Bits of fp32 numbers at which something changes."""
EVERY_ERROR = pytest.mark.parametrize("off", OFF, ids=lambda off: f"{off:+}_ulp")


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if compiler() is None:
        pytest.skip("there is no C compiler to prove it with")
    return load(tmp_path_factory.mktemp("exact"))


ON_MUFU = {
    -2: [0x3FA97BEF, 0x3FF028AB, 0x3FFC114A, 0x402A177F, 0x403B8BCC, 0x404D142A, 0x404D91EC, 0x405364E1, 0x405AE03B,
         0x405F5FA5, 0x406E9372],
    -1: [0x404D142A, 0x405AE03B, 0x406E9372],
    0: [],
    1: [0x3FFC114A, 0x406E9372],
    2: [0x3F925859, 0x3FF0D9CE, 0x3FFC114A, 0x402A177F, 0x403302BE, 0x403B8BCC, 0x40515A77, 0x405AE03B, 0x405F5FA5,
        0x406E9372],
}  # fmt: skip
"""Roots of [1, 4), by the approximation's error, that NVIDIA's FMAs get wrong: all of them, so all other are right."""


@EVERY_ERROR
def test_every_root_of_two_binades(exact: ctypes.CDLL, off: int) -> None:
    """All there is: four times the number has twice the root, by the same operations on the same mantissas."""
    assert wrong_roots(exact, 0x3F800000, 0x40800000, off) == ON_MUFU[off]


@pytest.mark.parametrize(("first", "end"), [(0x0CF00000, 0x0E000000), (0x7E800000, 0x7FFFFFFF)])
def test_roots_where_they_begin_and_end_to_be_taken(exact: ctypes.CDLL, first: int, end: int) -> None:
    """Among them 2^-101, whose remainder is just exact, the largest number, infinity and every NaN."""
    assert wrong_roots(exact, first, end, 0) == []


@EVERY_ERROR
def test_quotients_at_the_edges(exact: ctypes.CDLL, off: int) -> None:
    """All pairs, and all triples as x / (sqrt(square) + epsilon), of either sign: taken and right, or not taken."""
    wrong, taken = wrong_among(exact, [*EDGES, *(bits + 2**31 for bits in EDGES)], off)
    assert (wrong, taken > 1000) == (0, True)


@EVERY_ERROR
def test_quotients_of_any_numbers(exact: ctypes.CDLL, off: int) -> None:
    """A part of what `python -m tests.kernels.exact` tries."""
    wrong, taken = wrong_quotients(exact, 1_000_000, off, seed=off % 5)
    assert (wrong, taken > 500_000) == (0, True)


@EVERY_ERROR
def test_divisors_of_ones_alone(exact: ctypes.CDLL, off: int) -> None:
    """1 alone of all dividends is divided wrong, and not if the approximation is the nearest number."""
    assert wrong_dividends(exact, 0x3F7FFFFF, off) == ([0x3F800000] if off else [])


# Compiled.

PROGRAM = """
import sys
from tritopt.engine import private
from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import div, sqrt
from tritopt.tools.disassembly import run_tool

@triton.jit
def kernel(x_ptr, y_ptr, z_ptr, N: tl.constexpr):
    i = tl.arange(0, 32 * N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(z_ptr + i, tl.div_rn(x, y) if N == 1 else div(x, y))
    tl.store(z_ptr + 32 * N + i, tl.sqrt_rn(x) if N == 1 else sqrt(x))

kinds = {name: "*fp32" for name in ("x_ptr", "y_ptr", "z_ptr")} | {"N": "constexpr"}
for arch in map(int, sys.argv[1:]):
    for n in (1, 4):
        options = {"num_warps": 1, "enable_fp_fusion": False}
        binary = private.compile_for(arch, kernel, kinds, {"N": n}, options)
        print(run_tool("nvdisasm", "-c", "-ndf", binary=private.assembly(binary)["cubin"]), end="\\f")
"""
# A branch over a call: what lies between runs for the few operands that the FMAs do not do for.
DETOUR = re.compile(r"BRA `\((\.L_x_\d+)\) ;\n(?:(?!\.L_x_).*\n)*?.*CALL(?:.*\n)*?\1:")
WRITE = re.compile(r"\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*) (R\d+), (.*?) ;")


def expressions(sass: str) -> Counter[str]:
    """Write what MUFU, FMUL and FFMA compute in terms of what they are given, all of which is x."""
    known: dict[str, str] = {"RZ": "0"}
    counts: Counter[str] = Counter()
    for opcode, target, operands in WRITE.findall(DETOUR.sub("", sass).replace(".reuse", "")):
        name, sources = opcode.removesuffix(".FTZ"), operands.split(", ")
        names = [source.removeprefix("-") for source in sources]
        written = [known.get(each, "x" if each[0] == "R" else each) for each in names]
        # A product has one sign, whichever factor it stands at.
        is_negative = sum(source.startswith("-") for source in sources[:2]) == 1
        text = f"{name}({'-' * is_negative}{', '.join([*sorted(written[:2]), *written[2:]])})"
        counts[text] += 1
        is_known = name in ("MUFU.RSQ", "MUFU.RCP", "FMUL", "FFMA") and len(text) < 300
        known[target] = text if is_known else "x"
    return counts


ROOT = "FMUL(MUFU.RSQ(x), x)"
ROUNDED_ROOT = f"FFMA(FFMA(-{ROOT}, {ROOT}, x), FMUL(0.5, MUFU.RSQ(x)), {ROOT})"
INVERSE = "FFMA(FFMA(-MUFU.RCP(x), x, 1), MUFU.RCP(x), MUFU.RCP(x))"
QUOTIENT = f"FFMA({INVERSE}, x, 0)"
ROUNDED_QUOTIENT = f"FFMA(FFMA(-{QUOTIENT}, x, x), {INVERSE}, {QUOTIENT})"


ARCHS = (80, 90, 100)


@pytest.fixture(scope="module")
def sass(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Counter[str]]]:
    """Expressions that NVIDIA's instructions compute, and those of ours, by architecture."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = tmp_path_factory.mktemp("sass") / "compile.py"
    program.write_text(PROGRAM)  # Triton reads the source of its kernels
    command = [sys.executable, str(program), *map(str, ARCHS)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    texts = done.stdout.split("\f")
    return {arch: [expressions(text) for text in texts[2 * i : 2 * i + 2]] for i, arch in enumerate(ARCHS)}


@pytest.mark.parametrize("arch", ARCHS)
def test_the_instructions_are_those_of_nvidias_assembler(arch: int, sass: dict[int, list[Counter[str]]]) -> None:
    """Compare with `sqrt.rn` and `div.rn` where they do not branch: so the bits are the same, however MUFU errs."""
    theirs, ours = sass[arch]
    for expression in (ROUNDED_ROOT, ROUNDED_QUOTIENT):
        assert theirs[expression] == 1, theirs
        assert ours[expression] == 4, ours
