"""`tritopt inspect`: it reads compiled code right, and what it counts in the kernels of today is what is committed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.spills import allowed_spills
from tritopt.commands.app import app
from tritopt.mxnet.registry import names
from tritopt.tools import inspect as report
from tritopt.tools.compiled import CompiledLaunch
from tritopt.tools.gpus import ARCHITECTURES, DEFAULTS, GPUS, find_gpu, resident_programs
from tritopt.tools.hot_loop import HotLoop, hot_loops, parse_gcn, parse_sass
from tritopt.tools.inspect import MAIN_FORMATS, Case, LaunchRecord, compare, inspect_cases, select_cases, steps_of
from tritopt.tools.inspect import compile as compiling
from tritopt.tools.inspect.cases import NORM
from tritopt.tools.inspect.model import bytes_in_flight, seconds_of

pytestmark = pytest.mark.xdist_group("compiles")  # with tests/kernels/test_compiles.py: kernels are compiled once

COUNTS = Path(__file__).parents[1] / "data" / "counts_sm_90.json"
SAVED = report.load(COUNTS)
COUNTED = {row.optimizer for row in SAVED}
REFRESH = f"if that is meant: tritopt inspect --save tests/data/{COUNTS.name}"
ROOM = {"instructions": 0.15, "arithmetic": 0.2, "registers": 0.4}
"""Room for what another version of Triton makes, as a share. 3.6 and 3.9 differ by 0.12, 0.15 and 0.36."""
OF_VERSION = ("triton", "programs", "shared_bytes", "milliseconds", "bound", "alu", "xu", "in_flight")
"""Columns that are as the version of Triton has them."""


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["inspect", *arguments], env={"COLUMNS": "200"})


# The regression.


@pytest.fixture(scope="module")
def rows() -> list[LaunchRecord]:
    """The default cases, those of optimizers that were never saved included, compiled afresh."""
    pytest.importorskip("triton")
    return [row for records in inspect_cases(select_cases().cases, 1) for row in records]


def differences(saved: Sequence[LaunchRecord], now: Sequence[LaunchRecord]) -> list[str]:
    """List the changes that count: all if the compiler is the same, else those of what the kernels ask of it."""
    lines = []
    for change in compare(saved, now):
        if saved[0].triton != now[0].triton:
            if change.column in OF_VERSION or (change.column == "waits" and change.now < change.saved):
                continue
            if change.column in ("spilled_bytes", "waits") and change.now <= allowed_spills(change.kernel):
                continue
            is_known = change.column in ROOM and None not in (change.saved, change.now)
            if is_known and abs(change.now - change.saved) <= ROOM[change.column] * change.saved:
                continue
        lines.append(f"{change.case.label} {change.kernel}: {change.column} {change.saved} -> {change.now}")
    return lines


def test_the_compiled_code_is_as_committed(rows: list[LaunchRecord]) -> None:
    changed = differences(SAVED, [row for row in rows if row.optimizer in COUNTED])
    assert not changed, "\n".join(["the compiled code has changed;", REFRESH, *changed])


def test_the_committed_cases_are_the_default_ones() -> None:
    """Committed cases are of every optimizer that has any: a new one is counted when the counts are next saved."""
    default = [case for case in select_cases().cases if case.optimizer in COUNTED]
    assert [step.rows[0].case for step in steps_of(SAVED)] == default, REFRESH


def test_nothing_spills_and_every_step_moves_what_it_must(rows: list[LaunchRecord]) -> None:
    for step in steps_of(rows):
        assert step.moves_what_it_must, step.rows[0].case
        assert all(row.spilled_bytes <= allowed_spills(row.kernel) for row in step.rows), step.rows[0].case
        for row in step.hot:
            if row.must_load is not None:
                assert (row.bytes_loaded, row.bytes_stored) == (row.must_load, row.must_store)


def test_views_take_at_most_a_quarter_more() -> None:
    """Weights and gradients of a flat buffer behind a tensor of odd length, in every format."""
    views = [row for row in SAVED if row.views]
    assert {row.storage for row in views} == set(MAIN_FORMATS)
    aligned = {(row.storage, row.kernel): row for row in SAVED if row.optimizer == "adamw" and not row.views}
    for row in views:
        assert row.instructions is not None
        assert row.instructions <= 1.25 * (aligned[row.storage, row.kernel].instructions or 0), row.case.label
        assert row.spilled_bytes == 0


def test_counts_by_hand(rows: list[LaunchRecord]) -> None:
    """AdamW: g and w of 2 bytes, master, m and v of 4, four elements a thread; packed ones are eight."""
    by_name = {(row.optimizer, row.storage): row for row in rows if not row.arguments and not row.views}
    plain, packed = by_name["adamw", "master"], by_name["adamw", "split8+int8"]
    assert (plain.loads, plain.stores) == ({"128": 3, "64": 2}, {"128": 3, "64": 1})
    assert (plain.bytes_loaded, plain.bytes_stored) == (16, 14)
    # w and g; remainder, m and v of a byte; a scale each for m and v
    assert packed.loads == {"128": 2, "64": 3, "16": 2}
    assert (packed.bytes_loaded, packed.bytes_stored) == (7 + 4 / 64, 5 + 4 / 64)
    assert (plain.bound, packed.bound) == ("memory", "issue")
    assert plain.milliseconds == pytest.approx(30e12 / 4.8e12, abs=1e-3)
    assert packed.instructions is not None
    assert packed.milliseconds == pytest.approx(packed.instructions * 1e12 / (132 * 128 * 1.98e9 * 0.9), abs=1e-3)
    # A root and an inverse of Adam's; of int8 states five roots, a floor and a conversion.
    assert (plain.xu, packed.xu) == (2, 2 + 5 + 1 + 1)
    assert plain.in_flight == plain.programs * 128 * 4 * 16


@pytest.mark.parametrize(
    ("changed", "is_seen_with_another_triton"),
    [
        ({"instructions": 60.0}, True),
        ({"instructions": 40.0}, False),
        ({"registers": 70}, False),
        ({"registers": 128}, True),
        ({"bytes_loaded": 18.0}, True),
        ({"loads": {"128": 9}}, True),
        ({"spilled_bytes": 8}, True),
        ({"programs": 4}, False),
        ({"waits": 2}, True),
        ({"instructions": None}, True),
    ],
)
def test_the_regression_sees(changed: dict[str, Any], is_seen_with_another_triton: bool) -> None:
    adamw = Case("adamw", {}, "master", None, "H200")
    saved = [row for row in SAVED if row.case == adamw]
    now = [replace(row, **changed) for row in saved]
    assert len(differences(saved, now)) == 1
    other = [replace(row, triton="0.0") for row in now]
    assert bool(differences(saved, other)) == is_seen_with_another_triton
    assert differences(saved, [replace(row, triton="0.0") for row in saved]) == []


# Reading assembly.

SASS = """
        /*0000*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.U16 R8, desc[UR4][R6.64] ;
        /*0040*/                   BSSY B0, `(.L_x_2) ;
        /*0050*/                   MUFU.RSQ R9, R4 ;
        /*0060*/              @!P1 BRA `(.L_x_1) ;
        /*0070*/                   MOV R10, 0x80 ;
        /*0080*/                   CALL.REL.NOINC `($__internal_0_sqrt) ;
        /*0090*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*00a0*/                   FMUL R9, R4, R9 ;
        /*00b0*/                   FFMA R9, R4, R9, R9 ;
        /*00c0*/                   FFMA R9, R4, R9, R9 ;
        /*00d0*/                   FFMA R9, R4, R9, R9 ;
        /*00e0*/                   FFMA R9, R4, R9, R9 ;
.L_x_2:
        /*00f0*/                   BSYNC B0 ;
        /*0100*/                   BRA.U !UP0, `(.L_x_3) ;
        /*0110*/                   IMAD R9, R9, R9, R9 ;
        /*0120*/                   IMAD R9, R9, R9, R9 ;
.L_x_3:
        /*0130*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0140*/               @P2 BRA `(.L_x_0) ;
.L_x_9:
        /*0150*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0160*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0170*/               @P2 BRA `(.L_x_9) ;
        /*0180*/                   EXIT ;
$__internal_0_sqrt:
        /*0190*/                   RET.REL.NODEC R10 `(kernel) ;
.L_x_10:
        /*01a0*/                   BRA `(.L_x_10);
"""


def test_a_hot_loop_is_counted_along_its_shortest_way() -> None:
    """The call is left out, though it is shorter, and so is the rare branch; loops of single words are not hot."""
    (loop,) = hot_loops(parse_sass(SASS))
    # LDG LDG BSSY MUFU BRA, FMUL 4 FFMA, BSYNC BRA.U, STG BRA
    assert loop == HotLoop(14, 6, Counter({128: 1, 16: 1}), Counter({128: 1}), 1, alu=0, xu=1)


UNROLLED = """
        /*0000*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128 R8, desc[UR4][R2.64+0x800] ;
        /*0030*/                   FADD R4, R4, R8 ;
        /*0040*/                   FADD R4, R4, R8 ;
        /*0050*/              @!P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0060*/               @P2 BRA `(.L_x_2) ;
        /*0070*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0080*/                   FADD R4, R4, R8 ;
.L_x_2:
        /*0090*/                   EXIT ;
"""


def test_of_an_unrolled_loop_one_iteration_counts() -> None:
    (loop,) = hot_loops(parse_sass(UNROLLED))
    assert loop == HotLoop(5 / 2, 1, Counter({128: 1}), Counter(), 1 / 2, alu=0, xu=0)


def test_an_outer_loop_is_not_hot() -> None:
    """A persistent program's, over its chunks."""
    inner = UNROLLED.replace("EXIT ;", "@P3 BRA `(.L_x_5) ;")
    assert hot_loops(parse_sass(".L_x_5:\n" + inner)) == hot_loops(parse_sass(UNROLLED))


GCN = """
	s_cbranch_scc0 .LBB0_14
.LBB0_3:                                ; %.lr.ph
	global_load_dwordx4 v[4:7], v[2:3], off offset:16
	s_and_saveexec_b64 s[0:1], vcc
	s_cbranch_execz .LBB0_4
	global_load_ushort v8, v[2:3], off
	v_add_f32_e32 v4, v4, v8                ; a comment, s_branch .LBB0_3
.LBB0_4:
	s_or_b64 exec, exec, s[0:1]
	v_mul_f32_e32 v4, v4, v4
	global_store_dwordx2 v[2:3], v[4:5], off
	s_cbranch_scc1 .LBB0_3
.LBB0_5:
	global_load_dwordx4 v[4:7], v[2:3], off
	s_endpgm
.LBB0_14:
	s_branch .LBB0_5
	.section	.rodata
"""


def test_gcn_with_active_lanes_and_without_what_merely_jumps_back() -> None:
    (loop,) = hot_loops(parse_gcn(GCN))
    assert loop == HotLoop(9, 2, Counter({128: 1, 16: 1}), Counter({64: 1}), 0, alu=0, xu=0)


def test_a_loop_that_is_unrolled_twice_is_counted_by_its_wide_loads() -> None:
    """None of its iterations is left over, and it stands before what the compiler made of those that may be."""
    once = UNROLLED.rpartition(".L_x_1:")[0]
    assert hot_loops(parse_sass(once))[0].loads == Counter({128: 2})
    assert [loop.loads for loop in hot_loops(parse_sass(once), wide_loads=1)] == [Counter({128: 1})]


def test_pipes() -> None:
    lines = ("LDG.E.128 R4, desc[UR4][R2.64]", "MUFU.RSQ R8, R4", "I2F.S8 R9, R5", "I2FP.F32.U32 R9, R5",
             "FSETP.GEU.AND P0, PT, R4, R5, PT", "VIADDMNMX R9, R5, R6, R7, !PT", "IMAD R9, R5, R6, R7",
             "FSEL R9, R4, R5, P0", "@!P0 BRA `(.L_x_0)")  # fmt: skip
    text = ".L_x_0:\n" + "".join(f"        /*{16 * i:04x}*/    {line} ;\n" for i, line in enumerate(lines))
    (loop,) = hot_loops(parse_sass(text))
    assert (loop.instructions, loop.alu, loop.xu) == (9, 4, 2)


# Loads, and what of them is used: by a register of four, as an address, by a store of four.
WAITS = {
    "LDG.E.128 R4, desc[UR4][R2.64] ; LDG.E.U16 R9, desc[UR4][R12.64] ; FADD R1, R7, R1 ; FADD R1, R9, R1": 1,
    "LDG.E.128 R4, desc[UR4][R2.64] ; FADD R1, R7, R1 ; LDG.E.U16 R9, desc[UR4][R12.64] ; FADD R1, R9, R1": 2,
    "LDG.E.128 R4, desc[UR4][R2.64] ; FADD R1, R8, R1 ; LDG.E.U16 R9, desc[UR4][R12.64] ; FADD R1, R9, R1": 1,
    "LDG.E.64 R8, desc[UR4][R2.64] ; LDG.E.128 R4, desc[UR4][R8.64] ; FADD R1, R1, R1": 1,
    "LDG.E.128 R4, desc[UR4][R2.64] ; STG.E.128 desc[UR4][R2.64], R4 ; LDG.E R7, desc[UR4][R2.64]": 1,
    "LDG.E R7, desc[UR4][R2.64] ; STG.E.128 desc[UR4][R2.64], R4 ; LDG.E.128 R12, desc[UR4][R2.64]": 1,
    # What the iteration before has loaded.
    "FADD R1, R7, R1 ; STG.E.128 desc[UR4][R2.64], R12 ; LDG.E.128 R4, desc[UR4][R2.64]": 1,
}


@pytest.mark.parametrize(("written", "waits"), WAITS.items())
def test_waits_for_memory(written: str, waits: int) -> None:
    lines = [f"        /*{i:04x}*/ {text} ;" for i, text in enumerate([*written.split(" ; "), "@P2 BRA `(.L_x_0)"])]
    (loop,) = hot_loops(parse_sass("\n".join([".L_x_0:", *lines])))
    assert loop.waits == waits


def test_waits_of_gcn_are_instructions() -> None:
    """Counted waits leave some loads under way, which are taken to be there soon."""
    load, use = "\tglobal_load_dwordx4 v[4:7], v[2:3], off", "\tv_mul_f32_e32 v4, v4, v4"
    waits = [f"\ts_waitcnt vmcnt({n})" for n in range(3)]
    first = [".LBB0_3:", load, load, waits[2], use, waits[1], use, waits[0], use]
    later, before = (
        [*first, load, "\ts_waitcnt lgkmcnt(0)", waits[0]],
        [".LBB0_3:", waits[1], use, waits[0], use, load, load],
    )
    for lines, expected in ((first, 1), (later, 2), (before, 1)):
        (loop,) = hot_loops(parse_gcn("\n".join([*lines, "\ts_cbranch_scc1 .LBB0_3"])))
        assert loop.waits == expected


# GPUs.


@pytest.mark.parametrize(
    ("target", "registers", "num_warps", "shared", "programs"),
    [
        ("sm_90", 32, 4, 0, 16),  # 64 warps
        ("sm_90", 33, 4, 0, 12),  # 40 registers, 12.8 warps a scheduler
        ("sm_90", 64, 4, 0, 8),
        ("sm_90", 128, 8, 0, 2),
        ("sm_90", 255, 4, 0, 2),
        ("sm_90", 16, 1, 0, 32),  # programs
        ("sm_90", 32, 4, 49 * 1024, 4),  # 228 KB, and 1 KB for each program
        ("sm_80", 32, 4, 49 * 1024, 3),  # 164 KB
        ("gfx942", 61, 4, 0, 8),
        ("gfx942", 85, 4, 0, 5),
        ("gfx942", 130, 4, 0, 3),
        ("gfx942", 61, 4, 32 * 1024, 2),
    ],
)
def test_resident_programs(target: str, registers: int, num_warps: int, shared: int, programs: int) -> None:
    assert resident_programs(target, registers, num_warps, shared) == programs


def test_gpus_issue_what_their_fp32_peaks_say() -> None:
    """Two operations a lane and clock, in TFLOPS; an A100 has half as many lanes, AMD's take two at once."""
    published = {"A100": 19.5 * 2, "H100": 67, "H200": 67, "B200": 75, "MI300X": 163.4 / 2, "MI355X": 157.3 / 2}
    assert {gpu.name: gpu.issue_rate * 2e-12 for gpu in GPUS.values()} == pytest.approx(published, rel=0.01)
    assert DEFAULTS.keys() == ARCHITECTURES.keys()
    assert all(find_gpu(name).target == target for target, name in DEFAULTS.items())


# What is selected.


def test_defaults_show_every_optimizer() -> None:
    cases = select_cases().cases
    assert {case.optimizer for case in cases} == {*names(), NORM}
    adamw = [case for case in cases if case.optimizer == "adamw" and not case.arguments]
    assert [(case.storage, case.views) for case in adamw] == [*product(MAIN_FORMATS, (False, True))]
    assert {case.gpu for case in cases} == {"H200"}


def test_selected_by_name() -> None:
    selection = select_cases(["Lion", NORM], ["split8+int8", "fp32"], ["sm_80", "gfx942"])
    assert selection.cases == [
        Case(name, {}, storage, None, gpu)
        for gpu in ("A100", "MI300X")
        for name in ("lion", NORM)
        for storage in ("split8+int8", "fp32")
    ]
    assert [case.views for case in select_cases(["lion"], ["split16"], views=True).cases] == [False, True]
    assert select_cases(["torchsgd"], gpu="b200").cases[0].gpu == "B200"
    # It has no states, so formats that differ in them do not differ.
    assert [case.storage for case in select_cases(["sgld"]).cases] == ["fp32", "master", "split16", "split8+fp8"]
    everyone = select_cases(formats=["kahan"], everything=True).cases
    assert {"torchadam", "adamw", NORM} <= {case.optimizer for case in everyone}
    everything = select_cases(["adam"], everything=True).cases
    assert {"kahan", "stochastic+int8"} <= {case.storage for case in everything}


def test_what_is_refused_says_why() -> None:
    selection = select_cases(["adafactor"], ["master", "split8"])
    assert [case.storage for case in selection.cases] == ["master"]
    assert "draw no random bits" in selection.refused["adafactor split8"]
    with pytest.raises(ValueError, match=r"nothing to compile: adafactor split8: .* draw no random bits"):
        select_cases(["adafactor"], ["split8"])


# The command.


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The cases that were asked for; what compiles them is what is committed, and the H100 in place of other GPUs."""
    asked: list[Case] = []

    def committed(cases: Sequence[Case], processes: int | None = None) -> Iterator[list[LaunchRecord]]:
        asked.extend(cases)
        for case in cases:
            saved = [row for row in SAVED if row.case._replace(gpu="") == case._replace(gpu="")]
            yield [replace(row, gpu=case.gpu) for row in saved]

    monkeypatch.setattr(report, "inspect_cases", committed)
    return asked


def test_command_compiles_though_kernels_are_interpreted_here(tmp_path: Path) -> None:
    """End to end, in a process as a user's: JSON, a saved file, what changed."""
    pytest.importorskip("triton")
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "tritopt", "inspect", "--optimizer", "sgd", "--format", "none", "--grad-dtype",
               "fp32", "--gpu", "H100", "--json", "--save", str(file)]  # fmt: skip
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert json.loads(file.read_text()) == rows
    assert [row["kernel"] for row in rows] == ["multi_tensor_sgd_update", "multi_tensor_sgd_momentum_update"]
    assert {row["gpu"] for row in rows} == {"H100"}
    # w 2, g 4 and momentum 2, stored in the weight's dtype
    assert [(row["bytes_loaded"], row["bytes_stored"]) for row in rows] == [(2 + 4, 2), (2 + 4 + 2, 2 + 2)]
    assert [row["loads"] for row in rows] == [{"128": 1, "64": 1}, {"128": 1, "64": 2}]


def test_table(compiled: list[Case]) -> None:
    result = run("--optimizer", "adamw", "--optimizer", "lamb", "--format", "master")
    assert result.exit_code == 0, result.output
    assert [case.optimizer for case in compiled] == ["adamw", "adamw", "lamb"]
    assert "sm_90" in result.output
    assert "H200, 4.8 TB/s" in result.output
    lines = [line.split() for line in result.output.splitlines()]
    (adamw,) = (line for line in lines if line[:2] == ["adamw", "master"])
    assert adamw[2] == "adamw_update"
    assert adamw[5:10] == ["3x128", "2x64", "3x128", "1x64", "30"]
    assert adamw[-2:] == ["6.25", "memory"]
    (total,) = (line for line in lines if line[:1] == ["all"])
    assert total[1] == "44"
    assert "must 30" not in result.output


def test_the_page_shows_what_the_command_prints(compiled: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    formats = ("fp32", "master", "split16", "split16+bf16", "split8+fp8", "split8+int8")
    options = [option for name in formats for option in ("--format", name)]
    result = CliRunner().invoke(app, ["inspect", "adamw", *options], env={"COLUMNS": "112"})
    printed = [line.strip() for line in result.output.splitlines()]
    page = (Path(__file__).parents[2] / "docs" / "tools.md").read_text(encoding="utf-8")
    sample = [line.strip() for line in page.partition("```text\nstep ")[2].partition("```")[0].splitlines()]
    start = next(i for i, line in enumerate(printed) if line.startswith("step "))
    # Without the ruler below the titles.
    shown = [printed[start].removeprefix("step").strip(), *printed[start + 2 : start + 1 + len(sample)]]
    assert sample == shown, "copy what `COLUMNS=112 tritopt inspect adamw --format fp32 ...` prints into docs/tools.md"


def test_peers_stand_beside(compiled: list[Case]) -> None:
    result = run("adamw", "--format", "master", "--peer")
    assert result.exit_code == 0, result.output
    line = r"TransformerEngine FusedAdam +bf16; fp32 master, m, v +56 +512 +2 +4x16 12x32 +28 +46\.8 +56"
    assert re.search(line, result.output)


@pytest.mark.parametrize(
    ("changed", "bound", "milliseconds"),
    [
        ({}, "memory", 1e12 * 30 / 4.8e12),
        ({"instructions": 300.0}, "issue", 300e12 / (0.9 * 128 * 132 * 1.98e9)),
        ({"alu": 200.0}, "ALU", 200e12 / (0.9 * 64 * 132 * 1.98e9)),
        ({"xu": 40.0}, "XU", 40e12 / (0.9 * 16 * 132 * 1.98e9)),
        ({"waits": 9.0}, "latency", 1e12 * (9 * 1000 + 40 * 4 * 4) / (8 * 128 * 4 * 132 * 1.98e9)),
    ],
)
def test_the_longest_of_five_times(changed: dict[str, Any], bound: str, milliseconds: float) -> None:
    launch = CompiledLaunch(
        "adamw", 64, 0, 0, 4, 4, Counter(), Counter(), None, None, 16.0, 14.0, 40.0, 36.0, 1.0, 10.0, 2.0
    )
    seconds = seconds_of(launch._replace(**changed), 8, GPUS["H200"])
    assert max(seconds, key=seconds.__getitem__) == bound
    assert 1e12 * seconds[bound] == pytest.approx(milliseconds)
    assert bytes_in_flight(launch, 8, "sm_90") == 8 * 128 * 4 * 16
    assert bytes_in_flight(launch._replace(waits=2.0), 8, "sm_90") == 8 * 128 * 4 * 16 / 2


def test_table_says_where_bytes_differ(compiled: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [replace(row, bytes_loaded=18.0) if row.optimizer == "adamw" else row for row in SAVED]
    monkeypatch.setattr(sys.modules[__name__], "SAVED", wrong)
    result = run("--optimizer", "adamw", "--format", "master")
    assert "32, must 30" in result.output
    assert "adamw master, sm_90: the code loads 18 and stores 14 bytes per parameter, where 16 and 14" in result.output


def test_diff(compiled: list[Case], tmp_path: Path) -> None:
    file = tmp_path / "before.json"
    file.write_text(COUNTS.read_text())
    same = run("--diff", str(file))
    assert (same.exit_code, len(compiled)) == (0, len(steps_of(SAVED)))
    assert f"{len(compiled)} steps: all as in" in same.output

    def saved_with(**changed: Any) -> None:
        rows = [replace(row, **changed) if row.kernel == "multi_tensor_lion_update" else row for row in SAVED]
        file.write_text(report.dump(rows))

    saved_with(instructions=20.0, registers=70)
    worse = run("--diff", str(file))
    assert worse.exit_code == 1
    assert "2 changes, 1 of them worse" in worse.output
    saved_with(instructions=200.0, programs=2, registers=70)
    assert run("--diff", str(file)).exit_code == 0
    saved_with(programs=20)
    assert run("--diff", str(file)).exit_code == 1
    assert run("--diff", str(file), "--optimizer", "sgd").exit_code == 0
    # Times are for another GPU then, and not compared.
    assert run("--diff", str(file), "--optimizer", "sgd", "--gpu", "h100").exit_code == 0
    saved_with(instructions=None, bytes_loaded=None, elements=None)
    result = run("--diff", str(file), "--json")
    assert (result.exit_code, len(json.loads(result.stdout))) == (0, len(SAVED))


def test_a_launch_more_or_without_hot_loop_is_worse() -> None:
    (lion,) = (row for row in SAVED if row.optimizer == "lion")
    lost = replace(lion, instructions=None, bytes_loaded=None, bytes_stored=None, milliseconds=None)
    assert all(change.is_worse for change in compare([lion], [lost]))
    more = compare([lion], [lion, replace(lion, launch=1)])
    assert [(change.column, change.saved, change.now, change.is_worse) for change in more] == [("launches", 1, 2, True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "lambb"], "unknown optimizer 'lambb'; did you mean 'lamb'"),
        (["--format", "split9"], "unknown format 'split9'; did you mean 'split8'"),
        (["--target", "sm_91"], "unknown target 'sm_91'; did you mean 'sm_90'"),
        (["--gpu", "H20"], "unknown GPU 'H20'; did you mean 'H200'"),
        (["--gpu", "H200", "--target", "sm_80"], "H200 runs sm_90, not sm_80"),
        (["--grad-dtype", "fp64"], "unknown dtype of gradients 'fp64'; known: fp32, bf16, fp16"),
        (["--save", "nowhere/rows.json"], "there is no folder nowhere"),
        (["--diff", "nowhere.json"], "cannot read nowhere.json"),
        (["--diff", __file__], "is not JSON"),
        (["--diff", str(COUNTS), "--optimizer", "torchsgd"], "has none of these steps"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_what_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise SyntaxError("at 63:25: no such thing") from AttributeError("'int' object has no attribute 'type'")

    monkeypatch.setattr(compiling, "INTERPRETED", False)
    monkeypatch.setattr(compiling, "compile_launches", broken)
    monkeypatch.setattr(report, "inspect_cases", lambda cases: map(report.inspect_case, cases))
    result = run("--optimizer", "lion", "--format", "split8+int8")
    assert result.exit_code == 1
    assert "lion split8+int8, sm_90: Triton " in result.output
    assert "at 63:25: no such thing ('int' object has no attribute 'type')" in result.output


def test_of_a_batch_the_one_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(steps: Sequence[Any]) -> list[Any]:
        if any(type(step.opt).__name__ == "Lion" for step in steps):
            raise SyntaxError("no such thing")
        return [[] for _ in steps]

    monkeypatch.setattr(compiling, "INTERPRETED", False)
    monkeypatch.setattr(compiling, "compile_launches", broken)
    sound, wrong = (Case(name, {}, "master", None, "H200") for name in ("adamw", "lion"))
    assert compiling.inspect_batch([sound, sound]) == [[], []]
    with pytest.raises(RuntimeError, match=r"lion master, sm_90: Triton .* does not compile it: no such thing"):
        compiling.inspect_batch([sound, wrong, sound])


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "holds no list of rows"), ("[]", "holds no list"), ('[{"kernel": "x"}]', "rows differ in alu, arguments")],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        report.load(file)


def test_help() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for option in (
        "--optimizer",
        "--format",
        "--target",
        "--gpu",
        "--grad-dtype",
        "--all",
        "--peer",
        "--peer-kernels",
        "--save",
        "--diff",
    ):
        assert option in result.output


def test_kernels_that_are_interpreted_are_not_described() -> None:
    from tritopt.kernels.language import INTERPRETED

    if not INTERPRETED:
        pytest.skip("kernels are compiled here")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        report.inspect_case(Case("sgd", {}, "fp32", None, "H200"))
