"""What the compiler makes of the kernels, for any GPU and without one: registers, spills, access widths.

Needs kernels that are not interpreted: run with TRITON_INTERPRET unset.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from tritopt import phases
from tritopt.cost import fresh_state, tensors_of
from tritopt.fused import Planner, Task
from tritopt.group import Launch
from tritopt.kernels.formats import PLAIN, Format, format_of
from tritopt.kernels.language import INTERPRETED, triton
from tritopt.optimizer import Optimizer

_ACCESS = re.compile(r"\b(ld|st)\.global[\w.:]*?\.(?:v(\d)\.)?[a-z](\d+)\b")
_TYPES = {
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


class Launched(NamedTuple):
    """A launch that was recorded instead of made."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


class CompiledLaunch(NamedTuple):
    """One launch of an optimizer, compiled."""

    kernel: str
    registers: int
    spilled_bytes: int
    wide_loads: int
    """128-bit loads in the code, all of them in the branch of full blocks."""
    wide_stores: int
    expected_wide_loads: int | None
    """As many as that branch of the driver needs if each access is 128 bits wide; None for other kernels."""
    expected_wide_stores: int | None
    bytes_loaded: float | None
    """Per element of a full block, by accesses of several words; scales that elements share, which are narrow, apart.

    8-bit planes count: 8 bytes a thread, 256 in a row of a warp. None for other kernels, and for AMD GPUs.
    """
    bytes_stored: float | None


def compile_launches(
    opt: Optimizer, weight_dtype: torch.dtype, grad_dtype: torch.dtype, fmt: Format = PLAIN, arch: int | str = 90
) -> list[CompiledLaunch]:
    """Compile every launch of a step of `opt`.

    Args:
        opt: the optimizer.
        weight_dtype, grad_dtype, fmt: of the weights, gradients and the weights' storage.
        arch: compute capability of an NVIDIA GPU (90: sm_90, an H100 or H200), or the name of an AMD one ("gfx942").

    Raises RuntimeError under TRITON_INTERPRET=1, which replaces kernels by Python.
    """
    return _compiled(lambda: _step(opt, weight_dtype, grad_dtype, fmt), arch)


def compile_norm(dtype: torch.dtype, arch: int | str = 90) -> list[CompiledLaunch]:
    """Likewise, the launches that a global norm of gradients takes (max_grad_norm)."""
    return _compiled(lambda: Planner().squares("compile", [torch.zeros(64, 64, dtype=dtype)]), arch)


def _compiled(step: Callable[[], Any], arch: int | str) -> list[CompiledLaunch]:
    if INTERPRETED:
        raise RuntimeError("kernels are interpreted: unset TRITON_INTERPRET to compile them")
    with mock.patch.object(phases, "CONFIG", phases.NVIDIA if isinstance(arch, int) else phases.AMD):
        launches = recorded_launches(step)
    return [_describe(launched, arch) for launched in launches]


def recorded_launches(step: Callable[[], Any]) -> list[Launched]:
    """The launches that `step` makes, none of which happens."""
    launches: list[Launched] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        arguments |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        launches.append(Launched(kernel, arguments, options))

    with mock.patch.object(triton.runtime.jit.JITFunction, "run", record):
        step()
    return launches


def compile_launch(launched: Launched, arch: int | str) -> Any:
    """Triton's compiled kernel. Pointers are taken as 16-byte aligned, as torch allocates."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, kinds, constants = launched.kernel, {}, {}
    for name, value in launched.arguments.items():
        kinds[name] = _TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        parameter = kernel.params[kernel.arg_names.index(name)]
        if parameter.is_constexpr or value is None:
            kinds[name], constants[name] = "constexpr", value
    position = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        {name: kinds[name] for name in kernel.arg_names},
        constexprs={(position[name],): value for name, value in constants.items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name, kind in kinds.items() if kind.startswith("*")},
    )
    is_nvidia = isinstance(arch, int)
    target = GPUTarget("cuda", arch, 32) if is_nvidia else GPUTarget("hip", arch, 64)
    return triton.compile(source, target=target, options=launched.options)


def _step(opt: Optimizer, weight_dtype: torch.dtype, grad_dtype: torch.dtype, fmt: Format) -> None:
    weight, grad = torch.zeros(64, 64, dtype=weight_dtype), torch.zeros(64, 64, dtype=grad_dtype)
    planes = [weight] if fmt.companion_of is None else [weight, fmt.companion_of(weight, weight.float())]
    opt.multi_precision = False
    state = fresh_state(opt, 0, weight if fmt is PLAIN else fmt.decode(planes, torch.float32))
    task = Task(tuple(planes), fmt, grad, tuple(tensors_of(state)), state_formats=opt.state_formats())
    scalars = opt.scalars(0.1, opt.wd, 1)
    # A device scalar and a flag, as under a GradScaler: the most that a launch reads.
    launch = Launch(opt.phases, type(scalars), opt.preamble, torch.ones(()), torch.zeros(()), draws=task.draws)
    Planner().apply("compile", [task], [(1.0, 1.0, 0.1, *scalars, *[1.0] * task.draws)], launch)


def _describe(launched: Launched, arch: int | str) -> CompiledLaunch:
    """What runs from the second step on: a launch that spills gets more registers then."""
    binary = compile_launch(launched, arch)
    name, is_driver = binary.metadata.name, "FORMATS" in launched.arguments
    per_thread = _elements_of_a_thread(launched, 32 if isinstance(arch, int) else 64) if is_driver else 0
    expected: tuple[int | None, int | None] = (None, None)
    if is_driver:
        expected = _expected_accesses(launched, per_thread)
    if not isinstance(arch, int):
        assembly = binary.asm["amdgcn"]
        loads, stores = (len(re.findall(f"global_{kind}_dwordx4", assembly)) for kind in ("load", "store"))
        registers, spilled = (int(re.findall(rf"\.vgpr_{k}count:\s+(\d+)", assembly)[0]) for k in ("", "spill_"))
        return CompiledLaunch(name, registers, spilled, loads, stores, *expected, None, None)
    found = [(kind, int(words or 1), int(bits)) for kind, words, bits in _ACCESS.findall(binary.asm["ptx"])]
    wide = Counter(kind for kind, words, bits in found if words * bits == 128)
    # Tables, scales and the masked branch, whose pointers are not aligned, are accessed word by word.
    loaded, stored = (
        sum(words * bits for kind, words, bits in found if kind == wanted and words > 1) / 8 / per_thread
        if is_driver
        else None
        for wanted in ("ld", "st")
    )
    registers, spilled = _resources(binary.asm["cubin"])
    more = phases.more_registers(registers)
    if is_driver and spilled and "maxnreg" not in launched.options:
        return _describe(launched._replace(options={**launched.options, **more}), arch)
    return CompiledLaunch(name, registers, spilled, wide["ld"], wide["st"], *expected, loaded, stored)


def _elements_of_a_thread(launched: Launched, warp_size: int) -> int:
    """In a full block of the driver."""
    return int(launched.arguments["BLOCK_SIZE"]) // (warp_size * int(launched.options["num_warps"]))


def _expected_accesses(launched: Launched, per_thread: int) -> tuple[int, int]:
    """128-bit loads and stores that one thread of the driver needs for a full block."""
    constants = launched.arguments
    sizes = [dtype.primitive_bitwidth // 8 for dtype in constants["DTYPES"]]
    # Of 8-bit planes none: a thread's elements fill 64 bits, and those of neighbours whole sectors all the same.
    accesses = [per_thread * size // 16 for size in sizes]
    (_, weight_end, load, *_), *states = constants["FORMATS"]
    planes = zip(accesses[:weight_end], format_of(load).plane_reads, strict=True)
    loads = sum(n for n, is_read in planes if is_read) * constants["READS"][0]
    loads += accesses[weight_end] * constants["READS"][1]
    stores = sum(accesses[:weight_end]) * constants["WRITES"][0]
    for i, (first, *_) in enumerate(states):  # what follows the first plane are scales, one for many elements
        loads += accesses[first] * constants["READS"][i + 2]
        stores += accesses[first] * constants["WRITES"][i + 2]
    return loads, stores


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack plus local memory, which is where spills go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return found["REG"], found["STACK"] + found["LOCAL"]
