"""The examples of digits do what they are there to show."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import tritopt
from tritopt.kernels.language import INTERPRETED

# To import them takes each worker that collects tests two seconds.
MISSING = [name for name in ("sklearn", "matplotlib") if not importlib.util.find_spec(name)]
pytestmark = [
    pytest.mark.xdist_group("digits"),  # one worker trains
    pytest.mark.skipif(bool(MISSING), reason=f"could not import {MISSING}"),
]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_digits.py"
QUICKSTART = EXAMPLE.with_name("quickstart.py")


class Outcome(NamedTuple):
    """Files and output that one call of the example left behind."""

    runs: dict[str, Any]
    plot: bytes
    printed: str


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def users_torch() -> Iterator[None]:
    """Torch as a user has it, without the defaults of conftest.py, and left as it was found."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch, torch.device("cpu"):
        torch.use_deterministic_algorithms(False)  # cuBLAS refuses to work under True
        if INTERPRETED:
            # Thousands of updates take minutes in the interpreter, and others test that it agrees with the reference.
            patch.setattr(tritopt, "create", partial(tritopt.create, use_fused_step=False))
        yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def outcome(example: ModuleType, users_torch: None, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    plot = tmp_path_factory.mktemp("digits") / "loss.png"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runs = example.main(["--plot", str(plot)])
    return Outcome({run.recipe.name: run for run in runs}, plot.read_bytes(), printed.getvalue())


@pytest.mark.parametrize("name", ["bf16, fp32 master", "fp16, fp32 master"])
def test_a_master_keeps_up_with_fp32(name: str, outcome: Outcome) -> None:
    fp32, run = outcome.runs["fp32"], outcome.runs[name]
    assert fp32.accuracy > 93
    assert run.accuracy >= fp32.accuracy - 1
    assert run.losses == pytest.approx(fp32.losses, rel=0.02)


def test_without_a_master_small_updates_are_lost(outcome: Outcome) -> None:
    fp32, run = outcome.runs["fp32"], outcome.runs["bf16, no master"]
    assert run.losses[0] == pytest.approx(fp32.losses[0], rel=0.02)
    assert run.accuracy < fp32.accuracy - 20
    assert run.losses[-1] > 5 * fp32.losses[-1]


def test_loss_scale_shrinks_until_gradients_are_finite(outcome: Outcome) -> None:
    scale = outcome.runs["fp16, fp32 master"].loss_scale
    assert 1 <= scale.n_skipped <= 20
    assert scale.value == 2.0 ** (24 - scale.n_skipped)


def test_prints_a_table_and_saves_a_plot(outcome: Outcome) -> None:
    for name, run in outcome.runs.items():
        assert re.search(rf"{name}\W+{run.accuracy:.1f} %\W+{run.losses[-1]:.4f}", outcome.printed)
    assert outcome.plot.startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "lambb"], "did you mean 'lamb'"),
        (["--learning-rate", "-1"], "learning_rate=-1.0 must be >= 0"),
        (["--epochs", "0"], "0 must be at least 1"),
        (["--plot", "nowhere/digits.png"], "a folder that exists"),
        (["--plot", "digits.tiff"], "must be a .png file"),
        (["--device", "warp:9"], "warp:9"),
    ],
    ids=" ".join,
)
def test_bad_arguments_end_it_before_training(
    arguments: list[str], message: str, example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err


def quickstart(folder: Path, text: str) -> dict[str, float]:
    """Losses that a version of the script prints, run as a user runs it, with files in this folder."""
    (folder / "quickstart.py").write_text(text)
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env = {**own, "PYTHONPATH": str(EXAMPLE.parents[1]), "TMPDIR": str(folder)}
    command = [sys.executable, "-W", "error", "quickstart.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: float(loss) for name, loss in re.findall(r"loss (\w+): +([\d.]+)", done.stdout)}


@pytest.mark.parametrize("library", ["tritopt", "torch"])
def test_quickstart(library: str, tmp_path: Path) -> None:
    """It learns, what is resumed half-way arrives where the rest did, and one line is all that differs from torch."""
    text = QUICKSTART.read_text()
    assert text.count("tritopt") == 1
    losses = quickstart(tmp_path, text.replace("from tritopt.optim import", f"from {library}.optim import"))
    assert losses["before"] > 2.2
    assert losses["after"] < 0.3
    assert losses["resumed"] == losses["after"]
    assert (tmp_path / "digits.pt").exists()


def test_quickstart_is_short() -> None:
    lines = [line for line in QUICKSTART.read_text().rpartition('"""')[2].splitlines() if line]
    assert len(lines) <= 32
