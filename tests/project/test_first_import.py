"""Any module of the package may be the first that is imported: what `tritopt` shows is loaded when it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("module", ["tritopt.gluon.loss_scaler", "tritopt.optimizer", "tritopt.mxnet.updater"])
def test_first_import(module: str) -> None:
    program = f"import {module}, tritopt; tritopt.Trainer, tritopt.optimizer.SGD, tritopt.optim.AdamW"
    run(program)


@pytest.mark.parametrize(
    "program",
    [
        "from tritopt.gluon import Trainer; Trainer([nn.Parameter(torch.ones(2))], 'adam')",
        "from tritopt.mxnet.registry import create; create('adam')",
        "from tritopt.mxnet.registry import names; assert 'adam' in names()",
        "from tritopt.mxnet.optimizer import Optimizer; Optimizer.create_optimizer('adam')",
    ],
)
def test_optimizers_are_known_by_name(program: str) -> None:
    run(f"import torch; from torch import nn; {program}")


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
