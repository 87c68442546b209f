"""torch's Muon and AdamW side by side, each over its own parameters: what stands beside `Mixed`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from tritopt.tools.bench.shapes import is_hidden_matrix


class MuonAndAdamW:
    """Two optimizers of torch, one after the other.

    Args:
        params: the parameters: matrices between layers are Muon's, the others AdamW's, which is fused.
        lr: of both.
    """

    def __init__(self, params: Sequence[torch.nn.Parameter], lr: float) -> None:
        matrices = [param for param in params if is_hidden_matrix(param.shape)]
        rest = [param for param in params if not is_hidden_matrix(param.shape)]
        self._opts: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, lr=lr)] if matrices else []
        if rest:
            self._opts.append(torch.optim.AdamW(rest, lr=lr, fused=True))
        self.param_groups = list(chain.from_iterable(opt.param_groups for opt in self._opts))

    def step(self) -> None:
        """Update all parameters, the matrices first."""
        for opt in self._opts:
            opt.step()
