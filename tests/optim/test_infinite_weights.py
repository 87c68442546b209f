"""Weights that are infinite, as masks are stored, and get no gradient; NaN stays NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.optim.training import CLASSES, PRECISIONS, options_of, twin
from tritopt import optim

INF = math.inf
FUSED = pytest.mark.parametrize("fused", [None, False], ids=["kernel", "reference"])
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "SGD": ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}),
    "Adam": ({}, {"amsgrad": True}, {"decoupled_weight_decay": True}),
    "AdamW": ({}, {"amsgrad": True}),
    "NAdam": ({}, {"decoupled_weight_decay": True}),
    "RAdam": ({}, {"decoupled_weight_decay": True}),
    "RMSprop": ({}, {"momentum": 0.9}, {"centered": True}),
    "LARS": ({}, {"momentum": 0.0}, {"layer_wise": False}),
    "LAMB": ({}, {"upper_bound": 2.0}),
    "LANS": ({}, {"upper_bound": 2.0}),
    "DCASGD": ({}, {"momentum": 0.9}),
    "Signum": ({}, {"momentum": 0.0}, {"wd_lh": 0.1}),
}
CASES: list[Any] = [
    pytest.param(cls, variant, id=f"{cls.__name__}-{i}")
    for cls in CLASSES
    for i, variant in enumerate(VARIANTS.get(cls.__name__, ({},)))
]
# Ftrl solves for the weight anew from its states. Adafactor's step is relative to the weights' root mean square, which
# is infinite; so is torch's.


def _class_of(case: Any) -> Any:
    return case.values[0]


FREE = ("Ftrl", "Adafactor")
BOUND = [case for case in CASES if _class_of(case).__name__ not in FREE]
DECAYS_BY_FACTOR = ("Lion", "LAMB", "LANS", "Adan")


def masked(dtype: torch.dtype, *more: float) -> torch.nn.Parameter:
    rows = [[1.0, -INF], [INF, 0.5], [-2.0, -INF], *([list(more)] if more else [])]
    return torch.nn.Parameter(torch.tensor(rows, dtype=dtype))


def train(cls: Any, param: torch.nn.Parameter, **options: Any) -> torch.Tensor:
    """Three steps whose gradient is 0 where the weight is not finite."""
    opt = cls([param], **options)
    for step in range(1, 4):
        param.grad = torch.where(param.detach().isfinite(), 0.1 * step, 0.0).to(param.dtype)
        opt.step()
    return param.detach().double()


@PRECISIONS
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@FUSED
@pytest.mark.parametrize(("cls", "variant"), [case for case in BOUND if twin(case.values[0])])
def test_as_torch(
    cls: Any, variant: dict[str, Any], fused: bool | None, weight_decay: float, dtype: torch.dtype
) -> None:
    options = options_of(cls, weight_decay=weight_decay, **variant)
    ours = train(cls, masked(dtype), fused=fused, **options)
    theirs = train(twin(cls), masked(dtype), foreach=False, **options)
    if dtype == torch.bfloat16:  # torch rounds each operation to it
        ours, theirs = (torch.where(x.isfinite(), 0.0, x) for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * torch.finfo(torch.float32).eps, equal_nan=True)


@PRECISIONS
@FUSED
@pytest.mark.parametrize(("cls", "variant"), BOUND)
def test_without_decay_they_stay(cls: Any, variant: dict[str, Any], fused: bool | None, dtype: torch.dtype) -> None:
    param = masked(dtype)
    before = param.detach().double()
    after = train(cls, param, fused=fused, **options_of(cls, weight_decay=0.0, **variant))
    assert torch.equal(after.isinf(), before.isinf())
    assert torch.equal(after[before.isinf()], before[before.isinf()])
    assert (after != before)[before.isfinite()].any()


@FUSED
@pytest.mark.parametrize(("cls", "variant"), [case for case in BOUND if _class_of(case).__name__ in DECAYS_BY_FACTOR])
def test_with_decay_as_a_factor_they_stay(cls: Any, variant: dict[str, Any], fused: bool | None) -> None:
    param = masked(torch.float32)
    before = param.detach().double()
    after = train(cls, param, fused=fused, **options_of(cls, weight_decay=0.1, **variant))
    assert torch.equal(after[before.isinf()], before[before.isinf()])
    assert after[before.isfinite()].isfinite().all()


@PRECISIONS
@FUSED
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("cls", "variant"), CASES)
def test_nan_stays(
    cls: Any, variant: dict[str, Any], weight_decay: float, fused: bool | None, dtype: torch.dtype
) -> None:
    param = masked(dtype, math.nan, 1.0)
    after = train(cls, param, fused=fused, **options_of(cls, weight_decay=weight_decay, **variant))
    assert after[-1, 0].isnan()


@FUSED
@pytest.mark.parametrize("master", ["fp32", "split16", "split8", "kahan", "stochastic", None])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_in_every_master(master: str | None, weight_decay: float, fused: bool | None) -> None:
    param = masked(torch.bfloat16)
    before = param.detach().double()
    after = train(optim.AdamW, param, fused=fused, lr=0.1, weight_decay=weight_decay, master=master)
    assert torch.equal(after[before.isinf()], before[before.isinf()])


@FUSED
def test_adafactor_relates_its_step_to_an_infinite_size(fused: bool | None) -> None:
    ours, theirs = masked(torch.float32), masked(torch.float32)
    sides: list[tuple[Any, torch.nn.Parameter, dict[str, Any]]] = [
        (optim.Adafactor, ours, {"fused": fused}),
        (torch.optim.Adafactor, theirs, {}),
    ]
    for cls, param, options in sides:
        param.grad = torch.where(param.detach().isfinite(), 0.1, 0.0)
        cls([param], lr=0.1, **options).step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("capturable", [False, True])
def test_written_between_steps(capturable: bool) -> None:
    """Also in DCASGD, which remembers the weight, and in replayed steps."""
    for cls in (optim.SGD, optim.DCASGD):
        params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
        opt = cls(params, lr=0.1, capturable=capturable)
        for step in range(5):
            for p in params:
                p.grad = torch.tensor([1.0, 0.0, 1.0, 0.0])
            if step == 3:
                params[0].detach()[1] = -INF
                params[1].detach()[3] = INF
            opt.step()
        assert params[0].isinf().tolist() == [False, True, False, False]
        assert params[1].isinf().tolist() == [False, False, False, True]
        assert params[0][1] == -INF


@FUSED
def test_an_infinite_weight_that_stays_has_not_moved(fused: bool | None) -> None:
    param = masked(torch.float32)
    opt = optim.SGD([param], lr=0.1, track=True, fused=fused)
    param.grad = torch.zeros_like(param)
    opt.step()
    record = next(iter(opt.telemetry()))
    assert record.update_norm == 0
