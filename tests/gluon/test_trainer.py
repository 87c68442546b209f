"""Trainer does what Gluon's does: it equals Updater bit for bit, and refuses what it should before anything changes."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tritopt
from tests.gluon.models import BATCH, Model, Snapshot, assert_same, batch_of, counts, everything, loss_of, train
from tests.support.training import record_launches
from tritopt.kernels.language import HAS_TRITON

BOTH_PATHS = pytest.mark.parametrize(
    "fused", [pytest.param(True, marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")), False]
)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "adam": {"clip_gradient": 0.5},
    "lamb": {},
    "signum": {"wd_lh": 0.01},
}


@BOTH_PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_updater_bit_for_bit(name: str, dtype: torch.dtype, fused: bool) -> None:
    """Multipliers are by pattern here and by index there, batches have several sizes, and the rate changes."""
    arguments = {"learning_rate": 0.1, "wd": 0.05, "multi_precision": True, "use_fused_step": fused, **OPTIMIZERS[name]}
    model = Model(dtype)
    other = copy.deepcopy(model)
    trainer = tritopt.Trainer(model, name, arguments)
    trainer.optimizer.set_lr_mult({"*.bias": 2.0})
    trainer.optimizer.set_wd_mult({"*norm*": 0.0, re.compile("bias$"): 0.5})
    opt = tritopt.create(name, **arguments)
    opt.set_lr_mult({1: 2.0, 3: 2.0, 5: 2.0})
    opt.set_wd_mult({2: 0.0, 3: 0.0, 1: 0.5, 5: 0.5})
    updater, params = tritopt.get_updater(opt), list(other.parameters())
    for step, size in enumerate((4, 4, 3, 5)):
        if step == 2:
            trainer.set_learning_rate(0.05)
            opt.set_learning_rate(0.05)
        train(trainer, model, range(step, step + 1), size)
        loss_of(other, batch_of(step, size, dtype)).backward()
        opt.rescale_grad = 1.0 / size
        updater(list(range(6)), [param.grad for param in params], params)
        for param in params:
            param.grad = None
    expected = [param.detach().clone() for param in params]
    flat = everything(trainer)
    assert_same(flat[:6], expected)
    other_trainer = tritopt.Trainer(other, opt)
    other_trainer._updater = updater
    assert_same(flat, everything(other_trainer))
    assert counts(trainer) == (dict.fromkeys(range(6), 4), 4)
    start = Model(dtype)
    assert all(not torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters(), strict=True))


def test_divides_by_the_batch_size_in_the_step() -> None:
    """No pass over gradients: they are as backward has left them."""
    p = nn.Parameter(torch.ones(2))
    p.grad_req = "add"  # type: ignore[attr-defined]
    trainer = tritopt.Trainer([p], "sgd", {"learning_rate": 1.0})
    p.grad = torch.full((2,), 8.0)
    trainer.step(4)
    assert p.tolist() == [-1.0, -1.0]
    assert p.grad.tolist() == [8.0, 8.0]
    assert trainer.optimizer.rescale_grad == 0.25
    p.grad = torch.full((2,), 8.0)
    trainer.update(2)
    assert p.tolist() == [-5.0, -5.0]


def test_a_rescale_grad_of_the_optimizer_stays_a_factor() -> None:
    p = nn.Parameter(torch.zeros(1))
    trainer = tritopt.Trainer([p], "sgd", {"learning_rate": 1.0, "rescale_grad": 0.5})
    for size in (2, 4):
        p.grad = torch.tensor([8.0])
        trainer.step(size)
    assert p.item() == -2.0 - 1.0


def test_replays_what_it_has_built(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    made: list[int] = []
    original = tritopt.Optimizer._run_again

    def run_again(self: Any, repeated: Any) -> None:
        made.append(1)
        original(self, repeated)

    monkeypatch.setattr(tritopt.Optimizer, "_run_again", run_again)
    launches = record_launches(monkeypatch)
    model = Model()
    trainer = tritopt.Trainer(model, "adam", {"use_fused_step": True})
    train(trainer, model, range(4))
    assert len(made) == 3
    assert len(launches) == 4


# What it is given.


def forms(model: nn.Module) -> dict[str, Any]:
    return {
        "module": model,
        "pairs": list(model.named_parameters()),
        "generator": model.named_parameters(),
        "dict": dict(model.named_parameters()),
        "parameters": list(model.parameters()),
        "generator of parameters": model.parameters(),
        "compiled": torch.compile(model, backend="eager"),
    }


@pytest.mark.parametrize("form", forms(Model()))
def test_forms_of_parameters(form: str) -> None:
    model, expected = Model(), Model()
    trainer = tritopt.Trainer(forms(model)[form], "sgd", {"learning_rate": 0.5})
    train(trainer, model, range(2))
    train(tritopt.Trainer(expected, "sgd", {"learning_rate": 0.5}), expected, range(2))
    assert_same([p.detach() for p in model.parameters()], [p.detach() for p in expected.parameters()])
    names = list(range(6)) if "parameters" in form else [name for name, _ in model.named_parameters()]
    assert list(trainer.collect()) == names


def test_tied_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert list(tritopt.Trainer(model, "sgd").collect()) == ["0.weight"]
    weight: Any = model[0].weight
    assert len(tritopt.Trainer([("a", weight), ("b", weight)], "sgd").collect()) == 1


def test_parameters_that_take_shape_later() -> None:
    """A Trainer may come before the first forward pass, as with Gluon's deferred initialization."""
    model = nn.LazyLinear(3)
    trainer = tritopt.Trainer(model, "adam")
    model(torch.ones(2, 5)).sum().backward()
    before = model.weight.detach().clone()
    trainer.step(2)
    assert not torch.equal(model.weight, before)


def test_an_instance_is_given_the_parameters() -> None:
    model = Model()
    opt = tritopt.create("sgd", learning_rate=0.5)
    trainer = tritopt.Trainer(model, opt)
    assert trainer.optimizer is opt
    assert list(opt.param_dict.values()) == list(model.parameters())
    assert opt.idx2name[1] == "fc.bias"
    opt.set_lr_mult({"*.bias": 0.0}, strict=True)
    assert opt._get_lrs([0, 1]) == [0.5, 0.0]
    own = tritopt.create("sgd", param_idx2name={0: "mine"})
    assert tritopt.Trainer([nn.Parameter(torch.zeros(1))], own).optimizer.idx2name == {0: "mine"}


def test_learning_rate() -> None:
    trainer = tritopt.Trainer(Model(), "sgd", {"learning_rate": 0.5})
    assert trainer.learning_rate == 0.5
    trainer.set_learning_rate(0.25)
    assert trainer.learning_rate == trainer.optimizer.learning_rate == 0.25
    with pytest.raises(ValueError, match="learning_rate=-1"):
        trainer.set_learning_rate(-1)
    schedule = tritopt.lr_scheduler.FactorScheduler(step=2, factor=0.5, base_lr=1.0)
    scheduled = tritopt.Trainer(Model(), "sgd", {"learning_rate": None, "lr_scheduler": schedule})
    with pytest.raises(UserWarning, match=r"has no effect beside an lr_scheduler"):
        scheduled.set_learning_rate(0.1)
    assert scheduled.learning_rate == 1.0


def test_multipliers_of_parameters_are_read_live() -> None:
    model = Model()
    trainer = tritopt.Trainer(model, "sgd", {"learning_rate": 0.5, "wd": 0.1})
    train(trainer, model, range(1))
    trainer.collect("*.bias", "norm.*").setattr("lr_mult", 0)
    before = [p.detach().clone() for p in model.parameters()]
    train(trainer, model, range(1, 2))
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == [True, False, False, False, True, False]
    trainer.collect("norm.*").setattr("lr_mult", 1)
    train(trainer, model, range(2, 3))
    assert not torch.equal(model.norm.weight, before[2])
    assert torch.equal(model.fc.bias, before[1])


@BOTH_PATHS
def test_max_grad_norm(fused: bool) -> None:
    """The norm is that of the gradients after the division."""
    p, q = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    trainer = tritopt.Trainer([p, q], "sgd", {"learning_rate": 1.0, "use_fused_step": fused}, max_grad_norm=2.5)
    for _ in range(2):
        p.grad, q.grad = torch.tensor([30.0]), torch.tensor([40.0])
        trainer.step(10)
    assert [p.item(), q.item()] == pytest.approx([-3.0, -4.0])
    assert trainer.optimizer.grad_norm is not None
    assert trainer.optimizer.grad_norm.item() == 5.0
    opt = tritopt.create("sgd")
    assert tritopt.Trainer(Model(), opt, max_grad_norm=2.0).optimizer.max_grad_norm == 2.0


# What goes wrong.

BAD_BATCHES = [
    (0, ValueError, "batch_size=0 must be > 0"),
    (-4, ValueError, "batch_size=-4 must be > 0"),
    (math.nan, ValueError, "batch_size=nan must not be NaN"),
    (math.inf, ValueError, "batch_size=inf must be finite"),
    (10**400, ValueError, r"batch_size=10+\.\.\. is larger than any float"),
    (1e-320, ValueError, "batch_size=1e-320 makes inf of the factor"),
    ("32", TypeError, "batch_size='32' must be a number"),
    (True, TypeError, "batch_size=True must be a number"),
    (None, TypeError, "batch_size=None must be a number"),
    (torch.tensor(4), TypeError, "batch_size=tensor"),
]


@pytest.mark.parametrize(("size", "error", "message"), BAD_BATCHES, ids=lambda value: str(value)[:14])
@pytest.mark.parametrize("method", ["step", "update"])
def test_bad_batch_sizes_change_nothing(size: Any, error: type[Exception], message: str, method: str) -> None:
    model = Model()
    trainer = tritopt.Trainer(model, "adam")
    train(trainer, model, range(2))
    loss_of(model, batch_of(2)).backward()
    before = Snapshot(trainer)
    with pytest.raises(error, match=message):
        getattr(trainer, method)(size)
    before.check()
    trainer.step(BATCH)  # and the gradients are as fresh as they were


def spoil_shape(model: Model) -> None:
    model.fc.bias.grad = None
    model.fc.bias.data = torch.zeros(7)
    model.fc.bias.grad = torch.zeros(7)


def spoil_grad_req(model: Model) -> None:
    model.fc.bias.grad_req = "ad"  # type: ignore[attr-defined]


def spoil_multiplier(model: Model) -> None:
    model.fc.bias.lr_mult = math.nan  # type: ignore[attr-defined]


@BOTH_PATHS
@pytest.mark.parametrize(
    ("spoil", "message"), [(spoil_shape, "shape"), (spoil_grad_req, "grad_req='ad'"), (spoil_multiplier, "lr_mult")]
)
@pytest.mark.parametrize("scales", [True, False])
def test_a_step_that_fails_changes_nothing(
    spoil: Callable[[Any], None], message: str, scales: bool, fused: bool
) -> None:
    model = Model()
    trainer = tritopt.Trainer(
        model, "adam", {"use_fused_step": fused}, loss_scaler=tritopt.LossScaler() if scales else None
    )
    train(trainer, model, range(2))
    loss = loss_of(model, batch_of(2))
    if scales:
        with trainer.scale_loss(loss) as scaled:
            scaled.backward()
    else:
        loss.backward()
    spoil(model)
    before = Snapshot(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.step(BATCH)
    before.check()


BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"optimizer": "adamm"}, ValueError, "unknown optimizer 'adamm'; did you mean 'adam' or"),
    ({"optimizer": torch.optim.SGD}, TypeError, "must be a name such as 'sgd', or an instance of tritopt.Optimizer"),
    ({"optimizer": tritopt.SGD}, TypeError, "must be a name such as 'sgd', or an instance of tritopt.Optimizer"),
    ({"optimizer_params": {"learning_rte": 1}}, TypeError, "learning_rte"),
    ({"optimizer_params": 0.1}, TypeError, "optimizer_params=0.1 must be a dict"),
    (
        {"optimizer": tritopt.create("sgd"), "optimizer_params": {"learning_rate": 1}},
        ValueError,
        "optimizer_params must be None if optimizer is an instance of Optimizer instead of str",
    ),
    (
        {"kvstore": "dist_sync"},
        ValueError,
        "kvstore='dist_sync' must be 'device' or None: start one process",
    ),
    ({"kvstore": "local"}, ValueError, "torchrun"),
    ({"update_on_kvstore": True}, ValueError, "update_on_kvstore=True must be None or False"),
    ({"compression_params": {"type": "2bit"}}, ValueError, "DistributedDataParallel.*communication hook"),
    ({"max_grad_norm": 0}, ValueError, "max_grad_norm=0 must be > 0"),
    ({"max_grad_norm": -1, "optimizer": tritopt.create("sgd")}, ValueError, "max_grad_norm=-1 must be > 0"),
    ({"max_grad_norm": 1, "optimizer_params": {"max_grad_norm": 1}}, ValueError, "max_grad_norm is given twice"),
    ({"loss_scaler": True}, TypeError, "loss_scaler=True must be a tritopt.LossScaler"),
    ({"loss_scaler": 2.0**16}, TypeError, "loss_scaler=65536.0 must be a tritopt.LossScaler"),
    (
        {"loss_scaler": tritopt.LossScaler(), "optimizer_params": {"aggregate_num": 4}},
        ValueError,
        "loss_scaler is of all gradients together, and aggregate_num=4 splits",
    ),
    ({"optimizer_params": {"rescale_grad": math.nan}}, ValueError, "rescale_grad=nan must be a finite number"),
    (
        {"optimizer_params": {"rescale_grad": torch.ones(())}},
        ValueError,
        "rescale_grad=tensor.* must be a finite",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS, ids=lambda value: str(value)[:30])
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tritopt.Trainer(**{"params": Model(), "optimizer": "sgd", **arguments})


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("scaler", [None, tritopt.LossScaler], ids=["", "loss scaler"])
def test_a_copy_goes_on_alike(copied: Callable[[Any], Any], scaler: Any) -> None:
    """Multipliers of parameters, a rescale_grad of the optimizer and gradients that add up included."""
    model = Model()
    arguments = {"learning_rate": 0.1, "momentum": 0.9, "rescale_grad": 0.5}
    trainer = tritopt.Trainer(model, "sgd", arguments, loss_scaler=scaler and scaler(init_scale=4.0))
    trainer.collect("*.bias").setattr("lr_mult", 0.0)
    trainer.collect("norm.weight").setattr("grad_req", "add")
    train(trainer, model, range(2))
    other_model, other = copied((model, trainer))
    for one in (trainer, other):
        one.collect().zero_grad()
    train(trainer, model, range(2, 4))
    train(other, other_model, range(2, 4), 4)
    assert_same(everything(other), everything(trainer))
    assert counts(other) == counts(trainer)
    fresh = Model()
    assert torch.equal(other_model.fc.bias, fresh.fc.bias)


def test_an_optimizer_of_an_earlier_trainer_begins_anew() -> None:
    """The batch size and the names that one has left are gone."""
    opt = tritopt.create("sgd", learning_rate=1.0, rescale_grad=0.5)
    p, q = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    trainer = tritopt.Trainer({"p": p}, opt)
    p.sum().backward()
    trainer.step(4)
    assert p.item() == -0.125
    del trainer
    trainer = tritopt.Trainer({"q": q}, opt)
    opt.set_lr_mult({"q": 2.0})
    q.sum().backward()
    trainer.step(1)
    assert q.item() == -1.0
    with pytest.warns(UserWarning, match="this optimizer has another Trainer already"):
        tritopt.Trainer({"r": nn.Parameter(torch.zeros(1))}, opt)


@pytest.mark.parametrize("scaler", ["x", "taken"])
def test_a_refused_scaler_leaves_the_instance_alone(scaler: Any) -> None:
    opt, owner = tritopt.create("sgd"), None
    if scaler == "taken":
        scaler = tritopt.LossScaler()
        owner = tritopt.Trainer(Model(), "sgd", loss_scaler=scaler)
    with pytest.raises((TypeError, ValueError), match="LossScaler"):
        tritopt.Trainer(Model(), opt, max_grad_norm=0.1, loss_scaler=scaler)
    assert (opt.max_grad_norm, opt.param_dict, opt.idx2name) == (None, {}, {})
    del owner


def test_a_refused_bound_leaves_the_instance_alone() -> None:
    opt = tritopt.create("sgd", max_grad_norm=2.0)
    with pytest.raises(ValueError, match="max_grad_norm=-1"):
        tritopt.Trainer(Model(), opt, max_grad_norm=-1)
    assert opt.max_grad_norm == 2.0
    assert opt.param_dict == {}


leaf = nn.Parameter(torch.zeros(1))
BAD_PARAMS: list[tuple[Any, type[Exception], str]] = [
    ([], ValueError, "params has no parameters"),
    (nn.ReLU(), ValueError, "params has no parameters"),
    (leaf, TypeError, "params is a Parameter: pass a module, a list"),
    ("fc", TypeError, "params is a str"),
    (3, TypeError, "params is a int"),
    ([leaf, 3], TypeError, r"params\[1\] is 3, which is no parameter"),
    ([("a", leaf, 1)], TypeError, r"(?s)params\[0\] .*a pair must be \(name, parameter\)"),
    ([(1, leaf)], TypeError, r"(?s)params\[0\] .*a pair must be \(name, parameter\)"),
    ({"a": None}, TypeError, "parameter 'a' is None, which is no parameter"),
    ([("a", leaf), nn.Parameter(torch.zeros(1))], TypeError, r"params\[1\] has no name, and others have"),
    ([("a", leaf), ("a", nn.Parameter(torch.zeros(1)))], ValueError, "two parameters are called 'a'"),
    ([leaf * 2], ValueError, r"params\[0\] is the result of an operation"),
    ([("a", torch.zeros(1, dtype=torch.int64))], TypeError, "parameter 'a' is torch.int64"),
    ([torch.zeros(1, dtype=torch.complex64)], TypeError, r"params\[0\] is torch.complex64"),
]


@pytest.mark.parametrize(("params", "error", "message"), BAD_PARAMS, ids=lambda value: str(value)[:30])
def test_bad_params(params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tritopt.Trainer(params, "sgd")


def test_two_trainers_of_one_parameter_are_a_warning() -> None:
    model = Model()
    first = tritopt.Trainer(model, "sgd")
    with pytest.warns(UserWarning, match=r"^parameter `out.weight` and 1 more has another Trainer already"):
        second = tritopt.Trainer(model.out.named_parameters(prefix="out"), "sgd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tritopt.Trainer(Model(), "sgd")
        del first, second
        gc.collect()
        tritopt.Trainer(model, "sgd")  # they are gone


def test_a_trainer_is_freed_at_once() -> None:
    """It is in no circle of references, so that the next one of these parameters is no warning."""
    model = Model()
    trainer = tritopt.Trainer(model, "sgd", loss_scaler=tritopt.LossScaler())
    gc.disable()
    try:
        train(trainer, model, range(1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            del trainer
            tritopt.Trainer(model, "sgd")
    finally:
        gc.enable()


# Parameters by name.


def test_collect() -> None:
    model = Model()
    trainer = tritopt.Trainer(model, "sgd")
    assert list(trainer.collect("*.bias")) == ["fc.bias", "norm.bias", "out.bias"]
    assert list(trainer.collect(re.compile("norm"), "fc.bias")) == ["fc.bias", "norm.weight", "norm.bias"]
    assert trainer.collect("fc.weight")["fc.weight"] is model.fc.weight
    with pytest.warns(UserWarning, match=r"'\*.biass' matches no parameter; the nearest are 'fc.bias'.*strict=True"):
        assert list(trainer.collect("*.biass", "fc.bias")) == ["fc.bias"]
    with pytest.raises(ValueError, match=r"'\*.biass' matches no parameter; the nearest are 'fc.bias'"):
        trainer.collect("*.biass", strict=True)
    with pytest.raises(TypeError, match="3 selects no parameters"):
        trainer.collect(3)  # type: ignore[arg-type]
    unnamed = tritopt.Trainer(list(Model().parameters()), "sgd")
    with pytest.raises(ValueError, match=r"'\*.bias' is matched with names.*have none: construct it with a module"):
        unnamed.collect("*.bias")
    with pytest.raises(ValueError, match=r"lr_mult: '\*.bias' is matched with names of parameters, and none has"):
        unnamed.optimizer.set_lr_mult({"*.bias": 0.5})


def test_setattr() -> None:
    model = Model()
    biases = tritopt.Trainer(model, "sgd").collect("*.bias")
    biases.setattr("wd_mult", 0)
    assert [getattr(p, "wd_mult", None) for p in model.parameters()] == [None, 0, None, 0, None, 0]
    for name, value, error, message in [
        ("wd_mul", 0, ValueError, "no attribute 'wd_mul' of parameters; did you mean 'wd_mult'"),
        ("lr_mult", math.nan, ValueError, "lr_mult=nan"),
        ("lr_mult", -1, ValueError, "lr_mult=-1"),
        ("lr_mult", "1", TypeError, "lr_mult='1'"),
        ("grad_req", "ad", ValueError, "grad_req='ad' must be one of 'write', 'add', 'null'"),
    ]:
        with pytest.raises(error, match=message):
            biases.setattr(name, value)
    assert not hasattr(model.fc.bias, "lr_mult")
    loss_of(model, batch_of(0)).backward()
    biases.zero_grad()
    assert [p.grad is None for p in model.parameters()] == [False, True] * 3
