"""Other packages' AdamW kernels for sm_90, for `tritopt inspect --peer`.

Read off the machine code that the packages ship or that Triton makes of their source, in November 2026; no kernel was
run. Instructions are those of the aligned path where there is one (torch), and of the only one otherwise. Those of
optimi 0.3.3 and FlashOptim 0.1.4 are what `--peer-kernels` prints with Triton 3.9.
"""

from __future__ import annotations

from typing import NamedTuple


class PeerKernel(NamedTuple):
    """A peer's kernel, by the columns of `tritopt inspect`."""

    kernel: str
    stored: str
    """Dtypes of weights and gradients, and of what else it keeps."""
    registers: int
    threads: int
    """Number of threads of a program."""
    programs: int
    """Programs that a multiprocessor holds at once; fewer where the grid is smaller."""
    loads: str
    """Loads of a thread, as number x bits."""
    bytes_moved: float
    """Number of bytes per parameter that must move."""
    instructions: float
    """Number of instructions per parameter on the hot path."""
    in_flight: float
    """Kilobytes of loads under way on a multiprocessor when all its programs wait."""
    spilled_bytes: int = 0
    waits: float | None = None
    """Number of times that a thread waits for memory; None: not counted."""
    milliseconds: float | None = None
    """Milliseconds that 1e9 parameters take on an H200 by the model of tools/inspect/model.py; None: not computed."""
    bound: str = ""


_MASTER, _FP32 = "bf16; fp32 master, m, v", "fp32"
PEERS = (
    PeerKernel("TransformerEngine FusedAdam", _MASTER, 56, 512, 2, "4x16 12x32", 28, 46.8, 56),
    PeerKernel("apex FusedAdam, capturable", _MASTER, 64, 512, 2, "4x16 12x32", 28, 53.8, 56),
    PeerKernel("TransformerEngine, remainder", "bf16, int16; fp32 m, v", 56, 512, 2, "12x16 8x32", 26, 59.0, 56),
    PeerKernel("torch 2.14 fused", _FP32, 60, 512, 2, "4x128", 28, 48.5, 64),
    PeerKernel("apex FusedAdam", _FP32, 48, 512, 2, "16x32", 28, 39.8, 64),
    PeerKernel("optimi", _FP32, 40, 128, 12, "8x128", 28, 23.9, 98),
    PeerKernel("torch 2.14 fused", "fp32; bf16 m, v", 64, 512, 2, "2x128 8x16", 20, 53.8, 48),
    PeerKernel("torch 2.14 fused", "bf16", 61, 512, 2, "4x64", 14, 58.8, 32),
    PeerKernel("optimi, kahan", "bf16", 48, 128, 10, "5x128", 18, 39.6, 102),
    PeerKernel("FlashOptim, 16 bits", "bf16, int16; bf16 m, v", 56, 128, 2, "5x128", 18, 83.5, 20),
    PeerKernel("FlashOptim, 8 bits", "bf16, int8; int8 m, v", 64, 128, 2, "2x128 3x64 2x16", 12.25, 129.6, 7),
    PeerKernel("bitsandbytes, 8 bits", "bf16, no master; 8-bit m, v", 56, 256, 4, "1x16 2x8 2x32", 10.1, 374, 6),
)
"""Kernels beside whose formats tritopt has one."""
