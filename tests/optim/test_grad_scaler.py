"""torch.amp.GradScaler: scale, overflow and growth through grad_scale and found_inf, without waiting for the device."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tritopt.optim
from tests.support.training import (
    EVERY_CLASS,
    assert_follows,
    assert_same,
    clone,
    counts,
    everything,
    named,
    options_of,
    parameters,
    train,
    twin,
)
from tritopt.optim import SGD, Adam, AdamW

Class: TypeAlias = Any  # a class of tritopt.optim, with a signature of its own
OVERFLOWS = (0, 3)  # the steps; the first is one of them, when there are no states yet


def make_scaler() -> torch.amp.GradScaler:
    """Grows after two good steps."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)


def loss_of(params: Sequence[torch.Tensor], step: int, overflow: bool) -> torch.Tensor:
    """A loss whose gradients depend on the step only."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(1000 + step)
    terms = []
    for p in params:
        drawn = torch.randn(p.shape, generator=generator).to(p.dtype)
        terms.append((p * drawn).sum())
    loss = torch.stack([term.float() for term in terms]).sum()
    return loss * math.inf if overflow else loss


def scaled_steps(
    opt: Any,
    params: Sequence[torch.Tensor],
    steps: Sequence[int],
    scaler: torch.amp.GradScaler | None = None,
    unscale: bool = False,
) -> list[float]:
    """Train through a scaler; returns its scales."""
    scaler, scales = scaler or make_scaler(), []
    for step in steps:
        opt.zero_grad()
        scaler.scale(loss_of(params, step, step in OVERFLOWS)).backward()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def plain_steps(opt: Any, params: Sequence[torch.Tensor], steps: Sequence[int]) -> None:
    """The good steps, without a scaler."""
    for step in steps:
        if step not in OVERFLOWS:
            opt.zero_grad()
            loss_of(params, step, False).backward()
            opt.step()


@EVERY_CLASS
@pytest.mark.parametrize("fused", [None, False], ids=["fused", "reference"])
def test_a_scaled_run_is_the_run_of_its_good_steps(cls: Class, fused: bool | None) -> None:
    """Bit for bit, the scale being a power of two; capturable forms scalars the same way."""
    params, expected = parameters(), parameters()
    opt = cls(named(params), fused=fused, **options_of(cls))
    plain = cls(named(expected), fused=fused, **options_of(cls, capturable=True))
    scales = scaled_steps(opt, params, range(6))
    plain_steps(plain, expected, range(6))
    assert scales == [512.0, 512.0, 1024.0, 512.0, 512.0, 1024.0]
    assert_same(everything(opt), everything(plain))
    assert counts(opt, params) == [4.0] * 3


@pytest.mark.parametrize(
    ("cls", "options"),
    [(Adam, {"weight_decay": 0.1}), (AdamW, {"amsgrad": True}), (AdamW, {}), (SGD, {"momentum": 0.9})],
)
@pytest.mark.parametrize("unscale", [False, True])
def test_as_torchs_optimizer_under_the_same_scaler(cls: Class, options: dict[str, Any], unscale: bool) -> None:
    start, trained, scales = parameters(), [], []
    # torch's fused SGD makes all weights NaN if the first step overflows: it begins a buffer that it never fills.
    for kind, fused in ((cls, None), (twin(cls), cls is not SGD)):
        params = clone(start)
        opt = kind(params, lr=0.02, fused=fused, **options)
        scales.append(scaled_steps(opt, params, range(8), unscale=unscale))
        trained.append(params)
    assert scales[0] == scales[1]
    assert len(set(scales[0])) > 2
    assert_follows(trained[0], trained[1], start, 6)


@EVERY_CLASS
def test_a_skipped_step_leaves_everything_as_it_was(cls: Class) -> None:
    params = parameters(torch.bfloat16)
    opt = cls(params, **options_of(cls))
    scaled_steps(opt, params, range(3))
    before = everything(opt)
    scaled_steps(opt, params, [OVERFLOWS[1]])
    assert_same(everything(opt), before)


def test_one_element_that_overflows_skips_all() -> None:
    params = parameters()
    opt, scaler = AdamW(params), make_scaler()
    scaler.scale(loss_of(params, 1, False)).backward()
    assert params[2].grad is not None
    params[2].grad[0, 1] = math.nan
    before = [p.detach().clone() for p in params]
    scaler.step(opt)
    assert_same([p.detach() for p in params], before)
    assert not any(float(state["step"]) for state in opt.state.values())
    assert not any(state["exp_avg"].any() for state in opt.state.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_parameters(dtype: torch.dtype) -> None:
    """torch's scaler refuses to unscale fp16 gradients; with a fused optimizer it need not."""
    params, expected = parameters(dtype), parameters(dtype)
    opt, plain = AdamW(params, lr=0.01), AdamW(expected, lr=0.01, capturable=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for step in (1, 2):
        opt.zero_grad()
        scaler.scale(loss_of(params, step, False)).backward()
        scaler.step(opt)
        scaler.update()
    plain_steps(plain, expected, (1, 2))
    assert_same(everything(opt), everything(plain))


@pytest.mark.parametrize("unscale", [False, True])
def test_max_grad_norm_sees_unscaled_gradients(unscale: bool) -> None:
    params, expected = parameters(), parameters()
    opt = AdamW(params, lr=0.01, max_grad_norm=0.5)
    plain = AdamW(expected, lr=0.01, max_grad_norm=0.5, capturable=True)
    for steps in (range(3), range(3, 6)):
        scaler = make_scaler()
        scaled_steps(opt, params, steps, scaler, unscale)
        plain_steps(plain, expected, steps)
        assert opt.grad_norm is not None
        assert plain.grad_norm is not None
        assert torch.equal(opt.grad_norm, plain.grad_norm)
        assert opt.grad_norm > 1  # there was something to clip
    assert_same(everything(opt), everything(plain))
    scaled_steps(opt, params, [OVERFLOWS[1]])
    assert opt.grad_norm is not None
    assert not opt.grad_norm.isfinite()
    assert_same(everything(opt), everything(plain))


def test_clipped_by_hand_between_unscale_and_step() -> None:
    start, trained = parameters(), []
    for kind, clip in ((AdamW, tritopt.clip_grad_norm_), (torch.optim.AdamW, torch.nn.utils.clip_grad_norm_)):
        params = clone(start)
        opt, scaler = kind(params, lr=0.01), make_scaler()
        for step in range(5):
            opt.zero_grad()
            scaler.scale(loss_of(params, step, step in OVERFLOWS)).backward()
            scaler.unscale_(opt)
            clip(params, 0.5)
            scaler.step(opt)
            scaler.update()
        trained.append(params)
    assert_follows(trained[0], trained[1], start, 3)


def test_several_groups_and_missing_gradients() -> None:
    params, expected = parameters(), parameters()
    opts: list[Any] = [
        AdamW(list[Any]([{"params": owned[:1], "lr": 0.05}, {"params": owned[1:], "betas": (0.5, 0.6)}]), capturable=c)
        for owned, c in ((params, False), (expected, True))
    ]
    scaled_steps(opts[0], params[:2], range(3))
    plain_steps(opts[1], expected[:2], range(3))
    scaled_steps(opts[0], params, range(3, 6))
    plain_steps(opts[1], expected, range(3, 6))
    assert_same(everything(opts[0]), everything(opts[1]))
    assert [float(opts[0].state[p]["step"]) for p in params] == [4.0, 4.0, 2.0]


def test_two_optimizers_under_one_scaler() -> None:
    """One overflows, the other steps."""
    good, bad = parameters(seed=1), parameters(seed=2)
    opts, scaler = [AdamW(good), AdamW(bad)], make_scaler()
    before = [p.detach().clone() for p in bad]
    for params, opt, overflow in ((good, opts[0], False), (bad, opts[1], True)):
        scaler.scale(loss_of(params, 1, overflow)).backward()
        scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_same([p.detach() for p in bad], before)
    assert [float(opts[0].state[p]["step"]) for p in good] == [1.0] * 3


def test_a_scaler_that_is_switched_off() -> None:
    params, expected = parameters(), parameters()
    opt, plain = AdamW(params), AdamW(expected)
    scaled_steps(opt, params, (1, 2), torch.amp.GradScaler("cpu", enabled=False))
    plain_steps(plain, expected, (1, 2))
    assert_same(everything(opt), everything(plain))


def test_plain_steps_after_scaled_ones() -> None:
    """The scaler leaves nothing behind on the optimizer."""
    params, expected = parameters(), parameters()
    opt, plain = AdamW(params, lr=0.01), AdamW(expected, lr=0.01, capturable=True)
    scaled_steps(opt, params, range(3))
    assert not hasattr(opt, "found_inf")
    train(opt, params, range(10, 12))
    plain_steps(plain, expected, range(3))
    train(plain, expected, range(10, 12))
    assert_same(everything(opt), everything(plain))


# No host synchronisation.


class NoWaiting(TorchDispatchMode):
    """Refuses operations that bring a value to the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert name not in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"), name
        return func(*args, **(kwargs or {}))


def forbid_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for what asks in Python, whichever way; the interpreter of kernels itself uses none of them."""

    def refuse(name: str) -> Any:
        def method(*args: Any) -> Any:
            raise AssertionError(f"Tensor.{name} waits for the device")

        return method

    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "numpy", "cpu", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, refuse(name))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"clip_value": 0.1}], ids=str)
@EVERY_CLASS
def test_a_scaled_step_does_not_wait_for_the_device(
    cls: Class, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(torch.bfloat16)
    lr = 20 * options_of(cls)["lr"]  # seen in bf16
    opt = cls(params, lr=lr, **options)
    scale, found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    scaler = torch.amp.GradScaler("cpu")
    assert opt._step_supports_amp_scaling  # how torch's scaler knows that it need not look at found_inf itself
    assert "grad_scaler" not in inspect.signature(opt.step).parameters
    before = [p.detach().clone() for p in params]
    for step in range(2):
        scaler.scale(loss_of(params, 1 + step, False)).backward()
        opt.grad_scale, opt.found_inf = scale, found_inf
        with monkeypatch.context() as patch, NoWaiting():
            forbid_waiting(patch)
            opt.step()
    assert all(not torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_the_guard_against_waiting_works(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(())
    with monkeypatch.context() as patch:
        forbid_waiting(patch)
        for wait in (float, bool, int, torch.Tensor.item):
            with pytest.raises(AssertionError, match="waits for the device"):
                wait(x)
    with NoWaiting(), pytest.raises(AssertionError, match="aten::_local_scalar_dense"):
        x.item()
