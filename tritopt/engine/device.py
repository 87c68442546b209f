"""Current stream of a GPU, whether a graph captures it, pinned uploads, and memory that streams share.

On the CPU, whose kernels Triton interprets, there is nothing to ask, and uploads are no copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one, which launches go to."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    make: Callable[[torch.device], AbstractContextManager[Any]] = torch.cuda.device
    return make(device)


_HERE: AbstractContextManager[Any] = nullcontext()


def current_stream(device: torch.device) -> int:
    """Handle of the device's current stream; 0 on the CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing(device: torch.device | None = None) -> bool:
    """Whether a CUDA graph captures the current stream of a device, so that work runs with its replays only.

    device: None asks for the current one, if there is one.
    """
    if device is None:
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    if device.type != "cuda":
        return False
    with on_device(device):
        return torch.cuda.is_current_stream_capturing()


def share_with_streams(tensors: Iterable[torch.Tensor]) -> None:
    """Tell the allocator that the current streams use tensors which may have been made on others.

    Their memory is otherwise free for the other stream as soon as nobody holds them, whatever this one still has to do.
    """
    for tensor in tensors:
        if tensor.device.type == "cuda":
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def pinned(host: torch.Tensor) -> torch.Tensor:
    """Copy to pinned memory. torch keeps it until copies out of it are done, so the next step cannot overwrite it."""
    return host.pin_memory()


def from_pinned(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device, when its stream gets there."""
    return host.to(device, non_blocking=True)


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Bring to the device what the host may overwrite at once; on the CPU the same memory."""
    return from_pinned(pinned(host), device) if device.type == "cuda" else host
