"""GroupAdaGrad with torch's interface."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import Unpack

from tritopt.optim.beyond_torch import BeyondTorch, Keywords, Rate
from tritopt.optim.optimizer import Params
from tritopt.optimizers import groupadagrad


class GroupAdaGrad(BeyondTorch):
    """AdaGrad with one learning rate per row (MXNet's `contrib.GroupAdaGrad`, for embeddings; no paper).

        h_t = h_{t-1} + mean(grad^2 over each row)
        w_t = w_{t-1} - lr grad / (sqrt(h_t) + eps)

    Parameters are matrices. State: history (h), [rows, 1], at least fp32. Defaults are MXNet's.

    Args:
        params: parameters or param_groups, as torch takes them.
        lr: length of the first step of a row whose gradients are equal; later ones shrink.
        eps: added to the root.
        weight_decay: must be 0.
        options: see `Keywords`.

    Raises:
        ValueError: weight_decay, and at the first step a parameter that is not 2-D.
    """

    rule = groupadagrad.GroupAdaGradRule
    arguments: ClassVar = {"eps": "epsilon"}

    def __init__(
        self,
        params: Params,
        lr: Rate = 0.01,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        **options: Unpack[Keywords],
    ) -> None:
        super().__init__(params, options, lr, weight_decay, eps=eps)
