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
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
