"""The digits again, with Muon for the matrices between layers and AdamW for the rest, beside torch's two classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.nn import functional

from tritopt import optim
from tritopt.tools.environment import device
from tritopt.tools.numerics.digits import BATCH_SIZE, HIDDEN, Digits
from tritopt.tools.numerics.training import one_thread
from tritopt.tools.storage import FORMATS

MUON_STEPS = 300
MUON_LR, ADAMW_LR = 0.02, 1e-3
FORMATS_BESIDE = ("fp32", "split16", "split8+int8")
TORCHS = "torch.optim.Muon, AdamW"


Params: TypeAlias = Sequence[torch.nn.Parameter]
Optimizers: TypeAlias = Sequence[torch.optim.Optimizer]


@dataclass(frozen=True)
class MuonDigits:
    """Result of training on the digits."""

    name: str
    loss: float
    """Cross-entropy over the training images, after the last step."""
    accuracy: float
    """Share of the test images that are recognised."""


def muon_digits(digits: Digits, steps: int = MUON_STEPS) -> Iterator[MuonDigits]:
    """Train with torch's classes, with `Mixed` in some storage formats, and with NorMuon."""
    yield _trained(TORCHS, digits, steps, torch.float32, _torchs)
    for name in FORMATS_BESIDE:
        fmt = FORMATS[name]
        yield _trained(f"Mixed, {name}", digits, steps, fmt.dtype, partial(_mixed, fmt.arguments, {}))
    yield _trained("Mixed with beta2, fp32", digits, steps, torch.float32, partial(_mixed, {}, {"beta2": 0.95}))


def _torchs(matrices: Params, rest: Params) -> Optimizers:
    return torch.optim.Muon(matrices, MUON_LR), torch.optim.AdamW(rest, ADAMW_LR)


def _mixed(options: dict[str, Any], of_muon: dict[str, Any], matrices: Params, rest: Params) -> Optimizers:
    groups = [
        {"params": matrices, "algorithm": "Muon", "lr": MUON_LR, **of_muon},
        {"params": rest, "algorithm": "AdamW", "lr": ADAMW_LR},
    ]
    return (optim.Mixed(groups, fused=None if device().type == "cuda" else False, **options),)


@one_thread()
def _trained(
    name: str, digits: Digits, steps: int, dtype: torch.dtype, make: Callable[[Params, Params], Optimizers]
) -> MuonDigits:
    """Train a network of two hidden layers; its arithmetic is fp32."""
    random = torch.Generator("cpu").manual_seed(0)
    shapes = ((HIDDEN, 64), (HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,), (10, HIDDEN), (10,))
    params = []
    for shape in shapes:
        bound = 64**-0.5 if shape[-1] == 64 else HIDDEN**-0.5
        drawn = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=random)
        params.append(torch.nn.Parameter(drawn.bfloat16().to(device(), dtype)))
    opts = make([params[0], params[2]], [params[1], *params[3:]])
    # Down to 0, so that what the last batches happened to be does not show in the end.
    schedules = [torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, steps) for opt in opts]
    images, labels, test_images, test_labels = digits
    images, test_images = images.float(), test_images.float()

    def logits(x: torch.Tensor) -> torch.Tensor:
        first, first_bias, second, second_bias, out, out_bias = (param.float() for param in params)
        hidden = functional.linear(functional.linear(x, first, first_bias).relu(), second, second_bias).relu()
        return functional.linear(hidden, out, out_bias)

    for _ in range(steps):
        places = torch.randint(len(images), (BATCH_SIZE,), generator=random, dtype=torch.int64, device="cpu")
        places = places.to(device())
        for param in params:
            param.grad = None
        functional.cross_entropy(logits(images[places]), labels[places]).backward()
        for opt in opts:
            opt.step()
        for schedule in schedules:
            schedule.step()
    with torch.no_grad():
        loss = float(functional.cross_entropy(logits(images), labels))
        accuracy = float((logits(test_images).argmax(dim=1) == test_labels).float().mean())
    return MuonDigits(name, loss, accuracy)
