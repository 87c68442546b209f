"""capturable=True: step and learning rate live on the device, and a step never waits for them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import tritopt
from tests.support.training import (
    CLASSES,
    EVERY_CLASS,
    OF_MATRICES,
    Params,
    assert_same,
    counts,
    everything,
    parameters,
    set_grads,
)
from tritopt import optim
from tritopt.mxnet.registry import registered
from tritopt.rule import Rule

Class = Any
RELATIVE = 1e-6  # of the distance moved: a scalar that is rounded otherwise moves every step by an fp32 ulp of itself

# As a multiple of fp64's epsilon. torch's power of a vector is an ulp off Python's now and then; 1 - beta^t of small t
# makes that up to 1000 times as large for a beta of 0.999, and RAdam's rho is a difference of numbers around 2000.
SCALARS = 2.0**14 * torch.finfo(torch.float64).eps
LRS = (0.0, 1e-30, 1e-4, 0.01, 0.3, 1.0, 5.0)
COUNTS = (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 31, 100, 999, 1000, 12345, 10**6, 2**24 - 1)

RULES: dict[str, type[Rule]] = {
    **{f"{name} of MXNet": rule for name, rule in registered().items() if rule.__module__.startswith("tritopt.")},
    **{f"optim.{cls.__name__}": cls.rule for cls in CLASSES},
}
# Its product of the schedule is a list on the host; tritopt.optim has another rule.
del RULES["nadam of MXNet"]
VARIANTS = [
    pytest.param(rule, variant, id=f"{name}-{i}")
    for name, rule in RULES.items()
    for i, variant in enumerate(rule.variants)
]


@pytest.mark.parametrize(("rule", "variant"), VARIANTS)
def test_scalars_are_those_of_the_host(rule: type[Rule], variant: dict[str, Any]) -> None:
    """Learning rates are numbers and tensors, counts a vector."""
    made, wd = rule(**variant), 0.1 if rule.decays else 0.0
    lrs = [lr for lr in LRS if lr or not rule.skips_zero_lr]  # scalars of a rate of 0 are never read there
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    numbers = {name: torch.linspace(0.9, 0.1, len(COUNTS), dtype=torch.float64) for name in rule.scalar_states}
    for lr in lrs:
        expected = [
            made.scalars_at("p", lr, wd, count, *[float(vector[i]) for vector in numbers.values()])
            for i, count in enumerate(COUNTS)
        ]
        for rate in (lr, torch.tensor(lr, dtype=torch.float64)):
            actual = made.scalars_at("p", rate, wd, counts, *numbers.values())
            assert type(actual) is type(expected[0])
            for i, (column, values) in enumerate(zip(actual, zip(*expected, strict=True), strict=True)):
                name = f"{type(actual)._fields[i]} at lr={lr}"  # type: ignore[attr-defined]
                assert all(isinstance(value, float | int) for value in values), f"{name} is no number on the host"
                column = torch.as_tensor(column, dtype=torch.float64).expand(len(COUNTS)).tolist()
                for count, got, value in zip(COUNTS, column, values, strict=True):
                    assert got == value or math.isclose(got, value, rel_tol=SCALARS), f"{name}, count={count}"


@pytest.mark.parametrize(("rule", "variant"), VARIANTS)
def test_scalars_are_exact_where_the_power_is(rule: type[Rule], variant: dict[str, Any]) -> None:
    """A single count and one rate, each a tensor [] on the CPU: the C library's power, as in Python."""
    made, wd = rule(**variant), 0.1 if rule.decays else 0.0
    for count in (1, 2, 5, 6, 1000):
        numbers = [0.7] * len(rule.scalar_states)
        expected = made.scalars_at("p", 0.01, wd, count, *numbers)
        tensors = [torch.tensor(x, dtype=torch.float64, device="cpu") for x in (0.01, count, *numbers)]
        actual = made.scalars_at("p", tensors[0], wd, *tensors[1:])
        assert [float(x) for x in actual] == [float(x) for x in expected]


def shapes_of(cls: Class) -> tuple[tuple[int, ...], ...]:
    return ((5, 7), (2, 3), (1, 4)) if cls in OF_MATRICES else ((5, 7), (6,), (2, 3, 2))


def follow(cls: Class, capturable: bool, lrs: Sequence[float], each: Callable[[Any], None] | None = None) -> Params:
    """Weights after a step with each of the learning rates; the second parameter's first gradient is late."""
    params = parameters(shapes=shapes_of(cls))
    lr = torch.tensor(lrs[0], dtype=torch.float64) if capturable else lrs[0]
    opt = cls(params, lr=lr, capturable=capturable, fused=True)
    for step, rate in enumerate(lrs, 1):
        set_grads(params, step)
        if step < 3:
            params[1].grad = None
        if capturable:
            lr.fill_(rate)  # type: ignore[union-attr]
        else:
            opt.param_groups[0]["lr"] = rate
        opt.step()
        if each is not None:
            each(opt)
    assert counts(opt, params) == [len(lrs), len(lrs) - 2, len(lrs)]
    return params


def assert_near(got: Params, expected: Params, start: Params) -> None:
    for a, b, first in zip(got, expected, start, strict=True):
        moved = (b.detach() - first.detach()).abs().max()
        assert moved > 0
        assert (a.detach() - b.detach()).abs().max() <= RELATIVE * moved


@EVERY_CLASS
def test_goes_where_the_host_path_goes(cls: Class) -> None:
    lrs = [0.01] * 20
    assert_near(follow(cls, True, lrs), follow(cls, False, lrs), parameters(shapes=shapes_of(cls)))


@EVERY_CLASS
def test_learning_rate_that_changes_in_place_is_seen(cls: Class) -> None:
    """Some rules divide by the learning rate: at 0 they leave weight and states alone."""
    lrs = [0.01, 0.0, 0.05, 0.02]
    states: dict[bool, list[list[torch.Tensor]]] = {True: [], False: []}
    got, expected = (
        follow(cls, capturable, lrs, lambda opt, kept=states[capturable]: kept.append(everything(opt)))  # type: ignore[misc]
        for capturable in (True, False)
    )
    assert_near(got, expected, parameters(shapes=shapes_of(cls)))
    if cls.rule.skips_zero_lr:
        for history in states.values():
            assert torch.equal(history[0][0], history[1][0]), "a learning rate of 0 moved a weight"


@pytest.mark.parametrize("fused", [True, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("cls", [optim.Ftrl, optim.FTML])
def test_learning_rate_of_0_on_the_device_touches_nothing(cls: Class, fused: bool) -> None:
    """Only its own group stands still; the other one moves in the same launch."""
    params, lr = parameters(shapes=((5, 7), (6,))), torch.tensor(0.01, dtype=torch.float64)
    groups = [{"params": params[:1], "lr": lr}, {"params": params[1:], "lr": 0.02}]
    opt = cls(groups, capturable=True, fused=fused)
    set_grads(params, 1)
    opt.step()
    before = [t.clone() for p in params for t in (p.detach(), *(v for k, v in opt.state[p].items() if k != "step"))]
    lr.fill_(0.0)
    set_grads(params, 2)
    opt.step()
    after = [t for p in params for t in (p.detach(), *(v for k, v in opt.state[p].items() if k != "step"))]
    half = len(after) // 2
    assert_same(after[:half], before[:half])
    assert all(torch.any(a != b) for a, b in zip(after[half:], before[half:], strict=True))
    assert [float(opt.state[p]["step"]) for p in params] == [2, 2]


READS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "cpu", "numpy", "__array__")


@pytest.fixture
def no_host_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every read of a tensor on the host raise, if it is asked by tritopt itself or by torch on its behalf."""

    def forbidden(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            frame: Any = sys._getframe(1)
            while frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "numpy"):
                frame = frame.f_back
            asker = frame.f_globals.get("__name__", "")
            # Kernels run on the device; in the interpreter they run here.
            if asker.startswith("tritopt.") and not asker.startswith("tritopt.kernels."):
                raise AssertionError(f"{asker}:{frame.f_lineno} reads a tensor by {name}()")
            return original(tensor, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, forbidden(name))


@EVERY_CLASS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_is_read_on_the_host(cls: Class, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """The first steps may read; later ones have a loss scale, the flag of a GradScaler, and a bound on the norm."""
    params = parameters(dtype, shapes_of(cls))
    lr = torch.tensor(0.01)
    opt = cls(params, lr=lr, capturable=True, fused=True, max_grad_norm=1.0)
    scaled: Any = opt
    scaled.grad_scale, scaled.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    for step in (1, 2):
        set_grads(params, step)
        opt.step()
    before = [weight.clone() for weight in opt.master_weights()]
    request.getfixturevalue("no_host_reads")
    for step in (3, 4):
        set_grads(params, step)
        lr.mul_(0.5)
        opt.step()
    assert all(bool((p != q).any()) for p, q in zip(opt.master_weights(), before, strict=True))


def test_a_read_on_the_host_would_be_seen(request: pytest.FixtureRequest) -> None:
    params = parameters()
    set_grads(params, 1)
    opt = optim.SGD(params, lr=torch.tensor(0.01))  # a number on the host, unless capturable
    request.getfixturevalue("no_host_reads")
    with pytest.raises(AssertionError, match=r"reads a tensor by item\(\)"):
        opt.step()


@EVERY_CLASS
def test_a_skipped_step_leaves_everything(cls: Class) -> None:
    """The very first step may be skipped too: what follows it is a first step."""
    runs = []
    for skipped in ((1, 3), ()):
        params = parameters(shapes=shapes_of(cls))
        opt = cls(params, lr=torch.tensor(0.01), capturable=True, fused=True)
        scaled: Any = opt
        scaled.found_inf = torch.tensor(0.0)
        for step in range(1, 6):
            if step in skipped:
                scaled.found_inf.fill_(1.0)
                set_grads(params, step, scale=math.nan)
                before = everything(opt) if step > 1 else None
                opt.step()
                if before is not None:
                    assert_same(everything(opt), before)
                scaled.found_inf.fill_(0.0)
            elif step in (2, 4, 5):
                set_grads(params, step)
                opt.step()
        runs.append(everything(opt))
    assert_same(*runs)


def test_every_registered_rule_is_looked_at() -> None:
    assert len(RULES) == len(tritopt.names()) - 1 + len(CLASSES)
