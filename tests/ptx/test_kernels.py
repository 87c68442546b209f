"""Kernels that Triton compiles: in a process of its own, since this one may interpret them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tritopt.kernels.language import INTERPRETED
from tritopt.tools.ptx.driver import switch_on

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests/ptx"


def pytest_in_the_machine(*arguments: str, **env: str) -> str:
    """Output of pytest, which must have succeeded."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | env
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.ptx.plugin", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
def test_interpreted_kernels_cannot_be_run_in_the_machine() -> None:
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET before tritopt is imported"):
        switch_on()


def test_compiled_kernels() -> None:
    pytest.importorskip("triton")
    ended = re.search(r"(\d+) passed(.*)in", pytest_in_the_machine(f"{HERE}/compiled.py"))
    assert ended is not None
    assert int(ended[1]) >= 38
    assert ended[2].strip() == ""


def test_the_plugin_runs_other_tests_in_the_machine() -> None:
    pytest.importorskip("triton")
    selected = ["tests/test_driver.py", "-k", "noop or small_chunks or each_tensor_has"]
    said = pytest_in_the_machine(*selected, TRITOPT_PTX="80", TRITOPT_PTX_WARPS="3")
    assert re.search(r"PTX machine, sm_80: [1-9]\d* launches of [1-9]\d* binaries, [\d.]+ s, 0 faults", said)
