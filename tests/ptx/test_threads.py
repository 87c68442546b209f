"""Threads together: exchanges in a warp, divergence, barriers, shared memory, vectors, predicates."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.snippets import each, machine, run
from tritopt.tools.ptx.memory import Fault, Memory
from tritopt.tools.ptx.threads import Options


def values(body: str, n_threads: int = 32, grid: int = 1, shared: int = 0, options: Options | None = None) -> list[int]:
    """Value that each thread has in %r1 at the end."""
    out = np.zeros(n_threads * grid, np.uint32)
    options = Options() if options is None else options
    run(f"{body}\n{each('st', 0, 'b32', '%r1')}", out, n_threads=n_threads, grid=grid, shared=shared, options=options)
    return [int(value) for value in out]


def test_special_registers() -> None:
    assert values("mov.u32 %r1, %laneid;", 64) == [*range(32), *range(32)]
    assert values("mov.u32 %r1, %warpid;", 64) == [0] * 32 + [1] * 32
    assert values("mov.u32 %r1, %ctaid.x;", 32, 3) == [0] * 32 + [1] * 32 + [2] * 32
    assert values("mov.u32 %r1, %nctaid.x;", 32, 3) == [3] * 96
    assert values("mov.u32 %r1, %nctaid.y;", 32) == [1] * 32


def test_programs_are_numbered_along_x_first() -> None:
    out = np.zeros(24, np.uint32)
    body = """mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;
    mad.lo.s32 %r4, %r3, 4, %r2; mad.lo.s32 %r4, %r4, 2, %r1; mul.wide.u32 %rd0, %r4, 4; add.s64 %rd0, %rd0, %rd8;
    setp.eq.s32 %p1, %r15, 0; mov.u32 %r5, %tid.x; setp.eq.s32 %p1, %r5, 0; @%p1 st.global.b32 [%rd0], %r4;"""
    memory = Memory([(out.ctypes.data, out.ctypes.data + out.nbytes)])
    machine(body, 1).launch([out.ctypes.data], (2, 4, 3), memory)
    assert out.tolist() == list(range(24))


SHUFFLES = [
    ("bfly", "1", "31", [i ^ 1 for i in range(32)], [1] * 32),
    ("bfly", "16", "31", [i ^ 16 for i in range(32)], [1] * 32),
    ("down", "3", "31", [*range(3, 32), 29, 30, 31], [1] * 29 + [0] * 3),
    ("up", "3", "0", [0, 1, 2, *range(29)], [0] * 3 + [1] * 29),
    ("idx", "7", "31", [7] * 32, [1] * 32),
    # Segments of eight lanes: the upper bits of the clamp say so.
    ("idx", "2", "6175", [8 * (i // 8) + 2 for i in range(32)], [1] * 32),
    ("down", "5", "6175", [i + 5 if i % 8 < 3 else i for i in range(32)], [int(i % 8 < 3) for i in range(32)]),
]


@pytest.mark.parametrize(("mode", "by", "clamp", "expected", "is_valid"), SHUFFLES)
def test_shuffles(mode: str, by: str, clamp: str, expected: list[int], is_valid: list[int]) -> None:
    shuffle = f"shfl.sync.{mode}.b32 %r1|%p1, %r15, {by}, {clamp}, -1;"
    assert values(shuffle) == expected
    assert values(f"{shuffle} selp.b32 %r1, 1, 0, %p1;") == is_valid


@pytest.mark.parametrize(
    ("name", "expected"),
    [("add.s32", 496 - 16 * 32), ("max.s32", 15), ("min.s32", -16), ("max.u32", -1), ("or.b32", -1), ("and.b32", 0)],
)
def test_reductions_of_a_warp(name: str, expected: int) -> None:
    assert (
        values(f"sub.s32 %r2, %r15, 16; mov.b32 %r3, -1; redux.sync.{name} %r1, %r2, %r3;") == [expected % 2**32] * 32
    )


def test_reduction_of_floats_with_nan() -> None:
    body = "cvt.rn.f32.u32 %r2, %r15; setp.eq.s32 %p1, %r15, 3; selp.b32 %r2, 0x7FC00000, %r2, %p1;"
    assert values(f"{body} redux.sync.max.f32 %r1, %r2, -1;") == [0x41F80000] * 32
    assert values(f"{body} redux.sync.max.NaN.f32 %r1, %r2, -1;") == [0x7FFFFFFF] * 32


COLLATZ = """
    add.s32 %r2, %r15, 1;
    mov.b32 %r1, 0;
$loop:
    setp.eq.s32 %p1, %r2, 1;
    @%p1 bra $end;
    and.b32 %r3, %r2, 1;
    setp.eq.s32 %p2, %r3, 0;
    @%p2 bra $even;
    mad.lo.s32 %r2, %r2, 3, 1;
    bra.uni $next;
$even:
    shr.u32 %r2, %r2, 1;
$next:
    add.s32 %r1, %r1, 1;
    bra.uni $loop;
$end:
"""


def collatz(n: int) -> int:
    steps = 0
    while n != 1:
        n, steps = (n // 2 if n % 2 == 0 else 3 * n + 1), steps + 1
    return steps


@pytest.mark.parametrize("seed", [None, 1])
def test_loops_of_threads_that_part_and_meet(seed: int | None) -> None:
    """Each thread goes round as often as it must; behind the loop all of them take part in a shuffle again."""
    expected = [collatz(n + 1) for n in range(192)]
    assert values(COLLATZ, 64, 3, options=Options(warp_seed=seed)) == expected
    exchanged = values(f"{COLLATZ} shfl.sync.bfly.b32 %r1, %r1, 1, 31, -1;", 64, 3, options=Options(warp_seed=seed))
    assert exchanged == [expected[i ^ 1] for i in range(192)]


def test_some_threads_return_early() -> None:
    body = f"setp.lt.u32 %p1, %r15, 7; mov.b32 %r1, 5; @!%p1 ret; {each('st', 0, 'b32', '%r1')} mov.b32 %r1, 6;"
    assert values(body) == [6] * 7 + [0] * 25


REVERSED = """
    mov.u32 %r2, %tid.x;
    shl.b32 %r3, %r2, 2;
    mov.u32 %r4, global_smem;
    add.s32 %r5, %r4, %r3;
    st.shared.b32 [%r5], %r15;
    bar.sync 0;
    sub.s32 %r6, 127, %r2;
    shl.b32 %r6, %r6, 2;
    add.s32 %r6, %r4, %r6;
    ld.shared.b32 %r1, [%r6+0];
"""


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_shared_memory_of_each_program(seed: int | None) -> None:
    expected = [128 * program + 127 - thread for program in range(3) for thread in range(128)]
    assert values(REVERSED, 128, 3, shared=512, options=Options(warp_seed=seed)) == expected


def test_missing_barrier_gives_other_results_in_some_order_of_warps() -> None:
    broken = REVERSED.replace("bar.sync 0;", "")
    # In lockstep it does not show but for the check of races.
    expected = [127 - thread for thread in range(128)]
    assert values(broken, 128, shared=512, options=Options(watches=False)) == expected
    with pytest.raises(Fault, match="read of what another warp wrote with no barrier between"):
        values(broken, 128, shared=512)
    with pytest.raises(Fault, match="never written"):
        values(broken, 128, shared=512, options=Options(watches=False, warp_seed=0))


def test_warps_take_turns_in_any_order() -> None:
    """The second warp reads what the first one writes: which is right without a barrier if warps go by number."""
    body = """shl.b32 %r2, %r15, 2; setp.lt.u32 %p1, %r15, 32; mov.b32 %r1, 0;
    @%p1 st.shared.b32 [%r2], %r15; @!%p1 ld.shared.b32 %r1, [%r2+-128];"""
    expected = [0] * 32 + list(range(32))
    outcomes: set[bool | None] = set()
    for seed in range(8):
        try:
            outcomes.add(values(body, 64, shared=128, options=Options(watches=False, warp_seed=seed)) == expected)
        except Fault:
            outcomes.add(None)
    assert outcomes == {True, None}


def test_vectors_of_shared_and_global_memory() -> None:
    source, out = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    body = """
    mul.wide.u32 %rd0, %r15, 16; add.s64 %rd1, %rd0, %rd9; add.s64 %rd2, %rd0, %rd8; shl.b32 %r8, %r15, 4;
    ld.global.L1::evict_last.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
    st.shared.v2.b32 [%r8], {%r4, %r3}; st.shared.v2.b32 [%r8+8], {%r2, %r1};
    bar.warp.sync -1;
    ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r8];
    st.global.v4.b32 [%rd2], {%r1, %r2, %r3, %r4};"""
    run(body, out, source, shared=512)
    assert out.tolist() == source.reshape(-1, 4)[:, ::-1].reshape(-1).tolist()


def test_narrow_loads_are_extended_and_narrow_stores_cut() -> None:
    source, out = np.arange(-16, 16, dtype=np.int8), np.zeros(32, np.int32)
    run(f"{each('ld', 1, 'b8', '%r1').replace('.b8', '.s8')} {each('st', 0, 'b32', '%r1')}", out, source)
    assert out.tolist() == source.tolist()
    run(f"{each('ld', 1, 'b8', '%r1')} {each('st', 0, 'b32', '%r1')}", out, source)
    assert out.tolist() == source.view(np.uint8).tolist()
    cut = np.zeros(32, np.uint8)
    run(f"add.s32 %r1, %r15, 0x100; {each('st', 0, 'b8', '%r1')}", cut)
    assert cut.tolist() == list(range(32))


def test_what_a_predicate_switches_off_touches_nothing() -> None:
    """Neither memory, at addresses that are no memory, nor the register of a load."""
    source, out = np.arange(8, dtype=np.uint32), np.full(32, 9, np.uint32)
    body = f"""setp.lt.u32 %p1, %r15, 8; mov.b32 %r1, 77; mul.wide.u32 %rd0, %r15, 4; add.s64 %rd0, %rd0, %rd9;
    @%p1 ld.global.b32 {{ %r1 }}, [ %rd0 + 0 ]; setp.ge.u32 %p2, %r15, 4;
    {each("st", 0, "b32", "%r1").replace("st.", "@%p2 st.")}"""
    run(body, out, source)
    assert out.tolist() == [9] * 4 + [4, 5, 6, 7] + [77] * 24


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_of_shared_memory(trans: str) -> None:
    """Thread t gets two neighbours of row t / 4, or of column t / 4; stmatrix puts back what ldmatrix takes."""
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    out, source, back = np.zeros(32, np.uint32), matrix.reshape(-1).view(np.uint32).copy(), np.zeros(32, np.uint32)
    body = f"""
    {each("ld", 1, "b32", "%r1")} shl.b32 %r2, %r15, 2; st.shared.b32 [%r2], %r1; bar.sync 0;
    and.b32 %r3, %r15, 7; shl.b32 %r3, %r3, 4;
    ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r4}}, [%r3]; {each("st", 0, "b32", "%r4")}
    add.s32 %r5, %r3, 128; stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r5], {{%r4}}; bar.sync 0;
    ld.shared.b32 %r6, [%r2+128]; {each("st", 2, "b32", "%r6")}"""
    run(body, out, source, back, shared=256)
    assert out.view(np.uint16).tolist() == (matrix.T if trans else matrix).reshape(-1).tolist()
    assert back.tolist() == source.tolist()


def test_order_selects_programs() -> None:
    assert values("mov.b32 %r1, 1;", 32, 4, options=Options(order=lambda numbers: numbers[[2, 0]])) == (
        [1] * 32 + [0] * 32 + [1] * 32 + [0] * 32
    )


def test_grid_of_more_programs_than_run_together() -> None:
    n = 3 * 16384 // 32
    assert values("mov.u32 %r1, %ctaid.x;", 32, n) == np.repeat(np.arange(n), 32).tolist()
