"""One place says which values a param_group may have: asked at construction, when added, loaded and changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch

from tests.support.training import (
    CLASSES,
    EVERY_CLASS,
    assert_same,
    everything,
    options_of,
    parameters,
    set_grads,
    train,
)
from tritopt import optim
from tritopt.optim import SGD, AdamW
from tritopt.optim.defaults import arguments_of

Class: TypeAlias = Any  # a class of tritopt.optim, with a signature of its own
OURS: dict[str, list[Any]] = {
    "master": ["spit8", 3],
    "state_dtype": ["fp4", 7, {"exp_avg": "fp4"}],
    "multi_precision": ["yes", None],
    "clip_value": [-1.0, 0.0, math.nan, "x"],
    "fused": ["no"],
    "foreach": ["no"],
}
RATES = [-1.0, math.nan, math.inf, "x", [1], None, torch.tensor([0.1, 0.2]), torch.tensor(-1.0)]


def wrong(cls: Class) -> list[tuple[str, Any]]:
    """Values that no group of a class may have."""
    pairs = [(name, value) for name, values in OURS.items() for value in values]
    pairs += [(name, value) for name in ("lr", "weight_decay") for value in RATES]
    for name, default in arguments_of(cls).items():
        if isinstance(default, bool):
            pairs += [(name, value) for value in ("no", None, 2)]
        elif name == "betas":
            pairs += [
                (name, value) for value in ((2.0,) * len(default), default[:-1], 0.9, "x", (-0.1,) * len(default))
            ]
        elif name in ("eps", "momentum", "rho", "alpha", "lr_decay", "momentum_decay", "trust_coefficient"):
            pairs += [(name, value) for value in ((-1.0,) * len(default) if isinstance(default, tuple) else -1.0, "x")]
    return pairs


def case_of(cls: Class) -> tuple[Any, Any]:
    params = parameters(torch.bfloat16)
    opt = cls(params, **options_of(cls))
    train(opt, params, range(3))
    return opt, params


def untouched(opt: Any, before: list[torch.Tensor], fail: Callable[[], Any]) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        fail()
    assert_same(everything(opt), before)
    return str(caught.value)


@EVERY_CLASS
def test_a_wrong_value_is_refused_wherever_it_comes_from(cls: Class) -> None:
    opt, params = case_of(cls)
    saved = copy.deepcopy(opt.state_dict())
    set_grads(params, 3)
    before, (group,) = everything(opt), opt.param_groups
    for name, value in wrong(cls):
        kept = group[name]
        group[name] = value
        message = untouched(opt, before, opt.step)
        assert untouched(opt, before, opt.step) == message  # not only once
        group[name] = kept
        with pytest.raises(ValueError, match=r"\w") as caught:
            cls([{"params": parameters(), name: value}])
        assert str(caught.value) == message
        with pytest.raises((ValueError, TypeError, RuntimeError), match=r"\w"):
            cls(parameters(), **{name: value})
        with pytest.raises(ValueError, match=r"\w") as caught:
            opt.add_param_group({"params": parameters(), name: value})
        assert str(caught.value) == message
        assert len(opt.param_groups) == 1
        if name not in ("master", "state_dtype", "multi_precision", "fused", "foreach", "capturable", "differentiable"):
            wrongly = copy.deepcopy(saved)
            wrongly["param_groups"][0][name] = value
            said = untouched(opt, before, partial(opt.load_state_dict, wrongly))
            assert said.startswith(f"loaded state dict: {message}")
    opt.step()
    expected, others = case_of(cls)
    train(expected, others, range(3, 4))
    assert_same(everything(opt), everything(expected))


@EVERY_CLASS
def test_the_words_are_the_constructors(cls: Class) -> None:
    opt, _ = case_of(cls)
    names = arguments_of(cls)
    for name, value in (("lr", -1.0), ("weight_decay", -1.0), ("eps", -1.0), ("momentum", -0.5), ("clip_value", -1.0)):
        if (name not in names and name != "clip_value") or isinstance(names.get(name), tuple):
            continue
        with pytest.raises(ValueError, match=r"\w") as constructor:
            cls(parameters(), **{name: value})
        opt.param_groups[0][name], kept = value, opt.param_groups[0][name]
        with pytest.raises(ValueError, match=r"\w") as step:
            opt.step()
        opt.param_groups[0][name] = kept
        assert str(step.value) == str(constructor.value)


@EVERY_CLASS
def test_a_key_that_is_gone_is_named(cls: Class) -> None:
    opt, params = case_of(cls)
    set_grads(params, 3)
    before, (group,) = everything(opt), opt.param_groups
    for name in [name for name in group.keys() if name != "params"]:  # noqa: SIM118  # iteration shows fewer
        kept = group.pop(name)
        assert untouched(opt, before, opt.step).startswith(f"a param_group lacks {name!r}")
        group[name] = kept
    opt.step()


TAKEN: list[dict[str, Any]] = [
    {"lr": 0},
    {"lr": 1},
    {"lr": 0.0},
    {"lr": np.float32(0.1)},
    {"lr": np.float64(0.1)},
    {"lr": torch.tensor(0.1)},
    {"lr": torch.tensor([0.1])},
    {"weight_decay": 1},
    {"weight_decay": np.float32(0.1)},
    {"weight_decay": torch.tensor(0.1)},
    {"betas": (0, 0.999)},
    {"betas": [0.5, np.float32(0.9)]},
    {"betas": (torch.tensor(0.9), torch.tensor(0.99))},
    {"eps": 0},
    {"eps": np.float64(1e-8)},
    {"maximize": True},
    {"maximize": 1},
    {"maximize": np.bool_(True)},
    {"capturable": True},
    {"clip_value": 1},
    {"clip_value": np.float32(1)},
    {"state_dtype": torch.bfloat16},
    {"state_dtype": {"exp_avg": "int8"}},
    {"master": None},
    {"foreach": True},
]


@pytest.mark.parametrize("values", TAKEN, ids=str)
def test_what_torch_takes_is_taken(values: dict[str, Any]) -> None:
    params = parameters()
    opt = AdamW(params)
    train(opt, params, range(2))
    opt.param_groups[0].update(values)
    train(opt, params, range(2, 4))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, params, range(4, 5))
    opt = AdamW([{"params": params, **values}])
    train(opt, params, range(2))


def test_momentum_may_be_scheduled_to_zero_under_nesterov() -> None:
    params = parameters()
    opt = SGD(params, lr=0.1, momentum=0.9, nesterov=True)
    for momentum in (0.9, 0.0, 0, np.float32(0.5)):
        opt.param_groups[0]["momentum"] = momentum
        train(opt, params, range(2))


def test_betas_changed_in_place_are_checked_too() -> None:
    params = parameters()
    opt = AdamW(params)
    opt.param_groups[0]["betas"] = [0.9, 0.99]
    train(opt, params, range(2))
    before = everything(opt)
    opt.param_groups[0]["betas"][0] = 2.0
    assert untouched(opt, before, opt.step) == "Invalid beta parameter at index 0: 2.0"
    opt.param_groups[0]["betas"][0] = torch.tensor([0.9, 0.9])
    assert "must be a tensor of one element" in untouched(opt, before, opt.step)


def test_a_rate_on_the_host_is_checked_when_it_changes_in_place() -> None:
    params = parameters()
    opt = AdamW(params, lr=torch.tensor(0.1))
    train(opt, params, range(2))
    before = everything(opt)
    opt.param_groups[0]["lr"].fill_(-1.0)
    assert untouched(opt, before, opt.step) == "Invalid learning rate: -1.0"


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 7),
    "warm restarts": lambda opt: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, 5, 2),
    "to zero": lambda opt: torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, 30),
    "polynomial": lambda opt: torch.optim.lr_scheduler.PolynomialLR(opt, 37, 2.5),
    "one cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(
        opt, 0.1, total_steps=201, final_div_factor=math.inf, three_phase=True, anneal_strategy="linear"
    ),
    "cyclic": lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, 0.0, 0.1, 13, mode="exp_range", gamma=0.99),
    "chained": lambda opt: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.PolynomialLR(opt, 60), torch.optim.lr_scheduler.CosineAnnealingLR(opt, 21)]
    ),
    "swa": lambda opt: torch.optim.swa_utils.SWALR(opt, 0.0, 10),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("lr", [0.1, 3e-4, "tensor"])
def test_what_torchs_schedulers_make_is_taken(name: str, lr: Any) -> None:
    (param,) = parameters(shapes=((2, 3),))
    opt = SGD([param], lr=torch.tensor(0.1) if lr == "tensor" else lr, momentum=0.9, fused=False)
    schedule = SCHEDULES[name](opt)
    for step in range(200):
        set_grads([param], step)
        opt.step()
        schedule.step()
    assert param.isfinite().all()


# Unknown keywords.


@EVERY_CLASS
@pytest.mark.parametrize(
    "word", ["max_norm", "clip_norm", "clip_grad_norm", "grad_clip", "gradient_clip_val", "Max_Grad_Norm"]
)
def test_other_words_for_the_norm(cls: Class, word: str) -> None:
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{word}'; did you mean 'max_grad_norm'\?"):
        cls(parameters(), **options_of(cls), **{word: 1.0})


@pytest.mark.parametrize(
    ("word", "meant"),
    [("learning_rate", "lr"), ("wd", "weight_decay"), ("stat_dtype", "state_dtype"), ("rounding_sed", "rounding_seed"),
     ("clip_gradient", "clip_value"), ("epsilon", "eps"), ("master_weights", "multi_precision")],
)  # fmt: skip
def test_the_nearest_option_is_suggested(word: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"'{word}'; did you mean '{meant}'"):
        AdamW(parameters(), **{word: 1.0})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'foo'; beside torch's there are"):
        AdamW(parameters(), foo=1.0)  # type: ignore[call-arg]


# Frameworks are patched by assigning ours to torch's names.


def test_ours_under_torchs_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in CLASSES:
        monkeypatch.setattr(torch.optim, cls.__name__, cls, raising=False)
    monkeypatch.setattr(torch.optim, "Optimizer", optim.Optimizer)
    for cls in CLASSES:
        patched = getattr(torch.optim, cls.__name__)
        params = parameters()
        opt = patched(params, **options_of(cls))
        train(opt, params, range(2))
        opt.param_groups[0]["lr"] = 0.02
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        train(opt, params, range(2, 3))
        with pytest.raises(ValueError, match=r"Invalid|should be"):
            patched(parameters(), lr=-1.0)
