"""Global norm of gradients and its clip: one pass over them, without a host synchronisation."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Iterable, Sequence
from types import GeneratorType
from typing import NamedTuple

import numpy as np
import torch

from tritopt.engine import private, validate
from tritopt.engine.device import current_stream, is_capturing, on_device, share_with_streams
from tritopt.engine.driver import Apply
from tritopt.engine.group import Rows
from tritopt.engine.launcher import KernelRecorder, Launcher
from tritopt.engine.phase import Launch
from tritopt.engine.plan import Planner, Task, compute_dtype, unavailable
from tritopt.engine.warning import warn
from tritopt.kernels.drivers.multi_tensor_norm import clip_factor
from tritopt.kernels.formats.format import PLAIN
from tritopt.kernels.scale import scale_update
from tritopt.kernels.twins.ops import norm
from tritopt.optim.distributed import ShardSums, aligned, local, whole
from tritopt.optim.observed import uncompiled

EPSILON = 1e-6  # added to the norm, as torch.nn.utils.clip_grad_norm_ does


class Factor(NamedTuple):
    """What the scaling reads besides tensors."""

    factor: float


class _Plans(threading.local):
    """A planner for each thread: what it uploads belongs to the step that is under way."""

    def __init__(self) -> None:
        self.planner = Planner()


_plans = _Plans()
_of_graphs = private.weak_keys()
"""Plans that CUDA graphs captured in `clip_grad_norm_`, by parameter: kept as long as one of its parameters lives."""


@uncompiled
@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_`: scale gradients in place so that their global norm is at most max_norm.

        grad *= min(1, max_norm / (norm + 1e-6))

    Reads the gradients once, and writes them, in one launch for all of a dtype, only if they are too long; nothing
    waits for the device. Squares are added up in fp64, in an order that is always the same. Another `norm_type` than 2,
    and complex gradients, are handed to torch. `foreach` is accepted and means nothing otherwise.

    An optimizer's `max_grad_norm` does the same without writing gradients at all.

    Args:
        parameters: one or several; those without a gradient do not count. One that is listed twice counts once.
        max_norm: at least 0. Infinity measures only.
        norm_type: the p of the norm, "inf" too.
        error_if_nonfinite: raise if the norm is NaN or infinite, which waits for the device. Otherwise such a norm
            makes gradients NaN or 0, as torch's does.
        foreach: torch's.

    Returns:
        The norm before the clip, [] on the first gradient's device: fp64 if there is an fp64 gradient, otherwise fp32,
        also for fp16 and bf16 gradients. Of DTensors it is the norm of the whole, a plain tensor, the same in each
        process.

    Raises:
        ValueError: max_norm < 0 or NaN; gradients that share memory. RuntimeError: a norm that is not finite, if
        wanted. Gradients are then as they were.
    """
    is_generator = isinstance(parameters, GeneratorType)
    params = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    if is_generator and not params:
        warn("`parameters` is an empty generator, no gradient clipping will occur.")
    max_norm, norm_type = validate.nonnegative_count("max_norm", float(max_norm)), float(norm_type)
    grad_of = {id(param.grad): (param, param.grad) for param in params if param.grad is not None}
    if norm_type != 2 or any(grad.dtype not in validate.WEIGHT_DTYPES for _, grad in grad_of.values()):
        return whole(torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite, foreach))
    if not grad_of:
        return torch.tensor(0.0, dtype=torch.float32, device="cpu")
    params, grads = (list(column) for column in zip(*grad_of.values(), strict=True))
    parts = [_stored(local(grad)) for grad in grads]
    tasks = [Task((part,), PLAIN, part, ()) for part in parts]
    # Kept again when all is done: after a failure its tables may be half written.
    planner, key, _plans.planner = _plans.planner, id(params[0]), Planner()
    planner.check_aliases(key, [f"gradient {i}" for i in range(len(tasks))], tasks)
    total = global_norm(planner, key, params, grads)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    _scale(planner, key, tasks, _factor(total, max_norm))
    _plans.planner = planner
    if is_capturing():
        held = planner.held()
        for param in params:
            _of_graphs.setdefault(param, []).append(held)
    return total.to(max((compute_dtype(part) for part in parts), key=lambda dtype: dtype.itemsize))


def global_norm(
    planner: Planner,
    key: Hashable,
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    reduce: ShardSums | None = None,
) -> torch.Tensor:
    """Euclidean norm of all gradients together, fp64 [], over all processes that share the parameters.

    Fused where it can be. Bit-identical from run to run. `reduce`: that of these parameters, if it is at hand.
    """
    return squares(planner, key, params, grads, reduce).sum().sqrt()


def squares(
    planner: Planner,
    key: Hashable,
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    reduce: ShardSums | None = None,
) -> torch.Tensor:
    """Sum of squares of each gradient, fp64 [grads], likewise."""
    parts = [_dense(local(aligned(grad, param)).detach()) for grad, param in zip(grads, params, strict=True)]
    reduce = ShardSums(params) if reduce is None else reduce
    if all(unavailable(part) is None for part in parts):
        return planner.squares(key, parts, reduce if reduce else None)
    found = torch.stack([norm(part.to(compute_dtype(part))).square().to(parts[0].device) for part in parts])
    if reduce:
        reduce(found[:, None])
    return found


class Clip:
    """Norm and clip factor from the gradients' squares, step after step, in one launch where kernels can run."""

    def __init__(self) -> None:
        self.norm: torch.Tensor | None = None
        """Of the last step, fp32 []; overwritten by the next."""
        self._factor, self._bound = (torch.empty(0, dtype=torch.float64, device="cpu") for _ in range(2))
        self._max_norm = math.nan
        self._launch: Launcher | None = None
        self._stream = 0
        self._is_captured = False
        """Whether a CUDA graph captured the last launch."""

    def held(self) -> tuple[torch.Tensor | None, ...]:
        """What its launches read and write."""
        return self.norm, self._factor, self._bound

    def __call__(
        self,
        found: torch.Tensor,
        max_norm: float,
        inverse: torch.Tensor | None,
        record: KernelRecorder | None,
    ) -> torch.Tensor:
        """What gradients are multiplied by, fp64 []: at most `inverse`, that of a loss scale; NaN skips the update.

        record: told of the launch in place of making it, as `Launch.record` is of those of phases.
        """
        if unavailable(found) is not None:
            norm = found.sum().sqrt()
            norm = norm if inverse is None else norm * inverse
            self.norm = norm.float()
            factor = torch.where(norm.isfinite(), _factor(norm, max_norm), torch.nan)
            return factor if inverse is None else factor * inverse
        stream, is_capture = current_stream(found.device), is_capturing(found.device)
        known = self.norm if self.norm is not None and self.norm.device == found.device else None
        if known is None:
            self.norm = torch.full((), torch.nan, dtype=torch.float32, device=found.device)
        elif stream != self._stream:
            share_with_streams([known])
        # What a graph captures is its own: it writes that with its replays, and nobody before them. The norm is of
        # whichever step was the last, replayed or not.
        if is_capture or self._is_captured or known is None or stream != self._stream:
            self._factor, self._bound = (torch.empty((), dtype=torch.float64, device=found.device) for _ in range(2))
            self._max_norm = math.nan
            constants = {"EPSILON": EPSILON, "BLOCK_SIZE": 1024, "enable_fp_fusion": False}
            self._launch, self._stream = Launcher(clip_factor, 1, constants), stream
        self._is_captured = is_capture
        if max_norm != self._max_norm:
            self._max_norm = max_norm
            self._bound.fill_(max_norm)
        with on_device(found.device):
            assert self._launch is not None
            self._launch(record, found, found.numel(), self._bound, inverse, self.norm, self._factor)
        return self._factor


def _factor(total: torch.Tensor, max_norm: float) -> torch.Tensor:
    return (max_norm / (total + EPSILON)).clamp(max=1.0)


def _scale(planner: Planner, key: Hashable, tasks: Sequence[Task], factor: torch.Tensor) -> None:
    """Multiply all in place; a factor of 1 writes nothing."""
    by_device: dict[torch.device, list[Task]] = {}
    for task in tasks:
        if not private.is_zero_tensor(task.grad):  # which has no memory, and stays what it is
            by_device.setdefault(task.grad.device, []).append(task)
    for device, some in by_device.items():
        here = factor.to(device)
        if unavailable(some[0].grad) is not None:
            for task in some:
                dtype = compute_dtype(task.grad)
                task.grad.copy_(task.grad.to(dtype) * here.to(dtype))
            continue
        # A row begins with what preambles read; where no gradient is read there is none.
        row = Rows(torch.cat((here.new_zeros(3), here[None]))[None], np.zeros(len(some), dtype=np.int64))
        phase = Apply(scale_update, reads_grad=False)
        planner.apply(("scale", key, device), some, row, Launch((phase,), Factor, "raw", noop=here == 1))


def _dense(grad: torch.Tensor) -> torch.Tensor:
    """The values of a sparse gradient, each element once."""
    return grad if grad.layout == torch.strided else grad.coalesce().values()


def _stored(grad: torch.Tensor) -> torch.Tensor:
    """What of a gradient is in memory: scaling it scales the gradient, duplicates of a sparse one included."""
    return grad.detach() if grad.layout == torch.strided else private.stored_values(grad.detach())
