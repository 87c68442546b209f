"""Launches of the package in the machine: in processes of their own, since this one may interpret kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Number of tests, so that none goes missing.
FILES = {"steps": 71, "formats": 28, "addresses": 3}


@pytest.mark.parametrize("name", FILES)
def test_steps_in_the_machine(name: str) -> None:
    """Each file is a test, so that two cores share them."""
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITOPT_PTX": "90", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.ptx.plugin", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"tests/ptx/{name}.py"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ended = re.search(r"(\d+) passed(.*)in", done.stdout)
    assert ended is not None
    assert int(ended[1]) >= FILES[name]
    # None was skipped.
    assert ended[2].strip() == ""
