"""Preambles: the ways to treat a gradient before the update function sees it.

A preamble is a @triton.jit function for the driver and its twin in PyTorch; an optimizer names the one that it follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tritopt.kernels.language import tl, triton
from tritopt.kernels.ops import add_decay, clip
from tritopt.kernels.twins import ops as twins


@triton.jit
def coupled(w, g, rescale, bound, wd):
    """clip(rescale g) + wd w: coupled (L2) decay, which is never clipped. Most optimizers."""
    return add_decay(clip(rescale * g, bound), w, wd)


@triton.jit
def coupled_in_clip(w, g, rescale, bound, wd):
    """clip(rescale g + wd w)."""
    return clip(add_decay(rescale * g, w, wd), bound)


@triton.jit
def coupled_unclipped(w, g, rescale, bound, wd):
    """rescale g + wd w: what the two above are without a bound."""
    return add_decay(rescale * g, w, wd)


@triton.jit
def decoupled(w, g, rescale, bound, wd):
    """clip(rescale g): the update function itself applies the decay, or there is none."""
    return clip(rescale * g, bound)


@triton.jit
def rescaled(w, g, rescale, bound, wd):
    """rescale g: the update function itself clips, after it has formed a norm."""
    return rescale * g


@triton.jit
def raw(w, g, rescale, bound, wd):
    """The gradient as it is."""
    return g


class Preamble(NamedTuple):
    """The pair: `kernel` and `reference` take (weight, gradient, rescale, clip bound, wd)."""

    kernel: Any
    reference: Callable[[torch.Tensor, torch.Tensor, float, float, float], torch.Tensor]


PREAMBLES = {
    "coupled": Preamble(
        coupled,
        lambda w, g, rescale, bound, wd: twins.add_decay(twins.clip(twins.scale(rescale, g), bound), w, wd),
    ),
    "coupled_in_clip": Preamble(
        coupled_in_clip,
        lambda w, g, rescale, bound, wd: twins.clip(twins.add_decay(twins.scale(rescale, g), w, wd), bound),
    ),
    "coupled_unclipped": Preamble(
        coupled_unclipped, lambda w, g, rescale, bound, wd: twins.add_decay(twins.scale(rescale, g), w, wd)
    ),
    "decoupled": Preamble(decoupled, lambda w, g, rescale, bound, wd: twins.clip(twins.scale(rescale, g), bound)),
    "rescaled": Preamble(rescaled, lambda w, g, rescale, bound, wd: twins.scale(rescale, g)),
    "raw": Preamble(raw, lambda w, g, rescale, bound, wd: g),
}
_UNCLIPPED = {"coupled": "coupled_unclipped", "coupled_in_clip": "coupled_unclipped", "decoupled": "rescaled"}


def without_clip(preamble: str) -> str:
    """Name of the preamble that does the same where no bound is finite, in two instructions less for each element."""
    return _UNCLIPPED.get(preamble, preamble)
