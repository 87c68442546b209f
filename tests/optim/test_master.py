"""fp32 masters of fp16 and bf16 parameters: nothing that fp32 keeps is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.optim.training import EVERY_CLASS, PRECISIONS, assert_same, everything, parameters, set_grads, train
from tritopt import optim
from tritopt.kernels.formats import MASTER_FP32

HALF_ULP = 2.0**-9  # of a bf16 number in [1/2, 1)
LOW = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@LOW
@EVERY_CLASS
def test_is_an_fp32_run_with_rounded_weights(cls: Any, dtype: torch.dtype) -> None:
    """Masters and states bit for bit; the weight is the master to the nearest, after every step, on the kernel."""
    low = parameters(dtype)
    full = [torch.nn.Parameter(p.detach().float()) for p in low]
    opts = [cls(params, lr=0.01, fused=True) for params in (low, full)]
    for step in range(1, 5):
        set_grads(low, step)
        for p, q in zip(low, full, strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        for opt in opts:
            opt.step()
        for p, q in zip(low, full, strict=True):
            kept, expected = dict(opts[0].state[p]), opts[1].state[q]
            master = kept.pop(MASTER_FP32.companion)
            assert_same([master, *kept.values()], [q.detach(), *expected.values()])
            assert kept.keys() == expected.keys()
            assert torch.equal(p, master.to(dtype))
    assert all(torch.any(w != p) for w, p in zip(opts[0].master_weights(), parameters(dtype), strict=True))


def test_two_thousand_small_steps_of_adamw() -> None:
    """Each far below a bf16 ulp: together they go where an fp32 run goes, and where torch's goes in fp64."""
    steps, start = 2000, parameters(torch.bfloat16)
    how: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.1}
    low, lost = ([torch.nn.Parameter(p.detach().clone()) for p in start] for _ in range(2))
    full, exact = (
        [torch.nn.Parameter(p.detach().to(dtype)) for p in start] for dtype in (torch.float32, torch.float64)
    )
    opt = optim.AdamW(low, **how, fused=False)
    opts = [
        opt,
        optim.AdamW(lost, **how, fused=False, multi_precision=False),
        optim.AdamW(full, **how, fused=False),
        torch.optim.AdamW(exact, **how, foreach=True),
    ]
    for step in range(1, steps + 1):
        set_grads(low, step)
        for p, *others in zip(low, lost, full, exact, strict=True):
            assert p.grad is not None
            p.grad += 1.0  # a drift, so that the weights move much farther than in a step
            for other in others:
                other.grad = p.grad.to(other.dtype)
        for each in opts:
            each.step()
    for master, p, q, exactly, unmoved, first in zip(opt.master_weights(), low, full, exact, lost, start, strict=True):
        truth = exactly.detach()
        assert torch.equal(master, q)
        assert torch.equal(p, master.bfloat16())
        moved = (truth - first.detach()).abs()
        assert moved.min() > 1e-3
        # Half an ulp for the decay and half an ulp for the step, if all of them went the same way.
        error = (master - truth).abs()
        assert (error <= steps * torch.finfo(torch.float32).eps * truth.abs()).all()
        assert error.max() < 0.05 * moved.min()
        # Without a master such steps are lost wherever they are below half an ulp of the weight.
        large = first.abs() > 0.02
        assert torch.equal(unmoved[large], first[large])


SHRINKS: list[tuple[Any, dict[str, Any]]] = [
    (optim.AdamW, {}),
    (optim.AdamW, {"amsgrad": True}),
    (optim.Adam, {"decoupled_weight_decay": True}),
    (optim.NAdam, {"decoupled_weight_decay": True}),
    (optim.RAdam, {"decoupled_weight_decay": True}),
    (optim.Adafactor, {}),
    (optim.SGD, {}),
    (optim.NAG, {"momentum": 0.0}),
    (optim.DCASGD, {"lambd": 0.0}),
    (optim.Lion, {}),
    (optim.Adan, {}),
    (optim.Signum, {"momentum": 0.0}),
]


@pytest.mark.parametrize(("cls", "options"), SHRINKS, ids=lambda x: getattr(x, "__name__", ""))
def test_decay_alone_for_a_thousand_steps(cls: Any, options: dict[str, Any]) -> None:
    """(1 - 1e-4)^1000 = 0.9048, though one step changes no bf16 number."""
    for multi_precision in (True, False):
        p = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
        opt = cls([p], lr=1e-3, weight_decay=0.1, fused=False, multi_precision=multi_precision, **options)
        p.grad = torch.zeros_like(p)
        for _ in range(1000):
            opt.step()
        (master,) = opt.master_weights()
        if multi_precision:
            assert master.dtype == torch.float32
            assert (master - 0.9048).abs().max() < 1e-4
            assert (p - master).abs().max() <= HALF_ULP
        else:
            assert p.eq(1).all()


def test_decay_on_the_kernel_is_that_of_the_reference() -> None:
    runs = []
    for fused in (True, False):
        params = [torch.nn.Parameter(torch.full((3, 2), 0.7, dtype=torch.bfloat16))]
        opt = optim.AdamW(params, lr=1e-3, weight_decay=0.1, fused=fused)
        params[0].grad = torch.zeros_like(params[0])
        for _ in range(20):
            opt.step()
        runs.append(everything(opt))
    assert_same(*runs)
    assert torch.any(runs[0][0].float() != runs[0][2 if runs[0][2].shape == (3, 2) else 1])


@pytest.mark.parametrize("fused", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("seen", [True, False], ids=["copy_", "data.copy_"])
def test_a_weight_written_from_outside_takes_its_master_along(seen: bool, fused: bool) -> None:
    """Unless autograd does not learn of it: then the master counts."""
    params = parameters(torch.bfloat16)
    opt = optim.SGD(params, lr=1e-3, fused=fused)
    train(opt, params, range(1, 3))
    starts = [weight.clone() for weight in opt.master_weights()]
    with torch.no_grad():
        (params[0] if seen else params[0].data).copy_(torch.full_like(params[0], 3.0))
    if seen:
        starts[0].fill_(3.0)
    set_grads(params, 3)
    opt.step()
    for p, start, master in zip(params, starts, opt.master_weights(), strict=True):
        assert p.grad is not None
        assert torch.equal(master, start - 1e-3 * p.grad.float())
        assert torch.equal(p, master.bfloat16())


def test_a_model_that_is_loaded_takes_its_masters_along() -> None:
    model = torch.nn.Linear(4, 3).bfloat16()
    saved = {name: value.clone() + 1 for name, value in model.state_dict().items()}
    opt = optim.SGD(model.parameters(), lr=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    model.load_state_dict(saved)
    opt.step()
    assert_same(opt.master_weights(), [value.float() for value in saved.values()])
    assert_same([p.detach() for p in model.parameters()], list(saved.values()))


def test_master_weights_are_masters_where_there_are_some() -> None:
    """In the order of the parameters, over all groups."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.bfloat16)
    params = [parameters(dtype, ((2, 3),))[0] for dtype in dtypes]
    last: dict[str, Any] = {"params": params[4:], "multi_precision": False}
    opt = optim.AdamW([{"params": params[:3]}, {"params": params[3:4]}, last])
    assert_same(opt.master_weights(), [p.detach() for p in params])
    train(opt, params, range(1, 2))
    found = opt.master_weights()
    assert [weight.dtype for weight in found] == [
        torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16,
    ]  # fmt: skip
    for i, (p, weight) in enumerate(zip(params, found, strict=True)):
        assert (MASTER_FP32.companion in opt.state[p]) == (i in (0, 2))
        assert weight is opt.state[p][MASTER_FP32.companion] if i in (0, 2) else weight.data_ptr() == p.data_ptr()
        assert not weight.requires_grad


@PRECISIONS
@EVERY_CLASS
def test_no_master_where_none_is_wanted_or_needed(cls: Any, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    opt = cls(params, lr=0.01, multi_precision=False)
    train(opt, params, range(1, 2))
    least = torch.promote_types(dtype, cls.rule.least_state_dtype or dtype)
    for p in params:
        assert MASTER_FP32.companion not in opt.state[p]
        assert {v.dtype for k, v in opt.state[p].items() if k not in ("step", *cls.rule.scalar_states)} <= {least}
    assert_same(opt.master_weights(), [p.detach() for p in params])
