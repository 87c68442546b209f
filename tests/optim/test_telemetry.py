"""`track=True` and `telemetry()`, of both faces."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch

import tritopt
from tests.support.training import CLASSES, OF_MATRICES, options_of, parameters, record_launches, set_grads
from tritopt import optim
from tritopt.engine.plan import Planner
from tritopt.engine.telemetry import TensorTelemetry
from tritopt.engine.tuning.config import Config
from tritopt.kernels.formats.weights import MASTERS

BF16 = torch.bfloat16
SHAPES = ((3, 50), (9,), (0,), ())
TRACKED = [cls for cls in CLASSES if all(phase.is_driver for phase in cls.rule().phases)]
UNTRACKED = [cls for cls in CLASSES if cls not in TRACKED]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "config", Config(block_size=32, chunk_size=64, tail_size=16, num_warps=1))


def run(cls: Any, params: list[torch.nn.Parameter], steps: int = 2, **options: Any) -> Any:
    opt = cls(params, **options_of(cls, lr=0.01, weight_decay=0.1), track=True, **options)
    for step in range(steps):
        set_grads(params, step)
        opt.step()
    return opt


def assert_close(actual: list[TensorTelemetry], expected: list[TensorTelemetry], tolerance: float = 1e-5) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert (a.name, a.elements, a.nonfinite) == (b.name, b.elements, b.nonfinite)
        assert abs(a.unchanged - b.unchanged) <= 0.01 + tolerance
        for name in ("grad_norm", "weight_norm", "update_norm"):
            assert math.isclose(getattr(a, name), getattr(b, name), rel_tol=tolerance, abs_tol=1e-12), name


@pytest.mark.parametrize("master", [*MASTERS, None])
@pytest.mark.parametrize("cls", TRACKED, ids=lambda cls: cls.__name__)
def test_kernel_sums_up_what_the_reference_does(cls: Any, master: str | None) -> None:
    shapes = ((3, 50), (9, 1), (0, 2), (1, 1)) if cls in OF_MATRICES else SHAPES
    copies = [parameters(BF16, shapes) for _ in range(2)]
    kernel, reference = (
        run(cls, p, fused=fused, master=master) for p, fused in zip(copies, (None, False), strict=True)
    )
    actual = kernel.telemetry()
    assert_close(actual, reference.telemetry(), 2e-3 if master is None else 1e-4)
    assert [row.name for row in actual] == [0, 1, 2, 3]
    assert all(row.update_norm > 0 for row in actual if row.elements)


@pytest.mark.parametrize("fused", [None, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16])
def test_what_the_numbers_are(dtype: torch.dtype, fused: bool | None) -> None:
    params = parameters(dtype, SHAPES)
    opt = run(optim.AdamW, params, steps=1, fused=fused, max_grad_norm=0.1)
    before = [master.double().clone() for master in opt.master_weights()]
    shown = [p.detach().clone() for p in params]
    set_grads(params, 5)
    opt.step()
    for row, p, old, was, new in zip(opt.telemetry(), params, before, shown, opt.master_weights(), strict=True):
        assert p.grad is not None
        expected = TensorTelemetry(
            row.name,
            p.numel(),
            p.grad.double().norm().item(),
            new.double().norm().item(),
            (new.double() - old).norm().item(),
            (p == was).double().mean().item() if p.numel() else 0.0,
            0,
        )
        assert_close([row], [expected], 1e-4 if dtype != torch.float64 else 1e-12)


def test_steps_are_the_same_and_stay_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = [parameters(BF16, SHAPES) for _ in range(2)]
    tracked = run(optim.LAMB, copies[0], steps=4)
    launches = record_launches(monkeypatch)
    set_grads(copies[0], 4)
    tracked.step()
    assert len(launches) == 1  # a pass over the phases, as without
    plain = optim.LAMB(copies[1], **options_of(optim.LAMB, lr=0.01, weight_decay=0.1))
    for step in range(5):
        set_grads(copies[1], step)
        plain.step()
    for a, b in zip(copies[0], copies[1], strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=f"{type(plain).__name__} sums up nothing: construct it with track=True"):
        plain.telemetry()


@pytest.mark.parametrize("fused", [None, False], ids=["kernel", "reference"])
def test_weights_that_are_stuck_show(fused: bool | None) -> None:
    """Weights in bf16 alone are stuck: the updates are below half a step of the numbers near 1."""
    weight = torch.nn.Parameter(torch.ones(100, dtype=BF16))
    opts = {m: optim.SGD([weight], lr=1e-4, master=m, track=True, fused=fused) for m in (None, "stochastic")}
    by_master = {}
    for master, opt in opts.items():
        weight.grad = torch.ones_like(weight)
        opt.step()
        (by_master[master],) = opt.telemetry()
    assert by_master[None].unchanged == 1.0
    assert math.isclose(by_master[None].update_norm, 1e-3, rel_tol=1e-2)
    assert 0.8 < by_master["stochastic"].unchanged < 1.0


@pytest.mark.parametrize("fused", [None, False], ids=["kernel", "reference"])
def test_a_skipped_step_says_which_gradient_overflowed(fused: bool | None) -> None:
    params = parameters(torch.float16, ((3, 50), (90,)))
    opt = run(optim.AdamW, params, fused=fused)
    before = [p.detach().clone() for p in params]
    set_grads(params, 3)
    assert params[1].grad is not None
    params[1].grad[[5, 80]] = torch.inf
    params[1].grad[7] = torch.nan
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    opt.step()
    first, second = opt.telemetry()
    assert (first.nonfinite, second.nonfinite) == (0, 3)
    assert math.isfinite(first.grad_norm)
    assert first.grad_norm > 0
    assert first.update_norm == first.weight_norm == 0
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_names_groups_and_gradients_that_are_none() -> None:
    a, b, c = parameters(torch.float32, ((3,), (4,), (5,)))
    groups: list[dict[str, Any]] = [{"params": [("a", a), ("b", b)]}, {"params": [("c", c)], "lr": 0.1}]
    opt = optim.Lion(groups, lr=0.01, track=True)
    assert opt.telemetry() == []
    for p in (a, c):
        p.grad = torch.ones_like(p)
    opt.step()
    assert [row.name for row in opt.telemetry()] == ["a", "c"]
    text = str(opt.telemetry())
    assert "update norm" in text
    assert len(text.splitlines()) == 6
    again = copy.deepcopy(opt)
    assert again.telemetry() == []
    again.step()


@pytest.mark.parametrize("cls", UNTRACKED, ids=lambda cls: cls.__name__)
def test_kernels_that_track_nothing_say_so(cls: Any) -> None:
    params = parameters(torch.float32, ((3, 5),))
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=f"track=True is not for .*{cls.__name__}"):
        run(cls, params)
    assert torch.equal(params[0], before)
    assert len(run(cls, params, fused=False).telemetry()) == 1


@pytest.mark.parametrize("use_fused_step", [True, False])
def test_the_face_of_mxnet(use_fused_step: bool) -> None:
    opt = tritopt.create("adam", learning_rate=0.1, track=True, multi_precision=True, use_fused_step=use_fused_step)
    weights = [torch.ones(50, dtype=BF16), torch.ones(3, 4)]
    states = [opt.create_state_multi_precision(i, weight) for i, weight in enumerate(weights)]
    grads = [torch.full_like(weight, 2.0) for weight in weights]
    opt.update_multi_precision([0, "x"], weights, grads, states)
    rows = opt.telemetry()
    assert [(row.name, row.elements, row.nonfinite) for row in rows] == [(0, 50, 0), ("x", 12, 0)]
    assert math.isclose(rows[0].grad_norm, 2 * 50**0.5, rel_tol=1e-6)
    assert math.isclose(rows[1].update_norm, 0.1 * 12**0.5, rel_tol=1e-4)
    assert rows[0].unchanged == 0
    opt.rescale_grad = math.nan
    grads[1][0, 0] = math.nan
    opt.update_multi_precision([0, "x"], weights, grads, states)
    assert [row.nonfinite for row in opt.telemetry()] == [0, 1]
    assert pickle.loads(pickle.dumps(opt)).telemetry() == []
    assert tritopt.create("adam", track=True).telemetry() == []
    with pytest.raises(ValueError, match="Adam sums up nothing: construct it with track=True"):
        tritopt.create("adam").telemetry()
