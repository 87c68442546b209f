"""Values of param_groups are checked in one way, wherever they come from."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from tests.optim.training import CLASSES, EVERY_CLASS, assert_same, everything, options_of, parameters, set_grads, train
from tritopt import optim

NAN = math.nan
BAD: dict[str, tuple[Any, ...]] = {
    "lr": (-1.0, NAN, math.inf, "x", None, [0.1]),
    "weight_decay": (-1.0, NAN, [1], "x"),
    "eps": (-1.0,),
    "betas": ((1.5, 0.999), (0.9, 1.0), (0.9,), (0.9, 0.9, 0.9, 0.9), 0.9),
    "momentum": (-0.5,),
    "clip_value": (-1.0, NAN, 0.0, "x"),
    "maximize": ("no", 2),
    "nesterov": ("no",),
    "amsgrad": ("no",),
    "master": ("spit8", 8),
    "state_dtype": ("fp4", {"exp_avg": "fp4"}),
    "multi_precision": ("yes",),
}


def cases() -> list[Any]:
    found = []
    for cls in CLASSES:
        group = cls(parameters()).param_groups[0]
        for name, values in BAD.items():
            takes_pair = isinstance(group.get(name), tuple) and name == "eps"  # Adafactor's
            if name in group and not takes_pair:
                found += [pytest.param(cls, name, value, id=f"{cls.__name__}-{name}={value!r}") for value in values]
    return found


EVERY_BAD_VALUE = pytest.mark.parametrize(("cls", "name", "value"), cases())


def refused(call: Callable[[], object]) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    return str(caught.value)


@EVERY_BAD_VALUE
def test_between_two_steps(cls: Any, name: str, value: Any) -> None:
    params = parameters(torch.bfloat16)
    opt = cls(params, **options_of(cls), fused=False)
    train(opt, params, range(2))
    set_grads(params, 2)
    before = [t.clone() for t in everything(opt)]
    good, opt.param_groups[0][name] = opt.param_groups[0][name], value
    for _ in range(2):
        message = refused(opt.step)
        assert "KeyError" not in message
        assert "zip()" not in message
        assert_same(everything(opt), before)
    opt.param_groups[0][name] = good
    opt.step()


@EVERY_BAD_VALUE
def test_in_a_checkpoint_and_in_a_new_group(cls: Any, name: str, value: Any) -> None:
    params = parameters()
    opt = cls(params, **options_of(cls), fused=False)
    train(opt, params, range(1))
    saved = copy.deepcopy(opt.state_dict())
    before = [t.clone() for t in everything(opt)]
    if name in saved["param_groups"][0] or name == "clip_value":
        saved["param_groups"][0][name] = value
        refused(lambda: opt.load_state_dict(saved))
    refused(lambda: opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))], name: value}))
    assert len(opt.param_groups) == 1
    assert_same(everything(opt), before)
    train(opt, params, range(1, 2))


@EVERY_CLASS
def test_what_a_group_lacks_is_named(cls: Any) -> None:
    params = parameters()
    opt = cls(params, **options_of(cls), fused=False)
    train(opt, params, range(1))
    set_grads(params, 1)
    rate = opt.param_groups[0].pop("lr")
    assert "lr" in refused(opt.step)
    opt.param_groups[0]["lr"] = rate
    opt.step()


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("value", [-1.0, NAN, -1e-9])
def test_a_replayed_step_refuses_a_rate_in_the_constructors_words(value: float, fused: bool | None) -> None:
    params = parameters()
    expected = refused(lambda: optim.AdamW(params, lr=value)) if value < 0 else "Invalid learning rate: nan"
    opt = optim.AdamW(params, fused=fused)
    train(opt, params, range(3))
    opt.param_groups[0]["lr"] = value
    assert refused(opt.step) == expected


TAKEN = [0.0, 0, 1, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5]), 1e-30]


@pytest.mark.parametrize("value", TAKEN, ids=repr)
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_numbers_of_any_kind_are_taken(name: str, value: Any) -> None:
    params = parameters()
    opt = optim.AdamW(params)
    train(opt, params, range(2))
    opt.param_groups[0][name] = value
    train(opt, params, range(2, 4))


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=100),
    "warm restarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=50),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=260),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, base_lr=0.0, max_lr=0.1, step_size_up=20, cycle_momentum=False),
    "polynomial": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=100, power=2.0),
    "linear": lambda opt: lr_scheduler.LinearLR(opt, start_factor=1.0, end_factor=0.0, total_iters=97),
    "exponential": lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.5),
    "step": lambda opt: lr_scheduler.StepLR(opt, step_size=3, gamma=0.1),
    "constant": lambda opt: lr_scheduler.ConstantLR(opt, factor=0.1, total_iters=5),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("start", [0.1, 1e-3, 3e-4])
def test_schedulers_of_torch(name: str, start: float) -> None:
    """Also where rounding takes a rate that ends at 0 below it."""
    param = torch.nn.Parameter(torch.ones(2))
    opt = optim.AdamW([param], lr=start, fused=False)
    schedule = SCHEDULERS[name](opt)
    param.grad = torch.ones(2)
    for _ in range(250):
        opt.step()
        schedule.step(*((1.0,) if name == "plateau" else ()))
    assert param.isfinite().all()


def test_torchs_names_may_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As people patch a framework that names torch.optim.Adam."""
    for cls in CLASSES:
        if hasattr(torch.optim, cls.__name__):
            monkeypatch.setattr(torch.optim, cls.__name__, cls)
    for cls in CLASSES:
        params = parameters()
        opt = cls(params, **options_of(cls))
        train(opt, params, range(2))
        copy.deepcopy(opt).load_state_dict(opt.state_dict())
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))]})


WORDS = {"max_norm": "max_grad_norm", "clip_grad_norm": "max_grad_norm", "max_grad_nrom": "max_grad_norm",
         "master_weights": "multi_precision", "state_dtpye": "state_dtype"}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
@EVERY_CLASS
def test_a_word_of_other_libraries_is_understood(cls: Any, word: str) -> None:
    with pytest.raises(TypeError, match=f"{word}.*did you mean '?{WORDS[word]}"):
        cls(parameters(), **{word: 1.0})
