"""Launches that are bound once: what reaches the device is what Triton hands over. Its driver is a stub, no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tritopt.engine import launcher
from tritopt.engine.launcher import BoundKernel, no_launches

ROOT = Path(__file__).resolve().parents[2]

# Real compilation for sm_90; what would be handed to the GPU is noted down.
STUB = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as triton_driver
from tritopt import optim
from tritopt.engine.plan import Planner, Task
from tritopt.engine.phase import LaunchSpec
from tritopt.kernels.formats.format import PLAIN
from tritopt.optimizers.adamw import AdamW
from tritopt.optimizers.lamb import LAMB

launches, loaded, spills = [], [], [int(n) for n in sys.argv[1].split(",")]

class Recorder:
    def __init__(self, src, metadata):
        self.names, self.maxnreg = src.fn.arg_names, metadata.maxnreg
    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        ours = [a for n, a in zip(self.names, args, strict=True) if n.islower()]
        said = ["tensor" if isinstance(a, torch.Tensor) else a for a in ours]
        launches.append([function, [x, y, z], stream, [id(a) for a in ours], said, len(args), self.maxnreg])

class Utils:
    def load_binary(self, name, kernel, shared, device):
        loaded.append(name)
        return "module", len(loaded), 200, spills.pop(0) if spills else 0, 1024
    def get_device_properties(self, device):
        return {"max_shared_mem": 200_000}

class Driver:
    utils, launcher_cls = Utils(), Recorder
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 7
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self): return torch.device("cpu")

triton_driver.set_active(Driver())
"""

STEPS = (
    STUB
    + """planner = Planner()
opt = {"adamw": AdamW, "lamb": LAMB}[sys.argv[2]]()
w, g, *state = (torch.zeros(64, 64) for _ in range(4))
task = Task((w,), PLAIN, g, tuple(state))
steps = []
rescale = torch.ones((), dtype=torch.float64)
for step, scale in enumerate([None, None, None, rescale, rescale, rescale.clone(), rescale.float()]):
    scalars = opt.scalars(0.1, 0.0, step + 1)
    planner.apply("", [task], [(1.0, 1.0, 0.0, *scalars)], LaunchSpec(opt.phases, type(scalars), opt.preamble, scale))
    steps.append(list(launches))
    launches.clear()
print(json.dumps([steps, loaded]))
"""
)


EVERYTHING = (
    STUB
    + """
from tritopt.tools.compiled import _step
from tritopt.mxnet.registry import registered
n_launches = {}
for name in sys.argv[2:]:
    for _ in range(2):
        _step(Planner(), registered()[name](), torch.float32, torch.float32, PLAIN)
    n_launches[name] = len(launches)
    launches.clear()
from tritopt.kernels.formats.weights import MASTERS
for master, states in (("split8", "int8"), ("split16", "bf16")):
    for _ in range(2):
        _step(Planner(), registered()["adamw"](state_dtype=states), torch.bfloat16, torch.bfloat16, MASTERS[master])
    n_launches[master] = len(launches)
    launches.clear()
from tritopt.engine import clip
clip.unavailable = lambda tensor: None
norm = clip.Clip()
for inverse in (None, torch.ones((), dtype=torch.float64)):
    for _ in range(2):
        norm(torch.ones(5, 1, dtype=torch.float64), 1.0, inverse, None)
n_launches["clip"] = len(launches)
print(json.dumps(n_launches))
"""
)


def run(program: str, *arguments: str) -> Any:
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@cache
def recorded(spills: str, optimizer: str = "adamw") -> tuple[list[Any], list[str]]:
    steps, loaded = run(STEPS, spills, optimizer)
    return steps, loaded


@pytest.mark.xdist_group("compiles")
def test_every_kind_of_launch_passes_through_triton() -> None:
    """Up to the GPU: Triton's binding is not what compiling alone goes through.

    One of each driver, and what the machine of tests/ptx does not run: Muon, and `test`.
    """
    names = ("adamw", "lamb", "groupadagrad", "adafactor", "muon", "test")
    launches = run(EVERYTHING, "0", *names)
    assert [launches.pop(name) for name in ("clip", "split8", "split16")] == [4, 2, 2]
    assert launches.keys() == set(names)
    assert all(n >= 2 and n % 2 == 0 for n in launches.values())
    assert launches["adamw"] == 2


@pytest.mark.xdist_group("compiles")
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_what_is_bound_once_reaches_the_device_as_before(optimizer: str) -> None:
    steps, loaded = recorded("0", optimizer)
    n = len(steps[0])
    assert all(len(step) == n for step in steps)
    for by_triton, bound, again in zip(*steps[:3], strict=True):
        # The same binary, grid, stream and arguments: the very tensors, as many as the kernel has parameters.
        assert by_triton == bound == again
    for plain, first, second, other, narrow in zip(steps[0], *steps[3:], strict=True):
        assert first[1:3] == second[1:3] == plain[1:3]
        assert first == second
        assert other[0] == first[0]  # the same binary for another tensor of the same kind
        if "tensor" in first[4] and first[0] != plain[0]:  # the driver, which reads the rescale
            assert narrow[0] != first[0]
    assert len(loaded) == len(set(map(str, {entry[0] for step in steps for entry in step})))


@pytest.mark.xdist_group("compiles")
def test_a_launch_that_spills_gets_more_registers_from_the_next_step_on() -> None:
    steps, _ = recorded("8,0,0,0")
    maxnreg = [step[0][-1] for step in steps]
    assert maxnreg[0] is None
    assert set(maxnreg[1:3]) == {232}
    steps, _ = recorded("0")
    assert {step[0][-1] for step in steps} == {None}


class Kernel:
    """Stand-in for a jitted function."""

    arg_names = ("pointer", "n", "SIZE")

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> Kernel:
            self.calls.append((grid, args, constants))
            return self

        return run


def test_within_no_launches_nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    kernel, x = Kernel(), torch.zeros(4)
    inside, outside = (BoundKernel(kernel, 3, {"SIZE": 4, "num_warps": 1, "enable_fp_fusion": False}) for _ in range(2))
    with no_launches():
        assert inside(None, x, 1) is None
        inside(None, x, 1)
    inside(None, x, 1)  # bound within
    assert kernel.calls == []
    assert outside(None, x, 1) is kernel
    assert kernel.calls == [((3, 1, 1), (x, 1), {"SIZE": 4, "num_warps": 1, "enable_fp_fusion": False})]
    outside(None, x, 1)
    assert kernel.calls[1:] == [((3, 1, 1), (x, 1, 4), {})]  # what Triton compiled, by position


def test_arguments_of_another_kind_go_by_way_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    kernel, x = Kernel(), torch.zeros(8)
    bound = BoundKernel(kernel, 1, {"SIZE": 4, "enable_fp_fusion": False})
    bound(None, x, 1)
    for other, is_new in ((torch.zeros(8), False), (x[1:], True), (x.double(), True), (None, True), (x, True)):
        kernel.calls.clear()
        bound(None, other, 1)
        assert bool(kernel.calls[0][2]) == is_new
