"""`tritopt inspect --peer-kernels`: a package's Triton kernel is compiled and described, or a line says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tritopt.commands.app import app
from tritopt.tools import inspect as report
from tritopt.tools.hot_loop import parse_sass, straight_code
from tritopt.tools.inspect.peer_kernels import TRITON_PEERS, TritonPeer, inspect_peers
from tritopt.tools.inspect.peers import PEERS, PeerKernel

pytestmark = pytest.mark.xdist_group("compiles")

PACKAGE = """
import triton
import triton.language as tl

@triton.jit
def plain(w_ptr, g_ptr, none_ptr, lr, n_elements, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements
    w = tl.load(w_ptr + offsets, mask=mask)
    tl.store(w_ptr + offsets, w - lr * tl.load(g_ptr + offsets, mask=mask), mask=mask)

@triton.jit
def looped(w_ptr, g_ptr, none_ptr, lr, n_elements, BLOCK_SIZE: tl.constexpr):
    offsets = tl.arange(0, BLOCK_SIZE)
    w = tl.load(w_ptr + offsets)
    for _ in range(n_elements):
        w = w * w + lr
    tl.store(w_ptr + offsets, w)

@triton.jit
def changed(w_ptr, g_ptr, none_ptr, lr, n_elements, momentum, BLOCK_SIZE: tl.constexpr):
    pass

@triton.jit
def broken(w_ptr, g_ptr, none_ptr, lr, n_elements, BLOCK_SIZE: tl.constexpr):
    no_such_function(w_ptr)
"""


def peer(path: str) -> TritonPeer:
    types = {"*fp32": "w_ptr g_ptr", "fp32": "lr", "i32:16": "n_elements"}
    return TritonPeer(path, "fp32", "tiny-peer", path, types, {"none_ptr": None, "BLOCK_SIZE": 1024}, 1024, 8, 4)


REASONS = {
    "tiny_peer:looped": "tiny-peer: ValueError: it has a loop or a call",
    "tiny_peer:changed": "tiny-peer: TypeError: it takes other arguments than it did: momentum",
    "tiny_peer:gone": "tiny-peer: AttributeError: module 'tiny_peer' has no attribute 'gone'",
    "tiny_peer:broken": "no_such_function",
    "tiny_broken_peer:plain": "tiny-peer: ImportError: no GPU here",
    "no_such_peer:plain": "tiny-peer is not installed",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[PeerKernel | report.Skipped]:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("packages")
    (folder / "tiny_peer.py").write_text(PACKAGE)
    (folder / "tiny_broken_peer.py").write_text("raise ImportError('no GPU here')")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return list(inspect_peers([peer("tiny_peer:plain"), *map(peer, REASONS)]))


def test_a_kernel_is_described(compiled: list[Any]) -> None:
    """Eight elements a thread, 24 registers at least for the data, and a masked access of 128 bits for four."""
    row = compiled[0]
    assert isinstance(row, PeerKernel), row
    assert (row.kernel, row.stored, row.loads, row.bytes_moved) == ("tiny_peer:plain: tiny-peer", "fp32", "4x128", 12)
    assert (row.threads, row.spilled_bytes, row.waits, row.bound) == (128, 0, 1, "memory")
    assert 16 <= row.registers <= 40
    # A multiplication and a subtraction, or both in one.
    assert 1 < row.instructions < 8
    assert row.milliseconds == pytest.approx(12e12 / 4.8e12)
    assert row.in_flight == pytest.approx(row.programs * 128 * 8 * 8 / 1000)


def test_what_is_skipped_says_why(compiled: list[Any]) -> None:
    skipped = {row.kernel: row.reason for row in compiled[1:]}
    assert skipped.keys() == REASONS.keys()
    for kernel, reason in REASONS.items():
        assert reason in skipped[kernel]


def test_the_command_shows_rows_and_reasons(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "inspect_peers", lambda: compiled)
    monkeypatch.setattr(report, "inspect_cases", lambda cases: iter([report.load(COUNTS)[:1]]))
    result = CliRunner().invoke(app, ["inspect", "adamw", "--peer-kernels"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "TransformerEngine FusedAdam " in result.output
    (line,) = (line.split() for line in result.output.splitlines() if line.startswith("  tiny_peer:plain: tiny-peer"))
    assert line[-3:] == ["1", "2.50", "memory"]
    assert "no_such_peer:plain: skipped: tiny-peer is not installed" in result.output


COUNTS = Path(__file__).parents[1] / "data" / "counts_sm_90.json"


def test_peers_that_nvidia_gets_have_a_row_of_data() -> None:
    """Both tables say the same of what they move."""
    written = {kernel.kernel: kernel for kernel in PEERS if kernel.kernel != "torch 2.14 fused"}
    for triton in TRITON_PEERS:
        if not triton.kernel.endswith("for Intel"):
            row = written[triton.kernel]
            assert (triton.stored, triton.bytes_read + triton.bytes_written) == (row.stored, row.bytes_moved)
            assert 32 * triton.num_warps == row.threads


STRAIGHT = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   FADD R4, R4, R8 ;
        /*0030*/                   BRA `(.L_x_1) ;
        /*0040*/                   FADD R4, R4, R8 ;
.L_x_1:
        /*0050*/               @P0 EXIT ;
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_2);
"""


def test_straight_code_is_counted_as_threads_with_elements_run_it() -> None:
    described = straight_code(parse_sass(STRAIGHT))
    assert (described.instructions, described.arithmetic, described.waits) == (7, 1, 1)
    called = STRAIGHT.replace("FADD R4, R4, R8 ;\n        /*0030*/", "CALL.REL.NOINC `($sqrt) ;\n        /*0030*/")
    with pytest.raises(ValueError, match="a loop or a call"):
        straight_code(parse_sass(called))
