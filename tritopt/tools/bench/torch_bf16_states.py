"""torch's fused AdamW with states in bf16 beside fp32 weights, which torch 2.14 and newer take on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class AdamWWithBf16States(torch.optim.AdamW):
    """torch's fused AdamW, whose states are there before its first step would make them in fp32.

    Args:
        params: the parameters.
        lr: the learning rate.
    """

    def __init__(self, params: Sequence[torch.nn.Parameter], lr: float) -> None:
        super().__init__(params, lr=lr, fused=True)
        for param in params:
            mean, second = (torch.zeros_like(param, dtype=torch.bfloat16) for _ in range(2))
            count = torch.zeros((), dtype=torch.float32, device=param.device)
            self.state[param] = {"step": count, "exp_avg": mean, "exp_avg_sq": second}
