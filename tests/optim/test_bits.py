"""Tensors whose memory does not hold their values, because a bit says that they are negated, or 0 everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tritopt
from tritopt import optim

CLASSES = [optim.SGD, optim.AdamW, optim.LAMB, optim.Adafactor, optim.GroupAdaGrad]


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """Equal to the tensor, with the opposite of it in memory."""
    return torch._neg_view(-tensor)


def no_memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)


def train(
    cls: Any, dtype: torch.dtype, make_grad: Any, fused: bool | None, make_weight: Any, is_warm: bool, **options: Any
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(make_weight(torch.randn(3, 2).to(dtype))) for _ in range(2)]
    opt = cls(params, lr=0.1, fused=fused, **options)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for i, param in enumerate(params):
            grad = torch.randn(3, 2, generator=generator).to(dtype)
            param.grad = make_grad(grad) if i == 1 and (step >= 2 if is_warm else step < 2) else grad
        opt.step()
    return [param.detach().resolve_neg() for param in params]


@pytest.mark.parametrize("is_warm", [False, True], ids=["first", "replayed"])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", CLASSES)
def test_negated_gradients(cls: Any, dtype: torch.dtype, fused: bool | None, is_warm: bool) -> None:
    ours = train(cls, dtype, negated, fused, torch.clone, is_warm)
    expected = train(cls, dtype, torch.clone, fused, torch.clone, is_warm)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("is_warm", [False, True], ids=["first", "replayed"])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("cls", CLASSES)
def test_gradients_of_zeros_without_memory(cls: Any, fused: bool | None, is_warm: bool) -> None:
    ours = train(cls, torch.float32, no_memory, fused, torch.clone, is_warm, max_grad_norm=1.0)
    expected = train(cls, torch.float32, torch.zeros_like, fused, torch.clone, is_warm, max_grad_norm=1.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"capturable": True}, {"max_grad_norm": 0.5}, {"master": "kahan"}, {"master": None}], ids=str
)
def test_negated_weights(dtype: torch.dtype, fused: bool | None, options: dict[str, Any]) -> None:
    ours = train(optim.AdamW, dtype, torch.clone, fused, negated, False, **options)
    expected = train(optim.AdamW, dtype, torch.clone, fused, torch.clone, False, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_autograd_makes_them() -> None:
    """A phase that is learnt: the gradient of a parameter behind a conj has the bit."""
    results = []
    for cls in (torch.optim.SGD, optim.SGD):
        phase = torch.nn.Parameter(torch.tensor(1.0))
        opt: Any = cls([phase], lr=0.01)
        for _ in range(3):
            opt.zero_grad()
            z = torch.complex(torch.zeros(()), phase).conj() * (2 + 1j)
            ((z - (1 - 3j)).abs() ** 2).backward()
            assert phase.grad is not None
            assert phase.grad.is_neg()
            opt.step()
        results.append(phase.item())
    assert results[0] == pytest.approx(results[1], rel=1e-6)


@pytest.mark.parametrize("make", [negated, no_memory])
def test_the_norm_and_its_clip(make: Any) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(3)
    params[0].grad = make(torch.full((3,), 2.0))
    expected = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for param, ours in zip(expected, params, strict=True):
        assert ours.grad is not None
        param.grad = ours.grad.clone()
    theirs = torch.nn.utils.clip_grad_norm_(expected, 0.5)
    assert float(tritopt.clip_grad_norm_(params, 0.5)) == pytest.approx(float(theirs), rel=1e-6)
    for param, other in zip(params, expected, strict=True):
        assert param.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(param.grad.clone(), other.grad)


@pytest.mark.parametrize("use_fused_step", [True, False])
@pytest.mark.parametrize("make", [negated, no_memory])
def test_the_other_face(make: Any, use_fused_step: bool) -> None:
    results = []
    for change in (make, lambda grad: make(grad).clone()):
        weight, grad = torch.arange(4.0), torch.full((4,), 0.5)
        opt = tritopt.create("adam", use_fused_step=use_fused_step, learning_rate=0.1)
        updater = tritopt.get_updater(opt)
        for _ in range(2):
            updater(0, change(grad), weight)
        results.append(weight)
    assert torch.equal(*results)


@pytest.mark.parametrize("lazy", [True, False])
def test_negated_rows(lazy: bool) -> None:
    results = []
    for make in (negated, torch.clone):
        weight = torch.arange(12.0).view(4, 3)
        values = make(torch.full((2, 3), 0.5))
        grad = torch.sparse_coo_tensor(torch.tensor([[1, 3]]), values, (4, 3), check_invariants=True)
        opt = tritopt.create("sgd", lazy_update=lazy, learning_rate=0.1, momentum=0.9)
        updater = tritopt.get_updater(opt)
        for _ in range(2):
            updater(0, grad, weight)
        results.append(weight)
    assert torch.equal(*results)


@pytest.mark.parametrize("place", ["weight", "state"])
def test_zeros_without_memory_cannot_be_written_to(place: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    opt = optim.AdamW([param])
    param.grad = torch.ones(3)
    opt.step()
    if place == "weight":
        param.data = no_memory(param.data)
    else:
        opt.state[param]["exp_avg"] = no_memory(param.data)
    with pytest.raises(ValueError, match=f"the {place} is a tensor of zeros that has no memory"):
        opt.step()
    assert float(opt.state[param]["step"]) == 1
