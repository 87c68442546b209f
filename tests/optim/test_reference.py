"""The reference on the CPU: in NumPy's arrays or in torch's tensors, built or replayed, it is one and the same."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

import tritopt
from tests.support.training import CLASSES, OF_MATRICES, options_of
from tritopt import optim
from tritopt.engine import arrays

SHAPES = ((5,), (3, 4), (), (0, 3), (130,), (2, 64))
SPECIAL = torch.tensor([0.0, -0.0, 1e-42, -1e-42, 3e38, float("inf"), float("-inf"), float("nan"), 1.0])


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator("cpu").manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    params.append(torch.nn.Parameter(SPECIAL.to(dtype).clone()))
    params.append(torch.nn.Parameter(torch.randn(4, 6, generator=generator).to(dtype).t()))
    return params


def train(cls: Any, dtype: torch.dtype, n_steps: int = 3, **options: Any) -> list[torch.Tensor]:
    params = parameters(dtype)
    if cls in OF_MATRICES:
        params = [p for p in params if p.dim() == 2]
    opt = cls(params, fused=False, **options_of(cls), **options)
    generator = torch.Generator("cpu").manual_seed(1)
    for step in range(n_steps):
        for param in params:
            grad = torch.randn(param.shape, generator=generator).to(dtype)
            if param.shape == SPECIAL.shape:
                grad = SPECIAL.to(dtype).roll(step)
            param.grad = grad if param.dim() < 2 else grad.t().contiguous().t()
        opt.step()
    states = [value for state in opt.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*params, *states) if isinstance(tensor, torch.Tensor)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """All NaN are one, since their bits are the processor's affair."""
    plain = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor).contiguous().view(-1)
    return plain.view(torch.int64 if plain.dtype == torch.float64 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "clip_value": 0.5}], ids=["plain", "decay and clip"])
@pytest.mark.parametrize("cls", CLASSES)
def test_arrays_give_the_bits_of_tensors(
    cls: Any, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cls is optim.GroupAdaGrad:
        options = {name: value for name, value in options.items() if name != "weight_decay"}
    ours = train(cls, dtype, **options)
    monkeypatch.setattr("tritopt.rule.arrays_of", lambda task: None)
    theirs = train(cls, dtype, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(bits(a), bits(b))


def n_of_arrays(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    are_arrays: list[bool] = []

    def recording(task: Any) -> Any:
        made = arrays.arrays_of(task)
        are_arrays.append(made is not None)
        return made

    monkeypatch.setattr("tritopt.rule.arrays_of", recording)
    return are_arrays


def test_what_is_no_plain_small_tensor_stays_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    are_arrays = n_of_arrays(monkeypatch)
    params = [
        torch.nn.Parameter(torch.ones(8)),
        torch.nn.Parameter(torch.ones(arrays.MAX_ELEMENTS + 1)),
        torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16)),
        torch.nn.Parameter(torch.ones(8)),
        torch.nn.Parameter(torch.ones(8)),
    ]
    for param in params:
        param.grad = torch.ones_like(param)
    params[3].grad = torch._neg_view(torch.ones(8))
    params[4].grad = torch._efficientzerotensor((8,), dtype=torch.float32)
    optim.SGD(params, lr=1.0, fused=False).step()
    assert are_arrays == [True, False, False, False, False]
    assert [param[0].item() for param in params] == [0.0, 0.0, 0.0, 2.0, 1.0]


class Halved(tritopt.AdamW):
    """A user's, whose own words are torch's."""

    def reference(self, w: Any, g: Any, state: Any, s: Any) -> Any:
        return torch.clamp(w - 0.5 * torch.sign(g), -1.0, 1.0), state


def test_a_reference_that_overrides_a_marked_one_gets_tensors() -> None:
    opt = Halved(use_fused_step=False)
    weight, grad = torch.ones(4), torch.ones(4)
    opt.update([0], [weight], [grad], [opt.create_state(0, weight)])
    assert weight.tolist() == [0.5] * 4


@pytest.mark.parametrize("fused", [False, None])
def test_autograd_learns_of_what_arrays_wrote(fused: bool | None) -> None:
    param = torch.nn.Parameter(torch.ones(4))
    opt = optim.AdamW([param], fused=fused)
    for _ in range(3):
        param.grad = torch.ones(4)
        before = param._version
        loss = (param * param).sum()
        opt.step()
        assert param._version > before
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_the_reference_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    from tritopt.optim.step import build, stepper

    built: list[int] = []
    original = build.Build

    def building(*arguments: Any, **named: Any) -> Any:
        built.append(1)
        return original(*arguments, **named)

    monkeypatch.setattr(stepper, "Build", building)
    params = parameters(torch.float32)[:3] + parameters(torch.bfloat16)[:3]
    opt = optim.AdamW(params, fused=False, max_grad_norm=1.0)
    for _ in range(4):
        for param in params:
            param.grad = torch.ones_like(param)
        opt.step()
    assert len(built) == 1
    params[0].data = params[0].data.clone()
    opt.step()
    assert len(built) == 2


def test_a_replayed_reference_follows_what_a_built_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over masters, states in fewer bits, clips, and gradients that come and go."""

    def run() -> list[torch.Tensor]:
        params = parameters(torch.bfloat16)
        opt = optim.AdamW(params, fused=False, state_dtype="bf16", max_grad_norm=1.0, weight_decay=0.1)
        generator = torch.Generator("cpu").manual_seed(1)
        for step in range(6):
            for i, param in enumerate(params[:6]):
                grad = torch.randn(param.shape, generator=generator).to(torch.bfloat16)
                param.grad = None if step == 3 and i == 1 else grad
            if step == 4:
                opt.param_groups[0]["lr"] = 0.5
            opt.step()
        states = [value for state in opt.state.values() for value in state.values()]
        return [tensor.detach().clone() for tensor in (*params, *states)]

    ours = run()
    monkeypatch.setattr("tritopt.optim.step.build.Build.next", lambda *arguments: None)
    theirs = run()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


class InPlace(tritopt.SGD):
    """A user's, who writes to what it is given, as code for PyTorch does."""

    def reference(self, w: Any, g: Any, state: Any, s: Any) -> Any:
        return w - g.mul_(s.lr), state


class TorchInPlace(optim.Optimizer):
    rule = InPlace
    arguments: ClassVar = {}

    def __init__(self, params: Any, lr: float = 0.5, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "fused": False}, options)  # type: ignore[arg-type]


def test_a_reference_that_writes_to_its_gradient_does_not_write_to_the_callers() -> None:
    weight, grad = torch.ones(4), torch.ones(4)
    opt = InPlace(learning_rate=0.5, use_fused_step=False)
    opt.update([0], [weight], [grad], [None])
    assert weight.tolist() == [0.5] * 4
    assert grad.tolist() == [1.0] * 4
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    TorchInPlace([param]).step()
    assert param.tolist() == [0.5] * 4
    assert param.grad.tolist() == [1.0] * 4
