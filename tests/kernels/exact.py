"""`python -m tests.kernels.exact [N]`: is the arithmetic of kernels/assembly.py exact? N pairs are divided, 10^8 if not
told otherwise, with approximations that are off by up to 2 ulps in either direction."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

OFF = (-2, -1, 0, 1, 2)
"""Errors of approximations in ulps from what rounds right: two are the most that NVIDIA's documents allow."""


def compiler() -> str | None:
    """Path of a C compiler, if there is one."""
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def load(folder: Path) -> ctypes.CDLL:
    """Compile exact.c into a folder."""
    library = folder / "exact.so"
    options = ["-O2", "-ffp-contract=off", "-shared", "-fPIC"]
    # Where fmaf is an instruction, and the whole takes seconds instead of minutes.
    options += ["-mfma"] if "fma" in _flags() else []
    command = [str(compiler()), *options, "-o", str(library), str(Path(__file__).with_name("exact.c")), "-lm"]
    subprocess.run(command, check=True)
    exact = ctypes.CDLL(str(library))
    for function in (exact.wrong_roots, exact.wrong_dividends, exact.wrong_among, exact.wrong_quotients):
        function.restype = ctypes.c_int64
    return exact


def _flags() -> set[str]:
    try:
        return set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return set()


def wrong_roots(exact: ctypes.CDLL, first: int, end: int, off: int) -> list[int]:
    """Bits of the numbers from `first` up to `end` whose root would be wrong."""
    wrong = np.zeros(1000, np.uint32)
    n = exact.wrong_roots(
        ctypes.c_uint32(first), ctypes.c_uint32(end), off, ctypes.c_void_p(wrong.ctypes.data), ctypes.c_int64(1000)
    )
    return [int(bits) for bits in wrong[:n]]


def wrong_dividends(exact: ctypes.CDLL, y: int, off: int) -> list[int]:
    """Bits of the numbers of [1, 2) that would be divided wrong by the number with bits y."""
    wrong = np.zeros(1000, np.uint32)
    n = exact.wrong_dividends(ctypes.c_uint32(y), off, ctypes.c_void_p(wrong.ctypes.data), ctypes.c_int64(1000))
    return [int(bits) for bits in wrong[:n]]


def wrong_quotients(exact: ctypes.CDLL, n: int, off: int, seed: int = 0) -> tuple[int, int]:
    """Number of quotients that would be wrong among n pairs, and of those that the FMAs are taken for."""
    taken = ctypes.c_int64(0)
    wrong = exact.wrong_quotients(ctypes.c_int64(n), ctypes.c_uint64(seed), off, ctypes.byref(taken))
    return int(wrong), taken.value


def wrong_among(exact: ctypes.CDLL, numbers: list[int], off: int) -> tuple[int, int]:
    """The same of all pairs out of these numbers, by their bits."""
    array: Any = np.array(numbers, np.uint32)
    taken = ctypes.c_int64(0)
    wrong = exact.wrong_among(ctypes.c_void_p(array.ctypes.data), ctypes.c_int64(len(array)), off, ctypes.byref(taken))
    return int(wrong), taken.value


def main(n: int) -> None:
    """Print what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        exact = load(Path(folder))
        for off in OFF:
            bits = wrong_roots(exact, 0x3F800000, 0x40800000, off)
            print(f"roots, {off:+} ulp: {len(bits)} of {2**24} wrong", *map(hex, bits))
        for off in OFF:
            bits = wrong_dividends(exact, 0x3F7FFFFF, off)
            print(f"dividends of 0.99999994, {off:+} ulp: {len(bits)} of {2**23} wrong", *map(hex, bits))
        for off in OFF:
            wrong, taken = wrong_quotients(exact, n, off)
            print(f"quotients, {off:+} ulp: {wrong} of {taken} wrong; {n} pairs were tried")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10**8)
