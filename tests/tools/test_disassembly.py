"""Binaries that are disassembled together say what nvdisasm says of each file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("compiles")

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import torch, tritopt
from tritopt.engine import private
from tritopt.kernels.formats.weights import MASTER_FP32
from tritopt.tools.compiled import CompiledNorm, CompiledStep, _launches_of, compile_launch
from tritopt.tools.disassembly import disassemble, run_tool
from tritopt.tools.hot_loop import hot_loops, parse_sass

def targets(code):
    return [code.labels.get(one.label) for one in code.instructions]

bf16, n_loops, n_branches = torch.bfloat16, 0, 0
for arch in (80, 90, 100):
    names = ("adamw", "lars") if arch == 90 else ("adamw",)
    steps = [CompiledStep(tritopt.create(name), bf16, bf16, MASTER_FP32, arch) for name in names]
    steps.append(CompiledNorm(bf16, arch))
    launches = [launched for step in steps for launched in _launches_of(step)]
    cubins = [private.assembly(compile_launch(launched, arch))["cubin"] for launched in launches]
    texts = disassemble(cubins, arch)
    assert len(texts) == len(cubins) >= (5 if arch == 90 else 2)
    for cubin, text in zip(cubins, texts):
        ours, whole = parse_sass(text), parse_sass(run_tool("nvdisasm", "-c", "-ndf", binary=cubin))
        unlabelled = [[one._replace(label="") for one in code.instructions] for code in (ours, whole)]
        assert unlabelled[0] == unlabelled[1]
        assert targets(ours) == targets(whole)
        assert hot_loops(ours) == hot_loops(whole)
        n_loops += len(hot_loops(ours))
        n_branches += sum(place is not None for place in targets(ours))
assert disassemble([], 90) == []
try:
    disassemble([cubins[0].replace(b".text.", b".data.")], 90)
except ValueError as error:
    assert "with 0 kernels" in str(error), error
else:
    raise AssertionError("a file without code was taken")
print(n_loops, n_branches)
"""


def test_disassembled_together() -> None:
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    n_loops, n_branches = map(int, done.stdout.split())
    assert n_loops >= 6
    assert n_branches >= 100
