"""GPUs by name: what they can move and issue at most, and how many programs a multiprocessor holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tritopt.engine.validate import did_you_mean


class Architecture(NamedTuple):
    """Limits of a multiprocessor (AMD: a compute unit)."""

    arch: int | str
    """Compute capability or name, as `tritopt.tools.compiled` takes it."""
    warp_size: int
    registers: int
    """Number of registers per lane of a scheduler (AMD: a SIMD), 32 bits each."""
    register_unit: int
    """Number whose multiple a warp's registers are rounded up to."""
    warps: int
    """Number of warps per scheduler."""
    programs: int
    """Number of programs that it holds at most."""
    shared: int
    """Bytes of shared memory."""
    shared_per_program: int
    """Bytes that the system takes of it for each program."""
    issues_all: bool
    """Whether memory accesses and branches take issue slots of arithmetic. On AMD they are issued beside it."""
    lanes: int
    """Instructions of one thread each that a multiprocessor issues per clock."""
    alu_lanes: int
    """Instructions of integers, comparisons and choices that it issues per clock, each of one thread."""
    xu_lanes: int
    """Instructions of roots, inverses and conversions that it issues per clock, each of one thread."""


N_SCHEDULERS = 4

# NVIDIA: CUDA C++ Programming Guide, technical specifications per compute capability: 64K registers and 64 warps a
# multiprocessor, 32 blocks, 164 and 228 KB of shared memory. Four schedulers issue one instruction of 32 threads each.
# AMD: CDNA 3 instruction set reference and LLVM's user guide for AMDGPU: 512 vector registers a lane, in units of 8, 8
# waves a SIMD, 64 KB of LDS, 160 KB in CDNA 4. A SIMD of 16 lanes takes 4 clocks for a wave of 64, so four of them do
# 64 lanes a clock; 32 workgroups is what 32 waves of one each come to.
# Pipes: CUDA C++ Programming Guide, throughput of native arithmetic instructions: 64 of 32-bit integers and
# comparisons, 16 of special functions. Conversions are taken as the latter's. AMD: a SIMD does transcendentals at a
# quarter of its rate.
ARCHITECTURES = {
    "sm_80": Architecture(80, 32, 512, 8, 16, 32, 164 * 1024, 1024, True, 128, 64, 16),
    "sm_90": Architecture(90, 32, 512, 8, 16, 32, 228 * 1024, 1024, True, 128, 64, 16),
    "sm_100": Architecture(100, 32, 512, 8, 16, 32, 228 * 1024, 1024, True, 128, 64, 16),
    "gfx942": Architecture("gfx942", 64, 512, 8, 8, 32, 64 * 1024, 0, False, 64, 64, 16),
    "gfx950": Architecture("gfx950", 64, 512, 8, 8, 32, 160 * 1024, 0, False, 64, 64, 16),
}
"""Architectures by the name of a target."""


class Gpu(NamedTuple):
    """A GPU by what its vendor publishes: peaks, which no kernel quite reaches."""

    name: str
    target: str
    """Key of ARCHITECTURES, which kernels are compiled for."""
    bandwidth: float
    """Bandwidth of its memory, bytes per second."""
    multiprocessors: int
    clock: float
    """Highest clock, in Hz."""

    @property
    def issue_rate(self) -> float:
        """Instructions of one thread each that it issues per second."""
        return ARCHITECTURES[self.target].lanes * self.multiprocessors * self.clock


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 80GB SXM data sheet: 2,039 GB/s; architecture white paper: 108 multiprocessors, 1410 MHz.
        Gpu("A100", "sm_80", 2.039e12, 108, 1.41e9),
        # NVIDIA H100 SXM data sheet: 3.35 TB/s, 67 TFLOPS of fp32. White paper: 132 multiprocessors of 128 lanes, which
        # make 67 TFLOPS at 1.98 GHz.
        Gpu("H100", "sm_90", 3.35e12, 132, 1.98e9),
        # NVIDIA H200 SXM data sheet: 4.8 TB/s, and 67 TFLOPS of fp32 as the H100.
        Gpu("H200", "sm_90", 4.8e12, 132, 1.98e9),
        # NVIDIA DGX B200 data sheet: 64 TB/s for eight GPUs; HGX B200: 75 TFLOPS of fp32 each, which 148
        # multiprocessors of 128 lanes make at 1.98 GHz.
        Gpu("B200", "sm_100", 8e12, 148, 1.98e9),
        # AMD Instinct MI300X data sheet: 5.3 TB/s (5.325), 304 compute units, 2100 MHz.
        Gpu("MI300X", "gfx942", 5.3e12, 304, 2.1e9),
        # AMD Instinct MI355X data sheet: 8 TB/s, 256 compute units, 2400 MHz, 157.3 TFLOPS of fp32 vectors.
        Gpu("MI355X", "gfx950", 8e12, 256, 2.4e9),
    )
}
"""GPUs by the name that users give them."""
DEFAULTS = {"sm_80": "A100", "sm_90": "H200", "sm_100": "B200", "gfx942": "MI300X", "gfx950": "MI355X"}
"""GPU for a target, unless told otherwise."""


def find_gpu(name: str) -> Gpu:
    """Find the GPU of this name, whatever the case; ValueError if it is not known.

    >>> find_gpu("h200").bandwidth
    4800000000000.0
    """
    return GPUS[_find("GPU", name, GPUS)]


def find_target(name: str) -> str:
    """Find the target of this name, whatever the case; ValueError if it is not known."""
    return _find("target", name, ARCHITECTURES)


def _find(what: str, name: str, known: Iterable[str]) -> str:
    for candidate in known:
        if candidate.lower() == name.lower():
            return candidate
    raise ValueError(f"unknown {what} {name!r}{did_you_mean(name, list(known))} known: {', '.join(known)}")


def resident_programs(target: str, registers: int, num_warps: int, shared_bytes: int) -> int:
    """Count the programs of so many registers a thread, warps and bytes of shared memory that a multiprocessor holds.

    >>> resident_programs("sm_90", registers=91, num_warps=4, shared_bytes=4096)
    5
    """
    limits = ARCHITECTURES[target]
    per_warp = max(1, -(-registers // limits.register_unit)) * limits.register_unit
    n_warps = N_SCHEDULERS * min(limits.warps, limits.registers // per_warp)
    by_shared = limits.shared // max(1, shared_bytes + limits.shared_per_program)
    return min(n_warps // num_warps, by_shared, limits.programs)
