"""Any module of the package may be the first that is imported: what `tritopt` shows is loaded when it is asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = ["tritopt.gluon.loss_scaler", "tritopt.optimizer", "tritopt.mxnet.updater"]
BY_NAME = [
    "from tritopt.gluon import Trainer; Trainer([nn.Parameter(torch.ones(2))], 'adam')",
    "from tritopt.mxnet.registry import create; create('adam')",
    "from tritopt.mxnet.registry import names; assert 'adam' in names()",
    "from tritopt.mxnet.optimizer import Optimizer; Optimizer.create_optimizer('adam')",
]
PROGRAMS = [
    f"import {module}, tritopt; tritopt.Trainer, tritopt.optimizer.SGD, tritopt.optim.AdamW" for module in MODULES
]
PROGRAMS += [f"import torch; from torch import nn; {program}" for program in BY_NAME]
FORKS = """
import json, os, sys, torch
assert not [name for name in sys.modules if name.startswith("tritopt")]
exits = []
for program in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        exec(program, {})
        sys.exit()
    exits.append(os.waitpid(child, 0)[1])
print(json.dumps(exits))
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[int, str]]:
    """Exit status of each program, and what they all complained of, in processes in which torch alone is imported."""
    command = [sys.executable, "-c", FORKS, json.dumps(PROGRAMS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {program: (status, done.stderr) for program, status in zip(PROGRAMS, json.loads(done.stdout), strict=True)}


@pytest.mark.parametrize("program", PROGRAMS)
def test_first_import(program: str, outcomes: dict[str, tuple[int, str]]) -> None:
    status, complaint = outcomes[program]
    assert status == 0, complaint
