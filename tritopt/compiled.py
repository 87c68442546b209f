"""What the compiler makes of a kernel, for any GPU and without one: registers, spills, access widths.

Needs kernels that are not interpreted: run with TRITON_INTERPRET unset.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tritopt import fused
from tritopt.kernels.formats import PLAIN, Format
from tritopt.kernels.language import INTERPRETED, triton
from tritopt.kernels.multi_tensor_apply import multi_tensor_apply
from tritopt.kernels.multi_tensor_norm import sum_partials
from tritopt.optimizer import Optimizer

_ACCESS = re.compile(r"\b(ld|st)\.global[\w.:]*?\.(?:v(\d)\.)?[a-z](\d+)\b")


class CompiledPhase(NamedTuple):
    """One launch of an optimizer, compiled."""

    kernel: str
    registers: int
    spilled_bytes: int
    wide_loads: int
    """128-bit loads in the code, all of them in the branch of full blocks."""
    wide_stores: int
    expected_wide_loads: int
    """As many as that branch needs, if each of its accesses is 128 bits wide."""
    expected_wide_stores: int


def compile_phases(
    opt: Optimizer,
    weight_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    fmt: Format = PLAIN,
    capability: int = 90,
    config: fused.Config = fused.CONFIG,
) -> list[CompiledPhase]:
    """Compile each phase of `opt` for an NVIDIA GPU of compute capability `capability` (90: sm_90, an H100 or H200).

    Raises RuntimeError under TRITON_INTERPRET=1, which replaces kernels by Python.
    """
    if INTERPRETED:
        raise RuntimeError("kernels are interpreted: unset TRITON_INTERPRET to compile them")
    planes = (weight_dtype, *[torch.float32] * (fmt.n_planes - 1))
    states = [_state_dtype(opt, planes[-1])] * len(opt.state_names)
    dtypes = (*planes, grad_dtype, *states)
    scalars = opt.scalars(0.1, 0.1, 1)
    launch = fused.Launch(opt.phases, type(scalars), opt.decay)
    formats = (fmt, *[PLAIN] * len(states))
    compiled: list[CompiledPhase] = []
    n_earlier_sums = 0
    for phase in opt.phases:
        constants = fused.phase_constants(phase, launch, formats, dtypes, 3 + len(scalars), n_earlier_sums)
        compute = torch.float64 if weight_dtype == torch.float64 else torch.float32
        constants |= {
            "COMPUTE_DTYPE": fused.TRITON_DTYPES[compute],
            "CHUNK_SIZE": config.chunk_size,
            "BLOCK_SIZE": config.block_size,
        }
        signature: dict[str, str | None] = {
            "table_ptr": "*i64",
            "tensor_ptr": "*i64",
            "chunk_ptr": "*i32",
            "rescale_ptr": "*fp32",
            "noop_ptr": "*fp32",
            "partial_ptr": "*fp64" if phase.n_sums else None,
            "sum_ptr": "*fp64" if n_earlier_sums else None,
            "n_tensors": "i32",
        }
        binary = compile_kernel(multi_tensor_apply, signature, constants, capability, config.num_warps)
        loads, stores = _expected_accesses(phase, fmt, dtypes, config)
        compiled.append(_describe(binary, loads, stores))
        n_earlier_sums = phase.n_sums
    return compiled


def compile_sum_partials(n_sums: int, capability: int = 90) -> CompiledPhase:
    """Compile the second stage of a per-tensor reduction."""
    pointers = {"partial_ptr": "*fp64", "tensor_ptr": "*i64", "sum_ptr": "*fp64"}
    signature: dict[str, str | None] = {**pointers, "n_chunks": "i32", "n_tensors": "i32"}
    binary = compile_kernel(sum_partials, signature, {"N_SUMS": n_sums, "BLOCK_SIZE": 1024}, capability, 4)
    return _describe(binary, 0, 0)


def compile_kernel(
    kernel: Any, signature: dict[str, str | None], constants: dict[str, Any], capability: int, num_warps: int
) -> Any:
    """Triton's compiled kernel. Pointers are taken as 16-byte aligned, as a launch finds torch's allocations."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    absent = {name: None for name, kind in signature.items() if kind is None}
    kinds = {name: kind for name, kind in signature.items() if kind} | dict.fromkeys(constants | absent, "constexpr")
    position = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        {name: kinds[name] for name in kernel.arg_names},
        constexprs={(position[name],): value for name, value in (constants | absent).items()},
        attrs={(position[n],): [["tt.divisibility", 16]] for n, kind in kinds.items() if kind.startswith("*")},
    )
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _state_dtype(opt: Optimizer, weight_dtype: torch.dtype) -> torch.dtype:
    return weight_dtype if opt.state_dtype is None else torch.promote_types(opt.state_dtype, weight_dtype)


def _expected_accesses(
    phase: fused.Apply, fmt: Format, dtypes: Sequence[torch.dtype], config: fused.Config
) -> tuple[int, int]:
    """128-bit loads and stores that one thread needs for a full block."""
    per_thread = config.block_size // (32 * config.num_warps)
    accesses = [max(1, per_thread * dtype.itemsize // 16) for dtype in dtypes]
    planes, (grad, *states) = accesses[: fmt.n_planes], accesses[fmt.n_planes :]
    loads = sum(n for n, read in zip(planes, fmt.plane_reads, strict=True) if read and phase.reads_weight)
    loads += grad * phase.reads_grad + sum(states) * phase.reads_states
    return loads, sum(planes) * phase.writes_weight + sum(states) * phase.writes_states


def _describe(binary: Any, expected_loads: int, expected_stores: int) -> CompiledPhase:
    wide = Counter(
        kind for kind, lanes, bits in _ACCESS.findall(binary.asm["ptx"]) if int(lanes or 1) * int(bits) == 128
    )
    registers, spilled = _resources(binary.asm["cubin"])
    return CompiledPhase(
        binary.metadata.name, registers, spilled, wide["ld"], wide["st"], expected_loads, expected_stores
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack plus local memory, which is where spills go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return found["REG"], found["STACK"] + found["LOCAL"]
