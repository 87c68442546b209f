"""torch's own argument checks and defaults, of the version that is installed."""

from __future__ import annotations

from typing import Any

import torch


def torch_defaults(torch_class: type[torch.optim.Optimizer], **arguments: Any) -> dict[str, Any]:
    """The defaults of torch's optimizer for these arguments; raises what it raises."""
    defaults: dict[str, Any] = torch_class([torch.zeros((), dtype=torch.float32, device="cpu")], **arguments).defaults
    return defaults


def adam_defaults(lr: Any, betas: Any, eps: Any, weight_decay: Any, **how: Any) -> dict[str, Any]:
    """For optimizers that torch lacks and that take these, checked as torch's AdamW checks them."""
    checked = torch_defaults(torch.optim.AdamW, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **how)
    del checked["amsgrad"]
    checked.pop("decoupled_weight_decay", None)
    return checked
