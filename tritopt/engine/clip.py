"""Global norm of a list of tensors, and what clips it: factors on the device, and the launch that scales in place."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from tritopt.engine import private
from tritopt.engine.device import current_stream, is_capturing, on_device, share_with_streams
from tritopt.engine.driver import Apply
from tritopt.engine.group import ScalarTable
from tritopt.engine.launcher import BoundKernel, KernelRecorder
from tritopt.engine.phase import LaunchSpec, Reduce
from tritopt.engine.plan import Planner, Task, compute_dtype, unavailable
from tritopt.kernels.drivers.multi_tensor_norm import clip_factor
from tritopt.kernels.scale import scale_update
from tritopt.kernels.twins.ops import norm

EPSILON = 1e-6  # added to the norm, as torch.nn.utils.clip_grad_norm_ does


class Factor(NamedTuple):
    """Scalars that the scaling reads beside tensors: the factor."""

    factor: float


class Plans(threading.local):
    """A planner for each thread: what it uploads belongs to the step that is under way."""

    def __init__(self) -> None:
        self.planner = Planner()


def squares(
    planner: Planner, key: Hashable, parts: Sequence[torch.Tensor], reduce: Reduce | None = None
) -> torch.Tensor:
    """Sum of squares of each strided tensor, fp64 [tensors] on the first one's device; fused where it can be."""
    if all(unavailable(part) is None for part in parts):
        return planner.squares(key, parts, reduce)
    sums = torch.stack([norm(part.to(compute_dtype(part))).square().to(parts[0].device) for part in parts])
    if reduce is not None:
        reduce(sums[:, None])
    return sums


class Clip:
    """Norm and clip factor from the gradients' squares, step after step, in one launch where kernels can run."""

    def __init__(self) -> None:
        self.norm: torch.Tensor | None = None
        """Norm of the last step's gradients, fp32 []; overwritten by the next. None before the first."""
        self.factor, self._bound, self._inverse = (torch.empty(0, dtype=torch.float64, device="cpu") for _ in range(3))
        self._max_norm = self._inverse_is = math.nan
        self._launch: BoundKernel | None = None
        self._stream = 0
        self._is_captured = False
        """Whether a CUDA graph captured the last launch."""

    def __reduce__(self) -> tuple[type[Clip], tuple[()]]:
        """A copy has not clipped anything."""
        return Clip, ()

    def held(self) -> tuple[torch.Tensor | None, ...]:
        """Tensors that its launches read and write."""
        return self.norm, self.factor, self._bound, self._inverse

    def __call__(
        self,
        squares: torch.Tensor,
        max_norm: float,
        inverse: torch.Tensor | float | None,
        record: KernelRecorder | None,
    ) -> torch.Tensor:
        """Factor of the gradients, fp64 []: at most `inverse`, that of a loss scale; NaN skips the update.

        inverse: >= 0; a tensor is fp64 [] on the device of `squares`. record: told of the launch in place of making it,
        as `LaunchSpec.record` is of those of phases.
        """
        if unavailable(squares) is not None:
            norm = squares.sum().sqrt()
            norm = norm if inverse is None else norm * inverse
            self.norm = norm.float()
            factor = torch.where(norm.isfinite(), factor_of(norm, max_norm), torch.nan)
            self.factor = factor if inverse is None else factor * inverse
            return self.factor
        stream, is_capture = current_stream(squares.device), is_capturing(squares.device)
        known = self.norm if self.norm is not None and self.norm.device == squares.device else None
        if known is None:
            self.norm = torch.full((), torch.nan, dtype=torch.float32, device=squares.device)
        elif stream != self._stream:
            share_with_streams([known])
        # What a graph captures is its own: it writes that with its replays, and nobody before them. The norm is of
        # whichever step was the last, replayed or not.
        if is_capture or self._is_captured or known is None or stream != self._stream:
            self.factor, self._bound, self._inverse = (
                torch.empty((), dtype=torch.float64, device=squares.device) for _ in range(3)
            )
            self._max_norm = self._inverse_is = math.nan
            constants = {"EPSILON": EPSILON, "BLOCK_SIZE": 1024, "enable_fp_fusion": False}
            self._launch, self._stream = BoundKernel(clip_factor, 1, constants), stream
        self._is_captured = is_capture
        if max_norm != self._max_norm:
            self._max_norm = max_norm
            self._bound.fill_(max_norm)
        if isinstance(inverse, float):
            if inverse != self._inverse_is:
                self._inverse_is = inverse
                self._inverse.fill_(inverse)
            inverse = self._inverse
        with on_device(squares.device):
            assert self._launch is not None
            self._launch(record, squares, squares.numel(), self._bound, inverse, self.norm, self.factor)
        return self.factor


def factor_of(total: torch.Tensor, max_norm: float, epsilon: float = EPSILON) -> torch.Tensor:
    """Factor of tensors of this norm, so that it is at most max_norm."""
    return (max_norm / (total + epsilon)).clamp(max=1.0)


def scale_all(planner: Planner, key: Hashable, tasks: Sequence[Task], factor: torch.Tensor) -> None:
    """Multiply all in place; a factor of 1 writes nothing."""
    by_device: dict[torch.device, list[Task]] = {}
    for task in tasks:
        if not private.is_zero_tensor(task.grad):  # which has no memory, and stays what it is
            by_device.setdefault(task.grad.device, []).append(task)
    for device, placed in by_device.items():
        here = factor.to(device)
        if unavailable(placed[0].grad) is not None:
            for task in placed:
                dtype = compute_dtype(task.grad)
                task.grad.copy_(task.grad.to(dtype) * here.to(dtype))
            continue
        # Three scalars for preambles come first; no gradient is read, so none of them is.
        table = ScalarTable(torch.cat((here.new_zeros(3), here[None]))[None], np.zeros(len(placed), dtype=np.int64))
        phase = Apply(scale_update, reads_grad=False)
        planner.apply(("scale", key, device), placed, table, LaunchSpec((phase,), Factor, "raw", noop=here == 1))


def dense(grad: torch.Tensor) -> torch.Tensor:
    """The values of a sparse gradient, each element once."""
    return grad if grad.layout == torch.strided else grad.coalesce().values()


def stored(grad: torch.Tensor) -> torch.Tensor:
    """The values of a gradient in memory: scaling them scales the gradient, duplicates of a sparse one included."""
    return grad.detach() if grad.layout == torch.strided else private.stored_values(grad.detach())
