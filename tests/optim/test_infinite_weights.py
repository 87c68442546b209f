"""Weights that are infinite, as masks are stored, and get no gradient; NaN stays NaN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.support.training import CLASSES, PRECISIONS, options_of, twin
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
# Muon's products are rounded to bf16, so that it is only about where torch's is.
AS_TORCHS = [case for case in BOUND if twin(_class_of(case)) and _class_of(case) is not optim.Muon]
DECAYS = (0.0, 0.1)
DECAYS_BY_FACTOR = ("Lion", "LAMB", "LANS", "Adan")


def masked(dtype: torch.dtype, *more: float) -> torch.nn.Parameter:
    rows = [[1.0, -INF], [INF, 0.5], [-2.0, -INF], *([list(more)] if more else [])]
    return torch.nn.Parameter(torch.tensor(rows, dtype=dtype))


def train(
    cls: Any, params: Sequence[torch.nn.Parameter], decays: Sequence[float], **options: Any
) -> list[torch.Tensor]:
    """Three steps whose gradients are 0 where the weight is not finite; each parameter has a decay of its own."""
    has_decay = "weight_decay" in options_of(cls, weight_decay=0.0)
    groups = [
        {"params": [p], **({"weight_decay": decay} if has_decay else {})}
        for p, decay in zip(params, decays, strict=True)
    ]
    opt = cls(groups, **options)
    for step in range(1, 4):
        for p in params:
            p.grad = torch.where(p.detach().isfinite(), 0.1 * step, 0.0).to(p.dtype)
        opt.step()
    return [p.detach().double() for p in params]


def train_one(cls: Any, param: torch.nn.Parameter, weight_decay: float, **options: Any) -> torch.Tensor:
    """`train` of one parameter."""
    return train(cls, [param], [weight_decay], **options)[0]


@PRECISIONS
@FUSED
@pytest.mark.parametrize(("cls", "variant"), AS_TORCHS)
def test_as_torch(cls: Any, variant: dict[str, Any], fused: bool | None, dtype: torch.dtype) -> None:
    options = options_of(cls, **variant)
    params = [[masked(dtype) for _ in DECAYS] for _ in range(2)]
    ours = train(cls, params[0], DECAYS, fused=fused, **options)
    theirs = train(twin(cls), params[1], DECAYS, foreach=False, **options)
    if dtype == torch.bfloat16:  # torch rounds each operation to it
        ours, theirs = ([torch.where(x.isfinite(), 0.0, x) for x in side] for side in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * torch.finfo(torch.float32).eps, equal_nan=True)


@PRECISIONS
@FUSED
@pytest.mark.parametrize(("cls", "variant"), BOUND)
def test_without_decay_they_stay(cls: Any, variant: dict[str, Any], fused: bool | None, dtype: torch.dtype) -> None:
    param = masked(dtype)
    before = param.detach().double()
    after = train_one(cls, param, 0.0, fused=fused, **options_of(cls, **variant))
    assert torch.equal(after.isinf(), before.isinf())
    assert torch.equal(after[before.isinf()], before[before.isinf()])
    assert (after != before)[before.isfinite()].any()


@FUSED
@pytest.mark.parametrize(("cls", "variant"), [case for case in BOUND if _class_of(case).__name__ in DECAYS_BY_FACTOR])
def test_with_decay_as_a_factor_they_stay(cls: Any, variant: dict[str, Any], fused: bool | None) -> None:
    param = masked(torch.float32)
    before = param.detach().double()
    after = train_one(cls, param, 0.1, fused=fused, **options_of(cls, **variant))
    assert torch.equal(after[before.isinf()], before[before.isinf()])
    assert after[before.isfinite()].isfinite().all()


@PRECISIONS
@FUSED
@pytest.mark.parametrize(("cls", "variant"), CASES)
def test_nan_stays(cls: Any, variant: dict[str, Any], fused: bool | None, dtype: torch.dtype) -> None:
    params = [masked(dtype, math.nan, 1.0) for _ in DECAYS]
    for after in train(cls, params, DECAYS, fused=fused, **options_of(cls, **variant)):
        assert after[-1, 0].isnan()


@FUSED
@pytest.mark.parametrize("master", ["fp32", "split16", "split8", "kahan", "stochastic", None])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_in_every_master(master: str | None, weight_decay: float, fused: bool | None) -> None:
    param = masked(torch.bfloat16)
    before = param.detach().double()
    after = train_one(optim.AdamW, param, weight_decay, fused=fused, lr=0.1, master=master)
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
    """DCASGD, which remembers the weight, and replayed steps are no exceptions."""
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
