"""Two processes sum up gradients: as one with the doubled batch, in one all-reduce a dtype; DDP does it by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tritopt
from tests.gluon.models import BATCH, Model, Snapshot, assert_same, batch_of, counts, everything, loss_of
from tests.support.world import World

OPTIMIZERS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}, "adam": {}, "lamb": {}}


def steps(name: str, dtype: torch.dtype, scaled: bool, rank: int | None) -> list[torch.Tensor]:
    """Weights and states after some steps on half of each batch, or on all of it where the rank is None."""
    model = Model(dtype)
    scaler = tritopt.LossScaler(2.0**8) if scaled else None
    trainer = tritopt.Trainer(
        model, name, {"learning_rate": 0.01, "multi_precision": True, **OPTIMIZERS[name]},
        max_grad_norm=0.5, loss_scaler=scaler,
    )  # fmt: skip
    for step in range(4):
        x = batch_of(step, 2 * BATCH, dtype)
        loss = loss_of(model, x if rank is None else x[rank * BATCH : (rank + 1) * BATCH])
        if scaled:
            with trainer.scale_loss(loss) as loss:
                loss.backward()
        else:
            loss.backward()
        trainer.step(2 * BATCH)
    return everything(trainer)


def in_rank(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments, dist.get_rank())


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_are_one_with_the_doubled_batch(name: str, scaled: bool, pair: World) -> None:
    """The processes agree bit for bit, and with one process within the rounding of a sum in another order."""
    first, second = pair.run(in_rank, steps, name, torch.float32, scaled)
    assert_same(first, second)
    expected = steps(name, torch.float32, scaled, None)
    start = list(Model().parameters())
    for got, right in zip(first, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)
    assert all(not torch.equal(got, old) for got, old in zip(first[:6], start, strict=True))


def test_in_low_precision(pair: World) -> None:
    first, second = pair.run(in_rank, steps, "adam", torch.bfloat16, False)
    assert_same(first, second)
    expected = steps("adam", torch.bfloat16, False, None)
    for got, right in zip(first[:6], expected, strict=False):
        torch.testing.assert_close(got, right, rtol=0.02, atol=0.02)


class Mixed(nn.Module):
    """Parameters of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high = nn.Linear(3, 3, dtype=torch.bfloat16), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.high(self.low(x.bfloat16()).float())  # type: ignore[no-any-return]


def counted_reductions() -> list[tuple[int, torch.dtype]]:
    """Sizes and dtypes of what is sent in a step."""
    sent: list[tuple[int, torch.dtype]] = []
    original = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        sent.append((tensor.numel(), tensor.dtype))
        return original(tensor, *arguments, **keywords)

    model = Mixed()
    trainer = tritopt.Trainer(model, "sgd", {"multi_precision": True})
    dist.all_reduce = all_reduce
    try:
        for _ in range(2):
            model(torch.ones(2, 3)).sum().backward()
            trainer.step(4)
    finally:
        dist.all_reduce = original
    return sent


def test_one_reduction_for_each_dtype(pair: World) -> None:
    for sent in pair.run(counted_reductions):
        assert sent == [(12, torch.bfloat16), (12, torch.float32)] * 2


def by_hand() -> tuple[list[torch.Tensor], list[torch.Tensor], str]:
    """allreduce_grads, a clip, and update; beside max_grad_norm in step. And a step after allreduce_grads."""
    results = []
    for is_by_hand in (True, False):
        model = Model()
        trainer = tritopt.Trainer(
            model, "sgd", {"learning_rate": 0.1}, max_grad_norm=None if is_by_hand else 0.25 / (2 * BATCH)
        )
        for step in range(2):
            loss_of(model, batch_of(2 * step + dist.get_rank())).backward()
            if is_by_hand:
                trainer.allreduce_grads()
                tritopt.clip_global_norm([p.grad for p in model.parameters() if p.grad is not None], 0.25)
                trainer.update(2 * BATCH)
            else:
                trainer.step(2 * BATCH)
        results.append(everything(trainer))
    loss_of(model, batch_of(5)).backward()
    trainer.allreduce_grads()
    before = Snapshot(trainer)
    with pytest.raises(RuntimeError) as info:
        trainer.step(2 * BATCH)
    before.check()
    trainer.update(2 * BATCH)
    return results[0], results[1], str(info.value)


def test_allreduce_grads_and_update(pair: World) -> None:
    (one, other, message), (second, *_) = pair.run(by_hand)
    assert_same(one, second)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert message == "gradient of `fc.weight` is a sum already: call update(), and not step()"


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.experts = nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])


def experts(req: str, method: str) -> tuple[list[torch.Tensor], Any]:
    """Process 0 uses expert 0, process 1 expert 1, and nobody expert 2; the shared layer has a gradient in both."""
    model = Experts()
    trainer = tritopt.Trainer(model, "adam", {"learning_rate": 0.1})
    trainer.collect().setattr("grad_req", req)
    for step in range(2):
        x = batch_of(step)[:, :3] + dist.get_rank()
        model.experts[dist.get_rank()](model.shared(x)).square().sum().backward()
        if method == "step":
            trainer.step(2 * BATCH, ignore_stale_grad=True)
        else:
            trainer.allreduce_grads()
            trainer.update(2 * BATCH, ignore_stale_grad=True)
        trainer.zero_grad()
    return [p.detach().clone() for p in model.parameters()], counts(trainer)


def experts_of_one() -> tuple[list[torch.Tensor], Any]:
    model = Experts()
    trainer = tritopt.Trainer(model, "adam", {"learning_rate": 0.1})
    for step in range(2):
        for rank in range(2):
            x = batch_of(step)[:, :3] + rank
            model.experts[rank](model.shared(x)).square().sum().backward()
        trainer.step(2 * BATCH, ignore_stale_grad=True)
    return [p.detach().clone() for p in model.parameters()], counts(trainer)


@pytest.mark.parametrize("req", ["write", "add"])
@pytest.mark.parametrize("method", ["step", "update"])
def test_processes_agree_on_what_is_stale(req: str, method: str, pair: World) -> None:
    """A gradient that one process has is everybody's, or weights would drift apart."""
    (first, counted), (second, also) = pair.run(experts, req, method)
    assert_same(first, second)
    expected, right = experts_of_one()
    assert counted == also == right == ({0: 2, 1: 2, 2: 2, 3: 2, 4: 2, 5: 2}, 2)
    for got, one in zip(first, expected, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-6)
    assert torch.equal(first[6], expected[6])


def overflow() -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Overflow in process 1 alone: what both have then."""
    model = Model()
    trainer = tritopt.Trainer(model, "sgd", loss_scaler=tritopt.LossScaler())
    with trainer.scale_loss(loss_of(model, batch_of(0))) as scaled:
        scaled.backward()
    if dist.get_rank() == 1:
        assert model.fc.bias.grad is not None
        model.fc.bias.grad[0] = math.inf
    trainer.step(2 * BATCH)
    assert trainer.loss_scaler is not None
    return everything(trainer), trainer.loss_scaler.state_dict()


def test_an_overflow_is_everybodys(pair: World) -> None:
    for tensors, state in pair.run(overflow):
        assert_same(tensors, [p.detach() for p in Model().parameters()])
        assert state == {"loss_scale": 2.0**15, "clean_steps": 0}


def under_ddp() -> tuple[list[torch.Tensor], list[str], list[str]]:
    """Steps of a Trainer of a DistributedDataParallel, and what it refuses."""
    model = nn.parallel.DistributedDataParallel(Model())
    trainer = tritopt.Trainer(model, "adam")
    for step in range(2):
        loss_of(model, batch_of(step, 2 * BATCH)[dist.get_rank() * BATCH :][:BATCH]).backward()
        trainer.step(BATCH)
    messages = []
    loss_of(model, batch_of(2)).backward()
    with pytest.raises(RuntimeError) as info:
        trainer.allreduce_grads()
    messages.append(str(info.value))
    trainer.update(BATCH)
    del trainer
    for params in (model.module, list(model.parameters())):
        inner = tritopt.Trainer(params, "adam")
        loss_of(model, batch_of(3)).backward()
        before = Snapshot(inner)
        with pytest.raises(RuntimeError) as info:
            inner.step(BATCH)
        before.check()
        messages.append(str(info.value))
        model.zero_grad()
        del inner
    return [p.detach().clone() for p in model.parameters()], messages, list(tritopt.Trainer(model, "sgd").collect())


def plain_ddp() -> list[torch.Tensor]:
    model = Model()
    trainer = tritopt.Trainer(model, "adam")
    for x in (batch_of(0, 2 * BATCH), batch_of(1, 2 * BATCH)):
        loss_of(model, x).backward()
        trainer.step(2 * BATCH)
    for p in model.parameters():
        p.grad = None
    loss_of(model, batch_of(2)).backward()
    trainer.step(BATCH)
    return everything(trainer)[:6]


def test_ddp_does_it_itself(pair: World) -> None:
    """A mean over processes with the batch of one process is the sum with the batch of all."""
    (first, messages, names), (second, *_) = pair.run(under_ddp)
    assert_same(first, second)
    for got, right in zip(first, plain_ddp(), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    assert names == [name for name, _ in Model().named_parameters()]
    assert "DistributedDataParallel forms the mean of gradients over processes in backward: call step()" in messages[0]
    for message in messages[1:]:
        assert "pass it to the Trainer, as Trainer(ddp_model, ...)" in message


def refused() -> list[str]:
    """Messages about sparse gradients and sharded parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    messages = []
    model = nn.Embedding(4, 2, sparse=True)
    trainer = tritopt.Trainer(model, "sgd")
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError) as info:
        trainer.step(2)
    messages.append(str(info.value))
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    with pytest.raises(TypeError) as info:
        tritopt.Trainer([("w", param)], "sgd")
    messages.append(str(info.value))
    with pytest.raises(TypeError) as info:
        tritopt.clip_global_norm([distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])], 1.0)
    messages.append(str(info.value))
    return messages


def test_what_is_refused(pair: World) -> None:
    sparse, sharded, clipped = pair.run(refused)[0]
    assert "gradient of `weight` is sparse, which is not summed up over processes" in sparse
    assert "parameter 'w' is a DTensor" in sharded
    assert "tritopt.optim" in sharded
    assert "arrays[0] is a DTensor" in clipped
    assert "tritopt.clip_grad_norm_" in clipped


def test_alone_there_is_nothing_to_sum_up() -> None:
    model = Model()
    trainer = tritopt.Trainer(model, "sgd")
    loss_of(model, batch_of(0)).backward()
    before = Snapshot(trainer)
    trainer.allreduce_grads()
    before.check()
    trainer.step(BATCH)


def test_fsdp_is_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

    with pytest.raises(TypeError, match=r"takes no parameters of FullyShardedDataParallel"):
        tritopt.Trainer(nn.Sequential(FullyShardedDataParallel()), "sgd")
