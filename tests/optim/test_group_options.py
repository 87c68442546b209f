"""Hyperparameters are read again where they have changed, and only there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tritopt import optim
from tritopt.engine import walk
from tritopt.optim.step import group_options as module
from tritopt.optim.step.group_options import OptionsByGroup
from tritopt.optim.step.scalar_table import HostScalars, host_scalars


@pytest.fixture(params=["c", "python"], autouse=True)
def language(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(walk, "_chosen", [walk.MEANT])


def optimizer(n: int = 3, cls: Any = optim.AdamW, **options: Any) -> optim.Optimizer:
    groups = [{"params": [torch.zeros(2, requires_grad=True)], "lr": 0.1 * (i + 1)} for i in range(n)]
    return cls(groups, **options)  # type: ignore[no-any-return]


def test_what_is_unchanged_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    opt, options = optimizer(), OptionsByGroup()
    options.refresh(opt, opt.param_groups)
    version = options.version
    monkeypatch.setattr(module, "_options_of", None)
    options.refresh(opt, opt.param_groups)
    assert options.version == version
    opt.param_groups[1]["lr"] = 0.7  # what a scheduler does
    options.refresh(opt, opt.param_groups)
    assert options.version == version + 1
    assert [options.of(group).rate for group in opt.param_groups] == [0.1, 0.7, 0.1 * 3]
    opt.param_groups[1]["lr"] = float("0.7")  # another object, the same number
    options.refresh(opt, opt.param_groups)
    assert options.version == version + 1


@pytest.mark.parametrize("lr", [float("nan"), float("inf")])
def test_a_rate_out_of_range_is_not_taken_up(lr: float) -> None:
    opt, options = optimizer(), OptionsByGroup()
    options.refresh(opt, opt.param_groups)
    opt.param_groups[1]["lr"] = lr
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Invalid learning rate: nan|lr=inf must be finite"):
            options.refresh(opt, opt.param_groups)
    opt.param_groups[1]["lr"] = 0.5
    options.refresh(opt, opt.param_groups)
    assert options.of(opt.param_groups[1]).rate == 0.5


def test_values_that_change_in_place_are_read_each_time() -> None:
    opt, options = optimizer(), OptionsByGroup()
    first, second, third = opt.param_groups
    first["betas"] = [0.9, 0.99]
    second["lr"] = torch.tensor(0.25, dtype=torch.float64)
    options.refresh(opt, opt.param_groups)
    rule, other = options.of(first).rule, options.of(third).rule
    first["betas"][0] = 0.5
    second["lr"].fill_(0.5)
    options.refresh(opt, opt.param_groups)
    assert options.of(first).rule is not rule
    assert options.of(second).rate == 0.5
    assert options.of(third).rule is other
    first["betas"], second["lr"] = (0.9, 0.99), 0.125
    options.refresh(opt, opt.param_groups)
    assert options.of(first).rule is rule
    assert options.of(second).rate == 0.125


def test_other_changes_are_read_in_full() -> None:
    opt, options = optimizer(), OptionsByGroup()
    options.refresh(opt, opt.param_groups)
    group = opt.param_groups[0]
    group["weight_decay"], group["lr"] = 0.5, 0.9
    options.refresh(opt, opt.param_groups)
    assert options.of(group).common[2] == 0.5
    assert options.of(group).rate == 0.9
    group["maximize"] = True
    options.refresh(opt, opt.param_groups)
    assert options.of(group).common[0] == -1.0
    opt.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.3})
    options.refresh(opt, opt.param_groups)
    assert len(options.rates) == 4
    opt.param_groups[0] = {**group, "lr": 0.4}
    options.refresh(opt, opt.param_groups)
    assert options.of(opt.param_groups[0]).rate == 0.4


CLASSES = [cls for cls in vars(optim).values() if isinstance(cls, type) and hasattr(cls, "rule")]


@pytest.mark.parametrize("cls", CLASSES)
def test_rates_in_a_vector_give_the_rows_that_one_by_one_give(cls: Any) -> None:
    """Equality is to the bit: a resumed run starts with the slow way."""
    groups = [{"params": [torch.ones(2, 2, requires_grad=True)], "lr": 0.01 * 1.37**i} for i in range(5)]
    decay = 0.0 if cls is optim.GroupAdaGrad else 0.01  # which has none
    groups.append({"params": [torch.ones(2, 2, requires_grad=True)], "lr": 0.01, "weight_decay": decay})
    opt = cls(groups)
    for _ in range(3):
        for group in opt.param_groups:
            group["params"][0].grad = torch.full((2, 2), 0.5)
        opt.step()
    stepper = opt._stepper
    warm = stepper._last
    if warm is None:
        pytest.skip("no kernel for these")
    (plan,) = warm.plans
    actual = HostScalars(plan.by_group, plan.draws, warm.positions).table(stepper._options, stepper._scalar_states)
    expected = host_scalars(plan.by_group, stepper._options, stepper._scalar_states, plan.draws)
    assert actual[0] is expected[0]
    assert actual[1].values[actual[1].place_of].tolist() == expected[1].values[expected[1].place_of].tolist()
    # Members that are not alike go one by one, as a step finds out that counts them.
    stepper._scalar_states._exact[0], stepper._scalar_states._common = 9.0, None
    other = HostScalars(plan.by_group, plan.draws, warm.positions).table(stepper._options, stepper._scalar_states)
    again = host_scalars(plan.by_group, stepper._options, stepper._scalar_states, plan.draws)
    assert other[1].values.tolist() == again[1].values.tolist()


class Watcher:
    """Counts what a hook sees."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, opt: optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.seen.append((opt, args, kwargs))


def test_the_profiler_sees_a_step() -> None:
    opt = optimizer(1)
    opt.param_groups[0]["params"][0].grad = torch.ones(2)
    opt.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}


def test_hooks_see_a_step_as_it_was_called() -> None:
    opt, before, after = optimizer(1), Watcher(), Watcher()
    opt.param_groups[0]["params"][0].grad = torch.ones(2)
    opt.step()
    handles = [opt.register_step_pre_hook(before), opt.register_step_post_hook(after)]
    assert opt.step(closure=lambda: 5.0) == 5.0
    for watcher in (before, after):
        ((seen, args, kwargs),) = watcher.seen
        assert seen is opt
        assert args == (opt,)
        assert set(kwargs) == {"closure"}
    for handle in handles:
        handle.remove()
    opt.step()
    assert len(before.seen) == 1


@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD], ids=lambda cls: cls.__name__)
def test_a_bound_that_comes_and_goes_between_steps(cls: Any) -> None:
    """A step without a bound has a preamble that does not clip, also where it is replayed."""
    pytest.importorskip("triton")
    grads = torch.linspace(-2, 2, 300)
    weights = []
    for fused in (None, False):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 300)) for _ in range(2)]
        opt = cls([{"params": [param]} for param in params], lr=0.1, weight_decay=0.1, fused=fused)
        for bounds in [(None, None)] * 3 + [(None, 0.25)] * 3 + [(0.125, 0.25)] + [(None, None)] * 3:
            for param, group, bound in zip(params, opt.param_groups, bounds, strict=True):
                param.grad, group["clip_value"] = grads.clone(), bound
            opt.step()
        weights.append(torch.stack([param.detach() for param in params]))
    assert torch.equal(*weights)
    assert not torch.equal(weights[0][0], weights[0][1])
