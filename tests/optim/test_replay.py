"""Steps that reuse what the step before derived: they do what a step from scratch does, whatever changes in between."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tritopt import optim
from tritopt.engine import walk
from tritopt.engine.recent import Recent
from tritopt.optim.step.build import Build
from tritopt.optim.step.replay import Replay

Change = Callable[[optim.Optimizer, list[torch.Tensor]], None]


def parameters() -> list[torch.Tensor]:
    torch.manual_seed(0)
    plain = [torch.randn(size).requires_grad_() for size in ((), (5,), (4, 3), (0,))]
    low = [torch.randn(6, 2).to(torch.bfloat16).requires_grad_(), torch.randn(7).to(torch.bfloat16).requires_grad_()]
    square = [torch.randn(2, 2).requires_grad_() for _ in range(2)]
    return [*plain, torch.randn(3, 4).t().requires_grad_(), *low, *square]


def set_grads(params: list[torch.Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = (
            torch.randn(param.shape, generator=generator).to(param.dtype).as_strided(param.shape, param.stride())
        )


def options(params: list[torch.Tensor], cls: type[optim.Optimizer]) -> Any:
    groups: list[dict[str, Any]] = [{"params": params[:3]}, {"params": params[3:], "lr": 0.03, "weight_decay": 0.2}]
    return cls(groups, lr=0.01, max_grad_norm=3.0)  # type: ignore[call-arg]


def values(opt: optim.Optimizer, params: list[torch.Tensor]) -> list[torch.Tensor]:
    states = [value.to_dense() for param in params for value in opt.state.get(param, {}).values()]
    return [tensor.detach().clone() for tensor in [*params, *states]]


def _set(name: str, value: Any) -> Change:
    def change(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
        opt.param_groups[1][name] = value

    return change


def _drop_gradient(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    params[1].grad = None


def _other_layout(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    params[2].grad = params[2].grad.t().contiguous().t()  # type: ignore[union-attr]


def _swap_data(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    params[2].data = params[2].data.clone() + 1


def _write_weight(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    with torch.no_grad():
        params[5].copy_(torch.full_like(params[5], 7.0))


def _replace_state(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    opt.state[params[2]]["exp_avg"] = torch.full_like(opt.state[params[2]]["exp_avg"], 0.5)


def _swap_state_data(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    opt.state[params[2]]["exp_avg"].data = torch.full_like(opt.state[params[2]]["exp_avg"], 0.5)


def _replace_state_dict(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    opt.state[params[2]] = {name: value.clone() + 0.25 for name, value in opt.state[params[2]].items()}


def _set_count(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    opt.state[params[1]]["step"].fill_(40.0)


def _replace_count(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    opt.state[params[1]]["step"] = torch.tensor(40.0)


def _drop_state(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    del opt.state[params[4]]


def _load(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["exp_avg"] += 0.125
    opt.load_state_dict(saved)


def _add_group(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    params.append(torch.ones(3, requires_grad=True))
    params[-1].grad = torch.ones(3)
    opt.add_param_group({"params": [params[-1]], "lr": 0.5})


def _drop_from_group(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    del opt.param_groups[0]["params"][0]


def _move_to_next_group(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    """All parameters stay in the order that they had, as in the two changes below."""
    first, second = opt.param_groups
    second["params"].insert(0, first["params"].pop())


def _move_to_group_before(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    first, second = opt.param_groups
    first["params"].append(second["params"].pop(0))


def _empty_group(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    first, second = opt.param_groups
    second["params"][:0] = first["params"]
    first["params"].clear()


def _replace_group(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    opt.param_groups[1] = {**opt.param_groups[1], "lr": 0.125}


def _shared_gradient(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    for param in params:
        param.grad = torch.zeros_like(param)


def _flag(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    opt.found_inf, opt.grad_scale = torch.tensor([0.0]), torch.tensor([4.0])  # type: ignore[attr-defined]


def _overflow(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    opt.found_inf, opt.grad_scale = torch.tensor([1.0]), torch.tensor([4.0])  # type: ignore[attr-defined]


def _nan(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    params[2].grad[0, 0] = torch.nan  # type: ignore[index]


def _grad_data_moved(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    params[2].grad.data = params[2].grad.data.clone() * 2  # type: ignore[union-attr]


def _swap_tensors(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    other = torch.full((4, 3), 3.0, requires_grad=True)
    other.grad = params[2].grad
    torch.utils.swap_tensors(params[2], other)


def _gradient_appears(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    _drop_gradient(opt, params)
    opt.step()
    params[1].grad = torch.ones(5)


def _option(name: str, value: Any) -> Change:
    def change(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
        setattr(opt, name, value)

    return change


def _replace_groups(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    opt.param_groups = [dict(group) for group in opt.param_groups]


def _replace_groups_of_other_counts(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    _gradient_appears(opt, params)
    opt.step()
    _replace_groups(opt, params)


def _groups_of_tuples(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    for group in opt.param_groups:
        group["params"] = tuple(group["params"])


def _other_view(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    assert params[2].numel() == 12
    params[2].data = params[2].data.view(3, 4).t()


def _write_counts_unseen(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    for param in params:
        if param in opt.state:
            opt.state[param]["step"].data.fill_(50.0)


def _keep_something(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    opt.state["mine"] = 1  # type: ignore[index]
    opt.state[params[1]]["sparse"] = torch.ones(3).to_sparse()


def _exchange_names(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    """The same tensors in the same order, each under the other's name."""
    state = opt.state[params[2]]
    mean, var = state.pop("exp_avg").abs_(), state.pop("exp_avg_sq")
    state["exp_avg_sq"], state["exp_avg"] = mean, var


def _exchange_states(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    first, second = params[-2:]
    a, b = opt.state.pop(first), opt.state.pop(second)
    opt.state[second], opt.state[first] = a, b


def _transpose_state(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    opt.state[params[-1]]["exp_avg"].t_()


def _exchange_group_keys(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    """The same values in the same order, two of them under each other's names."""
    group = opt.param_groups[1]
    items = list(group.items())
    names = {"lr": "weight_decay", "weight_decay": "lr"}
    group.clear()
    group.update((names.get(name, name), value) for name, value in items)


def _negate_gradient(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    grad = params[2].grad
    assert grad is not None
    params[2].grad = torch._neg_view(grad)


def _zero_gradient_without_memory(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    params[2].grad = torch._efficientzerotensor(params[2].shape)


def _negated_state(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    state = opt.state[params[2]]
    state["exp_avg"] = torch._neg_view(-state["exp_avg"])


def _negated_weight(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    params[2].data = torch._neg_view(params[2].data)


def _count_given_memory(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    step = opt.state[params[1]]["step"]
    step.data = step.data.clone() + 7


def _count_swapped(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    torch.utils.swap_tensors(opt.state[params[1]]["step"], torch.tensor(31.0))


def _counts_shared(opt: optim.Optimizer, params: list[torch.Tensor]) -> None:
    for param in params:
        if param in opt.state:
            opt.state[param]["step"].share_memory_()
    opt.state[params[1]]["step"] += 3


CHANGES: dict[str, Change] = {
    "state names exchanged": _exchange_names,
    "states exchanged": _exchange_states,
    "state transposed": _transpose_state,
    "group keys exchanged": _exchange_group_keys,
    "gradient negated by a bit": _negate_gradient,
    "gradient of zeros without memory": _zero_gradient_without_memory,
    "state negated by a bit": _negated_state,
    "weight negated by a bit": _negated_weight,
    "count given other memory": _count_given_memory,
    "count swapped": _count_swapped,
    "counts shared": _counts_shared,
    "no clip": _option("max_grad_norm", None),
    "other clip": _option("max_grad_norm", 0.01),
    "random bits": _option("rounding_seed", 5),
    "telemetry": _option("track", True),
    "groups replaced": _replace_groups,
    "groups replaced, counts differ": _replace_groups_of_other_counts,
    "groups of tuples": _groups_of_tuples,
    "weight seen otherwise": _other_view,
    "counts written unseen": _write_counts_unseen,
    "something of the user's": _keep_something,
    "gradient moved": _grad_data_moved,
    "tensors swapped": _swap_tensors,
    "gradient appears": _gradient_appears,
    "lr": _set("lr", 0.5),
    "lr tensor": _set("lr", torch.tensor(0.25)),
    "betas": _set("betas", (0.5, 0.7)),
    "weight decay": _set("weight_decay", 0.0),
    "amsgrad": _set("amsgrad", True),
    "maximize": _set("maximize", True),
    "clip value": _set("clip_value", 0.1),
    "reference": _set("fused", False),
    "capturable": _set("capturable", True),
    "no master": _set("multi_precision", False),
    "no gradient": _drop_gradient,
    "gradient laid out otherwise": _other_layout,
    "weight moved": _swap_data,
    "weight written": _write_weight,
    "state replaced": _replace_state,
    "state moved": _swap_state_data,
    "states replaced": _replace_state_dict,
    "count written": _set_count,
    "count replaced": _replace_count,
    "state deleted": _drop_state,
    "loaded": _load,
    "group added": _add_group,
    "group replaced": _replace_group,
    "moved to the next group": _move_to_next_group,
    "moved to the group before": _move_to_group_before,
    "group emptied": _empty_group,
    "master": _set("master", "fp32"),
    "parameter removed": _drop_from_group,
    "zero gradients": _shared_gradient,
    "loss scale": _flag,
    "overflow": _overflow,
    "gradient not finite": _nan,
}


WITHOUT = ((), (1, 5), (0, 3, 6))
"""Parameters without a gradient, in turn."""


def drop_gradients(params: list[torch.Tensor], step: int) -> None:
    for i in WITHOUT[step % len(WITHOUT)]:
        params[i].grad = None


def forget(opt: optim.Optimizer) -> None:
    """Let the next step be one from scratch."""
    stepper = opt._stepper
    stepper._last, stepper._replays = None, Recent()
    stepper._replay_of.clear()


def after(change: str, is_warm: bool, in_turn: bool = False) -> list[torch.Tensor]:
    """Weights and states after steps, the change, and more steps, with gradients of one set of parameters or two."""
    params = parameters()
    opt = options(params, optim.AdamW)
    changed, end = (4, 7) if in_turn else (2, 4)
    for step in range(end):
        set_grads(params, step)
        if in_turn:
            drop_gradients(params, step % 2)
        if step == changed:
            CHANGES[change](opt, params)
        if not is_warm:
            forget(opt)
        opt.step()
        for name in ("found_inf", "grad_scale"):
            if hasattr(opt, name):
                delattr(opt, name)
    return values(opt, params)


@functools.cache
def from_scratch(change: str) -> list[torch.Tensor]:
    return after(change, is_warm=False)


@pytest.mark.parametrize("language", ["c", "python"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str, language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if language == "python":
        monkeypatch.setattr(walk, "_chosen", [walk.MEANT])
    actual, expected = after(change, is_warm=True), from_scratch(change)
    assert len(actual) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_by_steps_in_turn(change: str) -> None:
    actual, expected = (after(change, is_warm, in_turn=True) for is_warm in (True, False))
    assert len(actual) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of parameters of each step that is built."""
    built = []
    build = Build.__init__

    def count(self: Build, planner: Any, members: Any, *arguments: Any) -> None:
        built.append(len(members))
        build(self, planner, members, *arguments)

    monkeypatch.setattr(Build, "__init__", count)
    return built


@pytest.mark.parametrize("cls", [optim.AdamW, optim.LAMB])
@pytest.mark.parametrize("capturable", [False, True])
def test_gradients_of_other_parameters_in_turn(
    cls: type[optim.Optimizer], capturable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two heads that take turns, experts without tokens: each set of gradients is looked at once."""
    runs = []
    for is_warm in (True, False):
        params = parameters()
        opt = options(params, cls)
        for group in opt.param_groups:
            group["capturable"] = capturable
        built = count_builds(monkeypatch)
        for step in range(12):
            set_grads(params, step)
            drop_gradients(params, step)
            if not is_warm:
                forget(opt)
            opt.step()
        monkeypatch.undo()
        # A first step makes states, and so does the first of those that had no gradient in it.
        assert not is_warm or len(built) == len(WITHOUT)
        runs.append(values(opt, params))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_steps_that_share_a_launch_keep_their_own_addresses() -> None:
    """Parameters that draw random bits are updated by a launch of their own: the others' is the same without them."""
    runs = []
    for is_warm in (True, False):
        low = torch.ones(8, dtype=torch.bfloat16)
        params: list[torch.Tensor] = [torch.nn.Parameter(value) for value in (torch.ones(8), low)]
        opt = optim.SGD(params, lr=0.1, momentum=0.9, master="stochastic")
        grads = [[torch.full_like(p, i + j) for p in params] for i, j in ((1, 2), (3, 4))]
        for step in (0, 1, 0, 1, 1, 0, 0, 1):
            for param, grad in zip(params, grads[step], strict=True):
                param.grad = grad
            if step == 1:
                params[1].grad = None
            if not is_warm:
                forget(opt)
            opt.step()
        runs.append(values(opt, params))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("state_dtype", ["int8", "fp32"])
def test_a_weight_that_lies_otherwise_beside_gradients_that_are_new(state_dtype: str) -> None:
    """States whose elements share scales lie as their parameter does, also where their own tensors are the same."""
    runs = []
    for is_warm in (True, False):
        torch.manual_seed(0)
        params = [torch.randn(64, 64).requires_grad_() for _ in range(3)]
        opt = optim.AdamW(params, lr=0.1, state_dtype=state_dtype)
        for step, absent in enumerate((None, 0, 1)):
            set_grads(params, step)
            if step == 2:
                params[0].data = params[0].data.t()
            if absent is not None:
                params[absent].grad = None
            if not is_warm:
                forget(opt)
            opt.step()
        runs.append(values(opt, params))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_parameters_that_were_removed_are_let_go() -> None:
    params = parameters()
    opt = options(params, optim.AdamW)
    for step in range(6):
        set_grads(params, step)
        drop_gradients(params, step)
        opt.step()
    gone = weakref.ref(params[5])
    opt.state.pop(params[5])
    del opt.param_groups[1]["params"][2], params[5]
    set_grads(params, 6)
    opt.step()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, optim.LAMB, optim.NAdam])
def test_steps_that_are_alike_look_at_nothing_again(
    cls: type[optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters()
    opt = options(params, cls)
    built = count_builds(monkeypatch)
    for step in range(5):
        set_grads(params, step)
        opt.step()
    assert len(built) == 1
    assert isinstance(opt._stepper._last, Replay)


def test_hyperparameters_that_cycle_stay_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    opt = options(params, optim.AdamW)
    set_grads(params, 0)
    opt.step()
    monkeypatch.setattr(Build, "__init__", None)
    for step in range(1, 4):
        for group in opt.param_groups:
            group["betas"] = (0.9 - 0.1 * step, 0.99)
            group["lr"] *= 0.9
        set_grads(params, step)
        opt.step()


def test_a_failed_step_changes_nothing_and_is_not_reused() -> None:
    params = parameters()
    opt = options(params, optim.AdamW)
    for step in range(2):
        set_grads(params, step)
        opt.step()
    before = values(opt, params)
    opt.param_groups[1]["lr"] = float("nan")
    with pytest.raises(ValueError, match="Invalid learning rate: nan"):
        opt.step()
    opt.param_groups[1]["lr"] = 0.03
    opt.param_groups[1]["betas"] = (2.0, 0.9)
    with pytest.raises(ValueError, match="Invalid beta parameter at index 0"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, values(opt, params), strict=True))
    opt.param_groups[1]["betas"] = (0.9, 0.999)
    opt.step()
    assert not torch.equal(params[1], before[1])


def test_a_name_that_changes_decides_on_random_bits() -> None:
    def run(before_step: Callable[[optim.Optimizer], None]) -> list[torch.Tensor]:
        param = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        opt = optim.SGD([("first", param)], lr=1e-3, master="stochastic")
        for step in range(4):
            if step == 2:
                opt.param_groups[0]["param_names"][0] = "second"
            param.grad = torch.ones_like(param)
            before_step(opt)
            opt.step()
        return values(opt, [param])

    warm, cold = both_ways(run)
    assert all(torch.equal(a, b) for a, b in zip(warm, cold, strict=True))


def test_states_that_are_moved_to_shared_memory_stay_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state_dict that is sent to another process once does not cost anything in every later step."""
    params = parameters()
    opt = options(params, optim.AdamW)
    for step in range(3):
        set_grads(params, step)
        opt.step()
        for state in opt.state.values():
            state["step"].share_memory_()
    monkeypatch.setattr(Build, "__init__", None)
    opt.step()
    assert float(opt.state[params[0]]["step"]) == 4


def test_the_norm_that_was_read_is_not_overwritten() -> None:
    params = parameters()
    opt = options(params, optim.AdamW)
    norms = []
    for step in range(4):
        set_grads(params, step)
        opt.step()
        norms.append(opt.grad_norm)
        expected = torch.stack([param.grad.double().square().sum() for param in params]).sum().sqrt()  # type: ignore[union-attr]
        torch.testing.assert_close(norms[-1], expected.float())
    assert len({float(norm) for norm in norms if norm is not None}) == 4


def test_a_sparse_gradient_is_noticed() -> None:
    params = parameters()
    opt = options(params, optim.AdamW)
    for step in range(3):
        set_grads(params, step)
        opt.step()
    before = values(opt, params)
    params[2].grad = params[2].grad.to_sparse()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="sparse gradients"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(values(opt, params), before, strict=True))


def both_ways(run: Callable[[Callable[[optim.Optimizer], None]], list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """Return what `run` returns where it leaves warm steps alone, and where each of its steps starts cold."""
    return [run(lambda opt: None), run(forget)]


@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_clip_that_comes_later(cls: Any, capturable: bool) -> None:
    def run(before_step: Callable[[optim.Optimizer], None]) -> list[torch.Tensor]:
        params = parameters()
        opt = cls(params, lr=0.1, weight_decay=0.1)
        opt.param_groups[0]["capturable"] = capturable
        for step, max_norm in enumerate((None, None, 0.1, None, 0.05, 0.05)):
            opt.max_grad_norm = max_norm
            set_grads(params, step)
            before_step(opt)
            opt.step()
        return [*values(opt, params), opt.grad_norm]

    warm, cold = both_ways(run)
    assert all(torch.equal(a, b) for a, b in zip(warm, cold, strict=True))
    assert warm[-1] > 1


@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD])
def test_a_rate_of_the_device_that_becomes_zero(cls: Any) -> None:
    params = parameters()
    opt = cls(params, lr=torch.tensor(0.1), weight_decay=0.1)
    opt.param_groups[0]["capturable"] = True
    for step in range(3):
        set_grads(params, step)
        opt.step()
    opt.param_groups[0]["lr"] = 0.0
    before = [param.detach().clone() for param in params]
    opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_the_seed_of_random_bits() -> None:
    def run(before_step: Callable[[optim.Optimizer], None]) -> list[torch.Tensor]:
        params = parameters()
        opt = optim.AdamW(params, lr=1e-4, master="split8")
        for step in range(6):
            opt.rounding_seed = step // 3
            set_grads(params, step)
            before_step(opt)
            opt.step()
        return values(opt, params)

    warm, cold = both_ways(run)
    assert all(torch.equal(a, b) for a, b in zip(warm, cold, strict=True))


def test_one_gradient_alone_and_released() -> None:
    """Both kinds of step have the same single parameter, whose gradients lie at different places."""

    def run(before_step: Callable[[optim.Optimizer], None]) -> list[torch.Tensor]:
        param = torch.nn.Parameter(torch.ones(4))
        opt = optim.SGD([param], lr=0.1)
        grad = torch.ones(4)
        for _ in range(2):
            param.grad = grad
            opt.step()
        param.grad = None
        with optim.release_gradients([param], opt):
            (param * torch.tensor([5.0, 6.0, 7.0, 8.0])).sum().backward()
        before_step(opt)
        param.grad = grad
        opt.step()
        return values(opt, [param])

    warm, cold = both_ways(run)
    assert all(torch.equal(a, b) for a, b in zip(warm, cold, strict=True))


def test_released_parameters_in_another_order() -> None:
    def run(before_step: Callable[[optim.Optimizer], None]) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
        opt = optim.SGD(params, lr=0.1)
        for i in range(4):
            (params[0].sum() + 10 * params[1].sum()).backward()
            if i == 2:
                opt.param_groups[0]["params"].reverse()
            before_step(opt)
            with optim.release_gradients(params, opt):
                (params[0].sum() + 10 * params[1].sum()).backward()
            opt.step()
        return values(opt, list(params))

    warm, cold = both_ways(run)
    assert all(torch.equal(a, b) for a, b in zip(warm, cold, strict=True))


@pytest.mark.parametrize("inside", [(0,), (1, 2), (0, 1, 2, 3)])
def test_inference_mode(inside: tuple[int, ...]) -> None:
    """A step may be made there, the first one too, and others outside of it."""
    runs = []
    for steps_inside in (inside, ()):
        params = parameters()
        opt = options(params, optim.AdamW)
        for step in range(4):
            set_grads(params, step)
            with torch.inference_mode(step in steps_inside):
                opt.step()
        runs.append(values(opt, params))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("how", ["values", "dicts", "all"])
def test_replaced_states_are_given_back(how: str) -> None:
    """Moving states to the host between two phases of training gives back the device's memory."""
    params = parameters()
    opt = options(params, optim.AdamW)
    for step in range(3):
        set_grads(params, step)
        opt.step()
    tensors = [value for state in opt.state.values() for name, value in state.items() if name != "step"]
    gone = [weakref.ref(tensor) for tensor in tensors]
    del tensors
    if how == "values":
        for state in opt.state.values():
            for name in state:
                state[name] = state[name].clone()
    elif how == "dicts":
        for param in list(opt.state):
            opt.state[param] = {name: value.clone() for name, value in opt.state[param].items()}
    else:
        opt.state.clear()
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    set_grads(params, 3)
    opt.step()


def test_a_parameter_that_moved_while_it_had_no_gradient_is_checked_again() -> None:
    """Into another's memory, before a set of gradients that was not there yet: it would be updated twice."""
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(4)]
    opt = optim.AdamW(params, lr=0.1)

    def step(*with_gradient: int) -> None:
        for i, param in enumerate(params):
            param.grad = torch.ones(4) if i in with_gradient else None
        opt.step()

    step(0, 1, 2, 3)
    step(0, 2)
    params[1].data = params[0].data
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match="memory"):
        step(0, 1)
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("overlap", [True, False], ids=["the same elements", "every other element"])
def test_parameters_that_share_memory_and_never_had_gradients_together(overlap: bool) -> None:
    """All are known by then, each from another set; those that only reach into each other's memory are updated."""
    memory = torch.ones(8)
    views = (memory[:5], memory[3:]) if overlap else (memory[::2], memory[1::2])
    params = [torch.nn.Parameter(view) for view in (*views, torch.ones(4))]
    opt = optim.AdamW(params, lr=0.1, fused=False)

    def step(*with_gradient: int) -> None:
        for i, param in enumerate(params):
            param.grad = torch.ones_like(param) if i in with_gradient else None
        opt.step()

    for i in (0, 1, 0, 1):
        step(i, 2)
    before = memory.clone()
    if not overlap:
        step(0, 1)
        assert (memory < before - 0.05).all()
        return
    with pytest.raises(ValueError, match="parameters 0 and 1 share memory"):
        step(0, 1)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("fused", [None, False])
def test_a_state_that_was_made_and_removed_begins_anew(fused: bool | None) -> None:
    """A step from before the state was made finds all other states as they were."""
    ours, theirs = ([torch.nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2))
    opt, torchs = optim.AdamW(ours, lr=0.1, fused=fused), torch.optim.AdamW(theirs, lr=0.1)
    for t, with_gradient in enumerate([(0,), (0,), (0, 1), (0, 1), (), (0,), (0, 1), (1,), (0, 1)]):
        if t == 4:
            del opt.state[ours[1]], torchs.state[theirs[1]]
        for i in range(2):
            ours[i].grad = torch.full((3,), t + 1.0) if i in with_gradient else None
            theirs[i].grad = torch.full((3,), t + 1.0) if i in with_gradient else None
        opt.step()
        torchs.step()
        torch.testing.assert_close(ours, theirs)
        for p, q in zip(ours, theirs, strict=True):
            assert opt.state.get(p, {}).get("step") == torchs.state.get(q, {}).get("step")


def test_a_state_that_was_put_back_counts_on() -> None:
    """The other parameter's step lays all numbers anew while the state is out, and a release repeats steps of one."""
    ours, theirs = ([torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2)] for _ in range(2))
    opt, torchs = optim.AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for t, n in enumerate((2, 2, 2, 1, 2, 2)):
        if n == 1:
            taken = opt.state.pop(ours[1]), torchs.state.pop(theirs[1])
            ours[0].data = ours[0].data.clone()  # so that its step is built again
        elif t == 4:
            opt.state[ours[1]], torchs.state[theirs[1]] = taken
        with optim.release_gradients(ours, opt):
            torch.stack([((t + 1) * p).sum() for p in ours[:n]]).sum().backward()
            opt.step()
        torch.stack([((t + 1) * p).sum() for p in theirs[:n]]).sum().backward()
        torchs.step()
        torchs.zero_grad()
        torch.testing.assert_close(ours, theirs)
    assert opt.state[ours[1]]["step"] == torchs.state[theirs[1]]["step"] == 5


@pytest.mark.parametrize("fused", [None, False])
def test_a_wrong_state_that_was_put_back_is_refused(fused: bool | None) -> None:
    """A step beside the wrong one is repeated; that a right one was found complete meanwhile says nothing of it."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = optim.AdamW(params, fused=fused)

    def step(n: int) -> None:
        for i, p in enumerate(params):
            p.grad = torch.ones(3) if i < n else None
        opt.step()

    step(2)
    state = opt.state[params[1]]
    right, wrong = state["exp_avg"], torch.zeros(2)
    for exp_avg, steps in ((wrong, (1, 1)), (right, (2, 2, 0)), (wrong, (1,))):
        state["exp_avg"] = exp_avg
        for n in steps:
            step(n)
    before = params[1].detach().clone()
    with pytest.raises(ValueError, match=r"parameter 1: state of shape \(2,\)"):
        step(2)
    assert torch.equal(params[1], before)
