"""The stress: synthetic gradients that do not depend on the weights, the same for every format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from tritopt import optim
from tritopt.tools.cost import Bytes, counted_bytes
from tritopt.tools.environment import device
from tritopt.tools.numerics.record import FormatResult, Movement, described
from tritopt.tools.numerics.training import make_optimizer, one_thread, unless_refused, weights_of
from tritopt.tools.storage import TRUTH, StorageFormat

SHAPE = (64, 64)
MEAN, SPREAD = 0.6, 0.8
"""Mean and standard deviation of the gradients, in units of their rms. The mean's sign is an element's own."""
OUTLIER = 1e4
OUTLIERS = math.prod(SHAPE) // 256
"""Number of elements that are outliers at a time."""
DECAY_STEPS = 1000
N_PROBES = 24
"""Number of single updates that are looked at."""
LOSS_SCALE = 2.0**19
"""Loss scale for fp16 gradients: the largest of 1e-2 or so, and of 1e-8, are normal numbers then."""


class Case(NamedTuple):
    """One kind of the stress's weights and gradients."""

    name: str
    gradient_rms: float
    """Root mean square of the gradients that are not outliers."""
    lr: float
    weight_decay: float = 0.0
    outliers: str | None = None
    """Elements whose gradients are outliers: "same" (always), "any" (others in each step); None: there are none."""
    max_steps: int | None = None
    """Number of steps after which there are no gradients any more; None: there always are."""


GRADIENTS = {f"gradient rms 1e-{i}": float(f"1e-{i}") for i in range(2, 9)}
RATES = {f"lr 1e-{i}": float(f"1e-{i}") for i in range(2, 7)}
DECAY = "decay alone"
SAME_OUTLIERS, ANY_OUTLIERS = "outliers, the same elements", "outliers, any element"
CASES = (
    *(Case(name, rms, 1e-3) for name, rms in GRADIENTS.items()),
    Case(SAME_OUTLIERS, 1e-6, 1e-3, outliers="same"),
    Case(ANY_OUTLIERS, 1e-6, 1e-3, outliers="any"),
    *(Case(name, 1e-3, lr) for name, lr in RATES.items()),
    Case(DECAY, 0.0, 1e-3, weight_decay=0.1, max_steps=DECAY_STEPS),
)
"""Cases of the stress. Weights are around 1, so that a learning rate is about an update's share of the weight."""


class Stress:
    """Weights to start from, and gradients of each step: bf16 numbers, the same whatever the format."""

    def __init__(self, cases: Sequence[Case], steps: int) -> None:
        self.cases, self.steps = list(cases), steps
        self._random = torch.Generator("cpu").manual_seed(0)  # on the CPU: the same numbers on every machine
        weights = torch.empty(SHAPE, dtype=torch.float32, device="cpu").uniform_(-1, 1, generator=self._random).exp2()
        self.start = (weights * self._signs()).bfloat16().to(device())
        self._mean = (self._signs() * MEAN).to(device())
        places = torch.randperm(math.prod(SHAPE), generator=self._random, dtype=torch.int64, device="cpu")[:OUTLIERS]
        outliers = torch.ones(math.prod(SHAPE), dtype=torch.float32, device="cpu").index_fill_(0, places, OUTLIER)
        outliers = outliers.view(SHAPE).to(device())
        ones = torch.ones(SHAPE, dtype=torch.float32, device=device())
        self._scale = torch.stack([c.gradient_rms * (outliers if c.outliers == "same" else ones) for c in self.cases])
        self._moving = [i for i, case in enumerate(self.cases) if case.outliers == "any"]
        self._outliers = outliers.view(-1)
        self._normal = torch.randn(
            (min(steps, 512), *SHAPE), generator=self._random, dtype=torch.float32, device="cpu"
        ).to(device())

    def _signs(self) -> torch.Tensor:
        return torch.randint(0, 2, SHAPE, generator=self._random, dtype=torch.float32, device="cpu") * 2.0 - 1.0

    def gradients(self, step: int) -> torch.Tensor:
        """Make the gradients of a step: fp32 [cases, *SHAPE], of bf16 numbers."""
        # Numbers come again after 512 steps, each at another element.
        turn, at = divmod(step, len(self._normal))
        normal = self._normal[at].view(-1).roll(turn * 509).view(SHAPE)
        grads = self._scale * (self._mean + SPREAD * normal)
        for i in self._moving:
            grads[i] *= self._outliers.roll(step * 1021).view(SHAPE)
        return grads.bfloat16().float()


class Trained(NamedTuple):
    """Training on the stress in one format."""

    weights: list[torch.Tensor]
    """Weights of each case after the last step, as the arithmetic sees them."""
    updates: list[float]
    """Sum of the squares of single updates, of each case."""
    counted: Bytes


@one_thread()
def train_stress(cls: type[optim.Optimizer], fmt: StorageFormat, stress: Stress) -> Trained:
    """Train on all cases, in one optimizer."""
    grads = torch.zeros(len(stress.cases), *SHAPE, dtype=fmt.dtype, device=device())
    packs = _packs(cls, stress.cases)
    params = [torch.nn.Parameter(stress.start.to(fmt.dtype).repeat(len(pack), 1)) for pack in packs]
    for param, grad in zip(params, grads.split([len(pack) for pack in packs]), strict=True):
        param.grad = grad.view(param.shape)
    groups = [
        {"params": [param], "lr": pack[0].lr, "weight_decay": pack[0].weight_decay}
        for param, pack in zip(params, packs, strict=True)
    ]
    opt = make_optimizer(cls, groups, fmt)
    scale = LOSS_SCALE if fmt.dtype == torch.float16 else 1.0
    if scale != 1.0:
        opt.grad_scale = torch.tensor(scale, dtype=torch.float32, device=device())  # type: ignore[attr-defined]
    probes = {round((i + 1) * stress.steps / N_PROBES) - 1 for i in range(N_PROBES)}
    updates = []
    for step in range(stress.steps):
        for param, pack in zip(params, packs, strict=True):
            if step == pack[0].max_steps:
                param.grad = None
        grads.copy_(stress.gradients(step) * scale)
        before = weights_of(opt) if step in probes else None
        opt.step()
        if before is not None:
            updates.append((weights_of(opt) - before).view(len(grads), -1).square().sum(dim=1))
    weights = list(weights_of(opt).view(len(grads), *SHAPE))
    return Trained(weights, torch.stack(updates).sum(dim=0).tolist(), counted_bytes(opt))


def _packs(cls: type[optim.Optimizer], cases: Sequence[Case]) -> list[list[Case]]:
    """Group cases that share a parameter, which is faster: of one rate, where elements know nothing of each other."""
    if any(phase.sums_elements for phase in cls.rule().phases):
        return [[case] for case in cases]
    return [list(pack) for _, pack in groupby(cases, lambda case: (case.lr, case.weight_decay, case.max_steps))]


def stress_results(
    cls: type[optim.Optimizer], fmt: StorageFormat, stress: Stress, truth: Trained
) -> Iterator[FormatResult]:
    """Train in one format, and compare each case with the truth."""
    trained, refused = (truth, None) if fmt is TRUTH else unless_refused(lambda: train_stress(cls, fmt, stress))
    for i, case in enumerate(stress.cases):
        outcome: dict[str, Any] = {"refused": refused}
        if trained is not None:
            movement = Movement.of(trained.weights[i], truth.weights[i], stress.start)
            start = stress.start.double()
            outcome = {
                **trained.counted._asdict(),
                **movement._asdict(),
                "update": math.sqrt(trained.updates[i] / truth.updates[i]) if truth.updates[i] else None,
                "remains": float((trained.weights[i] * start).sum() / start.square().sum()),
            }
        yield FormatResult(
            **described(cls, fmt),
            problem="stress",
            case=case.name,
            steps=min(stress.steps, case.max_steps or stress.steps),
            lr=case.lr,
            weight_decay=case.weight_decay,
            gradient_rms=case.gradient_rms,
            **outcome,
        )
