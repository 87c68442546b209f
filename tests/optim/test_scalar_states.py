"""The numbers that a state shows: whatever tensor stands there is read, and counts on, as torch's does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from tests.support.world import forks
from tritopt import optim

State = dict[str, Any]


def _share(state: State, name: str) -> None:
    state[name].share_memory_()


def _other_memory(state: State, name: str) -> None:
    state[name].data = state[name].data.clone() + 2


def _swap(state: State, name: str) -> None:
    torch.utils.swap_tensors(state[name], state[name].clone() + 3)


def _set_memory(state: State, name: str) -> None:
    state[name].set_(torch.full((), 11.0))


def _assign(state: State, name: str) -> None:
    state[name] = state[name] + 5


def _fill_unseen(state: State, name: str) -> None:
    state[name].data.fill_(9.0)


def _through_numpy(state: State, name: str) -> None:
    state[name].numpy()[...] = 9.0


def _shared_tensor(state: State, name: str) -> None:
    state[name] = state[name].clone().share_memory_()


def _of_numpy(state: State, name: str) -> None:
    state[name] = torch.from_numpy(np.array(7.0, dtype=np.float32))


def _nothing(state: State, name: str) -> None:
    """Leave the number as it is."""


WRITES: dict[str, Callable[[State, str], None]] = {
    "nothing": _nothing,
    "shared": _share,
    "data replaced": _other_memory,
    "swapped": _swap,
    "memory set": _set_memory,
    "assigned": _assign,
    "filled through data": _fill_unseen,
    "written through numpy": _through_numpy,
    "shared tensor assigned": _shared_tensor,
    "numpy's memory assigned": _of_numpy,
}


def train(make: Any, write: Callable[[State, str], None], name: str, device_numbers: bool = False) -> list[Any]:
    """Weights and numbers after each of some steps, of which only some parameters take part."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(3)]
    opt = make(params)
    history: list[Any] = []
    for step in range(7):
        generator = torch.Generator().manual_seed(step)
        for i, param in enumerate(params):
            grad = torch.randn(3, 2, generator=generator)
            param.grad = None if step == 4 and i == 1 else grad
        if step in (2, 5):
            write(opt.state[params[0]], name)
            write(opt.state[params[2]], name)
        opt.step()
        numbers = [float(opt.state[param][name]) for param in params]
        history.append((numbers, torch.cat([param.detach().clone() for param in params])))
    saved = copy.deepcopy(opt.state_dict())["state"]
    assert [float(saved[i][name]) for i in range(3)] == history[-1][0]
    return history


COUNTS = [("AdamW", "step"), ("NAdam", "step"), ("Adagrad", "step"), ("RAdam", "step")]
CASES = [(*case, write) for case in COUNTS for write in WRITES]
# Numbers that a product of factors below 1 can have.
CASES += [("NAdam", "mu_product", write) for write in ("nothing", "shared", "shared tensor assigned")]


@pytest.mark.parametrize(("name", "number", "write"), CASES)
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"capturable": True, "fused": False}], ids=str)
def test_numbers_count_as_torchs_do(write: str, name: str, number: str, options: dict[str, Any]) -> None:
    theirs = train(lambda params: getattr(torch.optim, name)(params, foreach=False), WRITES[write], number)
    ours = train(lambda params: getattr(optim, name)(params, **options), WRITES[write], number)
    for (expected, expected_weights), (actual, weights) in zip(theirs, ours, strict=True):
        assert actual == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "value", [4, 4.0, np.float32(4), torch.tensor([4.0]), torch.tensor(4), torch.tensor(4.0).double()], ids=str
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_count_of_any_kind_is_taken_up(value: Any, is_first: bool) -> None:
    value = copy.deepcopy(value)
    param = torch.nn.Parameter(torch.ones(3))
    opt = optim.AdamW([param])
    param.grad = torch.ones(3)
    if is_first:
        opt.state[param].update(step=value, exp_avg=torch.zeros(3), exp_avg_sq=torch.zeros(3))
    else:
        for _ in range(3):
            opt.step()
        opt.state[param]["step"] = value
    for _ in range(3):
        opt.step()
    assert float(opt.state[param]["step"]) == 7
    assert float(copy.deepcopy(opt).state_dict()["state"][0]["step"]) == 7


def test_who_holds_a_count_sees_it_count() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    opt = optim.AdamW([param])
    count = torch.zeros(1)
    opt.state[param].update(step=count, exp_avg=torch.zeros(3), exp_avg_sq=torch.zeros(3))
    for _ in range(3):
        param.grad = torch.ones(3)
        opt.step()
    assert opt.state[param]["step"] is count
    assert count.tolist() == [3.0]


def _steps(param: torch.Tensor, opt: torch.optim.Optimizer) -> None:
    for _ in range(3):
        param.grad = torch.ones_like(param)
        opt.step()


@pytest.mark.parametrize("name", ["Adam", "NAdam", "Adagrad"])
@pytest.mark.parametrize("when", ["before the first step", "after some"])
def test_processes_count_in_one_tensor(name: str, when: str) -> None:
    """Training in several processes, as Hogwild and A3C have it: one after the other, so that the result is known."""
    results = []
    for module, options in ((torch.optim, {"foreach": False}), (optim, {}), (optim, {"fused": False})):
        param = torch.nn.Parameter(torch.ones(4))
        param.share_memory_()
        opt = getattr(module, name)([param], lr=0.1, **options)
        param.grad = torch.ones_like(param)
        if when == "after some":
            opt.step()
            opt.step()
        elif name != "Adagrad":
            opt.state[param].update(step=torch.zeros(()), exp_avg=torch.zeros(4), exp_avg_sq=torch.zeros(4))
            if name == "NAdam":
                opt.state[param]["mu_product"] = torch.ones(())
        for value in opt.state[param].values():
            value.share_memory_()
        for _ in range(2):
            worker = mp.get_context("fork").Process(target=_steps, args=(param, opt))
            worker.start()
            worker.join()
            assert worker.exitcode == 0
        results.append((float(opt.state[param]["step"]), param.detach().clone()))
    assert [count for count, _ in results] == [6.0 + 2 * (when == "after some")] * 3
    for _, weight in results[1:]:
        torch.testing.assert_close(weight, results[0][1])


def _read(queue: Any, is_done: Any) -> None:
    queue.get()
    is_done.set()


def test_a_state_dict_that_was_sent_to_another_process() -> None:
    """Sending moves the counts' memory, and frees what they were in."""
    context = forks()
    queue, is_done = context.Queue(), context.Event()
    model = torch.nn.Linear(64, 64)
    opt = optim.AdamW(model.parameters(), lr=1e-3)
    process = context.Process(target=_read, args=(queue, is_done))
    process.start()
    for step in range(6):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        opt.step()
        if step == 2:
            queue.put(opt.state_dict())
            assert is_done.wait(60)
            process.join()
            assert all(state["step"].is_shared() for state in opt.state.values())
    assert {float(state["step"]) for state in opt.state.values()} == {6.0}


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"capturable": True}], ids=str)
def test_random_bits_differ_beyond_the_counts_that_fp32_holds(options: dict[str, Any]) -> None:
    """fp32 numbers above 2^24 are even: steps are counted beside them."""
    param = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    opt = optim.SGD([param], lr=1.0, master="stochastic", **options)
    param.grad = torch.full_like(param, -(2.0**-11))
    opt.step()
    for count in (10.0, 2.0**24):
        with torch.no_grad():
            param.fill_(1.0)
        opt.state[param]["step"].fill_(count)
        for _ in range(16):
            opt.step()
        # Each step adds 2^-11, a sixteenth of a bf16 number's distance to the next: 16 independent draws.
        spread = float(param.detach().double().std()) / 2.0**-7
        assert spread == pytest.approx((16 * 1 / 16 * 15 / 16) ** 0.5, rel=0.1)
        assert float(opt.state[param]["step"]) == count + 16
