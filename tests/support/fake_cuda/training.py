"""A training whose numbers do not depend on where, or when, it runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from tritopt import optim

SHAPES = ((7,), (3, 5), (2, 4))


class Training:
    """Some parameters, and an optimizer of them.

    Args:
        cls: of the optimizer.
        devices: of the parameters, in turn.
        dtype: of the parameters and their gradients.
        options: of the optimizer.
    """

    def __init__(
        self,
        cls: type[optim.Optimizer],
        devices: Sequence[str],
        dtype: torch.dtype = torch.float32,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        **options: Any,
    ) -> None:
        self.devices = [devices[i % len(devices)] for i in range(len(shapes))]
        self.params = [
            numbers(shape, seed).to(dtype).to(device).requires_grad_()
            for seed, (shape, device) in enumerate(zip(shapes, self.devices, strict=True))
        ]
        self.opt = cls(self.params, **options)

    def set_grads(self, number: int, present: Collection[int] | None = None) -> None:
        """New gradients, those of a step of this number, for the parameters at these positions; None: for all."""
        for i, param in enumerate(self.params):
            is_present = present is None or i in present
            grad = numbers(param.shape, 100 * number + i).to(param.dtype).to(param.device)
            # Made on the device, as backward makes it.
            param.grad = grad * 1 if is_present else None

    def step(self, number: int, present: Collection[int] | None = None) -> None:
        """Make one step."""
        self.set_grads(number, present)
        self.opt.step()

    def results(self) -> list[torch.Tensor]:
        """Weights, states and the gradients' norm."""
        states = [value for param in self.params for value in self.opt.state[param].values()]
        norm = self.opt.grad_norm
        values = [*self.params, *states, *([] if norm is None else [norm])]
        return [tensor.detach().cpu().clone() for tensor in values if isinstance(tensor, torch.Tensor)]


def on_cpu(
    cls: type[optim.Optimizer], steps: Sequence[Collection[int] | None], dtype: torch.dtype, **options: Any
) -> list[torch.Tensor]:
    """Weights that steps with gradients at these positions come to on the CPU."""
    training = Training(cls, ["cpu"], dtype, **options)
    for number, present in enumerate(steps):
        training.step(number, present)
    return training.results()


def numbers(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Normal ones, the same each time."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def assert_same(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Assert that tensors are equal bit by bit."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
