"""The FSDP2 example learns, and goes on where it was when it is stopped."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_models import full
from tests.support.layouts import CLOSE, EXACT, assert_same
from tests.support.world import REASON, ROOT, World
from tritopt.optim import AdamW, Mixed

pytestmark = [pytest.mark.xdist_group("distributed"), pytest.mark.skipif(bool(REASON), reason=str(REASON))]

STEPS = 16


class StoppedError(Exception):
    """Error that takes the place of a kill."""


def run(folder: Path, *more: str) -> Any:
    from examples import train_fsdp

    with pytest.MonkeyPatch.context() as patch:
        # The interpreter would take minutes, and others test that it agrees with the reference.
        patch.setattr(train_fsdp, "AdamW", partial(AdamW, fused=False))
        patch.setattr(Mixed, "from_module", partial(Mixed.from_module, fused=False))
        return train_fsdp.main(["--steps", str(STEPS), "--save-every", "5", "--folder", str(folder), *more])


def test_stopped_and_resumed(worlds: dict[int, World], tmp_path: Path) -> None:
    worlds[2].run(check_stopped_and_resumed, tmp_path)
    worlds[4].run(check_resumed_on_more, tmp_path)


def check_stopped_and_resumed(folder: Path) -> None:
    from examples import train_fsdp

    whole = run(folder / "whole")
    assert whole.step == STEPS
    assert whole.loss < 1.5  # a guess costs log(31) = 3.4
    with pytest.MonkeyPatch.context() as patch:
        advance = train_fsdp.Training.advance

        def stopping(training: Any) -> torch.Tensor:
            if training.step == 12:
                raise StoppedError
            return advance(training)

        patch.setattr(train_fsdp.Training, "advance", stopping)
        with pytest.raises(StoppedError):
            run(folder / "stopped")
    torch.distributed.barrier()
    assert [step for step, _ in train_fsdp.checkpoints(folder / "stopped")] == [10]
    (folder / "stopped" / "step_15.part").mkdir(exist_ok=True)  # that of a run that was killed while it wrote
    torch.distributed.barrier()
    resumed = run(folder / "stopped")
    assert resumed.loss == whole.loss
    assert [path.name for path in (folder / "stopped").iterdir()] == [f"step_{STEPS}"]
    compare(resumed, whole, EXACT)


def check_resumed_on_more(folder: Path) -> None:
    """4 processes take over what 2 have written; there is nothing left to do."""
    from examples import train_fsdp

    resumed = run(folder / "whole")
    again = train_fsdp.Training(train_fsdp.Config(), STEPS, 1e-2, torch.device("cpu"))
    again.load(folder / "stopped" / f"step_{STEPS}")
    compare(resumed, again, EXACT)
    again.advance()
    resumed.advance()
    compare(resumed, again, CLOSE)


def compare(actual: Any, expected: Any, tolerance: float) -> None:
    assert actual.scheduler.state_dict() == expected.scheduler.state_dict()
    for ours, theirs in zip(actual.model.parameters(), expected.model.parameters(), strict=True):
        assert_same(full(ours), full(theirs), tolerance, "weight")
        mine, its = actual.optimizer.state[ours], expected.optimizer.state[theirs]
        assert set(mine) == set(its) == {"step", "exp_avg", "exp_avg_sq", "master_remainder"}
        for name, value in its.items():
            assert_same(full(mine[name]), full(value), tolerance, name)


def test_muon_beside_adamw(worlds: dict[int, World], tmp_path: Path) -> None:
    worlds[2].run(check_mixed, tmp_path / "run")


def check_mixed(folder: Path) -> None:
    trained = run(folder, "--steps", "2", "--optimizer", "mixed")
    assert trained.step == 2
    assert trained.loss < 4.0  # a guess costs 3.4
    assert [path.name for path in folder.iterdir()] == ["step_2"]


def test_torchrun(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(ROOT / "examples" / "train_fsdp.py"), "--steps", "2", "--folder", str(tmp_path / "run"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "step 2: loss " in done.stdout
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_2"]
