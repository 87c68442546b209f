"""Other packages' Triton kernels, compiled for sm_90 where they are installed: `tritopt inspect --peer-kernels`.

Types, constants and sizes are those with which the package launches the kernel for a large tensor, with AdamW's
hyperparameters. So the rows of `PEERS` that stand for these packages can be read off again, and newer versions be seen.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from operator import attrgetter
from typing import Any, NamedTuple

from tritopt.engine import private
from tritopt.kernels.language import HAS_TRITON, INSTALL_TRITON, INTERPRETED, tl
from tritopt.tools.compiled import CompiledLaunch, resources_of
from tritopt.tools.disassembly import disassemble
from tritopt.tools.gpus import ARCHITECTURES, GPUS, resident_programs
from tritopt.tools.hot_loop import hot_loops, parse_sass, straight_code
from tritopt.tools.inspect.compile import N_PARAMETERS, in_processes
from tritopt.tools.inspect.model import bytes_in_flight, seconds_of
from tritopt.tools.inspect.peers import PeerKernel
from tritopt.tools.inspect.record import by_width, widths

GPU = GPUS["H200"]


class TritonPeer(NamedTuple):
    """A peer's Triton kernel, and how it launches it."""

    kernel: str
    """Name in the table."""
    stored: str
    """Dtypes of weights and gradients, and of what else it keeps."""
    distribution: str
    """Name to install the package by."""
    path: str
    """Module and function, "package.module:function"."""
    types: Mapping[str, str]
    """Names of arguments by Triton's name of their type, "i32:16" for a number of elements that 16 divides."""
    constants: Mapping[str, Any]
    """Compile-time arguments; None for a pointer that the launch does not have."""
    elements: int
    """Number of elements that a program has at a time."""
    bytes_read: float
    """Bytes per parameter that are read."""
    bytes_written: float
    """Bytes per parameter that are written."""
    num_warps: int = 4
    most_programs: int = 32
    """Number of programs that its grid has for each multiprocessor, at most."""


class Skipped(NamedTuple):
    """A peer's kernel that was not compiled."""

    kernel: str
    reason: str


_OPTIMI = {"fp32": "lr beta1_hat beta1_comp beta2_hat beta2_comp weight_decay eps", "i32:16": "n_elements"}
_OF_OPTIMI = {"do_weight_decay": True, "decouple_wd": True, "update_parameters": True, "BLOCK_SIZE": 1024}
_FLASH = {"*bf16": "param_ptr grad_ptr", "fp32": "lr beta1 beta2 eps weight_decay", "i32": "step", "i32:16": "N"}
_OF_FLASH = {
    "GROUP_SIZE": 32, "DECOUPLED_WEIGHT_DECAY": True, "PARAM_DTYPE": tl.bfloat16, "USE_ECC": True,
    "NUM_MANTISSA_BITS": 7, "BLOCK_SIZE_N": 1024,
}  # fmt: skip
_BNB = {"*bf16": "g_ptr p_ptr", "i32": "step", "i32:16": "n_elements"}
_OF_BNB = {
    "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "gnorm_scale": 1.0, "OPTIMIZER_ID": 3,
    "N_PER_TH": 1,
}  # fmt: skip
TRITON_PEERS = (
    TritonPeer(
        "optimi", "fp32", "torch-optimi", "optimi.adam:_adam_kernel",
        {**_OPTIMI, "*fp32": "param_ptr grad_ptr exp_avg_ptr exp_avg_sq_ptr"},
        {**_OF_OPTIMI, "kahan_sum": False, "kahan_ptr": None}, 1024, 16, 12,
    ),
    TritonPeer(
        "optimi, kahan", "bf16", "torch-optimi", "optimi.adam:_adam_kernel",
        {**_OPTIMI, "*bf16": "param_ptr grad_ptr exp_avg_ptr exp_avg_sq_ptr kahan_ptr"},
        {**_OF_OPTIMI, "kahan_sum": True}, 1024, 10, 8,
    ),
    TritonPeer(
        "FlashOptim, 16 bits", "bf16, int16; bf16 m, v", "flashoptim", "flashoptim.optimizers:_triton_adam_kernel",
        {**_FLASH, "*bf16": "param_ptr grad_ptr mom_ptr var_ptr", "*i16": "ecc_ptr"},
        {**_OF_FLASH, "QUANTIZE_OPTIM_STATES": False, "SIGNED_ERROR_T": tl.int16, "SIGNED_MAX_VAL": 32767,
         "mom_scales_f16_ptr": None, "var_scales_f16_ptr": None}, 1024, 10, 8, most_programs=2,
    ),
    TritonPeer(
        "FlashOptim, 8 bits", "bf16, int8; int8 m, v", "flashoptim", "flashoptim.optimizers:_triton_adam_kernel",
        {**_FLASH, "*i8": "mom_ptr ecc_ptr", "*u8": "var_ptr", "*fp16": "mom_scales_f16_ptr var_scales_f16_ptr"},
        {**_OF_FLASH, "QUANTIZE_OPTIM_STATES": True, "SIGNED_ERROR_T": tl.int8, "SIGNED_MAX_VAL": 127},
        1024, 7 + 4 / 32, 5 + 4 / 32, most_programs=2,
    ),
    # bitsandbytes launches these on Intel's GPUs; on NVIDIA's it has CUDA in their place.
    TritonPeer(
        "bitsandbytes, 32 bits, for Intel", "bf16, no master; fp32 m, v", "bitsandbytes",
        "bitsandbytes.backends.triton.kernels_optim:_optimizer_update_2state_32bit_triton_kernel",
        {**_BNB, "*fp32": "state1_ptr state2_ptr unorm_ptr", "fp32": "param_norm beta3 alpha beta1_step beta2_step lr"},
        {**_OF_BNB, "max_unorm": 0.0, "skip_zeros": False, "BLOCK_SIZE": 256}, 256, 12, 10, num_warps=2,
    ),
    TritonPeer(
        "bitsandbytes, 8 bits, for Intel", "bf16, no master; 8-bit m, v", "bitsandbytes",
        "bitsandbytes.backends.triton.kernels_optim:_optimizer_update_2state_8bit_blockwise_triton_kernel",
        {**_BNB, "*u8": "state1_ptr state2_ptr", "*fp32": "qmap1_ptr qmap2_ptr absmax1_ptr absmax2_ptr",
         "fp32": "beta3 alpha beta1_step beta2_step lr"},
        {**_OF_BNB, "BLOCK_SIZE_N": 256}, 256, 6 + 8 / 256, 4 + 8 / 256, num_warps=2,
    ),
)  # fmt: skip


def inspect_peers(peers: Sequence[TritonPeer] = TRITON_PEERS) -> Iterator[PeerKernel | Skipped]:
    """Compile peers' kernels, in a process of its own if kernels are interpreted here. RuntimeError without Triton."""
    if not HAS_TRITON:
        raise RuntimeError(f"to compile kernels takes {INSTALL_TRITON}")
    yield from in_processes(inspect_peer, peers, int(INTERPRETED))


def inspect_peer(peer: TritonPeer) -> PeerKernel | Skipped:
    """Compile a peer's kernel and describe it, or say why that cannot be."""
    module = peer.path.partition(":")[0]
    if not find_spec(module.partition(".")[0]):
        return Skipped(peer.kernel, f"{peer.distribution} is not installed")
    try:
        return _compiled(peer)
    except Exception as error:
        # Whatever another version's import, signature or code raises.
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        return Skipped(peer.kernel, f"{_version_of(peer)}: {type(error).__name__}: {error}{cause}")


def _version_of(peer: TritonPeer) -> str:
    try:
        return f"{peer.distribution} {metadata.version(peer.distribution)}"
    except metadata.PackageNotFoundError:
        return peer.distribution


def _compiled(peer: TritonPeer) -> PeerKernel:
    module, _, name = peer.path.partition(":")
    kernel: Any = attrgetter(name)(importlib.import_module(module))
    kinds = {argument: kind for kind, arguments in peer.types.items() for argument in arguments.split()}
    kinds |= dict.fromkeys(peer.constants, "constexpr")
    differing = sorted(kinds.keys() ^ set(private.names_of(kernel)))
    if differing:
        raise TypeError(f"it takes other arguments than it did: {', '.join(differing)}")
    # Fusion is what Triton up to 3.9 does unless told otherwise.
    options = {"num_warps": peer.num_warps, "enable_fp_fusion": True}
    binary = private.compile_for(90, kernel, kinds, peer.constants, options)
    forms = private.assembly(binary)
    registers, spilled = resources_of(forms)
    shared = private.metadata(binary).shared
    code = parse_sass(disassemble([forms["cubin"]], 90)[0])
    loop = next(iter(hot_loops(code)), None) or straight_code(code)
    n_threads = peer.num_warps * ARCHITECTURES[GPU.target].warp_size
    elements = peer.elements // n_threads
    programs = min(resident_programs(GPU.target, registers, peer.num_warps, shared), peer.most_programs)
    launch = CompiledLaunch(
        peer.kernel, registers, spilled, shared, peer.num_warps, elements, loop.loads, loop.stores, None, None,
        peer.bytes_read, peer.bytes_written, loop.instructions / elements, loop.arithmetic / elements, loop.waits,
        loop.alu / elements, loop.xu / elements,
    )  # fmt: skip
    seconds = seconds_of(launch, programs, GPU)
    bound = max(seconds, key=lambda limit: seconds[limit])
    return PeerKernel(
        f"{peer.kernel}: {_version_of(peer)}",
        peer.stored,
        registers,
        n_threads,
        programs,
        widths(by_width(loop.loads)),
        peer.bytes_read + peer.bytes_written,
        loop.instructions / elements,
        (bytes_in_flight(launch, programs, GPU.target) or 0) / 1000,
        spilled,
        loop.waits,
        1000 * N_PARAMETERS * seconds[bound],
        bound,
    )
