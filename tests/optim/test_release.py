"""Gradient release: the same weights and states as a step after backward, few gradients at once, clear refusals."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from tests.support.training import (
    EVERY_CLASS,
    PRECISIONS,
    SHAPES,
    assert_same,
    clone,
    everything,
    named,
    options_of,
    parameters,
)
from tests.support.world import REASON, World
from tritopt import optim
from tritopt.optim import AdamW, release_gradients
from tritopt.optim.step.build import Build

Class: TypeAlias = Any  # a class of tritopt.optim, with a signature of its own
Parameters = Sequence[torch.Tensor]


def loss_of(params: Parameters, step: int) -> torch.Tensor:
    """Loss whose gradients depend on the weights: a wrong update shows in all that follow."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(step)
    terms = [(p.float() * torch.randn(p.shape, generator=generator)).sin().sum() for p in params]
    return torch.stack(terms).sum()


def train(
    opt: optim.Optimizer, params: Parameters, steps: range, after: Callable[[int], None] = lambda step: None
) -> None:
    for step in steps:
        loss_of(params, step).backward()
        opt.step()
        opt.zero_grad()
        after(step)


def in_groups(cls: Class, params: Parameters, **options: Any) -> Any:
    """Two groups with learning rate, decay and betas of their own."""
    second = options_of(cls, lr=0.03, weight_decay=0.1)
    if len(second) and "betas" in options_of(cls, betas=None):
        n_betas = len(cls([torch.zeros(2, 2)], lr=0.1).defaults["betas"])
        second["betas"] = (0.6, 0.7, 0.8)[:n_betas]
    groups = [{"params": named(params)[:2]}, {"params": named(params)[2:], **second}]
    return cls(groups, **options_of(cls), **options)


# The same results.


@EVERY_CLASS
@PRECISIONS
def test_every_class_gives_the_bits_of_a_step_after_backward(cls: Class, dtype: torch.dtype) -> None:
    params, others = parameters(dtype), parameters(dtype)
    released, usual = in_groups(cls, params), in_groups(cls, others)
    release_gradients(params, released)
    start = [p.detach().float() for p in clone(params)]

    def same(step: int) -> None:
        assert all(p.grad is None for p in params)
        assert_same(everything(released), everything(usual))
        for opt in (released, usual):
            opt.param_groups[0]["lr"] *= 0.9

    for step in range(4):
        train(usual, others, range(step, step + 1))
        train(released, params, range(step, step + 1), same)
    assert not any(torch.equal(a, b) for a, b in zip(released.master_weights(), start, strict=True))


@pytest.mark.parametrize("fused", [None, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("master", ["fp32", "split16", "split8", "kahan", "stochastic", None])
def test_every_master_gives_the_same_bits(master: str | None, fused: bool | None) -> None:
    params, others = parameters(torch.bfloat16), parameters(torch.bfloat16)
    released, usual = (in_groups(AdamW, owned, master=master, fused=fused) for owned in (params, others))
    release_gradients(params, released)
    train(usual, others, range(4))
    train(released, params, range(4))
    assert_same(everything(released), everything(usual))


@pytest.mark.parametrize("cls", [optim.AdamW, optim.NAdam, optim.Adafactor, optim.RAdam])
def test_steps_and_rates_on_the_device_give_the_same_bits(cls: Class) -> None:
    params, others = parameters(), parameters()
    made = []
    for owned in (params, others):
        options = options_of(cls, lr=torch.tensor(0.01), capturable=True)
        if cls is optim.Adafactor:
            options = {"lr": torch.tensor(0.01)}
        made.append(cls(named(owned), **options))
    release_gradients(params, made[0])
    train(made[1], others, range(3))
    train(made[0], params, range(3))
    assert_same(everything(made[0]), everything(made[1]))


def test_norms_of_tensors_of_many_blocks_are_the_same() -> None:
    shapes = ((3, 700), (5000,), (1,))
    params, others = parameters(torch.bfloat16, shapes), parameters(torch.bfloat16, shapes)
    released, usual = optim.LAMB(params, lr=0.01), optim.LAMB(others, lr=0.01)
    release_gradients(params, released)
    train(usual, others, range(2))
    train(released, params, range(2))
    assert_same(everything(released), everything(usual))


def test_a_parameter_counts_its_own_steps() -> None:
    params, others = parameters(), parameters()
    released, usual = in_groups(AdamW, params), in_groups(AdamW, others)
    release_gradients(params, released)
    for opt, owned in ((released, params), (usual, others)):
        train(opt, owned, range(1))
        train(opt, owned[:1], range(1, 3))
        train(opt, owned[1:], range(3, 5))
    assert [released.state[p]["step"].item() for p in params] == [3, 3, 3]
    train(released, params[2:], range(5, 6))
    train(usual, others[2:], range(5, 6))
    assert [released.state[p]["step"].item() for p in params] == [3, 3, 4]
    assert_same(everything(released), everything(usual))


def test_a_scheduler_follows_step_without_a_warning() -> None:
    params, others = parameters(), parameters()
    released, usual = in_groups(AdamW, params), in_groups(AdamW, others)
    schedulers = [torch.optim.lr_scheduler.StepLR(opt, 1, 0.5) for opt in (released, usual)]
    release_gradients(params, released)
    train(released, params, range(3), lambda step: schedulers[0].step())
    train(usual, others, range(3), lambda step: schedulers[1].step())
    assert released.param_groups[0]["lr"] == options_of(AdamW)["lr"] / 8
    assert_same(everything(released), everything(usual))


class Tied(torch.nn.Module):
    """An embedding that is the head too, a frozen layer, one that gets no gradient, and a norm in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(6, 4)
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
        self.hidden = torch.nn.Linear(4, 4)
        self.unused = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        return functional.cross_entropy(self.head(self.hidden(self.frozen(x)).tanh()), tokens.roll(1))


def model_and_twin() -> tuple[Tied, Tied]:
    torch.manual_seed(0)
    model = Tied()
    return model, copy.deepcopy(model)


def test_a_model_with_tied_frozen_and_unused_parameters() -> None:
    model, other = model_and_twin()
    released, usual = (AdamW(m.parameters(), lr=0.1) for m in (model, other))
    release_gradients(model, released)
    tokens = torch.tensor([0, 3, 5, 2])
    for _ in range(3):
        for m, opt in ((model, released), (other, usual)):
            m(tokens).backward()
            opt.step()
            opt.zero_grad()
    assert released.state[model.embedding.weight]["step"].item() == 3
    assert model.unused.weight not in released.state
    assert model.frozen.weight not in released.state
    assert_same(everything(released), everything(usual))


def test_checkpointed_activations_are_recomputed_from_weights_before_the_update() -> None:
    model, other = model_and_twin()
    released, usual = (AdamW(m.parameters(), lr=0.1) for m in (model, other))
    release_gradients(model, released)
    tokens = torch.tensor([0, 3, 5, 2])
    for _ in range(3):
        for m, opt in ((model, released), (other, usual)):
            x = m.embedding(tokens)
            for _ in range(2):  # the layer is used, and recomputed, twice
                x = torch.utils.checkpoint.checkpoint(m.hidden, x, use_reentrant=False)
            functional.cross_entropy(m.head(x), tokens).backward()
            opt.step()
            opt.zero_grad()
    assert_same([*model.parameters()], [*other.parameters()])


def test_sparse_gradients() -> None:
    params, others = parameters(), parameters()
    released, usual = optim.SGD(params, lr=0.1), optim.SGD(others, lr=0.1)
    release_gradients(params, released)
    for opt, owned in ((released, params), (usual, others)):
        functional.embedding(torch.tensor([0, 3, 3]), owned[0], sparse=True).square().sum().backward()
        opt.step()
    assert_same(everything(released), everything(usual))


# What is left to step, and to others.


def test_step_updates_what_is_not_released() -> None:
    params, others = parameters(), parameters()
    released, usual = in_groups(AdamW, params), in_groups(AdamW, others)
    release_gradients(params[1:2], released)
    loss_of(params, 0).backward()
    assert [p.grad is None for p in params] == [False, True, False]
    released.step()
    released.zero_grad()
    train(usual, others, range(1))
    train(released, params, range(1, 3))
    train(usual, others, range(1, 3))
    assert_same(everything(released), everything(usual))


def test_the_gradients_of_others_are_not_touched() -> None:
    params = parameters()
    opt = AdamW(params, lr=0.1)
    release_gradients(params, opt)
    params[1].grad = torch.full_like(params[1], 3.0)  # not final
    before = params[1].detach().clone()
    loss_of(params[:1], 0).backward()
    assert torch.equal(params[1], before)
    assert params[1] not in opt.state
    assert torch.equal(params[1].grad, torch.full_like(before, 3.0))


def test_after_remove_step_updates() -> None:
    params, others = parameters(), parameters()
    released, usual = in_groups(AdamW, params), in_groups(AdamW, others)
    with release_gradients(params, released) as handle:
        train(released, params, range(2))
    train(released, params, range(2, 4))
    with release_gradients(params, released):
        train(released, params, range(4, 6))
    loss_of(params, 6).backward()
    assert all(p.grad is not None for p in params)
    handle.remove()  # again: nothing
    released.step()
    train(usual, others, range(7))
    assert_same(everything(released), everything(usual))


def test_gradients_of_several_passes_add_up_if_only_the_last_is_released() -> None:
    params, others = parameters(), parameters()
    released, usual = in_groups(AdamW, params), in_groups(AdamW, others)
    for step in range(2):
        loss_of(params, 2 * step).backward()
        loss_of(others, 2 * step).backward()
        with release_gradients(params, released):
            loss_of(params, 2 * step + 1).backward()
            assert all(p.grad is None for p in params)
            released.step()
        train(usual, others, range(2 * step + 1, 2 * step + 2))
    assert_same(everything(released), everything(usual))


def test_a_closure_is_evaluated_in_step() -> None:
    params, others = parameters(), parameters()
    released, usual = in_groups(AdamW, params), in_groups(AdamW, others)
    release_gradients(params, released)

    def closure() -> torch.Tensor:
        loss = loss_of(params, 0)
        loss.backward()
        return loss

    assert released.step(closure) == loss_of(others, 0)
    train(usual, others, range(1))
    assert_same(everything(released), everything(usual))


def test_step_runs_its_hooks_once_after_the_updates() -> None:
    params = parameters()
    opt = AdamW(params, lr=0.1)
    release_gradients(params, opt)
    seen: list[Any] = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", params[0].grad, o.state[params[0]]["step"])))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append("post"))
    loss_of(params, 0).backward()
    assert seen == []
    opt.step()
    assert seen == [("pre", None, torch.tensor(1.0)), "post"]


def test_a_hook_registered_before_may_change_the_gradient() -> None:
    params, others = parameters(), parameters()
    released, usual = AdamW(params, lr=0.1), AdamW(others, lr=0.1)

    def reverse(p: torch.Tensor) -> None:
        assert p.grad is not None
        p.grad.mul_(-2.0)

    for p in params:
        p.register_post_accumulate_grad_hook(reverse)
    release_gradients(params, released)
    loss_of(params, 0).backward()
    loss_of(others, 0).backward()
    for p in others:
        reverse(p)
    usual.step()
    assert_same(everything(released), everything(usual))


def test_a_loaded_checkpoint_goes_on(tmp_path: Path) -> None:
    params, others = parameters(torch.bfloat16), parameters(torch.bfloat16)
    released, usual = in_groups(AdamW, params), in_groups(AdamW, others)
    release_gradients(params, released)
    train(released, params, range(2))
    saved = copy.deepcopy(released.state_dict())
    weights = [p.detach().clone() for p in params]
    torch.save(saved, tmp_path / "opt.pt")
    train(released, params, range(2, 4))
    train(usual, others, range(5))
    with torch.no_grad():
        for p, weight in zip(params, weights, strict=True):
            p.copy_(weight)
    released.load_state_dict(torch.load(tmp_path / "opt.pt"))
    train(released, params, range(2, 5))
    assert_same(everything(released), everything(usual))


def test_groups_may_change() -> None:
    params, others = parameters(), parameters()
    released, usual = in_groups(AdamW, params), in_groups(AdamW, others)
    release_gradients(params[1:], released)
    train(released, params, range(1))
    train(usual, others, range(1))
    more = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for opt, new in ((released, more[0]), (usual, more[1])):
        opt.state.pop(opt.param_groups[0]["params"][0])
        del opt.param_groups[0]["params"][0], opt.param_groups[0]["param_names"][0]
        opt.add_param_group({"params": [("new", new)], "lr": 0.5})
    train(released, [*params[1:], more[0]], range(1, 4))
    train(usual, [*others[1:], more[1]], range(1, 4))
    assert_same(everything(released), everything(usual))
    del released.param_groups[0]["params"][0], released.param_groups[0]["param_names"][0]
    with pytest.raises(RuntimeError, match=r"no longer has a parameter of shape \(3, 2\)"):
        train(released, params, range(1))


def test_weights_that_others_write_take_their_masters_along() -> None:
    params, others = parameters(torch.bfloat16), parameters(torch.bfloat16)
    released, usual = in_groups(AdamW, params), in_groups(AdamW, others)
    release_gradients(params, released)
    for opt, owned in ((released, params), (usual, others)):

        def clamp(step: int, owned: Parameters = owned) -> None:
            with torch.no_grad():
                owned[step % 3].clamp_(-0.25, 0.25)

        train(opt, owned, range(4), clamp)
    assert_same(everything(released), everything(usual))


def test_threads_that_run_backward_at_once() -> None:
    params, others = parameters(shapes=SHAPES * 2), parameters(shapes=SHAPES * 2)
    released, usual = AdamW(params, lr=0.1), AdamW(others, lr=0.1)
    release_gradients(params, released)
    threads = [threading.Thread(target=lambda p=p: loss_of([p], 0).backward()) for p in params]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for p in others:
        loss_of([p], 0).backward()
    usual.step()
    assert_same(everything(released), everything(usual))


# Memory and time.


@pytest.mark.parametrize("fused", [None, False], ids=["kernel", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_gradients_live_at_once(dtype: torch.dtype, fused: bool | None) -> None:
    layers = [torch.nn.Linear(8, 8, bias=False, dtype=dtype) for _ in range(12)]
    model = torch.nn.Sequential(*layers)
    opt = AdamW(model.parameters(), lr=1e-3, fused=fused)
    made: list[StorageWeakRef] = []
    alive: list[int] = []

    def count(param: torch.Tensor) -> None:
        assert param.grad is not None
        made.append(StorageWeakRef(param.grad.untyped_storage()))
        alive.append(sum(not storage.expired() for storage in made))

    for param in model.parameters():  # before the release, so they run before it
        param.register_post_accumulate_grad_hook(count)
    release_gradients(model, opt)
    gc.disable()  # nothing may need a collection
    try:
        for _ in range(3):
            model(torch.randn(4, 8, dtype=dtype)).float().square().sum().backward()
            opt.step()
            assert all(storage.expired() for storage in made)
    finally:
        gc.enable()
    assert len(alive) == 3 * len(layers)
    assert max(alive) <= 2


def test_a_step_keeps_no_gradient() -> None:
    params = parameters()
    opt = AdamW(params, lr=0.1)
    made = []
    for step in range(3):
        loss_of(params, step).backward()
        made += [StorageWeakRef(p.grad.untyped_storage()) for p in params if p.grad is not None]
        opt.step()
        opt.zero_grad()
    assert len(made) == 3 * len(params)
    assert all(storage.expired() for storage in made)


def test_steps_that_are_alike_look_at_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [*parameters(), *parameters(torch.bfloat16)]
    opt = in_groups(AdamW, params)
    release_gradients(params, opt)
    train(opt, params, range(1))
    monkeypatch.setattr(Build, "__init__", None)
    for step in range(1, 4):
        opt.param_groups[1]["lr"] *= 0.5
        train(opt, params, range(step, step + 1))


def test_nothing_outlives_its_owner() -> None:
    params = parameters()
    opt = AdamW(params, lr=0.1)
    handle = release_gradients(params, opt)
    train(opt, params, range(2))
    gone: list[Callable[[], object]] = [weakref.ref(handle), weakref.ref(opt), *map(weakref.ref, params)]
    del handle, opt, params
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_without_its_optimizer_gradients_stay() -> None:
    params = parameters()
    opt = AdamW(params, lr=0.1)
    release_gradients(params, opt)
    del opt
    gc.collect()
    loss_of(params, 0).backward()
    assert all(p.grad is not None for p in params)
    release_gradients(params, AdamW(params, lr=0.1))


# Refusals.


def refused(error: type[Exception], match: str, opt: Any, params: Any) -> None:
    """Expect an error of release_gradients, which leaves no hook behind."""
    with pytest.raises(error, match=match):
        release_gradients(params, opt)
    owned = opt.param_groups[0]["params"]
    loss_of(owned, 0).backward()
    assert all(p.grad is not None for p in owned if p.requires_grad)


def test_the_global_norm() -> None:
    params = parameters()
    refused(RuntimeError, "max_grad_norm=2.0 needs all gradients.*clip_value", AdamW(params, max_grad_norm=2.0), params)


def test_the_global_norm_set_later() -> None:
    params = parameters()
    opt = AdamW(params)
    release_gradients(params, opt)
    opt.max_grad_norm = 1.0
    before = everything(opt)
    with pytest.raises(RuntimeError, match=r"max_grad_norm=1\.0 needs all"):
        loss_of(params, 0).backward()
    assert_same(everything(opt), before)


def test_a_recorded_step() -> None:
    params = parameters()
    refused(RuntimeError, "differentiable=True", AdamW(params, differentiable=True), params)


def test_a_second_gradient_before_step() -> None:
    params = parameters()
    opt = AdamW(named(params), lr=0.1)
    release_gradients(params, opt)
    loss_of(params, 0).backward()
    before = everything(opt)
    with pytest.raises(RuntimeError, match=r"'layer\d.weight'.* arrives a second time before opt.step\(\): call"):
        loss_of(params, 1).backward()
    assert_same(everything(opt), before)


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_scaled_gradients(name: str) -> None:
    params = parameters()
    opt = AdamW(params)
    release_gradients(params, opt)
    setattr(opt, name, torch.tensor(1.0))
    before = everything(opt)
    with pytest.raises(RuntimeError, match=f"AdamW has {name}.*bfloat16 without a scaler"):
        loss_of(params, 0).backward()
    assert_same(everything(opt), before)


def test_a_grad_scaler() -> None:
    params = parameters()
    opt = AdamW(params)
    device = params[0].device.type
    release_gradients(params, opt)
    off = torch.amp.GradScaler(device, enabled=False)
    off.scale(loss_of(params, 0)).backward()
    off.step(opt)
    scaler = torch.amp.GradScaler(device)
    scaler.scale(loss_of(params, 0)).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler.*Load a checkpoint"):
        scaler.step(opt)


def test_an_optimizer_of_someone_else() -> None:
    params = parameters()
    refused(TypeError, "tritopt.optim, not a AdamW of torch.optim", torch.optim.AdamW(params), params)


@pytest.mark.parametrize("wrong", [3, torch.ones(2), ["weight"], [None]], ids=str)
def test_what_is_no_list_of_parameters(wrong: Any) -> None:
    refused(TypeError, "a module or a list of parameters", AdamW(parameters()), wrong)


def test_parameters_that_the_optimizer_lacks() -> None:
    model, _ = model_and_twin()
    opt = AdamW(model.hidden.parameters())
    match = r"AdamW does not have parameters 'embedding.weight', 'unused.weight', 'unused.bias': pass a list"
    refused(ValueError, match, opt, model)
    release_gradients(opt.param_groups[0]["params"], opt)


def test_nothing_to_release() -> None:
    params = parameters()
    opt = AdamW(params)
    refused(ValueError, "none of the parameters", opt, [])
    refused(ValueError, "none of the parameters", opt, [torch.ones(2)])


def test_memory_that_two_parameters_share() -> None:
    both = torch.zeros(6)
    params = [torch.nn.Parameter(both[:4]), torch.nn.Parameter(both[2:])]
    refused(ValueError, "parameters 0 and 1 share memory", AdamW(params), params)


def test_a_parameter_that_is_released_already() -> None:
    params = parameters()
    opt, other = AdamW(params, lr=0.1), AdamW(params[1:], lr=0.1)
    handle = release_gradients(params, opt)
    with pytest.raises(ValueError, match="gradients of parameters 0, 1 are released already"):
        release_gradients(params[1:], other)
    handle.remove()
    release_gradients(params[1:], other)


def test_a_bad_learning_rate_leaves_weight_and_gradient() -> None:
    params = parameters()
    opt = AdamW(params, lr=0.1)
    release_gradients(params, opt)
    train(opt, params, range(2))
    before = everything(opt)
    opt.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="Invalid learning rate: nan"):
        loss_of(params[:1], 2).backward()
    assert params[0].grad is not None
    assert_same(everything(opt), before)


def test_a_weight_that_is_read_after_its_update_is_autograd_s_error() -> None:
    first, weight = (torch.nn.Parameter(torch.randn(3, 3)) for _ in range(2))
    opt = AdamW([first, weight], lr=0.1)
    release_gradients([first, weight], opt)
    x = functional.linear(first, weight.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (x @ weight).sum().backward()


def refused_distributed() -> None:
    """Expect errors in a process group: for a wrapper around the module, around a list, and after the release; for
    DTensors."""
    from torch.distributed.fsdp import fully_shard

    inner = torch.nn.Linear(4, 4)
    opt = AdamW(inner.parameters(), lr=0.1)
    alone = torch.nn.Linear(4, 4)
    release_gradients(alone, AdamW(alone.parameters(), lr=0.1))
    handle = release_gradients(inner, opt)
    wrapped = torch.nn.parallel.DistributedDataParallel(inner)
    before = everything(opt)
    with pytest.raises(RuntimeError, match="in a DistributedDataParallel, which sums"):
        wrapped(torch.ones(2, 4)).sum().backward()
    assert_same(everything(opt), before)
    handle.remove()
    for model_or_params in (wrapped, inner, list(inner.parameters())):
        with pytest.raises(RuntimeError, match="in a DistributedDataParallel, which sums"):
            release_gradients(model_or_params, opt)
    alone(torch.ones(2, 4)).sum().backward()
    assert alone.weight.grad is None
    sharded = torch.nn.Linear(4, 4)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(sharded, mesh=mesh)
    with pytest.raises(RuntimeError, match="'weight' is a DTensor"):
        release_gradients(sharded, AdamW(sharded.parameters(), lr=0.1))


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_distributed_wrappers(tmp_path: Path) -> None:
    world = World(1, tmp_path)
    try:
        world.run(refused_distributed)
    finally:
        world.close()
