"""Order of a tensor's elements in memory, in which kernels number them."""

from __future__ import annotations

import torch


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a block of memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def lies_like(state: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the elements lie in memory as those of the weight do when a step reads them."""
    usual = torch.empty(weight.shape, dtype=weight.dtype, device="meta").stride()
    expected = weight.stride() if is_dense(weight) else usual
    return all(n <= 1 or a == b for n, a, b in zip(weight.shape, state.stride(), expected, strict=True))


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a dense tensor's elements as they lie, in one dimension."""
    return tensor.as_strided((tensor.numel(),), (1,))
