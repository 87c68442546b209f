"""The digits: a small network in a closed loop, its gradients those of its own weights."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from tritopt import optim
from tritopt.tools.cost import Bytes, counted_bytes
from tritopt.tools.environment import device
from tritopt.tools.numerics.record import FormatResult, Movement, described
from tritopt.tools.numerics.training import make_optimizer, one_thread, unless_refused, weights_of
from tritopt.tools.storage import TRUTH, StorageFormat

DIGITS = "digits"
"""Name of the problem's only case."""
HIDDEN = 128
BATCH_SIZE = 32
TEST_SIZE = 360
DIGITS_SCALE = 2.0**12
"""Loss scale for fp16 gradients."""


class Digits(NamedTuple):
    """scikit-learn's 1797 handwritten digits, standardised; images fp64 [n, 64], labels [n]."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    @classmethod
    def load(cls) -> Digits:
        """Load them, shuffle and split. ImportError says how to get scikit-learn."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("the digits need scikit-learn: pip install 'tritopt[numerics]'") from error
        digits = load_digits()
        images, labels = torch.from_numpy(digits.data), torch.from_numpy(digits.target)
        order = torch.randperm(
            len(labels), generator=torch.Generator("cpu").manual_seed(0), dtype=torch.int64, device="cpu"
        ).to(device())
        images, labels = images.to(device(), torch.float64)[order], labels.to(device())[order]
        deviation = images[TEST_SIZE:].std(dim=0)
        images = (images - images[TEST_SIZE:].mean(dim=0)) / torch.where(deviation == 0, 1.0, deviation)
        return cls(images[TEST_SIZE:], labels[TEST_SIZE:], images[:TEST_SIZE], labels[:TEST_SIZE])


class TrainedDigits(NamedTuple):
    """Training on the digits in one format."""

    start: torch.Tensor
    """All weights before the first step, one after another, fp64."""
    weights: torch.Tensor
    """All weights after the last step, one after another, fp64."""
    loss: float
    """Cross-entropy over the training images, after the last step."""
    accuracy: float
    """Share of the test images that are recognised."""
    counted: Bytes


@one_thread()
def train_digits(
    cls: type[optim.Optimizer], fmt: StorageFormat, digits: Digits, steps: int, lr: float
) -> TrainedDigits:
    """Train a network of one hidden layer on its stored weights; its arithmetic is fp32, or fp64 for the truth."""
    compute = torch.float64 if fmt.dtype == torch.float64 else torch.float32
    random = torch.Generator("cpu").manual_seed(0)
    params = [torch.nn.Parameter(w.to(device(), fmt.dtype)) for w in _first_weights(random)]
    opt = make_optimizer(cls, params, fmt, lr=lr)
    scale = torch.tensor(DIGITS_SCALE if fmt.dtype == torch.float16 else 1.0, dtype=torch.float32, device=device())
    if fmt.dtype == torch.float16:
        opt.grad_scale = scale  # type: ignore[attr-defined]
    images, labels, test_images, test_labels = digits
    images, test_images = images.to(compute), test_images.to(compute)

    def logits(of: torch.Tensor) -> torch.Tensor:
        hidden, hidden_bias, out, out_bias = (param.to(compute) for param in params)
        return functional.linear(functional.linear(of, hidden, hidden_bias.view(-1)).relu(), out, out_bias.view(-1))

    start = weights_of(opt)
    batches: Sequence[torch.Tensor] = ()
    for step in range(steps):
        at = step % (len(images) // BATCH_SIZE)
        if at == 0:
            order = torch.randperm(len(images), generator=random, dtype=torch.int64, device="cpu")
            batches = order.to(device()).split(BATCH_SIZE)
        opt.zero_grad()
        torch.autograd.backward(functional.cross_entropy(logits(images[batches[at]]), labels[batches[at]]) * scale)
        opt.step()
    weights = weights_of(opt)
    with torch.no_grad():
        loss = float(functional.cross_entropy(logits(images), labels))
        accuracy = float((logits(test_images).argmax(dim=1) == test_labels).float().mean())
    return TrainedDigits(start, weights, loss, accuracy, counted_bytes(opt))


def _first_weights(random: torch.Generator) -> list[torch.Tensor]:
    """Draw bf16 numbers, so that all formats begin in one place. Biases are columns: GroupAdaGrad takes no vectors."""
    shapes = ((HIDDEN, 64), (HIDDEN, 1), (10, HIDDEN), (10, 1))
    bounds = (64**-0.5, 64**-0.5, HIDDEN**-0.5, HIDDEN**-0.5)
    return [
        torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=random).bfloat16()
        for shape, bound in zip(shapes, bounds, strict=True)
    ]


def digits_result(
    cls: type[optim.Optimizer], fmt: StorageFormat, digits: Digits, steps: int, lr: float, truth: TrainedDigits
) -> FormatResult:
    """Train on the digits in one format, and compare with the truth."""
    trained, refused = truth, None
    if fmt is not TRUTH:
        trained, refused = unless_refused(lambda: train_digits(cls, fmt, digits, steps, lr))
    outcome: dict[str, Any] = {"refused": refused}
    if trained is not None:
        outcome = {
            **trained.counted._asdict(),
            **Movement.of(trained.weights, truth.weights, truth.start)._asdict(),
            "loss": trained.loss,
            "accuracy": trained.accuracy,
        }
    decay = inspect.signature(cls).parameters["weight_decay"].default
    return FormatResult(
        **described(cls, fmt), problem="digits", case=DIGITS, steps=steps, lr=lr, weight_decay=decay, **outcome
    )
