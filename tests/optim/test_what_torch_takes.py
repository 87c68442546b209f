"""Inputs that torch's classes take as well: lazy modules, flags that are numbers, older pickles."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.training import CLASSES
from tritopt import optim

LAZY = [cls for cls in CLASSES if cls.torch_class is not None and cls not in (optim.Adagrad, optim.Muon)]


@pytest.mark.parametrize("cls", LAZY, ids=lambda cls: cls.__name__)
def test_lazy_modules_get_their_shapes_later(cls: Any) -> None:
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.LazyLinear(2)) for _ in range(2)]
    opts = [cls(models[0].parameters(), lr=0.1), cls.torch_class(models[1].parameters(), lr=0.1)]
    x = torch.randn(5, 4)
    for model in models:
        model(x)
    models[1].load_state_dict(models[0].state_dict())
    for _ in range(3):
        for model, opt in zip(models, opts, strict=True):
            opt.zero_grad()
            model(x).square().sum().backward()
            opt.step()
    for ours, torchs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_for_a_lazy_module_wants_the_model_first() -> None:
    x, models = torch.randn(5, 4), [torch.nn.Sequential(torch.nn.LazyLinear(3)) for _ in range(2)]
    opt, again = (optim.AdamW(model.parameters(), lr=0.1, track=True) for model in models)
    assert len(again.telemetry()) == 0
    models[0](x).sum().backward()
    opt.step()
    with pytest.raises(ValueError, match=r"state for parameter 0, which is an uninitialized parameter"):
        again.load_state_dict(opt.state_dict())
    assert not again.state
    models[1].load_state_dict(models[0].state_dict())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))  # which goes on training
    for model, each in zip(models, (opt, again), strict=True):
        each.zero_grad()
        model(x).sum().backward()
        each.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_adagrad_wants_shapes_at_once() -> None:
    with pytest.raises(ValueError, match="uninitialized parameter"):
        optim.Adagrad(torch.nn.LazyLinear(3).parameters())


@pytest.mark.parametrize("flag", [0, 1, np.True_, np.False_], ids=repr)
def test_flags_may_be_numbers(flag: Any) -> None:
    cases: list[tuple[Any, str, dict[str, Any]]] = [
        (optim.AdamW, "amsgrad", {}), (optim.Adam, "amsgrad", {}), (optim.Muon, "nesterov", {}),
        (optim.SGD, "nesterov", {"momentum": 0.9}), (optim.RMSprop, "centered", {}),
    ]  # fmt: skip
    for cls, name, options in cases:
        results = []
        for value in (flag, bool(flag)):
            p = torch.nn.Parameter(torch.ones(2, 2))
            opt = cls([p], lr=0.1, **{**options, name: value})
            for step in range(3):
                p.grad = torch.full_like(p, 1.0 / (step + 1))
                opt.step()
            results.append(p.detach())
        assert torch.equal(*results)


def test_a_pickle_from_before_a_hyperparameter() -> None:
    p = torch.nn.Parameter(torch.ones(2, 2))
    opt = optim.Muon([p], lr=0.1)
    state = opt.__getstate__()
    for holder in (state["defaults"], *state["param_groups"]):
        holder.pop("ns_symmetric")
    again = optim.Muon.__new__(optim.Muon)
    again.__setstate__(copy.deepcopy(state))
    assert again.param_groups[0]["ns_symmetric"] is False


def test_a_pickle_of_several_classes_from_before_a_hyperparameter() -> None:
    p, q = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    opt = optim.Mixed([{"params": [p], "algorithm": "Muon"}, {"params": [q], "algorithm": "AdamW"}])
    state = copy.deepcopy(opt.__getstate__())
    state["param_groups"][0].pop("ns_symmetric")
    again = optim.Mixed.__new__(optim.Mixed)
    again.__setstate__(state)
    assert again.param_groups[0]["ns_symmetric"] is False
    for param in (param for group in again.param_groups for param in group["params"]):
        param.grad = torch.ones_like(param)
    again.step()
