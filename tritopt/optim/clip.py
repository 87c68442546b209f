"""Global norm of gradients and its clip: one pass over them, without a host synchronisation."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from types import GeneratorType

import torch

from tritopt.engine import clip, private, validate
from tritopt.engine.clip import Plans, dense, factor_of, scale_all, stored
from tritopt.engine.device import is_capturing
from tritopt.engine.plan import Planner, Task, compute_dtype
from tritopt.engine.warning import warn
from tritopt.kernels.formats.format import PLAIN
from tritopt.optim.distributed import ShardSums, aligned, local, whole
from tritopt.optim.observed import uncompiled

_plans = Plans()
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
    parts = [stored(local(grad)) for grad in grads]
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
    scale_all(planner, key, tasks, factor_of(total, max_norm))
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
    """Sum of squares of each gradient, fp64 [grads], over all processes that share the parameters."""
    parts = [dense(local(aligned(grad, param)).detach()) for grad, param in zip(grads, params, strict=True)]
    reduce = ShardSums(params) if reduce is None else reduce
    return clip.squares(planner, key, parts, reduce if reduce else None)
