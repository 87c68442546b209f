"""save_states and load_states: bit for bit on, whole at every moment, and refused before anything of it counts."""

from __future__ import annotations

import os
import pickle
import random
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tritopt
from tests.gluon.models import (
    BATCH,
    Model,
    Snapshot,
    assert_same,
    batch_of,
    counts,
    everything,
    loss_of,
    save_for_ever,
    train,
)
from tests.support.world import forks
from tritopt.gluon import states_file

ARGUMENTS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9},
    "adam": {"multi_precision": True},
    "lamb": {"multi_precision": True, "master": "split16", "state_dtype": "bf16"},
    "signum": {},
}


def trainer_of(model: nn.Module, name: str = "adam", scaler: bool = False, **arguments: Any) -> tritopt.Trainer:
    made = tritopt.LossScaler(scale_window=3) if scaler else None
    return tritopt.Trainer(model, name, {"learning_rate": 0.1, **ARGUMENTS[name], **arguments}, loss_scaler=made)


@pytest.mark.parametrize("scaler", [True, False])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_goes_on_bit_for_bit(name: str, scaler: bool, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if name in ("adam", "lamb") else torch.float32
    model, file = Model(dtype), tmp_path / "trainer.states"
    schedule = tritopt.lr_scheduler.FactorScheduler(step=2, factor=0.5, base_lr=0.25)
    trainer = trainer_of(model, name, scaler, learning_rate=None, lr_scheduler=schedule)
    trainer.optimizer.set_lr_mult({"*.bias": 2.0})
    train(trainer, model, range(3))
    trainer.save_states(file)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    train(trainer, model, range(3, 6))

    other = Model(dtype)
    other.load_state_dict(weights)
    resumed = trainer_of(other, name, scaler)
    resumed.load_states(str(file))
    assert counts(resumed) == (dict.fromkeys(range(6), 3), 3)
    assert resumed.optimizer.lr_mult == {"*.bias": 2.0}
    train(resumed, other, range(3, 6))
    assert_same(everything(resumed), everything(trainer))
    assert counts(resumed) == counts(trainer)
    assert resumed.learning_rate == trainer.learning_rate
    if scaler:
        assert resumed.loss_scaler is not None
        assert trainer.loss_scaler is not None
        assert resumed.loss_scaler.state_dict() == trainer.loss_scaler.state_dict()
        assert resumed.loss_scaler.loss_scale == 2.0**18


def test_before_the_first_step(tmp_path: Path) -> None:
    model, file = Model(), tmp_path / "trainer.states"
    trainer_of(model).save_states(file)
    other = trainer_of(Model())
    other.load_states(file)
    train(other, Model(), range(0))
    assert counts(other) == ({}, 0)


def test_into_the_trainer_that_saved_it(tmp_path: Path) -> None:
    """The optimizer is another object then, as in Gluon; this one's parameters keep their attributes."""
    model, file = Model(), tmp_path / "trainer.states"
    trainer = trainer_of(model)
    trainer.collect("*.bias").setattr("lr_mult", 0.5)
    train(trainer, model, range(2))
    trainer.save_states(file)
    before = trainer.optimizer
    trainer.set_learning_rate(0.5)
    train(trainer, model, range(2, 4))
    trainer.load_states(file)
    assert trainer.optimizer is not before
    assert trainer.learning_rate == 0.1
    assert trainer.optimizer._get_lrs([0, 1]) == [0.1, 0.05]
    train(trainer, model, range(4, 5))
    assert counts(trainer)[1] == 3


def test_how_it_is_computed_stays(tmp_path: Path) -> None:
    model, file = Model(), tmp_path / "trainer.states"
    trainer = trainer_of(model, use_fused_step=False)
    train(trainer, model, range(1))
    trainer.save_states(file)
    other = trainer_of(Model(), use_fused_step=None)
    other.load_states(file)
    assert other.optimizer.use_fused_step is None


def test_names_are_missed_where_there_are_none(tmp_path: Path) -> None:
    model, file = Model(), tmp_path / "trainer.states"
    trainer = trainer_of(model)
    train(trainer, model, range(1))
    trainer.save_states(file)
    other = tritopt.Trainer(list(Model().parameters()), "adam")
    with pytest.warns(UserWarning, match="the saved parameters have names and this Trainer's have none"):
        other.load_states(file)
    assert counts(other)[1] == 1


# What is refused, before anything changes.


def saved(path: Path, scaler: bool = False, name: str = "adam") -> dict[str, Any]:
    """Content of the file that a Trainer saves after two steps."""
    model = Model()
    trainer = trainer_of(model, name, scaler)
    train(trainer, model, range(2))
    trainer.save_states(path)
    return states_file.read(path)


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        content = saved(path)
        change(content)
        states_file.write(content, path)

    return write


def truncated(share: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        saved(path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return write


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(os.environ["EVIL"])),)


def a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"states": {}, "code": Evil()}))


def a_pickle_of_torch(path: Path) -> None:
    torch.save({"format": states_file.FORMAT, "code": Evil()}, path)


def states_of_an_updater(path: Path) -> None:
    path.write_bytes(tritopt.get_updater(tritopt.create("adam")).get_states(dump_optimizer=True))


def a_wider_model(path: Path) -> None:
    model = Model()
    model.out = nn.Linear(6, 4)
    trainer_of(model).save_states(path)


def a_longer_model(path: Path) -> None:
    trainer_of(nn.Sequential(Model(), nn.Linear(1, 1))).save_states(path)


def other_names(path: Path) -> None:
    trainer_of(nn.ModuleDict({"fc1": nn.Linear(5, 6), "norm": nn.LayerNorm(6), "out": nn.Linear(6, 3)})).save_states(
        path
    )


def set_state(index: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["states"][index] = value

    return change


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another optimizer": (lambda path: saved(path, name="sgd"), "saved by 'sgd', and this Trainer's optimizer is Adam"),
    "a scale": (lambda path: saved(path, scaler=True), "has no loss scaler, and the one that saved it had one"),
    "other shapes": (a_wider_model, r"parameter `out.weight` has shape \(3, 6\), and was saved as \(4, 6\)"),
    "more parameters": (a_longer_model, "it was saved for 8 parameters, and this Trainer has 6"),
    "other names": (other_names, "parameter 0 is called 'fc.weight', and was 'fc1.weight' when it was saved"),
    "truncated, half": (truncated(0.5), r"not a whole file of Trainer.save_states\(\)"),
    "truncated, a little": (truncated(0.99), r"not a whole file of Trainer.save_states\(\)"),
    "empty": (lambda path: path.write_bytes(b""), r"not a whole file of Trainer.save_states\(\)"),
    "text": (lambda path: path.write_text("hello"), r"not a whole file of Trainer.save_states\(\)"),
    "a pickle": (a_pickle, r"not a whole file of Trainer.save_states\(\)"),
    "a pickle of torch": (a_pickle_of_torch, r"not a whole file of Trainer.save_states\(\)"),
    "of an updater": (states_of_an_updater, r"not a file of Trainer.save_states\(\), which says format="),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), "which says format='tritopt.Trainer'"),
    "a state of another shape": (edited(set_state(1, (torch.zeros(7), torch.zeros(7)))), r"state of shape \(7,\)"),
    "a state too few": (edited(set_state(1, torch.zeros(6))), r"parameter 1: Adam keeps states \(mean, var\)"),
    "a state of nobody": (edited(set_state(9, None)), "it has a state of parameter 9, and this Trainer has 6"),
    "a state by name": (edited(set_state("fc", None)), "it has a state of parameter 'fc'"),
    "no states": (edited(lambda content: content.pop("states")), "states"),
    "no optimizer": (edited(lambda content: content.pop("optimizer")), "optimizer"),
    "no shapes": (edited(lambda content: content.pop("shapes")), "shapes"),
    "bad attributes": (edited(lambda content: content["optimizer"]["attributes"].update(beta1=7.0)), "beta1=7.0"),
}  # fmt: skip


@pytest.mark.parametrize("how", BAD)
def test_what_is_refused_changes_nothing(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "code has run"))
    file, model = tmp_path / "trainer.states", Model()
    trainer = trainer_of(model)
    train(trainer, model, range(2))
    loss_of(model, batch_of(2)).backward()
    write, message = BAD[how]
    write(file)
    before, optimizer = Snapshot(trainer), trainer.optimizer
    with pytest.raises(ValueError, match=message) as info:
        trainer.load_states(file)
    assert str(file) in str(info.value)
    before.check()
    assert trainer.optimizer is optimizer
    assert not (tmp_path / "code has run").exists()
    trainer.step(BATCH)
    assert counts(trainer)[1] == 3


@pytest.mark.parametrize("state", [{}, {"loss_scale": -1.0, "clean_steps": 0}, None], ids=str)
def test_a_bad_scale_changes_nothing(state: Any, tmp_path: Path) -> None:
    file, model = tmp_path / "trainer.states", Model()
    content = saved(file, scaler=True)
    states_file.write({**content, "loss_scaler": state}, file)
    trainer = trainer_of(model, scaler=True)
    train(trainer, model, range(4))
    before = Snapshot(trainer)
    with pytest.raises(ValueError, match=str(file)):
        trainer.load_states(file)
    before.check()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        trainer_of(Model()).load_states(tmp_path / "nothing")


def test_states_of_a_step_of_ones_own_are_checked(tmp_path: Path) -> None:
    @tritopt.register
    class OwnStates(tritopt.Optimizer):
        def create_state(self, index: Any, weight: torch.Tensor) -> Any:
            return torch.zeros_like(weight)

        def step(self, indices: Any, weights: Any, grads: Any, states: Any) -> None:
            for weight, grad, state in zip(weights, grads, states, strict=True):
                state += grad
                weight -= self.lr * state

    try:
        file, model = tmp_path / "trainer.states", Model()
        trainer = tritopt.Trainer(model, "ownstates")
        train(trainer, model, range(2))
        trainer.save_states(file)
        other = tritopt.Trainer(Model(), "ownstates")
        other.load_states(file)
        assert_same(everything(other)[6:], everything(trainer)[6:])
        content = states_file.read(file)
        content["states"][1] = torch.zeros(7)
        states_file.write(content, file)
        with pytest.raises(ValueError, match=r"parameter 1: a state is a float32 tensor of shape \(7,\), and must be"):
            other.load_states(file)
    finally:
        del tritopt.Optimizer.opt_registry["ownstates"]


# Whole at every moment.


def test_what_cannot_be_saved_leaves_the_file_alone(tmp_path: Path) -> None:
    file, model = tmp_path / "trainer.states", Model()
    trainer = trainer_of(model)
    trainer.save_states(file)
    before = file.read_bytes()
    trainer.optimizer.note = object()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"note is <object"):
        trainer.save_states(file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["trainer.states"]


def test_a_failure_while_writing_leaves_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "trainer.states"
    trainer = trainer_of(Model())
    trainer.save_states(file)
    before = file.read_bytes()

    def fail(content: Any, target: Any) -> None:
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_states(file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["trainer.states"]


def test_the_content_is_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return original(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    trainer_of(Model()).save_states(tmp_path / "trainer.states")
    assert calls == ["fsync", "replace", "fsync"]


def test_links_and_permissions_are_as_users_expect(tmp_path: Path) -> None:
    """A link keeps pointing to the file, which has the permissions that any new file has."""
    target, link, plain = tmp_path / "real", tmp_path / "link", tmp_path / "plain"
    plain.write_bytes(b"")
    link.symlink_to(target)
    trainer = trainer_of(Model())
    for _ in range(2):
        trainer.save_states(link)
        assert link.is_symlink()
        assert zipfile.is_zipfile(target)
    assert target.stat().st_mode == plain.stat().st_mode


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_kill_minus_9_loses_nothing(tmp_path: Path) -> None:
    """Fifty times, at any moment of a save: what was saved is there, and no step that was told of is lost."""
    path, context, chance = tmp_path / "trainer.states", forks(), random.Random(0)
    reached = 0
    for _ in range(50):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=save_for_ever, args=(str(path), theirs), daemon=True)
        process.start()
        theirs.close()
        assert ours.recv() == reached + 1  # the file before was whole
        time.sleep(chance.uniform(0, 0.01))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        told = reached + 1
        try:
            while True:
                told = ours.recv()
        except EOFError:
            pass
        reached = states_file.read(path)["optimizer"]["attributes"]["num_update"]
        assert told <= reached <= told + 1
        state = states_file.read(path)["states"][0]
        assert state[0].shape == (1000,)
    assert reached >= 50
