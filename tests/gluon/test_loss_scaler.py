"""LossScaler: MXNet's rule, decided on the device; a step reads the scale there, and what overflows writes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import tritopt
from tests.gluon.models import BATCH, Model, Snapshot, assert_same, batch_of, everything, loss_of, train
from tests.support.training import record_launches
from tritopt.gluon.loss_scaler import LossScaler
from tritopt.kernels.language import HAS_TRITON

BOTH_PATHS = pytest.mark.parametrize(
    "fused", [pytest.param(True, marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")), False]
)


class Scale:
    """MXNet's rule in Python, but that a new scale counts at once: python/mxnet/amp/loss_scaler.py of 2.0."""

    def __init__(self, scale: float, window: int) -> None:
        self.scale, self.window, self.unskipped = scale, window, 0

    def update(self, overflow: bool) -> None:
        if overflow:
            self.scale, self.unskipped = self.scale / 2.0, 0
        else:
            self.unskipped += 1
        if self.unskipped == self.window:
            self.unskipped, self.scale = 0, min(2.0**24, self.scale * 2.0)


def test_the_defaults_are_mxnets() -> None:
    scaler = LossScaler()
    assert scaler.loss_scale == 2.0**16
    c = scaler._constants
    assert (c["GROWTH"], c["BACKOFF"], c["WINDOW"], c["MOST"]) == (2.0, 0.5, 2000, 2.0**24)
    assert scaler.state_dict() == {"loss_scale": 2.0**16, "clean_steps": 0}


@pytest.mark.parametrize("kernel", [True, False])
def test_grows_and_shrinks_as_mxnets(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel:
        pytest.importorskip("triton")
    else:
        monkeypatch.setattr("tritopt.gluon.loss_scaler.unavailable", lambda tensor: "no kernel here")
    scaler, expected = LossScaler(2.0**22, scale_window=3), Scale(2.0**22, 3)
    one, nan = (torch.tensor(value, dtype=torch.float64) for value in (1.0, math.nan))
    for overflow in [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1]:
        scaler.update(nan if overflow else one)
        expected.update(bool(overflow))
        assert scaler.state_dict() == {"loss_scale": expected.scale, "clean_steps": expected.unskipped}
    assert expected.scale < 2.0**22


@pytest.mark.parametrize("kernel", [True, False])
def test_stays_within_its_bounds(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel:
        pytest.importorskip("triton")
    else:
        monkeypatch.setattr("tritopt.gluon.loss_scaler.unavailable", lambda tensor: "no kernel here")
    scaler = LossScaler(8.0, scale_factor=3.0, scale_window=1, min_loss_scale=2.0, max_loss_scale=20.0)
    scales = []
    for value in (1.0, 1.0, math.nan, math.nan, math.nan, 1.0):
        scaler.update(torch.tensor(value, dtype=torch.float64))
        scales.append(scaler.loss_scale)
    assert scales == pytest.approx([20.0, 20.0, 20 / 3, 20 / 9, 2.0, 6.0])


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"init_scale": 0.0}, ValueError, "init_scale=0.0 must be within the bounds"),
    ({"init_scale": 2.0**25}, ValueError, "init_scale=33554432.0 must be within the bounds"),
    ({"init_scale": math.nan}, ValueError, "init_scale=nan"),
    ({"init_scale": "65536"}, TypeError, "init_scale='65536'"),
    ({"scale_factor": 1.0}, ValueError, "scale_factor=1.0 must be > 1"),
    ({"scale_factor": math.inf}, ValueError, "scale_factor=inf"),
    ({"scale_window": 0}, ValueError, "scale_window=0 must be at least 1"),
    ({"scale_window": 2.5}, TypeError, "scale_window=2.5"),
    ({"min_loss_scale": 0.0}, ValueError, "min_loss_scale=0.0 must be > 0"),
    ({"min_loss_scale": 4.0, "max_loss_scale": 2.0}, ValueError, "at most max_loss_scale=2.0"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LossScaler(**arguments)


def test_scales_losses() -> None:
    scaler = LossScaler(4.0)
    loss = torch.tensor(3.0, requires_grad=True)
    assert scaler.scale(loss).item() == 12.0
    pair = scaler.scale([loss, loss * 2])
    assert isinstance(pair, list)
    assert [one.item() for one in pair] == [12.0, 24.0]
    assert isinstance(scaler.scale((loss,)), tuple)
    scaler.scale(loss).backward()
    assert loss.grad is not None
    assert loss.grad.item() == 4.0
    assert scaler.scale(torch.ones(2, dtype=torch.float16)).dtype == torch.float16
    with pytest.raises(TypeError, match=r"a loss to be scaled is a tensor.*got 3\.0"):
        scaler.scale(3.0)  # type: ignore[type-var]


# In a Trainer.


@BOTH_PATHS
@pytest.mark.parametrize("name", ["sgd", "adam", "lamb"])
def test_a_power_of_two_changes_no_bit(name: str, fused: bool) -> None:
    runs = []
    for scaler in (None, LossScaler(), LossScaler(2.0**10, scale_window=1)):
        model = Model()
        trainer = tritopt.Trainer(model, name, {"use_fused_step": fused, "wd": 0.1}, loss_scaler=scaler)
        train(trainer, model, range(3))
        runs.append(everything(trainer))
        assert trainer.optimizer.rescale_grad == 1 / BATCH
        assert trainer.optimizer.max_grad_norm is None
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])


@BOTH_PATHS
def test_with_a_clip(fused: bool) -> None:
    """The norm is that of the gradients without the scale."""
    runs = []
    for scaler in (None, LossScaler()):
        model = Model()
        trainer = tritopt.Trainer(model, "adam", {"use_fused_step": fused}, max_grad_norm=0.25, loss_scaler=scaler)
        train(trainer, model, range(3))
        assert trainer.optimizer.max_grad_norm == 0.25
        assert trainer.optimizer.grad_norm is not None
        runs.append([*everything(trainer), trainer.optimizer.grad_norm])
    assert_same(runs[1], runs[0])


@BOTH_PATHS
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_overflow_skips_and_halves(value: float, clip: float | None, fused: bool) -> None:
    model = Model()
    scaler = LossScaler(scale_window=3)
    trainer = tritopt.Trainer(model, "adam", {"use_fused_step": fused}, loss_scaler=scaler, max_grad_norm=clip)
    train(trainer, model, range(1))
    before = everything(trainer)
    with trainer.scale_loss(loss_of(model, batch_of(1))) as scaled:
        scaled.backward()
    assert model.norm.bias.grad is not None
    model.norm.bias.grad[2] = value
    trainer.step(BATCH)
    assert_same(everything(trainer), before)
    assert scaler.state_dict() == {"loss_scale": 2.0**15, "clean_steps": 0}
    assert all(p.grad is None for p in model.parameters())
    train(trainer, model, range(2, 5))
    assert scaler.state_dict() == {"loss_scale": 2.0**16, "clean_steps": 0}
    assert not torch.equal(everything(trainer)[0], before[0])


@BOTH_PATHS
def test_fp16_training_finds_its_scale(fused: bool) -> None:
    """Training begins with a scale that overflows fp16, comes to one that does not, and learns."""
    model = Model(torch.float16)
    scaler = LossScaler(2.0**24)
    trainer = tritopt.Trainer(
        model, "adam", {"multi_precision": True, "use_fused_step": fused, "learning_rate": 0.01}, loss_scaler=scaler
    )
    x = batch_of(0, dtype=torch.float16)
    start = loss_of(model, x).item()
    for _ in range(30):
        with trainer.scale_loss(loss_of(model, x)) as scaled:
            scaled.backward()
        trainer.step(BATCH)
    assert 2.0**4 <= scaler.loss_scale < 2.0**20
    assert loss_of(model, x).item() < 0.5 * start
    assert all(tensor.isfinite().all() for tensor in everything(trainer))


def test_gradients_of_several_losses_add_up() -> None:
    p = nn.Parameter(torch.zeros(1))
    trainer = tritopt.Trainer([p], "sgd", {"learning_rate": 1.0}, loss_scaler=LossScaler(8.0))
    with trainer.scale_loss([p.sum(), 2 * p.sum()]) as scaled:
        for one in scaled:
            one.backward()
    with trainer.scale_loss(3 * p.sum()) as another:
        another.backward()
    assert p.grad is not None
    assert p.grad.item() == 48.0
    trainer.step(2)
    assert p.item() == -3.0


def test_the_norm_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch finds the overflow, and clips too."""
    pytest.importorskip("triton")
    launches = record_launches(monkeypatch)
    for clip in (None, 1.0):
        model = Model()
        trainer = tritopt.Trainer(model, "sgd", {"use_fused_step": True}, loss_scaler=LossScaler(), max_grad_norm=clip)
        launches.clear()
        train(trainer, model, range(3))
        assert [launch.phases[0].kernels for _, launch in launches] == [("square_update",), ("sgd_update",)] * 3


def test_decides_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch reads the factor from a tensor; test_cuda_trainer.py shows that nothing waits."""
    pytest.importorskip("triton")
    model = Model()
    trainer = tritopt.Trainer(model, "adam", {"use_fused_step": True}, loss_scaler=LossScaler(), max_grad_norm=1.0)
    train(trainer, model, range(2))
    launches = record_launches(monkeypatch)
    with trainer.scale_loss(loss_of(model, batch_of(2))) as scaled:
        scaled.backward()
    trainer.step(BATCH)
    _, launch = launches[-1]
    assert launch.rescale is not None
    assert launch.rescale is trainer.optimizer.grad_factor
    assert launch.noop is None


# What goes wrong.


@pytest.mark.parametrize("method", ["step", "update"])
def test_a_step_inside_scale_loss_is_refused(method: str) -> None:
    model = Model()
    trainer = tritopt.Trainer(model, "adam", loss_scaler=LossScaler())
    train(trainer, model, range(1))
    with trainer.scale_loss(loss_of(model, batch_of(1))) as scaled:
        scaled.backward()
        before = Snapshot(trainer)
        with pytest.raises(RuntimeError, match=rf"{method}\(\) inside scale_loss\(\): leave the block"):
            getattr(trainer, method)(BATCH)
        before.check()
    getattr(trainer, method)(BATCH)


def test_a_step_without_a_scaled_loss_is_refused() -> None:
    """Gradients would be divided by a scale that they do not have."""
    model = Model()
    trainer = tritopt.Trainer(model, "adam", loss_scaler=LossScaler())
    for step in range(2):
        loss_of(model, batch_of(step)).backward()
        before = Snapshot(trainer)
        with pytest.raises(RuntimeError, match=r"no loss was scaled since the last: with trainer.scale_loss\(loss\)"):
            trainer.step(BATCH)
        before.check()
        trainer.zero_grad()
        train(trainer, model, range(step, step + 1))


def test_zero_grad_takes_a_scaled_loss_back() -> None:
    p = nn.Parameter(torch.zeros(1))
    trainer = tritopt.Trainer([p], "sgd", loss_scaler=tritopt.LossScaler())
    with trainer.scale_loss(p.sum()) as scaled:
        scaled.backward()
    trainer.zero_grad()
    p.sum().backward()
    with pytest.raises(RuntimeError, match="no loss was scaled since the last"):
        trainer.step(1)
    assert p.item() == 0


def test_a_block_that_fails_counts_as_none() -> None:
    model = Model()
    trainer = tritopt.Trainer(model, "adam", loss_scaler=LossScaler())
    with pytest.raises(ZeroDivisionError), trainer.scale_loss(loss_of(model, batch_of(0))):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="no loss was scaled"):
        trainer.step(BATCH)
    train(trainer, model, range(1))


def test_without_a_scaler_no_loss_is_scaled() -> None:
    model = Model()
    trainer = tritopt.Trainer(model, "adam")
    assert trainer.loss_scaler is None
    loss = loss_of(model, batch_of(0))
    with pytest.raises(ValueError, match=r"no loss scaler: construct it with loss_scaler"), trainer.scale_loss(loss):
        pass


def test_each_trainer_has_its_own() -> None:
    scaler = LossScaler()
    first = tritopt.Trainer(Model(), "sgd", loss_scaler=scaler)
    with pytest.raises(ValueError, match="this LossScaler is another Trainer's"):
        tritopt.Trainer(Model(), "sgd", loss_scaler=scaler)
    assert first.loss_scaler is scaler
    del first
    tritopt.Trainer(Model(), "sgd", loss_scaler=scaler)


def test_not_for_optimizers_with_a_step_of_their_own() -> None:
    class Own(tritopt.Optimizer):
        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            pass

    with pytest.raises(ValueError, match="loss_scaler is not for Own, which overrides step"):
        tritopt.Trainer(Model(), Own(), loss_scaler=LossScaler())


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"loss_scale": 2.0},
        {"loss_scale": 2.0, "clean_steps": 1, "more": 1},
        {"loss_scale": -1.0, "clean_steps": 1},
        {"loss_scale": math.nan, "clean_steps": 1},
        {"loss_scale": 2.0, "clean_steps": -1},
        {"loss_scale": 2.0, "clean_steps": 1.5},
    ],
    ids=str,
)
def test_bad_states_change_nothing(state: Any) -> None:
    scaler = LossScaler()
    with pytest.raises((ValueError, TypeError)):
        scaler.load_state_dict(state)
    assert scaler.state_dict() == {"loss_scale": 2.0**16, "clean_steps": 0}


def test_state_round_trip() -> None:
    scaler, other = LossScaler(scale_window=2), LossScaler(scale_window=2)
    scaler.update(torch.tensor(math.nan, dtype=torch.float64))
    scaler.update(torch.tensor(1.0, dtype=torch.float64))
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == {"loss_scale": 2.0**15, "clean_steps": 1}
    other.update(torch.tensor(1.0, dtype=torch.float64))
    assert other.loss_scale == 2.0**16
