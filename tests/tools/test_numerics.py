"""`tritopt numerics`: its yardsticks are right, so that what it says of the formats is."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.support.training import EVERY_CLASS
from tritopt import optim
from tritopt.commands.app import app
from tritopt.engine.driver import Apply
from tritopt.tools.numerics import COLUMNS, DIGITS_LR, FormatResult, Report, load, plot, summary
from tritopt.tools.numerics.digits import Digits, digits_result, train_digits
from tritopt.tools.numerics.record import Movement
from tritopt.tools.numerics.stress import (
    ANY_OUTLIERS,
    CASES,
    DECAY,
    GRADIENTS,
    LOSS_SCALE,
    OUTLIER,
    OUTLIERS,
    SAME_OUTLIERS,
    Case,
    Stress,
    stress_results,
    train_stress,
)
from tritopt.tools.storage import BY_DEFAULT, FORMATS, TRUTH, WEIGHTS, find_formats

SAVED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "numerics_adamw.json"
BY_NAME = {case.name: case for case in CASES}


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["numerics", *arguments])


def rows_of(name: str, cases: list[Case], steps: int) -> list[FormatResult]:
    stress = Stress(cases, steps)
    truth = train_stress(optim.AdamW, TRUTH, stress)
    return list(stress_results(optim.AdamW, FORMATS[name], stress, truth))


# The yardsticks.


def test_movement_is_what_goes_along_the_truth_and_drift_what_does_not() -> None:
    start, truth = torch.tensor([1.0, 1.0]), torch.tensor([5.0, 1.0])
    assert Movement.of(truth, truth, start) == (1.0, 0.0)
    assert Movement.of(start, truth, start) == (0.0, 1.0)
    assert Movement.of(torch.tensor([3.0, 4.0]), truth, start) == (0.5, math.sqrt(4 + 9) / 4)
    assert Movement.of(truth, start, start) == (None, None)


def test_the_truth_is_torchs_adamw() -> None:
    stress = Stress(CASES, 30)
    trained = train_stress(optim.AdamW, TRUTH, stress)
    params = [torch.nn.Parameter(stress.start.double()) for _ in CASES]
    opt = torch.optim.AdamW(
        [{"params": [p], "lr": c.lr, "weight_decay": c.weight_decay} for p, c in zip(params, CASES, strict=True)]
    )
    for step in range(30):
        for param, grad in zip(params, stress.gradients(step), strict=True):
            param.grad = grad.double()
        opt.step()
    for weight, param in zip(trained.weights, params, strict=True):
        torch.testing.assert_close(weight, param.detach(), rtol=1e-12, atol=0)


def test_gradients_are_what_the_cases_say() -> None:
    stress = Stress(CASES, 600)
    grads = torch.stack([stress.gradients(step) for step in range(0, 600, 10)])
    assert torch.equal(grads, grads.bfloat16().float())
    for i, case in enumerate(CASES):
        size, mean = grads[:, i].abs(), grads[:, i].mean(dim=0)
        is_outlier = size > 30 * case.gradient_rms
        usual = grads[:, i][~is_outlier]
        assert float(usual.square().mean().sqrt()) == pytest.approx(case.gradient_rms, rel=0.02)
        if case.outliers is None:
            assert not is_outlier.any()
            assert float(mean.abs().mean()) == pytest.approx(0.6 * case.gradient_rms, rel=0.05)
        else:
            assert float(size[is_outlier].median() / size.median()) == pytest.approx(OUTLIER, rel=0.2)
            places = is_outlier.any(dim=0).sum()
            assert (places == OUTLIERS) if case.outliers == "same" else (places > 10 * OUTLIERS)
    again = Stress(CASES, 600)
    assert torch.equal(again.start, stress.start)
    assert torch.equal(again.gradients(590), grads[59])


def test_numbers_that_come_again_come_elsewhere() -> None:
    stress = Stress([Case("one", 1.0, 1e-3)], 600)
    first, again = stress.gradients(1), stress.gradients(513)
    assert not torch.equal(first, again)
    assert float((first - again).abs().mean()) > 0.5


def test_fp16_gradients_are_exact() -> None:
    """Gradients below 2e-3 of the smallest rms are the exception: they are subnormal."""
    stress = Stress([case for case in CASES if case.outliers is None], 1)
    exact = stress.gradients(0)
    scaled = (exact * LOSS_SCALE).half().float() / LOSS_SCALE
    assert scaled.isfinite().all()
    large = exact.abs() > 2e-11
    assert torch.equal(scaled[large], exact[large])


# What it says of the formats.


@pytest.mark.parametrize("name", [*WEIGHTS, "fp32+bf16", "split8+int8", "split8+fp8", "stochastic+int8"])
def test_decay_alone(name: str) -> None:
    (row,) = rows_of(name, [BY_NAME[DECAY]], 100)
    assert row.remains == (1.0 if name == "none" else pytest.approx((1 - 1e-4) ** 100, abs=2e-4))


def test_decay_ends_after_a_thousand_steps() -> None:
    (row,) = rows_of("kahan", [BY_NAME[DECAY]], 1003)
    assert row.remains == pytest.approx(0.905, abs=0.002)
    assert row.steps == 1000


@pytest.mark.parametrize("name", ["split8", "fp32", "fp16-kahan"])
def test_updates_of_a_millionth_are_kept(name: str) -> None:
    (row,) = rows_of(name, [BY_NAME["lr 1e-6"]], 300)
    assert row.kept == pytest.approx(1, abs=0.05)


def test_without_a_master_small_updates_are_lost() -> None:
    (row,) = rows_of("none", [BY_NAME["lr 1e-4"]], 50)
    assert (row.kept, row.drift, row.update) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("name", ["fp32+bf16", "fp32+int8", "fp32+int8/bf16", "fp32+fp8"])
def test_updates_by_small_gradients_have_their_size(name: str) -> None:
    for row in rows_of(name, [BY_NAME["gradient rms 1e-6"], BY_NAME["gradient rms 1e-7"]], 100):
        assert row.update == pytest.approx(1, abs=0.05)
        assert row.kept == pytest.approx(1, abs=0.05)
        assert row.drift is not None
        assert 0 < row.drift < 0.1


def test_split16_is_the_master() -> None:
    cases = [BY_NAME["lr 1e-5"], BY_NAME["gradient rms 1e-7"]]
    for master, split in zip(rows_of("master", cases, 40), rows_of("split16", cases, 40), strict=True):
        assert (split.kept, split.drift, split.update) == (master.kept, master.drift, master.update)


def test_the_digits_are_learned() -> None:
    digits = Digits.load()
    expected = train_digits(optim.AdamW, TRUTH, digits, 90, DIGITS_LR)
    truth, master, none = (
        digits_result(optim.AdamW, fmt, digits, 90, DIGITS_LR, expected)
        for fmt in (TRUTH, *find_formats(["master", "none"]))
    )
    assert truth.loss is not None
    assert none.loss is not None
    assert truth.loss < 2.1 < none.loss
    assert (truth.kept, truth.drift) == (1.0, 0.0)
    assert master.loss == pytest.approx(truth.loss, rel=1e-3)
    assert master.kept == pytest.approx(1, abs=0.01)
    assert none.kept is not None
    assert none.kept < 0.5


@pytest.mark.parametrize(
    ("name", "resident", "moved"),
    [("fp32", 16, 28), ("master", 16, 30), ("split16", 14, 26), ("split8", 13, 24), ("kahan", 14, 26),
     ("stochastic", 12, 22), ("none", 8, 14), ("fp16-master", 16, 30), ("split16+bf16", 10, 18),
     # A scale of 2 bytes for 64 elements of each state.
     ("split8+int8", 7 + 1 / 16, 12 + 1 / 8), ("split16+fp8", 8 + 1 / 16, 14 + 1 / 8),
     ("fp32+int8/bf16", 11 + 1 / 32, 18 + 1 / 16)],
)  # fmt: skip
def test_bytes(name: str, resident: float, moved: float) -> None:
    rows = rows_of(name, [BY_NAME[DECAY]], 1)
    assert (rows[0].resident, rows[0].moved) == (resident, moved)


@EVERY_CLASS
def test_every_optimizer(cls: type[optim.Optimizer]) -> None:
    report = Report(cls, find_formats(["fp32", "split8", "fp32"]), steps=2)
    rows = list(report.results())
    assert len(rows) == len(report) == 3 * (len(report.cases) + 1)
    for row in rows:
        if row.format == "split8" and row.refused:
            assert not all(isinstance(phase, Apply) for phase in cls.rule().phases)
            assert "draw no random bits" in row.refused
            assert row.kept is None
        else:
            assert row.resident is not None
            assert row.drift is None or math.isfinite(row.drift)
    assert any(row.drift for row in rows)


# The table.


def row(case: str, **numbers: Any) -> FormatResult:
    return FormatResult("AdamW", "fp32", {}, "float32", "stress", case, 10, 1e-3, **numbers)


def cell(title: str, *rows: FormatResult) -> str:
    (cells,) = summary(rows).values()
    return cells[[column.title for column in COLUMNS].index(title)]


def test_cells_show_the_worst_case() -> None:
    same, other = SAME_OUTLIERS, ANY_OUTLIERS
    assert cell("kept %, outliers", row(same, kept=0.98), row(other, kept=1.01)) == "98.0"
    assert cell("kept %, outliers", row(same, kept=0.98), row(other, kept=1.5)) == "150.0"
    assert cell("kept %, outliers", row(same, kept=math.nan), row(other, kept=1.5)) == "nan"
    assert cell("kept %, outliers", row(other, refused="no")) == "-"
    drifts = [row(case, drift=0.001 * i) for i, case in enumerate(GRADIENTS)]
    assert cell("drift %, any g", *drifts) == "0.60"
    assert cell("drift %, any g", row("gradient rms 1e-2", drift=0.0)) == "0"
    assert cell("drift %, any g", row("gradient rms 1e-2", drift=1e-5)) == "<0.01"
    assert cell("bytes kept", row("gradient rms 1e-2", resident=7.03125)) == "7.031"


def test_saved_results_have_each_format() -> None:
    assert list(summary(load(SAVED))) == [TRUTH.name, *BY_DEFAULT]


@pytest.mark.parametrize("name", BY_DEFAULT)
def test_saved_results_have_the_bytes_that_are_true(name: str) -> None:
    (cells,) = summary(rows_of(name, [BY_NAME["gradient rms 1e-2"]], 1)).values()
    assert summary(load(SAVED))[name][:2] == cells[:2]


# The command.


def test_json_is_a_list_of_rows() -> None:
    result = run("--json", "--steps", "3", "--format", "split16", "--format", "none", "--no-digits")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["format"] for row in rows] == [n for n in ("fp64", "split16", "none") for _ in CASES]
    assert [row["case"] for row in rows[: len(CASES)]] == [case.name for case in CASES]
    first = rows[len(CASES)]
    assert first.keys() == FormatResult.__dataclass_fields__.keys()
    assert (first["arguments"], first["resident"], first["steps"]) == ({"master": "split16"}, 14, 3)


def test_table_and_markdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ("--steps", "2", "--format", "stochastic", "--no-digits")
    table = run(*arguments)
    assert table.exit_code == 0, table.output
    assert "…" not in table.stdout  # nothing is cut off
    assert max(map(len, table.stdout.splitlines())) <= 120
    markdown = run(*arguments, "--markdown").stdout.splitlines()
    assert [line.split("|")[1].strip() for line in markdown] == ["format", "---", "fp64", "stochastic"]
    assert len({line.count("|") for line in markdown}) == 1
    assert [cell for cell in markdown[3].split()[3:] if cell != "|"] == last_row(table.stdout)[1:]


def last_row(table: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.strip().startswith("stochastic")]
    return line.split()


def test_adafactor_says_why_it_has_no_row() -> None:
    result = run("--optimizer", "adafactor", "--steps", "1", "--format", "split8", "--no-digits")
    assert result.exit_code == 0
    assert "split8: parameter 0: master='split8' is not for Adafactor" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "splitt8"], "unknown format 'splitt8'; did you mean 'split8'"),
        (["--optimizer", "adamm"], "unknown optimizer 'adamm'; did you mean 'Adam"),
        (["--plot", "picture.jpg"], "picture.jpg must be a .png or .svg file"),
        (["--plot", "no/such/folder/a.png"], "must be a .png or .svg file in a folder that exists"),
        (["--steps", "0"], "--steps"),
        (["--lr", "0"], "lr=0.0 must be positive"),
        (["--lr", "nan"], "lr=nan must not be NaN"),
        (["--lr", "inf"], "lr=inf must be finite"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in unboxed(result.output)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("matplotlib", ["--no-digits", "--plot", "a.png"], "the plot needs matplotlib: pip install"),
        ("sklearn", [], "the digits need scikit-learn: pip install 'tritopt[numerics]', or leave them out"),
    ],
)
def test_what_is_not_installed(
    module: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in unboxed(result.output)


def unboxed(output: str) -> str:
    """The error's text without its frame."""
    return " ".join(output.replace("│", " ").split())


def test_saved_results_are_shown_as_they_were_printed(tmp_path: Path) -> None:
    assert json.loads(run("--load", str(SAVED), "--json").stdout) == json.loads(SAVED.read_text())
    lines = run("--load", str(SAVED), "--format", "split16", "--markdown").stdout.splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["split16"]
    other = tmp_path / "other.json"
    for content, message in (
        ("[{}]", "does not hold what `tritopt numerics --json` prints"),
        ("[]", "has no results of"),
    ):
        other.write_text(content)
        result = run("--load", str(other))
        assert result.exit_code == 2
        assert message in unboxed(result.output)
    assert "no/file.json does not hold" in unboxed(run("--load", "no/file.json").output)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_picture_of_saved_results(dark: bool, tmp_path: Path) -> None:
    """A panel has eight formats at most, each with its label; docs/images has what is drawn."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.svg"
    assert run("--load", str(SAVED), "--plot", str(path), *(["--dark"] if dark else [])).exit_code == 0
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())
    committed = SAVED.parents[2] / "docs" / "images" / f"numerics_{'dark' if dark else 'light'}.svg"
    assert re.findall(r"<text[^>]*>([^<]*)</text>", committed.read_text()) == texts
    assert len(plot.MAIN) <= plot.MOST
    assert [texts.count(name) for name in plot.MAIN if name not in ("split16", "master")] == [2] * 6
    assert "split16, master" in texts  # their lines are one


@pytest.mark.parametrize("suffix", plot.SUFFIXES)
def test_plot(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = list(Report(formats=find_formats(["fp32", "none"]), steps=2, with_digits=False).results())
    rows += [replace(r, format="refused", kept=None, drift=None, update=None, moved=None) for r in rows[: len(CASES)]]
    path = tmp_path / f"picture{suffix}"
    plot.save_plot(rows, path)
    written = path.read_bytes()
    assert written.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert len(written) > 10_000
    if suffix == ".svg":
        plot.save_plot(rows, path)
        assert path.read_bytes() == written
