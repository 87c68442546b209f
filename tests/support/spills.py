"""Kernels that a version of Triton makes spill registers."""

from __future__ import annotations

import importlib.metadata


def allowed_spills(kernel: str) -> int:
    """Bytes that a kernel may spill: none, but of Adafactor's kernels Triton 3.6 lets two spill two registers."""
    is_of_36 = importlib.metadata.version("triton").startswith("3.6.")
    return 8 if is_of_36 and kernel.startswith("factored_") else 0
