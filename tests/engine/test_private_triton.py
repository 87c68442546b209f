"""Private names of Triton do what is relied on; test_private.py has those of torch, and where all of them stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tritopt import optim
from tritopt.engine import private
from tritopt.kernels.language import HAS_TRITON, INTERPRETED, triton
from tritopt.kernels.scale import scale_update
from tritopt.tools.replaced import replaced

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
def test_launches_of_the_interpreter() -> None:
    made: list[Any] = []
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(self)
        return launch(self, *args, **kwargs)

    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    with replaced(GridExecutor, "__call__", count):
        optim.SGD([param], lr=0.1).step()
    assert len(made) == 1
    assert param.tolist() == pytest.approx([-0.1, -0.1])
    assert private.source_key(scale_update) == ""


def test_hooks_of_launches_can_be_added() -> None:
    hooks, calls = private.launch_hooks(), list[Any]()
    hooks.add(calls.append)
    hooks.remove(calls.append)
    assert calls == []


COMPILED = '''
import json, pathlib, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
import triton, triton.language as tl
from tritopt.engine import private
from tritopt.kernels.scale import scale_update
from tritopt.tools.disassembly import run_tool

launched = []

class Launcher:
    def __init__(self, src, metadata):
        pass
    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        launched.append([x, y, z, len(args), args[1]])
        if enter is not None:
            enter(metadata)

class Utils:
    def load_binary(self, name, kernel, shared, device):
        return "module", 1, 200, 3, 1024
    def get_device_properties(self, device):
        return {"max_shared_mem": 200_000}

class Driver:
    utils, launcher_cls = Utils(), Launcher
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 7
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(Driver())
folder = pathlib.Path(__import__("sys").argv[1])

def kernel_of(operation):
    file = folder / f"kernel_{len(list(folder.iterdir()))}.py"
    file.write_text(f"""
import triton, triton.language as tl
@triton.jit
def kernel(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < n) {operation}, mask=at < n)
""")
    names = {}
    exec(compile(file.read_text(), str(file), "exec"), names)
    return names["kernel"]

kernel, other = kernel_of("+ 1"), kernel_of("+ 2")
x = torch.zeros(64)
hooked = []
private.launch_hooks().add(hooked.append)
compiled = kernel[(2, 1, 1)](x, 5, BLOCK=64, num_warps=2)
private.bound(compiled, (3, 1, 1))(x, 6, None)
kinds = {"x_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
nvidia = private.compile_for(90, kernel, kinds, {"BLOCK": 64}, {"num_warps": 2})
amd = private.compile_for("gfx942", kernel, kinds, {"BLOCK": 64}, {})
print(json.dumps({
    "names": private.names_of(kernel),
    "constant": [private.is_constant(kernel, name) for name in private.names_of(kernel)],
    "keys": [private.source_key(f) for f in (kernel, kernel, other)],
    "of_ours": private.source_key(scale_update),
    "launched": launched,
    "resources": [private.n_spills(compiled), private.n_registers(compiled), private.n_spills(None)],
    "hooked": len(hooked),
    "assembly": [".target sm_90" in private.assembly(nvidia)["ptx"], "gfx942" in private.assembly(amd)["amdgcn"]],
    "metadata": [private.metadata(nvidia).name, private.metadata(nvidia).shared, private.metadata(nvidia).num_warps],
    "usage": "REG:" in run_tool("cuobjdump", "--dump-resource-usage", binary=private.assembly(nvidia)["cubin"]),
    "tools": [private.nvidia_tool(name).exists() for name in ("nvdisasm", "cuobjdump")],
}))
'''


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run code in a process in which kernels are compiled, and return what it prints; a stub stands in for the GPU."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder = tmp_path_factory.mktemp("kernels")
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(folder)], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_kernels_name_their_arguments(compiled: dict[str, Any]) -> None:
    assert compiled["names"] == ["x_ptr", "n", "BLOCK"]
    assert compiled["constant"] == [False, False, True]


def test_sources_have_keys(compiled: dict[str, Any]) -> None:
    first, again, other = compiled["keys"]
    assert len(first) > 8
    assert first == again != other
    assert compiled["of_ours"] not in ("", first)


def test_a_function_without_a_key_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "INTERPRETED", False)
    with pytest.raises(ImportError, match=f"triton {triton.__version__} has no JITFunction.cache_key"):
        private.source_key(object())


def test_what_is_compiled_is_launched_by_position(compiled: dict[str, Any]) -> None:
    assert compiled["launched"] == [[2, 1, 1, 3, 5], [3, 1, 1, 3, 6]]
    assert compiled["resources"] == [3, 200, 0]
    assert compiled["hooked"] == 2


def test_kernels_are_compiled_ahead_of_time(compiled: dict[str, Any]) -> None:
    assert compiled["assembly"] == [True, True]
    assert compiled["metadata"][0] == "kernel"
    assert compiled["metadata"][2] == 2
    assert compiled["tools"] == [True, True]
    assert compiled["usage"]


def test_a_module_is_built_from_c() -> None:
    from tritopt.engine import walk

    if "C" not in walk.description().split(",")[0]:
        pytest.skip(walk.description())
    source = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_nothing", NULL, -1, NULL, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__nothing(void) { return PyModule_Create(&module); }
"""
    assert private.build(source, "_nothing").__name__ == "_nothing"
