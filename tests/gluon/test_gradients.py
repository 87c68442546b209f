"""Stale gradients are told from fresh ones by identity and version; "write" drops them, "add" keeps them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tritopt
from tests.gluon.models import BATCH, Model, Snapshot, batch_of, counts, loss_of, train

STALE = r"Gradient of Parameters? .* has not been updated by backward since last `step`"


def trainer_of(model: nn.Module, req: str = "write", **arguments: Any) -> tritopt.Trainer:
    trainer = tritopt.Trainer(model, "sgd", {"learning_rate": 0.1, "momentum": 0.5, **arguments})
    trainer.collect().setattr("grad_req", req)
    return trainer


def backward(model: nn.Module, step: int) -> None:
    loss_of(model, batch_of(step)).backward()


def test_write_drops_gradients() -> None:
    """A Gluon script, which never zeroes gradients, does not add them up."""
    model = Model()
    trainer = tritopt.Trainer(model, "sgd")
    backward(model, 0)
    trainer.step(BATCH)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("req", ["write", "add"])
def test_several_backward_passes_add_up(req: str) -> None:
    model, expected = Model(), Model()
    trainer, whole = trainer_of(model, req), trainer_of(expected)
    for step in range(2):
        for part in range(3):
            backward(model, 3 * step + part)
        trainer.step(3 * BATCH)
        trainer.zero_grad()
        torch.stack([loss_of(expected, batch_of(3 * step + part)) for part in range(3)]).sum().backward()
        whole.step(3 * BATCH)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert counts(trainer)[1] == 2


def ones_of(*params: nn.Parameter) -> None:
    """A backward pass whose gradients are 1."""
    torch.stack([p.sum() for p in params if p.requires_grad]).sum().backward()


def test_a_step_drops_the_gradient_of_what_is_frozen() -> None:
    """Thawed, it would be updated with what backward left before."""
    p, q = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    trainer = tritopt.Trainer([p, q], "sgd", {"learning_rate": 1.0})
    ones_of(p, q)
    p.requires_grad_(False)
    trainer.step(1)
    p.requires_grad_(True)
    ones_of(p, q)
    trainer.step(1)
    assert (p.item(), q.item()) == (-1.0, -2.0)


@pytest.mark.parametrize(
    ("before", "after", "moved"), [("add", "write", -2.0), ("null", "write", -1.0), ("null", "add", -1.0)]
)
def test_another_grad_req_drops_the_gradient(before: str, after: str, moved: float) -> None:
    p = nn.Parameter(torch.zeros(1))
    trainer = tritopt.Trainer({"p": p}, "sgd", {"learning_rate": 1.0})
    trainer.collect().setattr("grad_req", before)
    ones_of(p)
    trainer.step(1, ignore_stale_grad=True)
    ones_of(p)
    trainer.collect().setattr("grad_req", after)
    assert p.grad is None
    ones_of(p)
    trainer.collect().setattr("grad_req", after)  # the same word leaves it
    trainer.step(1)
    assert p.item() == moved


def test_zero_grad_of_views() -> None:
    """DistributedDataParallel makes them, with gradient_as_bucket_view=True."""
    p, bucket = nn.Parameter(torch.zeros(2)), torch.ones(4)
    trainer = tritopt.Trainer([p], "sgd")
    p.grad = bucket[1:3]
    trainer.zero_grad(set_to_none=False)
    assert bucket.tolist() == [1, 0, 0, 1]
    with pytest.raises(UserWarning, match=STALE):
        trainer.step(1)


def test_add_keeps_gradients_until_they_are_zeroed() -> None:
    p = nn.Parameter(torch.zeros(1))
    p.grad_req = "add"  # type: ignore[attr-defined]
    trainer = tritopt.Trainer([("p", p)], "sgd", {"learning_rate": 1.0})
    for expected in (-1.0, -3.0):  # without zero_grad the second backward adds to the first
        p.sum().backward()
        trainer.step(1)
        assert p.item() == expected
    trainer.zero_grad()
    p.sum().backward()
    trainer.step(1)
    assert p.item() == -4.0


@pytest.mark.parametrize("req", ["write", "add"])
@pytest.mark.parametrize("method", ["step", "update"])
def test_a_second_step_without_backward_is_refused(req: str, method: str) -> None:
    model = Model()
    trainer = trainer_of(model, req)
    backward(model, 0)
    trainer.step(BATCH)
    before = Snapshot(trainer)
    with pytest.raises(UserWarning, match=STALE) as info:
        getattr(trainer, method)(BATCH)
    before.check()
    for part in (
        "`fc.weight`, `fc.bias`, `norm.weight`, `norm.bias`, `out.weight` and 1 more",
        "ignore_stale_grad=True",
    ):
        assert part in str(info.value)
    getattr(trainer, method)(BATCH, ignore_stale_grad=True)  # leaves all alone
    before.check()
    backward(model, 1)
    trainer.step(BATCH)
    assert counts(trainer)[1] == 2


def test_the_stale_ones_are_named() -> None:
    model = Model()
    trainer = trainer_of(model)
    backward(model, 0)
    model.norm.bias.grad = None
    with pytest.raises(UserWarning, match=r"^Gradient of Parameter `norm.bias` has not been updated by backward"):
        trainer.step(BATCH)
    unnamed = tritopt.Trainer(list(Model().parameters()), "sgd")
    with pytest.raises(UserWarning, match=r"^Gradient of Parameters `0`, `1`"):
        unnamed.step(BATCH)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("req", ["write", "add"])
def test_stale_ones_are_left_alone_if_they_are_ignored(req: str, fused: bool) -> None:
    """Stale ones are not updated and not counted; the others are, as in an Updater of their own."""
    if fused:
        pytest.importorskip("triton")
    model = Model()
    trainer = trainer_of(model, req, use_fused_step=fused)
    for step in range(2):
        backward(model, step)
        trainer.step(BATCH)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(2, 4):
        x = batch_of(step)
        (model.fc(x).square().sum()).backward()
        trainer.step(BATCH, ignore_stale_grad=True)
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == [True, True, False, False, False, False]
    assert counts(trainer) == ({0: 4, 1: 4, 2: 2, 3: 2, 4: 2, 5: 2}, 4)


def assign(p: Any) -> None:
    p.grad = torch.ones_like(p)


def in_place(p: Any) -> None:
    p.grad.add_(1)


def by_autograd(p: Any) -> None:
    p.sum().backward()


def of_a_view(p: Any) -> None:
    p.grad.view(-1)[0] = 2.0


def none_and_backward(p: Any) -> None:
    p.grad = None
    gc.collect()
    p.sum().backward()


def graph(p: Any) -> None:
    (p**2).sum().backward(create_graph=True)
    p.grad = p.grad.detach()


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # torch's, of create_graph
@pytest.mark.parametrize("write", [assign, in_place, by_autograd, of_a_view, none_and_backward, graph])
def test_what_counts_as_written(write: Callable[[Any], None]) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad_req = "add"  # type: ignore[attr-defined]
    trainer = tritopt.Trainer([("p", p)], "sgd", {"learning_rate": 0.125})
    p.grad = torch.ones(3)
    trainer.step(1)
    for _ in range(3):
        with pytest.raises(UserWarning, match=STALE):
            trainer.step(1)
        write(p)
        before = p.detach().clone()
        trainer.step(1)
        assert not torch.equal(before, p)


def test_a_gradient_that_takes_the_place_of_one_that_died_is_fresh() -> None:
    """Although it may have its address, its identity number and its version."""
    p = nn.Parameter(torch.ones(3))
    p.grad_req = "add"  # type: ignore[attr-defined]
    trainer = tritopt.Trainer([("p", p)], "sgd", {"learning_rate": 0.125})
    seen = set()
    for _ in range(2000):
        p.grad = None
        p.grad = torch.ones(3)
        seen.add((id(p.grad), p.grad.data_ptr(), p.grad._version))
        trainer.step(1)
    assert len(seen) < 2000


def test_gradients_are_not_kept_alive() -> None:
    p = nn.Parameter(torch.ones(3))
    trainer = tritopt.Trainer([("p", p)], "sgd")
    for req in ("add", "write"):
        p.grad_req = req  # type: ignore[attr-defined]
        p.grad = torch.ones(3)
        reference = weakref.ref(p.grad)
        trainer.step(1)
        p.grad = None
        assert reference() is None


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("req", ["write", "add"])
def test_zeroed_gradients_are_stale(set_to_none: bool, req: str) -> None:
    model = Model()
    trainer = trainer_of(model, req)
    backward(model, 0)
    trainer.zero_grad(set_to_none)
    assert all((p.grad is None) == set_to_none for p in model.parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with pytest.raises(UserWarning, match=STALE):
        trainer.step(BATCH)
    backward(model, 0)
    trainer.step(BATCH)
    assert counts(trainer)[1] == 1


def test_frozen_parameters_are_no_business_of_a_step() -> None:
    model = Model()
    trainer = trainer_of(model)
    trainer.collect("norm.*").setattr("grad_req", "null")
    model.fc.weight.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(2):
        backward(model, step)
        trainer.step(BATCH)
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == [False, True, False, False, True, True]
    assert counts(trainer) == ({1: 2, 4: 2, 5: 2}, 2)
    # One that is thawed later begins where a new one does, with the gradient of that step.
    model.fc.weight.requires_grad_(True)
    trainer.collect("norm.*").setattr("grad_req", "write")
    backward(model, 2)
    thawed = [model.fc.weight, model.norm.weight, model.norm.bias]
    expected = [p.detach() - 0.1 * torch.autograd.grad(loss_of(model, batch_of(2)), p)[0] / BATCH for p in thawed]
    trainer.step(BATCH)
    for p, aim in zip(thawed, expected, strict=True):
        torch.testing.assert_close(p.detach(), aim)
    assert counts(trainer) == ({0: 1, 1: 3, 2: 1, 3: 1, 4: 3, 5: 3}, 3)


def test_a_step_that_fails_leaves_gradients_fresh() -> None:
    model = Model()
    trainer = trainer_of(model, "add")
    backward(model, 0)
    trainer.step(BATCH)
    backward(model, 1)
    model.fc.bias.lr_mult = float("nan")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="lr_mult"):
        trainer.step(BATCH)
    del model.fc.bias.lr_mult  # type: ignore[attr-defined]
    trainer.step(BATCH)
    assert counts(trainer)[1] == 2


def test_sparse_gradients() -> None:
    model = nn.Embedding(6, 2, sparse=True)
    trainer = tritopt.Trainer(model, "sgd", {"learning_rate": 1.0, "lazy_update": True})
    before = model.weight.detach().clone()
    for _ in range(2):
        model(torch.tensor([1, 4, 1])).sum().backward()
        trainer.step(1)
        with pytest.raises(UserWarning, match=STALE):
            trainer.step(1)
    moved = before - model.weight.detach()
    torch.testing.assert_close(moved[:, 0], torch.tensor([0.0, 4.0, 0.0, 0.0, 2.0, 0.0]))


def test_gradients_of_inference_mode() -> None:
    """Such gradients count no writes; as another tensor each time they are fresh."""
    p = nn.Parameter(torch.zeros(2))
    p.grad_req = "add"  # type: ignore[attr-defined]
    trainer = tritopt.Trainer([p], "sgd", {"learning_rate": 1.0, "use_fused_step": False})
    for step in range(1, 3):
        with torch.inference_mode():
            p.grad = torch.ones(2)
        trainer.step(1)
        assert p.tolist() == [-step, -step]


def test_nothing_looks_at_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over gradients, or a wait for the device, would go through one of these."""
    model = Model()
    trainer = trainer_of(model, "add", use_fused_step=None)
    train(trainer, model, range(2))
    backward(model, 2)

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("it looks at values")

    for name in ("item", "__bool__", "__float__", "tolist", "equal", "isfinite", "norm", "sum", "any", "all", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    gradients = trainer._gradients.find()
    trainer._gradients.used(gradients, gradients.places)
    assert gradients.stale == set()
    assert trainer._gradients.find().stale == set(range(6))
