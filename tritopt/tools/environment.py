"""The device that kernels run on, and the versions that an outcome may depend on."""

from __future__ import annotations

import platform
from typing import Any

import torch

import tritopt
from tritopt.engine import plan, walk
from tritopt.kernels.language import HAS_TRITON, INTERPRETED, triton


def device() -> torch.device:
    """Return the device of the checks: the GPU, unless there is none or kernels take tensors of the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and plan.kernel_device == "cuda" else "cpu")


def fused_unavailable() -> str | None:
    """Say why no kernel can run here and what to do about it; None: they can."""
    return plan.unavailable(torch.empty(0, dtype=torch.float32, device=device()))


def environment(compiled_for: str | None = None, interpreted: bool = INTERPRETED) -> dict[str, Any]:
    """Describe the machine and the versions that the outcome may depend on.

    Args:
        compiled_for: GPU that the PTX machine stands in for; None: that is not used.
        interpreted: whether kernels run in Triton's interpreter, in this process or in those that it starts.
    """
    on_gpu, here = device().type == "cuda", "Triton's interpreter" if interpreted else "cpu"
    elsewhere = compiled_for is not None or (interpreted and not INTERPRETED)
    return {
        "tritopt": tritopt.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "python": platform.python_version(),
        "walk": walk.description(),
        "machine": platform.platform(),
        "device": "PTX machine" if compiled_for else torch.cuda.get_device_name() if on_gpu else here,
        "interpreter": interpreted,
        "compiled_for": compiled_for,
        "fused_unavailable": None if elsewhere else fused_unavailable(),
    }
