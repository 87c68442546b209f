"""Parameters of every layout that kernels meet, with guards around those that are views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

GUARD, GUARDED = 7.0, 64
"""Value and number of the elements before and behind a view, which no step may touch."""


class Layout(NamedTuple):
    """Shape of a parameter and how it lies in memory; how its gradient does, if otherwise."""

    shape: tuple[int, ...]
    kind: str = "plain"
    of_gradient: str = ""


VECTORS = (
    *(Layout((n,)) for n in (0, 1, 7, 255, 1024, 1025, 8195)),
    Layout(()),
    Layout((700,), "unaligned"),
    Layout((1031,), "plain", "unaligned"),
    Layout((1100,), "unaligned", "plain"),
)
MATRICES = (
    Layout((0, 4)),
    Layout((3, 5)),
    Layout((40, 64)),
    Layout((2, 600)),
    Layout((5, 64), "unaligned"),
    Layout((33, 70), "transposed"),
    Layout((2, 3, 4, 5), "channels_last"),
    Layout((9, 10), "strided"),
    Layout((8, 24), "plain", "transposed"),
    Layout((12, 20), "transposed", "plain"),
)
EVERY = (*VECTORS, *MATRICES)


def laid_out(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Copy that lies in memory as `kind` says."""
    if kind == "transposed":
        return torch.empty(values.shape[::-1], dtype=values.dtype).t().copy_(values)
    if kind == "channels_last":
        return values.clone(memory_format=torch.channels_last)
    if kind == "strided":
        room = torch.full((*values.shape[:-1], 2 * values.shape[-1]), GUARD, dtype=values.dtype)
        return room[..., ::2].copy_(values)
    if kind == "unaligned":
        room = torch.full((values.numel() + 2 * GUARDED + 1,), GUARD, dtype=values.dtype)
        return room[GUARDED + 1 : GUARDED + 1 + values.numel()].view(values.shape).copy_(values)
    return values.clone()


def is_guarded(tensor: torch.Tensor) -> bool:
    """Whether all that lies beside a view in its storage still is the guards' value."""
    room = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    outside = torch.ones_like(room, dtype=torch.bool)
    outside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
    return bool((room[outside] == GUARD).all())


def values(layouts: Sequence[Layout], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Contiguous values, normal ones."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(layout.shape, generator=random, dtype=torch.float64).to(dtype) for layout in layouts]


def parameters(layouts: Sequence[Layout], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """The same each time."""
    first = values(layouts, dtype, seed=0)
    return [torch.nn.Parameter(laid_out(x, layout.kind)) for x, layout in zip(first, layouts, strict=True)]


def set_gradients(
    params: Sequence[torch.nn.Parameter], layouts: Sequence[Layout], dtype: torch.dtype, step: int
) -> None:
    """Give each parameter the gradient of this step."""
    for param, layout, grad in zip(params, layouts, values(layouts, dtype, 1000 + step), strict=True):
        param.grad = None
        param.grad_dtype = dtype
        param.grad = laid_out(grad, layout.of_gradient or layout.kind)
