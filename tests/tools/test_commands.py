"""Behaviour that commands share: tables on narrow terminals, optimizers by position, a machine without Triton."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console
from typer.testing import CliRunner

import tritopt
import tritopt.__main__ as command_line
from tritopt.__main__ import announcement
from tritopt.commands import bench as bench_command
from tritopt.commands import check_report
from tritopt.commands import inspect as inspect_command
from tritopt.commands import numerics as numerics_command
from tritopt.commands import tune as tune_command
from tritopt.commands.app import app
from tritopt.commands.console import Column, Line, console, print_table
from tritopt.engine.tuning.config import Config
from tritopt.mxnet import registry
from tritopt.tools import numerics, resources, tune
from tritopt.tools.bench import host, measure
from tritopt.tools.bench.contestants import Case
from tritopt.tools.check import CheckResult
from tritopt.tools.check.cases import unchecked
from tritopt.tools.check.worker import Selection
from tritopt.tools.inspect import Change, load

ROOT = Path(__file__).resolve().parents[2]
COUNTS = ROOT / "tests" / "data" / "counts_sm_90.json"


def run(*arguments: str, **env: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env=env)


# Narrow terminals.


def assert_fits(output: str, width: int, *expected: str) -> None:
    """No line is wider, nothing is cut off, and what the table is for is there."""
    assert "…" not in output
    assert max(map(len, output.splitlines())) <= width
    for text in expected:
        assert text in output


@pytest.fixture(params=[60, 80, 120])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


def test_list(width: int) -> None:
    output = run("list").output
    assert_fits(output, width, "rmsprop(centered=True)", "master", "12")
    assert ("No room for: launches; states" in output) == (width < 120)


def test_check(width: int) -> None:
    result = run("check", "test", "--quick")
    assert result.exit_code == 0
    assert "Whether a step is like the last is asked in " in result.output.splitlines()[2]
    assert result.output.splitlines()[3] == "11 cases"
    report = result.output.partition("11 cases\n")[2]
    assert_fits(report, width, "optimizer", "ok", "all 11 checks passed")
    assert report.isascii()


def checked(rows_of: Callable[[CheckResult], dict[str, Any]], **chosen: Any) -> check_report.Report:
    """A report of every case, without a check: what `rows_of` says of each."""
    selection = Selection([], **chosen)
    cases = selection.cases()
    rows = [replace(row, **rows_of(row)) for row in map(unchecked, cases)]
    return check_report.Report(cases, rows, {"adamw": "mine:AdamW"}, selection)


def printed(report: check_report.Report, terminal: Console, verbose: bool = False) -> str:
    with terminal.capture() as captured:
        report.print(terminal, verbose, explains_skipped=True)
    return captured.get()


def fine(row: CheckResult) -> dict[str, Any]:
    return {"fused_vs_reference": 0.0, "fused_vs_truth": 0.52, "states": 130.0}


@pytest.mark.parametrize(("columns", "n_blocks"), [(60, 3), (80, 2), (120, 2), (132, 1)])
def test_matrix_of_all_checks(columns: int, n_blocks: int) -> None:
    """Every optimizer has a line in each block of columns, and every storage format a column in one of them."""
    output = printed(checked(fine), Console(width=columns, force_terminal=False))
    matrix = output.partition("\nNumber: ")[0]
    assert_fits(output, columns, f"all {len(Selection([]).cases())} checks passed")
    assert output.isascii()
    assert len(re.findall(r"^-+$", matrix, re.MULTILINE)) == n_blocks
    assert matrix.count("0.5 ok") == len({(case.cls, case.storage) for case in Selection([]).cases()})
    for name in tritopt.names():
        assert len(re.findall(rf"^{name} ", matrix, re.MULTILINE)) == n_blocks
    for word in ("optimizer", "fp32", "fp64", "fp16-", "split8", "stoch-", "astic", r"\+bf16", r"\+int8"):
        assert re.search(rf"\b{word}|{word}\b", matrix)
    test = [cell for line in matrix.splitlines() if line.startswith("test ") for cell in line.split()[1:]]
    assert test == ["0.5", "ok"] * 10 + ["-"] * 6, "no states"


def test_table_of_all_numbers(width: int) -> None:
    output = printed(checked(fine, quick=True), console(), verbose=True)
    assert_fits(output, width, "reference", "stochastic", "130", "ok")
    assert output.isascii()


def test_matrix_in_a_terminal() -> None:
    """One screen of 120 columns, in colours."""
    broken = checked(lambda row: {**fine(row), "passed": row.optimizer != "lion"})
    lines = printed(broken, Console(width=120, force_terminal=True, color_system="standard")).splitlines()
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    assert max(map(len, plain[: len(tritopt.names()) + 5])) <= 120
    assert sum(line.startswith("optimizer") for line in plain) == 1
    (lion,) = (line for line in lines if line.startswith("lion"))
    (adam,) = (line for line in lines if line.startswith("adam "))
    assert lion.count("\x1b[1;31m") == lion.count("0.5✗") == 16
    assert adam.count("\x1b[32m") == adam.count("0.5✓") == 16


def test_what_failed_is_explained_below(width: int) -> None:
    def broken(row: CheckResult) -> dict[str, Any]:
        if row.optimizer == "adamw" and row.master == "split16" and row.state_dtype is None:
            return {"fused_vs_reference": 31234.5, "passed": False, "reason": "step 0, weight 2: fused differs"}
        return {**fine(row), "reason": "compared with nothing" * (row.optimizer == "lamb")}

    report = checked(broken, quick=True, target="sm_80")
    output = printed(report, console())
    matrix, _, explained = output.partition("\nNumber: ")
    assert matrix.count("3e4 FAILED") == matrix.count("FAILED") == 1
    assert "lamb: compared with nothing" in explained
    said = explained.partition("\nadamw, split16: 3 of 3 FAILED\n")[2].splitlines()
    assert said == [
        "tritopt.create('adamw', learning_rate=0.1, wd=0.05, clip_gradient=1.5, rescale_grad=2.0, "
        "multi_precision=True, master='split16'), weights bfloat16 + split16, gradients bfloat16:",
        "  step 0, weight 2: fused differs",
        "  to run these alone: tritopt check mine:AdamW --format split16 --quick --compiled --target sm_80",
        "",
        f"3 of {len(Selection([], quick=True).cases())} checks failed",
    ]
    assert printed(report, console(), verbose=True).count("step 0, weight 2: fused differs") == 3


def test_many_failures_are_counted() -> None:
    output = printed(checked(lambda row: {"passed": False, "reason": "wrong"}), Console(width=132))
    assert output.count("to run these alone") == check_report.MAX_FAILURES
    n = len({(case.cls, case.storage) for case in Selection([]).cases()})
    assert f"\nand {n - check_report.MAX_FAILURES} more cells, which --json lists\n" in output
    n = len(Selection([]).cases())
    assert output.endswith(f"\n{n} of {n} checks failed\n")


# What is said before torch and Triton are imported.

BEFORE = """
import sys
sys.modules["torch"] = sys.modules["triton"] = None
sys.argv = ["tritopt", "check", *sys.argv[1:]]
from tritopt.__main__ import main
main()
"""


def test_the_first_line_comes_before_torch_does() -> None:
    """It takes less than two seconds from the start of Python, a tenth of one on two cores."""
    start = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", BEFORE], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        line = running.stdout.readline()
        seconds = time.monotonic() - start
        _, errors = running.communicate()
    assert re.match(
        rf"tritopt {tritopt.__version__} checks {len(tritopt.names())} optimizers: about [\d,]+ cases and ", line
    )
    assert seconds < 2
    assert "torch" in errors.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [[], ["--quick"], ["adamw", "Adam", "--optimizer=lion"], ["adam", "-j", "4", "--format", "split16", "--verbose"]],
    ids=" ".join,
)
def test_announced_cases_are_about_as_many(arguments: list[str]) -> None:
    said = announcement(["check", *arguments]) or ""
    names = [name for name in ("adamw", "adam", "lion") if name in " ".join(arguments).lower()]
    cases = Selection(names, "--quick" in arguments, ["split16"] if "split16" in arguments else []).cases()
    (n,) = re.findall(r"about ([\d,]+) cases ", said)
    assert int(n.replace(",", "")) == pytest.approx(len(cases), rel=0.15, abs=2)


def test_announced_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "n_processes", lambda n_cases: 2)
    monkeypatch.setattr(command_line, "GPUS", ())
    monkeypatch.setattr(command_line, "CASES", {False: 1500, True: 100})
    monkeypatch.setattr(command_line, "SECONDS", {False: 0.1, True: 0.05})
    arguments = ("adam", "adam --jobs=1", "adam --quick -j 1", "adam --format=split16")
    said = {words: announcement(["check", *words.split()]) for words in arguments}
    assert [str(line).partition(" cases and ")[2] for line in said.values()] == [
        "80 seconds with 2 processes.",
        "3 minutes with 1 process.",
        "10 seconds with 1 process.",
        "10 seconds with 2 processes.",
    ]
    monkeypatch.setattr(command_line, "GPUS", (str(ROOT),))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    compiled = "whose kernels are compiled first."
    assert str(announcement(["check"])).endswith(compiled)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not str(announcement(["check"])).endswith(compiled)
    assert str(announcement(["check", "--compiled", "--target", "sm_80"])).endswith(compiled)
    for silent in ([], ["list"], ["check", "--json"], ["check", "--help"]):
        assert announcement(silent) is None


def test_tritopt_imports_torch_when_it_is_asked_for_a_name() -> None:
    program = """
import sys, tritopt
assert "torch" not in sys.modules and tritopt.__version__
assert not hasattr(tritopt, "adma")
from tritopt import AdamW, optim
assert AdamW is tritopt.optimizers.AdamW and {"AdamW", "create", "optim"} <= set(dir(tritopt))
from tritopt import *
assert optim.SGD and SGD is create("sgd").__class__
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_numerics(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    numbers: Any = dict.fromkeys(["resident", "moved", "loss", "drift", "kept", "update", "remains"], 100.25)
    rows = [
        numerics.FormatResult("AdamW", name, {}, "bfloat16", "stress", case, 100, 0.1, **numbers)
        for name in numerics.FORMATS
        for case in dict.fromkeys(case for column in numerics.COLUMNS for case in column.cases)
    ]
    numerics_command._print_summary(rows, markdown=False)
    output = capsys.readouterr().out
    assert_fits(output, width, "bytes", *numerics.FORMATS)
    assert [line.split()[0] for line in output.splitlines() if "100.25" in line or "100.2" in line] == [
        *numerics.FORMATS
    ]


def test_inspect(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows = load(COUNTS)
    inspect_command._print_rows(rows)
    table = capsys.readouterr().out.partition("regs, shared:")[0]
    assert_fits(table, width, "ms", *{row.kernel.removeprefix("multi_tensor_") for row in rows if row.elements})
    inspect_command._print_changes([Change(rows[0].case, rows[0].kernel, "registers", 90, 91, False)], 1, COUNTS)
    assert_fits(capsys.readouterr().out, width, "saved", "90", "91")


def test_inspect_shows_what_spills(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    (row, *_) = [row for row in load(COUNTS) if row.elements]
    inspect_command._print_rows([row.__class__(**{**vars(row), "spilled_bytes": 16})])
    assert_fits(capsys.readouterr().out, 60, "16", "spilled", "ms")


def test_tune(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    few, many = Config(block_size=1024), Config(block_size=2048)
    row = tune.Row("AdamW", "split16+bf16", "adamw_update", 2**21, few, many, 10.25, 11.5, 1, 2)
    tune_command.print_rows([row])
    assert_fits(capsys.readouterr().out, width, "split16+bf16", "1024", *(["10.25"] if width > 60 else []))
    assert_fits(run("tune", "--show").output.partition("nothing tuned")[0], width, "block", "not measured", "AMD")


def test_bench(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    row = measure.Measurement("llama3-8b", 8_000_000_000, 291, "AdamW", "split16+bf16", "TransformerEngine", "bf16")
    row.ms, row.device_ms, row.ratio = 3.25, 3.0, 1.25

    class Done:
        copy, done, passed = 4.1e12, [row], True
        device = type("Device", (), {"is_rehearsal": False})

    bench_command._print(Done())  # type: ignore[arg-type]
    assert_fits(capsys.readouterr().out, width, "TransformerEngine", "3.250", "times", "1.25")
    times: Any = {"ms": 0.5, "best_ms": 0.25, "cold_ms": 1.0, "ratio": 0.125}
    names = ("torch foreach", "optimi")

    def case_times(case: Case, *_: object) -> list[host.HostTime]:
        rows = [host.HostTime(name, *case, case.title, "nothing", **times) for name in names]
        rows[1].ms, rows[1].refused = None, "RuntimeError: needs a GPU"
        return rows

    monkeypatch.setattr(host, "case_times", case_times)
    table, _, below = run("bench", "--host").output.partition("replaced,")
    assert_fits(table, width, *names, "0.500", "0.12", *{word for case in host.CASES for word in case.title.split()})
    assert f"{host.CASES[0].title}, optimi: RuntimeError: needs a GPU" in below


def test_words_are_broken_only_where_no_column_may_go() -> None:
    terminal = Console(width=20, force_terminal=False)
    with terminal.capture() as captured:
        print_table(terminal, [Column("a"), Column("b", 1), Column("c")], [Line(["x" * 15, "gone", "y" * 15])])
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 20
    assert captured.get().count("x") == captured.get().count("y") == 15
    assert "No room for: b." in captured.get()


# Optimizers by position.


@pytest.fixture
def _registers_for_now() -> Iterator[None]:
    known = dict(registry.registered())
    yield
    registry.registered().clear()
    registry.registered().update(known)


@pytest.mark.usefixtures("_registers_for_now")
@pytest.mark.parametrize("command", ["list", "check"])
def test_optimizers_by_position(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text("import tritopt\nclass Mine(tritopt.SGD): pass\n")
    quick = ["--quick"] if command == "check" else []
    result = run(command, "Test", "mine:Mine", *quick, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    rows = document["rows"] if command == "check" else document
    assert {row["optimizer"] for row in rows} == {"test", "mine"}
    for name, hint in (("adamww", "did you mean 'adamw'"), ("nowhere:Mine", "cannot import"), ("x", "my_module:My")):
        result = run(command, name, COLUMNS="200")
        assert result.exit_code == 2
        assert hint in result.output


@pytest.mark.usefixtures("_registers_for_now")
def test_a_class_of_torchs_face_stands_for_its_rule() -> None:
    result = run("list", "tritopt.optim:SGD", "--json")
    assert json.loads(result.stdout)[0]["optimizer"] == "torchsgd"


@pytest.mark.parametrize("command", ["numerics", "tune", "bench", "inspect"])
def test_unknown_optimizers_by_position(command: str) -> None:
    result = run(command, "AdmaW", *(["--rehearse"] if command == "bench" else []), COLUMNS="200")
    assert result.exit_code == 2
    assert "unknown optimizer 'AdmaW'; did you mean 'AdamW'" in result.output or "did you mean 'adamw'" in result.output


def test_numerics_takes_one_optimizer() -> None:
    result = run("numerics", "Lion", "--optimizer", "AdamW", COLUMNS="200")
    assert result.exit_code == 2
    assert "one optimizer at a time: Lion or --optimizer AdamW" in result.output
    result = run("numerics", "Lion", "--no-digits", "--steps", "1", "--format", "fp32", "--json")
    assert {row["optimizer"] for row in json.loads(result.stdout)} == {"Lion"}


# Without Triton.

WORKS = [
    ["list"],
    ["list", "--markdown"],
    ["check", "test", "--quick"],
    ["numerics", "--no-digits", "--steps", "1", "--format", "split16"],
    ["tune", "--show"],
    ["inspect", "--help"],
]
NEEDS = [
    ["inspect"],
    ["inspect", "adamw"],
    ["inspect", "--diff", str(COUNTS)],
    ["bench"],
    ["bench", "--host"],
    ["bench", "--rehearse"],
    ["tune"],
]
WITHOUT = """
import json, sys
sys.modules["triton"] = None  # `import triton` then raises ImportError, as where it is not installed
from typer.testing import CliRunner
from tritopt.commands.app import app
done = [CliRunner().invoke(app, arguments) for arguments in json.loads(sys.argv[1])]
failed = lambda run: isinstance(run.exception, Exception)
print(json.dumps([(run.exit_code, run.stdout, run.stderr, failed(run)) for run in done]))
"""


class Ended(NamedTuple):
    """Outcome of a command: exit code and output."""

    exit_code: int
    stdout: str
    stderr: str
    raised: bool


@pytest.fixture(scope="module")
def without_triton() -> dict[str, Ended]:
    """Each of these commands in turn, in one process that imports torch once."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"COLUMNS": "200"}
    command = [sys.executable, "-c", WITHOUT, json.dumps(WORKS + NEEDS)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ended = [Ended(*fields) for fields in json.loads(done.stdout)]
    return {" ".join(arguments): outcome for arguments, outcome in zip(WORKS + NEEDS, ended, strict=True)}


@pytest.mark.xdist_group("without_triton")
@pytest.mark.parametrize("arguments", WORKS, ids=" ".join)
def test_what_works_without_triton(arguments: list[str], without_triton: dict[str, Ended]) -> None:
    done = without_triton[" ".join(arguments)]
    assert done.exit_code == 0, done
    if arguments[0] == "list":
        assert done.stdout == run(*arguments, COLUMNS="200").output


@pytest.mark.xdist_group("without_triton")
@pytest.mark.parametrize("arguments", NEEDS, ids=lambda arguments: " ".join(arguments[:2]))
def test_what_needs_triton_says_how_to_get_it(arguments: list[str], without_triton: dict[str, Ended]) -> None:
    done = without_triton[" ".join(arguments)]
    said = " ".join(done.stderr.replace("│", " ").split())
    assert done.exit_code in (1, 2)
    assert "Triton, which is not installed: `pip install 'triton>=3.6'`" in said
    assert "use_fused_step" not in said
    assert not done.raised
