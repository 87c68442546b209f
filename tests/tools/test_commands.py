"""Behaviour that commands share: tables on narrow terminals, optimizers by position, a machine without Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tritopt.__main__ import app
from tritopt.commands import bench as bench_command
from tritopt.commands import inspect as inspect_command
from tritopt.commands import numerics as numerics_command
from tritopt.commands import tune as tune_command
from tritopt.commands.console import Column, Line, print_table
from tritopt.engine.tuning.config import Config
from tritopt.mxnet import registry
from tritopt.tools import numerics, tune
from tritopt.tools.bench import host, measure
from tritopt.tools.bench.contestants import Case
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
    assert_fits("\n".join(result.output.splitlines()[3:]), width, "reference", "stochastic", "ok")


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
    known = dict(registry.OPTIMIZERS)
    yield
    registry.OPTIMIZERS.clear()
    registry.OPTIMIZERS.update(known)


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
from tritopt.__main__ import app
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
