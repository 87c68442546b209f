"""The Gluon-style example learns in each dtype, goes on bit for bit, and two processes are one with the whole batch."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import tritopt
from tests.gluon.models import assert_same, counts, everything
from tests.support.world import ROOT, World

# To import it takes each worker that collects tests two seconds.
pytestmark = pytest.mark.skipif(not find_spec("sklearn"), reason="trains on scikit-learn's digits")


class Run(NamedTuple):
    """Outcome of a run of the example."""

    tensors: list[torch.Tensor]
    """Weights, masters and moments."""
    counts: Any
    scale: Any
    accuracy: float
    printed: str


def run(*arguments: str) -> Run:
    """The example, in this process, with torch as a user has it and the reference step.

    The interpreter would take minutes, and others test that it agrees with the reference.
    """
    from examples import train_gluon_style

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    printed = io.StringIO()

    def trainer_of(params: Any, name: str, arguments: dict[str, Any], **more: Any) -> tritopt.Trainer:
        return tritopt.Trainer(params, name, {**arguments, "use_fused_step": False}, **more)

    with torch.device("cpu"), contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tritopt.gluon, "Trainer", trainer_of)
        torch.use_deterministic_algorithms(False)
        try:
            net, trainer, accuracy = train_gluon_style.main(list(arguments))
        finally:
            torch.use_deterministic_algorithms(deterministic)
            torch.set_num_threads(threads)
    scaler = trainer.loss_scaler
    assert list(trainer.collect().values()) == list(net.parameters())
    scale = None if scaler is None else scaler.state_dict()
    return Run(everything(trainer), counts(trainer), scale, accuracy, printed.getvalue())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_learns(dtype: str) -> None:
    outcome = run("--dtype", dtype)
    assert outcome.accuracy > 0.94
    assert [f"[Epoch {epoch}] validation" in outcome.printed for epoch in range(6)] == [True] * 6
    assert {tensor.dtype for tensor in outcome.tensors[:6]} == {getattr(torch, dtype)}
    if dtype != "float32":  # a master and two moments each
        assert [tensor.dtype for tensor in outcome.tensors[6:]] == [torch.float32] * 18
    if dtype == "float16":
        assert 2.0**4 <= outcome.scale["loss_scale"] < 2.0**16  # the first scales overflow
    else:
        assert outcome.scale is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_goes_on_in_the_middle_of_an_epoch_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    """An epoch has 22 batches; the first run ends after 40, of which 35 are saved."""
    common = ["--dtype", dtype, "--epochs", "3", "--save-every", "7", "--folder"]
    (tmp_path / "whole").mkdir()
    whole = run(*common, str(tmp_path / "whole"))
    run(*common, str(tmp_path), "--stop-after", "40")
    names = sorted(path.name for path in tmp_path.glob("digits*"))
    assert names == ["digits-000035.params", "digits-000035.states"]
    # As of a run that was killed between the two.
    (tmp_path / "digits-000042.states").write_bytes(b"")
    resumed = run(*common, str(tmp_path))
    assert "resumed after 35 batches" in resumed.printed
    assert_same(resumed.tensors, whole.tensors)
    assert resumed[1:4] == whole[1:4]
    digests = [re.findall(r"^digest (\w+)$", one.printed, re.MULTILINE) for one in (whole, resumed)]
    assert digests[0] == digests[1] != []
    assert resumed.counts[1] == 66


def weights_after(*arguments: str) -> list[torch.Tensor]:
    return run(*arguments).tensors[:6]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_two_processes_are_one_with_the_whole_batch(dtype: str, pair: World) -> None:
    """Differences are the rounding of gradients, small beside the distance that the weights have moved."""
    arguments = ["--dtype", dtype, "--epochs", "1", "--stop-after"]
    first, second = pair.run(weights_after, *arguments, "12")
    assert_same(first, second)
    start, expected = weights_after(*arguments, "1"), weights_after(*arguments, "12")
    for got, right, old in zip(first, expected, start, strict=True):
        error = (got.double() - right.double()).norm() / (right.double() - old.double()).norm()
        assert error < (1e-5 if dtype == "float32" else 0.05), error


def test_torchrun(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(ROOT / "examples" / "train_gluon_style.py"), "--epochs", "1", "--save-every", "11",
        "--folder", str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[Epoch 0] validation: accuracy=") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-000022.params", "digits-000022.states"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--batch-size", "0"], "0 must be at least 1"),
        (["--folder", "nowhere"], "--folder nowhere must exist"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err
