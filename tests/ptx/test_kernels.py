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


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
def test_interpreted_kernels_cannot_be_run_in_the_machine() -> None:
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET before tritopt is imported"):
        switch_on()


def test_compiled_kernels_and_other_tests_through_the_plugin() -> None:
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITOPT_PTX": "80", "TRITOPT_PTX_WARPS": "3"}
    of_driver = ("test_sums_reach_the_next_phase", "test_long_tensors_are_summed_in_two_stages")
    selected = ["tests/ptx/compiled.py", *(f"tests/engine/test_driver.py::{name}" for name in of_driver)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.ptx.plugin", "-p", "no:cacheprovider", *selected]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ended = re.search(r"(\d+) passed(.*)in", done.stdout)
    assert ended is not None
    assert int(ended[1]) >= 39
    # None was skipped.
    assert ended[2].strip() == ""
    assert re.search(r"PTX machine, sm_80: [1-9]\d* launches of [1-9]\d* binaries, [\d.]+ s, 0 faults", done.stdout)
