"""Names of `mxnet.gluon.utils` that a training loop uses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tritopt.engine import private, validate
from tritopt.engine.clip import Plans, dense, factor_of, scale_all, squares, stored
from tritopt.engine.plan import Planner, Task
from tritopt.engine.warning import warn
from tritopt.kernels.formats.format import PLAIN

EPSILON = 1e-8  # added to the norm, as Gluon does

_plans = Plans()


@torch.no_grad()
def clip_global_norm(
    arrays: Sequence[torch.Tensor], max_norm: float, check_isfinite: bool = True
) -> float | torch.Tensor:
    """Scale tensors in place so that their Euclidean norm, all together, is at most max_norm.

        array *= min(1, max_norm / (norm + 1e-8))

    Reads all arrays of a dtype in one launch, and writes them in another only if they are too long. Gluon's signature
    and return value. An optimizer's `max_grad_norm` clips in its step and writes no gradient at all.

    Args:
        arrays: gradients, such as `[p.grad for p in model.parameters()]`; one that is listed twice counts once.
        max_norm: at least 0.
        check_isfinite: wait for the norm, and warn if it is NaN or infinite; the arrays are scaled all the same.

    Returns:
        The norm before the clip: a float, or fp32 [1] on the first array's device with check_isfinite=False, which
        waits for nothing.

    Raises:
        ValueError: no arrays, max_norm < 0 or NaN, arrays that share memory. TypeError: what is no floating tensor.
        Nothing is scaled then.
    """
    max_norm = validate.nonnegative_count("max_norm", max_norm)
    if isinstance(arrays, torch.Tensor):
        raise TypeError("arrays is a tensor: pass a list of tensors")
    arrays = list({id(array): array for array in arrays}.values())
    if not arrays:
        raise ValueError("arrays is empty: pass at least one gradient")
    for i, array in enumerate(arrays):
        _check(f"arrays[{i}]", array)
    parts = [stored(array) for array in arrays]
    tasks = [Task((part,), PLAIN, part, ()) for part in parts]
    # Kept again when all is done: after a failure its tables may be half written.
    planner, key, _plans.planner = _plans.planner, id(arrays[0]), Planner()
    planner.check_aliases(key, [f"arrays[{i}]" for i in range(len(tasks))], tasks)
    total = squares(planner, key, [dense(array).detach() for array in arrays]).sum().sqrt()
    norm = float(total) if check_isfinite else total.float().reshape(1)
    if isinstance(norm, float) and not math.isfinite(norm):
        warn(f"nan or inf is detected: the norm is {norm}. Clipping results will be undefined.")
    scale_all(planner, key, tasks, factor_of(total, max_norm, EPSILON))
    _plans.planner = planner
    return norm


def _check(name: str, array: object) -> None:
    if not isinstance(array, torch.Tensor):
        way_out = "leave out parameters without a gradient" if array is None else "pass tensors"
        raise TypeError(f"{name} is {array!r:.60}: {way_out}")
    if array.dtype not in validate.WEIGHT_DTYPES:
        raise TypeError(f"{name} is {array.dtype}: pass float16, bfloat16, float32 or float64")
    if private.local_part(array) is not array:
        raise TypeError(f"{name} is a DTensor, of which this process has a part: call tritopt.clip_grad_norm_")
