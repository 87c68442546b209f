"""The protocol of torch.optim.Optimizer, for every class of tritopt.optim."""

from __future__ import annotations

import copy
import functools
import io
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

import tritopt.optim
from tests.support.training import (
    CLASSES,
    EVERY_CLASS,
    assert_follows,
    assert_same,
    clone,
    counts,
    everything,
    named,
    options_of,
    parameters,
    record_launches,
    set_grads,
    train,
    twin,
)
from tritopt.engine.launcher import n_launches
from tritopt.engine.phase import Recorder
from tritopt.kernels.drivers.multi_tensor_norm import clip_factor
from tritopt.optim import Adam, AdamW

ROOT = Path(__file__).resolve().parent.parent.parent
Class: TypeAlias = Any  # a class of tritopt.optim, with a signature of its own


def make(cls: Class, params: Any, **options: Any) -> Any:
    """An optimizer with those of the options that its class has."""
    ours = {name: value for name, value in options.items() if name in tritopt.optim.Options.__annotations__}
    return cls(params, **options_of(cls, **options), **ours)


def group_options(cls: Class, i: int) -> dict[str, Any]:
    """Learning rate, decay and betas of group i."""
    options = {"lr": 0.01 * (i + 1), "weight_decay": 0.1 * i}
    if "betas" in options_of(cls, betas=None):
        n_betas = len(cls([torch.zeros(2, 2)], lr=0.1).defaults["betas"])
        options["betas"] = tuple(0.5 + 0.1 * i + 0.05 * k for k in range(n_betas))  # type: ignore[assignment]
    return options_of(cls, **options)


# Groups.


@EVERY_CLASS
def test_groups_with_options_of_their_own_share_the_launches(cls: Class, monkeypatch: pytest.MonkeyPatch) -> None:
    params, apart = parameters(torch.bfloat16), parameters(torch.bfloat16)
    launches = record_launches(monkeypatch)
    groups = [{"params": [pair], **group_options(cls, i)} for i, pair in enumerate(named(params))]
    together = make(cls, groups)
    singles = [make(cls, [{"params": [pair], **group_options(cls, i)}]) for i, pair in enumerate(named(apart))]
    for step in range(3):
        set_grads(params, step)
        set_grads(apart, step)
        launches.clear()
        together.step()
        assert [n for n, _ in launches] == [1]
        for opt in singles:
            opt.step()
    assert_same(params, apart)


class Kernels(Recorder):
    """Kernels that a step would launch, in order."""

    def __init__(self) -> None:
        self.noted: list[Any] = []

    def kernel(self, kernel: Any, grid: int, arguments: tuple[Any, ...], constants: Mapping[str, Any]) -> None:
        """Note a launch."""
        self.noted.append(kernel)


@EVERY_CLASS
def test_a_recorder_is_told_of_every_launch(cls: Class) -> None:
    """It hears of a step that is built, then of one that is replayed, each with the norm and the clip."""
    launched, recorded = parameters(), parameters()
    opt, other = make(cls, launched, max_grad_norm=1.0), make(cls, recorded, max_grad_norm=1.0)
    other._stepper._planner.record = kernels = Kernels()
    for step in range(2):
        for params in (launched, recorded):
            set_grads(params, step)
        before = n_launches()
        opt.step()
        launches = n_launches() - before
        other.step()
        assert n_launches() - before == launches == len(kernels.noted)
        assert kernels.noted.count(clip_factor) == 1
        kernels.noted.clear()
    assert_same(recorded, parameters())


@EVERY_CLASS
@pytest.mark.parametrize("steps_before", [0, 2])
def test_add_param_group(cls: Class, steps_before: int) -> None:
    params, expected = parameters(), parameters()
    opt, whole = make(cls, named(params[:2])), make(cls, named(expected))
    for group in whole.param_groups:
        assert group["param_names"] == [name for name, _ in named(expected)]
    train(opt, params[:2], range(steps_before))
    train(whole, expected[:2], range(steps_before))
    for p in expected[:2]:
        p.grad = None
    opt.add_param_group({"params": named(params)[2:]})
    assert len(opt.param_groups) == 2
    assert opt.param_groups[1]["lr"] == opt.defaults["lr"]
    train(opt, params, range(5, 8))
    train(whole, expected, range(5, 8))
    assert_same(params, expected)


def test_a_group_that_is_refused_is_not_added() -> None:
    params = parameters()
    opt = AdamW(params[:1], lr=0.1)
    for dtype in (torch.float8_e5m2, torch.complex64):
        wrong = params[1].detach().to(dtype).requires_grad_()
        with pytest.raises(ValueError, match=f"{dtype}, and AdamW"):
            opt.add_param_group({"params": [params[1], wrong]})
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        opt.add_param_group({"params": [params[0]]})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": params[1:]})
    assert len(opt.param_groups) == 2


@EVERY_CLASS
def test_named_parameters_of_a_model(cls: Class) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
    opt = make(cls, list(model.named_parameters()))
    names = [name for name, _ in model.named_parameters()]
    assert opt.param_groups[0]["param_names"] == names
    assert opt.state_dict()["param_groups"][0]["param_names"] == names
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(2, 4)).sum().backward()
    opt.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_message_names_the_parameter() -> None:
    model = torch.nn.Linear(4, 3)
    opt = AdamW(list(model.named_parameters()))
    model(torch.ones(2, 4)).sum().backward()
    opt.state[model.bias] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"parameter 'bias': state of shape \(2,\)"):
        opt.step()


# Step: closure, hooks, gradients.


@EVERY_CLASS
def test_closure_is_called_once_with_gradients_on(cls: Class) -> None:
    params, expected = parameters(), parameters()
    opt, plain = make(cls, params), make(cls, expected)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = torch.stack([(p * p).sum() for p in params]).sum()
        loss.backward()
        return loss

    loss = torch.stack([(p * p).sum() for p in expected]).sum()
    loss.backward()
    plain.step()
    with torch.no_grad():
        assert torch.equal(opt.step(closure), loss)
    assert calls == [True]
    assert_same(params, expected)
    assert plain.step() is None


@EVERY_CLASS
def test_step_hooks(cls: Class) -> None:
    params = parameters()
    opt = make(cls, params)
    seen: list[Any] = []

    def halve(optimizer: Any, args: Any, kwargs: Any) -> None:
        seen.append(("pre", optimizer is opt, params[0].detach().clone()))
        set_grads(params, 0, 0.5)

    handles = [
        opt.register_step_pre_hook(halve),
        opt.register_step_post_hook(lambda o, a, k: seen.append(("post", o is opt, params[0].detach().clone()))),
    ]
    first = params[0].detach().clone()
    train(opt, params, range(1))
    assert [name for name, _, _ in seen] == ["pre", "post"]
    assert all(is_opt for _, is_opt, _ in seen)
    assert torch.equal(seen[0][2], first)
    assert torch.equal(seen[1][2], params[0])
    assert not torch.equal(first, params[0])
    for handle in handles:
        handle.remove()
    train(opt, params, range(1, 2))
    assert len(seen) == 2


def test_global_step_hooks() -> None:
    params, seen = parameters(), []
    opt = AdamW(params)
    handle = register_optimizer_step_post_hook(lambda o, a, k: seen.append(o))
    try:
        train(opt, params, range(2))
    finally:
        handle.remove()
    assert seen == [opt, opt]


def test_state_dict_hooks() -> None:
    params = parameters()
    opt = AdamW(params)
    train(opt, params, range(1))
    seen: list[str] = []

    def add(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("post save")
        return {**state_dict, "extra": 1}

    def take(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("pre load")
        assert state_dict.pop("extra") == 1
        state_dict["param_groups"] = [{**group, "lr": 0.5} for group in state_dict["param_groups"]]
        return state_dict

    opt.register_state_dict_pre_hook(lambda o: seen.append("pre save"))
    opt.register_state_dict_post_hook(add)
    opt.register_load_state_dict_pre_hook(take)
    opt.register_load_state_dict_post_hook(lambda o: seen.append(f"post load {o.param_groups[0]['lr']}"))
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    assert seen == ["pre save", "post save", "pre load", "post load 0.5"]
    assert saved["extra"] == 1  # the hook worked on a copy
    assert saved["param_groups"][0]["lr"] == 1e-3


@EVERY_CLASS
def test_zero_grad(cls: Class) -> None:
    params = parameters()
    opt = make(cls, params)
    set_grads(params, 0)
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    opt.zero_grad()
    assert all(p.grad is None for p in params)
    before = everything(opt)
    opt.step()
    assert_same(everything(opt), before)
    assert not opt.state or cls.__name__ == "Adagrad"  # whose states the constructor makes


@EVERY_CLASS
def test_accumulated_gradients_are_one_step(cls: Class) -> None:
    params, expected = parameters(), parameters()
    opt, whole = make(cls, params), make(cls, expected)
    for step in range(3):
        opt.zero_grad()
        for _ in range(2):
            torch.stack([(p * p).sum() for p in params]).sum().backward()
        opt.step()
        set_grads(expected, step)
        for p in expected:
            p.grad = 4 * p.detach()
        whole.step()
    assert_same(params, expected)


@EVERY_CLASS
def test_frozen_missing_and_late_gradients(cls: Class) -> None:
    """A step over all is the same as one over those that have a gradient; counts are each parameter's own."""
    params, expected = parameters(), parameters()
    params[0].requires_grad_(False)
    frozen = params[0].detach().clone()
    opt = make(cls, named(params))
    apart = [make(cls, [pair]) for pair in named(expected)]
    for step in range(4):
        set_grads(params, step)
        set_grads(expected, step)
        for i in (1, 2):
            if (i == 1 and step < 2) or (i == 2 and step == 1):  # a first gradient that is late; one that is missing
                params[i].grad = None
            else:
                apart[i].step()
        opt.step()
    assert torch.equal(params[0], frozen)
    assert params[0] not in opt.state or counts(opt, params[:1]) == [0]
    assert_same(params[1:], expected[1:])
    assert counts(opt, params[1:]) == [2, 3]
    params[0].requires_grad_(True)  # thawed
    set_grads(params, 4)
    opt.step()
    assert not torch.equal(params[0], frozen)
    assert counts(opt, params[:1]) == [1]


@EVERY_CLASS
def test_weights_that_autograd_needs_cannot_be_written_unnoticed(cls: Class) -> None:
    params = parameters()
    opt = make(cls, params)
    loss = torch.stack([(p * p).sum() for p in params]).sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Copies.


def saved_whole(thing: Any) -> Any:
    """Through torch.save, which pickles."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@EVERY_CLASS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_whole])
def test_a_copy_goes_on_bit_exactly(cls: Class, duplicate: Callable[[Any], Any]) -> None:
    params = parameters(torch.bfloat16)
    options = {"max_grad_norm": 0.7, "clip_value": 0.3, "weight_decay": 0.1}
    opt = make(cls, named(params), **options)
    train(opt, params, range(2))
    params_too, opt_too = duplicate((params, opt))
    assert type(opt_too) is cls
    assert opt_too.max_grad_norm == 0.7
    assert opt_too.param_groups[0]["clip_value"] == 0.3
    before = everything(opt_too)
    train(opt, params, range(2, 5))
    assert_same(everything(opt_too), before)  # nothing is shared
    train(opt_too, params_too, range(2, 5))
    assert_same(everything(opt_too), everything(opt))
    assert torch.equal(opt_too.grad_norm, opt.grad_norm)


def test_a_copy_keeps_what_is_in_no_state_dict() -> None:
    params = parameters(torch.bfloat16)
    opt = copy.deepcopy(AdamW(params, multi_precision=False, max_grad_norm=2.0, fused=False))
    assert opt.max_grad_norm == 2.0
    assert opt.param_groups[0]["multi_precision"] is False
    assert opt.param_groups[0]["fused"] is False


# Learning rates.

LAMBDA = [lambda epoch: 0.9**epoch, lambda epoch: 1 / (1 + epoch)]
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, LAMBDA),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, LAMBDA),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3], 0.5),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.25, 3),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.25, total_iters=4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.7),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 4, 2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=7),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1, 9), lr_scheduler.ExponentialLR(opt, 0.5)], [2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.5)]
    ),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, swa_lr=0.005, anneal_epochs=3),
}


def test_no_scheduler_of_torch_is_forgotten() -> None:
    """Schedulers of later releases must be in the list as well."""
    assert {*lr_scheduler.__all__} - {"LRScheduler"} <= {*SCHEDULERS}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_schedulers(name: str, cls: Class) -> None:
    """The sequence of rates, betas where a scheduler cycles them, and the trajectory are torch's."""
    start = parameters()
    rates: list[list[Any]] = []
    trained = []
    for kind in (cls, twin(cls)):
        params = clone(start)
        opt = kind([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], lr=0.02, weight_decay=0.1)
        scheduler = SCHEDULERS[name](opt)
        seen: list[Any] = []
        for step in range(6):
            set_grads(params, step)
            opt.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            seen.append([(group["lr"], group["betas"]) for group in opt.param_groups])
        rates.append(seen)
        trained.append(params)
    assert rates[0] == rates[1]
    assert len({str(rate) for rate in rates[0]}) > 1
    assert_follows(trained[0], trained[1], start, 6)


@EVERY_CLASS
def test_a_scheduler_is_the_same_as_rates_set_by_hand(cls: Class) -> None:
    params, expected = parameters(), parameters()
    opt, by_hand = make(cls, params), make(cls, expected)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    for step in range(3):
        set_grads(params, step)
        set_grads(expected, step)
        by_hand.param_groups[0]["lr"] = opt.defaults["lr"] * 0.5**step
        opt.step()
        by_hand.step()
        scheduler.step()
    assert_same(params, expected)


@EVERY_CLASS
@pytest.mark.parametrize("capturable", [False, True])
def test_tensor_lr_that_changes_in_place(cls: Class, capturable: bool) -> None:
    if "capturable" not in options_of(cls, capturable=True) and capturable:
        pytest.skip("has no capturable")
    params, expected = parameters(), parameters()
    lr = torch.tensor(0.5, dtype=torch.float64)
    # torch's SGD and Adagrad want to hear of tensors in other words, and some of its classes check capturable.
    opt = make(cls, params, **({"capturable": True} if capturable else {}))
    opt.param_groups[0]["lr"] = lr
    plain = make(cls, expected)
    for step in range(3):
        set_grads(params, step)
        set_grads(expected, step)
        lr.fill_(0.25 / (step + 1))
        plain.param_groups[0]["lr"] = 0.25 / (step + 1)
        opt.step()
        plain.step()
    assert opt.param_groups[0]["lr"] is lr
    start = parameters()
    if capturable:  # scalars are formed by torch's operations in fp64, whose powers may differ in the last bit
        assert_follows(params, expected, start, 3)
    else:
        assert_same(params, expected)


# Steps replaced by hand.


@pytest.mark.parametrize("value", [100.0, torch.tensor(100.0), torch.tensor(100)], ids=["float", "tensor", "int"])
def test_a_step_that_is_replaced_counts_on_from_there(value: Any) -> None:
    start = parameters()
    trained = []
    for kind, number in ((AdamW, value), (torch.optim.AdamW, torch.tensor(100.0))):
        params = clone(start)
        opt = kind(params, lr=0.02)
        train(opt, params, range(2))
        for p in params[1:]:
            opt.state[p]["step"] = copy.deepcopy(number)
        train(opt, params, range(2, 4))
        assert [float(opt.state[p]["step"]) for p in params] == [4.0, 102.0, 102.0]
        trained.append(params)
    assert_follows(trained[0], trained[1], start, 4)


def test_a_step_that_is_written_in_place_counts_on_from_there() -> None:
    start = parameters()
    trained = []
    for kind in (AdamW, torch.optim.AdamW):
        params = clone(start)
        opt = kind(params, lr=0.02)
        train(opt, params, range(2))
        opt.state[params[1]]["step"].fill_(50)
        train(opt, params, range(2, 4))
        trained.append(params)
    assert_follows(trained[0], trained[1], start, 4)


def test_states_thrown_away_start_anew() -> None:
    params, fresh = parameters(), parameters()
    opt = AdamW(params)
    train(opt, params, range(2))
    opt.state.clear()
    with torch.no_grad():
        for p, q in zip(params, fresh, strict=True):
            q.copy_(p)
    opt_fresh = AdamW(fresh)
    train(opt, params, range(2, 4))
    train(opt_fresh, fresh, range(2, 4))
    assert_same(everything(opt), everything(opt_fresh))


# Masters follow weights that someone else writes.


@EVERY_CLASS
def test_a_weight_that_is_written_takes_its_master_along(cls: Class) -> None:
    if cls.__name__ in ("Ftrl", "FTML"):
        pytest.skip("forms its weights anew from states")
    params = parameters(torch.bfloat16)
    opt = make(cls, params)
    train(opt, params, range(2))
    with torch.no_grad():
        params[0].fill_(100.0)
        params[1].data = torch.full_like(params[1], 200.0)
    train(opt, params, range(2, 3))
    masters = opt.master_weights()
    assert (masters[0] - 100).abs().max() < 10
    assert (masters[1] - 200).abs().max() < 20
    for p, master in zip(params, masters, strict=True):
        assert torch.equal(p, master.bfloat16())


def test_elements_that_are_not_written_keep_their_masters_low_bits() -> None:
    params = parameters(torch.bfloat16)
    opt = AdamW(params, lr=0.01)
    train(opt, params, range(2))
    before = opt.master_weights()[0].clone()
    with torch.no_grad():
        params[0].clamp_(min=0)
    opt.param_groups[0]["lr"] = 0.0
    train(opt, params, range(2, 3))
    after, positive = opt.master_weights()[0], before > 0
    assert positive.any()
    assert not positive.all()
    assert_same([after[positive]], [before[positive]])
    assert not torch.equal(after[positive], after[positive].bfloat16().float())
    assert (after[~positive] == 0).all()


# torch.compile.


@EVERY_CLASS
def test_a_compiled_model_trains(cls: Class) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.Tanh(), torch.nn.Linear(3, 1, bias=False))
    other = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    for forward, module in ((compiled, model), (other, other)):
        opt = make(cls, module.parameters())
        for _ in range(3):
            opt.zero_grad()
            forward(x).square().sum().backward()
            opt.step()
    start = [torch.zeros_like(p) for p in other.parameters()]
    assert_follows(list(model.parameters()), list(other.parameters()), start, 3)


def test_a_step_inside_a_compiled_function_breaks_the_graph() -> None:
    params, expected = parameters(shapes=((5,),)), parameters(shapes=((5,),))
    opt, plain = AdamW(params, lr=0.1), AdamW(expected, lr=0.1)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()

    def before_and_after(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        opt.step()
        return y + params[0].detach()

    compiled = torch.compile(before_and_after, backend=backend)
    for step in range(10):  # torch gives up on what it has compiled anew 8 times
        set_grads(params, step)
        set_grads(expected, step)
        plain.step()
        got = compiled(torch.ones(5))
        assert torch.equal(got, 2 + expected[0].detach())
    assert len(graphs) == 2  # before the step and after it
    assert_same(params, expected)


def test_torchs_compiler_is_imported_neither_at_once_nor_by_training() -> None:
    """torch's own optimizers import it, in a second: in `add_param_group`, `zero_grad` and both of `state_dict`."""
    program = """
import sys, torch
before = set(sys.modules)
import tritopt.optim, tritopt.commands.app
print([name for name in ("torch._dynamo", "torch._inductor") if name in set(sys.modules) - before])
from tests.support.training import CLASSES, options_of
for cls in CLASSES:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    opt = cls([weight], **options_of(cls), fused=None if cls is tritopt.optim.AdamW else False)
    weight.square().sum().backward()
    opt.step()
    opt.zero_grad()
    opt.load_state_dict(opt.state_dict())
    print(cls.__name__, weight.grad, "torch._dynamo" in sys.modules)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[]", *(f"{cls.__name__} None False" for cls in CLASSES)], done.stderr


def test_methods_that_others_patched_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("add_param_group", "zero_grad", "state_dict"):
        method = getattr(torch.optim.Optimizer, name)

        def patched(self: Any, *args: Any, method: Any = method, **kwargs: Any) -> Any:
            called.append(method.__name__)
            return method(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.Optimizer, name, functools.wraps(method)(patched))
    opt = tritopt.optim.SGD(parameters(), lr=0.1)
    called.clear()
    opt.add_param_group({"params": torch.ones(3)})
    opt.zero_grad()
    opt.state_dict()
    assert called == ["add_param_group", "zero_grad", "state_dict"]


@EVERY_CLASS
def test_repr_and_defaults(cls: Class) -> None:
    opt = make(cls, parameters())
    assert repr(opt).startswith(f"{cls.__name__} (\nParameter Group 0\n")
    reference = twin(cls)
    if reference is not None:
        theirs = reference(parameters(), **options_of(cls)).defaults
        ours = {name: value for name, value in opt.defaults.items() if name in theirs}
        assert ours == theirs
    assert opt.param_groups[0].keys() >= {"params", "lr", "clip_value", "multi_precision"}
    assert not math.isnan(float(opt.param_groups[0]["lr"]))
