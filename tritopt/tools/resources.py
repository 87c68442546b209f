"""Cores and memory that processes may share; asked before torch and Triton are imported, and so without them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROCESS_BYTES = 500 * 2**20
"""Memory of one process of a check, with room: it took 330 MiB, 400 with kernels compiled, with torch 2.13 on Linux."""
MAX_PROCESSES = 16
CASES_PER_PROCESS = 16
"""Fewest cases that are worth the start of a process, which takes as long as these."""
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def n_processes(n_cases: int) -> int:
    """Count the processes to share so many cases: at most one a core, and as many as memory holds; 1 or more."""
    memory = free_memory()
    most = MAX_PROCESSES if memory is None else memory // PROCESS_BYTES
    return max(1, min(cores(), MAX_PROCESSES, most, n_cases // CASES_PER_PROCESS))


def cores() -> int:
    """Count the cores that this process may use: those it may run on, and the quota of its container; 1 or more."""
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups():
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if quota.isdecimal():
            most = min(most, int(quota) // int(period))
    return max(1, most)


def free_memory() -> int | None:
    """Measure the bytes that processes may still take, of the machine and of the container; None: unknown here."""
    free = [1024 * n for name, n in _numbers(PROC / "meminfo") if name == "MemAvailable:"]
    for group in _groups():
        limit, used = _text(group / "memory.max"), _text(group / "memory.current")
        if limit.isdecimal() and used.isdecimal():
            # What is kept of files makes room when it is needed.
            kept = sum(n for name, n in _numbers(group / "memory.stat") if name in ("active_file", "inactive_file"))
            free.append(int(limit) - int(used) + kept)
    return min(free, default=None)


def _groups() -> Iterator[Path]:
    """Find this process's control group and those around it, each of which may set limits (cgroup v2 only)."""
    for line in _text(PROC / "self" / "cgroup").splitlines():
        if line.startswith("0::"):
            own = CGROUPS / line[3:].strip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(CGROUPS))


def _numbers(path: Path) -> Iterator[tuple[str, int]]:
    for line in _text(path).splitlines():
        name, number, *_ = line.split()
        yield name, int(number)


def _text(path: Path) -> str:
    """Read a file of the kernel's; empty where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
