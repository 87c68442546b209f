"""A captured step, replayed: only on a GPU. tests/optim/test_capturable.py has the arithmetic of it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from tritopt import optim

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
CLASSES = [
    cls
    for cls in vars(optim).values()
    if inspect.isclass(cls) and issubclass(cls, optim.Optimizer) and hasattr(cls, "rule")
]


def problem(cls: Any, **options: Any) -> tuple[list[torch.Tensor], Any]:
    torch.manual_seed(0)
    params = [torch.randn(33, 65, dtype=torch.bfloat16), torch.randn(5, 7)]
    for param in params:
        param.requires_grad_()
        param.grad = torch.zeros_like(param)
    return params, cls(params, lr=torch.tensor(0.01), capturable=True, **options)


def fill(params: list[torch.Tensor], step: int) -> None:
    generator = torch.Generator("cuda").manual_seed(step)
    for param in params:
        assert param.grad is not None
        param.grad.copy_(torch.randn(param.shape, generator=generator, device="cuda"))


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_replayed_steps_are_steps(cls: Any, max_grad_norm: float | None) -> None:
    expected, eager = problem(cls, max_grad_norm=max_grad_norm)
    actual, captured = problem(cls, max_grad_norm=max_grad_norm)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(3):
            fill(actual, step)
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(6):
        fill(expected, step)
        if step == 4:
            eager.param_groups[0]["lr"].fill_(0.5)
            captured.param_groups[0]["lr"].fill_(0.5)
        eager.step()
        if step > 2:
            fill(actual, step)
            graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert captured.state[actual[0]]["step"] == 6
    assert torch.equal(captured.grad_norm, eager.grad_norm) if max_grad_norm else captured.grad_norm is None


def test_gradients_that_moved_into_the_graph_are_found() -> None:
    """Backward inside the capture puts them into the graph's own memory, so the tables are uploaded there."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64, requires_grad=True)
    opt = optim.AdamW([weight], lr=1e-2, capturable=True, max_grad_norm=1.0)
    x = torch.randn(8, 64)

    def train() -> None:
        opt.zero_grad(set_to_none=True)
        (x @ weight).square().mean().backward()
        opt.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(side)
    before = weight.detach().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train()
    assert torch.equal(weight, before)
    losses = []
    for _ in range(20):
        graph.replay()
        losses.append((x @ weight).square().mean().item())
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capturing_without_capturable_is_refused() -> None:
    weight = torch.randn(4, requires_grad=True)
    weight.grad = torch.ones(4)
    opt = optim.AdamW([weight])
    opt.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capturable is False"), torch.cuda.graph(graph):
        opt.step()
