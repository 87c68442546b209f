"""PyTorch twins of kernels/ops.py, and the norms that references of several optimizers take.

They have the names of the kernels, so that a reference and its update function read as the same text.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)  # and not a DTensor, which NumPy cannot look into


def sqrt(x: Any) -> Any:
    """Square root, rounded to nearest, which `torch.sqrt` on CPU is not: it is off by one ulp for 1% of numbers.

    NumPy's is, and takes a tenth of the time that fp32 takes through fp64. Where autograd looks on, fp64 is torch's.
    """
    if _is_array(x):
        return np.sqrt(x)
    is_numpy = type(x) in _PLAIN and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    if is_numpy and not (x.requires_grad and torch.is_grad_enabled()):
        values = x.numpy(force=True)
        with np.errstate(invalid="ignore"):
            return torch.from_numpy(np.sqrt(values, out=np.empty_like(values)))
    return x.double().sqrt().to(x.dtype)


def maximum(x: Any, y: Any) -> Any:
    """The larger; NaN where either is NaN."""
    return np.maximum(x, y) if _is_array(x) else torch.maximum(x, y)


def clip(x: Any, bound: float) -> Any:
    """x within +-bound; NaN stays. x itself where nothing is bounded."""
    if bound == math.inf:
        return x
    return x.clip(-bound, bound) if _is_array(x) else x.clamp(-bound, bound)


def scale(factor: float, x: Any) -> Any:
    """factor x; x itself where the factor is 1."""
    return x if factor == 1 else factor * x


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray | np.generic)


def norm(x: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of the whole tensor, fp64 [], as the kernels form it: squares in x's dtype, summed in fp64."""
    return (x * x).sum(dtype=torch.float64).sqrt()


def sign(x: Any) -> Any:
    """1, -1, or x itself where it is zero or NaN; `torch.sign` makes NaN zero."""
    if _is_array(x):
        one = x.dtype.type(1)
        return np.where(x > 0, one, np.where(x < 0, -one, x))
    return torch.where(x > 0, 1.0, torch.where(x < 0, -1.0, x))


def add_decay(x: torch.Tensor, w: torch.Tensor, wd: Any) -> torch.Tensor:
    """x + wd w; x alone where wd is 0. wd: a number, or a tensor that is differentiated by, which is never skipped."""
    return x + wd * w if isinstance(wd, torch.Tensor) or wd != 0 else x


def decay_of(w: torch.Tensor, wd: Any) -> Any:
    """Decay of a tensor: wd, but 0 if the norm is infinite, where it would make NaN of what is finite."""
    return 0.0 if norm(w).isinf() else wd


def trust_ratio(w: torch.Tensor, direction: torch.Tensor, lower_bound: float, upper_bound: float) -> torch.Tensor:
    """|w| within its bounds over |direction|, in w's dtype; 1 where either is 0 or |w| infinite."""
    weight_norm, direction_norm = norm(w), norm(direction)
    is_plain = weight_norm.isinf() | (direction_norm == 0)
    weight_norm = weight_norm.clamp(lower_bound, upper_bound)
    is_plain = is_plain | (weight_norm == 0)
    return torch.where(is_plain, 1.0, weight_norm / direction_norm).to(w.dtype)


def rough_root(x: torch.Tensor, n: int) -> torch.Tensor:
    """The 4th or 8th root of x >= 0, by torch's roots."""
    root = x.sqrt().sqrt()
    return root.sqrt() if n == 8 else root
