"""Lists of indices, weights and gradients that an Optimizer takes, from an `nn.Module`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from tritopt.engine.names import uncompiled


class ModuleParameters(NamedTuple):
    """The trainable parameters of a module, in `named_parameters()` order; a shared one appears once.

    >>> import tritopt
    >>> model = torch.nn.Linear(3, 2)
    >>> model.bias.wd_mult = 0.0
    >>> params = module_parameters(model)
    >>> opt = tritopt.create("sgd", wd=0.1, param_idx2name=params.idx2name, param_dict=params.param_dict)
    >>> params.idx2name, opt._get_wds(params.indices)
    ({0: 'weight', 1: 'bias'}, [0.1, 0.0])
    """

    indices: list[int]
    weights: list[nn.Parameter]
    idx2name: dict[int, str]
    """Names by index, for `param_idx2name`: multipliers go by them."""
    param_dict: dict[int, nn.Parameter]
    """Parameters by index, for `param_dict`: their attributes `lr_mult` and `wd_mult` are read live."""

    def grads(self) -> list[torch.Tensor | None]:
        """The gradients as they are now, None where there is none."""
        return [weight.grad for weight in self.weights]


def module_parameters(module: nn.Module) -> ModuleParameters:
    """Indices, weights, names and multipliers of all parameters that require a gradient.

    Of a module that torch.compile has wrapped, the names are those that it had before.
    """
    named = [(uncompiled(name), weight) for name, weight in module.named_parameters() if weight.requires_grad]
    return ModuleParameters(
        list(range(len(named))),
        [weight for _, weight in named],
        {i: name for i, (name, _) in enumerate(named)},
        {i: weight for i, (_, weight) in enumerate(named)},
    )
