"""Every check of the machine, by a kernel that it must refuse and one beside it that it must not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.snippets import each, machine, run
from tritopt.tools.ptx.memory import Fault, Memory
from tritopt.tools.ptx.threads import Options

PER_THREAD = "mul.wide.u32 %rd0, %r15, {size}; add.s64 %rd0, %rd0, %rd8;"


def fault(body: str, n: int = 32, n_threads: int = 32, grid: int = 1, shared: int = 0, **options: object) -> Fault:
    """Fault of PTX that has n words of memory at %rd8."""
    with pytest.raises(Fault) as error:
        run(body, np.zeros(n, np.uint32), n_threads=n_threads, grid=grid, shared=shared, options=Options(**options))  # type: ignore[arg-type]
    return error.value


def test_a_fault_names_kernel_instruction_thread_and_address() -> None:
    array = np.zeros(100, np.uint32)
    with pytest.raises(Fault) as error:
        run(each("ld", 0, "b32", "%r1"), array, n_threads=64, grid=2)
    raised = error.value
    assert (raised.kernel, raised.program, raised.thread) == ("snippet", 1, 36)
    assert raised.address == array.ctypes.data + 400
    assert raised.instruction == "ld.global.b32 %r1, [%rd0]"
    assert str(raised) == (
        "snippet: read of 4 bytes outside of live tensors, by 28 threads"
        f" at {raised.address:#x}; program 1, thread 36; ld.global.b32 %r1, [%rd0]"
    )


def test_out_of_bounds() -> None:
    assert "write of 4 bytes outside" in str(fault("mov.b32 %r1, 1; " + each("st", 0, "b32", "%r1"), n=31))
    assert "read of 16 bytes outside" in str(fault("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd8+16];", n=7))
    assert "outside" in str(fault("ld.global.b32 %r1, [%rd8+-4];"))
    assert "outside" in str(fault("mov.b64 %rd0, 0; ld.global.b32 %r1, [%rd0];"))
    run("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd8+16];", np.zeros(8, np.uint32))


def test_neighbouring_tensors_are_no_room() -> None:
    """An access that begins in one tensor and ends in the next one touches what neither owns alone."""
    array = np.zeros(8, np.uint32)
    first = array.ctypes.data
    memory = Memory([(first, first + 8), (first + 8, first + 32)])
    with pytest.raises(Fault, match="outside"):
        machine("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd8];", 1).launch([first], (1, 1, 1), memory)
    overlapping = Memory([(first, first + 12), (first + 8, first + 32)])
    machine("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd8];", 1).launch([first], (1, 1, 1), overlapping)


def test_misaligned() -> None:
    assert "misaligned read of 4 bytes" in str(fault("ld.global.b32 %r1, [%rd8+2];"))
    array = np.zeros(16, np.uint64).view(np.uint32)
    first = array[4 - array.ctypes.data // 4 % 4 :]
    run("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd8];", first)
    with pytest.raises(Fault, match="misaligned read of 16 bytes"):
        run("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd8];", first[1:])


def test_two_threads_that_write_the_same_bytes() -> None:
    raised = fault("st.global.b32 [%rd8], %r15;")
    assert "race: write of what program 0, thread 0 writes" in str(raised)
    assert raised.thread == 1
    halves = PER_THREAD.format(size=2) + "and.b32 %r1, %r15, 1; sub.s32 %r2, %r15, %r1; "
    halves += "mul.wide.u32 %rd0, %r2, 2; add.s64 %rd0, %rd0, %rd8; cvt.u16.u32 %h1, %r15;"
    assert "race" in str(fault(f"{halves} st.global.b32 [%rd0], %r15;"))
    run("st.global.b32 [%rd8], %r15;", np.zeros(1, np.uint32), options=Options(watches=False))
    run("setp.eq.u32 %p1, %r15, 3; @%p1 st.global.b32 [%rd8], %r15;", np.zeros(1, np.uint32))


def test_a_program_that_reads_what_another_one_writes() -> None:
    write = each("st", 0, "b32", "%r15")
    other = f"{write} xor.b32 %r15, %r15, 32; {each('ld', 0, 'b32', '%r1')}"
    assert "race: read of what program" in str(fault(other, n=64, grid=2))
    own = f"{write} xor.b32 %r15, %r15, 1; {each('ld', 0, 'b32', '%r1')}"
    run(own, np.zeros(64, np.uint32), grid=2)


ONE = "setp.eq.u32 %p1, %r15, 0; setp.eq.u32 %p2, %r15, {other};"


def test_races_of_accesses_that_are_wider_than_others() -> None:
    inside = """mov.b32 %r1, 0; @%p1 st.global.v4.b32 [%rd8], {%r1, %r1, %r1, %r1}; @%p1 st.global.b32 [%rd8+4], %r1;
    @%p2 st.global.b32 [%rd8+8], %r1;"""
    assert "race: write of what program 0, thread 0 writes" in str(fault(ONE.format(other=1) + inside))
    read = "@%p2 ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd8];"
    # Three words are the reader's own: the first or the last one is another program's.
    for theirs, own in ((0, (4, 8, 12)), (12, (0, 4, 8))):
        writes = f"@%p1 st.global.b32 [%rd8+{theirs}], %r15;"
        writes += " ".join(f"@%p2 st.global.b32 [%rd8+{place}], %r15;" for place in own)
        raised = fault(f"{ONE.format(other=32)} {writes} {read}", grid=2)
        assert "race: read of what program 0 writes" in str(raised)
        assert raised.program == 1


def test_a_thread_missing_at_a_barrier() -> None:
    warp = "setp.lt.u32 %p1, %r15, 32; @%p1 bra $end; bar.sync 0; $end: mov.b32 %r1, 0;"
    raised = fault(warp, n_threads=64)
    assert "a barrier that this thread never reaches" in str(raised)
    assert (raised.thread < 32, raised.instruction) == (True, "bar.sync 0")
    part = fault("setp.eq.u32 %p1, %r15, 5; @%p1 bra $end; bar.sync 0; $end: mov.b32 %r1, 0;")
    assert "a barrier without all threads of the warp" in str(part)
    assert "bar.warp.sync" in str(fault("setp.eq.u32 %p1, %r15, 5; @%p1 bar.warp.sync -1;"))


def test_a_thread_missing_at_an_exchange() -> None:
    for exchange in ("shfl.sync.bfly.b32 %r1, %r15, 1, 31, -1;", "redux.sync.add.s32 %r1, %r15, -1;"):
        raised = fault(f"setp.ne.u32 %p1, %r15, 5; @%p1 {exchange}")
        assert "an exchange without all threads of the warp" in str(raised)
        run(f"setp.ge.u32 %p1, %r15, 32; @%p1 {exchange}", np.zeros(1, np.uint32), n_threads=64)


def test_exchanges_of_a_part_of_a_warp_are_not_known() -> None:
    for exchange in ("shfl.sync.bfly.b32 %r1, %r15, 1, 31, 0xFF;", "redux.sync.add.s32 %r1, %r15, 0xFF;"):
        with pytest.raises(NotImplementedError, match="of a part of a warp"):
            run(exchange, np.zeros(1, np.uint32))


def test_shared_memory_out_of_bounds_or_misaligned() -> None:
    for access in ("ld.shared.b32 %r1, [%r2];", "st.shared.b32 [%r2], %r15;"):
        assert "outside of shared memory, 60 bytes" in str(fault(f"mov.b32 %r2, 60; {access}", shared=60))
        assert "outside of shared memory" in str(fault(f"mov.b32 %r2, -4; {access}", shared=64))
        assert "misaligned" in str(fault(f"mov.b32 %r2, 2; {access}", shared=64))


STORE = each("st", 0, "b32", "%r1")
UNDEFINED = {
    "stored": STORE,
    "computed with": f"add.s32 %r1, %r2, 1; {STORE}",
    "an address": "ld.global.b32 %r1, [%rd3];",
    "a predicate": "@%p1 ld.global.b32 %r1, [%rd8];",
    "a predicate of a branch": "setp.eq.s32 %p1, %r1, 0; @%p1 bra $end; mov.b32 %r2, 0; $end: mov.b32 %r2, 0;",
    "written by some threads only": f"setp.lt.u32 %p1, %r15, 9; @%p1 mov.b32 %r1, 1; {STORE}",
    "left as it was by a load": f"setp.lt.u32 %p1, %r15, 9; @%p1 ld.global.b32 %r1, [%rd8]; {STORE}",
    "selected": f"setp.lt.u32 %p1, %r15, 9; selp.b32 %r1, %r15, %r2, %p1; {STORE}",
    "selected by": f"selp.b32 %r1, %r15, 0, %p1; {STORE}",
    "another lane's": f"setp.lt.u32 %p1, %r15, 9; @%p1 mov.b32 %r2, 1; shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1; {STORE}",
    "a part": f"mov.b16 %h1, 1; mov.b32 %r1, {{%h1, %h2}}; {STORE}",
    "through shared memory": f"shl.b32 %r3, %r15, 2; st.shared.b32 [%r3], %r2; ld.shared.b32 %r1, [%r3]; {STORE}",
    "in shared memory": f"shl.b32 %r3, %r15, 2; ld.shared.b32 %r1, [%r3]; {STORE}",
    "in a part of shared memory": f"shl.b32 %r3, %r15, 2; st.shared.b8 [%r3], %r3; ld.shared.b32 %r1, [%r3]; {STORE}",
}


@pytest.mark.parametrize("body", UNDEFINED.values(), ids=UNDEFINED.keys())
def test_what_was_never_written(body: str) -> None:
    assert "which comes of something that was never written" in str(fault(body, shared=128))


def test_what_was_never_written_and_does_not_matter() -> None:
    for body in (
        f"setp.lt.u32 %p1, %r15, 32; selp.b32 %r1, %r15, %r2, %p1; {STORE}",
        f"add.s32 %r2, %r3, 1; mov.b32 %r1, 0; {STORE}",
        f"setp.lt.u32 %p1, %r15, 9; @%p1 mov.b32 %r1, 1; @!%p1 mov.b32 %r1, 2; {STORE}",
        f"setp.lt.u32 %p1, %r15, 9; @%p1 mov.b32 %r1, 1; {STORE.replace('st.', '@%p1 st.')}",
    ):
        run(body, np.zeros(32, np.uint32))


@pytest.mark.parametrize(
    "half",
    [
        "cvt.u32.u64 %r1, %rd2;", "mov.b64 {%r1, _}, %rd2;", "and.b64 %rd3, %rd2, 0xFFFFFFFF; cvt.u32.u64 %r1, %rd3;",
        "shl.b64 %rd3, %rd2, 32; shr.u64 %rd3, %rd3, 32; cvt.u32.u64 %r1, %rd3;",
        "or.b64 %rd3, %rd2, 0xFFFFFFFF00000000; shr.s64 %rd3, %rd3, 8; cvt.s32.s64 %r1, %rd3;",
        "mul.rn.f32x2 %rd3, %rd2, %rd2; mov.b64 {%r1, _}, %rd3;",
        "cvt.u32.u64 %r4, %rd2; prmt.b32 %r1, %r4, %r5, 0x3210;", "xor.b64 %rd3, %rd2, %rd2; cvt.u32.u64 %r1, %rd3;",
    ],
)  # fmt: skip
def test_halves_of_which_one_was_never_written(half: str) -> None:
    """Compilers pack them, and take the other one out again."""
    run(f"mov.b64 %rd2, {{%r15, %r7}}; {half} {STORE}", np.zeros(32, np.uint32))
    swapped = f"mov.b64 %rd2, {{%r7, %r15}}; {half} {STORE}"
    assert "never written" in str(fault(swapped))


def test_races_of_warps_in_shared_memory() -> None:
    place = "and.b32 %r2, %r15, 31; shl.b32 %r2, %r2, 2;"
    written = f"{place} st.shared.b32 [%r2], %r15;"
    assert "race in shared memory: write" in str(fault(written, n_threads=64, shared=128))
    read = f"{place} mov.b32 %r3, 0; st.shared.b32 [%r2], %r3; bar.sync 0; ld.shared.b32 %r1, [%r2]; "
    after = "setp.lt.u32 %p1, %r15, 32; @%p1 st.shared.b32 [%r2], %r15;"
    assert "write of what another warp read" in str(fault(read + after, n_threads=64, shared=128))
    # With a barrier, with the same value, and within a warp it is none.
    run(f"{read} bar.sync 0; {after}", np.zeros(1, np.uint32), n_threads=64, shared=128)
    run("mov.b32 %r3, 7; st.shared.b32 [0], %r3;", np.zeros(1, np.uint32), n_threads=64, shared=16)
    run(f"{written} ld.shared.b32 %r1, [%r2]; st.shared.b32 [%r2], %r1;", np.zeros(1, np.uint32), shared=128)
