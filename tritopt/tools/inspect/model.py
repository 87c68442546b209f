"""A model of what limits a launch, by what the compiler made of it: the longest of five times.

    memory     bytes at the vendor's bandwidth
    issue      instructions at the rate at which schedulers issue them, of which 90% is taken to be reached
    ALU, XU    those of the pipe of integers, and of that of roots and conversions, at 90% of its lanes
    latency    blocks one after the other, as many at once as multiprocessors hold programs

A block's latency is LOAD_CYCLES for each wait, and ISSUE_CYCLES for each instruction of a warp, as if each needed the
one before. Both are assumptions, as is the share of 90%: nothing was measured on a GPU.
"""

from __future__ import annotations

from tritopt.tools.compiled import CompiledLaunch
from tritopt.tools.gpus import ARCHITECTURES, Gpu

REACHED = 0.9
"""Share of the peak of a pipe or of issue slots that a kernel is taken to reach."""
LOAD_CYCLES = 1000
"""Clocks from a load to its data under load, assumed: 505 ns on an H200."""
ISSUE_CYCLES = 4
"""Clocks from one instruction of a warp to the next that needs its result, assumed."""


def seconds_of(launch: CompiledLaunch, programs: int, gpu: Gpu) -> dict[str, float]:
    """Seconds per parameter by each limit; empty for a launch without a hot loop. programs: resident programs."""
    if launch.instructions is None or launch.bytes_loaded is None or launch.bytes_stored is None:
        return {}
    target = ARCHITECTURES[gpu.target]
    assert launch.arithmetic is not None
    assert launch.waits is not None
    assert launch.alu is not None
    assert launch.xu is not None
    issued = launch.instructions if target.issues_all else launch.arithmetic
    clocks = gpu.multiprocessors * gpu.clock * REACHED
    n_threads = programs * launch.num_warps * target.warp_size
    cycles = launch.waits * LOAD_CYCLES + launch.instructions * launch.elements * ISSUE_CYCLES
    return {
        "memory": (launch.bytes_loaded + launch.bytes_stored) / gpu.bandwidth,
        "issue": issued / (target.lanes * clocks),
        "ALU": launch.alu / (target.alu_lanes * clocks),
        "XU": launch.xu / (target.xu_lanes * clocks),
        "latency": cycles / (n_threads * launch.elements * gpu.multiprocessors * gpu.clock),
    }


def bytes_in_flight(launch: CompiledLaunch, programs: int, target: str) -> float | None:
    """Bytes of loads under way on a multiprocessor when all its programs wait; None without a hot loop.

    By Little's law an H200 takes 25 KB in flight on each, reads and writes, to reach 4.8 TB/s at 700 ns.
    """
    if launch.bytes_loaded is None or not launch.waits:
        return None
    n_threads = programs * launch.num_warps * ARCHITECTURES[target].warp_size
    return n_threads * launch.elements * launch.bytes_loaded / max(1.0, launch.waits)
