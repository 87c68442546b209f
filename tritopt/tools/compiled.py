"""Compilation of the kernels for any GPU and without one: registers, spills, what the hot loops do.

Needs kernels that are not interpreted: run with TRITON_INTERPRET unset.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tritopt.engine import driver, private
from tritopt.engine.phase import LaunchSpec, Recorder
from tritopt.engine.plan import Planner, Task
from tritopt.engine.tuning.config import AMD, NVIDIA
from tritopt.kernels.formats.format import PLAIN, Format
from tritopt.kernels.formats.scales import BLOCK
from tritopt.kernels.formats.weights import format_of
from tritopt.kernels.language import INTERPRETED
from tritopt.kernels.preambles import without_clip
from tritopt.mxnet.optimizer import Optimizer
from tritopt.tools.cost import fresh_state, tensors_of
from tritopt.tools.disassembly import disassemble, run_tool
from tritopt.tools.hot_loop import HotLoop, hot_loops, parse_gcn, parse_sass

_VECTOR = re.compile(r"\b(?:ld|st)\.global[\w.:]*\.v\d")
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
    """One launch of an optimizer, compiled.

    What follows `num_warps` is of its hot loops (tools/hot_loop.py); a launch without one works on what is small
    beside the tensors.
    """

    kernel: str
    registers: int
    """Number of registers of a thread."""
    spilled_bytes: int
    """Bytes of registers that a thread spills to memory."""
    shared_bytes: int
    """Bytes of shared memory of a program."""
    num_warps: int
    elements: int
    """Number of elements that a thread has in an iteration of the hot loop; 0: there is no hot loop."""
    loads: Counter[int]
    """Number of loads from global memory that a thread makes for these, by their width in bits."""
    stores: Counter[int]
    """Number of stores to global memory that a thread makes for these, by their width in bits."""
    expected_wide_loads: int | None
    """Number of 128-bit loads that the driver needs if each access is that wide; None for other kernels."""
    expected_wide_stores: int | None
    """Number of 128-bit stores that the driver needs if each access is that wide; None for other kernels."""
    bytes_loaded: float | None
    """Bytes per parameter. A number that a block of neighbours shares counts with its share; what a row shares is taken
    as nothing.

    For Adafactor's kernels it is what they load for matrices, not for vectors. None: there is no hot loop.
    """
    bytes_stored: float | None
    """Bytes per parameter that are stored, counted like `bytes_loaded`. None: there is no hot loop."""
    instructions: float | None
    """Number of instructions per parameter that are issued on the shortest path. None: there is no hot loop."""
    arithmetic: float | None
    """Number of those that compute. None: there is no hot loop."""
    waits: float | None
    """Number of times that a thread waits for memory in an iteration, as `HotLoop` counts; of the loop with most.

    None: there is no hot loop.
    """
    alu: float | None
    """Number of instructions per parameter for the pipe of integers. None: there is no hot loop."""
    xu: float | None
    """Number of instructions per parameter for the pipe of roots and conversions. None: there is no hot loop."""


class CompiledStep(NamedTuple):
    """A step whose launches are to be compiled."""

    opt: Optimizer
    weight_dtype: torch.dtype
    grad_dtype: torch.dtype
    fmt: Format = PLAIN
    """Storage format of the weights."""
    arch: int | str = 90
    """Compute capability of an NVIDIA GPU (90: sm_90, an H100 or H200), or the name of an AMD one ("gfx942")."""
    are_views: bool = False
    """Whether weights and gradients begin at an odd place of a flat buffer."""


class CompiledNorm(NamedTuple):
    """A global norm of gradients (max_grad_norm) whose launches are to be compiled."""

    dtype: torch.dtype
    arch: int | str = 90


def compile_launches(steps: Sequence[CompiledStep | CompiledNorm]) -> list[list[CompiledLaunch]]:
    """Compile every launch of each step. Many at a time take less: they are disassembled together.

    Raises RuntimeError under TRITON_INTERPRET=1, which replaces kernels by Python.
    """
    compiled = [[_compile(launched, step.arch) for launched in _launches_of(step)] for step in steps]
    described = _described([binary for binaries in compiled for binary in binaries])
    return [[next(described) for _ in binaries] for binaries in compiled]


def _launches_of(step: CompiledStep | CompiledNorm) -> list[Launched]:
    recording, planner = Recording(), Planner()
    planner.generic, planner.record = NVIDIA if isinstance(step.arch, int) else AMD, recording
    if isinstance(step, CompiledNorm):
        planner.squares("compile", [torch.zeros(64, 64, dtype=step.dtype, device="cpu")])
    else:
        _step(planner, step.opt, step.weight_dtype, step.grad_dtype, step.fmt, int(step.are_views))
    return recording.launches


class Recording(Recorder):
    """The launches of a step, in order."""

    def __init__(self) -> None:
        self.launches: list[Launched] = []

    def kernel(self, kernel: Any, grid: int, arguments: tuple[Any, ...], constants: Mapping[str, Any]) -> None:
        """Note one launch, which is not made."""
        names = private.names_of(kernel)
        named = dict(zip(names, arguments, strict=False))
        named |= {name: value for name, value in constants.items() if name in names}
        options = {name: value for name, value in constants.items() if name not in names}
        self.launches.append(Launched(kernel, named, options))


def compile_launch(launched: Launched, arch: int | str) -> Any:
    """Compile a launch as Triton would. Pointers are taken as 16-byte aligned, as torch allocates."""
    if INTERPRETED:
        raise RuntimeError("kernels are interpreted: unset TRITON_INTERPRET to compile them")
    kernel, kinds, constants = launched.kernel, {}, {}
    for name, value in launched.arguments.items():
        number = "fp32" if isinstance(value, float) else "i32"
        kinds[name] = _TYPES[value.dtype] if isinstance(value, torch.Tensor) else number
        if value is None or private.is_constant(kernel, name):
            kinds[name], constants[name] = "constexpr", value
    is_nvidia = isinstance(arch, int)
    options = {name: value for name, value in launched.options.items() if is_nvidia or name != "maxnreg"}
    return private.compile_for(arch, kernel, kinds, constants, options)


def _step(
    planner: Planner, opt: Optimizer, weight_dtype: torch.dtype, grad_dtype: torch.dtype, fmt: Format, first: int = 0
) -> None:
    flat = (torch.zeros(first + 4096, dtype=dtype, device="cpu") for dtype in (weight_dtype, grad_dtype))
    weight, grad = (buffer[first:].view(64, 64) for buffer in flat)
    planes = [weight] if fmt.companion_of is None else [weight, fmt.companion_of(weight, weight.float())]
    opt.multi_precision = False
    state = fresh_state(opt, 0, weight if fmt is PLAIN else fmt.decode(planes, torch.float32))
    task = Task(tuple(planes), fmt, grad, tuple(tensors_of(state)), state_formats=opt.state_formats())
    scalars = opt.scalars(0.1, opt.wd, 1)
    # Under a GradScaler a launch reads the most: a device scalar and a flag.
    rescale, noop = (torch.full((), x, dtype=torch.float32, device="cpu") for x in (1.0, 0.0))
    # Nobody clips elements unless told to.
    launch = LaunchSpec(opt.phases, type(scalars), without_clip(opt.preamble), rescale, noop, draws=task.draws)
    planner.apply("compile", [task], [(1.0, 1.0, 0.1, *scalars, *[1.0] * task.draws)], launch)


class _Binary(NamedTuple):
    """A launch, compiled, before its hot loops are looked for."""

    launched: Launched
    arch: int | str
    code: Any
    """Cubin, or assembly of an AMD GPU; empty where a hot loop cannot be."""
    registers: int
    spilled: int
    metadata: Any
    is_driver: bool
    expected: tuple[int, int] | None
    """Number of 128-bit loads and stores that a full block takes; None for other kernels than the driver."""


def _compile(launched: Launched, arch: int | str, is_first: bool = True) -> _Binary:
    """Compile what runs from the second step on: a launch that spills gets more registers then."""
    binary = compile_launch(launched, arch)
    forms, is_driver = private.assembly(binary), "FORMATS" in launched.arguments
    registers, spilled = resources_of(forms)
    if isinstance(arch, int) and is_driver and spilled and is_first:
        more = driver.more_registers(registers)
        return _compile(launched._replace(options={**launched.options, **more}), arch, False)
    expected, code = None, ""
    if not _is_of_rows(launched):
        if is_driver:
            expected = _expected_accesses(launched, _elements_of_a_thread(launched, arch))
        if not isinstance(arch, int):
            code = forms["amdgcn"]
        elif _VECTOR.search(forms["ptx"]):  # A loop of single words is not hot.
            code = forms["cubin"]
    return _Binary(launched, arch, code, registers, spilled, private.metadata(binary), is_driver, expected)


def _described(binaries: Sequence[_Binary]) -> Iterator[CompiledLaunch]:
    """Describe launches, of which all for one architecture are disassembled together."""
    texts: dict[Any, str] = {}
    for arch in {binary.arch for binary in binaries if isinstance(binary.arch, int)}:
        cubins = list(dict.fromkeys(binary.code for binary in binaries if binary.arch == arch and binary.code))
        texts |= {(arch, cubin): text for cubin, text in zip(cubins, disassemble(cubins, arch), strict=True)}
    loops: dict[Any, Sequence[HotLoop]] = {}  # many launches share a binary
    for binary in binaries:
        wide = binary.expected[0] if binary.expected and binary.launched.arguments["UNROLL"] > 1 else 0
        key = binary.arch, binary.code, wide, binary.is_driver
        if key not in loops:
            is_nvidia = isinstance(binary.arch, int)
            text = texts.get((binary.arch, binary.code), "") if is_nvidia else binary.code
            code = parse_sass(text) if is_nvidia else parse_gcn(text)
            loops[key] = hot_loops(code, wide, binary.is_driver) if text else ()
        yield _describe(binary, loops[key])


def _describe(binary: _Binary, loops: Sequence[HotLoop]) -> CompiledLaunch:
    launched, arch, _, registers, spilled, metadata, is_driver, expected = binary
    elements = _elements_of_a_thread(launched, arch) if loops else 0
    loads: Counter[int] = sum((loop.loads for loop in loops), Counter())
    stores: Counter[int] = sum((loop.stores for loop in loops), Counter())
    masked = _masked_bytes(launched)
    return CompiledLaunch(
        metadata.name,
        registers,
        spilled,
        metadata.shared,
        metadata.num_warps,
        elements,
        loads,
        stores,
        expected[0] if expected else None,
        expected[1] if expected else None,
        _bytes(loads, elements, is_driver) - masked[0] if loops else None,
        _bytes(stores, elements, is_driver) - masked[1] if loops else None,
        sum(loop.instructions for loop in loops) / elements if loops else None,
        sum(loop.arithmetic for loop in loops) / elements if loops else None,
        max(loop.waits for loop in loops) if loops else None,
        sum(loop.alu for loop in loops) / elements if loops else None,
        sum(loop.xu for loop in loops) / elements if loops else None,
    )


def _is_of_rows(launched: Launched) -> bool:
    """Whether the driver moves no tensor, but a number for each row of matrices."""
    constants = launched.arguments
    if constants.get("scratch_ptr") is None:
        return False
    return not (constants["READS"][0] or constants["READS"][1] or constants["WRITES"][0])


def _elements_of_a_thread(launched: Launched, arch: int | str) -> int:
    """Number of elements that a thread has in one iteration over full blocks."""
    warp_size = 32 if isinstance(arch, int) else 64
    constants = launched.arguments
    block = (
        constants["BLOCK_SIZE"] if "BLOCK_SIZE" in constants else constants["BB"] * constants["BR"] * constants["BC"]
    )
    return int(block) // (warp_size * int(launched.options["num_warps"]))


def _bytes(accesses: Counter[int], elements: int, is_driver: bool) -> float:
    """Bytes per parameter. A thread that accesses less than a byte for each of its elements shares that with others."""
    own = sum(bits // 8 * count for bits, count in accesses.items() if bits >= 8 * elements) / elements
    scales = sum(bits // 8 * count for bits, count in accesses.items() if bits < 8 * elements) / BLOCK
    return own + (scales if is_driver else 0)


def _masked_bytes(launched: Launched) -> tuple[int, int]:
    """Bytes per parameter that the code loads and stores, but never of a matrix: a vector's second moment."""
    constants = launched.arguments
    if "IS_UPDATE" not in constants:
        return 0, 0
    size = constants["DTYPES"][constants["N_PLANES"] + 2].primitive_bitwidth // 8
    return size, 0 if constants["IS_UPDATE"] else size


def _expected_accesses(launched: Launched, per_thread: int) -> tuple[int, int]:
    """128-bit loads and stores that one thread of the driver needs for a full block."""
    constants = launched.arguments
    sizes = [dtype.primitive_bitwidth // 8 for dtype in constants["DTYPES"]]
    if constants["scratch_ptr"] is not None:
        sizes.append(constants["scratch_ptr"].dtype.itemsize)
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


def resources_of(code: Mapping[str, Any]) -> tuple[int, int]:
    """Registers a thread, and bytes of what they spill: on NVIDIA of stack plus local memory."""
    if "amdgcn" in code:
        registers, spills = (int(re.findall(rf"\.vgpr_{k}count:\s+(\d+)", code["amdgcn"])[0]) for k in ("", "spill_"))
        return registers, 4 * spills
    usage = run_tool("cuobjdump", "--dump-resource-usage", binary=code["cubin"])
    usage_of = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return usage_of["REG"], usage_of["STACK"] + usage_of["LOCAL"]
