"""Global norm of gradients and its clip: one pass over them, without a host synchronisation."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch

from tritopt.exact import norm
from tritopt.fused import Planner, compute_dtype, unavailable
from tritopt.optim.distributed import ShardSums, aligned, local

EPSILON = 1e-6  # added to the norm, as torch.nn.utils.clip_grad_norm_ does


def global_norm(
    planner: Planner, key: Hashable, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Euclidean norm of all gradients together, fp64 [], over all processes that share the parameters.

    Fused where it can be. Bit-identical from run to run.
    """
    parts = [_dense(local(aligned(grad, param)).detach()) for grad, param in zip(grads, params, strict=True)]
    reduce = ShardSums(params)
    if all(unavailable(part) is None for part in parts):
        return planner.squares(key, parts, reduce if reduce else None).sum().sqrt()
    squares = torch.stack([norm(part.to(compute_dtype(part))).square().to(parts[0].device) for part in parts])
    if reduce:
        reduce(squares[:, None])
    return squares.sum().sqrt()


def clip_factor(total: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What brings gradients of this norm to at most `max_norm`, fp64 []; NaN where the norm is not finite."""
    factor = (max_norm / (total + EPSILON)).clamp(max=1.0)
    return torch.where(total.isfinite(), factor, math.nan)


def _dense(grad: torch.Tensor) -> torch.Tensor:
    """The values of a sparse gradient, each element once."""
    return grad if grad.layout == torch.strided else grad.coalesce().values()
