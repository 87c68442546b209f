"""A small model, its losses, and what a Trainer holds of it: for the tests of tritopt.gluon."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

import tritopt

BATCH = 4


class Model(nn.Module):
    """Names: fc.weight, fc.bias, norm.weight, norm.bias, out.weight, out.bias."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm, self.out = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.fc(x)).tanh())  # type: ignore[no-any-return]


def batch_of(step: int, size: int = BATCH, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Inputs [size, 5] that depend on the step only."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(100 + step)
    return torch.randn(size, 5, generator=generator).to(dtype)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Sum over the samples, fp32 []."""
    output: torch.Tensor = model(x)
    return (output.float() - x[:, :3].float()).square().sum()


def train(trainer: Any, model: nn.Module, steps: range, size: int = BATCH) -> None:
    """Steps of a Trainer."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        loss = loss_of(model, batch_of(step, size, dtype))
        if trainer.loss_scaler is None:
            loss.backward()
        else:
            with trainer.scale_loss(loss) as scaled:
                scaled.backward()
        trainer.step(size)


def everything(trainer: Any) -> list[torch.Tensor]:
    """Copies of all weights and states, in the order of the parameters."""
    tensors = [param.detach().clone() for param in trainer.collect().values()]

    def add(value: Any) -> None:
        if isinstance(value, tuple):
            for item in value:
                add(item)
        elif value is not None:
            tensors.append(value.clone())

    states = trainer._updater.states
    for index in sorted(states):
        add(states[index])
    return tensors


def counts(trainer: Any) -> tuple[dict[Any, int], int]:
    """Counts of updates, by index and in all."""
    return dict(trainer.optimizer._index_update_count), trainer.optimizer.num_update


class Snapshot:
    """State of a Trainer that a step which fails must leave as it was."""

    def __init__(self, trainer: tritopt.Trainer) -> None:
        self._trainer = trainer
        self._grads = [None if p.grad is None else (p.grad, p.grad.clone()) for p in trainer.collect().values()]
        self._now, self._tensors = self._look(), everything(trainer)

    def _look(self) -> Any:
        opt = self._trainer.optimizer
        scaler = self._trainer.loss_scaler
        settings = opt.rescale_grad, opt.max_grad_norm, opt.learning_rate
        return counts(self._trainer), settings, None if scaler is None else scaler.state_dict()

    def check(self) -> None:
        """Compare."""
        assert self._look() == self._now
        for now, before in zip(everything(self._trainer), self._tensors, strict=True):
            assert torch.equal(now, before)
        for param, before_grad in zip(self._trainer.collect().values(), self._grads, strict=True):
            if before_grad is None:
                assert param.grad is None
            else:
                assert param.grad is before_grad[0]
                assert torch.equal(param.grad, before_grad[1])


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    """Bit for bit."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def save_for_ever(path: str, pipe: Any) -> None:
    """Steps and saves, one after the other, from what was saved before; tells of the first."""
    torch.set_num_threads(1)
    p = nn.Parameter(torch.zeros(1000))
    trainer = tritopt.Trainer([("p", p)], "adam", {"use_fused_step": False})
    if os.path.exists(path):
        trainer.load_states(path)
    while True:
        p.grad = torch.ones(1000)
        trainer.step(1)
        trainer.save_states(path)
        pipe.send(trainer.optimizer.num_update)
