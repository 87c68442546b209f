"""Factors of gradients, of a GradScaler's scale and of a clip, and whether a step is skipped: numbers on the device."""

from __future__ import annotations

import torch

from tritopt.optim import distributed


def scalar_of(value: object) -> torch.Tensor | None:
    """Number that a GradScaler left on the optimizer, as a tensor []; None: it left none."""
    if value is None:
        return None
    if not isinstance(value, torch.Tensor):
        value = torch.tensor(value, dtype=torch.float32, device="cpu")
    return distributed.whole(value).detach().reshape(())


def unclipped(rescale: torch.Tensor | None, grad_scale: torch.Tensor | None) -> torch.Tensor | None:
    """Factor of gradients that the norm's clip leaves alone, but that are skipped with the others."""
    if rescale is None:
        return None
    inverse = torch.ones_like(rescale) if grad_scale is None else 1.0 / grad_scale.double().to(rescale.device)
    return torch.where(rescale.isfinite(), inverse, torch.nan)


def moved(value: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Return a number on a device, None as it is."""
    return value if value is None or value.device == device else value.to(device)


def skip_of(found_inf: torch.Tensor | None, rescale: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Whether this step writes nothing, bool [] on the device; None: it does."""
    reasons = []
    if found_inf is not None:
        reasons.append((found_inf != 0).to(device))
    if rescale is not None:
        reasons.append(~rescale.isfinite().to(device))
    return torch.stack(reasons).any() if reasons else None
