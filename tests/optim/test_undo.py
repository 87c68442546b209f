"""A step that fails, or is interrupted, anywhere: what was not updated is as it was, and the next step goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import tritopt
from tritopt import optim
from tritopt.optim import optimizer

PACKAGE = str(Path(tritopt.__file__).parent)


def make(cls: Any, fused: bool | None) -> tuple[list[torch.nn.Parameter], optim.Optimizer]:
    torch.manual_seed(0)
    shapes = [(torch.float32, (3, 2)), (torch.bfloat16, (4,)), (torch.float32, (5,)), (torch.bfloat16, (2, 2))]
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for dtype, shape in shapes]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
    return params, cls(groups, lr=0.01, fused=fused, max_grad_norm=1.0)


def set_grads(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def content(opt: optim.Optimizer, param: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    state = opt.state.get(param, {})
    return param.detach().clone(), {name: value.detach().clone() for name, value in state.items()}


class InterruptAt:
    """Raises KeyboardInterrupt at the n-th line of the package that runs; kernels, and what runs them, apart."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE) or "kernels" in name or "tools" in name:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self

    def run(self, call: Callable[[], object]) -> bool:
        """Whether the call was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


@pytest.mark.parametrize("n_before", [0, 1, 3], ids=["first step", "second step", "replayed step"])
@pytest.mark.parametrize(("cls", "fused"), [(optim.NAdam, None), (optim.AdamW, False)], ids=["kernels", "reference"])
def test_interrupts_anywhere(cls: Any, fused: bool | None, n_before: int) -> None:
    """A parameter was updated, and counted, or neither; and another step works."""
    lines, stride, n_interrupted, n_untouched = 1, 149, 0, 0
    while True:
        params, opt = make(cls, fused)
        for step in range(n_before):
            set_grads(params, step)
            opt.step()
        before = [content(opt, param) for param in params]
        set_grads(params, n_before)
        if not InterruptAt(lines).run(lambda opt=opt: optimizer.Optimizer._update(opt)):  # type: ignore[misc]
            break
        n_interrupted += 1
        for param, (weight, state) in zip(params, before, strict=True):
            now, state_now = content(opt, param)
            if "step" in state_now and float(state_now["step"]) > n_before:
                continue
            assert torch.equal(now, weight)
            n_untouched += 1
            # What a first step has made is what a parameter without a step would get.
            first = {name: torch.zeros_like(value) for name, value in state_now.items()}
            first.update(mu_product=torch.ones(()), master_param=weight.float())
            for name, value in state_now.items():
                assert torch.equal(value, state.get(name, first[name])), (lines, name)
        opt.step()
        for param, (weight, _) in zip(params, before, strict=True):
            assert not torch.equal(param, weight)
            assert n_before + 1 <= float(opt.state[param]["step"]) <= n_before + 2
        lines += stride
    assert n_interrupted > 3
    assert n_untouched > 0


def _error(*arguments: Any, **options: Any) -> Any:
    raise torch.OutOfMemoryError("no memory (made up)")


@pytest.mark.parametrize(
    "place", ["tritopt.engine.plan.run_phases", "tritopt.engine.plan.upload_table", "tritopt.engine.plan._as_dense"]
)
@pytest.mark.parametrize("n_before", [0, 2])
@pytest.mark.parametrize("cls", [optim.AdamW, optim.NAdam, optim.SGD, optim.LAMB])
def test_a_launch_that_fails_leaves_counts(
    cls: Any, n_before: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = []
    for fails in (True, False):
        params, opt = make(cls, None)
        opt.max_grad_norm = None
        for step in range(4):
            set_grads(params, step)
            if fails and step == n_before:
                before = [content(opt, param) for param in params]
                monkeypatch.setattr(place, _error)
                monkeypatch.setattr("tritopt.optim.step.replay.run_phases", _error)
                with pytest.raises(torch.OutOfMemoryError):
                    opt.step()
                monkeypatch.undo()
                for param, (weight, state) in zip(params, before, strict=True):
                    now, state_now = content(opt, param)
                    assert torch.equal(now, weight)
                    assert all(torch.equal(state_now[name], state[name]) for name in state)
            opt.step()
        contents.append([content(opt, param) for param in params])
    for (weight, state), (expected, expected_state) in zip(*contents, strict=True):
        assert torch.equal(weight, expected)
        assert all(torch.equal(state[name], expected_state[name]) for name in expected_state)


def test_what_was_launched_before_a_failure_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of one dtype are updated by a launch of their own: the other's failure does not take that back."""
    from tritopt.engine.driver import Apply

    params, opt = make(optim.AdamW, None)
    opt.max_grad_norm = None
    opt.param_groups[1]["fused"] = False
    set_grads(params, 0)
    opt.step()
    before = [content(opt, param) for param in params]
    launch, n_calls = Apply.launch, 0

    def fail_later(self: Any, *arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 1:
            _error()
        return launch(self, *arguments)

    monkeypatch.setattr(Apply, "launch", fail_later)
    with pytest.raises(torch.OutOfMemoryError):
        opt.step()
    for param, (weight, state) in zip(params, before, strict=True):
        now, state_now = content(opt, param)
        is_updated = not torch.equal(now, weight)
        assert float(state_now["step"]) == float(state["step"]) + is_updated


@pytest.mark.parametrize("failing", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("n_before", [0, 2])
@pytest.mark.parametrize("cls", [optim.AdamW, optim.LAMB, optim.GroupAdaGrad, optim.Adafactor])
def test_what_a_kernel_has_updated_is_counted(
    cls: Any, n_before: int, failing: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of every kind: tensors of two dtypes are updated by launches of their own, of which the second fails."""
    params = [torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))]
    opt = cls(params, lr=0.01)
    for step in range(n_before):
        set_grads(params, step)
        opt.step()
    before = [param.detach().clone() for param in params]
    set_grads(params, n_before)
    phase, n_calls = type(cls.rule().phases[-1]), 0
    launch = phase.launch

    def fail_later(self: Any, *arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2 * len(opt.rule().phases):
            raise failing("made up")
        return launch(self, *arguments)

    monkeypatch.setattr(phase, "launch", fail_later)
    with pytest.raises(failing):
        opt.step()
    is_updated = [not torch.equal(param, old) for param, old in zip(params, before, strict=True)]
    assert is_updated == [True, False]
    assert float(opt.state[params[0]]["step"]) == n_before + 1


@pytest.mark.parametrize("use_fused_step", [True, False])
@pytest.mark.parametrize("failing", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_counts_of_the_other_face(failing: type[BaseException], use_fused_step: bool, monkeypatch: Any) -> None:
    """Counted is what was updated."""
    opt = tritopt.create("adam", use_fused_step=use_fused_step)
    updater = tritopt.get_updater(opt)
    weights = [torch.ones(3), torch.ones(2)]
    grads = [torch.ones(3), torch.ones(2)]
    updater([0, 1], grads, weights)
    reference, n_calls = type(opt).reference, 0

    def fail(*arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if use_fused_step or n_calls == 2:
            raise failing("made up")
        return reference(*arguments)

    before = [weight.clone() for weight in weights]
    if use_fused_step:
        monkeypatch.setattr("tritopt.mxnet.replay.run_phases", fail)
    else:
        monkeypatch.setattr(type(opt), "reference", fail)
    with pytest.raises(failing):
        updater([0, 1], grads, weights)
    updated = [not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)]
    assert updated == [not use_fused_step, False]
    assert opt._index_update_count == {0: 1 + updated[0], 1: 1}
    assert opt.num_update == 1 + updated[0]


def test_the_norm_of_a_step_without_gradients_is_none() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    opt = optim.SGD([param], lr=0.1, max_grad_norm=1.0)
    param.grad = torch.ones(3) * 5
    opt.step()
    assert opt.grad_norm is not None
    param.grad = None
    opt.step()
    assert opt.grad_norm is None
